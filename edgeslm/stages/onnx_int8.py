"""A classifier's float32 ONNX graph in 8 or 4 bits, held against itself on calibration examples.

    scheme         products        tables    recurrent   sensitive weights
    int8-dynamic   int8-dynamic    int8 *    int8        F32
    int8-static    int8-static     int8 *    int8        F32
    int8           int8            int8      int8        F32
    int4           int4            int4      int8        -
    int4-int8      int4            int4      int8        int8

What each type does to the graph: edgeslm.stages.onnx_rewrite.

What is lost is measured: KL(float32 || quantized) of the class probabilities on the calibration examples.
    * Tables take 4 bits where that costs less than TABLE_NATS: half of a small encoder is its embedding.
Where the whole loses more than ENOUGH_NATS, weights go a precision up: those first whose loss is the
largest for their size, each measured by leaving it alone out, until the loss is small enough or the share
`sensitive` of the weights is used up.  Without examples nothing is measured, and said so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from edgeslm.errors import DataError, ModelError, RecipeError, first_line
from edgeslm.progress import Quiet
from edgeslm.stages import onnx_ranges
from edgeslm.stages.onnx_rewrite import Rewriter, Weight
from edgeslm.stages.onnx_session import load_onnxruntime

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from edgeslm.progress import Progress
    from edgeslm.specs import OnnxSpec

    Feed = Mapping[str, NDArray[Any]]


class Scheme(NamedTuple):
    product: str
    table: str
    better: str | None
    """What sensitive weights take."""


SCHEMES = {
    "int8-dynamic": Scheme("int8-dynamic", "int8", "F32"),
    "int8-static": Scheme("int8-static", "int8", "F32"),
    "int8": Scheme("int8", "int8", "F32"),
    "int4": Scheme("int4", "int4", None),
    "int4-int8": Scheme("int4", "int4", "int8"),
}
WHOLE_NUMBERS = ("int8-dynamic", "int8-static")
TABLE_NATS = 1e-3
"""What 4-bit tables may cost, everything else in float."""
ENOUGH_NATS = 5e-3
"""A loss that changes one decision in a few hundred at most: nothing needs to go a precision up."""
BAD_AGREEMENT = 0.98
"""Below it the classifier is another one."""
SEARCH_EXAMPLES = 32
"""Examples that single weights are measured on; the result is measured on all."""


class Loss(NamedTuple):
    """How far a quantized classifier is from the float32 one."""

    nats: float
    """Mean KL(float32 || quantized) of the class probabilities."""
    agreement: float
    """Share of the examples with the same likeliest class."""


def quantize_classifier(
    data: bytes, scheme: str, spec: OnnxSpec, calibration: Sequence[Feed], progress: Progress | None = None
) -> tuple[bytes, dict[str, Any], list[str]]:
    """(the graph, facts for the plan, warnings) of a float32 classifier with one output of logits [B, L].

    calibration: one example each, input name to array [1, ...]; int8-static can't do without.
    facts: placed {weight: (type, parameters, bytes)}, accuracy_level and onnx as the manifest has them.
    Raises RecipeError for an unknown scheme, DataError for missing calibration, ModelError for a graph that
    has nothing to quantize, is not finite or that ONNX Runtime refuses afterwards.
    """
    if scheme not in SCHEMES:
        raise RecipeError(
            f"{scheme!r} is no scheme of an ONNX classifier", hint=f"one of {', '.join(SCHEMES)}"
        )
    if scheme == "int8-static" and not calibration:
        raise DataError(
            "int8-static takes the ranges of activations from examples, and there are none",
            hint="name some in [data] (or --calibration), or choose int8-dynamic",
        )
    job = _Job(data, scheme, spec, calibration, progress or Quiet())
    types = job.usual_types()
    if not types:
        raise ModelError(
            "the graph has no weight that is worth fewer bits", hint="keep it in F32: it is small as it is"
        )
    loss = job.loss(types) if calibration else None
    if loss is not None:
        loss = job.shrink_tables(types, loss)
        loss = job.mend(types, loss)
    result = job.rewriter.build(types)
    return result, job.facts(types, loss), job.warnings(loss)


@dataclass
class _Job:
    data: bytes
    scheme: str
    spec: OnnxSpec
    calibration: Sequence[Feed]
    progress: Progress
    measured: dict[str, float] = field(default_factory=dict)
    """Weight to what leaving it alone out saves, in nats."""

    def __post_init__(self) -> None:
        self.rewriter = Rewriter(self.data, self.spec, {})
        self._logits = _logits(self.rewriter.float_graph(), self.calibration)
        if self.scheme == "int8-static":
            tensors = sorted({weight.activation for weight in self.rewriter.weights if weight.activation})
            self.rewriter.ranges = onnx_ranges.measure(
                self.rewriter.float_graph(), tensors, self.calibration, self.spec.observer, self.progress
            )

    def usual_types(self) -> dict[str, str]:
        """The type of every weight that the scheme changes."""
        scheme = SCHEMES[self.scheme]
        return {
            weight.name: {"product": scheme.product, "table": scheme.table, "recurrent": "int8"}[weight.kind]
            for weight in self.rewriter.weights
        }

    def loss(self, types: Mapping[str, str], examples: int | None = None) -> Loss:
        """Of the graph in these types, on the first examples."""
        feeds = self.calibration[:examples]
        found = _logits(self.rewriter.build(types), feeds)
        return compare(self._logits[: len(feeds)], found)

    def shrink_tables(self, types: dict[str, str], loss: Loss) -> Loss:
        """Tables to 4 bits where the scheme is about whole numbers and they alone cost next to nothing."""
        tables = [weight.name for weight in self.rewriter.weights if weight.kind == "table"]
        if self.scheme not in WHOLE_NUMBERS or not tables:
            return loss
        smaller = dict.fromkeys(tables, "int4")
        if self.loss(smaller).nats > TABLE_NATS:
            return loss
        types.update(smaller)
        return self.loss(types)

    def mend(self, types: dict[str, str], loss: Loss) -> Loss:
        """Sensitive weights a precision up while the loss is too large and the share lasts."""
        better = SCHEMES[self.scheme].better
        if better is None or loss.nats <= ENOUGH_NATS or not self.spec.sensitive:
            return loss
        candidates = [weight for weight in self.rewriter.weights if weight.kind != "recurrent"]
        whole = self.loss(types, SEARCH_EXAMPLES).nats
        with self.progress.task("sensitive weights", total=len(candidates), unit="weights") as advance:
            for weight in candidates:
                left_out = self.loss(types | {weight.name: better}, SEARCH_EXAMPLES).nats
                self.measured[weight.name] = whole - left_out
                advance(1)
        room = self.spec.sensitive * sum(weight.parameters for weight in self.rewriter.weights)
        for weight in sorted(candidates, key=lambda each: -self.measured[each.name] / each.parameters):
            if weight.parameters > room or self.measured[weight.name] <= 0:
                continue
            types[weight.name] = better
            room -= weight.parameters
            loss = self.loss(types)
            if loss.nats <= ENOUGH_NATS:
                break
        return loss

    def facts(self, types: Mapping[str, str], loss: Loss | None) -> dict[str, Any]:
        """Parts of the plan, see `quantize_classifier`."""
        weights = {weight.name: weight for weight in self.rewriter.weights}
        kinds = {name: kind for name, kind in types.items() if kind != "F32"}
        products = {kind for name, kind in kinds.items() if weights[name].kind == "product"}
        in_blocks = bool(products & {"int8", "int4"}) or "int4" in kinds.values()
        better = SCHEMES[self.scheme].better
        return {
            "placed": {
                name: (kind, weights[name].parameters, self.rewriter.stored_bytes(weights[name], kind))
                for name, kind in kinds.items()
            },
            "fallbacks": [self._fallback(weight) for weight in weights.values() if weight.kind == "recurrent"]
            if self.scheme != "int8"
            else [],
            "accuracy_level": self.spec.accuracy_level if products & {"int8", "int4"} else None,
            "onnx": {
                "block": self.spec.block if in_blocks else None,
                "symmetric": self.spec.symmetric,
                "algorithm": self.spec.algorithm if in_blocks else None,
                "target": self.spec.target if self.scheme in WHOLE_NUMBERS else None,
                "observer": self.spec.observer if self.scheme == "int8-static" else None,
                "kept": sorted(name for name, kind in types.items() if kind == better),
                "sensitivity_kl_nats": dict(self.measured) or None,
                "examples": len(self.calibration),
                "kl_nats": None if loss is None else loss.nats,
                "top1_agreement": None if loss is None else loss.agreement,
            },
        }

    def _fallback(self, weight: Weight) -> dict[str, str]:
        reason = "recurrent layers compute in float: their weights are stored in 8 bits"
        return {"tensor": weight.name, "wanted": self.scheme, "got": "int8", "reason": reason}

    def warnings(self, loss: Loss | None) -> list[str]:
        if loss is None:
            return [f"{self.scheme}: nothing was measured, since there are no calibration examples"]
        if loss.agreement < BAD_AGREEMENT:
            return [
                f"{self.scheme}: {100 * (1 - loss.agreement):.1f} % of {len(self.calibration)} calibration examples "
                f"get another class than in F32 (KL {loss.nats:.2g} nats): choose int8, or raise sensitive"
            ]
        return []


def compare(expected: NDArray[np.float64], found: NDArray[np.float64]) -> Loss:
    """expected, found: logits [B, L].  A result that is not finite loses infinitely much."""
    if not np.isfinite(found).all():
        return Loss(float("inf"), 0.0)
    log_p, log_q = _log_softmax(expected), _log_softmax(found)
    nats = float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean())
    return Loss(max(nats, 0.0), float((log_p.argmax(-1) == log_q.argmax(-1)).mean()))


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(-1, keepdims=True)
    values: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return values


def _logits(data: bytes, feeds: Sequence[Feed]) -> NDArray[np.float64]:
    """[B, L] of a graph, one example at a time: padding would be part of a dynamic range."""
    onnxruntime = load_onnxruntime("what was quantized can't be checked")
    if not feeds:
        return np.empty((0, 0))
    try:
        session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
        rows = [session.run(["logits"], dict(feed))[0][0] for feed in feeds]
    except Exception as error:  # the engine's own errors share no class
        raise ModelError(f"ONNX Runtime refuses the quantized graph: {first_line(error)}") from error
    return np.stack(rows).astype(np.float64)
