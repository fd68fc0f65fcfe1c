"""The commands that make a checkpoint: finetune, prune, distill.  Their options are the recipe's keys.

Each option's name, values and help come from the recipe's tables and from edgeslm.specs, so that a
recipe and a command line can't drift apart.
"""

from __future__ import annotations

import ast
import inspect
import json
from dataclasses import fields
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from edgeslm import specs
from edgeslm.options import emit, json_option, processes_option, progress_for
from edgeslm.recipe import read_recipe
from edgeslm.recipe_tables import TABLES, Table
from edgeslm.schema import Key

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Command = Callable[..., Any]

PREFIXES = {"student": "student_", "train": ""}
"""Table inside a table to what its options begin with; the student's kind is --student itself."""


def table_options(*names: str) -> Callable[[Command], Command]:
    """Options for all keys of the tables `names` and of the tables in them."""

    def decorate(command: Command) -> Command:
        for name in reversed(names):
            for option in reversed(list(_options(TABLES[name], (name,), ""))):
                command = option(command)
        return command

    return decorate


def _options(table: Table, place: tuple[str, ...], prefix: str) -> Iterator[Any]:
    """place: the tables that lead to the key; it is kept in the parameter's name, as data__train."""
    texts = field_texts(table.make)
    defaults = {field.name: field.default for field in fields(table.make)}
    for key, kind in table.keys.items():
        if isinstance(kind, Table):
            yield from _options(kind, (*place, key), PREFIXES[key])
        elif isinstance(kind, Key):
            word = prefix.rstrip("_") if key == "kind" else prefix + key
            yield _option(word, "__".join((*place, key)), kind, texts.get(key, ""), defaults[key])


def _option(word: str, parameter: str, key: Key, text: str, default: Any) -> Any:
    flag = "--" + word.replace("_", "-")
    shown = "" if default in (None, (), False) else f"  [default: {default}]"
    if key.kind == "boolean":
        flag = f"{flag}/--no-{flag[2:]}" if default else flag
        return click.option(flag, parameter, is_flag=True, default=None, help=text + shown)
    types: dict[str, Any] = {"integer": int, "integers": int, "number": float}
    kind = click.Choice(key.choices) if key.choices else types.get(key.kind, str)
    return click.option(
        flag,
        parameter,
        type=kind,
        multiple=key.kind in ("strings", "integers"),
        default=None,
        help=text + shown,
    )


@cache
def field_texts(make: type) -> dict[str, str]:
    """The text below each field of a specification, as its source has it."""
    body = next(
        node.body
        for node in ast.parse(inspect.getsource(specs)).body
        if isinstance(node, ast.ClassDef) and node.name == make.__name__
    )
    return {
        field.target.id: " ".join(text.value.value.split())
        for field, text in pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant) and isinstance(text.value.value, str)
    }  # fmt: skip


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
    for parameter, value in options.items():
        if value is None or value == ():
            continue
        *place, key = parameter.split("__")
        table = values
        for name in place:
            table = table.setdefault(name, {})
        table[key] = list(value) if isinstance(value, tuple) else value
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
@_shared
def prune(model: str, **options: Any) -> None:
    """Cut the layers, widths or tokens of MODEL that matter least on the calibration text.

    The options are the keys of a recipe's [data] and [prune] tables.

    \b
    Example:  edgeslm prune ./tuned --calibration domain.txt --drop-layers 6 --out smaller
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
