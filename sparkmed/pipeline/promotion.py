"""Which version is the champion, and why."""

import datetime
import json
import logging
import statistics

from sparkmed import scoring, storage, tables, tracking
from sparkmed.config import Config, digest
from sparkmed.learning import metrics
from sparkmed.pipeline import common
from sparkmed.rejection import InputError
from sparkmed.spark import score as spark_score

log = logging.getLogger("sparkmed")


def promote(config: Config) -> dict:
    """Give the newest version the champion alias if it passes the gate on the present test split; the decision is kept."""
    registry = tracking.of(config)
    registry.check()
    challenger, champion = registry.latest(), registry.champion()
    if challenger is None:
        raise InputError(f"no version of model {registry.model} is registered: run the train stage first")
    if challenger == champion:
        return {"champion": champion, "action": "kept", "reason": "the newest version is the champion already"}
    common.require_same_classes(config, registry, challenger, champion)
    test = [r for r in common.labelled_rows(config) if r["split"] == "test"]
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
            raise common.StageFailed(
                f"versions {challenger} and {champion} have no test subject in common: they cannot be compared"
            )
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


def evaluate(config: Config, model_url: str, rows: list[dict]) -> list[dict]:
    """Scored rows of labelled volumes by the model at ``model_url``; each (volume, label, model) is computed once and kept."""
    model_digest = common.model_digest(model_url)
    table = tables.evaluations(config.lake)
    keys = {digest([r["uid"], r["label_uid"], r["target"], model_digest])[:32]: r for r in rows}
    known = {r["key"]: r for r in table.rows() if r["key"] in keys}
    todo = [r for k, r in keys.items() if k not in known]
    if todo:
        scored, rejections = spark_score.predict(
            common.spark_of(config), todo, model_url, config.train.device, imports=config.imports,
            scratch=storage.join(config.lake, "scratch"), split_mb=config.score.split_mb,
        )  # fmt: skip
        if rejections:
            e = rejections[0]
            log.warning("%d files of the test split cannot be read, such as %s: %s", len(rejections), e.reason, e.message)
            common.require_few(len(todo) - len(scored), len(rows), config.score.max_refused, "score.max_refused", "test volumes")
        by_uid = {r["uid"]: k for k, r in keys.items()}
        fresh = [
            r | {"key": by_uid[r["volume"]], "model_digest": model_digest, **common.lineage(config, config.score)} for r in scored
        ]
        common.commit_once(table, fresh, "evaluate")
        known |= {r["key"]: r for r in fresh}
    return sorted(known.values(), key=lambda r: (r["subject"], r["volume"]))


def _subject_scores(config: Config, registry: tracking.Registry, version: str, test: list[dict]) -> dict[str, float]:
    scores = scoring.subject_scores(evaluate(config, registry.fetch(version, config.lake), test))
    if not scores:
        raise common.StageFailed(f"version {version} has no score on the test split: its labels are empty")
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


def _test_digest(test: list[dict]) -> str:
    return digest(sorted([r["uid"], r["label_uid"] or "", r["target"] or 0] for r in test))[:16]


def _decide(config, registry, action: str, challenger: str, champion: str | None, reason: str, numbers: dict) -> dict:
    """Write the decision down, then act on it. One that was written by a run that could not act any more is not written again."""
    decided = {"model_name": registry.model, "action": action, "challenger": challenger, "champion": champion, "reason": reason}
    row = decided | {
        "numbers": json.dumps(numbers),
        "decided_at": datetime.datetime.now(datetime.UTC),
        **common.lineage(config, config.promote),
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
