"""The weights of a decoder's ONNX graph: what multiplies with them, what looks rows up in them.

    MatMul(x, W [K, N])                 a linear layer
    MatMul(x, Transpose(W [N, K]))      the same, stored as torch does
    Gather(Transpose(W [K, N]), ids)    the embedding, tied to the head's weight
    Gather(W [N, K], ids)               the embedding, tied to it or not

N outputs (for the embedding: tokens), K inputs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgeslm.errors import ModelError
from edgeslm.stages import external_data

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

FLOAT = 1
"""TensorProto.FLOAT"""

# Name of an ONNX weight to the GGUF names of weights with the same inputs, the first that is there counts.
_GGUF_NAMES = (
    (re.compile(r"layers\.(\d+)\..*(?:qkv_proj|q_proj|k_proj|v_proj)\."), ("attn_q", "attn_qkv")),
    (re.compile(r"layers\.(\d+)\..*(?:o_proj|dense)\."), ("attn_output",)),
    (re.compile(r"layers\.(\d+)\..*(?:gate_up_proj|gate_proj|up_proj|fc1)\."), ("ffn_gate", "ffn_up")),
    (re.compile(r"layers\.(\d+)\..*(?:down_proj|fc2)\."), ("ffn_down",)),
)
_HEAD_NAMES = ("output.weight", "token_embd.weight")


@dataclass(frozen=True, kw_only=True)
class Linear:
    """A weight matrix [N, K] with the nodes that use it."""

    name: str
    """Of the initializer."""
    tensor: Any
    transposed: bool
    """Stored [K, N], the way MatMul takes it; else [N, K]."""
    products: tuple[Any, ...]
    """MatMul nodes."""
    lookups: tuple[Any, ...]
    """Gather nodes of rows: this is the embedding."""
    transposes: tuple[Any, ...]
    """Transpose nodes in between, which a quantized weight does without."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K)"""
        first, second = self.tensor.dims
        return (second, first) if self.transposed else (first, second)

    @property
    def parameters(self) -> int:
        rows, columns = self.shape
        return rows * columns

    def read(self, folder: Path) -> NDArray[np.float32]:
        """The matrix [N, K]: a view of the file where that is possible."""
        values = external_data.read(self.tensor, folder)
        return values.T if self.transposed else values


def linears(model: Any) -> list[Linear]:
    """The float32 weight matrices of a graph that are only multiplied with or looked up, in graph order.

    A weight that anything else uses (a bias, a convolution) is none of them and stays as it is.
    """
    graph = model.graph
    stored = {tensor.name: tensor for tensor in graph.initializer if _is_matrix(tensor)}
    users = _users(graph)
    found = []
    order = {name: number for number, name in enumerate(_first_uses(graph, stored))}
    for name in sorted(order, key=order.__getitem__):
        linear = _linear(stored[name], users)
        if linear is not None:
            found.append(linear)
    if not found:
        raise ModelError("the graph has no float32 matrix to quantize", hint="start from the float32 export")
    return found


def importance_of(
    linear: Linear, importance: Mapping[str, NDArray[np.float32]]
) -> NDArray[np.float32] | None:
    """[K] mean squared inputs of a weight, by its own name or by that of the GGUF weight with the same inputs.

    Raises ModelError for importance of another length, which was made for another model.
    """
    for name in (linear.name, *_gguf_names(linear)):
        values = importance.get(name)
        if values is None:
            continue
        if values.size != linear.shape[1]:
            raise ModelError(
                f"the importance matrix has {values.size} channels for {name}, the weight {linear.shape[1]}",
                hint="it was made for another model",
            )
        return values
    return None


def _gguf_names(linear: Linear) -> tuple[str, ...]:
    if linear.lookups or "lm_head" in linear.name:
        return _HEAD_NAMES if linear.products else ()
    for pattern, names in _GGUF_NAMES:
        found = pattern.search(linear.name)
        if found:
            return tuple(f"blk.{found[1]}.{name}.weight" for name in names)
    return ()


def _is_matrix(tensor: Any) -> bool:
    return tensor.data_type == FLOAT and len(tensor.dims) == 2 and min(tensor.dims) > 1


def _users(graph: Any) -> dict[str, list[Any]]:
    users: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in dict.fromkeys(node.input):
            users.setdefault(name, []).append(node)
    for output in graph.output:
        users.setdefault(output.name, []).append(output)
    return users


def _first_uses(graph: Any, stored: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(name for node in graph.node for name in node.input if name in stored))


def _linear(tensor: Any, users: Mapping[str, list[Any]]) -> Linear | None:
    """What uses a matrix; None where something else than products and look-ups does."""
    products: list[tuple[Any, bool]] = []
    lookups: list[tuple[Any, bool]] = []
    transposes = []
    for node in users[tensor.name]:
        if getattr(node, "op_type", "") == "Transpose" and _permutation(node) in ([1, 0], []):
            transposes.append(node)
            for user in users.get(node.output[0], []):
                role = _role(user, node.output[0])
                (products if role == "MatMul" else lookups).append((user, True))
                if role is None:
                    return None
            continue
        role = _role(node, tensor.name)
        if role is None:
            return None
        (products if role == "MatMul" else lookups).append((node, False))
    direct = [not turned for _, turned in products] + [turned for _, turned in lookups]
    if len(set(direct)) != 1:
        return None
    return Linear(
        name=tensor.name, tensor=tensor, transposed=direct[0], transposes=tuple(transposes),
        products=tuple(node for node, _ in products), lookups=tuple(node for node, _ in lookups),
    )  # fmt: skip


def _role(node: Any, name: str) -> str | None:
    """MatMul or Gather where `name` is the matrix of one, by rows."""
    kind = getattr(node, "op_type", "")
    if kind == "MatMul" and node.input[1] == name and node.input[0] != name:
        return "MatMul"
    if kind == "Gather" and node.input[0] == name and node.input[1] != name:
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
        return "Gather" if axis == 0 else None
    return None


def _permutation(node: Any) -> list[int]:
    return next((list(attribute.ints) for attribute in node.attribute if attribute.name == "perm"), [])
