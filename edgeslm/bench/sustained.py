"""The same work for minutes: how fast a machine still is when it is warm.

A short run shows what a cold machine can do.  Small devices reach their limit of temperature after minutes,
laptops fall back from their turbo after half of one.  Here a curve shows it, and the speed that lasts.
"""

from __future__ import annotations

from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.bench import interference
from edgeslm.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from edgeslm.bench.measure import Clock, Plan
    from edgeslm.bench.power import Energy
    from edgeslm.bench.watch import Watch
    from edgeslm.progress import Progress
    from edgeslm.runtime.runner import Runner

MOST_POINTS, FEWEST_POINTS = 120, 24
"""Of the curve, where a unit of work is short enough."""
POINT_S = 5.0
"""A point as long as this has enough readings of power, one a second; the curve has fewer than MOST_POINTS for it."""
NOTE_EVERY_S = 60.0
BAND = 0.05
"""How far a steady speed may lie from its mean."""
SMOOTHING = 5
"""Points of which the median counts: one odd point is no change of speed."""
TAIL = 0.25
"""Share of the time, at its end, that must be steady."""
START = 1 / 12
"""Share of the time whose speed is that of the cold machine."""


def sustain(
    work: Callable[[], int],
    *,
    minutes: float,
    unit: str,
    facts: Mapping[str, Any],
    watch: Watch,
    clock: Clock,
    progress: Progress,
) -> dict[str, Any]:
    """Repeat `work` for some minutes: the `sustained` part of a record edgeslm.bench/1.

    work: does a few seconds of it at most and returns how many units (tokens, examples) it was; it is never
    cut short.  Reasons against the run are those of interference.reasons, but for the spread, and of
    thermal.reasons.
    """
    if not minutes > 0:
        raise RecipeError(f"{minutes} is no time to measure for", hint="give minutes above 0, such as 10")
    work()
    before = watch.observe()
    start = clock()
    offset = before.wall_s - start
    stamps, counts, noted = [start], [], start
    while stamps[-1] - start < minutes * 60:
        counts.append(work())
        stamps.append(clock())
        if stamps[-1] - noted >= NOTE_EVERY_S:
            noted = stamps[-1]
            speed = counts[-1] / (stamps[-1] - stamps[-2])
            progress.note(f"bench: {(noted - start) / 60:.0f} of {minutes:g} minutes, {speed:.4g} {unit}s/s")
    after = watch.observe()
    total, seconds = sum(counts), stamps[-1] - start
    width = max(minutes * 60 / MOST_POINTS, min(POINT_S, minutes * 60 / FEWEST_POINTS))
    points = curve([stamp - start for stamp in stamps], counts, width)
    for point in points:
        point.update(_conditions(watch, start + offset + point["at_s"], point["seconds"]))
    steady = steady_state(points)
    energy = watch.energy(start + offset + steady["from_s"], stamps[-1] + offset)
    reasons = interference.reasons([], before, after)
    return {
        **facts,
        "unit": unit,
        "minutes": minutes,
        "seconds": seconds,
        "total": total,
        **watch.facts(start + offset, stamps[-1] + offset, total, unit, reasons),
        "curve": points,
        "start_rate_per_s": _start_rate(points),
        "steady": steady | energy_at(steady["rate_per_s"], energy, unit),
    }


def energy_at(rate_per_s: float | None, energy: Energy | None, unit: str) -> dict[str, float | None]:
    """Power, and energy of a unit of work, at a speed; None where one of them is not known."""
    power = energy.mean_w if energy else None
    return {"power_w": power, f"joules_per_{unit}": power / rate_per_s if power and rate_per_s else None}


def sustain_model(
    runner: Runner, plan: Plan, *, minutes: float, watch: Watch, clock: Clock, progress: Progress, seed: int
) -> dict[str, Any]:
    """Decode of the plan's last length from an empty state, again and again; prefill where it has no decode."""
    kind, size = (
        ("decode", plan.decode_tokens[-1]) if plan.decode_tokens else ("prefill", plan.prompt_tokens[-1])
    )
    tokens = np.random.default_rng(seed).integers(runner.facts.vocab_size, size=size).tolist()

    def work() -> int:
        runner.reset()
        if kind == "prefill":
            runner.prefill(tokens)
            runner.synchronize()
        else:
            for token in tokens:
                runner.step(token)
                runner.synchronize()
        return len(tokens)

    facts = {"kind": kind, "tokens": size, "threads": runner.options.threads}
    progress.note(f"bench: {kind} {size} tokens, {runner.options.threads} threads, for {minutes:g} minutes")
    try:
        return sustain(
            work, minutes=minutes, unit="token", facts=facts, watch=watch, clock=clock, progress=progress
        )
    finally:
        runner.reset()


def sustain_calls(
    call: Callable[[], object], facts: Mapping[str, Any], *, minutes: float, watch: Watch, clock: Clock,
    progress: Progress,
) -> dict[str, Any]:  # fmt: skip
    """A classifier's call of a batch, again and again; a unit of work is as many calls as fill about a second."""
    call()
    start = clock()
    call()
    calls = max(1, round(1.0 / max(clock() - start, 1e-4)))

    def work() -> int:
        for _ in range(calls):
            call()
        return calls * int(facts["batch"])

    kept = {key: facts[key] for key in ("kind", "batch", "tokens", "rows", "threads")}
    progress.note(f"bench: batches of {facts['batch']}, {facts['threads']} threads, for {minutes:g} minutes")
    return sustain(
        work, minutes=minutes, unit="example", facts=kept, watch=watch, clock=clock, progress=progress
    )


def curve(stamps_s: Sequence[float], counts: Sequence[int], width_s: float) -> list[dict[str, Any]]:
    """Units of work joined to points of at least width_s: {at_s, seconds, rate_per_s}.

    stamps_s: [N + 1], the start of each unit and the end of the last.  counts: [N].
    A last point that is too short belongs to the one before.
    """
    points: list[dict[str, Any]] = []
    first = 0
    for number in range(1, len(stamps_s)):
        seconds = stamps_s[number] - stamps_s[first]
        if seconds >= width_s or (number == len(stamps_s) - 1 and not points):
            points.append(_point(stamps_s, counts, first, number))
            first = number
    if points and first < len(counts):
        points[-1] = _point(stamps_s, counts, first - _units(stamps_s, points[-1], first), len(counts))
    return points


def _units(stamps_s: Sequence[float], point: Mapping[str, Any], end: int) -> int:
    """Units of work in a point that ends with the stamp of number `end`."""
    return end - next(number for number, stamp in enumerate(stamps_s) if stamp >= point["at_s"])


def _point(stamps_s: Sequence[float], counts: Sequence[int], first: int, last: int) -> dict[str, Any]:
    seconds = stamps_s[last] - stamps_s[first]
    return {
        "at_s": stamps_s[first],
        "seconds": seconds,
        "rate_per_s": sum(counts[first:last]) / seconds if seconds > 0 else None,
    }


def steady_state(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What lasts: from when on the speed, as a median of SMOOTHING points, keeps within BAND of its mean at the end.

    reached: whether that holds for the last TAIL of the time at least; if not, the values are of that tail,
    and still change.  Means are over time; fraction_of_start is against the first START of the time.
    """
    end = points[-1]["at_s"] + points[-1]["seconds"]
    tail = [point for point in points if point["at_s"] >= (1 - TAIL) * end] or [points[-1]]
    level = _rate(tail)
    rates = [point["rate_per_s"] or 0.0 for point in points]
    half = SMOOTHING // 2
    first = len(points)
    while first > 0:
        near = rates[max(0, first - 1 - half) : first + half]
        if abs(median(near) - level) > BAND * level:
            break
        first -= 1
    reached = first < len(points) and points[first]["at_s"] <= tail[0]["at_s"]
    lasting = points[first:] if reached else tail
    rate, start = _rate(lasting), _start_rate(points)
    return {
        "reached": reached,
        "from_s": lasting[0]["at_s"],
        "rate_per_s": rate,
        "fraction_of_start": rate / start if start else None,
        **{key: _mean(lasting, key) for key in ("temperature_c", "frequency_hz")},
    }


def _start_rate(points: Sequence[Mapping[str, Any]]) -> float:
    end = points[-1]["at_s"] + points[-1]["seconds"]
    return _rate([point for point in points if point["at_s"] < START * end] or points[:1])


def _rate(points: Sequence[Mapping[str, Any]]) -> float:
    """Units a second over all of the points' time."""
    seconds: float = sum(point["seconds"] for point in points)
    return (
        sum((point["rate_per_s"] or 0.0) * point["seconds"] for point in points) / seconds if seconds else 0.0
    )


def _mean(points: Sequence[Mapping[str, Any]], key: str) -> float | None:
    known = [point[key] for point in points if point.get(key) is not None]
    return fmean(known) if known else None


def _conditions(watch: Watch, start_s: float, seconds: float) -> dict[str, Any]:
    """Means of temperature, clock and power in a point's time, and the flags seen."""
    moments = watch.moments(start_s, start_s + seconds)
    energy = watch.energy(start_s, start_s + seconds)
    temperatures = [m.temperature_c for m in moments if m.temperature_c is not None]
    clocks = [m.frequency_hz for m in moments if m.frequency_hz is not None]
    flags = sorted({flag for m in moments for flag in m.flags or ()})
    return {
        "temperature_c": fmean(temperatures) if temperatures else None,
        "frequency_hz": fmean(clocks) if clocks else None,
        "power_w": energy.mean_w if energy else None,
        "flags": flags,
    }
