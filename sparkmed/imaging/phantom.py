"""Images with known answers: for tests, for the demo, for a look before real data are there."""

from collections.abc import Sequence

import numpy as np

from sparkmed.imaging.patches import generator
from sparkmed.imaging.volume import Volume

_AIR, _BODY = -1000.0, 20.0  # HU
# class by class: HU, then ellipsoids as centre and radii in units of the body's radii along right, anterior, superior
_ORGANS: tuple[tuple[float, tuple[tuple[tuple[float, float, float], tuple[float, float, float]], ...]], ...] = (
    (130.0, (((0.42, 0.12, 0.05), (0.38, 0.46, 0.52)),)),  # one large
    (280.0, (((-0.30, -0.42, -0.10), (0.16, 0.20, 0.36)), ((-0.58, 0.22, 0.10), (0.20, 0.26, 0.34)))),  # two small
    (-450.0, (((-0.16, 0.42, -0.05), (0.20, 0.22, 0.42)),)),  # filled with gas
)
MOST_ORGANS = len(_ORGANS)
"""How many organs :func:`ct` knows."""


def ct(
    seed: int,
    shape: tuple[int, int, int] = (64, 64, 40),
    spacing: tuple[float, float, float] = (3.0, 3.0, 4.0),
    organs: int = 2,
    noise: float = 25.0,
    codes: str = "LPS",
) -> tuple[Volume, Volume]:
    """A body with ellipsoid organs: the image (1, I, J, K) int16 in HU, and its label uint8, 0 outside the organs.

    ``spacing`` is mm; ``organs`` 1 to 3; ``noise`` is a standard deviation in HU; ``codes`` are the axis codes of the
    array (``LPS`` is how DICOM stores axial slices). Place, size and grey value of the organs vary with ``seed``.
    """
    if not 1 <= organs <= MOST_ORGANS:
        raise ValueError(f"organs is 1 to {MOST_ORGANS}; got {organs}")
    rng = generator(f"ct:{seed}")
    affine = _centred_affine(shape, spacing, codes)
    extent = _world_extent(affine, shape)
    body = extent / 2 * np.array([0.88, 0.80, 1.3]) * rng.uniform(0.92, 1.0, 3)  # cut off above and below, as in a scan
    middle = extent * rng.uniform(-0.04, 0.04, 3) * (1, 1, 0)
    values = np.full(shape, _AIR)
    values[ellipsoid(affine, shape, middle, body)] = _BODY
    label = np.zeros(shape, np.uint8)
    inside = body * (1, 1, 1 / 1.3)
    for value, (hu, ellipsoids) in enumerate(_ORGANS[:organs], start=1):
        hu += rng.uniform(-15, 15)
        for centre, radii in ellipsoids:
            centre = middle + inside * (np.array(centre) + rng.uniform(-0.06, 0.06, 3))
            organ = ellipsoid(affine, shape, centre, inside * radii * rng.uniform(0.85, 1.1, 3)) & (label == 0)
            values[organ], label[organ] = hu, value
    values += rng.normal(0, noise, shape)
    image = np.clip(np.rint(values), -1024, 3071).astype(np.int16)
    return Volume(image[None], affine, modality="CT"), Volume(label[None], affine, modality="SEG")


def radiograph(seed: int, label: int, size: tuple[int, int] = (128, 128), noise: float = 8.0) -> Volume:
    """A projection of an abdomen (``label`` 0) or a chest (1): (1, I, J, 1) uint8, columns along I, rows along J.

    A chest has two dark lungs beside a bright heart; an abdomen has a pelvis below and a few dark bubbles of gas.
    """
    if label not in (0, 1):
        raise ValueError(f"label is 0 (abdomen) or 1 (chest); got {label}")
    rng = generator(f"radiograph:{label}:{seed}")
    i, j = np.meshgrid((np.arange(size[0]) + 0.5) / size[0], (np.arange(size[1]) + 0.5) / size[1], indexing="ij")

    def spot(centre: Sequence[float], radii: Sequence[float], jitter: float = 0.02) -> np.ndarray:
        (x, y), (a, b) = np.add(centre, rng.uniform(-jitter, jitter, 2)), np.multiply(radii, rng.uniform(0.85, 1.15, 2))
        return ((i - x) / a) ** 2 + ((j - y) / b) ** 2 <= 1

    values = np.full(size, 15.0)
    values[spot((0.5, 0.55), (0.44, 0.62))] = 120 + rng.uniform(-10, 10)
    if label == 1:
        values[spot((0.30, 0.48), (0.14, 0.28)) | spot((0.70, 0.48), (0.14, 0.28))] = 55 + rng.uniform(-10, 10)
        values[spot((0.55, 0.62), (0.13, 0.15))] = 170
    else:
        values[spot((0.28, 0.85), (0.16, 0.11)) | spot((0.72, 0.85), (0.16, 0.11))] = 180
        for _ in range(rng.integers(2, 5)):
            values[spot(rng.uniform((0.3, 0.3), (0.7, 0.65)), (0.05, 0.04))] = 70
    values[np.abs(i - 0.5) < 0.035] += 35  # the spine
    values += rng.normal(0, noise, size)
    image = np.clip(np.rint(values), 0, 255).astype(np.uint8)
    return Volume(image[None, :, :, None], np.diag([-1.0, -1.0, 1.0, 1.0]), modality="CR")


def ellipsoid(affine: np.ndarray, shape: tuple[int, int, int], centre: Sequence[float], radii: Sequence[float]) -> np.ndarray:
    """(I, J, K) bool: voxels whose centres lie in an ellipsoid along the world axes; ``centre`` and ``radii`` in RAS+ mm.

    Its volume is 4/3 pi times the radii, whatever the grid.
    """
    index = np.meshgrid(*(np.arange(n, dtype=np.float64) for n in shape), indexing="ij", sparse=True)
    total = np.zeros(shape)
    for w in range(3):
        x = sum(affine[w, a] * index[a] for a in range(3)) + affine[w, 3]
        total = total + ((x - centre[w]) / radii[w]) ** 2
    return total <= 1


def _centred_affine(shape, spacing, codes) -> np.ndarray:
    """Axes along ``codes`` with the centre of the grid at the origin."""
    directions = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    for a, code in enumerate(codes):
        world, sign = directions[code]
        affine[world, a] = sign * spacing[a]
    affine[:3, 3] = -affine[:3, :3] @ ((np.array(shape) - 1) / 2)
    return affine


def _world_extent(affine, shape) -> np.ndarray:
    """(3,) mm of the field of view along the world axes."""
    return np.abs(affine[:3, :3]) @ np.array(shape)
