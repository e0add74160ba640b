"""A cascade, an ensemble and postprocessing through all stages, with real Spark and two real MLflow stores."""

import json

import numpy as np
import pytest
import torch
from archives import CLASSES, ct_config, ct_pairs

import sparkmed
from sparkmed import config, dataset, formats, pipeline, storage, tables, tracking
from sparkmed.formats.instance import VolumeHeader
from sparkmed.imaging import patches, preprocess
from sparkmed.learning import model as models
from sparkmed.learning import networks
from sparkmed.learning.model import Model, ModelSpec
from sparkmed.pipeline import common, ledger
from sparkmed.rejection import InputError

pytestmark = pytest.mark.engine


def registered(registry, folder, seed, **more) -> str:
    """A version with random weights of ``registry``."""
    spec = ModelSpec(
        **{
            "name": registry.model, "task": "segmentation", "classes": CLASSES, "in_channels": 1, "spatial_dims": 3,
            "window": (16, 16, 16), "network": config.Component(name="UNet", channels=[4, 8], strides=[2]),
            "preprocess": config.Preprocess(intensity=config.Intensity(kind="window", low=-200, high=300)), "seed": seed,
        }
        | more
    )  # fmt: skip
    torch.manual_seed(seed)
    url = str(folder / f"{registry.model}-{seed}")
    Model(spec, networks.build(spec.network, 1, len(spec.classes), 3)).save(url)
    registry.check()
    with registry.run("by hand", {}, {}, {"name": "d", "version": "1", "digest": "0", "url": str(folder)}) as run:
        return run.register(url, {})


@pytest.fixture(scope="module")
def project(tmp_path_factory, spark):
    """(config of the second project, registry of the first, what the stages did): trained behind a first model of another store."""
    folder = tmp_path_factory.mktemp("cascade")
    whole = tracking.Registry(f"sqlite:///{folder}/whole.db", "whole", "whole")
    whole.crown(registered(whole, folder, 1, classes=("background", "body")), "by hand")
    plain = ct_config(ct_pairs(folder / "archive"), folder / "lake")
    plain["preprocess"]["cascade"] = {"model": "models:/whole@champion", "tracking": whole.uri}
    plain["train"] |= {"epochs": 2, "augment": {"flip": [0], "noise": 0.1}}
    plain["score"] = {"postprocess": {"liver": {"components": 1, "fill_holes": True}}}
    settings = config.parse(plain)
    assert pipeline.check(settings) == []
    return (
        settings,
        whole,
        {stage: pipeline.run_stage(stage, settings) for stage in ("catalog", "volumes", "patches", "train", "promote")},
    )


def image_of(row):
    return formats.read_volume(VolumeHeader.from_row(row))


def masks(settings, digest=None):
    """Label arrays by volume of the predictions of one model."""
    rows = [r for r in tables.predictions(settings.lake).rows() if digest in (None, r["model_digest"])]
    return {r["volume"]: formats.read_archive(storage.join(settings.lake, r["mask"]))[0][0].array for r in rows}


def test_patches_hold_what_the_first_model_says(project):
    settings, whole, done = project
    first = sparkmed.load_model("models:/whole@champion", tracking_uri=whole.uri, device="cpu")
    facts = dataset.describe(done["patches"]["dataset"])
    assert next(f["shape"] for f in facts["fields"] if f["name"] == "image") == [2, 16, 16, 16]
    assert facts["cascade"]["model"] == "models:/whole/1" and facts["cascade"]["digest"] == whole.digest("1")
    alone = settings.preprocess.model_copy(update={"cascade": None})
    rows = {r["uid"]: r for r in tables.volumes(settings.lake).rows()}
    seen = 0
    for batch in sparkmed.PatchLoader(done["patches"]["dataset"], batch_size=4, shuffle=False, split="val"):
        for patch_id, patch, weight in zip(batch["patch_id"], batch["image"].numpy(), batch["weight"], strict=True):
            if not weight:
                continue
            uid, number = patch_id.rsplit("-", 1)
            volume = image_of(rows[uid])
            image = preprocess.apply(volume, alone)
            found = preprocess.place(first.predict(volume), alone, order=0)
            place = patches.grid(image.spatial_shape, (16, 16, 16))[int(number)]
            assert np.array_equal(patch[0], patches.extract(image.array[0], place))
            assert np.array_equal(patch[1], patches.extract(found.array[0], place))
            seen += 1
    assert seen == facts["counts"]["val"]


def test_the_registered_model_stands_alone_and_is_what_scores(project):
    settings, whole, done = project
    uri = tracking.of(settings).uri
    model = sparkmed.load_model("models:/phantom@champion", tracking_uri=uri, device="cpu")
    pinned = model.spec.preprocess.cascade
    assert (pinned.model, pinned.digest, pinned.classes, pinned.tracking) == ("models:/whole/1", whole.digest("1"), ("body",), None)
    assert model.first.spec.name == "whole" and model.spec.in_channels == 2
    assert list(model.spec.score.cleaning) == ["liver"], "what was validated is part of the model"
    assert pipeline.score(settings)["scored"] == 12
    found = masks(settings)
    for row in tables.volumes(settings.lake).rows()[:3]:
        assert np.array_equal(found[row["uid"]], model.predict(image_of(row)).array)
    said = settings.score.model_copy(update={"postprocess": None})
    assert pipeline.score(settings.model_copy(update={"score": said}))["scored"] == 0, "silence is the model's own"


def test_other_settings_are_other_predictions(project):
    settings, _, _ = project
    said = settings.score.model_copy(update={"postprocess": {}, "mirrors": (0, 1)})
    elsewhere = settings.model_copy(update={"score": said})
    assert pipeline.score(elsewhere)["scored"] == 12 and pipeline.score(elsewhere)["scored"] == 0
    model = sparkmed.load_model("models:/phantom@champion", tracking_uri=tracking.of(settings).uri, device="cpu").with_settings(
        said
    )
    row = tables.volumes(settings.lake).rows()[0]
    digests = {r["config_digest"] for r in tables.predictions(settings.lake).rows()}
    paths = [r["mask"] for r in tables.predictions(settings.lake).rows() if r["volume"] == row["uid"]]
    arrays = [formats.read_archive(storage.join(settings.lake, p))[0][0].array for p in paths]
    assert len(digests) == 2 and len(set(paths)) == 2
    assert any(np.array_equal(a, model.predict(image_of(row)).array) for a in arrays)


def test_an_ensemble_scores_once_under_the_digests_of_all(project, tmp_path):
    settings, _, _ = project
    registry = tracking.of(settings)
    version = registered(registry, tmp_path, 5)
    elsewhere = settings.model_copy(update={"score": settings.score.model_copy(update={"ensemble": ("champion", version)})})
    before = {r["key"] for r in tables.predictions(settings.lake).rows()}
    assert pipeline.score(elsewhere)["scored"] == 12 and pipeline.score(elsewhere)["scored"] == 0
    backwards = settings.score.model_copy(update={"ensemble": (version, f"models:/phantom/{registry.champion()}", version)})
    assert pipeline.score(settings.model_copy(update={"score": backwards}))["scored"] == 0
    rows = [r for r in tables.predictions(settings.lake).rows() if r["key"] not in before]
    (digest,) = {r["model_digest"] for r in rows}
    assert {r["model_version"] for r in rows} == {f"ensemble-{digest[:16]}"}
    url = dataset.pinned_model(settings.lake, digest)
    spec = models.read_spec(url, digest)
    learnt = ledger.trace(elsewhere, rows[0]["key"])["training"]["networks"]
    assert [n["seed"] for n in learnt] in ([0, 1, 5], [5, 0, 1]), "a cascade of two, and one"
    assert all(set(n) == {"dataset", "dataset_digest", "seed"} for n in learnt)
    looked = {r["model_digest"]: r for r in tables.watch(settings.lake).rows()}
    assert digest in looked and looked[digest]["model_version"] == rows[0]["model_version"], "what scores is watched"
    assert digest in {r["model_digest"] for r in tables.fingerprints(settings.lake).rows()}, "and was judged for it"
    assert {(m.name, m.digest) for m in spec.members} == {(f"models:/phantom/{v}", registry.digest(v)) for v in ("1", version)}
    members = [sparkmed.load_model(m.name, tracking_uri=registry.uri, device="cpu") for m in spec.members]
    row = tables.volumes(settings.lake).rows()[0]
    volume = image_of(row)
    mean = np.mean([m.probabilities(volume).array for m in members], 0)
    found = members[0].with_settings(settings.score).labels(volume.with_array(mean)).array
    assert np.mean(masks(settings, digest)[row["uid"]] == found) > 0.999
    other = registered(registry, tmp_path, 6, classes=("background", "kidneys", "liver"))
    wrong = settings.score.model_copy(update={"ensemble": ("champion", other)})
    with pytest.raises(InputError, match="an ensemble wants models of the same classes"):
        pipeline.score(settings.model_copy(update={"score": wrong}))
    with pytest.raises(InputError, match="models:/phantom@nobody: the registry has no such model or alias"):
        pipeline.score(settings.model_copy(update={"score": wrong.model_copy(update={"ensemble": ("nobody",)})}))


def test_another_first_model_is_another_dataset(project, tmp_path):
    settings, whole, done = project
    version = registered(whole, tmp_path, 2, classes=("background", "body"))
    whole.crown(version, "by hand")
    rows = [r for r in tables.volumes(settings.lake).rows() if r["split"]]
    assert dataset.version(rows, common.pinned(settings)) != dataset.describe(done["patches"]["dataset"])["version"]
    with pytest.raises(InputError, match="no finished patch dataset"):
        pipeline.train(settings)
    cascade = settings.preprocess.cascade.model_copy(update={"digest": whole.digest("1")})
    held = settings.model_copy(update={"preprocess": settings.preprocess.model_copy(update={"cascade": cascade})})
    with pytest.raises(InputError, match="is not the one that was asked for"):
        pipeline.patches(held)
    whole.crown("1", "by hand")
    assert pipeline.patches(held)["dataset"] == done["patches"]["dataset"] and pipeline.train(settings)["already"] == "trained"
    classifier = cascade.model_copy(update={"model": "models:/whole@nobody", "digest": ""})
    wrong = settings.model_copy(update={"preprocess": settings.preprocess.model_copy(update={"cascade": classifier})})
    assert any("models:/whole@nobody" in p for p in pipeline.check(wrong))


def test_a_model_that_was_changed_is_refused_before_anything_is_scored(project):
    settings, _, _ = project
    registry = tracking.of(settings)
    url = storage.local_path(registry.fetch("1", settings.lake))
    again = settings.model_copy(update={"score": settings.score.model_copy(update={"overlap": 0.1})})
    spec, weights = (url / "spec.json").read_bytes(), (url / "weights.safetensors").read_bytes()
    changed = json.loads(spec)
    changed["preprocess"]["intensity"]["low"] = -100
    for name, data, said in [
        ("spec.json", json.dumps(changed).encode(), "is not the one that was asked for: spec.json has SHA-256"),
        ("weights.safetensors", weights[:-1] + bytes([weights[-1] ^ 1]), "weights.safetensors has SHA-256"),
    ]:
        whole = (url / name).read_bytes()
        (url / name).write_bytes(data)
        with pytest.raises(InputError, match=said):
            pipeline.score(again)
        (url / name).write_bytes(whole)
    assert {r["config_digest"] for r in tables.predictions(settings.lake).rows()}.isdisjoint(
        {common.lineage(again, again.score)["config_digest"]}
    )


def test_an_ensemble_without_the_mirrors_of_its_members_is_another_prediction(tmp_path):
    registry = tracking.Registry(f"sqlite:///{tmp_path}/ml.db", "mean", "mean")
    members = {}
    for seed in range(2):
        registered(registry, tmp_path, seed, score=config.Score(mirrors=(0,)))
        members[str(seed)] = str(tmp_path / f"mean-{seed}")
    spec, _ = models.ensemble("mean", members, config.Score())
    models.gather(spec, members, str(tmp_path / "all"))
    plain = config.parse(ct_config(tmp_path / "archive", tmp_path / "lake"))

    def settings(mirrors):
        score = plain.score.model_copy(update={"mirrors": mirrors})
        return common.settings_digest(plain.model_copy(update={"score": score}), str(tmp_path / "all"))

    assert len({settings(m) for m in (None, (), (1,))}) == 3
