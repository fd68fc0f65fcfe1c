"""GGUF files as torch models: whatever is exported comes back with the same logits."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from edgeslm.errors import ModelError
from edgeslm.gguf_file import Field, read_gguf
from edgeslm.specs import QuantizeSpec

if TYPE_CHECKING:
    from pathlib import Path

    from edgeslm.gguf_file import GgufFile

pytestmark = pytest.mark.workstation

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LONG = {"type": "longrope", "long_factor": [1.0 + i / 4 for i in range(8)],
        "short_factor": [1.0 + i / 16 for i in range(8)]}  # fmt: skip

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "untied": ("llama", {"tied": False}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "long heads": ("llama", {"head_dim": 32}),
    "llama3 rope": ("llama", {"rope_scaling": LLAMA3}),
    "linear rope": ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "mistral": ("mistral", {}),
    "smollm3": ("smollm3", {"layers": 5, "no_rope_layer_interval": 4}),
    "qwen2": ("qwen2", {}),
    "yarn rope": ("qwen2", {"rope_scaling": YARN}),
    "qwen3": ("qwen3", {"tied": False}),
    "gemma2": ("gemma2", {"layers": 3}),
    "gemma3": ("gemma3_text", {"layers": 7}),
    "phi3": ("phi3", {"tied": False, "original_max_position_embeddings": 512}),
    "longrope": ("phi3", {"tied": False, "context": 1024, "original_max_position_embeddings": 128,
                          "rope_scaling": LONG}),
    "granite": ("granite", {}),
    "olmo2": ("olmo2", {}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_an_exported_model_comes_back(tmp_path: Path, case: str) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    pytest.importorskip("llama_cpp")
    from edgeslm.stages import export_gguf
    from edgeslm.stages.checkpoint import resolve
    from tests.models import write_hf_model

    family, options = CASES[case]
    checkpoint = resolve(str(write_hf_model(tmp_path / "m", family, **options)))
    exported = export_gguf.run(checkpoint, QuantizeSpec(scheme="F32"), tmp_path / "m.gguf")
    tokens = torch.randint(0, 500, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = checkpoint.load()(input_ids=tokens).logits
        after = resolve(str(exported.path)).load()(input_ids=tokens).logits
    assert before.std() > 0.1
    torch.testing.assert_close(after, before, atol=2e-4, rtol=1e-4)


def test_a_quantized_file_comes_back_dequantized(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    pytest.importorskip("llama_cpp")
    from gguf import GGUFReader, dequantize

    from edgeslm.stages import export_gguf
    from edgeslm.stages.checkpoint import resolve
    from tests.models import write_hf_model

    checkpoint = resolve(str(write_hf_model(tmp_path / "m", "qwen2")))
    exported = export_gguf.run(checkpoint, QuantizeSpec(scheme="Q4_0"), tmp_path / "m.gguf")
    stored = next(t for t in GGUFReader(exported.path).tensors if t.name == "blk.1.ffn_up.weight")
    weight = resolve(str(exported.path)).load().model.layers[1].mlp.up_proj.weight
    torch.testing.assert_close(weight.detach(), torch.from_numpy(dequantize(stored.data, stored.tensor_type)))


def change(file: GgufFile, key: str, value: Any) -> GgufFile:
    return replace(file, fields={**file.fields, key: Field(kind="u32", item_kind=None, value=value)})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("general.architecture", "rwkv7", "no way to run 'rwkv7'"),
        ("llama.block_count", 3, r"blk\.2\.attn_q\.weight is missing"),
        ("llama.feed_forward_length", 64, r"has the shape \(128, 64\), its metadata want \(64, 64\)"),
        ("llama.block_count", 0, "no heads, blocks or embedding"),
        ("llama.attention.head_count_kv", [2, 1], "differ in shape"),
    ],
)
def test_metadata_that_do_not_fit_are_one_clear_error(
    tiny_gguf: Path, key: str, value: Any, message: str
) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("llama_cpp")
    from edgeslm.stages.gguf_model import load_gguf_model

    with pytest.raises(ModelError, match=message):
        load_gguf_model(change(read_gguf(tiny_gguf), key, value))
