"""The gate: bounds that an artifact's measured figures are held to."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from edgeslm import wording
from edgeslm.errors import GateError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgeslm.specs import GateSpec


LEVEL_AGREEMENT = 0.9
"""Least agreement with accuracy level 0 unless a recipe says otherwise: rounding alone costs a few percent."""


def judge(
    gate: GateSpec, file_bytes: int, quality: Mapping[str, Any] | None, bench: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """The verdict on point estimates: {passed, misses: [{bound, limit, value, by}]}; None without bounds.

    A bound whose quantity was not measured is missed, with null for value and by.
    """
    kl, agreement, ratio = (
        (quality or {}).get(key) or {} for key in ("kl_nats", "top1_agreement", "perplexity_ratio")
    )
    tasks = quality or {}
    decode = wording.headline((bench or {}).get("runs") or (), "decode") or {}
    measured = {
        "max_kl_nats": (kl.get("mean") or {}).get("value"),
        "min_top1_agreement": agreement.get("value"),
        "max_perplexity_ratio": ratio.get("value"),
        "min_accuracy": (tasks.get("accuracy") or {}).get("value"),
        "min_macro_f1": ((tasks.get("macro") or {}).get("f1") or {}).get("value"),
        "min_level_agreement": level_agreement(tasks.get("accuracy_level")),
        "max_file_bytes": file_bytes,
        "min_decode_tokens_per_s": decode.get("tokens_per_s"),
        "max_peak_rss_bytes": ((bench or {}).get("memory") or {}).get("peak_rss_bytes"),
    }
    limits = {bound: limit for bound, limit in asdict(gate).items() if limit is not None}
    if tasks.get("accuracy_level"):
        limits.setdefault("min_level_agreement", LEVEL_AGREEMENT)
    misses = []
    for bound, limit in limits.items():
        value = measured[bound]
        over = None if value is None else value - limit if bound.startswith("max_") else limit - value
        if over is None or over > 0:
            misses.append({"bound": bound, "limit": limit, "value": value, "by": over})
    return {"passed": not misses, "misses": misses} if limits else None


def level_agreement(audit: Mapping[str, Any] | None) -> float | None:
    """How often the chosen accuracy level has the likeliest token of level 0; None where nothing was audited."""
    levels = (audit or {}).get("levels") or ()
    return next((of["top1_agreement"] for of in levels if of["level"] == (audit or {})["chosen"]), None)


def raise_for_gate(result: Mapping[str, Any]) -> None:
    """Raise GateError when the record of a build has missed a bound; the files stay."""
    gate = result["gate"]
    if gate and not gate["passed"]:
        misses = "; ".join(wording.gate_miss(miss) for miss in gate["misses"])
        raise GateError(
            f"the gate is missed: {misses}", hint="what was made is kept; change the scheme or the bound"
        )
