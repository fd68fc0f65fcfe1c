"""What makes a measurement invalid, on invented machines; and the readers, on invented /proc and /sys trees."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from edgeslm.bench import interference
from edgeslm.bench.interference import Conditions, reasons

if TYPE_CHECKING:
    from pathlib import Path

CALM = Conditions(
    wall_s=100.0,
    own_s=50.0,
    busy_s=900.0,
    frequency_hz=2.4e9,
    throttle_events=3,
    throttled=False,
    emulated=False,
)
STEADY = [1.0, 1.01, 0.99, 1.0]


def later(**changes: float | bool | None) -> Conditions:
    """Ten seconds on: this process kept two cores busy and nobody else did anything, unless said otherwise."""
    return replace(CALM, **({"wall_s": 110.0, "own_s": 70.0, "busy_s": 920.0} | changes))  # type: ignore[arg-type]


def test_a_calm_machine_gives_no_reason() -> None:
    assert reasons(STEADY, CALM, later()) == []


def test_spread_between_repetitions() -> None:
    (reason,) = reasons([1.0, 1.0, 1.0, 2.0], CALM, later())
    assert reason == ("repetitions differ by 40.0% (standard deviation over mean, at most 10%): 1 to 2 s")
    assert reasons([1.0, 1.19], CALM, later()) != []
    assert reasons([1.0, 1.15], CALM, later()) == []  # 0.106 / 1.075
    assert reasons([1.0], CALM, later()) == []


def test_load_of_others_is_what_the_cores_did_less_what_we_did() -> None:
    (reason,) = reasons(STEADY, CALM, later(busy_s=925.1))
    assert reason == "other processes kept 0.51 cores busy (at most 0.5)"
    assert reasons(STEADY, CALM, later(busy_s=924.9)) == []
    assert reasons(STEADY, CALM, later(own_s=75.0)) == []  # ticks are coarse: ours may seem more than all


def test_a_moment_is_too_short_to_judge_load() -> None:
    assert reasons(STEADY, CALM, later(wall_s=100.1, own_s=50.1, busy_s=901.0)) == []


def test_a_falling_clock() -> None:
    (reason,) = reasons(STEADY, CALM, later(frequency_hz=1.5e9))
    assert reason == "the clock fell by 37.5%, from 2400 to 1500 MHz (at most 10%)"
    assert reasons(STEADY, CALM, later(frequency_hz=2.2e9)) == []
    assert reasons(STEADY, CALM, later(frequency_hz=3.0e9)) == []


def test_throttling() -> None:
    (reason,) = reasons(STEADY, CALM, later(throttle_events=5))
    assert reason == "the processor throttled 2 times for heat"
    (reason,) = reasons(STEADY, CALM, later(throttled=True))
    assert "firmware slows" in reason


def test_emulation() -> None:
    (reason,) = reasons(STEADY, CALM, later(emulated=True))
    assert "translated by software" in reason


def test_several_reasons_are_all_told() -> None:
    assert len(reasons([1.0, 2.0], CALM, later(busy_s=960.0, frequency_hz=1e9, throttle_events=4))) == 4


def test_what_cannot_be_read_is_no_reason() -> None:
    blind = {
        "busy_s": None,
        "frequency_hz": None,
        "throttle_events": None,
        "throttled": None,
        "emulated": None,
    }
    assert reasons(STEADY, replace(CALM, **blind), later(**blind)) == []  # type: ignore[arg-type]
    assert reasons(STEADY, CALM, later(**blind)) == []


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


STAT = """cpu  66 6 60 9999 99 6 6 6 0 0
cpu0 10 1 20 5000 50 2 3 4 7 7
cpu1 50 5 30 4000 40 4 3 2 7 7
cpu2 6 0 10 999 9 0 0 0 0 0
intr 12345 0 0
ctxt 987
"""


def test_busy_seconds_are_of_the_cores_open_to_us(tmp_path: Path) -> None:
    """user + nice + system + irq + softirq + steal; guests are in user already, waiting for disks is idle."""
    write(tmp_path / "proc/stat", STAT)
    tick = os.sysconf("SC_CLK_TCK")
    assert interference.busy_seconds(tmp_path, None, None) == (40 + 94 + 16) / tick
    assert interference.busy_seconds(tmp_path, frozenset({0}), 1) == 40 / tick
    assert interference.busy_seconds(tmp_path, frozenset({0, 2}), 2) == 56 / tick


def test_a_quota_hides_whose_work_it_is(tmp_path: Path) -> None:
    write(tmp_path / "proc/stat", STAT)
    assert interference.busy_seconds(tmp_path, frozenset({0, 1, 2}), 2) is None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_missing_counters_are_none(tmp_path: Path) -> None:
    assert interference.busy_seconds(tmp_path, None, None) is None
    write(tmp_path / "proc/stat", "cpu0 0 0 0 0 0 0 0 0 0 0\n")  # a sandbox that shows zeros
    assert interference.busy_seconds(tmp_path, None, None) is None
    assert interference.throttle_events(tmp_path) is None
    assert interference.throttled_now(tmp_path) is None


def test_throttle_counters_are_added_up(tmp_path: Path) -> None:
    cpus = tmp_path / "sys/devices/system/cpu"
    write(cpus / "cpu0/thermal_throttle/core_throttle_count", "2\n")
    write(cpus / "cpu0/thermal_throttle/package_throttle_count", "3\n")
    write(cpus / "cpu1/thermal_throttle/core_throttle_count", "4\n")
    write(cpus / "cpu1/thermal_throttle/core_throttle_max_time_ms", "500\n")
    assert interference.throttle_events(tmp_path) == 9


@pytest.mark.parametrize(("bits", "throttled"), [
    ("0", False), ("50000", False), ("50005", True), ("4", True), ("8", True),
])  # fmt: skip
def test_the_pis_firmware_tells_now_in_its_low_bits(tmp_path: Path, bits: str, throttled: bool) -> None:
    write(tmp_path / "sys/devices/platform/soc/soc:firmware/get_throttled", bits + "\n")
    assert interference.throttled_now(tmp_path) is throttled


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_this_process_is_not_its_own_interference() -> None:
    """Work of our own appears in own_s and busy_s alike, so that their difference is the others'."""
    before = interference.observe()
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    after = interference.observe()
    own = after.own_s - before.own_s
    assert own >= 0.3
    if before.busy_s is not None and after.busy_s is not None:
        assert after.busy_s - before.busy_s >= own - 0.05
