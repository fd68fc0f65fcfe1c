"""Chat and generate: sessions, pipes, JSON, interruption, a full context."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from typing import TYPE_CHECKING, Any

import pytest

from edgeslm.errors import DataError, ModelError
from edgeslm.runtime import chat as chat_module
from edgeslm.runtime.chat import Chat, Streams, chat_session, generate_once, summary
from edgeslm.runtime.sampling import Sampling
from tests.runtime.fakes import FakeRunner, Terminal

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

GREEDY = {"temperature": 0.0, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "repeat_penalty": 1.0, "seed": 0}


def streams(text: str = "", *, terminal: bool = False) -> Streams:
    return Streams(
        source=Terminal(text) if terminal else io.StringIO(text), sink=io.StringIO(), notes=io.StringIO()
    )


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Callable[[FakeRunner], None]:
    """Make the doorways open this runner instead of a file."""

    def use(runner: FakeRunner) -> None:
        monkeypatch.setattr(
            chat_module, "_open", lambda _artifact, _options: (runner, Sampling(temperature=0))
        )

    return use


def press_at(step: int, times: int = 1) -> Callable[[int], None]:
    """A user who presses Ctrl-C during a decode step."""

    def on_step(count: int) -> None:
        if count == step:
            for _ in range(times):
                signal.raise_signal(signal.SIGINT)

    return on_step


def talk(runner: FakeRunner, text: str, **options: Any) -> tuple[Chat, Streams]:
    where = streams(text, terminal=True)
    chat = Chat(runner, sampling=Sampling(temperature=0), streams=where, **options)
    chat.talk()
    return chat, where


def test_a_session_keeps_the_conversation() -> None:
    runner = FakeRunner(b"one", b"two")
    chat, where = talk(runner, "first\n\nsecond\n")
    assert where.sink.getvalue() == "one\ntwo\n"
    assert [message["content"] for message in chat.messages] == ["first", "one", "second", "two"]
    assert bytes(runner.state) == b"<user>first</><assistant>one</><user>second</><a>two"


def test_a_turn_computes_only_what_is_new() -> None:
    """The first answer stays in the cache up to where the template writes something else than the model did."""
    runner = FakeRunner(b"ssistant>one", b"two")
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}<a"
    runner.facts = type(runner.facts)(**(vars(runner.facts) | {"chat_template": template}))
    talk(runner, "first\nsecond\n")
    kept = len("<user>first</><assistant>")
    assert runner.computed == [
        len("<user>first</><a"),
        len("<user>first</><assistant>ssistant>one</><user>second</><a") - kept,
    ]


def test_the_system_message_comes_first() -> None:
    runner = FakeRunner(b"ok")
    talk(runner, "hi\n", system="be brief")
    assert bytes(runner.state).startswith(b"<system>be brief</><user>hi</>")


@pytest.mark.parametrize("adds_bos", [True, False])
def test_bos_comes_once(adds_bos: bool) -> None:
    runner = FakeRunner(b"ok", adds_bos=adds_bos)
    talk(runner, "hi\n")
    assert runner.state.count(257) == adds_bos


def test_ctrl_c_ends_the_answer_and_not_the_session() -> None:
    runner = FakeRunner(b"a long answer", b"two", on_step=press_at(3))
    chat, where = talk(runner, "first\nsecond\n")
    assert where.sink.getvalue() == "a lo\ntwo\n"
    assert "interrupted" in where.notes.getvalue()
    assert chat.messages[1] == {"role": "assistant", "content": "a lo"}


def test_a_second_ctrl_c_leaves() -> None:
    runner = FakeRunner(b"a long answer", b"two", on_step=press_at(3, times=2))
    _, where = talk(runner, "first\nsecond\n")
    assert "two" not in where.sink.getvalue()


def test_ctrl_c_works_as_before_afterwards() -> None:
    before = signal.getsignal(signal.SIGINT)
    talk(FakeRunner(b"a long answer", on_step=press_at(3)), "first\n")
    assert signal.getsignal(signal.SIGINT) is before


def test_the_oldest_turns_go_aloud_when_the_context_is_full() -> None:
    runner = FakeRunner(*[b"answer"] * 8, context=160)
    chat, where = talk(runner, "question\n" * 8, system="be brief")
    assert where.sink.getvalue() == "answer\n" * 8
    assert (
        "(the context of 160 tokens is full: the 2 oldest messages are forgotten)" in where.notes.getvalue()
    )
    assert chat.messages[0]["role"] == "system"
    assert chat.messages[1]["role"] == "user"
    assert len(runner.state) <= 160


def test_a_message_that_can_not_fit_is_refused_and_forgotten() -> None:
    runner = FakeRunner(b"ok", context=100)
    chat, where = talk(runner, "x" * 200 + "\nhi\n")
    assert "error: the message has 212 tokens with its marks, the context holds 100" in where.notes.getvalue()
    assert where.sink.getvalue() == "ok\n"
    assert [message["content"] for message in chat.messages] == ["hi", "ok"]


def test_an_answer_cut_by_the_context_says_so() -> None:
    _, where = talk(FakeRunner(b"x" * 100, context=40), "hi\n")
    assert "cut: the context is full" in where.notes.getvalue()


def test_json_answers_are_one_document_each() -> None:
    _, where = talk(FakeRunner(b"one", "zwö".encode()), "first\nsecond\n", as_json=True)
    records = [json.loads(line) for line in where.sink.getvalue().splitlines()]
    assert [record["text"] for record in records] == ["one", "zwö"]
    assert records[0]["schema"] == "edgeslm.generation/1"


def test_no_chat_template() -> None:
    with pytest.raises(ModelError, match="edgeslm generate"):
        Chat(FakeRunner(template=None), sampling=Sampling(), streams=streams())


def test_a_pipe_is_one_message(opened: Callable[[FakeRunner], None], tmp_path: Path) -> None:
    runner = FakeRunner(b"fine")
    opened(runner)
    where = streams("two\nlines\n")
    chat_session(tmp_path, system=None, as_json=False, streams=where)
    assert bytes(runner.state) == b"<user>two\nlines</><a>fine"
    assert where.sink.getvalue() == "fine\n"
    assert re.fullmatch(
        r"\[prompt 21 tokens, [\d.]+ tokens/s; first token after 0.0\d s; answer 4 tokens, [\d.]+ tokens/s\]\n",
        where.notes.getvalue(),
    )
    assert runner.closed


def test_an_empty_pipe(opened: Callable[[FakeRunner], None], tmp_path: Path) -> None:
    runner = FakeRunner()
    opened(runner)
    with pytest.raises(DataError, match="no message"):
        chat_session(tmp_path, system=None, as_json=False, streams=streams(" \n"))
    assert runner.closed


def test_a_pipe_that_is_not_utf8(opened: Callable[[FakeRunner], None], tmp_path: Path) -> None:
    opened(FakeRunner())
    source = io.TextIOWrapper(io.BytesIO(b"ab\xff"))
    where = Streams(source=source, sink=io.StringIO(), notes=io.StringIO())
    with pytest.raises(DataError, match="byte 0xff at 2"):
        generate_once(tmp_path, None, as_json=False, streams=where)


def test_generate_continues_the_prompt(opened: Callable[[FakeRunner], None], tmp_path: Path) -> None:
    runner = FakeRunner(b" world END more")
    opened(runner)
    where = streams()
    generate_once(tmp_path, "hello", as_json=True, stop=("END",), streams=where)
    record = json.loads(where.sink.getvalue())
    assert (record["text"], record["finish_reason"], record["prompt_tokens"]) == (" world ", "stop", 5)
    assert where.notes.getvalue() == ""


def test_generate_reads_a_pipe(opened: Callable[[FakeRunner], None], tmp_path: Path) -> None:
    """The newline that echo adds is no part of the prompt."""
    runner = FakeRunner(b"!")
    opened(runner)
    generate_once(tmp_path, None, as_json=False, streams=streams("a\nb\n"))
    assert bytes(runner.state) == b"a\nb!"


def test_generate_needs_a_prompt(opened: Callable[[FakeRunner], None], tmp_path: Path) -> None:
    opened(FakeRunner())
    with pytest.raises(DataError, match="empty"):
        generate_once(tmp_path, "", as_json=False, streams=streams())


def test_an_interrupted_command_tells_the_shell(opened: Callable[[FakeRunner], None], tmp_path: Path) -> None:
    opened(FakeRunner(b"a long answer", on_step=press_at(2)))
    where = streams()
    with pytest.raises(SystemExit) as stop:
        generate_once(tmp_path, "x", as_json=True, streams=where)
    assert stop.value.code == 130
    assert json.loads(where.sink.getvalue())["finish_reason"] == "interrupted"


def test_a_sink_that_can_not_show_a_character() -> None:
    sink = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    Streams(source=io.StringIO(), sink=sink, notes=io.StringIO()).show("aé😀b")
    assert sink.buffer.getvalue() == b"a??b"


def test_summary_names_what_is_known() -> None:
    record = {
        "prompt_tokens": 9, "reused_tokens": 4, "prefill_tokens_per_s": None, "ttft_s": None,
        "tokens": 0, "decode_tokens_per_s": None, "finish_reason": "interrupted",
    }  # fmt: skip
    assert summary(record) == "[prompt 9 tokens (4 kept); answer 0 tokens; interrupted]"


def own_terminal() -> None:
    """Make standard input the controlling terminal, so that Ctrl-C on it is a signal."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Session:
    """A command on a pseudo-terminal."""

    def __init__(self, *arguments: str) -> None:
        self.master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "edgeslm", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            preexec_fn=own_terminal,  # noqa: PLW1509 (there are no threads here)
        )
        os.close(slave)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def wait_for(self, pattern: str, *, timeout_s: float = 60) -> None:
        """Read on until `pattern` comes after what was waited for before."""
        end = time.monotonic() + timeout_s
        while not (found := re.search(pattern, self.seen)):
            left = end - time.monotonic()
            assert left > 0, f"no {pattern!r} in {self.seen!r}"
            if select.select([self.master], [], [], left)[0]:
                self.seen += os.read(self.master, 4096).decode(errors="replace")
        self.seen = self.seen[found.end() :]

    def leave(self, key: str) -> int:
        """Press `key` until the command has ended: readline misses a signal just before it waits for keys."""
        end = time.monotonic() + 30
        try:
            while self.process.poll() is None:
                assert time.monotonic() < end, "the session does not end"
                self.type(key)
                time.sleep(0.3)
            return self.process.returncode
        finally:
            self.process.kill()
            os.close(self.master)


def test_a_real_session_on_a_terminal(tiny_gguf: Path) -> None:
    """Typing, streaming, Ctrl-C in an answer, another turn, Ctrl-D; the model babbles without an end."""
    pytest.importorskip("llama_cpp")
    session = Session(
        "chat",
        str(tiny_gguf),
        "--temperature",
        "1",
        "--top-k",
        "0",
        "--min-p",
        "0",
        "-n",
        "100000",
        "-t",
        "1",
    )
    session.wait_for("Ctrl-D leaves")
    session.wait_for("> ")
    session.type("hello\n")
    session.wait_for(r"answer \d+ tokens, .* tokens/s(; cut: the context is full)?\]")
    session.wait_for("> ")
    assert session.leave("\x04") == 0


@pytest.mark.slow
def test_ctrl_c_in_a_real_session(smollm2_gguf: Path) -> None:
    pytest.importorskip("llama_cpp")
    session = Session("chat", str(smollm2_gguf), "--temperature", "0", "-n", "2000", "-t", "1")
    session.wait_for("> ")
    session.type("Write a very long story about a computer.\n")
    session.wait_for(r"\w+ \w+ \w+ \w+ \w+ \w+ \w+ \w+ \w+ \w+ \w+ \w+")
    session.type("\x03")
    session.wait_for(r"interrupted\]")
    session.wait_for("> ")
    session.type("Say yes.\n")
    session.wait_for(r"yes.*\n\w+ ")
    session.type("\x03")
    session.wait_for(r"\(\d+ kept\)")
    session.wait_for("> ")
    assert session.leave("\x03") == 0
