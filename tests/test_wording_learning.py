"""Data, training, pruning and decisions in words: known values, and nothing where nothing is known."""

from __future__ import annotations

from typing import Any

import pytest

from edgeslm import wording, wording_learning
from tests import learned_records

SIDE = {"examples": 1200, "classes": {"ham": 900, "spam": 300}, "tokens": 88_000}


@pytest.mark.parametrize(
    ("side", "said"),
    [
        (SIDE, "1,200 examples (900 ham, 300 spam), 88,000 tokens"),
        ({"examples": 9, "classes": dict.fromkeys("abcde", 1)}, "9 examples of 5 classes"),
        ({"examples": 1, "documents": 1, "tokens": 512, "counted_tokens": 128},
         "1 example, 1 document, 512 tokens, 25 % of them counted"),
        ({"examples": 40, "rows_per_window": 16, "units": 3}, "40 windows, 16 rows each, 3 units"),
        ({"examples": 40, "rows_per_window": 1}, "40 windows, 1 row each"),
        ({}, "n/a"),
    ],
)  # fmt: skip
def test_data_side(side: dict[str, Any], said: str) -> None:
    assert wording_learning.data_side(side) == said


def test_masked_says_counts_and_never_values() -> None:
    assert wording_learning.masked({"emails": 12, "phones": 3, "cards": 0}) == "12 emails, 3 phones"
    assert wording_learning.masked({"emails": 0}) == "nothing found"
    assert wording_learning.masked(None) == "n/a"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"duplicates": 1}, "1 held-out example is among the training examples too"),
        ({"duplicates": 12}, "12 held-out examples are among the training examples too"),
        ({"train": {"classes": {"a": 1, "b": 99}}}, "fewer than 2 % of the training examples are a"),
        ({"heldout": {"classes": {"a": 0, "b": 5}}}, "no held-out example is a"),
        ({"constant_channels": ["rpm"]}, "the channel rpm never changes"),
        ({"empty_channels": ["rpm"]}, "the channel rpm has no reading"),
        ({"windows_left_out": {"missing_readings": 1}}, "1 window was left out"),
    ],
)
def test_data_warnings(change: dict[str, Any], said: str) -> None:
    (warning,) = wording_learning.data_warnings({"train": SIDE, "duplicates": 0} | change)
    assert said in warning


def test_clean_data_has_no_warnings() -> None:
    assert wording_learning.data_warnings({"train": SIDE, "heldout": SIDE, "duplicates": 0}) == []
    assert wording_learning.data_warnings({}) == []


def test_training() -> None:
    record = learned_records.training()
    assert (
        wording_learning.training_length(record)
        == "240 steps, 3.00 epochs, stopped early, weights of step 150"
    )
    assert wording_learning.training_time(record) == "4 min 22 s, 3,096 tokens/s"
    assert wording_learning.heldout_figures(record) == "accuracy 98.50 %, log-loss 0.09120"
    assert wording_learning.training_time({"seconds": 0.4}) == "400 ms"


def evaluations(*losses: float) -> list[dict[str, float]]:
    return [{"step": 10 * number, "loss": loss} for number, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("record", "said"),
    [
        ({"evaluations": evaluations(3.0, 2.0, 1.0)}, "3.0000 before, 1.0000 after"),
        (
            {"evaluations": evaluations(3.0, 1.0, 2.0)},
            "3.0000 before, 2.0000 after, at best 1.0000 (step 10)",
        ),
        ({"evaluations": evaluations(3.0, 1.0, 2.0), "weights_of_step": 10}, "3.0000 before, 1.0000 after"),
        ({"evaluations": [{"step": 5, "loss": 1.0}]}, "1.0000 after"),
        ({"evaluations": []}, "n/a"),
        ({}, "n/a"),
    ],
)
def test_heldout_loss(record: dict[str, Any], said: str) -> None:
    assert wording_learning.heldout_loss(record) == said


def test_figures_of_other_kinds_are_left_out() -> None:
    held = {"accuracy": "high", "perplexity": float("nan"), "log_loss": True, "f1": None, "confusion": [[1]]}
    assert wording_learning.heldout_figures({"heldout": held}) == "n/a"


def test_pruned_says_only_what_changed() -> None:
    assert wording_learning.pruned(learned_records.prune()) == (
        "134.5 M -> 92.11 M parameters (68.5 % kept); layers 30 -> 24; MLP width 1,536 -> 1,280; "
        "tokens of the vocabulary 49,152 -> 17,408"
    )
    assert wording_learning.pruned({}) == wording.NOT_AVAILABLE


DECISION = {"labels": ["failure", "normal"], "training_prior": [0.2, 0.8], "prior": [0.01, 0.99]}


def test_base_rates_and_thresholds() -> None:
    assert (
        wording_learning.base_rates(DECISION) == "failure 1.0 %, normal 99.0 % (in training 20.0 %, 80.0 %)"
    )
    assert wording_learning.base_rates(DECISION | {"prior": [0.2, 0.8]}) == "n/a"
    assert wording_learning.base_rates(DECISION | {"prior": [0.2]}) == "n/a"
    assert wording_learning.decision_rule({"threshold": 1 / 21, "positive": "failure"}) == (
        "failure from a probability of 4.8 % on"
    )
    assert wording_learning.decision_rule({"threshold": 0.5, "positive": "failure"}) == "n/a"
    assert (
        wording_learning.decision_rule({"costs": [1, 2, 3], "threshold": None}) == "the least expected cost"
    )


def test_reads() -> None:
    assert wording_learning.reads({"kind": "text", "max_tokens": 256}) == "texts up to 256 tokens"
    sensors = {"kind": "sensors", "rows": 1, "channels": ["a", "b"]}
    assert wording_learning.reads(sensors) == "windows of 1 row, 2 channels"
    assert wording_learning.reads({}) == "n/a"


def test_alarms_in_one_line() -> None:
    said = wording_learning.alarms(learned_records.alarms())
    assert said == (
        "announced 33.0 s before failure against 10.3 s of a tuned threshold on rms, mean of 8 rows, "
        "at 0.4 % false alarms; 2 against 1 of 3 machines"
    )
    assert wording_learning.alarms(None) == wording_learning.alarms({"score": {}}) == "n/a"
    silent = learned_records.alarms()
    silent["baseline"]["mean_lead_s"] = 0.0
    assert "against 0.00 s of" in wording_learning.alarms(silent)
