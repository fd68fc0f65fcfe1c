"""Simulated bearings against closed forms: impact rate, RMS of the ringing, features, labels, determinism."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from edgeslm.errors import RecipeError
from edgeslm.specs import SimulateSpec
from edgeslm.stages import simulate
from edgeslm.stages.simulate import Bearing, Operation

if TYPE_CHECKING:
    from pathlib import Path

SPEC = SimulateSpec(units=4, life_s=120.0, warning_s=20.0)
FAULT_HZ = SPEC.fault_ratio * SPEC.shaft_hz
BEARING = Bearing(
    name="one", failure_s=64.0, growth_s=1e9, resonance_hz=700.0, decay_per_s=260.0, severity=2.0, gain=1.0
)
"""Its damage is 1 from the beginning: it grows so slowly."""


def steady(rows: int) -> Operation:
    return Operation(shaft_hz=np.full(rows, SPEC.shaft_hz), load=np.ones(rows))


def shaken(spec: SimulateSpec, bearing: Bearing, rows: int = 64) -> np.ndarray:
    return np.concatenate([*simulate.vibration(spec, bearing, steady(rows), np.random.default_rng(3))])


def test_ringing_is_the_sum_of_decaying_sines() -> None:
    random = np.random.default_rng(0)
    times, strengths = np.sort(random.uniform(0, 0.5, 40)), random.uniform(0.5, 2, 40)
    found = simulate.ringing(times, strengths, BEARING, start_s=0.125, samples=700, sample_hz=2048.0)
    moments = 0.125 + np.arange(700) / 2048
    since = moments[:, None] - times
    answers = np.exp(-260 * since) * np.sin(2 * np.pi * 700 * since)
    assert np.allclose(found, (np.where(since > 0, answers, 0) * strengths).sum(axis=1), atol=1e-9)


@pytest.mark.parametrize(("rate_hz", "decay_per_s"), [(20.0, 260.0), (89.25, 700.0)])
def test_rms_of_a_train_of_decaying_resonances_is_the_closed_form(rate_hz: float, decay_per_s: float) -> None:
    bearing = replace(BEARING, decay_per_s=decay_per_s)
    times = np.arange(0, 40, 1 / rate_hz)
    strength = np.full(len(times), simulate.impact_strength(bearing, rate_hz))
    found = simulate.ringing(times, strength, bearing, start_s=1.0, samples=36 * 4096, sample_hz=4096.0)
    assert np.sqrt(np.mean(found**2)) == pytest.approx(1.0, rel=0.01)


def test_impacts_come_fault_ratio_times_a_turn_and_slip_a_little() -> None:
    speeds = np.linspace(20, 30, 600)
    operation = Operation(shaft_hz=speeds, load=np.ones(600))
    times = simulate.impact_times(SPEC, operation, np.random.default_rng(1))
    turns = float(speeds.sum())
    assert len(times) == pytest.approx(turns * SPEC.fault_ratio, abs=1)
    first, last = (times < 60).sum(), (times > 540).sum()
    assert first == pytest.approx(speeds[:60].sum() * SPEC.fault_ratio, abs=2)
    assert last == pytest.approx(speeds[540:].sum() * SPEC.fault_ratio, abs=2)
    gaps = np.diff(simulate.impact_times(SPEC, steady(600), np.random.default_rng(1))) * FAULT_HZ
    assert gaps.mean() == pytest.approx(1.0, abs=1e-4)
    assert gaps.std() == pytest.approx(simulate.SLIP * math.sqrt(2), rel=0.05)


def test_the_envelope_shows_the_impact_rate_of_a_damaged_bearing_only() -> None:
    damaged = simulate.envelope_spectrum(shaken(SPEC, BEARING), SPEC.sample_hz).mean(axis=0)
    healthy = simulate.envelope_spectrum(
        shaken(SPEC, replace(BEARING, failure_s=1e12, growth_s=1.0)), SPEC.sample_hz
    ).mean(axis=0)
    # Bins are 1 Hz wide; up to 3 Hz are the window's own.
    assert 3 + damaged[3:].argmax() == pytest.approx(FAULT_HZ, abs=1)
    for harmonic in (1, 2):
        near = slice(round(harmonic * FAULT_HZ) - 1, round(harmonic * FAULT_HZ) + 2)
        assert damaged[near].max() > 3 * np.median(damaged[3:300])
        assert healthy[near].max() < 1.3 * np.median(healthy[3:300])


def test_a_modulated_tone_has_the_envelope_of_the_closed_form() -> None:
    seconds, depth = np.arange(2048) / 2048, 0.4
    tone = (1 + depth * np.cos(2 * np.pi * 64 * seconds)) * np.cos(2 * np.pi * 700 * seconds)
    # (1 + m cos)^2 = 1 + m^2/2 + 2m cos(wt) + m^2/2 cos(2wt)
    mean = 1 + depth**2 / 2
    spectrum = simulate.envelope_spectrum(tone[None], 2048.0)[0]
    assert spectrum[64] == pytest.approx(2 * depth / mean, rel=1e-3)
    assert spectrum[128] == pytest.approx(depth**2 / 2 / mean, rel=1e-3)
    features = simulate.features(tone[None], 2048.0, np.array([63.4]))[0]
    assert features[-3:] == pytest.approx([2 * depth / mean, depth**2 / 2 / mean, 0], rel=1e-3, abs=1e-3)


def test_features_of_a_sine_and_of_noise_are_the_closed_forms() -> None:
    seconds = np.arange(2048) / 2048
    sine = 3 * np.sin(2 * np.pi * 100 * seconds + 0.1)
    rms, kurtosis, crest, *bands = simulate.features(sine[None], 2048.0, np.array([89.0]))[0][:7]
    assert rms == pytest.approx(3 / math.sqrt(2))
    assert kurtosis == pytest.approx(1.5)
    assert crest == pytest.approx(math.sqrt(2), rel=1e-3)
    assert bands == pytest.approx([3 / math.sqrt(2), 0, 0, 0], abs=1e-9)
    noise = np.random.default_rng(0).standard_normal((400, 2048))
    table = simulate.features(noise, 2048.0, np.full(400, 89.0))
    assert table[:, :2].mean(axis=0) == pytest.approx([1, 3], rel=0.01)
    assert (table[:, 3:7] ** 2).sum(axis=1) == pytest.approx(table[:, 0] ** 2)  # Parseval


def test_the_healthy_signal_has_deviation_1_and_the_impacts_add_their_power() -> None:
    quiet = replace(SPEC, noise=0.0)
    healthy = shaken(quiet, replace(BEARING, failure_s=1e12, growth_s=1.0))
    assert healthy.std() == pytest.approx(1.0, rel=0.01)
    assert shaken(SPEC, BEARING).std() == pytest.approx(math.sqrt(1 + 1 + 2.0**2), rel=0.05)
    assert shaken(SPEC, replace(BEARING, gain=0.5)).std() == pytest.approx(math.sqrt(6) / 2, rel=0.05)


def test_vibration_does_not_depend_on_where_its_blocks_end(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = replace(SPEC, noise=0.0)
    rung = replace(BEARING, severity=1e6)  # all else is rounding beside the impacts
    whole = shaken(silent, rung)
    monkeypatch.setattr(simulate, "BLOCK_ROWS", 7)
    assert np.abs(shaken(silent, rung) - whole).max() < 2e-5 * np.abs(whole).max()


def test_damage_grows_e_fold_to_1_at_the_failure() -> None:
    bearing = replace(BEARING, failure_s=100.0, growth_s=10.0)
    assert bearing.damage(np.array([100.0, 90.0, 70.0])) == pytest.approx([1, math.exp(-1), math.exp(-3)])


def test_temperature_settles_where_load_puts_it() -> None:
    found = simulate.temperatures(
        replace(BEARING, failure_s=1e12, growth_s=1.0), steady(900), np.random.default_rng(0)
    )
    assert found[600:].mean() == pytest.approx(45.0, abs=0.1)


def test_lives_have_the_mean_that_is_asked_for() -> None:
    lives = [simulate.draw_bearing(replace(SPEC, life_s=600.0), number).failure_s for number in range(600)]
    assert np.mean(lives) == pytest.approx(600, rel=0.03)
    assert min(lives) >= 0.4 * 600


def read(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_tables_end_with_the_known_failure_and_say_so_in_time(tmp_path: Path) -> None:
    done = simulate.run(SPEC, tmp_path)
    train, heldout = read(done.train), read(done.heldout)
    assert {row["unit"] for row in train} == {"bearing-01", "bearing-02", "bearing-03"}
    assert {row["unit"] for row in heldout} == {"bearing-04"}
    columns = simulate.COLUMNS
    assert list(train[0]) == [columns.unit, columns.time, *columns.channels, columns.label]
    for name, failure_s in done.failures.items():
        rows = [row for row in train + heldout if row["unit"] == name]
        times = [float(row["time_s"]) for row in rows]
        assert times == list(range(1, int(failure_s) + 1))
        assert [row["label"] for row in rows] == [
            "failure" if time > failure_s - SPEC.warning_s else "normal" for time in times
        ]
        assert all(math.isfinite(float(row[channel])) for row in rows for channel in columns.channels)
        rms = np.array([float(row["rms"]) for row in rows])
        assert rms[-5:].mean() > 1.15 * rms[:20].mean()
    kept = json.loads((tmp_path / "bearings.json").read_text())
    assert [one["failure_s"] for one in kept["bearings"]] == list(done.failures.values())


def test_a_bearing_depends_on_the_seed_and_its_number_only(tmp_path: Path) -> None:
    first = simulate.run(SPEC, tmp_path / "a")
    again = simulate.run(SPEC, tmp_path / "b")
    assert first.train.read_bytes() == again.train.read_bytes()
    assert first.heldout.read_bytes() == again.heldout.read_bytes()
    more = simulate.run(replace(SPEC, units=6), tmp_path / "c")
    assert more.train.read_bytes().startswith(first.train.read_bytes())
    other = simulate.run(replace(SPEC, seed=1), tmp_path / "d")
    assert other.failures != first.failures


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"units": 1}, "none is left to train on"),
        ({"sample_hz": 512.0}, "can't be told apart"),
        ({"shaft_hz": 0.5}, "too few for rows"),
        ({"warning_s": 60.0}, "no healthy time"),
    ],
)
def test_a_simulation_that_shows_nothing_is_refused(change: dict[str, float], message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        simulate.check(replace(SPEC, **change))
    assert caught.value.hint
