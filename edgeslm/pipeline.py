"""From a recipe to a bundle: learn, export, evaluate, bench, gate, report (edgeslm.learning has the first half).

Each stage's result is kept under a key made of everything that can change its bytes (see edgeslm.work),
so a build that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from edgeslm import classifying, gate, language, learning, measuring, operators, variants
from edgeslm.assembly import assemble
from edgeslm.atomic import atomic_write
from edgeslm.bundle import Bundle, add_reports, check_replaceable, open_bundle
from edgeslm.device import load_device
from edgeslm.errors import RecipeError
from edgeslm.onnx_file import read_onnx
from edgeslm.progress import Progress, Quiet
from edgeslm.work import Work, open_work, scratch_beside

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgeslm.device import Device
    from edgeslm.learning import Learned
    from edgeslm.recipe import Recipe

STAGES = (*learning.STAGES, "calibrate", "quantize", "evaluate", "bench")
"""The stages that keep a result, in their order."""


def build(
    recipe: Recipe,
    out: Path,
    *,
    work: Path | None = None,
    force: Sequence[str] = (),
    processes: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any] | None:
    """Run a recipe's stages and put the bundle at `out`; returns the record edgeslm.build/1.

    A recipe with variants makes a folder of bundles and a report on all: the record edgeslm.variants/1.

    work: where stages keep their results; None: OUT.work beside `out`.  force: stages to run again.
    processes: how many `accelerate launch` started; all train, the main one does the rest, others get None.
    A missed gate is in the record and raises nothing here: see gate.raise_for_gate.
    """
    for name in force:
        if name not in STAGES:
            raise RecipeError(f"no stage is called {name!r}", hint=f"stages are {', '.join(STAGES)}")
    if recipe.variants:
        variants.check_folder(recipe, out)
    else:
        check_replaceable(out)
    device = load_device(recipe.device) if recipe.device else None
    work_path = work or out.with_name(out.name + ".work")
    with open_work(work_path, frozenset(force), progress or Quiet(), learning.team(processes)) as store:
        return _build(recipe, out, device, store)


def evaluate(
    artifact: Path,
    texts: Sequence[str],
    *,
    reference: str | None = None,
    context: int = 512,
    max_tokens: int | None = None,
    prior: Mapping[str, float] | None = None,
    costs: Mapping[str, float] | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure an artifact's quality through the runtime that ships; returns the record edgeslm.quality/1.

    reference: any model source; what is not an unquantized GGUF file is exported to F32 for the time of
    the measurement.  texts: sources as in a recipe.  For a classifier they are labelled tables, and the
    record is edgeslm.task-quality/1; prior, costs: base rates and costs of missing a class, in place of
    the bundle's own.
    """
    from edgeslm.stages.checkpoint import resolve
    from edgeslm.stages.data import documents

    progress = progress or Quiet()
    bundle = open_bundle(artifact)
    if bundle.is_classifier:
        if reference is not None:
            raise RecipeError(
                "a classifier is measured on labels, not on a reference", hint="leave --reference out"
            )
        return classifying.evaluate_artifact(
            bundle, texts, prior=prior, costs=costs, threads=threads, progress=progress
        )
    if prior or costs:
        raise RecipeError(
            f"{bundle.name} is a language model: base rates and costs are for classifiers",
            hint="leave --prior and --cost out",
        )
    found = list(documents(texts, progress=progress))
    writable = os.access(bundle.path.absolute().parent, os.W_OK)
    with scratch_beside(bundle.path) if writable else TemporaryDirectory() as scratch:
        weights = None
        if reference is not None:
            checkpoint = resolve(reference, work=Path(scratch), progress=progress)
            weights = measuring.reference_weights(checkpoint, Path(scratch), progress)
        record = measuring.measure(
            bundle, weights, found, context=context, max_tokens=max_tokens, threads=threads, progress=progress
        )
    record["text"]["sources"] = list(texts)
    if reference is not None:
        record["reference"] |= {"name": checkpoint.name, "digest": checkpoint.digest}
    return record


# --- the stages of a build ---


def _build(recipe: Recipe, out: Path, device: Device | None, store: Work) -> dict[str, Any] | None:
    store.log("build", recipe=recipe.name, sha256=recipe.sha256, out=str(out))
    learned = learning.learn(recipe, learning.starting_point(recipe, store), store)
    if store.team is not None:
        store.team.leave()
    if not store.writes:
        return None
    store = replace(store, team=None)  # the others have gone: what follows is one process's work
    if not recipe.variants:
        return _finish(recipe, out, device, learned, store)

    def finish(single: Recipe, path: Path, own: Work) -> dict[str, Any]:
        return _finish(single, path, device, learned, own)

    return variants.build(recipe, out, store, finish)


def _finish(
    recipe: Recipe, out: Path, device: Device | None, learned: Learned, store: Work
) -> dict[str, Any]:
    """The second half, for one artifact of what was learned."""
    checkpoint = learned.checkpoint
    assert checkpoint is not None
    exported, quality = _artifact(recipe, learned, store, device)
    warnings = [*checkpoint.warnings, *exported.warnings]
    if device is not None and recipe.quantize.format == "gguf":
        warnings += measuring.memory_warnings(device, exported.path, recipe.bench.context)
    for warning in warnings[len(checkpoint.warnings) :]:
        store.progress.note(f"warning: {warning}")
    bundle = assemble(out, recipe.name, learned, exported, recipe=recipe, quality=quality)
    if quality is not None:
        quality["artifact"] |= measuring.identity(bundle)
    bench = (classifying if bundle.is_classifier else language).bench(recipe, bundle, store)
    bench["artifact"] |= measuring.identity(bundle)
    result = {
        "schema": "edgeslm.build/1",
        "bundle": str(out),
        "bytes": bundle.size_bytes,
        "bits_per_weight": exported.plan["bits_per_weight"],
        "data": learned.data,
        "training": learned.training,
        "prune": learned.prune,
        "quality": quality,
        "bench": bench,
        "gate": gate.judge(recipe.gate, bundle.weights_bytes, quality, bench),
        "report": str(out / "report.html"),
        "stages": store.stages,
        "warnings": warnings,
    }
    _report(bundle, result, store)
    return result


def _artifact(
    recipe: Recipe, learned: Learned, store: Work, device: Device | None
) -> tuple[Any, dict[str, Any] | None]:
    """The exported weights and their measured quality; EngineError for what the device's engine can't run."""
    half = language if recipe.task == "causal-lm" else classifying
    exported = half.export(recipe, learned, store)
    if device is not None and device.onnxruntime is not None and recipe.quantize.format == "onnx":
        operators.check(read_onnx(exported.path), device.onnxruntime)

    def candidate(path: Path) -> Bundle:
        return assemble(path, recipe.name, learned, exported, recipe=recipe, quality=None)

    return exported, half.evaluate(recipe, learned, exported, store, candidate)


def _report(bundle: Bundle, result: Mapping[str, Any], store: Work) -> None:
    """The result beside the stages, and its report in the bundle."""
    from edgeslm.bench.report import write_report

    record = store.path / "result.json"
    atomic_write(record, json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    with TemporaryDirectory(prefix=".report-", suffix=".part", dir=store.path) as scratch:
        write_report([record], Path(scratch))
        add_reports(bundle, {path.name: path for path in sorted(Path(scratch).iterdir())})
