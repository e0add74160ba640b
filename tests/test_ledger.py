"""Which volumes are scored, once, and where a number comes from; with real Spark, real MLflow, and a model of random weights."""

import csv
import datetime
import io
import json
import os
import shutil
import signal
import time

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from archives import CLASSES, ct_pairs

from sparkmed import cli, config, lease, pipeline, scoring, storage, tables, tracking
from sparkmed.learning import networks
from sparkmed.learning.model import DatasetReference, Model, ModelSpec
from sparkmed.pipeline import common, ledger
from sparkmed.rejection import InputError
from sparkmed.spark import catalog as spark_catalog
from sparkmed.spark import score as spark_score

pytestmark = pytest.mark.engine
DAY = datetime.timedelta(days=1)


def settings_of(folder, **score) -> config.Config:
    plain = {
        "name": "nightly", "task": "segmentation", "classes": list(CLASSES), "archive": str((folder / "archive").resolve()),
        "lake": str(folder / "lake"), "identity": {"keep_subjects": True},
        "volumes": {"images": "img/{subject}.nii.gz", "labels": {"allow_missing": True}},
        "score": {"max_refused": 1.0, **score}, "train": {"device": "cpu"},
    }  # fmt: skip
    (folder / "project.yaml").write_text(yaml.safe_dump(plain))
    return config.parse(plain)


def crown(settings, folder, seed: int) -> str:
    """Make a model of random weights the champion; its version."""
    spec = ModelSpec(
        name="nightly", task="segmentation", classes=CLASSES, in_channels=1, spatial_dims=3, window=(8, 8, 8), seed=seed,
        network=config.Component(name="UNet", channels=[2, 4], strides=[2]), preprocess=config.Preprocess(),
        dataset=DatasetReference(name="nightly", version="cafe", digest=f"digest of the training data {seed}"),
    )  # fmt: skip
    torch.manual_seed(seed)
    where = str(folder / f"model-{seed}")
    Model(spec, networks.build(spec.network, 1, len(CLASSES), 3)).save(where)
    registry = tracking.of(settings)
    with registry.run("by hand", {}, {}, {"name": "d", "version": "1", "digest": "0", "url": str(folder)}) as run:
        version = run.register(where, {"sparkmed.training": f"training {seed}"})
    registry.crown(version, "by hand")
    return version


def volumes_of(settings):
    pipeline.catalog(settings)
    pipeline.volumes(settings)


def rows_of(settings) -> list[dict]:
    return tables.predictions(settings.lake).rows()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, spark):
    """Six volumes and a champion, nothing scored."""
    folder = tmp_path_factory.mktemp("prepared")
    ct_pairs(folder / "archive", 6, (8, 8, 8))
    settings = settings_of(folder)
    volumes_of(settings)
    crown(settings, folder, 1)
    ledger.pinned(settings)  # the model is in the lake
    shutil.copytree(folder / "archive", folder / "pristine")
    return folder


@pytest.fixture
def project(prepared, tmp_path):
    """A lake of the test's own, and the one archive, as it was."""
    shutil.rmtree(prepared / "archive")
    shutil.copytree(prepared / "pristine", prepared / "archive")
    shutil.copytree(prepared / "lake", tmp_path / "lake")
    (tmp_path / "archive").symlink_to(prepared / "archive")
    settings_of(tmp_path)
    return tmp_path


def test_executors_write_rows_and_the_driver_commits_their_names(project):
    settings = settings_of(project, commit_every=4)
    counts = {"scored": 6, "before": 0, "refused": 0, "parked": 0, "waiting": 0}
    assert pipeline.score(settings) == {"version": "1", **counts, "alarms": "none"}
    assert pipeline.score(settings)["before"] == 6
    rows, table = rows_of(settings), tables.predictions(settings.lake)
    champion = ledger.pinned(settings)
    assert {r["key"] for r in rows} == {champion.key(r["uid"]) for r in tables.volumes(settings.lake).rows()} and len(rows) == 6
    for r in rows:
        assert r["key"] == scoring.key(r["volume"], r["model_digest"], r["config_digest"])
        assert (r["model_name"], r["model_version"], r["dataset_digest"]) == ("nightly", "1", "digest of the training data 1")
        assert r["model_run"] == champion.registry.version_facts("1")["run_id"]
        assert r["code_version"] == common.code_version() and r["device"] == "cpu" and r["scored_at"]
        assert r["mask"].split("/")[3] == f"1-{r['model_digest'][:8]}", "of another model under this version a mask stays"
        assert "img/" not in str(r) and settings.archive not in str(r), "sources are named in volumes/ alone"
    assert {r["batch"].rpartition("/")[2] for r in rows} == {"0", "1"} and len({r["batch"].partition("/")[0] for r in rows}) == 1
    assert len(table.paths()) > 2, "a file for each task"
    assert table.committed("score") == 2, "a commit for each batch"
    assert not storage.exists(lease.url(settings.lake, "score"))


def test_a_rival_who_scored_the_same_adds_nothing(project):
    settings, table = settings_of(project), tables.predictions(str(project / "lake"))

    def keyed(*keys):
        return tables.Keyed(table.write([{"key": k, "volume": "theirs" if k == "a" else "mine"} for k in keys]), keys)

    assert common.commit_once(table, [{"key": "a", "volume": "first"}], "score") == 1
    written = [keyed("b", "c"), keyed("a", "d"), keyed("a"), keyed("c", "e")]
    assert common.commit_files(table, written, "score") == 4
    assert common.commit_files(table, written, "score") == 0
    rows = rows_of(settings)
    assert sorted(r["key"] for r in rows) == list("abcde") and [r["volume"] for r in rows if r["key"] == "a"] == ["first"]
    assert written[0].file.path in table.paths() and written[1].file.path not in table.paths()


def test_a_file_replaced_in_place_is_scored_whatever_its_time(project):
    settings = settings_of(project, attempts=2)
    image = project / "archive" / "img" / "s00.nii.gz"
    other = (ct_pairs(project / "other", 7, (8, 8, 8)) / "img" / "s06.nii.gz").read_bytes()
    first = image.read_bytes()
    (old,) = [r["uid"] for r in tables.volumes(settings.lake).rows() if r["source_paths"] == ["img/s00.nii.gz"]]

    image.write_bytes(other)  # behind the back of the catalog
    os.utime(image, (1e9, 1e9))
    outcome = pipeline.score(settings)
    assert (outcome["scored"], outcome["refused"]) == (5, 1)
    assert [r["reason"] for r in ledger.failures(settings)] == ["CHANGED"]
    assert old not in {r["volume"] for r in rows_of(settings)}, "nothing is written under the digest of other bytes"

    volumes_of(settings)
    (new,) = [r["uid"] for r in tables.volumes(settings.lake).rows() if r["source_paths"] == ["img/s00.nii.gz"]]
    assert pipeline.score(settings)["scored"] == 1
    assert new in {r["volume"] for r in rows_of(settings)}

    image.write_bytes(first)  # and back, with a time that is older still
    os.utime(image, (1e8, 1e8))
    volumes_of(settings)
    assert pipeline.score(settings)["scored"] == 1
    assert len(rows_of(settings)) == 7, "what was scored of the file between stays"
    assert old in ledger.current(settings)["volume"].to_pylist() and new not in ledger.current(settings)["volume"].to_pylist()
    assert pipeline.score(settings)["scored"] == 0


def test_what_fails_is_tried_within_a_budget_and_taken_up_when_asked(project, capsys):
    settings = settings_of(project, attempts=2, attempt_hours=0)
    images = project / "archive" / "img"
    for name in ("s01", "s02"):
        (images / f"{name}.nii.gz").rename(project / name)
    broken = images / "s03.nii.gz"
    broken.write_bytes(broken.read_bytes()[:200])
    volumes_of(settings)
    for name in ("s01", "s02"):  # catalogued, and then away
        (project / name).rename(images / f"{name}.nii.gz")
    volumes_of(settings)
    for name in ("s01", "s02"):
        (images / f"{name}.nii.gz").rename(project / name)
    volumes = len(tables.volumes(settings.lake).rows())
    outcomes = [pipeline.score(settings) for _ in range(4)]
    refused = volumes - outcomes[0]["scored"]
    lasting = refused - 2  # a header is whole, the pixels are cut off
    assert lasting == 1 and [o["scored"] for o in outcomes[1:]] == [0, 0, 0], "the run goes on"
    assert [(o["refused"], o["parked"]) for o in outcomes] == [(3, 0), (2, 1), (0, 3), (0, 3)]
    found = [(r["reason"], r["attempt"]) for r in ledger.failures(settings)]
    assert sorted(found, key=str) == [("TRUNCATED", None), *[("UNREADABLE", 1)] * 2, *[("UNREADABLE", 2)] * 2]
    strict = settings_of(project, max_refused=0.1)
    with pytest.raises(pipeline.StageFailed, match="3 of 6 volumes were refused, more than score.max_refused"):
        pipeline.score(strict)

    (project / "s01").rename(images / "s01.nii.gz")
    settings_of(project, attempts=2, attempt_hours=0)
    assert cli.main(["score", str(project / "project.yaml"), "--retry-quarantined"]) == 0
    assert "scored 1, before 3, refused 2, parked 0" in capsys.readouterr().out
    assert pipeline.score(settings)["parked"] == 2
    assert len([r for r in ledger.failures(settings) if r["reason"] == "TRUNCATED"]) == 1, "what lasts is written down once"


def test_failures_of_one_night_are_one_attempt(project):
    """A scheduler tries again after minutes; a folder that is away for an hour must not use up what is meant for nights."""
    settings = settings_of(project, attempts=2)
    image = project / "archive" / "img" / "s01.nii.gz"
    image.rename(project / "away")
    key = ledger.pinned(settings).key
    outcomes = [pipeline.score(settings) for _ in range(3)]
    assert [(o["refused"], o["parked"]) for o in outcomes] == [(1, 0)] * 3
    (row,) = ledger.failures(settings)
    assert row["attempt"] == 1 and row["key"] in {key(r["uid"]) for r in tables.volumes(settings.lake).rows()}
    table = tables.quarantine(settings.lake)
    (whole,) = table.rows(pc.field("key") == row["key"])
    earlier = whole | {"refused_at": whole["refused_at"] - datetime.timedelta(hours=7)}
    table.commit([table.write([earlier])], replace=spark_catalog.files_of(table, "score", -1))
    assert pipeline.score(settings)["refused"] == 1 and pipeline.score(settings)["parked"] == 1
    assert sorted(r["attempt"] for r in ledger.failures(settings)) == [1, 2]
    (project / "away").rename(image)


def test_volumes_that_kill_their_workers_cost_no_other_and_do_not_end_the_night(spark, tmp_path):
    """More of them in one task than Spark would try it; one that meets a killer from outside, twice, is not to blame, nor one whose
    disk was full twice."""

    def run(names):
        for name in names:
            first, second = (tmp_path / f"{name}.{n}" for n in (1, 2))
            if name.startswith("bad") or (name.startswith("unlucky") and not second.exists()):
                (second if first.exists() else first).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if name == "stuck" and not second.exists():
                (second if first.exists() else first).touch()
                raise OSError("No space left on device")
        return names

    tasks = [["a", *(f"bad{n}" for n in range(5)), "c"], ["d"], ["e", "unlucky"], ["bad alone"], ["stuck", "f"]]
    made, lost = spark_score._all(spark, tasks, run)
    assert sorted(n for names in made for n in names) == ["a", "c", "d", "e", "f", "stuck", "unlucky"]
    assert sorted(lost) == ["bad alone", *(f"bad{n}" for n in range(5))]


@pytest.mark.parametrize("names", [["a"], ["a", "b"]], ids=["alone", "with another"])
def test_what_a_task_raises_ends_the_night_with_its_reason(spark, names):
    """A disk that is full says nothing of a volume, which must not be parked for it."""

    def run(names):
        raise OSError("No space left on device")

    with pytest.raises(RuntimeError, match="No space left on device"):
        spark_score._all(spark, [names, ["c"]], run)


def test_a_new_champion_scores_what_the_config_says_and_old_scores_stay(project):
    settings = settings_of(project)
    images = project / "archive" / "img"
    images.joinpath("s05.nii.gz").rename(project / "s05")
    volumes_of(settings)
    assert pipeline.score(settings)["scored"] == 5
    before = ledger.current(settings).to_pylist()
    version = crown(settings, project, 2)
    (project / "s05").rename(images / "s05.nii.gz")
    volumes_of(settings)
    assert ledger.outlook(settings_of(project, per_night=4)) == {"new": 1, "backfill": 5, "nights": 2}

    uids = {r["uid"] for r in tables.volumes(settings.lake).rows()}
    champion = ledger.pinned(settings)
    tomorrow = (datetime.datetime.now(datetime.UTC) + DAY).date()
    which = ("all", str(tomorrow - 2 * DAY), str(tomorrow), 0.5, 0)
    plans = {b: ledger.plan(settings_of(project, backfill=b), champion) for b in which}
    assert [len(p.new) for p in plans.values()] == [1] * 5, "new volumes are always scored"
    assert [len(p.backfill) for p in plans.values()][:3] == [5, 5, 0] and not plans[0].backfill
    assert set(plans[0.5].backfill) < set(plans["all"].backfill)
    assert plans["all"].tonight(settings_of(project, per_night=2))[0] in plans["all"].new

    some = settings_of(project, per_night=2)
    nights = [pipeline.score(some) for _ in range(4)]
    assert [(n["scored"], n["waiting"]) for n in nights] == [(2, 4), (2, 2), (2, 0), (0, 0)]
    assert {n["version"] for n in nights} == {version}
    rows = rows_of(settings)
    assert len(rows) == 11 and {r["key"] for r in before} < {r["key"] for r in rows}, "old scores stay"
    now = ledger.current(settings).to_pylist()
    assert {r["volume"] for r in now} == uids and {r["model_version"] for r in now} == {version}

    wider = settings_of(project, overlap=0.25, per_night=1)  # other settings are scored like another model
    assert pipeline.score(wider)["waiting"] == 5
    assert sorted(r["config_digest"] for r in ledger.current(wider).to_pylist()).count(now[0]["config_digest"]) == 5
    tracking.of(settings).crown("1", "back again")
    assert [r["key"] for r in ledger.current(settings).to_pylist()] == [r["key"] for r in before]


def test_current_predictions_as_csv_and_parquet(project, capsys):
    settings = settings_of(project)
    with pytest.raises(InputError, match=r"--out x.txt: wanted a name that ends with .csv or .parquet"):
        ledger.export(settings, "x.txt")
    pipeline.score(settings)
    assert cli.main(["predictions", str(project / "project.yaml")]) == 0
    printed = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(printed) == 6 and {"key", "volume", "ml_liver", "probability_kidneys", "scored_at"} <= printed[0].keys()
    by_key = {r["key"]: r for r in rows_of(settings)}
    assert all(float(r["ml_liver"]) == pytest.approx(by_key[r["key"]]["ml"][1]) for r in printed)
    assert all(json.loads(r["quantiles"]) == by_key[r["key"]]["quantiles"] for r in printed)
    assert cli.main(["predictions", str(project / "project.yaml"), "--out", str(project / "out.parquet")]) == 0
    assert pq.read_table(project / "out.parquet").num_rows == 6


def test_an_alias_that_moves_while_a_run_scores_changes_nothing_in_it(project, monkeypatch):
    settings = settings_of(project, commit_every=2)
    whole, moved = common.commit_files, []

    def commit(*arguments):
        done = whole(*arguments)
        if not moved:
            moved.append(crown(settings, project, 2))
        return done

    monkeypatch.setattr(common, "commit_files", commit)
    assert pipeline.score(settings)["version"] == "1" and tracking.of(settings).champion() == moved[0]
    assert {r["model_version"] for r in rows_of(settings)} == {"1"} and len(rows_of(settings)) == 6
    assert {r["model_version"] for r in tables.watch(settings.lake).rows()} == {"1"}, "it is compared with what it was"


def test_a_number_is_traced_to_its_files_and_the_training_data(project, capsys):
    settings = settings_of(project)
    pipeline.score(settings)
    rows = {r["volume"]: r for r in rows_of(settings)}
    volume = next(r for r in tables.volumes(settings.lake).rows() if r["source_paths"] == ["img/s00.nii.gz"])
    row = rows[volume["uid"]]
    assert cli.main(["trace", str(project / "project.yaml"), row["key"][:12]]) == 0
    chain = yaml.safe_load(capsys.readouterr().out)
    source = {"path": "img/s00.nii.gz", "uri": volume["sources"][0], "sha256": volume["source_sha256"][0]}
    assert chain["volume"]["sources"] == [source | {"now": "as scored"}] and chain["volume"]["in_archive"]
    assert chain["prediction"]["key"] == row["key"] and chain["prediction"]["ml"]["liver"] == row["ml"][1]
    assert chain["model"] | {"version": "1", "digest": row["model_digest"], "champion": True} == chain["model"]
    assert chain["training"]["dataset_digest"] == "digest of the training data 1" and chain["training"]["training"] == "training 1"
    assert ledger.trace(settings, row["mask"])["prediction"]["key"] == row["key"]
    renamed = settings.model_copy(update={"classes": ("nothing", "something")})
    assert ledger.trace(renamed, row["key"])["prediction"] == ledger.trace(settings, row["key"])["prediction"]
    for name in ("zzzz", "", "no text \udcff"):
        with pytest.raises(InputError, match="no predictions of lake .* have the key, mask or SEG"):
            ledger.trace(settings, name)

    image = project / "archive" / "img" / "s00.nii.gz"
    image.write_bytes((project / "archive" / "img" / "s01.nii.gz").read_bytes())
    volumes_of(settings)
    again = ledger.trace(settings, row["key"])
    assert again["volume"]["sources"] == [source | {"now": "changed since"}] and not again["volume"]["in_archive"]
    image.unlink()
    assert ledger.trace(settings, row["key"])["volume"]["sources"][0]["now"] == "cannot be read (UNREADABLE)"
    tracking.of(settings).client.delete_registered_model("nightly")
    storage.remove(storage.join(settings.lake, "models"), recursive=True)
    last = ledger.trace(settings, row["key"])
    assert last["prediction"]["ml"]["class 1"] == row["ml"][1], "nobody knows the names any more"
    assert last["training"] == {"dataset_digest": "digest of the training data 1"}
    assert "does not have it" in last["model"]["registry"]


def test_a_lake_of_the_earlier_code_goes_on(project):
    """Tables without the new columns, and rows whose config digest was of the whole section."""
    settings = settings_of(project)
    champion = ledger.pinned(settings)
    first, second, *_ = [r["uid"] for r in tables.volumes(settings.lake).rows()]
    added = {"model_run", "dataset_digest", "batch", "attempt"}

    def before(table):
        return tables.Table(table.url, pa.schema([f for f in table.schema if f.name not in added]))

    old, refused = before(tables.predictions(settings.lake)), before(tables.quarantine(settings.lake))
    then = datetime.datetime.now(datetime.UTC) - 30 * DAY
    row = {"key": champion.key(first), "volume": first, "model_name": "nightly", "model_version": "1", "scored_at": then}
    old.commit([old.write([row | {"model_digest": champion.model_digest, "config_digest": "of the section"}])], ("score", 1))
    parked = {"uri": "u", "stage": "score", "reason": "CHANNELS", "key": champion.key(second), "refused_at": then}
    refused.commit([refused.write([parked])])
    storage.remove(tables.seen(settings.lake).url, recursive=True)

    outcome = pipeline.score(settings)
    assert (outcome["scored"], outcome["before"], outcome["parked"]) == (4, 1, 1)
    assert ledger.current(settings).num_rows == 5
    assert ledger.trace(settings, champion.key(first))["volume"]["sources"][0]["now"] == "as scored"
    crown(settings, project, 2)
    since = settings_of(project, backfill=str((then + DAY).date()))
    assert len(ledger.plan(since, ledger.pinned(since)).backfill) == 4, "a volume is there since its first score at the latest"


def aged(path, days=10):
    then = time.time() - days * 86400
    for p in [path, *path.rglob("*")] if path.is_dir() else [path]:
        os.utime(p, (then, then))


def test_vacuum_takes_what_nobody_can_need(project, capsys):
    settings, lake = settings_of(project), project / "lake"
    pipeline.score(settings)
    crown(settings, project, 2)
    pipeline.score(settings)
    crown(settings, project, 3)
    pipeline.score(settings)
    needed = {f.path for f in storage.walk(settings.lake)}
    table, name = tables.predictions(settings.lake), f"{'0' * 32}.partial"
    mask = rows_of(settings)[0]["mask"]
    row, seen = table.write([{"key": "orphan"}]), tables.seen(settings.lake).write([{"uid": "u"}])
    leftovers = [
        f"predictions/{row.path}", f"volumes/_seen/{seen.path}",
        f"{os.path.dirname(mask)}/sub_gone.nii.gz", f"predictions/masks/.a.nii.gz.{name}", f".seen-{'0' * 32}.1",
        "predictions/cells/sub_gone.parquet", "centres/0123.parquet",
        "datasets/nightly/cafe.writing-01234567/_spilled/a", "datasets/nightly/cafe.broken-17/a", "check-01234567/catalog/a",
    ]  # fmt: skip
    for path in leftovers[2:]:
        (lake / path).parent.mkdir(parents=True, exist_ok=True)
        (lake / path).write_bytes(b"12")
    for file in storage.walk(settings.lake):
        if "/_delta_log/" not in file.path and file.path != "mlflow.db":
            aged(storage.local_path(file.uri))
    young = ["predictions/masks/sub_new.nii.gz", "datasets/nightly/cafe.writing-89abcdef/a"]
    for path in young:
        (lake / path).parent.mkdir(parents=True, exist_ok=True)
        (lake / path).write_bytes(b"12")
    aged(lake / "datasets/nightly/cafe.writing-89abcdef/a")
    (lake / "datasets/nightly/cafe.writing-89abcdef/b").write_bytes(b"12")  # at work

    def left():
        return {f.path for f in storage.walk(settings.lake)}

    yaml_file, everything = str(project / "project.yaml"), left()
    assert cli.main(["vacuum", yaml_file, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert left() == everything and "would be removed" in said
    assert {line.split()[-1] for line in said.splitlines()[:-1]} == {
        *leftovers[:7], "datasets/nightly/cafe.writing-01234567", "datasets/nightly/cafe.broken-17", "check-01234567",
    }  # fmt: skip
    with lease.held(lease.url(settings.lake, "score"), "predictions"):
        pipeline.vacuum(settings)
    assert everything - left() == set(leftovers) - {leftovers[2], leftovers[5]}, "masks wait while a run is at work"
    assert cli.main(["vacuum", yaml_file]) == 0 and "2 removed, 4 bytes" in capsys.readouterr().out
    assert left() - {"mlflow.db"} == needed - {"mlflow.db"} | {*young, "datasets/nightly/cafe.writing-89abcdef/b"}
    assert pipeline.vacuum(settings) == []
    with pytest.raises(InputError, match="does not exist"):
        pipeline.vacuum(settings.model_copy(update={"lake": str(project / "none")}))

    rows = rows_of(settings)  # nobody has used version 1 for long, and version 2 is where a rollback goes
    promotions = tables.promotions(settings.lake)
    decided = {"model_name": "nightly", "action": "promoted", "decided_at": datetime.datetime.now(datetime.UTC) - 9 * DAY}
    won = [decided | {"challenger": str(n), "champion": str(n - 1)} for n in (2, 3)]
    promotions.commit([promotions.write(won)])
    old = [r | {"scored_at": r["scored_at"] - 8 * DAY} for r in rows]
    table.commit([table.write(old)], replace=table.paths())
    assert [x.path for x in pipeline.vacuum(settings) if x.what == "copy of a model"] == ["models/nightly/1"]
    tracking.of(settings).crown("1", "needed again")
    assert pipeline.score(settings)["before"] == 6 and storage.exists(storage.join(settings.lake, "models/nightly/1/spec.json"))
