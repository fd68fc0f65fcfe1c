"""Temperature, clock and whether something slows the processor: read often, beside a run, so cheaply.

Linux: thermal zones, hardware monitors, cpufreq and cooling devices of /sys, found once and then only read; the
Raspberry Pi's firmware by `vcgencmd get_throttled` (the Pi 5 has no file for it), else by its file in /sys.
macOS tells without privileges only how hard it slows the machine (notifyutil).  What can't be read is None.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Command = Callable[[Sequence[str]], str | None]
    """Runs a program and gives what it printed; None where it is missing or fails."""

FIRMWARE_FLAGS = {
    0: "under-voltage", 1: "frequency capped", 2: "throttled", 3: "soft temperature limit",
}  # fmt: skip
"""Bits of get_throttled right now; the same 16 bits up: since boot.  raspberrypi.com/documentation, vcgencmd."""
FLAGS = {
    "under-voltage": "the supply's voltage fell too low (under-voltage): a stronger supply or a shorter cable helps",
    "frequency capped": "the firmware capped the clock",
    "throttled": "the firmware throttled the processor",
    "soft temperature limit": "the firmware lowered the clock at its soft temperature limit: better cooling helps",
    "cooling": "the kernel lowered the clock for heat: better cooling helps",
    "thermal pressure": "macOS slowed the machine for heat (thermal pressure)",
}
"""What slows a processor, and what to say of it."""
MAX_CLOCK_DROP = 0.10
"""Of the fastest core's clock within a run, as a share."""
MIN_SAMPLES = 6
"""Of the clock in a run before a fall is believed."""
_PRESSURE = "com.apple.system.thermalpressurelevel"
_PROCESSOR = re.compile(r"cpu|pkg|soc|coretemp|k10temp|zenpower")
_ROOT = Path("/")


@dataclass(frozen=True, kw_only=True)
class Heat:
    """One moment.  flags: keys of FLAGS that hold now; since_boot: those that the firmware has ever seen."""

    temperature_c: float | None = None
    frequency_hz: float | None = None
    """Of the fastest core: cores without work may sleep."""
    flags: frozenset[str] | None = None
    since_boot: frozenset[str] | None = None


class Sensors:
    """Finds what this machine can tell; `read` then costs a few small files and at most one short command."""

    def __init__(
        self, root: Path = _ROOT, *, system: str = sys.platform, command: Command | None = None
    ) -> None:
        self._command = command or run_command
        self._mac = system == "darwin"
        classes, cpus = root / "sys/class", root / "sys/devices/system/cpu"
        self._temperatures = [] if self._mac else _temperatures(classes)
        self._clocks = [] if self._mac else sorted(cpus.glob("cpu[0-9]*/cpufreq/scaling_cur_freq"))
        self._coolers = [] if self._mac else _coolers(classes)
        self._firmware_files = sorted(root.glob("sys/devices/platform/soc*/*firmware/get_throttled"))
        self._asks_firmware = not self._mac and self._ask_firmware() is not None
        self.readable = self.read() != Heat()

    def read(self) -> Heat:
        if self._mac:
            return Heat(flags=_mac_flags(self._command(("notifyutil", "-g", _PRESSURE))))
        temperatures = [value / 1000 for value in map(_number, self._temperatures) if value is not None]
        clocks = [value * 1000.0 for value in map(_number, self._clocks) if value is not None]
        bits = self._firmware()
        states = [value for value in map(_number, self._coolers) if value is not None]
        flags: frozenset[str] | None = None
        if bits is not None or states:
            flags = _named(bits or 0) | ({"cooling"} if any(state > 0 for state in states) else set())
        return Heat(
            temperature_c=max(temperatures, default=None),
            frequency_hz=max(clocks, default=None),
            flags=flags,
            since_boot=None if bits is None else _named(bits >> 16),
        )

    def _firmware(self) -> int | None:
        if self._asks_firmware:
            return self._ask_firmware()
        texts = [_text(path) for path in self._firmware_files]
        words = [int(text, 16) for text in texts if re.fullmatch(r"(0x)?[0-9a-fA-F]+", text)]
        return words[0] if words else None

    def _ask_firmware(self) -> int | None:
        match = re.search(r"throttled=0x([0-9a-fA-F]+)", self._command(("vcgencmd", "get_throttled")) or "")
        return int(match[1], 16) if match else None


def reasons(moments: Sequence[Heat]) -> list[str]:
    """Why a run with these moments in it, in order, was not at full speed; [] if nothing tells so."""
    seen = Counter(flag for moment in moments for flag in moment.flags or ())
    known = [moment.since_boot for moment in moments if moment.since_boot is not None]
    between = (known[-1] - known[0] if known else frozenset()) - set(seen)
    hottest = max((m.temperature_c for m in moments if m.temperature_c is not None), default=None)
    at = "" if hottest is None else f", at up to {hottest:.0f} C"
    found = [
        f"{said}; in {seen[flag]} of {len(moments)} samples{at}" for flag, said in FLAGS.items() if seen[flag]
    ]
    found += [f"{said}; between two samples{at}" for flag, said in FLAGS.items() if flag in between]
    return [*found, *_clock_fall(moments)]


def as_record(moments: Sequence[Heat]) -> dict[str, Any] | None:
    """Start, highest and end of the temperature, of the clock the lowest, and the flags seen; None for nothing."""
    temperatures = [m.temperature_c for m in moments if m.temperature_c is not None]
    clocks = [m.frequency_hz for m in moments if m.frequency_hz is not None]
    told = [m.flags for m in moments if m.flags is not None]
    if not (temperatures or clocks or told):
        return None
    return {
        "samples": len(moments),
        "temperature_c": {"start": temperatures[0], "max": max(temperatures), "end": temperatures[-1]}
        if temperatures
        else None,
        "frequency_hz": {"start": clocks[0], "min": min(clocks), "end": clocks[-1]} if clocks else None,
        "flags": sorted(frozenset().union(*told)) if told else None,
    }


def run_command(arguments: Sequence[str]) -> str | None:
    """What a program prints; None where it is missing, fails, or takes more than five seconds."""
    try:
        done = subprocess.run(
            arguments, capture_output=True, text=True, errors="replace", timeout=5, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _clock_fall(moments: Sequence[Heat]) -> list[str]:
    """The clock late in the run against early in it, both as medians of a third: single samples may be odd."""
    clocks = [m.frequency_hz for m in moments if m.frequency_hz]
    if len(clocks) < MIN_SAMPLES:
        return []
    third = len(clocks) // 3
    early, late = sorted(clocks[:third])[third // 2], sorted(clocks[-third:])[third // 2]
    drop = 1 - late / early
    if drop <= MAX_CLOCK_DROP:
        return []
    return [
        f"the clock fell by {drop:.1%} while it ran, from {early / 1e6:.0f} to {late / 1e6:.0f} MHz "
        f"(at most {MAX_CLOCK_DROP:.0%})"
    ]


def _temperatures(classes: Path) -> list[Path]:
    """Sensors of the processor: thermal zones, else hardware monitors."""
    zones = [(zone / "type", zone / "temp") for zone in sorted(classes.glob("thermal/thermal_zone*"))]
    monitors = [(each.parent / "name", each) for each in sorted(classes.glob("hwmon/hwmon*/temp*_input"))]
    for sensors in (zones, monitors):
        found = [reading for kind, reading in sensors if _PROCESSOR.search(_text(kind))]
        if any(_number(path) is not None for path in found):
            return found
    return []


def _coolers(classes: Path) -> list[Path]:
    """Cooling devices that slow the processor; fans are none."""
    devices = sorted(classes.glob("thermal/cooling_device*"))
    return [
        device / "cur_state"
        for device in devices
        if re.search(r"cpufreq|^Processor$", _text(device / "type"))
    ]


def _named(bits: int) -> frozenset[str]:
    return frozenset(name for bit, name in FIRMWARE_FLAGS.items() if bits >> bit & 1)


def _mac_flags(printed: str | None) -> frozenset[str] | None:
    """'com.apple.system.thermalpressurelevel 0'; 0 is nominal (OSThermalNotification.h)."""
    match = re.search(rf"^{re.escape(_PRESSURE)} (\d+)", printed or "", re.M)
    return None if match is None else frozenset(["thermal pressure"] if int(match[1]) else [])


def _number(path: Path) -> int | None:
    text = _text(path)
    return int(text) if re.fullmatch(r"-?\d+", text) else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
