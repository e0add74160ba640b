"""Class probabilities of a whole image, window by window.

The windows over an image are taken in blocks: all windows at one place, or a few neighbouring ones, along one axis. A block gives
weighted sums of scores over its planes; where blocks overlap their sums are added in the order of the blocks. So what is held is a
block and not the image's probabilities, blocks may be computed anywhere in any order, and the same bits come out.
"""

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from torch import Tensor, nn

from sparkmed.imaging import patches
from sparkmed.imaging.patches import PatchLocation
from sparkmed.learning.networks import primary

Index = tuple[int, int, int]
Predictor = Callable[[Tensor], Tensor]
"""Probabilities (B, classes, I, J, K) float32, new each time, of windows (B, C, I, J, K)."""


@dataclass(frozen=True)
class Windows:
    """The windows of ``size`` over an image of ``shape`` (I, J, K), where MONAI's ``sliding_window_inference`` has them too.

    Neighbours share ``overlap`` of a side; an image smaller than a window is in its middle, in zeros. ``blending`` is ``gaussian``
    or ``constant``; ``batch`` windows go through the network at once, of one block each time.
    """

    shape: Index
    size: Index
    overlap: float = 0.5
    blending: str = "gaussian"
    batch: int = 4

    def __post_init__(self):
        for name in ("shape", "size"):
            object.__setattr__(self, name, tuple(int(n) for n in getattr(self, name)))

    @functools.cached_property
    def axis(self) -> int:
        """The axis across which blocks lie: where the image is longest in windows."""
        return max(range(3), key=lambda a: (self.shape[a] / self.size[a], -a))

    @functools.cached_property
    def starts(self) -> tuple[tuple[int, ...], ...]:
        """First voxels of the windows along I, J, K."""
        return tuple(_starts(n, p, self.overlap) for n, p in zip(self.shape, self.size, strict=True))

    @functools.cached_property
    def blocks(self) -> tuple[tuple[int, ...], ...]:
        """Per block the first planes of its windows along ``axis``: as many places as fill a batch."""
        along = self.starts[self.axis]
        many = math.ceil(self.batch / self._per_place)
        return tuple(along[n : n + many] for n in range(0, len(along), many))

    @property
    def _per_place(self) -> int:
        return math.prod(len(s) for a, s in enumerate(self.starts) if a != self.axis)

    def __len__(self) -> int:
        return math.prod(map(len, self.starts))

    def count(self, block: int) -> int:
        """Windows of a block."""
        return len(self.blocks[block]) * self._per_place

    def planes(self, block: int) -> tuple[int, int]:
        """First plane along ``axis`` of a block, and the plane behind its last."""
        places = self.blocks[block]
        return max(0, places[0]), min(self.shape[self.axis], places[-1] + self.size[self.axis])

    def locations(self, block: int) -> list[PatchLocation]:
        """Of the windows of a block, within its planes."""
        first, _ = self.planes(block)
        starts = [[s - first for s in self.blocks[block]] if a == self.axis else s for a, s in enumerate(self.starts)]
        return [PatchLocation((i, j, k), self.size) for i in starts[0] for j in starts[1] for k in starts[2]]

    def extent(self, block: int) -> Index:
        """(I, J, K) of the planes of a block."""
        first, last = self.planes(block)
        return tuple(last - first if a == self.axis else n for a, n in enumerate(self.shape))

    def across(self, start: int, stop: int) -> tuple[slice, ...]:
        """Index of planes ``start`` to ``stop`` in (C, I, J, K)."""
        return (slice(None),) * (1 + self.axis) + (slice(start, stop),)

    def weights(self, block: int) -> np.ndarray:
        """(I, J, K) float32: sums of the weights of a block's windows over its planes."""
        first, _ = self.planes(block)
        return _weights(self, tuple(s - first for s in self.blocks[block]), self.extent(block))


@functools.lru_cache(maxsize=2)  # of the blocks all but the last have the same
def _weights(windows: Windows, places: tuple[int, ...], extent: Index) -> np.ndarray:
    starts = [places if a == windows.axis else s for a, s in enumerate(windows.starts)]
    importance, total = _importance(windows.size, windows.blending).numpy(), np.zeros(extent, np.float32)
    for index in ((i, j, k) for i in starts[0] for j in starts[1] for k in starts[2]):
        inside, target = patches.covered(extent, PatchLocation(index, windows.size))
        total[inside] += importance[target]
    total.setflags(write=False)
    return total


def _starts(n: int, p: int, overlap: float) -> tuple[int, ...]:
    if n <= p:
        return (-((p - n) // 2),)
    return (*range(0, n - p, max(1, int(p * (1 - overlap)))), n - p)


@functools.lru_cache(maxsize=2)
def _importance(size: Index, blending: str) -> torch.Tensor:
    from monai.data.utils import compute_importance_map

    return compute_importance_map(size, blending, sigma_scale=0.125)


@torch.inference_mode()
def block_sums(
    predict: Predictor, slab: np.ndarray, windows: Windows, block: int, device: str | torch.device = "cpu"
) -> np.ndarray:
    """(classes, I, J, K) float32 weighted sums of probabilities over the planes of one block.

    ``slab`` (C, I, J, K) float32 is the preprocessed image there.
    """
    importance = _importance(windows.size, windows.blending).to(device)
    locations, extent, total = windows.locations(block), windows.extent(block), None
    for n in range(0, len(locations), windows.batch):
        some = locations[n : n + windows.batch]
        batch = torch.from_numpy(np.stack([patches.extract(slab, w) for w in some])).to(device)
        found = predict(batch)
        found *= importance
        if total is None:
            total = torch.zeros((found.shape[1], *extent), device=device)
        for scores, location in zip(found, some, strict=True):
            inside, target = patches.covered(extent, location)
            total[(slice(None), *inside)] += scores[(slice(None), *target)]
    return total.cpu().numpy()


def averaged(sums: Iterable[np.ndarray], windows: Windows) -> Iterator[tuple[int, np.ndarray]]:
    """Probabilities from the sums of all blocks, in order: the first plane and the finished planes (classes, I, J, K) behind it.

    The sums are changed.
    """
    rest = weight_rest = None
    block = 0
    for total in sums:  # enumerate would hold the sums of one block while the next is computed
        weight = windows.weights(block)
        first, last = windows.planes(block)
        done = (windows.planes(block + 1)[0] if block + 1 < len(windows.blocks) else last) - first
        if rest is None:
            rest, weight_rest = total[windows.across(0, 0)], weight[windows.across(0, 0)[1:]]
        shared = rest.shape[1 + windows.axis]
        mixed, alone, left = windows.across(0, min(shared, done)), windows.across(shared, done), windows.across(done, last - first)
        total[windows.across(0, shared)] += rest
        weight_rest = weight_rest + weight[windows.across(0, shared)[1:]]
        total[mixed] /= weight_rest[mixed[1:]]
        total[alone] /= weight[alone[1:]]
        # no views of what is left: they would hold the whole block
        rest, further, weight_rest = _copied(total[left], rest), weight_rest[left[1:]], weight[left[1:]].copy()
        weight_rest[windows.across(0, max(0, shared - done))[1:]] = further
        yield first, total[windows.across(0, done)]
        del total
        block += 1


def _copied(array: np.ndarray, into: np.ndarray | None) -> np.ndarray:
    """A copy, in the memory of ``into`` where that fits: what is allocated anew for each block leaves holes that nothing fills."""
    if into is None or into.shape != array.shape:
        return array.copy()
    np.copyto(into, array)
    return into


def finished_planes(
    predict: Predictor, read: Callable[[int, int], np.ndarray], windows: Windows, device: str | torch.device = "cpu"
) -> Iterator[tuple[int, np.ndarray]]:
    """What :func:`averaged` gives of an image; ``read(start, stop)`` is (C, I, J, K) float32 of its planes."""
    blocks = range(len(windows.blocks))
    return averaged((block_sums(predict, read(*windows.planes(b)), windows, b, device) for b in blocks), windows)


def scores(
    network: nn.Module,
    array: np.ndarray,
    window: tuple[int, int, int],
    overlap: float = 0.5,
    blending: str = "gaussian",
    window_batch: int = 4,
    device: str | torch.device = "cpu",
    mirrors: Sequence[int] = (),
) -> np.ndarray:
    """Softmax probabilities (classes, I, J, K) float32 of a preprocessed image (C, I, J, K) by a segmentation network.

    Windows of ``window`` voxels repeat ``overlap`` of each other and are averaged with Gaussian or constant weights; an image
    smaller than the window is padded with 0 on both sides and cropped back. Windows go to ``device``, the whole image stays
    in main memory. With ``mirrors`` each window is seen as :func:`predictor` says.
    """
    network.eval()
    windows, out = Windows(array.shape[1:], window, overlap, blending, window_batch), None

    def read(start, stop):
        return np.ascontiguousarray(array[windows.across(start, stop)], np.float32)

    for first, planes in finished_planes(predictor(network, mirrors), read, windows, device):
        if out is None:
            out = np.empty((len(planes), *array.shape[1:]), np.float32)
        out[windows.across(first, first + planes.shape[1 + windows.axis])] = planes
        del planes
    return out


@torch.inference_mode()
def class_scores(
    network: nn.Module,
    arrays: np.ndarray,
    batch: int = 16,
    device: str | torch.device = "cpu",
    mirrors: Sequence[int] = (),
) -> np.ndarray:
    """Softmax probabilities (B, classes) float32 of preprocessed images (B, C, I, J, K) by a classifier."""
    network.eval()
    images, predict = torch.from_numpy(np.ascontiguousarray(arrays, np.float32)), predictor(network, mirrors)
    return torch.cat([predict(x.to(device)).cpu() for x in images.split(batch)]).numpy()


def predictor(network: nn.Module, mirrors: Sequence[int] = ()) -> Predictor:
    """Softmax probabilities float32 of windows (B, C, I, J, K): the mean over the windows as they are and mirrored along every
    combination of the axes ``mirrors`` (0, 1, 2 for I, J, K), maps mirrored back.

    nnU-Net mirrors window by window too, and takes the mean before softmax. An axis of one voxel has no mirror image.
    """

    def probabilities(windows: Tensor) -> Tensor:
        return primary(network(windows)).float().softmax(1)

    def mean(windows: Tensor) -> Tensor:
        axes = [2 + a for a in sorted(set(mirrors)) if windows.shape[2 + a] > 1]
        total = probabilities(windows)
        for n in range(1, len(axes) + 1):
            for flipped in combinations(axes, n):
                seen = probabilities(windows.flip(flipped))
                total += seen.flip(flipped) if seen.ndim > 2 else seen
        return total.div_(2 ** len(axes))

    return mean
