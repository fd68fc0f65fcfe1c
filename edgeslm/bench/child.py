"""The benchmark in a process of its own: its memory is then the model's, not that of whoever asked.

The parent writes one JSON request to the child's standard input; the child answers in JSON lines on its
standard output: {"note": text} while it works, then {"record": ...} or {"error": {...}}.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import IO, TYPE_CHECKING, Any

from edgeslm import errors
from edgeslm.bench.classify_bench import bench_classifier
from edgeslm.bench.measure import bench_artifact
from edgeslm.errors import EdgeslmError, EngineError
from edgeslm.progress import Quiet
from edgeslm.runtime.runner import RunnerOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from edgeslm.progress import Progress

COMMAND = (sys.executable, "-m", "edgeslm.bench.child")


def bench_in_subprocess(
    artifact: Path | str,
    *,
    prompt_tokens: Sequence[int] = (512,),
    decode_tokens: Sequence[int] = (128,),
    threads: Sequence[int] = (),
    repetitions: int = 5,
    options: RunnerOptions | None = None,
    progress: Progress | None = None,
    seed: int = 0,
    command: Sequence[str] = COMMAND,
) -> dict[str, Any]:
    """The record of measure.bench_artifact, made by a fresh interpreter; the same arguments and errors.

    Keep no progress bar moving meanwhile: its thread takes time from the model.  Raises EngineError also
    when the engine kills the child, as an instruction that the processor lacks does.
    """
    request = {
        "artifact": str(artifact),
        "prompt_tokens": list(prompt_tokens),
        "decode_tokens": list(decode_tokens),
        "threads": list(threads),
        "repetitions": repetitions,
        "options": asdict(options or RunnerOptions()),
        "seed": seed,
    }
    return _ask({"what": "model", **request}, progress or Quiet(), command)


def bench_classifier_in_subprocess(
    artifact: Path | str,
    *,
    batch_sizes: Sequence[int] = (1,),
    threads: Sequence[int] = (),
    repetitions: int = 5,
    progress: Progress | None = None,
    seed: int = 0,
    command: Sequence[str] = COMMAND,
) -> dict[str, Any]:
    """The record of classify_bench.bench_classifier, made as bench_in_subprocess makes its own."""
    request = {
        "artifact": str(artifact),
        "batch_sizes": list(batch_sizes),
        "threads": list(threads),
        "repetitions": repetitions,
        "seed": seed,
    }
    return _ask({"what": "classifier", **request}, progress or Quiet(), command)


def _ask(request: dict[str, Any], progress: Progress, command: Sequence[str]) -> dict[str, Any]:
    with (
        tempfile.TemporaryFile() as complaints,
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=complaints,
            text=True,
            encoding="utf-8",
        ) as child,
    ):
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            with suppress(BrokenPipeError):  # it died at once: said below
                child.stdin.write(json.dumps(request))
                child.stdin.close()
            record = _listen(child.stdout, progress)
        except BaseException:
            child.kill()
            raise
        if record is not None:
            return record
        raise _death(child.wait(), complaints)


def _listen(answers: IO[str], progress: Progress) -> dict[str, Any] | None:
    """Pass notes on until the record comes; None if it does not."""
    for line in answers:
        if not line.startswith("{"):  # a library may print to standard output
            continue
        answer: dict[str, Any] = json.loads(line)
        if "note" in answer:
            progress.note(answer["note"])
        elif "error" in answer:
            error = answer["error"]
            raise getattr(errors, error["kind"])(error["message"], error["hint"])
        else:
            record: dict[str, Any] = answer["record"]
            return record
    return None


def _death(code: int, complaints: IO[bytes]) -> Exception:
    """What to raise for a child that ended without an answer."""
    complaints.seek(0)
    said = complaints.read().decode("utf-8", errors="replace").strip()
    if code >= 0:
        return RuntimeError(f"the benchmark's process ended with {code}:\n{said}")
    name = signal.Signals(-code).name
    last = said.splitlines()[-1] if said else "it said nothing"
    return EngineError(
        f"the engine died of {name} while it was measured: {last}",
        hint="not enough memory: use a smaller file or context" if name == "SIGKILL"
        else "edgeslm doctor shows whether the engine suits this processor",
    )  # fmt: skip


class _Notes:
    """Progress of the child: notes as JSON lines, no bars."""

    def __init__(self, out: IO[str]) -> None:
        self._out = out

    @contextmanager
    def task(self, name: str, total: float, unit: str = "") -> Iterator[Callable[[float], None]]:  # noqa: ARG002
        yield lambda _amount: None

    def note(self, text: str) -> None:
        self._out.write(json.dumps({"note": text}) + "\n")
        self._out.flush()


def answer(request: str, out: IO[str]) -> None:
    """The child's whole work: one JSON request to JSON lines on `out`."""
    arguments = json.loads(request)
    kinds: dict[str, Callable[..., dict[str, Any]]] = {
        "model": _bench_model,
        "classifier": bench_classifier,
    }
    bench = kinds[arguments.pop("what")]
    try:
        result = {"record": bench(**arguments, progress=_Notes(out))}
    except EdgeslmError as error:
        result = {"error": {"kind": type(error).__name__, "message": error.message, "hint": error.hint}}
    out.write(json.dumps(result, allow_nan=False) + "\n")


def _bench_model(*, options: dict[str, Any], **arguments: Any) -> dict[str, Any]:
    return bench_artifact(**arguments, options=RunnerOptions(**options))


if __name__ == "__main__":
    answer(sys.stdin.read(), sys.stdout)
