"""ONNX decoders against torch: every family, tied and untied, cut, windowed, through the cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgeslm.errors import ModelError
from edgeslm.stages import decoder_graph
from edgeslm.stages.architectures import ARCHITECTURES
from edgeslm.stages.checkpoint import Checkpoint, resolve
from edgeslm.stages.export_decoder import TOLERANCE, run_chunks, torch_logits
from edgeslm.stages.graph_writer import save
from tests.models import FAMILIES, write_hf_model

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.workstation
torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def built(path: Path, family: str, **changes: Any) -> tuple[Any, Path, Checkpoint]:
    """(torch model, ONNX file, checkpoint) of a tiny random model."""
    checkpoint = resolve(str(write_hf_model(path / "hf", family, **changes)))
    return checkpoint.load(), decoder_graph.build(checkpoint, path / "onnx"), checkpoint


def assert_same_logits(model: Any, file: Path, tokens: np.ndarray, *sizes: int) -> None:
    """Logits of `tokens`, computed in calls of `sizes` tokens each, are torch's of the whole."""
    expected = torch_logits(model, tokens)
    chunks = np.split(tokens, np.cumsum(sizes))
    found = np.concatenate(run_chunks(file, chunks, "x"))
    assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max()
    assert np.ptp(expected, axis=1).min() > 0.1  # not flat


def text(model: Any, count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, model.config.get_text_config().vocab_size, count)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tied: bool, tmp_path: Path) -> None:
    """Layers enough for every pattern; texts that leave the windows of 64 and 128 tokens."""
    changes = {"layers": 7} if family.startswith("gemma3") else {"layers": 4}
    model, file, _ = built(tmp_path, family, tied=tied, **changes)
    assert_same_logits(model, file, text(model, 150), 70, 1, 1, 40)


@pytest.mark.parametrize("family", FAMILIES)
def test_64_greedy_tokens(family: str, tmp_path: Path) -> None:
    """Token by token through the cache, as torch generates them."""
    model, file, _ = built(tmp_path, family, tied=False)
    prompt = text(model, 5, seed=1)
    with torch.no_grad():
        expected = model.generate(
            torch.from_numpy(prompt)[None], attention_mask=torch.ones(1, 5), max_new_tokens=64,
            min_new_tokens=64, do_sample=False, pad_token_id=0, eos_token_id=None,
        )[0]  # fmt: skip
    assert greedy(file, prompt, 64) == expected.tolist()
    assert len(set(expected.tolist())) > 5


def greedy(file: Path, prompt: np.ndarray, count: int) -> list[int]:
    """Prompt and `count` more tokens, with past and present in the same buffers and one row of logits a call."""
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    pasts = [each for each in session.get_inputs() if each.name.startswith("past")]
    room = len(prompt) + count
    buffers = {
        each.name: onnxruntime.OrtValue.ortvalue_from_numpy(
            np.full((1, each.shape[1], room, each.shape[3]), np.nan, np.float32)
        )
        for each in pasts
    }
    tokens = prompt.tolist()
    chunk = prompt
    for _ in range(count):
        binding = session.io_binding()
        feeds = {
            "input_ids": chunk[None], "attention_mask": np.ones((1, len(tokens)), np.int64),
            "first_logit": np.array([len(chunk) - 1]),
        }  # fmt: skip
        held = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
        for name, value in (held | buffers).items():
            binding.bind_ortvalue_input(name, value)
        for name, value in buffers.items():
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        binding.bind_output("logits")
        session.run_with_iobinding(binding)
        logits = next(value for value in binding.get_outputs() if len(value.shape()) == 3).numpy()
        assert logits.shape[:2] == (1, 1)
        tokens.append(int(logits[0, 0].argmax()))
        chunk = np.array(tokens[-1:])
    return tokens


ROTATIONS: dict[str, dict[str, Any]] = {
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 32},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
}  # fmt: skip


@pytest.mark.parametrize("kind", ROTATIONS)
def test_rotary_scaling(kind: str, tmp_path: Path) -> None:
    model, file, _ = built(tmp_path, "llama", rope_scaling=ROTATIONS[kind])
    assert_same_logits(model, file, text(model, 100), 60, 1)


def test_rotations_that_grow_are_those_of_the_original_context(tmp_path: Path) -> None:
    """Phi-3's long factors and a partial rotation: short texts are the model's, longer ones have no rows."""
    scaling = {"type": "longrope", "short_factor": [1.5] * 8, "long_factor": [4.0] * 8}
    model, _, checkpoint = built(
        tmp_path, "phi3", rope_scaling=scaling, partial_rotary_factor=0.5, context=256, sliding_window=None,
        original_max_position_embeddings=64, heads=2,
    )  # fmt: skip
    graph = decoder_graph.make_graph(model, "x")
    assert graph.context_length == 64
    assert graph.weights["cos_cache"].shape == (64, 8)
    assert "first 64 tokens, the model 256" in graph.warnings[0]
    decoder_graph.build(checkpoint, tmp_path / "onnx")
    assert_same_logits(model, tmp_path / "onnx/model.onnx", text(model, 64), 30, 1)


@pytest.mark.parametrize(
    ("family", "changes"),
    [("mistral", {"sliding_window": 9}), ("phi3", {"sliding_window": 9}), ("gemma2", {"sliding_window": 9}),
     ("gemma3_text", {"sliding_window": 9, "layers": 7}),
     ("qwen2", {"sliding_window": 9, "use_sliding_window": True, "max_window_layers": 1}),
     ("smollm3", {"sliding_window": 9, "use_sliding_window": True, "layers": 4,
                  "layer_types": ["sliding_attention", "full_attention"] * 2})],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_windows(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    """Narrow windows in the layers that slide; one token more or fewer is another model."""
    model, file, _ = built(tmp_path, family, **changes)
    tokens = text(model, 40)
    assert_same_logits(model, file, tokens, 25, 1)
    held = onnx.load(file, load_external_data=False)
    attributes = [
        attribute for node in held.graph.node if node.op_type == "GroupQueryAttention"
        for attribute in node.attribute if attribute.name == "local_window_size" and attribute.i == 9
    ]  # fmt: skip
    attributes[0].i = 10
    onnx.save(held, file)
    with pytest.raises(AssertionError):
        assert_same_logits(model, file, tokens, 25, 1)


@pytest.mark.parametrize(
    ("family", "changes"),
    [("llama", {"attention_bias": True, "mlp_bias": True}), ("llama", {"head_dim": 32}),
     ("llama", {"kv_heads": 4}), ("llama", {"kv_heads": 1, "layers": 1}), ("qwen3", {"attention_bias": True}),
     ("llama", {"hidden_act": "gelu"}), ("granite", {"residual_multiplier": 1.0, "logits_scaling": 1.0}),
     ("gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 1.5, "query_pre_attn_scalar": 100}),
     ("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
     ("smollm3", {"no_rope_layers": [0, 1, 1], "layers": 3}), ("qwen2", {"dtype": "bfloat16"})],
)  # fmt: skip
def test_settings_of_a_family(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model, file, _ = built(tmp_path, family, **changes)
    assert_same_logits(model, file, text(model, 40), 25, 1)


def test_a_tied_embedding_is_in_the_file_once(tmp_path: Path) -> None:
    sizes = {}
    for tied in (True, False):
        model, file, _ = built(tmp_path / str(tied), "llama", tied=tied)
        sizes[tied] = file.with_name("model.onnx.data").stat().st_size
    table = 4 * model.config.vocab_size * model.config.hidden_size
    assert sizes[False] - sizes[True] == pytest.approx(table, abs=64)


def test_a_batch_of_texts(tmp_path: Path) -> None:
    model, file, _ = built(tmp_path, "llama")
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    tokens = text(model, 36).reshape(3, 12)
    empty = {e.name: np.zeros((3, e.shape[1], 0, e.shape[3]), np.float32) for e in session.get_inputs()
             if e.name.startswith("past")}  # fmt: skip
    found = session.run(["logits"], {"input_ids": tokens, "attention_mask": np.ones_like(tokens), **empty})[0]
    for row, logits in zip(tokens, found, strict=True):
        np.testing.assert_allclose(logits, torch_logits(model, row), atol=1e-3)


def test_first_logit_leaves_out_rows(tmp_path: Path) -> None:
    model, file, _ = built(tmp_path, "gemma2")
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    tokens = text(model, 12)[None]
    feeds = {e.name: np.zeros((1, e.shape[1], 0, e.shape[3]), np.float32) for e in session.get_inputs()
             if e.name.startswith("past")}  # fmt: skip
    feeds |= {"input_ids": tokens, "attention_mask": np.ones_like(tokens)}
    whole = session.run(["logits"], feeds)[0]
    for first in (0, 5, 11):
        part = session.run(["logits"], feeds | {"first_logit": np.array([first])})[0]
        np.testing.assert_array_equal(part, whole[:, first:])


def test_norms_are_fused(tmp_path: Path) -> None:
    """The written-out norms become one node each, or decoding would take a third longer."""
    _, file, _ = built(tmp_path, "qwen3")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    kinds = [
        node.op_type for node in onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node
    ]
    assert not {"Pow", "ReduceMean", "Sqrt", "Div"} & set(kinds)
    assert kinds.count("SimplifiedLayerNormalization") == 1 + 2 * 2


def test_same_model_same_bytes(tmp_path: Path) -> None:
    _, one, checkpoint = built(tmp_path, "llama")
    other = decoder_graph.build(checkpoint, tmp_path / "again")
    for name in ("model.onnx", "model.onnx.data"):
        assert one.with_name(name).read_bytes() == other.with_name(name).read_bytes()


def test_every_architecture_has_a_row(tmp_path: Path) -> None:
    """What becomes GGUF becomes ONNX too."""
    kinds = set()
    for family in FAMILIES:
        held = resolve(str(write_hf_model(tmp_path / family, family, layers=1)))
        kinds |= set(held.config()["architectures"])
        assert held.config()["model_type"] in decoder_graph.FAMILIES
    assert set(ARCHITECTURES) - kinds <= {"Gemma3ForConditionalGeneration"}


def test_what_has_no_graph_is_refused(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=16))
    with pytest.raises(ModelError, match="no ONNX graph for the architecture 'gpt2'") as caught:
        decoder_graph.make_graph(model, "x")
    assert "llama" in caught.value.message
    held = resolve(str(write_hf_model(tmp_path / "hf", "llama", hidden_act="relu"))).load()
    with pytest.raises(ModelError, match="activation 'relu'"):
        decoder_graph.make_graph(held, "x")
    held = resolve(str(write_hf_model(tmp_path / "narrow", "llama", hidden=48, heads=6))).load()
    with pytest.raises(ModelError, match="8 rotary dimensions of 8"):
        decoder_graph.make_graph(held, "x")


def test_the_text_part_of_a_multimodal_model(tmp_path: Path) -> None:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    text_config = resolve(str(write_hf_model(tmp_path / "text", "gemma3_text", layers=6))).config()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    torch.manual_seed(0)
    model = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text_config, vision_config=vision, mm_tokens_per_image=1)
    ).eval()
    with torch.no_grad():
        for parameter in model.model.language_model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    graph = decoder_graph.make_graph(model, "x")
    save(graph.model, graph.weights, tmp_path / "model.onnx")
    assert_same_logits(model, tmp_path / "model.onnx", text(model, 80), 70, 1)
