"""Tracking as several machines share it: MLflow's server on a real PostgreSQL. In all other tests it is SQLite, the default."""

import os
import pathlib

import mlflow_server
import nibabel as nib
import numpy as np
import pytest
from archives import ct_config, ct_pairs

import sparkmed
from sparkmed import config, pipeline, storage, tables, tracking

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(mlflow_server.postgres_programs() is None, reason="needs PostgreSQL: apt-get install postgresql"),
]


@pytest.fixture(scope="module")
def store():
    with mlflow_server.postgres() as url:
        yield url


@pytest.fixture(scope="module")
def server(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mlflow")
    with mlflow_server.server(store, folder) as url:
        yield url, folder


def rows(store: str, query: str) -> list[tuple]:
    import sqlalchemy

    with sqlalchemy.create_engine(store).connect() as connection:
        return [tuple(row) for row in connection.execute(sqlalchemy.text(query))]


def test_from_archive_to_scores_by_a_server_on_postgres(store, server, spark, tmp_path):
    url, folder = server
    settings = ct_config(ct_pairs(tmp_path / "archive"), tmp_path / "lake", tracking={"uri": url})
    settings["train"]["epochs"] = 1
    done = pipeline.run(config.parse(settings))
    assert (done["train"]["version"], done["promote"]["action"], done["score"]["scored"]) == ("1", "promoted", 12)

    # all of it is in the database and behind the server, nothing in the lake
    assert rows(store, "select name, alias, version from registered_model_aliases") == [("phantom", "champion", 1)]
    assert rows(store, "select status from runs") == [("FINISHED",)]
    assert rows(store, "select artifact_location from experiments where name = 'phantom'")[0][0].startswith("mlflow-artifacts:/")
    assert not (tmp_path / "lake" / "mlflow.db").exists() and not (tmp_path / "lake" / "mlartifacts").exists()
    assert list((folder / "artifacts").rglob("weights.safetensors"))

    # a machine with neither the lake nor the folder of the artifacts gets the model by its alias
    model = sparkmed.load_model("models:/phantom@champion", tracking_uri=url)
    row = tables.predictions(str(tmp_path / "lake")).rows()[0]
    (volume,), _ = sparkmed.read_archive(str(tmp_path / "archive" / "img" / f"{row['subject']}.nii.gz"))
    stored = nib.load(storage.local_path(storage.join(str(tmp_path / "lake"), row["mask"])))
    np.testing.assert_array_equal(model.predict(volume).array[0], np.asarray(stored.dataobj))


def test_the_database_alone_is_a_store_too(store, server, tmp_path):
    """Without the server: runs and registry by SQL; what was registered by the server is there."""
    least = {"name": "phantom", "task": "segmentation", "classes": ["a", "b"], "archive": "x", "lake": str(tmp_path)}
    registry = tracking.of(config.parse(least | {"tracking": {"uri": store}}))
    registry.check()
    assert registry.champion() == registry.latest() == "1"


def test_a_password_is_not_among_the_arguments_of_the_server(store, server):
    """Anybody on a machine reads arguments."""
    password = store.split(":")[2].split("@")[0]
    for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
        if path.parent.name != str(os.getpid()):
            try:
                assert password.encode() not in path.read_bytes()
            except OSError:  # it has ended
                continue
