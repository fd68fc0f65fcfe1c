"""Rows of readings to windows as they come, cut as in training: no window crosses machines or gaps.

Training sorts a whole table by machine and time, and calls a step a gap that is longer than `max_gap`
times the median of all.  Here rows of each machine come in order of time, those of several may mix, and
the median is that of the latest steps: where sampling is regular, the windows are the same.

S rows of a window, C channels.
"""

from __future__ import annotations

import bisect
import math
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from edgeslm.errors import BundleError
from edgeslm.readings import label_text, number, seconds

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

KNOWN_STEPS = 1001
"""The latest steps of time, whose median is the usual one."""
MAX_GAP, MAX_MISSING = 1.5, 0.2
"""Of a bundle that doesn't say: the defaults of training."""


@dataclass(frozen=True, kw_only=True)
class Cutting:
    """How rows become windows; channels in the order of the model's input."""

    channels: tuple[str, ...]
    rows: int
    stride: int
    max_gap: float
    max_missing: float
    time: str | None
    unit: str | None

    @property
    def columns(self) -> tuple[str, ...]:
        """What a table must have."""
        return (*self.channels, *(name for name in (self.time, self.unit) if name is not None))


def read_cutting(
    manifest: Mapping[str, Any], preprocessing: Mapping[str, Any], where: str, *, stride: int | None = None
) -> Cutting:
    """From what a sensor bundle says; BundleError for numbers that make no sense.

    preprocessing: the model's, with rows and channels checked.  stride: in place of the bundle's.
    """
    data = manifest.get("data") or {}
    columns, windows = data.get("columns") or {}, data.get("windows") or {}
    rows = preprocessing["rows"]
    stride = stride or preprocessing.get("stride") or windows.get("stride") or max(1, rows // 2)
    max_missing = preprocessing.get("max_missing")
    max_missing = windows.get("max_missing", MAX_MISSING) if max_missing is None else max_missing
    max_gap = windows.get("max_gap", MAX_GAP)
    names = columns.get("time"), columns.get("unit")
    numbers = [max_gap, max_missing]
    if (
        type(stride) is not int or stride < 1
        or not all(isinstance(value, int | float) and value >= 0 for value in numbers)
        or not all(name is None or isinstance(name, str) for name in names)
    ):  # fmt: skip
        raise BundleError(
            f"{where}: the manifest does not say how rows become windows", hint="build the bundle again"
        )
    return Cutting(
        channels=tuple(preprocessing["channels"]), rows=rows, stride=stride, max_gap=float(max_gap),
        max_missing=float(max_missing), time=names[0], unit=names[1],
    )  # fmt: skip


class Window(NamedTuple):
    """What one row completes.  readings: [S, C], NaN where one is missing; None: too many are.

    unit: "" where no column names one.  time: of the last row as it was written.  run: of its machine's
    rows without a gap, counted; a new run has none of the last one's rows.
    """

    line: int
    unit: str
    time: Any
    run: int
    readings: NDArray[np.float64] | None
    missing: float


@dataclass
class _Machine:
    """The latest rows of one machine that follow each other without a gap."""

    rows: deque[list[float]]
    steps: deque[float]
    """Of time, between the rows: one less than they are."""
    last_s: float = math.nan
    run: int = 0
    seen: int = 0
    """Rows of this run."""

    def drop(self, kept: int) -> None:
        """Begin a new run with the latest `kept` rows."""
        for _ in range(len(self.rows) - kept):
            self.rows.popleft()
        while len(self.steps) > kept:
            self.steps.popleft()
        self.run, self.seen = self.run + 1, kept


@dataclass
class _Usual:
    """The median of the latest steps."""

    latest: deque[float] = field(default_factory=deque)
    ordered: list[float] = field(default_factory=list)

    def add(self, step: float) -> float:
        """The median with this step among them."""
        self.latest.append(step)
        bisect.insort(self.ordered, step)
        if len(self.latest) > KNOWN_STEPS:
            del self.ordered[bisect.bisect_left(self.ordered, self.latest.popleft())]
        middle = len(self.ordered) // 2
        return (self.ordered[middle] + self.ordered[~middle]) / 2


class WindowCutter:
    """Takes rows one at a time, and holds S of each machine.  rows: that were used; gaps: that were found."""

    def __init__(self, cutting: Cutting) -> None:
        self._cutting = cutting
        self._machines: dict[str, _Machine] = {}
        self._usual = _Usual()
        self._lost = False
        self.gaps = self.rows = 0

    @property
    def units(self) -> int:
        """Machines that were seen."""
        return len(self._machines)

    def lose(self) -> None:
        """A row that could not be read: without times its neighbours are not one step apart."""
        self._lost = True

    def take(self, line: int, values: Mapping[str, Any]) -> Window | None:
        """The window that this row completes.

        Raises ValueError, saying what is wrong, for a row with text for a reading, without its time or
        machine, or not later than the machine's row before.
        """
        cutting = self._cutting
        readings, unit, time_s = self._parse(values)
        machine = self._machines.get(unit)
        if machine is None:
            machine = _Machine(deque(maxlen=cutting.rows), deque(maxlen=max(cutting.rows - 1, 1)))
            self._machines[unit] = machine
        if cutting.time is not None:
            self._step(machine, time_s)
        elif self._lost and machine.seen:
            machine.rows.append([math.nan] * len(readings))
            machine.seen += 1
        self._lost = False
        machine.rows.append(readings)
        machine.seen += 1
        self.rows += 1
        if machine.seen < cutting.rows or (machine.seen - cutting.rows) % cutting.stride:
            return None
        window = np.array(machine.rows, np.float64)
        missing = float(np.isnan(window).mean())
        few = np.isnan(window).sum() <= cutting.max_missing * window.size
        time = None if cutting.time is None else values.get(cutting.time)
        return Window(line, unit, time, machine.run, window if few else None, missing)

    def _parse(self, values: Mapping[str, Any]) -> tuple[list[float], str, float]:
        cutting = self._cutting
        readings = []
        for name in cutting.channels:
            try:
                readings.append(number(values.get(name)))
            except ValueError as error:
                raise ValueError(f"{name} {error}") from None
        unit = "" if cutting.unit is None else label_text(values.get(cutting.unit))
        if cutting.unit is not None and not unit:
            raise ValueError(f"{cutting.unit} is empty")
        return readings, unit, math.nan if cutting.time is None else seconds(values.get(cutting.time))

    def _step(self, machine: _Machine, time_s: float) -> None:
        """Note the step to this row, and begin a new run behind the latest gap among the rows held."""
        step, machine.last_s = (
            time_s - machine.last_s,
            time_s if not time_s <= machine.last_s else machine.last_s,
        )
        if step <= 0:
            raise ValueError(
                "has the time of the row before" if step == 0 else "is earlier than the row before"
            )
        if math.isnan(step):
            return
        limit = self._cutting.max_gap * self._usual.add(step)
        machine.steps.append(step)
        if max(machine.steps) > limit:
            # The median moves as steps come: an older step may only now be seen to be a gap.
            behind = next(i for i, one in enumerate(reversed(machine.steps)) if one > limit)
            machine.drop(min(behind, len(machine.rows)))
            self.gaps += 1
