"""Grammars over tokens: the mask against brute force, and texts that end in the room that they have."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeslm.errors import EngineError
from edgeslm.runtime.constrain import MOST_CANDIDATES, TokenBytes, TokenConstraint, in_order
from edgeslm.runtime.gbnf import read_gbnf
from edgeslm.runtime.json_grammar import read_schema

BYTES = [bytes([byte]) for byte in range(256)]
MERGED = [
    b'":',
    b'", "',
    b'{"',
    b'"}',
    b"abc",
    b"na",
    b"name",
    b"123",
    b", ",
    b"}}",
    b"\xc3\xa9",
    b"",
    b'ab"',
]
VOCABULARY = TokenBytes([*BYTES, *MERGED, b"<end>"], {256 + len(MERGED)})
END = 256 + len(MERGED)
SIZE = END + 1
ITEM = {"type": "object", "properties": {"na": {"type": "number"}}, "required": ["na"]}
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "list": {"type": "array", "items": ITEM}},
    "required": ["name", "list"],
}


def allowed(logits: np.ndarray) -> set[int]:
    return set(np.flatnonzero(np.isfinite(logits)).tolist())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_the_mask_is_that_of_brute_force(seed: int) -> None:
    """Every token tried on the grammar, along a random way."""
    random = np.random.default_rng(seed)
    grammar = read_gbnf('root ::= "{\\"name\\":" value "}"\nvalue ::= [0-9]+ | "\\"" [a-zé]* "\\"" | root')
    constraint = TokenConstraint(grammar, VOCABULARY, needed=MOST_CANDIDATES)
    for _ in range(12):
        logits = random.standard_normal(SIZE).astype(np.float32)
        narrowed = constraint.narrow(logits, 10**6)
        expected = {
            token
            for token, piece in enumerate(VOCABULARY.pieces)
            if piece and token != END and grammar.advance(constraint.state, piece) is not None
        } | ({END} if constraint.state.accepting else set())
        assert allowed(narrowed) == expected
        token = int(random.choice(sorted(expected)))
        assert narrowed[token] == logits[token]
        if token == END:
            return
        constraint.accept(token)


def test_only_as_many_as_are_needed_and_those_the_likeliest() -> None:
    random = np.random.default_rng(1)
    logits = random.standard_normal(SIZE).astype(np.float32)
    every = allowed(TokenConstraint(read_gbnf("root ::= [a-z]+"), VOCABULARY).narrow(logits, 99))
    best = sorted(every, key=lambda token: -logits[token])
    few = TokenConstraint(read_gbnf("root ::= [a-z]+"), VOCABULARY, needed=3)
    assert allowed(few.narrow(logits, 99)) == set(best[:3])
    cut = TokenConstraint(read_gbnf("root ::= [a-z]+"), VOCABULARY, min_p=0.5)
    floor = logits[best[0]] + np.log(0.5)
    assert allowed(cut.narrow(logits, 99)) == {token for token in best if logits[token] >= floor}


@pytest.mark.parametrize("room", range(20, 120, 3))
def test_it_ends_in_the_room_there_is(room: int) -> None:
    """Whatever a random model would say: the text is whole when its tokens are used up."""
    random = np.random.default_rng(room)
    grammar = read_schema(SCHEMA)
    constraint = TokenConstraint(grammar, VOCABULARY, needed=40)
    data = b""
    for left in range(room, 0, -1):
        narrowed = constraint.narrow((random.standard_normal(SIZE) * 3).astype(np.float32), left)
        token = int(narrowed.argmax())
        if token == END:
            break
        constraint.accept(token)
        data += VOCABULARY.pieces[token]
    record = json.loads(data)
    assert set(record) == {"name", "list"}


def test_without_room_it_writes_what_fits() -> None:
    constraint = TokenConstraint(read_schema(SCHEMA), VOCABULARY)
    for left in (3, 2, 1):
        narrowed = constraint.narrow(np.zeros(SIZE, np.float32), left)
        constraint.accept(int(narrowed.argmax()))


def test_an_end_is_the_only_way_on_where_the_text_is_whole() -> None:
    constraint = TokenConstraint(read_gbnf('root ::= "abc"'), VOCABULARY)
    constraint.accept(256 + MERGED.index(b"abc"))
    assert allowed(constraint.narrow(np.zeros(SIZE, np.float32), 5)) == {END}


def test_a_vocabulary_that_can_not_say_it() -> None:
    vocabulary = TokenBytes([b"x", b"y", b"<end>"], {2})
    constraint = TokenConstraint(read_gbnf('root ::= "z"'), vocabulary)
    with pytest.raises(EngineError, match="no token"):
        constraint.narrow(np.zeros(3, np.float32), 5)
    with pytest.raises(EngineError, match="does not continue"):
        constraint.accept(0)


@given(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=600), st.integers(0, 600))
def test_in_order_is_sorting(values: list[float], count: int) -> None:
    logits = np.asarray(values, np.float32)
    tokens = np.arange(len(values))
    found = [token for token, _ in zip(in_order(logits, tokens), range(count), strict=False)]
    assert np.array_equal(logits[found], np.sort(logits)[::-1][: len(found)])
    assert len(set(found)) == min(count, len(values))
