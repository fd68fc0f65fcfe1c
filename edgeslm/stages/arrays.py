"""Arrays on disk that grow row by row and are read row by row, in NumPy's .npy format.

They are read by position, not memory-mapped: the pages of a map that has been walked through count as
the process's memory.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from edgeslm.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType

    from numpy.typing import ArrayLike, DTypeLike, NDArray


class ArrayWriter:
    """Appends rows of `shape` to a .npy file; how many there are stands in the file when it is closed."""

    def __init__(self, path: Path, dtype: DTypeLike, shape: tuple[int, ...] = ()) -> None:
        self.rows = 0
        self._dtype, self._shape = np.dtype(dtype), shape
        self._file: BinaryIO = path.open("wb")
        self._write_header()

    def append(self, values: NDArray[Any]) -> None:
        """values: [rows, *shape]; cast to the file's type."""
        values = np.ascontiguousarray(values, dtype=self._dtype)
        if values.shape[1:] != self._shape:
            raise ValueError(f"rows of the shape {values.shape[1:]}, the file has {self._shape}")
        self._file.write(values.data)
        self.rows += len(values)

    def close(self) -> None:
        if not self._file.closed:
            self._file.seek(0)
            self._write_header()
            self._file.close()

    def _write_header(self) -> None:
        # NumPy pads the header so that the first axis can grow in place (numpy.lib.format).
        header = {
            "descr": np.lib.format.dtype_to_descr(self._dtype),
            "fortran_order": False,
            "shape": (self.rows, *self._shape),
        }
        np.lib.format.write_array_header_1_0(self._file, header)

    def __enter__(self) -> ArrayWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class ArrayReader:
    """A .npy file, read by rows.  Raises DataError for a file that is cut off or not written by ArrayWriter."""

    path: Path

    def __len__(self) -> int:
        return int(self._header[0][0])

    def __getitem__(self, index: int) -> NDArray[Any]:
        """One row, [*shape]; negative indices count from the end."""
        index = index + len(self) if index < 0 else index
        row: NDArray[Any] = self.rows(index, index + 1)[0]
        return row

    def rows(self, start: int, stop: int) -> NDArray[Any]:
        """Rows start..stop, [stop - start, *shape], in fresh memory."""
        shape, dtype, offset = self._header
        if not 0 <= start <= stop <= shape[0]:
            raise IndexError(f"rows {start} to {stop} of {shape[0]}")
        width = dtype.itemsize * prod(shape[1:])
        data = bytearray()  # memory that may be written to, as torch wants it
        while missing := (stop - start) * width - len(data):
            read = os.pread(self._file.fileno(), missing, offset + start * width + len(data))
            if not read:
                raise DataError(f"{self.path}: cut off after {offset + start * width + len(data)} bytes")
            data += read
        return np.frombuffer(data, dtype).reshape(stop - start, *shape[1:])

    def all(self) -> NDArray[Any]:
        """The whole array, in memory."""
        return self.rows(0, len(self))

    @cached_property
    def _file(self) -> BinaryIO:
        return self.path.open("rb")

    @cached_property
    def _header(self) -> tuple[tuple[int, ...], np.dtype[Any], int]:
        with self.path.open("rb") as file:
            try:
                np.lib.format.read_magic(file)
                shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(file)
            except ValueError as error:
                raise DataError(f"{self.path}: not an array: {error}") from error
            if fortran_order or not shape or dtype.hasobject:
                raise DataError(f"{self.path}: not an array of plain rows")
            return shape, dtype, file.tell()

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)


class RaggedWriter:
    """Appends rows of different lengths: their values end to end in NAME.npy, where each ends in NAME_ends.npy."""

    def __init__(self, directory: Path, name: str, dtype: DTypeLike) -> None:
        self._values = ArrayWriter(directory / f"{name}.npy", dtype)
        self._ends = ArrayWriter(directory / f"{name}_ends.npy", np.int64)

    def append(self, rows: Sequence[ArrayLike]) -> None:
        for row in rows:
            self._values.append(np.asarray(row))
            self._ends.append(np.array([self._values.rows]))

    def close(self) -> None:
        self._values.close()
        self._ends.close()


@dataclass(frozen=True)
class RaggedReader:
    """What RaggedWriter wrote.  The rows' ends are in memory (8 bytes a row), their values on disk."""

    directory: Path
    name: str

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> NDArray[Any]:
        """One row, [its length]."""
        return self._values.rows(int(self.ends[index - 1]) if index else 0, int(self.ends[index]))

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        return ArrayReader(self.directory / f"{self.name}_ends.npy").all()

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.ends, prepend=0)

    @cached_property
    def _values(self) -> ArrayReader:
        return ArrayReader(self.directory / f"{self.name}.npy")
