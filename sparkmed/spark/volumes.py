"""Catalog to volumes: what belongs together, where it lies in space, whose it is."""

import dataclasses
import io
import json
import logging
import posixpath
from collections import Counter

import numpy as np
import pyarrow.compute as pc
from pyspark.sql import SparkSession

from sparkmed import cohort, formats, storage, tables
from sparkmed.config import Config, Plates, digest
from sparkmed.formats import archive, series
from sparkmed.formats.instance import READER, Instance, VolumeHeader
from sparkmed.hcs import crops, fields, filenames, indexes
from sparkmed.identity import fingerprint
from sparkmed.imaging import labels, preprocess
from sparkmed.reasons import PASSING
from sparkmed.rejection import InputError, Refused, Rejection
from sparkmed.spark import catalog, illumination
from sparkmed.spark.session import decoding

STAGE = cohort.STAGE
CENTRES = "centres"
"""Of the lake, where centres of cells lie."""
log = logging.getLogger(__name__)
_OF_PLATE = "plate in "
"""How the key of a group starts that is no series, and no URI."""


def build(spark: SparkSession, config: Config, key: bytes | None, lineage: dict) -> dict[str, int]:
    """Replace ``volumes/`` by the volumes of the catalog as it is now, in one commit; counts of what came and what was refused.

    Writes nothing when neither the catalog nor the config changed. Raises :class:`InputError` when the archive does not fit the
    config: labels missing, more classes than the config names, different channel counts, an empty split. What was refused is
    counted each time, ``files`` being all that came.
    """
    table, refusals = tables.volumes(config.lake), tables.quarantine(config.lake)
    inputs = digest(
        READER,
        tables.catalog(config.lake).committed(catalog.STAGE),
        cohort.label_table(config),
        *([cohort.plate_digest(config), config.plates] if config.plates else []),
        *illumination.inputs(config),
        *([cohort.cells_digest(config), storage.absolute(config.lake)] if config.cells and config.cells.listed else []),
        config.volumes,
        config.identity,
        fingerprint(key),
        config.classes,
        config.task,
        config.preprocess,
    )
    before = table.rows()
    whole = table.committed(STAGE) == refusals.committed(STAGE)  # else a run was killed between its two commits
    refused = refusals.read(["uri", "reason"], pc.field("stage") == STAGE).to_pylist()
    whole = whole and illumination.there(before) and PASSING.isdisjoint(r["reason"] for r in refused)
    if whole and before and {r["inputs"] for r in before} == {inputs}:
        table.sweep()
        # a file that came is a source of a volume, ignored or not, or was refused
        came = catalog.current(spark, config.lake).select("uri").distinct().count()
        return {"volumes": len(before), "changed": 0, "files": came, "refused": len({r["uri"] for r in refused})}

    headers, rejections = _assemble(spark, config)
    files = len({u for h in headers for u in h.sources} | {r.uri for r in rejections})
    study = cohort.assemble(headers, config, key)
    rejections += study.rejections
    if config.preprocess.of_plate:
        study, unlit = _treated(spark, study, config)
        rejections += unlit
    if config.cells and config.cells.listed:
        study = _listed(study, config)
    counted = {(r["uid"], r["label_uid"]): r["label_counts"] for r in before if len(r["label_counts"] or ()) == len(config.classes)}
    fitting, unfit = _fitting(study.members, config)
    members, label_counts, unsound = _check_labels(spark, fitting, config, counted)
    rejections += unfit + unsound
    if any(m.split for m in members):
        cohort.require_splits(members, config)

    run = max(table.committed(STAGE), refusals.committed(STAGE)) + 1
    lineage = {**lineage, "run": run}
    rows = [{**row(m, label_counts.get(m.image.uid)), "inputs": inputs, **lineage} for m in members]
    old = catalog.files_of(refusals, STAGE)
    refused = [catalog.quarantine_row(r, lineage) for r in rejections]
    refusals.commit([refusals.write(refused)] if refused else [], (STAGE, run), replace=old)
    table.commit([table.write(rows)], (STAGE, run), replace=table.paths())
    table.sweep()
    splits = Counter(m.split or "unlabelled" for m in members)
    refused_files = len({r.uri for r in rejections})
    return {"volumes": len(members), "changed": 1, **splits, "files": files, "refused": refused_files, "ignored": study.ignored}


def row(member: cohort.Member, label_counts: list[int] | None) -> dict:
    """A row of ``volumes/``."""
    image = member.image
    facts = {k: v for k, v in image.row().items() if k in tables.VOLUMES.names}
    return {
        **facts,
        "spacing": np.linalg.norm(np.reshape(image.affine, (4, 4))[:3, :3], axis=0).tolist(),
        "subject": member.subject,
        "split": member.split,
        "label": json.dumps(member.label.row()) if member.label else None,
        "label_uid": member.label.uid if member.label else None,
        "label_counts": label_counts,
        "target": member.target,
    }


def group(instance: Instance, plates: bool = False) -> str:
    """What the instances of one volume share; of segmentations, what copies of one object share; of plates, the folder. Always
    text: Spark sorts keys when it spills."""
    if plates and instance.format in ("raster", indexes.FORMAT):
        return _OF_PLATE + filenames.plate_folder(posixpath.dirname(instance.path))
    if instance.kind == "segmentation":
        return repr(("segmentation", instance.sop_uid or instance.sha256))
    return repr(series.series_key(instance)) if instance.format == "dicom" else instance.uri


def _assemble(spark: SparkSession, config: Config) -> tuple[list[VolumeHeader], list[Rejection]]:
    """Group instances by series (a file of another format is its own), then geometry; only headers travel."""

    def keyed(r):
        instance = dataclasses.replace(Instance.from_row(r.asDict()), patient=r.subject or "")
        return group(instance, plates is not None), instance

    settings, plates = config.volumes, config.plates
    grouped = catalog.current(spark, config.lake).rdd.map(keyed).groupByKey()
    headers, rejections = [], []

    def assembled(pair):
        key, instances = pair
        if plates is not None and key.startswith(_OF_PLATE):
            return _fields(list(instances), plates)
        with decoding():  # copies of an instance are compared
            return *series.assemble(instances, settings), {}

    other_kinds = Counter()
    for found, refused, others in grouped.map(assembled).collect():
        headers += found
        rejections += refused
        other_kinds.update(others)
    if plates is not None:
        wells, copies = fields.once(h for h in headers if h.format == fields.FORMAT)
        headers = [h for h in headers if h.format != fields.FORMAT] + wells
        rejections += copies
        if not wells and other_kinds["other channel"]:
            raise InputError(
                f"no image of the archive is of plates.channels {dict(plates.channels)}, {other_kinds['other channel']} are of "
                "other channels: wanted the ids that file names or the index have"
            )
    return sorted(headers, key=lambda h: h.source_paths), sorted(rejections, key=lambda r: (r.uri, r.reason))


def _fields(instances: list[Instance], plates: Plates) -> tuple[list[VolumeHeader], list[Rejection], Counter]:
    """Fields of the pictures in the folder of a plate, by their names and by the vendor's index if there is one; refusals; and how
    many pictures are of what other kind."""
    listed = [i for i in instances if i.format == indexes.FORMAT]
    pictures = [i for i in instances if i.format != indexes.FORMAT]
    index, rejections = None, []
    details = {i.path: i for i in listed if i.path.lower().endswith(".mrf")}
    wanted = [i for i in listed if i.path not in details and plates.index]
    wanted = [i for i in wanted if i.facts["source"] != "csv"] or wanted  # the vendor's own before a list of somebody else's
    if len(wanted) > 1:
        message = f"{len(wanted)} index files in the folder of one plate; plates.index: false leaves them aside"
        rejections += [Rejection(i.uri, STAGE, "BROKEN_INDEX", message) for i in wanted]
    elif wanted:
        detail = next(iter(details.values()), None)
        try:
            data = [io.BytesIO(d) for _, d in sorted(archive.read_many([i.uri for i in (wanted[0], detail) if i]))]
            index = indexes.read(wanted[0].path, *data, uri=wanted[0].uri)
        except Refused as e:
            rejections.append(e.at(wanted[0].uri, STAGE))
    found = fields.assemble(pictures, plates, index)
    return found.headers, rejections + found.rejections, Counter(found.others.values())


def _treated(spark: SparkSession, study: cohort.Cohort, config: Config) -> tuple[cohort.Cohort, list[Rejection]]:
    """The fields of plates with what is done to their plate, which their uid then says too; other images as they are."""
    fields_of = [m for m in study.members if m.image.format == fields.FORMAT]
    images, refused = illumination.treated(spark, [m.image for m in fields_of], config)
    by_sources = {i.sources: i for i in images}
    members = [
        dataclasses.replace(m, image=by_sources.get(m.image.sources, m.image))
        for m in study.members
        if m.image.format != fields.FORMAT or m.image.sources in by_sources
    ]
    return dataclasses.replace(study, members=members), [dataclasses.replace(r, stage=STAGE) for r in refused]


def _listed(study: cohort.Cohort, config: Config) -> cohort.Cohort:
    """The fields of plates with the cells that a table lists of them, which their uid then says too; other images as they are."""
    fields_of = [m for m in study.members if m.image.format == fields.FORMAT]
    folder = storage.join(config.lake, CENTRES)
    images, strays = crops.joined([m.image for m in fields_of], cohort.cells(config), folder)
    without = sum(not i.facts[fields.CENTRES]["cells"] for i in images)
    if without or strays:
        log.warning("the table of cells has none of %d of %d fields, and %d rows of no field", without, len(images), strays)
    by_sources = {i.sources: i for i in images}
    members = [dataclasses.replace(m, image=by_sources.get(m.image.sources, m.image)) for m in study.members]
    return dataclasses.replace(study, members=members)


def _fitting(members: list[cohort.Member], config: Config) -> tuple[list[cohort.Member], list[Rejection]]:
    """The images whose preprocessed grid can be made, and why not of the others; from geometry alone."""
    fitting, rejections = [], []
    for m in members:
        try:
            preprocess.output_shape(m.image.shape[1:], np.reshape(m.image.affine, (4, 4)), config.preprocess)
            fitting.append(m)
        except Refused as e:
            rejections += [e.at(u, STAGE) for u in m.image.sources]
    return fitting, rejections


def _check_labels(spark: SparkSession, members: list[cohort.Member], config: Config, counted: dict):
    """Read every label image once: it lies on the image's grid and holds the config's classes. Members, voxel counts, refusals."""
    classes = len(config.classes)
    known = {m.image.uid: counted[m.image.uid, m.label.uid] for m in members if m.label and (m.image.uid, m.label.uid) in counted}
    todo = [m for m in members if m.label and m.image.uid not in known]

    def check(some):
        with decoding():
            for member in some:
                image = member.image
                try:
                    label = labels.on_grid(formats.read_volume(member.label), np.reshape(image.affine, (4, 4)), image.shape[1:])
                    yield image.uid, labels.check_label(label, label, classes).tolist(), None
                except Refused as e:
                    yield image.uid, None, e

    tasks = max(1, min(len(todo), 4 * spark.sparkContext.defaultParallelism))
    checked = spark.sparkContext.parallelize(todo, tasks).mapPartitions(check).collect()
    problems = {uid: e for uid, _, e in checked if e}
    beyond = [
        (m, problems[m.image.uid])
        for m in members
        if m.image.uid in problems and problems[m.image.uid].reason == "LABEL_OUT_OF_RANGE"
    ]
    if beyond:
        member, e = beyond[0]
        raise InputError(
            f"{len(beyond)} labels do not fit classes {list(config.classes)}, such as {member.label.source_paths[0]}: {e.message}"
        )
    known |= {uid: counts for uid, counts, _ in checked if counts}
    sound = [m for m in members if m.image.uid not in problems]
    in_use = {m.label.sources for m in sound if m.label}
    rejections, labels_refused = [], {}
    for m in members:
        problem = problems.get(m.image.uid)
        if problem is None:
            continue
        used = m.label.sources in in_use
        message = f"its label {'fits another image but not this one' if used else 'was refused'}: {problem.reason}"
        rejections += [Rejection(u, STAGE, "LABEL_REFUSED", message) for u in m.image.sources]
        if not used:
            labels_refused.setdefault(m.label.sources, problem)
    rejections += [problem.at(u, STAGE) for sources, problem in labels_refused.items() for u in sources]
    return sound, known, rejections
