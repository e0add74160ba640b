"""Values on a common scale."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from sparkmed.config import Intensity
from sparkmed.rejection import InputError, Refused

Scale = Callable[[np.ndarray], np.ndarray]
"""What one voxel value of a channel becomes: any array of stored values to as many scaled ones."""

QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
"""Probabilities at which :func:`quantiles` describes an image."""
_CHANNELS = 8  # more of them are times or directions rather than contrasts, and are described as one
_COUNTED = 1 << 20  # voxels per channel: a quantile is then right to a tenth of a percent

_RESOLUTION = 1e-6  # of the largest value: variation below it is float32 rounding, not an image
_BLOCK = 1 << 20  # values at a time; numpy adds in steps that divide it, so that a sum does not depend on it


def normalise(array: np.ndarray, spec: Intensity) -> np.ndarray:
    """(C, I, J, K) float32: ``array`` scaled as ``spec`` says, each channel for itself.

    A channel without variation becomes 0 everywhere (``zscore``, ``percentile``), never NaN. Raises :class:`Refused`
    ``NOT_FINITE`` when a value is infinite, not a number, or beyond float32, and :class:`InputError` for percentiles
    that are not 0 <= low < high <= 100.
    """
    return scaled(array, scales(array, spec))


def scales(array: np.ndarray, spec: Intensity) -> list[Scale]:
    """One for each channel of (C, I, J, K): what :func:`scaled` applies to the image, or to any part of it.

    Raises what :func:`normalise` does; stored integers are never held as floating point all at once.
    """
    if array.dtype.kind not in "biuf":
        raise Refused("VOXEL_TYPE", f"voxels of type {array.dtype} are not numbers on one scale")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise Refused("NOT_FINITE", f"{np.count_nonzero(~np.isfinite(array))} voxels are infinite or not a number")
    fit = {"none": _unscaled, "zscore": _zscore, "window": _window, "percentile": _percentile}[spec.kind]
    fit = _unscaled if spec.against == "controls" else fit  # that was done to the whole plate
    with np.errstate(over="ignore", invalid="ignore"):
        found = [fit(channel, spec) for channel in array]
        for channel, scale in zip(array, found, strict=True):
            ends = np.array([channel.min(), channel.max()])  # a scale never falls: what lies between ends lies between theirs
            if not np.isfinite(scale(_floating(ends)).astype(np.float32)).all():
                raise Refused("NOT_FINITE", f"values up to {np.abs(array).max():g} are beyond float32")
    return found


def scaled(array: np.ndarray, scales: Sequence[Scale]) -> np.ndarray:
    """(C, I, J, K) float32 of the same shape."""
    result = np.empty(array.shape, np.float32)
    for channel, out, scale in zip(array, result, scales, strict=True):
        slow = int(np.argmax(np.abs(channel.strides)))  # planes as they lie in memory, some at a time
        planes, to = np.moveaxis(channel, slow, 0), np.moveaxis(out, slow, 0)
        step = max(1, _BLOCK * len(planes) // max(1, channel.size))
        for start in range(0, len(planes), step):
            to[start : start + step] = scale(_floating(planes[start : start + step]))
    return result


def quantiles(array: np.ndarray) -> list[float]:
    """Values of (C, I, J, K) at :data:`QUANTILES`, channel by channel; more than 8 channels are described as one.

    Of a large image every n-th voxel counts, n prime to its edges, so that all rows and slices take part.
    """
    found = []
    for channel in array if len(array) <= _CHANNELS else [array]:
        step = max(1, channel.size // _COUNTED)
        while any(math.gcd(step, n) > 1 for n in channel.shape):
            step += 1
        found += np.quantile(_floating(channel.ravel("K")[::step]), QUANTILES).tolist()
    return found


def _floating(values: np.ndarray) -> np.ndarray:
    """The values as they are: float32 where that holds them, else float64."""
    return values.astype(_working(values.dtype), copy=False)


def _working(dtype: np.dtype) -> np.dtype:
    return np.dtype(np.float32 if dtype.itemsize <= 2 or dtype == np.float32 else np.float64)


def _counted(values: np.ndarray, spec: Intensity) -> np.ndarray:
    return values[values != 0] if spec.nonzero else values


def _largest(values: np.ndarray) -> np.floating:
    return max(abs(_floating(values.min())), abs(_floating(values.max())))


def _unscaled(values: np.ndarray, spec: Intensity) -> Scale:
    return _same


def _zscore(values: np.ndarray, spec: Intensity) -> Scale:
    counted = _counted(values, spec)
    if counted.size == 0:
        return np.zeros_like
    working = _working(counted.dtype).type
    if working is np.float64:
        counted = _floating(counted)
    mean = counted.mean(dtype=np.float64)
    deviation = np.sqrt(_mean_square(counted, working(mean)))
    if deviation <= _RESOLUTION * _largest(counted):
        return np.zeros_like
    return partial(_standardised, mean=working(mean), deviation=working(deviation))


def _mean_square(values: np.ndarray, mean: np.floating) -> np.float64:
    """Of the differences from ``mean``, a block at a time where that gives the bits of the whole."""
    if mean.dtype == np.float64:
        return np.square(values - mean).mean()
    flat, total = values.ravel("K"), 0.0
    for start in range(0, flat.size, _BLOCK):
        block = np.square(_floating(flat[start : start + _BLOCK]) - mean)
        total = np.add.reduce(block, dtype=np.float64, initial=total)
    return total / flat.size


def _window(values: np.ndarray, spec: Intensity) -> Scale:
    return partial(_between, low=spec.low, high=spec.high)


def _percentile(values: np.ndarray, spec: Intensity) -> Scale:
    ends = (0.5 if spec.low is None else spec.low, 99.5 if spec.high is None else spec.high)
    if not 0 <= ends[0] < ends[1] <= 100:
        raise InputError(f"intensity.kind percentile wants 0 <= low < high <= 100, got {ends[0]:g} and {ends[1]:g}")
    counted = _counted(values, spec)
    if counted.size == 0:
        return np.zeros_like
    low, high = (float(p) for p in np.percentile(_subtractable(counted), ends))
    if high - low > _RESOLUTION * max(abs(low), abs(high)):
        return partial(_between, low=low, high=high)
    # most voxels share one value (an empty frame, a mask): what stands out of it is 1
    margin = _RESOLUTION * max(abs(low), abs(high))
    return partial(_above, limit=high + margin)


def _subtractable(values: np.ndarray) -> np.ndarray:
    """The stored small integers if their differences do not wrap, else as :func:`_floating`: quantiles are the same."""
    small = values.dtype.kind in "iu" and values.dtype.itemsize <= 2
    if small and int(values.max()) - int(values.min()) <= np.iinfo(values.dtype).max:
        return values
    return _floating(values)


def _same(values: np.ndarray) -> np.ndarray:
    return values


def _standardised(values: np.ndarray, mean: np.floating, deviation: np.floating) -> np.ndarray:
    result = values - mean
    result /= deviation
    return result


def _between(values: np.ndarray, low: float, high: float) -> np.ndarray:
    result = values - values.dtype.type(low)
    result /= values.dtype.type(high - low)
    return np.clip(result, 0, 1, out=result)


def _above(values: np.ndarray, limit: float) -> np.ndarray:
    return (values > limit).astype(np.float32)
