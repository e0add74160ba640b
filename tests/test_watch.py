"""Watching on lakes whose tables are written by hand, with a real MLflow store: no Spark takes part."""

import datetime
import json

import numpy as np
import pytest
import torch
import yaml

from sparkmed import cli, config, gates, pipeline, storage, tables, tracking
from sparkmed.config import Component, digest
from sparkmed.learning import metrics, networks
from sparkmed.learning.model import Model, ModelSpec
from sparkmed.pipeline import common
from sparkmed.rejection import InputError

NOW = datetime.datetime.now(datetime.UTC)
DAY = datetime.timedelta(days=1)
MODALITIES = ("CT", "MR")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """An MLflow store with two versions of a model, the first of them champion."""
    folder = tmp_path_factory.mktemp("store")
    settings = project(folder, folder / "lake")
    registry = tracking.of(settings)
    for seed in range(2):
        spec = ModelSpec(
            name="organs", task="segmentation", classes=settings.classes, in_channels=1, spatial_dims=3, window=(16, 16, 8),
            network=Component(name="UNet", channels=[4, 8], strides=[2]), preprocess=config.Preprocess(), seed=seed,
        )  # fmt: skip
        torch.manual_seed(seed)
        Model(spec, networks.build(spec.network, 1, 2, 3)).save(str(folder / "model"))
        with registry.run("by hand", {}, {}, {"name": "d", "version": "1", "digest": "0", "url": str(folder)}) as run:
            run.register(str(folder / "model"), {})
    registry.crown("1", "by hand")
    return folder


def project(folder, lake, **changes) -> config.Config:
    plain = {
        "name": "organs", "task": "segmentation", "classes": ["background", "liver"], "archive": str(folder / "archive"),
        "lake": str(lake), "tracking": {"uri": f"sqlite:///{folder}/ml.db"}, "identity": {"keep_subjects": True},
        "promote": {"resamples": 100},
    }  # fmt: skip
    return config.parse(plain | changes)


class Lake:
    """Volumes of subjects, their catalog rows and predictions, drawn from one distribution unless a shift says otherwise."""

    def __init__(self, settings):
        self.settings, self.count, self.rng = settings, 0, np.random.default_rng(5)
        registry = tracking.of(settings)
        urls = {v: registry.fetch(v, settings.lake) for v in ("1", "2")}
        self.digests = {v: common.model_digest(url) for v, url in urls.items()}
        self.scores_as = common.settings_digest(settings, urls["1"])

    def add(self, number, split=None, scored=True, shift=0.0, modality=None, age=0.01, refused=0):
        volumes, catalog, rows, quarantine = [], [], [], []
        for n in range(number):
            i = self.count
            self.count += 1
            kind = modality or MODALITIES[i % 2]
            uid, uri = f"u{i:04d}", f"file:///a/{i}"
            seen = NOW - age * DAY
            catalog.append(
                {"uri": uri, "container": uri, "run": 1, "format": "dicom", "kind": "image", "modality": kind, "header": "{}",
                 "series_uid": f"1.{i}",
                 "seen_at": seen, "file_mtime_ns": 0}
            )  # fmt: skip
            if n < refused:
                quarantine.append(
                    {"uri": uri, "container": uri, "stage": "volumes", "reason": "MISSING_SLICE", "refused_at": seen, "run": 1}
                )
                continue
            volumes.append(
                {"uid": uid, "subject": f"s{i:04d}", "split": split, "format": "dicom", "modality": kind, "header": "{}",
                 "sources": [uri], "source_paths": [str(i)],
                 "shape": [1, 64, 64, 32], "spacing": [1.0, 1.0, float(self.rng.normal(3, 0.2))],
                 "label_uid": f"l{i}" if split else None, "target": None}
            )  # fmt: skip
            if scored:
                values = np.sort(self.rng.normal(shift, 1, 5)).tolist()
                rows.append(self.row(uid, f"s{i:04d}", quantiles=values, ml=[100.0, float(self.rng.lognormal(shift))]))
        for table, content in (
            (tables.catalog(self.settings.lake), catalog),
            (tables.volumes(self.settings.lake), volumes),
            (tables.quarantine(self.settings.lake), quarantine),
        ):
            run = table.committed("catalog") or 0
            table.commit([table.write(content)] if content else [], None if run else ("catalog", 1))
        return rows

    def row(self, uid, subject, version="1", **facts) -> dict:
        lasting = {"seconds": 1.0, "device": "cpu", "scored_at": datetime.datetime.now(datetime.UTC)}
        made = {"key": f"{uid}-{version}", "volume": uid, "subject": subject, "model_name": "organs", "model_version": version}
        made |= {"model_digest": self.digests[version], "config_digest": self.scores_as, "probability": [0.9, 0.8]}
        return made | lasting | facts

    def score(self, rows):
        table = tables.predictions(self.settings.lake)
        table.commit([table.write(rows)])

    def judge(self, rows, version="1", dice=lambda n: 0.8, reliability=None, **facts):
        """As the promote stage would have it; it then finds the rows and scores nothing."""
        table, model = tables.evaluations(self.settings.lake), self.digests[version]
        judged = [
            r | {"key": digest([r["volume"], f"l{r['volume'][1:].lstrip('0') or 0}", None, model])[:32], "model_digest": model,
                 "score": [1.0, dice(n)], "split": "test", "reliability": reliability} | facts
            for n, r in enumerate(rows)
        ]  # fmt: skip
        table.commit([table.write(judged)])


@pytest.fixture
def lake(store, tmp_path):
    """Sixty subjects of the test split on which version 1, the champion, was judged."""
    made = Lake(project(store, tmp_path / "lake"))
    tracking.of(made.settings).crown("1", "by hand")
    made.judged = made.add(60, split="test", age=30)
    made.judge(made.judged)
    made.score([r | {"scored_at": NOW - 20 * DAY} for r in made.judged])
    return made


def watched(lake, *verdicts, **where):
    rows = [r for r in tables.watch(lake.settings.lake).rows() if all(r[k] == v for k, v in where.items())]
    return [r for r in rows if not verdicts or r["verdict"] in verdicts]


def test_like_volumes_are_fine_and_the_same_look_is_written_once(lake):
    lake.score(lake.add(60))
    outcome = pipeline.watch(lake.settings)
    assert (outcome["alarms"], outcome["drifted"], pipeline.status(outcome)) == ("none", 0, 0)
    assert outcome["figures"] == 2 * 10  # of two modalities: three of geometry, five of intensity, two of the liver
    before = tables.watch(lake.settings.lake).rows()
    assert pipeline.watch(lake.settings) == outcome and tables.watch(lake.settings.lake).rows() == before
    lake.score(lake.add(2))
    pipeline.watch(lake.settings)
    assert len(tables.watch(lake.settings.lake).rows()) == 2 * len(before)


def test_a_shift_of_one_modality_is_drift_of_that_one(lake):
    lake.score(lake.add(40, modality="CT") + lake.add(40, modality="MR", shift=1.5))
    outcome = pipeline.watch(lake.settings)
    assert (outcome["alarms"], pipeline.status(outcome)) == ("drift", 3)
    drifted = watched(lake, "drift", "unseen")
    assert {r["source"] for r in drifted} == {"modality=MR"} and "liver ml" in {r["figure"] for r in drifted}
    assert all(r["psi"] >= 0.25 and r["adjusted"] <= 0.01 and r["adjusted"] >= r["p"] for r in drifted)
    assert not any(isinstance(v, str) and v.startswith(("s0", "file:")) for r in watched(lake) for v in r.values())


def test_few_volumes_are_not_judged_and_those_trained_on_do_not_count(lake):
    lake.score(lake.add(30, shift=3) + lake.add(60, split="train", shift=3))
    assert pipeline.watch(lake.settings)["alarms"] == "none"
    assert {(r["verdict"], r["current"]) for r in watched(lake, check="drift")} == {("few", 15)}


def test_a_modality_that_the_champion_was_not_judged_on_is_said(lake):
    lake.score(lake.add(40) + lake.add(25, modality="PT"))
    assert pipeline.watch(lake.settings)["alarms"] == "drift"
    (row,) = watched(lake, "unseen")
    assert (row["source"], row["reference"], row["current"]) == ("modality=PT", 0, 25)


def test_a_champion_that_was_judged_on_nothing_is_compared_with_nothing(store, tmp_path):
    lake = Lake(project(store, tmp_path / "lake"))
    lake.score(lake.add(60))
    outcome = pipeline.watch(lake.settings)
    assert (outcome["alarms"], outcome["figures"]) == ("none", 0) and watched(lake, check="service")


def test_what_waits_too_long_is_backlog_and_what_is_parked_does_not_wait(lake):
    lake.score(lake.add(4))
    lake.add(3, scored=False, age=2)
    assert pipeline.watch(lake.settings)["alarms"] == "none"
    lake.add(1, scored=False, age=4)
    outcome = pipeline.watch(lake.settings)
    assert (outcome["backlog"], outcome["alarms"], pipeline.status(outcome)) == (4, "backlog", 4)
    (waits,) = watched(lake, "backlog")
    assert 4 <= waits["value"] < 4.1
    table = tables.quarantine(lake.settings.lake)
    parked = [
        {"uri": f"file:///a/{lake.count - 1}", "stage": "score", "reason": "CHANNELS", "key": "k", "refused_at": NOW, "run": 1}
    ]
    table.commit([table.write(parked)])
    assert (pipeline.watch(lake.settings)["backlog"], len(watched(lake, "backlog"))) == (3, 1)


def test_a_study_that_is_read_again_waits_as_long_as_it_did(lake):
    """A file that was touched, or that a new version of the reader reads, is as old as when it came."""
    lake.score(lake.add(4))
    lake.add(1, scored=False, age=0.1)
    seen = tables.seen(lake.settings.lake)
    seen.commit([seen.write([{"uid": f"u{lake.count - 1:04d}", "first_seen": NOW - 5 * DAY}])])
    assert pipeline.watch(lake.settings)["alarms"] == "backlog"


def test_volumes_per_hour_are_of_the_time_at_work(lake):
    """Two nights of 10 volumes, a volume in 6 minutes, within one day."""
    rows = lake.add(20)
    for n, row in enumerate(rows):
        night = NOW - (20 if n < 10 else 3) * DAY / 24
        moment = night + datetime.timedelta(minutes=6 * (n % 10))
        row |= {"scored_at": moment, "seconds": 360.0, "batch": f"{'first' if n < 10 else 'second'}/{n % 10 // 5}"}
    lake.score(rows)
    assert pipeline.watch(lake.settings)["per_hour"] == 10


def test_a_night_in_which_most_fails_is_said_however_large_the_archive_is(lake):
    lake.score(lake.add(10))
    lake.add(50, scored=False)
    table = tables.quarantine(lake.settings.lake)
    failed = [
        {"uri": f"file:///a/{n}", "stage": "score", "reason": "FAILED", "key": f"k{n}", "attempt": 1, "refused_at": NOW, "run": 1}
        for n in range(lake.count - 50, lake.count)
    ]
    table.commit([table.write(failed[:9])])
    assert pipeline.watch(lake.settings)["alarms"] == "none", "9 beside 10 are too few to be judged"
    table.commit([table.write(failed[9:])])
    outcome = pipeline.watch(lake.settings)
    assert (outcome["alarms"], pipeline.status(outcome)) == ("quarantine", 5)
    (row,) = watched(lake, "quarantine")
    assert (row["figure"], row["value"]) == ("share failed", 50 / 60)


def test_what_a_champion_said_under_other_settings_is_not_compared(lake):
    """A mask that is cleaned otherwise has another volume: that is no drift."""
    lake.score([r | {"config_digest": "other settings"} for r in lake.add(60, shift=3)])
    assert pipeline.watch(lake.settings)["figures"] == 0


def test_fewer_cells_than_the_champion_was_judged_on_are_drift(store, tmp_path):
    lake = Lake(project(store, tmp_path / "lake"))
    tracking.of(lake.settings).crown("1", "by hand")
    judged = [r | {"cells": 100 + n % 9} for n, r in enumerate(lake.add(60, split="test", age=30))]
    lake.judge(judged)
    lake.score([r | {"scored_at": NOW - 20 * DAY} for r in judged])
    lake.score([r | {"cells": 10 + n % 3} for n, r in enumerate(lake.add(60))])
    assert pipeline.watch(lake.settings)["alarms"] == "drift"
    assert {r["figure"] for r in watched(lake, "drift")} == {"cells"}


def test_another_champion_makes_no_backlog(lake):
    lake.score(lake.add(5, age=30))
    lake.judge(lake.judged, "2")
    tracking.of(lake.settings).crown("2", "by hand")
    outcome = pipeline.watch(lake.settings)
    assert (outcome["backlog"], outcome["alarms"]) == (0, "none")
    assert watched(lake, figure="volumes left to the champion")[0]["value"] == 65


def test_a_rise_in_quarantine_wins_over_drift(lake):
    pipeline.watch(lake.settings)  # keeps the fingerprint, with the share then
    lake.score(lake.add(80, shift=3, refused=0) + lake.add(40, modality="CT", refused=30))
    outcome = pipeline.watch(lake.settings)
    assert (outcome["alarms"], pipeline.status(outcome)) == ("drift, quarantine", 5)
    told = {r["source"]: (r["value"], r["current"], r["before"]) for r in watched(lake, "quarantine")}
    assert told == {"all": (30 / 120, 120, 0.0), "modality=CT": (30 / 80, 80, 0.0)}


def gated(lake, **promote):
    return lake.settings.model_copy(update={"promote": lake.settings.promote.model_copy(update=promote)})


def decisions(lake):
    rows = sorted(tables.promotions(lake.settings.lake).rows(), key=lambda r: r["decided_at"])
    return [r | {"numbers": json.loads(r["numbers"])} for r in rows]


def test_every_gate_is_written_down_and_one_that_fails_keeps_the_champion(lake):
    sure = metrics.reliability(np.full(50, 0.99), np.arange(50) % 2 == 0)  # half of them wrong
    lake.judge(lake.judged, "2", lambda n: 0.95, reliability=sure, seconds=3.0)
    strict = gated(lake, minimum=0.5, max_ece=0.2, max_slowdown=2.0, max_seconds=100.0, group_minimum=0.7)
    kept = pipeline.promote(strict)
    assert kept["action"] == "kept" and "calibration error 0.4900" in kept["reason"] and "3 times the seconds" in kept["reason"]
    (row,) = decisions(lake)
    passed = {g["gate"]: g["passed"] for g in row["numbers"]["gates"]}
    groups = {"group modality=CT": True, "group modality=MR": True}
    assert passed == {"metric": True, "comparison": True, "ece": False, "seconds": True, "slowdown": False, **groups}
    assert row["numbers"]["difference"] == pytest.approx(0.15) and row["numbers"]["slowdown"] == 3
    assert pipeline.promote(strict)["action"] == "kept" and len(decisions(lake)) == 1


def test_a_group_that_falls_below_the_floor_and_one_that_is_too_small(lake):
    def dice(n):
        return 0.2 if n % 4 == 1 else 1.0

    lake.judge(lake.judged, "2", dice)
    sites = {f"s{n:04d}": "B" if n % 4 == 1 else "C" if n < 8 else "A" for n in range(0, 58)}
    path = storage.local_path(lake.settings.lake).parent / "groups.csv"
    path.write_text("subject,site\n" + "\n".join(f"{s},{site}" for s, site in sites.items()))
    by_site = gated(lake, group_minimum=0.5, margin=-1.0)
    by_site = by_site.model_copy(update={"groups": config.Groups(by=["site"], csv=str(path))})
    kept = pipeline.promote(by_site)
    assert kept["action"] == "kept" and "of site=B, wanted at least 0.5" in kept["reason"]
    assert "6 test subjects of site=C, too few to judge" in kept["reason"]
    numbers = decisions(lake)[-1]["numbers"]
    assert {k: v["subjects"] for k, v in numbers["groups"].items()} == {"site=A": 37, "site=B": 15, "site=C": 6}
    groups = {r["volume"]: {"site": "D" if n < 3 else "A"} for n, r in enumerate(lake.judged)}
    read = [r | {"score": [1.0, 0.8], "seconds": 1.0, "device": "cpu"} for r in lake.judged[3:]]
    judged, _ = gates.judge(by_site.promote, read, None, None, groups, {}, 0)
    (lost,) = (g for g in judged if g.gate == "group site=D")
    assert (lost.passed, lost.wanted) == (None, 0.5) and "no test subject of site=D has a score" in lost.says
    path.write_text("subject,place\n1,A")
    with pytest.raises(InputError, match="wanted columns site and path or subject"):
        pipeline.promote(by_site)
    path.write_text("subject,site\n" + "\n".join(f"s{n:04d},{n}" for n in range(65)))
    with pytest.raises(InputError, match="column site has 65 values"):
        pipeline.promote(by_site)


def test_the_fingerprint_stays_with_the_champion_and_rollback_takes_one_step(lake):
    lake.judge(lake.judged, "2", lambda n: 0.95)
    pipeline.watch(lake.settings)
    assert pipeline.promote(lake.settings)["champion"] == "2"
    table = tables.fingerprints(lake.settings.lake)
    by_version = {v: [r for r in table.rows() if r["model_version"] == v] for v in ("1", "2")}
    assert len(by_version["1"]) == len(by_version["2"]) == 2 * 10 + 3
    assert tracking.of(lake.settings).version_facts("2")["sparkmed.fingerprint"] == by_version["2"][0]["set"]
    assert pipeline.rollback(lake.settings)["champion"] == "1"
    with pytest.raises(InputError, match="nothing to roll back to"):
        pipeline.rollback(lake.settings)
    assert "was rolled back" in pipeline.promote(lake.settings)["reason"]
    lake.score(lake.add(60, shift=2))
    volumes = tables.volumes(lake.settings.lake)
    left = [r for r in volumes.rows() if not r["split"]]  # the test split is gone from the archive
    volumes.commit([volumes.write(left)], replace=volumes.paths())
    assert pipeline.watch(lake.settings)["alarms"] == "drift"
    assert {r["model_version"] for r in watched(lake, "drift")} == {"1"} and len(table.rows()) == 46


def test_a_changed_test_split_is_said(lake):
    lake.judge(lake.judged, "2", lambda n: 0.95)
    assert "another than" not in pipeline.promote(lake.settings)["reason"]
    registry = tracking.of(lake.settings)
    registry.crown("1", "by hand")
    lake.judge(lake.judged, "1")
    new = lake.add(2, split="test")
    lake.judge(new, "1")
    lake.judge(new, "2")
    assert "the test split is another than when version 2 was promoted" in pipeline.promote(lake.settings)["reason"]
    first, second = (d["numbers"] for d in decisions(lake))
    assert second["test_before"] == first["test"] != second["test"]


def test_the_command_line_hands_the_alarm_on(lake, capsys):
    lake.score(lake.add(60, shift=3))
    path = storage.local_path(lake.settings.lake).parent / "project.yaml"
    path.write_text(yaml.safe_dump(lake.settings.model_dump(mode="json", exclude_defaults=True)))
    assert cli.main(["watch", str(path)]) == 3
    assert "alarms drift" in capsys.readouterr().out
    assert cli.main(["watch", str(path), "watch.alpha=1e-30"]) == 0
    assert cli.main(["watch", str(path), "classes=[background, liver, spleen]"]) == 2
    assert "predicts ['background', 'liver']" in capsys.readouterr().err


def test_what_came_last_is_looked_at_while_a_backfill_goes_on(lake):
    new = lake.add(40, shift=3)
    old = lake.add(60, age=300)
    lake.score([r | {"scored_at": NOW - DAY} for r in new] + old)
    seen = tables.seen(lake.settings.lake)
    days = [(r, 1) for r in new] + [(r, 300) for r in old]
    seen.commit([seen.write([{"uid": r["volume"], "first_seen": NOW - age * DAY} for r, age in days])])
    small = lake.settings.model_copy(update={"watch": lake.settings.watch.model_copy(update={"window": 40})})
    assert pipeline.watch(small)["alarms"] == "drift"


def test_no_rollback_to_a_version_that_is_gone(lake):
    lake.judge(lake.judged, "2", lambda n: 0.95)
    assert pipeline.promote(lake.settings)["champion"] == "2"
    registry = tracking.of(lake.settings)
    before, there = decisions(lake), tracking.Registry.versions
    with pytest.MonkeyPatch.context() as patched:  # the store is that of other tests
        patched.setattr(tracking.Registry, "versions", lambda self: there(self) - {"1"})
        with pytest.raises(InputError, match="version 1, the champion before 2, is not in the registry any more"):
            pipeline.rollback(lake.settings)
    assert decisions(lake) == before and registry.champion() == "2"


def test_a_challenger_is_compared_on_the_volumes_that_both_could_read(lake):
    subject = {r["volume"]: "twice" for r in lake.judged[:2]}  # two volumes of one
    rows = [r | {"subject": subject.get(r["volume"], r["subject"])} for r in lake.judged]
    ours = [r | {"score": [1.0, 0.8], "device": "cpu"} for r in rows if r is not rows[1]]
    theirs = [r | {"score": [1.0, 0.2 if n == 1 else 0.8], "device": "cpu"} for n, r in enumerate(rows)]
    (_, comparison, *_), numbers = gates.judge(lake.settings.promote, ours, theirs, "1", {}, {}, 0)
    assert (comparison.passed, numbers["difference"]) == (False, 0.0)
