"""Nuclei of a fluorescence field, and how well they were found.

    found = find(array[channel, ..., 0], settings.nuclei)
    found.labels            # (I, J) int32: 0 is ground, n the nucleus n
    found.cells             # a row per nucleus

Threshold, distance transform, watershed, as in CellProfiler's IdentifyPrimaryObjects (Carpenter et al. 2006, Genome Biol 7:R100).
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import ndimage
from skimage import filters, morphology, segmentation, transform

from sparkmed.config import Nuclei
from sparkmed.rejection import InputError, Refused

COLUMNS = ["cell", "x", "y", "area", "mean", "border"]
_NOISE = 3.0  # standard deviations of the ground
_SURROUNDINGS = 3.0  # diameters
_OPENING = 5.0  # diameters
_DIM = 0.85  # of the way from the ground to Otsu's threshold: dim nuclei beside bright ones lie below his


@dataclass(frozen=True, eq=False)
class Found:
    """``labels`` (I, J) int32; ``cells`` has a row per nucleus: ``cell`` (its label, 1 to n), ``x`` and ``y`` (centre of mass of
    its pixels along I and J, in pixels; 0 is the centre of the first), ``area`` (pixels), ``mean`` (of the image that was given)
    and ``border`` (True when the edge of the field cuts it).

    ``diameter`` in pixels is what was looked for, ``threshold`` the grey level after smoothing, with ``local`` above
    the ground; nan where nothing stands out.
    """

    labels: np.ndarray
    cells: pd.DataFrame
    diameter: float
    threshold: float


def find(field: np.ndarray, settings: Nuclei, pixel_um: float | None = None) -> Found:
    """The nuclei of one channel (I, J): bright on dark ground.

    ``pixel_um`` is the size of a pixel in um, needed for ``unit: um``. A field without any has no row. Raises :class:`Refused`
    ``VOXEL_TYPE``, ``NOT_FINITE``, and :class:`InputError` when the size of a pixel is not known but needed.
    """
    if field.ndim != 2 or 0 in field.shape:
        raise InputError(f"a field of one channel is (I, J), got shape {field.shape}")
    if field.dtype.kind not in "biuf":
        raise Refused("VOXEL_TYPE", f"voxels of type {field.dtype} are not numbers on one scale")
    with np.errstate(over="ignore"):
        image = field.astype(np.float32)
    if not np.isfinite(image).all():
        raise Refused("NOT_FINITE", "the field holds values that are infinite, not a number, or beyond float32")
    diameter = _pixels(settings, pixel_um)
    if diameter is None:
        diameter = _usual_diameter(image)
    if image.min() == image.max() or math.isnan(diameter):
        nothing = np.zeros(field.shape, np.int32)
        return Found(nothing, _measured(nothing, field), diameter, math.nan)
    smooth = ndimage.gaussian_filter(image, settings.smoothing * diameter) if settings.smoothing else image
    if settings.threshold == "local":
        smooth = smooth - _ground(smooth, diameter)
    threshold = _threshold(smooth, settings.threshold)
    mask = smooth > threshold
    if settings.threshold == "local":
        mask &= smooth > ndimage.uniform_filter(smooth, max(3, round(_SURROUNDINGS * diameter)))
    labels = _divided(_filled(mask), settings.split * diameter / 2, diameter)
    labels = _kept(labels, settings, diameter)
    return Found(labels, _measured(labels, field), diameter, threshold)


def joined(masks: Iterable[np.ndarray], shape: tuple[int, int] | None = None, overlap: float = 0.1) -> np.ndarray:
    """(I, J) int32: masks of one nucleus each as one instance label, numbered in their order.

    A mask is (I, J) or (C, I, J, 1), everything but 0 being the nucleus. Pixels of two masks go to the one that came first, as hand
    drawn outlines touch. Raises :class:`Refused` ``MASK_SHAPE``, ``MASK_EMPTY``, and ``MASK_OVERLAP`` when more than the share
    ``overlap`` of a mask belongs to others. Without a mask, ``shape`` says how large the label is.
    """
    labels = None if shape is None else np.zeros(shape, np.int32)
    for number, mask in enumerate(masks, 1):
        if mask.ndim == 4:
            mask = mask.any(axis=(0, 3))
        labels = np.zeros(mask.shape, np.int32) if labels is None else labels
        if mask.shape != labels.shape:
            raise Refused("MASK_SHAPE", f"mask {number} is of {mask.shape} pixels, wanted {labels.shape}")
        inside = mask != 0
        pixels = np.count_nonzero(inside)
        if not pixels:
            raise Refused("MASK_EMPTY", f"mask {number} has no pixel")
        free = inside & (labels == 0)
        if pixels - np.count_nonzero(free) > overlap * pixels:
            raise Refused("MASK_OVERLAP", f"{pixels - np.count_nonzero(free)} of {pixels} pixels of mask {number} belong to others")
        labels[free] = number
    if labels is None:
        raise InputError("no mask, and no shape of the image")
    return labels


@dataclass(frozen=True)
class Matches:
    """Objects that were found and are true, found but not true, true but not found; a mergeable value."""

    right: int = 0
    false: int = 0
    missed: int = 0

    def merge(self, other: "Matches") -> "Matches":
        return Matches(self.right + other.right, self.false + other.false, self.missed + other.missed)

    @property
    def f1(self) -> float:
        """2 right / (2 right + false + missed); nan where there is nothing, neither found nor true."""
        every = 2 * self.right + self.false + self.missed
        return 2 * self.right / every if every else math.nan


def matches(labels: np.ndarray, truth: np.ndarray, iou: float = 0.5) -> Matches:
    """Objects of ``labels`` against those of ``truth``, both (I, J) of integers with 0 as ground.

    Two match when their intersection over union is above ``iou``; from 0.5 on no object can match two (Caicedo et al. 2019, Nat
    Methods 16:1247). Raises :class:`InputError` for an ``iou`` below 0.5 or other shapes.
    """
    if not 0.5 <= iou < 1:
        raise InputError(f"iou is {iou:g}, wanted 0.5 up to 1: below that an object may match two")
    if labels.shape != truth.shape:
        raise InputError(f"labels of shape {labels.shape}, truth of {truth.shape}")
    _, found = np.unique(labels, return_inverse=True)
    _, true = np.unique(truth, return_inverse=True)
    # 0, the ground, must be number 0 even where there is none
    found = found.ravel() + (0 if (labels == 0).any() else 1)
    true = true.ravel() + (0 if (truth == 0).any() else 1)
    many, most = int(found.max(initial=0)) + 1, int(true.max(initial=0)) + 1
    pairs, both = np.unique(found * most + true, return_counts=True)
    of_found, of_true = np.bincount(found, minlength=many), np.bincount(true, minlength=most)
    a, b = pairs // most, pairs % most
    real = (a > 0) & (b > 0)
    share = both[real] / (of_found[a[real]] + of_true[b[real]] - both[real])
    right = int(np.count_nonzero(share > iou))
    return Matches(right, many - 1 - right, most - 1 - right)


def is_fluorescence(array: np.ndarray) -> bool:
    """True for a picture (C, I, J, 1) of bright objects on dark ground: its colours are equal, and its median is nearer to its
    darkest than to its brightest percentile. Stained tissue has colours, bright field a bright ground."""
    if any((channel != array[0]).any() for channel in array[1:]):
        return False
    low, median, high = np.quantile(array[0], [0.01, 0.5, 0.99])
    return bool(median - low < high - median)


def _pixels(settings: Nuclei, pixel_um: float | None) -> float | None:
    """The diameter in pixels; None when it is to be estimated."""
    if settings.diameter is None or settings.unit == "px":
        return settings.diameter
    if pixel_um is None or not (math.isfinite(pixel_um) and pixel_um > 0):
        raise InputError(f"nuclei.diameter is in um, but the size of a pixel is {pixel_um}: wanted um, or nuclei.unit: px")
    return settings.diameter / pixel_um


def _usual_diameter(image: np.ndarray) -> float:
    """Of the circle that is as large as the objects in which half of all pixels above a first threshold lie."""
    if image.min() == image.max():
        return math.nan
    smooth = ndimage.gaussian_filter(image, 1)
    labels, _ = ndimage.label(smooth > _threshold(smooth, "otsu"))
    areas = np.sort(np.bincount(labels.ravel())[1:])
    if not areas.size:
        return math.nan
    middle = areas[np.searchsorted(np.cumsum(areas), areas.sum() / 2)]
    return 2 * math.sqrt(middle / math.pi)


def _ground(smooth: np.ndarray, diameter: float) -> np.ndarray:
    """The field without what is narrower than some diameters: an opening, on a coarser grid."""
    step = max(1, min(int(diameter / 4), min(smooth.shape) // 2))
    coarse = ndimage.uniform_filter(smooth, step)[step // 2 :: step, step // 2 :: step]
    opened = ndimage.grey_opening(coarse, max(3, round(_OPENING * diameter / step)))
    return transform.resize(opened, smooth.shape, order=1, mode="edge", preserve_range=True, anti_aliasing=False)


def _threshold(smooth: np.ndarray, kind: str) -> float:
    """Otsu's, Li's, or a share of Otsu's (``local``), but above the noise of the ground: else a field without nuclei is all nuclei.

    The ground's spread is that between its lower percentiles, which nuclei do not reach as long as they fill less than half of the
    field.
    """
    some = smooth[:: max(1, smooth.shape[0] // 1024), :: max(1, smooth.shape[1] // 1024)]
    level = float(filters.threshold_li(some) if kind == "li" else filters.threshold_otsu(some))
    low, middle = (float(q) for q in np.quantile(some, [0.05, 0.25]))
    if kind == "local":
        level = middle + _DIM * (level - middle)
    deviation = (middle - low) / 0.9704  # of a normal distribution
    return max(level, middle + (0.6745 + _NOISE) * deviation)


def _filled(mask: np.ndarray) -> np.ndarray:
    """Ground that a nucleus encloses is nucleus."""
    ground, number = ndimage.label(~mask)
    outside = np.zeros(number + 1, bool)
    for edge in (ground[0], ground[-1], ground[:, 0], ground[:, -1]):
        outside[edge] = True
    outside[0] = False  # the mask itself
    return ~outside[ground]


def _divided(mask: np.ndarray, depth: float, diameter: float) -> np.ndarray:
    """(I, J) int32: one label per part of the mask, parts being cut at necks narrower than both sides by ``depth`` pixels."""
    labels, number = ndimage.label(mask)
    labels = labels.astype(np.int32)
    following = number
    for label, box in enumerate(ndimage.find_objects(labels), 1):
        part = labels[box] == label
        if max(part.shape) < 0.5 * diameter:
            continue  # too small to be two
        inside = np.pad(part, 1)
        distance = ndimage.distance_transform_edt(inside)
        distance = ndimage.gaussian_filter(distance, 0.05 * diameter)
        peaks = (ndimage.maximum_filter(distance, footprint=np.ones((3, 3))) == distance) & inside
        if ndimage.label(peaks, np.ones((3, 3)))[1] < 2:
            continue
        seeds, count = ndimage.label(morphology.h_maxima(distance, depth), np.ones((3, 3)))
        if count < 2:
            continue
        pieces = segmentation.watershed(-distance, seeds, mask=inside)[1:-1, 1:-1]
        more = pieces > 1
        labels[box][more] = pieces[more] + (following - 1)
        following += count - 1
    return labels


def _kept(labels: np.ndarray, settings: Nuclei, diameter: float) -> np.ndarray:
    """Labels 1 to n in the order of their first pixels, of objects whose size and place are wanted."""
    areas = np.bincount(labels.ravel())
    circle = math.pi / 4 * diameter**2
    wanted = (areas >= settings.smallest * circle) & (areas <= settings.largest * circle) & (areas > 0)
    if settings.border == "removed":
        wanted[_at_border(labels)] = False
    wanted[0] = False
    number = np.zeros(areas.size, np.int32)
    number[wanted] = np.arange(1, np.count_nonzero(wanted) + 1)
    return number[labels]


def _at_border(labels: np.ndarray) -> np.ndarray:
    return np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))


def _measured(labels: np.ndarray, field: np.ndarray) -> pd.DataFrame:
    number = int(labels.max(initial=0))
    inside = np.flatnonzero(labels)
    of = labels.ravel()[inside]
    areas = np.bincount(of, minlength=number + 1)[1:]
    x, y = np.divmod(inside, labels.shape[1])
    x, y, total = (np.bincount(of, w, number + 1)[1:] for w in (x, y, field.ravel()[inside].astype(np.float64)))
    cells = np.arange(1, number + 1)
    columns = [cells, x / areas, y / areas, areas, total / areas, np.isin(cells, _at_border(labels))]
    return pd.DataFrame(dict(zip(COLUMNS, columns, strict=True)))
