"""What each result costs against how good it is, and which results another one makes pointless.

One result dominates another when it is as good on both axes and better on at least one: Pareto's order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeslm import wording
from edgeslm.bench import scatter
from edgeslm.bench.blocks import Block, Figure, Notes, Table, at, bench_runs, colour

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from edgeslm.bench.blocks import Entry

    Record = Mapping[str, Any]

QUALITY_APART, SPEED_APART = "Quality is not comparable", "Speed is not comparable"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """A price of a result.  key: its name in records, with the SI unit; value: None where it was not measured."""

    key: str
    said: str
    plot: str
    unit: str
    scale: float
    """From the record's unit to the plot's."""
    value: Callable[[Entry], float | None]
    show: Callable[[float | None], str]
    run: str = ""
    """The kind of benchmark run that it is of: only those of equal conditions are compared."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """A measure of quality, less is better.  estimate: {value, low, high}, or None."""

    key: str
    said: str
    plot: str
    unit: str
    scale: float
    estimate: Callable[[Entry], Record | None]
    as_percent: bool = False


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where a result stands among others.

    by: indices of those that dominate it, the best first.  over: where nothing does, the best of those that cost
    less.  clear: whether the loss of one of `by` is below its own (or its own below that of `over`) with
    intervals that don't overlap; they are those of one text, so chance is not the reason then.
    """

    by: tuple[int, ...] = ()
    over: int | None = None
    clear: bool = True


# --- the order ---


def dominators(points: Sequence[tuple[float, float]]) -> list[tuple[int, ...]]:
    """For each (cost, loss) the indices of the points that dominate it: no worse on both axes, better on one.

    The one of the least loss comes first, of several the cheapest.  Equal points don't dominate each other.
    """
    found = []
    for cost, loss in points:
        by = [
            number
            for number, (other_cost, other_loss) in enumerate(points)
            if other_cost <= cost and other_loss <= loss and (other_cost, other_loss) != (cost, loss)
        ]
        found.append(tuple(sorted(by, key=lambda number: (points[number][1], points[number][0]))))
    return found


def standings(costs: Sequence[float], losses: Sequence[Record]) -> list[Standing]:
    """losses: {value, low, high}, one for each cost; low and high may be None."""
    points = [(cost, loss["value"]) for cost, loss in zip(costs, losses, strict=True)]
    found = []
    for number, by in enumerate(dominators(points)):
        if by:
            clear = any(_clearly_below(losses[other], losses[number]) for other in by)
            found.append(Standing(by=by, clear=clear))
            continue
        cheaper = [other for other, (cost, _) in enumerate(points) if cost < points[number][0]]
        over = min(cheaper, key=lambda other: points[other][1], default=None)
        clear = over is None or _clearly_below(losses[number], losses[over])
        found.append(Standing(over=over, clear=clear))
    return found


def _clearly_below(one: Record, other: Record) -> bool:
    high, low = one.get("high"), other.get("low")
    ahead: bool = one["value"] < other["value"] if high is None or low is None else high < low
    return ahead


# --- what is compared ---


def incomparable(entries: Sequence[Entry]) -> list[tuple[str, str]]:
    """What keeps results from being compared, and why."""
    texts = {(at(e, "quality", "text", "sha256"), at(e, "quality", "protocol", "scored_tokens"),
              at(e, "quality", "protocol", "examples")) for e in entries if e.get("quality")}  # fmt: skip
    machines = {(at(e, "bench", "machine", "cpu_model"), at(e, "bench", "machine", "usable_cores"))
                for e in entries if e.get("bench")}  # fmt: skip
    found = []
    if len(texts) > 1:
        found.append((QUALITY_APART, "these results were measured on different texts or windows"))
    if len(machines) > 1:
        found.append((SPEED_APART, "these results come from different machines"))
    return found


def _run(entry: Entry, kind: str) -> Record:
    """The run whose time to quote; {} where it is not to be quoted."""
    runs = bench_runs(entry)
    run = wording.fastest_call(runs) if kind == "predict" else wording.headline(runs, kind)
    return run if run and run.get("valid") is not False else {}


def _error_rate(entry: Entry) -> Record | None:
    """Share of wrong answers, of the accuracy and its interval."""
    accuracy = at(entry, "quality", "accuracy") or {}
    value, low, high = (accuracy.get(key) for key in ("value", "low", "high"))
    if value is None:
        return None
    return {
        "value": 1 - value,
        "low": None if high is None else 1 - high,
        "high": None if low is None else 1 - low,
    }


COSTS = (
    Cost(
        key="file_bytes", said="size", plot="size", unit="MiB", scale=2**-20,
        value=lambda e: at(e, "artifact", "file_bytes"), show=wording.size,
    ),
    Cost(
        key="time_per_token_s", said="time per token", plot="time", unit="ms per token", scale=1e3, run="decode",
        value=lambda e: at(_run(e, "decode"), "tpot_s", "p50"), show=wording.duration,
    ),
    Cost(
        key="latency_s", said="latency", plot="latency", unit="ms", scale=1e3, run="predict",
        value=lambda e: at(_run(e, "predict"), "latency_s", "p50"), show=wording.duration,
    ),
)  # fmt: skip
LOSSES = (
    Loss(
        key="kl_nats", said="KL divergence", plot="kl", unit="mean KL divergence, nats", scale=1.0,
        estimate=lambda e: at(e, "quality", "kl_nats", "mean"),
    ),
    Loss(
        key="perplexity", said="perplexity", plot="perplexity", unit="perplexity", scale=1.0,
        estimate=lambda e: at(e, "quality", "perplexity"),
    ),
    Loss(
        key="error_rate", said="error rate", plot="errors", unit="wrong, %", scale=100.0, estimate=_error_rate,
        as_percent=True,
    ),
)  # fmt: skip
"""In the order of preference: of those that most results have the first is compared."""


def comparisons(entries: Sequence[Entry]) -> list[dict[str, Any]]:
    """For each cost {cost, loss, results: [{label, cost, loss, dominated_by, over, clear}]}, as far as it is known.

    dominated_by, over: labels, and what they mean is in Standing.  [] for results that can't be compared.
    """
    apart = {what for what, _ in incomparable(entries)}
    loss = max(LOSSES, key=lambda each: sum(_loss_of(each, entry) is not None for entry in entries))
    if QUALITY_APART in apart:
        return []
    found = []
    for cost in COSTS:
        known = [e for e in entries if cost.value(e) is not None and _loss_of(loss, e) is not None]
        conditions = {wording.conditions(_run(entry, cost.run)) for entry in known if cost.run}
        if len(known) < 2 or len(conditions) > 1 or (cost.run and SPEED_APART in apart):
            continue
        found.append({"cost": cost.key, "loss": loss.key, "results": _results(cost, loss, known)})
    return found


def _results(cost: Cost, loss: Loss, known: Sequence[Entry]) -> list[dict[str, Any]]:
    costs = [cost.value(entry) or 0.0 for entry in known]
    losses = [loss.estimate(entry) or {} for entry in known]
    return [
        {
            "label": entry["label"],
            "cost": price,
            "loss": estimate["value"],
            "dominated_by": [known[number]["label"] for number in standing.by],
            "over": None if standing.over is None else known[standing.over]["label"],
            "clear": standing.clear,
        }
        for entry, price, estimate, standing in zip(
            known, costs, losses, standings(costs, losses), strict=True
        )
    ]


def _loss_of(loss: Loss, entry: Entry) -> float | None:
    value: float | None = at(loss.estimate(entry), "value")
    return value


# --- blocks ---


def trade_offs(entries: Sequence[Entry]) -> list[Block]:
    """A plot of each cost against the quality, and who is dominated; [] where nothing can be compared."""
    found = comparisons(entries)
    if not found:
        return []
    loss = next(each for each in LOSSES if each.key == found[0]["loss"])
    costs = [next(each for each in COSTS if each.key == one["cost"]) for one in found]
    blocks: list[Block] = []
    for cost, comparison in zip(costs, found, strict=True):
        said = f"{cost.said[:1].upper()}{cost.said[1:]} against {loss.said}"
        svg = scatter.scatter(
            f"{cost.plot}-{loss.plot}", said, _points(cost, loss, comparison, entries),
            x_unit=cost.unit, y_unit=loss.unit,
        )  # fmt: skip
        caption = f"{said}: nearer to the lower left is better, a hollow mark is dominated"
        blocks.append(Figure(caption=caption, svg=svg))
    return [*blocks, _table(entries, loss, costs, found), *_notes(entries, found)]


def _points(cost: Cost, loss: Loss, comparison: Record, entries: Sequence[Entry]) -> list[scatter.Point]:
    results = {result["label"]: result for result in comparison["results"]}
    points = []
    for number, entry in enumerate(entries):
        result = results.get(entry["label"])
        if result is None:
            continue
        estimate = loss.estimate(entry) or {}
        low, high = (
            None if estimate.get(end) is None else estimate[end] * loss.scale for end in ("low", "high")
        )
        points.append(
            scatter.Point(
                label=entry["label"], x=result["cost"] * cost.scale, y=result["loss"] * loss.scale, low=low,
                high=high, colour=colour(number), dominated=bool(result["dominated_by"]),
            )
        )  # fmt: skip
    return points


def standing_text(result: Record | None) -> str:
    """One of a comparison's results in words."""
    if result is None:
        return wording.NOT_AVAILABLE
    by = result["dominated_by"]
    if not by:
        return (
            "not dominated" if result["clear"] else f"not dominated, but no clear gain over {result['over']}"
        )
    more = f" and {len(by) - 1} more" if len(by) > 1 else ""
    return f"dominated by {by[0]}{more}{'' if result['clear'] else ', quality within the intervals'}"


def _table(entries: Sequence[Entry], loss: Loss, costs: Sequence[Cost], found: Sequence[Record]) -> Table:
    """The numbers of the plots and the verdicts in words."""
    by_label = [{result["label"]: result for result in one["results"]} for one in found]
    known = [entry for entry in entries if any(entry["label"] in results for results in by_label)]
    header = ("result", *(f"by {cost.said}" for cost in costs), *(cost.said for cost in costs), loss.said)
    rows = [
        (
            entry["label"],
            *(standing_text(results.get(entry["label"])) for results in by_label),
            *(cost.show(cost.value(entry)) for cost in costs),
            wording.interval(loss.estimate(entry), as_percent=loss.as_percent),
        )
        for entry in known
    ]
    return Table(caption="Cost and quality", header=header, rows=rows, left=1 + len(costs))


def _notes(entries: Sequence[Entry], found: Sequence[Record]) -> list[Block]:
    notes: list[Block] = []
    if any(result["dominated_by"] for one in found for result in one["results"]):
        said = "another result costs as much or less, is as good or better, and is ahead in one of the two"
        notes.append(Notes(title="Dominated", lines=[said]))
    spoiled = [entry["label"] for entry in entries if at(entry, "bench", "valid") is False]
    if spoiled:
        lines = [f"{', '.join(spoiled)}: the benchmark is INVALID"]
        notes.append(Notes(title="Not compared by time", lines=lines, bad=True))
    return notes
