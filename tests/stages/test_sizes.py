"""The size of an artifact by its configuration alone, against files that were written."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from edgeslm.gguf_file import read_gguf
from edgeslm.specs import OnnxSpec, QuantizeSpec
from edgeslm.stages import export_gguf, prune, sizes
from edgeslm.stages.checkpoint import resolve
from tests.models import FAMILIES, write_hf_model

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.workstation


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gguf_file_to_the_byte(family: str, tmp_path: Path) -> None:
    own = {"no_rope_layer_interval": 4} if family == "smollm3" else {}
    checkpoint = resolve(str(write_hf_model(tmp_path / "model", family, layers=8, intermediate=160, **own)))
    model = checkpoint.load()
    names, config = tuple(prune.text_state(model)), prune.text_config(model)
    for scheme, types in (("Q4_K_M", ()), ("Q8_0", (("ffn_down", "F32"), ("blk.99", "F16"))), ("F16", ())):
        spec = QuantizeSpec(scheme=scheme, types=types)
        known = replace(spec, types=types[:1])  # a pattern of a layer that is gone matches nothing
        made = export_gguf.run(checkpoint, known, tmp_path / f"{scheme}.gguf").path
        start = min(info.offset for info in read_gguf(made).tensors.values())
        assert sizes.artifact_bytes(names, config, spec, start) == made.stat().st_size
        first = [name for name in names if ".layers." not in name or ".layers.0." in name]
        assert sizes.artifact_bytes(first, config, spec, start) == made.stat().st_size


def test_an_onnx_model_by_its_types(tmp_path: Path) -> None:
    model = resolve(str(write_hf_model(tmp_path / "model", "llama", layers=2))).load()
    names, config = tuple(prune.text_state(model)), prune.text_config(model)
    matrices = sum(one.numel() for one in model.parameters() if one.ndim > 1)
    vectors = sum(one.numel() for one in model.parameters() if one.ndim == 1)

    def size(scheme: str, **onnx: object) -> int:
        spec = QuantizeSpec(
            format="onnx", scheme=scheme, onnx=OnnxSpec(**{"block": 32, "symmetric": True} | onnx)
        )  # type: ignore[arg-type]
        return sizes.artifact_bytes(names, config, spec, 10**9)

    assert size("F32") == 4 * (matrices + vectors)
    assert size("int4") == matrices * 5 // 8 + 4 * vectors
    assert size("int4", symmetric=False, block=64) == int(matrices * (4 + 36 / 64) / 8) + 4 * vectors
    assert size("int8", block=128) == int(matrices * 8.25 / 8) + 4 * vectors
    assert size("int4") < size("int4-int8") < size("int8") < size("int8-dynamic") < size("F32")
    assert size("int8-dynamic", sensitive=0) == matrices + 4 * vectors
