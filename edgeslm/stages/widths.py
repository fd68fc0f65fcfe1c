"""Cutting layers, channels, heads and tokens out of a decoder: arithmetic on its configuration and tensors.

A table says which axis of the model each dimension of each tensor runs along; cutting an axis is
selecting along it wherever it occurs.  What remains equals the whole model with the cut parts zeroed: an
RMS norm over fewer channels is scaled as if the missing ones were there and zero (its epsilon, which is
one for all norms of a model, is left alone).

H hidden, I MLP channels, K key-value heads, Q query heads, D elements of a head, V vocabulary, L layers.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.errors import ModelError, RecipeError
from edgeslm.stages.architectures import architecture_of
from edgeslm.stages.rope import Config, head_dim

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    Indices = NDArray[np.int64]

AXES: dict[str, tuple[str, ...]] = {
    "embed_tokens.weight": ("vocabulary", "hidden"),
    "lm_head.weight": ("vocabulary", "hidden"),
    "norm.weight": ("hidden",),
    "input_layernorm.weight": ("hidden",),
    "post_attention_layernorm.weight": ("hidden",),
    "pre_feedforward_layernorm.weight": ("hidden",),
    "post_feedforward_layernorm.weight": ("hidden",),
    "self_attn.q_proj.weight": ("queries", "hidden"),
    "self_attn.q_proj.bias": ("queries",),
    "self_attn.k_proj.weight": ("keys", "hidden"),
    "self_attn.k_proj.bias": ("keys",),
    "self_attn.v_proj.weight": ("keys", "hidden"),
    "self_attn.v_proj.bias": ("keys",),
    "self_attn.qkv_proj.weight": ("queries keys keys", "hidden"),
    "self_attn.o_proj.weight": ("hidden", "queries"),
    "self_attn.o_proj.bias": ("hidden",),
    "mlp.gate_proj.weight": ("mlp", "hidden"),
    "mlp.gate_proj.bias": ("mlp",),
    "mlp.up_proj.weight": ("mlp", "hidden"),
    "mlp.up_proj.bias": ("mlp",),
    "mlp.gate_up_proj.weight": ("mlp mlp", "hidden"),
    "mlp.down_proj.weight": ("hidden", "mlp"),
    "mlp.down_proj.bias": ("hidden",),
}
"""Tensor -> the axis of each dimension; several in one word lie one after the other along it."""

HEAD_NORMS = {"self_attn.q_norm.weight": "queries", "self_attn.k_norm.weight": "keys"}
"""Norms of one head in most families, of all heads at once in OLMo 2."""

PER_LAYER = ("layer_types", "no_rope_layers")
"""Lists of config.json with one item a layer."""

EQUAL_WIDTHS = ("qwen2", "phi3", "olmo2", "granite")
"""llama.cpp's architectures whose GGUF files hold no head size of their own: H is Q * D."""

PLAIN_MULTIPLE, K_QUANT_MULTIPLE = 32, 256
"""What a row of weights must be a multiple of: blocks of the plain types, and of the K-quants."""
_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.(.+)")


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What remains, by its places in the whole model, ascending; None: all of it."""

    layers: tuple[int, ...]
    mlp: Mapping[int, Indices] | None = None
    """Layer -> the [I'] channels that remain."""
    kv_heads: Mapping[int, Indices] | None = None
    """Layer -> the [K'] key-value heads that remain, each with its query heads."""
    hidden: Indices | None = None
    tokens: Indices | None = None


@dataclass(frozen=True, kw_only=True)
class Shape:
    """How many layers of which widths."""

    layers: int
    mlp: int
    kv_heads: int
    hidden: int


def shape_of(config: Config) -> Shape:
    return Shape(
        layers=config["num_hidden_layers"],
        mlp=config["intermediate_size"],
        kv_heads=config["num_key_value_heads"],
        hidden=config["hidden_size"],
    )


def axis_sizes(config: Config) -> dict[str, int]:
    """Axis -> its length in a model of this configuration."""
    head = head_dim(config)
    return {
        "hidden": config["hidden_size"],
        "mlp": config["intermediate_size"],
        "queries": config["num_attention_heads"] * head,
        "keys": config["num_key_value_heads"] * head,
        "head": head,
        "vocabulary": config["vocab_size"],
    }


def axes_of(name: str, config: Config) -> tuple[str, ...]:
    """The axes of a tensor of torch's state dict.  Raises ModelError for one that has no row in the table."""
    match = _LAYER.fullmatch(name)
    suffix = match[2] if match else name.removeprefix("model.")
    if suffix in HEAD_NORMS:
        return (HEAD_NORMS[suffix] if architecture_of(config).gguf == "olmo2" else "head",)
    if suffix not in AXES:
        raise ModelError(
            f"{config['architectures'][0]}: no way to cut {name}", hint="prune a model without extra modules"
        )
    return AXES[suffix]


def count_parameters(names: Sequence[str], config: Config) -> int:
    """Parameters of a model of this configuration; names: its tensors, of one layer or of all."""
    sizes, total = axis_sizes(config), 0
    for name in names:
        match = _LAYER.fullmatch(name)
        if match is None or match[1] == "0":
            axes = axes_of(name, config)
            elements = prod(sum(sizes[part] for part in axis.split()) for axis in axes)
            total += elements * (config["num_hidden_layers"] if match else 1)
    return total


# --- configuration ---


def cut_config(config: Config, layers: Sequence[int], shape: Shape) -> Config:
    """The configuration with these layers and this shape.  config: of transformers, nothing left out.

    Raises ModelError for a list of one item a layer that is not known, and for a shape that GGUF files of
    the family can't hold.
    """
    count = config["num_hidden_layers"]
    new = dict(config)
    for key, value in config.items():
        if len(layers) == count or not isinstance(value, list | tuple):
            continue
        if key in PER_LAYER:
            new[key] = [value[layer] for layer in layers]
        elif len(value) == count > 1 and not key.endswith(_OTHER_LISTS):
            raise ModelError(
                f"config.json: {key} has {count} items like the layers, and no rule says what they are",
                hint="drop no layers of this model",
            )
    head, ratio = head_dim(config), config["num_attention_heads"] // config["num_key_value_heads"]
    new |= {
        "num_hidden_layers": len(layers),
        "intermediate_size": shape.mlp,
        "num_key_value_heads": shape.kv_heads,
        "num_attention_heads": shape.kv_heads * ratio,
        "hidden_size": shape.hidden,
    }
    if shape.hidden != config["hidden_size"] or shape.kv_heads != config["num_key_value_heads"]:
        new["head_dim"] = head
        _check_equal_widths(new, head, ratio)
    return new


_OTHER_LISTS = ("_id", "_ids", "architectures", "id2label")


def _check_equal_widths(config: Config, head: int, ratio: int) -> None:
    family = architecture_of(config).gguf
    wanted = config["num_attention_heads"] * head
    if family not in EQUAL_WIDTHS or config["hidden_size"] == wanted:
        return
    groups = config["hidden_size"] / (ratio * head)
    way = f" or kv_heads = {groups:.0f}" if groups.is_integer() else ""
    raise ModelError(
        f"GGUF files of {family} have a hidden_size of heads * head_dim, {wanted} for "
        f"{config['num_attention_heads']} heads of {head}, not {config['hidden_size']}",
        hint=f"give hidden_size = {wanted}{way} as well, or cut layers and MLP channels only",
    )


def rounded(width: int, whole: int, multiple: int | None, name: str, notes: list[str]) -> int:
    """`width` rounded down to what GGUF's blocks like, said in `notes` where that changes it.

    multiple: None for 256 where that costs at most an eighth of the width, else 32.  whole: the width now,
    which needs no rounding.  Raises RecipeError for a width above it, or below one block.
    """
    if width > whole:
        raise RecipeError(
            f"{name} = {width} is more than the model's {whole}", hint="give less, or leave it out"
        )
    if width == whole:
        return whole
    if multiple is None:
        large = width // K_QUANT_MULTIPLE * K_QUANT_MULTIPLE
        multiple = K_QUANT_MULTIPLE if 8 * (width - large) <= width else PLAIN_MULTIPLE
    result = width // multiple * multiple
    if result == 0:
        raise RecipeError(f"{name} = {width} is less than one block of {multiple}", hint="give more")
    if result != width:
        notes.append(f"{name}: {width} rounded down to {result}, a multiple of {multiple}")
    return result


# --- which layers ---


def required_kinds(config: Config) -> tuple[list[int], int] | None:
    """(each layer's kind, period) where llama.cpp takes the kind from a layer's place, else None.

    SmolLM3: every fourth layer has no rotary positions; the kind of layer i must be that of i mod 4.
    """
    if architecture_of(config).gguf != "smollm3" or not config.get("no_rope_layers"):
        return None
    return [int(bool(value)) for value in config["no_rope_layers"]], 4


def layers_kept(
    influence: Sequence[float] | NDArray[np.float64],
    drop: int,
    kinds: tuple[Sequence[int], int] | None = None,
) -> tuple[int, ...]:
    """The layers that remain when the `drop` of least influence go.

    kinds: (each layer's kind, period): the kept layer at place j must be of the kind that place j of the
    whole has, modulo the period; then the kept ones are those of the largest sum among all that fit
    (dynamic programming over layers and places).  Raises RecipeError for too many, or where nothing fits.
    """
    count = len(influence)
    if not 0 <= drop < count:
        raise RecipeError(f"drop_layers = {drop} of {count} layers", hint="keep at least one layer")
    if kinds is None:
        order = sorted(range(count), key=lambda layer: (influence[layer], layer))
        return tuple(sorted(order[drop:]))
    kind, period = kinds
    # best[j]: (sum, layers) of the best j kept among the layers so far.
    best: list[tuple[float, tuple[int, ...]] | None] = [(0.0, ())] + [None] * (count - drop)
    for layer in range(count):
        for place in range(min(layer, count - drop - 1), -1, -1):
            before, after = best[place], best[place + 1]
            if before is None or kind[layer] != kind[place % period]:
                continue
            total = before[0] + influence[layer]
            if after is None or total > after[0]:
                best[place + 1] = (total, (*before[1], layer))
    found = best[count - drop]
    if found is None:
        raise RecipeError(
            f"no {count - drop} of the {count} layers keep the pattern that llama.cpp expects of this family",
            hint=f"drop a multiple of {period} layers",
        )
    return found[1]


# --- tensors ---


def cut_state(state: Mapping[str, Any], config: Config, cut: Cut) -> dict[str, Any]:
    """torch's state dict of what remains; config: of the whole model, `state` its tensors."""
    places = {layer: place for place, layer in enumerate(cut.layers)}
    result = {}
    for name, tensor in state.items():
        match = _LAYER.fullmatch(name)
        layer = int(match[1]) if match else None
        if layer is not None and layer not in places:
            continue
        new_name = name if layer is None else re.sub(r"layers\.\d+\.", f"layers.{places[layer]}.", name)
        result[new_name] = _cut_tensor(name, tensor, config, cut, layer)
    if cut.hidden is not None and architecture_of(config).gguf.startswith("gemma"):
        _rescale_embedding(result, (config["hidden_size"] / len(cut.hidden)) ** 0.5)
    return result


def _cut_tensor(name: str, tensor: Any, config: Config, cut: Cut, layer: int | None) -> Any:
    import torch

    sizes = axis_sizes(config)
    for dimension, axis in enumerate(axes_of(name, config)):
        parts = axis.split()
        chosen = [_indices(part, config, cut, layer) for part in parts]
        if all(indices is None for indices in chosen):
            continue
        kept, start = [], 0
        for part, indices in zip(parts, chosen, strict=True):
            kept.append(start + (np.arange(sizes[part]) if indices is None else indices))
            start += sizes[part]
        places = np.concatenate(kept)
        tensor = tensor.index_select(dimension, torch.from_numpy(places))
        if name.endswith("norm.weight"):
            offset = architecture_of(config).norm_offset
            tensor = (tensor + offset) * (start / len(places)) ** 0.5 - offset
    return tensor.contiguous()


def _rescale_embedding(state: dict[str, Any], factor: float) -> None:
    """Gemma multiplies embeddings by the root of H: let the narrower model's come out as the whole one's.

    A tied head is the same tensor; the norm before it makes up for that.
    """
    embedding = next(name for name in state if name.endswith("embed_tokens.weight"))
    state[embedding] = state[embedding] * factor
    if "lm_head.weight" not in state:
        norm = embedding.replace("embed_tokens", "norm")
        state[norm] = (state[norm] + 1) / factor - 1


def _indices(axis: str, config: Config, cut: Cut, layer: int | None) -> Indices | None:
    """What remains of an axis in a layer; None: all."""
    if axis == "hidden":
        return cut.hidden
    if axis == "vocabulary":
        return cut.tokens
    if axis == "mlp" and cut.mlp is not None and layer is not None:
        return cut.mlp[layer]
    if axis in ("queries", "keys") and cut.kv_heads is not None and layer is not None:
        ratio = config["num_attention_heads"] // config["num_key_value_heads"] if axis == "queries" else 1
        width = ratio * head_dim(config)
        return (cut.kv_heads[layer][:, None] * width + np.arange(width)).reshape(-1).astype(np.int64)
    return None
