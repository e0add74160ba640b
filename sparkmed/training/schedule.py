"""The learning rate and the decay of averaged weights as functions of how far training is."""

import math

from sparkmed.config import Train

_FACTORS = {"linear": lambda ranks: ranks, "sqrt": math.sqrt, "none": lambda ranks: 1}


def learning_rate(train: Train, ranks: int, progress: float) -> float:
    """The learning rate at ``progress`` epochs (2.5 is the middle of the third) with ``ranks`` processes.

    It rises over ``warmup_epochs`` from that of one process to the one scaled by ``scale_lr`` (Goyal et al. 2017, arXiv:1706.02677,
    2.2), then falls to 0 at ``epochs`` as half a cosine or as (1 - x)^0.9 (poly), or stays.
    """
    scale = _FACTORS[train.scale_lr](ranks)
    warmup = min(train.warmup_epochs, train.epochs)
    if progress < warmup:
        return train.optimizer.lr * (1 + (scale - 1) * progress / warmup)
    x = min(1.0, (progress - warmup) / max(train.epochs - warmup, 1e-9))
    fall = {"cosine": 0.5 * (1 + math.cos(math.pi * x)), "poly": (1 - x) ** 0.9, "constant": 1.0}[train.schedule]
    return train.optimizer.lr * scale * fall


def averaging_decay(ema: float, step: int) -> float:
    """How much of the averaged weights stays at ``step``; less in the first steps, when the weights move fast."""
    return min(ema, (1 + step) / (10 + step))
