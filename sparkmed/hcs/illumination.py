"""Light that falls unevenly on a field: estimated per plate and channel from all of its fields, and divided out.

    total = FieldSum()
    for field in fields:                       # in any order, in any number of parts
        total = total.merge(FieldSum.of(field))
    light = total.compute(Illumination())
    corrected = correct(array, [light, ...])   # one per channel

The mean of many fields is what the light does to a field, for cells lie anywhere. The division assumes that the camera adds no
constant of its own, or that it was subtracted.
"""

import functools
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import ndimage

from sparkmed import storage
from sparkmed.config import Illumination
from sparkmed.rejection import InputError, Refused

GRID = 64
"""Most blocks along an edge of a field, of whose means a sum is made."""
_STEPS = 1 << 20  # of one grey level
_LARGEST = 1 << 24  # grey level of a block
_MOST = (1 << 63) // (_STEPS * _LARGEST)  # fields
_DARKEST = 0.1  # of the mean


@dataclass(frozen=True, eq=False)
class FieldSum:
    """Sum of the fields of one plate and channel, on a grid of blocks: a mergeable value.

    ``shape`` is (I, J) of the fields, None of no field at all. ``total`` (i, j) int64 is the sum of the means of the blocks, each
    rounded to 2**-20 grey levels before it is added: whole numbers add up to the same in any order, so the sum does not depend on
    partitions.
    """

    shape: tuple[int, int] | None = None
    total: np.ndarray | None = None
    fields: int = 0

    @classmethod
    def of(cls, field: np.ndarray) -> "FieldSum":
        """Of one field (I, J) of any type of number.

        Raises :class:`Refused` ``VOXEL_TYPE`` for what is no number or is beyond 2**24 grey levels, ``NOT_FINITE``.
        """
        if field.ndim != 2 or 0 in field.shape:
            raise InputError(f"a field of one channel is (I, J), got shape {field.shape}")
        if field.dtype.kind not in "biuf":
            raise Refused("VOXEL_TYPE", f"voxels of type {field.dtype} are not numbers on one scale")
        exact = np.float64 if field.dtype.kind == "f" else np.int64
        starts = [np.arange(0, n, _edge(field.shape)) for n in field.shape]
        # along the memory first: a field that was read from a picture is transposed
        first = int(np.argmax(np.abs(field.strides)))
        total = np.add.reduceat(field, starts[first], axis=first, dtype=exact)
        total = np.add.reduceat(total, starts[1 - first], axis=1 - first, dtype=exact)
        means = total / np.outer(*_widths(field.shape))
        if not np.isfinite(means).all():
            raise Refused("NOT_FINITE", "the field holds values that are infinite or not a number")
        if np.abs(means).max() > _LARGEST:
            raise Refused("VOXEL_TYPE", f"grey levels up to {np.abs(means).max():g} are not summed, at most {_LARGEST}")
        return cls(field.shape, np.rint(means * _STEPS).astype(np.int64), 1)

    def merge(self, other: "FieldSum") -> "FieldSum":
        """Raises :class:`Refused` ``FIELD_SHAPE`` when the fields of the two have different shapes."""
        if not (self.fields and other.fields):
            return self if self.fields else other
        if self.shape != other.shape:
            raise Refused("FIELD_SHAPE", f"fields of {_by(self.shape)} and of {_by(other.shape)} pixels in one plate and channel")
        if self.fields + other.fields > _MOST:
            raise InputError(f"{self.fields + other.fields} fields of one plate and channel, at most {_MOST} are summed")
        return FieldSum(self.shape, self.total + other.total, self.fields + other.fields)

    def compute(self, settings: Illumination) -> "Light":
        """The light on these fields; raises :class:`Refused` ``FEW_FIELDS``, ``DARK_PLATE`` when there is none to estimate.

        A quadratic surface is fitted to the mean field, and what is left over passes a median filter: the surface carries the
        slope beyond the borders, where a median alone would bend up. The function is divided by its mean, not by its robust
        minimum as Singh et al. 2014 (J Microsc 256:231) do: so a plate keeps its mean intensity, and its scale does not hang on
        the noise in its darkest corner. Light below a tenth of the mean counts as a tenth, so that no pixel is divided by
        nearly nothing.
        """
        if self.fields < settings.least_fields:
            raise Refused(
                "FEW_FIELDS", f"{self.fields} fields of a plate and channel, illumination.least_fields is {settings.least_fields}"
            )
        mean = self.total / (self.fields * _STEPS)
        radius = settings.radius * max(self.shape) / _edge(self.shape)
        weights = np.outer(*_widths(self.shape))
        surface = _quadratic(mean)
        smooth = surface + _median(mean - surface, radius)
        average = float((smooth * weights).sum() / weights.sum())
        if not average * _STEPS >= 1:
            raise Refused("DARK_PLATE", f"the mean of {self.fields} fields is {average:g} grey levels: nothing to divide by")
        smooth = np.maximum(smooth, _DARKEST * average)
        return Light(self.shape, (smooth / average).astype(np.float32), self.fields)


@dataclass(frozen=True, eq=False)
class Light:
    """Relative light on the fields of one plate and channel; its mean is 1 when it was estimated.

    ``grid`` (i, j) float32 holds it at the centres of blocks, or at all pixels of ``shape`` (I, J); ``fields`` says from how many
    it was estimated, 0: it was given.
    """

    shape: tuple[int, int]
    grid: np.ndarray
    fields: int = 0

    @functools.cached_property
    def function(self) -> np.ndarray:
        """(I, J) float32: linear between the centres of blocks, and on beyond the outermost."""
        if self.grid.shape == self.shape:
            return self.grid
        found = self.grid
        for axis, (n, width) in enumerate(zip(self.shape, _widths(self.shape), strict=True)):
            found = _interpolated(found, np.cumsum(width) - (width + 1) / 2, n, axis)
        return np.maximum(found, np.float32(self.grid.min() / 2))  # what is continued beyond the centres stays above 0

    def row(self) -> dict[str, Any]:
        """Plain data for a table."""
        return {"shape": list(self.shape), "grid": self.grid.tobytes(), "grid_shape": list(self.grid.shape), "fields": self.fields}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Light":
        grid = np.frombuffer(row["grid"], np.float32).reshape([int(n) for n in row["grid_shape"]])
        return cls(tuple(int(n) for n in row["shape"]), grid, int(row["fields"]))

    def __getstate__(self):
        return self.shape, self.grid, self.fields  # without the function: it is large, and made again in an instant

    def __setstate__(self, state):
        for name, value in zip(("shape", "grid", "fields"), state, strict=True):
            object.__setattr__(self, name, value)


def correct(array: np.ndarray, lights: Sequence[Light | None]) -> np.ndarray:
    """(C, I, J, 1) float32: each channel divided by its light; a channel whose light is None stays as it is.

    Raises :class:`Refused` ``FIELD_SHAPE`` when the field has another shape than those that the light was estimated from, and
    :class:`InputError` for another number of channels.
    """
    if array.ndim != 4 or len(array) != len(lights):
        raise InputError(f"an array of shape {array.shape} and {len(lights)} lights, wanted one for each channel of (C, I, J, 1)")
    corrected = np.array(array, np.float32)  # in the order of memory of the field, a copy in any case
    for channel, light in zip(corrected, lights, strict=True):
        if light is None:
            continue
        if channel.shape != (*light.shape, 1):
            raise Refused(
                "FIELD_SHAPE", f"a field of {_by(channel.shape[:2])} pixels, the light of its plate is of {_by(light.shape)}"
            )
        channel[..., 0] /= light.function
    return corrected


def read(files: str, plate: str, channel: str) -> Light:
    """The user's own function, used as it is: ``files`` with ``{plate}`` and ``{channel}`` filled in is a ``.npy`` of (rows,
    columns), as CellProfiler saves them.

    Raises :class:`InputError` when there is none, or when it holds anything but finite numbers above 0.
    """
    url = files.replace("{plate}", plate).replace("{channel}", channel)
    try:
        found = np.load(io.BytesIO(storage.read_bytes(url)), allow_pickle=False)
    except OSError as e:
        raise InputError(f"illumination.files: {url} cannot be read ({type(e).__name__})") from None
    except (ValueError, EOFError, SyntaxError):
        raise InputError(f"illumination.files: {url} is not a .npy of plain numbers") from None
    if found.ndim != 2 or 0 in found.shape or found.dtype.kind not in "uif":
        raise InputError(f"illumination.files: {url} holds {found.dtype} of shape {found.shape}, wanted numbers of (rows, columns)")
    function = np.ascontiguousarray(found.T, np.float32)
    if not (np.isfinite(function).all() and function.min() > 0):
        raise InputError(f"illumination.files: {url} holds values that are not finite or not above 0, which nothing is divided by")
    return Light(function.shape, function)


def _edge(shape: tuple[int, int]) -> int:
    """Pixels along the edge of a block."""
    return math.ceil(max(shape) / GRID)


def _widths(shape: tuple[int, int]) -> list[np.ndarray]:
    """Pixels of the blocks along I and J; the last may be narrower."""
    edge = _edge(shape)
    return [np.diff(np.append(np.arange(0, n, edge), n)) for n in shape]


def _quadratic(mean: np.ndarray) -> np.ndarray:
    """The quadratic surface of least squares. Sums are numpy's own: those of a BLAS differ with its number of threads."""
    u, v = (np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in mean.shape)
    terms = [np.outer(u**a, v**b) for a in range(min(3, u.size)) for b in range(min(3 - a, v.size))]
    moments = np.array([[(s * t).sum() for t in terms] for s in terms])
    share = np.linalg.solve(moments, [(t * mean).sum() for t in terms])
    return sum(w * t for w, t in zip(share, terms, strict=True))


def _median(values: np.ndarray, radius: float) -> np.ndarray:
    """Over a disk of that many blocks, mirrored at the borders."""
    offsets = np.arange(-int(radius), int(radius) + 1)
    disk = np.hypot(*np.meshgrid(offsets, offsets)) <= radius
    return ndimage.median_filter(values, footprint=disk, mode="reflect")


def _interpolated(values: np.ndarray, centres: np.ndarray, n: int, axis: int) -> np.ndarray:
    """``values`` along ``axis`` at 0 to n - 1, given those at ``centres``; elementwise: no bit depends on the number of threads."""
    if len(centres) == 1:
        return np.repeat(values, n, axis)
    at = np.arange(n)
    lower = np.clip(np.searchsorted(centres, at, "right") - 1, 0, len(centres) - 2)
    share = ((at - centres[lower]) / (centres[lower + 1] - centres[lower])).astype(np.float32)
    share = share[:, None] if axis == 0 else share
    return values.take(lower, axis) * (1 - share) + values.take(lower + 1, axis) * share


def _by(shape) -> str:
    return " x ".join(str(n) for n in shape)
