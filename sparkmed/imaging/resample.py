"""Volumes on other grids: to a spacing, to a size, to the grid of another image.

Every function computes where the centre of each new voxel lies among the old ones from the two affines, in float64, and
interpolates there: linear for images (``order`` 1, float32), nearest for labels (``order`` 0, dtype kept, no new values).

Images that lose resolution are smoothed first, against aliasing, with a Gaussian whose width brings the point spread of
the old voxels to that of the new ones (Cardoso et al. 2015, MICCAI, doi:10.1007/978-3-319-24571-3_81): a variance of
(factor^2 - 1) / (8 ln 2) old voxels along an axis that is coarser by ``factor``. Labels are not smoothed.

Beyond the centres of the outer voxels their values are continued: up to the edge of those voxels, half a voxel out, always,
and further where no fill value is given. A function that is linear in the world is reproduced away from these edges.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from scipy import ndimage, sparse

from sparkmed.imaging.geometry import Grid, Placed, grid_of
from sparkmed.imaging.geometry import spacing as spacing_of
from sparkmed.imaging.volume import Volume
from sparkmed.rejection import Refused

_SNAP = 1e-5  # voxels: a position so close to a voxel's centre is that centre
_ALIGNED = 1e-3  # voxels: grids whose axes drift less than this over the whole image are parallel
_SAME_SPACING = 1e-3  # relative: a spacing so close to the wanted one is left, and stays as it is in the affine
_MOST_VOXELS = 2**31
_BLOCK = 1 << 20  # voxels interpolated at a time on oblique grids
_SLAB = 16  # planes interpolated at a time on parallel grids


def to_spacing(volume: Volume, spacing: tuple[float, float, float], order: int = 1) -> Volume:
    """The volume with voxels of ``spacing`` (mm along I, J, K), its centre where it was; see :func:`spaced` for the grid.

    Returns the volume itself when its spacing is right already. Raises :class:`Refused` ``NOT_FINITE``,
    ``VOXEL_TYPE``, ``TOO_LARGE``.
    """
    return _onto(volume, spaced(grid_of(volume), spacing), order, None)


def to_size(volume: Volume, size: tuple[int, int, int], order: int = 1) -> Volume:
    """The volume in ``size`` (I, J, K) voxels over the same field of view, from the outer edges of its outer voxels.

    Returns the volume itself when its size is right already. Raises :class:`Refused` ``NOT_FINITE``,
    ``VOXEL_TYPE``, ``TOO_LARGE``, ``SINGLETON_AXIS``.
    """
    return _onto(volume, sized(grid_of(volume), size), order, None)


def to_grid(
    volume: Volume, affine: np.ndarray, spatial_shape: tuple[int, int, int], order: int = 1, cval: float | None = 0.0
) -> Volume:
    """The volume at the voxels of another grid: ``affine`` (4, 4) index to RAS+ mm, ``spatial_shape`` (I, J, K).

    ``cval`` fills what lies outside the volume (beyond the edges of its outer voxels); None continues the outer voxels.
    Returns the volume itself when it is on that grid already. Raises :class:`Refused` ``NOT_FINITE``, ``VOXEL_TYPE``,
    ``TOO_LARGE``.
    """
    return _onto(volume, Grid(affine, spatial_shape), order, cval)


def spaced(grid: Placed, spacing: tuple[float, float, float]) -> Grid:
    """The grid of ``spacing`` (mm) around the same centre: as few voxels as cover the field of view.

    An axis of one voxel is left, and so is one whose spacing is right to 0.1 %.
    """
    if len(spacing) != 3 or not all(math.isfinite(s) and s > 0 for s in spacing):
        raise ValueError(f"spacing is three positive numbers in mm; got {spacing}")
    factors, shape = [], []
    for n, have, want in zip(grid.spatial_shape, spacing_of(grid.affine), spacing, strict=True):
        keep = n == 1 or abs(want / have - 1) <= _SAME_SPACING
        factors.append(1.0 if keep else want / have)
        shape.append(n if keep else max(1, math.ceil(n * have / want - 0.01)))  # 1 % of a voxel is no reason for another
    return _centred(grid, factors, shape)


def sized(grid: Placed, size: tuple[int, int, int]) -> Grid:
    """The grid of ``size`` (I, J, K) voxels over the same field of view. A single voxel is not spread over many."""
    if len(size) != 3 or min(size) < 1:
        raise ValueError(f"size is (I, J, K), each at least 1; got {size}")
    for name, n, want in zip("IJK", grid.spatial_shape, size, strict=True):
        if n == 1 and want > 1:
            raise Refused("SINGLETON_AXIS", f"one voxel along {name} cannot be resampled to {want}")
    return _centred(grid, [n / m for n, m in zip(grid.spatial_shape, size, strict=True)], list(size))


def _centred(grid: Placed, factors: list[float], shape: list[int]) -> Grid:
    """The grid of ``shape`` whose voxels are ``factors`` as large, around the centre of ``grid``."""
    if math.prod(shape) > _MOST_VOXELS:
        raise Refused("TOO_LARGE", f"resampling {tuple(grid.spatial_shape)} gives {tuple(shape)} voxels, more than {_MOST_VOXELS}")
    first = [(n - 1) / 2 - (m - 1) / 2 * f for n, m, f in zip(grid.spatial_shape, shape, factors, strict=True)]
    affine = np.array(grid.affine, np.float64)
    affine[:3, 3] += affine[:3, :3] @ first
    affine[:3, :3] *= factors
    return Grid(affine, tuple(shape))


@dataclass(frozen=True, eq=False)
class Planes:
    """:func:`to_grid` (``order`` 1, outer voxels continued) between parallel grids, some planes at a time: the same bits.

    ``axes`` is the new axis that runs along each old one. ``weights`` are per old axis (new voxels, old voxels), applied along
    the axes ``passes`` in this order.
    """

    axes: tuple[int, int, int]
    weights: tuple[sparse.csr_array, ...]
    passes: tuple[int, ...]

    @classmethod
    def between(cls, old: Placed, new: Placed) -> "Planes":
        """Raises :class:`ValueError` for grids that are oblique to each other."""
        to_old = np.linalg.inv(old.affine) @ new.affine
        axes = _parallel(to_old, tuple(new.spatial_shape))
        if axes is None:
            raise ValueError("the grids are oblique to each other")
        return cls(axes, *_linear_passes(to_old, axes, tuple(old.spatial_shape), tuple(new.spatial_shape)))

    def ends(self, axis: int) -> tuple[np.ndarray, np.ndarray]:
        """For each new plane across ``axes[axis]`` the first old plane that it is made of, and the one behind the last."""
        indices, first = self.weights[axis].indices, self.weights[axis].indptr[:-1]
        return np.minimum.reduceat(indices, first), np.maximum.reduceat(indices, first) + 1

    def made(self, array: np.ndarray, first: int, axis: int, start: int, stop: int) -> np.ndarray:
        """(C, I, J, K) float32: new planes ``start`` to ``stop``; ``array`` is the old planes across ``axis`` from ``first`` on."""
        lows, highs = self.ends(axis)
        low, high = int(lows[start:stop].min()), int(highs[start:stop].max())
        part = array[(slice(None),) * (1 + axis) + (slice(low - first, high - first),)]
        weights = [w[start:stop, low:high] if a == axis else w for a, w in enumerate(self.weights)]
        return _placed_along(_all_interpolated(part, weights, self.passes), self.axes)


def _onto(volume: Volume, grid: Grid, order: int, cval: float | None) -> Volume:
    if order not in (0, 1):
        raise ValueError(f"order is 0 (nearest) or 1 (linear); got {order}")
    if math.prod(grid.spatial_shape) > _MOST_VOXELS:
        raise Refused("TOO_LARGE", f"a grid of {grid.spatial_shape} has more than {_MOST_VOXELS} voxels")
    to_source = np.linalg.inv(volume.affine) @ grid.affine
    axes = _parallel(to_source, grid.spatial_shape)
    if axes is not None and axes == (0, 1, 2) and grid.spatial_shape == tuple(volume.spatial_shape):
        steps = [_positions(to_source, a, a, n) for a, n in enumerate(grid.spatial_shape)]
        if all(np.array_equal(s, np.arange(len(s))) for s in steps):
            return volume
    if axes is not None:
        array = _separable(volume.array, to_source, axes, grid.spatial_shape, order, cval)
    else:
        array = _oblique(volume.array, to_source, grid.spatial_shape, order, cval)
    return volume.with_array(array, grid.affine)


def _real(channel: np.ndarray) -> np.ndarray:
    """(I, J, K) float32, every value finite: one that is not would spread to its neighbours."""
    _require_real(channel)
    return np.ascontiguousarray(channel, np.float32)


def _require_real(channel: np.ndarray):
    if channel.dtype.kind not in "biuf":
        raise Refused("VOXEL_TYPE", f"voxels of type {channel.dtype} are not numbers on one scale")
    if channel.dtype.kind == "f":
        with np.errstate(over="ignore"):
            broken = sum(int(np.count_nonzero(~np.isfinite(p.astype(np.float32, copy=False)))) for p in channel)
        if broken:
            raise Refused("NOT_FINITE", f"{broken} voxels are infinite, not a number, or beyond float32")


def _parallel(to_source: np.ndarray, shape: tuple[int, int, int]) -> tuple[int, int, int] | None:
    """The new axis that runs along each old one (either way), or None for grids that are oblique to each other."""
    drift = np.abs(to_source[:3, :3]) * (np.array(shape) - 1)
    found = []
    for axes in permutations(range(3)):
        if all(drift[a, o] <= _ALIGNED for a in range(3) for o in range(3) if o != axes[a]):
            found.append((sum(abs(to_source[a, o]) for a, o in enumerate(axes)), axes))
    return max(found, key=lambda f: f[0])[1] if found else None


def _positions(to_source: np.ndarray, axis: int, new_axis: int, n: int) -> np.ndarray:
    """Positions in old voxels along ``axis`` of the n new voxels along ``new_axis``."""
    x = to_source[axis, new_axis] * np.arange(n) + to_source[axis, 3]
    whole = np.rint(x)
    return np.where(np.abs(x - whole) < _SNAP, whole, x)


def _separable(array, to_source, axes, shape, order, cval) -> np.ndarray:
    """Interpolation one axis at a time; (C, I, J, K) to (C, *shape)."""
    positions = [_positions(to_source, a, o, shape[o]) for a, o in enumerate(axes)]
    outside = [_outside(x, n) for x, n in zip(positions, array.shape[1:], strict=True)]
    if order == 0:
        picked = array
        for axis, x in enumerate(positions):
            picked = picked.take(_nearest(_untied(x), array.shape[1 + axis]), axis=1 + axis)
    else:
        picked = _all_interpolated(array, *_linear_passes(to_source, axes, array.shape[1:], shape))
    if cval is not None:
        for axis, out in enumerate(outside):
            if out.any():
                picked[(slice(None),) * (1 + axis) + (out,)] = cval
    return _placed_along(picked, axes)


def _linear_passes(to_source, axes, old_shape, shape) -> tuple[tuple[sparse.csr_array, ...], tuple[int, ...]]:
    """Weights per old axis, and the axes along which there is something to do, in order."""
    weights = []
    for a, (o, n) in enumerate(zip(axes, old_shape, strict=True)):
        weights.append(_smooth_linear(_positions(to_source, a, o, shape[o]), n, abs(to_source[a, o])))
    todo = [a for a in range(3) if not _is_identity(weights[a])]
    todo.sort(key=lambda a: weights[a].shape[0] / weights[a].shape[1])  # what shrinks first saves work later
    return tuple(weights), tuple(todo)


def _placed_along(array: np.ndarray, axes: tuple[int, int, int]) -> np.ndarray:
    back = tuple(1 + axes.index(o) for o in range(3))
    return np.ascontiguousarray(array.transpose(0, *back))


def _all_interpolated(array: np.ndarray, weights: Sequence[sparse.csr_array], todo: Sequence[int]) -> np.ndarray:
    if len(array) == 1:
        return _interpolated(array[0], weights, todo)[None]
    result = np.empty((len(array), *(w.shape[0] for w in weights)), np.float32)
    for channel, out in zip(array, result, strict=True):
        out[...] = _interpolated(channel, weights, todo)
    return result


def _interpolated(channel: np.ndarray, weights: Sequence[sparse.csr_array], todo: Sequence[int]) -> np.ndarray:
    """``weights`` (m, n) of the axes ``todo`` applied in this order to (I, J, K); float32, held once beside the channel.

    A pass along one axis treats the lines along it each for itself. So the first two go slab by slab across a third axis, and a
    third one slab by slab in the memory of its own input.
    """
    _require_real(channel)
    if not todo:
        return np.ascontiguousarray(channel, np.float32)
    across = todo[2] if len(todo) == 3 else next(a for a in (0, 1, 2) if a not in todo)
    halfway = [weights[a].shape[0] if a in todo[:2] else n for a, n in enumerate(channel.shape)]
    final = [weights[a].shape[0] if a in todo else n for a, n in enumerate(channel.shape)]
    memory = np.empty(max(math.prod(halfway), math.prod(final)), np.float32)
    if across == 0:
        both = memory.reshape(-1, *final[1:])
        values, result = both[: halfway[0]], both[: final[0]]
    else:  # in at the end, out at the front: what is written stays behind what is yet to be read
        values = memory[len(memory) - math.prod(halfway) :].reshape(halfway)
        result = memory[: math.prod(final)].reshape(final)
    for start in range(0, channel.shape[across], _SLAB):
        slab = (slice(None),) * across + (slice(start, start + _SLAB),)
        part = np.ascontiguousarray(channel[slab], np.float32)
        for axis in todo[:2]:
            part = _along(part, weights[axis], axis)
        values[slab] = part
    if len(todo) == 3:
        along = 1 if across == 0 else 0
        for start in range(0, final[along], _SLAB):
            slab = (slice(None),) * along + (slice(start, start + _SLAB),)
            result[slab] = _along(values[slab], weights[across], across)
    return result


def _oblique(array, to_source, shape, order, cval) -> np.ndarray:
    """Interpolation in three dimensions at once; (C, I, J, K) to (C, *shape), a block of planes at a time."""
    old = array.shape[1:]
    if order == 1:
        factors = np.linalg.norm(to_source[:3, :3], axis=1)  # old voxels per new one, whatever the angle
        smooth = [(a, _gaussian(n, f, np.arange(n))) for a, (n, f) in enumerate(zip(old, factors, strict=True))]
        channels = []
        for channel in array:
            values = _real(channel)
            for axis, weights in smooth:
                if not _is_identity(weights):
                    values = np.ascontiguousarray(_along(values, weights, axis))
            channels.append(values)
    result = np.empty((len(array), *shape), np.float32 if order == 1 else array.dtype)
    j, k = np.meshgrid(np.arange(shape[1]), np.arange(shape[2]), indexing="ij")
    plane = to_source[:3, 1, None, None] * j + to_source[:3, 2, None, None] * k + to_source[:3, 3, None, None]
    planes = max(1, _BLOCK // (shape[1] * shape[2]))
    for start in range(0, shape[0], planes):
        i = np.arange(start, min(start + planes, shape[0]))
        x = to_source[:3, 0, None, None, None] * i[:, None, None] + plane[:, None]
        outside = np.any([_outside(x[a], n) for a, n in enumerate(old)], axis=0)
        nearest = tuple(_nearest(x[a], n) for a, n in enumerate(old)) if order == 0 else None
        for c in range(len(array)):
            if order == 1:
                block = ndimage.map_coordinates(channels[c], x, order=1, mode="nearest", output=np.float32)
            else:
                block = array[c][nearest]
            if cval is not None:
                block[outside] = cval
            result[c, i[0] : i[-1] + 1] = block
    return result


def _outside(x: np.ndarray, n: int) -> np.ndarray:
    """Which positions lie beyond the outer edges of n voxels."""
    return (x < -0.5 - _SNAP) | (x > n - 0.5 + _SNAP)


def _nearest(x: np.ndarray, n: int) -> np.ndarray:
    """The voxel nearest to each position; of two equally near ones the first, whatever the rounding errors."""
    return np.clip(np.ceil(x - 0.5 - _SNAP), 0, n - 1).astype(np.intp)


def _untied(x: np.ndarray) -> np.ndarray:
    """Positions along an axis where those midway between two voxels go up and down in turn.

    Halving a label has midway positions only: all rounded one way, it would be half a voxel beside its image.
    """
    midway = np.abs(x - np.floor(x) - 0.5) < _SNAP
    return np.where(midway, np.floor(x) + np.cumsum(midway) % 2, x)


def _linear(x: np.ndarray, n: int) -> sparse.csr_array:
    """(len(x), n) weights of linear interpolation at positions among n voxels, the outer ones continued."""
    x = np.clip(x, 0, n - 1)
    low = np.minimum(np.floor(x).astype(np.intp), max(n - 2, 0))
    high = np.minimum(low + 1, n - 1)
    rows = np.arange(len(x))
    weights = np.concatenate([1 - (x - low), x - low])
    return _matrix(weights, np.concatenate([rows, rows]), np.concatenate([low, high]), (len(x), n))


def _smooth_linear(x: np.ndarray, n: int, factor: float) -> sparse.csr_array:
    """(len(x), n) weights of smoothing for voxels ``factor`` as large and then interpolating at x."""
    weights = _linear(x, n)
    used = np.unique(weights.indices)
    return weights[:, used] @ _gaussian(n, factor, used)


def _gaussian(n: int, factor: float, rows: np.ndarray) -> sparse.csr_array:
    """(len(rows), n) weights that smooth the voxels ``rows`` of n before they become ``factor`` as large, if that is above 1."""
    count = len(rows)
    if n == 1 or factor <= 1 + _SAME_SPACING:
        return _matrix(np.ones(count), np.arange(count), rows, (count, n))
    sigma = math.sqrt((factor**2 - 1) / (8 * math.log(2)))
    reach = max(1, math.ceil(4 * sigma))
    offsets = np.arange(-reach, reach + 1)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    kernel /= kernel.sum()
    columns = np.clip(rows[:, None] + offsets, 0, n - 1)
    return _matrix(np.tile(kernel, count), np.repeat(np.arange(count), len(offsets)), columns.ravel(), (count, n))


def _matrix(weights, rows, columns, shape) -> sparse.csr_array:
    matrix = sparse.csr_array((weights, (rows, columns)), shape=shape)
    matrix.sum_duplicates()
    matrix.eliminate_zeros()
    return matrix


def _is_identity(weights: sparse.csr_array) -> bool:
    n, m = weights.shape
    return n == m == weights.nnz and np.array_equal(weights.indices, np.arange(n)) and bool((weights.data == 1).all())


def _along(values: np.ndarray, weights: sparse.csr_array, axis: int) -> np.ndarray:
    """``weights`` (m, n) applied along one axis of (I, J, K) float32 values.

    Sparse products add in a fixed order in one thread, so the same bits come out on any machine and number of threads.
    """
    weights = weights.astype(np.float32)
    shape = [*values.shape[:axis], weights.shape[0], *values.shape[axis + 1 :]]
    if axis == 0:
        return (weights @ np.ascontiguousarray(values).reshape(values.shape[0], -1)).reshape(shape)
    if axis == 1:
        result = np.empty(shape, np.float32)
        for i, plane in enumerate(values):
            result[i] = weights @ np.ascontiguousarray(plane)
        return result
    flat = np.ascontiguousarray(values.reshape(-1, values.shape[2]).T)
    return (weights @ flat).T.reshape(shape)
