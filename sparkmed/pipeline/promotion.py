"""Which version is the champion, and why."""

import datetime
import json
import logging
import math

import pyarrow as pa
import pyarrow.compute as pc

from sparkmed import arrivals, cohort, drift, gates, scoring, storage, tables, tracking
from sparkmed.config import Config, digest
from sparkmed.pipeline import common, ledger
from sparkmed.rejection import InputError
from sparkmed.spark import score as spark_score

log = logging.getLogger("sparkmed")
QUARANTINED = "quarantined"
"""Figure of a fingerprint: how many volumes of how many were in quarantine."""


def promote(config: Config) -> dict:
    """Give the newest version the champion alias if it passes the gates on the present test split; the decision is kept."""
    registry = tracking.of(config)
    registry.check()
    challenger, champion = registry.latest(), registry.champion()
    if challenger is None:
        raise InputError(f"no version of model {registry.model} is registered: run the train stage first")
    if challenger == champion:
        return {"champion": champion, "action": "kept", "reason": "the newest version is the champion already"}
    common.require_same_classes(config, registry, challenger, champion)
    test = [r for r in common.labelled_rows(config) if r["split"] == "test"]
    groups = cohort.groups(test, config, common.key_of(config)[0])
    urls = {v: registry.fetch(v, config.lake) for v in (challenger, champion) if v}
    facts = {"test": _test_digest(test), "grouping": digest(groups)[:16]}
    settings = [common.judged_under(config, url) for url in urls.values()]
    if any(settings):
        facts["settings"] = digest(settings)[:16]
    decided = _decision(config, registry, challenger, champion, facts)
    if decided:
        return {"champion": champion, "action": decided["action"], "reason": decided["reason"]}
    ours, *others = (_evaluated(config, version, url, test) for version, url in urls.items())
    theirs = others[0] if others else None
    megavoxels = {r["uid"]: math.prod(r["shape"][1:]) / 1e6 for r in test}
    judged, numbers = gates.judge(config.promote, ours, theirs, champion, groups, megavoxels, config.seed)
    failed = [g.says for g in judged if g.passed is False]
    unjudged = [g.says for g in judged if g.passed is None and g.wanted is not None]
    reason = "; ".join(failed or [next((g for g in judged if g.gate == "comparison"), judged[0]).says])
    if not failed and champion is None:
        reason += "; no champion yet"
    reason = "; ".join([reason, *unjudged])
    numbers |= facts
    before = _promoted(config, registry)
    then = before and json.loads(before["numbers"]).get("test")
    if then and then != numbers["test"]:
        numbers["test_before"] = then
        reason += f"; the test split is another than when version {before['challenger']} was promoted"
        log.warning("the test split is another than when version %s was promoted", before["challenger"])
    if not failed:
        fingerprint(config, ledger.at(config, registry, challenger, urls[challenger]), ours)
    return _decide(config, registry, "kept" if failed else "promoted", challenger, champion, reason, numbers)


def rollback(config: Config) -> dict:
    """Give the champion alias back to the version that had it before the last promotion."""
    registry = tracking.of(config)
    champion = registry.champion()
    decisions = sorted(tables.promotions(config.lake).rows(), key=lambda r: r["decided_at"], reverse=True)
    made = [r for r in decisions if (r["model_name"], r["action"], r["challenger"]) == (registry.model, "promoted", champion)]
    if not made or made[0]["champion"] is None:
        raise InputError(f"model {registry.model}: no champion before version {champion}, nothing to roll back to")
    before = made[0]["champion"]
    if before not in registry.versions():
        raise InputError(
            f"model {registry.model}: version {before}, the champion before {champion}, is not in the registry any more"
        )
    return _decide(config, registry, "rolled back", before, champion, f"rolled back from version {champion}", {})


def evaluate(config: Config, model_url: str, rows: list[dict]) -> list[dict]:
    """Scored rows of labelled volumes by the model at ``model_url``, as the score stage would score them; each (volume, label,
    model, settings) is computed once and kept."""
    table, model_digest = tables.evaluations(config.lake), common.model_digest(model_url)
    keys = _keys(config, model_url, rows)
    known = {r["key"]: r for r in table.rows() if r["key"] in keys}
    todo = [r for k, r in keys.items() if k not in known]
    if todo:
        scored, rejections = spark_score.predict(
            common.spark_of(config), todo, model_url, config.train.device, settings=config.score.numbers, imports=config.imports,
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


def _keys(config: Config, model_url: str, rows: list[dict]) -> dict[str, dict]:
    """Volume rows by their key in ``evaluations/``."""
    of_model = [common.model_digest(model_url), *common.judged_under(config, model_url)]
    return {digest([r["uid"], r["label_uid"], r["target"], *of_model])[:32]: r for r in rows}


def fingerprint(config: Config, of: ledger.Pinned, judged: list[dict] | None = None) -> list[dict]:
    """Rows of ``fingerprints/``: what the volumes that a version was judged on are like, and what it said about them.

    Made when the version is promoted, from ``judged``, its rows of the test split; of a version that has none under the present
    grouping, from those rows of ``evaluations/`` whose volumes are in the test split now. Kept for good: after a rollback it is
    there. Training volumes do not count, for of them a model is surer than of new ones.
    """
    table = tables.fingerprints(config.lake)
    name = digest(of.model_digest, config.groups, *common.judged_under(config, of.url))[:16]
    known = table.rows(pc.field("set") == name)
    if known:
        return known
    test = {r["uid"]: r for r in common.volume_rows(config) if r["split"] == "test"}
    if judged is None:
        keys = pa.array(sorted(_keys(config, of.url, list(test.values()))), pa.string())
        judged = tables.evaluations(config.lake).rows(pc.field("key").isin(keys))
    if not judged:
        return []
    groups = cohort.groups(list(test.values()), config, common.key_of(config)[0])
    found = drift.samples(
        (r["subject"], sources(groups[r["volume"]]), drift.figures(test[r["volume"]], r, config.classes)) for r in judged
    )
    facts = {
        "set": name,
        "model_name": of.registry.model,
        "model_version": of.version,
        "model_digest": of.model_digest,
        "test": _test_digest(list(test.values())),
        "made_at": datetime.datetime.now(datetime.UTC),
        **common.lineage(config, config.groups),
    }
    rows = []
    for (source, figure), values in found.items():
        sample = drift.Sample.of(values)
        lists = {"values": sample.values.tolist(), "edges": sample.edges.tolist()}
        rows.append({"source": source, "figure": figure, "subjects": len(values), **lists})
    for source, (refused, total) in arrivals.quarantined(config.lake, config.score.attempts).items():
        rows.append({"source": source, "figure": QUARANTINED, "values": [float(refused), float(total)], "edges": []})
    for r in rows:
        r |= facts | {"key": digest([name, r["source"], r["figure"]])[:32]}
    common.commit_once(table, rows, "fingerprint")
    if not of.is_ensemble:
        of.registry.note(of.version, "sparkmed.fingerprint", name)
    return rows


def sources(groups: dict[str, str]) -> list[str]:
    """As rows name them: ``modality=CT``."""
    return [f"{k}={v}" for k, v in groups.items()]


def _evaluated(config: Config, version: str, url: str, test: list[dict]) -> list[dict]:
    rows = evaluate(config, url, test)
    if not scoring.subject_scores(rows):
        raise common.StageFailed(f"version {version} has no score on the test split: its labels are empty")
    return rows


def _promoted(config: Config, registry: tracking.Registry) -> dict | None:
    """The last promotion."""
    rows = [r for r in tables.promotions(config.lake).rows() if (r["model_name"], r["action"]) == (registry.model, "promoted")]
    return max(rows, key=lambda r: r["decided_at"], default=None)


def _decision(config: Config, registry, challenger: str, champion: str | None, facts: dict) -> dict | None:
    """The decision that was made about these two versions under these gates, if one was; ``facts`` are the digests of the test
    split, of how it is grouped and of how both are scored, if otherwise than they were validated."""
    wanted = (registry.model, challenger, champion, digest(config.promote)[:16])
    for r in tables.promotions(config.lake).rows():
        if (r["model_name"], r["action"], r["champion"]) == (registry.model, "rolled back", challenger):
            return r | {"action": "kept", "reason": f"version {challenger} was rolled back: train another"}
        same = (r["model_name"], r["challenger"], r["champion"], r["config_digest"]) == wanted
        if same and r["action"] == "kept" and facts.items() <= json.loads(r["numbers"]).items():
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
