"""Task metrics: against scikit-learn, closed forms and repeated samples; intervals by their coverage."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeslm.bench import tasks
from edgeslm.bench.tasks import evaluate_classifier, metrics, quadratic_weighted_kappa, rates
from edgeslm.errors import DataError, RecipeError
from tests import onnx_models

if TYPE_CHECKING:
    from pathlib import Path

CLASSES = ("low", "middle", "high")


def sample(count: int = 300, seed: int = 0, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """True classes and probabilities that know something of them."""
    random = np.random.default_rng(seed)
    truth = random.choice(classes, size=count, p=[0.5, 0.3, 0.2][:classes] if classes == 3 else None)
    logits = random.standard_normal((count, classes)) + 1.2 * np.eye(classes)[truth]
    return truth, np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


def values(record: dict[str, Any]) -> dict[str, float]:
    macro = {f"macro {name}": each["value"] for name, each in record["macro"].items()}
    return {"accuracy": record["accuracy"]["value"], "log_loss": record["log_loss"]["value"], **macro}


@pytest.mark.workstation
@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(30, 200))
def test_metrics_are_those_of_scikit_learn(seed: int, count: int) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    truth, probabilities = sample(count, seed)
    if len(set(truth)) < 3:
        return
    tasks_record = quick(truth, probabilities, ordinal=True)
    chosen = probabilities.argmax(axis=1)
    precision, recall, f1, support = sklearn.precision_recall_fscore_support(truth, chosen, zero_division=0)
    assert tasks_record["confusion"] == sklearn.confusion_matrix(truth, chosen).tolist()
    assert values(tasks_record) == pytest.approx({
        "accuracy": sklearn.accuracy_score(truth, chosen), "log_loss": sklearn.log_loss(truth, probabilities),
        "macro precision": precision.mean(), "macro recall": recall.mean(), "macro f1": f1.mean(),
    })  # fmt: skip
    for number, name in enumerate(CLASSES):
        entry = tasks_record["per_class"][name]
        assert (entry["examples"], entry["chosen"]) == (support[number], (chosen == number).sum())
        for metric, theirs in (("precision", precision), ("recall", recall), ("f1", f1)):
            ours = entry[metric]["value"] if entry[metric] else 0.0
            assert ours == pytest.approx(theirs[number])
    kappa = sklearn.cohen_kappa_score(truth, chosen, weights="quadratic")
    assert tasks_record["quadratic_weighted_kappa"]["value"] == pytest.approx(kappa)
    assert tasks_record["mean_absolute_error"]["value"] == pytest.approx(
        sklearn.mean_absolute_error(truth, chosen)
    )


def quick(truth: np.ndarray, probabilities: np.ndarray, **of: Any) -> dict[str, Any]:
    """metrics with few resamples, where the intervals don't matter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks.statistics, "RESAMPLES", 8)
        return metrics(truth, probabilities, classes=CLASSES[: probabilities.shape[1]], **of)


@pytest.mark.workstation
def test_base_rates_weigh_as_scikit_learn_s_sample_weights() -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    truth, probabilities = sample()
    prior = (0.1, 0.2, 0.7)
    weights = np.asarray(prior)[truth] / np.bincount(truth)[truth]
    record = quick(truth, probabilities, prior=prior, ordinal=True)
    chosen = probabilities.argmax(axis=1)
    precision, recall, f1, _ = sklearn.precision_recall_fscore_support(truth, chosen, sample_weight=weights)
    assert values(record) == pytest.approx({
        "accuracy": sklearn.accuracy_score(truth, chosen, sample_weight=weights),
        "log_loss": sklearn.log_loss(truth, probabilities, sample_weight=weights),
        "macro precision": precision.mean(), "macro recall": recall.mean(), "macro f1": f1.mean(),
    })  # fmt: skip
    assert record["quadratic_weighted_kappa"]["value"] == pytest.approx(
        sklearn.cohen_kappa_score(truth, chosen, weights="quadratic", sample_weight=weights)
    )
    assert record["protocol"]["prior"] == list(prior)


def test_base_rates_estimate_what_a_deployed_sample_gives() -> None:
    """Recall stays, precision falls with the base rate, as P(D|E) P(E) / P(D) says."""
    truth, probabilities = sample(4000, classes=2)
    record = quick(truth, probabilities, prior=(0.99, 0.01))
    confusion = np.asarray(record["confusion"])
    hit, alarm = confusion[1, 1] / confusion[1].sum(), confusion[0, 1] / confusion[0].sum()
    per_class = record["per_class"]["middle"]
    assert per_class["recall"]["value"] == pytest.approx(hit)
    assert per_class["precision"]["value"] == pytest.approx(hit * 0.01 / (hit * 0.01 + alarm * 0.99))


def by_hand_calibration(truth: np.ndarray, probabilities: np.ndarray) -> float:
    total = 0.0
    for k in range(15):
        inside = [i for i in range(len(truth)) if k / 15 < probabilities[i].max() <= (k + 1) / 15]
        if inside:
            sure = np.mean([probabilities[i].max() for i in inside])
            right = np.mean([probabilities[i].argmax() == truth[i] for i in inside])
            total += len(inside) / len(truth) * abs(sure - right)
    return total


@given(st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_calibration_error_by_brute_force(seed: int) -> None:
    truth, probabilities = sample(60, seed)
    record = quick(truth, probabilities)
    assert record["expected_calibration_error"]["value"] == pytest.approx(
        by_hand_calibration(truth, probabilities)
    )
    assert sum(each["examples"] for each in record["reliability"]) == 60
    for each in record["reliability"]:
        assert each["low"] - 1e-12 <= each["certainty"] <= each["high"] + 1e-12


def test_a_calibrated_model_s_error_is_put_down_to_chance() -> None:
    random = np.random.default_rng(5)
    sure = random.uniform(0.5, 1, 150)
    probabilities = np.stack([sure, 1 - sure], axis=1)
    truth = (random.random(150) > sure).astype(np.int64)
    error = metrics(truth, probabilities, classes=CLASSES[:2])["expected_calibration_error"]
    assert error["low"] == 0
    assert error["by_chance"] == pytest.approx(error["value"], abs=0.04)
    wrong = metrics(1 - truth, probabilities, classes=CLASSES[:2])["expected_calibration_error"]
    assert wrong["low"] > 0.3


def test_certainty_on_the_edge_of_a_bin() -> None:
    truth, probabilities = np.asarray([0, 0, 1]), np.asarray([[1.0, 0.0], [0.6, 0.4], [0.5, 0.5]])
    bins = {each["high"]: each["examples"] for each in quick(truth, probabilities)["reliability"]}
    assert bins == {1.0: 1, 9 / 15: 1, 8 / 15: 1}


def test_known_confusion() -> None:
    precision, recall, f1 = rates(np.asarray([[8, 2, 0], [1, 9, 0], [0, 0, 0]]))
    np.testing.assert_allclose(precision, [8 / 9, 9 / 11, math.nan])
    np.testing.assert_allclose(recall, [0.8, 0.9, math.nan])
    np.testing.assert_allclose(f1, [16 / 19, 18 / 21, math.nan])
    assert quadratic_weighted_kappa(np.eye(3)) == pytest.approx(1.0)
    assert quadratic_weighted_kappa(np.eye(3)[::-1]) == pytest.approx(-1.0)
    assert quadratic_weighted_kappa(np.ones((3, 3))) == pytest.approx(0.0, abs=1e-12)
    assert math.isnan(quadratic_weighted_kappa(np.diag([5.0, 0, 0])))


def test_what_is_not_defined_is_null() -> None:
    truth = np.asarray([0, 0, 1, 1])
    probabilities = np.tile([0.9, 0.1, 0.0], (4, 1))
    record = quick(truth, probabilities)
    assert record["per_class"]["middle"]["precision"] is None
    assert record["per_class"]["middle"]["recall"]["value"] == 0
    assert record["per_class"]["high"] == {
        "examples": 0, "chosen": 0, "precision": None, "recall": None, "f1": None,
    }  # fmt: skip
    assert "No example of: high." in record["protocol"]["method"]
    assert record["macro"]["recall"]["value"] == pytest.approx(0.5)
    alike = metrics(np.zeros(4, np.int64), probabilities, classes=CLASSES, ordinal=True)
    assert alike["quadratic_weighted_kappa"] is None
    json.dumps([record, alike], allow_nan=False)


def test_a_certain_mistake_does_not_make_the_loss_infinite() -> None:
    record = quick(np.asarray([0, 1]), np.asarray([[0.0, 1.0], [0.0, 1.0]]))
    assert record["log_loss"]["value"] == pytest.approx(-math.log(1e-12) / 2)


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """The population's values are those of a very large sample; 95 % of small samples' intervals hold them.

    The calibration error's hold a little less: its noise is one-sided.
    """
    truth, probabilities = sample(200_000, seed=99)
    population = values(quick(truth, probabilities))
    population["calibration"] = quick(truth, probabilities)["expected_calibration_error"]["value"]
    inside = dict.fromkeys(population, 0)
    trials = 120
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks.statistics, "RESAMPLES", 200)
        for seed in range(trials):
            record = metrics(*sample(250, seed), classes=CLASSES)
            estimates = {"accuracy": record["accuracy"], "log_loss": record["log_loss"],
                         **{f"macro {name}": each for name, each in record["macro"].items()},
                         "calibration": record["expected_calibration_error"]}  # fmt: skip
            for name, estimate in estimates.items():
                assert estimate["low"] <= estimate["value"] <= estimate["high"]
                inside[name] += estimate["low"] <= population[name] <= estimate["high"]
    for name, count in inside.items():
        assert count / trials >= (0.8 if name == "calibration" else 0.87), (name, count)


def test_examples_that_belong_together_widen_the_interval() -> None:
    """Ten copies of each example hold no more than one of each."""
    truth, probabilities = sample(100)
    groups = np.repeat(np.arange(100), 10)
    copied = np.repeat(truth, 10), np.repeat(probabilities, 10, axis=0)
    with_groups = metrics(*copied, classes=CLASSES, groups=[f"unit {group}" for group in groups])
    without, single = metrics(*copied, classes=CLASSES), metrics(truth, probabilities, classes=CLASSES)

    def width(record: dict[str, Any], *keys: str) -> float:
        for key in keys:
            record = record[key]
        return record["high"] - record["low"]

    for keys in (("accuracy",), ("macro", "f1"), ("log_loss",)):
        assert width(with_groups, *keys) == pytest.approx(width(single, *keys), rel=0.2)
        assert width(with_groups, *keys) > 2.5 * width(without, *keys)
    assert with_groups["protocol"]["groups"] == 100
    assert "the 100 groups" in with_groups["protocol"]["method"]


def test_one_example_or_group_has_no_interval() -> None:
    truth, probabilities = sample(20)
    for record in (
        metrics(truth[:1], probabilities[:1], classes=CLASSES),
        metrics(truth, probabilities, classes=CLASSES, groups=["a"] * 20),
    ):
        assert record["accuracy"]["low"] is record["macro"]["f1"]["high"] is None
        assert "One group" in record["protocol"]["method"]


def test_same_seed_same_record() -> None:
    one, again = (metrics(*sample(), classes=CLASSES, seed=3) for _ in range(2))
    assert one == again
    assert metrics(*sample(), classes=CLASSES, seed=4)["macro"] != one["macro"]


def test_nothing_to_measure_on() -> None:
    with pytest.raises(DataError, match="no examples"):
        metrics(np.zeros(0, np.int64), np.zeros((0, 3)), classes=CLASSES)
    truth, probabilities = sample()
    probabilities, truth = probabilities[truth < 2], truth[truth < 2]
    with pytest.raises(DataError, match="no example of high"):
        metrics(truth, probabilities, classes=CLASSES, prior=(0.2, 0.3, 0.5))
    assert metrics(truth, probabilities, classes=CLASSES, prior=(0.4, 0.6, 0.0))["accuracy"]


# --- the artifact ---

EXAMPLES = [
    ("win money", "spam"),
    ("meeting at noon", "ham"),
    ("now now now", "other"),
    ("hello " * 9, "ham"),
]


def test_the_artifact_is_measured_through_its_runtime(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    bundle = onnx_models.write_classifier(tmp_path / "b")
    record = evaluate_classifier(bundle, iter(EXAMPLES), threads=1)
    tokens = [[2, 3, 4], [2, 6, 7, 8], [2, 5, 5, 5], [2, 9, 9, 9, 9, 9]]
    logits = onnx_models.text_logits(tokens)
    loss = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(4), [1, 0, 2, 0]]
    assert record["log_loss"]["value"] == pytest.approx(loss.mean(), rel=1e-5)
    assert record["classes"] == list(onnx_models.LABELS)
    assert record["artifact"]["digest"] == bundle.digest
    assert record["artifact"]["parameters"] == 68
    assert record["protocol"]["truncated"] == 1
    assert record["decision"]["prior"] == pytest.approx([1 / 3] * 3)
    assert len(record["text"]["sha256"]) == 64
    json.dumps(record, allow_nan=False)


def test_sensors_with_a_base_rate_and_costs(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    from edgeslm.runtime.ort import OrtClassifier
    from edgeslm.runtime.posterior import make_decision, reweigh

    counts = {"failure": 1, "normal": 3}
    rule = make_decision(("failure", "normal"), counts, costs={"failure": 9})
    bundle = onnx_models.write_classifier(tmp_path / "b", "sensors", decision=rule.as_record())
    windows = np.random.default_rng(0).standard_normal((40, onnx_models.ROWS, 3)) * 10
    examples = [(window, "failure" if number % 4 == 0 else "normal") for number, window in enumerate(windows)]
    record = evaluate_classifier(
        bundle, examples, prior={"failure": 0.01}, groups=[f"{i // 8}" for i in range(40)]
    )
    learned = OrtClassifier(bundle).predict_readings(windows)
    deployed = reweigh(learned, (0.25, 0.75), (0.01, 0.99))
    called = deployed[:, 0] >= 0.1
    assert record["per_class"]["failure"]["chosen"] == called.sum()
    assert record["decision"]["threshold"] == pytest.approx(0.1)
    assert record["protocol"]["prior"] == pytest.approx([0.01, 0.99])
    assert record["protocol"]["truncated"] is None
    assert record["protocol"]["groups"] == 5
    plain = evaluate_classifier(bundle, examples)
    assert plain["per_class"]["failure"]["chosen"] == (learned[:, 0] >= 0.1).sum()
    assert plain["protocol"]["prior"] is None


def test_examples_that_fit_no_class(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    bundle = onnx_models.write_classifier(tmp_path / "b")
    with pytest.raises(DataError, match="no class 'eggs'"):
        evaluate_classifier(bundle, [("x", "eggs")])
    with pytest.raises(DataError, match="no examples"):
        evaluate_classifier(bundle, [])
    with pytest.raises(RecipeError, match="no class 'eggs'"):
        evaluate_classifier(bundle, EXAMPLES, prior={"eggs": 0.5})
