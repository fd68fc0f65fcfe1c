"""Bearings that wear out: vibration simulated from the physics, and what a sensor node reports of it each second.

A spall on the outer race is struck by each rolling element that passes, `fault_ratio` times a turn; each
impact rings the housing, a damped oscillator, in proportion to load and damage (McFadden & Smith 1984,
J. Sound Vib. 96(1), "Model for the vibration produced by a single point defect in a rolling element
bearing").  The time between impacts varies a little, since the elements slip (Randall & Antoni 2011,
Mech. Syst. Signal Process. 25(2), "Rolling element bearing diagnostics - a tutorial").  Damage grows
exponentially until the bearing fails (Gebraeel et al. 2005, IIE Trans. 37(6)); lives follow Weibull's law.

R rows (seconds), N samples of a row, K impacts, C channels.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgeslm.atomic import atomic_write, replacing
from edgeslm.errors import RecipeError
from edgeslm.progress import Progress, Quiet
from edgeslm.specs import ColumnsSpec, SimulateSpec

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    Array = NDArray[np.float64]

ROW_S = 1.0
"""Time that a row sums up, and from one row to the next."""
HARMONICS = 3
BANDS = 4
CHANNELS = (
    "rms",
    "kurtosis",
    "crest",
    *(f"band_{i + 1}" for i in range(BANDS)),
    *(f"envelope_{i + 1}" for i in range(HARMONICS)),
    "shaft_hz",
    "load",
    "temperature_c",
)
COLUMNS = ColumnsSpec(
    label="label", labels=("normal", "failure"), channels=CHANNELS, time="time_s", unit="unit"
)
DEMODULATED = (0.25, 0.45)
"""Band of the envelope analysis, in shares of the sampling rate: around the housing's resonance."""
SLIP = 0.01
"""Deviation of the time between two impacts, as a share of it; Randall & Antoni give 1 to 2 %."""
WEIBULL_SLOPE = 4.0
SHORTEST_LIFE = 0.4
"""Share of the mean life; a bearing that would fail sooner was rejected when it was run in."""
BLOCK_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class Bearing:
    """What sets one bearing apart from the others of its kind."""

    name: str
    failure_s: float
    growth_s: float
    """Time in which the damage grows e-fold."""
    resonance_hz: float
    decay_per_s: float
    """Rate at which the housing's ringing dies away: damping ratio times angular frequency."""
    severity: float
    """RMS of the impacts at failure, against that of the healthy signal."""
    gain: float
    """Of the sensor and its mounting."""

    def damage(self, time_s: Array) -> Array:
        """1 at the failure, e-fold less each `growth_s` before."""
        return np.asarray(np.exp((time_s - self.failure_s) / self.growth_s))


@dataclass(frozen=True, kw_only=True)
class Operation:
    """How a machine is run, per row: [R] each."""

    shaft_hz: Array
    load: Array
    """1 is the usual load."""


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """Tables of all bearings: one row a second until the failure, columns as COLUMNS names them."""

    train: Path
    heldout: Path
    bearings: tuple[Bearing, ...]

    @property
    def failures(self) -> dict[str, float]:
        """unit -> when it failed, in the table's seconds."""
        return {bearing.name: bearing.failure_s for bearing in self.bearings}


def run(spec: SimulateSpec, out: Path, *, progress: Progress | None = None) -> Simulated:
    """Write train.csv, heldout.csv (the last quarter of the bearings) and bearings.json into `out`.

    A bearing depends on the seed and its own number only.  Raises RecipeError for physics that the
    sampling rate can't show, and for too few bearings; EdgeslmError when the files can't be written.
    """
    check(spec)
    bearings = tuple(draw_bearing(spec, number) for number in range(spec.units))
    held = max(1, spec.units // 4)
    paths = {"train": out / "train.csv", "heldout": out / "heldout.csv"}
    parts = {"train": range(spec.units - held), "heldout": range(spec.units - held, spec.units)}
    with (progress or Quiet()).task("simulate", spec.units, "bearings") as advance:
        for name, path in paths.items():
            with replacing(path) as beside, beside.open("w", encoding="utf-8", newline="") as file:
                writer = csv.writer(file, lineterminator="\n")
                writer.writerow(("unit", "time_s", *CHANNELS, "label"))
                for number in parts[name]:
                    writer.writerows(_lines(spec, bearings[number], number))
                    advance(1)
    record = {"spec": asdict(spec), "bearings": [asdict(bearing) for bearing in bearings]}
    atomic_write(out / "bearings.json", json.dumps(record, indent=2) + "\n")
    return Simulated(train=paths["train"], heldout=paths["heldout"], bearings=bearings)


def check(spec: SimulateSpec) -> None:
    """Raise RecipeError for a simulation that can't show what it is for."""
    impacts = spec.shaft_hz * spec.fault_ratio
    width = (DEMODULATED[1] - DEMODULATED[0]) * spec.sample_hz
    if spec.units < 2:
        raise RecipeError(
            f"{spec.units} bearings: none is left to train on",
            hint="give units = 4 or more: a quarter is held out",
        )
    if impacts * HARMONICS >= width:
        needed = impacts * HARMONICS / (DEMODULATED[1] - DEMODULATED[0])
        raise RecipeError(
            f"{impacts:.1f} impacts a second can't be told apart at {spec.sample_hz:g} samples a second",
            hint=f"give sample_hz above {needed:.0f}, or a slower shaft",
        )
    if impacts * ROW_S < 2 * HARMONICS:
        raise RecipeError(
            f"{impacts:.2f} impacts a second are too few for rows of {ROW_S:g} s", hint="give a faster shaft"
        )
    if spec.life_s * SHORTEST_LIFE <= spec.warning_s:
        raise RecipeError(
            f"a warning {spec.warning_s:g} s before the failure leaves short lives around {spec.life_s:g} s no "
            "healthy time",
            hint=f"give warning_s below {spec.life_s * SHORTEST_LIFE:g}",
        )


def draw_bearing(spec: SimulateSpec, number: int) -> Bearing:
    """The `number`-th bearing of a seed."""
    random = np.random.default_rng([spec.seed, number, 0])
    mean = math.gamma(1 + 1 / WEIBULL_SLOPE)
    life = max(float(random.weibull(WEIBULL_SLOPE)) / mean, SHORTEST_LIFE) * spec.life_s
    resonance_hz = random.uniform(0.30, 0.38) * spec.sample_hz
    return Bearing(
        name=f"bearing-{number + 1:02}",
        failure_s=round(life, 3),
        growth_s=round(spec.life_s * random.uniform(0.08, 0.12), 3),
        resonance_hz=round(resonance_hz, 3),
        decay_per_s=round(random.uniform(0.04, 0.07) * 2 * math.pi * resonance_hz, 3),
        severity=round(random.uniform(1.7, 2.3), 4),
        gain=round(random.uniform(0.8, 1.25), 4),
    )


def operate(spec: SimulateSpec, rows: int, random: np.random.Generator) -> Operation:
    """Speed wanders by 1 %, load changes in steps of a minute or so, by up to a quarter."""
    speed, load = np.empty(rows), np.empty(rows)
    deviation, level = 0.0, 1.0
    for row in range(rows):
        deviation = 0.95 * deviation + 0.01 * math.sqrt(1 - 0.95**2) * random.standard_normal()
        if random.random() < ROW_S / 60:
            level = random.uniform(0.75, 1.25)
        speed[row], load[row] = deviation, level
    return Operation(shaft_hz=spec.shaft_hz * (1 + speed), load=load)


def impact_times(spec: SimulateSpec, operation: Operation, random: np.random.Generator) -> Array:
    """[K] seconds, ascending: `fault_ratio` impacts a turn while the shaft turns at [R] shaft_hz.

    Slip moves each impact on its own; on average the rate is exact.
    """
    turns = np.concatenate([[0.0], np.cumsum(operation.shaft_hz * ROW_S)]) * spec.fault_ratio
    seconds = np.arange(len(turns)) * ROW_S
    count = int(turns[-1])
    times = np.interp(np.arange(count) + random.random(), turns, seconds)
    times += SLIP / (spec.shaft_hz * spec.fault_ratio) * random.standard_normal(count)
    return np.sort(times)


def ringing(
    times_s: Array, strengths: Array, bearing: Bearing, *, start_s: float, samples: int, sample_hz: float
) -> Array:
    """[samples] of the housing's answer to [K] impacts, from `start_s` on.

    An impact of strength A at t0 adds A exp(-a (t - t0)) sin(w (t - t0)) from then on.  Exact between the
    samples: each impact sets a decaying phasor at its next sample, and a filter carries it on.
    """
    pole = complex(-bearing.decay_per_s, 2 * math.pi * bearing.resonance_hz)
    lead = math.ceil(30 / bearing.decay_per_s * sample_hz)  # older impacts have died away, to exp(-30)
    first_s = start_s - lead / sample_hz
    position = (times_s - first_s) * sample_hz
    inside = (position > 0) & (position <= lead + samples - 1)
    index = np.ceil(position[inside]).astype(np.int64)
    phasors = strengths[inside] * np.exp(pole * (index - position[inside]) / sample_hz)
    set_at = np.zeros(lead + samples, dtype=np.complex128)
    np.add.at(set_at, index, phasors)
    size = 1 << (2 * lead + samples - 1).bit_length()
    kernel = np.exp(pole * np.arange(lead) / sample_hz)
    answer = np.fft.ifft(np.fft.fft(set_at, size) * np.fft.fft(kernel, size))
    return answer[lead : lead + samples].imag


def impact_strength(bearing: Bearing, rate_hz: float) -> float:
    """The strength at which impacts `rate_hz` times a second have RMS 1, where each dies before the next.

    The mean square of A exp(-at) sin(wt) at a rate f is f A^2 w^2 / (4 a (a^2 + w^2)).
    """
    a, w = bearing.decay_per_s, 2 * math.pi * bearing.resonance_hz
    return math.sqrt(4 * a * (a * a + w * w) / (rate_hz * w * w))


def vibration(
    spec: SimulateSpec, bearing: Bearing, operation: Operation, random: np.random.Generator
) -> Iterator[Array]:
    """Blocks [R, N] of acceleration, one row a second; the healthy signal's deviation is 1 at the usual load."""
    size = round(spec.sample_hz * ROW_S)
    times = impact_times(spec, operation, random)
    row_of = np.minimum((times / ROW_S).clip(min=0).astype(np.int64), len(operation.load) - 1)
    at_failure = bearing.severity * impact_strength(bearing, spec.shaft_hz * spec.fault_ratio)
    strengths = at_failure * bearing.damage(times) * operation.load[row_of]
    turns = np.concatenate([[0.0], np.cumsum(operation.shaft_hz * ROW_S)])
    for first in range(0, len(operation.load), BLOCK_ROWS):
        last = min(first + BLOCK_ROWS, len(operation.load))
        shape = (last - first, size)
        turned = turns[first:last, None] + operation.shaft_hz[first:last, None] * (
            np.arange(size) / spec.sample_hz
        )
        # Imbalance once a turn and misalignment twice; the rest of the healthy signal is rolling noise.
        shaft = 0.6 * np.sin(2 * np.pi * turned) + 0.3 * np.sin(4 * np.pi * turned)
        rolling = math.sqrt(1 - (0.6**2 + 0.3**2) / 2) * random.standard_normal(shape)
        healthy = (shaft + rolling) * operation.load[first:last, None]
        impacts = ringing(
            times,
            strengths,
            bearing,
            start_s=first * ROW_S,
            samples=shape[0] * size,
            sample_hz=spec.sample_hz,
        ).reshape(shape)
        yield bearing.gain * (healthy + impacts + spec.noise * random.standard_normal(shape))


def envelope_spectrum(signal: Array, sample_hz: float) -> Array:
    """[R, N // 2 + 1] amplitudes of the squared envelope in the demodulated band, over its mean.

    Randall & Antoni 2011, section 4: band-pass, analytic signal, squared magnitude, spectrum.  Column k
    is the frequency k * sample_hz / N; the mean itself is left out.
    """
    size = signal.shape[-1]
    spectrum = np.fft.fft(signal, axis=-1)
    frequency = np.fft.fftfreq(size, 1 / sample_hz)
    band = (frequency >= DEMODULATED[0] * sample_hz) & (frequency < DEMODULATED[1] * sample_hz)
    envelope = np.abs(np.fft.ifft(2 * spectrum * band, axis=-1)) ** 2
    mean = envelope.mean(axis=-1, keepdims=True)
    window = np.hanning(size)
    amplitudes = np.abs(np.fft.rfft((envelope / mean - 1) * window, axis=-1)) * 2 / window.sum()
    return np.asarray(amplitudes, dtype=np.float64)


def features(signal: Array, sample_hz: float, fault_hz: Array) -> Array:
    """[R, 3 + BANDS + HARMONICS] of [R, N] acceleration: the first channels of CHANNELS.

    fault_hz: [R] impacts a second if there were a fault, from the measured speed.  Kurtosis is 3 for
    Gaussian noise, crest the peak over the RMS, a band's value its RMS; envelope_k is the largest amplitude
    of the squared envelope within 2 % of k * fault_hz, where slip spreads it.
    """
    rms = np.sqrt(np.mean(signal**2, axis=-1))
    kurtosis = np.mean(signal**4, axis=-1) / rms**4
    crest = np.abs(signal).max(axis=-1) / rms
    size = signal.shape[-1]
    power = 2 * np.abs(np.fft.rfft(signal, axis=-1)) ** 2 / size**2
    power[:, 0] /= 2  # neither 0 Hz nor half the sampling rate has a mirror image
    if size % 2 == 0:
        power[:, -1] /= 2
    edges = np.linspace(0, power.shape[-1], BANDS + 1).astype(int)
    bands = [np.sqrt(power[:, low:high].sum(axis=-1)) for low, high in itertools.pairwise(edges)]
    envelope = envelope_spectrum(signal, sample_hz)
    frequency = np.arange(envelope.shape[-1]) * sample_hz / size
    peaks = []
    for harmonic in range(1, HARMONICS + 1):
        centre = harmonic * fault_hz[:, None]
        near = np.abs(frequency - centre) <= np.maximum(0.02 * centre, 1.5 * sample_hz / size)
        peaks.append(np.where(near, envelope, 0.0).max(axis=-1))
    return np.stack([rms, kurtosis, crest, *bands, *peaks], axis=-1)


def temperatures(bearing: Bearing, operation: Operation, random: np.random.Generator) -> Array:
    """[R] degrees Celsius: friction by load and damage heats the housing with a time constant of a minute."""
    rows = len(operation.load)
    target = 25 + 20 * operation.load + 10 * bearing.damage(np.arange(float(rows)) * ROW_S)
    result, value = np.empty(rows), 45.0
    for row in range(rows):
        value += (target[row] - value) * ROW_S / 60
        result[row] = value
    return result + 0.3 * random.standard_normal(rows)


def _lines(spec: SimulateSpec, bearing: Bearing, number: int) -> Iterator[list[str]]:
    """The rows of one bearing, as CSV fields; a row's time is when its second ends."""
    random = np.random.default_rng([spec.seed, number, 1])
    rows = int(bearing.failure_s / ROW_S)
    operation = operate(spec, rows, random)
    temperature = temperatures(bearing, operation, random)
    first = 0
    for block in vibration(spec, bearing, operation, random):
        part = slice(first, first + len(block))
        table = np.column_stack(
            [
                features(block, spec.sample_hz, operation.shaft_hz[part] * spec.fault_ratio),
                operation.shaft_hz[part],
                operation.load[part],
                temperature[part],
            ]
        )
        for row, values in enumerate(table, first + 1):
            failing = row * ROW_S > bearing.failure_s - spec.warning_s
            label = "failure" if failing else "normal"
            yield [bearing.name, f"{row * ROW_S:g}", *(f"{value:.6g}" for value in values), label]
        first += len(block)
