"""What the verbs share: rows they start from, lineage, and commits that hold each key once."""

import datetime
import logging
from collections.abc import Sequence

import sparkmed
from sparkmed import arrivals, dataset, identity, storage, tables, tracking
from sparkmed.config import Config, digest
from sparkmed.learning import model as models
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
    return models.model_digest(model_url)


def settings_digest(config: Config, model_url: str) -> str:
    """Of how a model's predictions are made beyond what its own digest covers; of how often they are committed nothing."""
    changes = _changes(config, models.read_spec(model_url), model_url)
    return digest(config.score.overlap, config.score.blending, *changes, *config.score.outputs)[:16]


def judged_under(config: Config, model_url: str) -> list[str]:
    """Digest of how the model's numbers come about, as part of the key of what it was judged by; nothing where that is as it was
    validated. What is judged is what is scored: where the settings change, figures of before say nothing of the night's."""
    spec, score = models.read_spec(model_url), config.score
    changes = _changes(config, spec, model_url)
    as_validated = (score.overlap, score.blending) == (spec.score.overlap, spec.score.blending) and not changes
    if as_validated and not isinstance(spec, models.EnsembleSpec):
        return []
    return [digest(score.overlap, score.blending, *changes)[:16]]


def _changes(config: Config, spec: models.ModelSpec | models.EnsembleSpec, model_url: str) -> list:
    changes = config.score.changes(spec.score)
    own = isinstance(spec, models.EnsembleSpec) and any(s.score.mirrors for s in models.specs(model_url))
    if own and config.score.mirrors == ():
        changes = ["no mirrors", *changes]  # the spec of an ensemble says nothing of those of its members
    return changes


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
        now, seen = datetime.datetime.now(datetime.UTC), arrivals.first_seen(config.lake, new)
        rows = [r | {"first_seen": seen.get(r["uid"], now)} for r in new]
        try:
            table.commit([table.write(rows)], (SEEN, number + 1))
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
        _require_model(config, registry.fetch(version, config.lake), f"version {version} of model {registry.model}")


def _require_model(config: Config, url: str, name: str, digest: str = ""):
    """Load it here once: what executors would refuse is said before they start."""
    require_classes(config, models.Model.load(url, "cpu", config.imports, digest).spec, name)
    if any(spec.preprocess.of_plate != config.preprocess.of_plate for spec in models.specs(url)):
        raise InputError(
            f"{name} was trained on plates whose light or scale was treated in another way than preprocess.illumination and "
            "preprocess.intensity say: put them back, or give the new way a model of its own with tracking.model"
        )
    names = [channel for channel, _ in config.plates.channels] if config.plates else []
    for cells in (s.cells for s in models.specs(url) if s.cells is not None and s.cells.nuclei is not None):
        if names[cells.channel : cells.channel + 1] != [cells.nuclei.channel]:
            raise InputError(
                f"{name} finds cells in channel {cells.channel + 1}, {cells.nuclei.channel}; plates.channels has {names}: put them "
                "back in their order, or give the new one a model of its own with tracking.model"
            )
    listed = config.cells is not None and config.cells.listed
    if not listed and any(spec.cells is not None and spec.cells.listed for spec in models.specs(url)):
        raise InputError(
            f"{name} was trained on cells of a table, and the config names none: say in patches.crops.table where they are, or "
            "give the new way a model of its own with tracking.model"
        )


def require_classes(config: Config, spec: models.ModelSpec | models.EnsembleSpec, name: str):
    """Raise :class:`InputError` unless the model predicts the config's classes, in its order."""
    if (spec.task, spec.classes) != (config.task, config.classes):
        raise InputError(
            f"{name} predicts {list(spec.classes)} ({spec.task}), the config says {list(config.classes)} ({config.task}): give the "
            "new classes a model of their own with tracking.model"
        )


def scored(config: Config, registry: tracking.Registry) -> tuple[str, str]:
    """URL in the lake and version of the model that scores: the champion, or the ensemble of ``score.ensemble``.

    It is loaded here once. Raises :class:`InputError` when there is none, or it is not one for this config.
    """
    if config.score.ensemble:
        return _ensemble(config, registry)
    version = registry.champion()
    if version is None:
        raise InputError(f"model {registry.model} has no champion: no version has passed the promote stage")
    require_same_classes(config, registry, version)
    return registry.fetch(version, config.lake), version


def _ensemble(config: Config, registry: tracking.Registry) -> tuple[str, str]:
    members = {}
    for entry in config.score.ensemble:
        uri = entry if "/" in entry else f"models:/{registry.model}{'/' if entry.isdigit() else '@'}{entry}"
        name, url, _ = _pinned_model(config, uri, registry.uri)
        members[name] = url
    spec, found = models.ensemble(config.name, members, config.score)
    target = dataset.pinned_model(config.lake, found)
    if not storage.exists(storage.join(target, models.SPEC)):
        models.gather(spec, members, target)
    _require_model(config, target, f"the ensemble of {', '.join(members)}", found)
    log.info("the ensemble %s is the mean of %s", found[:16], ", ".join(m.name for m in spec.members))
    return target, f"ensemble-{found[:16]}"


def _pinned_model(config: Config, uri: str, tracking_uri: str, wanted: str = "") -> tuple[str, str, str]:
    """The model at ``uri`` by the version that it is now, its copy in the lake, found there by its digest, and the digest."""
    with tracking.located(uri, tracking_uri) as (name, folder):
        models.read_spec(folder, wanted)
        digest = models.model_digest(folder)
        target = dataset.pinned_model(config.lake, digest)
        if not storage.exists(storage.join(target, models.SPEC)):
            models.copy(folder, target)
    models.read_spec(target, digest)
    return name, target, digest


def pinned(config: Config) -> Config:
    """The config with the first model of its cascade pinned to a version and a digest, and a copy of it in the lake."""
    cascade = config.preprocess.cascade
    if cascade is None:
        return config
    name, url, digest = _pinned_model(config, cascade.model, cascade.tracking or tracking.of(config).uri, cascade.digest)
    spec = models.Model.load(url, "cpu", config.imports, digest).spec
    if spec.task != "segmentation":
        raise InputError(
            f"preprocess.cascade.model {cascade.model} is a {spec.task}: its output is no channel, wanted a segmentation"
        )
    found = {"model": name, "tracking": None, "digest": digest, "classes": spec.classes[1:]}
    preprocess = config.preprocess.model_copy(update={"cascade": cascade.model_copy(update=found)})
    return config.model_copy(update={"preprocess": preprocess})
