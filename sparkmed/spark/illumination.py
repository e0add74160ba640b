"""Light and scale of plates, summed over all of their fields: a task adds up fields of one plate, only sums travel."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from pyspark.sql import SparkSession

from sparkmed import config, formats
from sparkmed.formats import VolumeHeader
from sparkmed.hcs import illumination
from sparkmed.hcs.illumination import FieldSum, Light
from sparkmed.hcs.plate_intensity import ControlScale, Histogram
from sparkmed.rejection import Refused, Rejection
from sparkmed.spark.session import decoding, packed

STAGE = "illumination"
TASK_BYTES = 1e9
"""Of pixels that a task reads."""

Key = tuple[str, str]
"""Plate and name of the channel."""
Sum = FieldSum | Histogram


def lights(
    spark: SparkSession, rows: Sequence[dict], settings: config.Illumination, left_out: frozenset[tuple[str, str]] = frozenset()
) -> tuple[dict[Key, Light], dict[Key, Refused], list[Rejection]]:
    """The light of each plate and channel, why the others have none, and the fields that were refused.

    ``rows`` are of ``volumes/``, their facts with ``plate`` and ``channels`` (names in the order of the array); ``left_out`` are
    (uid, channel) of fields that do not count, such as saturated ones. The numbers are those of :class:`FieldSum` in one process,
    bit by bit. A field of another shape than most of its plate is refused (``FIELD_SHAPE``).
    """
    usual, odd = _of_usual_shape(rows)

    def one(row, channel, field):
        return FieldSum() if (row["uid"], channel) in left_out else FieldSum.of(field)

    found, undefined, refused = _summed(spark, usual, FieldSum(), one, lambda total: total.compute(settings))
    return found, undefined, odd + refused


def control_scales(
    spark: SparkSession, rows: Sequence[dict], spec: config.Intensity, lights: Mapping[Key, Light] | None = None
) -> tuple[dict[Key, ControlScale], dict[Key, Refused], list[Rejection]]:
    """The scale of each plate and channel by the fields of its controls, which ``rows`` are; as :func:`lights`.

    ``lights`` are divided out before; a channel without one counts as it is. A plate without a row has no scale.
    """
    known = spark.sparkContext.broadcast(dict(lights or {}))

    def one(row, channel, field):
        light = known.value.get((row["plate"], channel))
        return Histogram.of(illumination.correct(field[None, ..., None], [light]))

    try:
        return _summed(spark, rows, Histogram.empty(), one, lambda total: total.compute(spec))
    finally:
        known.unpersist()


def _summed(
    spark: SparkSession,
    rows: Sequence[dict],
    empty: Sum,
    one: Callable[[dict, str, np.ndarray], Sum],
    compute: Callable[[Sum], Any],
) -> tuple[dict[Key, Any], dict[Key, Refused], list[Rejection]]:
    """``compute`` of the sums by plate and channel, what it refused, and the fields that could not be read."""
    if not rows:
        return {}, {}, []

    def add(some: list[dict]) -> tuple[list[tuple[Key, Sum]], list[Rejection]]:
        sums: dict[Key, Sum] = {}
        refused = []
        with decoding():
            for row in some:
                try:
                    array = formats.read_volume(VolumeHeader.from_row(row)).array
                    found = [one(row, c, field[..., 0]) for c, field in zip(row["channels"], array, strict=True)]
                except Refused as e:
                    refused += [e.at(uri, STAGE) for uri in row["sources"]]
                    continue
                for channel, field in zip(row["channels"], found, strict=True):
                    key = row["plate"], channel
                    sums[key] = sums.get(key, empty).merge(field)
        return [*sums.items()], refused

    def computed(total: Sum) -> tuple[Any, Refused | None]:
        try:
            return compute(total), None
        except Refused as e:
            return None, e

    described = [_described(r) for r in rows]
    tasks = _tasks(described, spark.sparkContext.defaultParallelism)
    added = spark.sparkContext.parallelize(tasks, len(tasks)).map(add).cache()
    try:
        done = dict(added.flatMap(lambda a: a[0]).reduceByKey(lambda a, b: a.merge(b)).mapValues(computed).collect())
        refused = added.flatMap(lambda a: a[1]).collect()
    finally:
        added.unpersist()
    every = sorted({(r["plate"], c) for r in described for c in r["channels"]})
    done |= {key: computed(empty) for key in every if key not in done}  # all of its fields were refused
    values = {key: done[key][0] for key in every if done[key][1] is None}
    undefined = {key: done[key][1] for key in every if done[key][1] is not None}
    return values, undefined, sorted(refused, key=lambda r: (r.uri, r.reason))


def _described(row: dict) -> dict:
    facts = VolumeHeader.from_row(row).facts
    return {**row, "plate": str(facts["plate"]), "channels": list(facts["channels"])}


def _of_usual_shape(rows: Sequence[dict]) -> tuple[list[dict], list[Rejection]]:
    """The fields whose shape most of their plate have, of two as frequent the larger; and the others."""
    shapes: dict[str, dict[tuple, int]] = {}
    for row in rows:
        counts = shapes.setdefault(_described(row)["plate"], {})
        counts[tuple(row["shape"])] = counts.get(tuple(row["shape"]), 0) + 1
    usual = {plate: max(counts, key=lambda s: (counts[s], s)) for plate, counts in shapes.items()}
    fitting, odd = [], []
    for row in rows:
        wanted = usual[_described(row)["plate"]]
        if tuple(row["shape"]) == wanted:
            fitting.append(row)
        else:
            e = Refused("FIELD_SHAPE", f"a field of shape {tuple(row['shape'])}, most of its plate are {wanted}")
            odd += [e.at(uri, STAGE) for uri in row["sources"]]
    return fitting, odd


def _tasks(rows: list[dict], slots: int) -> list[list[dict]]:
    """Fields of one plate each, so that a task holds the sums of one plate; a plate has several tasks where there is much of it."""
    by_plate: dict[str, list[dict]] = {}
    for row in rows:
        by_plate.setdefault(row["plate"], []).append(row)
    tasks = []
    for plate in by_plate.values():
        sizes = [float(np.prod(r["shape"], dtype=np.float64)) * 2 for r in plate]
        tasks += packed(plate, sizes, max(-(-slots // len(by_plate)), int(sum(sizes) / TASK_BYTES) + 1))
    return tasks
