"""Light and scale of plates, summed over all of their fields: a task adds up fields of one plate, only sums travel."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pyspark.sql import SparkSession

from sparkmed import config, formats
from sparkmed.formats import VolumeHeader
from sparkmed.hcs import illumination
from sparkmed.hcs.illumination import FieldSum, Light
from sparkmed.hcs.plate_intensity import ControlScale, Histogram
from sparkmed.rejection import InputError, Refused, Rejection
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
    usual, odd = _of_usual_shape([_Field.of(r) for r in rows])

    def one(field, channel, pixels):
        return FieldSum() if (field.header.uid, channel) in left_out else FieldSum.of(pixels)

    found, undefined, refused = _summed(spark, usual, FieldSum(), one, lambda total: total.compute(settings))
    return found, undefined, odd + refused


def control_scales(
    spark: SparkSession, rows: Sequence[dict], spec: config.Intensity, lights: Mapping[Key, Light] | None = None
) -> tuple[dict[Key, ControlScale], dict[Key, Refused], list[Rejection]]:
    """The scale of each plate and channel by the fields of its controls, which ``rows`` are; as :func:`lights`.

    ``lights`` are divided out before; a channel without one counts as it is. A plate without a row has no scale.
    """
    known = spark.sparkContext.broadcast(dict(lights or {}))

    def one(field, channel, pixels):
        light = known.value.get((field.plate, channel))
        return Histogram.of(illumination.correct(pixels[None, ..., None], [light]))

    try:
        return _summed(spark, [_Field.of(r) for r in rows], Histogram.empty(), one, lambda total: total.compute(spec))
    finally:
        known.unpersist()


def _summed(
    spark: SparkSession,
    fields: list["_Field"],
    empty: Sum,
    one: Callable[["_Field", str, np.ndarray], Sum],
    compute: Callable[[Sum], Any],
) -> tuple[dict[Key, Any], dict[Key, Refused], list[Rejection]]:
    """``compute`` of the sums by plate and channel, what it refused, and the fields that could not be read."""
    if not fields:
        return {}, {}, []

    def add(some: list[_Field]) -> tuple[list[tuple[Key, Sum]], list[Rejection]]:
        sums: dict[Key, Sum] = {}
        refused = []
        with decoding():
            for field in some:
                try:
                    array = formats.read_volume(field.header).array
                    found = [one(field, c, pixels[..., 0]) for c, pixels in zip(field.channels, array, strict=True)]
                except Refused as e:
                    refused += [e.at(uri, STAGE) for uri in field.header.sources]
                    continue
                for channel, total in zip(field.channels, found, strict=True):
                    key = field.plate, channel
                    sums[key] = sums.get(key, empty).merge(total)
        return [*sums.items()], refused

    def computed(total: Sum) -> tuple[Any, Refused | None]:
        try:
            return compute(total), None
        except Refused as e:
            return None, e

    every = sorted({(f.plate, c) for f in fields for c in f.channels})
    tasks = _tasks(fields, spark.sparkContext.defaultParallelism)
    added = spark.sparkContext.parallelize(tasks, len(tasks)).map(add).cache()
    try:
        sums = added.flatMap(lambda a: a[0]).reduceByKey(lambda a, b: a.merge(b), min(len(every), len(tasks)))
        done = dict(sums.mapValues(computed).collect())
        refused = added.flatMap(lambda a: a[1]).collect()
    finally:
        added.unpersist()
    done |= {key: computed(empty) for key in every if key not in done}  # all of its fields were refused
    values = {key: done[key][0] for key in every if done[key][1] is None}
    undefined = {key: done[key][1] for key in every if done[key][1] is not None}
    return values, undefined, sorted(refused, key=lambda r: (r.uri, r.reason))


@dataclass(frozen=True)
class _Field:
    header: VolumeHeader
    plate: str
    channels: tuple[str, ...]

    @classmethod
    def of(cls, row: dict) -> "_Field":
        header = VolumeHeader.from_row(row)
        facts = header.facts
        channels = tuple(str(c) for c in facts.get("channels") or ())
        if not facts.get("plate") or len(channels) != header.shape[0]:
            raise InputError(
                f"volume {header.uid} of {header.shape[0]} channels is no field of a plate: its header names plate "
                f"{facts.get('plate')!r} and channels {list(channels)}"
            )
        return cls(header, str(facts["plate"]), channels)


def _of_usual_shape(fields: list[_Field]) -> tuple[list[_Field], list[Rejection]]:
    """The fields whose shape most of their plate have, of two as frequent the larger; and the others."""
    shapes = Counter((f.plate, f.header.shape) for f in fields)
    usual: dict[str, tuple] = {}
    for (plate, shape), count in shapes.items():
        usual[plate] = max(usual.get(plate, (0, ())), (count, shape))
    fitting, odd = [], []
    for f in fields:
        _, wanted = usual[f.plate]
        if f.header.shape == wanted:
            fitting.append(f)
        else:
            e = Refused("FIELD_SHAPE", f"a field of shape {f.header.shape}, most of its plate are {wanted}")
            odd += [e.at(uri, STAGE) for uri in f.header.sources]
    return fitting, odd


def _tasks(fields: list[_Field], slots: int) -> list[list[_Field]]:
    """Fields of one plate each, so that a task holds the sums of one plate; a plate has several tasks where there is much of it."""
    by_plate: dict[str, list[_Field]] = {}
    for f in fields:
        by_plate.setdefault(f.plate, []).append(f)
    tasks = []
    for plate in by_plate.values():
        sizes = [2.0 * math.prod(f.header.shape) for f in plate]
        tasks += packed(plate, sizes, max(-(-slots // len(by_plate)), int(sum(sizes) / TASK_BYTES) + 1))
    return tasks
