"""edgeslm.footprint against the buffer sizes that llama.cpp itself reports."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeslm.footprint import (
    MAX_LAYERS,
    Shape,
    compute_buffer_bytes,
    kv_cache_bytes,
    shape_of_config,
    shape_of_gguf,
)
from edgeslm.gguf_file import Field, GgufFile, read_gguf
from tests.conftest import write_tiny_gguf

# In a process of its own: llama.cpp tells its buffer sizes only in its log, of which there is one a process.
REPORTER = """
import ctypes, json, re, sys
from llama_cpp import llama_cpp as api
lines = []
log = api.llama_log_callback(lambda level, text, data: lines.append(text.decode("utf-8", "replace")))
api.llama_log_set(log, None)
api.llama_backend_init()
model_parameters = api.llama_model_default_params()
model_parameters.use_extra_bufts = False
model = api.llama_model_load_from_file(sys.argv[1].encode(), model_parameters)
for context, ubatch in json.loads(sys.argv[2]):
    parameters = api.llama_context_default_params()
    parameters.n_ctx, parameters.n_ubatch, parameters.n_batch, parameters.swa_full = context, ubatch, 2048, False
    lines.clear()
    api.llama_free(api.llama_init_from_model(model, parameters))
    sizes = {"KV": 0.0, "compute": 0.0}
    for name, mebibytes in re.findall(r"(KV|compute) buffer size = +([0-9.]+) MiB", "".join(lines)):
        sizes[name] += float(mebibytes) * 2**20
    print(json.dumps([sizes["KV"], sizes["compute"]]), flush=True)
"""

CASES = [(100, 512), (256, 512), (512, 512), (2048, 512), (2048, 64), (8192, 512)]


def reported(path: Path, cases: list[tuple[int, int]]) -> list[tuple[float, float]]:
    """(KV cache, compute buffer) in bytes, as llama.cpp rounds them to hundredths of a mebibyte."""
    if find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed")
    command = [sys.executable, "-c", REPORTER, str(path), json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def assert_as_reported(path: Path, shape: Shape, cases: list[tuple[int, int]]) -> None:
    for (context, ubatch), (kv_cache, compute) in zip(cases, reported(path, cases), strict=True):
        assert kv_cache_bytes(shape, context, ubatch) == pytest.approx(kv_cache, abs=2**20 / 100), context
        estimate = compute_buffer_bytes(shape, context, ubatch)
        assert estimate == pytest.approx(compute, rel=0.25), (context, ubatch, estimate / compute)


def test_tiny_model_as_llama_cpp_reports(tiny_gguf: Path) -> None:
    assert_as_reported(tiny_gguf, shape_of_gguf(read_gguf(tiny_gguf)), CASES)


@pytest.mark.slow
def test_real_model_as_llama_cpp_reports(smollm2_gguf: Path) -> None:
    assert_as_reported(smollm2_gguf, shape_of_gguf(read_gguf(smollm2_gguf)), CASES)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden": 256, "intermediate": 1024, "heads": 8, "kv_heads": 8},
        {"hidden": 256, "intermediate": 256, "heads": 8, "kv_heads": 2},
        {"hidden": 64, "intermediate": 2048},
        {"hidden": 512, "intermediate": 512, "heads": 32, "kv_heads": 4},
        {"hidden": 512, "intermediate": 1536, "heads": 8, "kv_heads": 2, "layers": 5, "tied": False},
    ],
)
def test_other_shapes_as_llama_cpp_reports(sizes: dict[str, int], tmp_path: Path) -> None:
    """Each with another part of the graph as the largest."""
    path = write_tiny_gguf(tmp_path / "shaped.gguf", **sizes)
    assert_as_reported(path, shape_of_gguf(read_gguf(path)), CASES)


@pytest.mark.slow
@pytest.mark.workstation
@pytest.mark.parametrize(
    "family",
    ["llama", "mistral", "smollm3", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "granite", "olmo2"],
)
def test_every_family_as_llama_cpp_reports(family: str, tmp_path: Path) -> None:
    """From config.json and from the exported file alike; with windows where the family has them."""
    pytest.importorskip("torch")
    from edgeslm.specs import QuantizeSpec
    from edgeslm.stages import export_gguf
    from edgeslm.stages.checkpoint import resolve
    from tests.models import write_hf_model

    own = {"no_rope_layer_interval": 4} if family == "smollm3" else {}
    source = write_hf_model(
        tmp_path / "hf", family, layers=7, intermediate=512, hidden=128, context=8192, **own
    )
    out = tmp_path / "model.gguf"
    export_gguf.run(resolve(str(source)), QuantizeSpec(scheme="F16"), out)
    shape = shape_of_gguf(read_gguf(out))
    assert_as_reported(out, shape, CASES)
    config = json.loads((source / "config.json").read_text())
    assert shape_of_config(config) == shape
    assert any(shape.windowed) == (family in ("gemma2", "gemma3_text"))


SHAPE = Shape(context_length=8192, hidden_size=576, layers=3, heads=9, kv_heads=(3, 3, 3), key_length=64,
              value_length=64, feed_forward=1536, vocab_size=49152, window=None,
              windowed=(False,) * 3)  # fmt: skip


def test_kv_cache_by_hand() -> None:
    assert kv_cache_bytes(SHAPE, 2048) == 2 * 3 * 2048 * 3 * 64 * 2
    assert kv_cache_bytes(SHAPE, 2049) == 2 * 3 * 2304 * 3 * 64 * 2
    windowed = replace(SHAPE, window=100, windowed=(True, False, True))
    assert kv_cache_bytes(windowed, 4096) == 2 * 3 * 64 * 2 * (4096 + 2 * 768)
    assert kv_cache_bytes(windowed, 512) == kv_cache_bytes(SHAPE, 512)
    assert kv_cache_bytes(replace(SHAPE, kv_heads=(1, 2, 6)), 256) == 2 * 9 * 256 * 64 * 2
    assert kv_cache_bytes(replace(SHAPE, value_length=128), 256) == 3 * 3 * 256 * (64 + 128) * 2


def test_what_is_unknown_has_no_estimate() -> None:
    for name in ("hidden_size", "heads", "key_length", "vocab_size"):
        assert compute_buffer_bytes(replace(SHAPE, **{name: None}), 512) is None
    assert kv_cache_bytes(replace(SHAPE, kv_heads=()), 512) is None
    assert kv_cache_bytes(replace(SHAPE, value_length=None), 512) is None
    assert compute_buffer_bytes(replace(SHAPE, feed_forward=None), 512) is not None


def file_with(values: dict[str, Any]) -> GgufFile:
    fields = {key: Field(kind="u32", item_kind=None, value=value) for key, value in values.items()}
    return GgufFile(
        path=Path("x"), version=3, alignment=32, fields=fields, tensors={}, data_offset=0, size_bytes=0
    )


def test_windows_of_layers() -> None:
    """llama.cpp's set_swa_pattern: of every group of n layers the last one sees everything."""
    base = {"block_count": 7, "attention.head_count": 2, "attention.sliding_window": 64}

    def windowed(architecture: str, **more: Any) -> tuple[bool, ...]:
        values = {f"{architecture}.{key}": value for key, value in (base | more).items()}
        return shape_of_gguf(file_with(values | {"general.architecture": architecture})).windowed

    assert windowed("gemma3") == (True,) * 5 + (False, True)
    assert windowed("gemma2") == (True, False) * 3 + (True,)
    assert windowed("llama") == (False,) * 7
    assert windowed("gemma3", **{"attention.sliding_window": 0}) == (False,) * 7
    assert windowed("gemma3", **{"attention.sliding_window_pattern": 2}) == (True, False) * 3 + (True,)
    assert windowed("new", **{"attention.sliding_window_pattern": [True, False]}) == (True,) + (False,) * 6


def test_sizes_that_differ_between_layers() -> None:
    shape = shape_of_gguf(file_with({
        "general.architecture": "openelm", "openelm.block_count": 3, "openelm.embedding_length": 64,
        "openelm.attention.head_count": [4, 8, 8], "openelm.attention.head_count_kv": [1, 2, 2],
        "openelm.feed_forward_length": [64, 128, 96], "openelm.attention.key_length": 16,
        "tokenizer.ggml.tokens": ["a", "b"],
    }))  # fmt: skip
    assert (shape.heads, shape.kv_heads, shape.feed_forward, shape.vocab_size) == (8, (1, 2, 2), 128, 2)


def test_mixture_of_experts_counts_the_experts_used() -> None:
    values = {"feed_forward_length": 100, "expert_used_count": 4, "expert_feed_forward_length": 50}
    fields = {"general.architecture": "moe"} | {f"moe.{key}": value for key, value in values.items()}
    assert shape_of_gguf(file_with(fields)).feed_forward == 200


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2**66) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)
KEYS = ("block_count", "embedding_length", "attention.head_count", "attention.head_count_kv", "context_length",
        "attention.key_length", "attention.value_length", "attention.sliding_window", "expert_used_count",
        "attention.sliding_window_pattern", "feed_forward_length", "expert_feed_forward_length",
        "vocab_size")  # fmt: skip
CONFIG_KEYS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
               "vocab_size", "max_position_embeddings", "sliding_window", "layer_types", "intermediate_size",
               "sliding_window_pattern", "model_type")  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    values=st.dictionaries(st.sampled_from(KEYS), VALUES), architecture=st.sampled_from(["gemma3", "llama"])
)
def test_any_metadata_gives_a_shape(values: dict[str, Any], architecture: str) -> None:
    fields = {f"{architecture}.{key}": value for key, value in values.items()}
    assert_sane(shape_of_gguf(file_with(fields | {"general.architecture": architecture})))


@settings(max_examples=300, deadline=None)
@given(
    config=st.dictionaries(st.sampled_from(CONFIG_KEYS), VALUES), model_type=st.sampled_from(["gemma2", "x"])
)
def test_any_config_gives_a_shape(config: dict[str, Any], model_type: str) -> None:
    assert_sane(shape_of_config({"model_type": model_type} | config))


def assert_sane(shape: Shape) -> None:
    assert len(shape.windowed) == (shape.layers or 0) <= MAX_LAYERS
    assert len(shape.kv_heads) in (0, shape.layers)
    for context in (1, 2048):
        for estimate in (kv_cache_bytes(shape, context), compute_buffer_bytes(shape, context)):
            assert estimate is None or (type(estimate) is int and estimate >= 0)
