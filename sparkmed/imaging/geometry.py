"""Where voxels are: 4x4 affines from voxel index (centre) to RAS+ millimetres.

A column of the matrix is the step in mm along one array axis; the last column is the position of voxel (0, 0, 0).
Axis codes name the direction in which each index grows: ``RAS`` is to the patient's right, anterior, superior.
"""

from dataclasses import dataclass
from itertools import permutations, product
from typing import Protocol

import numpy as np

from sparkmed.imaging.volume import Volume
from sparkmed.rejection import InputError

_NAMES = ("LR", "PA", "IS")  # of the negative and positive direction of each world axis
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


class Placed(Protocol):
    """Anything with a grid: a :class:`Volume` or a :class:`Grid`."""

    affine: np.ndarray
    spatial_shape: tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Grid:
    """The geometry of a volume without its voxels: ``affine`` (4, 4) index to RAS+ mm, ``spatial_shape`` (I, J, K)."""

    affine: np.ndarray
    spatial_shape: tuple[int, int, int]

    def __post_init__(self):
        affine = np.array(self.affine, np.float64)
        affine = affine.reshape(4, 4) if affine.size == 16 else affine
        shape = tuple(int(n) for n in self.spatial_shape)
        if affine.shape != (4, 4) or not np.isfinite(affine).all() or np.linalg.det(affine[:3, :3]) == 0:
            raise ValueError(f"Grid.affine is an invertible finite (4, 4) matrix; got {affine.tolist()}")
        if len(shape) != 3 or min(shape) < 1:
            raise ValueError(f"Grid.spatial_shape is (I, J, K), each at least 1; got {shape}")
        object.__setattr__(self, "affine", affine)
        object.__setattr__(self, "spatial_shape", shape)


def grid_of(placed: Placed) -> Grid:
    """The grid of a volume."""
    return Grid(placed.affine, placed.spatial_shape)


def spacing(affine: np.ndarray) -> tuple[float, float, float]:
    """Distance between voxel centres along I, J, K in mm.

    >>> spacing(np.diag([2, 3, 4, 1]))
    (2.0, 3.0, 4.0)
    """
    return tuple(float(s) for s in np.linalg.norm(np.asarray(affine, np.float64)[:3, :3], axis=0))


def lps_to_ras(matrix: np.ndarray) -> np.ndarray:
    """A (4, 4) matrix to RAS+ mm from one to DICOM's patient coordinates LPS+ mm (PS3.3 C.7.6.2.1.1), or the reverse.

    >>> lps_to_ras(np.eye(4)).diagonal().tolist()
    [-1.0, -1.0, 1.0, 1.0]
    """
    return _LPS_TO_RAS @ np.asarray(matrix, np.float64)


def axis_codes(affine: np.ndarray) -> str:
    """The three letters of the world directions that are closest to I, J, K; each world axis is used once.

    >>> axis_codes(np.diag([-1, -1, 1, 1]))
    'LPS'
    """
    axes, signs = closest_axes(_directions(affine))
    return "".join(_NAMES[w][int(s > 0)] for w, s in zip(axes, signs, strict=True))


def closest_axes(cosines: np.ndarray) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """For each column of a (3, 3) matrix of cosines the row it is closest to, all rows different, and the sign there.

    The assignment with the greatest sum of absolute cosines wins, so an oblique of 45 degrees has one answer too.
    """
    size = np.abs(cosines)
    # equal sums differ by rounding only: rounded away, the first permutation wins
    best = max(permutations(range(3)), key=lambda rows: round(float(sum(size[r, c] for c, r in enumerate(rows))), 9))
    return best, tuple(1 if cosines[r, c] >= 0 else -1 for c, r in enumerate(best))


def reorient(volume: Volume, codes: str) -> Volume:
    """The same voxels with axes flipped and permuted so that ``axis_codes`` is ``codes``; no value changes.

    Returns the volume itself when its axes are so already. Raises :class:`InputError` for codes such as ``RRS``.
    """
    order, signs = _moves(volume.affine, codes)
    if order == (0, 1, 2) and signs == (1, 1, 1):
        return volume
    return moved(volume, order, signs)


def reoriented(grid: Grid, codes: str) -> Grid:
    """The grid that :func:`reorient` gives."""
    return _moved_grid(grid, *_moves(grid.affine, codes))


def moved(volume: Volume, order: tuple[int, int, int], signs: tuple[int, int, int]) -> Volume:
    """The volume whose axis n is axis ``order[n]`` of this one, reversed where ``signs[n]`` is -1."""
    array = volume.array.transpose(0, *(1 + o for o in order))
    array = array[(slice(None), *(slice(None, None, s) for s in signs))]
    return volume.with_array(np.ascontiguousarray(array), _moved_grid(grid_of(volume), order, signs).affine)


def _moves(affine: np.ndarray, codes: str) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    wanted = [next((w for w, names in enumerate(_NAMES) if c in names), None) for c in codes]
    if sorted(wanted, key=str) != [0, 1, 2]:
        raise InputError(f"axis codes {codes!r}: wanted one of R or L, one of A or P, one of S or I, in any order")
    axes, signs = closest_axes(_directions(affine))
    order = tuple(axes.index(w) for w in wanted)
    flips = tuple(signs[o] * (1 if c == _NAMES[w][1] else -1) for o, w, c in zip(order, wanted, codes, strict=True))
    return order, flips


def _moved_grid(grid: Grid, order: tuple[int, int, int], signs: tuple[int, int, int]) -> Grid:
    affine = grid.affine.copy()
    for n, (o, s) in enumerate(zip(order, signs, strict=True)):
        affine[:3, n] = s * grid.affine[:3, o]
        if s < 0:
            affine[:3, 3] += (grid.spatial_shape[o] - 1) * grid.affine[:3, o]
    return Grid(affine, tuple(grid.spatial_shape[o] for o in order))


def _directions(affine: np.ndarray) -> np.ndarray:
    """(3, 3): the columns of the affine at unit length."""
    matrix = np.asarray(affine, np.float64)[:3, :3]
    return matrix / np.linalg.norm(matrix, axis=0)


def corners(affine: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """(8, 3) RAS+ mm of the centres of the corner voxels of a grid of (I, J, K) voxels, the last index fastest."""
    index = np.array(list(product(*((0, n - 1) for n in shape))), np.float64)
    affine = np.asarray(affine, np.float64)
    return index @ affine[:3, :3].T + affine[:3, 3]


def corner_distance(a: Placed, b: Placed) -> float:
    """Largest distance in mm between the same corner voxels of two grids of one shape; no other voxel is further apart."""
    return float(np.linalg.norm(corners(a.affine, a.spatial_shape) - corners(b.affine, b.spatial_shape), axis=1).max())


def grid_tolerance(placed: Placed) -> float:
    """How far in mm the corners of two files on one grid may lie apart: rounding of headers, never a shift that matters.

    0.1 mm or 1 % of the smallest spacing, whichever is greater, and never more than a quarter of it (microscopy).
    Axes of one voxel do not count.
    """
    steps = [s for s, n in zip(spacing(placed.affine), placed.spatial_shape, strict=True) if n > 1] or [min(spacing(placed.affine))]
    return min(max(0.1, 0.01 * min(steps)), 0.25 * min(steps))


def same_grid(a: Placed, b: Placed, tolerance: float | None = None) -> bool:
    """Whether two images have one shape and their voxels lie within ``tolerance`` mm (None: :func:`grid_tolerance`)."""
    if tuple(a.spatial_shape) != tuple(b.spatial_shape):
        return False
    return corner_distance(a, b) <= (grid_tolerance(a) if tolerance is None else tolerance)
