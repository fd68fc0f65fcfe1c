"""Numbers in words: known values, and properties that hold for all."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeslm import wording
from tests import records


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234.5, "1,234"), (366.1, "366"), (89.04, "89.0"), (9.996, "10.0"), (5.512, "5.51"), (0.05403, "0.0540"),
     (0, "0.00"), (-2.5, "-2.50"), (99.96, "100"), (None, "n/a")],
)  # fmt: skip
def test_significant(value: float | None, text: str) -> None:
    assert wording.significant(value) == text


@given(st.floats(1e-6, 1e6))
def test_significant_is_within_half_a_unit_of_its_last_digit(value: float) -> None:
    assert float(wording.significant(value).replace(",", "")) == pytest.approx(value, rel=0.0051)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (wording.size(103_703_552), "98.9 MiB"),
        (wording.size(16 * 2**30), "16.0 GiB"),
        (wording.size(2304), "2.25 KiB"),
        (wording.size(0), "0 B"),
        (wording.rate(366.1), "366 tokens/s"),
        (wording.rate(12_345), "12.3 k tokens/s"),
        (wording.rate(1_234), "1,234 tokens/s"),
        (wording.bandwidth(9.1e9), "9.10 GB/s"),
        (wording.frequency(2.7e9), "2.70 GHz"),
        (wording.duration(1.399), "1.40 s"),
        (wording.duration(0.0112), "11.2 ms"),
        (wording.duration(8.3e-5), "83.0 us"),
        (wording.duration(125.2), "2 min 05 s"),
        (wording.duration(99.6), "1 min 40 s"),
        (wording.percent(0.7946, 0), "79 %"),
        (wording.parameters(134_515_008), "134.5 M"),
        (wording.parameters(576), "576"),
        (wording.count(1, "run"), "1 run"),
        (wording.count(12288, "token"), "12,288 tokens"),
        (wording.interval({"value": 0.054, "low": 0.0498, "high": 0.0583}), "0.0540 [0.0498, 0.0583]"),
        (wording.interval({"value": 0.00112, "low": 0.00105, "high": 0.00119}), "0.00112 [0.00105, 0.00119]"),
        (wording.interval({"value": 15.604, "low": 14.9, "high": 16.3}), "15.60 [14.90, 16.30]"),
        (wording.interval({"value": 1.04, "low": None, "high": None}), "1.0400"),
        (
            wording.interval({"value": 0.9123, "low": 0.9, "high": 0.92}, as_percent=True),
            "91.23 [90.00, 92.00] %",
        ),
        (wording.interval({"value": None}), "n/a"),
        (wording.celsius(61.4), "61 C"),
        (wording.spread({"tokens_per_s": 50, "tokens_per_s_stdev": 1}), "2.0 %"),
        (wording.bits({"parameters": 64, "bytes": 36}), "4.50"),
    ],
)
def test_known_words(text: str, expected: str) -> None:
    assert text == expected


@pytest.mark.parametrize("name", ["size", "rate", "rate_number", "bandwidth", "frequency", "duration", "percent",
                                  "parameters", "count", "significant", "interval", "celsius"])  # fmt: skip
def test_what_is_not_known_is_never_a_zero(name: str) -> None:
    assert getattr(wording, name)(None) == "n/a"


def miss(bound: str, limit: float, value: float | None) -> str:
    return wording.gate_miss({"bound": bound, "limit": limit, "value": value})


def test_a_missed_gate_says_by_how_much_in_the_bounds_unit() -> None:
    assert miss("max_kl_nats", 0.05, 0.0817) == (
        "mean KL divergence 0.0817 nats is 0.0317 nats over max_kl_nats = 0.0500 nats"
    )
    assert miss("min_decode_tokens_per_s", 100, 89) == (
        "decode speed 89.0 tokens/s is 11.0 tokens/s under min_decode_tokens_per_s = 100 tokens/s"
    )
    assert miss("max_file_bytes", 100_000_000, 103_703_552) == (
        "file size 98.9 MiB is 3.53 MiB over max_file_bytes = 95.4 MiB"
    )
    assert miss("min_top1_agreement", 0.9, 0.8731) == (
        "top-1 agreement 87.3 % is 2.69 % under min_top1_agreement = 90.0 %"
    )
    assert miss("max_peak_rss_bytes", 2**27, None) == (
        "peak RSS not measured: no verdict on max_peak_rss_bytes = 128 MiB"
    )


@given(st.floats(1e-3, 1e3), st.floats(1e-9, 1.0))
def test_a_near_miss_never_reads_like_a_hit(limit: float, excess: float) -> None:
    value = limit * (1 + excess)
    if value == limit:
        return
    quantity, bound = miss("max_perplexity_ratio", limit, value).split(" is ")
    assert quantity.rsplit(" ", 1)[1] != bound.rsplit(" ", 1)[1]


def test_every_bound_of_a_recipes_gate_has_a_name() -> None:
    from dataclasses import fields

    from edgeslm.specs import GateSpec

    assert {field.name for field in fields(GateSpec)} == set(wording.BOUNDS)


def test_fallbacks_are_grouped_with_what_they_cost() -> None:
    assert wording.fallback_lines(records.fallbacks()) == [
        "165 tensors: rows of 576 are not divisible by 256, the block of Q4_K -> Q5_0, 5.50 bits instead of 4.50",
        "15 tensors: rows of 576 are not divisible by 256, the block of Q6_K -> Q8_0, 8.50 bits instead of 6.56",
    ]
    assert wording.fallback_lines([{"wanted": "Q4_K", "got": "F16"}]) == [
        "1 tensor: Q4_K not possible -> F16"
    ]


def test_the_headline_is_valid_then_long_then_fast() -> None:
    runs = [
        records.decode(200, tokens=512, valid=False),
        records.decode(80, tokens=128),
        records.decode(90, tokens=128),
        records.decode(300, tokens=32),
        records.prefill(999),
    ]
    assert wording.headline(runs, "decode") is runs[2]
    assert wording.headline(runs[:1], "decode") is runs[0]
    assert wording.headline(runs[:4], "prefill") is None


def test_reasons_for_an_invalid_benchmark() -> None:
    assert wording.invalid_reasons(records.bench()) == []
    assert wording.invalid_reasons(records.invalid_bench()) == [
        f"decode 128 tokens, 2 threads: {records.NOISY}"
    ]
    bare = {"valid": False, "runs": [records.decode(valid=False, reasons=["hot"])]}
    assert wording.invalid_reasons(bare) == ["decode of 128 tokens, 2 threads: hot"]
    assert wording.invalid_reasons({"valid": False}) == ["no reason given"]


@given(st.one_of(st.none(), st.floats(-1e18, 1e18)))
def test_words_are_ascii_whatever_the_number(value: float | None) -> None:
    for name in (
        "size",
        "rate",
        "bandwidth",
        "frequency",
        "duration",
        "percent",
        "parameters",
        "significant",
    ):
        text = getattr(wording, name)(value)
        assert text.isascii()
        assert re.search(r"\d|n/a", text)


def test_huge_values_are_told_by_their_magnitude() -> None:
    estimate = {"value": 3.2e29, "low": 2.5e29, "high": 4.1e29}
    assert wording.interval(estimate) == "3.200e+29 [2.500e+29, 4.100e+29]"
    assert wording.significant(3.2e29) == "3.20e+29"
