"""A runner without an engine: bytes are tokens, and a script decides what the model says."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

import numpy as np

from edgeslm.errors import EngineError
from edgeslm.runtime.runner import ModelFacts, RunnerOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

END = 256
"""The token that ends a turn."""
BOS = 257
VOCABULARY = 258
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


class FakeRunner:
    """Says `answers` one after the other: each starts where a prompt ends, END follows each.

    state: the tokens held.  computed: how many tokens each prefill got.
    """

    def __init__(
        self,
        *answers: bytes | Sequence[int],
        context: int = 4096,
        template: str | None = TEMPLATE,
        adds_bos: bool = False,
        on_step: Callable[[int], None] = lambda _count: None,
    ) -> None:
        self.facts = ModelFacts(
            architecture="fake",
            description="fake",
            parameters=1,
            weight_bytes=1,
            vocab_size=VOCABULARY,
            context_length=context,
            bos_token=BOS,
            eos_token=END,
            adds_bos=adds_bos,
            stop_tokens=frozenset({END}),
            chat_template=template,
        )
        self.options = RunnerOptions(threads=1, context=context)
        self.load_s = 0.0
        self.notes: tuple[str, ...] = ()
        self.state: list[int] = []
        self.computed: list[int] = []
        self.steps = 0
        self.closed = False
        self._answers = [list(answer) for answer in answers]
        self._rest: list[int] = []
        self._on_step = on_step

    @property
    def position(self) -> int:
        return len(self.state)

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        return ([BOS] if add_special and self.facts.adds_bos else []) + list(text.encode())

    def token_bytes(self, token: int, *, special: bool = False) -> bytes:
        if token < 256:
            return bytes([token])
        return {END: b"[end]", BOS: b"[bos]"}[token] if special else b""

    def _add(self, tokens: Sequence[int]) -> None:
        if len(self.state) + len(tokens) > (self.options.context or 0):
            raise EngineError("the context is full")
        self.state += tokens

    def prefill(self, tokens: Sequence[int]) -> None:
        self._add(tokens)
        self.computed.append(len(tokens))
        self._rest = []

    def step(self, token: int) -> None:
        self._add([token])
        self.steps += 1
        self._on_step(self.steps)

    def synchronize(self) -> None:
        pass

    def last_logits(self) -> NDArray[np.float32]:
        if not self._rest:
            self._rest = [*(self._answers.pop(0) if self._answers else []), END]
        logits = np.zeros(VOCABULARY, np.float32)
        logits[self._rest.pop(0)] = 100
        return logits

    def logits(self, tokens: Sequence[int], first: int = 0) -> NDArray[np.float32]:
        raise NotImplementedError

    def reset(self, keep: int = 0) -> None:
        assert keep >= 0
        del self.state[keep:]

    def close(self) -> None:
        self.closed = True


class Terminal(io.StringIO):
    """A text stream that calls itself a terminal."""

    def isatty(self) -> bool:
        return True
