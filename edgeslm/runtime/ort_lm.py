"""OrtRunner: an ONNX language model on ONNX Runtime, its tensors bound to memory that is taken once.

What the graph takes and gives is in runtime/ort_graph.py.  A decode step binds the attention mask anew, as
one token longer, and runs; nothing is copied and nothing is allocated here.

V vocabulary size, S tokens, P tokens before them, R rows of logits.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.errors import EngineError, RecipeError, first_line
from edgeslm.onnx_file import read_onnx
from edgeslm.runtime.fit import check_fits, with_sizes
from edgeslm.runtime.host import memory_bytes
from edgeslm.runtime.ort_cache import new_cache
from edgeslm.runtime.ort_graph import FIRST_LOGIT, read_facts, read_graph
from edgeslm.runtime.ort_session import check_operators, open_session
from edgeslm.runtime.tokenizer import TOKENIZER_NAME, TextTokenizer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from edgeslm.bundle import Bundle
    from edgeslm.runtime.ort_graph import DecoderGraph
    from edgeslm.runtime.ort_session import Opened
    from edgeslm.runtime.runner import RunnerOptions

ALL_LOGITS_UBATCH = 128
"""Most tokens of a run of a graph that computes the logits of each of them, V numbers."""


class OrtRunner:
    """One ONNX language model with one sequence of state; implements edgeslm.runtime.runner.Runner."""

    @classmethod
    def open(cls, bundle: Bundle, options: RunnerOptions) -> OrtRunner:
        """The runner of a bundle."""
        return cls(bundle, options)

    def __init__(
        self, bundle: Bundle, options: RunnerOptions, *, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """Load a bundle.

        Raises BundleError for a manifest, tokenizer and graph that don't fit each other, ModelError for a
        damaged file, RecipeError for impossible options, EngineError when the model does not fit the machine
        or ONNX Runtime is missing or refuses it.
        """
        self.facts = read_facts(bundle)
        options = _sized(options, self.facts.context_length)
        context = options.context or 0
        file = read_onnx(bundle.weights)
        check_operators(file)
        check_fits(bundle.name, (bundle.weights_bytes, 0), context, memory_bytes())
        start = clock()
        self._tokenizer = TextTokenizer(bundle.path / TOKENIZER_NAME, self.facts.vocab_size)
        opened = open_session(bundle.weights, threads=options.threads or 1, provider=options.provider)
        graph = read_graph(opened.session, file, bundle, self.facts)
        check_fits(bundle.name, (bundle.weights_bytes, graph.cache_bytes(context)), context, memory_bytes())
        self.options = _in_force(options, graph, opened)
        self.notes = (*opened.notes, *_without_effect(options))
        self._session: Any = opened.session
        self._graph = graph
        self._position = 0
        self._prepare(context)
        self.load_s = clock() - start

    def _prepare(self, context: int) -> None:
        """The memory of inputs and outputs, and what stays bound to it."""
        vocabulary, element = self.facts.vocab_size, self._graph.logits_element
        self._ids = np.zeros(self.options.ubatch, np.int64)
        self._mask = np.ones(context, np.int64)
        self._places = np.arange(context, dtype=np.int64)
        self._first = np.zeros(1, np.int64)
        self._row = np.zeros((1, vocabulary), element)
        # Pages of it become resident only where a graph computes the logits of all tokens of a run.
        rows = 1 if self._graph.takes_first_logit else self.options.ubatch
        self._rows = self._row if rows == 1 else np.empty((rows, vocabulary), element)
        self._last = self._row[0]
        self._bound: tuple[int, int] | None = None
        self._binding: Any = self._session.io_binding()
        self._bind_run(1, self._row)
        if self._graph.takes_first_logit:
            self._bind_numbers(FIRST_LOGIT, (1,), self._first)
        self._cache = new_cache(self._graph, self._binding, context)

    @property
    def position(self) -> int:
        """Tokens in the state."""
        return self._position

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        """Token ids of `text`; add_special: BOS/EOS as the model wants; parse_special: read <|...|> forms."""
        return self._tokenizer.encode(text, add_special=add_special, parse_special=parse_special)

    def token_bytes(self, token: int, *, special: bool = False) -> bytes:
        """The bytes of one token (may be part of a UTF-8 character); special: render control tokens too."""
        self._check_tokens((token,))
        return self._tokenizer.bytes_of(token, special=special)

    def prefill(self, tokens: Sequence[int]) -> None:
        """Append `tokens`, computing logits for the last only.  Raises EngineError if they don't fit."""
        self._make_room(len(tokens), self._position)
        self._check_tokens(tokens)
        for start in range(0, len(tokens), self.options.ubatch):
            chunk = tokens[start : start + self.options.ubatch]
            rows = self._rows if len(self._rows) == 1 else self._rows[: len(chunk)]
            self._run(chunk, rows, first=len(chunk) - 1)
            self._last = rows[-1]

    def step(self, token: int) -> None:
        """Append one token: one decode step.  Raises EngineError when the context is full."""
        self._make_room(1, self._position)
        self._check_tokens((token,))
        self._run((token,), self._row, first=0)
        self._last = self._row[0]

    def synchronize(self) -> None:
        """Return when all submitted work is done: a run returns no earlier."""

    def last_logits(self) -> NDArray[np.float32]:
        """[V] logits after the newest token: a view that the next prefill, step or reset makes invalid."""
        if not self._position:
            raise EngineError("there are no logits before the first token")
        return np.asarray(self._last, np.float32)

    def logits(self, tokens: Sequence[int], first: int = 0) -> NDArray[np.float32]:
        """[S - first, V] logits at positions first.. of a fresh sequence; resets before and after."""
        if not 0 <= first <= len(tokens):
            raise ValueError(f"first={first} is outside the {len(tokens)} tokens")
        self._make_room(len(tokens), 0)
        self._check_tokens(tokens)
        self.reset()
        element = self._graph.logits_element
        result = np.empty((len(tokens) - first, self.facts.vocab_size), element)
        for start in range(0, len(tokens), self.options.ubatch):
            chunk = tokens[start : start + self.options.ubatch]
            skipped = min(max(first - start, 0), len(chunk))
            wanted = result[max(start - first, 0) :][: len(chunk) - skipped]
            if self._graph.takes_first_logit and len(wanted):
                self._run(chunk, wanted, first=skipped)
                continue
            rows = self._rows if len(self._rows) == 1 else self._rows[: len(chunk)]
            self._run(chunk, rows, first=len(chunk) - 1)
            wanted[:] = rows[len(rows) - len(wanted) :]
        self.reset()
        return np.asarray(result, np.float32)

    def reset(self, keep: int = 0) -> None:
        """Forget all tokens but the first `keep`."""
        self._position = min(keep, self._position)
        self._cache.cut(self._position)

    def close(self) -> None:
        """Free the engine's memory; the runner can't be used afterwards."""
        self._binding = self._session = self._cache = None  # type: ignore[assignment]

    def _run(self, tokens: Sequence[int], rows: NDArray[Any], *, first: int) -> None:
        """Compute at most `ubatch` tokens: into `rows` [R, V] go the logits from token `first` on, or all."""
        count = len(tokens)
        self._ids[:count] = tokens
        self._first[0] = first
        self._bind_run(count, rows)
        total = self._position + count
        self._bind_numbers("attention_mask", (1, total), self._mask)
        if self._graph.takes_positions:
            self._bind_numbers("position_ids", (1, count), self._places[self._position :])
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # the engine's errors share no class of their own
            self._cache.cut(self._position)
            raise EngineError(f"ONNX Runtime could not compute: {first_line(error)}") from error
        self._cache.advance()
        self._position = total

    def _bind_run(self, count: int, rows: NDArray[Any]) -> None:
        """The tokens' and logits' places, unless the last run had the same."""
        address = int(rows.ctypes.data)
        if self._bound == (count, address):
            return
        self._bind_numbers("input_ids", (1, count), self._ids)
        self._binding.bind_output("logits", "cpu", 0, rows.dtype.type, (1, *rows.shape), address)
        self._bound = count, address

    def _bind_numbers(self, name: str, shape: tuple[int, ...], values: NDArray[np.int64]) -> None:
        self._binding.bind_input(name, "cpu", 0, np.int64, shape, values.ctypes.data)

    def _check_tokens(self, tokens: Sequence[int]) -> None:
        """The engine may read outside of its tables."""
        for token in tokens:
            if not 0 <= token < self.facts.vocab_size:
                raise EngineError(f"token {token} is outside the vocabulary of {self.facts.vocab_size}")

    def _make_room(self, count: int, taken: int) -> None:
        context = self.options.context or 0
        if taken + count > context:
            raise EngineError(
                f"the context is full: {taken} of {context} tokens taken, {count} more don't fit",
                hint="use a larger context (--context) or a shorter text",
            )


def _sized(options: RunnerOptions, trained: int) -> RunnerOptions:
    """`options` with threads and context.  Positions beyond the trained ones are not in the graph's tables."""
    sized = with_sizes(options, trained)
    if (sized.context or 0) > trained:
        raise RecipeError(
            f"context is {sized.context} tokens, the model has positions for {trained}",
            hint=f"use a context of at most {trained}",
        )
    return sized


def _in_force(options: RunnerOptions, graph: DecoderGraph, opened: Opened) -> RunnerOptions:
    if options.kv_type not in (None, graph.kv_type):
        raise RecipeError(
            f"the KV cache of this model is {graph.kv_type}, not {options.kv_type}",
            hint="the graph decides on it: leave --kv-type out",
        )
    batch = min(options.batch, options.context or 0)
    most = options.ubatch if graph.takes_first_logit else min(options.ubatch, ALL_LOGITS_UBATCH)
    return replace(
        options, batch=batch, ubatch=min(most, batch), kv_type=graph.kv_type, flash_attention=None, mmap=True,
        mlock=False, gpu_layers=None, provider=opened.provider,
    )  # fmt: skip


def _without_effect(options: RunnerOptions) -> list[str]:
    """What ONNX Runtime does as it does, whatever is asked."""
    asked = {
        "flash attention": options.flash_attention is not None,
        "reading instead of mapping the file": not options.mmap,
        "locking weights in memory": options.mlock,
        "layers on a GPU": options.gpu_layers is not None,
    }
    return [f"ONNX Runtime has no choice of {name}" for name, is_asked in asked.items() if is_asked]
