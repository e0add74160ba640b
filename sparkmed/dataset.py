"""The patch dataset: what a row is, which file it goes to, and the JSON that describes it.

Knows no engine. A dataset is a pure function of (volumes, config, seed): the patches of a split stand in the order of a hash of
what they are, and its files and row groups are consecutive stretches of that order. It is made in two steps, which need little
memory and give the same files whoever does what:

    spills = [spill(some volumes, ...), spill(the others, ...), ...]   cut each volume once; runs of patches in order, on storage
    for file in plan(spills, ...): write(file, ...)                    gather the stretches of the runs that make up a file
"""

import functools
import io
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sparkmed import formats, storage
from sparkmed.config import Cascade, Cells, Config, digest
from sparkmed.formats.instance import VolumeHeader
from sparkmed.hcs import correction
from sparkmed.hcs.fields import CELL_BYTES, CENTRES
from sparkmed.imaging import intensity, labels, patches, preprocess
from sparkmed.imaging.geometry import Grid, Placed
from sparkmed.imaging.volume import Volume
from sparkmed.rejection import InputError, Refused

DESCRIPTION = "_dataset.json"
"""Written last: a folder without it is not a dataset."""
STAGE = "patches"
FORMAT_VERSION = 1
LAYOUT = "order of the whole split"
"""Which rows stand where: other bytes under the same config want another word here, as it is part of the version."""


@dataclass(frozen=True)
class Field:
    """A column: ``codec`` ndarray is the bytes of ``numpy.save``, scalar is the value itself."""

    name: str
    dtype: str
    shape: tuple[int, ...] = ()
    codec: str = "scalar"


@dataclass(frozen=True)
class Run:
    """Patches of one split in order, as :func:`spill` leaves them in a file: from byte ``start`` their index, then they."""

    url: str
    start: int
    split: str
    keys: np.ndarray
    """(patches,) uint64, rising."""


@dataclass(frozen=True)
class Spill:
    """What became of some volumes."""

    runs: tuple[Run, ...]
    shortfall: dict[int, int]
    """Patches per class that were asked for and centred on another class instead."""
    refused: dict[str, Refused]
    """Volumes that could not be cut, by uid, and why."""
    patches: dict[str, int] = field(default_factory=dict)
    """How many patches the others gave, by uid."""


class Stretch(NamedTuple):
    """Consecutive patches of a run: where their part of the index begins, where the first patch does, how many they are."""

    url: str
    index: int
    patches: int
    rows: int


@dataclass(frozen=True)
class FilePlan:
    """A Parquet file to be: its path in the dataset, its split, where its patches are, and how many go to a row group."""

    path: str
    split: str
    stretches: tuple[Stretch, ...]
    rows_per_group: int

    @property
    def rows(self) -> int:
        return sum(s.rows for s in self.stretches)


_INDEX = np.dtype([("key", "<u8"), ("volume", "<u4"), ("number", "<u4")])
"""Of a patch in a run: its place in the order of the split, its volume (a position in :func:`numbered`), its number there."""
_CELL = np.dtype([("cell", f"S{CELL_BYTES}"), ("x", "<f8"), ("y", "<f8")])
"""What the index has besides of a patch that is the crop of a cell: its id in UTF-8, its centre."""
_MOST_BYTES = 2**31 - 1
"""Of a row group's column: Arrow counts them in 32 bits."""


def fields(config: Config, channels: int) -> list[Field]:
    """The columns of a dataset. Of cells also ``cell``, the id in the field, and ``x`` and ``y``, the centre along I and J in
    pixels of the field as it is stored, 0 being the middle of the first."""
    size = config.patches.size
    image = Field("image", "float32", (channels, *size), "ndarray")
    truth = Field("label", _label_dtype(config), size, "ndarray") if config.task == "segmentation" else Field("target", "int64")
    group = [Field("group", "int64")] if config.patches.balance else []
    cell = [Field("cell", "str"), Field("x", "float64"), Field("y", "float64")] if config.cells else []
    return [Field("patch_id", "str"), Field("subject", "str"), Field("volume", "str"), image, truth, *group, *cell]


First = Callable[[Volume], Volume]
"""What the first model of a cascade says about an image, on its grid: see :func:`sparkmed.imaging.preprocess.guidance`."""


def version(rows: Sequence[dict], config: Config) -> str:
    """Name of the dataset that these volumes give under this config: the first 16 hex digits of a digest.

    The first model of a cascade counts by its digest, a table of cells by the uids of the fields that it is joined with. Raises
    :class:`ValueError` when the model is not pinned.
    """
    if config.preprocess.cascade is not None and not config.preprocess.cascade.digest:
        raise ValueError("preprocess.cascade names no digest: the first model is not pinned")
    volumes = sorted((r["uid"], r["label_uid"], r["target"], r["split"], r["subject"]) for r in rows)
    patches = config.patches.model_copy(update={"crops": config.cells.crops}) if config.cells else config.patches
    settings = (config.preprocess, patches, config.seed, config.classes, config.task)
    balanced = [sorted(groups(rows, config).items())] if config.patches.balance else []
    cells = [config.cells] if config.cells else []
    return digest(FORMAT_VERSION, LAYOUT, [list(v) for v in volumes], *settings, *balanced, *cells)[:16]


def url(lake: str, name: str, version: str) -> str:
    return storage.join(lake, "datasets", name, version)


def describe(dataset_url: str) -> dict[str, Any]:
    """The JSON schema beside a dataset; :class:`InputError` when the dataset is not finished."""
    where = storage.join(dataset_url, DESCRIPTION)
    if not storage.exists(where):
        raise InputError(f"{dataset_url}: no finished patch dataset (it has no {DESCRIPTION}); run the patches stage")
    return storage.read_json(where)


def pinned_model(lake: str, digest: str) -> str:
    """Where a lake keeps a copy of the model with this digest, such as the first one of a cascade."""
    return storage.join(lake, "pinned", digest[:16])


def channels(rows: Sequence[dict], config: Config) -> int:
    """Of an image, and behind them those of the first model of a cascade."""
    own = 1 if config.preprocess.channels == "gray" else rows[0]["shape"][0]
    return own + config.preprocess.guided


def pinned(config: Config) -> str | None:
    """URL of the first model of a cascade, None without."""
    cascade = config.preprocess.cascade
    return None if cascade is None else pinned_model(config.lake, cascade.digest)


def numbered(rows: Iterable[dict]) -> list[tuple[int, dict]]:
    """Volumes with the numbers they go by in spills, whatever the order of ``rows``."""
    return list(enumerate(sorted(rows, key=lambda r: r["uid"])))


def groups(rows: Iterable[dict], config: Config) -> dict[str, int]:
    """By uid of a volume the number of its group in ``patches.balance``; the same whatever the order of ``rows``."""
    found = {}
    for row in rows:
        said = json.loads(row["header"] or "{}")
        said |= {"class": row["target"], "compound": said.get("treatment", {}).get("compound")}
        found[row["uid"]] = tuple(str(said.get(what, "")) for what in config.patches.balance)
    number = {group: n for n, group in enumerate(sorted(set(found.values())))}
    return {uid: number[group] for uid, group in found.items()}


def group_weights(rows: Sequence[dict], counts: Mapping[str, int], config: Config) -> list[float]:
    """By group what the loss of a training patch of it counts, so that all groups count the same and the mean patch 1; 0 of a
    group without training patches. ``counts`` are how many patches each volume gave, by uid."""
    known = groups(rows, config)
    patches = [0] * (max(known.values(), default=-1) + 1)
    for row in rows:
        if row["split"] == "train":
            patches[known[row["uid"]]] += counts.get(row["uid"], 0)
    there = sum(n > 0 for n in patches)
    return [sum(patches) / (there * n) if n else 0.0 for n in patches]


def order_key(seed: int, patch_id: str) -> int:
    """Where a patch stands in its split: the first 64 bits of a hash; patches of one key stand in the order of their volumes."""
    return int.from_bytes(sha256(f"{seed}/{patch_id}".encode()).digest()[:8], "big")


def patch_bytes(config: Config, channels: int) -> int:
    """Bytes of one patch before compression."""
    voxels = math.prod(config.patches.size)
    return voxels * (4 * channels + (np.dtype(_label_dtype(config)).itemsize if config.task == "segmentation" else 0))


def cell_count(row: dict, cells: Cells) -> int:
    """How many cells a field has: as many as a table lists, and where they are to be found about as many as crops fit side by
    side."""
    known, size = json.loads(row["header"] or "{}").get(CENTRES), cells.crops.size
    return known["cells"] if cells.listed and known else len(patches.grid(tuple(row["shape"][1:]), (size, size, 1)))


def patch_count(row: dict, config: Config) -> int:
    """How many patches a volume gives, from its geometry alone; about how many, where they are cells."""
    if config.cells:
        count, most = cell_count(row, config.cells), config.patches.per_volume
        return count if most == "all" else min(count, most)
    if _sampler(row["split"], config) != "grid":
        return config.patches.per_volume
    shape = preprocess.output_shape(tuple(row["shape"][1:]), np.reshape(row["affine"], (4, 4)), config.preprocess)
    return len(patches.grid(shape, config.patches.size, config.patches.overlap))


def weight(row: dict, config: Config) -> float:
    """Bytes that are moved to cut a volume: what tasks are packed by."""
    return 4.0 * math.prod(row["shape"]) + patch_count(row, config) * patch_bytes(config, channels([row], config))


def read_image(row: dict) -> Volume:
    """The image of a volume row; a field of a plate as the row says that its plate is treated (:mod:`sparkmed.hcs.correction`).

    Raises :class:`Refused` as :func:`formats.read_volume`.
    """
    header = VolumeHeader.from_row(row)
    volume, treated = formats.read_volume(header), header.facts.get(correction.FACT)
    if treated is None:
        return volume
    try:
        plate = correction.read(treated["file"])
    except (OSError, ValueError, KeyError) as e:
        raise Refused("UNREADABLE", f"how the plate is treated cannot be read ({type(e).__name__})") from None
    return replace(volume, array=plate.apply(volume.array), of_plate=treated["of"])


class Patch(NamedTuple):
    """``number`` of the patch in its volume, (C, I, J, K) float32 image, (I, J, K) label of a segmentation; of the crop of a cell
    its id in the field and its centre along I and J in pixels."""

    number: int
    image: np.ndarray
    label: np.ndarray | None
    cell: tuple[str, float, float] | None = None


def patch_id(uid: str, number: int) -> str:
    return f"{uid}-{number:05d}"


def cut(row: dict, config: Config, first: First | None = None) -> tuple[Iterator[Patch], dict[int, int]]:
    """The patches of one volume, cut one at a time as they are asked for, and how many of each class fell short.

    The image is held with its stored type, or float32 when it is resampled; intensities are scaled patch by patch, to the
    values that :func:`~sparkmed.imaging.preprocess.apply` gives. ``first`` is wanted with a cascade. Raises :class:`Refused` on
    unreadable pixels, before any patch; ``NO_CELLS``, ``NO_CENTRES`` and ``CENTRE_OUTSIDE`` where patches are cells.
    """
    header, spec = VolumeHeader.from_row(row), config.preprocess
    volume = [read_image(row)]  # held by the list alone: it is gone when it is placed
    cells = None if config.cells is None else _cells(volume[0], row, config)
    guidance = preprocess.guidance(first(volume[0]), spec) if spec.cascade is not None else None
    image = preprocess.place(volume.pop(), spec).array
    scale = functools.partial(intensity.scaled, scales=intensity.scales(image, spec.intensity))
    truth = None
    if config.task == "segmentation":
        stored = Grid(np.reshape(header.affine, (4, 4)), header.shape[1:])
        truth = preprocess.place(read_label(row, stored), spec, order=0).array[0]
    spatial, shortfall = image.shape[1:], {}
    if cells is not None:
        places = [place for _, (*_, place) in cells]
    elif _sampler(row["split"], config) == "grid":
        places = patches.grid(spatial, config.patches.size, config.patches.overlap)
    else:
        seed = f"{config.seed}/{row['uid']}"
        places, shortfall = patches.sample(spatial, config.patches, seed, truth, len(config.classes))
    found = _patches(image, scale, truth, np.dtype(_label_dtype(config)), places)
    if guidance is not None:
        found = _guided(found, guidance, spec.cascade, places)
    return found if cells is None else _named(found, cells), shortfall


def _patches(image, scale, truth, label_dtype, places) -> Iterator[Patch]:
    for number, place in enumerate(places):
        label = None if truth is None else patches.extract(truth, place).astype(label_dtype)
        yield Patch(number, patches.extract(image, place, change=scale), label)


def _guided(found: Iterator[Patch], guidance: np.ndarray, cascade: Cascade, places) -> Iterator[Patch]:
    """The patches with the channels of the first model behind their own; it says background beyond the image's edges."""
    for patch, place in zip(found, places, strict=True):
        more = preprocess.as_channels(patches.extract(guidance, place), cascade)
        yield patch._replace(image=np.concatenate([patch.image, more]))


def _cells(volume: Volume, row: dict, config: Config) -> list[tuple[int, tuple]]:
    """The cells that patches are cut of: their number among all of the field that can be cut, and what
    :func:`sparkmed.hcs.crops.located` says of them. Those of the least hashes are drawn, with a higher limit too."""
    from sparkmed.hcs import crops  # pandas and scikit-image are for those who need them

    there = list(enumerate(crops.located(volume, config.cells, read_centres(row) if config.cells.listed else None)))
    most = config.patches.per_volume
    if most == "all" or len(there) <= most:
        return there
    lots = {number: sha256(f"{config.seed}/{row['uid']}/{cell}".encode()).digest() for number, (cell, *_) in there}
    drawn = set(sorted(lots, key=lots.__getitem__)[:most])
    return [t for t in there if t[0] in drawn]


def _named(found: Iterator[Patch], cells: list[tuple[int, tuple]]) -> Iterator[Patch]:
    for patch, (number, (cell, x, y, _)) in zip(found, cells, strict=True):
        yield patch._replace(number=number, cell=(cell, x, y))


def read_centres(row: dict):
    """The centres of cells that a table lists of the field of a volume row, a data frame: :func:`sparkmed.hcs.crops.listed`."""
    from sparkmed.hcs import crops  # pandas and scikit-image are for those who need them

    return crops.listed(VolumeHeader.from_row(row))


def read_label(row: dict, image: Placed) -> Volume:
    """The label image of a volume row, on the image's axes."""
    label = formats.read_volume(VolumeHeader.from_row(json.loads(row["label"])))
    return labels.on_grid(label, image.affine, image.spatial_shape)


def spill(volumes: Iterable[tuple[int, dict]], config: Config, channels: int, url: str, first: First | None = None) -> Spill:
    """Cut ``volumes`` (with their numbers) into runs of patches, all in the file ``url``.

    At most ``patches.file_mb`` of patches are held, and one volume; ``first`` is wanted with a cascade.
    """
    runs, shortfall, refused, counts = [], Counter(), {}, Counter()
    most = max(1, int(config.patches.file_mb * 1e6 / patch_bytes(config, channels)))
    with storage.open(url, "wb") as file:
        for split, members in groupby(sorted(volumes, key=lambda v: (v[1]["split"], v[0])), key=lambda v: v[1]["split"]):
            waiting: list[tuple[tuple, Patch]] = []
            for volume, row in members:
                try:
                    found, short = cut(row, config, first)
                except Refused as e:
                    refused[row["uid"]] = e
                    continue
                shortfall.update(short)
                for patch in found:
                    counts[row["uid"]] += 1
                    waiting.append((_entry(patch, volume, row["uid"], config), patch))
                    if len(waiting) == most:
                        runs.append(_run(waiting, file, url, split, config))
                        waiting = []
            if waiting:
                runs.append(_run(waiting, file, url, split, config))
    return Spill(tuple(runs), dict(shortfall), refused, dict(counts))


def _index(config: Config) -> np.dtype:
    """Of the index of a run."""
    return np.dtype(_INDEX.descr + _CELL.descr) if config.cells else _INDEX


def _entry(patch: Patch, volume: int, uid: str, config: Config) -> tuple:
    """Of a patch in the index of a run."""
    place = order_key(config.seed, patch_id(uid, patch.number)), volume, patch.number
    if patch.cell is None:
        return place
    cell, x, y = patch.cell
    return *place, cell.encode(), x, y


def _run(waiting: list[tuple[tuple, Patch]], file, url: str, split: str, config: Config) -> Run:
    waiting.sort(key=lambda w: w[0])
    index, start = np.array([w[0] for w in waiting], _index(config)), file.tell()
    file.write(index.tobytes())
    for _, patch in waiting:
        for array in (patch.image, patch.label):
            if array is not None:
                file.write(_npy_header(array.dtype, array.shape))
                file.write(np.ascontiguousarray(array).data)
    return Run(url, start, split, index["key"].copy())


def plan(spills: Sequence[Spill], config: Config, channels: int) -> list[FilePlan]:
    """The files of the dataset: the order of each split, cut into stretches of equal numbers of patches.

    The same files whatever volumes share a spill.
    """
    record, entry, plans = _record_bytes(config, channels), _index(config).itemsize, []
    size = patch_bytes(config, channels)
    for split in ("train", "val", "test"):
        runs = [run for s in spills for run in s.runs if run.split == split]
        if not runs:
            continue
        keys = np.sort(np.concatenate([run.keys for run in runs]))
        total = len(keys)
        least = min(total, -(-config.patches.row_groups // 4))  # several files even of a small split: a task writes one
        files = max(least, math.ceil(total * size / (config.patches.file_mb * 1e6)))
        by_bytes = max(1, int(min(config.patches.row_group_mb * 1e6, _MOST_BYTES) / record))
        rows_per_group = min(by_bytes, max(1, total // config.patches.row_groups))
        inner = keys[[total * f // files for f in range(1, files)]]
        ends = [[0, *np.searchsorted(run.keys, inner).tolist(), len(run.keys)] for run in runs]
        for f in range(files):
            stretches = tuple(
                Stretch(run.url, run.start + a * entry, run.start + len(run.keys) * entry + a * record, b - a)
                for run, (a, b) in zip(runs, (e[f : f + 2] for e in ends), strict=True)
                if b > a
            )
            if stretches:
                plans.append(FilePlan(f"split={split}/part-{f:05d}.parquet", split, stretches, rows_per_group))
    return plans


def write(plan: FilePlan, facts: Sequence[tuple[str, str, int | None, int]], config: Config, channels: int, dataset_url: str):
    """Write one file, a row group in memory at a time.

    ``facts`` are (uid, subject, target, number of the group) of the volumes by their numbers.
    """
    schema, entry = arrow_schema(fields(config, channels)), _index(config)
    wanted = [(s.url, s.index, s.index + s.rows * entry.itemsize) for s in plan.stretches]
    index = np.concatenate([np.frombuffer(part, entry) for part in storage.read_ranges(wanted)])
    stretch = np.repeat(np.arange(len(plan.stretches)), [s.rows for s in plan.stretches])
    position = np.concatenate([np.arange(s.rows) for s in plan.stretches])
    order = np.lexsort((index["number"], index["volume"], index["key"]))
    with (
        storage.writing(storage.join(dataset_url, plan.path)) as file,
        pq.ParquetWriter(file, schema, compression=config.patches.compression, use_dictionary=False, write_statistics=False) as out,
    ):
        for start in range(0, len(order), plan.rows_per_group):
            rows = order[start : start + plan.rows_per_group]
            arrays = _gathered(plan.stretches, stretch[rows], position[rows], config, channels)
            table = pa.table(_columns(index[rows], facts, arrays, config), schema=schema)
            out.write_table(table, row_group_size=len(rows))


def _gathered(stretches, stretch: np.ndarray, position: np.ndarray, config: Config, channels: int) -> list[np.ndarray]:
    """Rows of a group, each given by its stretch and its position there: (rows, bytes) uint8 for each array column.

    A row group is a part of the order, and so is a run: what a stretch gives to the group lies side by side in it.
    """
    sizes = _payload_bytes(config, channels)
    record = sum(sizes)
    by_stretch = np.argsort(stretch, kind="stable")
    parts = np.split(by_stretch, np.flatnonzero(np.diff(stretch[by_stretch])) + 1)
    wanted = []
    for part in parts:
        first = stretches[stretch[part[0]]].patches + int(position[part[0]]) * record
        wanted.append((stretches[stretch[part[0]]].url, first, first + len(part) * record))
    arrays = [np.empty((len(stretch), size), np.uint8) for size in sizes]
    for part, data in zip(parts, storage.read_ranges(wanted), strict=True):
        block, begin = np.frombuffer(data, np.uint8).reshape(len(part), record), 0
        for array, size in zip(arrays, sizes, strict=True):
            array[part] = block[:, begin : begin + size]
            begin += size
    return arrays


def _columns(index: np.ndarray, facts, arrays: list[np.ndarray], config: Config) -> list[pa.Array]:
    """In the order of :func:`fields`."""
    volumes = [facts[v] for v in index["volume"].tolist()]
    ids = [patch_id(uid, n) for (uid, *_), n in zip(volumes, index["number"].tolist(), strict=True)]
    columns = [pa.array(ids), pa.array([v[1] for v in volumes]), pa.array([v[0] for v in volumes])]
    for array in arrays:
        ends = np.arange(len(array) + 1, dtype=np.int32) * array.shape[1]
        columns.append(pa.Array.from_buffers(pa.binary(), len(array), [None, pa.py_buffer(ends), pa.py_buffer(array)]))
    if config.task == "classification":
        columns.append(pa.array([v[2] for v in volumes], pa.int64()))
    if config.patches.balance:
        columns.append(pa.array([v[3] for v in volumes], pa.int64()))
    if config.cells:
        columns.append(pa.array([cell.decode() for cell in index["cell"].tolist()], pa.string()))
        columns += [pa.array(index[c].astype(np.float64)) for c in ("x", "y")]
    return columns


def _payloads(config: Config, channels: int) -> list[Field]:
    return [f for f in fields(config, channels) if f.codec == "ndarray"]


def _payload_bytes(config: Config, channels: int) -> list[int]:
    """Bytes of a row in each array column: the header of ``numpy.save`` and the values."""
    found = [(np.dtype(f.dtype), f.shape) for f in _payloads(config, channels)]
    return [len(_npy_header(dtype, shape)) + dtype.itemsize * math.prod(shape) for dtype, shape in found]


def _record_bytes(config: Config, channels: int) -> int:
    return sum(_payload_bytes(config, channels))


@functools.lru_cache
def _npy_header(dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    """What ``numpy.save`` writes before the values of an array in C order."""
    stream = io.BytesIO()
    descr = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def arrow_schema(columns: Sequence[Field]) -> pa.Schema:
    kinds = {"str": pa.string(), "int64": pa.int64(), "float64": pa.float64()}
    return pa.schema([pa.field(f.name, pa.binary() if f.codec == "ndarray" else kinds[f.dtype], nullable=False) for f in columns])


def description(
    config: Config, rows: Sequence[dict], spills: Sequence[Spill], plans: Sequence[FilePlan], lineage: dict
) -> dict[str, Any]:
    """What :func:`describe` gives back."""
    counts, shortfall, given = Counter(), Counter(), {}
    for p in plans:
        counts[p.split] += p.rows
    for s in spills:
        shortfall.update({config.classes[c]: n for c, n in s.shortfall.items()})
        given |= s.patches
    subjects = {split: len({r["subject"] for r in rows if r["split"] == split}) for split in counts}
    return {
        "format_version": FORMAT_VERSION,
        "name": config.name,
        "version": version(rows, config),
        "digest": digest(version(rows, config), sorted(uid for s in spills for uid in s.refused))[:16],
        "task": config.task,
        "classes": list(config.classes),
        "seed": config.seed,
        "counts": dict(counts),
        "subjects": subjects,
        "shortfall": dict(shortfall),
        "group_weights": group_weights(rows, given, config) if config.patches.balance else None,
        "refused": {uid: [e.reason, e.message] for s in spills for uid, e in s.refused.items()},
        "files": {p.path: p.rows for p in plans},
        "cascade": config.preprocess.cascade and config.preprocess.cascade.model_dump(mode="json", exclude={"tracking"}),
        "cells": config.cells and config.cells.model_dump(mode="json"),
        "fields": [f.__dict__ | {"shape": list(f.shape)} for f in fields(config, channels(rows, config))],
        **lineage,
    }


def _sampler(split: str, config: Config) -> str:
    return config.patches.sampler if split == "train" else "grid"


def _label_dtype(config: Config) -> str:
    return "uint8" if len(config.classes) <= 256 else "int32"
