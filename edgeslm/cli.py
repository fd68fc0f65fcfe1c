"""The command line.  Each command is a doorway: parse, one call, echo.

Modules load inside the command that needs them, so that `edgeslm --help` is instant and the
device half never sees torch.  Every command but serve takes --json: one JSON document on standard output,
as its last line, and nothing else there.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from edgeslm import __version__
from edgeslm.options import (
    ARTIFACT,
    SSH,
    LazyCommand,
    emit,
    json_option,
    on_option,
    processes_option,
    progress_for,
    runner_options,
    save,
    split_numbers,
    split_rates,
)

ELSEWHERE = {
    "edgeslm.quantize_commands": {"quantize": "Quantize MODEL in one pass, with no recipe."},
    "edgeslm.training_commands": {
        "finetune": "Train a model on a domain's own data.",
        "prune": "Cut layers, widths or tokens that matter least.",
        "distill": "Teach a smaller model what a larger one knows.",
    },
    "edgeslm.setup_commands": {
        "doctor": "Show what this machine has and what is missing.",
        "init": "Write a commented recipe for MODEL.",
        "devices": "List the device profiles, or show one.",
    },
    "edgeslm.device_commands": {
        "fit": "Predict memory and speed of MODEL on a device.",
        "device": "Measure this machine for a profile of its own.",
    },
    "edgeslm.chat_commands": {
        "chat": "Talk to ARTIFACT; a pipe is read as one message.",
        "run": "Answer one message, or talk: the same as chat.",
        "generate": "Continue a prompt, with no chat template.",
    },
    "edgeslm.serve_commands": {"serve": "Answer over HTTP, in the words of OpenAI's API."},
    "edgeslm.fleet_commands": {"deploy": "Copy ARTIFACT to devices over SSH and switch to it."},
    "edgeslm.wheelhouse_commands": {"wheelhouse": "Gather wheels for an Arm device without a network."},
    "edgeslm.predict_commands": {
        "classify": "Classify texts: a text, a file or a pipe in, JSON lines out.",
        "predict": "Score windows of sensor readings: P(E|D), posterior, alarm.",
    },
}
"""Modules with further commands, and what the list of commands says of each."""


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


@cli.command()
@click.argument("recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Bundle directory to create.")
@click.option(
    "--work", type=click.Path(path_type=Path), help="Where stages keep results.  [default: OUT.work]"
)
@click.option("--force", multiple=True, metavar="STAGE", help="Run STAGE again even if its result is there.")
@processes_option
@json_option
def build(
    *, recipe: Path, out: Path, work: Path | None, force: tuple[str, ...], processes: int, as_json: bool
) -> None:
    """Build a measured, deployable bundle from RECIPE.

    A stage whose inputs have not changed is skipped, so an interrupted build goes on where it
    stopped.  A missed gate exits with 1, keeps the bundle and names the bound.

    \b
    Example:  edgeslm build recipes/quickstart.toml --out smollm2-q4
    """
    from edgeslm import console, gate, pipeline
    from edgeslm.recipe import load_recipe

    result = pipeline.build(
        load_recipe(recipe), out, work=work, force=force, processes=processes, progress=progress_for(as_json)
    )
    if result is not None:  # one of several processes tells
        emit(result, as_json, console.build_text)
        gate.raise_for_gate(result)


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
@click.option(
    "--text",
    "texts",
    multiple=True,
    required=True,
    metavar="FILE",
    help="Held-out text, or a labelled table.",
)
@click.option(
    "--prior",
    multiple=True,
    metavar="CLASS=RATE",
    callback=split_rates,
    help="Base rate where it is deployed.",
)
@click.option(
    "--cost",
    "costs",
    multiple=True,
    metavar="CLASS=COST",
    callback=split_rates,
    help="Cost of missing a class.",
)
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
    prior: dict[str, float],
    costs: dict[str, float],
    context: int,
    max_tokens: int | None,
    threads: int | None,
    out: Path | None,
    as_json: bool,
) -> None:
    """Measure the quality of ARTIFACT, a bundle or a .gguf file, through the runtime that ships.

    A language model is compared with --reference on text; a classifier or a sensor model with the labels
    of a table, for the base rates and costs of its bundle or those of --prior and --cost.

    \b
    Example:  edgeslm eval smollm2-q4 --reference HuggingFaceTB/SmolLM2-135M-Instruct --text heldout.txt
              edgeslm eval bearing --text week-12.csv --prior failure=0.01 --cost failure=50
    """  # fmt: skip
    from edgeslm import console, pipeline

    record = pipeline.evaluate(
        artifact, texts, reference=reference, prior=prior, costs=costs, context=context, max_tokens=max_tokens,
        threads=threads, progress=progress_for(as_json),
    )  # fmt: skip
    save(record, out)
    emit(record, as_json, console.quality_text)


@cli.command(short_help="Measure speed and memory on this machine.")
@click.argument("artifact", type=ARTIFACT)
@click.option(
    "-p",
    "--prompt-tokens",
    callback=split_numbers,
    help="Prefill lengths, or those of a classifier's texts, as a list.  [default: 512; texts: as long as is read]",
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
@click.option(
    "--batch-sizes",
    callback=split_numbers,
    default="1",
    show_default=True,
    help="Classifiers: examples in a call.",
)
@click.option(
    "--minutes",
    type=click.FloatRange(min=0, min_open=True),
    help="Then go on for so long: the speed that lasts.",
)
@click.option(
    "--power-log",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="A power meter's log of that time, as CSV, or what powermetrics prints.",
)
@runner_options
@on_option(multiple=True)
@click.option("--out", type=click.Path(path_type=Path), help="Also write the record to this file.")
@json_option
def bench(
    *,
    artifact: Path,
    prompt_tokens: tuple[int, ...],
    decode_tokens: tuple[int, ...],
    threads: tuple[int, ...],
    repetitions: int,
    batch_sizes: tuple[int, ...],
    minutes: float | None,
    power_log: Path | None,
    on: tuple[str, ...],
    out: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure speed and memory of ARTIFACT on this machine, or on the devices of --on.

    A language model's prefill and decode; a classifier's latency and throughput for each of --batch-sizes.
    With --power-log, ARTIFACT may be a record of an earlier benchmark: it gets the energy that the log tells.

    \b
    Example:  edgeslm bench smollm2-q4 -p 128,512 -n 64 -t 1,2,4
              edgeslm bench smollm2-q4 --minutes 10
              edgeslm bench bearing --batch-sizes 1,64 -t 1
              edgeslm bench smollm2-q4 --on pi4 --on pi5 --out comparison
    """  # fmt: skip
    access = {key: options.pop(key) for key in SSH}
    if on and power_log is not None:
        raise click.UsageError(
            "--power-log goes with a record of --on: edgeslm bench RECORD.json --power-log FILE"
        )
    if on:
        from edgeslm.fleet_commands import bench_on

        bench_on(artifact, on, access, out=out, as_json=as_json)
        return
    from edgeslm import console
    from edgeslm.bench.classify_bench import bench_classifier
    from edgeslm.bench.measure import bench_artifact
    from edgeslm.bench.power_log import attach, measure_again, read_log
    from edgeslm.bundle import open_bundle
    from edgeslm.runtime.runner import RunnerOptions

    shared: dict[str, Any] = {
        "threads": threads, "repetitions": repetitions, "minutes": minutes, "progress": progress_for(as_json)
    }  # fmt: skip
    if power_log is not None and artifact.suffix == ".json":
        record = measure_again(artifact, power_log)
    elif open_bundle(artifact).is_classifier:
        record = bench_classifier(artifact, batch_sizes=batch_sizes, tokens=prompt_tokens, **shared)
    else:
        record = bench_artifact(
            artifact, prompt_tokens=prompt_tokens or (512,), decode_tokens=decode_tokens, **shared,
            options=RunnerOptions(**options),
        )  # fmt: skip
    save(record, out)
    if power_log is not None and artifact.suffix != ".json":  # a log that fails costs no measurement
        record = attach(record, read_log(power_log))
        save(record, out)
    emit(record, as_json, console.bench_text)


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


for module, commands in ELSEWHERE.items():
    for name, text in commands.items():
        cli.add_command(LazyCommand(name, module, text))
