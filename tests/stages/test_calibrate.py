"""The importance matrix: against a forward pass in numpy, against llama-imatrix, and as a file format."""

from __future__ import annotations

import shutil
import struct
import subprocess
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeslm.errors import DataError, EdgeslmError, ModelError
from edgeslm.gguf_file import read_gguf
from edgeslm.runtime.template import render_chat
from edgeslm.specs import CalibrateSpec
from edgeslm.stages import calibrate
from edgeslm.stages.checkpoint import resolve
from edgeslm.stages.data import Document, documents

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

TEXT = "The quick brown fox jumps over the lazy dog, and 12345 other things happen in 2024. " * 12
MESSAGES = ({"role": "user", "content": "Say <|eot_id|> twice."}, {"role": "assistant", "content": "No."})


def chat(template: str, messages: Sequence[Mapping[str, str]], bos: str, eos: str) -> str:
    return render_chat(template, messages, bos, eos, add_generation_prompt=False)


# --- the forward pass, written out ---


def rms_norm(x: NDArray[np.float64], weight: NDArray[np.float64]) -> NDArray[np.float64]:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * weight


def llama_inputs(
    weights: Mapping[str, NDArray[Any]], tokens: NDArray[np.int64], config: dict[str, Any]
) -> Any:
    """Input of every linear layer of a llama by name, [S, I], in float64; Touvron et al. 2023."""
    heads, kv_heads, theta = (
        config[key] for key in ("num_attention_heads", "num_key_value_heads", "rope_theta")
    )
    w = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    x, inputs = w["model.embed_tokens.weight"][tokens], {}
    count = len(tokens)
    head = x.shape[1] // heads
    angle = np.outer(np.arange(count), theta ** (-np.arange(0, head, 2) / head))
    cos, sin = (np.concatenate([f(angle)] * 2, -1)[:, None] for f in (np.cos, np.sin))
    hidden = np.triu(np.full((count, count), -np.inf), 1)

    def linear(name: str, value: NDArray[np.float64]) -> NDArray[np.float64]:
        inputs[name] = value
        return value @ w[f"{name}.weight"].T

    def rotate(value: NDArray[np.float64]) -> NDArray[np.float64]:
        half = head // 2
        return value * cos + np.concatenate([-value[..., half:], value[..., :half]], -1) * sin

    for i in range(config["num_hidden_layers"]):
        p = f"model.layers.{i}"
        normed = rms_norm(x, w[f"{p}.input_layernorm.weight"])
        q, k, v = (linear(f"{p}.self_attn.{n}_proj", normed).reshape(count, -1, head) for n in "qkv")
        k, v = (np.repeat(value, heads // kv_heads, 1) for value in (rotate(k), v))
        scores = np.einsum("shd,thd->hst", rotate(q), k) / np.sqrt(head) + hidden
        share = np.exp(scores - scores.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)
        mixed = np.einsum("hst,thd->shd", share, v).reshape(count, -1)
        x = x + linear(f"{p}.self_attn.o_proj", mixed)
        normed = rms_norm(x, w[f"{p}.post_attention_layernorm.weight"])
        gate, up = (linear(f"{p}.mlp.{n}_proj", normed) for n in ("gate", "up"))
        x = x + linear(f"{p}.mlp.down_proj", gate / (1 + np.exp(-gate)) * up)
    inputs["lm_head"] = rms_norm(x, w["model.norm.weight"])
    return inputs


GGUF_NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def gguf_name(module: str, head: str) -> str:
    if module == "lm_head":
        return head
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{GGUF_NAMES[part]}.weight"


@pytest.mark.workstation
@pytest.mark.parametrize("tied", [True, False])
def test_the_matrix_equals_a_forward_pass_in_numpy(tmp_path: Path, tied: bool) -> None:
    pytest.importorskip("transformers")
    from edgeslm.safetensors_file import read_checkpoint, to_float32
    from tests.models import write_hf_model

    checkpoint = resolve(str(write_hf_model(tmp_path / "m", "llama", tied=tied, head_dim=16)))
    found = [Document(text=TEXT), Document(messages=MESSAGES)]
    out = tmp_path / "importance.gguf"
    calibrate.run(
        checkpoint, found, CalibrateSpec(tokens=128, context=32), out, chat=chat, sources=["a", "b"]
    )

    tokenizer = checkpoint.tokenizer()
    tokens = list(calibrate.token_stream(found, tokenizer, chat))
    windows = calibrate.choose_windows(tokens, context=32, tokens=128)
    windows[:, 0] = tokenizer.bos_token_id
    weights = {name: to_float32(tensor) for name, tensor in read_checkpoint(checkpoint.path).items()}
    head = "token_embd.weight" if tied else "output.weight"
    wanted: dict[str, Any] = {}
    for window in windows:
        for module, value in llama_inputs(weights, window, checkpoint.config()).items():
            name = gguf_name(module, head)
            wanted[name] = wanted.get(name, 0) + (value**2).sum(0) / windows.size
    means = calibrate.load_importance(out)
    assert set(means) == set(wanted)
    for name, value in wanted.items():
        np.testing.assert_allclose(means[name], value, rtol=2e-4, err_msg=name)
    file = read_gguf(out)
    assert file.get("general.type") == "imatrix"
    assert file.get("imatrix.datasets") == ["a", "b"]
    assert (file.get("imatrix.chunk_count"), file.get("imatrix.chunk_size")) == (4, 32)


@pytest.mark.workstation
@pytest.mark.parametrize(
    "family", ["qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "granite", "olmo2", "smollm3"]
)
def test_every_family_has_a_place_for_each_weight(tmp_path: Path, family: str) -> None:
    pytest.importorskip("transformers")
    from edgeslm.specs import QuantizeSpec
    from edgeslm.stages import export_gguf
    from tests.models import write_hf_model

    checkpoint = resolve(str(write_hf_model(tmp_path / "m", family)))
    found = [Document(text=TEXT), Document(messages=MESSAGES)]
    out = tmp_path / "importance.gguf"
    calibrate.run(checkpoint, found, CalibrateSpec(tokens=64, context=32), out, chat=chat)
    exported = export_gguf.run(checkpoint, QuantizeSpec(scheme="F32", keep_going=True), tmp_path / "m.gguf")
    matrices = {
        name: info.shape[-1]
        for name, info in read_gguf(exported.path).tensors.items()
        if len(info.shape) == 2 and not name.startswith("rope")
    }
    if "output.weight" in matrices:
        del matrices["token_embd.weight"]  # an untied embedding is looked up, never multiplied
    means = calibrate.load_importance(out)
    assert {name: value.size for name, value in means.items()} == matrices


@pytest.mark.workstation
def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from tests.models import write_hf_model

    model = resolve(str(write_hf_model(tmp_path / "m", "llama"))).load()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 3] = float("nan")
    with pytest.raises(ModelError, match=r"blk\.0\.ffn_down\.weight are not finite"):
        calibrate.measure(model, calibrate.torch_names(model), np.ones((1, 16), np.int64))


@pytest.mark.workstation
def test_too_little_text_writes_nothing(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tests.models import write_hf_model

    checkpoint = resolve(str(write_hf_model(tmp_path / "m", "llama")))
    out = tmp_path / "out" / "importance.gguf"
    with pytest.raises(DataError, match="one window takes 512"):
        calibrate.run(checkpoint, [Document(text="Short.")], CalibrateSpec(), out, chat=chat)
    assert not out.parent.exists()


@pytest.mark.workstation
def test_special_tokens_are_read_in_chats_only(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    from tests.models import write_hf_model

    tokenizer = resolve(str(write_hf_model(tmp_path / "m", "llama"))).tokenizer()
    special = set(tokenizer.all_special_ids)
    plain = list(calibrate.token_stream([Document(text="<|eot_id|>")], tokenizer, chat))
    assert [token for token in plain if token in special] == [tokenizer.bos_token_id]
    chats = list(calibrate.token_stream([Document(messages=MESSAGES)], tokenizer, chat))
    assert chats.count(tokenizer.convert_tokens_to_ids("<|eot_id|>")) == 3
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        list(calibrate.token_stream([Document(messages=MESSAGES)], tokenizer, chat))


# --- windows ---


@given(st.integers(0, 400), st.integers(2, 16), st.integers(1, 300))
def test_windows_do_not_overlap_and_spread_evenly(length: int, context: int, tokens: int) -> None:
    if length < context:
        with pytest.raises(DataError):
            calibrate.choose_windows(range(length), context=context, tokens=tokens)
        return
    windows = calibrate.choose_windows(range(length), context=context, tokens=tokens)
    wanted = max(1, tokens // context)
    readable = min(length, calibrate.READ_AHEAD * wanted * context) // context
    assert windows.shape == (min(wanted, readable), context)
    starts = windows[:, 0] // context
    assert (windows == starts[:, None] * context + np.arange(context)).all()
    assert starts[0] == 0
    gaps = np.diff(np.append(starts, readable))
    assert gaps.min() >= 1
    assert gaps.max() - gaps.min() <= 1


# --- files ---


def write_legacy(path: Path, entries: Mapping[str, tuple[int, Sequence[float]]]) -> Path:
    """llama-imatrix --output-format dat, by save_imatrix_legacy: values are means times calls."""
    data = struct.pack("<i", len(entries))
    for name, (calls, values) in entries.items():
        data += struct.pack("<i", len(name)) + name.encode() + struct.pack("<ii", calls, len(values))
        data += np.array(values, "<f4").tobytes()
    path.write_bytes(data + struct.pack("<ii", 7, 4) + b"text")
    return path


def test_the_legacy_format_is_read(tmp_path: Path) -> None:
    path = write_legacy(tmp_path / "a.dat", {"blk.0.attn_q.weight": (4, [4, 8, 12]), "x": (0, [1, 2])})
    means = calibrate.load_importance(path)
    np.testing.assert_array_equal(means["blk.0.attn_q.weight"], np.float32([1, 2, 3]))
    np.testing.assert_array_equal(means["x"], np.float32([1, 2]))
    assert calibrate.is_importance(path)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    sums = np.array([1.5, 0.0, 3e-9, 2.0])
    calibrate.write_importance(tmp_path / "i.gguf", {"w": (sums, 3)}, windows=1, context=3)
    means = calibrate.load_importance(tmp_path / "i.gguf")
    np.testing.assert_array_equal(means["w"], sums.astype(np.float32) / np.float32(3))
    assert calibrate.is_importance(tmp_path / "i.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["i.gguf"]


def write_gguf(path: Path, tensors: Mapping[str, NDArray[Any]], kind: str = "imatrix") -> Path:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(path), "imatrix")
    writer.add_type(kind)
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_experts_without_tokens_count_as_one(tmp_path: Path) -> None:
    tensors = {"w.in_sum2": np.float32([[2, 4], [0, 0]]), "w.counts": np.float32([[2], [0]])}
    means = calibrate.load_importance(write_gguf(tmp_path / "i.gguf", tensors))
    np.testing.assert_array_equal(means["w"], np.float32([1, 2, 1, 1]))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"w.in_sum2": np.ones(4, np.float32)}, "no counts"),
        ({"w.in_sum2": np.ones(4, np.float16), "w.counts": np.ones(1, np.float32)}, "no counts in F32"),
        ({"w.in_sum2": np.ones(4, np.float32), "w.counts": np.ones(3, np.float32)}, "4 sums and 3 counts"),
        ({"w.in_sum2": np.float32([1, np.nan]), "w.counts": np.ones(1, np.float32)}, "not finite"),
        ({"w.in_sum2": np.float32([1, -1]), "w.counts": np.ones(1, np.float32)}, "not finite and positive"),
        ({"w.other": np.ones(4, np.float32)}, "holds no importance"),
    ],
)
def test_a_damaged_matrix_is_refused(tmp_path: Path, tensors: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        calibrate.load_importance(write_gguf(tmp_path / "i.gguf", tensors))


def test_a_model_is_no_matrix(tiny_gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no importance matrix"):
        calibrate.load_importance(tiny_gguf)
    with pytest.raises(ModelError, match="No such file"):
        calibrate.load_importance(tmp_path / "none.dat")
    assert not calibrate.is_importance(tmp_path / "none.txt")


@given(st.binary(max_size=120))
def test_bytes_that_are_no_matrix_are_one_clear_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "a.dat"
    path.write_bytes(data)
    try:
        means = calibrate.load_importance(path)
    except EdgeslmError:
        return
    assert all(value.dtype == np.float32 for value in means.values())


@given(st.data())
def test_a_cut_off_legacy_file_is_refused(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = write_legacy(tmp_path_factory.mktemp("cut") / "a.dat", {"w": (2, [1, 2, 3]), "v": (2, [1])})
    whole = path.read_bytes()
    end = data.draw(st.integers(0, len(whole) - 13))
    path.write_bytes(whole[:end])
    with pytest.raises(ModelError):
        calibrate.load_importance(path)


# --- llama-imatrix ---


@pytest.mark.slow
@pytest.mark.workstation
@pytest.mark.timeout(900)
def test_the_matrix_equals_llama_imatrix(smollm2_gguf: Path, tmp_path: Path) -> None:
    """Same model, same text: correlation above 0.999 and a median difference under 1 % for every weight."""
    tool = shutil.which("llama-imatrix")
    if tool is None:
        pytest.skip("llama-imatrix is not on PATH; benchmarks/ builds it")
    pytest.importorskip("transformers")
    from edgeslm.specs import QuantizeSpec
    from edgeslm.stages import export_gguf

    model = export_gguf.run(resolve(str(smollm2_gguf)), QuantizeSpec(scheme="F32"), tmp_path / "m.gguf").path
    text = next(iter(documents(["pkg://pydoc_data/topics.py#topics"]))).text or ""
    while len(text) < 12_000:
        text += text
    (tmp_path / "text.txt").write_text(text[:12_000])
    command = [
        tool,
        "-m",
        str(model),
        "-f",
        str(tmp_path / "text.txt"),
        "-o",
        str(tmp_path / "theirs.gguf"),
        "--no-ppl",
    ]
    subprocess.run([*command, "-c", "256"], check=True, capture_output=True)
    found = documents([str(tmp_path / "text.txt")])
    spec = CalibrateSpec(tokens=10**6, context=256)
    ours = calibrate.load_importance(
        calibrate.run(resolve(str(model)), found, spec, tmp_path / "ours.gguf", chat=chat)
    )
    theirs = calibrate.load_importance(tmp_path / "theirs.gguf")
    assert set(ours) - set(theirs) == {"token_embd.weight"}
    assert set(theirs) <= set(ours)
    for name, value in theirs.items():
        assert np.corrcoef(ours[name], value)[0, 1] > 0.999, name
        assert np.median(np.abs(ours[name] - value) / value) < 0.01, name
