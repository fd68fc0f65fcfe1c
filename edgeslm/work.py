"""Where a build keeps its stages' results: one directory for each, named by what went into it, whole or absent.

    work/quantize-0123456789abcdef/{model.gguf, plan.json, stage.json}
    work/run.jsonl      one line for each thing that happened

A stage writes into a hidden directory that is renamed when it is whole, so whatever kills a build
leaves nothing that a later one could take for a result.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from glob import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from edgeslm.atomic import assembling, flush
from edgeslm.bundle import file_sha256
from edgeslm.errors import EdgeslmError
from edgeslm.progress import Quiet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from edgeslm.progress import Progress

STAGE_FILE = "stage.json"


@dataclass(frozen=True, kw_only=True)
class Work:
    """An open work directory.

    stages: what was run or skipped so far, as a build's result lists it.  team: the processes of one
    build; None: this one alone.
    """

    path: Path
    force: frozenset[str]
    progress: Progress
    team: Team | None = None
    clock: Callable[[], float] = time.monotonic
    stages: list[dict[str, Any]] = field(default_factory=list)
    settled: set[str] = field(default_factory=set)
    """Keys of the stages that this build has run or skipped: `force` asks for none of them again."""

    def stage(self, name: str, inputs: Mapping[str, Any], produce: Callable[[Path], None]) -> Path:
        """The directory with the stage's result: an earlier one made of equal inputs, or a new one.

        inputs: everything that can change the result's bytes, as JSON values.  produce: fills the
        directory that it is given.  An earlier result counts only while every file has its hash.
        """
        return self._stage(name, inputs, lambda beside, _kept: produce(beside), together=False)

    def long_stage(self, name: str, inputs: Mapping[str, Any], produce: Callable[[Path, Path], None]) -> Path:
        """As `stage`, for training: all processes of the team take part, and a kill loses little.

        produce: is given a second directory too, which the next try finds again after a kill.
        """
        return self._stage(name, inputs, produce, together=True)

    def _stage(
        self, name: str, inputs: Mapping[str, Any], produce: Callable[[Path, Path], None], *, together: bool
    ) -> Path:
        key = hashlib.sha256(json.dumps([name, inputs], sort_keys=True).encode()).hexdigest()
        final = self.path / f"{name}-{key[:16]}"
        kept = self.path / f"{name}-{key[:16]}.progress"
        if self.team is not None and not self.writes:
            self._follow(self.team, kept, produce)
            return final
        start = self.clock()
        skipped = (name not in self.force or key in self.settled) and _is_whole(final, key)
        if skipped:
            self.progress.note(f"{name}: skipped, its result is there")
        if self.team is not None and (skipped or not together):
            self.team.share(None)
        if not skipped:
            self.progress.note(f"{name} ...")
            self.log("started", stage=name, key=key)
            try:
                self._run(
                    name, key, inputs, lambda beside: self._lead(beside, kept, produce, together), final
                )
            except BaseException as error:
                self.log("failed", stage=name, key=key, error=f"{type(error).__name__}: {error}")
                raise
            shutil.rmtree(kept, ignore_errors=True)
        if self.team is not None:
            self.team.wait()
        seconds = self.clock() - start
        self.settled.add(key)
        self.stages.append({"name": name, "key": key, "skipped": skipped, "seconds": seconds})
        self.log("skipped" if skipped else "finished", stage=name, key=key, seconds=seconds)
        return final

    @property
    def writes(self) -> bool:
        """Whether this is the process that makes the result."""
        return self.team is None or self.team.is_main

    def scratch(self, name: str) -> Path:
        """A new directory for this process; the next build in the same place removes it."""
        path = self.path / f".{name}-{os.getpid()}.part"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def _lead(self, beside: Path, kept: Path, produce: Callable[[Path, Path], None], together: bool) -> None:
        """Fill the directory; where all take part the others are told of it, and are done with it at the end."""
        if self.team is not None and together:
            self.team.share(str(beside))
        produce(beside, kept)
        if self.team is not None and together:
            self.team.wait()

    @staticmethod
    def _follow(team: Team, kept: Path, produce: Callable[[Path, Path], None]) -> None:
        """The part of a process that is not the main one: it computes too, and leaves the writing to that."""
        shared = team.share(None)
        if shared is not None:
            produce(Path(shared), kept)
            team.wait()
        team.wait()

    def log(self, event: str, **facts: Any) -> None:
        """Append one line to the run log."""
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **facts}
        with (self.path / "run.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def _run(
        self, name: str, key: str, inputs: Mapping[str, Any], produce: Callable[[Path], None], final: Path
    ) -> None:
        with assembling(final) as beside:
            produce(beside)
            files = sorted(path for path in beside.rglob("*") if path.is_file())
            hashes = {path.relative_to(beside).as_posix(): file_sha256(path) for path in files}
            record = {"stage": name, "key": key, "inputs": inputs, "files": hashes}
            text = json.dumps(record, indent=2, sort_keys=True, ensure_ascii=False)
            (beside / STAGE_FILE).write_text(text + "\n", encoding="utf-8")
            for path in (*files, beside / STAGE_FILE):
                flush(path)


class Team(Protocol):
    """The processes that run one build together, as `accelerate launch` starts them."""

    is_main: bool

    def share(self, value: Any) -> Any:
        """The main process's value, in every process."""

    def wait(self) -> None:
        """Return when all processes have come here."""

    def leave(self) -> None:
        """The last call of every process: return when all are here, and cut the connections between them."""


@contextmanager
def open_work(
    path: Path, force: frozenset[str], progress: Progress, team: Team | None = None
) -> Iterator[Work]:
    """A work directory for one build at a time; what a killed build left is removed.

    A build that fails before its first result leaves no new directory behind.
    """
    import fcntl

    path = path.absolute()  # results name each other, and a recipe reads relative paths from its own folder
    is_new = not path.exists()
    path.mkdir(parents=True, exist_ok=True)
    if team is not None and not team.is_main:
        yield Work(path=path, force=force, progress=Quiet(), team=team)
        return
    with (path / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EdgeslmError(
                f"another build is running in {path}", hint="wait for it, or give another --work"
            ) from None
        for left in (*path.glob(".*.tmp-*"), *path.glob(".*.part")):
            shutil.rmtree(left, ignore_errors=True)
        try:
            yield Work(path=path, force=force, progress=progress, team=team)
        except BaseException:
            if is_new and not any(each.is_dir() and not each.name.startswith(".") for each in path.iterdir()):
                shutil.rmtree(path, ignore_errors=True)
            raise
        for left in path.glob(".*.part"):
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def scratch_beside(out: Path) -> Iterator[Path]:
    """A hidden directory beside `out`, on its file system; what killed processes left there is removed."""
    import psutil

    out.parent.mkdir(parents=True, exist_ok=True)
    for left in out.parent.glob(f".{escape(out.name)}.work-*"):
        if not psutil.pid_exists(int(left.name.rpartition("-")[2])):
            shutil.rmtree(left, ignore_errors=True)
    path = out.parent / f".{out.name}.work-{os.getpid()}"
    path.mkdir()
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def read_record(path: Path) -> dict[str, Any]:
    """A JSON record that a stage wrote."""
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def _is_whole(directory: Path, key: str) -> bool:
    """Whether a result is there, is of this key, and has not changed since."""
    try:
        record = json.loads((directory / STAGE_FILE).read_text(encoding="utf-8"))
        files = record["files"]
        return record["key"] == key and all(file_sha256(directory / name) == files[name] for name in files)
    except (OSError, ValueError, KeyError, TypeError):
        return False
