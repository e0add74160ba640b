import os
import pathlib

import pytest

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    """Folder of public test images; they are not part of the project."""
    folder = os.environ.get("SPARKMED_TEST_DATA")
    if not folder:
        pytest.skip("needs shared data")
    return pathlib.Path(folder).resolve()
