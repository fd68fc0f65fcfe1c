"""How much each weight of a decoder suffers from fewer bits: the KL divergence when it alone has them.

One session serves all weights: they become inputs with a default, and a quantized one is fed in its
place.  Activations that a scheme quantizes as well pass a switch, which is off but for the weight at hand.

B windows, S tokens, V vocabulary, N outputs, K inputs of a weight.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.device import probe
from edgeslm.errors import ModelError
from edgeslm.progress import Quiet
from edgeslm.stages import external_data, nbits, onnx_session
from edgeslm.stages.onnx_linear import importance_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edgeslm.progress import Progress
    from edgeslm.specs import OnnxSpec, QuantizeSpec
    from edgeslm.stages.onnx_linear import Linear

WINDOWS, TOKENS = 2, 64
"""Of the calibration text: enough to put weights in an order, at one short prefill a weight."""


def measure(
    path: Path,
    weights: Sequence[Linear],
    spec: QuantizeSpec,
    *,
    importance: Mapping[str, NDArray[np.float32]],
    windows: NDArray[np.int64],
    progress: Progress | None = None,
) -> dict[str, float]:
    """Weight name to KL(float32 || it alone quantized as the scheme's bulk is), in nats a token.

    path: the float32 graph.  windows: [B, S] token ids, of which the first TOKENS of WINDOWS rows, spread
    evenly, are used and the second half of each is scored.  Raises ModelError where the graph's own logits
    are not finite.
    """
    rows = [index * len(windows) // min(WINDOWS, len(windows)) for index in range(min(WINDOWS, len(windows)))]
    tokens = windows[rows, :TOKENS]
    first = tokens.shape[1] // 2
    threads = probe()["usable_cores"] or 1
    dynamic = spec.scheme == "int8-dynamic"
    model = switched(external_data.load_graph(path), weights, dynamic=dynamic)
    session = onnx_session.open_session(model, path.parent, threads=threads)
    reference = onnx_session.logits(session, tokens, first=first)
    if not np.isfinite(reference).all():
        raise ModelError(f"{path.name}: the float32 graph's logits are not finite")
    found = {}
    with (progress or Quiet()).task("sensitivity", total=len(weights), unit="weights") as done:
        for weight in weights:
            values = _quantized(weight, path.parent, spec, importance, threads)
            more: dict[str, NDArray[Any]] = {weight.name: values}
            if dynamic:
                more |= {switch: np.array([True]) for switch in _switches(weight)}
            found[weight.name] = divergence(
                reference, onnx_session.logits(session, tokens, first=first, more=more)
            )
            done(1)
    return found


def switched(model: Any, weights: Sequence[Linear], *, dynamic: bool) -> Any:
    """A copy of a graph whose `weights` may be fed; dynamic: and whose activations may be rounded to 8 bits.

    The switch of a product is the input NAME_switch, bool [1], False where it is not fed.
    """
    import onnx
    from onnx import TensorProto, helper

    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    for weight in weights:
        graph.input.append(
            helper.make_tensor_value_info(weight.name, TensorProto.FLOAT, list(weight.tensor.dims))
        )
    if not dynamic:
        return copy
    products = {node.output[0] for weight in weights for node in weight.products}
    nodes = []
    for node in graph.node:
        if node.output and node.output[0] in products:
            switch = _switch(node)
            graph.initializer.append(onnx.numpy_helper.from_array(np.array([False]), switch))
            graph.input.append(helper.make_tensor_value_info(switch, TensorProto.BOOL, [1]))
            nodes += _rounding(node.input[0], switch)
            node.input[0] = f"{switch}_x"
        nodes.append(node)
    ordered = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(ordered)
    return copy


def divergence(reference: NDArray[np.float32], candidate: NDArray[np.float32]) -> float:
    """Mean KL(reference || candidate) of [R, V] logits, in nats; infinite where the candidate's are not finite."""
    if not np.isfinite(candidate).all():
        return float("inf")
    total = 0.0
    for theirs, ours in zip(np.array_split(reference, 16), np.array_split(candidate, 16), strict=True):
        p, q = _log_softmax(theirs), _log_softmax(ours)
        total += float((np.exp(p) * (p - q)).sum())
    return max(total / len(reference), 0.0)


def _log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True, initial=-np.inf)
    shifted -= np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return shifted


def _switch(node: Any) -> str:
    return f"{node.output[0]}_switch"


def _switches(weight: Linear) -> list[str]:
    return [_switch(node) for node in weight.products]


def _rounding(x: str, switch: str) -> list[Any]:
    """x as DynamicQuantizeLinear would leave it, where the switch is on."""
    from onnx import helper

    parts = [f"{switch}_{part}" for part in ("u8", "scale", "zero")]
    return [
        helper.make_node("DynamicQuantizeLinear", [x], parts),
        helper.make_node("DequantizeLinear", parts, [f"{switch}_rounded"]),
        helper.make_node("Where", [switch, f"{switch}_rounded", x], [f"{switch}_x"]),
    ]


def _quantized(
    weight: Linear,
    folder: Path,
    spec: QuantizeSpec,
    importance: Mapping[str, NDArray[np.float32]],
    threads: int,
) -> NDArray[np.float32]:
    """What a weight becomes in the scheme's lower type, as it is stored."""
    values, channels, onnx_spec = weight.read(folder), importance_of(weight, importance), spec.onnx
    if spec.scheme == "int8-dynamic":
        codes, scales = nbits.quantize_rows(values, bits=8, importance=channels, threads=threads)
        result = (codes.astype(np.float32) - 128) * scales[:, None]
    else:
        result = nbits.dequantize(
            nbits.quantize(
                values, bits=4, block=onnx_spec.block, symmetric=onnx_spec.symmetric,
                algorithm=_stand_in(onnx_spec), importance=channels, threads=threads,
            )
        )  # fmt: skip
    return np.ascontiguousarray(result.T) if weight.transposed else result


def _stand_in(spec: OnnxSpec) -> str:
    """The algorithm that puts weights in order: gptq's own would take hours."""
    return "search" if spec.algorithm == "gptq" else spec.algorithm
