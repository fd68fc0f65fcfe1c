"""Sensitivity of weights: one that is fed quantized gives what a graph written with it would."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from edgeslm.specs import OnnxSpec, QuantizeSpec
from edgeslm.stages.onnx_sensitivity import divergence
from tests import decoder_graphs

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.workstation
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from edgeslm.stages import external_data, onnx_session  # noqa: E402
from edgeslm.stages.onnx_linear import linears  # noqa: E402
from edgeslm.stages.onnx_sensitivity import measure  # noqa: E402
from edgeslm.stages.onnx_weights import quantize_decoder  # noqa: E402

TOKENS = np.arange(1, 25, dtype=np.int64).reshape(2, 12) * 3


def logits(path: Path) -> np.ndarray:
    session = onnx_session.open_session(external_data.load_graph(path), path.parent, threads=1)
    return onnx_session.logits(session, TOKENS, first=6)


@pytest.mark.parametrize("scheme", ["int4-int8", "int8-dynamic"])
def test_each_weight_alone_is_as_a_file_with_it_alone_quantized(tmp_path: Path, scheme: str) -> None:
    source = decoder_graphs.write(tmp_path / "f32.onnx", decoder_graphs.weights())
    weights = linears(external_data.load_graph(source))
    options = OnnxSpec(accuracy_level=0, sensitive=0.0)
    spec = QuantizeSpec(format="onnx", scheme=scheme, onnx=options)
    found = measure(source, weights, spec, importance={}, windows=TOKENS)
    for weight in weights:
        if weight.lookups and scheme == "int8-dynamic":
            continue  # the embedding gets blocks
        others = tuple((other.name, "F32") for other in weights if other is not weight)
        alone = QuantizeSpec(format="onnx", scheme=scheme, onnx=options, types=others)
        quantize_decoder(source, tmp_path / "alone.onnx", alone)
        expected = divergence(logits(source), logits(tmp_path / "alone.onnx"))
        assert found[weight.name] == pytest.approx(expected, rel=0.02)


def test_divergence_is_kl() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 40, 7))
    p, q = (np.exp(x) / np.exp(x).sum(axis=1, keepdims=True) for x in (a, b))
    expected = (p * np.log(p / q)).sum(axis=1).mean()
    assert divergence(a.astype(np.float32), b.astype(np.float32)) == pytest.approx(expected, rel=1e-5)
    assert divergence(a.astype(np.float32), np.full((40, 7), np.nan, np.float32)) == float("inf")
