"""The command line.  Each command is a doorway: parse, one call, echo.

Modules load inside the command that needs them, so that `edgeslm --help` is instant and the
device half never sees torch.  Every command takes --json: one JSON document on standard output,
as its last line, and nothing else there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeslm import __version__
from edgeslm.options import (
    ARTIFACT,
    json_option,
    runner_options,
    sampling_options,
    split_numbers,
    split_types,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from edgeslm.progress import Progress


def main() -> None:
    """Entry point: runs the command and turns the errors meant for the user into one clear message."""
    from edgeslm.errors import EdgeslmError

    try:
        cli.main(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; run the same command again to go on", err=True)
        sys.exit(130)
    except EdgeslmError as error:
        click.echo(f"error: {error.message}", err=True)
        if error.hint:
            click.echo(f"  try: {error.hint}", err=True)
        sys.exit(error.exit_code)
    except OSError as error:
        click.echo(f"error: {error.strerror or error}: {error.filename or 'no file named'}", err=True)
        sys.exit(2)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="edgeslm")
def cli() -> None:
    """Take a small language model to an edge device, and prove that it still works there.

    \b
    Start here:  edgeslm init MODEL > my.toml, then edgeslm build my.toml --out my-bundle
    Completion:  eval "$(_EDGESLM_COMPLETE=bash_source edgeslm)"   (or zsh_source, fish_source)
    """


def progress_for(as_json: bool) -> Progress:
    from edgeslm.progress import Quiet, for_terminal

    return Quiet() if as_json else for_terminal()


def emit(record: Mapping[str, Any], as_json: bool, render: Callable[[Mapping[str, Any]], str]) -> None:
    """Print a record: as JSON for machines or as text for people."""
    click.echo(json.dumps(record, ensure_ascii=False, allow_nan=False) if as_json else render(record))


@cli.command()
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Bundle directory to create.")
@click.option(
    "--work", type=click.Path(path_type=Path), help="Where stages keep results.  [default: OUT.work]"
)
@click.option("--force", multiple=True, metavar="STAGE", help="Run STAGE again even if its result is there.")
@json_option
def build(recipe: Path, out: Path, work: Path | None, force: tuple[str, ...], as_json: bool) -> None:
    """Build a measured, deployable bundle from RECIPE.

    A stage whose inputs have not changed is skipped, so an interrupted build goes on where it
    stopped.  A missed gate exits with 1, keeps the bundle and names the bound.

    \b
    Example:  edgeslm build recipes/quickstart.toml --out smollm2-q4
    """
    from edgeslm import console, pipeline
    from edgeslm.recipe import load_recipe

    result = pipeline.build(load_recipe(recipe), out, work=work, force=force, progress=progress_for(as_json))
    emit(result, as_json, console.build_text)
    pipeline.raise_for_gate(result)


@cli.command()
@click.argument("model")
@click.option("--to", "format_", type=click.Choice(["gguf"]), default="gguf", show_default=True)
@click.option("--scheme", default="Q4_K_M", show_default=True, help="A preset or a tensor type.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="A .gguf file, or a bundle directory to create.",
)
@click.option(
    "--calibration",
    metavar="TEXT",
    help="Text, JSONL or chat JSONL to measure importance on; or an "
    "importance matrix that llama-imatrix or edgeslm wrote.",
)
@click.option(
    "--type",
    "types",
    multiple=True,
    metavar="REGEX=TYPE",
    callback=split_types,
    help="Type of the tensors whose name matches; the first match counts.",
)
@click.option(
    "--keep-going", is_flag=True, help="Write what can be written when a tensor has NaN or infinity."
)
@json_option
def quantize(
    *,
    model: str,
    format_: str,
    scheme: str,
    out: Path,
    calibration: str | None,
    types: dict[str, str],
    keep_going: bool,
    as_json: bool,
) -> None:
    """Quantize MODEL in one pass, with no recipe.

    MODEL is a Hugging Face directory or hub id (id@revision), a .gguf file, a PEFT adapter, or
    pkg://package/path.

    \b
    Example:  edgeslm quantize ./my-model --scheme Q4_K_M --calibration domain.txt --out my-model.gguf
    """  # fmt: skip
    from edgeslm import console, pipeline

    result = pipeline.quantize(
        model, out, format=format_, scheme=scheme, calibration=calibration, types=types,
        keep_going=keep_going, progress=progress_for(as_json),
    )  # fmt: skip
    emit(result, as_json, console.quantize_text)


@cli.command(short_help="Show contents, memory and traps of a model.")
@click.argument("model")
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option(
    "-c",
    "--context",
    type=click.IntRange(min=1),
    default=2048,
    show_default=True,
    help="Context in tokens to estimate memory for.",
)
@click.option("--verify", is_flag=True, help="Check the hash of every file of a bundle.")
@json_option
def inspect(model: str, tensors: bool, context: int, verify: bool, as_json: bool) -> None:
    """Show what a file, bundle or model holds, what memory it needs, and the traps in it.

    \b
    Example:  edgeslm inspect smollm2-q4 --verify --context 4096
    """  # fmt: skip
    from edgeslm import console
    from edgeslm.inspection import inspect_model

    record = inspect_model(model, context=context, verify=verify)
    emit(record, as_json, lambda value: console.inspect_text(value, tensors=tensors))


@cli.command("eval", short_help="Measure the quality of ARTIFACT through its runtime.")
@click.argument("artifact", type=ARTIFACT)
@click.option("--reference", metavar="MODEL", help="The model before quantization: any model source.")
@click.option("--text", "texts", multiple=True, required=True, metavar="FILE", help="Held-out text or JSONL.")
@click.option(
    "-c",
    "--context",
    type=click.IntRange(min=16),
    default=512,
    show_default=True,
    help="Tokens in a window; the second half of each is scored.",
)
@click.option("--max-tokens", type=click.IntRange(min=1), help="Stop after about so many tokens of text.")
@click.option("-t", "--threads", type=click.IntRange(min=1), help="Threads of the engine.")
@click.option("--out", type=click.Path(path_type=Path), help="Also write the record to this file.")
@json_option
def evaluate(
    *,
    artifact: Path,
    reference: str | None,
    texts: tuple[str, ...],
    context: int,
    max_tokens: int | None,
    threads: int | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Measure the quality of ARTIFACT, a bundle or a .gguf file, through the runtime that ships.

    \b
    Example:  edgeslm eval smollm2-q4 --reference HuggingFaceTB/SmolLM2-135M-Instruct --text heldout.txt
    """  # fmt: skip
    from edgeslm import console, pipeline

    record = pipeline.evaluate(
        artifact, texts, reference=reference, context=context, max_tokens=max_tokens, threads=threads,
        progress=progress_for(as_json),
    )  # fmt: skip
    _save(record, out)
    emit(record, as_json, console.quality_text)


@cli.command(short_help="Measure speed and memory on this machine.")
@click.argument("artifact", type=ARTIFACT)
@click.option(
    "-p",
    "--prompt-tokens",
    callback=split_numbers,
    default="512",
    show_default=True,
    help="Prefill lengths, as a list.",
)
@click.option(
    "-n",
    "--decode-tokens",
    callback=split_numbers,
    default="128",
    show_default=True,
    help="Decode lengths, as a list.",
)
@click.option(
    "-t", "--threads", callback=split_numbers, help="Thread counts, as a list.  [default: the cores]"
)
@click.option("-r", "--repetitions", type=click.IntRange(min=1), default=5, show_default=True)
@runner_options
@click.option("--out", type=click.Path(path_type=Path), help="Also write the record to this file.")
@json_option
def bench(
    *,
    artifact: Path,
    prompt_tokens: tuple[int, ...],
    decode_tokens: tuple[int, ...],
    threads: tuple[int, ...],
    repetitions: int,
    out: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure speed and memory of ARTIFACT on this machine.

    \b
    Example:  edgeslm bench smollm2-q4 -p 128,512 -n 64 -t 1,2,4
    """  # fmt: skip
    from edgeslm import console
    from edgeslm.bench.measure import bench_artifact
    from edgeslm.runtime.runner import RunnerOptions

    record = bench_artifact(
        artifact, prompt_tokens=prompt_tokens, decode_tokens=decode_tokens, threads=threads,
        repetitions=repetitions, options=RunnerOptions(**options), progress=progress_for(as_json),
    )  # fmt: skip
    _save(record, out)
    emit(record, as_json, console.bench_text)


@cli.command(short_help="Talk to ARTIFACT; a pipe is read as one message.")
@click.argument("artifact", type=ARTIFACT)
@click.option("--system", help="The system message.")
@click.option("-t", "--threads", type=click.IntRange(min=1), help="Threads of the engine.")
@sampling_options
@runner_options
@json_option
def chat(artifact: Path, system: str | None, as_json: bool, **options: Any) -> None:
    """Talk to ARTIFACT with its own chat template; a pipe is read as one message.

    \b
    Example:  edgeslm chat smollm2-q4
              echo "What is a list comprehension?" | edgeslm chat smollm2-q4 --temperature 0
    """
    from edgeslm.runtime.chat import chat_session

    chat_session(artifact, system=system, as_json=as_json, **options)


@cli.command(short_help="Continue a prompt, with no chat template.")
@click.argument("artifact", type=ARTIFACT)
@click.argument("prompt", required=False)
@click.option("-t", "--threads", type=click.IntRange(min=1), help="Threads of the engine.")
@sampling_options
@runner_options
@json_option
def generate(artifact: Path, prompt: str | None, as_json: bool, **options: Any) -> None:
    """Continue PROMPT (or standard input) with no chat template.

    \b
    Example:  edgeslm generate smollm2-q4 "The capital of France is" --temperature 0 -n 16
    """
    from edgeslm.runtime.chat import generate_once

    generate_once(artifact, prompt, as_json=as_json, **options)


@cli.command(short_help="Put results side by side: JSON, Markdown, HTML.")
@click.argument("results", type=click.Path(exists=True, path_type=Path), nargs=-1, required=True)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("report"),
    show_default=True,
    help="Directory, or a file that ends in .html, .md or .json.",
)
@json_option
def report(results: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Put RESULTS (bundles, bench and eval records) side by side as JSON, Markdown and HTML.

    \b
    Example:  edgeslm report smollm2-q4 smollm2-q8 --out comparison
    """  # fmt: skip
    from edgeslm import console
    from edgeslm.bench.report import write_report

    emit(write_report(results, out), as_json, console.paths_text)


@cli.command(short_help="Show what this machine has and what is missing.")
@json_option
def doctor(as_json: bool) -> None:
    """Show what this machine has and what to install for what is missing.

    \b
    Example:  edgeslm doctor
    """
    from edgeslm import console
    from edgeslm.doctor import diagnose

    emit(diagnose(), as_json, console.doctor_text)


@cli.command()
@click.argument("model")
@click.option("--device", default="x86-64-laptop", show_default=True, help="A profile of `edgeslm devices`.")
@click.option("--out", type=click.Path(path_type=Path), help="Recipe file to create.  [default: print it]")
@json_option
def init(model: str, device: str, out: Path | None, as_json: bool) -> None:
    """Write a commented recipe for MODEL.

    \b
    Example:  edgeslm init HuggingFaceTB/SmolLM2-135M-Instruct --device rpi5-8gb --out chat.toml
    """
    from edgeslm.device import load_device
    from edgeslm.recipe import recipe_template, write_template

    load_device(device)  # an unknown profile is an error before anything is written
    text = recipe_template(model, device)
    if out is not None:
        write_template(text, out)
    emit(
        {"recipe": text, "path": str(out) if out else None},
        as_json,
        lambda _: f"wrote {out}" if out else text,
    )


@cli.command(short_help="List the device profiles, or show one.")
@click.argument("name", required=False)
@json_option
def devices(name: str | None, as_json: bool) -> None:
    """List the device profiles, or show one with the source of every value.

    \b
    Example:  edgeslm devices rpi5-8gb
    """
    from edgeslm import console
    from edgeslm.device import describe_devices

    emit(describe_devices(name), as_json, console.devices_text)


def _save(record: Mapping[str, Any], out: Path | None) -> None:
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(
            json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8"
        )
