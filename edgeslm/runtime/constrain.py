"""A grammar over the tokens of a vocabulary: which of them may come next, and how to end in time.

Tokens are tried in the order of their logits, and only as many as the sampling rule can use: a mask over a
whole vocabulary would cost more than the model does on a small device.

V vocabulary size, N candidates.
"""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np

from edgeslm.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from numpy.typing import NDArray

    from edgeslm.runtime.grammar import Grammar, State

MOST_CANDIDATES = 512
"""Allowed tokens that a sampling rule without limits of its own chooses from."""
NEAR = 96
"""Tokens beyond the shortest end within which every choice must leave room for an end."""
_BLOCK = 128


class TokenBytes:
    """What each token of a vocabulary writes.

    pieces: [V] bytes; stops: tokens that end a text.  Tokens that write nothing are never chosen.
    """

    def __init__(self, pieces: Sequence[bytes], stops: Collection[int]) -> None:
        self.pieces = pieces
        self.stops = np.asarray(sorted(stops), np.intp)
        groups: dict[int, list[int]] = defaultdict(list)
        self.of_bytes: dict[bytes, int] = {}
        for token, piece in enumerate(pieces):
            if piece and token not in stops:
                groups[piece[0]].append(token)
                self.of_bytes.setdefault(piece, token)
        self._starting = {byte: np.asarray(tokens, np.intp) for byte, tokens in groups.items()}
        self._longest = max(map(len, self.of_bytes), default=1)
        self._by_mask: dict[int, NDArray[np.intp]] = {}

    def starting(self, mask: int) -> NDArray[np.intp]:
        """[N] tokens whose first byte is in a mask of 256 bits."""
        if mask not in self._by_mask:
            parts = [tokens for byte, tokens in self._starting.items() if mask >> byte & 1]
            self._by_mask[mask] = np.concatenate(parts) if parts else np.empty(0, np.intp)
        return self._by_mask[mask]

    def spelled(self, data: bytes) -> list[int] | None:
        """Tokens that write `data`, the longest first at each place; None where no token fits."""
        tokens, place = [], 0
        while place < len(data):
            for size in range(min(self._longest, len(data) - place), 0, -1):
                token = self.of_bytes.get(data[place : place + size])
                if token is not None:
                    tokens.append(token)
                    place += size
                    break
            else:
                return None
        return tokens


class TokenConstraint:
    """One text under a grammar; implements edgeslm.runtime.steering.Constraint.

    needed: how many allowed tokens the sampling rule chooses from at most; None: MOST_CANDIDATES.
    min_p: tokens below this share of the likeliest allowed one's probability are not chosen either.
    """

    def __init__(
        self, grammar: Grammar, vocabulary: TokenBytes, *, needed: int | None = None, min_p: float = 0.0
    ) -> None:
        self._grammar = grammar.fresh()
        self._vocabulary = vocabulary
        self._needed = needed or MOST_CANDIDATES
        self._floor = math.log(min_p) if min_p > 0 else -math.inf
        self.state: State = grammar.start

    def narrow(self, logits: NDArray[np.float32], left: int) -> NDArray[np.float32]:
        """[V] logits with minus infinity where a token is not allowed.

        left: tokens that may still come, this one and one that ends the text included.  Where the shortest
        end needs all of them, it is taken.  Raises EngineError when no token continues the text.
        """
        way = self._way_out(left)
        allowed = [way[0]] if way else self._allowed(logits, left)
        if not allowed:
            raise EngineError("no token of the vocabulary continues the text as its grammar asks")
        narrowed = np.full_like(logits, -np.inf)
        narrowed[allowed] = logits[allowed]
        return narrowed

    def accept(self, token: int) -> None:
        """A token was chosen that narrow had left."""
        state = self._grammar.advance(self.state, self._vocabulary.pieces[token])
        if state is None:
            raise EngineError(f"token {token} does not continue the text as its grammar asks")
        self.state = state

    def completes(self, token: int) -> bool:
        """Whether the text is whole with a token that narrow had left."""
        state = self._grammar.advance(self.state, self._vocabulary.pieces[token])
        return state is not None and state.accepting

    def _way_out(self, left: int) -> list[int] | None:
        """The tokens of the shortest end, when there is no room for anything else; None while there is."""
        if left > len(self.state.soonest):
            return None
        way = self._vocabulary.spelled(self.state.soonest)
        return way if way and len(way) >= left else None

    def _allowed(self, logits: NDArray[np.float32], left: int) -> list[int]:
        """Allowed tokens, in the order of their logits, as many as the sampling rule can use."""
        near = left <= len(self.state.soonest) + NEAR
        found: list[int] = list(self._vocabulary.stops) if self.state.accepting else []
        best = float(logits[found].max()) if found else -math.inf
        needed = self._needed + len(found)
        tried = self._vocabulary.starting(self.state.mask)
        for token in in_order(logits, tried):
            if len(found) >= needed or (found and logits[token] < best + self._floor):
                break
            state = self._grammar.advance(self.state, self._vocabulary.pieces[token])
            if state is not None and (not near or self._ends_in(state, left - 1)):
                found.append(token)
                best = max(best, float(logits[token]))
        if not found and near:  # the shortest end has no room from the start: write what fits
            return self._allowed(logits, left + 10**9)
        return found

    def _ends_in(self, state: State, left: int) -> bool:
        """Whether the shortest end of a state fits into `left` tokens."""
        if len(state.soonest) <= left:
            return True
        way = self._vocabulary.spelled(state.soonest)
        return way is None or len(way) <= left


def in_order(logits: NDArray[np.float32], tokens: NDArray[np.intp]) -> Iterator[int]:
    """`tokens` by falling logit; only as many are sorted as are asked for, and those next to them."""
    values, rest, size = logits[tokens], tokens, _BLOCK
    while len(rest):
        if size < len(rest):
            split = np.argpartition(-values, size)
            head, tail = split[:size], split[size:]
        else:
            head, tail = np.arange(len(rest)), np.empty(0, np.intp)
        yield from rest[head[np.argsort(-values[head], kind="stable")]].tolist()
        values, rest, size = values[tail], rest[tail], size * 8
