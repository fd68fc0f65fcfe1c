"""Language models as ONNX files: what is written beside, the facts, the proof, and what must be refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgeslm.errors import EdgeslmError, ModelError
from edgeslm.onnx_file import read_onnx
from edgeslm.specs import OnnxSpec, QuantizeSpec
from edgeslm.stages import decoder_graph, export_decoder, export_gguf
from edgeslm.stages.checkpoint import Checkpoint, resolve
from tests.models import FAMILIES, HOSTILE_TEXTS, write_hf_model

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.workstation
torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

F32 = QuantizeSpec(format="onnx", scheme="F32")


def tiny(path: Path, family: str = "llama", **changes: Any) -> Checkpoint:
    return resolve(str(write_hf_model(path, family, **changes)))


def export(checkpoint: Checkpoint, out: Path, spec: QuantizeSpec = F32, **named: Any) -> Any:
    return export_decoder.run(checkpoint, spec, out / "model.onnx", **named)


def damage(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Write another number into one weight of the graph, as a mistaken conversion would."""
    make = decoder_graph.make_graph

    def damaged(model: Any, called: str) -> Any:
        graph = make(model, called)
        graph.weights[name] = graph.weights[name] * np.float32(1.01)
        return graph

    monkeypatch.setattr(decoder_graph, "make_graph", damaged)


def test_files_and_facts(tmp_path: Path) -> None:
    exported = export(tiny(tmp_path / "hf", "qwen2", tokenizer="smollm"), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"model.onnx", "model.onnx.data", "tokenizer.json", "chat_template.jinja"}
    assert "<|im_start|>" in (tmp_path / "out/chat_template.jinja").read_text()
    facts = exported.model
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert facts["architecture"] == "qwen2"
    assert facts["context_length"] == config["max_position_embeddings"] == 512
    assert (facts["vocab_size"], facts["tokenizer"]) == (config["vocab_size"], "BPE")
    assert (facts["bos_token"], facts["eos_token"], facts["adds_bos"]) == (1, 2, False)
    assert facts["stop_tokens"] == [0, 2]  # <|endoftext|> and <|im_end|>
    assert (facts["layers"], facts["kv_heads"], facts["head_dim"]) == (2, 2, 16)
    assert (facts["opset"], facts["ir_version"]) == (21, 10)
    assert "com.microsoft:GroupQueryAttention" in facts["operators"]
    assert "ai.onnx:MatMul" in facts["operators"]
    assert facts["inputs"][0] == {
        "name": "input_ids",
        "type": "I64",
        "shape": ["batch_size", "sequence_length"],
    }
    assert facts["inputs"][2] == {
        "name": "past_key_values.0.key", "type": "F32", "shape": ["batch_size", 2, "past_sequence_length", 16]
    }  # fmt: skip
    assert facts["inputs"][-1] == {"name": "first_logit", "type": "I64", "shape": [1]}
    assert facts["outputs"][0]["shape"] == ["batch_size", "logits_length", config["vocab_size"]]
    json.dumps([exported.plan, facts], allow_nan=False)


def test_the_plan_counts_every_weight_once(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path / "hf")
    exported = export(checkpoint, tmp_path / "out")
    count = sum(parameter.numel() for parameter in checkpoint.load().parameters())
    assert exported.model["parameters"] == count
    assert exported.plan["types"]["F32"]["parameters"] == count
    assert exported.plan["types"]["F32"]["bytes"] == 4 * count
    assert exported.plan["bits_per_weight"] == 32
    held = read_onnx(exported.path)
    assert sum(each.nbytes for each in held.tensors.values()) >= 4 * count


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tokenizer_is_the_models(family: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    checkpoint = tiny(tmp_path / "hf", family)
    exported = export(checkpoint, tmp_path / "out")
    held, plain = checkpoint.tokenizer(), Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    for text in HOSTILE_TEXTS:
        assert plain.encode(text).ids == held(text)["input_ids"]
    assert exported.model["adds_bos"] == (held("a")["input_ids"][0] == held.bos_token_id)
    stops = exported.model["stop_tokens"]
    assert held.eos_token_id in stops
    answers = {"<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>"} & set(held.get_vocab())
    assert {held.convert_tokens_to_ids(name) for name in answers if name in held.all_special_tokens
            or name in held.get_added_vocab()} <= set(stops)  # fmt: skip


def test_a_gguf_file_as_the_source(tmp_path: Path) -> None:
    """The same logits as the model it was made of, and the same splitting of text."""
    hf = tiny(tmp_path / "hf", tokenizer="smollm")
    export_gguf.run(hf, QuantizeSpec(scheme="F32"), tmp_path / "model.gguf")
    exported = export(resolve(str(tmp_path / "model.gguf")), tmp_path / "out")
    tokens = np.arange(1, 40)
    found = export_decoder.run_once(exported.path, tokens)
    np.testing.assert_allclose(found, export_decoder.torch_logits(hf.load(), tokens), atol=1e-3)
    from tokenizers import Tokenizer

    plain = Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    for text in HOSTILE_TEXTS:
        assert plain.encode(text).ids == hf.tokenizer()(text)["input_ids"]
    assert exported.model["stop_tokens"] == [0, 2]


def test_a_pruned_model(tmp_path: Path) -> None:
    """Fewer layers, key-value heads and channels, and a cut vocabulary."""
    from tests.stages import test_prune

    source = write_hf_model(tmp_path / "hf", "llama", layers=4, tokenizer="smollm", intermediate=256)
    cut, _ = test_prune.run(source, tmp_path / "cut", drop_layers=1, mlp_width=96, kv_heads=1)
    exported = export(cut, tmp_path / "out")
    assert (exported.model["layers"], exported.model["kv_heads"]) == (3, 1)
    assert exported.model["parameters"] < resolve(str(source)).parameters


@pytest.mark.parametrize(("scheme", "bits"), [("int4", 4), ("int8", 8), ("int8-dynamic", 8)])
def test_quantized(scheme: str, bits: int, tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path / "hf", "llama", hidden=128, intermediate=256)
    spec = QuantizeSpec(format="onnx", scheme=scheme, onnx=OnnxSpec(sensitive=0.0))
    exported = export(checkpoint, tmp_path / "out", spec)
    plan = exported.plan
    assert plan["scheme"] == scheme
    assert bits < plan["bits_per_weight"] < bits + 2
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"model.onnx", "model.onnx.data", "tokenizer.json", "chat_template.jinja"}
    tokens = np.arange(1, 30)
    expected = export_decoder.torch_logits(checkpoint.load(), tokens)
    found = export_decoder.run_once(exported.path, tokens)
    assert 0 < np.abs(found - expected).max() < np.abs(expected).max()
    assert [each["name"] for each in exported.model["inputs"]][-1] == "first_logit"


def test_a_new_export_takes_the_place_of_the_old(tmp_path: Path) -> None:
    checkpoint = tiny(tmp_path / "hf")
    first = export(checkpoint, tmp_path / "out").path.read_bytes()
    again = export(checkpoint, tmp_path / "out").path.read_bytes()
    assert first == again


# --- the proof ---


@pytest.mark.parametrize(
    "name",
    ["cos_cache", "model.layers.1.input_layernorm.weight", "model.layers.0.attn.qkv_proj.MatMul.weight",
     "model.layers.1.mlp.gate_up_proj.MatMul.weight", "model.embed_tokens.weight"],
)  # fmt: skip
def test_a_weight_that_is_one_percent_off_is_found(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tiny(tmp_path / "hf")
    damage(monkeypatch, name)
    with pytest.raises(ModelError, match="computes something else than the model"):
        export(checkpoint, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == []


def test_the_probe_leaves_short_windows(tmp_path: Path) -> None:
    model = tiny(tmp_path / "hf", "gemma2", sliding_window=64).load()
    tokens = export_decoder.probe_tokens(model)
    assert len(tokens) == 64 + export_decoder.PROBE_TOKENS
    assert len(set(tokens.tolist())) == len(tokens)
    assert tokens.max() < model.config.vocab_size


def test_logits_that_are_not_finite(tmp_path: Path) -> None:
    exported = export(tiny(tmp_path / "hf"), tmp_path / "out")
    data = exported.path.with_name("model.onnx.data")
    held = read_onnx(exported.path)
    assert held.tensors
    data.write_bytes(np.full(data.stat().st_size // 4, np.nan, np.float32).tobytes())
    with pytest.raises(ModelError, match="not finite"):
        export_decoder.run_once(exported.path, np.arange(4))


def test_a_file_that_the_engine_refuses(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ModelError, match="ONNX Runtime refuses"):
        export_decoder.run_once(tmp_path / "model.onnx", np.arange(4))


def test_nothing_is_left_where_quantizing_fails(tmp_path: Path) -> None:
    spec = QuantizeSpec(format="onnx", scheme="nonsense")
    with pytest.raises(EdgeslmError):
        export(tiny(tmp_path / "hf"), tmp_path / "out", spec)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_tokenizer_of_python_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = tiny(tmp_path / "hf")
    monkeypatch.setattr(Checkpoint, "tokenizer", lambda _: object())
    with pytest.raises(ModelError, match="runs in Python only"):
        export(checkpoint, tmp_path / "out")
