"""Files and directories that appear whole or not at all: written beside, flushed, renamed.

Whoever is killed or runs out of disk at any moment leaves the old thing or the new one, and at worst
a hidden file or directory that the next write removes.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from edgeslm.errors import EdgeslmError

if TYPE_CHECKING:
    from collections.abc import Iterator


def atomic_write(path: Path | str, data: bytes | str) -> None:
    """Write a whole file or nothing; EdgeslmError when the disk is full or the place can't be written."""
    with replacing(path) as beside:
        write_flushed(beside, data)


@contextmanager
def replacing(path: Path | str) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the place of `path` at the end, or vanishes on an error."""
    path = Path(path)
    beside = path.parent / f".{path.name}.tmp-{os.getpid()}"
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            _clean_up_after_killed(path)
            yield beside
            flush(beside)
            beside.replace(path)
            flush_directory(path.parent)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        if error.filename is not None and Path(error.filename) not in (beside, path, *path.parents):
            raise  # about another file, which the block was reading
        raise EdgeslmError(f"can't write {path}: {error.strerror or error}", hint=way_out(error)) from error


@contextmanager
def assembling(out: Path) -> Iterator[Path]:
    """A new directory beside `out` to fill; it takes the place of `out` at the end, or vanishes on an error.

    What is at `out` is removed after the new directory is there.  OSErrors pass through.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    _clean_up_after_killed(out)
    beside = out.parent / f".{out.name}.tmp-{os.getpid()}"
    try:
        beside.mkdir()
        yield beside
        flush_directory(beside)
        _put_in_place(beside, out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Files are written to `out` inside; EdgeslmError with the way out when they can't be.

    Libraries in Rust and C++ tell of a full disk in errors of their own.
    """
    try:
        yield
    except OSError as error:
        raise EdgeslmError(f"can't write {out}: {error.strerror or error}", hint=way_out(error)) from error
    except Exception as error:
        told = as_os_error(error)
        if told is None:
            raise
        raise EdgeslmError(f"can't write {out}: {told.strerror}", hint=way_out(told)) from error


def as_os_error(error: Exception) -> OSError | None:
    """The system's error that safetensors (in words) or torch (by a file that is cut off) tells of."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    if number is not None:
        return OSError(int(number[1]), os.strerror(int(number[1])))
    if re.search(r"PytorchStreamWriter failed|inline_container\.cc", str(error)):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return None


def left_over(path: Path) -> str:
    """The hint for a directory that is gone: whoever replaced it may have been killed between two renames."""
    with suppress(OSError):
        for left in _left_beside(path):
            if ".old-" in left.name:
                return f"an interrupted write left it at {left}: rename it back"
    return ""


def _put_in_place(beside: Path, out: Path) -> None:
    """Rename into place; an old bundle is swapped out in one step where the system can do that."""
    if not out.exists():
        beside.rename(out)
    elif not _exchange(beside, out):
        old = out.parent / f".{out.name}.old-{os.getpid()}"
        out.rename(old)
        beside.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    flush_directory(out.parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directories atomically: renameat2 of Linux, renamex_np of macOS; False where neither works."""
    libc = ctypes.CDLL(None)
    here, flag = -100, 2  # AT_FDCWD; RENAME_EXCHANGE and RENAME_SWAP are both 2
    first, second = os.fsencode(one.absolute()), os.fsencode(other.absolute())
    if hasattr(libc, "renameat2"):
        return bool(libc.renameat2(here, first, here, second, ctypes.c_uint(flag)) == 0)
    if hasattr(libc, "renamex_np"):
        return bool(libc.renamex_np(first, second, ctypes.c_uint(flag)) == 0)
    return False


def _clean_up_after_killed(out: Path) -> None:
    """Remove what dead processes left beside `out`; put back a directory that they had only moved away."""
    for path in _left_beside(out):
        if _is_alive(int(path.name.rpartition("-")[2])):
            continue
        if ".old-" in path.name and not out.exists():
            path.rename(out)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def _left_beside(out: Path) -> list[Path]:
    pattern = re.compile(rf"\.{re.escape(out.name)}\.(tmp|old)-\d{{1,9}}")
    return sorted(path for path in out.parent.iterdir() if pattern.fullmatch(path.name))


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process != os.getpid()


def way_out(error: OSError) -> str:
    """The hint for an error of the file system."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space, or choose another disk"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "choose a place that you may write to"
    return ""


def write_flushed(path: Path, data: bytes | str) -> None:
    with path.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())


def flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def flush_directory(path: Path) -> None:
    with suppress(OSError):  # some file systems can't flush a directory
        flush(path)
