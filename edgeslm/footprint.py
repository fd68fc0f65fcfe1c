"""The memory that a model takes in llama.cpp besides its weights: key-value cache and compute buffer.

A Shape comes from the metadata of a GGUF file or from a config.json, both of them untrusted: a number
that is missing or makes no sense is None, and so is what depends on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgeslm.gguf_file import GgufFile

UBATCH_TOKENS = 512
"""Most tokens that the runner computes at once unless told otherwise (llama.cpp n_ubatch)."""
CELL_TOKENS = 256
"""llama.cpp rounds the cells of a cache up to a multiple of this."""
MAX_NUMBER = 2**40
MAX_LAYERS = 4096
"""Larger numbers describe no model."""

WINDOW_PATTERNS = {"gemma2": 2, "gemma3": 6, "gemma3n": 5, "olmo2": 4, "cohere2": 4, "gpt-oss": 2}
"""Architectures whose layers have a sliding window, but for the last of each group of so many
(llama.cpp src/models/*.cpp, load_swa_pattern); any other is taken to attend to everything."""

HF_ARCHITECTURES = {
    "gemma3_text": "gemma3",
    "gemma3n_text": "gemma3n",
    "olmo3": "olmo2",
    "gpt_oss": "gpt-oss",
}
"""model_type of config.json to llama.cpp's name, where they differ and WINDOW_PATTERNS has it."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The sizes of a transformer that decide its memory; None, or no layers, where unknown."""

    context_length: int | None
    """The context that it was trained for, in tokens."""
    hidden_size: int | None
    layers: int | None
    heads: int | None
    kv_heads: tuple[int, ...]
    """Of each layer."""
    key_length: int | None
    value_length: int | None
    feed_forward: int | None
    vocab_size: int | None
    window: int | None
    """Tokens that a layer with a sliding window sees."""
    windowed: tuple[bool, ...]
    """Whether each layer has the window."""


def shape_of_gguf(file: GgufFile) -> Shape:
    """The keys of gguf-py's constants.py, under the name of the architecture."""

    def get(key: str) -> Any:
        return file.get(f"{file.architecture}.{key}")

    layers, hidden = _layers(get("block_count")), number(get("embedding_length"))
    heads = _largest(get("attention.head_count"))
    kv_heads = get("attention.head_count_kv")
    key_length = number(get("attention.key_length")) or (hidden // heads if hidden and heads else None)
    experts = (number(get("expert_used_count")) or 0) * (number(get("expert_feed_forward_length")) or 0)
    tokens = file.get("tokenizer.ggml.tokens")
    window = number(get("attention.sliding_window")) or None
    pattern = get("attention.sliding_window_pattern")
    if not isinstance(pattern, list):
        pattern = number(pattern) or WINDOW_PATTERNS.get(file.architecture)
    return Shape(
        context_length=number(get("context_length")),
        hidden_size=hidden,
        layers=layers,
        heads=heads,
        kv_heads=_of_each_layer(heads if kv_heads is None else kv_heads, layers),
        key_length=key_length,
        value_length=number(get("attention.value_length")) or key_length,
        feed_forward=max(_largest(get("feed_forward_length")) or 0, experts) or None,
        vocab_size=len(tokens) if isinstance(tokens, list) else number(get("vocab_size")),
        window=window if pattern else None,
        windowed=_windowed(pattern if window else None, layers),
    )


def shape_of_config(config: Mapping[str, Any]) -> Shape:
    """The names that transformers' configurations share."""

    def get(key: str) -> int | None:
        return _largest(config.get(key))

    layers, hidden, heads = (
        _layers(config.get("num_hidden_layers")),
        get("hidden_size"),
        get("num_attention_heads"),
    )
    kv_heads = config.get("num_key_value_heads")
    head_dim = get("head_dim") or (hidden // heads if hidden and heads else None)
    model_type = str(config.get("model_type"))
    pattern: Any = WINDOW_PATTERNS.get(HF_ARCHITECTURES.get(model_type, model_type))
    window = get("sliding_window") if pattern else None
    if isinstance(config.get("layer_types"), list):
        pattern = [kind == "sliding_attention" for kind in config["layer_types"]]
    return Shape(
        context_length=get("max_position_embeddings"),
        hidden_size=hidden,
        layers=layers,
        heads=heads,
        kv_heads=_of_each_layer(heads if kv_heads is None else kv_heads, layers),
        key_length=head_dim,
        value_length=head_dim,
        feed_forward=get("intermediate_size"),
        vocab_size=get("vocab_size"),
        window=window or None,
        windowed=_windowed(pattern if window else None, layers),
    )


def kv_cache_bytes(shape: Shape, context: int, ubatch: int = UBATCH_TOKENS) -> int | None:
    """Bytes of an f16 cache of `context` tokens; a layer with a window keeps the window and one batch."""
    if not shape.kv_heads or shape.key_length is None or shape.value_length is None:
        return None
    cells, window_cells = _cells(shape, context, ubatch)
    total = sum(
        heads * (window_cells if windowed else cells)
        for heads, windowed in zip(shape.kv_heads, shape.windowed, strict=True)
    )
    return 2 * (shape.key_length + shape.value_length) * total


def compute_buffer_bytes(shape: Shape, context: int, ubatch: int = UBATCH_TOKENS) -> int | None:
    """Bytes of llama.cpp's compute buffer with flash attention: the largest set of tensors alive at once.

    In float32 for each token of a full batch, all of which have logits (llama-context.cpp,
    sched_reserve).  The head: logits and twice the hidden state.  The feed-forward layer: gate, up and
    their product, and three times the hidden state.  Attention: hidden state, queries, keys and values.
    The mask, an f16 for every cell, is alive in the layers only.  Over shapes and contexts the result
    is 8 % below to 19 % above what llama.cpp reports.
    """
    sizes = (shape.hidden_size, shape.heads, shape.key_length, shape.vocab_size)
    hidden, heads, key_length, vocab = (size or 0 for size in sizes)
    if None in sizes or not shape.kv_heads:
        return None
    queries, keys = heads * key_length, max(shape.kv_heads) * key_length
    cells, window_cells = _cells(shape, context, ubatch)
    masks = (cells + (window_cells if any(shape.windowed) else 0)) / 2
    attention = masks + 2 * queries + max(3 * hidden, 2 * hidden + 2 * keys)
    feed_forward = masks + 3 * (shape.feed_forward or 0) + 3 * hidden
    inputs = 5  # token, position, indices of output, keys and values
    return round(4 * min(context, ubatch) * (inputs + max(vocab + 2 * hidden, feed_forward, attention)))


def number(value: Any) -> int | None:
    """A whole number as metadata holds it; None for anything else, truth values included."""
    return value if type(value) is int and 0 <= value < MAX_NUMBER else None


def _layers(value: Any) -> int | None:
    layers = number(value)
    return None if layers is None or layers > MAX_LAYERS else layers


def _largest(value: Any) -> int | None:
    """One number, or the largest of a list with one for each layer."""
    if isinstance(value, list):
        return max((item for item in map(number, value) if item is not None), default=None)
    return number(value)


def _of_each_layer(value: Any, layers: int | None) -> tuple[int, ...]:
    if layers is None:
        return ()
    values = value if isinstance(value, list) else [value] * layers
    known = tuple(item for item in map(number, values) if item is not None)
    return known if len(known) == layers else ()


def _windowed(pattern: Sequence[Any] | int | None, layers: int | None) -> tuple[bool, ...]:
    """Which layers have a window: as listed, or all but the last of each `pattern` layers."""
    if layers is None or not pattern:
        return (False,) * (layers or 0)
    if isinstance(pattern, int):
        return tuple(layer % pattern < pattern - 1 for layer in range(layers))
    return tuple(layer < len(pattern) and pattern[layer] is True for layer in range(layers))


def _cells(shape: Shape, context: int, ubatch: int) -> tuple[int, int]:
    """Cells of a layer that sees everything and of one with a window (llama-kv-cache-iswa.cpp)."""

    def padded(tokens: int) -> int:
        return -(-tokens // CELL_TOKENS) * CELL_TOKENS

    cells = padded(context)
    if shape.window is None:
        return cells, cells
    return cells, min(cells, padded(shape.window + min(context, ubatch)))
