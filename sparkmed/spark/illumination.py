"""Light and scale of plates, summed over all of their fields: a task adds up fields of one plate, only sums travel."""

import dataclasses
import fnmatch
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pyspark.sql import SparkSession

from sparkmed import formats, storage
from sparkmed.config import Config, FieldQuality, Illumination, Intensity, digest
from sparkmed.formats import VolumeHeader, ome_zarr
from sparkmed.formats.instance import READER, to_json
from sparkmed.hcs import correction, illumination, image_quality
from sparkmed.hcs.correction import Correction
from sparkmed.hcs.fields import CENTRES, NAMELESS
from sparkmed.hcs.illumination import FieldSum, Light
from sparkmed.hcs.plate_intensity import ControlScale, Histogram
from sparkmed.rejection import InputError, Refused, Rejection
from sparkmed.spark.session import decoding, packed

STAGE = "illumination"
FOLDER = "corrections"
"""Of the lake, where treatments of plates lie."""
TASK_BYTES = 1e9
"""Of pixels that a task reads."""

ALL = FieldQuality()
"""By which no field is left out."""

Key = tuple[str, str]
"""Plate and name of the channel."""
Sum = FieldSum | Histogram


def treated(spark: SparkSession, headers: Sequence[VolumeHeader], config: Config) -> tuple[list[VolumeHeader], list[Rejection]]:
    """The headers of fields with the fact how their plate is treated as ``config.preprocess`` says, and with a uid of that too.

    A plate whose light or scale cannot be estimated has all of its fields refused: none is taken as it is. What was estimated lies
    in the lake under a digest of what it is of, and is not estimated again. Raises :class:`InputError` for a function of the user's
    that cannot be read.
    """
    spec, plates = config.preprocess, {}
    for header in headers:
        plates.setdefault(_plate(header), []).append(header)
    given = _given(config, plates)
    plates, odd = _fitting(plates, given)

    def name(plate: str) -> tuple[str, str]:
        """Digest of all that the treatment is a function of, and the file of it."""
        found = _digest(config, plate, plates[plate], given)
        return found, storage.absolute(storage.join(config.lake, FOLDER, f"{found}.json"))

    new = [plate for plate in plates if not storage.exists(name(plate)[1])]
    found, problems, refused = _estimated(spark, [h for plate in new for h in plates[plate]], config, given)
    gone = {r.uri for r in refused}
    plates = {plate: [h for h in some if gone.isdisjoint(h.sources)] for plate, some in plates.items()}
    kept = []
    for plate, some in plates.items():
        if problem := problems.get(plate):
            refused += [problem.at(uri, STAGE) for header in some for uri in header.sources]
            continue
        of, file = name(plate)
        if plate in found:
            found[plate].write(file)
        for header in some:
            facts = header.facts | {correction.FACT: {"file": file, "of": spec.of_plate}}
            kept.append(dataclasses.replace(header, uid=digest(header.uid, of)[:32], header=to_json(facts)))
    return kept, odd + refused


def inputs(config: Config) -> list:
    """What treatments depend on beside the catalog and the config: the lake that they lie in, and the user's own functions as a
    listing shows them (another content is another size or time)."""
    spec = config.preprocess
    found = [storage.absolute(config.lake)] if spec.of_plate else []
    if spec.illumination is None or spec.illumination.files is None:
        return found
    url = storage.absolute(spec.illumination.files)
    folder = url.partition("{")[0].rpartition("/")[0]
    pattern = url.removeprefix(f"{folder}/").replace("{plate}", "*").replace("{channel}", "*")
    try:
        listed = [f for f in storage.walk(folder, whole=ome_zarr.SUFFIXES) if fnmatch.fnmatchcase(f.path, pattern)]
    except FileNotFoundError:
        raise InputError(f"illumination.files: {folder} does not exist") from None
    return found + sorted([f.path, f.size, f.mtime_ns] for f in listed)


def there(rows: Iterable[dict]) -> bool:
    """Whether the files that volume rows name still lie where they say."""
    said = (json.loads(r["header"] or "{}") for r in rows)
    named = {facts.get(fact, {}).get("file") for facts in said for fact in (correction.FACT, CENTRES)} - {None}
    return all(storage.exists(file) for file in named)


def _plate(header: VolumeHeader) -> str:
    return str(header.facts.get("plate") or NAMELESS)


def _is_control(header: VolumeHeader) -> bool:
    return header.facts.get("treatment", {}).get("control") == "negative"


def _given(config: Config, plates: Iterable[str]) -> dict[Key, Light]:
    """The user's own functions."""
    spec = config.preprocess.illumination
    if spec is None or spec.files is None:
        return {}
    return {(plate, c): illumination.read(spec.files, plate, c) for plate in plates for c, _ in config.plates.channels}


def _fitting(
    plates: Mapping[str, list[VolumeHeader]], given: Mapping[Key, Light]
) -> tuple[dict[str, list[VolumeHeader]], list[Rejection]]:
    """The fields that have the shape of the user's functions, and refusals of the others."""
    wanted = {plate: {light.shape for key, light in given.items() if key[0] == plate} for plate in plates}
    fitting, odd = {}, []
    for plate, some in plates.items():
        fitting[plate] = [h for h in some if wanted[plate] <= {h.shape[1:3]}]
        e = Refused("FIELD_SHAPE", f"the field has another shape than the functions of illumination.files: {sorted(wanted[plate])}")
        odd += [e.at(uri, STAGE) for h in some if not wanted[plate] <= {h.shape[1:3]} for uri in h.sources]
    return {plate: some for plate, some in fitting.items() if some}, odd


def _digest(config: Config, plate: str, headers: list[VolumeHeader], given: Mapping[Key, Light]) -> str:
    spec, plates = config.preprocess, config.plates
    own = [[list(light.shape), hashlib.sha256(light.grid).hexdigest()] for key, light in sorted(given.items()) if key[0] == plate]
    content = sorted((h.uid, _is_control(h)) for h in headers)
    return digest(READER, spec.illumination, spec.intensity, plates.quality, plates.channels, own, content)[:32]


def _estimated(
    spark: SparkSession, headers: list[VolumeHeader], config: Config, given: Mapping[Key, Light]
) -> tuple[dict[str, Correction], dict[str, Refused], list[Rejection]]:
    """The treatment of each plate, why some have none, and the fields that were refused."""
    spec, quality, rows = config.preprocess, config.plates.quality, [h.row() for h in headers]
    known, problems, refused, scales = dict(given), {}, [], {}
    if spec.illumination and not given:
        known, problems, refused = lights(spark, rows, spec.illumination, quality)
    if spec.intensity.against == "controls":
        gone = {r.uri for r in refused}
        controls = [h.row() for h in headers if _is_control(h) and gone.isdisjoint(h.sources)]
        scales, without, more = control_scales(spark, controls, spec.intensity, known, quality)
        problems, refused = {**without, **problems}, refused + more
    of_plates = {_plate(h) for h in headers}
    found, unfit = {}, {plate: e for (plate, _), e in sorted(problems.items(), reverse=True)}
    for plate in of_plates - unfit.keys():
        keys = [(plate, c) for c, _ in config.plates.channels]
        if spec.intensity.against == "controls" and not all(k in scales for k in keys):
            unfit[plate] = Refused("NO_CONTROLS", "the plate has no field of a negative control")
        else:
            found[plate] = Correction(tuple(known.get(k) for k in keys), tuple(scales.get(k) for k in keys))
    return found, unfit, refused


def lights(
    spark: SparkSession, rows: Sequence[dict], settings: Illumination, quality: FieldQuality = ALL
) -> tuple[dict[Key, Light], dict[Key, Refused], list[Rejection]]:
    """The light of each plate and channel, why the others have none, and the fields that were refused.

    ``rows`` are of ``volumes/``, their facts with ``plate`` and ``channels`` (names in the order of the array). A field with a flag
    of the channel that ``quality.leave_out`` names does not count; cells are not counted here. The numbers are those of
    :class:`FieldSum` in one process, bit by bit. A field of another shape than most of its plate is refused (``FIELD_SHAPE``).
    """
    usual, odd = _of_usual_shape([_Field.of(r) for r in rows])

    def one(field, channel, pixels):
        return FieldSum() if _suspect(pixels, quality) else FieldSum.of(pixels)

    found, undefined, refused = _summed(spark, usual, FieldSum(), one, lambda total: total.compute(settings))
    return found, undefined, odd + refused


def control_scales(
    spark: SparkSession,
    rows: Sequence[dict],
    spec: Intensity,
    lights: Mapping[Key, Light] | None = None,
    quality: FieldQuality = ALL,
) -> tuple[dict[Key, ControlScale], dict[Key, Refused], list[Rejection]]:
    """The scale of each plate and channel by the fields of its controls, which ``rows`` are; as :func:`lights`.

    ``lights`` are divided out before; a channel without one counts as it is. A plate without a row has no scale.
    """
    known = spark.sparkContext.broadcast(dict(lights or {}))

    def one(field, channel, pixels):
        light = known.value.get((field.plate, channel))
        if _suspect(pixels, quality):
            return Histogram.empty()
        return Histogram.of(illumination.correct(pixels[None, ..., None], [light]))

    try:
        return _summed(spark, [_Field.of(r) for r in rows], Histogram.empty(), one, lambda total: total.compute(spec))
    finally:
        known.unpersist()


def _suspect(pixels: np.ndarray, quality: FieldQuality) -> bool:
    wanted = set(quality.leave_out)
    return bool(wanted) and not wanted.isdisjoint(image_quality.flags(image_quality.measure(pixels, quality), quality))


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
        channels = tuple(str(c) for c in header.facts.get("channels") or ())
        if len(channels) != header.shape[0]:
            raise InputError(
                f"volume {header.uid} of {header.shape[0]} channels is no field of a plate: its header names {list(channels)}"
            )
        return cls(header, _plate(header), channels)


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
