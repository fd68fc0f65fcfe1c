"""ONNX graphs put together node by node, and written with their weights in a file beside.

    model.onnx          the graph
    model.onnx.data     the weights, see edgeslm.stages.external_data

Weights are given as arrays, views where possible, and are copied piece by piece, while they are written.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.atomic import replacing, write_flushed
from edgeslm.onnx_file import data_file
from edgeslm.progress import Quiet
from edgeslm.stages.external_data import Writer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edgeslm.progress import Progress

MICROSOFT = "com.microsoft"


@dataclass(kw_only=True)
class Nodes:
    """The nodes of a graph in their order, the arrays that they read, and constants, each once."""

    nodes: list[Any] = field(default_factory=list)
    weights: dict[str, NDArray[Any]] = field(default_factory=dict)
    constants: dict[str, NDArray[Any]] = field(default_factory=dict)

    def add(
        self, operator: str, inputs: Sequence[str], name: str, *, outputs: Sequence[str] = (), domain: str = "",
        **attributes: Any,
    ) -> str:  # fmt: skip
        """Append a node; its first output, which is called NAME/output_0 unless `outputs` are given."""
        import onnx

        names = list(outputs) or [f"{name}/output_0"]
        self.nodes.append(
            onnx.helper.make_node(operator, list(inputs), names, name=name, domain=domain, **attributes)
        )
        return names[0]

    def weight(self, name: str, array: NDArray[Any]) -> str:
        """Keep an array as a weight; its name."""
        self.weights[name] = array
        return name

    def constant(self, value: float | Sequence[int]) -> str:
        """The name of a small constant: a float32 number, or a list of int64."""
        array = np.array(value, np.float32 if isinstance(value, float) else np.int64)
        name = f"/constants/{array.dtype}/{value}"
        self.constants[name] = array
        return name

    def matmul(self, x: str, weight: NDArray[Any], bias: NDArray[Any] | None, path: str) -> str:
        """x [..., I] times weight [I, O], plus bias [O]; path: /model/layers.0/mlp/up_proj."""
        dotted = path.removeprefix("/").replace("/", ".")
        product = self.add("MatMul", [x, self.weight(f"{dotted}.MatMul.weight", weight)], f"{path}/MatMul")
        if bias is None:
            return product
        return self.add("Add", [product, self.weight(f"{dotted}.Add.bias", bias)], f"{path}/Add")

    def rms_norm(self, x: str, weight: str, epsilon: float, path: str) -> str:
        """x / sqrt(mean(x^2) + epsilon) * weight over the last axis, as operators of ONNX.

        ONNX Runtime fuses exactly this sequence into one kernel; as one node it would be none of the standard's.
        """
        square = self.add("Pow", [x, self.constant(2.0)], f"{path}/Pow")
        mean = self.add("ReduceMean", [square, self.constant([-1])], f"{path}/ReduceMean", keepdims=1)
        shifted = self.add("Add", [mean, self.constant(float(epsilon))], f"{path}/Add")
        root = self.add("Sqrt", [shifted], f"{path}/Sqrt")
        ratio = self.add("Div", [x, root], f"{path}/Div")
        return self.add("Mul", [ratio, weight], f"{path}/Mul")

    def skip_norm(self, x: str, skip: str, weight: str, epsilon: float, path: str) -> tuple[str, str]:
        """(RMS norm of x + skip, x + skip) as one node."""
        name = f"{path}/SkipLayerNorm"
        total = f"{name}/output_3"
        normed = self.add(
            "SkipSimplifiedLayerNormalization", [x, skip, weight], name, domain=MICROSOFT,
            outputs=[f"{name}/output_0", "", "", total], epsilon=float(epsilon),
        )  # fmt: skip
        return normed, total

    def model(
        self, *, inputs: Sequence[Any], outputs: Sequence[Any], opset: int, ir_version: int, producer: str,
        initializers: Mapping[str, NDArray[Any]] | None = None,
    ) -> Any:  # fmt: skip
        """The onnx.ModelProto without its weights."""
        import onnx

        small = {**self.constants, **(initializers or {})}
        graph = onnx.helper.make_graph(
            self.nodes, "decoder", list(inputs), list(outputs),
            initializer=[onnx.numpy_helper.from_array(array, name) for name, array in small.items()],
        )  # fmt: skip
        opsets = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid(MICROSOFT, 1)]
        return onnx.helper.make_model(
            graph, opset_imports=opsets, ir_version=ir_version, producer_name=producer
        )


def save(
    model: Any, weights: Mapping[str, NDArray[Any]], path: Path, *, progress: Progress | None = None
) -> None:
    """Write `model` to `path` and the weights to PATH.data beside it; both appear whole or not at all.

    model: an onnx.ModelProto without these weights; it is not changed.  Raises EdgeslmError where it can't write.
    """
    import onnx

    progress = progress or Quiet()
    whole = onnx.ModelProto()
    whole.CopyFrom(model)
    data = data_file(path)
    total = sum(array.nbytes for array in weights.values())
    with ExitStack() as stack:
        beside = stack.enter_context(replacing(path))
        beside_data = stack.enter_context(replacing(data))
        advance = stack.enter_context(progress.task("writing F32", total=total, unit="bytes"))
        with beside_data.open("wb") as file:
            writer = Writer(file, data.name)
            for name, array in weights.items():
                writer.add(name, array)
                advance(array.nbytes)
        whole.graph.initializer.extend(writer.initializers)
        write_flushed(beside, whole.SerializeToString(deterministic=True))
