"""The top of a report: what a reader must know first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeslm import wording
from edgeslm.bench import plots
from edgeslm.bench.blocks import Block, Cards, Figure, Verdict, at, bench_runs, colour, matrix, said_of
from edgeslm.bench.provenance import recipe_values

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgeslm.bench.blocks import Entry, Rows


def verdicts(entries: Sequence[Entry]) -> list[Verdict]:
    """The gates and the invalid benchmarks of all results, what is wrong before what is right."""
    found = []
    for entry in entries:
        gate, bench = entry.get("gate"), entry.get("bench") or {}
        if gate is not None:
            misses = gate.get("misses") or ()
            missed = f"gate missed, {wording.count(len(misses), 'bound')}"
            state, said = ("passed", "gate passed") if gate.get("passed") else ("missed", missed)
            items = [*map(wording.gate_miss, misses), *_bounds(entry, misses)]
            found.append(Verdict(state=state, title=said_of(entry, entries, said), lines=items))
        if bench.get("valid") is False:
            said = "benchmark INVALID, do not quote its speed"
            reasons = wording.invalid_reasons(bench)
            found.append(Verdict(state="invalid", title=said_of(entry, entries, said), lines=reasons))
    found += [Verdict(state="invalid", title=what, lines=[why]) for what, why in _incomparable(entries)]
    return sorted(found, key=lambda verdict: ("missed", "invalid", "passed").index(verdict.state))


def _incomparable(entries: Sequence[Entry]) -> list[tuple[str, str]]:
    """What keeps results from being compared, and why."""
    texts = {(at(e, "quality", "text", "sha256"), at(e, "quality", "protocol", "scored_tokens"),
              at(e, "quality", "protocol", "examples")) for e in entries if e.get("quality")}  # fmt: skip
    machines = {(at(e, "bench", "machine", "cpu_model"), at(e, "bench", "machine", "usable_cores"))
                for e in entries if e.get("bench")}  # fmt: skip
    found = []
    if len(texts) > 1:
        found.append(
            ("Quality is not comparable", "these results were measured on different texts or windows")
        )
    if len(machines) > 1:
        found.append(("Speed is not comparable", "these results come from different machines"))
    return found


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
        ("TTFT", lambda e: wording.duration(at(wording.headline(bench_runs(e), "prefill"), "ttft_s", "p50"))),
        ("peak RSS", lambda e: wording.size(at(e, "bench", "memory", "peak_rss_bytes"))),
    )
    blocks = matrix("Results side by side", rows, entries, numbers=True)
    if any(what.startswith("Quality") for what, _ in _incomparable(entries)):
        return blocks
    losses = (
        ("size-kl", "Size against KL divergence", "mean KL divergence, nats", ("kl_nats", "mean")),
        ("size-loss", "Size against log-loss", "log-loss, nats", ("log_loss",)),
    )
    for name, said, unit, keys in losses:
        points = [
            plots.Point(
                label=entry["label"], x=entry["artifact"]["file_bytes"] / 2**20, colour=colour(number),
                y=loss["value"], low=loss.get("low"), high=loss.get("high"),
            )
            for number, entry in enumerate(entries)
            if (loss := at(entry, "quality", *keys) or {}).get("value") is not None
            and at(entry, "artifact", "file_bytes") is not None
        ]  # fmt: skip
        if len(points) > 1:
            svg = plots.scatter(name, said, points, x_unit="MiB", y_unit=unit)
            blocks.append(Figure(caption=f"{said}: nearer to the lower left is better", svg=svg))
    return blocks


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
        ("time to first token", wording.duration(at(prefill, "ttft_s", "p50")), wording.conditions(prefill or {})),
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


def _latency(entry: Entry, share: str) -> str:
    """The latency of the smallest batch, or that it is not to be quoted."""
    run = wording.fastest_call(bench_runs(entry))
    text = wording.duration(at(run, "latency_s", share))
    return f"INVALID {text}" if at(run, "valid") is False and text != wording.NOT_AVAILABLE else text
