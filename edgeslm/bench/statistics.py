"""Estimates with intervals from clustered samples.

W clusters (windows of text), M values in each, F fractions.

Neighbouring tokens of a text resemble each other, so the values of one window are not independent:
an interval that counts N samples is too narrow.  Here whole windows are the sampling unit.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

CONFIDENCE = 0.95
RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A value with the ends of its 95 % interval; None where one cluster allows no interval."""

    value: float
    low: float | None
    high: float | None

    def as_record(self) -> dict[str, float | None]:
        return asdict(self)

    def exponential(self) -> Estimate:
        """The estimate of exp(value): a monotone map carries the interval's ends along.

        An upper end too large for a float becomes None; the value must be below 709.
        """
        low = None if self.low is None else math.exp(self.low)
        high = None if self.high is None or self.high > 709 else math.exp(self.high)
        return Estimate(value=math.exp(self.value), low=low, high=high)

    def at_least(self, floor: float) -> Estimate:
        """The same, its lower end no less than a bound that the quantity cannot pass."""
        return self if self.low is None else replace(self, low=max(self.low, floor))


def student_t_quantile(probability: float, degrees: int) -> float:
    """The t with P(T <= t) = probability for 0.5 <= probability < 1 and whole degrees of freedom >= 1.

    Inverts the exact finite series of Abramowitz & Stegun 26.7.3-4 by bisection; from 200 degrees on
    the Cornish-Fisher expansion 26.7.5, whose error is below 1e-9 there.
    """
    if degrees >= 200:
        z = NormalDist().inv_cdf(probability)
        first = (z**3 + z) / 4
        second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
        third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
        return z + first / degrees + second / degrees**2 + third / degrees**3
    low, high = 0.0, math.pi / 2
    for _ in range(60):  # halves the angle's interval to the last bit of a double
        middle = (low + high) / 2
        if _central_probability(middle, degrees) < 2 * probability - 1:
            low = middle
        else:
            high = middle
    return math.sqrt(degrees) * math.tan((low + high) / 2)


def _central_probability(angle: float, degrees: int) -> float:
    """P(|T| <= t) with angle = atan(t / sqrt(degrees)); Abramowitz & Stegun 26.7.3 and 26.7.4."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for k in range(1 + odd, degrees, 2):
        total += term
        term *= cosine * cosine * k / (k + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def mean(values: NDArray[np.float64]) -> Estimate:
    """Mean of [W, M] values; Student t with W - 1 degrees of freedom on the cluster means.

    With clusters of one size this is the cluster-robust standard error (CR1; Liang & Zeger 1986).
    """
    value = float(values.mean())
    error = _standard_error(values)
    if error is None:
        return Estimate(value=value, low=None, high=None)
    margin = _t(len(values)) * error
    return Estimate(value=value, low=value - margin, high=value + margin)


def proportion(hits: NDArray[np.bool_]) -> Estimate:
    """Share of True in [W, M] hits; Wilson's interval with the effective sample size (Korn & Graubard 1998).

    Unlike mean +- t * error it stays inside [0, 1] and has a width when every position agrees.
    """
    value = float(hits.mean())
    error = _standard_error(hits.astype(np.float64))
    if error is None:
        return Estimate(value=value, low=None, high=None)
    spread = value * (1 - value)
    # Clusters can look less alike than independent draws by chance: no credit for that.
    samples = min(hits.size, spread / error**2) if error > 0 and spread > 0 else hits.size
    t = _t(len(hits))
    scale = 1 + t * t / samples
    centre = (value + t * t / (2 * samples)) / scale
    margin = t / scale * math.sqrt(spread / samples + t * t / (4 * samples**2))
    # At 0 and 1 the interval ends at the value itself, which rounding may put a hair inside.
    low, high = min(value, max(0.0, centre - margin)), max(value, min(1.0, centre + margin))
    return Estimate(value=value, low=low, high=high)


def quantiles(values: NDArray[np.float64], fractions: Sequence[float], *, seed: int) -> list[Estimate]:
    """Quantiles of [W, M] values at [F] fractions, linear between order statistics as in llama-perplexity.

    Intervals: percentile bootstrap that draws whole windows (Davison & Hinkley 1997, 3.8).  At fraction 1,
    the maximum, the upper end is the largest value seen: no sample bounds what a longer text would show.
    """
    observed = [float(q) for q in np.quantile(values, fractions)]
    if len(values) < 2:
        return [Estimate(value=value, low=None, high=None) for value in observed]
    drawn = _resampled_quantiles(values, fractions, np.random.default_rng(seed), RESAMPLES)
    tail = (1 - CONFIDENCE) / 2
    ends = np.quantile(drawn, [tail, 1 - tail], axis=0)
    return [
        Estimate(value=value, low=float(low), high=float(high))
        for value, low, high in zip(observed, *ends, strict=True)
    ]


def _resampled_quantiles(
    values: NDArray[np.float64], fractions: Sequence[float], random: np.random.Generator, resamples: int
) -> NDArray[np.float64]:
    """[resamples, F] quantiles of samples of W windows drawn with replacement.

    Sorts once: a sample repeats each value as often as its window was drawn, so an order statistic is
    where the running count of draws, in sorted order, passes its rank.
    """
    clusters, size = values.shape
    order = np.argsort(values, axis=None, kind="stable")
    ordered, cluster_of = values.ravel()[order], order // size
    ranks = np.asarray(fractions) * (values.size - 1)
    below = np.floor(ranks).astype(np.int64)
    above = np.minimum(below + 1, values.size - 1)
    result = np.empty((resamples, len(ranks)))
    for i in range(resamples):
        draws = np.bincount(random.integers(clusters, size=clusters), minlength=clusters)
        count = np.cumsum(draws[cluster_of])
        lower = ordered[np.searchsorted(count, below, side="right")]
        upper = ordered[np.searchsorted(count, above, side="right")]
        result[i] = lower + (ranks - below) * (upper - lower)
    return result


def _standard_error(values: NDArray[np.float64]) -> float | None:
    """Standard error of the mean of [W, M] values; None with fewer than two clusters."""
    means = values.mean(axis=1)
    return float(means.std(ddof=1) / math.sqrt(len(means))) if len(means) > 1 else None


def _t(clusters: int) -> float:
    return student_t_quantile((1 + CONFIDENCE) / 2, clusters - 1)
