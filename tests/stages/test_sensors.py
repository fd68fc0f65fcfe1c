"""Windows against brute force: no window crosses a unit, a gap or the split; normalization of training rows only."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgeslm.errors import DataError
from edgeslm.runtime import ort
from edgeslm.specs import ColumnsSpec, WindowSpec
from edgeslm.stages import recordings, sensors
from edgeslm.stages.normalization import Normalization, fit, spread
from edgeslm.stages.recordings import Recordings, read_tables
from edgeslm.stages.sensors import SensorData, blocks, cut_windows, prepare, runs

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

UNITS = ColumnsSpec(label="state", time="t", unit="machine")


class Notes:
    """A progress that remembers."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def table(path: Path, header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
    return str(path)


def machines(path: Path, count: int = 6, rows: int = 40, **change: Any) -> str:
    """Interleaved rows of several machines, out of order in time; a reading tells its machine and second."""
    lines = [
        [f"m{machine}", second, machine * 1000 + second, -second, "bad" if second > rows - 10 else "good"]
        for second in range(1, rows + 1)
        for machine in range(count)
    ]
    np.random.default_rng(5).shuffle(lines)
    return table(path, ("machine", "t", "x", "y", "state"), lines)


def prepared(source: str, out: Path, columns: ColumnsSpec = UNITS, **change: Any) -> SensorData:
    spec = WindowSpec(**{"rows": 8, "stride": 3, **change.pop("spec", {})})
    return prepare([source], [], columns, spec, out, **{"heldout_every": 3, "seed": 0, **change})


def test_windows_hold_consecutive_rows_of_one_machine(tmp_path: Path) -> None:
    data = prepared(machines(tmp_path / "a.csv"), tmp_path / "out")
    found = set()
    for windows in (data.train, data.heldout):
        for index, raw in enumerate(windows.batches(1)):
            machine, second = divmod(int(raw[0, 0, 0]), 1000)
            assert np.array_equal(raw[0, :, 0], machine * 1000 + second + np.arange(8))
            assert np.array_equal(raw[0, :, 1], -second - np.arange(8))
            assert windows.label[index] == int(second + 7 <= 30)  # bad, good: the last row's
            assert windows.time_s[index] == second + 7
            assert windows.recordings.units[windows.unit[index]] == f"m{machine}"
            found.add((machine, second))
    assert found == {(machine, second) for machine in range(6) for second in range(1, 34, 3)}


def test_the_split_keeps_machines_whole(tmp_path: Path) -> None:
    source = machines(tmp_path / "a.csv")
    for seed in range(5):
        data = prepared(source, tmp_path / f"{seed}", seed=seed)
        assert not set(data.train.unit) & set(data.heldout.unit)
        assert len(set(data.heldout.unit)) == 2  # of 6, every third
        assert data.report["split_by"] == "unit"
    again = prepared(source, tmp_path / "again", seed=4)
    assert np.array_equal(again.heldout.starts, data.heldout.starts)


def test_blocks_of_one_machine_share_no_row_across_the_split(tmp_path: Path) -> None:
    rows = [[math.sin(i), i, "b" if i % 100 >= 60 else "a"] for i in range(1000)]
    source = table(tmp_path / "a.csv", ("x", "number", "label"), rows)
    data = prepared(source, tmp_path / "out", ColumnsSpec())
    assert data.report["split_by"] == "block"
    of_train = {row for start in data.train.starts for row in range(start, start + 8)}
    of_heldout = {row for start in data.heldout.starts for row in range(start, start + 8)}
    assert not of_train & of_heldout
    assert 0.2 < len(data.heldout) / (len(data.train) + len(data.heldout)) < 0.45


def test_single_rows_are_split_each_class_its_share(tmp_path: Path) -> None:
    rows = [[i, i % 7, int(i % 10 == 0)] for i in range(1000)]
    source = table(tmp_path / "a.csv", ("x", "y", "label"), rows)
    data = prepared(
        source, tmp_path / "out", ColumnsSpec(), spec={"rows": 1, "stride": None}, heldout_every=8
    )
    assert data.report["split_by"] == "row"
    assert data.train.classes == {"0": 788, "1": 88}
    assert data.heldout.classes == {"0": 112, "1": 12}
    seen = [
        raw[0, 0] for windows in (data.train, data.heldout) for batch in windows.batches(64) for raw in batch
    ]
    assert sorted(seen) == list(range(1000))


@pytest.mark.parametrize("kind", ["standard", "robust"])
def test_normalization_is_of_the_training_rows_alone(tmp_path: Path, kind: str) -> None:
    data = prepared(machines(tmp_path / "a.csv"), tmp_path / "out", spec={"normalize": kind})
    values = data.train.recordings.values
    rows = sorted({row for start in data.train.starts for row in range(start, start + 8)})
    channel = np.asarray(values[rows, 0], np.float64)
    if kind == "standard":
        expected = channel.mean(), channel.std()
    else:
        low, middle, high = np.quantile(channel, [0.25, 0.5, 0.75])
        expected = middle, (high - low) / 1.3489795
    normalization = data.train.normalization
    assert (normalization.center[0], normalization.scale[0]) == pytest.approx(expected, rel=1e-12)
    assert data.heldout.normalization == normalization
    item = data.heldout[0]
    assert item["readings"].dtype == np.float32
    assert np.allclose(item["readings"][:, 0], (data.heldout.raw(0)[:, 0] - expected[0]) / expected[1])
    assert item["label"] == data.heldout.label[0]


def test_both_normalizations_agree_on_a_normal_distribution() -> None:
    values = np.random.default_rng(0).normal(5, 2, 100_000)
    assert spread(values, "standard") == pytest.approx((5, 2), rel=0.02)
    assert spread(values, "robust") == pytest.approx((5, 2), rel=0.02)
    assert spread(np.array([1e-9, 3e-9]), "standard") == pytest.approx(
        (2e-9, 1e-9)
    )  # small units are no rounding
    assert spread(np.full(9, 7.0), "standard") == (7.0, 1.0)
    assert spread(np.array([]), "robust") == (0.0, 1.0)
    assert spread(np.array([0.0] * 90 + [10.0] * 10), "robust") == pytest.approx((0.0, 3.0))


def test_training_and_device_normalize_alike() -> None:
    random = np.random.default_rng(1)
    windows = random.normal(3, 5, (20, 16, 4))
    windows[random.random(windows.shape) < 0.3] = np.nan
    windows[0, :, 1] = np.nan
    normalization = Normalization(
        kind="standard", channels=("a", "b", "c", "d"), center=(3, 1, 0, 2), scale=(5, 1, 0.1, 3)
    )
    record = normalization.as_record()
    assert np.array_equal(normalization.apply(windows), ort.normalized(windows, record))
    assert Normalization.from_record(record) == normalization
    with pytest.raises(DataError, match="can't be read"):
        Normalization.from_record({**record, "scale": None})
    with pytest.raises(DataError, match="no positive number"):
        Normalization.from_record({**record, "scale": [1, 1, 0, 1]})
    with pytest.raises(DataError, match="4 channels"):
        normalization.apply(windows[..., :3])


def test_a_missing_reading_takes_the_last_one_in_its_window_or_the_center() -> None:
    normalization = Normalization(kind="standard", channels=("a",), center=(10,), scale=(2,))
    window = np.array([math.nan, 12, math.nan, math.nan, 8])[:, None]
    assert normalization.apply(window)[:, 0].tolist() == [0, 1, 1, 1, -1]


def gappy(path: Path) -> str:
    """Seconds 1-20 and 31-50 of one machine, twice; NaN in places."""
    seconds = [*range(1, 21), *range(31, 51)]
    lines = [
        [m, s, "" if s in (5, 33) else s, 1.5, "nan", "bad" if s > 40 else "good"]
        for m in "pqrs"
        for s in seconds
    ]
    return table(path, ("machine", "t", "x", "still", "dead", "state"), lines)


def test_gaps_and_missing_readings_are_told_and_kept_out(tmp_path: Path) -> None:
    notes = Notes()
    data = prepared(
        gappy(tmp_path / "a.csv"), tmp_path / "out", progress=notes, spec={"stride": 1, "max_missing": 0.4}
    )
    windows = [window for side in (data.train, data.heldout) for batch in side.batches(5) for window in batch]
    assert len(windows) == 4 * 2 * 13
    assert all(np.nanmax(window[:, 0]) - np.nanmin(window[:, 0]) <= 7 for window in windows)
    assert data.report["gaps"] == 4
    assert data.report["constant_channels"] == ["still"]
    assert data.report["empty_channels"] == ["dead"]
    assert data.report["missing_readings"] == pytest.approx((2 / 40 + 1) / 3)
    assert any("dead has no reading" in text for text in notes.texts)
    assert any("4 gaps" in text for text in notes.texts)
    item = data.train[0]["readings"]
    assert np.isfinite(item).all()
    assert not item[:, 1:].any()


def test_windows_that_miss_too_much_are_left_out(tmp_path: Path) -> None:
    columns = replace(UNITS, channels=("x",))
    data = prepared(
        gappy(tmp_path / "a.csv"), tmp_path / "a", columns, spec={"stride": 1, "max_missing": 0.0}
    )
    assert data.report["windows_left_out"]["missing_readings"] == 4 * (5 + 3)
    with pytest.raises(DataError, match="no window of 8 rows") as caught:
        prepared(gappy(tmp_path / "b.csv"), tmp_path / "b", spec={"max_missing": 0.0})
    assert "104 of" not in caught.value.hint


def test_held_out_tables_of_their_own(tmp_path: Path) -> None:
    train, heldout = machines(tmp_path / "a.csv"), machines(tmp_path / "b.csv", count=2)
    spec = WindowSpec(rows=8)
    data = prepare([train], [heldout], UNITS, spec, tmp_path / "out", heldout_every=None, seed=0)
    assert (data.report["split_by"], len(data.heldout)) == ("file", 2 * 9)
    assert data.report["duplicates"] == 2 * 9  # machines 0 and 1 are the same in both
    assert data.heldout.labels == data.train.labels == ("bad", "good")
    rest = table(
        tmp_path / "c.csv", ("machine", "t", "x", "y", "state"), [["z", s, s, s, "odd"] for s in range(30)]
    )
    with pytest.raises(DataError, match=r"have no label that is known; c\.csv:2: state is 'odd'"):
        prepare([train], [rest], UNITS, spec, tmp_path / "c", heldout_every=None, seed=0)


def test_rows_of_no_use_are_counted_and_shown(tmp_path: Path) -> None:
    lines = [["m", s, s, s, "good" if s < 60 else "bad"] for s in range(100)]
    lines[10][2] = "broken"
    lines[20][1] = ""
    lines[30][4] = ""
    source = table(tmp_path / "a.csv", ("machine", "t", "x", "y", "state"), lines)
    columns = replace(UNITS, channels=("x", "y"))
    notes = Notes()
    found = read_tables([source], columns, tmp_path / "out", progress=notes)
    assert (len(found.label), found.bad_rows) == (98, 2)
    assert any("a.csv:12" in text or "line 12" in text for text in notes.texts)
    assert any("a.csv:32: state is ''" in text for text in notes.texts)
    assert found.label[found.time_s == 30] == recordings.NO_LABEL
    with pytest.raises(
        DataError, match="2 of 100 rows can't be used; line 12: x holds 'broken', not a number"
    ):
        read_tables([source], columns, tmp_path / "out", max_bad=0.01)


def test_a_bad_row_without_times_keeps_its_place(tmp_path: Path) -> None:
    lines = [[s, "good" if s < 60 else "bad"] for s in range(100)]
    lines[50][0] = "broken"
    source = table(tmp_path / "a.csv", ("x", "state"), lines)
    found = read_tables([source], ColumnsSpec(label="state", channels=("x",)), tmp_path / "out")
    assert len(found.label) == 100
    assert np.array_equal(
        found.values[:, 0], [math.nan if s == 50 else s for s in range(100)], equal_nan=True
    )
    assert found.label[50] == recordings.NO_LABEL


def test_repeated_times_and_dates(tmp_path: Path) -> None:
    lines = [
        [f"2024-03-0{1 + s // 60}T10:{s % 60:02}:00", s, "a" if s < 50 else "b"] for s in (*range(100), 7, 7)
    ]
    source = table(tmp_path / "a.csv", ("when", "x", "label"), lines)
    found = read_tables([source], ColumnsSpec(time="when"), tmp_path / "out")
    assert found.repeated == 2
    assert np.array_equal(found.values[:, 0], np.arange(100))
    assert found.time_s is not None
    assert np.diff(found.time_s)[:59] == pytest.approx(60)
    assert runs(found, 1.5).tolist() == [[0, 60], [60, 100]]


def test_parquet_and_gzip_give_the_same_rows(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import gzip

    from pyarrow import parquet

    source = machines(tmp_path / "a.csv")
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    with (tmp_path / "a.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    numeric = {"t": float, "x": float, "y": int}
    typed = {name: [numeric.get(name, str)(row[name]) for row in rows] for name in rows[0]}
    parquet.write_table(pyarrow.table(typed), tmp_path / "c.parquet")
    tables = [
        read_tables([str(path)], UNITS, tmp_path / path.name.replace(".", "-"))
        for path in (tmp_path / "a.csv", tmp_path / "b.csv.gz", tmp_path / "c.parquet")
    ]
    for other in tables[1:]:
        assert np.array_equal(other.values, tables[0].values)
        assert np.array_equal(other.label, tables[0].label)
        assert other.labels == tables[0].labels == ("bad", "good")
    assert source


def test_columns_are_found_or_missed_by_name(tmp_path: Path) -> None:
    rows = [["m", s, s / 2, "note", "" if s else 3, s % 2] for s in range(50)]
    source = table(tmp_path / "a.csv", ("machine", "t", "x", "comment", "sparse", "label"), rows)
    columns = ColumnsSpec(time="t", unit="machine")
    assert read_tables([source], columns, tmp_path / "out").channels == ("x", "sparse")
    with pytest.raises(DataError, match="no column 'speed'") as caught:
        read_tables([source], replace(columns, channels=("x", "speed")), tmp_path / "out")
    assert "comment" in caught.value.hint
    with pytest.raises(DataError, match="no column 'verdict'"):
        read_tables([source], replace(columns, label="verdict"), tmp_path / "out")
    texts = table(tmp_path / "b.csv", ("a", "label"), [["x", "y"]] * 20)
    with pytest.raises(DataError, match="holds numbers only"):
        read_tables([texts], ColumnsSpec(), tmp_path / "out")


def test_what_can_not_be_learned_from_is_refused(tmp_path: Path) -> None:
    same = table(tmp_path / "a.csv", ("x", "label"), [[s, "only"] for s in range(100)])
    with pytest.raises(DataError, match="all rows are 'only'"):
        prepared(same, tmp_path / "out", ColumnsSpec())
    unnamed = table(tmp_path / "b.csv", ("x", "label"), [[s, ""] for s in range(100)])
    with pytest.raises(DataError, match="no label that is known"):
        prepared(unnamed, tmp_path / "out", ColumnsSpec())
    short = table(tmp_path / "c.csv", ("x", "label"), [[s, s % 2] for s in range(5)])
    with pytest.raises(DataError, match="5 rows give no window of 8 rows"):
        prepared(short, tmp_path / "out", ColumnsSpec())
    with pytest.raises(DataError, match="no table"):
        prepare([], [], ColumnsSpec(), WindowSpec(), tmp_path / "out", heldout_every=8, seed=0)
    with pytest.raises(DataError, match="nothing is held out"):
        prepared(machines(tmp_path / "d.csv"), tmp_path / "out", heldout_every=None)
    one = table(tmp_path / "e.csv", ("x", "label"), [[s, s % 2] for s in range(9)])
    with pytest.raises(DataError, match="too few"):
        prepared(one, tmp_path / "out", ColumnsSpec())


def test_a_table_alone_gives_its_windows_as_they_were_measured(tmp_path: Path) -> None:
    table_of = read_tables([machines(tmp_path / "a.csv", count=2)], UNITS, tmp_path / "out")
    windows = sensors.measured(table_of, WindowSpec(rows=8, stride=3))
    assert len(windows) == 2 * 11
    assert np.array_equal(windows[12]["readings"], windows.raw(12))
    assert windows.raw(12)[:, 0].tolist() == [windows.raw(12)[0, 0] + i for i in range(8)]


def test_blocks_cover_their_runs() -> None:
    for every in (1, 4, 40):
        found = blocks(np.array([[0, 103], [103, 110], [110, 1000]]), 8, every)
        rows = np.concatenate([np.arange(first, last) for first, last in found])
        assert np.array_equal(rows, np.arange(1000))
        assert not any(first < 103 < last or first < 110 < last for first, last in found)


def test_rows_before_a_first_label_are_context(tmp_path: Path) -> None:
    out = Recordings(
        values=np.arange(20, dtype=np.float32)[:, None], label=np.array([-1] * 5 + [0, 1] * 7 + [-1], np.int32),
        time_s=None, unit=np.zeros(20, np.int32), channels=("x",), labels=("a", "b"), units=("u",), bad_rows=0,
        repeated=0,
    )  # fmt: skip
    cut = cut_windows(out, WindowSpec(rows=4, stride=1), by="unit", every=1)
    assert cut.starts.tolist() == list(range(2, 16))
    assert cut.left_out == {"no_label": 3, "missing_readings": 0}
    assert fit(out, cut.starts, WindowSpec(rows=4)).center[0] == pytest.approx(np.arange(2, 19).mean())


def test_indices_end_where_the_windows_do(tmp_path: Path) -> None:
    data = prepared(machines(tmp_path / "a.csv"), tmp_path / "out")
    with pytest.raises(IndexError):
        data.train[len(data.train)]
    assert sensors.stride_of(WindowSpec(rows=9)) == 4
    assert sensors.stride_of(WindowSpec(rows=1)) == 1
