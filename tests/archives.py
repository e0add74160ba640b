"""Small archives with known answers, written for tests."""

import pathlib

from sparkmed.formats import nifti
from sparkmed.imaging import phantom

SHAPE = (24, 24, 16)
CLASSES = ("background", "liver", "kidneys")


def ct_pairs(folder: pathlib.Path, subjects: int = 12, shape=SHAPE) -> pathlib.Path:
    """``img/sNN.nii.gz`` and ``lab/sNN.nii.gz`` of CT phantoms."""
    for i in range(subjects):
        image, label = phantom.ct(i, shape, (4.0, 4.0, 6.0))
        nifti.write(image, str(folder / "img" / f"s{i:02d}.nii.gz"))
        nifti.write(label, str(folder / "lab" / f"s{i:02d}.nii.gz"))
    return folder


def ct_config(folder: pathlib.Path, lake: pathlib.Path, **changes) -> dict:
    """A config for :func:`ct_pairs` that trains in seconds."""
    return {
        "name": "phantom",
        "task": "segmentation",
        "classes": list(CLASSES),
        "archive": str(folder),
        "lake": str(lake),
        "identity": {"keep_subjects": True},
        "volumes": {
            "images": "img/{subject}.nii.gz",
            "labels": {"pattern": "lab/{subject}.nii.gz"},
            "splits": {"train": 0.5, "val": 0.25, "test": 0.25},
        },
        "preprocess": {"spacing": [4.0, 4.0, 6.0], "intensity": {"kind": "window", "low": -200, "high": 300}},
        "patches": {"size": [16, 16, 16], "sampler": "balanced", "per_volume": 4},
        "train": {
            "processes": 1,
            "threads": 2,
            "epochs": 8,
            "batch_size": 2,
            "optimizer": {"name": "AdamW", "lr": 0.01},
            "warmup_epochs": 1,
            "network": {"name": "UNet", "channels": [8, 16], "strides": [2], "norm": "instance"},
        },
    } | changes
