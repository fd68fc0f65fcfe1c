"""A decoder's float32 ONNX graph with its weights in 8 or 4 bits, in one streaming pass over the weights.

    MatMul                     -> MatMulNBits: blocks of 4 or 8 bits, activations as the accuracy level says
                               -> DynamicQuantizeLinear, MatMulInteger: 8 bits by column, activations by tensor
    Gather in the tied weight  -> GatherBlockQuantized, or Gather of 8-bit columns: the head's own bytes

Memory is bounded by the largest weight, not by the model.  Both files are written beside their places
and renamed when they are whole.

N outputs, K inputs of a weight.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.atomic import replacing
from edgeslm.device import probe
from edgeslm.errors import DataError, ModelError, RecipeError
from edgeslm.onnx_file import data_file
from edgeslm.progress import Quiet
from edgeslm.stages import external_data, gptq, nbits, onnx_nodes
from edgeslm.stages.onnx_linear import Linear, importance_of, linears

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edgeslm.progress import Progress
    from edgeslm.specs import QuantizeSpec

    Importance = Mapping[str, NDArray[np.float32]]

# Scheme to (type of the bulk of the weights, type of the sensitive ones).
SCHEMES = {
    "int4": ("int4", None),
    "int8": ("int8", None),
    "int4-int8": ("int4", "int8"),
    "int8-dynamic": ("int8-dynamic", "F32"),
}
BITS = {"int4": 4, "int8": 8}
COLUMNS = {None: ("u8", 8), "avx2": ("s7", 7), "avx512-vnni": ("s8", 8), "arm64": ("s8", 8)}
"""Target to (codes, bits) of int8-dynamic.  AVX2's vpmaddubsw adds two products of u8 and s8 in 16 bits and
saturates: unsigned weights take another instruction, weights of 7 bits never reach the limit."""
TYPE_NAMES = {"F32": "F32", "INT8": "int8", "INT4": "int4", "Q8_0": "int8", "Q4_0": "int4"}
"""Types of QuantizeSpec.types in an ONNX model."""


def quantize_decoder(
    model_path: Path,
    out_path: Path,
    spec: QuantizeSpec,
    *,
    importance: Importance | None = None,
    windows: NDArray[np.int64] | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the float32 decoder at `model_path` with quantized weights to `out_path` and OUT.data beside it.

    importance: GGUF or ONNX weight name to [K] mean squared inputs.  windows: [W, S] token ids of calibration
    text; gptq needs them, and so do the schemes with sensitive weights.  Returns the plan with the key
    "warnings".  Raises RecipeError for the spec's mistakes, DataError for calibration text that is missing,
    ModelError for what is no float32 graph, is damaged or not finite.
    """
    progress = progress or Quiet()
    model = external_data.load_graph(model_path)
    weights = linears(model)
    sensitivity = _sensitivity(
        model_path, weights, spec, importance=importance or {}, windows=windows, progress=progress
    )
    calibrated = spec.onnx.algorithm == "gptq" and spec.scheme != "int8-dynamic"
    job = _Job(
        model=model, folder=model_path.parent, spec=spec, weights=weights, importance=importance or {},
        types=place(weights, spec, sensitivity),
        hessians=gptq.Hessians(model_path, weights, windows, progress) if calibrated else None,
        threads=threads or probe()["usable_cores"] or 1,
    )  # fmt: skip
    data_path = data_file(out_path)
    with replacing(data_path) as data_beside, replacing(out_path) as beside:
        with data_beside.open("wb") as file:
            writer = external_data.Writer(file, data_path.name)
            job.write(writer, progress)
        beside.write_bytes(job.graph(writer).SerializeToString(deterministic=True))
    return job.plan(sensitivity)


def place(
    weights: Sequence[Linear], spec: QuantizeSpec, sensitivity: Mapping[str, float] | None
) -> dict[str, str]:
    """The type of each weight: the scheme's, one up for the most sensitive, and what spec.types says.

    sensitivity: weight name to KL in nats when it alone has the scheme's lower type.  The share
    spec.onnx.sensitive goes to the weights that give the most KL for their size, as long as they fit in.
    """
    if spec.scheme not in SCHEMES:
        raise RecipeError(
            f"{spec.scheme} is no scheme of an ONNX language model", hint=f"choose {', '.join(SCHEMES)}, F32"
        )
    usual, better = SCHEMES[spec.scheme]
    types = {weight.name: _usual(weight, usual) for weight in weights}
    room = spec.onnx.sensitive * sum(weight.parameters for weight in weights)
    measured = [weight for weight in weights if sensitivity and weight.name in sensitivity]
    for weight in sorted(measured, key=lambda one: -(sensitivity or {})[one.name] / one.parameters):
        if better and weight.parameters <= room:
            types[weight.name] = better
            room -= weight.parameters
    for weight in weights:
        said = next((kind for pattern, kind in spec.types if re.search(pattern, weight.name)), None)
        if said is not None and said not in TYPE_NAMES:
            raise RecipeError(
                f"{said} is no type of an ONNX weight ({weight.name})", hint="choose F32, Q8_0 or Q4_0"
            )
        types[weight.name] = TYPE_NAMES[said] if said else types[weight.name]
    return types


def _usual(weight: Linear, usual: str) -> str:
    """The scheme's type; the embedding is never in 8-bit columns, whose activations share one scale.

    What enters the head spreads the most, and the head is too large to stay float: blocks of 8 bits cost it
    an eighth more bytes.
    """
    return "int8" if usual == "int8-dynamic" and weight.lookups else usual


def _sensitivity(
    path: Path, weights: Sequence[Linear], spec: QuantizeSpec, *, importance: Importance,
    windows: NDArray[np.int64] | None, progress: Progress,
) -> dict[str, float] | None:  # fmt: skip
    """KL of each weight alone in the scheme's lower type, where the scheme keeps a share above it."""
    if spec.scheme not in SCHEMES or SCHEMES[spec.scheme][1] is None or not spec.onnx.sensitive:
        return None
    if windows is None or not windows.size:
        raise DataError(
            f"{spec.scheme} keeps the most sensitive weights at a higher precision, which takes calibration text",
            hint="give [data] calibration (--calibration), or set sensitive to 0",
        )
    from edgeslm.stages.onnx_sensitivity import measure

    measured = [
        weight for weight in weights if _usual(weight, SCHEMES[spec.scheme][0]) == SCHEMES[spec.scheme][0]
    ]
    return measure(path, measured, spec, importance=importance, windows=windows, progress=progress)


@dataclass(kw_only=True)
class _Job:
    """One model on its way into the new file."""

    model: Any
    folder: Path
    spec: QuantizeSpec
    weights: list[Linear]
    importance: Importance
    types: dict[str, str]
    hessians: gptq.Hessians | None
    threads: int

    def __post_init__(self) -> None:
        self.nodes: dict[str, list[Any]] = {}
        self.placed: dict[str, tuple[str, int, int]] = {}
        """Tensor to (type, parameters, bytes)."""
        self.warnings: list[str] = []
        self.fallbacks: list[dict[str, Any]] = []
        self._quantized: set[str] = set()

    def write(self, writer: external_data.Writer, progress: Progress) -> None:
        """Every initializer, quantized or as it is, one at a time."""
        by_name = {weight.name: weight for weight in self.weights}
        tables = _rotary_tables(self.model.graph)
        total = sum(weight.parameters for weight in self.weights)
        with progress.task(f"writing {self.spec.scheme}", total=total, unit="weights") as done:
            for tensor in self.model.graph.initializer:
                linear = by_name.get(tensor.name)
                if (
                    linear is not None
                    and self.types[linear.name] != "F32"
                    and self._write_linear(linear, writer)
                ):
                    done(linear.parameters)
                    continue
                values = external_data.read(tensor, self.folder)
                writer.add(tensor.name, values)
                if values.dtype == np.float32 and values.size > 1 and tensor.name not in tables:
                    self.placed[tensor.name] = ("F32", values.size, values.nbytes)
                done(linear.parameters if linear else 0)

    def _write_linear(self, linear: Linear, writer: external_data.Writer) -> bool:
        """Write a weight in its type; False where it stays float since it has values that are not finite."""
        kind = self.types[linear.name]
        try:
            arrays, nodes = self._blocks(linear, kind) if kind in BITS else self._columns(linear)
        except ModelError as error:
            if not self.spec.keep_going or "not finite" not in error.message:
                raise ModelError(f"{linear.name}: {error.message}", hint=error.hint) from error
            self.warnings.append(f"{linear.name}: {error.message}; it stays in F32")
            self.fallbacks.append(
                {"tensor": linear.name, "wanted": kind, "got": "F32", "reason": "values that are not finite"}
            )
            return False
        for name, values in arrays.items():
            writer.add(name, values)
        self.nodes |= nodes
        self.placed[linear.name] = (kind, linear.parameters, sum(values.nbytes for values in arrays.values()))
        return True

    def _blocks(self, linear: Linear, kind: str) -> tuple[dict[str, NDArray[Any]], dict[str, list[Any]]]:
        onnx_spec = self.spec.onnx
        # A tied weight is the embedding too, whose rows no later column makes up for.
        hessian = self.hessians.of(linear) if self.hessians and not linear.lookups else None
        shape: dict[str, Any] = {
            "bits": BITS[kind],
            "block": onnx_spec.block,
            "symmetric": onnx_spec.symmetric,
            "threads": self.threads,
        }
        if hessian is not None:
            blocks = gptq.quantize(linear.read(self.folder), hessian, **shape)
        else:
            algorithm = "search" if self.hessians else onnx_spec.algorithm
            channels = importance_of(linear, self.importance)
            blocks = nbits.quantize(
                linear.read(self.folder), algorithm=algorithm, importance=channels, **shape
            )
        nodes, more = onnx_nodes.block_nodes(linear, blocks, onnx_spec.accuracy_level)
        return onnx_nodes.block_arrays(linear.name, blocks) | more, nodes

    def _columns(self, linear: Linear) -> tuple[dict[str, NDArray[Any]], dict[str, list[Any]]]:
        kind, bits = COLUMNS[self.spec.onnx.target]
        codes, scales = nbits.quantize_rows(
            linear.read(self.folder), bits=bits, importance=importance_of(linear, self.importance),
            threads=self.threads,
        )  # fmt: skip
        nodes, more = onnx_nodes.column_nodes(linear, kind, self._quantized)
        return onnx_nodes.column_arrays(linear.name, codes, scales, kind) | more, nodes

    def graph(self, writer: external_data.Writer) -> Any:
        """The ModelProto with the new nodes and initializers."""
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self.model)
        gone = {
            node.output[0]
            for weight in self.weights
            for node in weight.transposes
            if weight.name in self.placed and self.placed[weight.name][0] != "F32"
        }
        kept = [
            new
            for node in self.model.graph.node
            if not (node.output and node.output[0] in gone)
            for new in self.nodes.get(node.output[0] if node.output else "", [node])
        ]
        del model.graph.node[:], model.graph.initializer[:], model.graph.value_info[:]
        model.graph.node.extend(kept)
        model.graph.initializer.extend(writer.initializers)
        if not any(opset.domain == onnx_nodes.CONTRIB for opset in model.opset_import):
            model.opset_import.append(onnx.helper.make_opsetid(onnx_nodes.CONTRIB, 1))
        return model

    def plan(self, sensitivity: Mapping[str, float] | None) -> dict[str, Any]:
        """The plan as the manifest keeps it."""
        types: dict[str, dict[str, int]] = {}
        for kind, parameters, nbytes in self.placed.values():
            row = types.setdefault(kind, {"tensors": 0, "parameters": 0, "bytes": 0})
            row["tensors"], row["parameters"] = row["tensors"] + 1, row["parameters"] + parameters
            row["bytes"] += nbytes
        onnx_spec = self.spec.onnx
        in_blocks = any(kind in BITS for kind, _, _ in self.placed.values())
        total = sum(row["parameters"] for row in types.values())
        return {
            "scheme": self.spec.scheme,
            "bits_per_weight": 8 * sum(row["bytes"] for row in types.values()) / total,
            "importance": None,
            "types": dict(sorted(types.items())),
            "fallbacks": self.fallbacks,
            "accuracy_level": onnx_spec.accuracy_level if in_blocks else None,
            "onnx": {
                "block": onnx_spec.block if in_blocks else None,
                "symmetric": onnx_spec.symmetric and onnx_spec.algorithm not in nbits.ONLY_ASYMMETRIC,
                "algorithm": onnx_spec.algorithm,
                "target": onnx_spec.target,
                "sensitivity_kl_nats": None if sensitivity is None else dict(sensitivity),
            },
            "warnings": self.warnings,
        }


def _rotary_tables(graph: Any) -> set[str]:
    """Sines and cosines of positions: in the file, but no weights of the model."""
    return {
        name
        for node in graph.node
        for name in {"GroupQueryAttention": node.input[7:9], "RotaryEmbedding": node.input[2:4]}.get(
            node.op_type, ()
        )
    }
