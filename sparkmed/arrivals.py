"""What came into the archive, and what became of it: volumes and files since a moment, how many are in quarantine, how long others
wait."""

import datetime
from collections import Counter
from collections.abc import Sequence

import pyarrow.compute as pc

from sparkmed import scoring, tables

ALL = "all"


def quarantined(lake: str, attempts: int, since: datetime.datetime | None = None) -> dict[str, tuple[int, int]]:
    """By source how many of how many are in quarantine, of what was first seen at or after ``since`` (None: ever).

    A series of DICOM counts once however many files it has, and so does every other file; it is in quarantine when a part of it
    is; a volume that could not be scored is when it was tried ``attempts`` times. What the catalog refused has no modality: it
    counts in ``all`` only, beside ``modality=CT`` and the like.
    """
    catalog = tables.catalog(lake)
    finished = catalog.committed("catalog")
    columns = ["uri", "container", "run", "format", "modality", "kind", "series_uid"]
    recent = pc.field("run") <= finished
    if since is not None:
        recent &= pc.field("seen_at") >= since
    read = catalog.read(columns, recent).to_pylist()
    wanted = pc.field("stage").isin(["catalog", "volumes", "score"])
    columns = ["uri", "container", "run", "stage", "reason", "refused_at", "key", "attempt"]
    kept_out = tables.quarantine(lake).read(columns, wanted).to_pylist()
    of_catalog = [r for r in kept_out if r["stage"] == "catalog" and r["run"] <= finished]
    if since is not None:
        of_catalog = [r for r in of_catalog if r["refused_at"] >= since]
    last: dict[str, int] = {}
    for r in (*read, *of_catalog):
        last[r["container"]] = max(last.get(r["container"], 0), r["run"])
    refused_later = {r["uri"] for r in kept_out if r["stage"] == "volumes"} | (parked(kept_out, attempts) - _scored(lake))
    units: dict[tuple, bool] = {}
    for r in read:
        if r["run"] == last[r["container"]] and r["format"] != "gone" and r["kind"] == "image":
            unit = (f"modality={r['modality'] or r['format']}", r["series_uid"] or r["uri"])
            units[unit] = units.get(unit, False) or r["uri"] in refused_later
    total, refused = Counter(), Counter()
    for (source, _), out in units.items():
        for name in (ALL, source):
            total[name] += 1
            refused[name] += out
    broken = {r["uri"] for r in of_catalog if r["run"] == last[r["container"]]}
    total[ALL] += len(broken)
    refused[ALL] += len(broken)
    return {name: (refused[name], n) for name, n in sorted(total.items()) if n}


def parked(rows: Sequence[dict], attempts: int) -> set[str]:
    """URIs of volumes that are not scored again by themselves, from quarantine rows."""
    return {r["uri"] for r in rows if r["stage"] == "score" and r["key"] and scoring.stays(r, attempts)}


def _scored(lake: str) -> set[str]:
    """URIs of volumes that some model has scored: what was refused then was one of several results, or one of several models."""
    done = set(tables.predictions(lake).read(["volume"])["volume"].to_pylist())
    return {u for r in tables.volumes(lake).read(["uid", "sources"]).to_pylist() if r["uid"] in done for u in r["sources"]}


def remembered(lake: str) -> dict[str, datetime.datetime]:
    """By uid since when a volume is there, of those that a run of the score stage has found: a file that is read again, as after
    it was touched, is as old as it was."""
    kept = tables.seen(lake).read(["uid", "first_seen"]).to_pydict()
    return dict(zip(kept["uid"], kept["first_seen"], strict=True))


def first_seen(lake: str, rows: Sequence[dict]) -> dict[str, datetime.datetime]:
    """By uid of volume rows when the last of its files was read, or changed where an older version of this program read it."""
    wanted = sorted({u for r in rows for u in r["sources"]})
    if not wanted:
        return {}
    seen: dict[str, datetime.datetime] = {}
    for r in tables.catalog(lake).read(["uri", "seen_at", "file_mtime_ns", "format"], pc.field("uri").isin(wanted)).to_pylist():
        if r["format"] == "gone":
            continue
        moment = r["seen_at"] or datetime.datetime.fromtimestamp((r["file_mtime_ns"] or 0) / 1e9, datetime.UTC)
        seen[r["uri"]] = max(seen.get(r["uri"], moment), moment)
    return {r["uid"]: max(seen[u] for u in r["sources"] if u in seen) for r in rows if any(u in seen for u in r["sources"])}
