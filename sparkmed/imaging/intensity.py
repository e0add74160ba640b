"""Values on a common scale."""

import numpy as np

from sparkmed.config import Intensity
from sparkmed.rejection import InputError, Refused

_RESOLUTION = 1e-6  # of the largest value: variation below it is float32 rounding, not an image


def normalise(array: np.ndarray, spec: Intensity) -> np.ndarray:
    """(C, I, J, K) float32: ``array`` scaled as ``spec`` says, each channel for itself.

    A channel without variation becomes 0 everywhere (``zscore``, ``percentile``), never NaN. Raises :class:`Refused`
    ``NOT_FINITE`` when a value is infinite, not a number, or beyond float32, and :class:`InputError` for percentiles
    that are not 0 <= low < high <= 100.
    """
    if array.dtype.kind not in "biuf":
        raise Refused("VOXEL_TYPE", f"voxels of type {array.dtype} are not numbers on one scale")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise Refused("NOT_FINITE", f"{np.count_nonzero(~np.isfinite(array))} voxels are infinite or not a number")
    scale = {"none": _unscaled, "zscore": _zscore, "window": _window, "percentile": _percentile}[spec.kind]
    result = np.empty(array.shape, np.float32)
    with np.errstate(over="ignore"):
        for c, channel in enumerate(array):
            result[c] = scale(_floating(channel), spec)
    if not np.isfinite(result).all():
        raise Refused("NOT_FINITE", f"values up to {np.abs(array).max():g} are beyond float32")
    return result


def _floating(channel: np.ndarray) -> np.ndarray:
    """The values as they are: float32 where that holds them, else float64."""
    small = channel.dtype.itemsize <= 2 or channel.dtype == np.float32
    return channel.astype(np.float32 if small else np.float64, copy=False)


def _counted(values: np.ndarray, spec: Intensity) -> np.ndarray:
    return values[values != 0] if spec.nonzero else values


def _unscaled(values: np.ndarray, spec: Intensity) -> np.ndarray:
    return values


def _zscore(values: np.ndarray, spec: Intensity) -> np.ndarray:
    counted = _counted(values, spec)
    if counted.size == 0:
        return np.zeros_like(values)
    mean = counted.mean(dtype=np.float64)
    deviation = np.sqrt(np.square(counted - mean.astype(values.dtype)).mean(dtype=np.float64))
    if deviation <= _RESOLUTION * np.abs(counted).max():
        return np.zeros_like(values)
    return (values - mean.astype(values.dtype)) / deviation.astype(values.dtype)


def _window(values: np.ndarray, spec: Intensity) -> np.ndarray:
    return _between(values, spec.low, spec.high)


def _percentile(values: np.ndarray, spec: Intensity) -> np.ndarray:
    ends = (0.5 if spec.low is None else spec.low, 99.5 if spec.high is None else spec.high)
    if not 0 <= ends[0] < ends[1] <= 100:
        raise InputError(f"intensity.kind percentile wants 0 <= low < high <= 100, got {ends[0]:g} and {ends[1]:g}")
    counted = _counted(values, spec)
    if counted.size == 0:
        return np.zeros_like(values)
    low, high = (float(p) for p in np.percentile(counted, ends))
    if high - low > _RESOLUTION * max(abs(low), abs(high)):
        return _between(values, low, high)
    # most voxels share one value (an empty frame, a mask): what stands out of it is 1
    margin = _RESOLUTION * max(abs(low), abs(high))
    return (values > high + margin).astype(np.float32)


def _between(values: np.ndarray, low: float, high: float) -> np.ndarray:
    scaled = (values - values.dtype.type(low)) / values.dtype.type(high - low)
    return np.clip(scaled, 0, 1, out=scaled)
