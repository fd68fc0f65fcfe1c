"""Text from tokens: character ends, stop strings, limits, prefix reuse."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeslm.runtime.generate import PREFILL_CHUNK, Generation, Text, common_prefix
from edgeslm.runtime.sampling import REPEAT_WINDOW, Sampling
from tests.runtime.fakes import END, FakeRunner

GREEDY = Sampling(temperature=0)


def naive_text(data: bytes, stops: list[str]) -> str:
    """Character after character: ends before the first stop string that is complete, the longest if several."""
    text = data.decode("utf-8", errors="replace")
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return text


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return [data[a:b] for a, b in itertools.pairwise(places)]


TEXTS = st.one_of(
    st.text(st.sampled_from("abcé€😀\n"), max_size=30).map(str.encode),
    st.binary(max_size=20),
    st.lists(
        st.sampled_from([b"a", b"b", b"\xe2\x82\xac", b"\xe2\x82", b"\xf0\x9f", b"\xff"]), max_size=12
    ).map(b"".join),
)
STOPS = st.lists(st.text(st.sampled_from("abcé€😀\n\ufffd"), min_size=1, max_size=4), max_size=3)


@given(TEXTS, STOPS, st.lists(st.integers(0, 1000), max_size=10))
def test_text_equals_the_naive_reference(data: bytes, stops: list[str], cuts: list[int]) -> None:
    text = Text(stops)
    shown = [text.feed(piece) for piece in pieces(data, cuts)]
    assert "".join(shown) + text.finish() == naive_text(data, stops)
    assert text.stopped == (naive_text(data, stops) != data.decode("utf-8", errors="replace"))


@given(TEXTS, STOPS, st.lists(st.integers(0, 1000), max_size=10))
def test_text_shows_all_that_is_certain(data: bytes, stops: list[str], cuts: list[int]) -> None:
    """What is held back is never more than the start of a stop string."""
    text = Text(stops)
    fed = b""
    shown = ""
    for piece in pieces(data, cuts):
        shown += text.feed(piece)
        fed += piece
        if text.stopped:
            return
        whole = fed.decode("utf-8", errors="ignore")
        held = len(whole) - len(shown)
        assert held <= max((len(stop) - 1 for stop in stops), default=0)
        assert held <= 0 or any(stop.startswith(whole[len(shown) :]) for stop in stops)


def run(runner: FakeRunner, prompt: str = "hi", **options: object) -> tuple[Generation, list[str]]:
    defaults = {"sampling": GREEDY, "max_tokens": 100}
    generation = Generation(runner, list(prompt.encode()), **(defaults | options))
    return generation, list(generation)


def test_a_character_of_several_tokens_comes_whole() -> None:
    generation, shown = run(FakeRunner("né€😀".encode()))
    assert shown == ["n", "é", "€", "😀"]
    assert generation.text == "né€😀"
    assert generation.finish_reason == "stop"
    assert generation.tokens == list("né€😀".encode())


def test_a_stop_string_over_several_tokens() -> None:
    generation, shown = run(FakeRunner(b"one two END three"), stop=["END"])
    assert generation.text == "".join(shown) == "one two "
    assert generation.finish_reason == "stop"
    assert generation.record()["tokens"] == len("one two END")


def test_a_stop_string_that_does_not_come_is_shown_after_all() -> None:
    generation, shown = run(FakeRunner(b"x EN"), stop=["END"])
    assert shown == ["x", " ", "EN"]
    assert generation.text == "x EN"


def test_max_tokens() -> None:
    runner = FakeRunner(b"abcdef")
    generation, _ = run(runner, max_tokens=3)
    assert (generation.text, generation.finish_reason) == ("abc", "length")
    assert runner.steps == 2, "the last token needs no further computation"


def test_half_a_character_at_the_end() -> None:
    generation, _ = run(FakeRunner("é".encode()), max_tokens=1)
    assert generation.text == "\ufffd"


def test_a_full_context_ends_the_answer() -> None:
    runner = FakeRunner(b"abcdef", context=5)
    generation, _ = run(runner, "hi!")
    assert generation.finish_reason == "length"
    assert generation.text == "abc"
    assert runner.position == 5


def test_an_empty_answer() -> None:
    generation, shown = run(FakeRunner(b""))
    assert shown == []
    assert generation.record()["finish_reason"] == "stop"
    assert generation.record()["decode_tokens_per_s"] is None


def test_the_prompt_comes_in_chunks_and_can_be_interrupted() -> None:
    runner = FakeRunner(b"answer")
    asked = iter([False, False, True])
    generation, shown = run(runner, "x" * (3 * PREFILL_CHUNK), interrupted=lambda: next(asked))
    assert runner.computed == [PREFILL_CHUNK, PREFILL_CHUNK]
    assert generation.held == runner.state
    assert (shown, generation.finish_reason, generation.ttft_s) == ([], "interrupted", None)
    assert generation.record()["prefill_tokens_per_s"] is None


def test_an_answer_can_be_interrupted() -> None:
    runner = FakeRunner(b"a long answer")
    generation, _ = run(runner, interrupted=lambda: runner.steps >= 4)
    assert (generation.text, generation.finish_reason) == ("a lon", "interrupted")
    assert generation.held == runner.state


def test_a_common_beginning_is_not_computed_again() -> None:
    runner = FakeRunner(b"one", b"two")
    first, _ = run(runner, "question")
    second, _ = run(runner, "questionone more", held=first.held)
    assert runner.computed == [8, len(" more")]
    assert second.record()["reused_tokens"] == len("questionone")
    assert second.held == runner.state


def test_the_last_token_is_always_computed() -> None:
    """An equal prompt has no logits in the state to go on from."""
    runner = FakeRunner(b"one", b"two")
    first, _ = run(runner, "question", max_tokens=1)
    second, _ = run(runner, "question", held=first.held)
    assert runner.computed == [8, 1]
    assert second.text == "two"


def test_times_come_from_the_clock() -> None:
    """Every look at the clock is one second later."""
    ticks = itertools.count()
    generation, _ = run(FakeRunner(b"abc"), "hi", clock=lambda: float(next(ticks)))
    record = generation.record()
    assert record["ttft_s"] == 3
    assert record["prefill_tokens_per_s"] == 2
    assert record["decode_tokens_per_s"] == 1
    assert generation.steps == 3


def test_the_record_has_the_documented_keys() -> None:
    generation, _ = run(FakeRunner(b"abc"))
    assert set(generation.record()) == {
        "schema", "text", "tokens", "prompt_tokens", "reused_tokens", "finish_reason", "ttft_s",
        "prefill_tokens_per_s", "decode_tokens_per_s",
    }  # fmt: skip
    assert generation.record()["schema"] == "edgeslm.generation/1"


def test_prompt_and_answer_are_penalized() -> None:
    """A penalty that turns 100 below 0 forbids whatever was in the prompt or the answer."""

    class Flat(FakeRunner):
        def last_logits(self):
            logits = super().last_logits()
            logits[:] = 0
            logits[ord("a") : ord("e")] = (4, 3, 2, 1)
            logits[END] = 0.5
            return logits

    generation, _ = run(Flat(b""), "b", sampling=Sampling(temperature=0, repeat_penalty=100))
    assert generation.text == "acd"
    assert REPEAT_WINDOW > 4


@pytest.mark.parametrize(("a", "b", "expected"), [([], [1], 0), ([1, 2], [1, 2, 3], 2), ([1, 2], [1, 3], 1)])
def test_common_prefix(a: list[int], b: list[int], expected: int) -> None:
    assert common_prefix(a, b) == expected
