"""The second half for classifiers and sensors: export, evaluation and timing of the artifact that ships."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from edgeslm import watching
from edgeslm.bundle import file_sha256
from edgeslm.device import probe
from edgeslm.specs import ColumnsSpec, DecideSpec, WindowSpec
from edgeslm.versions import chosen_versions
from edgeslm.work import read_record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from edgeslm.bundle import Bundle
    from edgeslm.learning import Learned
    from edgeslm.progress import Progress
    from edgeslm.recipe import Recipe
    from edgeslm.specs import QuantizeSpec
    from edgeslm.stages.checkpoint import Checkpoint
    from edgeslm.stages.export_onnx import Exported
    from edgeslm.work import Work

CALIBRATION_EXAMPLES = 256
"""Examples that ranges of activations are measured on."""


def export(recipe: Recipe, learned: Learned, store: Work) -> Exported:
    """The classifier as an ONNX file with its tokenizer."""
    from edgeslm.stages import export_onnx

    checkpoint = learned.checkpoint
    assert checkpoint is not None
    limits = [spec.train.context for spec in (recipe.finetune, recipe.distill) if spec is not None]
    max_tokens = min(limits) if limits else None

    def produce(directory: Path) -> None:
        exported = export_onnx.run(
            checkpoint, directory / "model.onnx", spec=recipe.quantize, max_tokens=max_tokens,
            calibration=_calibration(recipe, learned), progress=store.progress,
        )  # fmt: skip
        facts = {"plan": exported.plan, "model": exported.model, "warnings": exported.warnings}
        (directory / "plan.json").write_text(json.dumps(facts, ensure_ascii=False), encoding="utf-8")

    inputs = {
        "spec": asdict(recipe.quantize),
        "model": checkpoint.digest,
        "source": checkpoint.source,
        "max_tokens": max_tokens,
        "versions": chosen_versions("edgeslm", "torch", "transformers", "onnx"),
    }
    directory = store.stage("quantize", inputs, produce)
    return export_onnx.Exported(path=directory / "model.onnx", **read_record(directory / "plan.json"))


def export_alone(
    checkpoint: Checkpoint, spec: QuantizeSpec, calibration: str | None, scratch: Path, progress: Progress
) -> Exported:
    """The classifier with no recipe; calibration: a source of texts, for int8-static."""
    from edgeslm.stages import export_onnx
    from edgeslm.stages.data import documents

    found = documents([calibration], progress=progress) if calibration else ()
    texts = [document.text for document in islice(found, CALIBRATION_EXAMPLES) if document.text]
    return export_onnx.run(
        checkpoint, scratch / "model.onnx", spec=spec, calibration=texts, progress=progress
    )


def manifest_parts(recipe: Recipe | None, exported: Exported, learned: Learned) -> dict[str, Any]:
    """What only a classifier's manifest has: how scores become decisions, and how tables are read.

    recipe: None for a model quantized without one; its own classes' shares are the base rates then.
    """
    from edgeslm.runtime.posterior import make_decision

    labels = exported.model["labels"]
    shares = exported.model.get("class_shares")
    trained = ((learned.data or {}).get("train") or {}).get("classes") or shares or dict.fromkeys(labels, 1)
    decide = recipe.decide if recipe else DecideSpec()
    decision = make_decision(
        labels, trained, prior=dict(decide.prior) or None, costs=dict(decide.costs) or None
    )
    columns = learned.columns or (recipe.columns if recipe else ColumnsSpec())
    return {
        "decision": decision.as_record(),
        "data": {
            "columns": asdict(columns),
            "windows": asdict(recipe.windows) if recipe and recipe.task == "sensor-classification" else None,
            "licence": recipe.data.licence if recipe else None,
        },
    }


def evaluate(
    recipe: Recipe, learned: Learned, exported: Exported, store: Work, candidate: Callable[[Path], Bundle]
) -> dict[str, Any] | None:
    """Quality on the held-out examples; candidate: assembles a bundle in a directory."""
    from edgeslm.bench.tasks import evaluate_classifier

    held = _heldout(recipe, learned)
    if held is None:
        return None
    columns = learned.columns or recipe.columns

    def produce(directory: Path) -> None:
        scratch = store.scratch("candidate") / recipe.name
        bundle = candidate(scratch)
        record = evaluate_classifier(
            bundle, held.pairs, ordinal=columns.ordinal, groups=held.groups, seed=recipe.seed,
            progress=store.progress,
        )  # fmt: skip
        if _of_whole_machines(recipe, learned):
            record["alarms"] = watching.measure(
                bundle, learned.sets.heldout, record["decision"], store.progress
            )
        record["artifact"] = {**record["artifact"], "path": None, "digest": None}
        record["text"]["sources"] = list(recipe.data.heldout or recipe.data.train) or ["simulated"]
        (directory / "quality.json").write_text(json.dumps(record, allow_nan=False), encoding="utf-8")

    assert learned.checkpoint is not None
    inputs = {
        "seed": recipe.seed,
        "name": recipe.name,
        "model": learned.checkpoint.digest,
        "artifact": file_sha256(exported.path),
        "decide": asdict(recipe.decide),
        "columns": asdict(columns),
        "data": learned.data_key,
        "versions": chosen_versions("edgeslm", "onnxruntime", "numpy", "tokenizers"),
    }
    return read_record(store.stage("evaluate", inputs, produce) / "quality.json")


def _of_whole_machines(recipe: Recipe, learned: Learned) -> bool:
    """Whether the held-out windows are all that there is of their machines."""
    return recipe.task == "sensor-classification" and (learned.data or {}).get("split_by") in ("unit", "file")


def _calibration(recipe: Recipe, learned: Learned) -> Sequence[Any] | None:
    """Texts, or windows [R, C] in physical units, of the training examples, spread over them."""
    if not learned.sets or recipe.quantize.scheme == "F32":
        return None
    train = learned.sets.train
    chosen = range(0, len(train), max(1, len(train) // CALIBRATION_EXAMPLES))
    if recipe.task == "sensor-classification":
        return [train.raw(number) for number in chosen]
    return [train.text(number) for number in chosen]


def _heldout(recipe: Recipe, learned: Learned) -> Examples | None:
    """The held-out examples, in an order that does not change; None when nothing is held out."""
    if recipe.task == "sensor-classification":
        return _of_windows(learned.sets.heldout) if learned.sets else None
    if learned.sets and learned.sets.heldout:
        held = learned.sets.heldout
        return Examples((held.text(i), held.classes[held.labels[i]]) for i in range(len(held)))
    if not recipe.data.heldout:
        return None
    from edgeslm.stages.labelled import labelled_rows

    rows = labelled_rows(
        recipe.data.heldout, recipe.columns, base=recipe.base, max_bad=recipe.data.max_bad_rows
    )
    return Examples((row.text, row.label) for row in rows)


class Examples(NamedTuple):
    """What a classifier is measured on: (text or window [R, C], label), and what each belongs to."""

    pairs: Iterable[tuple[Any, str]]
    groups: list[str] | None = None


def _of_windows(windows: Any) -> Examples:
    """Windows in physical units; those of one machine are one group, where there are several."""
    units = windows.recordings.units
    return Examples(
        ((windows.raw(i), windows.labels[windows.label[i]]) for i in range(len(windows))),
        [units[index] for index in windows.unit] if len(units) > 1 else None,
    )


# --- edgeslm eval ---


def evaluate_artifact(
    bundle: Bundle,
    sources: Sequence[str],
    *,
    prior: Mapping[str, float] | None = None,
    costs: Mapping[str, float] | None = None,
    threads: int | None = None,
    progress: Progress,
) -> dict[str, Any]:
    """The record edgeslm.task-quality/1 of a bundle on labelled tables with the columns that it was made of.

    prior, costs: base rates where it is deployed, and costs of missing a class; None: the bundle's.
    """
    from edgeslm.bench.tasks import evaluate_classifier
    from edgeslm.stages import labelled, recordings, sensors

    assert bundle.manifest is not None
    facts = bundle.manifest.get("data") or {}
    columns, measured = ColumnsSpec(**_as_tuples(facts.get("columns"))), None
    with TemporaryDirectory() as scratch:
        if facts.get("windows"):
            labels = tuple(bundle.manifest["model"]["labels"])
            channels = tuple(bundle.manifest["model"]["preprocessing"]["channels"])
            known = replace(columns, labels=labels, channels=channels)
            table = recordings.read_tables(sources, known, Path(scratch), progress=progress)
            windows = WindowSpec(**_as_tuples(facts["windows"]))
            measured = sensors.measured(table, windows)
            examples = _of_windows(measured)
        else:
            rows = labelled.labelled_rows(sources, columns, progress=progress)
            examples = Examples((row.text, row.label) for row in rows)
        record = evaluate_classifier(
            bundle, examples.pairs, prior=prior, costs=costs, ordinal=columns.ordinal, groups=examples.groups,
            threads=threads, progress=progress,
        )  # fmt: skip
        if measured is not None:
            record["alarms"] = watching.measure(bundle, measured, record["decision"], progress)
    record["text"]["sources"] = list(sources)
    return record


def _as_tuples(facts: Mapping[str, Any] | None) -> dict[str, Any]:
    """A specification's fields as they were before they became JSON."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in (facts or {}).items()}


# --- timing ---


def bench(recipe: Recipe, bundle: Bundle, store: Work) -> dict[str, Any]:
    """Latency, throughput and memory on this machine, in a process of its own."""
    from edgeslm.bench.child import bench_classifier_in_subprocess

    spec = recipe.bench

    def produce(directory: Path) -> None:
        record = bench_classifier_in_subprocess(
            bundle.path, batch_sizes=spec.batch_sizes, threads=spec.threads, repetitions=spec.repetitions,
            seed=recipe.seed, progress=store.progress,
        )  # fmt: skip
        (directory / "bench.json").write_text(json.dumps(record, allow_nan=False), encoding="utf-8")

    machine = probe()
    inputs = {
        "spec": asdict(spec),
        "seed": recipe.seed,
        "artifact": file_sha256(bundle.weights),
        "machine": [machine[key] for key in ("cpu_model", "usable_cores", "memory_bytes", "kernel")],
        "versions": chosen_versions("edgeslm", "onnxruntime", "numpy"),
    }
    return read_record(store.stage("bench", inputs, produce) / "bench.json")
