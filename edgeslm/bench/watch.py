"""Power and heat beside a benchmark: samples by the clock, and what they say of each run.

A thread reads the meter and the sensors once a second: some tenths of a millisecond, on a Raspberry Pi two
short commands of a few.  Where nothing can be read there is no thread.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from edgeslm.bench import interference, thermal
from edgeslm.bench.power import Energy, Meter, energy_between, energy_record, find_meter
from edgeslm.bench.thermal import Heat, Sensors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import TracebackType

    from edgeslm.bench.interference import Conditions

INTERVAL_S = 1.0
JOIN_S = 10.0
"""Longest wait for a command that was under way when the benchmark ended."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    at_s: float
    """By the monotonic clock, as Conditions.wall_s."""
    reading: float | None
    """Joules so far or watts, as the meter has it."""
    heat: Heat


@dataclass(kw_only=True)
class Watch:
    """Samples the machine while it is entered.  monotonic, unix: clocks; a test gives others."""

    meter: Meter | None = None
    sensors: Sensors | None = None
    interval_s: float = INTERVAL_S
    monotonic: Callable[[], float] = time.monotonic
    unix: Callable[[], float] = time.time
    conditions: Callable[[], Conditions] = interference.observe
    samples: list[Sample] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._marks: list[float] = []

    def __enter__(self) -> Watch:
        if self.meter is not None or (self.sensors is not None and self.sensors.readable):
            self._thread = threading.Thread(target=self._run, name="edgeslm-watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(JOIN_S)

    def _run(self) -> None:
        while not self._stopped.wait(self.interval_s):
            self.sample()

    def sample(self) -> Sample:
        """Read everything once, now."""
        with self._lock:
            now = self.monotonic()
            sample = Sample(
                at_s=now,
                reading=None if self.meter is None else self.meter.read(),
                heat=Heat() if self.sensors is None else self.sensors.read(),
            )
            self.samples.append(sample)
        return sample

    def observe(self) -> Conditions:
        """interference.observe with a sample: the start or end of a run.

        Where the sensors name what slows the processor, the conditions don't say it a second time.
        """
        sample = self.sample()
        self._marks.append(sample.at_s)
        conditions = self.conditions()
        known = conditions.throttled if sample.heat.flags is None else None
        return replace(conditions, wall_s=sample.at_s, throttled=known)

    def complete(self, run: Mapping[str, Any]) -> dict[str, Any]:
        """A run with its times, energy and heat, and what slowed it as reasons; it lay between the last two observe.

        Its work is what it counts itself: tokens or calls of a batch, times repetitions.
        """
        start, end = self._marks[-2:]
        predicts = run.get("kind") == "predict"
        unit = "example" if predicts else "token"
        count = (run.get("calls") or 0) * (run.get("batch") or 0) if predicts else run.get("tokens") or 0
        work = count * (run.get("repetitions") or 0)
        return dict(run) | self.facts(start, end, work, unit, run.get("reasons") or ())

    def facts(
        self, start_s: float, end_s: float, work: float, unit: str, reasons: Any = ()
    ) -> dict[str, Any]:
        """Times since 1970, power, thermal, valid and reasons of the span."""
        moments = self.moments(start_s, end_s)
        offset = self.unix() - self.monotonic()
        said = [*reasons, *thermal.reasons(moments)]
        source = "" if self.meter is None else self.meter.source
        return {
            "started_unix_s": start_s + offset,
            "ended_unix_s": end_s + offset,
            "power": energy_record(self.energy(start_s, end_s), source, work, unit),
            "thermal": thermal.as_record(moments),
            "valid": not said,
            "reasons": said,
        }

    def moments(self, start_s: float, end_s: float) -> list[Heat]:
        with self._lock:
            return [sample.heat for sample in self.samples if start_s <= sample.at_s <= end_s]

    def energy(self, start_s: float, end_s: float) -> Energy | None:
        if self.meter is None:
            return None
        with self._lock:
            known = [(sample.at_s, sample.reading) for sample in self.samples if sample.reading is not None]
        times, readings = [at for at, _ in known], [reading for _, reading in known]
        return energy_between(times, readings, start_s, end_s, cumulative=self.meter.cumulative)

    def as_record(self) -> dict[str, Any] | None:
        """Where the energy is from, for the whole record; None without a meter."""
        if self.meter is None:
            return None
        return {"source": self.meter.source, "covers": self.meter.covers, "interval_s": self.interval_s}


def watch_machine(note: Callable[[str], None]) -> Watch:
    """A watch with all that this machine has; what it has and does not show is told to `note`."""
    meter, hint = find_meter()
    if hint is not None:
        note(f"bench: no energy: {hint}")
    return Watch(meter=meter, sensors=Sensors())
