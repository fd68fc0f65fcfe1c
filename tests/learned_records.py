"""Records of classifiers and of the stages that train and cut, as the commands write them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from edgeslm.bench.tasks import metrics
from tests import records
from tests.records import machine

DIGESTS = {"encoder": "ab12" * 16, "gru": "cd34" * 16}
GRADES = ("poor", "fair", "good", "very good", "excellent")


def artifact(kind: str = "encoder") -> dict[str, Any]:
    size = {"encoder": (90_870_000, 22_713_987, "bert"), "gru": (4_360_000, 1_088_643, "edgeslm-recurrent")}[
        kind
    ]
    return {
        "name": f"classify-email-{kind}", "path": f"out/classify-email-{kind}", "format": "onnx",
        "digest": DIGESTS[kind], "file_bytes": size[0], "weight_bytes": 4 * size[1], "parameters": size[1],
        "bits_per_weight": 32.0, "architecture": size[2],
    }  # fmt: skip


def sample(classes: int, count: int, skill: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    truth = random.choice(classes, size=count, p=np.arange(classes, 0, -1) / sum(range(classes + 1)))
    distance = np.abs(np.subtract.outer(truth, np.arange(classes)))
    logits = random.standard_normal((count, classes)) - skill * distance
    return truth, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def task_quality(
    kind: str = "encoder",
    classes: tuple[str, ...] = ("ham", "spam"),
    *,
    skill: float = 3.0,
    ordinal: bool = False,
) -> dict[str, Any]:
    truth, probabilities = sample(len(classes), 900, skill)
    record = metrics(truth, probabilities, classes=classes, ordinal=ordinal)
    record["artifact"] = artifact(kind)
    record["text"] = {"sources": ["mails.tsv"], "sha256": "34ab" * 16}
    record["protocol"] |= {"truncated": 31}
    share = 1 / len(classes)
    record["decision"] = {
        "labels": list(classes), "training_prior": [share] * len(classes), "prior": [share] * len(classes),
        "costs": None, "positive": classes[-1] if len(classes) == 2 else None,
        "threshold": 0.5 if len(classes) == 2 else None,
    }  # fmt: skip
    return record


def deployed_quality() -> dict[str, Any]:
    """A failure detector where failures are rare and dear."""
    record = task_quality(classes=("failure", "normal"), skill=2.0)
    record["decision"] = {
        "labels": ["failure", "normal"], "training_prior": [0.2, 0.8], "prior": [0.01, 0.99], "costs": [20.0, 1.0],
        "positive": "failure", "threshold": 1 / 21,
    }  # fmt: skip
    record["protocol"] |= {"prior": [0.01, 0.99], "groups": 3, "truncated": None}
    record["alarms"] = alarms()
    return record


def alarms() -> dict[str, Any]:
    """Three bearings: one announced early, one by the model alone, one by neither."""
    leads = {"bearing-01": 58.0, "bearing-02": 41.0, "bearing-03": None}
    plain = {"bearing-01": 31.0, "bearing-02": None, "bearing-03": None}
    rate = {"false_alarms": 5, "false_alarm_rate": 0.0042}
    return {
        "schema": "edgeslm.alarms/1", "warning_s": 60.0, "false_alarm_rate": 0.0042, "machines": 3,
        "positive": "failure", "gain_s": {"value": 22.67, "low": 0.0, "high": 41.0}, "earlier": 2, "later": 0,
        "never_later": True,
        "score": {"threshold": 1 / 21, "lead_s": leads, "announced": 2, "mean_lead_s": 33.0, **rate},
        "baseline": {
            "threshold": 1.93, "lead_s": plain, "announced": 1, "mean_lead_s": 31 / 3, "name": "rms, mean of 8 rows",
            **rate,
        },
    }  # fmt: skip


def predict(rate: float = 410.0, batch: int = 1, **changes: Any) -> dict[str, Any]:
    latency = batch / rate
    return {
        "kind": "predict", "batch": batch, "tokens": 256, "rows": None, "threads": 2, "calls": 200, "repetitions": 5,
        "samples_s": [200 * latency * factor for factor in (0.99, 1.0, 1.0, 1.01, 1.02)], "items_per_s": rate,
        "items_per_s_stdev": rate * 0.012,
        "latency_s": {"p50": latency, "p95": latency * 1.1, "p99": latency * 1.4}, "valid": True, "reasons": [],
    } | changes  # fmt: skip


def bench(kind: str = "encoder", runs: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    runs = [predict(), predict(560.0, 8), predict(590.0, 32)] if runs is None else runs
    return records.bench(runs=runs) | {
        "artifact": artifact(kind),
        "machine": machine(),
        "memory_bandwidth_bytes_per_s": None,
    }


def training(stage: str | None = "finetune", steps: int = 240, **changes: Any) -> dict[str, Any]:
    """A loss that falls and levels off, with the noise of small batches."""
    random = np.random.default_rng(steps)
    curve = [
        {"step": step, "loss": 0.06 + 0.65 * math.exp(-step / 40) * (1 + 0.2 * random.standard_normal()),
         "learning_rate": 1e-4 * min(1, step / 12), "tokens_per_s": 3100.0}
        for step in range(1, steps + 1)
    ]  # fmt: skip
    evaluations = [
        {"step": step, "loss": 0.08 + 0.62 * math.exp(-step / 40) + step * 8e-5}
        for step in range(0, steps + 1, steps // 8)
    ]
    record = {
        "schema": "edgeslm.training/1", "steps": steps, "epochs": 3.0, "examples": steps * 16, "tokens": 812_400,
        "seconds": 262.4, "curve": curve, "evaluations": evaluations, "best_step": 150, "weights_of_step": 150,
        "stopped_early": True, "resumed_from": None, "processes": 1, "precision": "float32", "seed": 7,
        "heldout": {"examples": 900, "log_loss": 0.0912, "accuracy": 0.985},
    }  # fmt: skip
    return (record | {"stage": stage} if stage else record) | changes


def language_training() -> dict[str, Any]:
    figures = {"loss_before": 2.71, "loss": 2.29, "perplexity_before": 15.03, "perplexity": 9.91}
    return training(
        "distill",
        110,
        heldout=figures,
        weights_of_step=110,
        stopped_early=False,
        method="lora",
        trained_parameters=921_600,
    )


def data() -> dict[str, Any]:
    return {
        "schema": "edgeslm.data/1",
        "train": {"examples": 5290, "classes": {"ham": 3643, "spam": 1647}, "tokens": 1_204_113, "truncated": 1012},
        "heldout": {"examples": 756, "classes": {"ham": 521, "spam": 235}, "tokens": 171_004, "truncated": 140},
        "duplicates": 12, "truncated": 1152, "bad_rows": 3, "licence": "CC0-1.0",
        "scrubbed": {"emails": 8112, "addresses": 930, "phones": 411, "ibans": 0},
    }  # fmt: skip


def sensor_data() -> dict[str, Any]:
    side = {"examples": 3111, "classes": {"failure": 40, "normal": 3071}, "units": 9, "rows_per_window": 16}
    return {
        "schema": "edgeslm.data/1", "train": side, "heldout": side | {"examples": 1001, "units": 3},
        "split_by": "unit", "duplicates": 0, "bad_rows": 0, "repeated_rows": 2, "gaps": 4,
        "missing_readings": 0.0031, "windows_left_out": {"no_label": 0, "missing_readings": 7},
        "channels": ["rms", "kurtosis", "crest", "envelope"], "empty_channels": [], "constant_channels": ["crest"],
        "licence": None,
    }  # fmt: skip


def blocks_data() -> dict[str, Any]:
    side = {"examples": 220, "documents": 71, "tokens": 112_640, "counted_tokens": 98_011}
    return {"schema": "edgeslm.data/1", "train": side, "heldout": side | {"documents": 8}, "duplicates": None,
            "truncated": 0, "bad_rows": 0, "scrubbed": None}  # fmt: skip


def prune(**changes: Any) -> dict[str, Any]:
    widths = {"layers": 30, "mlp_width": 1536, "kv_heads": 3, "hidden_size": 576}
    influence = [0.41, *(0.05 + 0.02 * ((7 * layer) % 11) for layer in range(1, 29)), 0.37]
    dropped = sorted(range(30), key=lambda layer: influence[layer])[:6]
    return {
        "schema": "edgeslm.prune/1", "dropped_layers": sorted(dropped), "layers_by": "cosine", "influence": influence,
        "widths": {"before": widths, "after": widths | {"layers": 24, "mlp_width": 1280}},
        "tokens": {"before": 49_152, "after": 17_408, "used": 16_977},
        "parameters": {"before": 134_515_008, "after": 92_113_344},
        "notes": ["mlp_width 1300 rounded down to 1280, a multiple of 256"],
    } | changes  # fmt: skip


def build(**changes: Any) -> dict[str, Any]:
    quality, timed = task_quality(), bench()
    record = {
        "schema": "edgeslm.build/1", "bundle": artifact()["path"], "bytes": artifact()["file_bytes"],
        "bits_per_weight": 32.0, "quality": quality, "bench": timed,
        "gate": {
            "passed": False,
            "misses": [{"bound": "min_accuracy", "limit": 0.999, "value": quality["accuracy"]["value"],
                        "by": 0.999 - quality["accuracy"]["value"]}],
        },
        "report": f"{artifact()['path']}/report.html",
        "stages": [
            {"name": "data", "key": "aa" * 32, "skipped": False, "seconds": 4.2},
            {"name": "finetune", "key": "bb" * 32, "skipped": False, "seconds": 262.4},
            {"name": "quantize", "key": "cc" * 32, "skipped": False, "seconds": 6.0},
            {"name": "evaluate", "key": "dd" * 32, "skipped": False, "seconds": 21.0},
        ],
        "warnings": [], "data": data(), "training": [training()], "prune": None,
    }  # fmt: skip
    return record | changes


def language_build() -> dict[str, Any]:
    """A language model that was fine-tuned, cut twice and healed."""
    cut = prune(
        before=prune(
            influence=None, dropped_layers=[], widths={"before": {"layers": 30}, "after": {"layers": 30}}
        )
    )
    return records.build(
        data=blocks_data(), training=[training(heldout=None), language_training()], prune=cut
    )


def checkpoint() -> dict[str, Any]:
    return {
        "schema": "edgeslm.checkpoint/1", "path": "out/smaller", "parameters": 92_113_344, "data": blocks_data(),
        "training": [language_training()], "prune": prune(),
        "stages": [{"name": "prune", "key": "aa" * 32, "skipped": False, "seconds": 44.0}],
    }  # fmt: skip
