"""Several artifacts of one recipe: learned once, each exported, measured and held to the gate, all compared.

    OUT/NAME/                       the bundle of a variant, with a report of its own
    OUT/report.html, .md, .json     all of them side by side, the dominated ones marked

A stage's key holds what goes into it, so what variants have in common (learning, the importance matrix) runs
once, and a variant that is added or changed leaves the others' results where they are.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgeslm.atomic import atomic_write
from edgeslm.bundle import MANIFEST_NAME, check_replaceable
from edgeslm.errors import BundleError, EdgeslmError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from edgeslm.recipe import Recipe
    from edgeslm.specs import VariantSpec
    from edgeslm.work import Work

SCHEMA = "edgeslm.variants/1"


def check_folder(recipe: Recipe, out: Path) -> None:
    """Raise BundleError, before any work, for an `out` that can't become the variants' folder."""
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        raise BundleError(f"{out} is not a directory", hint="choose another name for the variants' folder")
    if (out / MANIFEST_NAME).exists():
        raise BundleError(
            f"{out} is a bundle, and a recipe with [[variants]] makes a folder of bundles",
            hint="choose another name for the variants' folder",
        )
    for variant in recipe.variants:
        check_replaceable(out / variant.name)


def single(recipe: Recipe, variant: VariantSpec) -> Recipe:
    """The recipe of one variant alone; its text stays that of the file."""
    return replace(recipe, name=f"{recipe.name}-{variant.name}", quantize=variant.quantize, variants=())


def build(
    recipe: Recipe, out: Path, store: Work, finish: Callable[[Recipe, Path, Work], dict[str, Any]]
) -> dict[str, Any]:
    """Make each variant's bundle and the comparing report; returns the record edgeslm.variants/1.

    store: what was learned is in its stages already.  finish: makes one bundle of a recipe without variants
    and returns its record edgeslm.build/1.  An EdgeslmError of a variant is raised under its name; the bundles
    that are whole by then stay, and another build goes on after them.
    """
    learned = list(store.stages)
    records = []
    for variant in recipe.variants:
        store.progress.note(f"variant {variant.name} ...")
        own = replace(store, stages=list(learned))
        try:
            records.append(finish(single(recipe, variant), out / variant.name, own))
        except EdgeslmError as error:
            raise type(error)(f"variant {variant.name}: {error.message}", hint=error.hint) from error
        store.stages.extend(own.stages[len(learned) :])
    names = [variant.name for variant in recipe.variants]
    result = {
        "schema": SCHEMA,
        "name": recipe.name,
        "path": str(out),
        "variants": [{"name": name, **record} for name, record in zip(names, records, strict=True)],
        "comparisons": _comparisons(records),
        "gate": merged_gate(names, records),
        "report": str(out / "report.html"),
        "stages": store.stages,
    }
    record = store.path / "result.json"
    atomic_write(record, json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    _compare(record, out)
    return result


def merged_gate(names: Sequence[str], records: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """{passed, misses: [{variant, bound, limit, value, by}]}: missed when one of them misses a bound."""
    gates = [(name, gate) for name, record in zip(names, records, strict=True) if (gate := record["gate"])]
    misses = [{"variant": name, **miss} for name, gate in gates for miss in gate["misses"]]
    return {"passed": not misses, "misses": misses} if gates else None


def _comparisons(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What each costs against how good it is, as bench.pareto has it."""
    from edgeslm.bench.records import report_document

    found: list[dict[str, Any]] = report_document(records)["comparisons"]
    return found


def _compare(record: Path, out: Path) -> None:
    from edgeslm.bench.report import write_report

    write_report([record], out)
