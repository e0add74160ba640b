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
