"""Small archives with known answers, written for tests."""

import copy
import itertools
import pathlib

import numpy as np
import tifffile

from sparkmed import config, formats, storage
from sparkmed.formats import archive, nifti
from sparkmed.hcs import fields
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


PLATE_CHANNELS = {"GFP": 1, "DNA": 2}


def plate(folder, columns: int = 4, size: int = 48, seed: int = 0) -> list[str]:
    """Four rows of a plate of 96 wells in SBS names, two channels: the names of the images.

    The first column holds negative controls, the last positive ones, and between them are doses of one compound, in the lower rows
    of another. ``map.csv`` says so.
    """
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    lines, names = ["Row,Col,Compound,Dose,Control"], []
    for n, (row, column) in enumerate(itertools.product("ABCD", range(1, columns + 1)), 1):
        share = (column - 1) / (columns - 1)
        for channel in (1, 2):
            image = rng.normal(20, 3, (size, size))
            for i, j in rng.integers(6, size - 6, (4, 2)):
                blob = np.exp(-((np.arange(size)[:, None] - i) ** 2 + (np.arange(size) - j) ** 2) / 18)
                image += (150 if channel == 2 else 40 + 120 * share) * blob
            names.append(f"Channel{channel}-{n:02d}-{row}-{column:02d}.tif")
            tifffile.imwrite(folder / "images" / names[-1], image.clip(0, 255).astype(np.uint8))
        control = {1: "neg", columns: "pos"}.get(column, "")
        compound = "" if column == 1 else "reference" if column == columns else ("one" if row in "AB" else "two")
        lines.append(f"{row},{column},{compound},{10 * share:g},{control}")
    (folder / "map.csv").write_text("\n".join(lines) + "\n")
    return names


def plate_rows(folder, plates) -> list[dict]:
    """Rows of ``volumes/`` of the fields in a folder of :func:`plate`, labelled: the last column is positive, row C is of the
    validation split, D of the test split."""
    members = [m for f in storage.walk(str(folder)) for m in archive.members(f, config.Catalog())]
    found = fields.assemble([formats.read_instance(m) for m in members], plates)
    assert not found.rejections
    last, rows = max((h.facts["column"] for h in found.headers), default=0), []
    for h in found.headers:
        split = {"C": "val", "D": "test"}.get(h.facts["well"][0], "train")
        label = {"target": int(h.facts["column"] == last), "label": None, "label_uid": None}
        rows.append(h.row() | {"subject": h.facts["well"], "split": split, **label})
    return rows


CELLS = {"preprocess": {"orientation": None}, "patches": {"sampler": "cells", "crops": {"size": 12}, "row_groups": 4}}
"""Changes of :func:`plate_config` that cut the cells of :func:`plate` out."""


def plate_config(archive, lake, **changes) -> dict:
    plain = {
        "name": "plates", "task": "classification", "classes": ["negative", "positive"], "archive": str(archive), "lake": str(lake),
        "identity": {"keep_subjects": True}, "volumes": {"labels": {"allow_missing": True}},
        "plates": {
            "convention": "sbs", "wells": 96, "channels": PLATE_CHANNELS, "split_by": "well", "nuclei": {"channel": "DNA"},
            "splits": {"train": "A*", "val": "B*", "test": ["C*", "D*"]},
            "maps": {
                "tables": "map.csv", "controls": {"neg": "negative", "pos": "positive"},
                "columns": {"row": "Row", "column": "Col", "compound": "Compound", "concentration": "Dose", "control": "Control"},
            },
        },
        "preprocess": {"orientation": None, "size": [48, 48, 1]}, "score": {"features": True}, "train": {"device": "cpu"},
    }  # fmt: skip
    for key, value in changes.items():
        section, _, last = key.rpartition("__")
        where = plain
        for name in section.split("__") if section else []:
            where = where[name]
        where[last] = copy.deepcopy(value)
    return plain
