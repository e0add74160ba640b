"""The whole path on phantoms, with real Spark and a real MLflow store."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

import nibabel as nib
import numpy as np
import pytest
from archives import ct_config, ct_pairs

import sparkmed
from sparkmed import config, dataset, pipeline, storage, tables, tracking
from sparkmed.rejection import InputError

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def project(tmp_path_factory, spark):
    """A project on which every stage has run once, with what each stage said."""
    folder = tmp_path_factory.mktemp("project")
    settings = config.parse(ct_config(ct_pairs(folder / "archive"), folder / "lake"))
    return settings, pipeline.run(settings)


def test_every_stage_did_its_work(project):
    settings, done = project
    assert done["catalog"]["instances"] == 24
    assert done["volumes"]["volumes"] == 12
    assert done["patches"]["train"] == 4 * done["volumes"]["train"]
    assert done["train"]["version"] == "1" and done["train"]["test_dice"] > 0.3
    assert done["promote"]["action"] == "promoted"
    assert done["score"]["scored"] == 12
    assert storage.exists(done["report"]["report"])


def test_the_champion_has_a_fingerprint_and_a_first_run_has_no_alarm(project):
    settings, done = project
    assert done["score"]["alarms"] == "none"
    kept = {r["figure"]: r for r in tables.fingerprints(settings.lake).rows() if r["source"] == "modality=nifti"}
    assert {"intensity p50", "field ml", "liver ml", "liver probability", "quarantined"} <= kept.keys()
    judged = tables.evaluations(settings.lake).rows()
    assert kept["intensity p50"]["values"] == sorted(float(f"{r['quantiles'][2]:.4g}") for r in judged)
    for r in judged:  # every voxel that is counted is foreground, predicted or true, and right or wrong
        counts, confidence, right = np.reshape(r["reliability"], (3, 15)).sum(1)
        assert 0 < right <= counts and 1 / 3 <= confidence / counts <= 1
    (decision,) = [json.loads(r["numbers"]) for r in tables.promotions(settings.lake).rows()]
    assert {"metric", "ece", "seconds", "group modality=nifti"} == {g["gate"] for g in decision["gates"]}
    assert {r["check"] for r in tables.watch(settings.lake).rows()} == {"quarantine", "service"}  # no volume is new


def test_a_second_run_does_nothing_twice(project):
    settings, _ = project

    def files():
        ignored = ("report/", "mlflow.db")
        return {f.path: f.mtime_ns for f in storage.walk(settings.lake) if not f.path.startswith(ignored)}

    before = files()
    again = pipeline.run(settings)
    assert (again["catalog"]["new"], again["volumes"]["changed"], again["score"]["scored"]) == (0, 0, 0)
    assert again["train"]["already"] == "trained"
    assert files() == before


def test_masks_lie_on_the_input_grid(project):
    settings, _ = project
    volumes = {r["uid"]: r for r in tables.volumes(settings.lake).rows()}
    rows = tables.predictions(settings.lake).rows()
    assert len({r["key"] for r in rows}) == len(rows) == 12
    for row in rows:
        mask = nib.load(storage.local_path(storage.join(settings.lake, row["mask"])))
        image = nib.load(storage.local_path(volumes[row["volume"]]["sources"][0]))
        assert mask.shape == image.shape and np.allclose(mask.affine, image.affine, atol=1e-5)
        counts = np.bincount(np.asarray(mask.dataobj).ravel(), minlength=3)
        assert row["ml"] == pytest.approx((counts * abs(np.linalg.det(image.affine[:3, :3])) / 1000).tolist(), rel=1e-5)
        assert row["model_version"] == "1" and row["config_digest"]


def test_petastorm_reads_the_patches_back(project):
    from petastorm import make_reader

    settings, done = project
    url = done["patches"]["dataset"]
    facts = dataset.describe(url)
    with make_reader(url, num_epochs=1, reader_pool_type="dummy") as reader:
        rows = list(reader)
    ids = [r.patch_id for r in rows]
    assert len(ids) == len(set(ids)) == sum(facts["counts"].values())
    by_id = {r.patch_id: r for r in rows}
    for batch in sparkmed.PatchLoader(url, batch_size=4, shuffle=False):
        for i, patch_id in enumerate(batch["patch_id"]):
            if batch["weight"][i]:
                np.testing.assert_array_equal(batch["image"][i].numpy(), by_id[patch_id].image)
                np.testing.assert_array_equal(batch["label"][i, 0].numpy(), by_id[patch_id].label)


def test_subjects_never_cross_splits(project):
    settings, done = project
    import pyarrow.dataset as pads

    table = pads.dataset(str(storage.local_path(done["patches"]["dataset"])), format="parquet", partitioning="hive")
    pairs = set(zip(*table.to_table(["subject", "split"]).to_pydict().values(), strict=True))
    assert len({s for s, _ in pairs}) == len(pairs) == 12


def test_the_dataset_is_the_same_bytes_whatever_the_partitions(project, spark, tmp_path):
    from sparkmed.spark import patches

    settings, done = project
    rows = tables.volumes(settings.lake).rows()
    elsewhere = settings.model_copy(update={"lake": str(tmp_path)})
    url = patches.write(spark, list(reversed(rows)), elsewhere, {})
    for path in dataset.describe(url)["files"]:
        assert storage.read_bytes(storage.join(url, path)) == storage.read_bytes(storage.join(done["patches"]["dataset"], path))


def test_a_killed_patches_stage_leaves_no_dataset(project, spark, tmp_path, monkeypatch):
    from sparkmed.spark import patches

    settings, _ = project
    elsewhere = settings.model_copy(update={"lake": str(tmp_path)})
    monkeypatch.setattr(patches.dataset, "description", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    rows = tables.volumes(settings.lake).rows()
    with pytest.raises(KeyboardInterrupt):
        patches.write(spark, rows, elsewhere, {})
    with pytest.raises(InputError, match="no finished patch dataset"):
        dataset.describe(dataset.url(str(tmp_path), settings.name, dataset.version(rows, settings)))


def test_mlflow_holds_the_whole_training(project):
    import mlflow

    settings, done = project
    registry = tracking.of(settings)
    facts = registry.version_facts(done["train"]["version"])
    run = registry.client.get_run(facts["run_id"])
    assert run.data.params["train.epochs"] == "8"
    assert run.inputs.dataset_inputs[0].dataset.digest == dataset.describe(done["patches"]["dataset"])["digest"]
    low, mean, high = (run.data.metrics[f"test_dice{s}"] for s in ("_low", "", "_high"))
    assert low <= mean <= high
    assert len(registry.curves(facts["run_id"])["train_loss"]) == 8
    assert any(m.startswith("system/") for m in run.data.metrics)
    kept = {a.path for a in registry.client.list_artifacts(run.info.run_id)}
    assert {"dataset.json", "examples", "test_predictions.json"} <= kept
    spec = mlflow.models.get_model_info(f"runs:/{facts['run_id']}/model")
    assert spec.metadata["spec"]["dataset"]["digest"]


def test_the_champion_predicts_in_another_process_way(project):
    settings, _ = project
    uri = tracking.of(settings).uri
    model = sparkmed.load_model("models:/phantom@champion", tracking_uri=uri)
    volumes, rejections = sparkmed.read_archive(settings.archive + "/img")
    assert len(volumes) == 12 and rejections == []
    prediction = model.predict(volumes[0])
    assert prediction.array.shape == volumes[0].array.shape and prediction.array.dtype == np.uint8
    np.testing.assert_allclose(prediction.affine, volumes[0].affine)


def test_plain_pyfunc_loads_the_champion(project, monkeypatch):
    import mlflow
    import pandas as pd

    settings, _ = project
    monkeypatch.setattr(mlflow, "get_tracking_uri", mlflow.get_tracking_uri)
    mlflow.set_tracking_uri(tracking.of(settings).uri)
    model = mlflow.pyfunc.load_model("models:/phantom@champion")
    answer = model.predict(pd.DataFrame({"uri": [tables.volumes(settings.lake).rows()[0]["sources"][0]]}))
    assert len(answer) == 1


def test_the_gate_keeps_a_worse_challenger_and_rollback_goes_one_back(project):
    settings, _ = project
    worse = settings.model_copy(update={"train": settings.train.model_copy(update={"epochs": 1}), "seed": 0})
    registry = tracking.of(settings)
    version = pipeline.train(worse)["version"]
    kept = pipeline.promote(worse)
    assert kept["action"] == "kept" and registry.champion() == "1"
    with pytest.raises(InputError, match="nothing to roll back to"):
        pipeline.rollback(settings)
    open_gate = worse.model_copy(update={"promote": worse.promote.model_copy(update={"margin": -1.0})})
    assert pipeline.promote(open_gate)["champion"] == version == registry.champion()
    assert pipeline.rollback(settings)["champion"] == "1" == registry.champion()
    numbers = [json.loads(r["numbers"]) for r in tables.promotions(settings.lake).rows() if r["challenger"] == version]
    assert all({"low", "high", "difference"} <= n.keys() for n in numbers)


def test_a_new_image_is_scored_alone(project, tmp_path):
    settings, _ = project
    folder = storage.local_path(settings.archive)
    extra = ct_pairs(tmp_path / "extra", 13) / "img" / "s12.nii.gz"
    (folder / "img" / "s12.nii.gz").write_bytes(extra.read_bytes())
    labels = settings.volumes.labels.model_copy(update={"allow_missing": True})
    open_config = settings.model_copy(update={"volumes": settings.volumes.model_copy(update={"labels": labels})})
    pipeline.catalog(open_config)
    assert pipeline.volumes(open_config)["unlabelled"] == 1
    assert pipeline.score(open_config)["scored"] == 1


def test_bad_input_is_said_before_anything_expensive(project, tmp_path):
    settings, _ = project
    with pytest.raises(InputError, match="does not exist"):
        pipeline.catalog(settings.model_copy(update={"archive": str(tmp_path / "none")}))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no file"):
        pipeline.catalog(settings.model_copy(update={"archive": str(tmp_path / "empty"), "lake": str(tmp_path / "l1")}))
    with pytest.raises(InputError, match="has no catalog: run the catalog stage"):
        pipeline.volumes(settings.model_copy(update={"lake": str(tmp_path / "l2")}))
    with pytest.raises(InputError, match="has no volumes: run the volumes stage"):
        pipeline.train(settings.model_copy(update={"lake": str(tmp_path / "l2")}))
    greedy = settings.model_copy(update={"train": settings.train.model_copy(update={"processes": 3, "epochs": 2})})
    pipeline.patches(greedy)
    with pytest.raises(InputError, match="3 but Spark has 2 task slots"):
        pipeline.train(greedy)
    assert any("Spark has 2 task slots" in p for p in pipeline.check(greedy))
    pairs = ct_pairs(tmp_path / "pairs", 3)
    few = settings.model_copy(update={"classes": ("background", "liver"), "lake": str(tmp_path / "l3"), "archive": str(pairs)})
    pipeline.catalog(few)
    with pytest.raises(InputError, match="do not fit classes"):
        pipeline.volumes(few)
    away = settings.model_copy(update={"tracking": config.Tracking(uri="http://127.0.0.1:9")})
    with pytest.raises(InputError, match="tracking.uri http://127.0.0.1:9 cannot be used"):
        pipeline.train(away)
    assert any("cannot be used" in p for p in pipeline.check(away))


def test_check_finds_what_the_stages_would_and_keeps_nothing(project, tmp_path):
    settings, _ = project
    pairs = ct_pairs(tmp_path / "pairs", 12)
    (pairs / "lab" / "s03.nii.gz").unlink()
    lacking = settings.model_copy(update={"archive": str(pairs), "lake": str(tmp_path / "lake")})
    (problem,) = pipeline.check(lacking, deep=True)
    assert "12 images but 11 labels: none for img/s03.nii.gz" in problem
    two = lacking.model_copy(update={"classes": ("background", "liver")})
    (pairs / "img" / "s03.nii.gz").unlink()
    (problem,) = pipeline.check(two, deep=True)
    assert "11 labels do not fit classes" in problem
    assert pipeline.check(lacking, deep=True) == []
    lone = lacking.model_copy(update={"volumes": lacking.volumes.model_copy(update={"images": "img/s01.nii.gz"})})
    assert pipeline.check(lone, deep=True) != []
    assert not storage.exists(storage.join(lacking.lake, "volumes"))
    wrong = lacking.model_copy(update={"train": settings.train.model_copy(update={"network": config.Component(name="UNett")})})
    (problem,) = pipeline.check(wrong)
    assert "UNet" in problem


def test_a_version_that_was_rolled_back_stays_back(project):
    settings, _ = project
    registry = tracking.of(settings)
    assert registry.champion() == "1" and registry.latest() != "1"
    open_gate = settings.model_copy(update={"promote": settings.promote.model_copy(update={"margin": -1.0})})
    assert "was rolled back" in pipeline.promote(open_gate)["reason"]
    assert registry.champion() == "1"


def test_other_classes_are_not_compared_with_the_champion(project):
    settings, _ = project
    swapped = settings.model_copy(update={"classes": ("background", "kidneys", "liver")})
    for stage in (pipeline.promote, pipeline.score, pipeline.make_report):
        with pytest.raises(InputError, match="predicts .*, the config says"):
            stage(swapped)


def test_what_may_pass_is_tried_again_and_what_is_broken_is_parked(project, tmp_path):
    settings, _ = project
    again = settings.model_copy(update={"score": settings.score.model_copy(update={"overlap": 0.25, "max_refused": 1.0})})
    images = storage.local_path(settings.archive) / "img"
    images.rename(tmp_path / "away")
    away = pipeline.score(again)
    (tmp_path / "away").rename(images)
    assert away["scored"] == 0 and away["refused"] == len(tables.volumes(settings.lake).rows())
    assert pipeline.score(again)["scored"] == away["refused"]
    paths = {r["mask"] for r in tables.predictions(settings.lake).rows()}
    assert len(paths) == len(tables.predictions(settings.lake).rows()), "other settings write other files"


def test_a_lake_is_of_one_project(project):
    settings, _ = project
    with pytest.raises(InputError, match="is of project phantom, the config is of other"):
        pipeline.catalog(settings.model_copy(update={"name": "other"}))


@pytest.mark.parametrize(
    ("train", "sentence"),
    [
        ({"network": {"name": "UNet", "channels": [4, 8], "strides": [3], "norm": "instance"}}, "does not take patches|makes"),
        ({"optimizer": {"name": "Adamm"}}, "Adam"),
        ({"optimizer": {"name": "AdamW", "lrr": 5}}, "lr"),
        ({"loss": {"name": "DiceLosss"}}, "DiceLoss"),
        ({"initial_weights": "none.safetensors"}, "does not exist"),
    ],
)
def test_check_tries_the_network(tmp_path, train, sentence):
    plain = ct_config(ct_pairs(tmp_path / "pairs", 1), tmp_path / "lake")
    problems = pipeline.check(config.parse(plain | {"train": plain["train"] | train}))
    assert len(problems) == 1 and re.search(sentence, problems[0]), problems


def test_what_could_not_be_cut_is_in_quarantine_once_and_counts(project, monkeypatch):
    settings, _ = project
    uids = [r["uid"] for r in tables.volumes(settings.lake).rows()][:7]
    facts = dataset.describe(pipeline.patches(settings)["dataset"])
    monkeypatch.setattr(dataset, "describe", lambda _: facts | {"refused": {u: ["TRUNCATED", "cut off"] for u in uids}})
    for _ in range(2):
        with pytest.raises(pipeline.StageFailed, match=r"7 of 1\d volumes were refused, more than volumes.max_refused"):
            pipeline.patches(settings)
    rows = [r for r in tables.quarantine(settings.lake).rows() if r["stage"] == "patches"]
    assert len(rows) == 7 and {r["reason"] for r in rows} == {"TRUNCATED"}


def test_of_two_trainings_at_once_one_trains(project):
    settings, _ = project
    other = settings.model_copy(update={"seed": 7, "train": settings.train.model_copy(update={"epochs": 1})})
    pipeline.patches(other)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(pipeline.train, (other, other))
    assert first["version"] == second["version"] and [f.get("already") for f in (first, second)].count("trained") == 1
