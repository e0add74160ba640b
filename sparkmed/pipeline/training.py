"""Train on a patch dataset, measure on the test volumes, register the model."""

import json
import logging
import math
import statistics
import threading
import time

from sparkmed import dataset, lease, scoring, storage, tracking
from sparkmed.config import PLACE_KEYS, Config, Score, digest
from sparkmed.learning import metrics
from sparkmed.pipeline import common
from sparkmed.pipeline.promotion import evaluate
from sparkmed.training import launch

log = logging.getLogger("sparkmed")


def train(config: Config) -> dict:
    """Train on the patch dataset, measure on the test volumes, register the model. Done once for a dataset and a config."""
    config = common.pinned(config)
    rows = common.labelled_rows(config)
    url = dataset.url(config.lake, config.name, dataset.version(rows, config))
    facts = dataset.describe(url)
    common.require_few(len(facts["refused"]), len(rows), config.volumes.max_refused, "volumes.max_refused", "volumes")
    how = config.train.model_dump(mode="json", exclude=PLACE_KEYS, exclude_defaults=True)
    training = digest(facts["digest"], how, config.score.overlap, config.score.blending, *config.score.changes(Score()))[:16]
    registry = tracking.of(config)
    registry.check()
    with lease.held(lease.url(config.lake, f"train-{training}"), f"training {training}"):
        done = registry.trained(training)  # of two at once the second has waited for the first
        if done:
            return {"version": done, "already": "trained"}
        return _train(config, registry, training, rows, url, facts)


def _train(config: Config, registry: tracking.Registry, training: str, rows: list[dict], url: str, facts: dict) -> dict:
    from sparkmed import report  # and matplotlib, which most verbs do without

    slots, python = common.slots(config), None
    if slots is not None:
        python = common.spark_of(config).sparkContext.pythonExec  # of the executors: on YARN the packed environment's
    folder = storage.join(config.lake, "training", config.name, training)
    storage.makedirs(folder)
    source = {"name": config.name, "version": facts["version"], "digest": facts["digest"], "url": url, "counts": facts["counts"]}
    sections = {"preprocess": config.preprocess, "patches": config.patches, "train": config.train, "score": config.score.numbers}
    parameters = {name: section.model_dump(mode="json") for name, section in sections.items()}
    tags = {"sparkmed.training": training, "sparkmed.code_version": common.code_version(), "sparkmed.config": digest(config)[:16]}
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


def _rounded(figures: dict[str, float]) -> dict:
    return {k: round(v, 4) for k, v in figures.items() if v is not None}
