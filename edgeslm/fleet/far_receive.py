"""Takes a release in, on the far side: this file's text is sent to a python3 there and run.

Only the standard library, of any Python from 3.8 on.  Standard input: one line of JSON, the request
{directory, release, files: [{path, bytes, sha256}]}, then the bytes that the first answer asks for, in its
order.  Standard output: answers, one JSON object a line after MARK.

    DIRECTORY/current            -> releases/ID, replaced in one step once everything is verified
    DIRECTORY/previous           -> the release before
    DIRECTORY/releases/ID/       whole releases
    DIRECTORY/.incoming-ID/      a release whose files are not all there yet
    DIRECTORY/.parts/SHA256      the beginning of a file; the next call goes on behind it
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from io import BufferedReader

MARK = "@edgeslm "
CHUNK_BYTES = 2**18
FLUSH_BYTES = 2**25
"""A cut of the power costs at most so much of what was sent."""
SILENCE_S = 30
"""With nothing to read for so long the other side is gone, and the next call may take over."""
LOCK_S = SILENCE_S + 15
MARGIN_BYTES = 2**20


class RefusedError(Exception):
    """What can't go on, and what to do about it."""


def tell(**answer: Any) -> None:
    sys.stdout.write(MARK + json.dumps(answer) + "\n")
    sys.stdout.flush()


class Store:
    """One directory of releases."""

    def __init__(self, directory: str, release: str, files: list[dict[str, Any]]) -> None:
        self.root = Path.home() / Path(directory).expanduser()
        self.files = files
        self.parts = self.root / ".parts"
        self.releases = self.root / "releases"
        self.whole = self.releases / release
        self.incoming = self.root / f".incoming-{release}"
        self._hashes: dict[tuple[int, int], str] = {}

    def open(self) -> None:
        self.releases.mkdir(parents=True, exist_ok=True)
        for name in ("current", "previous"):
            link = self.root / name
            if link.exists() and not link.is_symlink():
                raise RefusedError(
                    f"{link} is not a symbolic link: something else lives there", "choose another directory"
                )

    @property
    def target(self) -> Path:
        return self.whole if self.whole.is_dir() else self.incoming

    def missing(self) -> list[dict[str, Any]]:
        """Files to send, one for each content; what any release has already is linked."""
        wanted: dict[str, dict[str, Any]] = {}
        for file in self.files:
            path = self.target / file["path"]
            if self._holds(path, file) or self._link_from_elsewhere(path, file):
                continue
            wanted.setdefault(file["sha256"], file)
        return list(wanted.values())

    def _holds(self, path: Path, file: dict[str, Any]) -> bool:
        if path.is_symlink() or not path.is_file() or path.stat().st_size != file["bytes"]:
            return False
        status = path.stat()
        known = (status.st_dev, status.st_ino)
        if known not in self._hashes:
            self._hashes[known] = sha256(path)
        return self._hashes[known] == str(file["sha256"])

    def _link_from_elsewhere(self, path: Path, file: dict[str, Any]) -> bool:
        folders = [*sorted(self.releases.iterdir()), *sorted(self.root.glob(".incoming-*"))]
        same_size = [
            each
            for folder in folders
            for each in folder.rglob("*")
            if each.is_file() and each.stat().st_size == file["bytes"] and each != path
        ]
        for each in sorted(same_size, key=lambda each: each.name != path.name):
            if self._holds(each, file):
                self._place(each, path)
                return True
        return False

    def _place(self, source: Path, path: Path) -> None:
        """A second name for a file, or a copy where the file system has only one name for each."""
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.parent / f".{path.name}.tmp"
        beside.unlink(missing_ok=True)
        try:
            os.link(source, beside)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            shutil.copyfile(source, beside)
            flush(beside)
        beside.replace(path)

    def offset(self, file: dict[str, Any]) -> int:
        """Bytes of a file that earlier calls brought."""
        part = self.parts / file["sha256"]
        size = part.stat().st_size if part.exists() else 0
        if size > file["bytes"]:
            part.unlink()
            return 0
        return size

    def make_room(self, need_bytes: int) -> None:
        """RefusedError when `need_bytes` don't fit, not even without what nothing points to."""
        if free_bytes(self.root) >= need_bytes + MARGIN_BYTES:
            return
        self._remove_parts({file["sha256"] for file in self.files})
        self.remove_stale()
        free = free_bytes(self.root)
        if free < need_bytes + MARGIN_BYTES:
            raise RefusedError(
                f"the disk has {free / 2**20:,.1f} MiB free, {need_bytes / 2**20:,.1f} MiB are to come",
                "free some space there, or name a directory on another disk",
            )

    def receive(self, file: dict[str, Any], source: BufferedReader) -> None:
        """Append to a file's part until it is whole, read it back from the disk, put it in its places."""
        self.parts.mkdir(exist_ok=True)
        part = self.parts / file["sha256"]
        with part.open("ab", buffering=0) as out:
            left = file["bytes"] - out.tell()
            while left:
                signal.alarm(SILENCE_S)
                data = source.read1(min(left, CHUNK_BYTES))
                signal.alarm(0)
                left -= append(out, data)
                if not data or left // FLUSH_BYTES != (left + len(data)) // FLUSH_BYTES:
                    os.fsync(out.fileno())
                if not data:
                    raise EOFError
            os.fsync(out.fileno())
            with suppress(AttributeError, OSError):  # read from the disk what is compared
                os.posix_fadvise(out.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if sha256(part) != file["sha256"]:
            part.unlink()
            raise RefusedError(
                f"{file['path']} arrived with another sha256", "run the same command again: it is sent anew"
            )
        paths = [self.target / each["path"] for each in self.files if each["sha256"] == file["sha256"]]
        for path in paths[1:]:
            self._place(part, path)
        paths[0].parent.mkdir(parents=True, exist_ok=True)
        part.replace(paths[0])
        for path in paths:
            flush(path.parent)

    def switch(self) -> str | None:
        """Make the release `current`; the name of the one before it, or None."""
        if self.target == self.incoming:
            for folder in {path.parent for path in self.incoming.rglob("*")}:
                flush(folder)
            self.incoming.rename(self.whole)
        flush(self.releases)
        before = self.pointed_at("current")
        if before != self.whole.name:
            self._point("current", self.whole.name)
            if before is not None:
                self._point("previous", before)
            flush(self.root)
        return before

    def pointed_at(self, name: str) -> str | None:
        """The release that `current` or `previous` names."""
        link = self.root / name
        return Path(os.readlink(str(link))).name if link.is_symlink() else None  # noqa: PTH115

    def _point(self, name: str, release: str) -> None:
        beside = self.root / f".{name}.tmp"
        beside.unlink(missing_ok=True)
        try:
            beside.symlink_to(Path("releases") / release)
        except OSError as error:
            raise RefusedError(
                f"{self.root} can't hold symbolic links: {error.strerror}",
                "name a directory on another file system",
            ) from None
        beside.replace(self.root / name)

    def remove_stale(self) -> None:
        """Releases that neither `current` nor `previous` names, and what was begun for others."""
        kept = {self.whole, self.incoming, *(self.releases / str(self.pointed_at(name)) for name in LINKS)}
        for folder in (*self.releases.iterdir(), *self.root.glob(".incoming-*")):
            if folder not in kept:
                shutil.rmtree(str(folder), ignore_errors=True)

    def clean_up(self) -> None:
        self.remove_stale()
        self._remove_parts(set())

    def _remove_parts(self, kept: set[str]) -> None:
        for part in self.parts.glob("*"):
            if part.name not in kept:
                part.unlink()


LINKS = ("current", "previous")


def append(out: Any, data: bytes) -> int:
    view = memoryview(data)
    while view:
        view = view[out.write(view) :]
    return len(data)


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(2**20):
            digest.update(data)
    return digest.hexdigest()


def flush(path: Path) -> None:
    with suppress(OSError):  # some file systems can't flush a directory
        descriptor = os.open(str(path), os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def free_bytes(path: Path) -> int:
    status = os.statvfs(str(path))
    return status.f_bavail * status.f_frsize


def take_lock(root: Path) -> IO[str]:
    """The lock of a directory, which a call that has lost its other side gives up after SILENCE_S."""
    lock = (root / ".lock").open("w")
    end = time.monotonic() + LOCK_S
    told = False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
        else:
            return lock
        if time.monotonic() > end:
            raise RefusedError(
                f"another call is copying to {root}", "wait for it, or choose another directory"
            )
        if not told:
            tell(waiting=f"another call holds {root}; waiting for it to end")
            told = True
        time.sleep(0.2)


def receive(request: dict[str, Any], source: BufferedReader) -> None:
    store = Store(request["directory"], request["release"], request["files"])
    store.root.mkdir(parents=True, exist_ok=True)
    with take_lock(store.root):
        store.open()
        missing = store.missing()
        need = [{"sha256": file["sha256"], "offset": store.offset(file)} for file in missing]
        store.make_room(sum(file["bytes"] for file in missing) - sum(each["offset"] for each in need))
        tell(need=need, total_bytes=sum(file["bytes"] for file in missing))
        for file in missing:
            store.receive(file, source)
            tell(received=file["path"])
        before = store.switch()
        store.clean_up()
        tell(
            done={
                "directory": str(store.root),
                "path": str(store.whole),
                "before": before,
                "previous": store.pointed_at("previous"),
            }
        )


def main() -> None:
    source: BufferedReader = sys.stdin.buffer  # type: ignore[assignment]
    try:
        receive(json.loads(source.readline()), source)
    except EOFError:
        sys.exit(1)
    except RefusedError as refused:
        tell(error=refused.args[0], hint=refused.args[1])
        sys.exit(1)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        tell(
            error=f"{error.strerror or error}: {error.filename or 'while writing'}",
            hint="free some space there and run the same command again: it goes on where it stopped"
            if full
            else "name a directory that you may write to, as host:DIR",
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
