"""Answers for programs: the README's lines, scores and the end of what has a grammar."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from edgeslm import open_bundle
from edgeslm.errors import DataError
from edgeslm.runtime.answering import Answerer, Piece, Question, Summary
from edgeslm.runtime.gbnf import read_gbnf
from edgeslm.runtime.runner import RunnerOptions, open_runner
from edgeslm.runtime.sampling import Sampling
from tests.runtime.fakes import FakeRunner

if TYPE_CHECKING:
    from pathlib import Path

GREEDY = Sampling(temperature=0)


def test_as_a_library(tiny_gguf: Path) -> None:
    pytest.importorskip("llama_cpp")
    answerer = Answerer(open_runner(open_bundle(tiny_gguf), RunnerOptions(threads=1)))
    tokens = answerer.chat_tokens([{"role": "user", "content": "Why?"}])
    question = Question(tokens=tokens, sampling=GREEDY, max_tokens=8, scored=1)
    *pieces, summary = answerer.answer(question)
    assert isinstance(summary, Summary)
    scores = [score for piece in pieces if isinstance(piece, Piece) for score in piece.scores]
    assert summary.tokens == len(scores) <= 8
    assert all(score.top[0][0] == score.token for score in scores), "the likeliest was taken"
    again = list(answerer.answer(question))
    texts = [[piece.text for piece in some if isinstance(piece, Piece)] for some in (again, pieces)]
    assert texts[0] == texts[1]
    assert isinstance(again[-1], Summary)
    assert again[-1].reused_tokens == len(tokens) - 1
    answerer.runner.close()


def test_a_grammar_that_uses_all_the_room_is_whole() -> None:
    for room, finish in ((1, "length"), (2, "length"), (3, "stop"), (4, "stop")):
        answerer = Answerer(FakeRunner(b"yes"))
        question = Question(
            tokens=[1], sampling=GREEDY, max_tokens=room, grammar=read_gbnf('root ::= "yes" | "n"')
        )
        *pieces, summary = answerer.answer(question)
        assert isinstance(summary, Summary)
        text = "".join(piece.text for piece in pieces if isinstance(piece, Piece))
        assert (text, summary.finish_reason) in ((("n", "stop"),) if room < 3 else (("yes", finish),))


def test_a_model_without_an_end_of_its_own_ends_with_its_grammar() -> None:
    runner = FakeRunner(b"aaaaaaaaaaaaaaa")
    runner.facts = type(runner.facts)(**{**vars(runner.facts), "stop_tokens": frozenset()})
    question = Question(tokens=[1], sampling=GREEDY, max_tokens=50, grammar=read_gbnf('root ::= "a"{3}'))
    *pieces, summary = Answerer(runner).answer(question)
    assert isinstance(summary, Summary)
    assert (len(pieces), summary.finish_reason, summary.tokens) == (3, "stop", 3)


def test_prompts_that_are_none() -> None:
    answerer = Answerer(FakeRunner(context=100), 20)
    assert answerer.prompt_limit == 20
    for tokens in ([], [3, 258], [-1]):
        with pytest.raises(DataError):
            answerer.check(tokens)
    answerer.check([0, 257])


def test_what_was_read_is_forgotten_after_an_error() -> None:
    def fail(_count: int) -> None:
        raise DataError("broken")

    runner = FakeRunner(b"abc", on_step=fail)
    answerer = Answerer(runner)
    with pytest.raises(DataError):
        list(answerer.answer(Question(tokens=[1, 2], sampling=GREEDY, max_tokens=5)))
    assert runner.position == 0
