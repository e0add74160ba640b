"""Where patches are cut: on a grid, anywhere, balanced over classes, or with enough foreground; cut and put back.

Shapes are (I, J, K). A patch has one size always: a patch lies inside the image along each axis where the image is larger,
and is centred and padded where it is smaller.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from sparkmed import config
from sparkmed.imaging import labels

Index = tuple[int, int, int]


@dataclass(frozen=True)
class PatchLocation:
    """The box ``index`` to ``index + size`` in voxels; what lies before 0 or beyond the end is padding."""

    index: Index
    size: Index


def grid(shape: Index, size: Index, overlap: float = 0.0) -> list[PatchLocation]:
    """Patches that cover every voxel, the last index fastest; neighbours share at least ``overlap`` (0 to below 1) of a side.

    The last patch along an axis is shifted back inside.

    >>> [p.index[0] for p in grid((10, 4, 1), (4, 4, 1))]
    [0, 4, 6]
    """
    _check(shape, size)
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap is a share from 0 to below 1; got {overlap}")
    starts = []
    for n, p in zip(shape, size, strict=True):
        step = max(1, math.floor(p * (1 - overlap) + 1e-6))
        starts.append([*range(0, n - p, step), n - p] if n > p else [_start(n, p, 0)])
    return [PatchLocation((i, j, k), tuple(size)) for i in starts[0] for j in starts[1] for k in starts[2]]


def sample(
    shape: Index, spec: config.Patches, seed_key: str, label: np.ndarray | None = None, n_classes: int | None = None
) -> tuple[list[PatchLocation], dict[int, int]]:
    """Training patches of one volume as ``spec.sampler`` says, and how many patches each class was short of.

    ``random``: anywhere, each place as likely. ``balanced``: each class gets its share of ``spec.per_volume`` patches
    (``class_weights``, or equal shares; largest remainder, equal ones by lot), centred on different voxels of the class.
    A class that is absent, or has fewer voxels than its share, gives what it has; the others fill up by their weights and
    the missing number is in the shortfall. ``foreground``: the share ``spec.foreground`` is centred on voxels that are not
    0, the rest is anywhere; a shortfall counts under 1, whatever the class. ``grid``: :func:`grid`.

    All but ``grid`` give exactly ``spec.per_volume`` patches. A patch that would leave the volume is shifted back, so its
    voxel need not be in the middle. The result is a pure function of the arguments.

    ``label`` is (I, J, K) integers on the volume's grid, needed for ``balanced`` (with ``n_classes``) and ``foreground``.
    Raises :class:`ValueError` without it, :class:`~sparkmed.rejection.Refused` ``LABEL_OUT_OF_RANGE``.
    """
    if spec.sampler == "grid":
        return grid(shape, spec.size, spec.overlap), {}
    _check(shape, spec.size)
    rng = generator(seed_key)
    if spec.sampler == "random":
        return [_anywhere(shape, spec.size, rng) for _ in range(spec.per_volume)], {}
    if label is None or tuple(label.shape) != tuple(shape) or label.dtype.kind not in "biu":
        got = "none" if label is None else f"{label.dtype} of shape {tuple(label.shape)}"
        raise ValueError(f"sampler {spec.sampler} wants an integer label of shape {tuple(shape)}; got {got}")
    if spec.sampler == "foreground":
        quota = _quotas(spec.per_volume, [1 - spec.foreground, spec.foreground], rng)
        foreground = label != 0
        voxels = _Voxels(foreground, 2)
        there = min(quota[1], voxels.total[1])
        shortfall = {1: quota[1] - there} if there < quota[1] else {}
        centres = voxels.draw(1, there, rng)
        around = [_around(c, shape, spec.size) for c in centres]
        return around + [_anywhere(shape, spec.size, rng) for _ in range(spec.per_volume - there)], shortfall
    if n_classes is None:
        raise ValueError("sampler balanced wants n_classes")
    weights = spec.class_weights or (1.0,) * n_classes
    if len(weights) != n_classes:
        raise ValueError(f"class_weights wants {n_classes} weights; got {len(weights)}")
    voxels = _Voxels(label, n_classes)
    quotas = _quotas(spec.per_volume, weights, rng)
    shortfall = {c: q - voxels.total[c] for c, q in enumerate(quotas) if q > voxels.total[c]}
    places = []
    for c, n in enumerate(_filled(quotas, weights, voxels.total, rng)):
        centres = voxels.draw(c, n, rng)
        places += [_around(centre, shape, spec.size) for centre in centres]
    return places, shortfall


def generator(key: str) -> np.random.Generator:
    """Random numbers that depend on ``key`` alone."""
    return np.random.Generator(np.random.PCG64(int.from_bytes(hashlib.sha256(key.encode()).digest(), "big")))


def extract(
    array: np.ndarray, location: PatchLocation, pad_value: float = 0, change: Callable[[np.ndarray], np.ndarray] | None = None
) -> np.ndarray:
    """A copy of the patch: (C, *size) of (C, I, J, K), or size of (I, J, K); ``pad_value`` beyond the edges.

    ``change`` is applied to what lies inside, before padding, and keeps its shape.
    """
    if array.ndim not in (3, 4):
        raise ValueError(f"array is (C, I, J, K) or (I, J, K); got shape {array.shape}")
    inside, target = covered(array.shape[-3:], location)
    found = array[(..., *inside)]
    found = found.copy() if change is None else change(found)
    if target == tuple(slice(0, s) for s in location.size):
        return found
    patch = np.full((*array.shape[:-3], *location.size), pad_value, found.dtype)
    patch[(..., *target)] = found
    return patch


def stitch(patches: Iterable[np.ndarray], locations: Sequence[PatchLocation], shape: Index) -> np.ndarray:
    """Patches (C, *size) or size put back into (C, *shape) or ``shape``: the mean where they overlap, padding dropped.

    Raises :class:`ValueError` when they leave a voxel out.
    """
    total, weight = None, np.zeros(shape, np.int64)
    for patch, location in zip(patches, locations, strict=True):
        if patch.shape[-3:] != location.size:
            raise ValueError(f"patch of shape {patch.shape} for a location of size {location.size}")
        if total is None:
            total = np.zeros((*patch.shape[:-3], *shape), np.float64)
        inside, target = covered(shape, location)
        total[(..., *inside)] += patch[(..., *target)]
        weight[inside] += 1
    if total is None or not weight.all():
        raise ValueError(f"the patches leave {np.count_nonzero(weight == 0)} of {weight.size} voxels out")
    return (total / weight).astype(patch.dtype)


def _check(shape: Index, size: Index):
    if len(shape) != 3 or len(size) != 3 or min(shape) < 1 or min(size) < 1:
        raise ValueError(f"shape and size are (I, J, K), each at least 1; got {shape} and {size}")


def _start(n: int, p: int, wanted: int) -> int:
    """Where a patch of p voxels begins along an axis of n: ``wanted`` if it lies inside, centred if the axis is shorter."""
    return min(max(wanted, 0), n - p) if n > p else -((p - n) // 2)


def _around(centre: Index, shape: Index, size: Index) -> PatchLocation:
    return PatchLocation(tuple(_start(n, p, c - p // 2) for c, n, p in zip(centre, shape, size, strict=True)), tuple(size))


def _anywhere(shape: Index, size: Index, rng: np.random.Generator) -> PatchLocation:
    index = [_start(n, p, int(rng.integers(max(n - p, 0) + 1))) for n, p in zip(shape, size, strict=True)]
    return PatchLocation(tuple(index), tuple(size))


def covered(shape: Index, location: PatchLocation) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """The part of the location inside the image: in the image's indices and in the patch's."""
    inside, target = [], []
    for n, start, size in zip(shape, location.index, location.size, strict=True):
        low = min(max(start, 0), n)
        high = max(min(start + size, n), low)
        inside.append(slice(low, high))
        target.append(slice(low - start, high - start) if high > low else slice(0, 0))
    return tuple(inside), tuple(target)


def _quotas(total: int, weights: Sequence[float], rng: np.random.Generator) -> list[int]:
    """``total`` shared out by ``weights``: whole parts first, the rest to the largest remainders, equal ones by lot."""
    exact = [total * w / sum(weights) for w in weights]
    quotas = [math.floor(x + 1e-9) for x in exact]
    lot = rng.permutation(len(weights))
    most = sorted(range(len(weights)), key=lambda c: (-round(exact[c] - quotas[c], 9), lot[c]))
    for c in most[: total - sum(quotas)]:
        quotas[c] += 1
    return quotas


def _filled(quotas: list[int], weights: Sequence[float], there: Sequence[int], rng: np.random.Generator) -> list[int]:
    """Quotas that the classes can meet, with the same sum: ``there`` voxels at most, then by weight from the others.

    Classes of weight 0 help out when no other has a voxel left; when none has, voxels are drawn more than once.
    """
    taken = [min(q, n) for q, n in zip(quotas, there, strict=True)]
    while missing := sum(quotas) - sum(taken):
        left = [n - t for n, t in zip(there, taken, strict=True)]
        open_weights = [w if n else 0.0 for w, n in zip(weights, left, strict=True)]
        if not any(open_weights):
            open_weights = [1.0 if n else 0.0 for n in left]
        if not any(open_weights):
            open_weights, left = [float(n > 0) for n in there], [missing] * len(left)
        taken = [t + min(q, n) for t, q, n in zip(taken, _quotas(missing, open_weights, rng), left, strict=True)]
    return taken


class _Voxels:
    """The voxels of each class, by counts per plane: a few numbers instead of lists of millions."""

    def __init__(self, label: np.ndarray, n_classes: int):
        self._label = label
        self._until = np.cumsum(labels.count(label, n_classes), axis=0)
        self.total = [int(n) for n in self._until[-1]]

    def draw(self, value: int, n: int, rng: np.random.Generator) -> list[Index]:
        """(i, j, k) of n voxels of a class, different ones as long as there are any."""
        if n == 0:
            return []
        rounds, rest = divmod(n, self.total[value])
        chosen = [rng.permutation(self.total[value]) for _ in range(rounds)]
        chosen.append(rng.choice(self.total[value], rest, replace=False))
        return [self._find(value, int(rank)) for rank in np.concatenate(chosen)]

    def _find(self, value: int, rank: int) -> Index:
        until = self._until[:, value]
        i = int(np.searchsorted(until, rank, side="right"))
        before = int(until[i - 1]) if i else 0
        flat = np.flatnonzero(self._label[i] == value)[rank - before]
        j, k = divmod(int(flat), self._label.shape[2])
        return i, j, k
