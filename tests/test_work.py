"""Long stages: what survives a kill, what a team of processes does, and results with folders in them."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from queue import Queue
from typing import TYPE_CHECKING, Any

import pytest

from edgeslm.errors import DataError
from edgeslm.progress import Quiet
from edgeslm.work import open_work

if TYPE_CHECKING:
    from pathlib import Path


@dataclass
class Meeting:
    """Where two threads that play processes meet."""

    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(2))
    values: Queue[Any] = field(default_factory=Queue)


@dataclass
class Member:
    meeting: Meeting
    is_main: bool

    def share(self, value: Any) -> Any:
        if self.is_main:
            self.meeting.values.put(value)
            return value
        return self.meeting.values.get(timeout=10)

    def wait(self) -> None:
        self.meeting.barrier.wait(timeout=10)

    def leave(self) -> None:
        self.wait()


def write_two(directory: Path, kept: Path) -> None:
    (directory / "inner").mkdir()
    (directory / "inner" / "weights").write_text("w")
    (directory / "note").write_text("n")


def test_folders_in_a_result_are_hashed_too(tmp_path: Path) -> None:
    with open_work(tmp_path / "work", frozenset(), Quiet()) as store:
        final = store.long_stage("train", {"a": 1}, write_two)
        assert store.long_stage("train", {"a": 1}, write_two) == final
        (final / "inner" / "weights").write_text("x")
        store.long_stage("train", {"a": 1}, write_two)
        assert [stage["skipped"] for stage in store.stages] == [False, True, False]
    assert (final / "inner" / "weights").read_text() == "w"


def test_progress_is_found_again_after_a_failure_and_goes_when_it_is_done(tmp_path: Path) -> None:
    seen = []

    def produce(directory: Path, kept: Path) -> None:
        kept.mkdir(exist_ok=True)
        seen.append(sorted(path.name for path in kept.iterdir()))
        (kept / "step-7").write_text("state")
        if len(seen) == 1:
            raise KeyboardInterrupt
        (directory / "done").write_text("")

    with open_work(tmp_path / "work", frozenset(), Quiet()) as store, pytest.raises(KeyboardInterrupt):
        store.long_stage("train", {}, produce)
    with open_work(tmp_path / "work", frozenset(), Quiet()) as store:
        final = store.long_stage("train", {}, produce)
    assert seen == [[], ["step-7"]]
    assert [path.name for path in final.parent.iterdir() if path.is_dir()] == [final.name]


def test_other_processes_compute_along_and_leave_the_writing_to_one(tmp_path: Path) -> None:
    """Each of two stages, one for all processes and one for the main one; then both again, skipped."""
    meeting = Meeting()
    calls: list[tuple[str, bool]] = []

    def run(is_main: bool) -> None:
        member = Member(meeting, is_main)

        def train(to: Path, kept: Path) -> None:
            calls.append(("train", is_main))
            if is_main:
                write_two(to, kept)
            member.wait()
            assert (to / "inner" / "weights").is_file()  # all of them see one directory

        def pack(to: Path) -> None:
            calls.append(("pack", is_main))
            (to / "x").write_text("")

        with open_work(tmp_path / "work", frozenset(), Quiet(), member) as store:
            for _ in range(2):
                store.long_stage("train", {}, train)
                assert (store.stage("pack", {}, pack) / "x").is_file()  # others go on when it is there

    others = threading.Thread(target=run, args=(False,))
    others.start()
    run(True)
    others.join(timeout=10)
    assert sorted(calls) == [("pack", True), ("train", False), ("train", True)]
    assert len([path for path in (tmp_path / "work").iterdir() if path.is_dir()]) == 2


def write_rows(directory: Path) -> None:
    (directory / "rows").write_text("1")


def test_a_failure_before_any_result_leaves_nothing(tmp_path: Path) -> None:
    def refused(directory: Path) -> None:
        raise DataError("holds no rows")

    work = tmp_path / "out.work"
    with pytest.raises(DataError), open_work(work, frozenset(), Quiet()) as store:
        store.stage("data", {}, refused)
    assert not work.exists()
    with open_work(work, frozenset(), Quiet()) as store:
        store.stage("data", {}, write_rows)
        with pytest.raises(DataError):
            store.stage("train", {}, refused)
    assert [path.name.partition("-")[0] for path in work.iterdir() if path.is_dir()] == ["data"]
    before = sorted(work.iterdir())
    with pytest.raises(DataError), open_work(work, frozenset(), Quiet()) as store:
        store.stage("prune", {}, refused)
    assert sorted(work.iterdir()) == before
