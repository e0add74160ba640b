"""Whether new volumes are like those that the champion was judged on, whether they are scored, and how fast."""

import datetime
import logging
import statistics
from collections.abc import Iterable, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sparkmed import arrivals, cohort, drift, tables, tracking
from sparkmed.config import Config, digest
from sparkmed.learning import model as models
from sparkmed.pipeline import common
from sparkmed.pipeline.promotion import QUARANTINED, fingerprint, sources
from sparkmed.rejection import InputError

log = logging.getLogger("sparkmed")
DAY = datetime.timedelta(days=1)
STATUS = {"drift": 3, "backlog": 4, "quarantine": 5}
"""Exit status by alarm. Of several the largest: studies that are refused come before those that wait, and those before drift."""


def watch(config: Config) -> dict:
    """Compare what came last with the fingerprint of the champion, count what is in quarantine and what waits; one row per figure.

    A look that finds what the last one found writes nothing. Raises :class:`InputError` without a champion.
    """
    registry = tracking.of(config)
    registry.check()
    version = registry.champion()
    if version is None:
        raise InputError(f"model {registry.model} has no champion: no version has passed the promote stage")
    url = registry.fetch(version, config.lake)
    common.require_classes(config, models.read_spec(url), f"version {version} of model {registry.model}")
    model_digest = common.model_digest(url)
    now = datetime.datetime.now(datetime.UTC)
    volumes = common.volume_rows(config)
    kept = fingerprint(config, registry, version)
    findings = _drift(config, kept, volumes, model_digest)
    shares = _quarantine(config, kept, now)
    service = _service(config, registry.model, model_digest, volumes, now)
    rows = [*findings, *shares, *service]
    alarms = {name: sum(r["verdict"] in verdicts for r in rows) for name, verdicts in _VERDICTS.items()}
    told = [name for name in STATUS if alarms[name]]
    for r in rows:
        if r["verdict"] not in ("fine", "few"):
            log.warning("watch: %s", sentence(r))
    _keep(config, rows, {"model_name": registry.model, "model_version": version, "model_digest": model_digest}, now)
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


def _drift(config: Config, kept: list[dict], volumes: list[dict], model_digest: str) -> list[dict]:
    reference = {(r["source"], r["figure"]): _sample(r) for r in kept if r["figure"] != QUARANTINED}
    if not reference:
        return []
    new = _newest(config, volumes, model_digest)
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


def _newest(config: Config, volumes: list[dict], model_digest: str) -> dict[str, dict]:
    """By uid the champion's predictions of the volumes that came last, of those that it was neither trained nor judged on.

    Not of those that it scored last: a backfill ends every night with the oldest ones, for weeks.
    """
    judged = tables.evaluations(config.lake).read(["volume"], pc.field("model_digest") == model_digest)["volume"].to_pylist()
    known = {r["uid"] for r in volumes if r["split"] not in ("train", "val")} - set(judged)
    ledger = tables.predictions(config.lake)
    light = ledger.read(["volume", "scored_at"], pc.field("model_digest") == model_digest).to_pylist()
    last = {r["volume"]: r["scored_at"] for r in sorted(light, key=lambda r: r["scored_at"]) if r["volume"] in known}
    seen = tables.seen(config.lake).read(["uid", "first_seen"]).to_pydict()
    came = last | {u: moment for u, moment in zip(seen["uid"], seen["first_seen"], strict=True) if u in last}
    chosen = sorted(last, key=lambda u: (came[u], last[u], u))[-config.watch.window :]
    columns = ["volume", "subject", "ml", "probability", "quantiles", "scored_at"]
    theirs = (pc.field("model_digest") == model_digest) & pc.field("volume").isin(pa.array(chosen, pa.string()))
    rows = ledger.read(columns, theirs).to_pylist()
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


def _service(config: Config, model: str, model_digest: str, volumes: list[dict], now: datetime.datetime) -> list[dict]:
    """How many volumes no version has scored and how long the oldest of them waits, what the champion has still to score, and of
    the last 24 hours how many were scored an hour at work, how long one took, and which share failed. What is in quarantine
    does not wait."""
    done = tables.predictions(config.lake).read(["volume", "model_name", "model_digest", "scored_at", "seconds"]).to_pylist()
    done = [r for r in done if r["model_name"] == model]
    columns = ["uri", "stage", "reason", "key", "refused_at", "attempt"]
    kept_out = tables.quarantine(config.lake).read(columns, pc.field("stage") == "score").to_pylist()
    held = arrivals.parked(kept_out, config.score.attempts)
    by_any, by_champion = {r["volume"] for r in done}, {r["volume"] for r in done if r["model_digest"] == model_digest}
    free = [r for r in volumes if r["uid"] in by_any or not held & set(r["sources"])]
    waiting = [r for r in free if r["uid"] not in by_any]
    found = [_row("service", arrivals.ALL, "backlog volumes", float(len(waiting)))]
    if waiting:
        seen = arrivals.first_seen(config.lake, waiting)
        days = max(((now - moment) / DAY for moment in seen.values()), default=0.0)
        verdict = "backlog" if days > config.watch.backlog_days else "fine"
        found.append(_row("service", arrivals.ALL, "days that the oldest unscored volume waits", days, verdict))
    left = sum(r["uid"] not in by_champion for r in free)
    found.append(_row("service", arrivals.ALL, "volumes left to the champion", float(left)))
    today = [r for r in done if r["scored_at"] > now - DAY]
    failed = {r["uri"] for r in kept_out if r["refused_at"] > now - DAY and r["attempt"] != 0}
    if today:
        hours = (max(r["scored_at"] for r in today) - min(r["scored_at"] for r in today)) / datetime.timedelta(hours=1)
        first = min(today, key=lambda r: r["scored_at"])
        rate = len(today) / (hours + first["seconds"] / 3600)
        found.append(_row("service", arrivals.ALL, "volumes per hour", rate))
        found.append(_row("service", arrivals.ALL, "seconds per volume", statistics.median(r["seconds"] for r in today)))
    broken = sum(bool(failed & set(r["sources"])) for r in volumes) if failed else 0
    if today or broken:
        found.append(_row("service", arrivals.ALL, "share failed", broken / (broken + len(today))))
    return found


def _keep(config: Config, rows: Iterable[dict], model: dict, now: datetime.datetime):
    """Commit the rows of this look, unless the last one was of the same: what only grows with the clock is no news, a wait is."""
    table = tables.watch(config.lake)
    passing = ("volumes per hour", "seconds per volume", "share failed")
    news = [r for r in rows if r["figure"] not in passing]
    told = sorted([r["check"], r["source"], r["figure"], repr(r["value"]), r["verdict"]] for r in news)
    lineage = common.lineage(config, config.watch, config.groups)
    inputs = digest(told, model, lineage["config_digest"])[:16]
    past = table.read(["inputs", "watched_at"]).to_pylist()
    if past and max(past, key=lambda r: r["watched_at"])["inputs"] == inputs:
        return
    table.commit([table.write([r | model | lineage | {"inputs": inputs, "watched_at": now} for r in rows])])
