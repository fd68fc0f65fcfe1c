"""Speed and memory of a classifier on this machine: one call of a batch, from raw data to probabilities.

A call takes texts (or windows of readings in physical units) and gives probabilities, so tokenizing and
normalizing count.  Latency is that of single calls; examples per second are averaged over repetitions of
many calls, as tokens per second are for language models.
"""

from __future__ import annotations

import math
import time
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.bench import interference
from edgeslm.bench.measure import SCHEMA, WORDS, Timing, outcome
from edgeslm.bench.memory import MemoryWatch
from edgeslm.bench.sustained import sustain_calls
from edgeslm.bench.watch import watch_machine
from edgeslm.bundle import open_bundle
from edgeslm.device import probe
from edgeslm.errors import RecipeError
from edgeslm.progress import Quiet
from edgeslm.runtime.ort import OrtClassifier
from edgeslm.versions import engine_versions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from edgeslm.bundle import Bundle
    from edgeslm.progress import Progress

REPETITION_S = 0.5
"""A repetition has as many calls as fill about this time, so that short calls are timed often."""
MAX_CALLS = 1000


def bench_classifier(
    artifact: Path | str,
    *,
    batch_sizes: Sequence[int] = (1,),
    tokens: Sequence[int] = (),
    threads: Sequence[int] = (),
    repetitions: int = 5,
    minutes: float | None = None,
    progress: Progress | None = None,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Record edgeslm.bench/1 of a classifier bundle, with runs of the kind "predict".

    batch_sizes: examples in a call.  tokens: lengths of the texts; empty: as long as the model reads.
    threads: counts to measure one after the other; empty: the cores.  seed: of sensor readings.
    minutes: how long to go on with the last of all these for the speed that lasts.
    Memory is the peak of this process from here on: see measure.bench_artifact.
    Raises BundleError, ModelError or EngineError for the artifact, RecipeError for impossible sizes.
    """
    progress = progress or Quiet()
    if min((*batch_sizes, *tokens, repetitions, 1)) < 1 or not batch_sizes:
        raise RecipeError(
            "batch sizes, tokens and repetitions are counts", hint="give whole numbers from 1 up"
        )
    bundle = open_bundle(artifact)
    machine = probe()
    memory = MemoryWatch()
    loads: list[float] = []
    runs: list[dict[str, Any]] = []
    sustained = None
    with watch_machine(progress.note) as watch:
        timing = Timing(clock=clock, observe=watch.observe, complete=watch.complete)
        for count in threads or (None,):
            classifier = OrtClassifier(bundle, threads=count, clock=clock)
            loads.append(classifier.load_s)
            for length in _lengths(classifier, tokens):
                for batch in batch_sizes:
                    facts = _facts(classifier, batch, length, repetitions)
                    progress.note(f"bench: predict, {_label(facts)}, {repetitions} times")
                    call = _call(classifier, batch, length, seed)
                    runs.append(timing.complete(facts | measure_predict(call, batch, repetitions, timing)))
                    memory.sample()
        if minutes is not None:
            sustained = sustain_calls(
                call, facts, minutes=minutes, watch=watch, clock=clock, progress=progress
            )
    after = probe()
    return {
        "schema": SCHEMA,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "artifact": describe_classifier(bundle),
        "machine": machine,
        "machine_after": {key: after[key] for key in ("frequency_hz", "temperature_c", "load_average_1m")},
        "versions": engine_versions(),
        "memory_bandwidth_bytes_per_s": None,
        "load_s": loads[0],
        "runs": runs,
        **outcome([(_label(run), run) for run in runs], sustained, memory, watch),
    }


def measure_predict(
    call: Callable[[], object], batch: int, repetitions: int, timing: Timing
) -> dict[str, Any]:
    """Repetitions of many calls: samples_s of whole repetitions, percentiles of single calls' latency.

    The clock is read once a call: about 0.1 us, where the smallest network takes some 20.
    """
    clock = timing.clock
    call()  # memory is taken, and the engine's kernels are chosen
    start = clock()
    call()
    took = max(clock() - start, 1e-9)
    calls = min(max(1, math.ceil(REPETITION_S / took)), MAX_CALLS)
    samples: list[float] = []
    latencies: list[float] = []
    before = timing.observe()
    for _ in range(repetitions):
        stamps = [clock()]
        for _ in range(calls):
            call()
            stamps.append(clock())
        samples.append(stamps[-1] - stamps[0])
        latencies += np.diff(stamps).tolist()
    after = timing.observe()
    speeds = [calls * batch / sample for sample in samples]
    p50, p95, p99 = (float(value) for value in np.quantile(latencies, (0.5, 0.95, 0.99)))
    reasons = interference.reasons(samples, before, after)
    return {
        "calls": calls,
        "samples_s": samples,
        "items_per_s": float(np.mean(speeds)),
        "items_per_s_stdev": float(np.std(speeds, ddof=1)) if len(speeds) > 1 else None,
        "latency_s": {"p50": p50, "p95": p95, "p99": p99},
        "valid": not reasons,
        "reasons": reasons,
    }


def describe_classifier(bundle: Bundle) -> dict[str, Any]:
    """What a classifier bundle says of itself, as the `artifact` of a record."""
    manifest = bundle.manifest or {}
    model, plan = manifest.get("model") or {}, manifest.get("quantization") or {}
    return {
        "name": bundle.name,
        "path": str(bundle.path),
        "format": bundle.format,
        "digest": bundle.digest,
        "file_bytes": bundle.size_bytes,
        "weight_bytes": sum(of.get("bytes") or 0 for of in (plan.get("types") or {}).values()) or None,
        "parameters": model.get("parameters"),
        "bits_per_weight": plan.get("bits_per_weight"),
        "architecture": model.get("architecture"),
    }


def _lengths(classifier: OrtClassifier, tokens: Sequence[int]) -> list[int | None]:
    """Token counts to measure with, none of them beyond what the model reads; None for sensors."""
    if classifier.kind != "text":
        return [None]
    limit = classifier.preprocessing["max_tokens"]
    return list(dict.fromkeys(min(length, limit) for length in tokens)) or [limit]


def _call(classifier: OrtClassifier, batch: int, length: int | None, seed: int) -> Callable[[], object]:
    if length is not None:
        return partial(classifier.predict_texts, [_text(classifier, length)] * batch, batch=batch)
    facts = classifier.preprocessing
    shape = (batch, facts["rows"], len(facts["channels"]))
    center, scale = (np.asarray(facts["normalization"][key]) for key in ("center", "scale"))
    readings = center + scale * np.random.default_rng(seed).standard_normal(shape)
    return partial(classifier.predict_readings, readings, batch=batch)


def _text(classifier: OrtClassifier, length: int) -> str:
    """A text of `length` tokens, or as near to it as whole words come."""
    words = [WORDS[number % len(WORDS)] for number in range(length)]
    low, high = 1, length
    while low < high:  # the most words that still fit
        middle = (low + high + 1) // 2
        if len(classifier.tokenize([" ".join(words[:middle])])[0]) <= length and not any(
            classifier.is_cut([" ".join(words[:middle])])
        ):
            low = middle
        else:
            high = middle - 1
    return " ".join(words[:low])


def _facts(classifier: OrtClassifier, batch: int, length: int | None, repetitions: int) -> dict[str, Any]:
    return {
        "kind": "predict",
        "batch": batch,
        "tokens": length,
        "rows": classifier.preprocessing.get("rows"),
        "threads": classifier.threads,
        "repetitions": repetitions,
    }


def _label(run: dict[str, Any]) -> str:
    size = f"{run['rows']} rows" if run["tokens"] is None else f"{run['tokens']} tokens"
    return f"predict {run['batch']} of {size}, {run['threads']} threads"
