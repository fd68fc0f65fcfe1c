"""The only file that knows the order of the stages: resolve, calibrate, quantize, evaluate, bench, gate, report.

Each stage's result is kept under a key made of everything that can change its bytes (see edgeslm.work),
so a build that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from edgeslm import card, measuring, wording
from edgeslm.atomic import atomic_write
from edgeslm.bundle import (
    Bundle,
    add_reports,
    check_replaceable,
    file_sha256,
    open_bundle,
    write_bundle,
)
from edgeslm.device import engine_versions, load_device, probe
from edgeslm.errors import GateError, RecipeError
from edgeslm.gguf_file import read_gguf
from edgeslm.progress import Progress, Quiet
from edgeslm.recipe import CalibrateSpec, GateSpec, QuantizeSpec, Recipe
from edgeslm.work import Work, open_work, scratch_beside

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgeslm.device import Device
    from edgeslm.stages.checkpoint import Checkpoint
    from edgeslm.stages.export_gguf import Exported

STAGES = ("calibrate", "quantize", "evaluate", "bench")
"""The stages that keep a result, in their order."""


def build(
    recipe: Recipe,
    out: Path,
    *,
    work: Path | None = None,
    force: Sequence[str] = (),
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run a recipe's stages and put the bundle at `out`; returns the record edgeslm.build/1.

    work: where stages keep their results; None: OUT.work beside `out`.  force: stages to run again.
    A missed gate is in the record and raises nothing here: see raise_for_gate.
    """
    for name in force:
        if name not in STAGES:
            raise RecipeError(f"no stage is called {name!r}", hint=f"stages are {', '.join(STAGES)}")
    check_replaceable(out)
    device = load_device(recipe.device) if recipe.device else None
    work_path = work or out.with_name(out.name + ".work")
    with open_work(work_path, frozenset(force), progress or Quiet()) as store:
        return _build(recipe, out, device, store)


def raise_for_gate(result: Mapping[str, Any]) -> None:
    """Raise GateError when the record of a build has missed a bound; the files stay."""
    gate = result["gate"]
    if gate and not gate["passed"]:
        misses = "; ".join(wording.gate_miss(miss) for miss in gate["misses"])
        raise GateError(
            f"the gate is missed: {misses}", hint="the bundle is kept; change the scheme or the bound"
        )


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
            size_bytes = _assemble(out, out.name, checkpoint, exported, recipe=None, quality=None).size_bytes
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
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure an artifact's quality through the runtime that ships; returns the record edgeslm.quality/1.

    reference: any model source; what is not an unquantized GGUF file is exported to F32 for the time of
    the measurement.  texts: sources as in a recipe.
    """
    from edgeslm.stages.checkpoint import resolve
    from edgeslm.stages.data import documents

    progress = progress or Quiet()
    bundle = open_bundle(artifact)
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


def _build(recipe: Recipe, out: Path, device: Device | None, store: Work) -> dict[str, Any]:
    from edgeslm.stages.checkpoint import resolve

    store.log("build", recipe=recipe.name, sha256=recipe.sha256, out=str(out))
    checkpoint = resolve(recipe.model, base=recipe.base, work=store.path, progress=store.progress)
    importance = _calibrate(recipe, checkpoint, store)
    exported = _quantize(recipe, checkpoint, importance, store)
    if device is not None:
        exported.warnings.extend(measuring.memory_warnings(device, exported.path, recipe.bench.context))
    for warning in exported.warnings:
        store.progress.note(f"warning: {warning}")
    quality = _evaluate(recipe, checkpoint, exported, store)
    bundle = _assemble(out, recipe.name, checkpoint, exported, recipe=recipe, quality=quality)
    if quality is not None:
        quality["artifact"] |= measuring.identity(bundle)
    bench = _bench(recipe, bundle, store)
    result = {
        "schema": "edgeslm.build/1",
        "bundle": str(out),
        "bytes": bundle.size_bytes,
        "bits_per_weight": exported.plan["bits_per_weight"],
        "quality": quality,
        "bench": bench,
        "gate": judge(recipe.gate, bundle.weights.stat().st_size, quality, bench),
        "report": str(out / "report.html"),
        "stages": store.stages,
        "warnings": [*checkpoint.warnings, *exported.warnings],
    }
    _report(bundle, result, store)
    return result


def _calibrate(recipe: Recipe, checkpoint: Checkpoint, store: Work) -> Path | None:
    from edgeslm.stages import calibrate
    from edgeslm.stages.data import calibration_documents, data_digest

    if not recipe.data.calibration:
        return None

    def produce(directory: Path) -> None:
        calibrate.run(
            checkpoint, calibration_documents(recipe, store.progress), recipe.calibrate, directory / "importance.gguf",
            chat=measuring.render_messages, sources=recipe.data.calibration, progress=store.progress,
        )  # fmt: skip

    inputs = {
        "spec": asdict(recipe.calibrate),
        "model": checkpoint.digest,
        "data": data_digest(recipe, recipe.data.calibration),
        "versions": _versions("edgeslm", "torch", "transformers", "tokenizers"),
    }
    return store.stage("calibrate", inputs, produce) / "importance.gguf"


def _quantize(recipe: Recipe, checkpoint: Checkpoint, importance: Path | None, store: Work) -> Exported:
    from edgeslm.stages import export_gguf

    def produce(directory: Path) -> None:
        exported = export_gguf.run(
            checkpoint, recipe.quantize, directory / "model.gguf", importance=importance,
            progress=store.progress,
        )  # fmt: skip
        facts = {"plan": exported.plan, "model": exported.model, "warnings": exported.warnings}
        (directory / "plan.json").write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")

    inputs = {
        "spec": asdict(recipe.quantize),
        "model": checkpoint.digest,
        "name": checkpoint.name,
        "source": checkpoint.source,
        "importance": file_sha256(importance) if importance else None,
        "versions": _versions("edgeslm", "gguf", "llama_cpp_python"),
    }
    directory = store.stage("quantize", inputs, produce)
    facts = json.loads((directory / "plan.json").read_text(encoding="utf-8"))
    return export_gguf.Exported(path=directory / "model.gguf", **facts)


def _evaluate(
    recipe: Recipe, checkpoint: Checkpoint, exported: Exported, store: Work
) -> dict[str, Any] | None:
    from edgeslm.stages.data import data_digest, heldout_documents

    sources = recipe.data.heldout or (recipe.data.calibration if recipe.data.heldout_every else ())
    if not sources:
        return None
    artifact = open_bundle(exported.path)

    def produce(directory: Path) -> None:
        # The reference is many times the artifact's size, so it goes when it has served.
        with TemporaryDirectory(prefix=".reference-", suffix=".part", dir=store.path) as scratch:
            weights = measuring.reference_weights(checkpoint, Path(scratch), store.progress)
            record = measuring.measure(
                artifact, weights, heldout_documents(recipe, store.progress), context=recipe.evaluate.context,
                max_tokens=recipe.evaluate.max_tokens, threads=None, progress=store.progress, seed=recipe.seed,
            )  # fmt: skip
        record["artifact"] = {**record["artifact"], "name": recipe.name, "path": None, "digest": None}
        record["reference"] |= {"name": checkpoint.name, "digest": checkpoint.digest}
        record["text"]["sources"] = list(sources)
        (directory / "quality.json").write_text(json.dumps(record, allow_nan=False), encoding="utf-8")

    inputs = {
        "spec": asdict(recipe.evaluate),
        "seed": recipe.seed,
        "name": recipe.name,
        "artifact": artifact.digest,
        "model": checkpoint.digest,
        "data": data_digest(recipe, sources),
        "versions": _versions("edgeslm", "llama_cpp_python", "numpy"),
    }
    return _load(store.stage("evaluate", inputs, produce) / "quality.json")


def _bench(recipe: Recipe, bundle: Bundle, store: Work) -> dict[str, Any]:
    from edgeslm.bench.child import bench_in_subprocess
    from edgeslm.runtime.runner import RunnerOptions

    spec = recipe.bench

    def produce(directory: Path) -> None:
        record = bench_in_subprocess(
            bundle.path, prompt_tokens=spec.prompt_tokens, decode_tokens=spec.decode_tokens,
            threads=spec.threads, repetitions=spec.repetitions, seed=recipe.seed,
            options=RunnerOptions(context=spec.context), progress=store.progress,
        )  # fmt: skip
        (directory / "bench.json").write_text(json.dumps(record, allow_nan=False), encoding="utf-8")

    machine = probe()
    inputs = {
        "spec": asdict(spec),
        "seed": recipe.seed,
        "artifact": file_sha256(bundle.weights),
        "machine": [machine[key] for key in ("cpu_model", "usable_cores", "memory_bytes", "kernel")],
        "versions": _versions("edgeslm", "llama_cpp_python", "numpy"),
    }
    record = _load(store.stage("bench", inputs, produce) / "bench.json")
    record["artifact"] |= measuring.identity(bundle)
    return record


def judge(
    gate: GateSpec, file_bytes: int, quality: Mapping[str, Any] | None, bench: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """The verdict on point estimates: {passed, misses: [{bound, limit, value, by}]}; None without bounds.

    A bound whose quantity was not measured is missed, with null for value and by.
    """
    kl, agreement, ratio = (
        (quality or {}).get(key) or {} for key in ("kl_nats", "top1_agreement", "perplexity_ratio")
    )
    decode = wording.headline((bench or {}).get("runs") or (), "decode") or {}
    measured = {
        "max_kl_nats": (kl.get("mean") or {}).get("value"),
        "min_top1_agreement": agreement.get("value"),
        "max_perplexity_ratio": ratio.get("value"),
        "max_file_bytes": file_bytes,
        "min_decode_tokens_per_s": decode.get("tokens_per_s"),
        "max_peak_rss_bytes": ((bench or {}).get("memory") or {}).get("peak_rss_bytes"),
    }
    limits = {bound: limit for bound, limit in asdict(gate).items() if limit is not None}
    misses = []
    for bound, limit in limits.items():
        value = measured[bound]
        over = None if value is None else value - limit if bound.startswith("max_") else limit - value
        if over is None or over > 0:
            misses.append({"bound": bound, "limit": limit, "value": value, "by": over})
    return {"passed": not misses, "misses": misses} if limits else None


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
    checkpoint: Checkpoint,
    exported: Exported,
    *,
    recipe: Recipe | None,
    quality: Mapping[str, Any] | None,
) -> Bundle:
    manifest = {
        "name": name,
        "task": recipe.task if recipe else "causal-lm",
        "format": "gguf",
        "weights": "model.gguf",
        "model": exported.model,
        "quantization": exported.plan,
        "recipe": {"text": recipe.text, "sha256": recipe.sha256} if recipe else None,
        "versions": {name: version for name, version in engine_versions().items() if version},
        "quality": quality,
    }
    files: dict[str, Path | str] = {"model.gguf": exported.path, "README.md": card.model_card(manifest)}
    if template := read_gguf(exported.path).get("tokenizer.chat_template"):
        files["chat_template.jinja"] = template
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


def _versions(*names: str) -> dict[str, str | None]:
    versions = engine_versions()
    return {name: versions[name] for name in names}


def _load(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record
