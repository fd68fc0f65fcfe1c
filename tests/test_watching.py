"""Lead of a model's alarms over a plain threshold, on machines small enough to be worked out by hand."""

from __future__ import annotations

import csv
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgeslm import watching
from edgeslm.progress import Quiet
from edgeslm.runtime import ort
from edgeslm.runtime.posterior import make_decision
from edgeslm.specs import ColumnsSpec, WindowSpec
from edgeslm.stages import recordings, sensors

if TYPE_CHECKING:
    from pathlib import Path

COLUMNS = ColumnsSpec(label="state", labels=("fine", "bad"), time="time_s", unit="unit")
LIFE, WARNING, ROWS = 40, 10, 4


class KnowsBefore:
    """A classifier that is sure as soon as the hidden channel says so."""

    def __init__(self, bundle: Any) -> None:
        pass

    def predict_readings(self, windows: Any) -> Any:
        sure = np.where(windows[:, -1, 1] > 0, 0.9, 0.1)
        return np.stack([1 - sure, sure], axis=1)


def windows_of(folder: Path, machines: dict[str, tuple[int, int | None]], **columns: Any) -> Any:
    """Machines of LIFE seconds, labelled bad in their last WARNING ones.

    machines: name -> (seconds before the end from which rms is high, from which the hidden channel is; None: never).
    """
    with (folder / "table.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("unit", "time_s", columns.pop("channel", "rms"), "hidden", "state"))
        for name, (loud, hidden) in machines.items():
            for second in range(1, LIFE + 1):
                left = LIFE - second
                writer.writerow(
                    (
                        name, 100 + second, 1.0 + (left <= loud) + 0.001 * (second % 7),
                        int(hidden is not None and left <= hidden),
                        "bad" if left < WARNING and hidden is not None else "fine",
                    )
                )  # fmt: skip
    table = recordings.read_tables([str(folder / "table.csv")], COLUMNS, folder / "rows")
    return sensors.measured(table, WindowSpec(rows=ROWS, stride=4))


def measure(windows: Any, monkeypatch: pytest.MonkeyPatch, **decision: Any) -> Any:
    monkeypatch.setattr(ort, "OrtClassifier", KnowsBefore)
    rule = make_decision(("fine", "bad"), {"fine": 3, "bad": 1}, **decision).as_record()
    return watching.measure(SimpleNamespace(path="bundle"), windows, rule, Quiet())  # type: ignore[arg-type]


def test_the_lead_over_a_threshold_on_rms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One false alarm of the model, 12 s before the end of b: the threshold on RMS may have one too."""
    found = measure(windows_of(tmp_path, {"a": (3, 8), "b": (5, 10)}), monkeypatch)
    assert found["warning_s"] == WARNING
    assert found["score"]["lead_s"] == {"a": 8.0, "b": 9.0}  # an alarm at exactly 10 s is false
    early = 2 * (LIFE - WARNING - (ROWS - 1))
    assert found["score"]["false_alarms"] == 1
    assert found["false_alarm_rate"] == pytest.approx(1 / early)
    assert found["baseline"]["lead_s"] == {"a": 3.0, "b": 5.0}
    assert found["baseline"]["name"] == "rms"
    assert found["baseline"]["false_alarm_rate"] <= found["false_alarm_rate"]
    assert (found["earlier"], found["later"], found["machines"]) == (2, 0, 2)
    assert found["positive"] == "bad"
    assert found["gain_s"]["value"] == pytest.approx(4.5)


def test_the_threshold_is_the_one_that_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With failures thought to be rare, a probability of 0.9 in training is too little: nothing is announced."""
    found = measure(windows_of(tmp_path, {"a": (3, 8)}), monkeypatch, prior={"bad": 0.001})
    assert found["score"]["announced"] == 0
    assert found["score"]["mean_lead_s"] == 0
    assert found["baseline"]["lead_s"] == {"a": 3.0}
    costly = measure(
        windows_of(tmp_path, {"a": (3, 8)}), monkeypatch, prior={"bad": 0.001}, costs={"bad": 1e6}
    )
    assert costly["score"]["announced"] == 1


def test_without_rms_the_best_of_all_readings_is_the_rival(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = measure(windows_of(tmp_path, {"a": (3, 8)}, channel="pressure"), monkeypatch)
    assert found["baseline"]["name"] == "hidden"
    assert found["baseline"]["lead_s"] == found["score"]["lead_s"]
    assert found["never_later"]


def test_machines_that_do_not_fail_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = measure(windows_of(tmp_path, {"a": (3, 8), "b": (0, None)}), monkeypatch)
    assert list(found["score"]["lead_s"]) == ["a"]
    assert measure(windows_of(tmp_path, {"b": (0, None)}), monkeypatch) is None


def test_readings_that_are_missing_are_the_last_ones() -> None:
    values = np.array([np.nan, np.nan, 1, np.nan, 3, np.nan])
    assert watching.known(values).tolist() == [1, 1, 1, 1, 3, 3]
    assert watching.known(np.full(2, np.nan)).tolist() == [0, 0]
