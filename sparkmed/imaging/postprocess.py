"""From scores to labels."""

import numpy as np

from sparkmed.imaging.volume import Volume
from sparkmed.rejection import Refused


def as_labels(scores: Volume) -> Volume:
    """(1, I, J, K) uint8 (uint16 beyond 256 classes): the class with the highest of the (classes, I, J, K) scores.

    Of equal scores the lowest class wins. Raises :class:`Refused` ``NOT_FINITE`` when a score is not a number.
    """
    array = scores.array
    dtype = np.uint8 if len(array) <= 256 else np.uint16
    best, label = array[0].copy(), np.zeros(array.shape[1:], dtype)
    broken = np.isnan(best)
    for c, channel in enumerate(array[1:], start=1):
        broken |= np.isnan(channel)
        higher = channel > best
        best[higher] = channel[higher]
        label[higher] = c
    if broken.any():
        raise Refused("NOT_FINITE", f"the scores of {np.count_nonzero(broken)} voxels are not numbers")
    return scores.with_array(label[None])
