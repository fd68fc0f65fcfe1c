"""The commands that make a checkpoint: finetune, prune, distill.  Their options are the recipe's keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeslm import specs
from edgeslm.options import emit, json_option, processes_option, progress_for
from edgeslm.recipe import read_recipe
from edgeslm.recipe_tables import SCHEMES
from edgeslm.table_options import as_tables, table_options

if TYPE_CHECKING:
    from collections.abc import Callable

    Command = Callable[..., Any]


def _run(stage: str, model: str | None, options: dict[str, Any]) -> None:
    """Read the options as a recipe with this one stage, run it, and print what came of it."""
    from edgeslm import console, learning

    out, work, as_json = options.pop("out"), options.pop("work"), options.pop("as_json")
    processes = options.pop("processes")
    values: dict[str, Any] = {
        "name": "command",
        "task": options.pop("task"),
        "seed": options.pop("seed"),
        stage: {},
    }
    if options.pop("scrub", False):
        values["scrub"] = {}
    if model is not None:
        values["model"] = model
    for name, table in as_tables(options).items():
        values.setdefault(name, {}).update(table)
    recipe = read_recipe(
        values, where=f"edgeslm {stage}", text=json.dumps(values, ensure_ascii=False), base=Path.cwd()
    )
    record = learning.make_checkpoint(
        recipe, out, work=work, processes=processes, progress=progress_for(as_json)
    )
    if record is not None:  # one of several processes prints it
        emit(record, as_json, console.checkpoint_text)


def _shared(command: Command) -> Command:
    """--task, --seed, --out, --work and --json."""
    options = (
        click.option("--task", type=click.Choice(specs.TASKS), default="causal-lm", show_default=True),
        click.option("--seed", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True),
        click.option("--out", type=click.Path(path_type=Path), required=True, help="Model directory to create."),
        click.option("--work", type=click.Path(path_type=Path), help="Where progress is kept.  [default: OUT.work]"),
        processes_option,
        json_option,
    )  # fmt: skip
    for option in reversed(options):
        command = option(command)
    return command


SCRUB = click.option(
    "--scrub", is_flag=True, help="Mask e-mail addresses, phone and card numbers, IBANs, IPs."
)


@click.command()
@click.argument("model", required=False)
@table_options("data", "columns", "windows", "finetune")
@SCRUB
@_shared
def finetune(model: str | None, **options: Any) -> None:
    """Train MODEL on a domain's own data, and write an ordinary Hugging Face directory.

    The options are the keys of a recipe's [data], [columns], [windows] and [finetune] tables.

    \b
    Example:  edgeslm finetune HuggingFaceTB/SmolLM2-135M-Instruct --train domain.txt --out tuned
              edgeslm finetune ./encoder --task text-classification --train mails.tsv --heldout-every 8 --out router
    """
    _run("finetune", model, options)


@click.command()
@click.argument("model")
@table_options("data", "prune")
@click.option(
    "--scheme",
    "quantize__scheme",
    type=click.Choice(SCHEMES),
    default="F16",
    show_default=True,
    help="What --target-bytes are bytes of: a GGUF file of this scheme.",
)
@_shared
def prune(model: str, **options: Any) -> None:
    """Cut the layers, widths or tokens of MODEL that matter least on the calibration text.

    The options are the keys of a recipe's [data] and [prune] tables.

    \b
    Example:  edgeslm prune ./tuned --calibration domain.txt --drop-layers 6 --out smaller
              edgeslm prune ./tuned --calibration domain.txt --target-bytes 60000000 --scheme IQ4_NL --out smaller
    """
    _run("prune", model, options)


@click.command()
@click.argument("model")
@table_options("data", "columns", "distill")
@SCRUB
@_shared
def distill(model: str, **options: Any) -> None:
    """Teach MODEL what --teacher knows; with --student gru, MODEL is the teacher of a recurrent network.

    The options are the keys of a recipe's [data], [columns] and [distill] tables.

    \b
    Example:  edgeslm distill ./smaller --teacher ./tuned --train domain.txt --out healed
              edgeslm distill ./router --task text-classification --train mails.tsv --student gru --out tiny
    """
    _run("distill", model, options)
