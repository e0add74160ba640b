import os
import pathlib

import hypothesis
import pytest

hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))  # ci: the same examples each time
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


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
    """Spark in this process with two task slots."""
    from sparkmed import config
    from sparkmed.spark import session

    return session.session(config.Spark(master="local[2]", conf={"spark.sql.shuffle.partitions": "4"}), "tests")
