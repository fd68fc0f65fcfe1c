"""The command that answers over HTTP: serve."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from edgeslm.options import ARTIFACT, runner_options


@click.command()
@click.argument("artifact", type=ARTIFACT)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8080, show_default=True, help="0: any free one."
)
@click.option(
    "--api-key-file",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="File with the keys that may ask, one a line.",
)
@click.option(
    "--queue", type=click.IntRange(min=0), default=8, show_default=True,
    help="Requests that may wait; more get the status 429.",
)  # fmt: skip
@click.option(
    "--max-prompt-tokens", type=click.IntRange(min=1), help="Longest prompt.  [default: the context]"
)
@click.option(
    "--max-body-bytes", type=click.IntRange(min=1024), default=4 * 2**20, show_default=True,
    help="Largest request.",
)  # fmt: skip
@click.option("--systemd", is_flag=True, help="Print a systemd unit that runs this command, and end.")
@click.option("-t", "--threads", type=click.IntRange(min=1), help="Threads of the engine.")
@runner_options
def serve(
    *,
    artifact: Path,
    host: str,
    port: int,
    api_key_file: Path | None,
    queue: int,
    max_prompt_tokens: int | None,
    max_body_bytes: int,
    systemd: bool,
    **options: Any,
) -> None:
    """Answer over HTTP with ARTIFACT, in the words of OpenAI's API; a page to chat in is at /.

    \b
    Example:  edgeslm serve smollm2-q4 --port 8080
              edgeslm serve smollm2-q4 --host 0.0.0.0 --api-key-file keys.txt --queue 4
    """
    if systemd:
        click.echo(_unit(click.get_current_context()), nl=False)
        return
    from edgeslm import __version__
    from edgeslm.bundle import open_bundle
    from edgeslm.runtime.runner import RunnerOptions
    from edgeslm.runtime.serving import close_service, is_loopback, open_service, run

    service = open_service(
        open_bundle(artifact), RunnerOptions(**options), queue=queue, max_prompt_tokens=max_prompt_tokens,
        max_body_bytes=max_body_bytes, api_key_file=api_key_file, host=host, version=__version__,
    )  # fmt: skip
    if not is_loopback(host) and api_key_file is None:
        click.echo(
            f"warning: everyone who reaches {host} can use this model: give an --api-key-file", err=True
        )
    try:
        run(service, host, port, ready=lambda url: click.echo(f"{service.name} answers at {url}", err=True))
    finally:
        close_service(service)


def _unit(context: click.Context) -> str:
    """The systemd unit of this very command."""
    from edgeslm.bundle import open_bundle
    from edgeslm.runtime.serving import is_loopback
    from edgeslm.runtime.systemd import arguments_of, unit

    values = context.params
    left_out = ("artifact", "systemd", "api_key_file")
    options = [
        one for one in context.command.params if isinstance(one, click.Option) and one.name not in left_out
    ]
    given = {}
    for option in options:
        source = context.get_parameter_source(str(option.name))
        if source is not click.core.ParameterSource.DEFAULT:
            long = next((name for name in option.opts if name.startswith("--")), option.opts[0])
            value = values[str(option.name)]
            given[long] = (
                {None: "auto", True: "on", False: "off"}[value] if long == "--flash-attention" else value
            )
    bundle = open_bundle(values["artifact"])
    return unit(
        values["artifact"], arguments_of(given, {}), name=bundle.name, loopback=is_loopback(values["host"]),
        key_file=values["api_key_file"],
    )  # fmt: skip
