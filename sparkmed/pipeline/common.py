"""What the verbs share: rows they start from, lineage, and commits that hold each key once."""

import datetime
import hashlib
import logging
from collections.abc import Sequence

import sparkmed
from sparkmed import identity, storage, tables, tracking
from sparkmed.config import Config, digest
from sparkmed.learning.model import ModelSpec
from sparkmed.rejection import InputError
from sparkmed.spark import session as spark_session

log = logging.getLogger("sparkmed")
SEEN = "seen"


class StageFailed(Exception):
    """A stage ended, but more was refused than the config allows, or it could not finish: exit status 1."""


def spark_of(config: Config):
    """The Spark session; of a cluster, once it is known that its nodes share the lake."""
    spark = spark_session.session(config.spark, f"sparkmed {config.name}")
    spark_session.require_shared(spark, config.lake)
    return spark


def volume_rows(config: Config) -> list[dict]:
    rows = tables.volumes(config.lake).rows()
    if not rows:
        raise InputError(f"lake {config.lake} has no volumes: run the volumes stage first")
    return rows


def labelled_rows(config: Config) -> list[dict]:
    rows = [r for r in volume_rows(config) if r["split"]]
    if not rows:
        raise InputError("no volume has a label: volumes.labels says where labels are")
    return rows


def key_of(config: Config) -> tuple[bytes | None, str]:
    return (None, "") if config.identity.keep_subjects else identity.load_key(config)


def lineage(config: Config, *sections) -> dict:
    return {"config_digest": digest(*sections)[:16], "code_version": code_version()}


def code_version() -> str:
    return sparkmed.__version__


def model_digest(model_url: str) -> str:
    """SHA-256 of the spec, which names the SHA-256 of the weights."""
    return hashlib.sha256(storage.read_bytes(storage.join(model_url, "spec.json"))).hexdigest()


def require_few(refused: int, total: int, most: float, setting: str, what: str):
    if total and refused / total > most:
        raise StageFailed(
            f"{refused} of {total} {what} were refused, more than {setting} {most:g} allows: see the quarantine table"
        )


def commit_once(ledger: tables.Table, rows: list[dict], writer: str) -> int:
    """:func:`commit_files` of rows that this process holds."""
    return commit_files(ledger, [tables.Keyed(ledger.write(rows), tuple(r["key"] for r in rows))], writer) if rows else 0


def commit_files(ledger: tables.Table, written: Sequence[tables.Keyed], writer: str) -> int:
    """Commit the rows whose keys the ledger does not hold yet, in one step; how many.

    Only names of files are committed, but a file that holds keys of a rival too is written again without them. A rival's commit in
    between is looked at again.
    """
    while True:
        number = ledger.committed(writer)
        present = set(ledger.read(["key"])["key"].to_pylist())
        files, new = [], 0
        for file, keys in written:
            fresh = set(keys) - present
            if len(fresh) < len(keys):
                rows = {r["key"]: r for r in ledger.read(files=[file.path]).to_pylist()} if fresh else {}
                file = ledger.write([rows[k] for k in sorted(fresh)])
            files.append(file)
            present |= fresh
            new += len(fresh)
        if not new:
            return 0
        try:
            ledger.commit(files, (writer, number + 1))
            return new
        except tables.Conflict:
            continue


def remember(config: Config):
    """Write down since when the volumes are there, and their sources: a later archive may have others in their place."""
    table = tables.seen(config.lake)
    while True:
        number = table.committed(SEEN)
        known = set(table.read(["uid"])["uid"].to_pylist())
        there = tables.volumes(config.lake).read(["uid", "sources", "source_paths", "source_sha256"])
        new = [r for r in there.to_pylist() if r["uid"] not in known]
        if not new:
            return
        now = datetime.datetime.now(datetime.UTC)
        try:
            table.commit([table.write([r | {"first_seen": now} for r in new])], (SEEN, number + 1))
            return
        except tables.Conflict:
            continue


def slots(config: Config) -> int | None:
    """Task slots of Spark, at least one per rank; None when one process trains without Spark."""
    ranks = config.train.processes
    if ranks == 1:
        return None
    slots = spark_session.slots(spark_of(config), ranks, patience=min(60, config.train.start_timeout))
    if slots < ranks:
        raise InputError(f"train.processes is {ranks} but Spark has {slots} task slots: lower it, or give Spark more cores")
    return slots


def require_same_classes(config: Config, registry: tracking.Registry, *versions: str | None):
    """Raise :class:`InputError` unless these versions predict the config's classes, in its order."""
    for version in versions:
        if version is None:
            continue
        spec = ModelSpec.model_validate(storage.read_json(storage.join(registry.fetch(version, config.lake), "spec.json")))
        if (spec.task, spec.classes) != (config.task, config.classes):
            raise InputError(
                f"version {version} of model {registry.model} predicts {list(spec.classes)} ({spec.task}), the config says "
                f"{list(config.classes)} ({config.task}): give the new classes a model of their own with tracking.model"
            )
