"""LlamaRunner: the same numbers however tokens are cut up, exact state handling, and clear refusals."""

from __future__ import annotations

import dataclasses
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgeslm.errors import BundleError, EngineError, ModelError, RecipeError
from edgeslm.gguf_file import read_gguf
from edgeslm.runtime import llama as llama_module
from edgeslm.runtime.engine import load_engine
from edgeslm.runtime.fit import DEFAULT_CONTEXT, kv_cache_bytes
from edgeslm.runtime.llama import LlamaRunner
from edgeslm.runtime.runner import KV_TYPES, RunnerOptions, open_runner
from tests.conftest import byte_alphabet, write_tiny_gguf

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytest.importorskip("llama_cpp")

TEXT = "the hen  in\tthe 12 é€😀 <|im_end|>\n\n"
TOKENS = [5, 77, 130, 9, 200, 31, 31, 256, 44, 17, 3, 250, 66, 101, 8, 12, 90, 41]


EXACT = {"kv_type": "f32", "flash_attention": False}
"""Flash attention adds in another order, so that results would move with the cache's layout."""


def options(**changes: Any) -> RunnerOptions:
    return RunnerOptions(**({"threads": 1, "context": 256} | changes))


@pytest.fixture
def make(tiny_gguf: Path) -> Iterator[Callable[..., LlamaRunner]]:
    """Runners of the tiny model, closed at the end."""
    runners = []

    def open_one(path: Path = tiny_gguf, **changes: Any) -> LlamaRunner:
        runners.append(LlamaRunner(path, options(**changes)))
        return runners[-1]

    yield open_one
    for runner in runners:
        runner.close()


def test_facts(make: Callable[..., LlamaRunner]) -> None:
    facts = make().facts
    assert (facts.architecture, facts.vocab_size, facts.context_length) == ("llama", 265, 256)
    assert (facts.bos_token, facts.eos_token, facts.adds_bos) == (1, 2, False)
    assert facts.stop_tokens == {0, 2}
    assert facts.parameters * 4 == facts.weight_bytes
    assert facts.chat_template is not None
    assert "<|im_start|>" in facts.chat_template


def test_options_in_force(make: Callable[..., LlamaRunner], tiny_gguf: Path, smollm2_gguf: Path) -> None:
    """Nothing is None, and sizes are what the engine made of them."""
    assert make(ubatch=4096, batch=5000).options == RunnerOptions(
        threads=1, context=256, batch=256, ubatch=256, kv_type="f16", flash_attention=True, gpu_layers=0,
        provider="cpu",
    )  # fmt: skip
    assert make(context=300).options.context == 512, "llama.cpp rounds up to 256 cells"
    assert make(flash_attention=False).options.flash_attention is False
    defaults = LlamaRunner(tiny_gguf, RunnerOptions())
    assert defaults.options.context == 256
    assert defaults.options.threads >= 1
    assert None not in dataclasses.asdict(defaults.options).values()
    defaults.close()
    real = LlamaRunner(smollm2_gguf, RunnerOptions())
    assert real.options.context == DEFAULT_CONTEXT < real.facts.context_length
    real.close()


def test_tokens_are_the_text(make: Callable[..., LlamaRunner]) -> None:
    runner = make()
    for special in (False, True):
        tokens = runner.tokenize(TEXT, add_special=False, parse_special=special)
        assert (2 in tokens) == special
        assert b"".join(runner.token_bytes(token, special=True) for token in tokens) == TEXT.encode()
    assert runner.token_bytes(2) == b""
    assert runner.token_bytes(2, special=True) == b"<|im_end|>"
    assert runner.tokenize("", add_special=True, parse_special=False) == []
    assert len(runner.tokenize("the" * 50_000, add_special=False, parse_special=False)) == 50_000


def test_a_token_outside_the_vocabulary(make: Callable[..., LlamaRunner]) -> None:
    runner = make()
    for token in (-1, 265):
        with pytest.raises(EngineError, match="vocabulary"):
            runner.token_bytes(token)
        with pytest.raises(EngineError, match="could not compute"):
            runner.step(token)
    runner.prefill(TOKENS)
    assert runner.position == len(TOKENS), "a refused token leaves the state as it was"


@pytest.mark.parametrize(("batch", "ubatch"), [(256, 256), (7, 7), (16, 5), (1, 1)])
def test_logits_do_not_depend_on_how_tokens_are_cut(
    make: Callable[..., LlamaRunner], batch: int, ubatch: int
) -> None:
    """Every row of logits() is what one forward pass that ends there gives."""
    whole = make(**EXACT).logits(TOKENS)
    runner = make(batch=batch, ubatch=ubatch, **EXACT)
    assert whole.shape == (len(TOKENS), 265)
    assert whole.dtype == np.float32
    np.testing.assert_allclose(runner.logits(TOKENS), whole, atol=1e-4)
    for first in (1, 6, 7, 8, len(TOKENS) - 1, len(TOKENS)):
        np.testing.assert_allclose(runner.logits(TOKENS, first), whole[first:], atol=1e-4)
    runner.prefill(TOKENS[:11])
    np.testing.assert_allclose(runner.last_logits(), whole[10], atol=1e-4)
    for place, token in enumerate(TOKENS[11:], start=11):
        runner.step(token)
        np.testing.assert_allclose(runner.last_logits(), whole[place], atol=1e-4)
    assert runner.position == len(TOKENS)


def test_logits_leave_nothing_behind(make: Callable[..., LlamaRunner]) -> None:
    runner = make()
    runner.prefill(TOKENS[:5])
    first = runner.logits(TOKENS)
    assert runner.position == 0
    np.testing.assert_array_equal(runner.logits(TOKENS), first)
    with pytest.raises(ValueError, match="first=19"):
        runner.logits(TOKENS, 19)


def test_last_logits_are_a_view(make: Callable[..., LlamaRunner]) -> None:
    runner = make()
    with pytest.raises(EngineError, match="no logits"):
        runner.last_logits()
    runner.prefill(TOKENS)
    assert np.shares_memory(runner.last_logits(), runner.last_logits())
    assert not runner.last_logits().flags.owndata


@pytest.mark.parametrize("keep", [0, 1, 9, 17, 18, 99])
def test_reset_keeps_exactly_the_beginning(make: Callable[..., LlamaRunner], keep: int) -> None:
    runner = make()
    runner.prefill(TOKENS)
    runner.reset(keep)
    kept = TOKENS[:keep]
    assert runner.position == len(kept)
    other = [99, 98, 97]
    runner.prefill(other)
    np.testing.assert_allclose(runner.last_logits(), make().logits([*kept, *other])[-1], atol=1e-4)


def test_reset_forgets_what_was_computed_but_not_counted(make: Callable[..., LlamaRunner]) -> None:
    """Ctrl-C may fall between the engine's computation and the runner's count of it."""
    runner = make()
    runner.prefill(TOKENS)
    runner._position -= 1
    runner.reset(len(TOKENS))
    assert runner.position == len(TOKENS) - 1
    runner.step(9)
    np.testing.assert_allclose(runner.last_logits(), make().logits([*TOKENS[:-1], 9])[-1], atol=1e-4)


def test_a_full_context(make: Callable[..., LlamaRunner]) -> None:
    runner = make()
    with pytest.raises(EngineError, match="0 of 256 tokens taken, 257 more"):
        runner.prefill([7] * 257)
    assert runner.position == 0
    runner.prefill([7] * 256)
    with pytest.raises(EngineError, match="the context is full"):
        runner.step(7)
    with pytest.raises(EngineError, match="--context"):
        runner.logits([7] * 300)
    runner.reset(10)
    runner.step(7)
    assert runner.position == 11


def test_close_is_final_and_may_come_twice(tiny_gguf: Path) -> None:
    runner = LlamaRunner(tiny_gguf, options())
    runner.close()
    runner.close()


def test_loading_is_timed_by_the_clock(tiny_gguf: Path) -> None:
    ticks = iter([10.0, 12.5])
    runner = LlamaRunner(tiny_gguf, options(), clock=lambda: next(ticks))
    assert runner.load_s == 2.5
    runner.close()


@pytest.mark.parametrize("mlock", [False, True])
@pytest.mark.parametrize("mmap", [False, True])
def test_ways_of_loading_agree(make: Callable[..., LlamaRunner], mmap: bool, mlock: bool) -> None:
    np.testing.assert_array_equal(make(mmap=mmap, mlock=mlock).logits(TOKENS), make().logits(TOKENS))


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_kv_types(tmp_path: Path, kv_type: str, make: Callable[..., LlamaRunner]) -> None:
    """Heads of 64 values suit every type; the coarsest moves the logits, none breaks them."""
    path = write_tiny_gguf(tmp_path / "wide.gguf", hidden=128, heads=2, kv_heads=2)
    exact = make(path, **EXACT).logits(TOKENS)
    ours = make(path, kv_type=kv_type).logits(TOKENS)
    correlation = np.corrcoef(exact.ravel(), ours.ravel())[0, 1]
    assert correlation > (0.9999 if kv_type in ("f32", "f16", "bf16", "q8_0") else 0.97)


def test_impossible_options(make: Callable[..., LlamaRunner]) -> None:
    with pytest.raises(RecipeError, match=r"unknown KV cache type 'q9'.*f16"):
        make(kv_type="q9")
    with pytest.raises(RecipeError, match="needs flash attention"):
        make(kv_type="q8_0", flash_attention=False)
    with pytest.raises(EngineError, match=r"block size 32 does not divide n_embd_head_k=16.*f16"):
        make(kv_type="q8_0")
    for name in ("threads", "context", "batch", "ubatch"):
        with pytest.raises(RecipeError, match=f"{name} is 0"):
            make(**{name: 0})
    with pytest.raises(RecipeError, match="512"):
        make(threads=513)


def test_a_context_larger_than_memory(make: Callable[..., LlamaRunner]) -> None:
    with pytest.raises(EngineError, match=r"KV cache of 2147483647 tokens [\d,.]+ MiB\), this machine has"):
        make(context=2**31 - 1)
    with pytest.raises(RecipeError, match="context is 2147483648"):
        make(context=2**31)


def test_a_model_larger_than_memory(
    make: Callable[..., LlamaRunner], monkeypatch: pytest.MonkeyPatch, tiny_gguf: Path
) -> None:
    monkeypatch.setattr(llama_module, "memory_bytes", lambda: 1000)
    with pytest.raises(EngineError, match=r"tiny.gguf needs 0.4 MiB .*smaller model"):
        make()


def test_the_kv_cache_is_what_llama_cpp_says(smollm2_gguf: Path, tiny_gguf: Path) -> None:
    """llama.cpp logs 90 MiB in f16 and 47.81 in q8_0 for 4096 tokens of SmolLM2-135M."""
    assert kv_cache_bytes(read_gguf(smollm2_gguf), 4096, "f16") == 90 * 2**20
    assert kv_cache_bytes(read_gguf(smollm2_gguf), 4096, "q8_0") == 90 * 2**20 * 34 // 64
    assert kv_cache_bytes(read_gguf(tiny_gguf), 256, "f32") == 2 * 2 * 256 * 2 * 16 * 4


def test_files_that_are_no_model(make: Callable[..., LlamaRunner], tmp_path: Path, tiny_gguf: Path) -> None:
    data = tiny_gguf.read_bytes()
    for name, content in (("text.gguf", b"hello"), ("empty.gguf", b""), ("cut.gguf", data[:-9])):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelError, match=name):
            make(tmp_path / name)
    with pytest.raises(ModelError, match=r"nothing\.gguf"):
        make(tmp_path / "nothing.gguf")


def test_an_unknown_architecture(make: Callable[..., LlamaRunner], tmp_path: Path, tiny_gguf: Path) -> None:
    """llama.cpp's own words reach the user."""
    data = tiny_gguf.read_bytes()
    assert data.count(b"llama") > 1
    (tmp_path / "other.gguf").write_bytes(data.replace(b"llama", b"lemma"))
    with pytest.raises(EngineError, match=r"other.gguf: .*unknown model architecture: 'lemma'"):
        make(tmp_path / "other.gguf")


def test_a_missing_tensor(make: Callable[..., LlamaRunner], tmp_path: Path, tiny_gguf: Path) -> None:
    (tmp_path / "less.gguf").write_bytes(tiny_gguf.read_bytes().replace(b"blk.1.ffn_up", b"blk.1.ffn_xx"))
    with pytest.raises(EngineError, match=r"blk\.1\.ffn_up\.weight"):
        make(tmp_path / "less.gguf")


def test_a_path_that_is_not_ascii(make: Callable[..., LlamaRunner], tmp_path: Path, tiny_gguf: Path) -> None:
    path = tmp_path / "modèle 小.gguf"
    os.link(tiny_gguf, path)
    assert make(path).logits([5]).shape == (1, 265)


def test_the_log_is_silent(make: Callable[..., LlamaRunner], capfd: pytest.CaptureFixture[str]) -> None:
    make().logits(TOKENS)
    assert capfd.readouterr() == ("", "")


def test_open_runner(tiny_gguf: Path) -> None:
    from edgeslm.bundle import open_bundle

    bundle = open_bundle(tiny_gguf)
    runner = open_runner(bundle, options())
    assert isinstance(runner, LlamaRunner)
    runner.close()
    with pytest.raises(BundleError, match=r"'tflite'.*gguf, onnx"):
        open_runner(dataclasses.replace(bundle, format="tflite"), options())


def write_sliding_gguf(path: Path, *, window: int) -> Path:
    """A random gemma3 with sliding windows in five of six layers."""
    import gguf

    random = np.random.default_rng(4)
    hidden, heads, head, inner, layers = 64, 2, 32, 128, 6
    tokens = ["<pad>", "<eos>", "<bos>", *byte_alphabet().values()]
    writer = gguf.GGUFWriter(str(path), "gemma3")
    writer.add_context_length(2048)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_sliding_window(window)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * 3 + [1] * 256)
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(1)
    writer.add_bos_token_id(2)

    def weight(name: str, *shape: int) -> None:
        writer.add_tensor(name, (random.standard_normal(shape) / np.sqrt(shape[-1])).astype(np.float32))

    def norm(name: str, size: int = hidden) -> None:
        writer.add_tensor(name, np.ones(size, np.float32))

    weight("token_embd.weight", len(tokens), hidden)
    norm("output_norm.weight")
    for i in range(layers):
        for name in ("attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm"):
            norm(f"blk.{i}.{name}.weight")
        for name in ("attn_q", "attn_k", "attn_v"):
            weight(f"blk.{i}.{name}.weight", heads * head, hidden)
        norm(f"blk.{i}.attn_q_norm.weight", head)
        norm(f"blk.{i}.attn_k_norm.weight", head)
        weight(f"blk.{i}.attn_output.weight", hidden, heads * head)
        weight(f"blk.{i}.ffn_gate.weight", inner, hidden)
        weight(f"blk.{i}.ffn_up.weight", inner, hidden)
        weight(f"blk.{i}.ffn_down.weight", hidden, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("keep", [20, 400, 1000, 1190, 1199])
def test_reset_with_sliding_windows_is_exact_or_total(
    make: Callable[..., LlamaRunner], tmp_path: Path, keep: int
) -> None:
    """A cache with windows has dropped old tokens: going back too far must not go on with holes."""
    path = write_sliding_gguf(tmp_path / "gemma.gguf", window=16)
    tokens = np.random.default_rng(0).integers(3, 259, 1200).tolist()
    runner = make(path, context=2048, ubatch=64, **EXACT)
    runner.prefill(tokens)
    runner.reset(keep)
    assert runner.position in (0, keep)
    assert keep < 1199 or runner.position == keep, "one step back is within the window"
    runner.prefill([*tokens[runner.position : keep], 7, 8])
    fresh = make(path, context=2048, ubatch=64, **EXACT)
    fresh.prefill([*tokens[:keep], 7, 8])
    np.testing.assert_allclose(runner.last_logits(), fresh.last_logits(), atol=1e-4)


@pytest.mark.workstation
@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_torch(make: Callable[..., LlamaRunner], tmp_path: Path, tied: bool) -> None:
    """The same weights in transformers' LlamaForCausalLM, in float32 with float32 caches."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from edgeslm.gguf_file import tensor_bytes

    path = write_tiny_gguf(tmp_path / "oracle.gguf", tied=tied, seed=3)
    file = read_gguf(path)
    config = transformers.LlamaConfig(
        vocab_size=265, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, rms_norm_eps=1e-5, rope_theta=10000.0, tie_word_embeddings=tied,
        max_position_embeddings=256,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()

    def weight(name: str) -> Any:
        info = file.tensors[name]
        return torch.from_numpy(tensor_bytes(file, info).view(np.float32).reshape(info.shape).copy())

    def unpermuted(name: str, heads: int) -> Any:
        """GGUF holds the rows of q and k in pairs for ggml's RoPE (convert_hf_to_gguf.py, permute)."""
        rows = weight(name)
        return rows.view(heads, 8, 2, 64).transpose(1, 2).reshape(rows.shape)

    state = {
        "model.embed_tokens.weight": weight("token_embd.weight"),
        "model.norm.weight": weight("output_norm.weight"),
    }
    state["lm_head.weight"] = weight("token_embd.weight" if tied else "output.weight")
    for i in range(2):
        ours, theirs = f"blk.{i}", f"model.layers.{i}"
        state |= {
            f"{theirs}.input_layernorm.weight": weight(f"{ours}.attn_norm.weight"),
            f"{theirs}.post_attention_layernorm.weight": weight(f"{ours}.ffn_norm.weight"),
            f"{theirs}.self_attn.q_proj.weight": unpermuted(f"{ours}.attn_q.weight", 4),
            f"{theirs}.self_attn.k_proj.weight": unpermuted(f"{ours}.attn_k.weight", 2),
            f"{theirs}.self_attn.v_proj.weight": weight(f"{ours}.attn_v.weight"),
            f"{theirs}.self_attn.o_proj.weight": weight(f"{ours}.attn_output.weight"),
            f"{theirs}.mlp.gate_proj.weight": weight(f"{ours}.ffn_gate.weight"),
            f"{theirs}.mlp.up_proj.weight": weight(f"{ours}.ffn_up.weight"),
            f"{theirs}.mlp.down_proj.weight": weight(f"{ours}.ffn_down.weight"),
        }
    model.load_state_dict(state)
    tokens = np.random.default_rng(1).integers(3, 265, 200).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    ours = make(path, **EXACT).logits(tokens)
    np.testing.assert_allclose(ours, expected, atol=1e-3)


def test_layers_on_a_gpu(make: Callable[..., LlamaRunner], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of a GPU, in force and told; the library of the tests computes on the CPU either way."""
    assert make(gpu_layers=0).notes == ()
    if not load_engine().has_gpu:
        asked = make(gpu_layers=4)
        assert asked.options.gpu_layers == 0
        assert asked.notes == (llama_module.NO_GPU,)
    given: list[Any] = []
    api = load_engine().api
    load, start = api.llama_model_load_from_file, api.llama_init_from_model

    def loads(path: bytes, parameters: Any) -> Any:
        given.append(parameters.n_gpu_layers)
        return load(path, parameters)

    def starts(model: Any, parameters: Any) -> Any:
        given.append((parameters.offload_kqv, parameters.op_offload))
        return start(model, parameters)

    monkeypatch.setattr(api, "llama_supports_gpu_offload", lambda: True)
    monkeypatch.setattr(api, "llama_model_load_from_file", loads)
    monkeypatch.setattr(api, "llama_init_from_model", starts)
    whole = make()
    assert (whole.options.gpu_layers, whole.notes) == (3, ())
    assert make(gpu_layers=1).options.gpu_layers == 1
    assert make(gpu_layers=0).options.gpu_layers == 0
    assert make(gpu_layers=99).options.gpu_layers == 3
    assert given == [-1, (True, True), 1, (True, True), 0, (False, False), 99, (True, True)]
