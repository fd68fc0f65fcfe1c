"""An exported classifier against the module that it was made of, and what its ONNX file declares.

B batch, S sequence, L labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.errors import ModelError, first_line
from edgeslm.stages.onnx_session import load_onnxruntime

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

TOLERANCE = 2e-4
"""Largest difference between engine and torch, over the largest logit: rounding is a hundred times smaller."""
ONNX_TYPES = {1: "F32", 2: "U8", 3: "I8", 6: "I32", 7: "I64", 9: "BOOL", 10: "F16", 11: "F64", 16: "BF16"}
"""onnx.TensorProto.DataType to the names that plans use."""


@dataclass(frozen=True, kw_only=True)
class Traced:
    """What an export needs to know of a classifier: its module, its inputs and how raw data become them."""

    module: Any
    labels: tuple[str, ...]
    preprocessing: dict[str, Any]
    probe: tuple[NDArray[Any], ...]
    """Arrays in the order of forward's arguments; rows of the first may be shorter than the longest."""
    axes: dict[str, dict[int, str]]
    """Input name to its dimensions of any size."""


def bare(module: Any) -> Any:
    """The module with a bare tensor for its output, in evaluation mode and float32."""
    import torch

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, *inputs: torch.Tensor) -> Any:
            output = self.inner(*inputs)
            return getattr(output, "logits", output)

    return Logits().float().eval()


def prove(data: bytes, traced: Traced, name: str) -> None:
    """Raise ModelError unless ONNX Runtime computes on a padded batch what torch does on each row alone."""
    import torch

    found = _run(data, traced, name)
    module = bare(traced.module)
    expected = []
    with torch.no_grad():
        for number in range(len(traced.probe[0])):
            row = [array[number : number + 1] for array in traced.probe]
            if len(row) == 2:  # tokens and their mask: without the padding
                row = [array[:, : int(row[1].sum())] for array in row]
            expected.append(module(*map(torch.from_numpy, row))[0].numpy())
    if found.shape != (len(expected), len(traced.labels)):
        raise ModelError(
            f"{name}: the model gives {found.shape[-1]} scores for {len(traced.labels)} labels",
            hint="num_labels of its configuration and its labels must agree",
        )
    largest = max(float(np.abs(expected).max()), 1.0)
    worst = float(np.abs(found - np.stack(expected)).max())
    if not worst <= TOLERANCE * largest:
        raise ModelError(
            f"{name}: the ONNX file computes something else than the model: logits differ by {worst:.2g} "
            f"where the largest is {largest:.2g}",
            hint="does padding change the model's result, or a layer choose by the data?",
        )


def _run(data: bytes, traced: Traced, name: str) -> NDArray[np.float32]:
    """[B, L] logits of the probe's padded batch."""
    onnxruntime = load_onnxruntime("what was exported can't be checked")
    try:
        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        names = list(traced.axes)
        found: NDArray[np.float32] = session.run(["logits"], dict(zip(names, traced.probe, strict=True)))[0]
    except Exception as error:  # the engine's own errors share no class
        raise ModelError(f"{name}: ONNX Runtime refuses the graph: {first_line(error)}") from error
    return found


def describe(data: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """(plan, interface): the weights by type as the manifest's quantization, and opset, inputs and outputs."""
    import onnx

    model = onnx.load_from_string(data)
    try:
        onnx.checker.check_model(model, full_check=True)
    except onnx.checker.ValidationError as error:
        raise ModelError(f"the ONNX file is not valid: {first_line(error)}") from error
    types: dict[str, dict[str, int]] = {}
    for tensor in model.graph.initializer:
        name = ONNX_TYPES.get(tensor.data_type, f"type {tensor.data_type}")
        sums = types.setdefault(name, {"tensors": 0, "parameters": 0, "bytes": 0})
        sums["tensors"] += 1
        sums["parameters"] += int(np.prod(tensor.dims, dtype=np.int64))
        sums["bytes"] += onnx.numpy_helper.to_array(tensor).nbytes
    weights = sum(of["parameters"] for of in types.values())
    plan: dict[str, Any] = {
        "scheme": "F32",
        "bits_per_weight": 8 * sum(of["bytes"] for of in types.values()) / weights if weights else None,
        "importance": None,
        "types": types,
        "fallbacks": [],
    }
    return plan, interface(model)


def interface(model: Any) -> dict[str, Any]:
    """Opset, IR version, operators, inputs and outputs of a ModelProto, as a manifest's model has them."""
    return {
        "opset": next(each.version for each in model.opset_import if each.domain in ("", "ai.onnx")),
        "ir_version": model.ir_version,
        "operators": sorted({f"{node.domain or 'ai.onnx'}:{node.op_type}" for node in _nodes(model.graph)}),
        "inputs": [_declared(value) for value in model.graph.input],
        "outputs": [_declared(value) for value in model.graph.output],
    }


def _nodes(graph: Any) -> Iterator[Any]:
    """Those of branches and loops too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def quantized_plan(plan: Mapping[str, Any], scheme: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The float32 graph's plan once weights are placed as onnx_int8.quantize_classifier's facts say."""
    types = {name: dict(sums) for name, sums in plan["types"].items()}
    for kind, parameters, nbytes in facts["placed"].values():
        row = types.setdefault(kind, {"tensors": 0, "parameters": 0, "bytes": 0})
        for sums, sign, size in ((row, 1, nbytes), (types["F32"], -1, 4 * parameters)):
            sums["tensors"] += sign
            sums["parameters"] += sign * parameters
            sums["bytes"] += sign * size
    types = {name: sums for name, sums in sorted(types.items()) if sums["tensors"]}
    weights = sum(sums["parameters"] for sums in types.values())
    return {
        **plan,
        "scheme": scheme,
        "bits_per_weight": 8 * sum(sums["bytes"] for sums in types.values()) / weights,
        "types": types,
        "fallbacks": facts["fallbacks"],
        "accuracy_level": facts["accuracy_level"],
        "onnx": facts["onnx"],
    }


def prove_quantized(data: bytes, traced: Traced, name: str) -> None:
    """Raise ModelError unless ONNX Runtime gives finite scores for a padded batch."""
    found = _run(data, traced, name)
    if found.shape != (len(traced.probe[0]), len(traced.labels)) or not np.isfinite(found).all():
        raise ModelError(
            f"{name}: the quantized graph gives no finite score for every label",
            hint="choose another scheme, or F32",
        )


def _declared(value: Any) -> dict[str, Any]:
    """{name, type, shape} of a graph's input or output; a dimension of any size is its name."""
    tensor = value.type.tensor_type
    shape = [axis.dim_param or axis.dim_value for axis in tensor.shape.dim]
    return {"name": value.name, "type": ONNX_TYPES[tensor.elem_type], "shape": shape}
