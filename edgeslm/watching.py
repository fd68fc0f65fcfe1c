"""How long before a failure a sensor model calls it, and how long a plain threshold on a reading does.

Both watch the same machines at the same moments, and give the same share of false alarms: the model by the
threshold that it ships with, the reading by the best threshold there is for these very machines, looking back
over one row, over several, or over a window.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from edgeslm.bench.alarms import Watched
    from edgeslm.bundle import Bundle
    from edgeslm.progress import Progress
    from edgeslm.stages.recordings import Recordings
    from edgeslm.stages.sensors import SensorWindows

USUAL = "rms"
"""The channel that a threshold is usually put on; without it the best of all is taken, in either direction."""
LOOKS_BACK = (1, 8)
"""Rows that a threshold's reading is averaged over, beside a whole window."""
AT_ONCE = 1024


def measure(
    bundle: Bundle, windows: SensorWindows, decision: Mapping[str, Any], progress: Progress
) -> dict[str, Any] | None:
    """The record edgeslm.alarms/1 of a bundle on the machines that `windows` are of.

    decision: a Decision's record.  None where nothing is announced: without time, with more than two
    classes, or where no machine's rows end with the class that is watched for.
    """
    from edgeslm.bench import alarms
    from edgeslm.runtime.posterior import read_decision
    from edgeslm.stages import sensors

    table, units = windows.recordings, np.unique(windows.unit).tolist()
    if table.time_s is None or decision["positive"] is None:
        return None
    failures = dict(_failures(table, table.labels.index(decision["positive"]), units))
    if not failures:
        return None
    every = sensors.measured(table, replace(windows.spec, stride=1))
    moments = {unit: at for unit in failures if len(at := np.flatnonzero(every.unit == unit))}
    rule = read_decision(decision, table.labels, str(bundle.path))
    scores = _scores(bundle, every, moments, rule, progress)

    def watched(values: Mapping[int, NDArray[np.float64]]) -> list[Watched]:
        return [
            alarms.Watched(
                name=table.units[unit], times_s=every.time_s[at], scores=values[unit], failure_s=failures[unit][0]
            )
            for unit, at in moments.items()
        ]  # fmt: skip

    machines, warning_s = watched(scores), max(failures[unit][1] for unit in moments)
    own = alarms.performance(machines, float(rule.threshold or 0.5), warning_s)
    if own["false_alarm_rate"] is None:  # every moment is one to warn at
        return None
    baselines = {
        name: watched({unit: values[unit][every.ends[at] - first[unit]] for unit, at in moments.items()})
        for name, values, first in _readings(table, moments, every.spec.rows)
    }
    name = alarms.best_of(baselines, own["false_alarm_rate"], warning_s)
    found = alarms.compare(machines, baselines[name], warning_s=warning_s, threshold=own["threshold"])
    return {**found, "positive": decision["positive"], "baseline": {**found["baseline"], "name": name}}


def _failures(
    table: Recordings, positive: int, units: Iterable[int]
) -> Iterator[tuple[int, tuple[float, float]]]:
    """(unit, (its last time, how long before its rows begin to be labelled so)) of machines that end so."""
    assert table.time_s is not None
    for unit in units:
        at = np.flatnonzero(table.unit == unit)
        others = np.flatnonzero(table.label[at] != positive)
        if not len(others) or others[-1] == len(at) - 1:
            continue
        times = table.time_s[at]
        yield unit, (float(times[-1]), float(times[-1] - times[others[-1]]))


def _scores(
    bundle: Bundle,
    every: SensorWindows,
    moments: Mapping[int, NDArray[np.int64]],
    rule: Any,
    progress: Progress,
) -> dict[int, NDArray[np.float64]]:
    """Unit -> the posterior of the class that is watched for, at each of its moments."""
    from edgeslm.runtime.ort import OrtClassifier

    classifier, rows = OrtClassifier(bundle), np.arange(every.spec.rows)
    found = {}
    total = sum(map(len, moments.values()))
    with progress.task("watching machines", total, "windows") as advance:
        for unit, at in moments.items():
            parts = []
            for first in range(0, len(at), AT_ONCE):
                starts = every.starts[at[first : first + AT_ONCE]]
                parts.append(classifier.predict_readings(every.recordings.values[starts[:, None] + rows]))
                advance(len(starts))
            found[unit] = rule.posterior(np.concatenate(parts))[:, rule.positive]
    return found


def _readings(
    table: Recordings, moments: Mapping[int, Any], rows: int
) -> Iterator[tuple[str, dict[int, NDArray[np.float64]], dict[int, int]]]:
    """(name, unit -> [N] readings of all its rows, higher is worse, unit -> its first row) of each baseline."""
    from edgeslm.bench import alarms

    at = {unit: np.flatnonzero(table.unit == unit) for unit in moments}
    first = {unit: int(places[0]) for unit, places in at.items()}
    usual = USUAL in table.channels
    for channel in [table.channels.index(USUAL)] if usual else range(len(table.channels)):
        values = {
            unit: known(table.values[places, channel].astype(np.float64)) for unit, places in at.items()
        }
        for sign in (1,) if usual else (1, -1):
            for back in dict.fromkeys((*LOOKS_BACK, rows)):
                name = f"{'' if sign > 0 else 'low '}{table.channels[channel]}"
                name += f", mean of {back} rows" if back > 1 else ""
                yield name, {unit: alarms.smoothed(sign * one, back) for unit, one in values.items()}, first


def known(readings: Sequence[float] | NDArray[np.float64]) -> NDArray[np.float64]:
    """[N] readings with what is missing (NaN) as the last one before it, at the start as the first one after."""
    values = np.asarray(readings, np.float64)
    there = np.flatnonzero(np.isfinite(values))
    if not len(there):
        return np.zeros(len(values))
    place = np.searchsorted(there, np.arange(len(values)), side="right") - 1
    return np.asarray(values[there[np.maximum(place, 0)]])
