"""What every record of edgeslm looks like: the shapes that untrusted files are held against.

float stands for any number, a list for any number of its element, "*" for any key, {} for anything in an
object.  Every value may be missing or null.
"""

from __future__ import annotations

from typing import Any

SCHEMA = "edgeslm.report/1"
VARIANTS = "edgeslm.variants/1"
BUNDLE, BUILD, CHECKPOINT = "edgeslm.bundle/1", "edgeslm.build/1", "edgeslm.checkpoint/1"
QUALITY, TASK_QUALITY, BENCH = "edgeslm.quality/1", "edgeslm.task-quality/1", "edgeslm.bench/1"
DATA, TRAINING, PRUNE = "edgeslm.data/1", "edgeslm.training/1", "edgeslm.prune/1"

_ESTIMATE = {"value": float, "low": float, "high": float}
_ARTIFACT = {
    **dict.fromkeys(("name", "path", "format", "digest", "architecture"), str),
    **dict.fromkeys(("file_bytes", "weight_bytes", "parameters", "bits_per_weight"), float),
}
_TIMES = dict.fromkeys(("p50", "p95", "p99", "min", "max"), float)
_POWER: dict[str, Any] = {
    **dict.fromkeys(("source", "covers"), str),
    **dict.fromkeys(("interval_s", "energy_j", "seconds", "samples", "mean_w", "max_w", "joules_per_token",
                     "joules_per_example"), float),
    "notes": [str],
}  # fmt: skip
_HEAT = {
    "samples": float,
    **dict.fromkeys(("temperature_c", "frequency_hz"), dict.fromkeys(("start", "min", "max", "end"), float)),
    "flags": [str],
}
_SPAN: dict[str, Any] = {
    **dict.fromkeys(("started_unix_s", "ended_unix_s"), float), "power": _POWER, "thermal": _HEAT,
}  # fmt: skip
_POINT = {
    **dict.fromkeys(("at_s", "seconds", "rate_per_s", "temperature_c", "frequency_hz", "power_w"), float),
    "flags": [str],
}
_SUSTAINED: dict[str, Any] = {
    **dict.fromkeys(("kind", "unit"), str),
    **dict.fromkeys(("tokens", "batch", "rows", "threads", "minutes", "seconds", "total", "start_rate_per_s"), float),
    **_SPAN, "curve": [_POINT], "valid": bool, "reasons": [str],
    "steady": {
        "reached": bool,
        **dict.fromkeys(("from_s", "rate_per_s", "fraction_of_start", "temperature_c", "frequency_hz", "power_w",
                         "joules_per_token", "joules_per_example"), float),
    },
}  # fmt: skip
_RUN = {
    **_SPAN,
    **dict.fromkeys(("kind", "kv_type", "provider"), str),
    **dict.fromkeys(("tokens", "threads", "batch", "ubatch", "context", "gpu_layers", "repetitions", "tokens_per_s",
                     "tokens_per_s_stdev", "ceiling_tokens_per_s", "ceiling_fraction", "rows", "calls",
                     "items_per_s", "items_per_s_stdev"), float),
    **dict.fromkeys(("flash_attention", "mmap", "valid"), bool),
    "samples_s": [float], "tpot_s": _TIMES, "ttft_s": _TIMES, "latency_s": _TIMES, "reasons": [str],
}  # fmt: skip
_MACHINE = {
    **dict.fromkeys(("cpu_model", "architecture", "os", "kernel", "python", "governor"), str),
    **dict.fromkeys(("physical_cores", "logical_cores", "usable_cores", "memory_bytes", "frequency_hz",
                     "memory_available_bytes", "temperature_c", "load_average_1m"), float),
    "instruction_sets": [str], "emulated": bool,
}  # fmt: skip
_DECISION = {
    "labels": [str], "training_prior": [float], "prior": [float], "costs": [float], "positive": str,
    "threshold": float,
}  # fmt: skip
_WATCH = {
    **dict.fromkeys(("threshold", "false_alarms", "false_alarm_rate", "announced", "mean_lead_s"), float),
    "lead_s": {"*": float}, "name": str,
}  # fmt: skip
_TASK: dict[str, Any] = {
    "classes": [str],
    "ordinal": bool,
    **dict.fromkeys(("accuracy", "log_loss", "quadratic_weighted_kappa", "mean_absolute_error"), _ESTIMATE),
    "expected_calibration_error": {**_ESTIMATE, "by_chance": float},
    "macro": dict.fromkeys(("precision", "recall", "f1"), _ESTIMATE),
    "per_class": {
        "*": {"examples": float, "chosen": float, **dict.fromkeys(("precision", "recall", "f1"), _ESTIMATE)}
    },
    "confusion": [[float]],
    "reliability": [dict.fromkeys(("low", "high", "examples", "certainty", "accuracy"), float)],
    "decision": _DECISION,
    "alarms": {
        **dict.fromkeys(("warning_s", "false_alarm_rate", "machines", "earlier", "later"), float),
        "score": _WATCH,
        "baseline": _WATCH,
        "gain_s": _ESTIMATE,
        "positive": str,
    },
}
"""What a classifier's quality has beside what all have."""
_LEVEL = dict.fromkeys(
    ("level", "top1_agreement", "kl_nats", "prefill_tokens_per_s", "decode_tokens_per_s"), float
)
_QUALITY: dict[str, Any] = {
    "artifact": _ARTIFACT,
    "reference": _ARTIFACT,
    "text": {"sources": [str], "sha256": str, "tokens": float},
    "protocol": {
        **dict.fromkeys(("context", "scored_tokens", "windows", "examples", "groups", "truncated"), float),
        "prior": [float],
        "method": str,
    },
    **dict.fromkeys(("perplexity", "reference_perplexity", "perplexity_ratio", "top1_agreement"), _ESTIMATE),
    "kl_nats": dict.fromkeys(("mean", "median", "p99", "max"), _ESTIMATE),
    "accuracy_level": {"chosen": float, "levels": [_LEVEL]},
    "confidence": float,
    **_TASK,
}
_BENCH: dict[str, Any] = {
    "created_at": str, "artifact": _ARTIFACT, "machine": _MACHINE, "machine_after": _MACHINE,
    "versions": {"*": str}, "memory_bandwidth_bytes_per_s": float, "load_s": float, "runs": [_RUN],
    "sustained": _SUSTAINED, "power": _POWER,
    "memory": dict.fromkeys(("peak_rss_bytes", "file_backed_bytes", "anonymous_bytes"), float),
    "valid": bool, "reasons": [str],
}  # fmt: skip
_GATE = {
    "passed": bool,
    "misses": [{"bound": str, "limit": float, "value": float, "by": float}],
}
_STAGES = [{"name": str, "key": str, "skipped": bool, "seconds": float}]
_TYPE = {"tensors": float, "parameters": float, "bytes": float}
_QUANTIZATION = {
    "scheme": str, "bits_per_weight": float, "importance": str, "types": {"*": _TYPE},
    "fallbacks": [{"tensor": str, "wanted": str, "got": str, "wanted_bits": float, "got_bits": float,
                   "reason": str}],
}  # fmt: skip
_KINDS = [{"kind": str, "tensors": float, "parameters": float, "bytes": float, "types": {"*": _TYPE}}]
_MODEL = {
    **dict.fromkeys(("architecture", "tokenizer", "source", "source_sha256", "licence"), str),
    **dict.fromkeys(("parameters", "context_length", "vocab_size", "opset"), float),
    "labels": [str],
    "preprocessing": {
        "kind": str,
        "channels": [str],
        **dict.fromkeys(("max_tokens", "rows", "stride"), float),
        "normalization": {"kind": str},
    },
}
_RECIPE = {"text": str, "sha256": str}
_MANIFEST: dict[str, Any] = {
    "name": str, "task": str, "format": str, "weights": str, "model": _MODEL, "quantization": _QUANTIZATION,
    "recipe": _RECIPE, "versions": {"*": str}, "quality": _QUALITY, "decision": _DECISION,
    "files": [{"path": str, "bytes": float, "sha256": str}],
}  # fmt: skip
_SIDE = {
    **dict.fromkeys(("examples", "tokens", "counted_tokens", "documents", "truncated", "units",
                     "rows_per_window"), float),
    "classes": {"*": float},
}  # fmt: skip
_DATA: dict[str, Any] = {
    "train": _SIDE,
    "heldout": _SIDE,
    "scrubbed": {"*": float},
    "windows_left_out": {"*": float},
    **dict.fromkeys(("licence", "split_by"), str),
    **dict.fromkeys(
        ("duplicates", "truncated", "bad_rows", "repeated_rows", "gaps", "missing_readings"), float
    ),
    **{key: [str] for key in ("channels", "empty_channels", "constant_channels")},
}
_TRAINING: dict[str, Any] = {
    **dict.fromkeys(("stage", "precision", "method"), str),
    **dict.fromkeys(("steps", "epochs", "examples", "tokens", "seconds", "best_step", "weights_of_step", "seed",
                     "resumed_from", "processes", "trained_parameters"), float),
    "stopped_early": bool,
    "curve": [dict.fromkeys(("step", "loss", "learning_rate", "tokens_per_s"), float)],
    "evaluations": [{"step": float, "loss": float}],
    "heldout": {},
}  # fmt: skip
_PRUNE: dict[str, Any] = {
    "dropped_layers": [float],
    "layers_by": str,
    "influence": [float],
    "widths": {"before": {"*": float}, "after": {"*": float}},
    "tokens": {"before": float, "after": float, "used": float},
    "parameters": {"before": float, "after": float},
    "notes": [str],
}
_PRUNE["before"] = _PRUNE
_LEARNED: dict[str, Any] = {"data": _DATA, "training": [_TRAINING], "prune": _PRUNE}
ENTRY: dict[str, Any] = {
    "label": str, "artifact": _ARTIFACT, "digests": [str], "model": _MODEL, "quantization": _QUANTIZATION,
    "recipe": _RECIPE, "versions": {"*": str}, "kinds": _KINDS, "quality": _QUALITY, "bench": _BENCH,
    "gate": _GATE, "stages": _STAGES, "warnings": [str], **_LEARNED,
}  # fmt: skip
_BUILD: dict[str, Any] = {
    "bundle": str, "bytes": float, "bits_per_weight": float, "quality": _QUALITY, "bench": _BENCH,
    "gate": _GATE, "report": str, "stages": _STAGES, "warnings": [str], **_LEARNED,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    BUNDLE: {"path": str, "digest": str, "bytes": float, "manifest": _MANIFEST, "kinds": _KINDS},
    QUALITY: _QUALITY,
    TASK_QUALITY: _QUALITY,
    BENCH: _BENCH,
    BUILD: _BUILD,
    VARIANTS: {"name": str, "path": str, "variants": [_BUILD], "gate": _GATE, "report": str, "stages": _STAGES},
    CHECKPOINT: {"path": str, "parameters": float, "stages": _STAGES, **_LEARNED},
    DATA: _DATA,
    TRAINING: _TRAINING,
    PRUNE: _PRUNE,
    SCHEMA: {"results": [ENTRY]},
}  # fmt: skip
"""Schema to the shape of its records."""
