"""From probabilities to labels.

What is taken from a class becomes background, as in nnU-Net (``remove_all_but_largest_component_from_segmentation``) and DeepNeuro
(``LargestComponents``), not the next likely class: that class did not claim the voxel when its own components were counted, so the
result would depend on the order of the classes.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import ndimage

from sparkmed.config import Cleaning
from sparkmed.imaging.volume import Volume
from sparkmed.rejection import Refused

_NEIGHBOURS = {"faces": 1, "edges": 2, "corners": 3}
_ROUNDING = 1e-6  # relative: a component that has the wanted volume but for the rounding of the affine stays


def labels(probabilities: Volume, classes: Sequence[str], cleaning: Mapping[str, Cleaning]) -> Volume:
    """(1, I, J, K) uint8 (uint16 beyond 256 classes) of (classes, I, J, K) probabilities, cleaned by class name.

    The order is fixed: thresholds of all classes (:func:`as_labels`), then :func:`clean`. Without ``cleaning`` it is the likeliest
    class. Raises :class:`Refused` ``NOT_FINITE``.
    """
    return clean(as_labels(probabilities, thresholds(classes, cleaning)), classes, cleaning)


def thresholds(classes: Sequence[str], cleaning: Mapping[str, Cleaning]) -> dict[int, float]:
    """By class index, of the classes that have one."""
    return {classes.index(name): wanted.threshold for name, wanted in cleaning.items() if wanted.threshold is not None}


def clean(labels: Volume, classes: Sequence[str], cleaning: Mapping[str, Cleaning]) -> Volume:
    """The label map (1, I, J, K) without small components, with the largest ones alone, and with holes filled; changed in place.

    Class by class in their order small components and all but the largest become background; then, class by class again, holes are
    filled. So what was taken from one class can be a hole of another. Of components of equal size the one whose first voxel comes
    first (I slowest, K fastest) counts as larger.
    """
    label, wanted = labels.array[0], [(c, cleaning[name]) for c, name in enumerate(classes) if name in cleaning]
    for c, how in wanted:
        if how.minimum_ml or how.components:
            _keep_components(label, c, how, labels.voxel_ml)
    for c, how in wanted:
        if how.fill_holes:
            _fill_holes(label, c, how)
    return labels


def as_labels(scores: Volume, thresholds: Mapping[int, float] | None = None) -> Volume:
    """(1, I, J, K) uint8 (uint16 beyond 256 classes): the class with the highest of the (classes, I, J, K) scores.

    A class of ``thresholds`` is a candidate from that score on, whatever class 0 has; any other where it has more than class 0. Of
    equal scores the lowest class wins. Raises :class:`Refused` ``NOT_FINITE`` when a score is not a number.
    """
    array, thresholds = scores.array, thresholds or {}
    dtype = np.uint8 if len(array) <= 256 else np.uint16
    best, label = array[0].copy(), np.zeros(array.shape[1:], dtype)
    broken = np.isnan(best)
    for c, channel in enumerate(array[1:], start=1):
        broken |= np.isnan(channel)
        higher = channel > best
        if thresholds:
            higher &= (channel >= np.float32(thresholds[c])) if c in thresholds else (channel > array[0])
            if c in thresholds:  # background gives way
                higher |= (label == 0) & (channel >= np.float32(thresholds[c]))
        best[higher] = channel[higher]
        label[higher] = c
    if broken.any():
        raise Refused("NOT_FINITE", f"the scores of {np.count_nonzero(broken)} voxels are not numbers")
    return scores.with_array(label[None])


def _keep_components(label: np.ndarray, c: int, how: Cleaning, voxel_ml: float) -> None:
    """Of class ``c`` in (I, J, K), in place."""
    box = _box(label == c)
    if box is None:
        return
    part = label[box]
    components, count = ndimage.label(part == c, _structure(label.shape, _NEIGHBOURS[how.connectivity]))
    sizes = np.bincount(components.ravel(), minlength=count + 1)[1:]
    keep = sizes * voxel_ml >= how.minimum_ml * (1 - _ROUNDING)
    if how.components is not None:  # components are numbered by their first voxels, and the sort is stable
        keep[np.argsort(-sizes, kind="stable")[how.components :]] = False
    if not keep.all():
        part[np.concatenate([[False], ~keep])[components]] = 0


def _fill_holes(label: np.ndarray, c: int, how: Cleaning) -> None:
    """Holes of class ``c`` in (I, J, K), in place: where the outside is not reached, by faces alone when the class is connected by
    edges or corners too, else by corners (Rosenfeld 1970, J. ACM 17:146)."""
    box = _box(label == c)
    if box is None:
        return
    part = label[box]
    outside = _structure(label.shape, 3 if how.connectivity == "faces" else 1)
    part[ndimage.binary_fill_holes(part == c, outside) & (part == 0)] = c


def _structure(shape: tuple[int, ...], neighbours: int) -> np.ndarray:
    """(3, 3, 3) bool; along an axis where the image of ``shape`` has one voxel there are no neighbours, and no outside."""
    structure = ndimage.generate_binary_structure(3, neighbours)
    for axis, n in enumerate(shape):
        if n == 1:
            structure[tuple(slice(None) if a != axis else [0, 2] for a in range(3))] = False
    return structure


def _box(mask: np.ndarray) -> tuple[slice, ...] | None:
    """The smallest box that holds all of (I, J, K) bool; None of nothing."""
    found = []
    for axis in range(3):
        there = np.flatnonzero(mask.any(tuple(a for a in range(3) if a != axis)))
        if not len(there):
            return None
        found.append(slice(int(there[0]), int(there[-1]) + 1))
    return tuple(found)
