"""Training on sensor windows: the loss against its closed forms, what is written, and the two tasks as a whole."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgeslm.bench import alarms
from edgeslm.bench.alarms import Watched
from edgeslm.errors import EdgeslmError, RecipeError
from edgeslm.specs import (
    ColumnsSpec,
    DistillSpec,
    FinetuneSpec,
    SimulateSpec,
    StudentSpec,
    TrainSpec,
    WindowSpec,
)
from edgeslm.stages import sensor_training, sensors, simulate
from edgeslm.stages.sensors import SensorData, SensorWindows

if TYPE_CHECKING:
    from pathlib import Path

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")
pytestmark = pytest.mark.workstation

QUICK = FinetuneSpec(units=8, train=TrainSpec(epochs=25, learning_rate=1e-2, batch_size=16))


def cross_entropy(logits: Any, labels: Any) -> Any:
    exact = logits - logits.max(1, keepdims=True)
    return np.log(np.exp(exact).sum(1)) - exact[np.arange(len(labels)), labels]


def test_class_weights_make_classes_count_alike_up_to_a_bound() -> None:
    counts = np.array([90, 10])
    weight = sensor_training.class_weights(counts)
    assert weight * counts == pytest.approx([50, 50])
    rare = sensor_training.class_weights(np.array([100_000, 10]))
    assert rare[1] / rare[0] == pytest.approx(sensor_training.HEAVIEST)
    assert (rare * [100_000, 10]).sum() == pytest.approx(100_010)


def test_the_loss_is_the_weighted_cross_entropy_of_shifted_logits() -> None:
    random = np.random.default_rng(0)
    logits, labels, weight = random.normal(size=(20, 3)), random.integers(0, 3, 20), np.array([0.5, 1.0, 4.0])
    batch = {"readings": torch.tensor(logits, dtype=torch.float32), "labels": torch.tensor(labels)}
    found = sensor_training.weighted_loss(weight)(lambda readings: readings, batch)
    expected = (weight[labels] * cross_entropy(logits + np.log(weight), labels)).sum()
    assert float(found) == pytest.approx(expected, rel=1e-5)
    plain = sensor_training.weighted_loss(np.ones(3))(lambda readings: readings, batch)
    assert float(plain) == pytest.approx(cross_entropy(logits, labels).sum(), rel=1e-5)


def test_what_the_weighted_loss_is_smallest_at_are_the_shares_of_training() -> None:
    """A free logit a cell learns P(class | cell) as counted, although the rare class weighs nine times more."""
    counts = np.array([[81, 3], [9, 7]])
    cells = np.repeat([0, 0, 1, 1], counts.ravel())
    labels = np.repeat([0, 1, 0, 1], counts.ravel())
    logits = torch.zeros(2, 2, requires_grad=True)
    batch = {"readings": torch.tensor(cells), "labels": torch.tensor(labels)}
    loss = sensor_training.weighted_loss(sensor_training.class_weights(counts.sum(0)))
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_grad=1e-9)

    def closure() -> Any:
        optimizer.zero_grad()
        value = loss(lambda cell: logits[cell], batch) / len(labels)
        value.backward()
        return value

    optimizer.step(closure)
    learned = logits.detach().softmax(-1).numpy()
    assert learned == pytest.approx(counts / counts.sum(1, keepdims=True), abs=1e-3)


def rising(tmp_path: Path, out: str = "data") -> SensorData:
    """Windows that rise or fall: no single row tells which."""
    random = np.random.default_rng(0)
    path = tmp_path / "slopes.csv"
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("unit", "t", "x", "y", "label"))
        for unit in range(60):
            slope = 1 if unit % 3 == 0 else -1
            values = slope * np.arange(12) + random.normal(0, 0.5, 12) + random.normal(0, 4)
            label = "up" if slope > 0 else "down"
            writer.writerows((f"u{unit}", t, value, random.normal(), label) for t, value in enumerate(values))
    return sensors.prepare(
        [str(path)], [], ColumnsSpec(time="t", unit="unit"), WindowSpec(rows=6, stride=2), tmp_path / out,
        heldout_every=4, seed=1,
    )  # fmt: skip


def trained(
    data: SensorData, tmp_path: Path, spec: FinetuneSpec = QUICK, name: str = "net", seed: int = 0
) -> Any:
    return sensor_training.run(
        spec,
        tmp_path / name,
        train=data.train,
        heldout=data.heldout,
        work=tmp_path / f"{name}-work",
        seed=seed,
    )


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_a_network_learns_and_its_directory_says_all(tmp_path: Path, kind: str) -> None:
    from edgeslm.stages import sensor_net

    data = rising(tmp_path)
    threads = torch.get_num_threads()
    checkpoint = trained(data, tmp_path, replace(QUICK, network=kind))
    assert torch.get_num_threads() == threads
    assert {path.name for path in checkpoint.path.iterdir()} == {
        "config.json", "model.safetensors", "training.json", "edgeslm.json",
    }  # fmt: skip
    net = sensor_net.load(checkpoint.path)
    scores = sensor_training.predict(net, data.heldout)
    assert (scores.argmax(1) == data.heldout.label).mean() > 0.95
    config = checkpoint.config()
    assert (config["network"], config["units"], config["rows"], config["stride"]) == (kind, 8, 6, 2)
    assert config["normalization"] == data.train.normalization.as_record()
    assert config["labels"] == ["down", "up"]
    assert config["class_shares"]["up"] == pytest.approx((data.train.label == 1).mean())
    assert config["class_shares"]["up"] == pytest.approx(1 / 3, abs=0.02)
    record = json.loads((checkpoint.path / "training.json").read_text())
    assert record["evaluations"][-1]["loss"] == pytest.approx(
        sensor_training.log_loss(scores, data.heldout.label), abs=1e-6
    )
    note = json.loads((checkpoint.path / "edgeslm.json").read_text())
    assert (note["stage"], note["parent"], note["spec"]["units"]) == ("finetune", None, 8)


def test_predictions_are_the_windows_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeslm.stages import sensor_net

    data = rising(tmp_path)
    net = sensor_net.create(sensor_training.config_of(QUICK, data.train), seed=0)
    monkeypatch.setattr(sensor_training, "EVALUATED_AT_ONCE", 7)
    found = sensor_training.predict(net, data.heldout)
    assert net.training
    net.eval()
    with torch.no_grad():
        for index in range(len(data.heldout)):
            batch = sensor_training.collate([data.heldout[index]])
            assert batch["labels"].tolist() == [data.heldout.label[index]]
            expected = net(batch["readings"]).log_softmax(-1)[0].numpy()
            assert found[index] == pytest.approx(expected, abs=1e-5)
    assert sensor_training.log_loss(np.log([[0.25, 0.75], [0.5, 0.5]]), np.array([1, 0])) == pytest.approx(
        -(math.log(0.75) + math.log(0.5)) / 2
    )


def test_the_same_seed_gives_the_same_weights(tmp_path: Path) -> None:
    data = rising(tmp_path)
    spec = replace(QUICK, train=replace(QUICK.train, max_steps=5))
    one, two, other = (
        trained(data, tmp_path, spec, name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert one.digest == two.digest
    assert one.digest != other.digest


def test_what_can_not_be_trained_or_written_is_told(tmp_path: Path) -> None:
    data = rising(tmp_path)
    with pytest.raises(RecipeError, match="needs a model to start from"):
        trained(data, tmp_path, replace(QUICK, method="lora"))
    (tmp_path / "file").write_text("")
    short = replace(QUICK, train=replace(QUICK.train, max_steps=1))
    with pytest.raises(EdgeslmError, match="can't write"):
        trained(data, tmp_path, short, "file/net")


# --- the tasks as a whole ---


def f1(said: Any, label: Any) -> float:
    return float(2 * (said & (label == 1)).sum() / (said.sum() + (label == 1).sum()))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_anomalies_of_the_shuttle_are_found_row_by_row(tmp_path: Path, seed: int) -> None:
    """Statlog (Shuttle): 49,097 rows of nine sensors, 7 % anomalies; an eighth is held out."""
    pytest.importorskip("river")
    from edgeslm.stages import sensor_net

    data = sensors.prepare(
        ["pkg://river/datasets/shuttle.csv.gz"], [], ColumnsSpec(label="anomaly"),
        WindowSpec(rows=1, normalize="robust"), tmp_path / "data", heldout_every=8, seed=seed,
    )  # fmt: skip
    assert len(data.heldout) == pytest.approx(49_097 / 8, abs=2)
    spec = FinetuneSpec(train=TrainSpec(epochs=5, learning_rate=3e-3, batch_size=128))
    net = sensor_net.load(trained(data, tmp_path, spec, seed=seed).path)
    scores = sensor_training.predict(net, data.heldout)
    assert f1(scores.argmax(1) == 1, data.heldout.label) >= 0.97


def scored(net: Any, table: SensorWindows, failures: dict[str, float]) -> list[Watched]:
    """The network's odds of failure at every second from the first full window on."""
    every = sensors.measured(table.recordings, replace(table.spec, stride=1))
    windows = SensorWindows(table.recordings, every.starts, every.spec, table.normalization)
    scores = sensor_training.predict(net, windows)
    odds = scores[:, 1] - scores[:, 0]
    return [
        Watched(name=name, times_s=windows.time_s[at], scores=odds[at], failure_s=failures[name])
        for number, name in enumerate(table.recordings.units)
        if len(at := np.flatnonzero(windows.unit == number))
    ]


def rms_of(table: SensorWindows, failures: dict[str, float], seconds: int) -> list[Watched]:
    """RMS of the last `seconds`, at the same moments."""
    column = table.recordings.channels.index("rms")
    result = []
    for number, name in enumerate(table.recordings.units):
        at = np.flatnonzero(table.recordings.unit == number)
        scores = alarms.smoothed(table.recordings.values[at, column].astype(np.float64), seconds)
        times = table.recordings.time_s
        assert times is not None
        result.append(
            Watched(
                name=name,
                times_s=times[at][table.spec.rows - 1 :],
                scores=scores[table.spec.rows - 1 :],
                failure_s=failures[name],
            )
        )
    return result


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_failures_are_announced_no_later_than_by_the_best_threshold_on_rms(tmp_path: Path, seed: int) -> None:
    """24 bearings, six held out; the threshold on RMS is tuned on these six, and over how long it looks back."""
    from edgeslm.stages import distill, sensor_net

    done = simulate.run(SimulateSpec(units=24, seed=seed), tmp_path / "tables")
    data = sensors.prepare(
        [str(done.train)], [str(done.heldout)], simulate.COLUMNS, WindowSpec(rows=32, stride=4), tmp_path / "data",
        heldout_every=None, seed=seed,
    )  # fmt: skip
    assert data.report["duplicates"] == 0
    spec = FinetuneSpec(units=32, train=TrainSpec(epochs=5, learning_rate=3e-3, batch_size=64))
    teacher = trained(data, tmp_path, spec, seed=seed)
    smaller = DistillSpec(
        student=StudentSpec(kind="gru", units=8, layers=1), train=replace(spec.train, epochs=10)
    )
    student = distill.run(
        teacher, None, smaller, tmp_path / "student", task="sensor-classification", train=data.train,
        heldout=data.heldout, work=tmp_path / "student-work", seed=seed,
    )  # fmt: skip
    assert student.parameters < teacher.parameters / 8
    for checkpoint in (teacher, student):
        scores = scored(sensor_net.load(checkpoint.path), data.heldout, done.failures)
        for rate in (0.01, 0.05):
            for seconds in (1, 8, 32):
                baseline = rms_of(data.heldout, done.failures, seconds)
                found = alarms.compare(scores, baseline, warning_s=60.0, rate=rate)
                assert found["gain_s"]["value"] > 10
                plain = found["baseline"]["lead_s"]
                gains = [(lead or 0) - (plain[name] or 0) for name, lead in found["score"]["lead_s"].items()]
                assert min(gains) >= -simulate.ROW_S or checkpoint is student
