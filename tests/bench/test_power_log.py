"""Logs of power meters: every form that is known, and the runs that they cover."""

from __future__ import annotations

import copy
import json
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeslm.bench.power_log import PowerLog, attach, measure_again, read_log
from edgeslm.cli import cli
from edgeslm.errors import DataError
from tests import records
from tests.recorded import POWER

if TYPE_CHECKING:
    from pathlib import Path

NINE = datetime(2026, 11, 22, 9, tzinfo=UTC).timestamp()


def test_voltage_times_current_by_iso_times() -> None:
    """The last row is cut off but whole enough; columns of the data lines are no supply."""
    log = read_log(POWER / "meters" / "voltage_current.csv")
    assert log.watts == pytest.approx([5.1, 10.0, 10.0, 12.0, 12.0])
    assert [at - NINE for at in log.times_unix_s] == [0, 1, 2, 3, 4]
    assert log.skipped == 0


def test_milliwatts_with_decimal_commas_and_milliseconds() -> None:
    log = read_log(POWER / "meters" / "milliwatts.csv")
    assert log.watts == pytest.approx([5.1005, 10.0, 10.0])
    assert [at - NINE for at in log.times_unix_s] == [0, 0.5, 1]
    assert log.skipped == 1


def test_millivolts_times_milliamperes() -> None:
    log = read_log(POWER / "meters" / "shunt.tsv")
    assert log.watts == pytest.approx([5.0, 10.0])
    assert [at - NINE for at in log.times_unix_s] == [0.25, 1.25]


def test_powermetrics_output() -> None:
    """A sample is the mean of the second before it was printed; one has no combined line, one has nothing."""
    log = read_log(POWER / "m2" / "powermetrics.txt")
    assert log.watts == pytest.approx([10.0, 12.0, 12.0, 14.0])
    assert [at - NINE for at in log.times_unix_s] == [0.5, 1.5, 2.5, 4.5]
    assert log.skipped == 1


@pytest.mark.parametrize(
    "header",
    [
        "time,power",
        "Timestamp,Power(W)",
        "date_time,power_w",
        "ts,W",
        "Time[s],Watts",
        "unix,P",
        "epoch,Power [W]",
    ],
)
def test_names_of_columns(tmp_path: Path, header: str) -> None:
    (tmp_path / "log.csv").write_text(f"{header}\n{NINE},2.5\n")
    assert read_log(tmp_path / "log.csv").watts == [2.5]


@pytest.mark.parametrize(
    "header", ["VBUS(V),IBUS(A)", "voltage_v,current_a", "U,I", "Volts,Amps", "Voltage,Current"]
)
def test_names_of_voltage_and_current(tmp_path: Path, header: str) -> None:
    (tmp_path / "log.csv").write_text(f"time,{header}\n{NINE},5.0,0.5\n")
    assert read_log(tmp_path / "log.csv").watts == [2.5]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "names no time or no power"),
        ("1,2,3\n4,5,6\n", "names no time or no power"),
        ("time,temperature\n1,2\n", "names no time or no power"),
        ("time,power factor\n1,2\n", "names no time or no power"),
        ("time,power\nnever,much\n", "no row has a time and a power"),
        ("time,power\n1e400,nan\n", "no row has a time and a power"),
    ],
)
def test_what_is_no_log(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "log.csv").write_text(text)
    with pytest.raises(DataError, match=said) as caught:
        read_log(tmp_path / "log.csv")
    assert "log.csv" in caught.value.message
    with pytest.raises(DataError, match=r"absent\.csv"):
        read_log(tmp_path / "absent.csv")


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_break_it(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.csv"
    path.write_bytes(b"time,power\n" + data)
    try:
        log = read_log(path)
    except DataError:
        return
    assert len(log.watts) == len(log.times_unix_s) > 0


def record() -> dict[str, Any]:
    """Prefill from 9:00:10 for five seconds, decode from 9:00:20 for ten."""
    made = records.bench()
    for run, start, seconds in zip(made["runs"], (10, 20), (5, 10), strict=True):
        run |= {"started_unix_s": NINE + start, "ended_unix_s": NINE + start + seconds, "power": None}
    return made


def log(start: int, end: int, watts: float = 8.0) -> PowerLog:
    times = [NINE + second + 0.5 for second in range(start, end)]
    return PowerLog(name="usb.csv", times_unix_s=times, watts=[watts] * len(times), skipped=2)


def test_the_runs_get_what_the_meter_saw() -> None:
    before = record()
    kept = copy.deepcopy(before)
    made = attach(before, log(0, 60))
    assert before == kept
    prefill, decode = made["runs"]
    assert prefill["power"]["energy_j"] == pytest.approx(40.0)
    assert prefill["power"]["joules_per_token"] == pytest.approx(40 / (512 * 5))
    assert decode["power"]["energy_j"] == pytest.approx(80.0)
    assert made["power"]["source"] == "log"
    assert made["power"]["covers"] == "whatever the meter of usb.csv feeds"
    assert made["power"]["interval_s"] == pytest.approx(1.0)
    assert made["power"]["notes"] == ["2 rows of usb.csv could not be read"]


def test_a_run_that_the_log_does_not_cover_has_no_energy() -> None:
    made = attach(record(), log(0, 22))
    assert made["runs"][0]["power"] is not None
    assert made["runs"][1]["power"] is None
    assert made["power"]["notes"][1] == (
        "1 of 2 runs have no energy: usb.csv has 2026-11-22 09:00:00 to 2026-11-22 09:00:21 UTC, the runs were "
        "2026-11-22 09:00:10 to 2026-11-22 09:00:30 UTC; do both clocks tell the same time?"
    )


def test_the_curve_gets_its_power() -> None:
    made = record()
    made["sustained"] = {
        "kind": "decode", "unit": "token", "tokens": 128, "threads": 4, "total": 400,
        "started_unix_s": NINE + 100, "ended_unix_s": NINE + 140,
        "curve": [
            {"at_s": 0.0, "seconds": 20.0, "rate_per_s": 12.0}, {"at_s": 20.0, "seconds": 20.0, "rate_per_s": 8.0},
        ],
        "steady": {"reached": True, "from_s": 20.0, "rate_per_s": 8.0},
    }  # fmt: skip
    sustained = attach(made, log(0, 200, watts=4.0))["sustained"]
    assert [point["power_w"] for point in sustained["curve"]] == pytest.approx([4.0, 4.0])
    assert sustained["steady"]["power_w"] == pytest.approx(4.0)
    assert sustained["steady"]["joules_per_token"] == pytest.approx(0.5)
    assert sustained["power"]["joules_per_token"] == pytest.approx(160 / 400)


def test_a_record_file_is_measured_again(tmp_path: Path) -> None:
    path, meter = tmp_path / "bench.json", tmp_path / "usb.csv"
    path.write_text(json.dumps(record()))
    meter.write_text("time,power\n" + "".join(f"{NINE + second},3\n" for second in range(60)))
    assert measure_again(path, meter)["runs"][1]["power"]["mean_w"] == pytest.approx(3.0)
    path.write_text(json.dumps(records.bench()))
    with pytest.raises(DataError, match="does not say when"):
        measure_again(path, meter)
    path.write_text(json.dumps(records.quality()))
    with pytest.raises(DataError, match="no record of `edgeslm bench`"):
        measure_again(path, meter)


def test_the_command_adds_energy_to_a_record(tmp_path: Path) -> None:
    path, meter = tmp_path / "bench.json", tmp_path / "usb.csv"
    path.write_text(json.dumps(record()))
    meter.write_text("time,power\n" + "".join(f"{NINE + second},3\n" for second in range(60)))
    words = ["bench", str(path), "--power-log", str(meter), "--out", str(tmp_path / "out.json")]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    assert "log: whatever the meter of usb.csv feeds" in done.output
    assert json.loads((tmp_path / "out.json").read_text())["runs"][0]["power"]["mean_w"] == pytest.approx(3.0)
    refused = CliRunner().invoke(cli, [*words, "--on", "pi5"])
    assert refused.exit_code == 2
    assert "edgeslm bench RECORD.json --power-log FILE" in refused.output
