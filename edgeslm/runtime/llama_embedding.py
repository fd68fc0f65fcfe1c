"""Vectors of texts out of llama.cpp: hidden states after the last norm, pooled, of length 1.

The states are pooled here, since llama.cpp pools each of its batches for itself: a text of several would get
the vector of its last one.

S tokens, E size of a hidden state.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.runtime.engine import new_context

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from edgeslm.gguf_file import GgufFile
    from edgeslm.runtime.engine import Engine
    from edgeslm.runtime.runner import RunnerOptions

CHUNK = 64
"""Tokens computed at once.  llama.cpp computes V logits beside each hidden state: more would take much memory."""
SMALLEST = 512
"""Tokens of the first context; a longer text makes a larger one."""
KINDS = {None: "mean", 0: "mean", 1: "mean", 2: "first", 3: "last"}
"""`pooling_type` of a GGUF file (llama.h, llama_pooling_type) to what stands for the text; rerankers have 4."""


@dataclass(frozen=True, kw_only=True)
class Pooling:
    """How the hidden states of a text become one."""

    kind: str
    """mean, first or last."""
    causal: bool
    """Whether a token sees only those before it; else a text is computed at once."""


def read_pooling(file: GgufFile) -> Pooling | None:
    """What a file declares, for a model of language the mean; None where its output is no vector of the text."""
    declared = file.get(f"{file.architecture}.pooling_type")
    causal = file.get(f"{file.architecture}.attention.causal") is not False
    kind = KINDS.get(declared) if declared is None or type(declared) is int else None
    return None if kind is None else Pooling(kind=kind, causal=causal)


class EmbeddingContext:
    """A second context of a loaded model, as long as the longest text so far; for one thread."""

    def __init__(
        self, engine: Engine, model: Any, options: RunnerOptions, pooling: Pooling, pool: int | None
    ) -> None:
        """options: of the runner, whose threads it shares, too, by `pool`."""
        self._engine, self._model, self._options = engine, model, options
        self._pooling, self._pool = pooling, pool
        self._context: Any = None
        self._room = 0
        self._size = int(engine.api.llama_model_n_embd_out(model))

    def vector(self, tokens: Sequence[int], interrupted: Callable[[], bool]) -> NDArray[np.float32] | None:
        """[E] of length 1 from `tokens` [S]; None when interrupted between two chunks.  Raises EngineError."""
        self._make_room(len(tokens))
        api, chunk = self._engine.api, CHUNK if self._pooling.causal else self._room
        api.llama_memory_clear(api.llama_get_memory(self._context), False)
        pooled = np.zeros(self._size)
        for start in range(0, len(tokens), chunk):
            if interrupted():
                return None
            states = self._states(tokens[start : start + chunk])
            if self._pooling.kind == "mean":
                pooled += states.sum(axis=0, dtype=np.float64)
            elif self._pooling.kind == "last" or start == 0:
                pooled[:] = states[-1 if self._pooling.kind == "last" else 0]
        length = float(np.linalg.norm(pooled))
        if not (0 < length < np.inf):
            raise self._engine.failure("the model's hidden states make no vector of this text")
        return (pooled / length).astype(np.float32)

    def free(self) -> None:
        """Free the memory; the next vector takes it anew."""
        if self._context:
            self._engine.api.llama_free(self._context)
        self._context, self._room = None, 0

    def _make_room(self, count: int) -> None:
        """A context of at least `count` tokens, at most as long as the runner's."""
        if count <= self._room:
            return
        self.free()
        most = self._options.context or count
        room = min(most, max(SMALLEST, 1 << (count - 1).bit_length()))
        batch = min(room, CHUNK) if self._pooling.causal else room
        sized = replace(self._options, context=room, batch=batch, ubatch=batch)
        self._context = new_context(self._engine, self._model, sized, "embeddings", hidden_states=True)
        self._room = room
        if self._pool is not None:
            self._engine.attach_threadpool(self._context, self._pool)

    def _states(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """[S, E] a view of the hidden states of the next tokens."""
        api = self._engine.api
        ids = np.asarray(tokens, np.int32)
        batch = api.llama_batch()
        batch.token, batch.n_tokens = ids.ctypes.data_as(ctypes.POINTER(ctypes.c_int32)), len(ids)
        self._engine.forget_log()
        code = api.llama_decode(self._context, batch)
        states = None if code else api.llama_get_embeddings(self._context)
        if not states:
            raise self._engine.failure(f"llama.cpp could not compute an embedding (code {code})")
        return np.ctypeslib.as_array(states, (len(ids), self._size))
