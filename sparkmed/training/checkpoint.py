"""Checkpoints: whole or not there, checked when read, in any folder that has a URL."""

import hashlib
import io
import math
import re
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from sparkmed import storage

_NAME = re.compile(r"epoch-(\d{5,})(?:-at-(\d{9,}))?-([0-9a-f]{16})\.pt")


@dataclass(frozen=True)
class Checkpoint:
    """A file ``epoch-<number>[-at-<position>]-<SHA-256, 16 digits>.pt``: its name says what its bytes must be.

    ``position`` counts the samples of the epoch that were learnt from; None when the epoch is over.
    """

    url: str
    epoch: int
    position: int | None
    sha256: str

    @property
    def progress(self) -> tuple[int, float]:
        return self.epoch, math.inf if self.position is None else self.position


def save(folder: str, epoch: int, position: int | None, state: dict[str, Any]) -> Checkpoint:
    """Write ``state`` (tensors and plain values) as the checkpoint of ``epoch``; atomic. ``torch.load`` opens the file too.

    Others of this progress or later are removed: training went back behind them because they were damaged.
    """
    stream = io.BytesIO()
    torch.save(state, stream)
    data = stream.getvalue()
    sha256 = hashlib.sha256(data).hexdigest()[:16]
    within = "" if position is None else f"-at-{position:09d}"
    saved = Checkpoint(storage.join(folder, f"epoch-{epoch:05d}{within}-{sha256}.pt"), epoch, position, sha256)
    storage.write_bytes(saved.url, data)
    for stale in present(folder):
        if stale.progress >= saved.progress and stale.sha256 != sha256:
            storage.remove(stale.url)
    return saved


def present(folder: str) -> list[Checkpoint]:
    """The checkpoints in ``folder`` in the order of progress; their bytes are not looked at."""
    try:
        files = list(storage.walk(folder))
    except FileNotFoundError:
        return []
    matches = [(f.uri, _NAME.fullmatch(f.path)) for f in files]
    found = [Checkpoint(uri, int(m[1]), m[2] and int(m[2]), m[3]) for uri, m in matches if m]
    return sorted(found, key=lambda c: (c.progress, c.sha256))


def load(checkpoint: Checkpoint) -> dict[str, Any]:
    """The state in a checkpoint, on the CPU; ValueError when its bytes are not whole. Unpickles plain values only."""
    data = storage.read_bytes(checkpoint.url)
    found = hashlib.sha256(data).hexdigest()[:16]
    if found != checkpoint.sha256:
        raise ValueError(f"checkpoint {checkpoint.url}: its bytes have SHA-256 {found}..., its name says {checkpoint.sha256}...")
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def latest(folder: str) -> dict[str, Any] | None:
    """The state of the last checkpoint that can be read; damaged ones are passed over with a warning. None when there is none."""
    return next((saved for c in reversed(present(folder)) if (saved := readable(c))), None)


def readable(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The state in a checkpoint; None, with a warning, of one that is damaged."""
    try:
        return load(checkpoint)
    except Exception as e:  # whatever is wrong with it, another may be whole
        warnings.warn(f"passed over: {e}", stacklevel=2)
        return None


def prune(folder: str, keep: int, best_epoch: int | None) -> None:
    """Remove all but the last ``keep`` checkpoints and that at the end of ``best_epoch``."""
    there = present(folder)
    for checkpoint in there[: max(0, len(there) - keep)]:
        if checkpoint.position is not None or checkpoint.epoch != best_epoch:
            storage.remove(checkpoint.url)
