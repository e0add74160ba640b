import os
import pathlib
import sys

import class_archive
import hypothesis
import pytest

hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))  # ci: the same examples each time
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("JDK_JAVA_OPTIONS", class_archive.options(pathlib.Path(sys.prefix) / "spark.jsa"))


def pytest_collection_modifyitems(items):
    """Files that start engines take longest: first they, so that no process is left with one at the end."""
    engines = {item.path for item in items if item.get_closest_marker("engine")}
    items.sort(key=lambda item: item.path not in engines)


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """Folder of public test images; they are not part of the project."""
    folder = os.environ.get("SPARKMED_TEST_DATA")
    if not folder:
        pytest.skip("needs shared data")
    return pathlib.Path(folder).resolve()


@pytest.fixture(scope="session")
def spark_cluster(tmp_path_factory):
    """A running Spark standalone cluster of two workers with one core each: see :mod:`cluster`."""
    import cluster

    with cluster.standalone(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.fixture(scope="session")
def spark():
    """Spark in this process with two task slots; its workers have MONAI from their daemon: see :mod:`preloaded`."""
    from sparkmed import config
    from sparkmed.spark import session

    conf = {"spark.sql.shuffle.partitions": "4", "spark.python.daemon.module": "preloaded"}
    conf["spark.executorEnv.PYTHONPATH"] = str(pathlib.Path(__file__).parent)
    return session.session(config.Spark(master="local[2]", conf=conf), "tests")
