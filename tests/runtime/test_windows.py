"""Windows of a stream against those that training cuts of the whole table, and against brute force."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgeslm.errors import BundleError
from edgeslm.runtime.windows import Cutting, Window, WindowCutter, read_cutting
from edgeslm.specs import ColumnsSpec, WindowSpec
from tests import onnx_models

if TYPE_CHECKING:
    from pathlib import Path

CHANNELS = ("a", "b")


def cutting(**changes: Any) -> Cutting:
    given: dict[str, Any] = {
        "channels": CHANNELS, "rows": 4, "stride": 2, "max_gap": 1.5, "max_missing": 0.2, "time": "t", "unit": "unit",
    }  # fmt: skip
    return Cutting(**given | changes)


def feed(cutter: WindowCutter, rows: list[dict[str, Any]]) -> list[Window | str]:
    found: list[Window | str] = []
    for line, row in enumerate(rows, 2):
        try:
            window = cutter.take(line, row)
        except ValueError as error:
            cutter.lose()
            found.append(f"{line}: {error}")
        else:
            found += [] if window is None else [window]
    return found


def table(seed: int, *, timed: bool = True, units: int = 3) -> list[dict[str, Any]]:
    """Machines that take turns row by row, with gaps in time, missing readings and bad cells."""
    random = np.random.default_rng(seed)
    clocks = {f"m{number}": 10.0 * number for number in range(units)}
    rows = []
    for line in range(400):
        unit = f"m{random.integers(units)}" if timed else "m0"
        clocks[unit] += 60.0 if line > 60 and random.random() < 0.03 else 1.0
        cells = {
            name: "" if random.random() < 0.08 else f"{random.standard_normal():.4f}" for name in CHANNELS
        }
        if random.random() < 0.02:
            cells["a"] = "broken"
        rows.append(cells | {"unit": unit, "label": "x"} | ({"t": f"{clocks[unit]:g}"} if timed else {}))
    return rows


@pytest.mark.parametrize("stride", [1, 2, 4, 6])
@pytest.mark.parametrize("rows", [1, 4, 7])
@pytest.mark.parametrize("timed", [True, False])
def test_windows_are_those_of_training(tmp_path: Path, timed: bool, rows: int, stride: int) -> None:
    """The oracle sorts and cuts the whole table; windows are compared as sets, since machines mix here."""
    from edgeslm.stages import recordings, sensors

    written = table(rows, timed=timed)
    path = tmp_path / "t.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(written[0]))
        writer.writeheader()
        writer.writerows(written)
    names = {"time": "t" if timed else None, "unit": "unit" if timed else None}
    columns = ColumnsSpec(channels=CHANNELS, labels=("x",), **names)
    read = recordings.read_tables([str(path)], columns, tmp_path / "spool", max_bad=0.5)
    expected = sensors.measured(read, WindowSpec(rows=rows, stride=stride))
    cutter = WindowCutter(cutting(rows=rows, stride=stride, **names))
    found = [one for one in feed(cutter, written) if isinstance(one, Window) and one.readings is not None]
    assert len(found) == len(expected) > 5
    key = [window.readings.astype(np.float32).tobytes() for window in found if window.readings is not None]
    assert sorted(key) == sorted(expected.raw(number).tobytes() for number in range(len(expected)))


def row(time: float, unit: str = "m", a: Any = 1.0) -> dict[str, Any]:
    return {"t": time, "unit": unit, "a": a, "b": 2.0}


def test_no_window_crosses_a_gap_and_each_run_begins_anew() -> None:
    cutter = WindowCutter(cutting())
    found = feed(cutter, [row(time) for time in (*range(6), *range(100, 107))])
    windows = [one for one in found if isinstance(one, Window)]
    assert [(one.line, one.time, one.run) for one in windows] == [
        (5, 3, 0),
        (7, 5, 0),
        (11, 103, 1),
        (13, 105, 1),
    ]
    assert (cutter.gaps, cutter.rows, cutter.units) == (1, 13, 1)


def test_a_first_step_that_proves_to_be_a_gap_is_in_no_window() -> None:
    """When it came no other step was known."""
    found = feed(WindowCutter(cutting(stride=1)), [row(time) for time in (0, 100, 101, 102, 103)])
    assert [one.time for one in found if isinstance(one, Window)] == [103]


def test_rows_in_disorder_are_told_and_left_out() -> None:
    times = (0, 1, 1, 0.5, 2, 3)
    found = feed(WindowCutter(cutting()), [row(time) for time in times])
    assert [one for one in found if isinstance(one, str)] == [
        "4: has the time of the row before", "5: is earlier than the row before",
    ]  # fmt: skip
    [window] = [one for one in found if isinstance(one, Window)]
    assert window.time == 3


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"a": "on"}, "a holds 'on'"), ({"t": ""}, "has no time"), ({"unit": " "}, "unit is empty")],
)
def test_bad_rows_say_what_is_wrong(changed: dict[str, Any], said: str) -> None:
    [told] = feed(WindowCutter(cutting()), [row(0) | changed])
    assert isinstance(told, str)
    assert said in told


def test_a_window_that_misses_too_many_readings_has_none() -> None:
    rows = [row(0), row(1, a=""), row(2, a=None), row(3), row(4), row(5, a=3.0)]
    first, second = feed(WindowCutter(cutting(max_missing=0.2)), rows)
    assert isinstance(first, Window)
    assert isinstance(second, Window)
    assert (first.readings, first.missing) == (None, 0.25)
    assert second.readings is not None
    np.testing.assert_array_equal(second.readings[:, 0], [np.nan, 1.0, 1.0, 3.0])


def test_the_manifest_says_how_to_cut() -> None:
    preprocessing = onnx_models.manifest("sensors")["model"]["preprocessing"]
    bare = read_cutting({}, preprocessing, "b")
    assert (bare.rows, bare.stride, bare.max_gap, bare.max_missing, bare.time) == (4, 2, 1.5, 0.2, None)
    data = {
        "columns": {"time": "t", "unit": "u"},
        "windows": {"max_gap": 3.0, "max_missing": 0.5, "stride": 1},
    }
    full = read_cutting({"data": data}, preprocessing | {"stride": None}, "b")
    assert (full.stride, full.max_gap, full.max_missing) == (1, 3.0, 0.5)
    assert full.columns == (*onnx_models.CHANNELS, "t", "u")
    assert read_cutting({"data": data}, preprocessing, "b", stride=3).stride == 3


@pytest.mark.parametrize("windows", [{"max_gap": "long"}, {"max_missing": -1}, {"max_gap": float("nan")}])
def test_a_manifest_that_makes_no_sense(windows: dict[str, Any]) -> None:
    preprocessing = onnx_models.manifest("sensors")["model"]["preprocessing"]
    with pytest.raises(BundleError, match="rows become windows"):
        read_cutting({"data": {"windows": windows}}, preprocessing, "b")
