"""edgeslm.atomic: a file is the old one or the new one, whatever happens.  Directories: tests/test_bundle.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from edgeslm.atomic import atomic_write, replacing
from edgeslm.errors import EdgeslmError

if TYPE_CHECKING:
    from pathlib import Path


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def test_atomic_write(tmp_path: Path) -> None:
    atomic_write(tmp_path / "new" / "a.json", "grün")
    atomic_write(tmp_path / "new" / "a.json", b"two")
    assert contents(tmp_path) == {"new/a.json": b"two"}
    with pytest.raises(EdgeslmError, match=r"can't write .*a\.json"):
        atomic_write(tmp_path / "new" / "a.json" / "b", "x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(EdgeslmError, match=r"can't write .*folder: Is a directory"):
        atomic_write(tmp_path / "folder", "x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "new"]


def test_replacing_leaves_the_old_file_on_any_error(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("old")

    def fail(error: BaseException) -> None:
        with replacing(path) as beside:
            beside.write_text("half")
            raise error

    with pytest.raises(KeyboardInterrupt):
        fail(KeyboardInterrupt())
    with pytest.raises(FileNotFoundError):
        fail(FileNotFoundError(2, "No such file or directory", "the source of the data"))
    with pytest.raises(EdgeslmError, match="No space left"):
        fail(OSError(28, "No space left on device"))
    assert contents(tmp_path) == {"a": b"old"}
    with replacing(path) as beside:
        beside.write_text("new")
        assert path.read_text() == "old"
    assert contents(tmp_path) == {"a": b"new"}


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".a.tmp-999999999").write_text("half of it")
    (tmp_path / ".a.tmp-1").write_text("of a living process")
    (tmp_path / ".ab.tmp-999999999").write_text("of another file")
    atomic_write(tmp_path / "a", "new")
    assert sorted(contents(tmp_path)) == [".a.tmp-1", ".ab.tmp-999999999", "a"]
