"""What a decoder's weights take in the artifact, out of its configuration alone: before they are cut and written."""

from __future__ import annotations

import re
from math import prod
from typing import TYPE_CHECKING

from edgeslm.stages.architectures import architecture_of, complete, extra_tensors, tensor_names
from edgeslm.stages.plan import Weight, make_plan
from edgeslm.stages.widths import axes_of, axis_sizes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgeslm.specs import QuantizeSpec
    from edgeslm.stages.rope import Config

ALIGNMENT = 32
"""Tensors of a GGUF file start at multiples of it."""
ONNX_BITS = {"F32": 32.0, "int8-dynamic": 8.0, "int8-static": 8.0, "int8": 8.0, "int4": 4.0, "int4-int8": 4.0}
"""Bits of a matrix's elements, without scales and without the share that stays a precision up."""
ONNX_UP = {"int8-dynamic": 32.0, "int8-static": 32.0, "int4-int8": 8.0}
"""Scheme -> bits of the most sensitive weights."""


def artifact_bytes(names: Sequence[str], config: Config, spec: QuantizeSpec, metadata: int) -> int:
    """Bytes of a model of this configuration: a GGUF file's exactly, an ONNX model's within a few percent.

    names: torch's names of its tensors, of one layer or of all.  metadata: bytes of a GGUF file in front of
    its tensors.
    """
    config = complete(config)
    shapes = _shapes(names, config)
    return (
        _onnx_bytes(shapes, spec) if spec.format == "onnx" else metadata + _gguf_bytes(shapes, config, spec)
    )


def _shapes(names: Sequence[str], config: Config) -> dict[str, tuple[int, ...]]:
    """Each tensor's shape, of every layer."""
    sizes, shapes = axis_sizes(config), {}
    for name in names:
        layer = re.search(r"\.layers\.(\d+)\.", name)
        if layer is not None and layer[1] != "0":
            continue
        shape = tuple(sum(sizes[part] for part in axis.split()) for axis in axes_of(name, config))
        for number in range(config["num_hidden_layers"] if layer else 1):
            shapes[name.replace(".layers.0.", f".layers.{number}.")] = shape
    return shapes


def _gguf_bytes(shapes: dict[str, tuple[int, ...]], config: Config, spec: QuantizeSpec) -> int:
    written = tensor_names(shapes, config)
    weights = [
        Weight(name=name, shape=shapes[torch_name], source_type="F32") for torch_name, name in written.items()
    ]
    if architecture_of(config).needs_head and "output.weight" not in written.values():
        embedding = next(weight for weight in weights if weight.name == "token_embd.weight")
        weights.append(Weight(name="output.weight", shape=embedding.shape, source_type="F32"))
    weights += [
        Weight(name=name, shape=values.shape, source_type="F32") for name, values in extra_tensors(config)
    ]
    plan = make_plan(
        weights, spec.scheme, layers=config["num_hidden_layers"],
        heads_per_kv_head=config["num_attention_heads"] // config["num_key_value_heads"],
        overrides=[
            (pattern, kind)
            for pattern, kind in spec.types
            if any(re.search(pattern, weight.name) for weight in weights)
        ],
        importance=True,
    )  # fmt: skip
    return sum(-(-placed.nbytes // ALIGNMENT) * ALIGNMENT for placed in plan.tensors)


def _onnx_bytes(shapes: dict[str, tuple[int, ...]], spec: QuantizeSpec) -> int:
    """Every matrix in the scheme's type, with a float32 scale for each of its blocks."""
    onnx, bits = spec.onnx, ONNX_BITS[spec.scheme]
    if spec.scheme in ONNX_UP:
        bits += onnx.sensitive * (ONNX_UP[spec.scheme] - bits)
    if spec.scheme in ("int8", "int4", "int4-int8"):
        bits += (32 if onnx.symmetric else 32 + ONNX_BITS[spec.scheme]) / onnx.block
    return int(sum(prod(shape) * (bits if len(shape) > 1 else 32.0) for shape in shapes.values()) / 8)
