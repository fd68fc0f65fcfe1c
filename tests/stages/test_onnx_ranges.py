"""Observers against quantiles, against ONNX Runtime's own calibration, and by what they are for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgeslm.errors import ModelError
from edgeslm.progress import Quiet
from edgeslm.stages.onnx_ranges import BINS, entropy_span, histogram, measure, percentile_span

if TYPE_CHECKING:
    from numpy.typing import NDArray

pytestmark = pytest.mark.workstation
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


def doubled() -> bytes:
    info = onnx.helper.make_tensor_value_info
    nodes = [
        onnx.helper.make_node("Add", ["x", "x"], ["twice"], "add"),
        onnx.helper.make_node("Neg", ["twice"], ["logits"], "neg"),
    ]
    graph = onnx.helper.make_graph(nodes, "g", [info("x", 1, ["n"])], [info("logits", 1, ["n"])])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    data: bytes = model.SerializeToString()
    return data


def drawn(count: int = 8, size: int = 20_000) -> list[dict[str, NDArray[Any]]]:
    random = np.random.default_rng(0)
    return [{"x": random.standard_normal(size).astype(np.float32)} for _ in range(count)]


def test_min_max_is_the_whole_range() -> None:
    feeds = drawn()
    values = 2 * np.concatenate([feed["x"] for feed in feeds])
    found = measure(doubled(), ["twice", "logits"], feeds, "min-max", Quiet())
    assert found["twice"] == (values.min(), values.max())
    assert found["logits"] == (-values.max(), -values.min())


def test_percentile_leaves_the_outermost_out() -> None:
    feeds = drawn(size=50_000)  # one value in 400,000 is less than what is given up at either end
    feeds[3]["x"][7] = 500.0
    values = 2 * np.concatenate([feed["x"] for feed in feeds])
    low, high = measure(doubled(), ["twice"], feeds, "percentile", Quiet())["twice"]
    assert low == pytest.approx(values.min(), abs=2 * 1000 / BINS)  # a bin's width
    assert high < 10
    ordinary = percentile_span(histogram(values[values < 100], 20.0), 20.0)
    exact = np.quantile(values[values < 100], [5e-6, 1 - 5e-6])
    np.testing.assert_allclose(ordinary, exact, atol=0.5)


def test_entropy_cuts_what_few_values_reach() -> None:
    random = np.random.default_rng(0)
    values = random.standard_normal(200_000).astype(np.float32)
    low, high = entropy_span(histogram(values, 5.0), 5.0)
    assert low == pytest.approx(-high, rel=0.01)
    assert 3 < high <= 5.0
    few = np.concatenate([values, np.full(3, 60.0, np.float32)])
    assert 3 < entropy_span(histogram(few, 60.0), 60.0)[1] < 15
    found = measure(doubled(), ["twice"], [{"x": few}], "entropy", Quiet())["twice"]
    assert found[1] < 30
    assert found[0] == pytest.approx(2 * values.min())  # no lower than what was seen


def test_activations_that_are_not_finite_are_named() -> None:
    feeds = drawn(2)
    feeds[1]["x"][0] = np.inf
    with pytest.raises(ModelError, match="twice are not finite"):
        measure(doubled(), ["twice"], feeds, "min-max", Quiet())


def test_activations_that_are_always_zero() -> None:
    feeds: list[dict[str, NDArray[Any]]] = [{"x": np.zeros(5, np.float32)}]
    for observer in ("min-max", "percentile", "entropy"):
        assert measure(doubled(), ["twice"], feeds, observer, Quiet()) == {"twice": (0.0, 0.0)}
