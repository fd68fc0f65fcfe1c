"""Exports against their oracles: torch for logits, tokenizers for text, llama.cpp's own quantizer for bytes."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgeslm.errors import EdgeslmError, ModelError, RecipeError
from edgeslm.gguf_file import read_gguf, tensor_bytes
from edgeslm.specs import QuantizeSpec
from edgeslm.stages import export_gguf
from edgeslm.stages.checkpoint import Checkpoint, resolve
from edgeslm.stages.plan import PRESETS
from tests.conftest import write_tiny_gguf
from tests.models import FAMILIES, HOSTILE_TEXTS, write_hf_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.workstation

ROPE_LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 64}  # fmt: skip
ROPE_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
ROPE_LONG = {"type": "longrope", "long_factor": [1.5] * 8, "short_factor": [1.1] * 8}
FOURTH = {"no_rope_layer_interval": 4}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, FOURTH | {"layers": 5} if family == "smollm3" else {}) for family in FAMILIES),
    ("llama", {"tied": False, "head_dim": 32}),
    ("llama", {"dtype": "bfloat16", "hidden": 96, "attention_bias": True, "mlp_bias": True}),
    ("llama", {"rope_scaling": ROPE_LLAMA3, "dtype": "float16"}),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    ("qwen2", {"rope_scaling": ROPE_YARN, "tied": False}),
    ("phi3", {"rope_scaling": ROPE_LONG, "context": 2048}),
    ("gemma3_text", {"layers": 8, "sliding_window_pattern": 3, "tied": False}),
    ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}),
    ("gemma2", {"rope_theta": 50000.0}),
    ("llama", {"tokenizer": "smollm"}),
    ("llama", {"tokenizer": "gpt2"}),
    ("llama", {"tokenizer": "mistral"}),
    ("qwen3", {"hidden": 576, "intermediate": 64, "heads": 9, "kv_heads": 3}),
]


def export(source: Path, out: Path, **spec: Any) -> export_gguf.Exported:
    return export_gguf.run(resolve(str(source)), QuantizeSpec(**spec), out)


def runner(path: Path) -> Any:
    from edgeslm.runtime.llama import LlamaRunner
    from edgeslm.runtime.runner import RunnerOptions

    return LlamaRunner(path, RunnerOptions(context=256, threads=2, kv_type="f32", flash_attention=False))


@pytest.mark.parametrize(("family", "settings"), VARIANTS, ids=lambda value: str(value)[:40])
def test_logits_and_tokens_agree_with_torch(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    import torch
    import transformers

    source = write_hf_model(tmp_path / "model", family, **settings)
    export(source, tmp_path / "model.gguf", scheme="F32")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    # Long enough for every sliding window of the fixtures, within what llama.cpp attends to.
    ids = np.random.default_rng(0).integers(3, model.config.vocab_size, 100).tolist()
    with torch.no_grad():
        wanted = model(torch.tensor([ids])).logits[0].numpy()
    engine = runner(tmp_path / "model.gguf")
    got = engine.logits(ids)
    # llama.cpp's GELU reads a table of 16-bit floats, which Gemma's logits show.
    tolerance = 1e-3 if "gemma" in family else 1e-5
    np.testing.assert_allclose(got, wanted, atol=tolerance * np.abs(wanted).max(), rtol=0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    for index, text in enumerate(HOSTILE_TEXTS):
        if (family.startswith("qwen") and index == 8) or (family == "phi3" and index == 11):
            # llama.cpp does not compose characters (NFC); it strips after Phi-3's special tokens by the model's name.
            continue
        assert engine.tokenize(text, add_special=True, parse_special=True) == tokenizer.encode(text), text
    engine.close()


@pytest.mark.parametrize("family", ["mistral", "gemma2", "phi3"])
def test_sentencepiece_out_of_tokenizer_json_alone(family: str, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    source = write_hf_model(tmp_path / "model", family)
    (source / "tokenizer.model").unlink()
    export(source, tmp_path / "model.gguf", scheme="F32")
    engine, tokenizer = runner(tmp_path / "model.gguf"), Tokenizer.from_file(str(source / "tokenizer.json"))
    for index, text in enumerate(HOSTILE_TEXTS):
        if family == "phi3" and index == 11:
            continue
        assert engine.tokenize(text, add_special=True, parse_special=True) == tokenizer.encode(text).ids, text
    engine.close()


class _Quantizer:
    """llama_model_quantize of the same libllama, in this process."""

    def __init__(self) -> None:
        from edgeslm.runtime.engine import load_engine

        self.api = load_engine().api

    def __call__(self, source: Path, out: Path, file_type: int, importance: dict[str, Any]) -> Path:
        class Entry(ctypes.Structure):
            _fields_ = (
                ("name", ctypes.c_char_p),
                ("data", ctypes.POINTER(ctypes.c_float)),
                ("size", ctypes.c_size_t),
            )

        parameters = self.api.llama_model_quantize_default_params()
        parameters.ftype, parameters.nthread = file_type, 2
        entries = (Entry * (len(importance) + 1))()
        for entry, (name, values) in zip(entries, importance.items(), strict=False):
            entry.name, entry.size = name.encode(), values.size
            entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        if importance:
            parameters.imatrix = ctypes.cast(entries, type(parameters.imatrix))
        assert (
            self.api.llama_model_quantize(str(source).encode(), str(out).encode(), ctypes.byref(parameters))
            == 0
        )
        return out


@pytest.fixture(scope="module")
def quantizer() -> _Quantizer:
    return _Quantizer()


def assert_same_tensors(got: Path, wanted: Path) -> None:
    ours, theirs = read_gguf(got), read_gguf(wanted)
    assert set(ours.tensors) == set(theirs.tensors)
    for name, info in theirs.tensors.items():
        mine = ours.tensors[name]
        assert (mine.type, mine.shape) == (info.type, info.shape), name
        assert np.array_equal(tensor_bytes(ours, mine), tensor_bytes(theirs, info)), name


SHAPES = {
    "256": {"layers": 16, "hidden": 256, "heads": 8, "kv_heads": 2, "intermediate": 256, "tied": False},
    "288": {"layers": 9, "hidden": 288, "heads": 9, "kv_heads": 3, "intermediate": 256},
    "96": {"layers": 3, "hidden": 96, "heads": 4, "kv_heads": 4, "intermediate": 96},
    "48": {"layers": 2, "hidden": 48, "heads": 4, "kv_heads": 2, "intermediate": 80},
}


@pytest.mark.parametrize("weighed", [False, True], ids=["plain", "importance"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_preset_is_llama_quantizes_bit_for_bit(
    shape: str, weighed: bool, tmp_path: Path, quantizer: _Quantizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_tiny_gguf(tmp_path / "source.gguf", **SHAPES[shape])
    random = np.random.default_rng(1)
    importance: dict[str, Any] = {}
    if weighed:
        importance = {
            name: random.exponential(size=info.shape[-1]).astype(np.float32)
            for name, info in read_gguf(source).tensors.items()
            if len(info.shape) == 2
        }
    monkeypatch.setattr(export_gguf, "_load_importance", lambda _: importance)
    # A slab of a few rows, so that a wrong slab end shows.
    monkeypatch.setattr("edgeslm.stages.tensors.SLAB_ELEMENTS", 20_000)
    for scheme, (_, file_type) in PRESETS.items():
        wanted = quantizer(source, tmp_path / "wanted.gguf", file_type, importance)
        result = export(source, tmp_path / "got.gguf", scheme=scheme)
        assert_same_tensors(tmp_path / "got.gguf", wanted)
        assert read_gguf(tmp_path / "got.gguf").get("general.file_type") == file_type
        weights = read_gguf(wanted).tensors.values()
        bits = 8 * sum(w.nbytes for w in weights) / sum(w.parameters for w in weights)
        assert result.plan["bits_per_weight"] == pytest.approx(bits)


def test_metadata_of_a_gguf_source_is_carried_over(tmp_path: Path) -> None:
    source = write_tiny_gguf(tmp_path / "source.gguf")
    export(source, tmp_path / "out.gguf", scheme="Q8_0")
    before, after = read_gguf(source), read_gguf(tmp_path / "out.gguf")
    changed = {"general.file_type", "general.quantization_version"}
    assert {k: v for k, v in after.fields.items() if k not in changed} == {
        k: v for k, v in before.fields.items() if k not in changed
    }


def test_same_inputs_same_bytes(tmp_path: Path) -> None:
    source = write_hf_model(tmp_path / "model", "llama")
    for name in ("a.gguf", "b.gguf"):
        export(source, tmp_path / name, scheme="Q4_0")
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_shards_give_the_same_file_as_one(tmp_path: Path) -> None:
    one = write_hf_model(tmp_path / "one" / "model", "qwen2")
    many = write_hf_model(tmp_path / "many" / "model", "qwen2", max_shard_size="60KB")
    assert len(list(many.glob("*.safetensors"))) > 1
    export(one, tmp_path / "one.gguf", scheme="F16")
    export(many, tmp_path / "many.gguf", scheme="F16")
    assert_same_tensors(tmp_path / "many.gguf", tmp_path / "one.gguf")


def test_overrides_by_pattern_and_fallbacks_are_in_the_record(tmp_path: Path) -> None:
    source = write_hf_model(tmp_path / "model", "llama", hidden=96, heads=4, intermediate=256)
    result = export(
        source,
        tmp_path / "out.gguf",
        scheme="Q4_K_M",
        types=(("ffn_down", "Q6_K"), (r"blk\.0\.attn_q", "Q8_0")),
    )
    tensors = read_gguf(tmp_path / "out.gguf").tensors
    assert tensors["blk.1.ffn_down.weight"].type == "Q6_K"
    assert tensors["blk.0.attn_q.weight"].type == "Q8_0"
    assert tensors["blk.1.attn_q.weight"].type == "Q5_0"
    fallback = next(f for f in result.plan["fallbacks"] if f["tensor"] == "blk.1.attn_q.weight")
    assert (fallback["wanted"], fallback["got"]) == ("Q4_K", "Q5_0")
    assert (fallback["wanted_bits"], fallback["got_bits"]) == (4.5, 5.5)
    assert "96" in fallback["reason"]


def test_a_stored_copy_of_a_tied_head_is_left_out(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    source = write_hf_model(tmp_path / "model", "llama", tied=True)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    result = export(source, tmp_path / "out.gguf", scheme="F16")
    assert "output.weight" not in read_gguf(tmp_path / "out.gguf").tensors
    assert any("tied head" in warning for warning in result.warnings)


def test_olmo2_gets_the_head_that_llama_cpp_needs(tmp_path: Path) -> None:
    result = export(
        write_hf_model(tmp_path / "model", "olmo2", tied=True), tmp_path / "out.gguf", scheme="F16"
    )
    assert "output.weight" in read_gguf(tmp_path / "out.gguf").tensors
    assert any("written twice" in warning for warning in result.warnings)


# --- what must fail, clearly, and leave nothing ---


def edit_json(path: Path, **changes: Any) -> None:
    document = json.loads(path.read_text())
    path.write_text(json.dumps({**document, **changes}))


def poison(source: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = np.nan
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


def overflow(source: Path) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 1e6
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})


def truncate(source: Path) -> None:
    file = source / "model.safetensors"
    os.truncate(file, file.stat().st_size - 100)


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "NaN": (poison, "blk.1.ffn_up.weight has 1 values"),
    "overflow of 16 bits": (overflow, "blk.1.ffn_up.weight.*F16"),
    "truncated": (truncate, "safetensors"),
    "no tokenizer": (lambda d: (d / "tokenizer.json").unlink(), "no tokenizer"),
    "broken tokenizer": (lambda d: (d / "tokenizer.json").write_text("{"), "tokenizer.json"),
    "unknown architecture": (
        lambda d: edit_json(d / "config.json", architectures=["MambaForCausalLM"]), "LlamaForCausalLM.*Olmo2"
    ),
    "quantized": (lambda d: edit_json(d / "config.json", quantization_config={"quant_method": "gptq"}), "gptq"),
    "no hidden size": (lambda d: edit_json(d / "config.json", hidden_size=None), "hidden_size"),
    "fewer layers": (lambda d: edit_json(d / "config.json", num_hidden_layers=1), "layers.1"),
    "more layers": (lambda d: edit_json(d / "config.json", num_hidden_layers=3), "blk.2"),
    "other vocabulary": (lambda d: edit_json(d / "config.json", vocab_size=9999), "9999"),
    "unknown rope": (
        lambda d: edit_json(d / "config.json", rope_scaling={"rope_type": "dynamic", "factor": 2.0}), "dynamic"
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_the_source_are_one_clear_error(fault: str, tmp_path: Path) -> None:
    break_it, pattern = FAULTS[fault]
    source = write_hf_model(tmp_path / "model", "llama")
    break_it(source)
    out = tmp_path / "out" / "model.gguf"
    with pytest.raises(ModelError, match=pattern):
        export(source, out, scheme="F16")
    assert not out.parent.exists() or not list(out.parent.iterdir())


@pytest.mark.parametrize(
    ("spec", "pattern"),
    [
        ({"scheme": "Q4_K_L"}, "Q4_K_"),
        ({"types": (("ffn_downn", "Q8_0"),)}, "ffn_downn.*matches none"),
        ({"types": (("ffn_down", "Q9_0"),)}, "Q9_0"),
        ({"types": (("ffn_(down", "Q8_0"),)}, "not a regular expression"),
    ],
)
def test_mistakes_of_the_user_are_one_clear_error(spec: dict[str, Any], pattern: str, tmp_path: Path) -> None:
    source = write_tiny_gguf(tmp_path / "tiny.gguf")
    with pytest.raises(RecipeError, match=pattern):
        export(source, tmp_path / "out.gguf", **spec)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.gguf"]


def test_biases_that_llama_cpp_cannot_load_are_refused(tmp_path: Path) -> None:
    source = write_hf_model(tmp_path / "model", "qwen3", attention_bias=True)
    with pytest.raises(ModelError, match=r"attn_output.bias and 1 more"):
        export(source, tmp_path / "out.gguf", scheme="F16")


def test_keep_going_leaves_the_bad_tensor_in_f32(tmp_path: Path) -> None:
    source = write_hf_model(tmp_path / "model", "llama")
    poison(source)
    result = export(source, tmp_path / "out.gguf", scheme="Q8_0", keep_going=True)
    tensors = read_gguf(tmp_path / "out.gguf").tensors
    assert tensors["blk.1.ffn_up.weight"].type == "F32"
    assert tensors["blk.0.ffn_up.weight"].type == "Q8_0"
    assert any("blk.1.ffn_up.weight" in warning for warning in result.warnings)


def test_importance_of_another_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_tiny_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(
        export_gguf, "_load_importance", lambda _: {"blk.0.attn_q.weight": np.ones(32, np.float32)}
    )
    with pytest.raises(ModelError, match="32 channels"):
        export(source, tmp_path / "out.gguf", scheme="Q4_0")


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_tiny_gguf(tmp_path / "tiny.gguf")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(EdgeslmError, match="MiB: No space left"):
        export(source, tmp_path / "out.gguf", scheme="Q4_0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.gguf"]


def test_interrupt_leaves_nothing_and_kill_leaves_no_whole_file(tmp_path: Path) -> None:
    source = write_tiny_gguf(tmp_path / "tiny.gguf", layers=24, hidden=512, heads=8, intermediate=1024)
    code = (
        "import sys; from pathlib import Path; from edgeslm.stages import export_gguf;"
        "from edgeslm.stages.checkpoint import resolve; from edgeslm.specs import QuantizeSpec;"
        "print('go', flush=True);"
        "export_gguf.run(resolve(sys.argv[1]), QuantizeSpec(scheme='Q4_K_M'), Path(sys.argv[2]), threads=1)"
    )
    for number, left in ((signal.SIGINT, 0), (signal.SIGKILL, None)):
        out = tmp_path / f"out-{number}" / "model.gguf"
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(source), str(out)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert process.stdout is not None
        process.stdout.readline()
        deadline = time.monotonic() + 30
        while not (out.parent.exists() and list(out.parent.iterdir())) and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(number)
        process.wait(timeout=60)
        assert not out.exists()
        if left is not None:
            assert len(list(out.parent.iterdir())) == left
        shutil.rmtree(out.parent)


def test_memory_is_bounded_by_slabs_not_by_the_model(tmp_path: Path) -> None:
    source = write_tiny_gguf(tmp_path / "tiny.gguf", layers=8, hidden=1024, heads=8, intermediate=4096)
    size = source.stat().st_size
    assert size > 350e6
    code = (
        "import sys, resource; from pathlib import Path; from edgeslm.stages import export_gguf;"
        "from edgeslm.stages.checkpoint import Checkpoint; from edgeslm.specs import QuantizeSpec;"
        "import gguf; before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "c = Checkpoint(path=Path(sys.argv[1]), kind='gguf', name='x', source='x');"
        "export_gguf.run(c, QuantizeSpec(scheme='Q8_0'), Path(sys.argv[2]), threads=2);"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(source), str(tmp_path / "out.gguf")],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert int(done.stdout) < 120e6


def test_checkpoint_kinds_share_the_export(tmp_path: Path) -> None:
    """A Hugging Face directory and the F32 file made of it quantize to the same tensors."""
    source = write_hf_model(tmp_path / "model", "granite", hidden=256, heads=4, intermediate=256)
    export(source, tmp_path / "f32.gguf", scheme="F32")
    export(source, tmp_path / "direct.gguf", scheme="Q4_K_M")
    via = Checkpoint(path=tmp_path / "f32.gguf", kind="gguf", name="f32", source="f32.gguf")
    export_gguf.run(via, QuantizeSpec(scheme="Q4_K_M"), tmp_path / "via.gguf")
    assert_same_tensors(tmp_path / "direct.gguf", tmp_path / "via.gguf")
