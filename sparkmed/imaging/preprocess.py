"""The one way from an image to what a network sees; training and scoring both take it.

Colours to gray, orientation, spacing or size, intensity, in this order. The label of an image takes the same way without
colours and intensity, by nearest neighbour; so does what the first model of a cascade says about it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from sparkmed.config import Cascade, Preprocess
from sparkmed.imaging import geometry, intensity, labels, resample
from sparkmed.imaging.geometry import Grid, Placed
from sparkmed.imaging.volume import Volume
from sparkmed.rejection import InputError, Refused

_PIECE = 2 << 20  # bytes of scores that are resampled at a time, or one plane
_LUMINANCE = (0.299, 0.587, 0.114)  # of red, green, blue: ITU-R BT.601


def apply(
    volume: Volume, spec: Preprocess, label: Volume | None = None, first: Volume | None = None
) -> Volume | tuple[Volume, Volume]:
    """The image as ``spec`` wants it: (C, I', J', K') float32 with its affine; with ``label`` the pair of them.

    The label comes back on the very grid of the image, with its dtype and no value that it had not. It may be stored in
    another orientation than the image. ``first`` is what the first model of ``spec.cascade`` says about the image, on its grid: its
    channels follow those of the image. Raises :class:`Refused` ``CHANNELS``, ``NOT_FINITE``, ``VOXEL_TYPE``,
    ``SINGLETON_AXIS``, ``TOO_LARGE`` or ``LABEL_GRID_MISMATCH``.
    """
    image = place(volume, spec)
    image = image.with_array(intensity.normalise(image.array, spec.intensity))
    if spec.cascade is not None:
        image = image.with_array(np.concatenate([image.array, as_channels(guidance(first, spec), spec.cascade)]))
    if label is None:
        return image
    return image, place(labels.on_grid(label, volume.affine, volume.spatial_shape), spec, order=0)


def place(volume: Volume, spec: Preprocess, order: int = 1) -> Volume:
    """The image of :func:`apply` before its intensities are scaled: stored values where nothing was interpolated.

    ``order`` 0 is for a label that is on the grid of its image. Given the only reference to a volume, it holds no more of the
    steps than the one at hand needs. Raises :class:`Refused` ``OTHER_LIGHT`` for a field of a plate whose light and scale were
    not treated as ``spec`` says.
    """
    if order and volume.of_plate != spec.of_plate:
        done, wanted = (f"settings {x}" if x else "no settings" for x in (volume.of_plate, spec.of_plate))
        raise Refused("OTHER_LIGHT", f"light and scale of the plate were treated by {done} of preprocess, wanted {wanted}")
    grid = output_grid(volume, spec)
    if spec.channels == "gray":
        volume = volume.with_array(_gray(volume.array))
    if spec.orientation is not None:
        volume = geometry.reorient(volume, spec.orientation)
    return resample.to_grid(volume, grid.affine, grid.spatial_shape, order, cval=None)


def guidance(first: Volume, spec: Preprocess) -> np.ndarray:
    """What the first model of a cascade says about an image, on the grid of :func:`apply`; :func:`as_channels` comes next.

    ``first`` is on the grid of the image: a label map (1, I, J, K), which stays one (nearest neighbour), or probabilities of its
    foreground classes (linear).
    """
    order = 0 if spec.cascade.output == "labels" else 1
    first = replace(first, of_plate=spec.of_plate)  # what it says is no light
    return place(first, spec.model_copy(update={"channels": "keep"}), order).array


def as_channels(guidance: np.ndarray, cascade: Cascade) -> np.ndarray:
    """(foreground classes, I, J, K) float32, unscaled: 0 or 1 of a label map, as nnU-Net's cascade has it, or probabilities."""
    if cascade.output == "probabilities":
        return guidance.astype(np.float32, copy=False)
    return np.stack([guidance[0] == c for c in range(1, len(cascade.classes) + 1)]).astype(np.float32)


def output_grid(grid: Placed, spec: Preprocess) -> Grid:
    """The grid of the image after :func:`apply`, from the grid alone."""
    if spec.spacing is not None and spec.size is not None:
        raise InputError("preprocess has both spacing and size; the size of the whole image sets its spacing: wanted one")
    grid = geometry.grid_of(grid)
    if spec.orientation is not None:
        grid = geometry.reoriented(grid, spec.orientation)
    if spec.spacing is not None:
        grid = resample.spaced(grid, spec.spacing)
    if spec.size is not None:
        grid = resample.sized(grid, spec.size)
    return grid


def output_shape(spatial_shape: tuple[int, int, int], affine: np.ndarray, spec: Preprocess) -> tuple[int, int, int]:
    """(I', J', K') of the image after :func:`apply`."""
    return output_grid(Grid(affine, spatial_shape), spec).spatial_shape


def to_input_grid(scores: Volume, reference: Placed) -> Volume:
    """(C, I, J, K) float32 scores at the voxels of the image they were made from, by linear interpolation.

    ``scores`` are on the preprocessed grid, ``reference`` is the image before preprocessing. Channels that add up to 1
    do so afterwards, and no voxel of the image is left without.
    """
    back = resample.to_grid(scores, reference.affine, reference.spatial_shape, order=1, cval=None)
    return back.with_array(back.array.astype(np.float32, copy=False), np.asarray(reference.affine, np.float64))


def planes_to_input_grid(
    planes: Iterable[tuple[int, np.ndarray]], axis: int, grid: Placed, reference: Placed
) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
    """:func:`to_input_grid` as planes of scores come: index into (C, I, J, K) on the input's grid, and the scores there.

    ``planes`` are (first plane along ``axis``, (C, I', J', K')), in order; ``grid`` is the preprocessed one. Holds the planes at
    hand, a few at a time are resampled.
    """
    way = resample.Planes.between(grid, reference)
    lows, highs = way.ends(axis)
    order = range(len(lows)) if highs[-1] >= highs[0] else range(len(lows) - 1, -1, -1)  # an axis may be reversed
    lead, done, held, first = (slice(None),) * (1 + axis), 0, None, 0
    for start, found in planes:
        many = max(1, _PIECE * found.shape[1 + axis] // found.nbytes)
        for at in range(0, found.shape[1 + axis], many):
            piece = found[(*lead, slice(at, at + many))]
            held = piece if held is None else np.concatenate([held, piece], 1 + axis)
            there, begun = start + at + piece.shape[1 + axis], done
            while done < len(order) and highs[order[done]] <= there:
                done += 1
            for n in range(begun, done, many):
                some = order[n : min(n + many, done)]
                new = slice(min(some), max(some) + 1)
                index = (slice(None),) * (1 + way.axes[axis]) + (new,)
                yield index, way.made(held, first, axis, new.start, new.stop)
            needed = min(int(lows[order[done]]), there) if done < len(order) else there
            held, first = held[(*lead, slice(needed - first, None))].copy(), needed
        del found, piece  # or they were held while more planes are made


def _gray(array: np.ndarray) -> np.ndarray:
    """(1, I, J, K) luminance of one channel (as it is) or of red, green and blue (float32)."""
    if len(array) == 1:
        return array
    if len(array) != 3:
        raise Refused("CHANNELS", f"preprocess.channels gray takes 1 or 3 channels, this image has {len(array)}")
    return sum(np.float32(w) * channel.astype(np.float32) for w, channel in zip(_LUMINANCE, array, strict=True))[None]
