"""The nodes that stand for a product or a look-up once its weight is quantized, and the arrays they read.

MatMulNBits and GatherBlockQuantized are ONNX Runtime's (docs/ContribOperators.md, com.microsoft);
DynamicQuantizeLinear and MatMulInteger are ONNX's own.

B batch, S sequence, N outputs, K inputs, G blocks of a row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgeslm.stages.nbits import Blocks
    from edgeslm.stages.onnx_linear import Linear

    Array = NDArray[Any]

CONTRIB = "com.microsoft"


def block_arrays(name: str, blocks: Blocks) -> dict[str, Array]:
    """Initializers of a weight in blocks."""
    arrays: dict[str, Array] = {f"{name}_Q{blocks.bits}": blocks.data, f"{name}_scales": blocks.scales}
    if blocks.zero_points is not None:
        arrays[f"{name}_zero_points"] = blocks.zero_points
    return arrays


def block_nodes(
    linear: Linear, blocks: Blocks, accuracy_level: int
) -> tuple[dict[str, list[Any]], dict[str, Array]]:
    """What stands for each node that uses a weight in blocks, by the node's first output; more initializers."""
    from onnx import helper

    inputs = list(block_arrays(linear.name, blocks))
    rows, columns = linear.shape
    attributes = {"K": columns, "N": rows, "bits": blocks.bits, "block_size": blocks.block}
    if accuracy_level:
        attributes["accuracy_level"] = accuracy_level
    nodes = {
        node.output[0]: [
            helper.make_node(
                "MatMulNBits", [node.input[0], *inputs], [node.output[0]], f"{node.name}_Q{blocks.bits}",
                domain=CONTRIB, **attributes,
            )
        ]
        for node in linear.products
    }  # fmt: skip
    arrays: dict[str, Array] = {}
    for node in linear.lookups:
        nodes[node.output[0]], more = _block_lookup(linear, node, blocks, inputs)
        arrays |= more
    return nodes, arrays


def _block_lookup(
    linear: Linear, node: Any, blocks: Blocks, inputs: list[str]
) -> tuple[list[Any], dict[str, Array]]:
    """Rows out of the head's own bytes.

    MatMulNBits wants the codes [N, G, bytes] and GatherBlockQuantized reads them so too, with the block as
    quantized axis, when every block has its own scale [N, G, 1] (and zero point byte): then only the looked
    up rows are reshaped, and the codes stay where the file is mapped.  Packed zero points of 4 bits can't be
    had so: there the codes are seen as [N, G * bytes], which ONNX Runtime copies once when it loads.
    """
    from onnx import helper

    base = f"{linear.name}_lookup"
    rows, columns = linear.shape
    groups = blocks.scales.shape[1]
    out = node.output[0]
    attributes = {"bits": blocks.bits, "block_size": blocks.block, "gather_axis": 0}
    if columns != groups * blocks.block:
        return _padded_lookup(linear, node, blocks, inputs)
    if blocks.zero_points is not None and blocks.bits == 4:
        shape = {f"{base}_shape": np.array([rows, -1], np.int64)}
        codes, gathered = f"{base}_codes", [f"{base}_codes", node.input[1], *inputs[1:]]
        return [
            helper.make_node("Reshape", [inputs[0], f"{base}_shape"], [codes], f"{base}/Reshape"),
            helper.make_node(
                "GatherBlockQuantized", gathered, [out], f"{node.name}_Q{blocks.bits}", domain=CONTRIB,
                quantize_axis=1, **attributes,
            ),
        ], shape  # fmt: skip
    arrays: dict[str, Array] = {
        f"{base}_axis": np.array([2], np.int64),
        f"{base}_shape": np.array([0, 0, columns], np.int64),
    }
    nodes, parts = [], [inputs[0], node.input[1]]
    for name in inputs[1:]:
        nodes.append(
            helper.make_node("Unsqueeze", [name, f"{base}_axis"], [f"{name}_3d"], f"{name}/Unsqueeze")
        )
        parts.append(f"{name}_3d")
    nodes += [
        helper.make_node(
            "GatherBlockQuantized", parts, [f"{base}_blocks"], f"{node.name}_Q{blocks.bits}", domain=CONTRIB,
            quantize_axis=2, **attributes,
        ),
        helper.make_node("Reshape", [f"{base}_blocks", f"{base}_shape"], [out], f"{base}/Reshape"),
    ]  # fmt: skip
    return nodes, arrays


def _padded_lookup(
    linear: Linear, node: Any, blocks: Blocks, inputs: list[str]
) -> tuple[list[Any], dict[str, Array]]:
    """Rows whose last block is filled up: look the whole blocks up, then cut to K."""
    from dataclasses import replace

    from onnx import helper

    base = f"{linear.name}_cut"
    whole = replace(
        linear,
        tensor=_Extents(dims=(linear.shape[0], blocks.scales.shape[1] * blocks.block)),
        transposed=False,
    )
    inner = helper.make_node("Gather", list(node.input), [f"{base}_whole"], node.name)
    nodes, arrays = _block_lookup(whole, inner, blocks, inputs)
    arrays |= {
        f"{base}_start": np.array([0], np.int64),
        f"{base}_end": np.array([linear.shape[1]], np.int64),
        f"{base}_axis": np.array([-1], np.int64),
    }
    cut = [f"{base}_whole", f"{base}_start", f"{base}_end", f"{base}_axis"]
    return [*nodes, helper.make_node("Slice", cut, [node.output[0]], f"{base}/Slice")], arrays


class _Extents:
    """A shape in place of a TensorProto."""

    def __init__(self, dims: tuple[int, int]) -> None:
        self.dims = dims


# --- 8-bit columns with activations quantized as they come ---


def column_arrays(
    name: str, codes: NDArray[np.uint8], scales: NDArray[np.float32], kind: str
) -> dict[str, Array]:
    """Initializers of a weight with one scale for each output.

    codes: [N, K] from 0 on, zero being 2^(bits-1).  scales: [N].  kind: u8, s8 or s7.
    """
    zero = np.uint8({"u8": 0, "s8": 128, "s7": 64}[kind])
    stored = (codes - zero).view(np.uint8 if kind == "u8" else np.int8)
    arrays: dict[str, Array] = {f"{name}_I8": np.ascontiguousarray(stored.T), f"{name}_scales": scales}
    if kind == "u8":
        arrays[f"{name}_zero"] = np.array(128, np.uint8)
    return arrays


def column_nodes(
    linear: Linear, kind: str, quantized: set[str]
) -> tuple[dict[str, list[Any]], dict[str, Array]]:
    """What stands for each node that uses a weight of 8-bit columns, by the node's first output.

    quantized: activations that have a DynamicQuantizeLinear already; added to.  The form is the one that
    ONNX Runtime fuses into MatMulIntegerToFloat (core/optimizer/matmul_integer_to_float.cc).
    """
    from onnx import TensorProto, helper

    weight, scales, zero = (f"{linear.name}_{part}" for part in ("I8", "scales", "zero"))
    nodes: dict[str, list[Any]] = {}
    for node in linear.products:
        x, out = node.input[0], node.output[0]
        new = []
        parts = [f"{x}_u8", f"{x}_scale", f"{x}_zero"]
        if x not in quantized:
            quantized.add(x)
            new.append(helper.make_node("DynamicQuantizeLinear", [x], parts, f"{x}/DynamicQuantizeLinear"))
        operands = [parts[0], weight, parts[2], *([zero] if kind == "u8" else [])]
        new += [
            helper.make_node("MatMulInteger", operands, [f"{out}_i32"], f"{node.name}_I8"),
            helper.make_node(
                "Cast", [f"{out}_i32"], [f"{out}_f32"], f"{node.name}/Cast", to=TensorProto.FLOAT
            ),
            helper.make_node("Mul", [parts[1], scales], [f"{out}_scale"], f"{node.name}/Mul_scales"),
            helper.make_node("Mul", [f"{out}_f32", f"{out}_scale"], [out], f"{node.name}/Mul"),
        ]
        nodes[out] = new
    arrays: dict[str, Array] = {}
    for node in linear.lookups:
        nodes[node.output[0]], more = _column_lookup(linear, node, kind)
        arrays |= more
    return nodes, arrays


def _column_lookup(linear: Linear, node: Any, kind: str) -> tuple[list[Any], dict[str, Array]]:
    """Columns of the head's own bytes [K, N], turned into rows [B, S, K] and scaled each by its own scale."""
    from onnx import helper

    base, ids = f"{linear.name}_lookup", node.input[1]
    weight, scales, zero = (f"{linear.name}_{part}" for part in ("I8", "scales", "zero"))
    whole = [f"{base}_rows", f"{base}_one", *([zero] if kind == "u8" else [])]
    nodes = [
        helper.make_node("Gather", [weight, ids], [f"{base}_columns"], f"{base}/Gather", axis=1),
        helper.make_node(
            "Transpose", [f"{base}_columns"], [f"{base}_rows"], f"{base}/Transpose", perm=[1, 2, 0]
        ),
        helper.make_node("DequantizeLinear", whole, [f"{base}_floats"], f"{base}/DequantizeLinear"),
        helper.make_node("Gather", [scales, ids], [f"{base}_own"], f"{base}/Gather_scales", axis=0),
        helper.make_node(
            "Unsqueeze", [f"{base}_own", f"{base}_last"], [f"{base}_scale"], f"{base}/Unsqueeze"
        ),
        helper.make_node("Mul", [f"{base}_floats", f"{base}_scale"], [node.output[0]], f"{base}/Mul"),
    ]
    return nodes, {f"{base}_one": np.array(1, np.float32), f"{base}_last": np.array([-1], np.int64)}
