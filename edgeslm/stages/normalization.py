"""Sensor readings as a network takes them: what a device must do with its own is in the record of this.

S rows of a window, C channels, W windows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeslm.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import ArrayLike, NDArray

    from edgeslm.specs import WindowSpec
    from edgeslm.stages.recordings import Recordings

NORMAL_QUARTILES = 1.3489795
"""Distance of a normal distribution's quartiles, in deviations."""
CONSTANT = 1e-6
"""A deviation below this share of the mean is rounding."""


@dataclass(frozen=True, kw_only=True)
class Normalization:
    """Per channel, what is subtracted and what is divided by; both are of the training rows.

    kind: standard (mean and deviation) or robust (median and quartiles).
    """

    kind: str
    channels: tuple[str, ...]
    center: tuple[float, ...]
    scale: tuple[float, ...]

    def __post_init__(self) -> None:
        if not len(self.channels) == len(self.center) == len(self.scale):
            raise DataError(
                f"normalization of {len(self.channels)} channels has {len(self.center)} centers and "
                f"{len(self.scale)} scales"
            )
        if not all(map(math.isfinite, (*self.center, *self.scale))) or min(self.scale, default=1.0) <= 0:
            raise DataError("normalization holds a scale that is no positive number, or an infinite center")

    def apply(self, readings: ArrayLike) -> NDArray[np.float32]:
        """[..., S, C] readings of S rows in order, normalized; a missing one (NaN) is filled.

        It takes the channel's last value in the same window, or the center where none came before.
        Raises DataError when the channels are not as many as these.
        """
        values = np.asarray(readings, dtype=np.float64)
        if values.ndim < 2 or values.shape[-1] != len(self.channels):
            raise DataError(
                f"readings of the shape {values.shape} are not windows of {len(self.channels)} channels",
                hint=f"give [rows, channels] with the channels {', '.join(self.channels)}",
            )
        values = (values - self.center) / self.scale
        missing = np.isnan(values)
        if missing.any():
            rows = np.arange(values.shape[-2])[:, None]
            last = np.maximum.accumulate(np.where(missing, 0, rows), axis=-2)
            values = np.nan_to_num(np.take_along_axis(values, last, axis=-2), nan=0.0)
        return values.astype(np.float32)

    def as_record(self) -> dict[str, Any]:
        """As a checkpoint's config.json and a bundle's manifest have it."""
        return {
            "kind": self.kind,
            "channels": list(self.channels),
            "center": list(self.center),
            "scale": list(self.scale),
        }

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Normalization:
        """Raises DataError for a record that is incomplete or makes no sense."""
        try:
            return cls(
                kind=str(record["kind"]),
                channels=tuple(str(name) for name in record["channels"]),
                center=tuple(float(value) for value in record["center"]),
                scale=tuple(float(value) for value in record["scale"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"normalization can't be read: {error!r}") from error


def fit(recordings: Recordings, starts: NDArray[np.int64], spec: WindowSpec) -> Normalization:
    """The normalization of the rows that the windows at `starts` cover, each row counted once.

    A constant channel is centred only; one without any reading is 0 everywhere.
    """
    edges = np.zeros(len(recordings.label) + 1, dtype=np.int64)
    np.add.at(edges, starts, 1)
    np.add.at(edges, starts + spec.rows, -1)
    covered = np.flatnonzero(np.cumsum(edges[:-1]))
    center, scale = [], []
    for channel in range(len(recordings.channels)):
        values = recordings.values[:, channel][covered].astype(np.float64)
        middle, width = spread(values[np.isfinite(values)], spec.normalize)
        center.append(middle)
        scale.append(width)
    return Normalization(
        kind=spec.normalize, channels=recordings.channels, center=tuple(center), scale=tuple(scale)
    )


def spread(values: NDArray[np.float64], kind: str) -> tuple[float, float]:
    """(center, scale) of one channel's readings: mean and deviation, or median and quartiles (robust).

    The quartiles' distance is divided by a normal distribution's, so that both kinds agree on one.  It is
    0 where half of the readings are equal: the deviation stands in.  No readings: (0, 1); constant: scale 1.
    """
    if not len(values):
        return 0.0, 1.0
    center, scale = float(values.mean()), float(values.std())
    if kind == "robust":
        low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
        center = float(middle)
        scale = float(high - low) / NORMAL_QUARTILES or scale
    return center, scale if scale > CONSTANT * abs(center) else 1.0
