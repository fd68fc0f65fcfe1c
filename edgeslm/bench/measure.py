"""Speed and memory of an artifact on this machine, by the methods of llama-bench.

As in llama.cpp's tools/llama-bench/llama-bench.cpp (test_prompt, test_gen): a warm-up; prefill of random
tokens on an empty state, in batches; decode of random tokens one at a time from an empty state, waiting
for each; prefill and decode apart; tokens per second averaged over repetitions.  Added: time to first
token, time per output token, memory, the ceiling that memory bandwidth sets, and whether to believe it.

Nothing is drawn while the clock runs: a progress bar's thread would take a core from the model, so
progress is told in lines between runs.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.bench import interference
from edgeslm.bench.memory import MemoryWatch
from edgeslm.bench.sustained import sustain_model
from edgeslm.bench.watch import watch_machine
from edgeslm.bench.weights import read_weights
from edgeslm.bundle import open_bundle
from edgeslm.device import memory_bandwidth, probe
from edgeslm.errors import RecipeError
from edgeslm.progress import Quiet
from edgeslm.runtime.runner import RunnerOptions, open_runner
from edgeslm.versions import engine_versions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from edgeslm.bench.interference import Conditions
    from edgeslm.bench.watch import Watch
    from edgeslm.bench.weights import Weights
    from edgeslm.bundle import Bundle
    from edgeslm.progress import Progress
    from edgeslm.runtime.runner import Runner

    Clock = Callable[[], float]
    Observe = Callable[[], Conditions]

SCHEMA = "edgeslm.bench/1"
WORDS = (
    "the",
    "of",
    "and",
    "a",
    "to",
    "in",
    "is",
    "was",
    "for",
    "on",
    "with",
    "at",
    "by",
    "from",
    "time",
    "water",
)
"""A prompt's words; what they say has no influence on the time."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure with each loaded model."""

    prompt_tokens: tuple[int, ...]
    decode_tokens: tuple[int, ...]
    repetitions: int

    @property
    def longest(self) -> int:
        return max(*self.prompt_tokens, *self.decode_tokens, 1)


@dataclass(frozen=True, kw_only=True)
class Timing:
    """The clock and what else surrounds a measurement: given, so that a test can give others."""

    clock: Clock = time.perf_counter
    observe: Observe = interference.observe
    complete: Callable[[dict[str, Any]], dict[str, Any]] = dict
    """What else to say of a run that has just been measured: power and heat."""


def bench_artifact(
    artifact: Path | str,
    *,
    prompt_tokens: Sequence[int] = (512,),
    decode_tokens: Sequence[int] = (128,),
    threads: Sequence[int] = (),
    repetitions: int = 5,
    options: RunnerOptions | None = None,
    minutes: float | None = None,
    progress: Progress | None = None,
    seed: int = 0,
    clock: Clock = time.perf_counter,
) -> dict[str, Any]:
    """Record edgeslm.bench/1 of a language model: a bundle of either format or a .gguf file.

    threads: thread counts to measure one after the other; empty: options.threads, else the runner's choice.
    options.context None: the longest measurement.  seed: of the random tokens.
    minutes: after all that, and with the last thread count, how long to go on for the speed that lasts.
    Memory is the peak of this process from here on (see memory.reset_peak), so call this in a process
    that holds nothing else of size, or use child.bench_in_subprocess.
    load_s is the first load, with whatever of the file the system held in its page cache.
    Raises BundleError, ModelError or EngineError for the artifact, RecipeError for impossible sizes.
    """
    options, progress = options or RunnerOptions(), progress or Quiet()
    plan = Plan(
        prompt_tokens=tuple(prompt_tokens), decode_tokens=tuple(decode_tokens), repetitions=repetitions
    )
    _check(plan, options)
    bundle = open_bundle(artifact)
    weights = read_weights(bundle)
    machine = probe()
    memory = MemoryWatch()
    loads: list[float] = []
    runs: list[dict[str, Any]] = []
    sustained = None
    counts = list(threads or (options.threads,))
    with watch_machine(progress.note) as watch:
        for number, count in enumerate(counts, 1):
            each = replace(options, threads=count, context=options.context or plan.longest)
            some, load_s, sustained = _measure_with(
                bundle, plan, each, minutes=minutes if number == len(counts) else None, watch=watch,
                memory=memory, progress=progress, seed=seed, clock=clock,
            )  # fmt: skip
            loads.append(load_s)
            runs += some
    after = probe()
    # Last, as its buffer would count as memory of the model.
    bandwidth = memory_bandwidth(working_set_bytes=weights.decode_bytes)
    return {
        "schema": SCHEMA,
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "artifact": _describe(bundle, weights),
        "machine": machine,
        "machine_after": {key: after[key] for key in ("frequency_hz", "temperature_c", "load_average_1m")},
        "versions": engine_versions(),
        "memory_bandwidth_bytes_per_s": bandwidth,
        "load_s": loads[0],
        "runs": [_with_ceiling(run, bandwidth, weights.decode_bytes) for run in runs],
        **outcome([(_label(run), run) for run in runs], sustained, memory, watch),
    }


def outcome(
    labelled: Sequence[tuple[str, dict[str, Any]]],
    sustained: dict[str, Any] | None,
    memory: MemoryWatch,
    watch: Watch,
) -> dict[str, Any]:
    """The end of a record: what was sampled beside its runs, and why they are not valid if so."""
    known = [*labelled, *([("sustained", sustained)] if sustained else [])]
    reasons = list(dict.fromkeys(f"{label}: {reason}" for label, run in known for reason in run["reasons"]))
    return {
        "sustained": sustained,
        "memory": memory.as_record(),
        "power": watch.as_record(),
        "valid": not reasons,
        "reasons": reasons,
    }


def _measure_with(
    bundle: Bundle, plan: Plan, options: RunnerOptions, *, minutes: float | None, watch: Watch, memory: MemoryWatch,
    progress: Progress, seed: int, clock: Clock,
) -> tuple[list[dict[str, Any]], float, dict[str, Any] | None]:  # fmt: skip
    """The runs of one thread count, the seconds of loading, and what lasts for some minutes."""
    timing = Timing(clock=clock, observe=watch.observe, complete=watch.complete)
    runner = open_runner(bundle, options)
    try:
        for note in runner.notes:
            progress.note(f"bench: {note}")
        runs = measure(runner, plan, memory=memory, timing=timing, progress=progress, seed=seed)
        if minutes is None:
            return runs, runner.load_s, None
        sustained = sustain_model(
            runner, plan, minutes=minutes, watch=watch, clock=clock, progress=progress, seed=seed
        )
        memory.sample()
        return runs, runner.load_s, sustained
    finally:
        runner.close()


def measure(
    runner: Runner, plan: Plan, *, memory: MemoryWatch, timing: Timing, progress: Progress, seed: int
) -> list[dict[str, Any]]:
    """All prefill and decode runs of one loaded model."""
    random = np.random.default_rng(seed)
    runs = []
    for kind, sizes in (("prefill", plan.prompt_tokens), ("decode", plan.decode_tokens)):
        for size in sizes:
            progress.note(
                f"bench: {kind} {size} tokens, {runner.options.threads} threads, {plan.repetitions} times"
            )
            tokens = _random_tokens(runner, size, random)
            one = measure_prefill if kind == "prefill" else measure_decode
            runs.append(
                timing.complete(_facts(kind, size, runner) | one(runner, tokens, plan.repetitions, timing))
            )
            memory.sample()
    return runs


def measure_prefill(
    runner: Runner, tokens: Sequence[int], repetitions: int, timing: Timing
) -> dict[str, Any]:
    """Prefill of `tokens`, [repetitions] samples, and the time to first token of a prompt as long.

    ttft_s: from a prompt's text to its first output token, on an empty state with the model loaded:
    tokenizing a text of about as many tokens, prefill, logits of the last position, the likeliest token.
    Its parts are timed in the same repetitions; samples_s is the prefill alone, as in llama-bench.
    """
    text = _prompt(runner, len(tokens))
    clock = timing.clock
    samples, first_tokens = [], []
    runner.reset()
    runner.prefill(tokens)
    runner.synchronize()
    before = timing.observe()
    for _ in range(repetitions):
        runner.reset()
        start = clock()
        runner.tokenize(text, add_special=True, parse_special=True)
        tokenized = clock()
        runner.prefill(tokens)
        runner.synchronize()
        filled = clock()
        int(runner.last_logits().argmax())
        chosen = clock()
        samples.append(filled - tokenized)
        first_tokens.append(chosen - start)
    after = timing.observe()
    runner.reset()
    return {
        **_speed(len(tokens), samples),
        "ttft_s": {"p50": float(np.median(first_tokens)), "min": min(first_tokens), "max": max(first_tokens)},
        **_validity(samples, before, after),
    }


def measure_decode(runner: Runner, tokens: Sequence[int], repetitions: int, timing: Timing) -> dict[str, Any]:
    """Decode of `tokens` one at a time from an empty state, [repetitions] samples, and the time of single tokens.

    tpot_s: percentiles over all steps of all repetitions.  The clock is read once a step, about 0.1 us
    where a step takes milliseconds, so the same repetitions give both.
    """
    samples: list[float] = []
    steps: list[float] = []
    runner.reset()
    runner.step(tokens[0])
    runner.synchronize()
    before = timing.observe()
    for _ in range(repetitions):
        runner.reset()
        stamps = _decode(runner, tokens, timing.clock)
        samples.append(stamps[-1] - stamps[0])
        steps += np.diff(stamps).tolist()
    after = timing.observe()
    runner.reset()
    p50, p95, p99 = (float(value) for value in np.quantile(steps, (0.5, 0.95, 0.99)))
    return {
        **_speed(len(tokens), samples),
        "tpot_s": {"p50": p50, "p95": p95, "p99": p99},
        **_validity(samples, before, after),
    }


def _decode(runner: Runner, tokens: Sequence[int], clock: Clock) -> list[float]:
    """The clock before the first step and after each: [S + 1]."""
    step, synchronize = runner.step, runner.synchronize
    stamps = [clock()]
    for token in tokens:
        step(token)
        synchronize()
        stamps.append(clock())
    return stamps


def _random_tokens(runner: Runner, count: int, random: np.random.Generator) -> list[int]:
    """BOS where the model wants it, then tokens drawn from the whole vocabulary, as llama-bench has it."""
    tokens: list[int] = random.integers(runner.facts.vocab_size, size=count).tolist()
    if runner.facts.adds_bos and runner.facts.bos_token is not None:
        tokens[0] = runner.facts.bos_token
    return tokens


def _prompt(runner: Runner, count: int) -> str:
    """Text of about `count` tokens."""
    words = [WORDS[i % len(WORDS)] for i in range(count)]
    found = len(runner.tokenize(" ".join(words), add_special=True, parse_special=True))
    return " ".join(words[: max(1, round(count * count / max(found, 1)))])


def _facts(kind: str, tokens: int, runner: Runner) -> dict[str, Any]:
    options = runner.options
    return {
        "kind": kind,
        "tokens": tokens,
        "threads": options.threads,
        "batch": options.batch,
        "ubatch": options.ubatch,
        "context": options.context,
        "kv_type": options.kv_type,
        "flash_attention": options.flash_attention,
        "mmap": options.mmap,
        "gpu_layers": options.gpu_layers,
        "provider": options.provider,
    }


def _speed(tokens: int, samples_s: list[float]) -> dict[str, Any]:
    """Tokens per second: the mean of the repetitions' speeds, as llama-bench has it."""
    speeds = [tokens / sample for sample in samples_s]
    return {
        "repetitions": len(samples_s),
        "samples_s": samples_s,
        "tokens_per_s": float(np.mean(speeds)),
        "tokens_per_s_stdev": float(np.std(speeds, ddof=1)) if len(speeds) > 1 else None,
    }


def _validity(samples_s: Sequence[float], before: Conditions, after: Conditions) -> dict[str, Any]:
    reasons = interference.reasons(samples_s, before, after)
    return {"valid": not reasons, "reasons": reasons}


def _with_ceiling(
    run: dict[str, Any], bandwidth_bytes_per_s: float | None, bytes_per_token: int
) -> dict[str, Any]:
    """A decode run with the speed at which memory could deliver the weights, and the share reached."""
    if run["kind"] != "decode":
        return run
    ceiling = bandwidth_bytes_per_s / bytes_per_token if bandwidth_bytes_per_s and bytes_per_token else None
    fraction = run["tokens_per_s"] / ceiling if ceiling else None
    return run | {"ceiling_tokens_per_s": ceiling, "ceiling_fraction": fraction}


def _describe(bundle: Bundle, weights: Weights) -> dict[str, Any]:
    return {
        "name": bundle.name,
        "path": str(bundle.path),
        "format": bundle.format,
        "digest": bundle.digest,
        "file_bytes": bundle.size_bytes,
        "weight_bytes": weights.weight_bytes,
        "decode_bytes_per_token": weights.decode_bytes,
        "parameters": weights.parameters,
        "bits_per_weight": weights.weight_bytes * 8 / weights.parameters if weights.parameters else None,
        "architecture": weights.architecture,
    }


def _label(run: dict[str, Any]) -> str:
    return f"{run['kind']} {run['tokens']} tokens, {run['threads']} threads"


def _check(plan: Plan, options: RunnerOptions) -> None:
    if not plan.prompt_tokens and not plan.decode_tokens:
        raise RecipeError("there is nothing to measure", hint="give prompt_tokens or decode_tokens")
    smallest = min(*plan.prompt_tokens, *plan.decode_tokens, plan.repetitions)
    if smallest < 1:
        raise RecipeError(
            f"{smallest} is no count of tokens or repetitions", hint="give whole numbers from 1 up"
        )
    if options.context is not None and plan.longest > options.context:
        raise RecipeError(
            f"a measurement of {plan.longest} tokens does not fit the context of {options.context}",
            hint=f"use a context of {plan.longest} or more, or leave it out",
        )
