"""Class probabilities of a whole image, window by window."""

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from torch import Tensor, nn

from sparkmed.learning.networks import primary


@torch.inference_mode()
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
    image = torch.from_numpy(np.ascontiguousarray(array, np.float32))[None]
    out = sliding_window_inference(
        image, window, window_batch, predictor(network, mirrors), overlap=overlap, mode=blending,
        sw_device=device, device="cpu",
    )  # fmt: skip
    return out[0].numpy()


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


def predictor(network: nn.Module, mirrors: Sequence[int] = ()) -> Callable[[Tensor], Tensor]:
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
        return total / 2 ** len(axes)

    return mean
