"""Tiny ONNX language models and their bundles, written byte by byte, with what they compute by hand.

One shares the buffers of past and present, as com.microsoft:GroupQueryAttention does; the other hands its
present on, as optimum's graphs do.

B batch, S tokens, P tokens before them, T both, V vocabulary, E width, H heads, D their size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.bundle import write_bundle
from tests.conftest import CHAT_TEMPLATE, SPECIAL_TOKENS, byte_alphabet
from tests.onnx_models import field, graph, node, tensor, value_info

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from edgeslm.bundle import Bundle

V, E, H, D, CONTEXT = 259, 16, 2, 8, 64
_FLOAT, _INT32, _INT64 = 1, 6, 7
_END = 2**63 - 1


def tokenizer_json() -> str:
    """256 bytes behind the special tokens, no merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = [*SPECIAL_TOKENS, *byte_alphabet().values()]
    raw = Tokenizer(models.BPE({piece: token for token, piece in enumerate(pieces)}, []))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(list(SPECIAL_TOKENS))
    return str(raw.to_str())


def weights(seed: int = 0) -> dict[str, NDArray[np.float32]]:
    random = np.random.default_rng(seed)
    shapes = {"embedding": (V, E), "places": (CONTEXT, E), "q": (E, H * D), "k": (E, D), "v": (E, D),
              "o": (H * D, E), "head": (E, V)}  # fmt: skip
    return {name: random.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def shared_graph(*, first_logit: bool = True, seed: int = 0, extra_input: bool = False) -> bytes:
    """One layer of attention, two heads on one pair of keys and values, in place."""
    held = weights(seed)
    attention = ("queries", "keys", "values", *(f"past_key_values.0.{part}" for part in ("key", "value")),
                 "before", "total")  # fmt: skip
    nodes = [
        node("Gather", ("embedding", "input_ids"), "vectors", axis=0),
        node("MatMul", ("vectors", "q"), "queries"),
        node("MatMul", ("vectors", "k"), "keys"),
        node("MatMul", ("vectors", "v"), "values"),
        node("ReduceSum", ("attention_mask", "one"), "counted", keepdims=1),
        node("Sub", ("counted", "one"), "last"),
        node("Cast", ("last",), "before", to=_INT32),
        node("Shape", ("attention_mask",), "extents"),
        node("Gather", ("extents", "second"), "wide", axis=0),
        node("Cast", ("wide",), "total", to=_INT32),
        node("GroupQueryAttention", attention, "mixed", num_heads=H, kv_num_heads=1)
        + b"".join(field(2, f"present.0.{part}") for part in ("key", "value"))
        + field(7, "com.microsoft"),
        node("MatMul", ("mixed", "o"), "added"),
        node("Add", ("vectors", "added"), "hidden"),
    ]
    kept = "hidden"
    if first_logit:
        nodes.append(node("Slice", ("hidden", "first_logit", "end", "one"), "rows"))
        kept = "rows"
    nodes.append(node("MatMul", (kept, "head"), "logits"))
    numbers = {"one": [1], "end": [_END]} | ({"first_logit": [0]} if first_logit else {})
    tensors = [tensor(name, held[name]) for name in ("embedding", "q", "k", "v", "o", "head")]
    tensors += [tensor(name, np.asarray(value, np.int64)) for name, value in numbers.items()]
    tensors.append(tensor("second", np.asarray(1, np.int64)))
    inputs = [*_inputs("key", "value", heads=1, size=D)]
    inputs += [value_info("first_logit", _INT64, (1,))] if first_logit else []
    inputs += [value_info("token_type_ids", _INT64, ("batch", "sequence"))] if extra_input else []
    return _model(nodes, tensors, inputs, size=D)


def handed_graph(seed: int = 0) -> bytes:
    """Running sums over all tokens; the cache grows by a copy, positions are given."""
    held = weights(seed)
    nodes = [
        node("Gather", ("embedding", "input_ids"), "vectors", axis=0),
        node("Gather", ("places", "position_ids"), "placed", axis=0),
        node("Add", ("vectors", "placed"), "positioned"),
    ]
    for part, source in (("key", "vectors"), ("value", "positioned")):
        nodes += [
            node("Unsqueeze", (source, "one"), f"new_{part}"),
            node("Concat", (f"past_key_values.0.{part}", f"new_{part}"), f"present.0.{part}", axis=2),
            node("CumSum", (f"present.0.{part}", "axis"), f"sums_{part}"),
            node("Shape", (f"past_key_values.0.{part}",), f"extents_{part}"),
            node("Slice", (f"extents_{part}", "two", "three"), f"past_{part}"),
            node("Slice", (f"sums_{part}", f"past_{part}", "end", "two"), f"own_{part}"),
            node("Squeeze", (f"own_{part}", "one"), f"sum_{part}"),
        ]
    nodes += [
        node("Mul", ("sum_key", "sum_value"), "hidden"),
        node("MatMul", ("hidden", "head"), "logits"),
    ]
    numbers = {"one": [1], "two": [2], "three": [3], "end": [_END]}
    tensors = [tensor(name, held[name]) for name in ("embedding", "places", "head")]
    tensors += [tensor(name, np.asarray(value, np.int64)) for name, value in numbers.items()]
    tensors.append(tensor("axis", np.asarray(2, np.int64)))
    inputs = [
        *_inputs("key", "value", heads=1, size=E),
        value_info("position_ids", _INT64, ("batch", "sequence")),
    ]
    return _model(nodes, tensors, inputs, size=E)


def _inputs(*parts: str, heads: int, size: int) -> list[bytes]:
    cached = [
        value_info(f"past_key_values.0.{part}", _FLOAT, ("batch", heads, "past", size)) for part in parts
    ]
    return [
        value_info("input_ids", _INT64, ("batch", "sequence")),
        value_info("attention_mask", _INT64, ("batch", "total")),
        *cached,
    ]


def _model(nodes: list[bytes], tensors: list[bytes], inputs: list[bytes], *, size: int) -> bytes:
    outputs = [value_info("logits", _FLOAT, ("batch", "rows", V))]
    outputs += [
        value_info(f"present.0.{part}", _FLOAT, ("batch", 1, "total", size)) for part in ("key", "value")
    ]
    domains = (("", 17), ("com.microsoft", 1))
    sets = b"".join(field(8, field(1, domain) + field(2, version)) for domain, version in domains)
    return field(1, 8) + field(2, "hand") + field(7, graph(nodes, tensors, inputs, outputs)) + sets


GRAPHS = {"shared": shared_graph, "handed": handed_graph}


def expected_logits(kind: str, tokens: list[int], seed: int = 0) -> NDArray[np.float64]:
    """[S, V] of a sequence, in float64."""
    held = {name: value.astype(np.float64) for name, value in weights(seed).items()}
    vectors = held["embedding"][tokens]
    if kind == "handed":
        positioned = vectors + held["places"][: len(tokens)]
        return np.asarray((vectors.cumsum(axis=0) * positioned.cumsum(axis=0)) @ held["head"])
    queries, keys, values = (vectors @ held[name] for name in "qkv")
    mixed = []
    for head in range(H):
        scores = queries[:, head * D :][:, :D] @ keys.T / np.sqrt(D)
        scores[np.triu_indices(len(tokens), 1)] = -np.inf
        shares = np.exp(scores - scores.max(axis=1, keepdims=True))
        mixed.append(shares / shares.sum(axis=1, keepdims=True) @ values)
    return np.asarray((vectors + np.concatenate(mixed, axis=1) @ held["o"]) @ held["head"])


def manifest(**changes: Any) -> dict[str, Any]:
    parameters = 2 * V * E + 2 * E * H * D + 2 * E * D
    model = {
        "architecture": "hand", "parameters": parameters, "context_length": CONTEXT, "vocab_size": V,
        "tokenizer": "BPE", "bos_token": 1, "eos_token": 2, "adds_bos": False, "stop_tokens": [0, 2], "layers": 1,
        "kv_heads": 1, "head_dim": D, "opset": 17, "ir_version": 8, "source": "hand", "source_sha256": "77" * 32,
    }  # fmt: skip
    types = {"F32": {"tensors": 6, "parameters": parameters, "bytes": 4 * parameters}}
    return {
        "name": "tiny-decoder",
        "task": "causal-lm",
        "format": "onnx",
        "weights": "model.onnx",
        "model": model | changes,
        "quantization": {"scheme": "F32", "bits_per_weight": 32.0, "importance": None, "types": types,
                         "fallbacks": []},
    }  # fmt: skip


def write_decoder(out: Path, kind: str = "shared", *, data: bytes | None = None, **changes: Any) -> Bundle:
    """A bundle.  data: another graph; changes: of the manifest's model."""
    files = {
        "model.onnx": GRAPHS[kind]() if data is None else data,
        "tokenizer.json": tokenizer_json(),
        "chat_template.jinja": CHAT_TEMPLATE,
    }
    return write_bundle(out, files=files, manifest=manifest(**changes))
