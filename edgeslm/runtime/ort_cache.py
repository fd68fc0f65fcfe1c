"""The key-value cache of an ONNX decoder: buffers that the graph updates in place, or tensors that it hands on.

N key-value heads, C context, P tokens of the past, D size of a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgeslm.runtime.ort_graph import DecoderGraph, Slot


class Cache(Protocol):
    """The past of one sequence, bound to an onnxruntime.IOBinding."""

    def advance(self) -> None:
        """After a run: what it gave is the past of the next."""

    def cut(self, keep: int) -> None:
        """Forget all tokens but the first `keep`; also after a run that failed."""


def new_cache(graph: DecoderGraph, binding: Any, context: int) -> Cache:
    """The cache that suits a graph, bound.  The binding's first output, the logits, must be bound before."""
    if graph.shares:
        return SharedCache(graph.slots, binding, context, graph.kv_element)
    return HandedCache(graph.slots, binding, graph.kv_element)


class SharedCache:
    """[1, N, C, D] buffers, past and present at once: a step adds its row to each, and nothing is copied.

    The operator reads no further than the tokens that the mask counts, so nothing is ever cleared.
    """

    def __init__(self, slots: Sequence[Slot], binding: Any, context: int, element: Any) -> None:
        # Zeroed memory comes from the system as pages that are resident only once a token reaches them.
        self._buffers = [np.zeros((1, slot.heads, context, slot.size), element) for slot in slots]
        for slot, buffer in zip(slots, self._buffers, strict=True):
            where = "cpu", 0, element, buffer.shape, buffer.ctypes.data
            binding.bind_input(slot.past, *where)
            binding.bind_output(slot.present, *where)

    def advance(self) -> None:
        """The present is the past already."""

    def cut(self, keep: int) -> None:
        """What lies behind the tokens that count is not read."""


class HandedCache:
    """[1, N, P, D] tensors that the graph makes anew in each run, one row longer: its outputs are its next inputs."""

    def __init__(self, slots: Sequence[Slot], binding: Any, element: Any) -> None:
        self._slots = slots
        self._binding = binding
        self._element = element
        self._held: list[Any] = []
        self.cut(0)

    def advance(self) -> None:
        self._bind(self._binding.get_outputs()[1:])

    def cut(self, keep: int) -> None:
        from onnxruntime import OrtValue

        rows = [held.numpy()[:, :, :keep] for held in self._held] if keep else [
            np.zeros((1, slot.heads, 0, slot.size), self._element) for slot in self._slots
        ]  # fmt: skip
        self._bind([OrtValue.ortvalue_from_numpy(np.ascontiguousarray(part)) for part in rows])

    def _bind(self, values: Sequence[Any]) -> None:
        for slot, value in zip(self._slots, values, strict=True):
            self._binding.bind_ortvalue_input(slot.past, value)
            # Bound anew each time: the engine would take the last run's tensor for one to write into.
            self._binding.bind_output(slot.present, "cpu")
        self._held = list(values)
