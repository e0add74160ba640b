"""The verbs: each reads a table, applies a step, writes a table. Running one twice does nothing twice.

A verb returns a dictionary of what it did; :func:`run` does all of them.
"""

import datetime
import hashlib
import json
import logging
import math
import statistics
import threading
import time
import uuid
from collections.abc import Callable

import sparkmed
from sparkmed import dataset, identity, report, scoring, storage, tables, tracking
from sparkmed.config import PLACE_KEYS, Config, Deidentification, digest
from sparkmed.imaging import paths
from sparkmed.learning import metrics
from sparkmed.learning.model import ModelSpec
from sparkmed.reasons import sentence
from sparkmed.rejection import InputError, Rejection
from sparkmed.spark import catalog as spark_catalog
from sparkmed.spark import deidentify as spark_deidentify
from sparkmed.spark import patches as spark_patches
from sparkmed.spark import score as spark_score
from sparkmed.spark import session as spark_session
from sparkmed.spark import volumes as spark_volumes
from sparkmed.training import launch

log = logging.getLogger("sparkmed")


class StageFailed(Exception):
    """A stage ended, but more was refused than the config allows, or it could not finish: exit status 1."""


def catalog(config: Config) -> dict:
    """Bring ``catalog/`` and ``quarantine/`` up to date with the archive."""
    key, origin = _key(config)
    if origin.endswith("subject.key"):
        log.info("subjects are pseudonyms under the key %s: keep it, and keep it secret", origin)
    _claim_lake(config)
    return _catalog(config, key)


def _claim_lake(config: Config):
    """A lake is of one project: two would take each other's files for deleted."""
    where = storage.join(config.lake, "project.json")
    owner = storage.read_json(where)["name"] if storage.exists(where) else None
    if owner is None:
        storage.write_json(where, {"name": config.name})
    elif owner != config.name:
        raise InputError(f"lake {config.lake} is of project {owner}, the config is of {config.name}: give each its own lake")


def volumes(config: Config) -> dict:
    """Make ``volumes/`` from the catalog: geometry, subjects, labels, splits."""
    if not tables.catalog(config.lake).committed(spark_catalog.STAGE):
        raise InputError(f"lake {config.lake} has no catalog: run the catalog stage first")
    return _make_volumes(config, _key(config)[0])


def _catalog(config: Config, key: bytes | None) -> dict:
    lineage = _lineage(config, config.catalog, config.identity)
    try:
        counts = spark_catalog.update(_spark(config), config.archive, config.lake, config.catalog, key, lineage)
    except FileNotFoundError:
        raise InputError(f"archive {config.archive} does not exist: say where the images are with archive=FOLDER") from None
    if not counts["files"]:
        raise InputError(f"archive {config.archive} holds no file")
    refused, total = counts["refused"], counts["refused"] + counts["instances"]
    _require_few(refused, total, config.catalog.max_refused, "catalog.max_refused", "files")
    return counts


def _make_volumes(config: Config, key: bytes | None) -> dict:
    counts = spark_volumes.build(_spark(config), config, key, _lineage(config, config.volumes, config.identity))
    _require_few(counts["refused"], counts["files"], config.volumes.max_refused, "volumes.max_refused", "files")
    return counts


def patches(config: Config) -> dict:
    """Write the patch dataset of the labelled volumes, unless it is there."""
    rows = _labelled(config)
    spark = _spark(config)
    lineage = _lineage(config, config.preprocess, config.patches)
    url = spark_patches.write(spark, rows, config, lineage)
    facts = dataset.describe(url)
    quarantine = tables.quarantine(config.lake)
    known = set(quarantine.read(["key"])["key"].to_pylist()) if facts["refused"] else set()
    sources = {r["uid"]: r["sources"] for r in rows}
    refusals = []
    for uid, (reason, message) in facts["refused"].items():
        key = f"{facts['version']}/{uid}"
        if key not in known:  # a run that was killed before it could say so is made up for
            found = [Rejection(uri, dataset.STAGE, reason, message) for uri in sources[uid]]
            refusals += [spark_catalog.quarantine_row(r, lineage, key=key) for r in found]
    if refusals:
        quarantine.commit([quarantine.write(refusals)])
    _require_few(len(facts["refused"]), len(rows), config.volumes.max_refused, "volumes.max_refused", "volumes")
    for name, missing in facts["shortfall"].items():
        log.info("class %s fell short by %d patches, which are centred on other classes", name, missing)
    return {"dataset": url, **facts["counts"], "refused": len(facts["refused"])}


def train(config: Config) -> dict:
    """Train on the patch dataset, measure on the test volumes, register the model. Done once for a dataset and a config."""
    rows = _labelled(config)
    url = dataset.url(config.lake, config.name, dataset.version(rows, config))
    facts = dataset.describe(url)
    _require_few(len(facts["refused"]), len(rows), config.volumes.max_refused, "volumes.max_refused", "volumes")
    how = config.train.model_dump(mode="json", exclude=PLACE_KEYS, exclude_defaults=True)
    training = digest(facts["digest"], how, config.score.overlap, config.score.blending)[:16]
    registry = tracking.of(config)
    registry.check()
    done = registry.trained(training)
    if done:
        return {"version": done, "already": "trained"}
    slots, python = _slots(config), None
    if slots is not None:
        python = _spark(config).sparkContext.pythonExec  # of the executors: on YARN the packed environment's
    folder = storage.join(config.lake, "training", config.name, training)
    storage.makedirs(folder)
    source = {"name": config.name, "version": facts["version"], "digest": facts["digest"], "url": url, "counts": facts["counts"]}
    sections = {"preprocess": config.preprocess, "patches": config.patches, "train": config.train, "score": config.score.numbers}
    parameters = {name: section.model_dump(mode="json") for name, section in sections.items()}
    tags = {"sparkmed.training": training, "sparkmed.code_version": code_version(), "sparkmed.config": digest(config)[:16]}
    with registry.run(
        f"{config.name}-{training[:6]}", {"seed": config.seed, "task": config.task, **parameters}, tags, source
    ) as run:
        started = time.monotonic()
        with _following(folder, run):
            result = launch.run(config, url, folder, slots, python)
        minutes = (time.monotonic() - started) / 60
        test = [r for r in rows if r["split"] == "test" and r["uid"] not in facts["refused"]]
        scored = evaluate(config, result["model"], test)
        figures = test_figures(config, scored)
        run.metrics({**figures, "train_minutes": minutes})
        table = [{k: r[k] for k in ("subject", "volume", "score", "probability", "target")} for r in scored]
        run.file(json.dumps(table, indent=1).encode(), "test_predictions.json")
        for name, png in report.examples(config, result["model"], test).items():
            run.file(png, f"examples/{name}.png")
        model_tags = {**tags, "sparkmed.dataset": facts["digest"], "sparkmed.config_digest": digest(config.score)[:16]}
        version = run.register(result["model"], model_tags | {k: f"{v:.4f}" for k, v in figures.items() if v is not None})
    return {"version": version, "minutes": round(minutes, 2), "best_epoch": result["best"]["epoch"], **_rounded(figures)}


def promote(config: Config) -> dict:
    """Give the newest version the champion alias if it passes the gate on the present test split; the decision is kept."""
    registry = tracking.of(config)
    registry.check()
    challenger, champion = registry.latest(), registry.champion()
    if challenger is None:
        raise InputError(f"no version of model {registry.model} is registered: run the train stage first")
    if challenger == champion:
        return {"champion": champion, "action": "kept", "reason": "the newest version is the champion already"}
    _require_same_classes(config, registry, challenger, champion)
    test = [r for r in _labelled(config) if r["split"] == "test"]
    decided = _decision(config, registry, challenger, champion, test)
    if decided:
        return {"champion": champion, "action": decided["action"], "reason": decided["reason"]}
    ours = _subject_scores(config, registry, challenger, test)
    mean = statistics.fmean(ours.values())
    numbers = {"challenger_mean": mean, "subjects": len(ours), "minimum": config.promote.minimum, "test": _test_digest(test)}
    passes = mean >= config.promote.minimum
    reason = f"mean {mean:.4f} over {len(ours)} test subjects, wanted at least {config.promote.minimum:g}"
    if passes and champion is not None:
        theirs = _subject_scores(config, registry, champion, test)
        shared = sorted(set(ours) & set(theirs))
        if not shared:
            raise StageFailed(f"versions {challenger} and {champion} have no test subject in common: they cannot be compared")
        a, b = [ours[s] for s in shared], [theirs[s] for s in shared]
        gate = config.promote
        difference, low, high = metrics.paired_bootstrap(a, b, gate.confidence, gate.resamples, config.seed)
        numbers |= {"champion_mean": statistics.fmean(b), "difference": difference, "low": low, "high": high, "margin": gate.margin}
        passes = low > gate.margin
        reason = (
            f"difference to version {champion} is {difference:+.4f}, {gate.confidence:.0%} interval [{low:+.4f}, {high:+.4f}] "
            f"over {len(shared)} test subjects, wanted its lower end above {gate.margin:g}"
        )
    elif passes:
        reason += "; no champion yet"
    return _decide(config, registry, "promoted" if passes else "kept", challenger, champion, reason, numbers)


def rollback(config: Config) -> dict:
    """Give the champion alias back to the version that had it before the last promotion."""
    registry = tracking.of(config)
    champion = registry.champion()
    decisions = sorted(tables.promotions(config.lake).rows(), key=lambda r: r["decided_at"], reverse=True)
    made = [r for r in decisions if (r["model_name"], r["action"], r["challenger"]) == (registry.model, "promoted", champion)]
    if not made or made[0]["champion"] is None:
        raise InputError(f"model {registry.model}: no champion before version {champion}, nothing to roll back to")
    before = made[0]["champion"]
    return _decide(config, registry, "rolled back", before, champion, f"rolled back from version {champion}", {})


def score(config: Config) -> dict:
    """Predict with the champion every volume that it has not scored under these settings."""
    registry = tracking.of(config)
    registry.check()
    version = registry.champion()
    if version is None:
        raise InputError(f"model {registry.model} has no champion: no version has passed the promote stage")
    _require_same_classes(config, registry, version)
    model_url = registry.fetch(version, config.lake)
    model_digest = _model_digest(model_url)
    settings = digest(config.score.overlap, config.score.blending, *config.score.outputs)[:16]
    with_masks = config.task == "segmentation" and config.score.masks != "seg"
    segs = _seg_folder(config) and scoring.SegFolder(_seg_folder(config), registry.model, version, model_digest, settings)
    ledger = tables.predictions(config.lake)
    keys = {scoring.key(r["uid"], model_digest, settings): r for r in _volumes(config)}
    quarantine = tables.quarantine(config.lake)
    parked = set() if config.score.retry_refused else set(quarantine.read(["key"])["key"].to_pylist())
    scored = set(ledger.read(["key"])["key"].to_pylist())
    todo = [k for k in sorted(keys) if k not in scored and k not in parked]
    log.info("champion is version %s of %s; %d of %d volumes to score", version, registry.model, len(todo), len(keys))
    done = refused = 0
    spark = _spark(config) if todo else None
    for start in range(0, len(todo), config.score.commit_every):
        batch = {k: keys[k] for k in todo[start : start + config.score.commit_every]}
        paths = {r["uid"]: scoring.mask_path(registry.model, version, settings, r["subject"], r["uid"]) for r in batch.values()}
        masks = {uid: storage.join(config.lake, path) for uid, path in paths.items()} if with_masks else None
        rows, rejections = spark_score.predict(
            spark, list(batch.values()), model_url, config.train.device, masks, config.score, segs
        )
        lineage = _lineage(config, config.score) | {
            "model_name": registry.model,
            "model_version": version,
            "model_digest": model_digest,
        }
        for r in rows:
            r |= lineage | {"key": scoring.key(r["volume"], model_digest, settings)}
            r["mask"] = paths[r["volume"]] if with_masks else None
        done += _commit_once(ledger, rows, "score")
        of_source = {u: k for k, r in batch.items() for u in r["sources"]}
        refusals = []
        for r in rejections:
            stays = None if r.reason in spark_score.PASSING else of_source[r.uri]
            refusals.append(spark_catalog.quarantine_row(r, _lineage(config, config.score), key=stays))
        if refusals:
            quarantine.commit([quarantine.write(refusals)])
        refused += len(batch) - len(rows)
    left_out = len(set(keys) & parked - scored)
    _require_few(refused + left_out, len(keys), config.score.max_refused, "score.max_refused", "volumes")
    return {"version": version, "scored": done, "before": len(set(keys) & scored), "refused": refused, "parked": left_out}


def _seg_folder(config: Config) -> str | None:
    """Where DICOM SEG go, None when none are written; :class:`InputError` when that is where pseudonyms only may be."""
    if config.score.masks == "nifti":
        return None
    folder, lake = storage.absolute(config.score.seg_folder), storage.absolute(config.lake)
    if f"{folder}/".startswith(f"{lake.rstrip('/')}/"):
        raise InputError(
            f"score.seg_folder {folder} is in the lake {lake}: DICOM SEG hold the names of patients, put them elsewhere"
        )
    return folder


def make_report(config: Config) -> dict:
    """One HTML page about all of the above."""
    registry = tracking.of(config)
    registry.check()
    _require_same_classes(config, registry, registry.latest(), registry.champion())
    url = report.write(config, registry)
    return {"report": url}


def deidentify(wanted: Deidentification) -> dict:
    """De-identified copies of the DICOM files of an archive, each proven clean, and one audit row for every file."""
    if not storage.exists(wanted.archive):
        raise InputError(f"archive {wanted.archive} does not exist: say where the DICOM files are")
    wanted = wanted.model_copy(update={"archive": storage.absolute(wanted.archive), "out": storage.absolute(wanted.out)})
    place = storage.absolute(wanted.key or f"{wanted.out}.key")
    key, origin = identity.key_of(wanted.identity, place)
    if origin == place:
        log.info(
            "pseudonyms, dates and UIDs are functions of the key %s: keep it, keep it secret, and never hand it on with them",
            origin,
        )
    settings = digest(wanted.deidentify, identity.fingerprint(key), code_version())[:16]
    lineage = {**_lineage(None, wanted.deidentify, wanted.identity), "settings": settings}
    spark = spark_session.session(wanted.spark, "sparkmed deidentify")
    spark_session.require_shared(spark, wanted.out)
    counts = spark_deidentify.run(spark, wanted, key, lineage)
    reasons = tables.audit(wanted.out).read(["reason"])["reason"].value_counts().to_pylist()
    for reason, count in sorted((r["values"], r["counts"]) for r in reasons if r["values"]):
        log.info("%6d held back: %s (%s)", count, sentence(reason), reason)
    return counts


STAGES: dict[str, Callable[[Config], dict]] = {
    "catalog": catalog,
    "volumes": volumes,
    "patches": patches,
    "train": train,
    "promote": promote,
    "score": score,
    "report": make_report,
}


def run(config: Config, tell: Callable[[str], None] = log.info) -> dict[str, dict]:
    """All stages in order; what each did. Every stage finds what is done already and leaves it."""
    problems = check(config)
    if problems:
        raise InputError("; ".join(problems))
    return {name: run_stage(name, config, tell) for name in STAGES}


def run_stage(name: str, config: Config, tell: Callable[[str], None] = log.info) -> dict:
    started = time.monotonic()
    outcome = STAGES[name](config)
    tell(f"{name:8s} {time.monotonic() - started:6.1f} s  " + ", ".join(f"{k} {v}" for k, v in outcome.items() if v is not None))
    return outcome


def check(config: Config, data: bool = False) -> list[str]:
    """What would fail, before it does; an empty list when nothing is known to.

    ``data`` also reads the headers of the archive and every label, as the first two stages would, and keeps nothing of it.
    """
    problems = []

    def attempt(step: Callable):
        try:
            step()
        except (InputError, StageFailed) as e:
            problems.append(str(e))

    for step in (_archive_is_there, _patterns, _seg_folder, _key, lambda c: tracking.of(c).check(), launch.check, _slots):
        attempt(lambda step=step: step(config))
    if data and not problems:
        attempt(lambda: _rehearse(config))
    return problems


def _rehearse(config: Config):
    """The first two stages in a lake that is thrown away."""
    key, _ = _key(config)
    archive, lake = storage.absolute(config.archive), storage.absolute(config.lake)
    limits = config.catalog
    if lake.startswith(f"{archive}/"):  # the scratch lake is left out by itself, the real one is not
        limits = limits.model_copy(update={"exclude": (*limits.exclude, f"{lake.removeprefix(f'{archive}/')}/**")})
    scratch = config.model_copy(update={"lake": storage.join(lake, f"check-{uuid.uuid4().hex[:8]}"), "catalog": limits})
    try:
        _catalog(scratch, key)
        _make_volumes(scratch, key)
    finally:
        if storage.exists(scratch.lake):
            storage.remove(scratch.lake, recursive=True)


def _slots(config: Config) -> int | None:
    """Task slots of Spark, at least one per rank; None when one process trains without Spark."""
    ranks = config.train.processes
    if ranks == 1:
        return None
    slots = spark_session.slots(_spark(config), ranks, patience=min(60, config.train.start_timeout))
    if slots < ranks:
        raise InputError(f"train.processes is {ranks} but Spark has {slots} task slots: lower it, or give Spark more cores")
    return slots


def _archive_is_there(config: Config):
    try:
        first = next(storage.walk(config.archive), None)
    except FileNotFoundError:
        raise InputError(f"archive {config.archive} does not exist: say where the images are with archive=FOLDER") from None
    if first is None:
        raise InputError(f"archive {config.archive} holds no file")


def _patterns(config: Config):
    images, labels = config.volumes.images, config.volumes.labels.pattern
    for pattern in [
        *([images] if isinstance(images, str) else images or []),
        *([labels] if labels else []),
        *config.catalog.exclude,
    ]:
        paths.PathPattern(pattern)


def evaluate(config: Config, model_url: str, rows: list[dict]) -> list[dict]:
    """Scored rows of labelled volumes by the model at ``model_url``; each (volume, label, model) is computed once and kept."""
    model_digest = _model_digest(model_url)
    table = tables.evaluations(config.lake)
    keys = {digest([r["uid"], r["label_uid"], r["target"], model_digest])[:32]: r for r in rows}
    known = {r["key"]: r for r in table.rows() if r["key"] in keys}
    todo = [r for k, r in keys.items() if k not in known]
    if todo:
        scored, rejections = spark_score.predict(_spark(config), todo, model_url, config.train.device)
        if rejections:
            e = rejections[0]
            log.warning("%d files of the test split cannot be read, such as %s: %s", len(rejections), e.reason, e.message)
            _require_few(len(todo) - len(scored), len(rows), config.score.max_refused, "score.max_refused", "test volumes")
        by_uid = {r["uid"]: k for k, r in keys.items()}
        fresh = [r | {"key": by_uid[r["volume"]], "model_digest": model_digest, **_lineage(config, config.score)} for r in scored]
        _commit_once(table, fresh, "evaluate")
        known |= {r["key"]: r for r in fresh}
    return sorted(known.values(), key=lambda r: (r["subject"], r["volume"]))


def test_figures(config: Config, scored: list[dict]) -> dict[str, float]:
    """Test metrics with a bootstrap interval over subjects: mean Dice per class, or accuracy and area under the ROC curve."""
    scored = [r for r in scored if r["score"] is not None]
    figures = {"test_subjects": float(len({r["subject"] for r in scored}))}
    overall = scoring.subject_scores(scored)
    name = "test_dice" if config.task == "segmentation" else "test_accuracy"
    figures |= _with_interval(name, list(overall.values()), config)
    if config.task == "segmentation":
        for c, label in enumerate(config.classes[1:], start=1):
            per_subject: dict[str, list[float]] = {}
            for r in scored:
                if r["score"][c] is not None:
                    per_subject.setdefault(r["subject"], []).append(r["score"][c])
            figures |= _with_interval(f"test_dice_{label}", [statistics.fmean(v) for v in per_subject.values()], config)
    else:
        figures["test_roc_auc"] = metrics.roc_auc([r["probability"] for r in scored], [r["target"] for r in scored])
    return figures


def _with_interval(name: str, values: list[float], config: Config) -> dict[str, float]:
    if not values:
        return {}
    low, high = metrics.bootstrap_interval(values, config.promote.confidence, config.promote.resamples, config.seed)
    return {name: statistics.fmean(values), f"{name}_low": low, f"{name}_high": high}


def _subject_scores(config: Config, registry: tracking.Registry, version: str, test: list[dict]) -> dict[str, float]:
    scores = scoring.subject_scores(evaluate(config, registry.fetch(version, config.lake), test))
    if not scores:
        raise StageFailed(f"version {version} has no score on the test split: its labels are empty")
    return scores


def _decision(config: Config, registry, challenger: str, champion: str | None, test: list[dict]) -> dict | None:
    """The decision that was made about these two versions on this test split under this gate, if one was."""
    wanted = (registry.model, challenger, champion, digest(config.promote)[:16])
    for r in tables.promotions(config.lake).rows():
        if (r["model_name"], r["action"], r["champion"]) == (registry.model, "rolled back", challenger):
            return r | {"action": "kept", "reason": f"version {challenger} was rolled back: train another"}
        same = (r["model_name"], r["challenger"], r["champion"], r["config_digest"]) == wanted
        if same and r["action"] == "kept" and json.loads(r["numbers"])["test"] == _test_digest(test):
            return r
    return None


def _require_same_classes(config: Config, registry: tracking.Registry, *versions: str | None):
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


def _test_digest(test: list[dict]) -> str:
    return digest(sorted([r["uid"], r["label_uid"] or "", r["target"] or 0] for r in test))[:16]


def _decide(config, registry, action: str, challenger: str, champion: str | None, reason: str, numbers: dict) -> dict:
    """Write the decision down, then act on it. One that was written by a run that could not act any more is not written again."""
    decided = {"model_name": registry.model, "action": action, "challenger": challenger, "champion": champion, "reason": reason}
    row = decided | {
        "numbers": json.dumps(numbers),
        "decided_at": datetime.datetime.now(datetime.UTC),
        **_lineage(config, config.promote),
    }
    table = tables.promotions(config.lake)
    made = sorted((r for r in table.rows() if r["model_name"] == registry.model), key=lambda r: r["decided_at"])
    if not made or any(made[-1][k] != row[k] for k in (*decided, "numbers", "config_digest")):
        table.commit([table.write([row])])
    if action == "kept":
        registry.note(challenger, "sparkmed.promotion", reason)
    else:
        registry.crown(challenger, reason)
    now = champion if action == "kept" else challenger
    return {"champion": now, "action": action, "reason": reason}


def _commit_once(ledger: tables.Table, rows: list[dict], writer: str) -> int:
    """Commit the rows whose keys the ledger does not hold yet; how many. A rival's commit in between is looked at again."""
    while True:
        number = ledger.committed(writer)
        present = set(ledger.read(["key"])["key"].to_pylist())
        new = [r for r in rows if r["key"] not in present]
        if not new:
            return 0
        try:
            ledger.commit([ledger.write(new)], (writer, number + 1))
            return len(new)
        except tables.Conflict:
            continue


class _following:
    """Copies the epochs that rank 0 appends to ``history.jsonl`` into the run while training goes on."""

    def __init__(self, folder: str, run: tracking.Run):
        self.url, self.run = storage.join(folder, "history.jsonl"), run
        self.seen = 0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self):
        self.thread.start()

    def __exit__(self, *_):
        self.ended.set()
        self.thread.join()
        self._copy()

    def _follow(self):
        while not self.ended.wait(2.0):
            self._copy()

    def _copy(self):
        try:
            lines = storage.read_bytes(self.url).decode().split("\n")[:-1]  # the last one may be half written
        except FileNotFoundError:
            return
        for line in lines[self.seen :]:
            epoch = json.loads(line)
            flat = {k: v for k, v in epoch.items() if isinstance(v, int | float) and k != "epoch"}
            flat |= {f"val_metric_{name}": v for name, v in epoch.get("val_per_class", {}).items()}
            self.run.metrics({k: v for k, v in flat.items() if math.isfinite(v)}, step=epoch["epoch"])
        self.seen = len(lines)


def _volumes(config: Config) -> list[dict]:
    rows = tables.volumes(config.lake).rows()
    if not rows:
        raise InputError(f"lake {config.lake} has no volumes: run the volumes stage first")
    return rows


def _labelled(config: Config) -> list[dict]:
    rows = [r for r in _volumes(config) if r["split"]]
    if not rows:
        raise InputError("no volume has a label: volumes.labels says where labels are")
    return rows


def _spark(config: Config):
    """The Spark session; of a cluster, once it is known that its nodes share the lake."""
    spark = spark_session.session(config.spark, f"sparkmed {config.name}")
    spark_session.require_shared(spark, config.lake)
    return spark


def _key(config: Config) -> tuple[bytes | None, str]:
    return (None, "") if config.identity.keep_subjects else identity.load_key(config)


def _lineage(config: Config, *sections) -> dict:
    return {"config_digest": digest(*sections)[:16], "code_version": code_version()}


def code_version() -> str:
    return sparkmed.__version__


def _model_digest(model_url: str) -> str:
    """SHA-256 of the spec, which names the SHA-256 of the weights."""
    return hashlib.sha256(storage.read_bytes(storage.join(model_url, "spec.json"))).hexdigest()


def _require_few(refused: int, total: int, most: float, setting: str, what: str):
    if total and refused / total > most:
        raise StageFailed(
            f"{refused} of {total} {what} were refused, more than {setting} {most:g} allows: see the quarantine table"
        )


def _rounded(figures: dict[str, float]) -> dict:
    return {k: round(v, 4) for k, v in figures.items() if v is not None}
