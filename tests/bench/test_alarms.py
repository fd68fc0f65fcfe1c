"""Announcements and thresholds against brute force, and a comparison worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeslm.bench import alarms
from edgeslm.bench.alarms import Watched
from edgeslm.errors import DataError


def watched(scores: list[float], failure_s: float | None = None, name: str = "a") -> Watched:
    times = np.arange(1.0, len(scores) + 1)
    return Watched(
        name=name, times_s=times, scores=np.array(scores, float), failure_s=failure_s or float(len(scores))
    )


def brute_announcement(machine: Watched, threshold: float, warning_s: float) -> float | None:
    for time, score in zip(machine.times_s, machine.scores, strict=True):
        if machine.failure_s - warning_s < time <= machine.failure_s and score >= threshold:
            return float(machine.failure_s - time)
    return None


machines = st.lists(st.lists(st.integers(0, 9).map(float), min_size=6, max_size=20), min_size=1, max_size=4)


@given(machines, st.integers(1, 5), st.integers(0, 10))
def test_leads_and_false_alarms_are_brute_force(scores: list[list[float]], warning: int, level: int) -> None:
    group = [watched(one, name=str(number)) for number, one in enumerate(scores)]
    found = alarms.performance(group, float(level), float(warning))
    for machine in group:
        assert found["lead_s"][machine.name] == brute_announcement(machine, level, warning)
    early = [one[: len(one) - warning] for one in scores]  # row k is at k + 1 s, the failure at len s
    assert found["false_alarms"] == sum(score >= level for one in early for score in one)
    assert found["false_alarm_rate"] == pytest.approx(found["false_alarms"] / sum(map(len, early)))


@given(machines, st.integers(1, 5), st.floats(0, 1))
def test_the_threshold_is_the_lowest_that_keeps_the_rate(
    scores: list[list[float]], warning: int, rate: float
) -> None:
    group = [watched(one, name=str(number)) for number, one in enumerate(scores)]
    threshold = alarms.threshold_at(group, rate, float(warning))
    count, moments = alarms.false_alarms(group, threshold, float(warning))
    assert count <= rate * moments + 1e-6
    lower = [score for one in scores for score in one if score < threshold]
    if lower:  # the next lower score that anything could be compared with
        more, _ = alarms.false_alarms(group, max(lower), float(warning))
        assert more > rate * moments - 1e-6 or more == count


def test_announcement_counts_from_the_first_alarm_in_time() -> None:
    times, scores = np.arange(1.0, 11), np.array([0, 9, 0, 0, 0, 0, 5, 0, 9, 9.0])
    assert alarms.announcement(scores, times, 10.5, 5.0) == 8.5
    assert alarms.announcement(scores, times, 10.5, 5.0, warning_s=5) == 3.5
    assert alarms.announcement(scores, times, 10.5, 6.0, warning_s=5) == 1.5
    assert alarms.announcement(scores, times, 10.5, 9.5, warning_s=5) is None


def test_smoothing_is_the_mean_of_what_has_been_seen() -> None:
    scores = np.random.default_rng(0).standard_normal(50)
    expected = [scores[max(0, end - 6) : end + 1].mean() for end in range(50)]
    assert alarms.smoothed(scores, 7) == pytest.approx(expected)


def test_a_comparison_worked_out_by_hand() -> None:
    """Warning 3 s.  One false alarm in 14 allows the score 5 and 4 ahead, the baseline only 2 of them."""
    score = [
        watched([0, 0, 4, 0, 0, 0, 0, 5, 5, 5], name="a"),
        watched([1, 1, 1, 1, 1, 1, 1, 1, 6, 6], name="b"),
    ]
    base = [
        watched([0, 0, 0, 3, 0, 0, 0, 0, 0, 4], name="a"),
        watched([0, 0, 0, 0, 5, 0, 0, 0, 0, 4], name="b"),
    ]
    found = alarms.compare(score, base, warning_s=3.0, rate=1 / 14)
    assert found["score"]["lead_s"] == {"a": 2.0, "b": 1.0}
    assert found["baseline"]["lead_s"] == {"a": 0.0, "b": 0.0}
    assert (found["earlier"], found["later"], found["never_later"]) == (2, 0, True)
    assert found["gain_s"]["value"] == pytest.approx(1.5)
    strict = alarms.compare(score, base, warning_s=3.0, rate=0.0)
    assert strict["score"]["lead_s"] == {"a": 2.0, "b": 1.0}
    assert strict["baseline"]["lead_s"] == {"a": None, "b": None}
    assert strict["baseline"]["mean_lead_s"] is None or strict["baseline"]["mean_lead_s"] == 0.0
    # A threshold from elsewhere lets the score cry wolf once in 14; the baseline may do so as often.
    fixed = alarms.compare(score, base, warning_s=3.0, threshold=4.0)
    assert fixed["false_alarm_rate"] == pytest.approx(1 / 14)
    assert fixed["baseline"] == found["baseline"]


def test_a_score_is_never_later_than_itself() -> None:
    group = [watched(list(np.random.default_rng(seed).random(30)), name=str(seed)) for seed in range(5)]
    found = alarms.compare(group, group, warning_s=10, rate=0.1)
    assert found["gain_s"]["value"] == 0
    assert found["score"] == found["baseline"]


def test_what_can_not_be_compared_is_refused() -> None:
    one = watched([1.0, 2, 3])
    with pytest.raises(DataError, match="same machines"):
        alarms.compare([one], [watched([1.0, 2, 3], name="b")], warning_s=1, rate=0.1)
    with pytest.raises(DataError, match="either"):
        alarms.compare([one], [one], warning_s=1)
    with pytest.raises(DataError, match="not a finite"):
        watched([1.0, float("nan")])
    with pytest.raises(DataError, match="end with the failure"):
        watched([1.0, 2, 3], failure_s=2.5)
    with pytest.raises(DataError, match="more than 9 s before"):
        alarms.threshold_at([one], 0.0, 9.0)
