"""model.ort against the ONNX file that it was made of, and the list of its operators."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from edgeslm.errors import ModelError
from edgeslm.stages import onnx_mobile
from tests.onnx_models import text_model

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.workstation
pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("target", [None, "avx2"])
def test_the_mobile_model_computes_the_same(target: str | None, tmp_path: Path) -> None:
    written = onnx_mobile.write(text_model(), tmp_path, target=target)
    assert {name: path.name for name, path in written.items()} == {name: name for name in onnx_mobile.NAMES}
    assert {path.name for path in tmp_path.iterdir()} == set(onnx_mobile.NAMES)
    ids = np.array([[2, 3, 4], [2, 9, 0]])
    feed = {"input_ids": ids, "attention_mask": (ids != 0).astype(np.int64)}
    found = [
        onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"]).run(["logits"], feed)[0]
        for model in (text_model(), str(written["model.ort"]))
    ]
    np.testing.assert_allclose(found[1], found[0], atol=1e-6)


def test_the_list_names_what_a_reduced_build_needs(tmp_path: Path) -> None:
    written = onnx_mobile.write(text_model(), tmp_path)
    names = onnx_mobile.operators(written["required_operators.config"].read_text())
    assert {"ai.onnx:Gather", "ai.onnx:Gemm", "ai.onnx:ReduceSum"} <= set(names)
    assert onnx_mobile.operators("# said\nai.onnx;12;Add,Relu\ncom.microsoft;1;Gelu\n") == (
        "ai.onnx:Add", "ai.onnx:Relu", "com.microsoft:Gelu",
    )  # fmt: skip


def test_what_can_not_be_converted_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="mobile format"):
        onnx_mobile.write(b"\x08\x08no model", tmp_path)
    assert not list(tmp_path.iterdir())
