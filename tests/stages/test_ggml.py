"""ggml's codecs through ctypes, held against gguf-py's independent ones in numpy."""

from __future__ import annotations

import numpy as np
import pytest

from edgeslm.errors import ModelError
from edgeslm.gguf_file import GGML_TYPES, row_bytes
from edgeslm.stages import ggml
from edgeslm.stages.plan import TYPES

pytestmark = pytest.mark.workstation

ROWS = np.random.default_rng(0).standard_normal((7, 512)).astype(np.float32)


@pytest.mark.parametrize("kind", TYPES)
def test_dequantize_agrees_with_gguf_py(kind: str) -> None:
    import gguf

    data = ggml.quantize(kind, ROWS)
    assert data.shape == (7, row_bytes(kind, 512))
    wanted = gguf.quants.dequantize(data, gguf.GGMLQuantizationType(GGML_TYPES[kind].id))
    np.testing.assert_allclose(ggml.dequantize(kind, data, 512), wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantize_agrees_with_gguf_py(kind: str) -> None:
    import gguf

    wanted = gguf.quants.quantize(ROWS, gguf.GGMLQuantizationType(GGML_TYPES[kind].id))
    assert np.array_equal(ggml.quantize(kind, ROWS), wanted.view(np.uint8).reshape(7, -1))


@pytest.mark.parametrize("kind", ["Q4_K", "Q2_K", "Q4_0", "IQ4_NL"])
def test_importance_lowers_the_weighed_error(kind: str) -> None:
    importance = np.where(np.arange(512) % 8 == 0, 100.0, 0.01).astype(np.float32)

    def error(data: np.ndarray) -> float:
        return float((((ggml.dequantize(kind, data, 512) - ROWS) ** 2) * importance).sum())

    assert error(ggml.quantize(kind, ROWS, importance)) < error(ggml.quantize(kind, ROWS))


def test_a_wrong_number_of_channels_is_a_bug() -> None:
    with pytest.raises(ValueError, match="importance"):
        ggml.quantize("Q4_0", ROWS, np.ones(256, np.float32))


def test_overflow_of_a_scale_is_an_error() -> None:
    rows = ROWS.copy()
    rows[3, 100] = 1e30
    with pytest.raises(ModelError, match="too large for Q8_0"):
        ggml.quantize("Q8_0", rows)
