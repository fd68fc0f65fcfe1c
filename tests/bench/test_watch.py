"""Samples beside a run: which belong to it, what they add to it, and that the thread comes and goes."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Any

import pytest

from edgeslm.bench import watch as watching
from edgeslm.bench.interference import Conditions
from edgeslm.bench.power import Meter
from edgeslm.bench.thermal import Heat
from edgeslm.bench.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Callable

CALM = Conditions(
    wall_s=5.0, own_s=0.0, busy_s=None, frequency_hz=None, throttle_events=None, throttled=True, emulated=False
)  # fmt: skip


class Room:
    """A machine whose clock, power and heat a test sets."""

    def __init__(self, *, flags: frozenset[str] | None = frozenset()) -> None:
        self.now_s, self.joules, self.watts = 100.0, 0.0, 4.0
        self.heat = Heat(temperature_c=50.0, frequency_hz=2e9, flags=flags)
        self.readable = True

    def read(self) -> Heat:
        return self.heat

    def watch(self, *, cumulative: bool = True, meter: bool = True) -> Watch:
        def reading() -> float:
            return self.joules if cumulative else self.watts

        source: Callable[[], float | None] = reading
        made = Meter(source="rapl", covers="package-0", cumulative=cumulative, read=source) if meter else None
        sensors: Any = self
        return Watch(
            meter=made, sensors=sensors, monotonic=lambda: self.now_s, unix=lambda: self.now_s + 1_000_000.0,
            conditions=lambda: CALM,
        )  # fmt: skip

    def work(self, seconds: float, watts: float) -> None:
        self.now_s += seconds
        self.joules += seconds * watts
        self.watts = watts


RUN = {"kind": "decode", "tokens": 10, "repetitions": 4, "valid": True, "reasons": []}


def test_a_run_gets_the_energy_between_its_ends() -> None:
    room = Room()
    watch = room.watch()
    watch.sample()
    room.work(50, 1.0)
    watch.observe()
    room.work(20, 6.0)
    watch.observe()
    room.work(50, 1.0)
    watch.sample()
    run = watch.complete(RUN)
    assert run["power"] == {
        "source": "rapl", "energy_j": pytest.approx(120.0), "seconds": 20.0, "samples": 0,
        "mean_w": pytest.approx(6.0), "max_w": pytest.approx(6.0), "joules_per_token": pytest.approx(3.0),
    }  # fmt: skip
    assert (run["started_unix_s"], run["ended_unix_s"]) == (1_000_150.0, 1_000_170.0)
    assert run["thermal"]["samples"] == 2
    assert run["valid"]
    assert watch.as_record() == {"source": "rapl", "covers": "package-0", "interval_s": 1.0}


def test_power_is_of_the_samples_within_the_run() -> None:
    room = Room()
    watch = room.watch(cumulative=False)
    watch.observe()  # idle still
    for watts in (7.0, 7.0, 7.0, 7.0):
        room.work(1, watts)
        watch.sample()
    room.work(1, 2.0)
    watch.observe()
    run = watch.complete(RUN | {"kind": "predict", "calls": 5, "batch": 2})
    assert run["power"]["energy_j"] == pytest.approx(35.0)
    assert run["power"]["joules_per_example"] == pytest.approx(35 / 40)


def test_what_slows_the_machine_spoils_the_run_it_falls_into() -> None:
    room = Room()
    watch = room.watch(meter=False)
    watch.observe()
    room.work(1, 1)
    watch.observe()
    calm = watch.complete(RUN)
    room.work(1, 1)
    watch.observe()
    room.work(1, 1)
    room.heat = Heat(flags=frozenset({"throttled"}), temperature_c=85.0)
    watch.sample()
    room.work(1, 1)
    room.heat = Heat(flags=frozenset(), temperature_c=84.0)
    watch.observe()
    hot = watch.complete(RUN | {"reasons": ["something else"]})
    assert (calm["valid"], calm["power"]) == (True, None)
    assert hot["valid"] is False
    assert hot["reasons"] == [
        "something else",
        "the firmware throttled the processor; in 1 of 3 samples, at up to 85 C",
    ]
    assert hot["thermal"]["flags"] == ["throttled"]
    assert watch.as_record() is None


def test_flags_that_are_named_are_not_told_twice() -> None:
    named = Room().watch().observe()
    assert (named.throttled, named.wall_s) == (None, 100.0)
    assert Room(flags=None).watch().observe().throttled is True


def test_the_thread_samples_while_it_is_entered_and_only_then() -> None:
    before = threading.active_count()
    room: Any = Room()
    with Watch(sensors=room, interval_s=0.01, conditions=lambda: CALM) as watch:
        deadline = time.monotonic() + 10
        while len(watch.samples) < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
    seen = len(watch.samples)
    assert seen >= 3
    assert threading.active_count() == before
    time.sleep(0.05)
    assert len(watch.samples) == seen


def test_no_thread_where_nothing_can_be_read() -> None:
    room: Any = Room()
    room.readable = False
    before = threading.active_count()
    with Watch(sensors=room, interval_s=0.001):
        assert threading.active_count() == before


def test_a_meter_that_cannot_be_read_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    monkeypatch.setattr(watching, "find_meter", lambda: (None, "do this"))
    assert watching.watch_machine(notes.append).meter is None
    assert notes == ["bench: no energy: do this"]
