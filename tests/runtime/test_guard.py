"""Values that make llama.cpp abort are refused before it sees them; mutants never end the process."""

from __future__ import annotations

import struct
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from edgeslm.errors import ModelError
from edgeslm.gguf_file import Field, GgufFile, read_gguf
from edgeslm.runtime.guard import can_tokenize, check_runnable

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def file(tiny_gguf: Path) -> GgufFile:
    return read_gguf(tiny_gguf)


def with_field(file: GgufFile, key: str, value: Any) -> GgufFile:
    return replace(file, fields={**file.fields, key: replace(file.fields[key], value=value)})


def test_a_sound_file_passes(file: GgufFile, smollm2_gguf: Path) -> None:
    check_runnable(file)
    check_runnable(read_gguf(smollm2_gguf))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("llama.block_count", 0, "block_count is 0"),
        ("llama.block_count", 513, "block_count is 513"),
        ("llama.block_count", "2", "block_count is '2'"),
        ("llama.attention.layer_norm_rms_epsilon", -1.0, "epsilon is -1.0"),
        ("llama.attention.layer_norm_rms_epsilon", float("nan"), "epsilon is nan"),
        ("tokenizer.ggml.tokens", ["a", "", "b", "", "a"], "token 'a' is in the vocabulary more than once"),
    ],
)
def test_metadata(file: GgufFile, key: str, value: Any, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        check_runnable(with_field(file, key, value))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("blk.0.attn_q.weight", "I32"), ("blk.1.ffn_up.weight", "Q8_K"), ("blk.0.attn_norm.weight", "F16"),
     ("token_embd.weight", "F64")],
)  # fmt: skip
def test_tensor_types(file: GgufFile, name: str, kind: str) -> None:
    tensors = {**file.tensors, name: replace(file.tensors[name], type=kind)}
    with pytest.raises(ModelError, match=f"tensor {name} has type {kind}"):
        check_runnable(replace(file, tensors=tensors))


def test_sentencepiece_needs_its_bytes(file: GgufFile) -> None:
    assert can_tokenize(file)
    spm = with_field(file, "tokenizer.ggml.model", "llama")
    assert not can_tokenize(spm)
    tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    assert can_tokenize(with_field(spm, "tokenizer.ggml.tokens", tokens))
    assert not can_tokenize(with_field(spm, "tokenizer.ggml.tokens", tokens[:-1]))
    plain = [chr(byte) for byte in range(128)] + tokens[128:]
    assert can_tokenize(with_field(spm, "tokenizer.ggml.tokens", plain))


TRY = """
import sys
from pathlib import Path
from edgeslm.errors import EdgeslmError
from edgeslm.runtime.llama import LlamaRunner
from edgeslm.runtime.runner import RunnerOptions
for path in sys.argv[1:]:
    try:
        runner = LlamaRunner(Path(path), RunnerOptions(context=64, threads=1))
        runner.prefill(runner.tokenize("the \\u00e9", add_special=True, parse_special=True) or [1])
        runner.step(5)
        runner.close()
        print(path, "runs", flush=True)
    except EdgeslmError as error:
        print(path, error, flush=True)
"""


def test_no_mutant_ends_the_process(tiny_gguf: Path, tmp_path: Path) -> None:
    """Every number of the metadata, set to its extremes: an answer or an error, never a signal."""
    pytest.importorskip("llama_cpp")
    data, fields = tiny_gguf.read_bytes(), read_gguf(tiny_gguf).fields
    mutants = []
    for key, field in fields.items():
        for number, value in enumerate(_extremes(field)):
            place = data.index(struct.pack("<Q", len(key)) + key.encode()) + 8 + len(key) + 4
            mutants.append(tmp_path / f"{key}-{number}.gguf")
            mutants[-1].write_bytes(data[:place] + value + data[place + len(value) :])
    assert len(mutants) > 50
    result = subprocess.run(
        [sys.executable, "-c", TRY, *mutants], capture_output=True, text=True, timeout=280, check=False
    )
    lines = result.stdout.splitlines()
    assert result.returncode == 0, f"{mutants[len(lines)]}: {result.stderr[-300:]}"
    assert len(lines) == len(mutants)


def _extremes(field: Field) -> list[bytes]:
    if field.kind == "u32":
        return [struct.pack("<I", value) for value in (0, 1, 7, 255, 65536, 2**31 - 1, 2**31, 2**32 - 1)]
    if field.kind == "f32":
        return [struct.pack("<f", value) for value in (0.0, -1.0, 1e30, float("nan"), float("inf"))]
    return []
