import pytest
from learning.test_model import segmenter
from mlflow.exceptions import MlflowException

from sparkmed import config, storage, tracking
from sparkmed.learning import model as models
from sparkmed.rejection import InputError

LEAST = {"name": "p", "task": "segmentation", "classes": ["a", "b"], "archive": "x"}


def registry(tmp_path, **settings):
    return tracking.of(config.parse(LEAST | {"lake": str(tmp_path / "lake"), "tracking": settings}))


def test_the_default_is_sqlite_in_the_lake(tmp_path):
    found = registry(tmp_path)
    assert found.uri == f"sqlite:///{tmp_path}/lake/mlflow.db"
    assert (found.experiment, found.model) == ("p", "p")
    found.check()
    assert found.champion() is None and found.latest() is None and found.trained("x") is None


def test_a_remote_lake_wants_a_server():
    with pytest.raises(InputError, match="name an MLflow server in tracking.uri"):
        tracking.of(config.parse(LEAST | {"lake": "s3://bucket/lake"}))


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "postgresql://u:secret@127.0.0.1:9/db", "nonsense://x"])
def test_a_store_that_does_not_answer_is_said_without_its_password(tmp_path, uri):
    with pytest.raises(InputError, match="cannot be used from the driver") as e:
        registry(tmp_path, uri=uri).check()
    assert "secret" not in str(e.value)


def test_a_store_that_fails_is_not_taken_for_one_without_a_champion(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(MlflowException):
        registry(tmp_path, uri="http://127.0.0.1:9").champion()


def test_loading_what_is_no_model_is_said(tmp_path):
    uri = registry(tmp_path).uri
    registry(tmp_path).check()
    with pytest.raises(InputError, match="models:/nobody@champion"):
        tracking.load_model("models:/nobody@champion", tracking_uri=uri)
    with pytest.raises(InputError, match="spec.json"):
        tracking.load_model(str(tmp_path))


def test_parameters_are_flat_names():
    assert tracking._flat({"a": {"b": 1, "c": {"d": [1, 2]}}, "e": "x"}) == {"a.b": "1", "a.c.d": "[1, 2]", "e": "x"}


def test_a_version_that_is_not_what_was_registered_is_refused(tmp_path):
    store = registry(tmp_path)
    store.check()
    segmenter().save(str(tmp_path / "model"))
    with store.run("by hand", {}, {}, {"name": "d", "version": "1", "digest": "0", "url": str(tmp_path)}) as run:
        version = run.register(str(tmp_path / "model"), {})
    store.crown(version, "by hand")
    assert store.digest(version) == models.model_digest(str(tmp_path / "model"))
    for uri in ("models:/p@champion", "models:/p/latest", f"models:/p/{version}"):
        with tracking.located(uri, store.uri) as (name, _):
            assert name == f"models:/p/{version}"
    (kept,) = (p for p in (tmp_path / "lake" / "mlartifacts").rglob("spec.json"))
    kept.write_text(kept.read_text().replace('"liver"', '"lever"'))
    for use in (
        lambda: tracking.load_model("models:/p@champion", tracking_uri=store.uri),
        lambda: store.fetch(version, str(tmp_path / "lake")),
    ):
        with pytest.raises(InputError, match="is not the one that was asked for: spec.json has SHA-256"):
            use()
    kept.write_text(kept.read_text().replace('"lever"', '"liver"'))
    copy = storage.local_path(store.fetch(version, str(tmp_path / "lake")))
    (copy / "spec.json").write_text((copy / "spec.json").read_text().replace('"liver"', '"lever"'))
    with pytest.raises(InputError, match=f"is another model in the registry: remove .*models/p/{version}"):
        store.fetch(version, str(tmp_path / "lake"))
