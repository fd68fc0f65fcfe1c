"""A classifier's float32 ONNX graph with some of its weights in 8 or 4 bits: which, and as what, is said by name.

    product    MatMul, Gemm            int8-dynamic, int8-static, int8, int4
    table      Gather of rows          int8, int4
    recurrent  GRU, LSTM               int8

int8-dynamic and int8-static multiply whole numbers, with a scale for each output; activations are measured
in every call, or have the range that calibration found.  int8 and int4 products are of blocks
(MatMulNBits).  Tables have a scale for each row (8 bits) or block (4 bits: GatherBlockQuantized).
Recurrent weights are only stored in 8 bits: ONNX Runtime has whole-number kernels for LSTM alone, and they
are slower than float ones at the widths of small students; it makes floats of them once, when it loads.

N outputs, K inputs of a weight, D directions of a recurrent layer, G gates times units.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.device import probe
from edgeslm.stages import nbits, onnx_nodes
from edgeslm.stages.onnx_linear import Linear, linears

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from edgeslm.specs import OnnxSpec

    Array = NDArray[Any]

MIN_PARAMETERS = 1024
"""Smaller matrices stay float: scales and nodes would eat what is saved, and the head decides the class."""
BITS = {"int8": 8, "int4": 4}
COLUMNS = {None: ("s7", 7), "avx2": ("s7", 7), "avx512-vnni": ("s8", 8), "arm64": ("s8", 8)}
"""Target to (codes, bits) of whole-number products.  AVX2's vpmaddubsw adds two products of u8 and s8 in 16
bits and saturates; weights of 7 bits never reach the limit, and unsigned ones are slower everywhere
(ONNX Runtime, docs "Quantize ONNX models", "When and why do I need to try U8U8?")."""


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A matrix of the graph that can be stored in fewer bits."""

    name: str
    kind: str
    """product, table or recurrent."""
    parameters: int
    linear: Linear | None
    """None for a recurrent one."""
    activation: str | None
    """The tensor that a product is with."""


class Rewriter:
    """Makes graphs out of one float32 graph; each weight is quantized once, however many graphs use it."""

    def __init__(self, data: bytes, spec: OnnxSpec, ranges: Mapping[str, tuple[float, float]]) -> None:
        """data: the float32 graph.  ranges: tensor to its lowest and highest value, for int8-static."""
        import onnx

        self._model = onnx.load_from_string(data)
        _split_gemm(self._model.graph)
        self._spec = spec
        self.ranges = dict(ranges)
        self.weights = _weights(self._model)
        self._arrays: dict[tuple[str, str], dict[str, Array]] = {}
        self._blocks: dict[tuple[str, str], nbits.Blocks] = {}
        self._threads = probe()["usable_cores"] or 1

    def float_graph(self) -> bytes:
        """The graph that the others are compared with."""
        data: bytes = self._model.SerializeToString()
        return data

    def build(self, types: Mapping[str, str]) -> bytes:
        """The graph with weights in the given types; what is not named stays float."""
        from onnx import helper, numpy_helper

        nodes: dict[str, list[Any]] = {}
        arrays: dict[str, Array] = {}
        gone: set[str] = set()
        front: list[Any] = []
        quantized: set[str] = set()
        for weight in self.weights:
            kind = types.get(weight.name, "F32")
            if kind == "F32":
                continue
            gone.add(weight.name)
            if weight.linear is None:
                front += _unpacking(weight.name)
                arrays |= self._recurrent(weight)
                continue
            gone |= {node.output[0] for node in weight.linear.transposes}
            new, more = self._linear(weight, kind, quantized)
            nodes |= new
            arrays |= more
        model = type(self._model)()
        model.CopyFrom(self._model)
        graph = model.graph
        kept = [each for node in graph.node if node.output[0] not in gone
                for each in nodes.get(node.output[0], [node])]  # fmt: skip
        stored = [tensor for tensor in graph.initializer if tensor.name not in gone]
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend([*front, *kept])
        graph.initializer.extend(
            [*stored, *(numpy_helper.from_array(array, name) for name, array in arrays.items())]
        )
        if any(node.domain == onnx_nodes.CONTRIB for node in graph.node):
            model.opset_import.append(helper.make_opsetid(onnx_nodes.CONTRIB, 1))
        data: bytes = model.SerializeToString()
        return data

    def stored_bytes(self, weight: Weight, kind: str) -> int:
        """Bytes of a weight's codes, scales and zero points, once `build` has made them."""
        arrays = self._arrays[weight.name, kind]
        return sum(array.nbytes for array in arrays.values())

    # --- one weight ---

    def _linear(
        self, weight: Weight, kind: str, quantized: set[str]
    ) -> tuple[dict[str, list[Any]], dict[str, Array]]:
        linear = weight.linear
        assert linear is not None
        if weight.kind == "table" and kind == "int8":
            arrays = self._kept(weight, kind, lambda: _row_arrays(linear, self._threads))
            nodes, more = _row_nodes(linear)
            return nodes, arrays | more
        if kind in BITS:
            blocks = self._in_blocks(linear, kind)
            arrays = self._kept(weight, kind, lambda: onnx_nodes.block_arrays(linear.name, blocks))
            nodes, more = onnx_nodes.block_nodes(linear, blocks, self._spec.accuracy_level)
            return nodes, arrays | more
        codes, bits = COLUMNS[self._spec.target]
        arrays = self._kept(weight, kind, lambda: _column_arrays(linear, codes, bits, self._threads))
        if kind == "int8-dynamic":
            nodes, more = onnx_nodes.column_nodes(linear, codes, quantized)
            return nodes, arrays | more
        signed = self._spec.target == "arm64"
        nodes, more = _static_nodes(linear, self.ranges, quantized, signed=signed)
        return nodes, arrays | more

    def _kept(self, weight: Weight, kind: str, make: Any) -> dict[str, Array]:
        key = weight.name, kind
        if key not in self._arrays:
            self._arrays[key] = make()
        return self._arrays[key]

    def _in_blocks(self, linear: Linear, kind: str) -> nbits.Blocks:
        key = linear.name, kind
        if key not in self._blocks:
            self._blocks[key] = nbits.quantize(
                _matrix(linear), bits=BITS[kind], block=self._spec.block, symmetric=self._spec.symmetric,
                algorithm=self._spec.algorithm, threads=self._threads,
            )  # fmt: skip
        return self._blocks[key]

    def _recurrent(self, weight: Weight) -> dict[str, Array]:
        from onnx import numpy_helper

        def make() -> dict[str, Array]:
            stored = next(tensor for tensor in self._model.graph.initializer if tensor.name == weight.name)
            values = numpy_helper.to_array(stored)
            directions, gates, inputs = values.shape
            codes, scales = nbits.quantize_rows(values.reshape(-1, inputs), bits=8, threads=self._threads)
            return {
                f"{weight.name}_I8": _signed(codes, 8).reshape(values.shape),
                f"{weight.name}_scales": scales.reshape(directions, gates, 1),
            }

        return self._kept(weight, "int8", make)


def _weights(model: Any) -> list[Weight]:
    graph = model.graph
    has_matrix = any(len(tensor.dims) == 2 and tensor.data_type == 1 for tensor in graph.initializer)
    found = []
    for linear in linears(model) if has_matrix else []:
        if linear.parameters < MIN_PARAMETERS or (linear.products and linear.lookups):
            continue
        kind = "product" if linear.products else "table"
        activation = linear.products[0].input[0] if linear.products else None
        found.append(
            Weight(
                name=linear.name,
                kind=kind,
                parameters=linear.parameters,
                linear=linear,
                activation=activation,
            )
        )
    stored = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        for name in node.input[1:3] if node.op_type in ("GRU", "LSTM") else ():
            parameters = int(np.prod(stored[name].dims)) if name in stored else 0
            if parameters >= MIN_PARAMETERS:
                found.append(
                    Weight(name=name, kind="recurrent", parameters=parameters, linear=None, activation=None)
                )
    return found


def _split_gemm(graph: Any) -> None:
    """Gemm with a stored matrix as MatMul and Add, which the engine joins again where it can."""
    from onnx import helper, numpy_helper

    stored = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[Any] = []
    for node in graph.node:
        said = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        plain = said.get("alpha", 1.0) == said.get("beta", 1.0) == 1.0 and not said.get("transA")
        if node.op_type != "Gemm" or node.input[1] not in stored or not plain:
            nodes.append(node)
            continue
        name, bias = node.input[1], node.input[2] if len(node.input) > 2 else ""
        if said.get("transB"):
            turned = f"{name}_T"
            if turned not in stored:
                values = np.ascontiguousarray(numpy_helper.to_array(stored[name]).T)
                stored[turned] = numpy_helper.from_array(values, turned)
                graph.initializer.append(stored[turned])
            name = turned
        out = f"{node.output[0]}_product" if bias else node.output[0]
        nodes.append(helper.make_node("MatMul", [node.input[0], name], [out], f"{node.name}/MatMul"))
        if bias:
            nodes.append(helper.make_node("Add", [out, bias], [node.output[0]], f"{node.name}/Add"))
    used = {name for node in nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)


def _matrix(linear: Linear) -> NDArray[np.float32]:
    """[N, K]"""
    from onnx import numpy_helper

    values: NDArray[np.float32] = numpy_helper.to_array(linear.tensor)
    return values.T if linear.transposed else values


def _signed(codes: NDArray[np.uint8], bits: int) -> NDArray[np.int8]:
    return (codes - np.uint8(2 ** (bits - 1))).view(np.int8)


def _column_arrays(linear: Linear, kind: str, bits: int, threads: int) -> dict[str, Array]:
    codes, scales = nbits.quantize_rows(_matrix(linear), bits=bits, threads=threads)
    return onnx_nodes.column_arrays(linear.name, codes, scales, kind)


# --- tables of rows ---


def _row_arrays(linear: Linear, threads: int) -> dict[str, Array]:
    codes, scales = nbits.quantize_rows(_matrix(linear), bits=8, threads=threads)
    return {f"{linear.name}_I8": _signed(codes, 8), f"{linear.name}_scales": scales[:, None]}


def _row_nodes(linear: Linear) -> tuple[dict[str, list[Any]], dict[str, Array]]:
    """Rows of whole numbers, each times its own scale [N, 1]."""
    from onnx import TensorProto, helper

    nodes = {}
    for node in linear.lookups:
        out, ids = node.output[0], node.input[1]
        nodes[out] = [
            helper.make_node("Gather", [f"{linear.name}_I8", ids], [f"{out}_rows"], f"{node.name}_I8"),
            helper.make_node(
                "Cast", [f"{out}_rows"], [f"{out}_floats"], f"{node.name}/Cast", to=TensorProto.FLOAT
            ),
            helper.make_node(
                "Gather", [f"{linear.name}_scales", ids], [f"{out}_row_scale"], f"{node.name}_scales"
            ),
            helper.make_node("Mul", [f"{out}_floats", f"{out}_row_scale"], [out], f"{node.name}/Mul"),
        ]
    return nodes, {}


# --- recurrent layers ---


def _unpacking(name: str) -> list[Any]:
    """Nodes that make the float weight [D, G, K] under its own name."""
    from onnx import TensorProto, helper

    return [
        helper.make_node("Cast", [f"{name}_I8"], [f"{name}_f32"], f"{name}/Cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", [f"{name}_f32", f"{name}_scales"], [name], f"{name}/Mul"),
    ]


# --- products with ranges that were measured before ---


def _static_nodes(
    linear: Linear, ranges: Mapping[str, tuple[float, float]], quantized: set[str], *, signed: bool
) -> tuple[dict[str, list[Any]], dict[str, Array]]:
    """QuantizeLinear and DequantizeLinear around a product, which the engine joins into one of whole numbers."""
    from onnx import helper

    weight = f"{linear.name}_float"
    nodes: dict[str, list[Any]] = {}
    arrays: dict[str, Array] = {}
    for number, node in enumerate(linear.products):
        x = node.input[0]
        scale, zero = scale_of(ranges[x], signed=signed)
        parts = [f"{x}_scale", f"{x}_zero"]
        arrays |= {parts[0]: scale, parts[1]: zero}
        new = []
        if x not in quantized:
            quantized.add(x)
            new += [
                helper.make_node("QuantizeLinear", [x, *parts], [f"{x}_i8"], f"{x}/QuantizeLinear"),
                helper.make_node(
                    "DequantizeLinear", [f"{x}_i8", *parts], [f"{x}_f32"], f"{x}/DequantizeLinear"
                ),
            ]
        if number == 0:
            stored = [f"{linear.name}_I8", f"{linear.name}_scales"]
            new.append(
                helper.make_node(
                    "DequantizeLinear", stored, [weight], f"{linear.name}/DequantizeLinear", axis=1
                )
            )
        new.append(helper.make_node("MatMul", [f"{x}_f32", weight], [node.output[0]], f"{node.name}_I8"))
        nodes[node.output[0]] = new
    return nodes, arrays


def scale_of(span: tuple[float, float], *, signed: bool) -> tuple[Array, Array]:
    """(scale, zero point) with which 0 is exact and the range fills 8 bits; ONNX, DynamicQuantizeLinear."""
    low, high = min(span[0], 0.0), max(span[1], 0.0)
    scale = np.float32(max(high - low, 1e-12) / 255)
    zero = np.clip(np.round(-low / scale), 0, 255)
    return np.array(scale), np.array(zero - 128, np.int8) if signed else np.array(zero, np.uint8)
