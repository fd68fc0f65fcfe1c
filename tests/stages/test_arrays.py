"""Arrays that grow on disk: the same bytes as NumPy writes, rows by position, damaged files."""

from __future__ import annotations

import pickle
from contextlib import closing
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeslm.errors import DataError
from edgeslm.stages.arrays import ArrayReader, ArrayWriter, RaggedReader, RaggedWriter

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("dtype", [np.int32, np.float16, np.bool_, np.uint8])
@pytest.mark.parametrize("shape", [(), (7,), (2, 3)])
def test_numpy_reads_what_was_appended(tmp_path: Path, dtype: Any, shape: tuple[int, ...]) -> None:
    random = np.random.default_rng(0)
    parts = [random.integers(0, 100, (count, *shape)).astype(dtype) for count in (3, 0, 1000, 1)]
    with ArrayWriter(tmp_path / "a.npy", dtype, shape) as writer:
        for part in parts:
            writer.append(part)
    whole = np.concatenate(parts)
    read = np.load(tmp_path / "a.npy")
    assert read.dtype == whole.dtype
    assert (read == whole).all()
    found = ArrayReader(tmp_path / "a.npy")
    assert len(found) == 1004
    assert (found.all() == whole).all()
    assert (found.rows(2, 900) == whole[2:900]).all()
    assert (found[1003] == whole[1003]).all()
    assert (found[-1] == whole[-1]).all()
    found.rows(0, 2)[...] = 1  # a copy that may be written to


def test_no_rows(tmp_path: Path) -> None:
    ArrayWriter(tmp_path / "a.npy", np.int32, (4,)).close()
    assert ArrayReader(tmp_path / "a.npy").all().shape == (0, 4)


def test_rows_of_another_shape_are_refused(tmp_path: Path) -> None:
    with ArrayWriter(tmp_path / "a.npy", np.int32, (4,)) as writer, pytest.raises(ValueError, match="shape"):
        writer.append(np.zeros((2, 3)))


def test_rows_beyond_the_end(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(5))
    found = ArrayReader(tmp_path / "a.npy")
    for start, stop in ((0, 6), (-1, 2), (4, 3)):
        with pytest.raises(IndexError):
            found.rows(start, stop)
    with pytest.raises(IndexError):
        found[5]


def test_damaged_files(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(500))
    data = (tmp_path / "a.npy").read_bytes()
    (tmp_path / "a.npy").write_bytes(data[:-8])
    assert ArrayReader(tmp_path / "a.npy")[0] == 0
    with pytest.raises(DataError, match="cut off after"):
        ArrayReader(tmp_path / "a.npy").all()
    (tmp_path / "b.npy").write_bytes(b"no array")
    with pytest.raises(DataError, match="not an array"):
        len(ArrayReader(tmp_path / "b.npy"))
    np.save(tmp_path / "c.npy", np.array([{}]), allow_pickle=True)
    with pytest.raises(DataError, match="not an array of plain rows"):
        len(ArrayReader(tmp_path / "c.npy"))


def test_a_reader_goes_to_another_process(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.arange(5))
    found = ArrayReader(tmp_path / "a.npy")
    assert found[3] == 3
    assert pickle.loads(pickle.dumps(found))[3] == 3


@given(st.lists(st.lists(st.integers(0, 255)), max_size=20))
def test_rows_of_different_lengths(tmp_path_factory: pytest.TempPathFactory, lists: list[list[int]]) -> None:
    folder = tmp_path_factory.mktemp("ragged")
    with closing(RaggedWriter(folder, "x", np.uint8)) as writer:
        writer.append([np.array(one, np.uint8) for one in lists[:3]])
        writer.append([np.array(one, np.uint8) for one in lists[3:]])
    found = RaggedReader(folder, "x")
    assert len(found) == len(lists)
    assert [found[at].tolist() for at in range(len(lists))] == lists
    assert found.lengths.tolist() == [len(one) for one in lists]
