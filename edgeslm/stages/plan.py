"""Which type each tensor of a GGUF file gets: a preset's rules, overrides, and the fallbacks said aloud.

The rules are llama-quantize's for dense decoders (llama.cpp src/llama-quant.cpp, llama_tensor_get_type
and tensor_type_fallback).  What is added here is the account: which tensor could not have the type
that the preset wanted, and what the replacement costs in bits per weight.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from edgeslm.errors import RecipeError
from edgeslm.gguf_file import GGML_TYPES, row_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

# Preset: (type of the bulk of the weights, llama.cpp's llama_ftype).
PRESETS: dict[str, tuple[str, int]] = {
    "F32": ("F32", 0), "F16": ("F16", 1), "BF16": ("BF16", 32),
    "Q8_0": ("Q8_0", 7), "Q6_K": ("Q6_K", 18),
    "Q5_K_M": ("Q5_K", 17), "Q5_K_S": ("Q5_K", 16), "Q5_1": ("Q5_1", 9), "Q5_0": ("Q5_0", 8),
    "Q4_K_M": ("Q4_K", 15), "Q4_K_S": ("Q4_K", 14), "Q4_1": ("Q4_1", 3), "Q4_0": ("Q4_0", 2),
    "IQ4_NL": ("IQ4_NL", 25), "IQ4_XS": ("IQ4_XS", 30),
    "Q3_K_L": ("Q3_K", 13), "Q3_K_M": ("Q3_K", 12), "Q3_K_S": ("Q3_K", 11), "Q2_K": ("Q2_K", 10),
}  # fmt: skip
# The names that llama-quantize accepts for its middle-sized presets.
ALIASES = {"Q5_K": "Q5_K_M", "Q4_K": "Q4_K_M", "Q3_K": "Q3_K_M"}
TYPES = ("F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q3_K", "Q2_K", "Q5_0", "Q5_1", "Q4_0", "Q4_1",
         "IQ4_NL", "IQ4_XS")  # fmt: skip
FLOATS = ("F32", "F16", "BF16")
# A 256-block type and the 32-block type that stands in for it; the shape decides, not the quality.
FALLBACKS = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "IQ4_XS": "IQ4_NL",
}

# Parts of the names of two-dimensional tensors that stay as they are: routers, convolutions,
# positions and recurrences (tensor_allows_quantization of llama-quant.cpp).
_KEPT = re.compile(
    r"_norm\.weight|ffn_gate_inp\.weight|ffn_gate_tid2eid\.weight|altup|laurel|per_layer_model_proj"
    r"|^position_embd\.weight|^token_types\.weight|ssm_conv1d|shortconv\.conv\.weight|indexer\.[kq]_proj\.weight"
    r"|time_mix_(first|w[012]|v[012]|a[012]|g[12]|decay_w[12]|lerp_fused)\.weight|attn_rel_b\.weight|\.position_embd"
)


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A tensor to place: its GGUF name, shape (last is the row length) and the type it has in the source."""

    name: str
    shape: tuple[int, ...]
    source_type: str

    @property
    def parameters(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A tensor with the type it gets, the type that was wanted, and why they differ ("" where they don't)."""

    weight: Weight
    type: str
    wanted: str
    reason: str = ""
    finite: bool = True
    """False: known to hold NaN or infinity, and kept all the same."""

    @property
    def nbytes(self) -> int:
        length = self.weight.shape[-1] if self.weight.shape else 1
        return self.weight.parameters // max(length, 1) * row_bytes(self.type, length)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The types of a whole file, in the order in which its tensors are written."""

    scheme: str
    file_type: int
    tensors: tuple[Placed, ...]

    @property
    def bits_per_weight(self) -> float:
        """True bits per weight: all tensor bytes over all parameters, norms and biases included."""
        return (
            8 * sum(placed.nbytes for placed in self.tensors) / sum(p.weight.parameters for p in self.tensors)
        )

    def record(self) -> dict[str, Any]:
        """The plan as the manifest keeps it."""
        types: dict[str, dict[str, int]] = {}
        for placed in self.tensors:
            row = types.setdefault(placed.type, {"tensors": 0, "parameters": 0, "bytes": 0})
            row["tensors"] += 1
            row["parameters"] += placed.weight.parameters
            row["bytes"] += placed.nbytes
        fallbacks = [
            {
                "tensor": placed.weight.name,
                "wanted": placed.wanted,
                "got": placed.type,
                "wanted_bits": type_bits(placed.wanted),
                "got_bits": type_bits(placed.type),
                "reason": placed.reason,
            }
            for placed in self.tensors
            if placed.reason
        ]
        return {
            "scheme": self.scheme,
            "bits_per_weight": self.bits_per_weight,
            "types": dict(sorted(types.items())),
            "fallbacks": fallbacks,
        }


def type_bits(type_name: str) -> float:
    """Bits per weight of a type, scales included: 4.5 for Q4_K, 5.5 for Q5_0."""
    ggml_type = GGML_TYPES[type_name]
    return 8 * ggml_type.block_bytes / ggml_type.block_elements


def preset(scheme: str) -> tuple[str, str, int]:
    """A preset's canonical name, bulk type and llama_ftype.  Raises RecipeError naming the nearest known one."""
    name = ALIASES.get(scheme.upper(), scheme.upper())
    if name not in PRESETS:
        near = get_close_matches(name, PRESETS, n=1)
        known = ", ".join(PRESETS)
        raise RecipeError(
            f"unknown scheme {scheme!r}" + (f"; nearest is {near[0]}" if near else ""), hint=f"one of {known}"
        )
    bulk, file_type = PRESETS[name]
    return name, bulk, file_type


def quantizable(weight: Weight) -> bool:
    """True for matrices that llama-quantize would quantize."""
    return len(weight.shape) >= 2 and weight.name.endswith("weight") and not _KEPT.search(weight.name)


def category(name: str) -> str:
    """The part that a tensor plays in a block, as llama-quantize groups them ("other" for the rest)."""
    whole = {
        "output.weight": "output",
        "token_embd.weight": "token_embd",
        "per_layer_token_embd.weight": "token_embd",
    }
    if name in whole:
        return whole[name]
    parts = ("attn_qkv.weight", "attn_kv_b.weight", "attn_v.weight", "attn_k.weight", "attn_q.weight",
             "attn_output.weight", "ffn_up", "ffn_gate", "ffn_down")  # fmt: skip
    return next((part.removesuffix(".weight") for part in parts if part in name), "other")


def make_plan(
    weights: Iterable[Weight],
    scheme: str,
    *,
    layers: int,
    heads_per_kv_head: int,
    overrides: Mapping[str, str] | Sequence[tuple[str, str]] = (),
    importance: bool = False,
) -> Plan:
    """Place every tensor.

    layers: blocks of the model.  heads_per_kv_head: query heads that share a key-value head.
    overrides: regular expression (searched in the tensor's name) to type; the first that matches counts.
    importance: whether an importance matrix is at hand, which changes some presets' rules.
    Raises RecipeError for an unknown scheme or type, a bad pattern, and a pattern that matches nothing.
    """
    name, bulk, file_type = preset(scheme)
    patterns = _compile(overrides)
    ordered = sorted(weights, key=lambda weight: (_block(weight.name), weight.name))
    rules = _Rules(
        preset=name, bulk=bulk, layers=layers, heads_per_kv_head=heads_per_kv_head, importance=importance,
        attention_values=sum(category(w.name) in _VALUE_LIKE for w in ordered),
        tied=not any(weight.name == "output.weight" for weight in ordered),
    )  # fmt: skip
    used: set[str] = set()
    placed = [_place(weight, rules, patterns, used) for weight in ordered]
    for pattern, _ in patterns:
        if pattern.pattern not in used:
            names = [w.name for w in ordered if quantizable(w)]
            raise RecipeError(
                f"--type {pattern.pattern!r} matches none of the {len(names)} tensors that can be quantized",
                hint=f"tensor names look like {', '.join(names[:3])}; `edgeslm inspect --tensors` lists them",
            )
    return Plan(scheme=name, file_type=file_type, tensors=tuple(placed))


def _compile(overrides: Mapping[str, str] | Sequence[tuple[str, str]]) -> list[tuple[re.Pattern[str], str]]:
    pairs = overrides.items() if hasattr(overrides, "items") else overrides
    compiled = []
    for pattern, type_name in pairs:
        if type_name.upper() not in TYPES:
            near = get_close_matches(type_name.upper(), TYPES, n=1)
            raise RecipeError(
                f"unknown type {type_name!r} for tensors {pattern!r}"
                + (f"; nearest is {near[0]}" if near else ""),
                hint=f"one of {', '.join(TYPES)}",
            )
        try:
            compiled.append((re.compile(pattern), type_name.upper()))
        except re.error as error:
            raise RecipeError(f"{pattern!r} is not a regular expression: {error}") from error
    return compiled


def _block(name: str) -> int:
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match.group(1)) if match else -1


def _place(
    weight: Weight, rules: _Rules, patterns: list[tuple[re.Pattern[str], str]], used: set[str]
) -> Placed:
    if not quantizable(weight):
        kept = weight.source_type if weight.source_type in GGML_TYPES else "F32"
        return Placed(weight=weight, type=kept, wanted=kept)
    for pattern, type_name in patterns:
        if pattern.search(weight.name):
            used.add(pattern.pattern)
            return _fit(weight, type_name)
    if rules.bulk in FLOATS:
        return Placed(weight=weight, type=rules.bulk, wanted=rules.bulk)
    return _fit(weight, rules.wanted(weight))


def _fit(weight: Weight, wanted: str) -> Placed:
    """The wanted type, or what holds a row of this length instead (tensor_type_fallback of llama-quant.cpp)."""
    length = weight.shape[-1]
    if length % GGML_TYPES[wanted].block_elements == 0:
        return Placed(weight=weight, type=wanted, wanted=wanted)
    got = FALLBACKS.get(wanted, wanted)
    if length % GGML_TYPES[got].block_elements:
        got = "F16"
    return Placed(weight=weight, type=got, wanted=wanted, reason=_why(weight, wanted))


def _why(weight: Weight, wanted: str) -> str:
    return f"rows of {weight.shape[-1]} are not divisible by {GGML_TYPES[wanted].block_elements}, the block of {wanted}"


_VALUE_LIKE = ("attn_v", "attn_qkv", "attn_kv_b")


@dataclass(kw_only=True)
class _Rules:
    """llama-quantize's choice for one file; it counts the tensors it has seen, as the original does."""

    preset: str
    bulk: str
    layers: int
    heads_per_kv_head: int
    importance: bool
    attention_values: int
    tied: bool
    seen: dict[str, int] = field(default_factory=dict)

    def _next(self, kind: str) -> int:
        index = self.seen.get(kind, 0)
        self.seen[kind] = index + 1
        return index

    def wanted(self, weight: Weight) -> str:
        """The type that the preset's rules want for a tensor, before its shape is looked at."""
        kind = category(weight.name)
        if kind == "output" or (kind == "token_embd" and self.tied):
            return self.bulk if self.bulk == "Q8_0" else "Q6_K"
        if kind in _VALUE_LIKE:
            return self._attention_value(self._next("attn_v"))
        if kind == "ffn_down":
            return self._ffn_down(self._next("ffn_down"))
        if kind == "attn_output":
            return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(self.preset, self.bulk)
        return self.bulk

    def _attention_value(self, index: int) -> str:
        grouped = self.heads_per_kv_head >= 4
        choices = {
            "Q2_K": "Q4_K" if grouped else "Q3_K",
            "Q3_K_M": "Q5_K" if index < 2 else "Q4_K",
            "Q3_K_L": "Q5_K",
            "IQ4_NL": "Q5_K" if grouped else self.bulk,
            "IQ4_XS": "Q5_K" if grouped else self.bulk,
            "Q4_K_M": "Q6_K" if use_more_bits(index, self.attention_values) else self.bulk,
            "Q5_K_M": "Q6_K" if use_more_bits(index, self.attention_values) else self.bulk,
            "Q4_K_S": "Q5_K" if index < 4 else self.bulk,
        }
        return choices.get(self.preset, self.bulk)

    def _ffn_down(self, index: int) -> str:
        first_eighth = index < self.layers // 8
        choices = {
            "Q2_K": "Q3_K",
            "Q3_K_M": "Q5_K" if index < self.layers // 16 else "Q4_K",
            "Q3_K_L": "Q5_K",
            "Q4_K_M": "Q6_K" if use_more_bits(index, self.layers) else self.bulk,
            "Q5_K_M": "Q6_K" if use_more_bits(index, self.layers) else self.bulk,
            "Q4_K_S": "Q5_K" if first_eighth else self.bulk,
            "IQ4_NL": "Q5_K" if first_eighth and not self.importance else self.bulk,
            "IQ4_XS": "Q5_K" if first_eighth and not self.importance else self.bulk,
            "Q4_0": "Q4_1" if first_eighth and self.importance else self.bulk,
            "Q5_0": "Q5_1" if first_eighth and self.importance else self.bulk,
        }
        return choices.get(self.preset, self.bulk)


def use_more_bits(index: int, count: int) -> bool:
    """The first and last eighth of the blocks, and every third in between (llama-quant.cpp)."""
    return index < count // 8 or index >= 7 * count // 8 or (index - count // 8) % 3 == 2
