"""Energy from recorded machines, and the arithmetic against closed forms."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeslm.bench.power import (
    Rapl,
    energy_between,
    energy_record,
    find_meter,
    parse_pmic,
    parse_powermetrics,
)
from tests.recorded import POWER, Programs, plant, put

if TYPE_CHECKING:
    from pathlib import Path

NOTHING = Programs()


def test_a_laptop_counts_its_package_once(tmp_path: Path) -> None:
    """core and uncore are in the package, the mmio zone is the package again, psys is the whole machine."""
    root = plant(tmp_path, "x86-laptop")
    meter, hint = find_meter(root, system="linux", command=NOTHING)
    assert meter is not None
    assert (meter.source, meter.covers, meter.cumulative, hint) == ("rapl", "package-0", True, None)
    assert meter.read() == pytest.approx(261_802.0)


def test_a_counter_that_starts_again_is_followed(tmp_path: Path) -> None:
    root = plant(tmp_path, "x86-laptop")
    zone = root / "sys/class/powercap/intel-rapl:0"
    rapl = Rapl([zone])
    before = rapl.read()
    put(root, "sys/class/powercap/intel-rapl:0/energy_uj", 158_671_150)
    first = rapl.read()
    assert before is not None
    assert first is not None
    assert first - before == pytest.approx(341.328850 + 158.671150)
    put(root, "sys/class/powercap/intel-rapl:0/energy_uj", 258_671_150)
    second = rapl.read()
    assert second is not None
    assert second - first == pytest.approx(100.0)


def test_a_server_adds_packages_and_memory(tmp_path: Path) -> None:
    meter, _ = find_meter(plant(tmp_path, "x86-server"), system="linux", command=NOTHING)
    assert meter is not None
    assert meter.covers == "package-0, dram, package-1, dram"
    assert meter.read() == pytest.approx(1.0 + 0.2 + 3.0 + 0.4)


def test_counters_that_only_root_may_read_are_told(tmp_path: Path) -> None:
    root = plant(tmp_path, "x86-laptop")
    (root / "sys/class/powercap/intel-rapl:0/energy_uj").unlink()
    meter, hint = find_meter(root, system="linux", command=NOTHING)
    assert meter is None
    assert hint is not None
    assert "sudo chmod a+r" in hint


def test_a_raspberry_pi_5_adds_its_rails(tmp_path: Path) -> None:
    printed = (POWER / "rpi5" / "pmic_read_adc.txt").read_text()
    meter, _ = find_meter(plant(tmp_path, "rpi5"), system="linux", command=Programs(pmic_read_adc=printed))
    assert meter is not None
    assert (meter.source, meter.cumulative) == ("pmic", False)
    by_hand = (
        0.0976 * 3.7 + 0.1025 * 3.31 + 0.172 * 1.8 + 0.21 * 1.1 + 0.05 * 0.6 + 0.18 * 1.11
        + 0.35 * 0.8 + 5.5 * 0.87 + 0.0003 * 3.31 + 0.004 * 0.8 + 0.02 * 5.08
    )  # fmt: skip
    assert meter.read() == pytest.approx(by_hand)


@pytest.mark.parametrize(
    "printed",
    [None, "", "error=1 error_msg=\"Command not registered\"", "EXT5V_V volt(24)=5.1V\nBATT_V volt(25)=nanV\n",
     "VDD_CORE_A current(7)=1.2.3A\nVDD_CORE_V volt(15)=0.9V\n"],
)  # fmt: skip
def test_without_a_pair_there_is_no_power(printed: str | None) -> None:
    assert parse_pmic(printed) is None


def test_a_mac_tells_root_alone(tmp_path: Path) -> None:
    printed = Programs(
        powermetrics="CPU Power: 900 mW\nGPU Power: 50 mW\nANE Power: 0 mW\nGPU Power: 49 mW\n"
    )
    meter, _ = find_meter(tmp_path, system="darwin", command=printed, privileged=True)
    assert meter is not None
    assert meter.read() == pytest.approx(0.95)
    meter, hint = find_meter(tmp_path, system="darwin", command=printed, privileged=False)
    assert meter is None
    assert hint is not None
    assert "--power-log" in hint
    assert find_meter(tmp_path, system="darwin", command=NOTHING, privileged=True)[0] is None


def test_the_combined_line_wins() -> None:
    assert parse_powermetrics("CPU Power: 9 W\nCombined Power (CPU + GPU + ANE): 12.5 W\n") == 12.5
    assert parse_powermetrics("Current pressure level: Nominal") is None


def test_a_machine_without_a_meter(tmp_path: Path) -> None:
    assert find_meter(tmp_path, system="linux", command=NOTHING) == (None, None)


def test_a_counter_is_linear_between_readings() -> None:
    energy = energy_between([0, 1, 2, 3], [0, 10, 30, 60], 0.5, 2.5, cumulative=True)
    assert energy is not None
    assert energy.joules == pytest.approx(5 + 20 + 15)
    assert (energy.seconds, energy.samples, energy.mean_w, energy.max_w) == (
        2.0,
        2,
        pytest.approx(20.0),
        20.0,
    )


def test_a_counter_must_be_known_on_both_sides() -> None:
    assert energy_between([1, 2], [0, 10], 0.5, 1.5, cumulative=True) is None
    assert energy_between([1, 2], [0, 10], 1.5, 2.5, cumulative=True) is None
    assert energy_between([], [], 1.5, 2.5, cumulative=True) is None
    assert energy_between([0, 9], [0, 9], 1.0, 1.05, cumulative=True) is None  # too short


@settings(deadline=None)
@given(st.integers(3, 60), st.floats(0.2, 500.0), st.floats(-3.0, 3.0), st.floats(5.0, 50.0))
def test_the_integral_of_a_ramp_is_exact_but_for_its_ends(
    count: int, span: float, slope: float, level: float
) -> None:
    """Against the closed form: a straight line of power, whose ends are held for half a step."""
    step = span / count
    times = [10 + (number + 0.5) * step for number in range(count)]
    watts = [level + slope * number / count for number in range(count)]
    energy = energy_between(times, watts, 10.0, 10.0 + span, cumulative=False)
    assert energy is not None
    assert energy.joules == pytest.approx(float(np.mean(watts)) * span, rel=1e-9)
    assert energy.max_w == max(watts)
    assert energy.samples == count


def test_readings_outside_of_the_run_are_not_its_power() -> None:
    times, watts = [0, 1, 2, 3, 4, 5, 6], [2, 2, 8, 8, 8, 2, 2]
    energy = energy_between(times, watts, 1.5, 4.5, cumulative=False)
    assert energy is not None
    assert energy.joules == pytest.approx(24.0)


def test_too_few_readings_give_no_number() -> None:
    assert energy_between([1, 5], [3, 3], 0, 6, cumulative=False) is None
    assert energy_between([1, 3, 5], [3, 3, 3], 0, 6, cumulative=False) is not None
    assert energy_between([1, 2, 3], [3, 3, 3], 0, 6, cumulative=False) is None
    assert energy_between([7, 8], [3, 3], 0, 6, cumulative=False) is None


def test_the_share_of_a_token() -> None:
    energy = energy_between([0, 10], [0, 50], 0, 10, cumulative=True)
    record = energy_record(energy, "rapl", 25, "token")
    assert record is not None
    assert record["joules_per_token"] == pytest.approx(2.0)
    assert record["mean_w"] == pytest.approx(5.0)
    assert all(value is None or value == "rapl" or math.isfinite(value) for value in record.values())
    nothing = energy_record(energy, "rapl", 0, "token")
    assert nothing is not None
    assert nothing["joules_per_token"] is None
    assert energy_record(None, "rapl", 25, "token") is None
