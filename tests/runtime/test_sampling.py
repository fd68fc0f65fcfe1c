"""Sampling against a brute-force reference and against llama.cpp's own samplers."""

from __future__ import annotations

import ctypes
import math
import time
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from edgeslm.errors import EngineError
from edgeslm.runtime.sampling import REPEAT_WINDOW, Sampling, candidates, choose, largest, penalized, softmax

LOGITS = arrays(
    np.float32,
    st.integers(1, 40),
    elements=st.floats(-20, 20, width=16).map(lambda value: round(value * 8) / 8),  # ties are wanted
)


def reference_candidates(logits: np.ndarray, top_k: int, top_p: float, min_p: float) -> list[int]:
    """One token after the other, in plain Python."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    if top_k > 0:
        order = order[:top_k]
    weights = [math.exp(float(logits[token]) - float(logits[order[0]])) for token in order]
    total = sum(weights)
    if top_p < 1:
        running, kept = 0.0, []
        for token, weight in zip(order, weights, strict=True):
            kept.append(token)
            running += weight / total
            if running >= top_p - 1e-7:
                break
        order = kept
    if min_p > 0:
        best = float(logits[order[0]])
        order = [token for token in order if float(logits[token]) >= best + math.log(min_p)]
    return order


@given(
    LOGITS,
    st.integers(0, 45),
    st.sampled_from([0.0, 0.3, 0.77, 0.95, 1.0]),
    st.sampled_from([0, 0.05, 0.5, 1]),
)
@settings(deadline=None)
def test_candidates_equal_brute_force(logits: np.ndarray, top_k: int, top_p: float, min_p: float) -> None:
    assert candidates(logits, top_k, top_p, min_p).tolist() == reference_candidates(
        logits, top_k, top_p, min_p
    )


def test_candidates_beyond_the_first_guess() -> None:
    """A flat distribution keeps thousands: the partition has to grow without changing the answer."""
    logits = np.random.default_rng(0).standard_normal(20_000).astype(np.float32) * 0.1
    assert candidates(logits, 0, 0.9, 0.0).tolist() == reference_candidates(logits, 0, 0.9, 0.0)
    assert candidates(logits, 0, 1.0, 0.0).tolist() == reference_candidates(logits, 0, 1.0, 0.0)


@given(LOGITS, st.data())
def test_largest_equals_sorting(logits: np.ndarray, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(logits)))
    expected = sorted(range(len(logits)), key=lambda token: (-logits[token], token))[:count]
    assert largest(logits, count).tolist() == expected


def llama_kept(logits: np.ndarray, samplers: list[object]) -> dict[int, float]:
    """The tokens that llama.cpp's samplers leave, with their logits."""
    from llama_cpp import llama_cpp as api

    data = (api.llama_token_data * len(logits))()
    for token, logit in enumerate(logits):
        data[token].id, data[token].logit, data[token].p = token, float(logit), 0.0
    array = api.llama_token_data_array(data, len(logits), -1, False)
    for sampler in samplers:
        api.llama_sampler_apply(sampler, ctypes.byref(array))
        api.llama_sampler_free(sampler)
    return {array.data[i].id: array.data[i].logit for i in range(array.size)}


@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"), list(product([0, 1, 7, 40], [0.1, 0.9, 1.0], [0, 0.05, 0.4]))
)
@pytest.mark.parametrize("seed", range(3))
def test_candidates_equal_llama_cpp(seed: int, top_k: int, top_p: float, min_p: float) -> None:
    api = pytest.importorskip("llama_cpp").llama_cpp
    logits = (np.random.default_rng(seed).standard_normal(500) * 3).astype(np.float32)
    kept = llama_kept(
        logits,
        [
            api.llama_sampler_init_top_k(top_k),
            api.llama_sampler_init_top_p(top_p, 1),
            api.llama_sampler_init_min_p(min_p, 1),
        ],
    )
    assert set(candidates(logits, top_k, top_p, min_p).tolist()) == set(kept)


@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.8])
def test_penalty_equals_llama_cpp(penalty: float) -> None:
    api = pytest.importorskip("llama_cpp").llama_cpp
    logits = (np.random.default_rng(1).standard_normal(50) * 3).astype(np.float32)
    recent = [3, 17, 3, 42, 0]
    sampler = api.llama_sampler_init_penalties(50, REPEAT_WINDOW, penalty, 0.0, 0.0)
    for token in recent:
        api.llama_sampler_accept(sampler, token)
    kept = llama_kept(logits, [sampler])
    ours = penalized(logits, recent, penalty)
    np.testing.assert_allclose(ours, [kept[token] for token in range(50)], rtol=1e-6)


def test_penalty_leaves_its_argument_alone() -> None:
    logits = np.array([1.0, -1.0], np.float32)
    assert penalized(logits, [0, 1], 2.0).tolist() == [0.5, -2.0]
    assert logits.tolist() == [1.0, -1.0]


def test_choices_follow_the_distribution() -> None:
    """20,000 draws against the probabilities: chi-squared with 3 degrees of freedom below its 0.1 % point."""
    logits = np.array([2.0, 1.0, 0.5, -1.0], np.float32)
    sampling = Sampling(temperature=0.8, top_k=0, top_p=1.0, min_p=0.0)
    random = np.random.default_rng(5)
    counts = np.bincount([choose(logits, sampling, [], random) for _ in range(20_000)], minlength=4)
    expected = softmax(logits, 0.8) * 20_000
    assert float(((counts - expected) ** 2 / expected).sum()) < 16.27


def test_greedy_takes_the_first_of_the_largest() -> None:
    random = np.random.default_rng(0)
    assert choose(np.array([1, 3, 3], np.float32), Sampling(temperature=0), [], random) == 1
    penalty = Sampling(temperature=0, repeat_penalty=4.0)
    assert choose(np.array([1, 3, 2], np.float32), penalty, [1], random) == 2


def test_only_the_newest_tokens_are_penalized() -> None:
    logits = np.array([1, 3, 2], np.float32)
    sampling = Sampling(temperature=0, repeat_penalty=9.0)
    assert choose(logits, sampling, [1, *[0] * REPEAT_WINDOW], np.random.default_rng(0)) == 1


def test_the_seed_repeats_the_choices() -> None:
    logits = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    runs = [
        [choose(logits, Sampling(), [], random) for _ in range(20)]
        for random in (np.random.default_rng(3), np.random.default_rng(3), np.random.default_rng(4))
    ]
    assert runs[0] == runs[1] != runs[2]


def test_infinite_logits_are_never_chosen() -> None:
    logits = np.full(10, -np.inf, np.float32)
    logits[4] = 0.0
    for sampling in (Sampling(), Sampling(top_k=0, top_p=1.0, min_p=0.0), Sampling(top_k=0)):
        assert choose(logits, sampling, [], np.random.default_rng(0)) == 4


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e30])
def test_extreme_temperatures(temperature: float) -> None:
    """Towards 0 it is greedy, towards infinity uniform; nothing overflows."""
    logits = np.array([1.0, 5.0, 4.0], np.float32)
    expected = [1 / 3] * 3 if temperature > 1 else [0, 1, 0]
    np.testing.assert_allclose(softmax(logits, temperature), expected, atol=1e-6)


def test_nan_is_an_error() -> None:
    with pytest.raises(EngineError, match="NaN"):
        choose(np.array([0, np.nan], np.float32), Sampling(), [], np.random.default_rng(0))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=0)])
def test_a_choice_among_262144_is_fast(sampling: Sampling) -> None:
    """A sort of everything takes 20 ms here; a choice may not cost a tenth of a small model's decode step."""
    logits = (np.random.default_rng(0).standard_normal(262_144) * 3).astype(np.float32)
    logits[77] = 14  # one token stands out, as in real distributions
    random = np.random.default_rng(0)
    times = []
    for _ in range(7):
        start = time.perf_counter()
        choose(logits, sampling, [], random)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.012
