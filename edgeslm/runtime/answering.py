"""A language model that answers requests one after the other, keeping what it has read.

S tokens.
"""

from __future__ import annotations

import secrets
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgeslm.errors import DataError, ModelError
from edgeslm.runtime.constrain import TokenBytes, TokenConstraint
from edgeslm.runtime.generate import Generation
from edgeslm.runtime.runner import Embedder
from edgeslm.runtime.steering import Steered, stop_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from edgeslm.runtime.grammar import Grammar
    from edgeslm.runtime.runner import Runner
    from edgeslm.runtime.sampling import Sampling
    from edgeslm.runtime.steering import Score


@dataclass(frozen=True, kw_only=True)
class Question:
    """What one answer is to be; tokens [S] of the prompt."""

    tokens: Sequence[int]
    sampling: Sampling
    max_tokens: int
    stop: Sequence[str] = ()
    grammar: Grammar | None = None
    scored: int | None = None
    """How many likeliest tokens the scores name; None: no scores."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some text of an answer, with the scores of the tokens chosen since the last piece."""

    text: str
    scores: tuple[Score, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The end of an answer: finish_reason is stop, length or interrupted."""

    finish_reason: str
    prompt_tokens: int
    reused_tokens: int
    tokens: int
    ttft_s: float | None


@dataclass
class Answerer:
    """One runner and the tokens that it holds.

    answer belongs to one thread, the other methods to any.
    """

    runner: Runner
    max_prompt_tokens: int | None = None
    """None: what the context holds, less one token for the answer."""
    _held: list[int] = field(default_factory=list)
    _vocabulary: TokenBytes | None = None
    _tokenizing: threading.Lock = field(default_factory=threading.Lock)

    @property
    def embedder(self) -> Embedder | None:
        """The runner, where it also gives vectors of texts."""
        runner = self.runner
        return runner if isinstance(runner, Embedder) and runner.embedding_size else None

    @property
    def prompt_limit(self) -> int:
        """Most tokens that a prompt may have."""
        room = (self.runner.options.context or 1) - 1
        return room if self.max_prompt_tokens is None else min(room, self.max_prompt_tokens)

    def text_tokens(self, text: str) -> list[int]:
        """Token ids of a prompt without a template."""
        with self._tokenizing:
            return self.runner.tokenize(text, add_special=True, parse_special=True)

    def chat_tokens(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation in the model's own template.  Raises ModelError where there is none."""
        from edgeslm.runtime.template import conversation_tokens  # and with it Jinja

        template = self.runner.facts.chat_template
        if template is None:
            raise ModelError(
                "the model has no chat template: it was not made for chat", hint="use /v1/completions"
            )
        with self._tokenizing:
            return conversation_tokens(self.runner, template, messages)

    def check(self, tokens: Sequence[int]) -> None:
        """Raise DataError for a prompt that is empty, or has tokens that the model lacks."""
        if not tokens:
            raise DataError("the prompt is empty", hint="give some text to continue")
        size = self.runner.facts.vocab_size
        if wrong := next((token for token in tokens if not 0 <= token < size), None):
            raise DataError(f"the prompt's token {wrong} is outside the vocabulary of {size}")

    def forget(self) -> None:
        """Start over: no token that was read before is kept.  For the thread of answer."""
        self.runner.reset()
        self._held = []

    def answer(
        self, question: Question, interrupted: Callable[[], bool] = lambda: False
    ) -> Iterator[Piece | Summary]:
        """The pieces of an answer, then its summary.  Raises EngineError when the engine refuses.

        interrupted: asked between steps, and between chunks of the prompt, whether to end now.
        """
        constraint = self._constraint(question)
        steered = Steered(
            self.runner,
            constraint=constraint,
            scored=question.scored,
            max_tokens=question.max_tokens,
        )
        held, self._held = self._held, []
        generation = Generation(
            steered,
            question.tokens,
            sampling=question.sampling,
            max_tokens=question.max_tokens,
            stop=question.stop,
            held=held,
            interrupted=interrupted,
        )
        told = 0
        try:
            for text in generation:
                _settle(steered, generation)
                yield Piece(text=text, scores=tuple(steered.scores[told:]))
                told = len(steered.scores)
        except BaseException:
            self.forget()
            raise
        self._held = generation.held
        _settle(steered, generation)
        if len(steered.scores) > told:  # tokens that gave no text of their own
            yield Piece(text="", scores=tuple(steered.scores[told:]))
        finish = generation.finish_reason or "stop"
        if constraint is not None and finish == "length" and constraint.completes(generation.tokens[-1]):
            finish = "stop"  # the room was enough to the last token
        yield Summary(
            finish_reason=finish,
            prompt_tokens=len(generation.prompt),
            reused_tokens=generation.reused_tokens,
            tokens=len(generation.tokens),
            ttft_s=generation.ttft_s,
        )

    def _constraint(self, question: Question) -> TokenConstraint | None:
        if question.grammar is None:
            return None
        if self._vocabulary is None:
            runner = self.runner
            self._vocabulary = TokenBytes(
                [runner.token_bytes(token) for token in range(runner.facts.vocab_size)], stop_tokens(runner)
            )
        sampling = question.sampling
        needed = 1 if sampling.temperature == 0 else sampling.top_k or None
        return TokenConstraint(question.grammar, self._vocabulary, needed=needed, min_p=sampling.min_p)


def _settle(steered: Steered, generation: Generation) -> None:
    """Score the newest token, unless it is the one that ended the turn."""
    if generation.tokens and len(steered.scores) < len(generation.tokens):
        steered.settle(generation.tokens[-1])


def any_seed() -> int:
    """A seed for a request that names none."""
    return secrets.randbits(63)
