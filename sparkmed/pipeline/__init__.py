"""The verbs: each reads a table, applies a step, writes a table. Running one twice does nothing twice.

A verb returns a dictionary of what it did; :func:`run` does all of them.
"""

import logging
import time
from collections.abc import Callable

from sparkmed import cohort, tracking
from sparkmed.config import Config
from sparkmed.pipeline import common, data, ledger, promotion
from sparkmed.pipeline.common import StageFailed
from sparkmed.pipeline.data import catalog, deidentify, patches, volumes
from sparkmed.pipeline.ledger import current
from sparkmed.pipeline.nightly import score, seg_folder
from sparkmed.pipeline.promotion import rollback
from sparkmed.pipeline.screen import screen
from sparkmed.pipeline.training import train
from sparkmed.pipeline.vacuum import vacuum
from sparkmed.pipeline.watch import status, watch
from sparkmed.rejection import InputError
from sparkmed.training import launch

__all__ = [
    "STAGES", "StageFailed", "catalog", "check", "current", "deidentify", "make_report", "patches", "promote", "rollback", "run",
    "run_stage", "score", "screen", "status", "train", "vacuum", "volumes", "watch",
]  # fmt: skip

log = logging.getLogger("sparkmed")


def promote(config: Config) -> dict:
    """Choose the champion; of a new one, what it will score from now on, and in how many nights."""
    outcome = promotion.promote(config)
    return outcome | (ledger.outlook(config) if outcome["action"] == "promoted" else {})


def make_report(config: Config) -> dict:
    """One HTML page about all of the above."""
    from sparkmed import report  # and matplotlib, which most verbs do without

    registry = tracking.of(config)
    registry.check()
    common.require_same_classes(config, registry, registry.latest(), registry.champion())
    config = common.pinned(config)
    url = report.write(config, registry)
    return {"report": url}


def grouping(config: Config):
    """Raise :class:`InputError` unless the table of groups can be read."""
    cohort.groups([], config, None)


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
    """All stages in order, and between score and report what a screen answers; what each did. Every stage finds what is done
    already and leaves it."""
    problems = check(config)
    if problems:
        raise InputError("; ".join(problems))
    names = [n for name in STAGES for n in (["screen", name] if name == "report" and config.plates else [name])]
    return {name: run_stage(name, config, tell) for name in names}


def run_stage(name: str, config: Config, tell: Callable[[str], None] = log.info) -> dict:
    started = time.monotonic()
    outcome = (STAGES | {"screen": screen, "watch": watch})[name](config)
    tell(f"{name:8s} {time.monotonic() - started:6.1f} s  " + ", ".join(f"{k} {v}" for k, v in outcome.items() if v is not None))
    return outcome


def check(config: Config, deep: bool = False) -> list[str]:
    """What would fail, before it does; an empty list when nothing is known to.

    ``deep`` also reads the headers of the archive and every label, as the first two stages would, and keeps nothing of it.
    """
    problems = []

    def attempt(step: Callable):
        try:
            step()
        except (InputError, StageFailed) as e:
            problems.append(str(e))

    tracked = [lambda c: tracking.of(c).check(), launch.check]
    tables = (data.patterns, grouping, cohort.cells)
    for step in (data.archive_is_there, *tables, seg_folder, common.key_of, *tracked, common.pinned, common.slots):
        attempt(lambda step=step: step(config))
    if deep and not problems:
        attempt(lambda: data.rehearse(config))
    return problems
