"""What scoring one volume takes of memory, in a process of its own.

usage: python memory.py SHAPE DTYPE SPEC CLASSES FOLDER

Prints, in bytes, the growth of resident memory at its highest over scoring a small volume, and the voxels of the larger one as
float32 on the larger of its two grids. DTYPE may be ``int16 labelled``: with a label to be compared with, in uint8.
"""

import json
import math
import pathlib
import sys

import nibabel
import numpy as np
import torch
from torch import nn

from sparkmed import formats, scoring
from sparkmed.config import Component, Preprocess, Score
from sparkmed.formats.instance import VolumeHeader
from sparkmed.imaging import preprocess
from sparkmed.learning.model import Model, ModelSpec


class Thresholds(nn.Module):
    """Classes by value: next to no memory of its own."""

    def __init__(self, classes: int):
        super().__init__()
        self.classes = classes

    def forward(self, x):
        return torch.cat([-((x - c) ** 2) for c in range(self.classes)], 1)


def scored(shape, dtype: str, spec: dict, classes: int, folder: pathlib.Path) -> dict[str, int]:
    names = tuple("abcdefghijklmnop"[:classes])
    model = Model(
        ModelSpec(
            name="m", task="segmentation", classes=names, in_channels=1, spatial_dims=3, window=(32, 32, 32),
            network=Component(name="UNet"), preprocess=Preprocess.model_validate(spec), score=Score(overlap=0.25),
        ),
        Thresholds(classes),
    )  # fmt: skip
    torch.set_num_threads(1)
    _score(model, (40, 40, 40), dtype, folder / "small.nii.gz")
    row = _write(shape, dtype, folder / "large.nii.gz")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the highest is now what there is
    before = _status("VmRSS")
    scoring.score(model, row, str(folder / "mask.nii.gz"))
    grid = preprocess.output_shape(tuple(shape), np.reshape(row["affine"], (4, 4)), model.spec.preprocess)
    return {"growth": _status("VmHWM") - before, "volume": 4 * max(math.prod(shape), math.prod(grid))}


def _score(model: Model, shape, dtype: str, path: pathlib.Path):
    return scoring.score(model, _write(shape, dtype, path), str(path) + ".mask.nii.gz")


def _write(shape, dtype: str, path: pathlib.Path) -> dict:
    """The row of a new volume: noise whose blocks repeat, so that it is quick to write."""
    dtype, _, labelled = dtype.partition(" ")
    part = np.random.default_rng(0).normal(0, 300, (*shape[:2], 8)).astype(dtype)
    image, label = _saved(part, shape, path), None
    if labelled:
        label = json.dumps(_saved((part > 0).astype(np.uint8), shape, path.with_name(f"label-{path.name}")).row())
    return {**image.row(), "subject": "s", "split": None, "target": None, "label": label}


def _saved(part: np.ndarray, shape, path: pathlib.Path) -> VolumeHeader:
    array = np.tile(part, (1, 1, -(-shape[2] // 8)))[..., : shape[2]]
    nibabel.save(nibabel.Nifti1Image(array, np.diag([-1.0, 1.0, 2.0, 1.0])), path)
    ((header,), _) = formats.read_headers(str(path))
    return header


def _status(name: str) -> int:
    (line,) = (s for s in pathlib.Path("/proc/self/status").read_text().splitlines() if s.startswith(name + ":"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    shape, dtype, spec, classes, folder = sys.argv[1:]
    print(json.dumps(scored(json.loads(shape), dtype, json.loads(spec), int(classes), pathlib.Path(folder))))
