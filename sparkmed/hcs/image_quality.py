"""Figures that show a field that is blurred, saturated or empty, and the flags that follow from them.

Fields are flagged, not dropped, and every figure is kept: a good limit depends on the microscope. (The quality of a plate, from its
wells, is another thing.)
"""

import math
from dataclasses import dataclass

import numpy as np
import scipy.fft

from sparkmed.config import FieldQuality
from sparkmed.rejection import InputError, Refused

BACKGROUND = 0.05
"""Share of the pixels that is taken for ground: cells leave that much free."""
_LARGEST = float(np.finfo(np.float32).max)
_INNER = 2  # rings of the spectrum from here on: the first holds the mean and the light
_OUTER = 8  # up to this part of the shorter edge


@dataclass(frozen=True)
class ImageQuality:
    """Of one field and channel; nan where a figure is undefined.

    ``slope``: of the log of the power in rings of the spectrum against the log of their radius, as CellProfiler's
    ``PowerLogLogSlope`` (Bray et al. 2012, J Biomol Screen 17:266): 1 for white noise, lower the more blurred. Theirs is lower by
    some hundredths, for it has negative frequencies one place nearer to the middle than they are. ``focus``: variance of the
    Laplacian over the variance of the field, which neither gain nor offset changes. ``saturated``: share of the pixels at or
    above the largest value that the bits allow, ``at_maximum`` at the largest value that occurs, ``maximum``: a camera of 12 bits
    in files of 16 shows there. ``background``: 5 % of the pixels are at or below it. ``mean`` and ``deviation`` in grey levels.
    ``cells``: nuclei, nan when nobody counted.
    """

    slope: float
    focus: float
    saturated: float
    at_maximum: float
    maximum: float
    background: float
    mean: float
    deviation: float
    cells: float


def measure(field: np.ndarray, settings: FieldQuality, cells: int | None = None) -> ImageQuality:
    """Of one channel (I, J).

    ``slope`` is nan for a field of one value or with an edge below 32 pixels, ``focus`` for one of one value or with an edge below
    3, ``saturated`` for fractions of an unknown bit depth. Raises :class:`Refused` ``VOXEL_TYPE``, ``NOT_FINITE``.
    """
    if field.ndim != 2 or 0 in field.shape:
        raise InputError(f"a field of one channel is (I, J), got shape {field.shape}")
    if field.dtype.kind not in "biuf":
        raise Refused("VOXEL_TYPE", f"voxels of type {field.dtype} are not numbers on one scale")
    if field.dtype.kind == "f" and not (np.abs(field) <= _LARGEST).all():  # neither is what is no number
        raise Refused("NOT_FINITE", "the field holds values that are infinite, not a number, or beyond float32")
    largest = _brightest(field.dtype, settings.bits)
    if field.dtype in (np.uint8, np.uint16):  # far fewer values than pixels
        values = np.arange(np.iinfo(field.dtype).max + 1.0)
        counts = np.bincount(field.ravel("K"), minlength=values.size)
        background = float(np.searchsorted(np.cumsum(counts), BACKGROUND * field.size))
    else:
        values, counts = field.ravel("K").astype(np.float64), 1
        background = float(np.quantile(values, BACKGROUND, method="inverted_cdf"))
    mean = float((values * counts).sum() / field.size)
    deviation = math.sqrt(float((np.square(values - mean) * counts).sum() / field.size))
    maximum = float(field.max())
    varies = maximum > field.min() and deviation > 0
    image = ((field - np.float32(mean)) / np.float32(deviation)).astype(np.float32) if varies else None
    return ImageQuality(
        slope=_slope(image) if varies else math.nan,
        focus=_laplacian_variance(image) if varies and min(field.shape) >= 3 else math.nan,
        saturated=math.nan if largest is None else float(np.count_nonzero(field >= largest) / field.size),
        at_maximum=float(np.count_nonzero(field == field.max()) / field.size),
        maximum=maximum,
        background=background,
        mean=mean,
        deviation=deviation if varies else 0.0,
        cells=math.nan if cells is None else float(cells),
    )


def flags(found: ImageQuality, settings: FieldQuality) -> tuple[str, ...]:
    """Which limits of the config the field breaks, in the order of the config; a figure that is nan breaks none."""
    broken = {
        "saturated": _beyond(found.saturated, settings.saturated),
        "empty": settings.empty is not None and found.deviation <= settings.empty,
        "blurred": _beyond(settings.slope, found.slope) or _beyond(settings.focus, found.focus),
        "bright": _beyond(found.background, settings.background),
        "few_cells": _beyond(settings.least_cells, found.cells),
    }
    return tuple(name for name, true in broken.items() if true)


def _beyond(larger: float | None, smaller: float | None) -> bool:
    return larger is not None and smaller is not None and larger > smaller


def _brightest(dtype: np.dtype, bits: int | None) -> int | None:
    """The largest value that a camera of that many bits gives; None when nobody knows."""
    if bits is not None:
        return 2**bits - 1
    return int(np.iinfo(dtype).max) if dtype.kind in "iu" else None


def _slope(image: np.ndarray) -> float:
    """Ring n holds frequencies of radius n - 1 up to n, in periods per field."""
    outer = math.floor(min(image.shape) / _OUTER)
    rings = np.arange(_INNER, outer)
    if rings.size < 2:
        return math.nan
    spectrum = scipy.fft.rfft2(image)
    rows = np.concatenate([np.arange(outer), np.arange(-outer, 0)])
    columns = np.arange(outer)
    low = spectrum[rows][:, columns]
    power = np.square(low.real.astype(np.float64)) + np.square(low.imag.astype(np.float64))
    power[:, 1:] *= 2  # the other half of the plane mirrors this one
    ring = np.floor(np.hypot(rows[:, None], columns[None])).astype(np.intp) + 1
    sums = np.bincount(ring.ravel(), power.ravel(), outer + 1)[rings]
    if not (sums > 0).all():
        rings, sums = rings[sums > 0], sums[sums > 0]
        if rings.size < 2:
            return math.nan
    x, y = np.log(rings), np.log(sums)
    x -= x.mean()
    return float((x * (y - y.mean())).sum() / np.square(x).sum())


def _laplacian_variance(image: np.ndarray) -> float:
    """Of the sum of the four neighbours less four times the pixel, over the pixels that have them."""
    laplacian = image[2:, 1:-1] + image[:-2, 1:-1]
    laplacian += image[1:-1, 2:]
    laplacian += image[1:-1, :-2]
    laplacian -= 4 * image[1:-1, 1:-1]
    return float(laplacian.var(dtype=np.float64))
