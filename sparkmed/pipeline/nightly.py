"""Score what the champion has not scored yet, each volume once."""

import logging

from sparkmed import scoring, storage, tables, tracking
from sparkmed.config import Config
from sparkmed.pipeline import common
from sparkmed.pipeline.watch import watch
from sparkmed.rejection import InputError
from sparkmed.spark import catalog as spark_catalog
from sparkmed.spark import score as spark_score

log = logging.getLogger("sparkmed")


def score(config: Config) -> dict:
    """Predict with the champion, or the ensemble, every volume that it has not scored under these settings."""
    registry = tracking.of(config)
    registry.check()
    model_url, version = common.scored(config, registry)
    model_digest, settings = common.model_digest(model_url), common.settings_digest(config, model_url)
    with_masks = config.task == "segmentation" and config.score.masks != "seg"
    segs = seg_folder(config) and scoring.SegFolder(seg_folder(config), registry.model, version, model_digest, settings)
    ledger = tables.predictions(config.lake)
    keys = {scoring.key(r["uid"], model_digest, settings): r for r in common.volume_rows(config)}
    quarantine = tables.quarantine(config.lake)
    parked = set() if config.score.retry_refused else set(quarantine.read(["key"])["key"].to_pylist())
    scored = set(ledger.read(["key"])["key"].to_pylist())
    todo = [k for k in sorted(keys) if k not in scored and k not in parked]
    log.info("version %s of %s; %d of %d volumes to score", version, registry.model, len(todo), len(keys))
    done = refused = 0
    spark = common.spark_of(config) if todo else None
    for start in range(0, len(todo), config.score.commit_every):
        batch = {k: keys[k] for k in todo[start : start + config.score.commit_every]}
        paths = {r["uid"]: scoring.mask_path(registry.model, version, settings, r["subject"], r["uid"]) for r in batch.values()}
        masks = {uid: storage.join(config.lake, path) for uid, path in paths.items()} if with_masks else None
        rows, rejections = spark_score.predict(
            spark, list(batch.values()), model_url, config.train.device, masks, config.score, segs, config.imports,
            storage.join(config.lake, "scratch"), config.score.split_mb,
        )  # fmt: skip
        lineage = common.lineage(config, config.score) | {
            "model_name": registry.model,
            "model_version": version,
            "model_digest": model_digest,
        }
        for r in rows:
            r |= lineage | {"key": scoring.key(r["volume"], model_digest, settings)}
            r["mask"] = paths[r["volume"]] if with_masks else None
        done += common.commit_once(ledger, rows, "score")
        of_source = {u: k for k, r in batch.items() for u in r["sources"]}
        refusals = []
        for r in rejections:
            stays = None if r.reason in spark_score.PASSING else of_source[r.uri]
            refusals.append(spark_catalog.quarantine_row(r, common.lineage(config, config.score), key=stays))
        if refusals:
            quarantine.commit([quarantine.write(refusals)])
        refused += len(batch) - len(rows)
    left_out = len(set(keys) & parked - scored)
    alarms = watch(config)["alarms"]
    common.require_few(refused + left_out, len(keys), config.score.max_refused, "score.max_refused", "volumes")
    before = len(set(keys) & scored)
    return {"version": version, "scored": done, "before": before, "refused": refused, "parked": left_out, "alarms": alarms}


def seg_folder(config: Config) -> str | None:
    """Where DICOM SEG go, None when none are written; :class:`InputError` when that is where pseudonyms only may be."""
    if config.score.masks == "nifti":
        return None
    folder, lake = storage.absolute(config.score.seg_folder), storage.absolute(config.lake)
    if f"{folder}/".startswith(f"{lake.rstrip('/')}/"):
        raise InputError(
            f"score.seg_folder {folder} is in the lake {lake}: DICOM SEG hold the names of patients, put them elsewhere"
        )
    return folder
