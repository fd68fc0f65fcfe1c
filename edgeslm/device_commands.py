"""The commands about a device that is not this one, and about making a profile of this one: fit, device."""

from __future__ import annotations

from pathlib import Path

import click

from edgeslm.options import emit, json_option


@click.command()
@click.argument("model")
@click.option("--device", help="A profile of `edgeslm devices`, or a .toml file.  [default: all of them]")
@click.option("--scheme", help="As quantizing to this scheme would make it.  [default: as it is]")
@click.option(
    "-c",
    "--context",
    type=click.IntRange(min=1),
    default=2048,
    show_default=True,
    help="Tokens that the KV cache holds.",
)
@click.option(
    "-p",
    "--prompt-tokens",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    help="Tokens of prompt before the first token.",
)
@json_option
def fit(
    *, model: str, device: str | None, scheme: str | None, context: int, prompt_tokens: int, as_json: bool
) -> None:
    """Predict memory and speed of MODEL, a bundle, a file or a model source, on a device.

    Without --device: all profiles and schemes in a table.  Exits with 1 when it does not fit the device.

    \b
    Example:  edgeslm fit smollm2-q4 --device rpi5-8gb --context 4096
              edgeslm fit HuggingFaceTB/SmolLM2-135M-Instruct
    """  # fmt: skip
    from edgeslm import console_fit, prediction

    record = prediction.fit(model, device, context=context, prompt_tokens=prompt_tokens, scheme=scheme)
    emit(record, as_json, console_fit.fit_text)
    prediction.raise_for_fit(record)


@click.command()
@click.argument("action", type=click.Choice(["probe"]))
@click.option("--name", default="my-machine", show_default=True, help="Name of the profile.")
@click.option(
    "--directory",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Where models lie: its storage is measured.  [default: here]",
)
@json_option
def device(*, action: str, name: str, directory: Path | None, as_json: bool) -> None:
    """Measure this machine in a few seconds (ACTION probe) and print a profile of it.

    \b
    Example:  edgeslm device probe > devices/my.toml
              edgeslm device probe --name my-board --directory models > my-board.toml
    """  # fmt: skip
    from edgeslm.probing import measure_profile

    assert action == "probe"
    emit(measure_profile(name, directory), as_json, lambda record: str(record["profile"]))
