import zipfile

import pytest

from sparkmed import config
from sparkmed.spark import session


@pytest.mark.parametrize(
    "master, wanted",
    [
        ("local", "local[1,4]"),
        ("local[2]", "local[2,4]"),
        ("local[*]", "local[*,4]"),
        ("local[2,1]", "local[2,1]"),
        ("local-cluster[2,1,1024]", "local-cluster[2,1,1024]"),
        ("spark://host:7077", "spark://host:7077"),
        ("yarn", "yarn"),
    ],
)
def test_local_spark_tries_a_task_as_often_as_a_cluster(master, wanted):
    assert session._retrying(config.Spark(master=master)) == wanted


def test_the_number_of_failures_of_the_config_counts():
    assert session._retrying(config.Spark(master="local[2]", conf={"spark.task.maxFailures": "7"})) == "local[2,7]"


def test_packed_is_balanced():
    groups = session.packed(list(range(100)), [float(n) for n in range(100)], 7)
    assert sorted(n for g in groups for n in g) == list(range(100))
    loads = [sum(g) for g in groups]
    assert max(loads) - min(loads) < 100


@pytest.mark.engine
def test_workers_are_forked_with_everything_imported(spark):
    def worker(_):
        import gc
        import os
        import sys

        return os.getppid(), "sparkmed.spark.score" in sys.modules, gc.get_freeze_count()

    found = spark.sparkContext.parallelize(range(4), 4).map(worker).collect()
    assert len({parent for parent, _, _ in found}) == 1
    assert all(there and frozen > 100_000 for _, there, frozen in found)


@pytest.mark.engine
def test_a_zip_of_modules_that_is_sent_later_is_found(spark, tmp_path):
    """Workers do not read archives again that they know; one that they do not know yet is not among those."""

    def answers(names):
        import importlib

        return [importlib.import_module(name).ANSWER for name in names]

    names = []
    for n in (1, 2):
        names.append(f"sent_later_{n}")
        with zipfile.ZipFile(tmp_path / f"{names[-1]}.zip", "w") as archive:
            archive.writestr(f"{names[-1]}.py", f"ANSWER = {n}")
        spark.sparkContext.addPyFile(str(tmp_path / f"{names[-1]}.zip"))
        assert spark.sparkContext.parallelize([names] * 2, 2).map(answers).collect() == [[1, 2][:n]] * 2
