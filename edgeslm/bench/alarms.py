"""When a score announces a failure, and whether one score does so earlier than another at equal false alarms.

An alarm is a score at or above a threshold.  Within `warning_s` before the failure it announces it; before
that it is a false alarm.  The share of false alarms is what a threshold costs, the time from the first
announcement to the failure is what it brings: two scores are compared at the same cost.

N moments of one machine, M machines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.bench import statistics
from edgeslm.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    Array = NDArray[np.float64]

SCHEMA = "edgeslm.alarms/1"


@dataclass(frozen=True, kw_only=True)
class Watched:
    """One machine's score over time until it fails.

    times_s: [N] ascending.  scores: [N], higher is worse.  failure_s: when it failed, on the same clock.
    """

    name: str
    times_s: Array
    scores: Array
    failure_s: float

    def __post_init__(self) -> None:
        if self.times_s.shape != self.scores.shape or self.times_s.ndim != 1 or not len(self.times_s):
            raise DataError(
                f"{self.name}: {self.scores.shape} scores do not go with {self.times_s.shape} times"
            )
        if not np.all(np.diff(self.times_s) > 0) or self.times_s[-1] > self.failure_s:
            raise DataError(
                f"{self.name}: times must ascend and end with the failure at {self.failure_s:g} s"
            )
        if not np.all(np.isfinite(self.scores)):
            raise DataError(f"{self.name}: a score is not a finite number")

    def early(self, warning_s: float) -> NDArray[np.bool_]:
        """[N] moments too long before the failure for an alarm to be right."""
        return np.asarray(self.times_s <= self.failure_s - warning_s)


def announcement(
    scores: Array, times_s: Array, failure_s: float, threshold: float, *, warning_s: float = math.inf
) -> float | None:
    """Seconds from the first alarm within `warning_s` before the failure to the failure; None without one.

    scores, times_s: [N] each, times ascending.
    """
    due = (scores >= threshold) & (times_s > failure_s - warning_s) & (times_s <= failure_s)
    return float(failure_s - times_s[np.argmax(due)]) if due.any() else None


def false_alarms(machines: Sequence[Watched], threshold: float, warning_s: float) -> tuple[int, int]:
    """(false alarms, moments at which one was possible) over all machines."""
    early = [machine.early(warning_s) for machine in machines]
    alarms = sum(int((one.scores[at] >= threshold).sum()) for one, at in zip(machines, early, strict=True))
    return alarms, sum(int(at.sum()) for at in early)


def threshold_at(machines: Sequence[Watched], rate: float, warning_s: float) -> float:
    """The lowest threshold whose share of false alarms is at most `rate`.

    Just above a score that must not alarm, so that no threshold in between would announce more.  Raises
    DataError without a moment at which an alarm is false.
    """
    early = np.concatenate([machine.scores[machine.early(warning_s)] for machine in machines])
    if not len(early):
        raise DataError(
            f"no reading is more than {warning_s:g} s before its machine's failure",
            hint="give longer lives, or a shorter warning_s",
        )
    ordered = np.sort(early)[::-1]
    allowed = math.floor(rate * len(ordered) + 1e-9)
    if allowed >= len(ordered):
        return float(min(machine.scores.min() for machine in machines))
    return float(np.nextafter(ordered[allowed], np.inf))


def smoothed(scores: Array, moments: int) -> Array:
    """[N] mean of each score and those before it, `moments` at most: what a careful threshold looks at."""
    total = np.concatenate([[0.0], np.cumsum(scores, dtype=np.float64)])
    end = np.arange(1, len(scores) + 1)
    begin = np.maximum(end - moments, 0)
    return np.asarray((total[end] - total[begin]) / (end - begin))


def performance(machines: Sequence[Watched], threshold: float, warning_s: float) -> dict[str, Any]:
    """What a threshold costs and brings: rate of false alarms, lead in seconds of each machine (None: missed)."""
    alarms, moments = false_alarms(machines, threshold, warning_s)
    leads = {
        one.name: announcement(one.scores, one.times_s, one.failure_s, threshold, warning_s=warning_s)
        for one in machines
    }
    found = [lead for lead in leads.values() if lead is not None]
    return {
        "threshold": threshold,
        "false_alarms": alarms,
        "false_alarm_rate": alarms / moments if moments else None,
        "lead_s": leads,
        "announced": len(found),
        "mean_lead_s": sum(found) / len(leads) if leads else None,
    }


def best_of(baselines: Mapping[str, Sequence[Watched]], rate: float, warning_s: float) -> str:
    """The baseline of the longest mean lead when its threshold gives that rate of false alarms; the first of equals."""

    def lead_s(name: str) -> float:
        machines = baselines[name]
        found = performance(machines, threshold_at(machines, rate, warning_s), warning_s)
        return float(found["mean_lead_s"] or 0.0)

    return max(baselines, key=lead_s)


def compare(
    machines: Sequence[Watched],
    baseline: Sequence[Watched],
    *,
    warning_s: float,
    threshold: float | None = None,
    rate: float | None = None,
) -> dict[str, Any]:
    """Leads of a score over those of a baseline on the same M machines, at the same rate of false alarms.

    threshold: the score's, decided elsewhere, such as on training machines; its rate here is then the rate
    of both.  rate: of false alarms, for both thresholds.  Either way the baseline's threshold is the best
    there is for these very machines.  A missed failure counts as a lead of 0.
    """
    if [one.name for one in machines] != [one.name for one in baseline]:
        raise DataError("the score and the baseline are not of the same machines")
    if (threshold is None) == (rate is None):
        raise DataError("give either a threshold or a rate of false alarms")
    if threshold is None:
        assert rate is not None
        threshold = threshold_at(machines, rate, warning_s)
    own = performance(machines, threshold, warning_s)
    rate = rate if rate is not None else own["false_alarm_rate"] or 0.0
    other = performance(baseline, threshold_at(baseline, rate, warning_s), warning_s)
    gains = {name: (lead or 0.0) - (other["lead_s"][name] or 0.0) for name, lead in own["lead_s"].items()}
    return {
        "schema": SCHEMA,
        "warning_s": warning_s,
        "false_alarm_rate": rate,
        "machines": len(machines),
        "score": own,
        "baseline": other,
        "gain_s": statistics.mean(np.array([*gains.values()])[:, None]).as_record(),
        "earlier": sum(gain > 0 for gain in gains.values()),
        "later": sum(gain < 0 for gain in gains.values()),
        "never_later": all(gain >= 0 for gain in gains.values()),
    }
