"""What happens on the far side, with no network between: cut anywhere, a call leaves the old release whole."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from edgeslm.fleet import far_receive

SCRIPT = Path(str(far_receive.__file__))
Files = dict[str, bytes]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def request(root: Path, release: str, files: Files) -> bytes:
    listed = [{"path": path, "bytes": len(data), "sha256": digest(data)} for path, data in files.items()]
    return json.dumps({"directory": str(root), "release": release, "files": listed}).encode() + b"\n"


class Call:
    """One call: `answers` so far, and the bytes that the far side asks for in `wanted`."""

    def __init__(self, root: Path, release: str, files: Files) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-I", str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self.process.stdin is not None
        self.process.stdin.write(request(root, release, files))
        self.process.stdin.flush()
        self.answers = [self.answer()]
        by_hash = {digest(data): data for data in files.values()}
        self.offsets = {each["sha256"]: each["offset"] for each in self.answers[0].get("need", ())}
        self.wanted = b"".join(by_hash[name][offset:] for name, offset in self.offsets.items())

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().decode()
        return json.loads(line.removeprefix(far_receive.MARK)) if line else {}

    def send(self, data: bytes) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(data)
            self.process.stdin.flush()

    def finish(self) -> dict[str, Any]:
        """The last answer, after end of input."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        out = self.process.stdout.read()
        self.process.wait()
        lines = [line for line in out.decode().splitlines() if line.startswith(far_receive.MARK)]
        self.answers += [json.loads(line.removeprefix(far_receive.MARK)) for line in lines]
        return self.answers[-1]


def put(root: Path, release: str, files: Files) -> dict[str, Any]:
    call = Call(root, release, files)
    call.send(call.wanted)
    return call.finish()


def shown(root: Path, link: str = "current") -> Files:
    folder = root / link
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


OLD: Files = {"model.gguf": b"old" * 1000, "a/card.md": b"card", "a/copy.md": b"card"}
NEW: Files = {"model.gguf": b"new" * 100_000, "a/card.md": b"card", "empty": b""}


def test_a_release_is_whole_and_pointed_to(tmp_path: Path) -> None:
    done = put(tmp_path / "chat", "one", OLD)["done"]
    assert done["before"] is None
    assert Path(done["path"]) == tmp_path / "chat/releases/one"
    assert shown(tmp_path / "chat") == OLD
    assert (tmp_path / "chat/current").readlink() == Path("releases/one")


def test_the_same_again_asks_for_nothing(tmp_path: Path) -> None:
    put(tmp_path, "one", OLD)
    call = Call(tmp_path, "one", OLD)
    assert call.wanted == b""
    assert call.finish()["done"]["before"] == "one"


def test_what_another_release_has_is_linked(tmp_path: Path) -> None:
    put(tmp_path, "one", OLD)
    call = Call(tmp_path, "two", NEW)
    assert set(call.offsets) == {digest(NEW["model.gguf"]), digest(b"")}
    call.send(call.wanted)
    assert call.finish()["done"]["previous"] == "one"
    assert shown(tmp_path) == NEW
    assert shown(tmp_path, "previous") == OLD
    inodes = {(tmp_path / "releases" / name / "a/card.md").stat().st_ino for name in ("one", "two")}
    assert len(inodes) == 1


def test_only_the_release_before_is_kept(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        put(tmp_path, name, {"model.gguf": name.encode()})
    assert sorted(path.name for path in (tmp_path / "releases").iterdir()) == ["three", "two"]
    assert put(tmp_path, "two", {"model.gguf": b"two"})["done"]["before"] == "three"  # back again
    assert shown(tmp_path, "previous") == {"model.gguf": b"three"}


def test_a_damaged_file_is_replaced(tmp_path: Path) -> None:
    put(tmp_path, "one", OLD)
    (tmp_path / "releases/one/model.gguf").write_bytes(b"0" * 3000)
    call = Call(tmp_path, "one", OLD)
    assert call.wanted == OLD["model.gguf"]
    call.send(call.wanted)
    assert "done" in call.finish()
    assert shown(tmp_path) == OLD


@pytest.mark.parametrize("seed", range(10))
def test_cut_anywhere_the_next_call_goes_on(tmp_path: Path, seed: int) -> None:
    """Killed or with its input ended after so many bytes, thrice; nothing that was kept is asked for again."""
    put(tmp_path, "one", OLD)
    choose = random.Random(seed)
    kept = 0
    for _ in range(3):
        call = Call(tmp_path, "two", NEW)
        assert len(call.wanted) == len(NEW["model.gguf"]) - kept
        call.send(call.wanted[: choose.randrange(len(call.wanted))])
        if choose.random() < 0.5:
            os.kill(call.process.pid, signal.SIGKILL)
        call.finish()
        assert shown(tmp_path) == OLD
        part = tmp_path / ".parts" / digest(NEW["model.gguf"])
        kept = part.stat().st_size if part.exists() else 0
        assert part.exists() is False or NEW["model.gguf"].startswith(part.read_bytes())
    assert "done" in put(tmp_path, "two", NEW)
    assert shown(tmp_path) == NEW
    assert not any((tmp_path / ".parts").iterdir())
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [
        ".parts", "current", "previous", "releases"
    ]  # fmt: skip


KILL = """
import atexit, json, os, signal, sys
limit, script = int(sys.argv[1]), sys.argv[2]
calls = 0
def count(frame, event, argument):
    global calls
    if event == "c_call":
        calls += 1
        if calls == limit:
            os.kill(os.getpid(), signal.SIGKILL)
atexit.register(lambda: print(json.dumps(calls)))
code = compile(open(script).read(), "far", "exec")
sys.setprofile(count)
exec(code, {"__name__": "__main__"})
"""


def receive_new(folder: Path, limit: int) -> tuple[int, str]:
    """A deployment of NEW that is killed at its call number `limit` of a C function: (status, last line).

    Its input is a file: how often a pipe has to be read, and so the number of calls, differs from run to run.
    """
    sent = folder.with_suffix(".sent")
    sent.write_bytes(request(folder, "two", NEW) + NEW["model.gguf"])
    with sent.open("rb") as source:
        done = subprocess.run(
            [sys.executable, "-I", "-c", KILL, str(limit), str(SCRIPT)],
            stdin=source, capture_output=True, check=False,
        )  # fmt: skip
    return done.returncode, (done.stdout.decode().splitlines() or [""])[-1]


def test_killed_between_any_two_steps(tmp_path: Path) -> None:
    """At shares of all its calls, close together where files are put in place and links renamed."""
    put(tmp_path / "counted", "one", OLD)
    status, calls = receive_new(tmp_path / "counted", 0)
    assert status == 0
    seen = set()
    for step in range(1, 12):
        folder = tmp_path / f"killed-{step}"
        put(folder, "one", OLD)
        assert receive_new(folder, int(int(calls) * (1 - step**2 / 150)))[0] == -signal.SIGKILL
        assert shown(folder) in (OLD, NEW)
        seen.add(len(shown(folder)["model.gguf"]))
        assert "done" in put(folder, "two", NEW)
        assert shown(folder) == NEW
        assert not [path for path in folder.glob(".*") if path.name not in (".parts", ".lock")]
    assert seen == {len(OLD["model.gguf"]), len(NEW["model.gguf"])}


def test_a_full_disk(tmp_path: Path) -> None:
    """Said before anything is sent; when it fills up meanwhile, what was written is kept."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(small)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system is not allowed here")
    try:
        put(small, "one", OLD)
        big = {"model.gguf": os.urandom(2**22)}
        refused = Call(small, "two", big).answers[0]
        assert "4.0 MiB are to come" in refused["error"]
        fits = {"model.gguf": os.urandom(2**21)}
        call = Call(small, "two", fits)
        room = os.statvfs(small)
        (small / "other").write_bytes(bytes(room.f_bavail * room.f_frsize - 2**20))
        call.send(call.wanted)
        assert "No space left" in call.finish()["error"]
        assert "goes on" in call.answers[-1]["hint"]
        assert shown(small) == OLD
        (small / "other").unlink()
        again = Call(small, "two", fits)
        assert 2**20 - 2**16 <= again.offsets[digest(fits["model.gguf"])] <= 2**20
        again.send(again.wanted)
        assert "done" in again.finish()
        assert shown(small) == fits
    finally:
        subprocess.run(["umount", "-l", str(small)], check=False)


def test_bytes_that_arrive_changed_are_refused(tmp_path: Path) -> None:
    put(tmp_path, "one", OLD)
    call = Call(tmp_path, "two", NEW)
    call.send(b"x" + call.wanted[1:])
    assert "another sha256" in call.finish()["error"]
    assert shown(tmp_path) == OLD
    assert "done" in put(tmp_path, "two", NEW)


def test_a_second_call_waits_for_the_first(tmp_path: Path) -> None:
    first = Call(tmp_path, "one", OLD)
    second = Call(tmp_path, "one", OLD)
    assert "waiting" in second.answers[0]
    first.send(first.wanted)
    assert "done" in first.finish()
    assert second.answer()["need"] == []
    assert second.finish()["done"]["before"] == "one"


def test_what_is_no_link_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "current").mkdir()
    assert "not a symbolic link" in Call(tmp_path, "one", OLD).answers[0]["error"]


def test_a_place_that_can_not_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    answer = Call(tmp_path / "file/chat", "one", OLD).answers[0]
    assert "Not a directory" in answer["error"]
    assert "HOST:DIR" not in answer["error"]
    assert answer["hint"]
