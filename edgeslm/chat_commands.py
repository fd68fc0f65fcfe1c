"""The commands that talk to a model: run (which is chat with one message in the command), chat and generate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from edgeslm.options import ARTIFACT, SSH, json_option, on_option, runner_options, sampling_options

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@click.argument("artifact", type=ARTIFACT)
@click.argument("message", required=False)
@click.option("--system", help="The system message.")
@click.option("-t", "--threads", type=click.IntRange(min=1), help="Threads of the engine.")
@sampling_options
@runner_options
@on_option(multiple=False)
@json_option
def chat(
    artifact: Path, message: str | None, system: str | None, on: str | None, as_json: bool, **options: Any
) -> None:
    """Talk to ARTIFACT with its own chat template; MESSAGE, or what a pipe holds, is answered once.

    \b
    Example:  edgeslm chat smollm2-q4
              edgeslm run smollm2-q4 "What is a list comprehension?"
              echo "What is a list comprehension?" | edgeslm chat smollm2-q4 --temperature 0
              edgeslm chat smollm2-q4 --on pi@raspberrypi.local
    """
    access = {key: options.pop(key) for key in SSH}
    if on is not None:
        from edgeslm.fleet_commands import run_on

        run_on(artifact, on, "chat", [] if message is None else ["--", message], access)
        return
    from edgeslm.runtime.chat import chat_session

    chat_session(artifact, message, system=system, as_json=as_json, **options)


run = click.Command("run", params=chat.params, callback=chat.callback, help=chat.help)


@click.command()
@click.argument("artifact", type=ARTIFACT)
@click.argument("prompt", required=False)
@click.option("-t", "--threads", type=click.IntRange(min=1), help="Threads of the engine.")
@sampling_options
@runner_options
@on_option(multiple=False)
@json_option
def generate(artifact: Path, prompt: str | None, on: str | None, as_json: bool, **options: Any) -> None:
    """Continue PROMPT (or standard input) with no chat template.

    \b
    Example:  edgeslm generate smollm2-q4 "The capital of France is" --temperature 0 -n 16
    """
    access = {key: options.pop(key) for key in SSH}
    if on is not None:
        from edgeslm.fleet_commands import run_on

        run_on(artifact, on, "generate", [] if prompt is None else ["--", prompt], access)
        return
    from edgeslm.runtime.chat import generate_once

    generate_once(artifact, prompt, as_json=as_json, **options)
