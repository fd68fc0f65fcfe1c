"""How far a quantized model is from its reference, measured on the artifact through the runtime that ships.

The protocol is llama-perplexity's (llama.cpp, tools/perplexity/perplexity.cpp: perplexity and
kl_divergence): the text is tokenized whole, cut into windows of C tokens that do not overlap, and the
second half of each window is scored.  Two things differ.  Both models run in lock-step, so nothing is
stored (llama-perplexity writes the reference's log-probabilities to disk, in 16 bits), and the intervals
treat windows as the clusters that they are (llama-perplexity counts every token as independent).

C context, S scored positions of a window, V vocabulary, W windows, R rows of a block of S.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.bench import statistics
from edgeslm.errors import DataError, EngineError, ModelError, RecipeError
from edgeslm.progress import Quiet

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edgeslm.progress import Progress
    from edgeslm.runtime.runner import Runner

SCHEMA = "edgeslm.quality/1"
DAMAGED = "the file is damaged or a weight overflowed: quantize again, or use another type"
BLOCK_ELEMENTS = 2**18
"""Logits scored at once: a few such blocks of float32 stay in a core's cache."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a reference adds to a window's scored positions, [S] each."""

    nll_nats: NDArray[np.float64]
    """-log p(the token that follows) of the reference."""
    kl_nats: NDArray[np.float64]
    """KL(reference || candidate) over the vocabulary."""
    same_top: NDArray[np.bool_]
    """Whether both models hold the same token the likeliest."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """What a window's scored positions give."""

    nll_nats: NDArray[np.float64]
    """[S] -log p(the token that follows) of the candidate."""
    comparison: Comparison | None


def measure_quality(
    candidate: Runner,
    reference: Runner | None,
    texts: Sequence[str],
    *,
    context: int,
    max_tokens: int | None = None,
    parse_special: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Perplexity, and against a reference its ratio, KL divergence in nats and top-1 agreement: a record.

    texts: joined by a blank line and tokenized as one.  context: tokens of a window.  max_tokens: use only
    the windows that fit into so many.  parse_special: read <|...|> in the text as tokens, for rendered chats.
    seed: of the bootstrap.  Memory: one window's logits of each model, 2 * C/2 * V * 4 bytes.
    Raises DataError when the text fills no window, ModelError when the two tokenize it differently,
    RecipeError for a context that a runner can't hold, EngineError when a model's logits aren't numbers.
    """
    runners = [candidate] if reference is None else [candidate, reference]
    _check_context(context, runners)
    text = "\n\n".join(texts)
    tokens = _tokenize(text, runners, parse_special)
    windows = cut_windows(tokens, context, max_tokens)
    shared = min(runner.facts.vocab_size for runner in runners)
    scores = []
    with (progress or Quiet()).task("quality", len(windows) * context, "tokens") as advance:
        for number, window in enumerate(windows):
            scores.append(_score_window(candidate, reference, window, shared, number))
            advance(context)
    return {
        "schema": SCHEMA,
        "artifact": _facts(candidate),
        "reference": None if reference is None else _facts(reference),
        "text": {"sha256": hashlib.sha256(text.encode()).hexdigest(), "tokens": len(tokens)},
        "protocol": _protocol(context, len(windows), [runner.facts.vocab_size for runner in runners], seed),
        "confidence": statistics.CONFIDENCE,
        **_estimates(scores, seed),
    }


def cut_windows(tokens: Sequence[int], context: int, max_tokens: int | None) -> list[list[int]]:
    """Windows of `context` tokens, one after the other; what is left at the end is not used."""
    usable = len(tokens) if max_tokens is None else min(len(tokens), max_tokens)
    if usable < context:
        limit = "" if usable == len(tokens) else f" and max_tokens is {max_tokens}"
        raise DataError(
            f"the text has {len(tokens)} tokens{limit}, but one window takes {context}",
            hint="give a longer text or a smaller context",
        )
    starts = range(0, usable - context + 1, context)
    return [list(tokens[start : start + context]) for start in starts]


def score_logits(
    candidate: NDArray[np.float32],
    reference: NDArray[np.float32] | None,
    targets: NDArray[np.int64],
    *,
    threads: int = 1,
) -> Scores:
    """Scores of [S, V] logits of the candidate and the reference against the [S] tokens that followed."""
    count, vocabulary = candidate.shape
    nll, reference_nll, kl = np.empty(count), np.empty(count), np.empty(count)
    same_top = np.empty(count, np.bool_)
    rows = max(1, BLOCK_ELEMENTS // vocabulary)

    def score(start: int) -> None:
        block = slice(start, min(start + rows, count))
        compared = None if reference is None else reference[block]
        scores = _score_block(candidate[block], compared, targets[block])
        nll[block] = scores.nll_nats
        if scores.comparison is not None:
            reference_nll[block] = scores.comparison.nll_nats
            kl[block] = scores.comparison.kl_nats
            same_top[block] = scores.comparison.same_top

    with ThreadPoolExecutor(threads) as pool:  # numpy releases the GIL
        list(pool.map(score, range(0, count, rows)))
    if reference is None:
        return Scores(nll_nats=nll, comparison=None)
    comparison = Comparison(nll_nats=reference_nll, kl_nats=kl, same_top=same_top)
    return Scores(nll_nats=nll, comparison=comparison)


def _score_block(
    candidate: NDArray[np.float32], reference: NDArray[np.float32] | None, targets: NDArray[np.int64]
) -> Scores:
    """score_logits of [R, V] logits.

    With p the reference's and q the candidate's distribution, a and b their logits less the largest,
    KL(p || q) = sum p (b - a) - log sum exp b + log sum exp a: differences are taken before anything is
    summed, in float32 as the logits are, and every sum is carried in float64.
    """
    # Infinities and NaN come through to the scores, where they are found once, with a message.
    with np.errstate(invalid="ignore"):
        chosen = (np.arange(len(candidate)), targets)
        top, a, _, log_sum = _shift(candidate)
        nll = log_sum - a[chosen]
        if reference is None:
            return Scores(nll_nats=nll, comparison=None)
        reference_top, b, exponential, reference_log_sum = _shift(reference)
        reference_nll = reference_log_sum - b[chosen]
        difference = np.subtract(b, a, out=b)
        expected = np.einsum("rv,rv->r", exponential, difference, dtype=np.float64) / np.exp(
            reference_log_sum
        )
        # KL can't be negative; rounding can make a tiny one so.
        kl = np.maximum(expected - reference_log_sum + log_sum, 0)
    comparison = Comparison(nll_nats=reference_nll, kl_nats=kl, same_top=top == reference_top)
    return Scores(nll_nats=nll, comparison=comparison)


def _shift(
    logits: NDArray[np.float32],
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32], NDArray[np.float64]]:
    """Of [R, V] logits: the likeliest token [R], the logits less their largest and exp of that [R, V], and
    the log of its sum [R]."""
    top = logits.argmax(axis=1)
    shifted = logits - np.take_along_axis(logits, top[:, None], axis=1)
    exponential = np.exp(shifted)
    return top, shifted, exponential, np.log(exponential.sum(axis=1, dtype=np.float64))


def _score_window(
    candidate: Runner, reference: Runner | None, window: list[int], shared: int, number: int
) -> Scores:
    """Scores of positions C/2 .. C-2, each on the token after it; what the last predicts is not known."""
    first = len(window) // 2
    targets = np.asarray(window[first + 1 :])
    ours = candidate.logits(_with_bos(window, candidate), first)[:-1, :shared]
    theirs = None
    if reference is not None:
        theirs = reference.logits(_with_bos(window, reference), first)[:-1, :shared]
    scores = score_logits(ours, theirs, targets, threads=candidate.options.threads or 1)
    checks = [("the model's logits", scores.nll_nats)]
    if scores.comparison is not None:
        checks.append(("the reference's logits", scores.comparison.nll_nats))
        checks.append(("the KL divergences", scores.comparison.kl_nats))
    for name, values in checks:
        if not np.isfinite(values).all():
            raise EngineError(f"{name} in window {number} are not finite numbers", hint=DAMAGED)
    return scores


def _with_bos(window: list[int], runner: Runner) -> list[int]:
    """The window with BOS in place of its first token, for models that want one: no window starts without."""
    bos = runner.facts.bos_token
    return [bos, *window[1:]] if runner.facts.adds_bos and bos is not None else window


def _tokenize(text: str, runners: Sequence[Runner], parse_special: bool) -> list[int]:
    """The text's tokens, on which all runners must agree."""
    tokens, *others = (
        runner.tokenize(text, add_special=True, parse_special=parse_special) for runner in runners
    )
    for other in others:
        if other != tokens:
            same = (ours == theirs for ours, theirs in zip(tokens, other, strict=False))
            place = next((i for i, equal in enumerate(same) if not equal), min(len(tokens), len(other)))
            raise ModelError(
                f"model and reference tokenize the text differently, from token {place} on "
                f"({len(tokens)} tokens against {len(other)})",
                hint="compare with the model that the artifact was made from: KL needs one vocabulary",
            )
    return tokens


def _check_context(context: int, runners: Sequence[Runner]) -> None:
    if context < 4:
        raise RecipeError(f"context is {context} tokens", hint="a window needs at least 4")
    for runner in runners:
        held = runner.options.context
        if held is not None and context > held:
            raise RecipeError(
                f"a window of {context} tokens does not fit the model's context of {held}",
                hint=f"open the model with a context of {context}, or measure with one of {held}",
            )


def _estimates(scores: Sequence[Scores], seed: int) -> dict[str, Any]:
    """The record's measured values out of W windows' scores."""
    nll = np.stack([score.nll_nats for score in scores])
    record: dict[str, Any] = {
        "perplexity": _perplexity(nll, "model"),
        "reference_perplexity": None,
        "perplexity_ratio": None,
        "kl_nats": None,
        "top1_agreement": None,
    }
    compared = [score.comparison for score in scores if score.comparison is not None]
    if not compared:
        return record
    reference_nll = np.stack([comparison.nll_nats for comparison in compared])
    kl = np.stack([comparison.kl_nats for comparison in compared])
    same_top = np.stack([comparison.same_top for comparison in compared])
    median, p99, largest = statistics.quantiles(kl, (0.5, 0.99, 1.0), seed=seed)
    return record | {
        "reference_perplexity": _perplexity(reference_nll, "reference"),
        # Paired: what both models find hard cancels, so the ratio is known better than either perplexity.
        "perplexity_ratio": statistics.mean(nll - reference_nll).exponential().as_record(),
        "kl_nats": {
            "mean": statistics.mean(kl).at_least(0.0).as_record(),
            "median": median.as_record(),
            "p99": p99.as_record(),
            "max": largest.as_record(),
        },
        "top1_agreement": statistics.proportion(same_top).as_record(),
    }


def _perplexity(nll_nats: NDArray[np.float64], name: str) -> dict[str, float | None]:
    estimate = statistics.mean(nll_nats)
    if estimate.value > 700:  # exp would overflow
        raise EngineError(f"the {name} gives each token {estimate.value:.0f} nats of surprise", hint=DAMAGED)
    return estimate.exponential().as_record()


def _protocol(context: int, windows: int, vocabularies: Sequence[int], seed: int) -> dict[str, Any]:
    first = context // 2
    scored = context - 1 - first
    method = (
        f"As llama-perplexity: windows of {context} tokens that do not overlap, BOS in place of the first "
        f"where the model adds one; the predictions at positions {first} to {context - 2} are scored. "
    )
    if windows > 1:
        method += (
            f"95 % intervals with the {windows} windows as clusters: Student t with {windows - 1} degrees of "
            "freedom for means and perplexities, Wilson's with the effective sample size for the agreement, "
            f"a bootstrap of whole windows ({statistics.RESAMPLES} resamples, seed {seed}) for median, p99 "
            "and maximum; the maximum of a longer text may be larger than its upper end."
        )
    else:
        method += "One window gives no interval: the ends are null; use a longer text."
    if len(set(vocabularies)) > 1:
        method += (
            f" The vocabularies have {vocabularies[0]} and {vocabularies[1]} tokens: compared over the first "
            f"{min(vocabularies)}, which they share."
        )
    return {"context": context, "windows": windows, "scored_tokens": windows * scored, "method": method}


def _facts(runner: Runner) -> dict[str, Any]:
    """What the runner knows of its model; whoever opened the file adds name, path and digest."""
    facts = runner.facts
    return {
        "architecture": facts.architecture,
        "description": facts.description,
        "parameters": facts.parameters,
        "weight_bytes": facts.weight_bytes,
        "vocab_size": facts.vocab_size,
    }
