"""Windows of sensor readings as examples: no window crosses units, gaps or the split, all normalized alike.

The label of a window is the label of its last row: what a device would have to say at that moment, and
all that it could know.  N rows, W windows, S rows of a window, C channels.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.errors import DataError
from edgeslm.progress import Progress, Quiet
from edgeslm.stages.normalization import Normalization, fit
from edgeslm.stages.recordings import NO_LABEL, Recordings, read_tables

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from edgeslm.specs import ColumnsSpec, WindowSpec

    Indices = NDArray[np.int64]

BLOCK_WINDOWS = (8, 4, 2, 1)
"""Windows' lengths in a block, the piece of rows that is held out or trained on as a whole: the first that
gives blocks enough."""
CONSTANT = 1e-6
"""A deviation below this share of the mean is rounding."""
CHUNK_ROWS = 65536


class SensorWindows:
    """Windows over rows on disk, as a map-style data set: {"readings": float32 [S, C], "label": int}.

    starts: [W] first rows.  label: [W] classes, as indices of recordings.labels.
    """

    def __init__(
        self, recordings: Recordings, starts: Indices, spec: WindowSpec, normalization: Normalization
    ) -> None:
        self.recordings, self.starts, self.spec, self.normalization = recordings, starts, spec, normalization
        self.label = recordings.label[self.ends].astype(np.int64)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"readings": self.normalization.apply(self.raw(index)), "label": int(self.label[index])}

    def raw(self, index: int) -> NDArray[np.float32]:
        """[S, C] readings as they were measured, NaN where one is missing: what a device is given."""
        start = int(self.starts[index])
        if index < -len(self):
            raise IndexError(index)
        return np.asarray(self.recordings.values[start : start + self.spec.rows])

    def batches(self, size: int) -> Iterator[NDArray[np.float32]]:
        """All windows in order as they were measured, [B, S, C] at a time with B at most `size`."""
        rows = np.arange(self.spec.rows)
        for first in range(0, len(self), size):
            yield self.recordings.values[self.starts[first : first + size, None] + rows]

    @property
    def ends(self) -> Indices:
        """[W] last rows."""
        return self.starts + (self.spec.rows - 1)

    @property
    def unit(self) -> NDArray[np.int32]:
        """[W] indices of recordings.units."""
        return self.recordings.unit[self.ends]

    @property
    def time_s(self) -> NDArray[np.float64]:
        """[W] times of the last rows; their numbers where the table has no time."""
        ends = self.ends
        return ends.astype(np.float64) if self.recordings.time_s is None else self.recordings.time_s[ends]

    @property
    def labels(self) -> tuple[str, ...]:
        return self.recordings.labels

    @property
    def classes(self) -> dict[str, int]:
        """Class -> windows, in the classes' order."""
        counts = np.bincount(self.label, minlength=len(self.labels))
        return {name: int(count) for name, count in zip(self.labels, counts, strict=True)}


@dataclass(frozen=True, kw_only=True)
class SensorData:
    """Examples of both sides of the split, and what the report says of them."""

    train: SensorWindows
    heldout: SensorWindows
    report: dict[str, Any]


def prepare(
    train: Sequence[str],
    heldout: Sequence[str],
    columns: ColumnsSpec,
    spec: WindowSpec,
    out: Path,
    *,
    heldout_every: int | None,
    seed: int,
    base: Path | None = None,
    progress: Progress | None = None,
    max_bad: float = 0.05,
) -> SensorData:
    """Windows of the tables `train`, and of `heldout`, or of every `heldout_every`-th piece of `train` without it.

    The pieces are units where a column names them; else blocks of rows; else, with windows of one row and
    no time column, single rows.  Each class keeps its share.  Files go to the directory `out`.  Raises
    DataError for tables that give no windows, fewer than two classes, or nothing to hold out.
    """
    progress = progress or Quiet()
    known = read_tables(train, columns, out / "train", base=base, progress=progress, max_bad=max_bad)
    if len(known.labels) < 2:
        raise DataError(
            f"all rows are {known.labels[0]!r}: nothing to tell apart"
            if known.labels
            else "no row has a label",
            hint="training needs two classes at least",
        )
    by = "row" if spec.rows == 1 and columns.time is None else "block"
    cut = cut_windows(known, spec, by="unit" if columns.unit is not None and len(known.units) > 1 else by,
                      every=heldout_every or 1)  # fmt: skip
    if heldout:
        same = replace(columns, channels=known.channels, labels=known.labels)
        other = read_tables(heldout, same, out / "heldout", base=base, progress=progress, max_bad=max_bad)
        there = cut_windows(other, spec, by="unit", every=1)
        sides = (known, cut.starts), (other, there.starts)
        cut = replace(cut, by="file", left_out={k: n + there.left_out[k] for k, n in cut.left_out.items()})
    elif heldout_every is None:
        raise DataError("nothing is held out", hint="give [data] heldout or heldout_every")
    else:
        kept, held = split(known, cut, spec, heldout_every, seed)
        sides = (known, kept), (known, held)
    normalization = fit(known, sides[0][1], spec)
    data = [SensorWindows(table, starts, spec, normalization) for table, starts in sides]
    if missing := [name for name, count in data[0].classes.items() if count == 0]:
        raise DataError(
            f"no training window ends on {', '.join(missing)}",
            hint="give shorter windows, or a shorter stride",
        )
    report = _report(data[0], data[1], cut)
    _remark(report, progress)
    return SensorData(train=data[0], heldout=data[1], report=report)


# --- windows ---


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Windows of a table: the first row of each [W], and the piece of the table that it lies in [W]."""

    starts: Indices
    piece: Indices
    by: str
    left_out: dict[str, int]


def cut_windows(recordings: Recordings, spec: WindowSpec, *, by: str, every: int) -> Cut:
    """All windows that end on a label and miss few enough readings; DataError when there are none.

    by: the pieces that a split takes or leaves: unit, block or row.  every: a piece of so many is held
    out; blocks get short enough for it.
    """
    stride = stride_of(spec)
    if by == "row":
        starts = np.arange(0, len(recordings.label), stride)
        piece = np.arange(len(starts))
    else:
        found = runs(recordings, spec.max_gap)
        if by == "block":
            found = blocks(found, spec.rows, every)
        per_run = [np.arange(first, last - spec.rows + 1, stride) for first, last in found]
        starts = np.concatenate([*per_run, np.empty(0, np.int64)])
        name = recordings.unit[found[:, 0]] if by == "unit" else np.arange(len(found))
        piece = np.repeat(name.astype(np.int64), [len(one) for one in per_run])
    labelled = recordings.label[starts + spec.rows - 1] != NO_LABEL
    few = _missing(recordings, starts, spec.rows) <= spec.max_missing * spec.rows * len(recordings.channels)
    left_out = {"no_label": int((~labelled).sum()), "missing_readings": int((labelled & ~few).sum())}
    kept = labelled & few
    if not kept.any():
        raise DataError(
            f"{len(recordings.label)} rows give no window of {spec.rows} rows: {len(starts)} fit between units "
            f"and gaps, {left_out['no_label']} of them end without a label, {left_out['missing_readings']} miss "
            "too many readings",
            hint="give smaller [windows] rows, or check max_gap and max_missing",
        )
    return Cut(starts=starts[kept], piece=piece[kept], by=by, left_out=left_out)


def measured(recordings: Recordings, spec: WindowSpec) -> SensorWindows:
    """All windows of a table, as they were measured: a device normalizes them itself."""
    channels = recordings.channels
    as_is = Normalization(
        kind="none", channels=channels, center=(0.0,) * len(channels), scale=(1.0,) * len(channels)
    )
    cut = cut_windows(recordings, spec, by="unit", every=1)
    return SensorWindows(recordings, cut.starts, spec, as_is)


def stride_of(spec: WindowSpec) -> int:
    """Rows from one window to the next."""
    return spec.stride or max(1, spec.rows // 2)


def runs(recordings: Recordings, max_gap: float) -> Indices:
    """[P, 2] (first row, past the last) of rows that follow each other: one unit, no gap in time."""
    breaks = np.diff(recordings.unit) != 0
    if recordings.time_s is not None and not breaks.all():
        step = np.diff(recordings.time_s)
        breaks |= step > max_gap * float(np.median(step[~breaks]))
    edges = np.concatenate([[0], np.flatnonzero(breaks) + 1, [len(recordings.unit)]])
    return np.stack([edges[:-1], edges[1:]], axis=1)


def blocks(found: Indices, rows: int, every: int) -> Indices:
    """[P, 2] runs cut into blocks of a few windows' length: at least two are held out, where the rows allow it."""
    result = found
    for windows in BLOCK_WINDOWS:
        size = windows * rows
        edges = [
            np.append(np.arange(first, max(last - size // 2, first + 1), size), last) for first, last in found
        ]
        result = np.concatenate([np.stack([one[:-1], one[1:]], axis=1) for one in edges])
        if len(result) >= 2 * every:
            break
    return result


def _missing(recordings: Recordings, starts: Indices, rows: int) -> NDArray[np.int64]:
    """[W] missing readings of each window."""
    total = np.zeros(len(recordings.label) + 1, dtype=np.int64)
    for first in range(0, len(recordings.label), CHUNK_ROWS):
        chunk = np.isnan(recordings.values[first : first + CHUNK_ROWS]).sum(axis=1)
        total[first + 1 : first + 1 + len(chunk)] = chunk
    np.cumsum(total, out=total)
    return np.asarray(total[starts + rows] - total[starts])


def split(
    recordings: Recordings, cut: Cut, spec: WindowSpec, heldout_every: int, seed: int
) -> tuple[Indices, Indices]:
    """(kept, held out) starts, whole pieces each: a piece counts for the rarest class that its windows have.

    Raises DataError when there are too few pieces to hold one out.
    """
    from edgeslm.stages.labelled import stratified_split

    label = recordings.label[cut.starts + spec.rows - 1]
    rarity = np.argsort(np.argsort(np.bincount(label, minlength=len(recordings.labels)), kind="stable"))
    names, member = np.unique(cut.piece, return_inverse=True)
    rarest = np.full(len(names), len(rarity))
    np.minimum.at(rarest, member, rarity[label])
    _, held = stratified_split(rarest, heldout_every, seed)
    if not 0 < len(held) < len(names):
        raise DataError(
            f"{len(names)} {cut.by}s are too few to hold out every {heldout_every}th",
            hint="give [data] heldout, or a smaller heldout_every",
        )
    out = np.isin(member, held)
    return cut.starts[~out], cut.starts[out]


# --- report ---


def duplicates(train: SensorWindows, heldout: SensorWindows) -> int:
    """Held-out windows whose readings are, to the bit, those of a training window too."""
    held = Counter(_digest(window) for batch in heldout.batches(256) for window in batch)
    found = {
        digest for batch in train.batches(256) for window in batch if (digest := _digest(window)) in held
    }
    return sum(held[digest] for digest in found)


def _digest(window: NDArray[np.float32]) -> bytes:
    return hashlib.blake2b(window.tobytes(), digest_size=12).digest()


def _report(train: SensorWindows, heldout: SensorWindows, cut: Cut) -> dict[str, Any]:
    """What a report says of the data: schema edgeslm.data/1."""
    tables = [train.recordings]
    if heldout.recordings is not train.recordings:
        tables.append(heldout.recordings)
    missing, empty, constant = 0, [], []
    for index, name in enumerate(train.normalization.channels):
        columns = [table.values[:, index] for table in tables]
        missing += sum(int(np.isnan(column).sum()) for column in columns)
        known = columns[0][np.isfinite(columns[0])]
        if not len(known):
            empty.append(name)
        elif known.min() == known.max():
            constant.append(name)
    return {
        "schema": "edgeslm.data/1",
        "train": _side(train),
        "heldout": _side(heldout),
        "split_by": cut.by,
        "duplicates": duplicates(train, heldout),
        "bad_rows": sum(table.bad_rows for table in tables),
        "repeated_rows": sum(table.repeated for table in tables),
        "gaps": sum(len(runs(table, train.spec.max_gap)) - len(np.unique(table.unit)) for table in tables),
        "missing_readings": missing / sum(table.values.size for table in tables),
        "windows_left_out": cut.left_out,
        "channels": list(train.normalization.channels),
        "empty_channels": empty,
        "constant_channels": constant,
    }


def _side(windows: SensorWindows) -> dict[str, Any]:
    return {
        "examples": len(windows),
        "classes": windows.classes,
        "units": len(np.unique(windows.unit)),
        "rows_per_window": windows.spec.rows,
    }


def _remark(report: dict[str, Any], progress: Progress) -> None:
    """Tell the user what he may not expect of his data."""
    for names, text in (("empty_channels", "has no reading"), ("constant_channels", "never changes")):
        for name in report[names]:
            progress.note(f"warning: channel {name} {text}: it tells the network nothing")
    if report["gaps"]:
        progress.note(f"{report['gaps']} gaps in time: no window crosses one")
    if report["repeated_rows"]:
        progress.note(f"left out {report['repeated_rows']} rows whose unit has one of the same time")
    if report["missing_readings"]:
        progress.note(
            f"{report['missing_readings']:.2%} of the readings are missing: filled with the last one"
        )
    if lost := report["windows_left_out"]["missing_readings"]:
        progress.note(f"left out {lost} windows that miss too many readings")
    if report["duplicates"]:
        progress.note(f"warning: {report['duplicates']} held-out windows are among the training windows too")
