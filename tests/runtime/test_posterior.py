"""Bayes' rule, costs and base rates: against closed forms, brute force and simulated populations."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeslm.errors import BundleError, RecipeError
from edgeslm.runtime.posterior import (
    Decision,
    decide,
    make_decision,
    read_decision,
    reweigh,
    threshold_from_costs,
)

LABELS = ("failure", "normal")


def normal_density(x: np.ndarray, mean: float) -> np.ndarray:
    return np.exp(-((x - mean) ** 2) / 2) / np.sqrt(2 * np.pi)


def test_reweigh_is_bayes_rule_in_closed_form() -> None:
    """Two normal classes: the posterior under any base rate is known, and what reweigh must give."""
    x = np.linspace(-6, 6, 101)
    likelihoods = np.stack([normal_density(x, 1.0), normal_density(x, -1.0)], axis=1)

    def posterior(prior: tuple[float, float]) -> np.ndarray:
        joint = likelihoods * prior
        return joint / joint.sum(axis=1, keepdims=True)

    for trained, deployed in (((0.5, 0.5), (0.01, 0.99)), ((0.2, 0.8), (0.7, 0.3)), ((0.9, 0.1), (0.0, 1.0))):
        found = reweigh(posterior(trained), trained, deployed)
        np.testing.assert_allclose(found, posterior(deployed), rtol=1e-12, atol=1e-300)


def test_reweigh_one_number_by_hand() -> None:
    """p = 0.8 learned at 1:1; at 1:99 the odds 4 become 4/99."""
    found = reweigh(np.asarray([[0.8, 0.2]]), (0.5, 0.5), (0.01, 0.99))
    assert found[0, 0] == pytest.approx((4 / 99) / (1 + 4 / 99), rel=1e-14)


def test_reweighed_probabilities_are_calibrated_where_the_base_rate_differs() -> None:
    """Simulated at the deployed rate: of the cases called p, a share p is positive."""
    random = np.random.default_rng(0)
    truth = random.random(200_000) < 0.05
    x = random.standard_normal(len(truth)) + np.where(truth, 1.0, -1.0)
    learned = 1 / (1 + np.exp(-2 * x))  # the posterior at equal rates
    found = reweigh(np.stack([learned, 1 - learned], axis=1), (0.5, 0.5), (0.05, 0.95))[:, 0]
    for low in (0.0, 0.1, 0.3, 0.5, 0.7):
        inside = (found >= low) & (found < low + 0.2)
        assert truth[inside].mean() == pytest.approx(found[inside].mean(), abs=0.03)
    assert abs(truth.mean() - found.mean()) < 0.002
    assert learned.mean() > 2 * truth.mean()


probabilities = st.lists(st.floats(0, 1), min_size=3, max_size=3).filter(lambda values: sum(values) > 1e-3)


def shares(values: list[float]) -> np.ndarray:
    return np.asarray(values) / sum(values)


@given(probabilities, st.lists(st.floats(0.01, 1), min_size=3, max_size=3))
def test_reweigh_to_the_training_prior_changes_nothing_and_back_undoes(
    row: list[float], prior: list[float]
) -> None:
    given_row, trained, even = shares(row)[None], shares(prior), np.full(3, 1 / 3)
    np.testing.assert_allclose(reweigh(given_row, trained, trained), given_row, atol=1e-12)
    there = reweigh(given_row, trained, even)
    assert there.sum() == pytest.approx(1)
    np.testing.assert_allclose(reweigh(there, even, trained), given_row, atol=1e-9)


def test_a_row_that_says_nothing_where_it_runs_becomes_the_prior() -> None:
    found = reweigh(np.asarray([[1.0, 0.0, 0.0]]), (0.2, 0.4, 0.4), (0.0, 0.25, 0.75))
    assert found.tolist() == [[0.0, 0.25, 0.75]]


def expected_cost(said: int, row: np.ndarray, costs: list[float]) -> float:
    return sum(row[k] * costs[k] for k in range(len(row)) if k != said)


@given(probabilities, st.lists(st.floats(0.1, 50), min_size=3, max_size=3))
def test_decide_has_the_least_expected_cost(row: list[float], costs: list[float]) -> None:
    given_row = shares(row)
    said = int(decide(given_row[None], costs)[0])
    best = min(expected_cost(k, given_row, costs) for k in range(3))
    assert expected_cost(said, given_row, costs) == pytest.approx(best, abs=1e-9)


def test_threshold_is_where_both_cost_the_same() -> None:
    for miss, alarm in ((1.0, 1.0), (9.0, 1.0), (0.2, 3.0)):
        at = threshold_from_costs(miss, alarm)
        assert at * miss == pytest.approx((1 - at) * alarm)
    assert threshold_from_costs(9.0, 1.0) == pytest.approx(0.1)


def test_decision_by_threshold_is_decision_by_costs() -> None:
    rule = make_decision(LABELS, {"failure": 1, "normal": 19}, costs={"failure": 20})
    assert (rule.positive, rule.threshold) == (0, pytest.approx(1 / 21))
    p = np.linspace(0, 1, 1000)
    rows = np.stack([p, 1 - p], axis=1)
    assert rule.choose(rows).tolist() == decide(rows, rule.costs).tolist()
    exactly = np.asarray([[rule.threshold, 1 - rule.threshold]])
    assert rule.choose(exactly).tolist() == [0]


def test_the_positive_class_is_the_costlier_else_the_rarer() -> None:
    assert make_decision(LABELS, {"failure": 5, "normal": 95}).positive == 0
    assert make_decision(LABELS, {"failure": 95, "normal": 5}).positive == 1
    assert make_decision(LABELS, {"failure": 95, "normal": 5}, costs={"failure": 3}).positive == 0
    three = make_decision(("a", "b", "c"), {"a": 1, "b": 1, "c": 1}, costs={"c": 9})
    assert (three.positive, three.threshold) == (None, None)
    assert three.choose(np.asarray([[0.5, 0.4, 0.1]])).tolist() == [2]


def test_base_rates_that_are_not_given_share_the_rest() -> None:
    counts = {"a": 60, "b": 30, "c": 10}
    rule = make_decision(("a", "b", "c"), counts, prior={"c": 0.4})
    assert rule.training_prior == pytest.approx((0.6, 0.3, 0.1))
    assert rule.prior == pytest.approx((0.4, 0.2, 0.4))
    assert make_decision(LABELS, {"failure": 1, "normal": 1}, prior={"failure": 0.01}).prior == pytest.approx(
        (0.01, 0.99)
    )


@pytest.mark.parametrize(
    ("prior", "costs", "said"),
    [
        ({"failur": 0.1}, None, "no class 'failur'"),
        (None, {"nothing": 2}, "no class 'nothing'"),
        ({"failure": -0.1}, None, "base rate of failure is -0.1"),
        ({"failure": 1.5}, None, "base rate of failure is 1.5"),
        ({"failure": float("nan")}, None, "is nan"),
        ({"failure": 0.3, "normal": 0.3}, None, "add up to 0.6"),
        ({"failure": 0.8, "normal": 0.8}, None, "add up to 1.6"),
        (None, {"failure": 0}, "cost of missing failure is 0"),
        (None, {"failure": float("inf")}, "is inf"),
    ],
)
def test_impossible_numbers_are_named(prior: dict | None, costs: dict | None, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        make_decision(LABELS, {"failure": 1, "normal": 3}, prior=prior, costs=costs)
    assert said in caught.value.message
    assert caught.value.hint


def test_the_nearest_class_is_offered() -> None:
    with pytest.raises(RecipeError, match="did you mean 'failure'"):
        make_decision(LABELS, {"failure": 1, "normal": 3}, prior={"failur": 0.1})


def test_a_class_without_examples_has_no_base_rate() -> None:
    with pytest.raises(RecipeError, match="'failure' has no base rate"):
        make_decision(LABELS, {"normal": 3})


def test_record_reads_back() -> None:
    rule = make_decision(LABELS, {"failure": 1, "normal": 3}, prior={"failure": 0.01}, costs={"failure": 50})
    record = json.loads(json.dumps(rule.as_record()))
    assert read_decision(record, LABELS, "here") == rule
    assert record["positive"] == "failure"
    assert record["threshold"] == pytest.approx(1 / 51)
    plain = read_decision(None, LABELS, "here")
    assert plain == Decision(labels=LABELS, training_prior=(0.5, 0.5), prior=(0.5, 0.5))
    rows = np.asarray([[0.3, 0.7]])
    assert plain.posterior(rows) is rows


@pytest.mark.parametrize(
    "change",
    [{"labels": ["normal", "failure"]}, {"training_prior": None}, {"training_prior": [0.5]}, {"prior": [0.5, 0.6]},
     {"prior": ["a", "b"]}, {"prior": [-1, 2]}, {"costs": [0, 1]}, {"training_prior": [0, 1]}, {"costs": "x"}],
)  # fmt: skip
def test_a_bundle_s_bad_record_is_refused(change: dict) -> None:
    record = make_decision(LABELS, {"failure": 1, "normal": 3}).as_record() | change
    with pytest.raises(BundleError, match="here"):
        read_decision(record, LABELS, "here")
