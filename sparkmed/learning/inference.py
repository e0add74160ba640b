"""Class probabilities of a whole image, window by window."""

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from torch import nn

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
) -> np.ndarray:
    """Softmax probabilities (classes, I, J, K) float32 of a preprocessed image (C, I, J, K) by a segmentation network.

    Windows of ``window`` voxels repeat ``overlap`` of each other and are averaged with Gaussian or constant weights; an image
    smaller than the window is padded with 0 on both sides and cropped back. Windows go to ``device``, the whole image stays
    in main memory.
    """
    network.eval()
    image = torch.from_numpy(np.ascontiguousarray(array, np.float32))[None]
    out = sliding_window_inference(
        image, window, window_batch, lambda x: primary(network(x)).float().softmax(1), overlap=overlap, mode=blending,
        sw_device=device, device="cpu",
    )  # fmt: skip
    return out[0].numpy()


@torch.inference_mode()
def class_scores(network: nn.Module, arrays: np.ndarray, batch: int = 16, device: str | torch.device = "cpu") -> np.ndarray:
    """Softmax probabilities (B, classes) float32 of preprocessed images (B, C, I, J, K) by a classifier."""
    network.eval()
    images = torch.from_numpy(np.ascontiguousarray(arrays, np.float32))
    return torch.cat([primary(network(x.to(device))).float().softmax(1).cpu() for x in images.split(batch)]).numpy()
