"""`edgeslm chat` and `edgeslm generate`: a session at the terminal, one message from a pipe, one continuation.

The answer goes to standard output, everything about it to standard error.
"""

from __future__ import annotations

import json
import signal
import sys
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from edgeslm.errors import DataError, EdgeslmError, ModelError
from edgeslm.runtime.generate import Generation
from edgeslm.runtime.runner import RunnerOptions, open_runner
from edgeslm.runtime.sampling import Sampling
from edgeslm.runtime.template import conversation_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from edgeslm.runtime.runner import Runner

PROMPT = "> "
INTERRUPTED_EXIT_CODE = 130


@dataclass(frozen=True, kw_only=True)
class Streams:
    """Where a conversation happens; the defaults are looked up when it starts."""

    source: TextIO
    sink: TextIO
    notes: TextIO

    @classmethod
    def standard(cls) -> Streams:
        return cls(source=sys.stdin, sink=sys.stdout, notes=sys.stderr)

    def note(self, text: str) -> None:
        self.notes.write(text + "\n")
        self.notes.flush()

    def tell(self, notes: Sequence[str]) -> None:
        """What a runner could not do as asked."""
        for note in notes:
            self.note(f"note: {note}")

    def show(self, text: str) -> None:
        """Write part of an answer at once; what the terminal can't show becomes '?'."""
        try:
            self.sink.write(text)
        except UnicodeEncodeError as error:
            self.sink.write(text.encode(error.encoding, errors="replace").decode(error.encoding))
        self.sink.flush()

    def read_all(self) -> str:
        """Standard input to its end.  Raises DataError when it is not UTF-8."""
        data = self.source.buffer.read() if hasattr(self.source, "buffer") else self.source.read().encode()
        try:
            return str(data.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise DataError(
                f"standard input is not UTF-8: byte {data[error.start]:#04x} at {error.start}",
                hint="convert it, for example with iconv -t utf-8",
            ) from error

    def read_line(self, *, editing: bool = True) -> str | None:
        """The user's next line; None at the end of input or after Ctrl-C.

        editing: with the keys of a shell, for which Python has to write the prompt to the sink.
        """
        try:
            if editing and self.source is sys.stdin and self.sink is sys.stdout and self.sink.isatty():
                with suppress(ImportError):
                    import readline  # noqa: F401 (its import changes what input() does)

                return input(PROMPT)
            self.notes.write(PROMPT)
            self.notes.flush()
            return self.source.readline() or None
        except (EOFError, KeyboardInterrupt):
            self.note("")
            return None


def chat_session(
    artifact: Path,
    message: str | None = None,
    *,
    system: str | None,
    as_json: bool,
    max_tokens: int = 512,
    stop: Sequence[str] = (),
    streams: Streams | None = None,
    **options: Any,
) -> None:
    """Talk to `artifact`: answer `message`; without one at a terminal until Ctrl-D or Ctrl-C, from a pipe one message.

    options: fields of RunnerOptions and Sampling.  With as_json each answer is one JSON document.
    """
    streams = streams or Streams.standard()
    runner, sampling = _open(artifact, options)
    with closing(runner):
        streams.tell(runner.notes)
        chat = Chat(
            runner,
            sampling=sampling,
            system=system,
            stop=stop,
            max_tokens=max_tokens,
            streams=streams,
            as_json=as_json,
        )
        if message is None and streams.source.isatty():
            chat.talk()
            return
        message = (streams.read_all() if message is None else message).strip()
        if not message:
            raise DataError("there is no message", hint='edgeslm chat ARTIFACT "Hello", or a pipe')
        _leave_if_interrupted(chat.answer(message))


def generate_once(
    artifact: Path,
    prompt: str | None,
    *,
    as_json: bool,
    max_tokens: int = 512,
    stop: Sequence[str] = (),
    streams: Streams | None = None,
    **options: Any,
) -> None:
    """Continue `prompt`, or standard input where it is None, with no chat template."""
    streams = streams or Streams.standard()
    if prompt is None:
        if streams.source.isatty():
            streams.note("type the text to continue, then Ctrl-D")
        prompt = streams.read_all().removesuffix("\n")
    runner, sampling = _open(artifact, options)
    with closing(runner):
        streams.tell(runner.notes)
        tokens = runner.tokenize(prompt, add_special=True, parse_special=True)
        if not tokens:
            raise DataError("the prompt is empty", hint="give some text to continue")
        generation = _generate(
            runner, tokens, streams, as_json, sampling=sampling, stop=stop, max_tokens=max_tokens
        )
        _leave_if_interrupted(generation)


class Chat:
    """A conversation with one runner: its messages, and the tokens that the runner holds of them."""

    def __init__(
        self,
        runner: Runner,
        *,
        sampling: Sampling,
        system: str | None = None,
        stop: Sequence[str] = (),
        max_tokens: int = 512,
        streams: Streams,
        as_json: bool = False,
    ) -> None:
        """Raises ModelError when the model has no chat template."""
        if runner.facts.chat_template is None:
            raise ModelError(
                "the model has no chat template: it was not made for chat",
                hint="continue a text with edgeslm generate",
            )
        self.messages = [{"role": "system", "content": system}] if system else []
        self._template = runner.facts.chat_template
        self._runner = runner
        self._sampling = sampling
        self._random = np.random.default_rng(sampling.seed)
        self._stop = stop
        self._max_tokens = max_tokens
        self._streams = streams
        self._as_json = as_json
        self._held: list[int] = []

    def talk(self) -> None:
        """Answer line after line.  Ctrl-C ends an answer, Ctrl-D or Ctrl-C at the prompt the conversation."""
        self._streams.note("Ctrl-C stops an answer, Ctrl-D leaves")
        while (line := self._streams.read_line(editing=not self._as_json)) is not None:
            if not line.strip():
                continue
            try:
                self.answer(line.strip())
            except EdgeslmError as error:
                self._streams.note(f"error: {error}")
            except KeyboardInterrupt:  # the second Ctrl-C within one answer
                self._streams.note("")
                return

    def answer(self, message: str) -> Generation:
        """One turn.  An error leaves the conversation as it was."""
        before = list(self.messages)
        self.messages.append({"role": "user", "content": message})
        try:
            generation = _generate(
                self._runner,
                self._fitting_tokens(),
                self._streams,
                self._as_json,
                sampling=self._sampling,
                stop=self._stop,
                max_tokens=self._max_tokens,
                held=self._held,
                random=self._random,
            )
        except EdgeslmError:
            self.messages, self._held = before, []
            raise
        self._held = generation.held
        if generation.text:
            self.messages.append({"role": "assistant", "content": generation.text})
        else:
            self.messages.pop()
        return generation

    def _tokens(self, messages: Sequence[dict[str, str]]) -> list[int]:
        return conversation_tokens(self._runner, self._template, messages)

    def _fitting_tokens(self) -> list[int]:
        """The prompt; where it leaves too little of the context for an answer, the oldest turns go, aloud."""
        context = self._runner.options.context or 0
        room = context - min(self._max_tokens, context // 4)
        dropped = 0
        while len(tokens := self._tokens(self.messages)) > room:
            oldest = _oldest_turn(self.messages)
            if oldest is None:
                if len(tokens) < context:
                    break
                raise DataError(
                    f"the message has {len(tokens)} tokens with its marks, the context holds {context}",
                    hint="shorten it or use a larger --context",
                )
            dropped += len(self.messages[oldest])
            del self.messages[oldest]
        if dropped:
            self._streams.note(
                f"(the context of {context} tokens is full: the {dropped} oldest messages are forgotten)"
            )
        return tokens


def _oldest_turn(messages: Sequence[dict[str, str]]) -> slice | None:
    """The first user message and its answer; None when only the newest message is left."""
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    return slice(users[0], users[1]) if len(users) > 1 else None


def _generate(
    runner: Runner, tokens: Sequence[int], streams: Streams, as_json: bool, **options: Any
) -> Generation:
    """Show an answer while it grows, then what it took.  Raises KeyboardInterrupt on a second Ctrl-C."""
    with _ctrl_c() as interrupted:
        generation = Generation(runner, tokens, interrupted=interrupted, **options)
        for piece in generation:
            if not as_json:
                streams.show(piece)
    record = generation.record()
    if as_json:
        streams.show(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
        return generation
    streams.show("" if generation.text.endswith("\n") else "\n")
    streams.note(summary(record, context_full=runner.position >= (runner.options.context or 0)))
    return generation


def summary(record: dict[str, Any], *, context_full: bool = False) -> str:
    """One line on what a generation took, from its record."""

    def speed(value: float | None) -> str:
        return "" if value is None else f", {value:.1f} tokens/s"

    parts = [f"prompt {record['prompt_tokens']} tokens"]
    if record["reused_tokens"]:
        parts[0] += f" ({record['reused_tokens']} kept)"
    parts[0] += speed(record["prefill_tokens_per_s"])
    if record["ttft_s"] is not None:
        parts.append(f"first token after {record['ttft_s']:.2f} s")
    parts.append(f"answer {record['tokens']} tokens" + speed(record["decode_tokens_per_s"]))
    if record["finish_reason"] == "length":
        parts.append("cut: the context is full" if context_full else "cut at --max-tokens")
    elif record["finish_reason"] == "interrupted":
        parts.append("interrupted")
    return f"[{'; '.join(parts)}]"


@contextmanager
def _ctrl_c() -> Iterator[Callable[[], bool]]:
    """Count Ctrl-C instead of raising: the first ends the answer between two steps, the second raises."""
    presses: list[int] = []

    def press(number: int, _frame: object) -> None:
        presses.append(number)
        if len(presses) > 1:
            raise KeyboardInterrupt

    try:
        previous = signal.signal(signal.SIGINT, press)
    except ValueError:  # signals belong to the main thread
        yield lambda: False
        return
    try:
        yield lambda: bool(presses)
    finally:
        signal.signal(signal.SIGINT, previous)


def _leave_if_interrupted(generation: Generation) -> None:
    """A script that runs this command must see that Ctrl-C ended it."""
    if generation.finish_reason == "interrupted":
        raise SystemExit(INTERRUPTED_EXIT_CODE)


def _open(artifact: Path, options: dict[str, Any]) -> tuple[Runner, Sampling]:
    """The runner and the sampling that `options`, fields of RunnerOptions and Sampling, ask for."""
    from edgeslm.bundle import open_bundle

    names = {field.name for field in fields(Sampling)}
    sampling = Sampling(**{name: value for name, value in options.items() if name in names})
    runner_options = RunnerOptions(**{name: value for name, value in options.items() if name not in names})
    return open_runner(open_bundle(artifact), runner_options), sampling
