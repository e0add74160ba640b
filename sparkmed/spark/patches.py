"""Volumes to patches: a Petastorm dataset, written by the executors with pyarrow; no pixel passes through the JVM."""

import time
import uuid
from collections.abc import Sequence

import numpy as np
from petastorm.codecs import NdarrayCodec, ScalarCodec
from petastorm.etl.dataset_metadata import materialize_dataset
from petastorm.unischema import Unischema, UnischemaField
from pyspark.sql import SparkSession
from pyspark.sql.types import LongType, StringType

from sparkmed import dataset, storage
from sparkmed.config import Config
from sparkmed.rejection import InputError


def write(spark: SparkSession, rows: Sequence[dict], config: Config, lineage: dict) -> str:
    """The URL of the dataset of these volumes, written now unless it is there already; its description names refused volumes.

    It is written beside its place and moved there when Petastorm's metadata and the description are complete.
    """
    url = dataset.url(config.lake, config.name, dataset.version(rows, config))
    if storage.exists(storage.join(url, dataset.DESCRIPTION)):
        return url
    unfinished = f"{url}.writing-{uuid.uuid4().hex[:8]}"
    storage.makedirs(unfinished)
    plans, channels = dataset.plan(rows, config), dataset.channels(rows, config)
    try:
        with materialize_dataset(
            spark, unfinished, unischema(config, channels), row_group_size_mb=max(1, int(config.patches.row_group_mb))
        ):
            tasks = spark.sparkContext.parallelize(plans, len(plans))
            written = tasks.map(lambda p: dataset.write(p, config, channels, unfinished)).collect()
            _require_patches(written)
        storage.write_json(storage.join(unfinished, dataset.DESCRIPTION), dataset.description(config, rows, written, lineage))
        _publish(unfinished, url)
    except BaseException:
        if storage.exists(unfinished):
            storage.remove(unfinished, recursive=True)
        raise
    return url


def unischema(config: Config, channels: int) -> Unischema:
    """Petastorm's schema of the rows that :func:`sparkmed.dataset.write` writes."""
    columns = []
    for f in dataset.fields(config, channels):
        if f.codec == "ndarray":
            columns.append(UnischemaField(f.name, np.dtype(f.dtype).type, f.shape, NdarrayCodec(), False))
        elif f.dtype == "str":
            columns.append(UnischemaField(f.name, np.str_, (), ScalarCodec(StringType()), False))
        else:
            columns.append(UnischemaField(f.name, np.int64, (), ScalarCodec(LongType()), False))
    return Unischema("Patches", columns)


def _require_patches(written: Sequence[dataset.Written]):
    empty = {w.split for w in written} - {w.split for w in written if w.rows}
    if empty:
        reasons = [f"{e.reason}, {e.message}" for w in written for e in w.refused.values()]
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
