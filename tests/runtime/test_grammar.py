"""Grammars over bytes: regular expressions as the oracle, Unicode by brute force, what GBNF may say."""

from __future__ import annotations

import itertools
import math
import random
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgeslm.errors import DataError
from edgeslm.runtime.gbnf import others, read_gbnf, read_regex
from edgeslm.runtime.grammar import Grammar, State, characters
from edgeslm.runtime.number_ranges import any_number, integers, numbers

PATTERNS = st.recursive(
    st.sampled_from(["a", "b", "é", "😀", "[ab]", "[^a]", ".", r"\d", r"\W", "[b-é]"]),
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda two: f"({two[0]}|{two[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{0,2}", "{2,}"])).map(
            lambda two: f"(?:{two[0]}){two[1]}"
        ),
    ),
    max_leaves=6,
)
TEXTS = st.text(st.sampled_from("abcé😀1 \x80"), max_size=6)


@settings(max_examples=300, deadline=None)
@given(PATTERNS, st.lists(TEXTS, min_size=1, max_size=8))
def test_regular_expressions_match_as_pythons_do(pattern: str, texts: list[str]) -> None:
    grammar = Grammar(read_regex(pattern))
    for text in texts:
        assert grammar.matches(text.encode()) == bool(re.fullmatch(pattern, text, re.ASCII)), text
    assert re.fullmatch(pattern, grammar.start.soonest.decode(), re.ASCII)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 0x10FFFF), st.integers(0, 3000)), min_size=1, max_size=4))
def test_characters_are_those_of_the_ranges(starts: list[tuple[int, int]]) -> None:
    ranges = [(low, min(low + width, 0x10FFFF)) for low, width in starts]
    inside, outside = Grammar(characters(ranges)), Grammar(characters(others(ranges)))
    for low, high in ranges:
        for code in {low - 1, low, low + 1, (low + high) // 2, high, high + 1}:
            if 0 <= code <= 0x10FFFF and not 0xD800 <= code <= 0xDFFF:
                expected = any(first <= code <= last for first, last in ranges)
                assert inside.matches(chr(code).encode()) == expected
                assert outside.matches(chr(code).encode()) != expected


def test_every_character_and_no_other_bytes() -> None:
    grammar = Grammar(characters([(0, 0x10FFFF)]))
    for code in [*range(0x900), *range(0xD700, 0xE100), *range(0xFF00, 0x10100), 0x10FFFF]:
        data = chr(code).encode("utf-8", errors="surrogatepass")
        assert grammar.matches(data) == (not 0xD800 <= code <= 0xDFFF)
    for data in (b"\x80", b"\xc0\x80", b"\xe0\x80\x80", b"\xf4\x90\x80\x80", b"\xf8", b"\xff"):
        assert not grammar.matches(data)


def test_numbers_within_bounds() -> None:
    draw = random.Random(7)
    for _ in range(300):
        low = draw.randint(-1200, 1200)
        high = low + draw.choice([0, 1, 9, draw.randint(0, 1500)])
        whole, decimal = integers(low, high), numbers(low, high)
        assert whole is not None
        assert decimal is not None
        exact, broken = Grammar(whole), Grammar(decimal)
        for _ in range(20):
            number = draw.randint(low - 30, high + 30)
            assert exact.matches(str(number).encode()) == (low <= number <= high), (low, high, number)
            value = draw.uniform(low - 3, high + 3)
            assert broken.matches(f"{value:.3f}".encode()) == (low <= round(value, 3) <= high), (
                low,
                high,
                value,
            )
        assert not exact.matches(b"007")
    assert integers(0.2, 0.8) is None


BOUNDS = (-3.5, -1.0, -0.25, -0.05, 0.0, 0.05, 0.1, 0.5, 0.99, 1.0, 1.01, 2.0, 2.75)


def test_decimal_bounds_against_all_numbers_of_three_digits() -> None:
    """The oracle: every decimal of up to two places near the bounds, compared as a number."""
    texts = [f"{value / 10**places:.{places}f}" for places in range(3) for value in range(-400, 400)]
    for low in (-math.inf, *BOUNDS):
        for high in (*BOUNDS, math.inf):
            for above, below in itertools.product((False, True), repeat=2):
                found = numbers(low, high, above=above, below=below)
                if low == -math.inf and high == math.inf:
                    continue
                is_there = low < high or (low == high and not above and not below)
                assert (found is not None) == is_there, (low, high, above, below)
                if found is None:
                    continue
                grammar = Grammar(found)
                for text in texts:
                    inside = (low < float(text) if above else low <= float(text)) and (
                        float(text) < high if below else float(text) <= high
                    )
                    if text.startswith("-") and not float(text):
                        continue  # minus nothing may be left out
                    assert grammar.matches(text.encode()) == inside, (low, high, above, below, text)


@settings(max_examples=300, deadline=None)
@example(562949953421312.2, 1.0, True, False, random.Random(0))
@given(
    st.floats(-1e15, 1e15), st.floats(0, 1e3) | st.floats(0, 1e15), st.booleans(), st.booleans(),
    st.randoms(use_true_random=False),
)  # fmt: skip
def test_no_number_rounds_onto_a_bound_that_is_left_out(
    low: float, width: float, above: bool, below: bool, draw: random.Random
) -> None:
    high = min(low + width, 1e15)
    found = numbers(low, high, above=above, below=below)
    if found is None:
        return
    grammar = Grammar(found)
    for _ in range(5):
        text = walked(grammar, draw)
        value = float(text)
        assert low < value if above else low <= value, text
        assert value < high if below else value <= high, text


def walked(grammar: Grammar, draw: random.Random) -> str:
    """A text along a random way that stays near the bounds: the outermost bytes are drawn more often."""
    state, data = grammar.start, b""
    while state.mask and not (state.accepting and draw.random() < 0.05):
        ways = [byte for byte in range(256) if state.mask >> byte & 1]
        byte = draw.choice([ways[0], ways[-1], draw.choice(ways)])
        after = grammar.advance(state, bytes([byte]))
        assert after is not None
        state, data = after, data + bytes([byte])
    return data.decode()


def test_anchors_where_they_change_nothing() -> None:
    for pattern in ("^yes$|^no$", "^(?:a|b$)", "(^a|b)c$", "^^a$$", "^$|^x+$", r"\Aab\Z"):
        grammar = Grammar(read_regex(pattern))
        for text in ("yes", "no", "a", "b", "ac", "bc", "", "x", "xx", "ab", "yesno", "aa"):
            assert grammar.matches(text.encode()) == bool(re.fullmatch(pattern, text)), (pattern, text)
    for pattern in ("a^b", "a$b", "(a$)b", "(^a)+", "x(^a|b)"):
        with pytest.raises(DataError, match="no grammar can say"):
            read_regex(pattern)


def test_numbers_without_bounds() -> None:
    grammar = Grammar(any_number())
    for good in ("0", "-0", "12", "-3.25", "1e5", "1.5E-10", "999999999999999"):
        assert grammar.matches(good.encode())
    for bad in ("", "-", "01", "1.", ".5", "1e", "+1", "1e999", "NaN", "0x1"):
        assert not grammar.matches(bad.encode())


GBNF = r"""
# a list of moves
root  ::= move ("," ws move)*   # at least one
move  ::= piece? [a-h] [1-8] check? |
          "O-O" ("-O")?
piece ::= [^a-z\x00-@\u0080-\U0010FFFF[-`{-~\x7f]
check ::= [+#\-\]] | "\"" | .{0}
ws    ::= " "{1,2}
"""


def test_gbnf() -> None:
    grammar = read_gbnf(GBNF)
    for good in ("e4", "Ke4", "O-O", "O-O-O, e5", "Nf3+,  d4#", "a1-", "a1]", 'h8"'):
        assert grammar.matches(good.encode()), good
    for bad in ("", "e9", "O-", "e4,", "e4,e5", "e4,   e5", "ke4", "[e4", "e4,, e5"):
        assert not grammar.matches(bad.encode()), bad


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no rule root"),
        ('x ::= "a"', "no rule root"),
        ("root = x", "expected ::="),
        ("root ::= x", "no rule 'x'"),
        ('root ::= "a', 'expected "'),
        ("root ::= [z-a]", "backwards"),
        ("root ::= [a", "expected ]"),
        ('root ::= "a" )', "end of the rule"),
        ('root ::= ("a"', "expected )"),
        (r'root ::= "\q"', "escape"),
        (r'root ::= "\U00110000"', "escape"),
        ('root ::= "a"{3,2}', "repeats"),
        ('root ::= "a"{99999}', "repeats"),
        ('root ::= "a" root', "no text at all"),
        ('root ::= root "a" | "b"', "too ambiguous"),
        ('root ::= a\na ::= b\nb ::= a "x" | "y"', "too ambiguous"),
        ("root ::= " + "(" * 100, "within each other"),
        ("root ::= " + '"a" ' * 30_000, "characters"),
    ],
)
def test_what_is_no_grammar(text: str, words: str) -> None:
    with pytest.raises(DataError, match=re.escape(words)):
        read_gbnf(text)


@pytest.mark.parametrize("pattern", ["(?=a)b", r"(a)\1", r"\bx", "(", "a{20000}", "(?i:a)", "x" * 10 + "$y"])
def test_what_no_grammar_can_say(pattern: str) -> None:
    with pytest.raises(DataError, match="pattern"):
        read_regex(pattern)


def test_every_state_ends_and_as_soon_as_it_says() -> None:
    grammar = read_gbnf('root ::= "[" (item ("," item)*)? "]"\nitem ::= "ab"{2,4} | root | [0-9]+ "."')
    draw = random.Random(3)
    for _ in range(200):
        state: State | None = grammar.start
        for _ in range(30):
            assert state is not None
            end = grammar.advance(state, state.soonest)
            assert end is not None
            assert end.accepting
            bits = [byte for byte in range(256) if state.mask >> byte & 1]
            if not bits:
                break
            state = grammar.advance(state, bytes([draw.choice(bits)]))


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeslm.runtime.grammar.MOST_FRAMES", 50)
    grammar = read_gbnf("root ::= [a-z]{0,5000}")
    assert grammar.matches(b"abc" * 100)
    before = grammar.start
    assert grammar.fresh().start is not before
    assert grammar.matches(b"abc" * 100)
