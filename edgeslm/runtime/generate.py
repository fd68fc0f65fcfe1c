"""Generation: from prompt tokens to text as it grows, with what it took."""

from __future__ import annotations

import codecs
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.runtime.sampling import choose

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from edgeslm.runtime.runner import Runner
    from edgeslm.runtime.sampling import Sampling

PREFILL_CHUNK = 128
"""Prompt tokens between two looks at Ctrl-C: seconds on a slow board, and as fast as larger chunks."""


class Text:
    """Bytes in, text out: whole characters only, ending before the first stop string to be complete.

    Text that may be the start of a stop string is held back until that is decided.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = [stop for stop in stops if stop]
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stopped = False

    def feed(self, data: bytes) -> str:
        """The text that `data` makes certain; "" once stopped."""
        return "" if self.stopped else self._release(self._decoder.decode(data))

    def finish(self) -> str:
        """What was held back and is no stop string after all; half a character becomes U+FFFD."""
        if self.stopped:
            return ""
        text = self._release(self._decoder.decode(b"", final=True))
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _release(self, more: str) -> str:
        text = self._held + more
        ends = [(place + len(stop), place) for stop in self._stops if (place := text.find(stop)) >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)[1]]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop` without completing it."""
    return next(
        (size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0
    )


class Generation:
    """One answer of a runner.  Iterate over it once for the text, piece by piece; then read what it took.

    held: the tokens in the runner's state, before and after; a common beginning is not computed again.
    interrupted: asked between steps whether to end now.
    """

    def __init__(
        self,
        runner: Runner,
        tokens: Sequence[int],
        *,
        sampling: Sampling,
        max_tokens: int,
        stop: Sequence[str] = (),
        held: Sequence[int] = (),
        random: np.random.Generator | None = None,
        interrupted: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.held = list(held)
        self.prompt = list(tokens)
        self.tokens: list[int] = []
        """What was generated, without the token that ends the turn."""
        self.text = ""
        self.finish_reason: str | None = None
        """stop: the model's end or a stop string; length: max_tokens or a full context; interrupted."""
        self.reused_tokens = 0
        self.ttft_s: float | None = None
        """Seconds from the request to the first token, prefill included."""
        self.prefill_s = self.decode_s = 0.0
        self.steps = 0
        self._recent = list(tokens)
        self._runner = runner
        self._sampling = sampling
        self._max_tokens = max_tokens
        self._stop = stop
        self._random = random or np.random.default_rng(sampling.seed)
        self._interrupted = interrupted
        self._clock = clock

    def __iter__(self) -> Iterator[str]:
        start = self._clock()
        if not self._prefill():
            self.finish_reason = "interrupted"
            return
        token = self._choose()
        self.ttft_s = self._clock() - start
        text = Text(self._stop)
        while not self._ended(token):
            self.tokens.append(token)
            self._recent.append(token)
            yield from self._show(text.feed(self._runner.token_bytes(token)))
            self.finish_reason = self._limit(text)
            if self.finish_reason:
                break
            before = self._clock()
            self._runner.step(token)
            self.held.append(token)
            token = self._choose()
            self.decode_s += self._clock() - before
            self.steps += 1
        yield from self._show(text.finish())

    def record(self) -> dict[str, Any]:
        """The generation as a JSON document."""
        computed = len(self.prompt) - self.reused_tokens
        return {
            "schema": "edgeslm.generation/1",
            "text": self.text,
            "tokens": len(self.tokens),
            "prompt_tokens": len(self.prompt),
            "reused_tokens": self.reused_tokens,
            "finish_reason": self.finish_reason,
            "ttft_s": self.ttft_s,
            "prefill_tokens_per_s": computed / self.prefill_s if self.prefill_s and self.ttft_s else None,
            "decode_tokens_per_s": self.steps / self.decode_s if self.decode_s else None,
        }

    def _prefill(self) -> bool:
        """Bring the prompt into the state; False when interrupted on the way."""
        start = self._clock()
        runner, prompt = self._runner, self.prompt
        # The last token is always computed: its logits choose the first new one.
        runner.reset(min(common_prefix(self.held, prompt), len(prompt) - 1))
        self.reused_tokens = runner.position
        self.held = prompt[: self.reused_tokens]
        while len(self.held) < len(prompt):
            if self._interrupted():
                return False
            chunk = prompt[len(self.held) :][:PREFILL_CHUNK]
            runner.prefill(chunk)
            self.held += chunk
        runner.synchronize()
        self.prefill_s = self._clock() - start
        return True

    def _choose(self) -> int:
        return choose(self._runner.last_logits(), self._sampling, self._recent, self._random)

    def _ended(self, token: int) -> bool:
        if token in self._runner.facts.stop_tokens:
            self.finish_reason = "stop"
        return self.finish_reason is not None

    def _limit(self, text: Text) -> str | None:
        """Why no further token is computed; None: go on."""
        if text.stopped:
            return "stop"
        if len(self.tokens) >= self._max_tokens or self._runner.position >= (
            self._runner.options.context or 0
        ):
            return "length"
        return "interrupted" if self._interrupted() else None

    def _show(self, piece: str) -> Iterator[str]:
        self.text += piece
        if piece:
            yield piece


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens `a` and `b` begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
