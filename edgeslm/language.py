"""The second half for language models: importance, GGUF export, quality and speed of the artifact that ships."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from edgeslm import measuring
from edgeslm.bundle import file_sha256, open_bundle
from edgeslm.device import probe
from edgeslm.gguf_file import read_gguf
from edgeslm.versions import chosen_versions
from edgeslm.work import read_record

if TYPE_CHECKING:
    from edgeslm.bundle import Bundle
    from edgeslm.learning import Learned
    from edgeslm.recipe import Recipe
    from edgeslm.stages.checkpoint import Checkpoint
    from edgeslm.stages.export_gguf import Exported
    from edgeslm.work import Work


def export(recipe: Recipe, learned: Learned, store: Work) -> Exported:
    """The checkpoint as a quantized GGUF file, with an importance matrix where there is calibration text."""
    from edgeslm.stages import export_gguf

    checkpoint = learned.checkpoint
    assert checkpoint is not None
    importance = _calibrate(recipe, checkpoint, store)

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
        "versions": chosen_versions("edgeslm", "gguf", "llama_cpp_python"),
    }
    directory = store.stage("quantize", inputs, produce)
    return export_gguf.Exported(path=directory / "model.gguf", **read_record(directory / "plan.json"))


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


def evaluate(recipe: Recipe, learned: Learned, exported: Exported, store: Work) -> dict[str, Any] | None:
    """Quality on held-out text against the unquantized checkpoint; None when nothing is held out."""
    from edgeslm.stages.data import data_digest, heldout_documents

    checkpoint, data = learned.checkpoint, recipe.data
    assert checkpoint is not None
    sources = data.heldout or ((data.train or data.calibration) if data.heldout_every else ())
    if not sources:
        return None
    artifact = open_bundle(exported.path)

    def produce(directory: Path) -> None:
        # The reference is many times the artifact's size, so it goes when it has served.
        with TemporaryDirectory(prefix=".reference-", suffix=".part", dir=store.path) as scratch:
            weights = measuring.reference_weights(checkpoint, Path(scratch), store.progress)
            record = measuring.measure(
                artifact, weights, list(heldout_documents(recipe, store.progress)), context=recipe.evaluate.context,
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
        "versions": chosen_versions("edgeslm", "llama_cpp_python", "numpy"),
    }
    return read_record(store.stage("evaluate", inputs, produce) / "quality.json")


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
        "artifact": file_sha256(bundle.weights),
        "machine": [machine[key] for key in ("cpu_model", "usable_cores", "memory_bytes", "kernel")],
        "versions": chosen_versions("edgeslm", "llama_cpp_python", "numpy"),
    }
    record = read_record(store.stage("bench", inputs, produce) / "bench.json")
    record["artifact"] |= measuring.identity(bundle)
    return record


def bundle_files(exported: Exported) -> dict[str, Path | str]:
    """What goes into the bundle: name inside to file or content."""
    files: dict[str, Path | str] = {"model.gguf": exported.path}
    if template := read_gguf(exported.path).get("tokenizer.chat_template"):
        files["chat_template.jinja"] = template
    return files
