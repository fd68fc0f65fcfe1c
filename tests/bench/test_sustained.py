"""The speed that lasts, on scripted machines: one that stays cool, one that throttles, one that never settles."""

from __future__ import annotations

from html import unescape
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeslm.bench import report
from edgeslm.bench.measure import bench_artifact
from edgeslm.bench.power import Energy
from edgeslm.bench.records import check, report_document
from edgeslm.bench.sustained import curve, energy_at, steady_state, sustain, sustain_calls
from edgeslm.bench.thermal import Heat
from edgeslm.console import bench_text
from edgeslm.errors import RecipeError
from edgeslm.progress import Quiet
from tests import records
from tests.bench.test_watch import Room

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path


def points(rates: Sequence[float], seconds: float = 5.0) -> list[dict[str, Any]]:
    return [{"at_s": i * seconds, "seconds": seconds, "rate_per_s": rate} for i, rate in enumerate(rates)]


def test_a_cool_machine_is_steady_from_the_start() -> None:
    steady = steady_state(points([10.0] * 100))
    assert (steady["reached"], steady["from_s"], steady["rate_per_s"]) == (True, 0.0, pytest.approx(10.0))
    assert steady["fraction_of_start"] == pytest.approx(1.0)


def test_a_machine_that_throttles_is_steady_afterwards() -> None:
    steady = steady_state(points([12.0] * 40 + [8.0] * 80))
    assert steady["reached"]
    assert steady["from_s"] == pytest.approx(200.0)
    assert steady["rate_per_s"] == pytest.approx(8.0)
    assert steady["fraction_of_start"] == pytest.approx(8 / 12)


def test_one_odd_point_changes_nothing() -> None:
    rates = [10.0] * 100
    rates[60], rates[99] = 3.0, 17.0
    steady = steady_state(points(rates))
    assert (steady["reached"], steady["from_s"]) == (True, 0.0)


def test_a_machine_that_still_slows_down_is_not_steady() -> None:
    steady = steady_state(points([20 - 0.15 * i for i in range(120)]))
    assert steady["reached"] is False
    assert steady["from_s"] == pytest.approx(450.0)  # the last quarter
    assert steady["rate_per_s"] == pytest.approx(20 - 0.15 * 104.5)


def test_a_change_in_the_last_quarter_is_not_steady() -> None:
    assert steady_state(points([10.0] * 105 + [7.0] * 15))["reached"] is False


def test_energy_and_heat_when_warm() -> None:
    made = [point | {"temperature_c": 80.0, "frequency_hz": 1.5e9} for point in points([3.0] * 20)]
    steady = steady_state(made)
    assert (steady["temperature_c"], steady["frequency_hz"]) == (pytest.approx(80.0), 1.5e9)
    energy = Energy(joules=60.0, seconds=10.0, samples=10, max_w=7.0)
    assert energy_at(3.0, energy, "token") == {"power_w": 6.0, "joules_per_token": 2.0}
    assert energy_at(3.0, None, "token") == energy_at(None, None, "token")


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.01, 30.0), st.integers(1, 500)), min_size=1, max_size=80),
    st.floats(0.1, 20.0),
)
def test_a_curve_keeps_all_work_and_time(units: list[tuple[float, int]], width: float) -> None:
    stamps = [0.0]
    for seconds, _ in units:
        stamps.append(stamps[-1] + seconds)
    made = curve(stamps, [count for _, count in units], width)
    assert sum(point["seconds"] for point in made) == pytest.approx(stamps[-1])
    assert sum(point["rate_per_s"] * point["seconds"] for point in made) == pytest.approx(
        sum(c for _, c in units)
    )
    assert made[0]["at_s"] == 0.0
    for one, following in pairwise(made):
        assert one["at_s"] + one["seconds"] == pytest.approx(following["at_s"])
        assert one["seconds"] >= width * (1 - 1e-9)


def hot_room() -> tuple[Room, Callable[[], int]]:
    """Two seconds for ten tokens at 6 W; after three minutes the firmware throttles to half of that."""
    room = Room()

    def work() -> int:
        hot = room.now_s > 280
        room.heat = Heat(
            temperature_c=85.0 if hot else 60.0, frequency_hz=1.2e9 if hot else 2.4e9,
            flags=frozenset({"throttled"} if hot else ()),
        )  # fmt: skip
        for _ in range(4 if hot else 2):
            room.work(1.0, 4.0 if hot else 6.0)
            watch.sample()
        return 10

    watch = room.watch(cumulative=False)
    room.started = watch  # type: ignore[attr-defined]
    return room, work


def sustained_record() -> dict[str, Any]:
    room, work = hot_room()
    watch = room.started  # type: ignore[attr-defined]
    return sustain(
        work, minutes=10, unit="token", facts={"kind": "decode", "tokens": 10, "threads": 4}, watch=watch,
        clock=lambda: room.now_s * 1.0 - 7, progress=Quiet(),
    )  # fmt: skip


def test_a_whole_run_that_gets_hot() -> None:
    record = sustained_record()
    assert record["seconds"] == pytest.approx(600, abs=4)
    assert record["start_rate_per_s"] == pytest.approx(5.0)
    assert record["steady"]["reached"]
    assert record["steady"]["rate_per_s"] == pytest.approx(2.5)
    assert 170 < record["steady"]["from_s"] < 195
    assert record["steady"]["temperature_c"] == pytest.approx(85.0, abs=0.1)
    assert record["curve"][0]["temperature_c"] == 60.0
    assert record["curve"][-1]["flags"] == ["throttled"]
    assert len(record["curve"]) <= 120
    assert record["valid"] is False
    assert [reason.split(";")[0] for reason in record["reasons"]] == [
        "the firmware throttled the processor",
        "the clock fell by 50.0% while it ran, from 2400 to 1200 MHz (at most 10%)",
    ]
    assert record["steady"]["power_w"] == pytest.approx(4.0, abs=0.05)
    assert record["steady"]["joules_per_token"] == pytest.approx(1.6, abs=0.02)
    energy = record["power"]["energy_j"]
    assert record["power"]["joules_per_token"] == pytest.approx(energy / record["total"])
    check(records.bench() | {"sustained": record}, "here")


def test_the_time_must_be_some() -> None:
    room, work = hot_room()
    with pytest.raises(RecipeError, match="no time"):
        sustain(
            work, minutes=0, unit="token", facts={}, watch=room.watch(), clock=lambda: 0.0, progress=Quiet()
        )


def test_calls_of_a_classifier_are_examples() -> None:
    room = Room()

    def call() -> None:
        room.work(0.25, 1.0)

    facts = {"kind": "predict", "batch": 8, "tokens": None, "rows": 20, "threads": 1, "repetitions": 5}
    record = sustain_calls(
        call, facts, minutes=0.5, watch=room.watch(), clock=lambda: room.now_s, progress=Quiet()
    )
    assert record["steady"]["rate_per_s"] == pytest.approx(32.0)
    assert record["power"]["joules_per_example"] == pytest.approx(1 / 32)
    assert (record["unit"], record["kind"], record["rows"]) == ("example", "predict", 20)


def hot_bench() -> dict[str, Any]:
    sustained = sustained_record()
    heat = {
        "samples": 5,
        "temperature_c": {"start": 50.0, "max": 61.0, "end": 60.0},
        "flags": [],
        "frequency_hz": None,
    }
    power = {"source": "pmic", "energy_j": 30.2, "seconds": 5.1, "samples": 5, "mean_w": 5.92, "max_w": 6.4,
             "joules_per_token": 0.047}  # fmt: skip
    made = records.bench(runs=[records.prefill(), records.decode(power=power, thermal=heat)])
    reasons = [f"sustained: {reason}" for reason in sustained["reasons"]]
    covers = {"source": "pmic", "covers": "the board's own rails", "interval_s": 1.0}
    return made | {"sustained": sustained, "power": covers, "valid": False, "reasons": reasons}


def test_the_terminal_shows_the_curve_and_what_lasts() -> None:
    text = bench_text(hot_bench())
    assert "pmic: the board's own rails" in text
    assert "2.50 tokens/s from 3 min" in text
    assert "50.0 % of the 5.00 tokens/s at the start" in text
    assert "47.0 mJ/token" in text
    assert "throttled" in text
    assert "INVALID" in text
    assert len([line for line in text.splitlines() if " C  " in line]) >= 8
    assert text.isascii()


def test_the_report_shows_them_too() -> None:
    document = report_document([hot_bench()])
    page, text = report.render_html(document), report.render_markdown(document)
    for wanted in (
        "Power, heat and endurance",
        "47.0 mJ/token",
        "2.50 tokens/s from 3 min",
        "board's own rails",
    ):
        assert wanted in unescape(page)
        assert wanted in text
    for name in ("rate", "temperature", "frequency", "power"):
        assert f'id="lasting-token-{name}-title"' in page


def test_a_report_without_power_has_no_such_section() -> None:
    assert "endurance" not in report.render_html(report_document([records.bench()]))


def test_the_real_engine_goes_on_for_a_second(tiny_gguf: Path) -> None:
    pytest.importorskip("llama_cpp")
    record = bench_artifact(
        tiny_gguf, prompt_tokens=(16,), decode_tokens=(8,), threads=(1,), repetitions=2, minutes=1 / 60
    )
    sustained = record["sustained"]
    assert sustained["seconds"] >= 1.0
    assert sustained["total"] % 8 == 0
    assert sustained["total"] / sustained["seconds"] == pytest.approx(
        sum(p["rate_per_s"] * p["seconds"] for p in sustained["curve"]) / sustained["seconds"]
    )
    check(record, "here")
    assert "sustained" in bench_text(record)
