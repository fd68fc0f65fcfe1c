"""What decides: the bundle's rule, and what is asked for in its place."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgeslm.errors import BundleError, EngineError, RecipeError
from edgeslm.runtime.posterior import Decision, decide, make_decision
from edgeslm.runtime.rule import as_lines, make_rule, open_for, rounded, scored
from tests import onnx_models

if TYPE_CHECKING:
    from pathlib import Path

TWO = make_decision(("failure", "normal"), {"failure": 0.1, "normal": 0.9}, costs={"failure": 20.0})
THREE = make_decision(("a", "b", "c"), {"a": 1, "b": 1, "c": 2})
POSTERIOR = np.random.default_rng(0).dirichlet([1.0, 1.0], 200)


def test_without_wishes_the_bundle_decides() -> None:
    rule = make_rule(TWO)
    assert rule.label == "failure"
    assert rule.alarm_from == pytest.approx(1 / 21)
    np.testing.assert_array_equal(rule.choose(POSTERIOR), TWO.choose(POSTERIOR))
    assert rule.as_record() == TWO.as_record()


@pytest.mark.parametrize("threshold", [0.01, 0.5, 0.9, 1.0])
def test_a_threshold_is_of_the_watched_class(threshold: float) -> None:
    """Above one half too, where costs would watch for the other class."""
    rule = make_rule(TWO, threshold=threshold)
    expected = np.where(POSTERIOR[:, 0] >= threshold, 0, 1)
    np.testing.assert_array_equal(rule.choose(POSTERIOR), expected)
    assert rule.as_record()["threshold"] == threshold


def test_a_threshold_among_several_classes() -> None:
    posterior = np.random.default_rng(1).dirichlet([1.0, 1.0, 1.0], 200)
    rule = make_rule(THREE, watch="b", threshold=0.4)
    for row, chosen in zip(posterior, rule.choose(posterior), strict=True):
        assert chosen == (1 if row[1] >= 0.4 else 0 if row[0] >= row[2] else 2)
    plain = make_rule(THREE)
    assert (plain.watched, plain.alarm_from) == (None, None)
    np.testing.assert_array_equal(plain.choose(posterior), decide(posterior))


def test_rates_and_costs_take_the_place_of_the_bundle_s() -> None:
    rule = make_rule(TWO, prior={"failure": 0.001})
    assert rule.decision.prior == pytest.approx((0.001, 0.999))
    assert rule.decision.costs == TWO.costs
    dear = make_rule(TWO, costs={"normal": 3.0})
    assert dear.decision.costs == (1.0, 3.0)
    assert dear.decision.prior == TWO.prior


@pytest.mark.parametrize(
    ("decision", "wishes", "said"),
    [
        (TWO, {"threshold": 0.5, "costs": {"failure": 2.0}}, "both costs and a threshold"),
        (TWO, {"watch": "Failure"}, "no class 'Failure'"),
        (TWO, {"prior": {"failed": 0.1}}, "no class 'failed'"),
        (TWO, {"prior": {"failure": 1.5}}, "1.5"),
        (THREE, {"threshold": 0.5}, "the model has 3"),
    ],
)
def test_impossible_wishes(decision: Decision, wishes: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        make_rule(decision, **wishes)


def test_a_bundle_for_another_task_names_its_command(tmp_path: Path) -> None:
    text = onnx_models.write_classifier(tmp_path / "text").path
    sensors = onnx_models.write_classifier(tmp_path / "sensors", "sensors").path
    assert open_for(text, "text-classification").name == "tiny-text"
    with pytest.raises(BundleError, match="edgeslm predict") as caught:
        open_for(sensors, "text-classification")
    assert "sensor-classification" in caught.value.message
    with pytest.raises(BundleError, match="edgeslm classify"):
        open_for(text, "sensor-classification")


def test_an_item_that_fails_costs_no_other() -> None:
    def predict(items: list[float]) -> Any:
        if any(np.isnan(items)):
            raise EngineError("not finite")
        return np.asarray([[item, 1 - item] for item in items])

    found = scored(predict, [0.1, np.nan, 0.3, np.nan])
    assert [isinstance(one, EngineError) for one in found] == [False, True, False, True]
    np.testing.assert_allclose(np.stack([found[0], found[2]])[:, 0], [0.1, 0.3])


def test_answers_are_json_lines_in_utf_8_whatever_the_text_holds() -> None:
    lines = as_lines([{"text": "Grüße \ud800 \n"}, {"p": rounded(1 / 3)}]).decode("utf-8").splitlines()
    assert [json.loads(line) for line in lines] == [{"text": "Grüße \ud800 \n"}, {"p": 0.333333}]
