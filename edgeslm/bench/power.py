"""Energy: what this machine can tell of the power it takes, and how much of it fell into a span of time.

A counter of energy (RAPL) is exact between two readings.  A reading of power (the Raspberry Pi 5's power
management chip, macOS' powermetrics, a meter's log) is integrated by the trapezoidal rule over readings that
lie within the span; with too few of them there is no number.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.bench.thermal import run_command

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edgeslm.bench.thermal import Command

MAX_GAP = 1 / 3
"""Longest part of a span without a reading of power: three evenly spread readings are enough."""
MIN_SPAN_S = 0.1
"""Below this, RAPL's steps of a millisecond and the readings' own time show."""
_ROOT = Path("/")
_POWERMETRICS = ("powermetrics", "--samplers", "cpu_power,gpu_power", "-i", "500", "-n", "1")
_DOMAINS = re.compile(r"package-\d+|dram")
"""Domains of RAPL that do not contain one another: core and uncore are parts of the package."""


@dataclass(frozen=True, kw_only=True)
class Meter:
    """A source of energy readings.  read: joules so far if cumulative, else watts now; None: nothing this time."""

    source: str
    """rapl, pmic, powermetrics or log."""
    covers: str
    """What the number is about, in words: never the same on two kinds of machine."""
    cumulative: bool
    read: Callable[[], float | None]


@dataclass(frozen=True, kw_only=True)
class Energy:
    """Energy of a span of time."""

    joules: float
    seconds: float
    samples: int
    """Readings within the span."""
    max_w: float | None

    @property
    def mean_w(self) -> float:
        return self.joules / self.seconds


def find_meter(
    root: Path = _ROOT,
    *,
    system: str = sys.platform,
    command: Command = run_command,
    privileged: bool | None = None,
) -> tuple[Meter | None, str | None]:
    """The meter of this machine, or None and, where one is there but can't be read, how that can be changed.

    privileged: whether programs that need root work; None: whether this process is root's.
    """
    if system == "darwin":
        privileged = os.geteuid() == 0 if privileged is None else privileged
        if privileged and parse_powermetrics(command(_POWERMETRICS)) is not None:
            return Meter(
                source="powermetrics", covers="processor, graphics and neural engine, as macOS estimates them",
                cumulative=False, read=lambda: parse_powermetrics(command(_POWERMETRICS)),
            ), None  # fmt: skip
        return None, (
            "macOS tells its power only to root: in another terminal, "
            "sudo powermetrics --samplers cpu_power,gpu_power -i 1000 > power.txt, and give --power-log power.txt"
        )
    zones = sorted(root.glob("sys/class/powercap/intel-rapl:*"))  # intel-rapl-mmio repeats the package
    rapl = Rapl([zone for zone in zones if _DOMAINS.fullmatch(_text(zone / "name") or "")])
    if rapl.zones and rapl.read() is not None:
        return Meter(source="rapl", covers=", ".join(rapl.names), cumulative=True, read=rapl.read), None
    if _pmic(command) is not None:
        return Meter(
            source="pmic", covers="the board's own rails, without USB ports and losses of the supply",
            cumulative=False, read=lambda: _pmic(command),
        ), None  # fmt: skip
    if rapl.zones:
        return None, f"{rapl.zones[0] / 'energy_uj'} is for root only: sudo chmod a+r on it shows the energy"
    return None, None


class Rapl:
    """Counters of Linux' powercap as one sum in joules; a counter that starts again at 0 is followed.

    A counter wraps after an hour or less of load (max_energy_range_uj); it is read each second.
    """

    def __init__(self, zones: Sequence[Path]) -> None:
        self.zones = list(zones)
        self.names = [_text(zone / "name") or zone.name for zone in self.zones]
        self._ranges = [int(_text(zone / "max_energy_range_uj") or 0) for zone in self.zones]
        self._last: list[int] = []
        self._turns_uj = 0

    def read(self) -> float | None:
        """Joules; None if a counter can't be read."""
        texts = [_text(zone / "energy_uj") for zone in self.zones]
        if not texts or not all(text and text.isdigit() for text in texts):
            return None
        now = [int(text) for text in texts if text]
        for before, after, whole in zip(self._last, now, self._ranges, strict=False):
            self._turns_uj += whole if after < before else 0
        self._last = now
        return (sum(now) + self._turns_uj) / 1e6


def parse_pmic(printed: str | None) -> float | None:
    """Watts of all rails for which `vcgencmd pmic_read_adc` tells current and voltage; None if it tells none.

    Lines such as 'VDD_CORE_A current(7)=1.428A' and 'VDD_CORE_V volt(15)=0.906V'; rails pair by name, not by
    number.  The 5 V input and the battery have a voltage alone.
    """
    lines = re.findall(r"^\s*(\w+)_([AV]) (?:current|volt)\(\d+\)=([\d.]+)[AV]\s*$", printed or "", re.M)
    values: dict[str, dict[str, float]] = {"A": {}, "V": {}}
    for rail, kind, value in lines:
        if value.count(".") < 2:
            values[kind][rail] = float(value)
    rails = set(values["A"]) & set(values["V"])
    return sum(values["A"][rail] * values["V"][rail] for rail in rails) if rails else None


def parse_powermetrics(printed: str | None) -> float | None:
    """Watts of one sample: the combined line, else the sum of the parts; None without either.

    A second GPU line, of the sampler gpu_power, repeats the first.
    """
    found = re.findall(r"^(Combined|CPU|GPU|ANE) Power[^:\n]*: ([\d.]+) (m?W)\s*$", printed or "", re.M)
    watts: dict[str, float] = {}
    for part, value, unit in found:
        watts.setdefault(part, float(value) * (1e-3 if unit == "mW" else 1.0))
    return watts["Combined"] if "Combined" in watts else sum(watts.values()) if watts else None


def energy_between(
    times_s: Sequence[float], readings: Sequence[float], start_s: float, end_s: float, *, cumulative: bool
) -> Energy | None:
    """Energy between two times; None where the readings don't say.

    times_s, readings: [N], in order of time.  cumulative: the readings are joules so far, and linear between
    two; else watts, which must lie within the span (see MAX_GAP) and hold on to its ends.
    """
    times, values = np.asarray(times_s, float), np.asarray(readings, float)
    span = end_s - start_s
    inside = (times > start_s) & (times < end_s)
    if span < MIN_SPAN_S or not len(times):
        return None
    if cumulative:
        if times[0] > start_s or times[-1] < end_s:
            return None
        first, last = np.interp([start_s, end_s], times, values)
        steps = np.diff(times)
        long = steps >= MIN_SPAN_S
        within = long & (times[:-1] >= start_s) & (times[1:] <= end_s)
        rates = np.diff(values)[within] / steps[within]
        return Energy(
            joules=float(last - first), seconds=span, samples=int(inside.sum()),
            max_w=float(rates.max()) if len(rates) else None,
        )  # fmt: skip
    own, watts = times[inside], values[inside]
    if not len(own) or np.diff([start_s, *own, end_s]).max() > MAX_GAP * span * (1 + 1e-6):
        return None
    ends, held = np.array([start_s, *own, end_s]), np.array([watts[0], *watts, watts[-1]])
    joules = float(np.sum(np.diff(ends) * (held[1:] + held[:-1]) / 2))
    return Energy(joules=joules, seconds=span, samples=len(own), max_w=float(watts.max()))


def energy_record(energy: Energy | None, source: str, work: float, unit: str) -> dict[str, Any] | None:
    """A run's energy, and the share of one unit of its work (token, example); None without energy."""
    if energy is None:
        return None
    return {
        "source": source,
        "energy_j": energy.joules,
        "seconds": energy.seconds,
        "samples": energy.samples,
        "mean_w": energy.mean_w,
        "max_w": energy.max_w,
        f"joules_per_{unit}": energy.joules / work if work else None,
    }


def _pmic(command: Command) -> float | None:
    return parse_pmic(command(("vcgencmd", "pmic_read_adc")))


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return None
