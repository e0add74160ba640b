"""Intensities of a plate on the scale of its own controls: wells of the same treatment on every plate, so what differs between
them is stain, lamp and camera."""

from dataclasses import dataclass

import numpy as np

from sparkmed.config import Intensity
from sparkmed.rejection import InputError, Refused

_DROPPED = 8  # of the 24 significant bits of float32


@dataclass(frozen=True, eq=False)
class Histogram:
    """Which values the pixels of one plate and channel have, and how often: a mergeable value.

    A value counts with 16 significant bits: whole numbers up to 65536 are exact, others right to 1 in 130,000. Counts are whole
    numbers, so that the order of merging does not matter. ``levels`` (n,) int32 number the values in their order, ``counts`` (n,)
    int64.
    """

    levels: np.ndarray
    counts: np.ndarray

    @classmethod
    def empty(cls) -> "Histogram":
        return cls(np.empty(0, np.int32), np.empty(0, np.int64))

    @classmethod
    def of(cls, field: np.ndarray) -> "Histogram":
        """Of an array of numbers of any shape; raises :class:`Refused` ``VOXEL_TYPE``, ``NOT_FINITE``."""
        if field.dtype.kind not in "biuf":
            raise Refused("VOXEL_TYPE", f"voxels of type {field.dtype} are not numbers on one scale")
        if field.dtype in (np.uint8, np.uint16):  # far fewer values than pixels
            counts = np.bincount(field.ravel("K"))
            values = np.flatnonzero(counts)
            return cls(_levels(values.astype(np.float32)), counts[values].astype(np.int64))
        with np.errstate(over="ignore"):
            values = field.ravel("K").astype(np.float32)
        if not np.isfinite(values).all():
            raise Refused("NOT_FINITE", "the field holds values that are infinite, not a number, or beyond float32")
        levels = _levels(values)
        lowest = int(levels.min(initial=0))
        if int(levels.max(initial=0)) - lowest <= 1 << 23:  # as all values of one sign do: counting is faster than sorting
            counts = np.bincount(levels - lowest)
            found = np.flatnonzero(counts)
            return cls((found + lowest).astype(np.int32), counts[found].astype(np.int64))
        found, counts = np.unique(levels, return_counts=True)
        return cls(found, counts.astype(np.int64))

    def merge(self, other: "Histogram") -> "Histogram":
        levels, at = np.unique(np.append(self.levels, other.levels), return_inverse=True)
        counts = np.zeros(levels.size, np.int64)
        np.add.at(counts, at, np.append(self.counts, other.counts))
        return Histogram(levels, counts)

    @property
    def pixels(self) -> int:
        return int(self.counts.sum())

    @property
    def values(self) -> np.ndarray:
        """(n,) float64, rising."""
        bits = (np.abs(self.levels.astype(np.int64)) << _DROPPED).astype(np.int32)
        return np.copysign(bits.view(np.float32).astype(np.float64), self.levels)

    def quantile(self, share: float) -> float:
        """As ``numpy.quantile``, linear between two pixels; nan of no pixel."""
        if not self.levels.size:
            return float("nan")
        place = share * (self.pixels - 1)
        low = int(place)
        values, upto = self.values, np.cumsum(self.counts)
        a, b = (float(values[np.searchsorted(upto, min(n, self.pixels - 1), "right")]) for n in (low, low + 1))
        return a + (b - a) * (place - low)

    def mean(self) -> float:
        """nan of no pixel."""
        return float((self.values * self.counts).sum() / self.pixels) if self.levels.size else float("nan")

    def deviation(self) -> float:
        """Standard deviation over all pixels; nan of no pixel."""
        if not self.levels.size:
            return float("nan")
        return float(np.sqrt((np.square(self.values - self.mean()) * self.counts).sum() / self.pixels))

    def compute(self, spec: Intensity) -> "ControlScale":
        """What scales the plate so that these pixels, of its controls, are scaled as ``spec`` says.

        ``zscore``: their mean becomes 0, their deviation 1. ``percentile``: from the lower to the upper percentile is 0 to 1, and
        nothing is cut off there, for a treatment may be brighter than every control. Raises :class:`Refused` ``NO_CONTROLS``,
        ``FLAT_CONTROLS`` where that is undefined, and :class:`InputError` for the other kinds, which need no controls.
        """
        if spec.kind not in ("zscore", "percentile") or spec.nonzero:
            raise InputError(
                f"against controls intensity is zscore or percentile over all pixels, got {spec.kind} and nonzero {spec.nonzero}"
            )
        if not self.levels.size:
            raise Refused("NO_CONTROLS", "the plate has no field of a control in this channel")
        if spec.kind == "zscore":
            offset, unit = self.mean(), self.deviation()
        else:
            ends = (0.5 if spec.low is None else spec.low, 99.5 if spec.high is None else spec.high)
            offset, upper = (self.quantile(p / 100) for p in ends)
            unit = upper - offset
        if not unit > 1e-6 * abs(self.values).max():
            raise Refused("FLAT_CONTROLS", f"the {self.pixels} pixels of the plate's controls do not vary in this channel")
        return ControlScale(offset, unit)


@dataclass(frozen=True)
class ControlScale:
    """``(value - offset) / unit`` is the value of a pixel on the scale of its plate's controls."""

    offset: float
    unit: float

    def apply(self, channel: np.ndarray) -> np.ndarray:
        """float32 of the same shape."""
        result = channel.astype(np.float32)
        result -= np.float32(self.offset)
        result /= np.float32(self.unit)
        return result


def _levels(values: np.ndarray) -> np.ndarray:
    """int32 that rise with float32 ``values``, the same for values that agree to 16 significant bits."""
    bits = values.view(np.int32)
    levels = ((bits & 0x7FFFFFFF) + (1 << (_DROPPED - 1))) >> _DROPPED
    return np.where(bits < 0, -levels, levels)
