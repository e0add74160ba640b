"""Score what the champion has not scored yet, each volume once."""

import datetime
import logging
import uuid
from collections.abc import Set

from sparkmed import lease, scoring, storage, tables
from sparkmed.config import Config
from sparkmed.learning import model as models
from sparkmed.pipeline import common, ledger
from sparkmed.pipeline.watch import watch
from sparkmed.reasons import PASSING
from sparkmed.rejection import InputError
from sparkmed.spark import catalog as spark_catalog
from sparkmed.spark import score as spark_score

log = logging.getLogger("sparkmed")


def score(config: Config) -> dict:
    """Predict with the champion, or the ensemble, the volumes that it has not scored under these settings, as far as the config
    says.

    Of two runs at once the second waits for the first, and finds what is left. That saves work only: the ledger takes each key
    once, whoever wrote it.
    """
    folder = seg_folder(config)
    with lease.held(lease.url(config.lake, "score"), f"the predictions of lake {config.lake}"):
        return _score(config, folder)


def _score(config: Config, folder: str | None) -> dict:
    champion = ledger.pinned(config)
    common.remember(config)
    plan = ledger.plan(config, champion)
    todo = plan.tonight(config)
    waiting = len(plan.new) + len(plan.backfill) - len(todo)
    log.info(
        "version %s of %s; of %d volumes %d are new and %d are backfill, %d of them tonight",
        champion.version, champion.registry.model, len(plan.rows), len(plan.new), len(plan.backfill), len(todo),
    )  # fmt: skip
    predictions = tables.predictions(config.lake)
    run = f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%SZ}-{uuid.uuid4().hex[:8]}"
    done = refused = 0
    spark = common.spark_of(config) if todo else None
    for number, start in enumerate(range(0, len(todo), config.score.commit_every)):
        held = set(predictions.read(["key"])["key"].to_pylist())  # a rival may have been faster
        batch = {k: plan.rows[k] for k in todo[start : start + config.score.commit_every] if k not in held}
        written, refusals = _predict(config, spark, champion, batch, f"{run}/{number}", folder)
        predicted = {k for w in written for k in w.keys}
        _park(config, champion, refusals, predicted)  # first: what is predicted without a SEG would not be looked at again
        done += common.commit_files(predictions, written, spark_score.STAGE)
        refused += len(batch) - sum(len(w.keys) for w in written)
    if todo:
        predictions.compact(spark_score.STAGE)
    alarms = watch(config, champion)["alarms"]
    common.require_few(refused + len(plan.parked), len(plan.rows), config.score.max_refused, "score.max_refused", "volumes")
    counts = {"scored": done, "before": len(plan.scored), "refused": refused, "parked": len(plan.parked), "waiting": waiting}
    return {"version": champion.version, **counts, "alarms": alarms}


def _predict(
    config: Config, spark, champion: ledger.Pinned, batch: dict[str, dict], name: str, folder: str | None
) -> tuple[list[tables.Keyed], list[spark_score.Refusal]]:
    """Files of prediction rows that the executors have written into the ledger's folder, which no commit names yet; refusals."""
    registry, version, settings = champion.registry, champion.version, champion.settings
    segs = folder and scoring.SegFolder(folder, registry.model, version, champion.model_digest, settings)
    with_masks = config.task == "segmentation" and config.score.masks != "seg"
    with_cells = not champion.is_ensemble and models.read_spec(champion.url).cells is not None
    model = f"{version}-{champion.model_digest[:8]}"  # a registry that was made anew counts its versions from 1 again
    place = scoring.cells_path if with_cells else scoring.mask_path
    paths = {r["uid"]: place(registry.model, model, settings, r["subject"], r["uid"]) for r in batch.values()}
    urls = {uid: storage.join(config.lake, path) for uid, path in paths.items()} if with_masks or with_cells else None
    table, keys = tables.predictions(config.lake), {r["uid"]: k for k, r in batch.items()}
    lineage = {
        "model_name": registry.model,
        "model_version": version,
        "model_digest": champion.model_digest,
        **champion.origin(),
        "config_digest": settings,
        "code_version": common.code_version(),
        "batch": name,
    }

    def write(found: list[dict]) -> tables.Keyed:
        column = "mask" if with_masks else "cell_table" if with_cells else None
        rows = [r | lineage | {"key": keys[r["volume"]]} | ({column: paths[r["volume"]]} if column else {}) for r in found]
        return tables.Keyed(table.write(rows), tuple(r["key"] for r in rows))

    return spark_score.predict(
        spark, list(batch.values()), champion.url, config.train.device, urls, config.score, segs, config.imports,
        storage.join(config.lake, "scratch"), config.score.split_mb, write,
    )  # fmt: skip


def _park(config: Config, champion: ledger.Pinned, refusals: list[spark_score.Refusal], predicted: Set[str]):
    """Write refusals down once under the key that they stand for; of those that may pass which attempt it was. What was
    ``predicted`` all the same has attempt 0: should its commit fail, it is to be scored again."""
    table, writer = tables.quarantine(config.lake), f"{spark_score.STAGE}-refused"
    while refusals:
        number = table.committed(writer)
        before = ledger.failures(config)
        known = {(r["key"], r["uri"], r["reason"], r["attempt"]) for r in before}
        last: dict[str, tuple[int, datetime.datetime]] = {}
        for r in before:
            if r["attempt"]:
                last[r["key"]] = max(last.get(r["key"], (0, r["refused_at"])), (r["attempt"], r["refused_at"]))
        rows = []
        for r in refusals:
            key = champion.key(r.volume)
            attempt = 0 if key in predicted else _attempt(last.get(key), config) if r.reason in PASSING else None
            if (key, r.uri, r.reason, attempt) not in known:
                rows.append(spark_catalog.quarantine_row(r, common.lineage(config, config.score), key=key, attempt=attempt))
        if not rows:
            return
        try:
            table.commit([table.write(rows)], (writer, number + 1))
            return
        except tables.Conflict:  # a rival has written some of them down
            continue


def _attempt(last: tuple[int, datetime.datetime] | None, config: Config) -> int:
    """The how-manieth attempt a failure of now is, after the number and the moment of the last one."""
    if last is None:
        return 1
    number, moment = last
    hours = (datetime.datetime.now(datetime.UTC) - moment) / datetime.timedelta(hours=1)
    return number + (hours >= config.score.attempt_hours)


def seg_folder(config: Config) -> str | None:
    """Where DICOM SEG go, None when none are written; :class:`InputError` when that is where pseudonyms only may be."""
    if config.score.masks == "nifti":
        return None
    folder, lake = storage.absolute(config.score.seg_folder), storage.real(config.lake)
    if f"{storage.real(folder)}/".startswith(f"{lake.rstrip('/')}/"):
        raise InputError(
            f"score.seg_folder {folder} is in the lake {lake}: DICOM SEG hold the names of patients, put them elsewhere"
        )
    return folder
