"""Label images: integers per voxel on the grid of their image."""

import numpy as np

from sparkmed.imaging import geometry
from sparkmed.imaging.geometry import Grid, Placed
from sparkmed.imaging.volume import Volume
from sparkmed.rejection import Refused

_WHOLE = 1e-3  # how far a stored value may be from an integer: a scale slope in the header leaves such a rest


def as_label(volume: Volume) -> Volume:
    """The label with the smallest dtype that holds it: (1, I, J, K) uint8, uint16 or int32 (any below 0).

    Raises :class:`Refused` ``LABEL_CHANNELS`` when there is more than one channel, ``LABEL_NOT_INTEGER``,
    ``LABEL_OUT_OF_RANGE`` beyond 32 bits.
    """
    array = volume.array
    if len(array) != 1:
        raise Refused("LABEL_CHANNELS", f"a label image has one channel, this has {len(array)}")
    if array.dtype.kind == "f":
        rounded = np.rint(array)
        with np.errstate(invalid="ignore"):
            wrong = ~(np.abs(array - rounded) <= _WHOLE)  # NaN and infinity are wrong too
        if wrong.any():
            several = f"{np.count_nonzero(wrong)} voxels are not whole numbers: {_some(array[wrong])}"
            raise Refused("LABEL_NOT_INTEGER", several)
        array = rounded
    elif array.dtype.kind not in "biu":
        raise Refused("LABEL_NOT_INTEGER", f"labels of type {array.dtype}, wanted whole numbers")
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    if low < -(2**31) or high >= 2**31:
        raise Refused("LABEL_OUT_OF_RANGE", f"labels from {low} to {high} do not fit 32 bits")
    dtype = np.int32 if low < 0 or high > 65535 else np.uint16 if high > 255 else np.uint8
    return volume if volume.array.dtype == dtype else volume.with_array(array.astype(dtype))


def on_grid(label: Volume, image_affine: np.ndarray, image_shape: tuple[int, int, int]) -> Volume:
    """The label on the axes of its image, with the image's own affine and the dtype of :func:`as_label`.

    Voxels may be moved, never resampled: a label of the same physical voxels stored in another orientation is flipped and permuted.
    Grids are the same when the shapes are equal and no corner is further off than
    :func:`~sparkmed.imaging.geometry.grid_tolerance`: 0.1 mm or 1 % of the smallest spacing, at most a quarter of it.
    Raises :class:`Refused` ``LABEL_GRID_MISMATCH`` otherwise, and what :func:`as_label` raises.
    """
    image, label = Grid(image_affine, image_shape), as_label(label)
    if not geometry.same_grid(image, label):
        cosines = _unit(label.affine).T @ _unit(image.affine)  # [label axis, image axis]
        order, signs = geometry.closest_axes(cosines)
        turned = geometry.moved(label, order, signs)
        if not geometry.same_grid(image, turned):
            raise Refused("LABEL_GRID_MISMATCH", _difference(label, turned, image))
        label = turned
    return label.with_array(label.array, image.affine)


def check_label(label: Volume, image: Placed, n_classes: int) -> np.ndarray:
    """(n_classes,) int64: how many voxels each class has, if the label fits its image and the config.

    ``image`` is a Volume or a :class:`~sparkmed.imaging.geometry.Grid`. Raises :class:`Refused` ``LABEL_GRID_MISMATCH``
    (as :func:`on_grid`), ``LABEL_CHANNELS``, ``LABEL_NOT_INTEGER`` or ``LABEL_OUT_OF_RANGE``.
    """
    label = on_grid(label, image.affine, image.spatial_shape)
    return count(label.array[0], n_classes).sum(axis=0)


def count(label: np.ndarray, n_classes: int) -> np.ndarray:
    """(I, n_classes) int64: voxels of each class in each plane of an (I, J, K) integer label.

    Raises :class:`Refused` ``LABEL_OUT_OF_RANGE`` naming the values that are no class.
    """
    low, high = int(label.min()), int(label.max())
    if low < 0 or high >= n_classes:
        values = np.unique(label)
        wrong = values[(values < 0) | (values >= n_classes)]
        raise Refused("LABEL_OUT_OF_RANGE", f"values {_some(wrong)}; the config has {n_classes} classes (0 to {n_classes - 1})")
    return np.stack([np.bincount(plane.ravel().astype(np.intp), minlength=n_classes) for plane in label])


def _unit(affine: np.ndarray) -> np.ndarray:
    return affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)


def _some(values: np.ndarray) -> str:
    values = np.unique(values)
    shown = ", ".join(f"{v:g}" for v in values[:5])
    return shown + (f" and {len(values) - 5} more" if len(values) > 5 else "")


def _difference(label: Volume, turned: Volume, image: Grid) -> str:
    if tuple(turned.spatial_shape) != image.spatial_shape:
        return f"label of {_by(label.spatial_shape)} voxels for an image of {_by(image.spatial_shape)}"
    away = geometry.corner_distance(image, turned)
    return f"label and image corners are up to {away:.4g} mm apart, tolerance {geometry.grid_tolerance(image):.2g} mm"


def _by(shape) -> str:
    return " x ".join(str(n) for n in shape)
