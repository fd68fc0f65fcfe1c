"""The sensor network against numpy, against its ONNX export, and through a directory and back."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgeslm.errors import ModelError
from edgeslm.specs import StudentSpec
from edgeslm.stages.checkpoint import model_directory

if TYPE_CHECKING:
    from pathlib import Path

    from edgeslm.stages.sensor_net import SensorNet

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.workstation


def network(**change: Any) -> SensorNet:
    from edgeslm.stages import sensor_net

    config = sensor_net.SensorConfig(
        network="gru", units=6, layers=1, channels=("a", "b", "c"), labels=("normal", "failure"), rows=9, stride=4,
        normalization={"kind": "standard", "channels": ["a", "b", "c"], "center": [0, 1, 2], "scale": [1, 2, 3]},
        max_missing=0.2, class_shares={"normal": 0.9, "failure": 0.1},
    )  # fmt: skip
    return sensor_net.create(replace(config, **change), seed=3).eval()


def windows(net: SensorNet, count: int = 5) -> Any:
    shape = (count, net.config.rows, len(net.config.channels))
    return np.random.default_rng(0).normal(0, 3, shape).astype(np.float32)


def said(net: SensorNet, readings: Any) -> Any:
    with torch.no_grad():
        return net(torch.from_numpy(readings)).numpy()


def sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def gru_step(part: dict[str, Any], x: Any, h: Any) -> Any:
    """Cho et al. 2014 with cuDNN's bias inside the reset product, as torch documents nn.GRU."""
    r_x, z_x, n_x = np.split(part["weight_ih"] @ x + part["bias_ih"], 3)
    r_h, z_h, n_h = np.split(part["weight_hh"] @ h + part["bias_hh"], 3)
    z = sigmoid(z_x + z_h)
    return (1 - z) * np.tanh(n_x + sigmoid(r_x + r_h) * n_h) + z * h


def lstm_step(part: dict[str, Any], x: Any, h: Any, c: Any) -> tuple[Any, Any]:
    i, f, g, o = np.split(
        part["weight_ih"] @ x + part["bias_ih"] + part["weight_hh"] @ h + part["bias_hh"], 4
    )
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def reference(net: SensorNet, window: Any) -> Any:
    """[L] logits of one window, step by step in float64."""
    weights = {name: value.double().numpy() for name, value in net.state_dict().items()}
    rows = [*np.arcsinh(window.astype(np.float64))]
    for layer in range(net.config.layers):
        part = {
            name: weights[f"body.{name}_l{layer}"]
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        }
        h, c, states = np.zeros(net.config.units), np.zeros(net.config.units), []
        for x in rows:
            if net.config.network == "gru":
                h = gru_step(part, x, h)
            else:
                h, c = lstm_step(part, x, h, c)
            states.append(h)
        rows = states
    features = np.concatenate([rows[-1], np.mean(rows, axis=0)])
    hidden = np.maximum(weights["head.0.weight"] @ features + weights["head.0.bias"], 0)
    return weights["head.2.weight"] @ hidden + weights["head.2.bias"]


@pytest.mark.parametrize("kind", ["gru", "lstm"])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_window_is_read_row_by_row(kind: str, layers: int) -> None:
    net = network(network=kind, layers=layers)
    readings = windows(net)
    expected = [reference(net, window) for window in readings]
    assert np.allclose(said(net, readings), expected, atol=1e-5)


def test_a_window_of_one_row_is_a_perceptron() -> None:
    net = network(rows=1, layers=2)
    readings = windows(net)
    weights = {name: value.numpy() for name, value in net.state_dict().items()}
    x = np.arcsinh(readings[:, 0])
    for place in ("body.0", "body.2", "head.0"):
        x = np.maximum(x @ weights[f"{place}.weight"].T + weights[f"{place}.bias"], 0)
    assert np.allclose(
        said(net, readings), x @ weights["head.2.weight"].T + weights["head.2.bias"], atol=1e-5
    )


def test_a_spike_is_finite_and_moves_little() -> None:
    net = network()
    calm = np.zeros((1, 9, 3), np.float32)
    spiked = calm.copy()
    spiked[0, 4, 1] = 1e30
    assert np.isfinite(said(net, spiked)).all()


def test_weights_depend_on_the_seed_alone() -> None:
    from edgeslm.stages import sensor_net

    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = network()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), network().parameters(), strict=True))
    other = sensor_net.create(one.config, seed=4)
    assert not torch.equal(other.head[0].weight, one.head[0].weight)


@pytest.mark.parametrize("rows", [1, 9])
def test_a_directory_holds_the_network_and_what_a_device_needs(tmp_path: Path, rows: int) -> None:
    from edgeslm.stages import sensor_net

    net = network(rows=rows)
    sensor_net.save(net, tmp_path / "net", licence="CC0-1.0")
    again = sensor_net.load(model_directory(tmp_path / "net", "x").path)
    assert again.config == net.config
    assert not again.training
    readings = windows(net)
    assert np.array_equal(said(again, readings), said(net, readings))
    record = json.loads((tmp_path / "net" / "config.json").read_text())
    assert record["model_type"] == "edgeslm-sensor"
    assert record["parameters"] == sum(value.numel() for value in net.parameters())
    assert record["licence"] == "CC0-1.0"
    for key in ("channels", "labels", "rows", "stride", "normalization", "max_missing", "class_shares"):
        assert record[key] == json.loads(json.dumps(getattr(net.config, key)))


def test_a_damaged_directory_is_told(tmp_path: Path) -> None:
    from edgeslm.stages import sensor_net

    sensor_net.save(network(), tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())
    for change in ({"units": 7}, {"network": "cnn"}, {"rows": None}, {"channels": 3}, {"normalization": {}}):
        (tmp_path / "config.json").write_text(json.dumps({**record, **change}))
        with pytest.raises(ModelError, match="do not fit"):
            sensor_net.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**record, "model_type": "llama"}))
    with pytest.raises(ModelError, match="model_type is 'llama'"):
        sensor_net.load(tmp_path)


def test_a_student_reads_what_its_teacher_reads_with_less() -> None:
    from edgeslm.stages.sensor_net import student_net

    teacher = network(units=32)
    student = student_net(teacher, StudentSpec(kind="lstm", units=4, layers=1))
    assert student.config == replace(teacher.config, network="lstm", units=4, layers=1)
    assert student.parameter_count < teacher.parameter_count / 10
    assert said(student.eval(), windows(teacher)).shape == (5, 2)
    with pytest.raises(ModelError, match="'pruned'") as caught:
        student_net(teacher, StudentSpec(kind="pruned"))
    assert "gru" in caught.value.hint
    with pytest.raises(ModelError, match="its teacher"):
        student_net(teacher, StudentSpec(kind="gru", units=32, layers=1))


@pytest.mark.parametrize(("kind", "rows"), [("gru", 9), ("lstm", 9), ("gru", 1)])
def test_the_onnx_export_computes_the_same_in_any_batch(tmp_path: Path, kind: str, rows: int) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    from edgeslm.stages import export_onnx, sensor_net

    net = network(network=kind, rows=rows, layers=2)
    sensor_net.save(net, tmp_path / "net")
    done = export_onnx.run(model_directory(tmp_path / "net", "x"), tmp_path / "net.onnx")
    session = onnxruntime.InferenceSession(str(done.path))
    for count in (1, 2, 17):
        readings = windows(net, count)
        assert np.allclose(session.run(None, {"readings": readings})[0], said(net, readings), atol=1e-5)
    assert done.model["preprocessing"]["normalization"] == net.config.normalization
