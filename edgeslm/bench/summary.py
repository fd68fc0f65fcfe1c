"""The top of a report: what a reader must know first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeslm import wording
from edgeslm.bench import pareto
from edgeslm.bench.blocks import Block, Cards, Notes, Table, Verdict, at, bench_runs, matrix, said_of
from edgeslm.bench.provenance import recipe_values

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgeslm.bench.blocks import Entry, Rows

MOST_COLUMNS = 3
"""Results that stand beside each other; more are lines of a table."""


def verdicts(entries: Sequence[Entry]) -> list[Verdict]:
    """The gates and the invalid benchmarks of all results, what is wrong before what is right."""
    found: list[Verdict] = []
    passed, invalid = [], []
    for entry in entries:
        gate, bench = entry.get("gate"), entry.get("bench") or {}
        if gate is not None and gate.get("passed"):
            passed.append(entry)
        elif gate is not None:
            misses = gate.get("misses") or ()
            missed = f"gate missed, {wording.count(len(misses), 'bound')}"
            items = [*map(wording.gate_miss, misses), *_bounds(entry, misses)]
            found.append(Verdict(state="missed", title=said_of(entry, entries, missed), lines=items))
        if bench.get("valid") is False:
            invalid.append(entry)
    found += _invalid(invalid, entries)
    found += _passed(passed, entries)
    found += [Verdict(state="invalid", title=what, lines=[why]) for what, why in pareto.incomparable(entries)]
    return sorted(found, key=lambda verdict: ("missed", "invalid", "passed").index(verdict.state))


def _invalid(invalid: Sequence[Entry], entries: Sequence[Entry]) -> list[Verdict]:
    """What spoiled each benchmark; one verdict for many, which would fill the first page."""
    reasons = [list(wording.invalid_reasons(entry["bench"])) for entry in invalid]
    if len(invalid) > MOST_COLUMNS:
        title = f"{len(invalid)} benchmarks INVALID, do not quote their speed"
        lines = [f"{entry['label']}: {'; '.join(why)}" for entry, why in zip(invalid, reasons, strict=True)]
        return [Verdict(state="invalid", title=title, lines=lines)]
    said = "benchmark INVALID, do not quote its speed"
    return [
        Verdict(state="invalid", title=said_of(entry, entries, said), lines=why)
        for entry, why in zip(invalid, reasons, strict=True)
    ]


def _passed(passed: Sequence[Entry], entries: Sequence[Entry]) -> list[Verdict]:
    """One verdict for all that were held to the same bounds and kept them."""
    by_bounds: dict[tuple[str, ...], list[str]] = {}
    for entry in passed:
        by_bounds.setdefault(tuple(_bounds(entry, ())), []).append(entry["label"])
    return [
        Verdict(
            state="passed",
            title=f"{', '.join(labels)}: gate passed" if len(entries) > 1 else "Gate passed",
            lines=bounds,
        )
        for bounds, labels in by_bounds.items()
    ]


def _bounds(entry: Entry, misses: Sequence[Mapping[str, Any]]) -> list[str]:
    """The bounds that were kept, as the recipe sets them."""
    gate = recipe_values(entry).get("gate")
    missed = {miss.get("bound") for miss in misses}
    kept = [
        f"{bound} = {wording.bound_value(bound, limit)}"
        for bound, limit in (gate.items() if isinstance(gate, dict) else ())
        if bound not in missed and isinstance(limit, int | float)
    ]
    return [f"kept: {', '.join(kept)}"] if kept else []


def summary(entries: Sequence[Entry]) -> list[Block]:
    if len(entries) == 1:
        cards = _cards(entries[0])
        return [Cards(cards=cards)] if cards else []
    rows: Rows = (
        (
            "gate",
            lambda e: {True: "passed", False: "MISSED"}.get(at(e, "gate", "passed"), wording.NOT_AVAILABLE),
        ),
        ("format", lambda e: wording.text(at(e, "artifact", "format"))),
        ("scheme", lambda e: wording.text(at(e, "quantization", "scheme"))),
        ("size", lambda e: wording.size(at(e, "artifact", "file_bytes"))),
        ("bits per weight", lambda e: wording.significant(at(e, "artifact", "bits_per_weight"))),
        ("KL divergence, nats", lambda e: wording.interval(at(e, "quality", "kl_nats", "mean"))),
        ("perplexity", lambda e: wording.interval(at(e, "quality", "perplexity"))),
        ("top-1 agreement", lambda e: wording.interval(at(e, "quality", "top1_agreement"), as_percent=True)),
        ("accuracy", lambda e: wording.interval(at(e, "quality", "accuracy"), as_percent=True)),
        ("macro F1", lambda e: wording.interval(at(e, "quality", "macro", "f1"))),
        ("log-loss, nats", lambda e: wording.interval(at(e, "quality", "log_loss"))),
        ("calibration error", lambda e: wording.interval(at(e, "quality", "expected_calibration_error"))),
        ("latency p50", lambda e: _latency(e, "p50")),
        ("latency p99", lambda e: _latency(e, "p99")),
        ("latency of", lambda e: wording.conditions(wording.fastest_call(bench_runs(e)) or {})),
        ("examples/s", lambda e: _quoted(e, "predict")),
        ("examples/s of", lambda e: wording.conditions(wording.headline(bench_runs(e), "predict") or {})),
        ("prefill", lambda e: _quoted(e, "prefill")),
        ("prefill of", lambda e: wording.conditions(wording.headline(bench_runs(e), "prefill") or {})),
        ("decode", lambda e: _quoted(e, "decode")),
        ("decode of", lambda e: wording.conditions(wording.headline(bench_runs(e), "decode") or {})),
        ("TTFT", lambda e: _first_token(wording.headline(bench_runs(e), "prefill"))),
        ("peak RSS", lambda e: wording.size(at(e, "bench", "memory", "peak_rss_bytes"))),
    )
    if len(entries) <= MOST_COLUMNS:
        return matrix("Results side by side", rows, entries, numbers=True)
    return _down(rows, entries)


def _down(rows: Rows, entries: Sequence[Entry]) -> list[Block]:
    """Results down and facts across; what is the same for all is said once."""
    facts = [(name, [show(entry) for entry in entries]) for name, show in rows]
    facts = [(name, cells) for name, cells in facts if set(cells) - {"", wording.NOT_AVAILABLE}]
    apart = [(name, cells) for name, cells in facts if len(set(cells)) > 1]
    table = Table(
        caption="Results side by side", header=("result", *(name for name, _ in apart)),
        rows=[
            (entry["label"], *(cells[number] for _, cells in apart)) for number, entry in enumerate(entries)
        ],
    )  # fmt: skip
    same = [f"{name}: {cells[0]}" for name, cells in facts if len(set(cells)) == 1]
    return [table, Notes(title="The same for all", lines=same)] if same else [table]


def _cards(entry: Entry) -> list[tuple[str, str, str]]:
    quality, bench = entry.get("quality") or {}, entry.get("bench") or {}
    runs = bench_runs(entry)
    prefill, decode, predict = (wording.headline(runs, kind) for kind in ("prefill", "decode", "predict"))
    call = wording.fastest_call(runs)
    perplexity, around = _split(at(quality, "perplexity"), "")
    if at(quality, "reference_perplexity", "value") is not None:
        around += f", reference {wording.interval({'value': quality['reference_perplexity']['value']})}"
    cards = [
        ("size", wording.size(at(entry, "artifact", "file_bytes")),
         f"{wording.significant(at(entry, 'artifact', 'bits_per_weight'))} bits per weight"),
        ("KL divergence", *_split(at(quality, "kl_nats", "mean"), " nats")),
        ("perplexity", perplexity, around),
        ("top-1 agreement", *_split(at(quality, "top1_agreement"), "", as_percent=True)),
        ("accuracy", *_split(at(quality, "accuracy"), "", as_percent=True)),
        ("macro F1", *_split(at(quality, "macro", "f1"), "")),
        ("log-loss", *_split(at(quality, "log_loss"), " nats")),
        ("calibration error", *_split(at(quality, "expected_calibration_error"), "")),
        ("weighted kappa", *_split(at(quality, "quadratic_weighted_kappa"), "")),
        ("latency p50", _latency(entry, "p50"), wording.conditions(call or {})),
        ("latency p99", _latency(entry, "p99"), wording.conditions(call or {})),
        ("throughput", _quoted(entry, "predict"), wording.conditions(predict or {})),
        ("prefill", _quoted(entry, "prefill"), wording.conditions(prefill or {})),
        ("decode", _quoted(entry, "decode"), wording.conditions(decode or {})),
        ("time to first token", _first_token(prefill), wording.conditions(prefill or {})),
        ("peak RSS", wording.size(at(bench, "memory", "peak_rss_bytes")),
         f"{wording.size(at(bench, 'memory', 'file_backed_bytes'))} of it file-backed"),
    ]  # fmt: skip
    return [
        (name, value, "" if detail.startswith(wording.NOT_AVAILABLE) else detail)
        for name, value, detail in cards
        if value != wording.NOT_AVAILABLE
    ]


def _split(estimate: Mapping[str, Any] | None, unit: str, *, as_percent: bool = False) -> tuple[str, str]:
    """The value and its interval apart: ('0.0817 nats', '[0.0760, 0.0874]')."""
    value, _, interval = wording.interval(estimate, as_percent=as_percent).partition(" [")
    if interval:
        return value + (" %" if as_percent else unit), f"[{interval}".removesuffix(" %")
    return value + ("" if estimate is None else unit), ""


def _quoted(entry: Entry, kind: str) -> str:
    """The speed to quote first, or that it is not to be quoted."""
    run = wording.headline(bench_runs(entry), kind) or {}
    speed = wording.speed_of(run)
    text = wording.item_rate(speed) if kind == "predict" else wording.rate(speed)
    return f"INVALID {text}" if run.get("valid") is False else text


def _first_token(prefill: Mapping[str, Any] | None) -> str:
    """The median time to the first token, or that it is not to be quoted."""
    return _marked(wording.duration(at(prefill, "ttft_s", "p50")), prefill)


def _latency(entry: Entry, share: str) -> str:
    """The latency of the smallest batch, or that it is not to be quoted."""
    run = wording.fastest_call(bench_runs(entry))
    return _marked(wording.duration(at(run, "latency_s", share)), run)


def _marked(text: str, run: Mapping[str, Any] | None) -> str:
    return f"INVALID {text}" if at(run, "valid") is False and text != wording.NOT_AVAILABLE else text
