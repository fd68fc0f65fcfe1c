"""Quality against closed forms and a brute-force reading of the protocol, on runners that are arithmetic."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgeslm.bench.quality import cut_windows, measure_quality, score_logits
from edgeslm.errors import DataError, EngineError, ModelError, RecipeError
from edgeslm.runtime.runner import ModelFacts, RunnerOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

VOCABULARY = 13


class ArithmeticRunner:
    """A model whose logits are a function of the token, the one before it and the position.

    Its text is numbers with blanks between them; the token after each blank line is BOS if it adds BOS.
    """

    load_s = 0.0
    position = 0

    def __init__(
        self, *, seed: int = 0, vocabulary: int = VOCABULARY, bos: int | None = None, context: int = 64,
        shift: int = 0, scale: float = 3.0,
    ) -> None:  # fmt: skip
        random = np.random.default_rng(seed)
        self.by_token = random.standard_normal((VOCABULARY, vocabulary)) * scale
        self.by_previous = random.standard_normal((VOCABULARY, vocabulary)) * scale
        self.by_position = random.standard_normal((context, vocabulary)) * scale
        self.shift = shift
        self.options = RunnerOptions(threads=1, context=context)
        self.facts = ModelFacts(
            architecture="arithmetic", description="arithmetic", parameters=1, weight_bytes=4,
            vocab_size=vocabulary, context_length=context, bos_token=bos, eos_token=None,
            adds_bos=bos is not None, stop_tokens=frozenset(), chat_template=None,
        )  # fmt: skip

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool) -> list[int]:
        bos = [self.facts.bos_token] if add_special and self.facts.bos_token is not None else []
        words = text.split() if not parse_special else [*text.split(), "0"]
        return [*bos, *((int(word) + self.shift) % self.facts.vocab_size for word in words)]

    def logits(self, tokens: Sequence[int], first: int = 0) -> NDArray[np.float32]:
        rows = np.stack([self.at(tokens, i) for i in range(first, len(tokens))])
        return rows.astype(np.float32)

    def at(self, tokens: Sequence[int], i: int) -> NDArray[np.float64]:
        before = self.by_previous[tokens[i - 1]] if i else 0.0
        return self.by_token[tokens[i]] + before + self.by_position[i]


class ConstantRunner(ArithmeticRunner):
    """Always the same distribution."""

    def __init__(self, probabilities: Sequence[float], *, offset: float = 0.0) -> None:
        super().__init__(vocabulary=len(probabilities))
        with np.errstate(divide="ignore"):
            self.row = np.log(np.asarray(probabilities)) + offset

    def at(self, tokens: Sequence[int], i: int) -> NDArray[np.float64]:
        return self.row


def numbers(count: int, *, seed: int = 1, vocabulary: int = VOCABULARY) -> str:
    return " ".join(map(str, np.random.default_rng(seed).integers(vocabulary, size=count)))


def log_softmax(row: NDArray[np.float64]) -> NDArray[np.float64]:
    return row - row.max() - math.log(np.exp(row - row.max()).sum())


def brute_force(
    candidate: ArithmeticRunner, reference: ArithmeticRunner, text: str, context: int, vocabulary: int
) -> dict[str, NDArray[np.float64]]:
    """The protocol position by position in float64: [W, S] of each score."""
    tokens = candidate.tokenize(text, add_special=True, parse_special=False)
    scores: dict[str, list[list[float]]] = {"nll": [], "reference_nll": [], "kl": [], "same": []}
    for window in range(len(tokens) // context):
        for values in scores.values():
            values.append([])
        for position in range(context // 2, context - 1):
            rows = []
            for runner in (candidate, reference):
                seen = tokens[window * context : window * context + position + 1]
                if runner.facts.adds_bos:
                    assert runner.facts.bos_token is not None
                    seen = [runner.facts.bos_token, *seen[1:]]
                rows.append(log_softmax(runner.at(seen, position)[:vocabulary]))
            target = tokens[window * context + position + 1]
            q, p = rows
            scores["nll"][-1].append(-q[target])
            scores["reference_nll"][-1].append(-p[target])
            scores["kl"][-1].append(float(np.sum(np.exp(p) * (p - q))))
            scores["same"][-1].append(float(p.argmax() == q.argmax()))
    return {name: np.asarray(values) for name, values in scores.items()}


@pytest.mark.parametrize("context", [4, 8, 9, 16])
@pytest.mark.parametrize("bos", [None, 2])
def test_measures_what_the_protocol_says_position_by_position(context: int, bos: int | None) -> None:
    candidate, reference = (ArithmeticRunner(seed=seed, bos=bos) for seed in (1, 2))
    text = numbers(5 * context + 2)
    record = measure_quality(candidate, reference, [text], context=context)
    expected = brute_force(candidate, reference, text, context, VOCABULARY)
    windows, scored = expected["kl"].shape
    assert record["protocol"]["windows"] == windows == 5
    assert record["protocol"]["scored_tokens"] == windows * scored
    value = lambda key: record[key]["value"]  # noqa: E731
    near = lambda number: pytest.approx(number, rel=1e-5)  # noqa: E731
    assert value("perplexity") == near(math.exp(expected["nll"].mean()))
    assert value("reference_perplexity") == near(math.exp(expected["reference_nll"].mean()))
    assert value("perplexity_ratio") == near(math.exp((expected["nll"] - expected["reference_nll"]).mean()))
    assert value("top1_agreement") == pytest.approx(expected["same"].mean())
    kl = record["kl_nats"]
    assert kl["mean"]["value"] == near(expected["kl"].mean())
    for name, fraction in (("median", 0.5), ("p99", 0.99), ("max", 1.0)):
        assert kl[name]["value"] == near(np.quantile(expected["kl"], fraction))


@pytest.mark.parametrize("offset", [-1, 1])
def test_a_window_that_starts_one_token_off_gives_other_numbers(offset: int) -> None:
    """What the test above would not see if every position scored alike."""
    candidate, reference = ArithmeticRunner(seed=1), ArithmeticRunner(seed=2)
    words = numbers(80).split()
    record = measure_quality(candidate, reference, [" ".join(words)], context=16)
    moved = words[1:] if offset > 0 else ["0", *words]
    wrong = brute_force(candidate, reference, " ".join(moved), 16, VOCABULARY)
    assert record["kl_nats"]["mean"]["value"] != pytest.approx(wrong["kl"].mean(), rel=1e-3)
    assert record["perplexity"]["value"] != pytest.approx(math.exp(wrong["nll"].mean()), rel=1e-3)


def test_kl_of_two_known_distributions() -> None:
    p, q = [0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]
    candidate, reference = ConstantRunner(q, offset=40.0), ConstantRunner(p, offset=-7.0)
    record = measure_quality(candidate, reference, [numbers(64, vocabulary=4)], context=16)
    expected = math.log(4) + 0.7 * math.log(0.7) + 0.3 * math.log(0.1)  # log 4 less the entropy of p
    for estimate in record["kl_nats"].values():
        assert estimate == pytest.approx({"value": expected, "low": expected, "high": expected}, rel=1e-5)
    reverse = sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
    assert abs(reverse - expected) > 0.01  # so that the other direction would not pass


def test_a_runner_against_itself_has_no_divergence() -> None:
    runner = ArithmeticRunner(seed=3)
    record = measure_quality(runner, runner, [numbers(100)], context=16)
    for estimate in record["kl_nats"].values():
        assert estimate == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert record["perplexity_ratio"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert record["top1_agreement"]["value"] == 1.0
    assert record["top1_agreement"]["low"] < 1.0
    assert record["perplexity"] == record["reference_perplexity"]


@pytest.mark.parametrize("vocabulary", [3, 1000, 300_000])
def test_a_uniform_model_has_the_vocabulary_as_its_perplexity(vocabulary: int) -> None:
    uniform = ConstantRunner(np.full(vocabulary, 1 / vocabulary))
    record = measure_quality(uniform, None, [numbers(24, vocabulary=3)], context=8)
    assert record["perplexity"]["value"] == pytest.approx(vocabulary, rel=1e-6)
    assert record["reference"] is record["kl_nats"] is record["top1_agreement"] is None
    assert record["perplexity_ratio"] is record["reference_perplexity"] is None


@pytest.mark.parametrize("threads", [1, 3])
def test_small_divergences_survive_a_large_vocabulary(threads: int) -> None:
    """KL near 1e-3 nats over 150,001 tokens, against float64, with blocks that don't divide the rows."""
    random = np.random.default_rng(0)
    reference = (random.standard_normal((7, 150_001)) * 4 + 30).astype(np.float32)
    candidate = (reference + random.standard_normal(reference.shape) * 0.03 + 5).astype(np.float32)
    targets = random.integers(150_001, size=7)
    scores = score_logits(candidate, reference, targets, threads=threads)
    assert scores.comparison is not None
    for row in range(7):
        q, p = log_softmax(candidate[row].astype(np.float64)), log_softmax(reference[row].astype(np.float64))
        assert scores.nll_nats[row] == pytest.approx(-q[targets[row]], abs=2e-6)
        assert scores.comparison.nll_nats[row] == pytest.approx(-p[targets[row]], abs=2e-6)
        kl = np.sum(np.exp(p) * (p - q))
        assert 1e-4 < kl < 1e-2
        assert scores.comparison.kl_nats[row] == pytest.approx(kl, rel=1e-3)
        assert scores.comparison.same_top[row] == (p.argmax() == q.argmax())


@pytest.mark.parametrize("padded", ["candidate", "reference"])
def test_a_padded_vocabulary_is_compared_over_the_shared_part(padded: str) -> None:
    sizes = {"candidate": VOCABULARY, "reference": VOCABULARY} | {padded: VOCABULARY + 5}
    candidate = ArithmeticRunner(seed=1, vocabulary=sizes["candidate"])
    reference = ArithmeticRunner(seed=2, vocabulary=sizes["reference"])
    text = numbers(48)
    record = measure_quality(candidate, reference, [text], context=16)
    expected = brute_force(candidate, reference, text, 16, VOCABULARY)
    assert record["kl_nats"]["mean"]["value"] == pytest.approx(expected["kl"].mean(), rel=1e-5)
    assert record["perplexity"]["value"] == pytest.approx(math.exp(expected["nll"].mean()), rel=1e-5)
    assert f"first {VOCABULARY}" in record["protocol"]["method"]


def test_different_tokenizers_are_refused() -> None:
    with pytest.raises(ModelError, match=r"differently, from token 0 on \(64 tokens against 64\)") as caught:
        measure_quality(ArithmeticRunner(), ArithmeticRunner(shift=1), [numbers(64)], context=16)
    assert "made from" in caught.value.hint
    with pytest.raises(ModelError, match=r"\(65 tokens against 64\)"):
        measure_quality(ArithmeticRunner(bos=1), ArithmeticRunner(), [numbers(64)], context=16)


@pytest.mark.parametrize(("tokens", "context", "max_tokens", "windows"), [
    (16, 16, None, 1), (31, 16, None, 1), (32, 16, None, 2), (100, 16, 48, 3), (100, 16, 47, 2),
    (20, 16, 99, 1),
])  # fmt: skip
def test_windows_follow_each_other(tokens: int, context: int, max_tokens: int | None, windows: int) -> None:
    cut = cut_windows(range(tokens), context, max_tokens)
    assert cut == [list(range(i * context, (i + 1) * context)) for i in range(windows)]


def test_a_text_shorter_than_a_window_is_refused_with_the_numbers() -> None:
    with pytest.raises(DataError, match="the text has 15 tokens, but one window takes 16"):
        measure_quality(ArithmeticRunner(), None, [numbers(15)], context=16)
    with pytest.raises(DataError, match="has 99 tokens and max_tokens is 15, but one window takes 16"):
        measure_quality(ArithmeticRunner(), None, [numbers(99)], context=16, max_tokens=15)


def test_a_context_that_a_runner_cannot_hold_is_refused() -> None:
    with pytest.raises(RecipeError, match="window of 32 tokens does not fit the model's context of 16"):
        measure_quality(ArithmeticRunner(), ArithmeticRunner(context=16), [numbers(64)], context=32)
    with pytest.raises(RecipeError, match="context is 3"):
        measure_quality(ArithmeticRunner(), None, [numbers(64)], context=3)


def test_one_window_has_values_but_no_interval_and_says_so() -> None:
    record = measure_quality(ArithmeticRunner(seed=1), ArithmeticRunner(seed=2), [numbers(16)], context=16)
    estimates = [record["perplexity"], record["perplexity_ratio"], record["top1_agreement"]]
    for estimate in [*estimates, *record["kl_nats"].values()]:
        assert estimate["value"] >= 0
        assert estimate["low"] is estimate["high"] is None
    assert "no interval" in record["protocol"]["method"]


def test_texts_are_joined_by_a_blank_line_and_hashed() -> None:
    one, two = numbers(20), numbers(21, seed=2)
    apart = measure_quality(ArithmeticRunner(), None, [one, two], context=8)
    joined = measure_quality(ArithmeticRunner(), None, [f"{one}\n\n{two}"], context=8)
    assert apart == joined
    assert apart["text"]["tokens"] == 41
    assert (
        measure_quality(ArithmeticRunner(), None, [one], context=8, parse_special=True)["text"]["tokens"]
        == 21
    )


def broken(value: float) -> Callable[..., NDArray[np.float32]]:
    def logits(tokens: Sequence[int], first: int = 0) -> NDArray[np.float32]:
        rows = np.zeros((len(tokens) - first, VOCABULARY), np.float32)
        rows[3, 5] = value
        return rows

    return logits


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.filterwarnings("error")
def test_logits_that_are_not_numbers_are_an_error(value: float) -> None:
    runner = ArithmeticRunner()
    runner.logits = broken(value)  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="the model's logits in window 0 are not finite"):
        measure_quality(runner, None, [numbers(64)], context=16)
    with pytest.raises(EngineError, match="the reference's logits in window 0 are not finite"):
        measure_quality(ArithmeticRunner(), runner, [numbers(64)], context=16)


@pytest.mark.filterwarnings("error")
def test_a_token_that_the_candidate_rules_out_is_an_error_not_infinity() -> None:
    candidate = ConstantRunner([0.5, 0.5, 0.0])
    with pytest.raises(EngineError, match="KL divergences in window 0"):
        measure_quality(candidate, ConstantRunner([0.4, 0.4, 0.2]), ["0 1 " * 16], context=16)


def test_a_perplexity_beyond_floats_is_an_error_not_infinity() -> None:
    runner = ArithmeticRunner(scale=1e4)
    with pytest.raises(EngineError, match="nats of surprise"):
        measure_quality(runner, None, [numbers(64)], context=16)


def test_progress_comes_to_its_total() -> None:
    class Counting:
        def __init__(self) -> None:
            self.total, self.done = 0.0, 0.0

        @contextmanager
        def task(self, name: str, total: float, unit: str = "") -> Iterator[Callable[[float], None]]:
            def advance(amount: float) -> None:
                self.done += amount

            self.total = total
            yield advance

        def note(self, text: str) -> None:
            raise AssertionError(text)

    progress: Any = Counting()
    measure_quality(ArithmeticRunner(), None, [numbers(70)], context=16, progress=progress)
    assert progress.total == progress.done == 64
