"""The ledger of scoring: what the champion has not scored, what it says about the volumes, and where a number comes from."""

import datetime
import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet

from sparkmed import arrivals, dataset, scoring, storage, tables, tracking
from sparkmed.config import Config, digest
from sparkmed.formats import archive
from sparkmed.learning import model as models
from sparkmed.pipeline import common
from sparkmed.rejection import InputError, Refused
from sparkmed.spark import score as spark_score


@dataclass(frozen=True)
class Pinned:
    """The one model version that a run scores with, where its files are, and the digests that make keys of it."""

    registry: tracking.Registry
    version: str
    url: str
    model_digest: str
    settings: str

    @property
    def is_ensemble(self) -> bool:
        return _is_ensemble(self.version)

    def key(self, volume: str) -> str:
        return scoring.key(volume, self.model_digest, self.settings)

    def origin(self) -> dict:
        """Columns of ``predictions/``: the MLflow run and the dataset that the model came from; an ensemble has none of its own."""
        if self.is_ensemble:
            return {"model_run": None, "dataset_digest": None}
        spec = models.read_spec(self.url)
        return {"model_run": self.registry.version_facts(self.version)["run_id"], "dataset_digest": spec.dataset.digest}


def _is_ensemble(version: str) -> bool:
    return version.startswith("ensemble-")


def pinned(config: Config) -> Pinned:
    """What scores now: the version that the champion alias names, or the ensemble of the config."""
    registry = tracking.of(config)
    registry.check()
    url, version = common.scored(config, registry)
    return at(config, registry, version, url)


def at(config: Config, registry: tracking.Registry, version: str, url: str) -> Pinned:
    """A version by its copy in the lake."""
    return Pinned(registry, version, url, common.model_digest(url), common.settings_digest(config, url))


@dataclass(frozen=True)
class Plan:
    """What is to be scored, as keys: ``new`` volumes, the oldest first, that no model has scored; ``backfill``, the newest first,
    that the champion shall score because another one did. ``parked`` ones have failed and are left out."""

    rows: dict[str, dict]
    scored: frozenset[str]
    parked: frozenset[str]
    new: tuple[str, ...]
    backfill: tuple[str, ...]

    def tonight(self, config: Config) -> list[str]:
        """What one run does of it, in this order."""
        return [*self.new, *self.backfill][: config.score.per_night]


def plan(config: Config, champion: Pinned) -> Plan:
    """What the ledger does not hold for (volume, model, settings); a function of the tables and the config alone."""
    rows = {champion.key(r["uid"]): r for r in common.volume_rows(config)}
    ledger = tables.predictions(config.lake).read(["key", "volume", "scored_at"]).to_pydict()
    now = datetime.datetime.now(datetime.UTC)
    first = {r["uid"]: now for r in rows.values()} | arrivals.remembered(config.lake)
    for volume, moment in zip(ledger["volume"], ledger["scored_at"], strict=True):
        first[volume] = min(first.get(volume, moment), moment)
    scored = frozenset(ledger["key"]) & rows.keys()
    parked = frozenset() if config.score.retry_refused else _parked(config) & rows.keys() - scored
    known, todo = set(ledger["volume"]), [k for k in sorted(rows) if k not in scored and k not in parked]
    new = [k for k in todo if rows[k]["uid"] not in known]
    again = [k for k in todo if rows[k]["uid"] in known and _wanted(config, rows[k]["uid"], first[rows[k]["uid"]])]
    new.sort(key=lambda k: first[rows[k]["uid"]])
    again.sort(key=lambda k: first[rows[k]["uid"]], reverse=True)
    return Plan(rows, scored, parked, tuple(new), tuple(again))


def outlook(config: Config) -> dict:
    """How much the champion has to score, and in how many runs it will have done so if nothing is added."""
    common.remember(config)
    todo = plan(config, pinned(config))
    count = len(todo.new) + len(todo.backfill)
    return {"new": len(todo.new), "backfill": len(todo.backfill), "nights": -(-count // (config.score.per_night or count or 1))}


def _wanted(config: Config, uid: str, first_seen: datetime.datetime) -> bool:
    """Whether the backfill takes a volume."""
    which = config.score.backfill
    if isinstance(which, datetime.date):
        return first_seen >= datetime.datetime.combine(which, datetime.time(), datetime.UTC)
    return which == "all" or int(digest(uid)[:8], 16) < which * 2**32


def failures(config: Config) -> list[dict]:
    """Quarantine rows of predictions: ``key``, ``uri``, ``reason``, ``attempt``, ``refused_at``."""
    where = (pc.field("stage") == spark_score.STAGE) & pc.field("key").is_valid()
    return tables.quarantine(config.lake).read(["key", "uri", "reason", "attempt", "refused_at"], where).to_pylist()


def _parked(config: Config) -> frozenset[str]:
    """Keys that are not tried any more: broken for good, or failed as often as the config allows."""

    return frozenset(r["key"] for r in failures(config) if scoring.stays(r, config.score.attempts))


def current(config: Config) -> pa.Table:
    """The champion's predictions of the volumes that are there now, one row each, by volume: those under the present settings, and
    where it has none the last under others."""
    champion = pinned(config)
    volumes = pa.array({r["uid"] for r in common.volume_rows(config)}, pa.string())
    mine = (pc.field("model_digest") == champion.model_digest) & pc.field("volume").isin(volumes)
    found = tables.predictions(config.lake).read(where=mine)
    best: dict[str, tuple] = {}
    columns = [found[c].to_pylist() for c in ("volume", "key", "scored_at")]
    for n, (volume, key, moment) in enumerate(zip(*columns, strict=True)):
        best[volume] = max(best.get(volume, ()), (key == champion.key(volume), moment, n))
    return found.take(pa.array([best[v][-1] for v in sorted(best)], pa.int64()))


def as_csv(rows: pa.Table, config: Config) -> str:
    """Predictions as CSV: what is per class is a column per class, such as ``ml_liver``; other lists are JSON. Columns depend on
    the config alone."""
    frame = rows.to_pandas()
    of_image = {"score"} if config.task == "classification" else set()  # right or wrong
    for column in ("probability", "score") if of_image else ("probability", "ml", "score"):
        lists = frame.pop(column)
        for c, name in enumerate(config.classes[:1] if column in of_image else config.classes):
            values = [None if v is None else v[c] for v in lists]
            frame[column if column in of_image else f"{column}_{name}"] = pd.Series(values, frame.index, float)
    for column in frame.columns.intersection([f.name for f in rows.schema if pa.types.is_list(f.type)]):  # as JSON
        frame[column] = [None if v is None else json.dumps(v.tolist()) for v in frame[column]]
    return frame.to_csv(index=False)


def export(config: Config, url: str | None) -> str:
    """:func:`current` as CSV text, or written to ``url`` as its ending says (``.csv``, ``.parquet``), and then its URL."""
    if url is not None and not url.endswith((".csv", ".parquet")):
        raise InputError(f"--out {url}: wanted a name that ends with .csv or .parquet")
    rows = current(config)
    if url is None:
        return as_csv(rows, config)
    if url.endswith(".parquet"):
        buffer = io.BytesIO()
        pa.parquet.write_table(rows, buffer)
        data = buffer.getvalue()
    else:
        data = as_csv(rows, config).encode()
    storage.write_bytes(url, data)
    return storage.absolute(url)


def trace(config: Config, name: str) -> dict:
    """The chain from a prediction back to the files that it was made of and to what its model was trained on.

    ``name`` is a key of ``predictions/``, its beginning, or the mask or SEG in that row. Files are read again, to say whether they
    are still what was scored. The answer names them: it is for those who may see the archive.
    """
    key, name = pc.field("key"), storage.spelt(name)
    named = pc.starts_with(key, name) if len(name) >= 4 else key == name
    either = pc.if_else(pc.field("mask").is_valid(), pc.field("mask") == name, False)
    either = either | pc.if_else(pc.field("seg").is_valid(), pc.field("seg") == name, False)
    found = tables.predictions(config.lake).rows(named | either)
    if len(found) != 1:
        raise InputError(
            f"{len(found) or 'no'} predictions of lake {config.lake} have the key, mask or SEG {name}: wanted the key of one, or "
            "its beginning of 4 characters or more (sparkmed predictions prints them)"
        )
    (row,) = found
    classes = _classes(config, row)
    per_class = {c: dict(zip(classes, row[c], strict=True)) for c in ("probability", "ml") if row[c]}
    files = ("mask", "seg", "cells", "cell_table")
    facts = ("predicted", "score", *files, "scored_at", "seconds", "device", "batch", "config_digest", "code_version")
    prediction = {"key": row["key"]} | per_class | {c: _plain(row[c]) for c in facts if row[c] is not None}
    model = {
        "name": row["model_name"],
        "version": row["model_version"],
        "digest": row["model_digest"],
        "mlflow_run": row["model_run"],
    }
    model, training = _training(config, row, model)
    return {"prediction": prediction, "volume": _volume(config, row), "model": model, "training": training}


def _classes(config: Config, row: dict) -> Sequence[str]:
    """Names of the classes that were predicted, by the copy of the model; numbers when the lake has none any more."""
    if _is_ensemble(row["model_version"]):
        url = dataset.pinned_model(config.lake, row["model_digest"])
    else:
        url = storage.join(config.lake, "models", storage.component(row["model_name"]), row["model_version"])
    try:
        return models.read_spec(url, row["model_digest"]).classes
    except InputError:
        return [f"class {n}" for n in range(len(row["probability"]))]


def _volume(config: Config, row: dict) -> dict:
    """What was scored: where it lies now, or when the archive has another file in its place, where it lay."""
    uid = row["volume"]
    now = {r["uid"]: r for r in tables.volumes(config.lake).rows(pc.field("uid") == uid)}
    kept = {r["uid"]: r for r in tables.seen(config.lake).rows(pc.field("uid") == uid)}
    facts = {"digest": uid, "subject": row["subject"], "split": row["split"], "in_archive": uid in now}
    found = now.get(uid) or kept.get(uid)
    if found is None:
        return facts | {"sources": "not known: it was scored before they were kept, and the archive has another file in its place"}
    if uid in kept:
        facts["first_seen"] = _plain(kept[uid]["first_seen"])
    several = zip(found["source_paths"], found["sources"], found["source_sha256"], strict=True)
    return facts | {"sources": [{"path": p, "uri": u, "sha256": s, "now": _now(u, s)} for p, u, s in several]}


def _now(uri: str, sha256: str) -> str:
    try:
        ((_, data),) = archive.read_many([uri])
    except Refused as e:
        return f"cannot be read ({e.reason})"
    return "as scored" if hashlib.sha256(data).hexdigest() == sha256 else "changed since"


def _training(config: Config, row: dict, model: dict) -> tuple[dict, dict]:
    """What is known of the model and of what it was trained on; from its spec as long as that is the one that predicted."""
    training = {"dataset_digest": row["dataset_digest"]}
    if _is_ensemble(row["model_version"]):
        url = dataset.pinned_model(config.lake, row["model_digest"])
        if not storage.exists(url):
            return model | {"members": "the lake has no copy of it any more"}, training
        spec = models.read_spec(url, row["model_digest"])
        return model | {"members": [m.model_dump() for m in spec.members]}, training | {"networks": _learnt_from(config, url)}
    registry = tracking.of(config)
    try:
        url = registry.fetch(row["model_version"], config.lake)
        registered = registry.version_facts(row["model_version"])
    except Exception as e:  # the registry may be gone, or have another version by that number: the row says enough
        return model | {"registry": f"does not have it any more ({type(e).__name__})"}, training
    if common.model_digest(url) != row["model_digest"]:
        return model | {"registry": "has another model under this version by now"}, training
    spec = models.read_spec(url)
    model |= {
        "mlflow_run": registered["run_id"],
        "weights_sha256": spec.weights_sha256,
        "code_version": spec.code_version,
        "champion": registry.champion() == row["model_version"],
        "promotion": registered.get("sparkmed.promotion"),
    }
    (facts, *first) = _learnt_from(config, url)
    if first:
        facts["first_of_the_cascade"] = first
    return model, facts | {"training": registered.get("sparkmed.training"), "config_digest": registered.get("sparkmed.config")}


def _learnt_from(config: Config, url: str) -> list[dict]:
    """Per network of a model what it was trained on: of a cascade the first comes last."""
    datasets = storage.join(config.lake, "datasets")
    return [
        {
            "dataset": storage.join(datasets, s.dataset.name, s.dataset.version) if s.dataset.name else None,
            "dataset_digest": s.dataset.digest,
            "seed": s.seed,
        }
        for s in models.specs(url)
    ]


def _plain(value):
    return value.isoformat() if isinstance(value, datetime.datetime) else value


def as_text(chain: dict) -> str:
    """A chain of :func:`trace`, as YAML."""
    import yaml

    return yaml.safe_dump(chain, sort_keys=False, allow_unicode=True, width=200)
