"""Scores, posteriors and alarms against the classifier itself and a count by hand."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgeslm.bundle import open_bundle, write_bundle
from edgeslm.errors import DataError, RecipeError
from edgeslm.runtime.ort import OrtClassifier
from edgeslm.runtime.watch import predict
from tests import onnx_models

if TYPE_CHECKING:
    from pathlib import Path

    from edgeslm.runtime.rule import Answer

pytest.importorskip("onnxruntime")

ROWS, CHANNELS = onnx_models.ROWS, onnx_models.CHANNELS
DECISION = {
    "labels": ["failure", "normal"], "training_prior": [0.5, 0.5], "prior": [0.1, 0.9], "costs": [5.0, 1.0],
    "positive": "failure", "threshold": 1 / 6,
}  # fmt: skip
DATA = {"columns": {"time": "t", "unit": "machine"}, "windows": {"max_gap": 1.5, "max_missing": 0.2}}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    manifest = onnx_models.manifest("sensors", decision=DECISION, data=DATA)
    files: dict[str, Any] = {"model.onnx": onnx_models.sensor_model()}
    return write_bundle(tmp_path_factory.mktemp("sensors") / "b", files=files, manifest=manifest).path


def readings(count: int, seed: int = 0) -> np.ndarray:
    center, scale = (np.asarray(onnx_models.NORMALIZATION[key]) for key in ("center", "scale"))
    return center + scale * np.random.default_rng(seed).standard_normal((count, len(CHANNELS)))


def write(path: Path, values: np.ndarray, *, machine: str = "m", start: int = 0) -> Path:
    rows = [
        {"machine": machine, "t": start + number} | dict(zip(CHANNELS, map(float, row), strict=True))
        for number, row in enumerate(values)
    ]
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return path


def run(path: Path, source: Path, **options: Any) -> tuple[dict[str, Any], list[Answer]]:
    found: list[Answer] = []
    record = predict(path, source, found.extend, threads=1, **options)
    return record, found


def test_scores_are_the_classifier_s_and_posteriors_bayes_rule(path: Path, tmp_path: Path) -> None:
    values = readings(300)
    record, found = run(path, write(tmp_path / "a.jsonl", values))
    starts = range(0, len(values) - ROWS + 1, 2)
    windows = np.stack([values[start : start + ROWS] for start in starts])
    scores = OrtClassifier(open_bundle(path), threads=1).predict_readings(windows)[:, 0]
    np.testing.assert_allclose([one["score"] for one in found], scores, rtol=2e-5)
    odds = scores / (1 - scores) * (0.1 / 0.9)
    np.testing.assert_allclose([one["posterior"] for one in found], odds / (1 + odds), rtol=2e-5)
    assert [one["time"] for one in found] == [start + ROWS - 1 for start in starts]
    assert [one["line"] for one in found] == [start + ROWS for start in starts]
    assert [one["alarm"] for one in found] == [one["posterior"] >= 1 / 6 for one in found]
    assert record["answered"] == len(found) == 149
    assert 0 < record["alarms"]["windows"] == sum(one["alarm"] for one in found)
    assert record["alarms"]["first"] == next(one for one in found if one["alarm"])


@pytest.mark.parametrize("hold", [1, 2, 3])
def test_an_alarm_is_held_by_each_machine_for_itself(path: Path, tmp_path: Path, hold: int) -> None:
    """Rows of two machines alternate; by hand, each one's windows are counted alone."""
    table, several = tmp_path / "a.jsonl", {name: readings(200, seed) for seed, name in enumerate("xy")}
    for number in range(200):
        for name, values in several.items():
            write(table, values[number : number + 1], machine=name, start=number)
    record, found = run(path, table, hold=hold, threshold=0.3)
    begun = 0
    for name in "xy":
        over = 0
        for one in (each for each in found if each["unit"] == name):
            over = over + 1 if one["posterior"] >= 0.3 else 0
            assert (one["held"], one["alarm"]) == (over, over >= hold)
            assert one["label"] == ("failure" if over else "normal")
            begun += over == hold
    assert record["alarms"]["begun"] == begun > 0
    assert (record["units"], record["decision"]["hold"]) == (2, hold)


def test_a_gap_ends_what_was_held(path: Path, tmp_path: Path) -> None:
    values = readings(80)
    table = write(write(tmp_path / "a.jsonl", values[:40]), values[40:], start=1000)
    record, found = run(path, table, threshold=1e-9, stride=1)
    held = [one["held"] for one in found]
    assert held == [*range(1, 38), *range(1, 38)]
    assert record["gaps"] == 1


def test_bad_rows_and_windows_are_told_in_their_place(path: Path, tmp_path: Path) -> None:
    table = write(tmp_path / "a.jsonl", readings(4))
    with table.open("a") as file:
        file.write('nonsense\n"text"\n' + json.dumps({"machine": "m", "t": 4, "rms": "high"}) + "\n")
        file.write("".join(json.dumps({"machine": "m", "t": 4 + n, "rms": 1.0}) + "\n" for n in range(2)))
    record, found = run(path, table)
    assert [one["line"] for one in found] == [4, 5, 6, 7, 9]
    assert [next((key for key in ("error", "left_out", "score") if key in one), "") for one in found] == [
        "score", "error", "error", "error", "left_out",
    ]  # fmt: skip
    assert (record["rows"], record["failed"], record["left_out"], record["answered"]) == (9, 3, 1, 1)


def test_several_classes_have_no_alarm_unless_one_is_watched(tmp_path: Path) -> None:
    held = onnx_models.weights()
    random = np.random.default_rng(3)
    held["sensor_head"] = random.standard_normal((ROWS * 3, 3)).astype(np.float32)
    nodes = [
        onnx_models.node("Flatten", ("readings",), "flat", axis=1),
        onnx_models.node("MatMul", ("flat", "head"), "logits"),
    ]
    graph = onnx_models.graph(
        nodes,
        [onnx_models.tensor("head", held["sensor_head"])],
        [onnx_models.value_info("readings", 1, ("batch", ROWS, 3))],
        [onnx_models.value_info("logits", 1, ("batch", 3))],
    )
    model = onnx_models.manifest("sensors")["model"] | {"labels": ["a", "b", "c"]}
    bundle = onnx_models.write_classifier(
        tmp_path / "b", "sensors", data=onnx_models.model(graph), model=model
    ).path
    table = write(tmp_path / "a.jsonl", readings(60))
    record, found = run(bundle, table)
    assert record["alarms"] is None
    assert all(one["label"] == max(one["posteriors"], key=one["posteriors"].get) for one in found)
    record, found = run(bundle, table, watch="b")
    assert [one["alarm"] for one in found] == [one["label"] == "b" for one in found]
    assert record["decision"]["positive"] == "b"


def test_what_is_no_table_of_these_sensors(path: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("t,machine,rms\n0,m,1\n")
    with pytest.raises(DataError, match="no column 'kurtosis'"):
        run(path, tmp_path / "a.csv")
    (tmp_path / "b").write_text("t\tmachine\trms\tkurtosis\n")
    with pytest.raises(DataError, match="no column 'temperature'"):
        run(path, tmp_path / "b")
    with pytest.raises(RecipeError, match="hold is 0"):
        run(path, tmp_path / "a.csv", hold=0)
