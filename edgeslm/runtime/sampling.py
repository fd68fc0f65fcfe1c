"""Which token comes next: penalty, then top-k, top-p, min-p, then temperature, as llama.cpp orders them.

Pure functions on logits.  V vocabulary size, N candidates, in order of falling logit (equal logits:
lower id first).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgeslm.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

REPEAT_WINDOW = 64
"""Newest tokens that the repeat penalty looks at (llama.cpp's penalty_last_n)."""
_FIRST_GUESS = 256
"""Candidates to sort when no top_k bounds them; few distributions need more for 95 % of their mass."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to choose; the defaults are those of the command line."""

    temperature: float = 0.7
    """0: the likeliest token."""
    top_k: int = 40
    """Only the k likeliest; 0: no limit."""
    top_p: float = 0.95
    """Only the likeliest that together have this probability (Holtzman et al. 2020, arXiv:1904.09751)."""
    min_p: float = 0.05
    """Only those with this share of the likeliest one's probability (Nguyen et al. 2024, arXiv:2407.01082)."""
    repeat_penalty: float = 1.0
    """Divides positive logits of recent tokens, multiplies negative ones (Keskar et al. 2019, arXiv:1909.05858)."""
    seed: int = 0


def choose(
    logits: NDArray[np.float32], sampling: Sampling, recent: Sequence[int], random: np.random.Generator
) -> int:
    """The next token.  logits: [V].  recent: tokens so far, newest last.  Raises EngineError for NaN logits."""
    if np.isnan(logits.max()):
        raise EngineError(
            "the model computes NaN instead of logits",
            hint="the weights are damaged: build or copy them again",
        )
    logits = penalized(logits, recent[-REPEAT_WINDOW:], sampling.repeat_penalty)
    if sampling.temperature == 0:
        return int(logits.argmax())
    tokens = candidates(logits, sampling.top_k, sampling.top_p, sampling.min_p)
    shares = softmax(logits[tokens], sampling.temperature).cumsum()
    place = np.searchsorted(shares, random.random() * shares[-1], side="right")
    return int(tokens[min(int(place), len(tokens) - 1)])


def penalized(logits: NDArray[np.float32], recent: Sequence[int], penalty: float) -> NDArray[np.float32]:
    """[V] logits with those of `recent` tokens made less likely, once each; the argument is not changed."""
    if penalty == 1 or not recent:
        return logits
    tokens = np.unique(np.asarray(recent))
    changed = logits.copy()
    old = logits[tokens]
    changed[tokens] = np.where(old <= 0, old * np.float32(penalty), old / np.float32(penalty))
    return changed


def candidates(logits: NDArray[np.float32], top_k: int, top_p: float, min_p: float) -> NDArray[np.intp]:
    """[N] tokens left by top-k, then top-p among those, then min-p; at least one.

    logits: [V].  Only as much is sorted as the limits leave, since V reaches 262,144.
    """
    size = len(logits)
    limit = min(top_k, size) if top_k > 0 else size
    top = float(logits.max())
    floor = top + math.log(min_p) if min_p > 0 else -math.inf
    if top_k > 0:
        tokens = largest(logits, limit)
        mass = float(np.exp(logits[tokens] - top).sum(dtype=np.float64))
        return _cut(logits, tokens, top_p * mass if top_p < 1 else math.inf, top, floor)
    if top_p >= 1:
        tokens = np.flatnonzero(logits >= floor)
        return tokens[np.argsort(-logits[tokens], kind="stable")]
    mass = float(np.exp(logits - top).sum(dtype=np.float64))
    guess = _FIRST_GUESS
    while True:
        tokens = largest(logits, min(guess, size))
        kept = _cut(logits, tokens, top_p * mass, top, floor)
        if len(kept) < len(tokens) or len(tokens) == size:
            return kept
        guess *= 16


def _cut(
    logits: NDArray[np.float32], tokens: NDArray[np.intp], enough: float, top: float, floor: float
) -> NDArray[np.intp]:
    """The first of the sorted `tokens` whose exp(logit - top) sum to `enough`, without those below `floor`."""
    values = logits[tokens]
    reached = np.exp(values - top).cumsum(dtype=np.float64)
    by_mass = int(np.searchsorted(reached, enough * (1 - 1e-7), side="left")) + 1
    by_floor = int(np.count_nonzero(values >= floor))
    return tokens[: max(1, min(by_mass, by_floor))]


def largest(logits: NDArray[np.float32], count: int) -> NDArray[np.intp]:
    """[count] tokens of the largest logits, sorted; 1 <= count <= V.  Partitions before it sorts."""
    if count < len(logits):
        boundary = np.partition(logits, len(logits) - count)[len(logits) - count]
        above = np.flatnonzero(logits > boundary)
        equal = np.flatnonzero(logits == boundary)[: count - len(above)]
        tokens = np.concatenate((above, equal))
    else:
        tokens = np.arange(len(logits))
    return tokens[np.argsort(-logits[tokens], kind="stable")]


def softmax(logits: NDArray[np.float32], temperature: float) -> NDArray[np.float64]:
    """[N] probabilities; the largest logit is taken off first, so that no temperature above 0 overflows."""
    with np.errstate(over="ignore"):
        weights = np.exp((logits - logits.max()).astype(np.float64) / temperature)
    return np.asarray(weights / weights.sum())
