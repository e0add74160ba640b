"""Every job through spark-submit on a standalone cluster of two workers, training by two Horovod ranks included."""

import pathlib

import pytest
import yaml
from archives import ct_config, ct_pairs
from formats import dicoms

from sparkmed import tables

pytestmark = pytest.mark.engine
JOBS = pathlib.Path(__file__).parents[1] / "jobs"
DAEMON = {"spark.python.daemon.module": "sparkmed.spark.daemon"}  # as in conf/spark/standalone.conf
STAGES = ("catalog", "volumes", "patches", "train", "promote", "score", "report")


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jobs")
    settings = ct_config(ct_pairs(folder / "archive"), folder / "lake")
    settings["train"] |= {"processes": 2, "threads": 1, "epochs": 2}
    (folder / "project.yaml").write_text(yaml.safe_dump(settings))
    return folder


def test_there_is_a_job_per_stage():
    assert {p.stem for p in JOBS.glob("*.py")} == {*STAGES, "deidentify", "screen", "watch"}


def test_the_whole_path_by_spark_submit(spark_cluster, project):
    said = {}
    eager = {"spark.speculation": "true", "spark.speculation.multiplier": "1", "spark.speculation.quantile": "0.1"}
    eager |= {"spark.speculation.interval": "20ms", "spark.speculation.minTaskRuntime": "1ms"}
    for stage in STAGES:  # tasks of scoring run twice
        conf = DAEMON | (eager if stage == "score" else {})
        ended = spark_cluster.submit(JOBS / f"{stage}.py", project / "project.yaml", "seed=0", conf=conf, timeout=400)
        assert ended.returncode == 0, f"{stage}:\n{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}"
        said[stage] = ended.stdout
    assert "version 1" in said["train"] and "promoted" in said["promote"]
    lake = str(project / "lake")
    keys = tables.predictions(lake).read(["key"])["key"].to_pylist()
    assert len(keys) == len(set(keys)) == 12
    look = spark_cluster.submit(JOBS / "watch.py", project / "project.yaml", conf=DAEMON, timeout=400)
    assert look.returncode == 0 and "alarms none" in look.stdout, look.stdout[-2000:] + look.stderr[-2000:]
    again = spark_cluster.submit(JOBS / "score.py", project / "project.yaml", timeout=400)
    assert "scored 0" in again.stdout, again.stderr[-2000:]
    assert len(tables.predictions(lake).rows()) == 12


def test_a_job_with_a_wrong_config_says_so_and_fails(spark_cluster, project):
    ended = spark_cluster.submit(JOBS / "catalog.py", project / "project.yaml", "trian.epochs=1")
    assert ended.returncode != 0
    assert "did you mean train?" in ended.stdout  # spark-submit gives both streams of Python there


def test_more_ranks_than_slots_is_said_before_training(spark_cluster, project):
    ended = spark_cluster.submit(
        JOBS / "train.py",
        project / "project.yaml",
        "train.processes=2",
        "train.epochs=7",
        "train.start_timeout=5",
        conf={"spark.cores.max": "1"},
        timeout=200,
    )
    assert ended.returncode != 0
    assert "Spark has 1 task slots" in ended.stdout


def test_deidentify_by_spark_submit(spark_cluster, tmp_path):
    dicoms.write(tmp_path / "archive", dicoms.series(dicoms.stack()))
    (tmp_path / "key").write_text("k" * 32)
    ended = spark_cluster.submit(
        JOBS / "deidentify.py", tmp_path / "archive", tmp_path / "out", f"identity.key_file={tmp_path}/key", timeout=200
    )
    assert ended.returncode == 0, ended.stderr[-4000:]
    assert "written 4" in ended.stdout and len(list((tmp_path / "out").rglob("*.dcm"))) == 4
