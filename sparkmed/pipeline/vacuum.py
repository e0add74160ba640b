"""Remove what nobody can need: what killed runs have left, and files that a commit has replaced."""

import datetime
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from sparkmed import lease, storage, tables, tracking
from sparkmed.config import Config
from sparkmed.rejection import InputError

log = logging.getLogger("sparkmed")
_LOG = "/_delta_log/"
_FOLDERS = re.compile(
    r"(?P<dataset>datasets/[^/]+/[^/]+\.(?:writing-[0-9a-f]{8}|broken-\d+))/|(?P<check>check-[0-9a-f]{8})/"
    r"|(?P<part>scratch/[0-9a-f]{32})/"
)
_PARTIAL = re.compile(r"(.*/)?\.[^/]+\.[0-9a-f]{32}\.partial")
_PROBE = re.compile(r"\.seen-[0-9a-f]{32}(\.\d+)?")
_MODEL = re.compile(r"models/(?P<name>[^/]+)/(?P<version>\d+)/")
_OF_FIELD = re.compile(r"(corrections|centres)/[^/]+\.(?:json|parquet)")
_OF_PREDICTION = {"predictions/masks/": "mask without prediction", "predictions/cells/": "cells without prediction"}
_OF_FIELDS = {"corrections": "correction of no plate", "centres": "centres of no field"}
_WHAT = {"dataset": "unfinished dataset", "check": "unfinished check", "part": "part of a volume"}


@dataclass(frozen=True)
class Leftover:
    """A file or folder of the lake that goes: its path below the lake, the bytes in it, and what it was."""

    path: str
    bytes: int
    what: str
    folder: bool = False


def vacuum(config: Config, dry_run: bool = False) -> list[Leftover]:
    """Remove leftovers that were not touched for ``vacuum.after_days``; what they are, or with ``dry_run`` would be.

    These are data files of any table that no version names that was the newest since then; masks and tables of cells without a
    prediction; datasets, checks and files that were never finished; corrections of plates that have changed, and centres of cells
    that no field is joined with any more; copies of models that were neither used nor named by a decision since then, and that the
    registry still has. SEG lie outside of the lake and stay. Readers and runs that are at work keep what they need, unless they are
    older than that.
    """
    if not storage.exists(config.lake):
        raise InputError(f"lake {config.lake} does not exist")
    before = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=config.vacuum.after_days)
    files = {f.path: f for f in storage.walk(config.lake)}
    found = [*_data_files(config, files, before), *_unfinished(files, before), *_models(config, files, before)]
    found += _corrections(config, files, before)
    if not dry_run:
        for leftover in found:
            _remove(config, leftover)
    try:
        with lease.held(lease.url(config.lake, "score"), "predictions", wait=False):  # a run may write a mask again that it left
            masks = _masks(config, files, before)
            if not dry_run:
                for leftover in masks:
                    _remove(config, leftover)
    except lease.Taken:
        log.info("a score stage is at work: masks are looked at next time")
        masks = []
    return found + masks


def _remove(config: Config, leftover: Leftover):
    try:
        storage.remove(storage.join(config.lake, leftover.path), recursive=leftover.folder)
    except FileNotFoundError:
        pass  # by somebody else


def _old(file: storage.File, before: datetime.datetime) -> bool:
    return file.mtime_ns < before.timestamp() * 1e9


def _data_files(config: Config, files: dict[str, storage.File], before: datetime.datetime) -> Iterator[Leftover]:
    folders = sorted({path.partition(_LOG)[0] for path in files if _LOG in path and not _FOLDERS.match(path)})
    for folder in folders:
        for file in tables.Table(storage.join(config.lake, folder), pa.schema([])).orphans(before):
            yield Leftover(f"{folder}/{file.path}", file.size, "data file in no table")


def _unfinished(files: dict[str, storage.File], before: datetime.datetime) -> Iterator[Leftover]:
    folders: dict[tuple[str, str], list[storage.File]] = {}
    for path, file in files.items():
        match = _FOLDERS.match(path)
        if match:
            folders.setdefault((match.lastgroup, match[match.lastgroup]), []).append(file)
        elif (_PARTIAL.fullmatch(path) or _PROBE.fullmatch(path)) and _old(file, before):
            yield Leftover(path, file.size, "unfinished file")
    for (kind, folder), inside in sorted(folders.items()):
        if all(_old(f, before) for f in inside):
            yield Leftover(folder, sum(f.size for f in inside), _WHAT[kind], True)


def _models(config: Config, files: dict[str, storage.File], before: datetime.datetime) -> Iterator[Leftover]:
    """Copies that :meth:`Registry.fetch` would make again."""
    registry = tracking.of(config)
    copies: dict[str, list[storage.File]] = {}
    for path, file in files.items():
        match = _MODEL.match(path)
        if match and storage.text(match["name"]) == registry.model:
            copies.setdefault(match["version"], []).append(file)
    if not copies:
        return
    registry.check()
    decided = sorted((r for r in tables.promotions(config.lake).rows() if r["model_name"] == registry.model), key=_decided)
    now = registry.champion()
    needed = {now, registry.latest()}
    for r in decided:
        if r["decided_at"] >= before or (r["action"] == "promoted" and r["challenger"] == now):  # and where a rollback goes
            needed |= {r["challenger"], r["champion"]}
    used = pc.field("scored_at") >= pa.scalar(before, pa.timestamp("us", tz="UTC"))
    recent = tables.predictions(config.lake).read(["model_name", "model_version"], used).to_pylist()
    needed |= {r["model_version"] for r in recent if r["model_name"] == registry.model}
    there = registry.versions()
    for version, inside in sorted(copies.items()):
        if version not in needed and version in there and all(_old(f, before) for f in inside):
            folder = f"models/{storage.component(registry.model)}/{version}"
            yield Leftover(folder, sum(f.size for f in inside), "copy of a model", True)


def _corrections(config: Config, files: dict[str, storage.File], before: datetime.datetime) -> list[Leftover]:
    old = [(f, _OF_FIELDS[match[1]]) for path, f in files.items() if (match := _OF_FIELD.fullmatch(path)) and _old(f, before)]
    headers = tables.volumes(config.lake).read(["header"])["header"].to_pylist() if old else []
    facts = [json.loads(h or "{}") for h in headers]
    files_named = (said.get(fact, {}).get("file", "") for said in facts for fact in ("correction", "centres"))
    named = {file.rpartition("/")[2] for file in files_named}  # digests, by whatever way the lake was reached
    return [Leftover(f.path, f.size, what) for f, what in old if f.path.rpartition("/")[2] not in named]


def _decided(row: dict) -> datetime.datetime:
    return row["decided_at"]


def _masks(config: Config, files: dict[str, storage.File], before: datetime.datetime) -> list[Leftover]:
    old = [f for path, f in files.items() if path.startswith(tuple(_OF_PREDICTION)) and _old(f, before)]
    old = [f for f in old if not _PARTIAL.fullmatch(f.path)]
    if not old:
        return []
    found = tables.predictions(config.lake).read(["mask", "cell_table"])
    named = {path for column in found.columns for path in column.to_pylist()}
    what = {f.path: next(w for folder, w in _OF_PREDICTION.items() if f.path.startswith(folder)) for f in old}
    return [Leftover(f.path, f.size, what[f.path]) for f in old if f.path not in named]
