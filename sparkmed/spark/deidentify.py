"""Archive to de-identified copies: each file read once, its copy written when it is proven clean, one audit row for each."""

import contextlib
import datetime
import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq
from pyspark.sql import SparkSession

from sparkmed import config, storage, tables
from sparkmed.formats import archive, deidentify, isolation
from sparkmed.rejection import InputError, Refused, Rejection
from sparkmed.spark.session import decoding, packed

STAGE = deidentify.STAGE
_KNOWN = ["uri", "container", "file_size", "file_mtime_ns", "status", "output", "output_sha256", "reason", "settings"]
_TWINS = {
    "DUPLICATE_INSTANCE": "another file holds the same object; its copy is the one",
    "CONFLICTING_INSTANCE": "files of different content claim to be this object; none of them is written",
}


def run(spark: SparkSession, wanted: config.Deidentification, key: bytes, lineage: dict) -> dict[str, int]:
    """De-identify what is new or changed below ``wanted.archive``; how many files there are, how many were opened now, and how
    many members have a copy and how many are held back in all.

    A file whose size and time are those of the last run, whose settings are the same, and whose copies are there is not opened.
    Under other settings or another key all earlier copies go. Files that are gone keep their copies and rows, but contradict
    no other once they are held as conflicting. Raises FileNotFoundError when there is nothing at the archive, InputError for places
    that contain each other or are not ours, :class:`tables.Conflict` when another run into the same folder was faster.
    """
    audit = tables.audit(wanted.out)
    present = _require_own_place(wanted, audit)
    settings = lineage["settings"]
    number = audit.committed(STAGE) + 1
    rows = list(_rows(audit))
    void = {r["uri"] for r in rows if r["settings"] != settings}
    valid = [r for r in rows if r["uri"] not in void]

    found = {storage.spelt(f.uri): f for f in archive.files(wanted.archive, wanted.catalog)}
    todo = _todo(found, valid, present)
    opened = set(todo)
    redone = {r["uri"] for r in valid if r["container"] in opened}
    for name in {r["output"] for r in rows if r["status"] == "written" and r["uri"] in void | redone} & present:
        storage.remove(storage.join(wanted.out, name))

    files = [found[c] for c in todo]
    groups = packed(files, [f.size + 100_000 for f in files], spark.sparkContext.defaultParallelism * 4)
    tasks = spark.sparkContext.parallelize(groups, max(1, len(groups))) if groups else None
    row = {**lineage, "run": number}
    done = tasks.map(lambda g: _clean(g, wanted, key, row)).collect() if tasks else []

    standing = [r for r in valid if r["uri"] not in redone]
    fresh = [r for _, written in done for r in written]
    changes = _twins(standing + fresh, found)
    gone = void | redone
    fresh_files = {f.path for f, _ in done}
    names = [*fresh_files, *audit.paths()] if gone or changes else []
    rewritten = {n: _rewritten(audit, n, set() if n in fresh_files else gone, changes) for n in names}
    rewritten = {n: f for n, f in rewritten.items() if f}
    if done or rewritten:
        add = [f for f, _ in done if f.path not in rewritten]
        audit.commit([*add, *rewritten.values()], (STAGE, number), replace=rewritten)
    standing = {r["uri"]: r | changes.get(r["uri"], {}) for r in standing + fresh}
    _remove_strays(wanted.out, {r["output"] for r in standing.values() if r["status"] == "written"}, audit)
    written = sum(r["status"] == "written" for r in standing.values())
    return {"files": len(found), "opened": len(todo), "written": written, "held": len(standing) - written}


def _require_own_place(wanted: config.Deidentification, audit: tables.Table) -> set[str]:
    """Paths of the files in the output folder, which must be new or one of ours, and apart from the archive."""
    source, target = (storage.real(u).rstrip("/") + "/" for u in (wanted.archive, wanted.out))
    if source.startswith(target) or target.startswith(source):
        raise InputError(f"archive {wanted.archive} and output {wanted.out} lie in each other: keep the two zones apart")
    present = {f.path for f in storage.walk(wanted.out)} if storage.exists(wanted.out) else set()
    if not storage.exists(storage.join(audit.url, "_delta_log")):
        if present:
            raise InputError(f"output {wanted.out} holds files and has no audit table {audit.url}: choose a new folder")
        folder = storage.local_path(audit.url)
        if folder is not None:  # it names sources: nobody else's business
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        audit.commit([])
    return present


def _rows(audit: tables.Table) -> Iterator[dict]:
    for name in audit.paths():
        with storage.open(storage.join(audit.url, name)) as f:
            yield from pq.read_table(f, columns=_KNOWN).to_pylist()


def _todo(found: dict[str, storage.File], rows: list[dict], present: set[str]) -> list[str]:
    """Containers to open: new, changed, without their copies, held for a conflict with a file that is gone, or with an object that
    one of those has too."""
    of_container = defaultdict(list)
    for r in rows:
        of_container[r["container"]].append(r)

    def same(uri: str, file: storage.File) -> bool:
        known = of_container[uri]
        stamps = {(r["file_size"], r["file_mtime_ns"]) for r in known}
        return stamps == {(file.size, file.mtime_ns)} and all(r["output"] in present for r in known if r["status"] == "written")

    todo = {uri for uri, file in found.items() if uri not in of_container or not same(uri, file)}
    users = defaultdict(set)
    for r in rows:
        if r["output"]:
            users[r["output"]].add(r["container"])
    held = {r["container"] for r in rows if r["reason"] == "CONFLICTING_INSTANCE" and not users[r["output"]] <= found.keys()}
    todo |= held & found.keys()
    front = list(todo)
    while front:
        for r in of_container.get(front.pop(), ()):
            more = {c for c in users.get(r["output"], ()) if c in found} - todo
            todo |= more
            front += more
    return sorted(todo)


def _clean(files: list[storage.File], wanted: config.Deidentification, key: bytes, lineage: dict):
    """One task: the unpublished table file with the audit rows of some files, and what the driver must know of each."""
    rows = []
    for file in files:
        facts = {"container": storage.spelt(file.uri), "file_size": file.size, "file_mtime_ns": file.mtime_ns, **lineage}
        with decoding():
            for outcome in outcomes(file, wanted, key):
                rows.append({**facts, **outcome, "done_at": datetime.datetime.now(datetime.UTC)})
    written = tables.audit(wanted.out).write(rows)
    return written, [{k: r.get(k) for k in _KNOWN} for r in rows]


def outcomes(file: storage.File, wanted: config.Deidentification, key: bytes) -> Iterator[dict]:
    """What became of each member of a file: its copy is written, or it is held back with a reason."""
    empty = True
    if file.folder:
        yield _held(storage.spelt(file.uri), file.path, "NOT_DICOM", "only DICOM files are de-identified, no Zarr")
        return
    try:
        for member in archive.members(file, wanted.catalog):
            empty = False
            if isinstance(member, Rejection):
                yield _held(member.uri, file.path, member.reason, member.message)
            else:
                yield _outcome(member, wanted, key)
    except isolation.Unavailable:
        raise
    except OSError as e:
        yield _held(storage.spelt(file.uri), file.path, "UNREADABLE", f"the file cannot be read ({type(e).__name__})")
    else:
        if empty:
            yield _held(file.uri, file.path, "EMPTY_ARCHIVE", "the archive has no member")


def _outcome(member: archive.Member, wanted: config.Deidentification, key: bytes) -> dict:
    digest = None
    try:
        with member.open() as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            stream.seek(0)
            deidentify.require_dicom(stream.read(64 << 10))  # a picture of many GB is not read for nothing
            stream.seek(0)
            data = stream.read()
        clean = deidentify.deidentify(data, key, wanted.deidentify)
    except Refused as e:
        return {**_held(member.uri, member.path, e.reason, e.message), "sha256": digest}
    except MemoryError:
        return {**_held(member.uri, member.path, "TOO_LARGE", "the file is larger than the memory of a task"), "sha256": digest}
    except isolation.Unavailable:  # no fault of the file: the task is tried again
        raise
    except OSError as e:
        return _held(member.uri, member.path, "UNREADABLE", f"the file cannot be read ({type(e).__name__})")
    url, sha256 = storage.join(wanted.out, clean.path), hashlib.sha256(clean.data).hexdigest()
    if not storage.exists(url) or hashlib.sha256(storage.read_bytes(url)).hexdigest() != sha256:
        storage.write_bytes(url, clean.data)
    facts = {"uri": member.uri, "path": member.path, "sha256": digest, "status": "written"}
    return {**facts, "output": clean.path, "output_sha256": sha256, "actions": list(clean.actions)}


def _held(uri: str, path: str, reason: str, message: str) -> dict:
    return {"uri": uri, "path": storage.spelt(path), "status": "held", "reason": reason, "message": message}


def _twins(rows: list[dict], found: dict[str, storage.File]) -> dict[str, dict]:
    """By URI, what changes in the rows of files that hold the same object: the first has the copy, or none when they differ. One
    that was held for that and is no longer among the ``found`` files does not count."""
    groups = defaultdict(list)
    for r in rows:
        if r["output"] and (r["reason"] != "CONFLICTING_INSTANCE" or r["container"] in found):
            groups[r["output"]].append(r)
    changes = {}
    for group in groups.values():
        group.sort(key=lambda r: r["uri"])
        differ = len({r["output_sha256"] for r in group}) > 1
        for n, r in enumerate(group):
            reason = "CONFLICTING_INSTANCE" if differ else "DUPLICATE_INSTANCE" if n else None
            if r["reason"] != reason:
                facts = {"status": "held" if reason else "written", "reason": reason, "message": _TWINS.get(reason)}
                changes[r["uri"]] = facts
    return changes


def _rewritten(audit: tables.Table, name: str, gone: set[str], changes: dict[str, dict]) -> tables.DataFile | None:
    """A table file with ``changes`` and without the rows of ``gone``; None when it has none of them."""
    with storage.open(storage.join(audit.url, name)) as f:
        table = pq.read_table(f)
    uris = table["uri"].to_pylist()
    if not any(u in gone or u in changes for u in uris):
        return None
    rows = [r | changes.get(r["uri"], {}) for r in table.to_pylist() if r["uri"] not in gone]
    return audit.write(pa.Table.from_pylist(rows, audit.schema))


def _remove_strays(out: str, claimed: set[str], audit: tables.Table):
    """Remove the copies that no row claims, halves of files, and empty folders: of conflicts and of killed runs.

    Only what is older than the newest committed file of the audit table: a younger copy may be that of a run that began since,
    as for :meth:`tables.Table.sweep`.
    """
    if not storage.exists(out):
        return
    committed = set(audit.paths())
    newest = max((f.mtime_ns for f in storage.walk(audit.url) if f.path in committed), default=0)
    for file in list(storage.walk(out)):
        if file.path.endswith((".dcm", ".partial")) and file.path not in claimed and file.mtime_ns < newest:
            storage.remove(file.uri)
    root = storage.local_path(out)
    for folder, _, _ in os.walk(root, topdown=False) if root is not None else ():
        if folder != str(root):
            with contextlib.suppress(OSError):  # not empty
                os.rmdir(folder)
