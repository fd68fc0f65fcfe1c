"""Tables of sensor readings, streamed to disk: every unit's rows together, in order of time.

N rows, C channels.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from edgeslm.errors import DataError, EdgeslmError
from edgeslm.progress import Progress, Quiet
from edgeslm.readings import label_text, number, seconds
from edgeslm.stages.tables import Row, Tally, read, rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edgeslm.specs import ColumnsSpec

PEEK_ROWS = 200
"""Rows that show which columns are numeric, where the recipe names no channels."""
CHUNK_ROWS = 4096
NO_LABEL = -1


@dataclass(frozen=True, kw_only=True)
class Recordings:
    """Rows of one or more units, unit by unit and in order of time; the readings lie on disk.

    values: [N, C] float32, NaN where a reading is missing.  label: [N] index of labels, -1 without one.
    time_s: [N], or None where the rows are evenly spaced.  unit: [N] index of units.  bad_rows: rows that
    could not be used.  repeated: rows left out, since their unit has one of that time.
    """

    values: NDArray[np.float32]
    label: NDArray[np.int32]
    time_s: NDArray[np.float64] | None
    unit: NDArray[np.int32]
    channels: tuple[str, ...]
    labels: tuple[str, ...]
    units: tuple[str, ...]
    bad_rows: int
    repeated: int


def read_tables(
    sources: Sequence[str],
    columns: ColumnsSpec,
    out: Path,
    *,
    base: Path | None = None,
    progress: Progress | None = None,
    max_bad: float = 0.05,
) -> Recordings:
    """The rows of all sources; the readings go to a file in the directory `out`, some 30 bytes a row stay in memory.

    Without a unit column each source is one unit.  A row with text for a reading, without time or without
    unit is bad and left out; a row without a label, or with none of `columns.labels`, stays as a part of
    windows that end later.  Raises DataError for a missing column, for no rows, and when more than the
    share `max_bad` of a source's rows are bad, or without a label.
    """
    progress = progress or Quiet()
    if not sources:
        raise DataError("no table of readings is given", hint="name files in [data] train")
    first = list(islice(rows(sources[0], base=base, max_bad=max_bad), PEEK_ROWS))
    columns = replace(columns, channels=columns.channels or numeric_columns(first, columns))
    try:
        out.mkdir(parents=True, exist_ok=True)
        spool = _Spool(out, columns)
        try:
            for source in sources:
                check_columns(list(islice(rows(source, base=base, max_bad=max_bad), PEEK_ROWS)), columns)
                spool.take(source, base, progress, max_bad)
            return spool.finish()
        finally:
            spool.close()
    except OSError as error:
        raise EdgeslmError(f"can't write {out}: {error.strerror or error}") from error


def numeric_columns(first: Sequence[Row], columns: ColumnsSpec) -> tuple[str, ...]:
    """The columns of the first rows that hold numbers only, but label, time and unit.  DataError for none."""
    taken = {columns.label, columns.time, columns.unit}
    names = dict.fromkeys(name for row in first for name in row.values if name not in taken)
    numeric = tuple(name for name in names if all(_is_number(row.values.get(name)) for row in first))
    if not numeric:
        raise DataError(
            f"{first[0].where if first else 'the table'}: no column but label, time and unit holds numbers only",
            hint="name the sensor columns in [columns] channels",
        )
    return numeric


def check_columns(first: Sequence[Row], columns: ColumnsSpec) -> None:
    """Raise DataError when a column that is asked for is in none of the first rows."""
    names = {name for row in first for name in row.values}
    for wanted in (*columns.channels, columns.label, columns.time, columns.unit):
        if first and wanted is not None and wanted not in names:
            raise DataError(
                f"{first[0].where}: no column {wanted!r}",
                hint=f"its columns are {', '.join(sorted(names)[:20])}",
            )


def sorted_labels(found: Iterable[str]) -> tuple[str, ...]:
    """Classes in their order: by value where all are numbers, else by the alphabet."""
    names = sorted(found)
    try:
        return tuple(sorted(names, key=float))
    except ValueError:
        return tuple(names)


def _is_number(value: Any) -> bool:
    try:
        number(value)
    except ValueError:
        return False
    return True


class _Parsed(NamedTuple):
    """A row's readings, its label ("" without one), its unit and its time (NaN without one)."""

    readings: list[float]
    label: str
    unit: str
    time_s: float


class _Spool:
    """Rows on their way to disk, in the order of the tables; `finish` puts them into the units' order."""

    def __init__(self, out: Path, columns: ColumnsSpec) -> None:
        self._out, self._columns = out, columns
        self._file = (out / "readings.spool").open("wb")
        self._chunk: list[list[float]] = []
        self._label, self._unit, self._time_s = array("i"), array("i"), array("d")
        self._labels = {name: index for index, name in enumerate(columns.labels)}
        self._units: dict[str, int] = {}
        self._tally = Tally()

    def take(self, source: str, base: Path | None, progress: Progress, max_bad: float) -> None:
        """Add the rows of one table.  Raises DataError for too many bad or unlabelled ones."""
        total, unlabelled, first, line = 0, 0, "", 0
        found = read(
            source,
            lambda values: self._parse(values, source),
            base=base,
            progress=progress,
            max_bad=max_bad,
            tally=self._tally,
            hint="check [columns]: channels hold numbers, and each row has its time and unit",
        )
        for row, where in found:
            before, line = line, int(where.rpartition(":")[2])
            if self._columns.time is None and total and line > before + 1:
                # A row that was left out keeps its place: its neighbours are not one step apart.
                self._add(row._replace(readings=[math.nan] * len(row.readings)), NO_LABEL)
            total += 1
            index = self._class(row.label)
            if index == NO_LABEL:
                unlabelled += 1
                first = first or f"{where}: {self._columns.label} is {row.label!r}"
            self._add(row, index)
        if unlabelled > max_bad * total:
            raise DataError(
                f"{source}: {unlabelled} of {total} rows have no label that is known; {first}",
                hint=f"the classes are {', '.join(self._columns.labels)}"
                if self._columns.labels
                else "name the column in [columns] label",
            )
        if unlabelled:
            progress.note(f"{source}: {unlabelled} of {total} rows have no label that is known; {first}")

    def _parse(self, values: Mapping[str, Any], source: str) -> _Parsed:
        """Raises ValueError saying what is wrong with the row."""
        columns = self._columns
        readings = []
        for name in columns.channels:
            try:
                readings.append(number(values.get(name)))
            except ValueError as error:
                raise ValueError(f"{name} {error}") from None
        unit = source if columns.unit is None else label_text(values.get(columns.unit))
        if not unit:
            raise ValueError(f"{columns.unit} is empty")
        time_s = math.nan if columns.time is None else seconds(values.get(columns.time))
        return _Parsed(readings, label_text(values.get(columns.label)), unit, time_s)

    def _class(self, label: str) -> int:
        """Index of a class in order of appearance, or as the recipe has them; -1 for none."""
        if label and not self._columns.labels:
            return self._labels.setdefault(label, len(self._labels))
        return self._labels.get(label, NO_LABEL)

    def _add(self, row: _Parsed, label: int) -> None:
        self._chunk.append(row.readings)
        self._label.append(label)
        self._unit.append(self._units.setdefault(row.unit, len(self._units)))
        self._time_s.append(row.time_s)
        if len(self._chunk) == CHUNK_ROWS:
            self._write()

    def _write(self) -> None:
        np.asarray(self._chunk, dtype=np.float32).tofile(self._file)
        self._chunk.clear()

    def finish(self) -> Recordings:
        """The rows in order of unit and time."""
        self._write()
        self.close()
        labels = self._columns.labels or sorted_labels(self._labels)
        place = np.array([*(labels.index(name) for name in self._labels), NO_LABEL], dtype=np.int32)
        label = place[np.asarray(self._label)]  # -1 takes the last place, which is -1
        unit, time_s = np.asarray(self._unit, dtype=np.int32), np.asarray(self._time_s)
        timed = self._columns.time is not None
        order, repeated = order_of(unit, time_s if timed else None)
        return Recordings(
            values=_in_order(self._out, order, len(self._columns.channels)),
            label=label[order],
            time_s=time_s[order] if timed else None,
            unit=unit[order],
            channels=self._columns.channels,
            labels=tuple(labels),
            units=tuple(self._units),
            bad_rows=self._tally.bad,
            repeated=repeated,
        )

    def close(self) -> None:
        self._file.close()


def order_of(unit: NDArray[np.int32], time_s: NDArray[np.float64] | None) -> tuple[NDArray[np.int64], int]:
    """(indices that sort [N] rows by unit and time, how many were left out as repeated); stable."""
    if time_s is None:
        return np.argsort(unit, kind="stable"), 0
    order = np.lexsort((time_s, unit))
    again = np.zeros(len(order), dtype=bool)
    again[1:] = (np.diff(time_s[order]) == 0) & (np.diff(unit[order]) == 0)
    return order[~again], int(again.sum())


def _in_order(out: Path, order: NDArray[np.int64], channels: int) -> NDArray[np.float32]:
    """The spooled rows in order, as a read-only map of a file."""
    spooled, path = out / "readings.spool", out / "readings.f32"
    rows_there = spooled.stat().st_size // (4 * channels)
    if np.array_equal(order, np.arange(rows_there)):
        spooled.replace(path)
    else:
        raw = np.memmap(spooled, np.float32, "r", shape=(rows_there, channels))
        with path.open("wb") as file:
            for first in range(0, len(order), CHUNK_ROWS):
                raw[order[first : first + CHUNK_ROWS]].tofile(file)
        spooled.unlink()
    return np.memmap(path, np.float32, "r", shape=(len(order), channels))
