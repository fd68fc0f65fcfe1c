"""Whether a measurement can be trusted: what else the machine did meanwhile, and whether it slowed down.

A benchmark that averages over a throttled or shared processor reports a number that nobody can repeat.
Here it says so instead, with the numbers.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING

import psutil

from edgeslm.device import probe

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_SPREAD = 0.10
"""Standard deviation between repetitions, as a share of their mean."""
MAX_FREQUENCY_DROP = 0.10
MAX_OTHER_CORES = 0.5
MIN_WALL_S = 0.2
"""Below this, the kernel's 10 ms ticks say nothing of the load."""
_ROOT = Path("/")


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """The machine at one moment; None where it can't be read."""

    wall_s: float
    own_s: float
    """CPU seconds of this process so far, all threads."""
    busy_s: float | None
    """CPU seconds that the cores open to this process have worked for anyone, or were kept by a hypervisor."""
    frequency_hz: float | None
    throttle_events: int | None
    """Times the processor was slowed for heat so far (x86)."""
    throttled: bool | None
    """Whether heat or low voltage slows it right now (Raspberry Pi)."""
    emulated: bool | None


def observe(root: Path = _ROOT) -> Conditions:
    """Conditions now; a few milliseconds, so never within a timed section."""
    machine = probe(root)
    return Conditions(
        wall_s=time.monotonic(),
        own_s=time.process_time(),
        busy_s=busy_seconds(root, _allowed_cores(), machine["usable_cores"]),
        frequency_hz=machine["frequency_hz"],
        throttle_events=throttle_events(root),
        throttled=throttled_now(root),
        emulated=machine["emulated"],
    )


def reasons(samples_s: Sequence[float], before: Conditions, after: Conditions) -> list[str]:
    """Why repetitions that took samples_s between `before` and `after` are not valid; [] if they are."""
    return [
        *_spread(samples_s),
        *_other_load(before, after),
        *_frequency(before, after),
        *_throttling(before, after),
        *(
            ["the instructions are translated by software: no speed of this machine"]
            if after.emulated
            else []
        ),
    ]


def _spread(samples_s: Sequence[float]) -> list[str]:
    if len(samples_s) < 2:
        return []
    spread = stdev(samples_s) / fmean(samples_s)
    if spread <= MAX_SPREAD:
        return []
    return [
        f"repetitions differ by {spread:.1%} (standard deviation over mean, at most {MAX_SPREAD:.0%}): "
        f"{min(samples_s):.4g} to {max(samples_s):.4g} s"
    ]


def _other_load(before: Conditions, after: Conditions) -> list[str]:
    """Load of others by accounting, not by the load average: that one lags by a minute and holds our own."""
    wall, own = after.wall_s - before.wall_s, after.own_s - before.own_s
    if before.busy_s is None or after.busy_s is None or wall < MIN_WALL_S:
        return []
    others = (after.busy_s - before.busy_s - own) / wall
    if others <= MAX_OTHER_CORES:
        return []
    return [f"other processes kept {others:.2f} cores busy (at most {MAX_OTHER_CORES})"]


def _frequency(before: Conditions, after: Conditions) -> list[str]:
    if not before.frequency_hz or not after.frequency_hz:
        return []
    drop = 1 - after.frequency_hz / before.frequency_hz
    if drop <= MAX_FREQUENCY_DROP:
        return []
    return [
        f"the clock fell by {drop:.1%}, from {before.frequency_hz / 1e6:.0f} to {after.frequency_hz / 1e6:.0f} MHz "
        f"(at most {MAX_FREQUENCY_DROP:.0%})"
    ]


def _throttling(before: Conditions, after: Conditions) -> list[str]:
    found = []
    if before.throttle_events is not None and after.throttle_events is not None:
        count = after.throttle_events - before.throttle_events
        found += [f"the processor throttled {count} times for heat"] if count > 0 else []
    if before.throttled or after.throttled:
        found.append("the firmware slows the processor for heat or low voltage: better cooling or supply")
    return found


def busy_seconds(root: Path, cores: frozenset[int] | None, usable: int | None) -> float | None:
    """CPU seconds spent on `cores` (None: all) since boot, by anyone; None where others can't be told apart.

    A control group's quota leaves a share of cores that also serve others, whose work there is no interference.
    """
    if cores is not None and usable is not None and usable < len(cores):
        return None
    try:
        lines = (root / "proc/stat").read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        times = psutil.cpu_times() if sys.platform == "darwin" else None
        return None if times is None else times.user + times.system + times.nice
    total = 0
    for line in lines:
        name, *fields = line.split()
        if name[:3] == "cpu" and name[3:].isdigit() and (cores is None or int(name[3:]) in cores):
            user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
            total += user + nice + system + irq + softirq + steal
    return total / os.sysconf("SC_CLK_TCK") if total else None


def throttle_events(root: Path = _ROOT) -> int | None:
    """Sum of the x86 kernel's counters of thermal throttling, or None."""
    counters = root.glob("sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/*_throttle_count")
    counts = [int(text) for text in map(_read, counters) if text.isdigit()]
    return sum(counts) if counts else None


def throttled_now(root: Path = _ROOT) -> bool | None:
    """The lower four bits of the Raspberry Pi firmware's get_throttled: low voltage, capped, throttled, hot."""
    texts = [_read(path) for path in root.glob("sys/devices/platform/soc/*firmware/get_throttled")]
    bits = [int(text, 16) & 0xF for text in texts if text]
    return any(bits) if bits else None


def _allowed_cores() -> frozenset[int] | None:
    return frozenset(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace").strip()
    except OSError:
        return ""
