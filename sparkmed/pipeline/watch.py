"""Whether new volumes are like those that the champion was judged on, whether they are scored, and how fast."""

import datetime
import logging
import statistics
from collections.abc import Iterable, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sparkmed import arrivals, cohort, drift, scoring, tables
from sparkmed.config import Config, digest
from sparkmed.pipeline import common, ledger
from sparkmed.pipeline.promotion import QUARANTINED, evaluate, fingerprint, sources

log = logging.getLogger("sparkmed")
DAY = datetime.timedelta(days=1)
STATUS = {"drift": 3, "backlog": 4, "quarantine": 5}
"""Exit status by alarm. Of several the largest: studies that are refused come before those that wait, and those before drift."""


def watch(config: Config, champion: ledger.Pinned | None = None) -> dict:
    """Compare what came last with the fingerprint of the model that scores, the champion or the ensemble, count what is in
    quarantine and what waits; one row per figure. ``champion`` is the one that a run has pinned.

    A model that was not judged as it scores now, such as an ensemble or one under other settings, is judged first. A look that
    finds what the last one found writes nothing. Raises :class:`InputError` without a champion.
    """
    champion = champion or ledger.pinned(config)
    now = datetime.datetime.now(datetime.UTC)
    volumes = common.volume_rows(config)
    kept = _kept(config, champion, volumes)
    findings = _drift(config, kept, volumes, champion)
    shares = _quarantine(config, kept, now)
    service = _service(config, champion, volumes, now)
    rows = [*findings, *shares, *service]
    alarms = {name: sum(r["verdict"] in verdicts for r in rows) for name, verdicts in _VERDICTS.items()}
    told = [name for name in STATUS if alarms[name]]
    for r in rows:
        if r["verdict"] not in ("fine", "few"):
            log.warning("watch: %s", sentence(r))
    model = {"model_name": champion.registry.model, "model_version": champion.version, "model_digest": champion.model_digest}
    _keep(config, rows, model, now)
    judged = sum(r["verdict"] != "few" for r in findings)
    by_figure = {r["figure"]: r["value"] for r in service}
    return {
        "figures": judged,
        "drifted": alarms["drift"],
        "backlog": int(by_figure["backlog volumes"]),
        "per_hour": by_figure.get("volumes per hour") and round(by_figure["volumes per hour"], 1),
        "alarms": ", ".join(told) or "none",
    }


_VERDICTS = {"drift": ("drift", "unseen"), "backlog": ("backlog",), "quarantine": ("quarantine",)}


def status(outcome: Mapping) -> int:
    """Exit status of what :func:`watch` said.

    >>> status({"alarms": "none"}), status({"alarms": "drift, backlog"}), status({})
    (0, 4, 0)
    """
    return max((STATUS[a] for a in outcome.get("alarms", "none").split(", ") if a in STATUS), default=0)


def sentence(row: Mapping) -> str:
    """A row of ``watch/`` in words."""
    if row["check"] == "drift" and row["verdict"] == "unseen":
        return f"{row['current']} new subjects of {row['source']}, and the champion was judged on none"
    if row["check"] == "drift":
        return (
            f"{row['figure']} of {row['source']} drifted: median {row['before']:.4g} then, {row['value']:.4g} now; PSI "
            f"{row['psi']:.2f}, Kolmogorov-Smirnov {row['ks']:.2f} (p {row['adjusted']:.2g} after Holm), "
            f"{row['current']} new subjects"
        )
    if row["check"] == "quarantine":
        return (
            f"{row['value']:.0%} of {row['current']} new volumes and files of {row['source']} are in quarantine, "
            f"{row['before']:.0%} when the champion was chosen"
        )
    return f"{row['figure']} is {row['value']:.3g}"


def _row(check: str, source: str, figure: str, value: float | None, verdict: str = "fine", **facts) -> dict:
    return {"check": check, "source": source, "figure": figure, "value": value, "verdict": verdict, **facts}


def _kept(config: Config, champion: ledger.Pinned, volumes: list[dict]) -> list[dict]:
    """The fingerprint of the model under the settings that it scores with; empty where there is no test split to judge it by."""
    kept = fingerprint(config, champion)
    test = [r for r in volumes if r["split"] == "test"]
    if kept or not test:
        return kept
    log.warning("version %s was not judged as it scores now: it is, on %d test volumes", champion.version, len(test))
    try:
        judged = evaluate(config, champion.url, test)
    except common.StageFailed as e:
        log.warning("version %s is compared with nothing: %s", champion.version, e)
        return []
    scores = scoring.subject_scores(judged)
    if scores:
        log.warning("version %s: mean %.4f over %d test subjects", champion.version, statistics.fmean(scores.values()), len(scores))
    return fingerprint(config, champion, judged)


def _drift(config: Config, kept: list[dict], volumes: list[dict], champion: ledger.Pinned) -> list[dict]:
    reference = {(r["source"], r["figure"]): _sample(r) for r in kept if r["figure"] != QUARANTINED}
    if not reference:
        return []
    new = _newest(config, volumes, champion)
    rows = {r["uid"]: r for r in volumes if r["uid"] in new}
    groups = cohort.groups(list(rows.values()), config, common.key_of(config)[0])
    current = drift.samples(
        (p["subject"], sources(groups[u]), drift.figures(rows[u], p, config.classes)) for u, p in sorted(new.items())
    )
    settings = config.watch
    found = []
    for f in drift.compare(reference, current, settings.minimum, settings.psi, settings.alpha):
        then, here = reference.get((f.source, f.figure)), current.get((f.source, f.figure))
        facts = {k: getattr(f, k) for k in ("reference", "current", "psi", "chance", "ks", "p", "adjusted")}
        facts["before"] = statistics.median(then.values.tolist()) if then else None
        found.append(_row("drift", f.source, f.figure, statistics.median(here) if here else None, f.verdict, **facts))
    return found


def _sample(row: dict) -> drift.Sample:
    return drift.Sample(np.array(row["values"]), np.array(row["edges"]))


def _newest(config: Config, volumes: list[dict], champion: ledger.Pinned) -> dict[str, dict]:
    """By uid the champion's predictions, as it scores now, of the volumes that came last, of those that it was neither trained nor
    judged on.

    Not of those that it scored last: a backfill ends every night with the oldest ones, for weeks.
    """
    of_model = pc.field("model_digest") == champion.model_digest
    judged = tables.evaluations(config.lake).read(["volume"], of_model)["volume"].to_pylist()
    known = {r["uid"] for r in volumes if r["split"] not in ("train", "val")} - set(judged)
    table, mine = tables.predictions(config.lake), of_model & (pc.field("config_digest") == champion.settings)
    light = table.read(["volume", "scored_at"], mine).to_pylist()
    last = {r["volume"]: r["scored_at"] for r in sorted(light, key=lambda r: r["scored_at"]) if r["volume"] in known}
    came = last | {u: moment for u, moment in arrivals.remembered(config.lake).items() if u in last}
    chosen = sorted(last, key=lambda u: (came[u], last[u], u))[-config.watch.window :]
    columns = ["volume", "subject", "ml", "probability", "quantiles", "cells", "scored_at"]
    rows = table.read(columns, mine & pc.field("volume").isin(pa.array(chosen, pa.string()))).to_pylist()
    return {r["volume"]: r for r in sorted(rows, key=lambda r: r["scored_at"])}


def _quarantine(config: Config, kept: list[dict], now: datetime.datetime) -> list[dict]:
    settings = config.watch
    then = {r["source"]: (int(r["values"][0]), int(r["values"][1])) for r in kept if r["figure"] == QUARANTINED}
    arrived = arrivals.quarantined(config.lake, config.score.attempts, now - settings.quarantine_days * DAY)
    found = []
    for source, (refused, total) in arrived.items():
        before = then.get(source, (0, 0))
        verdict = "few"
        if total >= settings.minimum:
            up = drift.risen(before, (refused, total), settings.quarantine_rise, settings.alpha / len(arrived))
            verdict = "quarantine" if up else "fine"
        share = before[0] / before[1] if before[1] else 0.0
        facts = {"reference": before[1], "current": total, "before": share}
        found.append(_row("quarantine", source, QUARANTINED, refused / total, verdict, **facts))
    return found


def _service(config: Config, champion: ledger.Pinned, volumes: list[dict], now: datetime.datetime) -> list[dict]:
    """How many volumes no version has scored and how long the oldest of them waits, what the champion has still to score, and of
    the last 24 hours how many were scored an hour at work, how long one took, and which share failed. What is in quarantine
    does not wait."""
    columns = ["volume", "model_name", "model_digest", "scored_at", "seconds", "batch"]
    done = tables.predictions(config.lake).read(columns).to_pylist()
    done = [r for r in done if r["model_name"] == champion.registry.model]
    columns = ["uri", "stage", "reason", "key", "refused_at", "attempt"]
    kept_out = tables.quarantine(config.lake).read(columns, pc.field("stage") == "score").to_pylist()
    held = arrivals.parked(kept_out, config.score.attempts)
    by_any, by_champion = {r["volume"] for r in done}, {r["volume"] for r in done if r["model_digest"] == champion.model_digest}
    free = [r for r in volumes if r["uid"] in by_any or not held & set(r["sources"])]
    waiting = [r for r in free if r["uid"] not in by_any]
    found = [_row("service", arrivals.ALL, "backlog volumes", float(len(waiting)))]
    if waiting:
        seen = arrivals.first_seen(config.lake, waiting) | arrivals.remembered(config.lake)
        days = max(((now - seen[r["uid"]]) / DAY for r in waiting if r["uid"] in seen), default=0.0)
        verdict = "backlog" if days > config.watch.backlog_days else "fine"
        found.append(_row("service", arrivals.ALL, "days that the oldest unscored volume waits", days, verdict))
    left = sum(r["uid"] not in by_champion for r in free)
    found.append(_row("service", arrivals.ALL, "volumes left to the champion", float(left)))
    today = [r for r in done if r["scored_at"] > now - DAY]
    failed = {r["uri"] for r in kept_out if r["refused_at"] > now - DAY and r["attempt"] != 0}
    if today:
        found.append(_row("service", arrivals.ALL, "volumes per hour", 3600 * len(today) / _seconds_at_work(today)))
        found.append(_row("service", arrivals.ALL, "seconds per volume", statistics.median(r["seconds"] for r in today)))
    broken = sum(bool(failed & set(r["sources"])) for r in volumes) if failed else 0
    if today or broken:
        share, enough = broken / (broken + len(today)), broken + len(today) >= config.watch.minimum
        verdict = "quarantine" if enough and share > config.score.max_refused else "fine"
        found.append(_row("service", arrivals.ALL, "share failed", share, verdict))
    return found


def _seconds_at_work(scored: list[dict]) -> float:
    """How long the runs that scored these volumes were at it, the pauses between runs left out."""
    runs: dict[str, list[dict]] = {}
    for r in sorted(scored, key=lambda r: r["scored_at"]):
        runs.setdefault((r["batch"] or "").partition("/")[0], []).append(r)
    return sum((of[-1]["scored_at"] - of[0]["scored_at"]).total_seconds() + of[0]["seconds"] for of in runs.values())


def _keep(config: Config, rows: Iterable[dict], model: dict, now: datetime.datetime):
    """Commit the rows of this look, unless the last one was of the same: what only grows with the clock is no news, a wait is."""
    table = tables.watch(config.lake)
    passing = ("volumes per hour", "seconds per volume", "share failed")
    news = [r for r in rows if r["figure"] not in passing or r["verdict"] != "fine"]
    told = sorted([r["check"], r["source"], r["figure"], repr(r["value"]), r["verdict"]] for r in news)
    lineage = common.lineage(config, config.watch, config.groups)
    inputs = digest(told, model, lineage["config_digest"])[:16]
    past = table.read(["inputs", "watched_at"]).to_pylist()
    if past and max(past, key=lambda r: r["watched_at"])["inputs"] == inputs:
        return
    table.commit([table.write([r | model | lineage | {"inputs": inputs, "watched_at": now} for r in rows])])
