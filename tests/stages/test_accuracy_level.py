"""The accuracy level's audit: the trap is caught, the harmless model passes."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING

import numpy as np
import pytest

from edgeslm.errors import DataError
from edgeslm.specs import OnnxSpec, QuantizeSpec
from tests import decoder_graphs

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.workstation
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from edgeslm.stages.accuracy_level import SCHEMA, audit  # noqa: E402
from edgeslm.stages.onnx_weights import quantize_decoder  # noqa: E402

TOKENS = np.arange(1, 91, dtype=np.int64).reshape(3, 30)


def quantized(source: Path, level: int) -> Path:
    out = source.with_name(f"int4-{level}.onnx")
    spec = QuantizeSpec(format="onnx", scheme="int4", onnx=OnnxSpec(accuracy_level=level))
    quantize_decoder(source, out, spec)
    return out


def test_a_large_channel_is_caught(tmp_path: Path) -> None:
    path = quantized(decoder_graphs.trap(tmp_path / "trap.onnx"), 4)
    record = audit(path, TOKENS, threads=1)
    assert record["schema"] == SCHEMA
    assert record["chosen"] == 4
    by_level = {row["level"]: row for row in record["levels"]}
    assert by_level[0]["top1_agreement"] == by_level[1]["top1_agreement"] == 1
    assert by_level[4]["top1_agreement"] < 0.5
    assert by_level[4]["kl_nats"] > 0.02


def test_an_even_model_passes(tmp_path: Path) -> None:
    path = quantized(decoder_graphs.write(tmp_path / "f32.onnx", decoder_graphs.weights()), 0)
    record = audit(path, TOKENS, threads=1, levels=(0, 4), clock=count().__next__)
    assert record["chosen"] == 0
    assert [row["level"] for row in record["levels"]] == [0, 4]
    assert record["levels"][1]["top1_agreement"] > 0.9
    assert record["levels"][1]["kl_nats"] < 0.01
    assert record["levels"][1]["prefill_tokens_per_s"] == 15
    assert record["levels"][1]["decode_tokens_per_s"] == 15


def test_a_graph_without_such_products_has_no_levels(tmp_path: Path) -> None:
    path = decoder_graphs.write(tmp_path / "f32.onnx", decoder_graphs.weights())
    record = audit(path, TOKENS, threads=1)
    assert record["chosen"] is None
    assert record["levels"] == []
    with pytest.raises(DataError):
        audit(path, TOKENS[:0])
