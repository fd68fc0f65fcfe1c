"""Ranges of a graph's activations on calibration examples: the whole of them, or what 8 bits serve best.

    min-max      the lowest and highest value seen
    percentile   all but one value in a hundred thousand, half of those at either end
    entropy      the threshold at which 8-bit values tell most of the distribution: S. Migacz, 8-bit inference
                 with TensorRT, GTC 2017; computed by onnxruntime.quantization.calibrate

Examples are run one at a time and only counts are kept, so memory does not grow with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.errors import ModelError, first_line

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from edgeslm.progress import Progress

    Feed = Mapping[str, NDArray[Any]]
    Span = tuple[float, float]

BINS = 2048
"""Of a histogram, over twice the largest magnitude."""
LEVELS = 128
"""Values that the entropy observer's 8 bits tell apart, both signs together."""
LEFT_OUT = 1e-5
"""Share of the values that the percentile observer gives up."""


def measure(
    data: bytes, tensors: Sequence[str], feeds: Sequence[Feed], observer: str, progress: Progress
) -> dict[str, Span]:
    """{tensor: (lowest, highest)} of activations of the graph `data` over `feeds` (input to array).

    Raises ModelError for activations that are not finite: the model is damaged.
    """
    passes = 1 if observer == "min-max" else 2
    session = _watching(data, tensors)
    with progress.task("ranges of activations", total=passes * len(feeds), unit="examples") as advance:
        spans = _spans(session, tensors, _counted(feeds, advance))
        if observer == "min-max":
            return spans
        counts = {name: np.zeros(BINS, np.int64) for name in tensors}
        for feed in _counted(feeds, advance):
            for name, values in zip(tensors, session.run(list(tensors), dict(feed)), strict=True):
                counts[name] += histogram(values, _magnitude(spans[name]))
    find = {"percentile": percentile_span, "entropy": entropy_span}[observer]
    return {
        name: _within(find(counts[name], _magnitude(span)), span) if _magnitude(span) else span
        for name, span in spans.items()
    }


def histogram(values: NDArray[np.float32], magnitude: float) -> NDArray[np.int64]:
    """[BINS] counts between -magnitude and magnitude."""
    edges = (-magnitude, magnitude) if magnitude else (-1.0, 1.0)
    counts: NDArray[np.int64] = np.histogram(values, BINS, range=edges)[0]
    return counts


def percentile_span(counts: NDArray[np.int64], magnitude: float) -> Span:
    """The range with LEFT_OUT / 2 of the values below it and as many above."""
    edges = np.linspace(-magnitude, magnitude, len(counts) + 1)
    shares = np.cumsum(counts) / counts.sum()
    low = int(np.searchsorted(shares, LEFT_OUT / 2, side="right"))
    high = int(np.searchsorted(shares, 1 - LEFT_OUT / 2))
    return float(edges[low]), float(edges[min(high + 1, len(counts))])


def entropy_span(counts: NDArray[np.int64], magnitude: float) -> Span:
    """The symmetric range of least KL(values clipped to it || the same in LEVELS steps), by ONNX Runtime."""
    from onnxruntime.quantization.calibrate import HistogramCollector

    collector = HistogramCollector("entropy", True, len(counts), LEVELS, None, "same")
    edges = np.linspace(-magnitude, magnitude, len(counts) + 1, dtype=np.float32)
    low, high = collector.get_entropy_threshold((counts, edges, edges[0], edges[-1], magnitude), LEVELS)[:2]
    return float(low), float(high)


def _magnitude(span: Span) -> float:
    return max(abs(span[0]), abs(span[1]))


def _within(found: Span, span: Span) -> Span:
    return max(found[0], span[0]), min(found[1], span[1])


def _counted(feeds: Sequence[Feed], advance: Any) -> Iterable[Feed]:
    for feed in feeds:
        yield feed
        advance(1)


def _spans(session: Any, tensors: Sequence[str], feeds: Iterable[Feed]) -> dict[str, Span]:
    low, high = np.full(len(tensors), np.inf), np.full(len(tensors), -np.inf)
    for feed in feeds:
        for number, values in enumerate(session.run(list(tensors), dict(feed))):
            low[number], high[number] = min(low[number], values.min()), max(high[number], values.max())
    for name, bottom, top in zip(tensors, low, high, strict=True):
        if not np.isfinite([bottom, top]).all():
            raise ModelError(
                f"the activations {name} are not finite on calibration examples",
                hint="the checkpoint is damaged, or training diverged",
            )
    return {name: (float(bottom), float(top)) for name, bottom, top in zip(tensors, low, high, strict=True)}


def _watching(data: bytes, tensors: Sequence[str]) -> Any:
    """A session of the graph that gives the tensors too."""
    import onnx
    import onnxruntime

    model = onnx.load_from_string(data)
    known = {output.name for output in model.graph.output}
    model.graph.output.extend(
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)
        for name in tensors
        if name not in known
    )
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    except Exception as error:  # the engine's own errors share no class
        raise ModelError(f"ONNX Runtime refuses the graph: {first_line(error)}") from error
