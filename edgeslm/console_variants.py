"""The variants of a recipe as text for a terminal, side by side."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgeslm import layout, wording

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Record = Mapping[str, Any]


def variants_text(record: Record) -> str:
    """A line for each variant, which of them are dominated, and where the report on all is."""
    variants = record.get("variants") or ()
    columns = [
        ("variant", [wording.text(each.get("name")) for each in variants]),
        ("size", [wording.size(each.get("bytes")) for each in variants]),
        ("bits", [wording.significant(each.get("bits_per_weight")) for each in variants]),
        ("KL, nats", [wording.interval(_quality(each, "kl_nats", "mean")) for each in variants]),
        (
            "accuracy",
            [wording.interval(_quality(each, "accuracy"), as_percent=True) for each in variants],
        ),
        ("decode", [_speed(each, "decode") for each in variants]),
        ("latency p50", [_latency(each) for each in variants]),
        ("peak RSS", [wording.size(_memory(each)) for each in variants]),
        ("gate", [_gate(each.get("gate")) for each in variants]),
    ]
    known = [column for column in columns if set(column[1]) != {wording.NOT_AVAILABLE}]
    table = layout.table([name for name, _ in known], list(zip(*(cells for _, cells in known), strict=True)))
    gate = record.get("gate") or {}
    facts = [
        *[("dominated", line) for line in dominated_lines(record)],
        *[("gate missed", wording.gate_miss(miss)) for miss in gate.get("misses") or ()],
        ("variants", wording.text(record.get("path"))),
        ("report", wording.text(record.get("report"))),
    ]
    return f"{table}\n\n{layout.facts(facts)}"


def dominated_lines(record: Record) -> list[str]:
    """'size against KL divergence: q4_0 by iq4_nl', one line for each pair of axes with dominated variants."""
    start = f"{record.get('name')}-"
    lines = []
    for one in record.get("comparisons") or ():
        said = [
            f"{result['label'].removeprefix(start)} by {result['dominated_by'][0].removeprefix(start)}"
            for result in one["results"]
            if result["dominated_by"]
        ]
        if said:
            lines.append(f"{AXES[one['cost']]} against {AXES[one['loss']]}: {', '.join(said)}")
    return lines


AXES = {
    "file_bytes": "size",
    "time_per_token_s": "time per token",
    "latency_s": "latency",
    "kl_nats": "KL divergence",
    "perplexity": "perplexity",
    "error_rate": "error rate",
}
"""What a comparison's costs and losses are called."""


def _quality(variant: Record, *keys: str) -> Any:
    found: Any = variant.get("quality")
    for key in keys:
        found = (found or {}).get(key)
    return found


def _runs(variant: Record) -> Sequence[Record]:
    return (variant.get("bench") or {}).get("runs") or ()


def _speed(variant: Record, kind: str) -> str:
    run = wording.headline(_runs(variant), kind) or {}
    return _quoted(run, wording.rate(run.get("tokens_per_s")))


def _latency(variant: Record) -> str:
    run = wording.fastest_call(_runs(variant)) or {}
    return _quoted(run, wording.duration((run.get("latency_s") or {}).get("p50")))


def _quoted(run: Record, text: str) -> str:
    return f"INVALID {text}" if run.get("valid") is False and text != wording.NOT_AVAILABLE else text


def _memory(variant: Record) -> float | None:
    value: float | None = ((variant.get("bench") or {}).get("memory") or {}).get("peak_rss_bytes")
    return value


def _gate(gate: Record | None) -> str:
    return wording.NOT_AVAILABLE if gate is None else "passed" if gate.get("passed") else "MISSED"
