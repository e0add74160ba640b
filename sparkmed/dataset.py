"""The patch dataset: what a row is, which file it goes to, and the JSON that describes it.

Knows no engine. A dataset is a pure function of (volumes, config, seed): which volumes share a file, and in which order patches
stand in it, are decided by hashes of what they are, never by partitions or time.
"""

import hashlib
import io
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sparkmed import formats, storage
from sparkmed.config import Config, digest
from sparkmed.formats.instance import VolumeHeader
from sparkmed.imaging import labels, patches, preprocess
from sparkmed.imaging.volume import Volume
from sparkmed.rejection import InputError, Refused

DESCRIPTION = "_dataset.json"
"""Written last: a folder without it is not a dataset."""
STAGE = "patches"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Field:
    """A column: ``codec`` ndarray is the bytes of ``numpy.save``, scalar is the value itself."""

    name: str
    dtype: str
    shape: tuple[int, ...] = ()
    codec: str = "scalar"


@dataclass(frozen=True)
class FilePlan:
    """A Parquet file to be: its path in the dataset, its split, the volumes that it is cut from, its largest row group."""

    path: str
    split: str
    volumes: tuple[dict, ...]
    rows_per_group: int


@dataclass(frozen=True)
class Written:
    """What a file came to hold."""

    path: str
    split: str
    rows: int
    bytes: int
    shortfall: dict[int, int]
    """Patches per class that were asked for and centred on another class instead."""
    refused: dict[str, Refused]
    """Volumes that could not be cut, by uid, and why."""


def fields(config: Config, channels: int) -> list[Field]:
    size = config.patches.size
    image = Field("image", "float32", (channels, *size), "ndarray")
    truth = Field("label", _label_dtype(config), size, "ndarray") if config.task == "segmentation" else Field("target", "int64")
    return [Field("patch_id", "str"), Field("subject", "str"), Field("volume", "str"), image, truth]


def version(rows: Sequence[dict], config: Config) -> str:
    """Name of the dataset that these volumes give under this config: the first 16 hex digits of a digest."""
    volumes = sorted((r["uid"], r["label_uid"], r["target"], r["split"], r["subject"]) for r in rows)
    settings = (config.preprocess, config.patches, config.seed, config.classes, config.task)
    return digest(FORMAT_VERSION, [list(v) for v in volumes], *settings)[:16]


def url(lake: str, name: str, version: str) -> str:
    return storage.join(lake, "datasets", name, version)


def describe(dataset_url: str) -> dict[str, Any]:
    """The JSON schema beside a dataset; :class:`InputError` when the dataset is not finished."""
    where = storage.join(dataset_url, DESCRIPTION)
    if not storage.exists(where):
        raise InputError(f"{dataset_url}: no finished patch dataset (it has no {DESCRIPTION}); run the patches stage")
    return storage.read_json(where)


def channels(rows: Sequence[dict], config: Config) -> int:
    return 1 if config.preprocess.channels == "gray" else rows[0]["shape"][0]


def plan(rows: Sequence[dict], config: Config) -> list[FilePlan]:
    """Which volumes go to which file: in the order of a hash, so that every file is a random draw of its split."""
    size = patch_bytes(config, channels(rows, config))
    per_file = max(1, int(config.patches.file_mb * 1e6 / size))
    plans = []
    for split in ("train", "val", "test"):
        members = sorted((r for r in rows if r["split"] == split), key=lambda r: _order(config.seed, r["uid"]))
        counts = [patch_count(r, config) for r in members]
        least = min(len(members), -(-config.patches.row_groups // 4))  # several files even of a small split: a task writes one
        groups = _chunks(members, counts, min(per_file, math.ceil(sum(counts) / max(1, least))))
        for i, group in enumerate(groups):
            patches_here = sum(patch_count(r, config) for r in group)
            by_bytes = max(1, int(config.patches.row_group_mb * 1e6 / size))
            by_groups = max(1, patches_here * len(groups) // config.patches.row_groups)
            plans.append(FilePlan(f"split={split}/part-{i:05d}.parquet", split, tuple(group), min(by_bytes, by_groups)))
    return plans


def patch_bytes(config: Config, channels: int) -> int:
    """Bytes of one patch before compression."""
    voxels = math.prod(config.patches.size)
    return voxels * (4 * channels + (np.dtype(_label_dtype(config)).itemsize if config.task == "segmentation" else 0))


def patch_count(row: dict, config: Config) -> int:
    """How many patches a volume gives, from its geometry alone."""
    if _sampler(row["split"], config) != "grid":
        return config.patches.per_volume
    shape = preprocess.output_shape(tuple(row["shape"][1:]), np.reshape(row["affine"], (4, 4)), config.preprocess)
    return len(patches.grid(shape, config.patches.size, config.patches.overlap))


def cut(row: dict, config: Config) -> tuple[list[dict], dict[int, int]]:
    """The patches of one volume as rows, and how many of each class fell short. Raises :class:`Refused` on unreadable pixels."""
    image = formats.read_volume(VolumeHeader.from_row(row))
    if config.task == "segmentation":
        label = read_label(row, image)
        image, label = preprocess.apply(image, config.preprocess, label)
        truth = label.array[0]
    else:
        image, truth = preprocess.apply(image, config.preprocess), None
    spatial = image.array.shape[1:]
    sampler = _sampler(row["split"], config)
    if sampler == "grid":
        places, shortfall = patches.grid(spatial, config.patches.size, config.patches.overlap), {}
    else:
        seed = f"{config.seed}/{row['uid']}"
        places, shortfall = patches.sample(spatial, config.patches, seed, truth, len(config.classes))
    facts = {"subject": row["subject"], "volume": row["uid"]}
    out = []
    for n, place in enumerate(places):
        patch = {"patch_id": f"{row['uid']}-{n:05d}", **facts, "image": patches.extract(image.array, place).astype(np.float32)}
        if truth is None:
            patch["target"] = row["target"]
        else:
            patch["label"] = patches.extract(truth, place).astype(_label_dtype(config))
        out.append(patch)
    return out, shortfall


def read_label(row: dict, image: Volume) -> Volume:
    """The label image of a volume row, on the image's axes."""
    import json

    label = formats.read_volume(VolumeHeader.from_row(json.loads(row["label"])))
    return labels.on_grid(label, image.affine, image.spatial_shape)


def write(plan: FilePlan, config: Config, channels: int, dataset_url: str) -> Written:
    """Cut the volumes of one file and write it: rows in the order of a hash, row groups as planned, the same bytes every time."""
    rows, shortfall, refused = [], Counter(), {}
    for volume in plan.volumes:
        try:
            found, short = cut(volume, config)
        except Refused as e:
            refused[volume["uid"]] = e
            continue
        shortfall.update(short)
        rows += [_encoded(r) for r in found]
    rows.sort(key=lambda r: _order(config.seed, r["patch_id"]))
    schema = arrow_schema(fields(config, channels))
    buffer = io.BytesIO()
    with pq.ParquetWriter(
        buffer, schema, compression=config.patches.compression, use_dictionary=False, write_statistics=False
    ) as out:
        for start in range(0, len(rows), plan.rows_per_group):
            group = pa.Table.from_pylist(rows[start : start + plan.rows_per_group], schema)
            out.write_table(group, row_group_size=plan.rows_per_group)
    if rows:
        storage.write_bytes(storage.join(dataset_url, plan.path), buffer.getvalue())
    return Written(plan.path, plan.split, len(rows), buffer.tell(), dict(shortfall), refused)


def arrow_schema(columns: Sequence[Field]) -> pa.Schema:
    kinds = {"str": pa.string(), "int64": pa.int64()}
    return pa.schema([pa.field(f.name, pa.binary() if f.codec == "ndarray" else kinds[f.dtype], nullable=False) for f in columns])


def description(config: Config, rows: Sequence[dict], written: Sequence[Written], lineage: dict) -> dict[str, Any]:
    """What :func:`describe` gives back."""
    counts, shortfall = Counter(), Counter()
    for w in written:
        counts[w.split] += w.rows
        shortfall.update({config.classes[c]: n for c, n in w.shortfall.items()})
    subjects = {split: len({r["subject"] for r in rows if r["split"] == split}) for split in counts}
    return {
        "format_version": FORMAT_VERSION,
        "name": config.name,
        "version": version(rows, config),
        "digest": version(rows, config),
        "task": config.task,
        "classes": list(config.classes),
        "seed": config.seed,
        "counts": dict(counts),
        "subjects": subjects,
        "shortfall": dict(shortfall),
        "refused": {uid: [e.reason, e.message] for w in written for uid, e in sorted(w.refused.items())},
        "files": {w.path: w.rows for w in sorted(written, key=lambda w: w.path) if w.rows},
        "fields": [f.__dict__ | {"shape": list(f.shape)} for f in fields(config, channels(rows, config))],
        **lineage,
    }


def _encoded(row: dict) -> dict:
    out = dict(row)
    for name, value in row.items():
        if isinstance(value, np.ndarray):
            buffer = io.BytesIO()
            np.save(buffer, np.ascontiguousarray(value))
            out[name] = buffer.getvalue()
    return out


def _sampler(split: str, config: Config) -> str:
    return config.patches.sampler if split == "train" else "grid"


def _label_dtype(config: Config) -> str:
    return "uint8" if len(config.classes) <= 256 else "int32"


def _order(seed: int, identity: str) -> bytes:
    return hashlib.sha256(f"{seed}/{identity}".encode()).digest()


def _chunks(members: list[dict], counts: list[int], most: int) -> list[list[dict]]:
    """Consecutive members in groups of at most ``most`` patches (a volume is never divided)."""
    groups, filled = [], 0
    for member, count in zip(members, counts, strict=True):
        if not groups or filled + count > most:
            groups.append([])
            filled = 0
        groups[-1].append(member)
        filled += count
    return groups
