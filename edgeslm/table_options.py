"""Command line options that are a recipe's keys.

Each option's name, values and help come from the recipe's tables and from edgeslm.specs, so that a
recipe and a command line can't drift apart.
"""

from __future__ import annotations

import ast
import inspect
from dataclasses import fields
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import click

from edgeslm import specs
from edgeslm.recipe_tables import TABLES, Table
from edgeslm.schema import Key

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    Command = Callable[..., Any]

PREFIXES = {"student": "student_", "train": "", "onnx": ""}
"""Table inside a table to what its options begin with; the student's kind is --student itself."""


def table_options(*names: str, but: frozenset[str] = frozenset()) -> Callable[[Command], Command]:
    """Options for all keys of the tables `names` and of the tables in them; but: parameters left out."""

    def decorate(command: Command) -> Command:
        for name in reversed(names):
            for parameter, option in reversed(list(_options(TABLES[name], (name,), ""))):
                if parameter not in but:
                    command = option(command)
        return command

    return decorate


def _options(table: Table, place: tuple[str, ...], prefix: str) -> Iterator[tuple[str, Any]]:
    """(parameter, option).  place: the tables that lead to the key; the parameter's name keeps it: data__train."""
    texts = field_texts(table.make)
    defaults = {field.name: field.default for field in fields(table.make)}
    for key, kind in table.keys.items():
        if isinstance(kind, Table):
            yield from _options(kind, (*place, key), PREFIXES[key])
        elif isinstance(kind, Key):
            word = prefix.rstrip("_") if key == "kind" else prefix + key
            parameter = "__".join((*place, key))
            yield parameter, _option(word, parameter, kind, texts.get(key, ""), defaults[key])


def _option(word: str, parameter: str, key: Key, text: str, default: Any) -> Any:
    flag = "--" + word.replace("_", "-")
    shown = "" if default in (None, (), False) else f"  [default: {default}]"
    if key.kind == "boolean":
        flag = f"{flag}/--no-{flag[2:]}" if default else flag
        return click.option(flag, parameter, is_flag=True, default=None, help=text + shown)
    types: dict[str, Any] = {"integer": int, "integers": int, "number": float}
    words = [str(choice) for choice in key.choices]
    kind = click.Choice(words) if words else types.get(key.kind, str)
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


def as_tables(options: Mapping[str, Any]) -> dict[str, Any]:
    """Given options, place__key to value, as the tables of a recipe; what was left out is left out."""
    tables: dict[str, Any] = {}
    for parameter, value in options.items():
        if value is None or value == ():
            continue
        *place, name = parameter.split("__")
        table, keys = tables, dict[str, Any](TABLES)
        for step in place:
            table, keys = table.setdefault(step, {}), keys[step].keys
        plain: Any = list(value) if isinstance(value, tuple) else value
        table[name] = int(plain) if place and keys[name].kind == "integer" else plain
    return tables
