"""A runner under way to an answer: its logits narrowed to what is allowed, its choices scored.

V vocabulary size, S tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from edgeslm.runtime.sampling import largest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edgeslm.runtime.runner import Runner


class Constraint(Protocol):
    """What decides which tokens may come next."""

    def narrow(self, logits: NDArray[np.float32], left: int) -> NDArray[np.float32]:
        """[V] logits with minus infinity where a token is not allowed; left: tokens that may still come."""

    def accept(self, token: int) -> None:
        """A token was chosen."""


class Score(NamedTuple):
    """Log probabilities in nats, before any sampling rule: of the chosen token and of the likeliest ones."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class Steered:
    """A Runner for one answer; implements edgeslm.runtime.runner.Runner around another.

    scored: how many of the likeliest tokens each score names; None: no scores.
    """

    def __init__(
        self, runner: Runner, *, constraint: Constraint | None, scored: int | None, max_tokens: int
    ) -> None:
        self._runner = runner
        self._constraint = constraint
        self._scored = scored
        self._left = max_tokens
        self._pending: NDArray[np.float32] | None = None
        self.scores: list[Score] = []
        self.options, self.load_s, self.notes = runner.options, runner.load_s, runner.notes
        self.facts = runner.facts
        if constraint is not None:
            # A model without an end of its own needs some token that says: this is all.
            self.facts = replace(self.facts, stop_tokens=stop_tokens(runner))
        self.tokenize, self.token_bytes = runner.tokenize, runner.token_bytes
        self.prefill, self.logits = runner.prefill, runner.logits
        self.reset, self.synchronize, self.close = runner.reset, runner.synchronize, runner.close

    @property
    def position(self) -> int:
        """Tokens in the state."""
        return self._runner.position

    def last_logits(self) -> NDArray[np.float32]:
        """[V] logits after the newest token, narrowed; a view that the next call makes invalid."""
        logits = self._runner.last_logits()
        if self._scored is not None:
            self._pending = logits.copy()
        if self._constraint is None:
            return logits
        room = (self.options.context or 0) - self._runner.position + 1
        return self._constraint.narrow(logits, min(self._left, room))

    def step(self, token: int) -> None:
        """Append one token."""
        self.settle(token)
        self._left -= 1
        if self._constraint is not None:
            self._constraint.accept(token)
        self._runner.step(token)

    def settle(self, token: int) -> None:
        """Score the token that was chosen from the newest logits, if that was not done yet."""
        if self._pending is not None and self._scored is not None:
            self.scores.append(score(self._pending, token, self._scored))
            self._pending = None


def stop_tokens(runner: Runner) -> frozenset[int]:
    """The tokens that end a turn; of a model without any, its last one."""
    return runner.facts.stop_tokens or frozenset({runner.facts.vocab_size - 1})


def score(logits: NDArray[np.float32], token: int, top: int) -> Score:
    """The log softmax of [V] logits at `token` and at the `top` likeliest tokens."""
    exact = logits.astype(np.float64)
    highest = exact.max()
    norm = float(highest + np.log(np.exp(exact - highest).sum()))
    best: Sequence[int] = largest(logits, min(top, len(logits))).tolist() if top else ()
    return Score(token, float(exact[token]) - norm, tuple((one, float(exact[one]) - norm) for one in best))
