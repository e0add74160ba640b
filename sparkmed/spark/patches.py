"""Volumes to patches: a Petastorm dataset, written by the executors with pyarrow; no pixel passes through the JVM."""

import math
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from petastorm.codecs import NdarrayCodec, ScalarCodec
from petastorm.etl.dataset_metadata import materialize_dataset
from petastorm.unischema import Unischema, UnischemaField
from pyspark.sql import SparkSession
from pyspark.sql.types import DoubleType, LongType, StringType

from sparkmed import dataset, storage
from sparkmed.config import Config
from sparkmed.rejection import InputError
from sparkmed.spark import session

TASK_BYTES = 256e6
"""Of voxels and patches that a task moves: more is divided, except for a single volume or file."""
_SCALARS = {"str": (np.str_, StringType), "int64": (np.int64, LongType), "float64": (np.float64, DoubleType)}


def write(spark: SparkSession, rows: Sequence[dict], config: Config, lineage: dict) -> str:
    """The URL of the dataset of these volumes, written now unless it is there already; its description names refused volumes.

    It is written beside its place and moved there when Petastorm's metadata and the description are complete. Until then
    the patches lie there twice, once uncompressed.
    """
    url = dataset.url(config.lake, config.name, dataset.version(rows, config))
    if storage.exists(storage.join(url, dataset.DESCRIPTION)):
        return url
    unfinished = f"{url}.writing-{uuid.uuid4().hex[:8]}"
    spilled = storage.join(unfinished, "_spilled")
    storage.makedirs(spilled)
    volumes, channels = dataset.numbered(rows), dataset.channels(rows, config)
    groups = dataset.groups(rows, config)
    facts = [(r["uid"], r["subject"], r["target"], groups[r["uid"]]) for _, r in volumes]

    def cut_some(some):
        with session.decoding():  # a name for each attempt at a task: of two that run at once, one counts
            return dataset.spill(some, config, channels, storage.join(spilled, uuid.uuid4().hex), _first(config))

    try:
        with materialize_dataset(
            spark, unfinished, unischema(config, channels), row_group_size_mb=max(1, int(config.patches.row_group_mb))
        ):
            cut = _on_executors(spark, volumes, [dataset.weight(row, config) for _, row in volumes], cut_some)
            _require_patches(rows, cut)
            plans = dataset.plan(cut, config, channels)
            size = dataset.patch_bytes(config, channels)
            _on_executors(
                spark,
                plans,
                [p.rows * size for p in plans],
                lambda some: [dataset.write(p, facts, config, channels, unfinished) for p in some],
            )
            _keep_only({p.path for p in plans}, unfinished)
        described = dataset.description(config, rows, cut, plans, lineage)
        storage.write_json(storage.join(unfinished, dataset.DESCRIPTION), described)
        _publish(unfinished, url)
    except BaseException:
        if storage.exists(unfinished):
            storage.remove(unfinished, recursive=True)
        raise
    return url


def _first(config: Config) -> dataset.First | None:
    """The first model of a cascade, from its copy in the lake."""
    cascade = config.preprocess.cascade
    if cascade is None:
        return None
    from sparkmed.learning.model import Model  # torch is for those who need it

    model = Model.load(dataset.pinned(config), config.train.device, config.imports, cascade.digest)
    return lambda image: model.guide(image, cascade.output)


def _on_executors(spark: SparkSession, items: list, weights: list[float], do: Callable[[list], Any]) -> list:
    """What ``do`` makes of the items of each task; ``weights`` are bytes. One task per slot, and more where there is much."""
    tasks = max(spark.sparkContext.defaultParallelism, math.ceil(sum(weights) / TASK_BYTES))
    groups = session.packed(items, weights, tasks)
    return spark.sparkContext.parallelize(groups, len(groups)).map(do).collect()


def _keep_only(paths: set[str], unfinished: str):
    """Remove runs, and what attempts left that were killed."""
    storage.remove(storage.join(unfinished, "_spilled"), recursive=True)
    for file in list(storage.walk(unfinished)):
        if file.path not in paths:
            storage.remove(file.uri)


def unischema(config: Config, channels: int) -> Unischema:
    """Petastorm's schema of the rows that :func:`sparkmed.dataset.write` writes."""
    columns = []
    for f in dataset.fields(config, channels):
        if f.codec == "ndarray":
            columns.append(UnischemaField(f.name, np.dtype(f.dtype).type, f.shape, NdarrayCodec(), False))
        else:
            kind, stored = _SCALARS[f.dtype]
            columns.append(UnischemaField(f.name, kind, (), ScalarCodec(stored()), False))
    return Unischema("Patches", columns)


def _require_patches(rows: Sequence[dict], spills: Sequence[dataset.Spill]):
    empty = {r["split"] for r in rows} - {run.split for s in spills for run in s.runs}
    if empty:
        reasons = [f"{e.reason}, {e.message}" for s in spills for _, e in sorted(s.refused.items())]
        raise InputError(f"split {' and '.join(sorted(empty))} has no patch: every volume was refused ({reasons[0]})")


def _publish(unfinished: str, url: str):
    try:
        storage.move(unfinished, url)
    except OSError:
        if not storage.exists(storage.join(url, dataset.DESCRIPTION)):
            # a folder without a description stands there: left by a move that was cut off on a store without renames
            storage.move(url, f"{url}.broken-{int(time.time())}")
            storage.move(unfinished, url)
        else:  # another run of the same job was faster, with the same bytes
            storage.remove(unfinished, recursive=True)
