"""From a recipe to a bundle: learn, export, evaluate, bench, gate, report (edgeslm.learning has the first half).

Each stage's result is kept under a key made of everything that can change its bytes (see edgeslm.work),
so a build that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from edgeslm import card, classifying, gate, language, learning, measuring
from edgeslm.atomic import atomic_write
from edgeslm.bundle import (
    Bundle,
    add_reports,
    check_replaceable,
    open_bundle,
    write_bundle,
)
from edgeslm.device import load_device
from edgeslm.errors import RecipeError
from edgeslm.learning import Learned
from edgeslm.progress import Progress, Quiet
from edgeslm.specs import CalibrateSpec, QuantizeSpec
from edgeslm.versions import engine_versions
from edgeslm.work import Work, open_work, scratch_beside

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgeslm.device import Device
    from edgeslm.recipe import Recipe
    from edgeslm.stages.checkpoint import Checkpoint

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

    work: where stages keep their results; None: OUT.work beside `out`.  force: stages to run again.
    processes: how many `accelerate launch` started; all train, the main one does the rest, others get None.
    A missed gate is in the record and raises nothing here: see gate.raise_for_gate.
    """
    for name in force:
        if name not in STAGES:
            raise RecipeError(f"no stage is called {name!r}", hint=f"stages are {', '.join(STAGES)}")
    check_replaceable(out)
    device = load_device(recipe.device) if recipe.device else None
    work_path = work or out.with_name(out.name + ".work")
    with open_work(work_path, frozenset(force), progress or Quiet(), learning.team(processes)) as store:
        return _build(recipe, out, device, store)


def quantize(
    model: str,
    out: Path,
    *,
    format: str = "gguf",  # noqa: A002 (the command's word)
    scheme: str = "Q4_K_M",
    calibration: str | None = None,
    types: Mapping[str, str] | None = None,
    keep_going: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Quantize a model source in one go; returns the record edgeslm.quantize/1.

    out: a .gguf file, or the directory of a bundle.  calibration: a source of text, or an importance
    matrix.  types: regular expression to type, for single tensors.
    """
    from edgeslm.stages import export_gguf
    from edgeslm.stages.checkpoint import resolve

    progress, start = progress or Quiet(), time.perf_counter()
    spec = QuantizeSpec(
        format=format, scheme=scheme, types=tuple((types or {}).items()), keep_going=keep_going
    )
    is_file = out.suffix == ".gguf"
    if not is_file:
        check_replaceable(out)
    with scratch_beside(out) as scratch:
        checkpoint = resolve(model, work=scratch, progress=progress)
        importance = _importance(calibration, checkpoint, scratch, progress)
        target = out if is_file else scratch / "model.gguf"
        exported = export_gguf.run(checkpoint, spec, target, importance=importance, progress=progress)
        if is_file:
            size_bytes = out.stat().st_size
        else:
            learned = Learned(checkpoint=checkpoint)
            size_bytes = _assemble(out, out.name, learned, exported, recipe=None, quality=None).size_bytes
    return {
        "schema": "edgeslm.quantize/1",
        "path": str(out),
        "kind": "file" if is_file else "bundle",
        "bytes": size_bytes,
        "quantization": exported.plan,
        "warnings": [*checkpoint.warnings, *exported.warnings],
        "seconds": time.perf_counter() - start,
    }


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
    if bundle.format == "onnx":
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
    checkpoint = learned.checkpoint
    assert checkpoint is not None
    if not store.writes:
        return None
    store = replace(store, team=None)  # the others have gone: what follows is one process's work
    exported, quality = _artifact(recipe, learned, store)
    warnings = [*checkpoint.warnings, *exported.warnings]
    if device is not None and recipe.quantize.format == "gguf":
        warnings += measuring.memory_warnings(device, exported.path, recipe.bench.context)
    for warning in warnings[len(checkpoint.warnings) :]:
        store.progress.note(f"warning: {warning}")
    bundle = _assemble(out, recipe.name, learned, exported, recipe=recipe, quality=quality)
    if quality is not None:
        quality["artifact"] |= measuring.identity(bundle)
    bench = (language if recipe.quantize.format == "gguf" else classifying).bench(recipe, bundle, store)
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
        "gate": gate.judge(recipe.gate, bundle.weights.stat().st_size, quality, bench),
        "report": str(out / "report.html"),
        "stages": store.stages,
        "warnings": warnings,
    }
    _report(bundle, result, store)
    return result


def _artifact(recipe: Recipe, learned: Learned, store: Work) -> tuple[Any, dict[str, Any] | None]:
    """The exported weights and their measured quality."""
    if recipe.quantize.format == "gguf":
        exported = language.export(recipe, learned, store)
        return exported, language.evaluate(recipe, learned, exported, store)
    graph = classifying.export(recipe, learned, store)

    def candidate(path: Path) -> Bundle:
        return _assemble(path, recipe.name, learned, graph, recipe=recipe, quality=None)

    return graph, classifying.evaluate(recipe, learned, store, candidate)


def _report(bundle: Bundle, result: Mapping[str, Any], store: Work) -> None:
    """The result beside the stages, and its report in the bundle."""
    from edgeslm.bench.report import write_report

    record = store.path / "result.json"
    atomic_write(record, json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    with TemporaryDirectory(prefix=".report-", suffix=".part", dir=store.path) as scratch:
        write_report([record], Path(scratch))
        add_reports(bundle, {path.name: path for path in sorted(Path(scratch).iterdir())})


# --- what the stages share ---


def _assemble(
    out: Path,
    name: str,
    learned: Learned,
    exported: Any,
    *,
    recipe: Recipe | None,
    quality: Mapping[str, Any] | None,
) -> Bundle:
    checkpoint = learned.checkpoint
    assert checkpoint is not None
    licence = recipe.licence if recipe else None
    model = exported.model | ({"licence": licence} if licence else {})
    manifest = {
        "name": name,
        "task": recipe.task if recipe else "causal-lm",
        "format": recipe.quantize.format if recipe else "gguf",
        "weights": exported.path.name,
        "model": model,
        "quantization": exported.plan,
        "recipe": {"text": recipe.text, "sha256": recipe.sha256} if recipe else None,
        "ancestry": checkpoint.ancestry(),
        "versions": {name: version for name, version in engine_versions().items() if version},
        "quality": quality,
    }
    if exported.path.suffix == ".gguf":
        files = language.bundle_files(exported)
    else:
        assert recipe is not None
        files = dict(exported.files)
        manifest |= classifying.manifest_parts(recipe, exported, learned)
    files["README.md"] = card.model_card(manifest)
    files |= {path.name: path for path in checkpoint.licence_files()}
    return write_bundle(out, files=files, manifest=manifest)


def _importance(
    calibration: str | None, checkpoint: Checkpoint, scratch: Path, progress: Progress
) -> Path | None:
    """The importance matrix that `calibration` is, or that is measured on its text."""
    from edgeslm.stages import calibrate
    from edgeslm.stages.data import documents

    if calibration is None:
        return None
    if not calibration.startswith("pkg://") and calibrate.is_importance(Path(calibration)):
        return Path(calibration)
    found = documents([calibration], progress=progress)
    return calibrate.run(
        checkpoint, found, CalibrateSpec(), scratch / "importance.gguf", chat=measuring.render_messages,
        sources=[calibration], progress=progress,
    )  # fmt: skip
