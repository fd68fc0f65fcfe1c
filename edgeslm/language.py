"""The second half for language models: importance, export, quality and speed of the artifact that ships."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from edgeslm import measuring, wording
from edgeslm.bundle import file_sha256, open_bundle
from edgeslm.device import probe
from edgeslm.gguf_file import read_gguf
from edgeslm.specs import CalibrateSpec
from edgeslm.versions import chosen_versions
from edgeslm.work import read_record

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from edgeslm.bundle import Bundle
    from edgeslm.learning import Learned
    from edgeslm.recipe import Recipe
    from edgeslm.stages import export_gguf, export_onnx
    from edgeslm.stages.checkpoint import Checkpoint
    from edgeslm.work import Work

    Exported = export_gguf.Exported | export_onnx.Exported

WEIGHTS = {"gguf": "model.gguf", "onnx": "model.onnx"}
"""Format to the name of the weights in a bundle."""
ONNX_FILES = ("model.onnx", "model.onnx.data", "tokenizer.json", "chat_template.jinja")
"""What an export to ONNX leaves beside each other, the last one where the model has a template."""
SENSITIVITY_WINDOWS = 8
"""Windows of calibration text that an export to ONNX measures on what it may round."""
AUDIT_WINDOWS = 4
"""Windows of held-out text that accuracy levels are compared on."""


def export(recipe: Recipe, learned: Learned, store: Work) -> Exported:
    """The checkpoint quantized, with an importance matrix where there is calibration text."""
    checkpoint = learned.checkpoint
    assert checkpoint is not None
    importance = _calibrate(recipe, checkpoint, store)
    is_gguf = recipe.quantize.format == "gguf"
    name = WEIGHTS[recipe.quantize.format]

    def produce(directory: Path) -> None:
        exported = (_to_gguf if is_gguf else _to_onnx)(
            recipe, checkpoint, directory / name, importance, store
        )
        facts = {"plan": exported.plan, "model": exported.model, "warnings": exported.warnings}
        (directory / "plan.json").write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")

    inputs = {
        "spec": asdict(recipe.quantize),
        "model": checkpoint.digest,
        "name": checkpoint.name,
        "source": checkpoint.source,
        "importance": file_sha256(importance) if importance else None,
        "versions": chosen_versions(
            *(("gguf", "llama_cpp_python") if is_gguf else ("onnx", "onnxruntime", "torch")),
            "edgeslm",
        ),
    }
    directory = store.stage("quantize", inputs, produce)
    facts = read_record(directory / "plan.json")
    if is_gguf:
        from edgeslm.stages import export_gguf

        return export_gguf.Exported(path=directory / name, **facts)
    from edgeslm.stages import export_onnx

    return export_onnx.Exported(path=directory / name, **facts)


def _to_gguf(
    recipe: Recipe, checkpoint: Checkpoint, out: Path, importance: Path | None, store: Work
) -> Exported:
    from edgeslm.stages import export_gguf

    return export_gguf.run(checkpoint, recipe.quantize, out, importance=importance, progress=store.progress)


def _to_onnx(
    recipe: Recipe, checkpoint: Checkpoint, out: Path, importance: Path | None, store: Work
) -> Exported:
    from edgeslm.stages import export_decoder

    return export_decoder.run(
        checkpoint, recipe.quantize, out, importance=importance,
        windows=_sensitivity_windows(recipe, checkpoint, store), progress=store.progress,
    )  # fmt: skip


def _sensitivity_windows(recipe: Recipe, checkpoint: Checkpoint, store: Work) -> NDArray[np.int64] | None:
    """[W, C] token ids of calibration text; None without any."""
    from edgeslm.stages import calibrate
    from edgeslm.stages.data import calibration_documents

    if not recipe.data.calibration:
        return None
    return calibrate.token_windows(
        checkpoint, calibration_documents(recipe, store.progress), sensitivity_spec(recipe.calibrate),
        chat=measuring.render_messages,
    )  # fmt: skip


def sensitivity_spec(spec: CalibrateSpec) -> CalibrateSpec:
    """As much text as an export to ONNX measures on what it may round."""
    return replace(spec, tokens=SENSITIVITY_WINDOWS * spec.context)


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
        "versions": chosen_versions("edgeslm", "torch", "transformers", "tokenizers"),
    }
    return store.stage("calibrate", inputs, produce) / "importance.gguf"


def evaluate(
    recipe: Recipe, learned: Learned, exported: Exported, store: Work, candidate: Callable[[Path], Bundle]
) -> dict[str, Any] | None:
    """Quality on held-out text against the unquantized checkpoint; None when nothing is held out.

    candidate: assembles a bundle in a directory, for an artifact that is more than one file.
    """
    from edgeslm.stages.data import data_digest, heldout_documents

    checkpoint, data = learned.checkpoint, recipe.data
    assert checkpoint is not None
    sources = data.heldout or ((data.train or data.calibration) if data.heldout_every else ())
    if not sources:
        return None

    def produce(directory: Path) -> None:
        is_gguf = recipe.quantize.format == "gguf"
        artifact = (
            open_bundle(exported.path) if is_gguf else candidate(store.scratch("candidate") / recipe.name)
        )
        # The reference is many times the artifact's size, so it goes when it has served.
        with TemporaryDirectory(prefix=".reference-", suffix=".part", dir=store.path) as scratch:
            weights = measuring.reference_weights(checkpoint, Path(scratch), store.progress)
            record = measuring.measure(
                artifact, weights, list(heldout_documents(recipe, store.progress)), context=recipe.evaluate.context,
                max_tokens=recipe.evaluate.max_tokens, threads=None, progress=store.progress, seed=recipe.seed,
            )  # fmt: skip
        record["artifact"] = {**record["artifact"], "name": recipe.name, "path": None, "digest": None}
        record["reference"] |= {"name": _reference_name(checkpoint), "digest": checkpoint.digest}
        record["text"]["sources"] = list(sources)
        record["accuracy_level"] = _audit(recipe, checkpoint, exported, store)
        (directory / "quality.json").write_text(json.dumps(record, allow_nan=False), encoding="utf-8")

    inputs = {
        "spec": asdict(recipe.evaluate),
        "seed": recipe.seed,
        "name": recipe.name,
        "artifact": _digests(exported),
        "model": checkpoint.digest,
        "data": data_digest(recipe, sources),
        "versions": chosen_versions("edgeslm", "llama_cpp_python", "onnxruntime", "numpy"),
    }
    return read_record(store.stage("evaluate", inputs, produce) / "quality.json")


def _reference_name(checkpoint: Checkpoint) -> str:
    """The model before quantization: its source's name, and what was done to it."""
    stages = wording.stage_names(checkpoint.ancestry())
    return f"{checkpoint.name} after {', '.join(stages)}" if stages else checkpoint.name


def _audit(recipe: Recipe, checkpoint: Checkpoint, exported: Exported, store: Work) -> dict[str, Any] | None:
    """What the accuracy level of an ONNX model's products gives and costs, on held-out text; None without any."""
    from edgeslm.stages import accuracy_level, calibrate
    from edgeslm.stages.data import heldout_documents

    if recipe.quantize.format != "onnx" or exported.plan.get("accuracy_level") is None:
        return None
    context = recipe.evaluate.context
    spec = CalibrateSpec(tokens=AUDIT_WINDOWS * context, context=context)
    windows = calibrate.token_windows(
        checkpoint, heldout_documents(recipe, store.progress), spec, chat=measuring.render_messages
    )
    return accuracy_level.audit(exported.path, windows, progress=store.progress)


def bench(recipe: Recipe, bundle: Bundle, store: Work) -> dict[str, Any]:
    """Prefill, decode and memory on this machine, in a process of its own."""
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
        "artifact": {entry["path"]: entry["sha256"] for entry in _weights(bundle)},
        "machine": [machine[key] for key in ("cpu_model", "usable_cores", "memory_bytes", "kernel")],
        "versions": chosen_versions("edgeslm", "llama_cpp_python", "onnxruntime", "numpy"),
    }
    record = read_record(store.stage("bench", inputs, produce) / "bench.json")
    record["artifact"] |= measuring.identity(bundle)
    return record


def bundle_files(exported: Exported) -> dict[str, Path | str]:
    """What goes into the bundle: name inside to file or content."""
    if exported.path.suffix == ".onnx":
        return {name: path for name in ONNX_FILES if (path := exported.path.with_name(name)).is_file()}
    files: dict[str, Path | str] = {exported.path.name: exported.path}
    if template := read_gguf(exported.path).get("tokenizer.chat_template"):
        files["chat_template.jinja"] = template
    return files


def _digests(exported: Exported) -> dict[str, str]:
    """sha256 of each file of the artifact."""
    files = bundle_files(exported)
    return {name: file_sha256(path) for name, path in files.items() if isinstance(path, Path)}


def _weights(bundle: Bundle) -> list[dict[str, Any]]:
    """Entries of the manifest of what an engine loads."""
    assert bundle.manifest is not None
    return [entry for entry in bundle.manifest["files"] if entry["path"] in (*WEIGHTS.values(), *ONNX_FILES)]
