"""Estimates: t quantiles against tables, intervals against closed forms and brute force, coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgeslm.bench import statistics
from edgeslm.bench.statistics import Estimate, student_t_quantile

# R's qt(); also in the tables of Abramowitz & Stegun, 26.10.
T_TABLE = {
    (0.975, 1): 12.706204736,
    (0.975, 2): 4.302652730,
    (0.975, 3): 3.182446305,
    (0.975, 4): 2.776445105,
    (0.975, 5): 2.570581836,
    (0.975, 10): 2.228138852,
    (0.975, 20): 2.085963447,
    (0.975, 30): 2.042272456,
    (0.975, 60): 2.000297822,
    (0.975, 100): 1.983971519,
    (0.975, 120): 1.979930405,
    (0.975, 1000): 1.962339081,
    (0.95, 10): 1.812461123,
    (0.995, 1): 63.656741163,
    (0.995, 5): 4.032142984,
    (0.995, 10): 3.169272667,
}


@pytest.mark.parametrize(("probability", "degrees"), T_TABLE)
def test_student_t_quantile_is_the_tables(probability: float, degrees: int) -> None:
    assert student_t_quantile(probability, degrees) == pytest.approx(T_TABLE[probability, degrees], abs=1e-8)


def test_student_t_quantile_goes_on_smoothly_where_the_method_changes() -> None:
    values = [student_t_quantile(0.975, degrees) for degrees in range(190, 210)]
    steps = np.diff(values)
    assert np.all(steps < 0)
    assert np.allclose(np.diff(steps), np.diff(steps).mean(), atol=1e-6)
    assert abs(np.diff(steps, n=2)).max() < 1e-7


def test_student_t_median_is_zero() -> None:
    assert student_t_quantile(0.5, 7) == pytest.approx(0.0, abs=1e-12)


def test_mean_of_clusters_counts_clusters_not_values() -> None:
    values = np.repeat([[1.0], [2.0], [3.0], [6.0]], 100, axis=1)
    estimate = statistics.mean(values)
    # Four windows whose values are all alike hold four independent numbers: 1, 2, 3, 6.
    margin = 3.182446305 * math.sqrt(14 / 3 / 4)
    assert estimate.value == pytest.approx(3.0)
    assert estimate.low == pytest.approx(3.0 - margin)
    assert estimate.high == pytest.approx(3.0 + margin)


def test_one_cluster_gives_no_interval() -> None:
    one = np.arange(5.0)[None]
    nothing = {"low": None, "high": None}
    assert statistics.mean(one).as_record() == {"value": 2.0, **nothing}
    assert statistics.mean(one).exponential().as_record() == {"value": math.exp(2.0), **nothing}
    assert statistics.mean(one).at_least(0.0).as_record() == {"value": 2.0, **nothing}
    assert statistics.proportion(one > 1).as_record() == {"value": 0.6, **nothing}
    assert statistics.quantiles(one, (0.5,), seed=0)[0].as_record() == {"value": 2.0, **nothing}


def test_exponential_carries_the_ends_and_never_gives_infinity() -> None:
    estimate = Estimate(value=1.0, low=0.0, high=5000.0).exponential()
    assert estimate == Estimate(value=math.e, low=1.0, high=None)


def test_at_least_moves_only_the_lower_end() -> None:
    assert Estimate(value=1.0, low=-2.0, high=4.0).at_least(0.0) == Estimate(value=1.0, low=0.0, high=4.0)
    assert Estimate(value=1.0, low=0.5, high=4.0).at_least(0.0) == Estimate(value=1.0, low=0.5, high=4.0)


def test_proportion_of_independent_hits_is_wilsons() -> None:
    # 2 x 50 with equal window means: no sign of clustering, so 100 independent draws and t with 1 degree.
    hits = np.tile(np.arange(50) < 40, (2, 1))
    t, p, n = 12.706204736, 0.8, 100
    centre = (p + t * t / (2 * n)) / (1 + t * t / n)
    margin = t / (1 + t * t / n) * math.sqrt(p * (1 - p) / n + t * t / (4 * n * n))
    estimate = statistics.proportion(hits)
    assert estimate.value == 0.8
    assert estimate.low == pytest.approx(centre - margin)
    assert estimate.high == pytest.approx(centre + margin)


def test_proportion_widens_when_hits_come_in_clusters() -> None:
    scattered = statistics.proportion(np.tile(np.arange(100) < 80, (10, 1)))
    clustered = statistics.proportion(np.repeat((np.arange(10) < 8)[:, None], 100, axis=1))
    assert clustered.low is not None
    assert clustered.high is not None
    assert scattered.low is not None
    assert scattered.high is not None
    assert clustered.value == scattered.value == 0.8
    # Ten windows that agree or disagree as a whole are ten draws: Wilson with 0.16 / (0.16 / 9) = 9.
    assert clustered.low < 0.5 < 0.7 < scattered.low
    assert clustered.high > scattered.high


def test_full_agreement_still_has_a_width() -> None:
    estimate = statistics.proportion(np.ones((4, 255), np.bool_))
    assert estimate.value == estimate.high == 1.0
    assert estimate.low is not None
    assert 0.98 < estimate.low < 1.0


def test_quantiles_are_numpys_on_the_values_and_on_every_resample() -> None:
    values = np.random.default_rng(5).exponential(size=(7, 11))
    fractions = (0.5, 0.99, 1.0, 0.0)
    fast = statistics._resampled_quantiles(values, fractions, np.random.default_rng(3), 50)
    random = np.random.default_rng(3)
    for row in fast:
        drawn = values[random.integers(7, size=7)]
        assert row == pytest.approx(np.quantile(drawn, fractions), abs=1e-15)
    observed = [estimate.value for estimate in statistics.quantiles(values, fractions, seed=0)]
    assert observed == pytest.approx(np.quantile(values, fractions))


def test_quantiles_are_the_same_for_the_same_seed() -> None:
    values = np.random.default_rng(5).exponential(size=(7, 11))
    assert statistics.quantiles(values, (0.5,), seed=1) == statistics.quantiles(values, (0.5,), seed=1)
    assert statistics.quantiles(values, (0.5,), seed=1) != statistics.quantiles(values, (0.5,), seed=2)


def test_the_maximum_is_no_more_than_the_largest_seen() -> None:
    values = np.random.default_rng(5).exponential(size=(20, 30))
    (largest,) = statistics.quantiles(values, (1.0,), seed=0)
    assert largest.value == largest.high == values.max()


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """Clustered normal data, 16 windows of 20, 300 samples: each interval should hold the truth 285 times."""
    random = np.random.default_rng(11)
    held = {"mean": 0, "proportion": 0, "median": 0}
    for _ in range(300):
        values = random.normal(size=(16, 1)) + random.normal(size=(16, 20))
        estimates = {"mean": statistics.mean(values), "proportion": statistics.proportion(values > 0)}
        (estimates["median"],) = statistics.quantiles(values, (0.5,), seed=int(random.integers(2**31)))
        truth = {"mean": 0.0, "proportion": 0.5, "median": 0.0}
        for name, estimate in estimates.items():
            assert estimate.low is not None
            assert estimate.high is not None
            held[name] += estimate.low <= truth[name] <= estimate.high
    assert held["mean"] >= 273
    assert held["proportion"] >= 273
    assert held["median"] >= 262  # the percentile bootstrap is known to be a little narrow
