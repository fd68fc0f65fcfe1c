"""Temperature, clock and what slows a processor, on recorded machines."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from edgeslm.bench import thermal
from edgeslm.bench.thermal import Heat, Sensors, reasons
from tests.recorded import POWER, Programs, plant, put

if TYPE_CHECKING:
    from pathlib import Path

NOTHING = Programs()


def test_a_raspberry_pi_5_tells_its_flags_by_command_alone(tmp_path: Path) -> None:
    asked = Programs(get_throttled="throttled=0x50005\n")
    sensors = Sensors(plant(tmp_path, "rpi5"), system="linux", command=asked)
    assert sensors.readable
    assert sensors.read() == Heat(
        temperature_c=61.85, frequency_hz=2.4e9, flags=frozenset({"under-voltage", "throttled"}),
        since_boot=frozenset({"under-voltage", "throttled"}),
    )  # fmt: skip
    assert set(asked.asked) == {("vcgencmd", "get_throttled")}


def test_a_raspberry_pi_4_tells_them_in_a_file_too(tmp_path: Path) -> None:
    heat = Sensors(plant(tmp_path, "rpi4"), system="linux", command=NOTHING).read()
    assert heat.flags == {"soft temperature limit"}
    assert heat.since_boot == {"frequency capped", "throttled", "soft temperature limit"}
    assert heat.frequency_hz == 1.4e9


def test_under_voltage_of_a_zero(tmp_path: Path) -> None:
    heat = Sensors(plant(tmp_path, "rpi-zero2w"), system="linux", command=NOTHING).read()
    (supply, throttled) = reasons([heat])
    assert supply.startswith("the supply's voltage fell too low (under-voltage)")
    assert supply.endswith("; in 1 of 1 samples, at up to 48 C")
    assert throttled.startswith("the firmware throttled the processor")


def test_the_kernel_cools_by_the_clock(tmp_path: Path) -> None:
    """Other devices than the processor may be slowed, and sensors of others may be hotter."""
    root = plant(tmp_path, "rk3588")
    sensors = Sensors(root, system="linux", command=NOTHING)
    heat = sensors.read()
    assert (heat.flags, heat.temperature_c, heat.frequency_hz) == ({"cooling"}, 84.075, 2.016e9)
    put(root, "sys/class/thermal/cooling_device1/cur_state", 0)
    assert sensors.read().flags == frozenset()


def test_fans_and_idle_injection_are_no_slowing(tmp_path: Path) -> None:
    heat = Sensors(plant(tmp_path, "x86-laptop"), system="linux", command=NOTHING).read()
    assert heat == Heat(temperature_c=71.0, frequency_hz=4.1e9, flags=frozenset(), since_boot=None)
    fan = Sensors(plant(tmp_path / "pi", "rpi5"), system="linux", command=NOTHING).read()
    assert fan.flags is None  # nobody told


def test_hardware_monitors_where_there_is_no_zone(tmp_path: Path) -> None:
    heat = Sensors(plant(tmp_path, "x86-server"), system="linux", command=NOTHING).read()
    assert heat == Heat(temperature_c=58.0)


def test_a_mac_tells_its_thermal_pressure(tmp_path: Path) -> None:
    printed = (POWER / "m2" / "thermalpressurelevel.txt").read_text()
    heat = Sensors(tmp_path, system="darwin", command=Programs(notifyutil=printed)).read()
    assert heat == Heat(flags=frozenset({"thermal pressure"}))
    calm = Programs(notifyutil=printed.replace(" 2", " 0"))
    assert Sensors(tmp_path, system="darwin", command=calm).read().flags == frozenset()
    assert not Sensors(tmp_path, system="darwin", command=NOTHING).readable


def test_nothing_to_read_is_nothing(tmp_path: Path) -> None:
    sensors = Sensors(tmp_path, system="linux", command=NOTHING)
    assert not sensors.readable
    assert sensors.read() == Heat()
    assert thermal.as_record([Heat(), Heat()]) is None
    assert reasons([Heat(), Heat()]) == []


@pytest.mark.parametrize("text", ["", "no number", "12a", "0x"])
def test_nonsense_in_files_is_no_number(tmp_path: Path, text: str) -> None:
    root = plant(tmp_path, "rpi4")
    for path in (
        "sys/class/thermal/thermal_zone0/temp",
        "sys/devices/platform/soc/soc:firmware/get_throttled",
    ):
        put(root, path, text)
    heat = Sensors(root, system="linux", command=Programs(get_throttled="error=1 error_msg=no")).read()
    assert heat.temperature_c is None
    assert heat.since_boot is None or text == "12a"


def test_what_happened_between_two_samples_is_seen_by_the_sticky_bits() -> None:
    calm = Heat(flags=frozenset(), since_boot=frozenset({"throttled"}), temperature_c=70.0)
    later = Heat(flags=frozenset(), since_boot=frozenset({"throttled", "under-voltage"}), temperature_c=83.6)
    (reason,) = reasons([calm, later])
    assert "under-voltage" in reason
    assert reason.endswith("; between two samples, at up to 84 C")
    assert reasons([later, later]) == []  # it was before this run


def test_a_clock_that_falls_within_the_run() -> None:
    clocks = [2.4e9] * 4 + [2.0e9] * 2 + [1.5e9] * 4
    (reason,) = reasons([Heat(frequency_hz=clock) for clock in clocks])
    assert reason == "the clock fell by 37.5% while it ran, from 2400 to 1500 MHz (at most 10%)"
    assert reasons([Heat(frequency_hz=clock) for clock in reversed(clocks)]) == []
    assert reasons([Heat(frequency_hz=clock) for clock in (2.4e9, 1.5e9)]) == []
    odd = [2.4e9] * 9
    odd[-1] = 0.6e9
    assert reasons([Heat(frequency_hz=clock) for clock in odd]) == []


def test_the_record_of_a_run() -> None:
    moments = [
        Heat(temperature_c=50.0, frequency_hz=2e9, flags=frozenset()),
        Heat(temperature_c=80.0, frequency_hz=1e9, flags=frozenset({"throttled"})),
        Heat(temperature_c=70.0, frequency_hz=1.5e9, flags=frozenset()),
    ]
    assert thermal.as_record(moments) == {
        "samples": 3,
        "temperature_c": {"start": 50.0, "max": 80.0, "end": 70.0},
        "frequency_hz": {"start": 2e9, "min": 1e9, "end": 1.5e9},
        "flags": ["throttled"],
    }


def test_programs_that_fail_say_nothing() -> None:
    assert thermal.run_command((sys.executable, "-c", "print('told')")) == "told\n"
    assert thermal.run_command((sys.executable, "-c", "raise SystemExit(3)")) is None
    assert thermal.run_command(("edgeslm-has-no-such-program",)) is None


def test_this_machine_can_be_asked() -> None:
    heat = Sensors().read()
    assert heat.temperature_c is None or -20 < heat.temperature_c < 125
    assert heat.frequency_hz is None or 1e7 < heat.frequency_hz < 1e10
