"""Archive to catalog: what files there are, read once each."""

import datetime
from collections.abc import Iterator

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from sparkmed import formats, storage, tables
from sparkmed.formats import archive
from sparkmed.imaging import paths, splits
from sparkmed.rejection import Refused, Rejection
from sparkmed.spark.session import packed

STAGE = "catalog"


def update(spark: SparkSession, url: str, lake: str, limits, key: bytes | None, lineage: dict) -> dict[str, int]:
    """Bring ``catalog/`` and ``quarantine/`` up to date with the files below ``url``; how many are
    there, new, changed, gone, and how many instances and refusals that makes in all.

    Only files that are new or whose size or modification time changed are opened. ``key`` makes pseudonyms of patients; None
    keeps their identifiers. Writes nothing when nothing changed. Raises FileNotFoundError when there is nothing at ``url``.
    """
    instances, refusals = tables.catalog(lake), tables.quarantine(lake)
    _forget_unfinished(refusals, instances.committed(STAGE))
    run = max(instances.committed(STAGE), refusals.committed(STAGE)) + 1
    known = {r.container: r for r in _latest_files(spark, lake).collect()}
    ignored = [paths.PathPattern(p) for p in limits.exclude]
    found = {f.uri: f for f in storage.walk(url) if not any(p.match(f.path) for p in ignored)}
    same = {u for u, r in known.items() if u in found and (r.file_size, r.file_mtime_ns) == (found[u].size, found[u].mtime_ns)}
    todo = [f for u, f in found.items() if u not in same]
    gone = [u for u in known if u not in found]
    new = sum(f.uri not in known for f in todo)
    counts = {"files": len(found), "new": new, "changed": len(todo) - new, "gone": len(gone)}
    counts["refused"] = sum(known[u].refused for u in same)
    counts["instances"] = sum(known[u].members for u in same) - counts["refused"]
    if not todo and not gone:
        return counts

    lineage = {**lineage, "run": run}
    # a file costs its bytes to hash and about 0.1 MB worth of time to open
    groups = packed(todo, [f.size + 100_000 for f in todo], spark.sparkContext.defaultParallelism * 4)
    written = (
        spark.sparkContext.parallelize(groups, max(1, len(groups))).map(lambda g: _write(g, lake, limits, key, lineage)).collect()
    )
    if gone:
        marks = [{"uri": u, "container": u, "format": "gone", **lineage} for u in gone]
        written.append((instances.write(marks), None))
    counts["refused"] += sum(q.rows for _, q in written if q)
    counts["instances"] += sum(c.rows for c, _ in written if c) - len(gone)
    # quarantine first: a run counts when the catalog has its number, and an unfinished one is forgotten above
    refusals.commit([q for _, q in written if q], (STAGE, run))
    instances.commit([c for c, _ in written if c], (STAGE, run))
    return counts


def current(spark: SparkSession, lake: str) -> DataFrame:
    """The instances that count: of each file those of the last run that read it."""
    latest = _latest_files(spark, lake).select("container", "run")
    return _read(spark, tables.catalog(lake)).where("format != 'gone'").join(latest, ["container", "run"], "left_semi")


def refused(spark: SparkSession, lake: str) -> DataFrame:
    """The quarantine rows that count."""
    rows = _read(spark, tables.quarantine(lake))
    latest = _latest_files(spark, lake).select("container", "run")
    of_catalog = rows.where(F.col("stage") == STAGE).join(latest, ["container", "run"], "left_semi")
    return of_catalog.unionByName(rows.where(F.col("stage") != STAGE))


def quarantine_row(rejection: Rejection, lineage: dict, **file) -> dict:
    now = datetime.datetime.now(datetime.UTC)
    facts = {"uri": rejection.uri, "stage": rejection.stage, "reason": rejection.reason, "message": rejection.message}
    return {**facts, "refused_at": now, **lineage, **file}


def _latest_files(spark: SparkSession, lake: str) -> DataFrame:
    """Per file that is there: container, the number of the last run that read it, size, time, members read and refused then."""
    columns = ["container", "run", "file_size", "file_mtime_ns"]
    read = _read(spark, tables.catalog(lake)).select(*columns, "format", F.lit(0).alias("refused"))
    kept_out = _read(spark, tables.quarantine(lake)).where(F.col("stage") == STAGE)
    rows = read.unionByName(kept_out.select(*columns, F.lit("").alias("format"), F.lit(1).alias("refused")))
    per_run = rows.groupBy("container", "run").agg(
        F.max("file_size").alias("file_size"),
        F.max("file_mtime_ns").alias("file_mtime_ns"),
        F.sum("refused").alias("refused"),
        F.count("*").alias("members"),
        F.max(F.col("format") == "gone").alias("gone"),
    )
    facts = ["run", "file_size", "file_mtime_ns", "refused", "members", "gone"]
    last = per_run.groupBy("container").agg(F.max(F.struct(*facts)).alias("last"))
    return last.select("container", *(f"last.{f}" for f in facts)).where("not gone")


def _read(spark: SparkSession, table: tables.Table) -> DataFrame:
    uris = table.uris()
    if not uris:
        return spark.createDataFrame(table.schema.empty_table().to_pandas(), _spark_schema(table))
    return spark.read.schema(_spark_schema(table)).parquet(*uris)


def _spark_schema(table: tables.Table):
    from pyspark.sql.pandas.types import from_arrow_schema

    return from_arrow_schema(table.schema)


def _write(files: list[storage.File], lake: str, limits, key: bytes | None, lineage: dict):
    """One task: read the headers of some files, write what became of them, return the two unpublished table files."""
    rows, refusals = [], []
    for file in files:
        facts = {"path": file.path, "container": file.uri, "file_size": file.size, "file_mtime_ns": file.mtime_ns}
        for outcome in read_headers(file, limits):
            if isinstance(outcome, Rejection):
                refusals.append(quarantine_row(outcome, lineage, **facts))
            else:
                subject = outcome.patient and (splits.pseudonym(outcome.patient, key) if key else outcome.patient)
                rows.append({**outcome.row(), "subject": subject or None, **lineage})
    return (
        tables.catalog(lake).write(rows) if rows else None,
        tables.quarantine(lake).write(refusals) if refusals else None,
    )


def read_headers(file: storage.File, limits) -> Iterator:
    """An Instance or a Rejection for each member of a file; at least one, whatever is in it."""
    empty = True
    try:
        for member in archive.members(file, limits):
            empty = False
            if isinstance(member, Rejection):
                yield member
                continue
            try:
                yield formats.read_instance(member)
            except Refused as e:
                yield e.at(member.uri, STAGE)
    except OSError as e:
        yield Rejection(file.uri, STAGE, "UNREADABLE", e.strerror or type(e).__name__)
    else:
        if empty:
            yield Rejection(file.uri, STAGE, "EMPTY_ARCHIVE", "the archive has no member")


def _forget_unfinished(refusals: tables.Table, finished: int):
    """Drop quarantine rows of a run after ``finished``: it was killed before its catalog rows were committed."""
    if refusals.committed(STAGE) <= finished:
        return
    import pyarrow.parquet as pq

    for uri in refusals.uris():
        with storage.open(uri) as f:
            rows = pq.read_table(f, columns=["stage", "run"]).to_pylist()
        if any(r["stage"] == STAGE and r["run"] > finished for r in rows):
            refusals.commit([], replace=[uri.rsplit("/", 1)[1]])
