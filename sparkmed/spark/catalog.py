"""Archive to catalog: what files there are, read once each."""

import collections
import datetime
import itertools
import posixpath
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow.parquet as pq
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from sparkmed import formats, storage, tables
from sparkmed.formats import archive
from sparkmed.formats.instance import READER, to_json
from sparkmed.hcs import filenames, indexes
from sparkmed.identity import fingerprint
from sparkmed.imaging import splits
from sparkmed.reasons import PASSING
from sparkmed.rejection import InputError, Refused, Rejection
from sparkmed.spark import manifest
from sparkmed.spark.session import packed

STAGE = "catalog"
FILES_PER_SLOT = 5000
"""Files per task slot that the driver holds at a time (thrice: those being read, those read when slots are free, the next ones)."""
_PATTERN = re.compile(r"[\[\]{}*?\\]")  # what Spark would take for a pattern of paths


def update(spark: SparkSession, url: str, lake: str, limits, key: bytes | None, lineage: dict) -> dict[str, int]:
    """Bring ``catalog/`` and ``quarantine/`` up to date with the files below ``url``; how many are
    there, new, changed, gone, and how many instances and refusals that makes in all.

    Only files that are new or whose size or modification time changed are opened. ``key`` makes pseudonyms of patients; None
    keeps their identifiers. Under another key than before (or none), or when headers are read in another way by now, every file
    is read again and all earlier rows and their data files go. Files of the lake itself are passed over. Writes nothing when
    nothing changed. The driver holds some thousand files at a time, however many there are. Raises FileNotFoundError when there
    is nothing at ``url``, InputError when that is the lake itself.
    """
    instances, refusals = tables.catalog(lake), tables.quarantine(lake)
    top, own = (storage.real(u).rstrip("/") + "/" for u in (url, lake))
    if top == own:
        raise InputError(f"archive and lake are both {lake}: put the lake elsewhere, a folder inside the archive will do")
    inside = own.removeprefix(top) if own.startswith(top) else None
    finished = instances.committed(STAGE)  # all below is as of this run, whoever commits meanwhile
    unfinished = _unfinished(refusals, finished)
    run = max(finished, refusals.committed(STAGE)) + 1
    known = manifest.Manifest(lake, finished)
    if not known.exists and finished:  # an earlier version, or a run that was killed when it had committed
        manifest.write(_latest_files(spark, lake, finished), lake, finished)
        known = manifest.Manifest(lake, finished)
    identity = f"{READER}:{fingerprint(key)}"
    rekeyed = bool(known.identities - {identity})
    lineage = {**lineage, "run": run, "identity": identity}
    found = (f for f in archive.files(url, limits) if not (inside and f.path.startswith(inside)))
    counts = dict.fromkeys(("files", "new", "changed", "gone", "refused", "instances"), 0)
    absent, marks = [], []

    def mark():
        if absent:
            marks.append(instances.write([{"uri": u, "container": u, "format": "gone", **lineage} for u in absent]))
            absent.clear()

    def todo() -> Iterator[storage.File]:
        for file, before in manifest.compare(found, known):
            there = before is not None and not before.gone
            if file is None:
                counts["gone"] += there
                if there or rekeyed:
                    absent.append(before.container)
                if len(absent) == FILES_PER_SLOT:
                    mark()
                continue
            counts["files"] += 1
            if there and not rekeyed and (before.file_size, before.file_mtime_ns) == (file.size, file.mtime_ns):
                counts["refused"] += before.refused
                counts["instances"] += before.members - before.refused
                continue
            counts["changed" if there else "new"] += 1
            yield from archive.parts(file)

    written = _read_all(spark, todo(), lambda files: _write(files, lake, limits, key, lineage))
    mark()
    if not (written or marks or rekeyed or unfinished):
        if known.rows:
            instances.sweep()  # what a run left that was killed before it could
        return counts
    counts["refused"] += sum(q.rows for _, q in written if q)
    counts["instances"] += sum(c.rows for c, _ in written if c)
    written += [(m, None) for m in marks]
    # Quarantine first: a run counts when the catalog has its number, until then its refusals are passed over. What it makes
    # void goes last, when no rival that read the same tables can commit any more.
    void = files_of(refusals, STAGE) if rekeyed else unfinished
    refusals.commit([q for _, q in written if q], (STAGE, run))
    instances.commit([c for c, _ in written if c], (STAGE, run), replace=instances.paths() if rekeyed else ())
    if void:
        refusals.commit([], replace=void)
    instances.sweep()
    manifest.write(_latest_files(spark, lake, run), lake, run)
    return counts


def _read_all(spark: SparkSession, files: Iterator[storage.File], write: Callable[[list[storage.File]], Any]) -> list:
    """What ``write`` makes of groups of ``files`` on the executors.

    The next files are listed while a batch is read, and handed over before it is done: no slot waits for the last tasks of a batch.
    """
    slots = spark.sparkContext.defaultParallelism

    def job(batch: list[storage.File]) -> list:
        # a file costs its bytes to hash and about 0.1 MB worth of time to open
        groups = packed(batch, [f.size // f.part[1] + 100_000 for f in batch], slots * 4)
        return spark.sparkContext.parallelize(groups, len(groups)).map(write).collect()

    written, running = [], collections.deque()
    with ThreadPoolExecutor(2) as threads:
        while batch := list(itertools.islice(files, FILES_PER_SLOT * slots)):
            if len(running) == 2:
                written += running.popleft().result()
            running.append(threads.submit(job, batch))
        for job_done in running:
            written += job_done.result()
    return written


def current(spark: SparkSession, lake: str) -> DataFrame:
    """The instances that count: of each file those of the last run that read it."""
    latest = _latest_files(spark, lake).where("not gone").select("container", "run")
    return read(spark, tables.catalog(lake)).where("format != 'gone'").join(latest, ["container", "run"], "left_semi")


def refused(spark: SparkSession, lake: str) -> DataFrame:
    """The quarantine rows that count."""
    rows = read(spark, tables.quarantine(lake))
    latest = _latest_files(spark, lake).where("not gone").select("container", "run")
    of_catalog = rows.where(F.col("stage") == STAGE).join(latest, ["container", "run"], "left_semi")
    return of_catalog.unionByName(rows.where(F.col("stage") != STAGE))


def quarantine_row(rejection: Rejection, lineage: dict, **file) -> dict:
    now = datetime.datetime.now(datetime.UTC)
    facts = {"uri": rejection.uri, "stage": rejection.stage, "reason": rejection.reason, "message": rejection.message}
    return {**facts, "refused_at": now, **lineage, **file}


def _latest_files(spark: SparkSession, lake: str, finished: int | None = None) -> DataFrame:
    """Per file: container, the number of the last finished run that read it, size, time, members read and refused then, whether
    it is gone, and under which identity it was read."""
    columns = ["container", "run", "file_size", "file_mtime_ns", "identity"]
    if finished is None:
        finished = tables.catalog(lake).committed(STAGE)  # asked first: a run that ends now is not half seen
    whole = F.col("run") <= finished
    taken = read(spark, tables.catalog(lake)).where(whole).select(*columns, "format", F.lit(0).alias("refused"))
    kept_out = read(spark, tables.quarantine(lake)).where(F.col("stage") == STAGE).where(whole)
    rows = taken.unionByName(kept_out.select(*columns, F.lit("").alias("format"), F.lit(1).alias("refused")))
    per_run = rows.groupBy("container", "run").agg(
        F.min("file_size").alias("file_size"),  # 0 where a part of it is to be read again
        F.min("file_mtime_ns").alias("file_mtime_ns"),
        F.sum("refused").alias("refused"),
        F.count("*").alias("members"),
        F.max(F.col("format") == "gone").alias("gone"),
        F.max("identity").alias("identity"),
    )
    facts = ["run", "file_size", "file_mtime_ns", "refused", "members", "gone", "identity"]
    last = per_run.groupBy("container").agg(F.max(F.struct(*facts)).alias("last"))
    return last.select("container", *(f"last.{f}" for f in facts))


def read(spark: SparkSession, table: tables.Table) -> DataFrame:
    uris = table.uris()
    if not uris:
        return spark.createDataFrame(table.schema.empty_table().to_pandas(), _spark_schema(table))
    if _PATTERN.search(table.url) and ":" in table.url.partition("://")[2].partition("/")[2]:
        raise InputError(f"{table.url}: Spark reads no path with a colon and one of []{{}}*?; rename the lake")
    return spark.read.schema(_spark_schema(table)).parquet(*(_PATTERN.sub(r"\\\g<0>", u) for u in uris))


def _spark_schema(table: tables.Table):
    from pyspark.sql.pandas.types import from_arrow_schema

    return from_arrow_schema(table.schema)


def _write(files: list[storage.File], lake: str, limits, key: bytes | None, lineage: dict):
    """One task: read the headers of some files, write what became of them, return the two unpublished table files."""
    rows, refusals = [], []
    seen_at = datetime.datetime.now(datetime.UTC)
    for file in map(archive.readable, files):
        name, uri = storage.spelt(file.path), storage.spelt(file.uri)
        facts = {"path": name, "container": uri, "file_size": file.size, "file_mtime_ns": file.mtime_ns}
        for outcome in read_headers(file, limits):
            if isinstance(outcome, Rejection):
                again = file.folder and outcome.reason in PASSING  # a part of many may be missing without a word otherwise
                size = {"file_size": 0, "file_mtime_ns": 0} if again else {}
                refusals.append(quarantine_row(outcome, lineage, **facts | size))
            else:
                subject = outcome.patient and (splits.pseudonym(outcome.patient, key) if key else outcome.patient)
                rows.append({**outcome.row(), "subject": subject or None, "seen_at": seen_at, **lineage})
    return (
        tables.catalog(lake).write(rows) if rows else None,
        tables.quarantine(lake).write(refusals) if refusals else None,
    )


def read_headers(file: storage.File, limits) -> Iterator:
    """An Instance or a Rejection for each member of a file; at least one, whatever is in it."""
    try:
        for member in archive.members(file, limits):
            if isinstance(member, Rejection):
                yield member
                continue
            try:
                yield formats.read_instance(member, of_index(member.path))
            except Refused as e:
                yield e.at(member.uri, STAGE)
    except OSError as e:
        yield Rejection(storage.spelt(file.uri), STAGE, "UNREADABLE", e.strerror or type(e).__name__)


def of_index(path: str) -> dict | None:
    """The fields of an Instance that the name of a vendor's index file determines; None for other names."""
    convention = filenames.index_convention(posixpath.basename(path))
    if convention is None:
        return None
    plain = dict.fromkeys(("modality", "series_uid", "sop_uid", "sop_class", "transfer_syntax", "patient"), "")
    return plain | {
        "format": indexes.FORMAT,
        "kind": "other",
        "shape": (0, 0, 0, 0),
        "affine": None,
        "header": to_json({"source": convention}),
    }


def _unfinished(refusals: tables.Table, finished: int) -> list[str]:
    """Quarantine files of runs after ``finished``: killed, or at work, before their catalog rows were committed."""
    if refusals.committed(STAGE) <= finished:
        return []
    return files_of(refusals, STAGE, after=finished)


def files_of(refusals: tables.Table, stage: str, after: int = 0) -> list[str]:
    """Names of the quarantine files that hold refusals of one stage by runs after ``after``; a file holds those of one stage."""
    found = []
    for name in refusals.paths():
        with storage.open(storage.join(refusals.url, name)) as f:
            rows = pq.read_table(f, columns=["stage", "run"]).to_pylist()
        if rows and all(r["stage"] == stage and (r["run"] or 0) > after for r in rows):
            found.append(name)
    return found
