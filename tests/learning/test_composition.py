"""Mirrors, postprocessing, ensembles and cascades: what a model made of config and of other models predicts."""

import hashlib
import json
import subprocess
import sys
import weakref

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch

from learning.test_model import OBLIQUE, classifier, segmenter, volume
from sparkmed.config import Cascade, Cleaning, Intensity, Preprocess, Score
from sparkmed.formats import nifti
from sparkmed.imaging import postprocess, preprocess
from sparkmed.learning import inference, networks
from sparkmed.learning import model as models
from sparkmed.learning.model import Ensemble, Model
from sparkmed.rejection import InputError, Refused


def other(seed, **more) -> Model:
    """Of the same classes, with other weights."""
    model = segmenter(**more)
    torch.manual_seed(seed)
    spec = model.spec
    return Model(spec, networks.build(spec.network, spec.in_channels, len(spec.classes), spec.spatial_dims))


def saved(model, folder) -> str:
    model.save(str(folder))
    return str(folder)


def test_mirrors_belong_to_the_model_and_settings_may_say_others():
    plain, mirrored = segmenter(), segmenter(score=Score(overlap=0.25, mirrors=[0, 2]))
    ready = preprocess.apply(volume(), plain.spec.preprocess)
    wanted = inference.scores(plain.network, ready.array, (16, 16, 8), 0.25, mirrors=(0, 2))
    wanted = preprocess.to_input_grid(ready.with_array(wanted), volume()).array
    assert np.array_equal(mirrored.probabilities(volume()).array, wanted)
    assert np.array_equal(mirrored.with_settings(Score(overlap=0.25)).probabilities(volume()).array, wanted)
    without = mirrored.with_settings(Score(overlap=0.25, mirrors=[])).probabilities(volume()).array
    assert np.array_equal(without, plain.probabilities(volume()).array) and not np.array_equal(without, wanted)


def test_labels_are_cleaned_as_the_model_says_or_the_settings():
    model = segmenter()
    probabilities = model.probabilities(volume())
    cleaning = {"liver": Cleaning(threshold=0.3, components=1, fill_holes=True), "spleen": Cleaning(minimum_ml=0.1)}
    cleaned = model.with_settings(Score(overlap=0.25, postprocess=cleaning))
    found = cleaned.predict(volume())
    assert np.array_equal(found.array, postprocess.labels(probabilities, model.spec.classes, cleaning).array)
    assert not np.array_equal(found.array, model.predict(volume()).array)
    assert np.array_equal(cleaned.with_settings(Score(overlap=0.25)).predict(volume()).array, found.array)
    assert np.array_equal(
        cleaned.with_settings(Score(overlap=0.25, postprocess={})).predict(volume()).array, model.predict(volume()).array
    )


@pytest.fixture
def three(tmp_path):
    """Three models, the last with another preprocessing and window, by name and folder."""
    members = [other(1), other(2), other(3, preprocess=Preprocess(orientation="PIR", spacing=(1.5, 1.5, 2)), window=(8, 8, 8))]
    return members, {f"models:/organs/{i}": saved(m, tmp_path / str(i)) for i, m in enumerate(members)}


def gathered(folders, target, settings=Score()) -> str:  # noqa: B008
    spec, digest = models.ensemble("organs", folders, settings)
    models.gather(spec, folders, str(target))
    assert models.model_digest(str(target)) == digest
    return str(target)


def test_an_ensemble_is_the_mean_of_its_members(three, tmp_path):
    members, folders = three
    ensemble = Model.load(gathered(folders, tmp_path / "all"))
    assert isinstance(ensemble, Ensemble) and len(ensemble.members) == 3
    wanted = np.mean([m.probabilities(volume()).array for m in members], 0)
    found = ensemble.probabilities(volume())
    np.testing.assert_allclose(found.array, wanted, atol=1e-6)
    assert np.array_equal(found.affine, OBLIQUE) and found.sources == volume().sources
    assert np.array_equal(ensemble.predict(volume()).array[0], found.array.argmax(0))
    mirrored = ensemble.with_settings(Score(overlap=0.0, mirrors=[1], postprocess={"liver": Cleaning(components=1)}))
    wanted = np.mean([m.with_settings(Score(overlap=0.0, mirrors=[1])).probabilities(volume()).array for m in members], 0)
    np.testing.assert_allclose(mirrored.probabilities(volume()).array, wanted, atol=1e-6)
    assert np.array_equal(mirrored.predict(volume()).array, mirrored.labels(mirrored.probabilities(volume())).array)
    with pytest.raises(ValueError, match="preprocess in different ways"):
        ensemble.predict_patches(np.zeros((1, 1, 16, 16, 8), np.float32))


def test_the_digest_of_an_ensemble_holds_all_members_in_any_order(three, tmp_path):
    _, folders = three
    spec, digest = models.ensemble("organs", folders, Score())
    backwards = dict(reversed(folders.items()))
    assert models.ensemble("organs", backwards, Score()) == (spec, digest)
    assert {m.digest for m in spec.members} == {models.model_digest(f) for f in folders.values()}
    fewer = dict(list(folders.items())[:2])
    assert models.ensemble("organs", fewer, Score())[1] != digest
    first = next(iter(folders.values()))
    twice = models.ensemble("organs", {"a": first, "b": first}, Score())[0]
    assert len(twice.members) == 1


def test_an_ensemble_holds_the_maps_of_one_member_at_a_time(three, tmp_path, monkeypatch):
    _, folders = three
    ensemble, alive = Model.load(gathered(folders, tmp_path / "all")), []
    whole = Model.probabilities

    def watched(self, image):
        assert sum(r() is not None for r in alive) <= 1, "the sum alone"
        found = whole(self, image)
        alive.append(weakref.ref(found.array))
        return found

    monkeypatch.setattr(Model, "probabilities", watched)
    Ensemble.probabilities(ensemble, volume())
    assert len(alive) == 3


def test_members_that_do_not_fit_are_refused_in_a_sentence(three, tmp_path):
    _, folders = three
    swapped = saved(other(4, classes=("background", "spleen", "liver")), tmp_path / "swapped")
    with pytest.raises(InputError, match=r"same classes: models:/organs/0 predicts \['background', 'liver', 'spleen'\].*swapped"):
        models.ensemble("organs", folders | {"swapped": swapped}, Score())
    one = saved(other(5, score=Score(postprocess={"liver": Cleaning(components=1)})), tmp_path / "one")
    with pytest.raises(InputError, match="models:/organs/0 and one postprocess in different ways: say in score.postprocess"):
        models.ensemble("organs", folders | {"one": one}, Score())
    said = Score(postprocess={"spleen": Cleaning(components=2)})
    assert models.ensemble("organs", folders | {"one": one}, said)[0].score.cleaning == said.cleaning
    nested = gathered(folders, tmp_path / "all")
    with pytest.raises(InputError, match="nested is an ensemble itself"):
        models.ensemble("organs", {"nested": nested, **folders}, Score())
    member = next((tmp_path / "all" / "members").iterdir())
    damaged = bytearray((member / "weights.safetensors").read_bytes())
    damaged[-1] ^= 1
    (member / "weights.safetensors").write_bytes(damaged)
    with pytest.raises(InputError, match=f"{member.name}: weights.safetensors has SHA-256"):
        Model.load(nested)


def test_an_ensemble_of_classifiers(tmp_path):
    folders, members = {}, []
    for seed in (1, 2):
        model = classifier((8, 8, 1))
        torch.manual_seed(seed)
        members.append(Model(model.spec, networks.build(model.spec.network, 1, 2, 2)))
        folders[f"models:/x/{seed}"] = saved(members[-1], tmp_path / str(seed))
    picture = volume((3, 50, 40, 1), np.eye(4))
    found = Model.load(gathered(folders, tmp_path / "all")).predict(picture)
    assert np.asarray(found) == pytest.approx(np.mean([np.asarray(m.predict(picture)) for m in members], 0))
    patches = np.random.default_rng(0).normal(size=(3, 1, 8, 8, 1)).astype(np.float32)
    found = Model.load(str(tmp_path / "all")).predict_patches(patches)
    np.testing.assert_allclose(found, np.mean([m.predict_patches(patches) for m in members], 0), atol=1e-6)


def cascade(tmp_path, output="labels"):
    """(first, second, folder of the second): the second sees the image and what the first finds, on a grid of its own."""
    first = other(7, preprocess=Preprocess(orientation="LPS", spacing=(1.3, 1.3, 2.5)), score=Score(overlap=0.0))
    whole = saved(first, tmp_path / "whole")
    pinned = Cascade(model="models:/whole/3", output=output, digest=models.model_digest(whole), classes=first.spec.classes[1:])
    spec = segmenter().spec.model_copy(
        update={
            "name": "core", "classes": ("background", "core"), "in_channels": 3,
            "preprocess": Preprocess(spacing=(1, 1, 2), intensity=Intensity(kind="zscore"), cascade=pinned),
        }
    )  # fmt: skip
    torch.manual_seed(8)
    second = Model(spec, networks.build(spec.network, 3, 2, 3), first=first)
    models.copy(whole, str(tmp_path / "core" / "first"))
    second.save(str(tmp_path / "core"))
    return first, second, tmp_path / "core"


@pytest.mark.parametrize("output", ["labels", "probabilities"])
def test_the_second_of_a_cascade_sees_what_the_first_says(tmp_path, output):
    first, second, folder = cascade(tmp_path, output)
    alone = second.spec.preprocess.model_copy(update={"cascade": None})
    ready = preprocess.apply(volume(), alone)
    if output == "labels":  # by hand: image first, then a channel per foreground class, unscaled, nearest neighbour
        found = preprocess.place(first.predict(volume()), alone, order=0).array[0]
        more = np.stack([found == 1, found == 2]).astype(np.float32)
        assert 0 < more[0].mean() < 1
    else:
        more = preprocess.place(volume().with_array(first.probabilities(volume()).array[1:]), alone).array
    array = np.concatenate([ready.array, more])
    scores = inference.scores(second.network, array, (16, 16, 8), 0.25)
    wanted = preprocess.to_input_grid(ready.with_array(scores), volume()).array
    loaded = Model.load(str(folder))
    for model in (second, loaded):
        assert np.array_equal(model.probabilities(volume()).array, wanted)
    blind = np.concatenate([ready.array, np.zeros_like(more)])
    assert not np.allclose(inference.scores(second.network, blind, (16, 16, 8), 0.25), scores), "it looks at them"
    settings = loaded.with_settings(Score(overlap=0.25, mirrors=[0]))
    assert settings.first.spec == loaded.first.spec, "the first is as the second was trained on"
    with pytest.raises(Refused, match="image has 2 channels, the model takes 1"):
        loaded.predict(volume((2, 20, 18, 7)))


def test_a_cascade_is_whole_or_refused(tmp_path):
    _, second, folder = cascade(tmp_path)
    with pytest.raises(InputError, match="first: no spec.json"):
        second.save(str(tmp_path / "bare"))
    with pytest.raises(InputError, match="its first model is not at hand"):
        Model(second.spec, second.network).predict(volume())
    elsewhere = tmp_path / "elsewhere"
    models.copy(str(folder), str(elsewhere), models.model_digest(str(folder)))
    paths = lambda f: {str(p.relative_to(f)): p.read_bytes() for p in f.rglob("*") if p.is_file()}  # noqa: E731
    assert paths(elsewhere) == paths(folder)
    assert sorted(paths(folder)) == ["first/spec.json", "first/weights.safetensors", "spec.json", "weights.safetensors"]
    saved(other(9), elsewhere / "first")  # another one, sound by itself
    with pytest.raises(InputError, match="first is not the one that was asked for"):
        Model.load(str(elsewhere))
    spec = json.loads((folder / "spec.json").read_text())
    spec["preprocess"]["cascade"]["classes"] = ["liver"]
    (folder / "spec.json").write_text(json.dumps(spec))
    with pytest.raises(InputError, match=r"wants a first model of \['liver'\], has \['liver', 'spleen'\]"):
        Model.load(str(folder))


def test_pyfunc_takes_cascades_and_ensembles(tmp_path):
    _, second, folder = cascade(tmp_path)
    nifti.write(volume(), str(tmp_path / "image.nii.gz"))
    frame = pd.DataFrame({"uri": [str(tmp_path / "image.nii.gz")]})
    row = models._load_pyfunc(str(folder)).predict(frame).iloc[0]
    assert row["ml_core"] == pytest.approx(models.volumes_ml(second.predict(volume()), second.spec.classes)["core"], rel=0.01)
    both = gathered({"a": str(folder), "b": str(folder)}, tmp_path / "both")
    assert models._load_pyfunc(both).predict(frame).iloc[0]["ml_core"] == pytest.approx(row["ml_core"], rel=1e-6)


# After the imports nothing that is unpickled finds a class, and nothing is started or fetched: CPython tells of it in audit events.
WITHOUT_PICKLES = """
import pickle, sys
import mlflow.pyfunc, numpy as np, torch
import sparkmed.learning.model, monai.networks.nets
armed = False
def audit(event, arguments):
    if armed and event in ("pickle.find_class", "subprocess.Popen", "os.system", "urllib.Request"):
        raise RuntimeError(f"{event} {arguments}")
sys.addaudithook(audit)
def refuse(*_, **__):
    raise RuntimeError("torch.load")
armed, torch.load = True, refuse
for path, channels in zip(sys.argv[1::2], map(int, sys.argv[2::2])):
    print(mlflow.pyfunc.load_model(path).predict(np.zeros((1, channels, 16, 16, 8), np.float32)).shape)
try:
    pickle.loads(pickle.dumps(np.dtype))
except RuntimeError:
    print("a pickle would have been seen")
"""


def test_plain_mlflow_loads_them_without_a_pickle(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    _, _, folder = cascade(tmp_path)
    saved(other(1, classes=("background", "core")), tmp_path / "plain")
    command = [sys.executable, "-c", WITHOUT_PICKLES]
    for name, path, channels in zip(
        ("plain", "cascade", "ensemble"),
        (tmp_path / "plain", folder, gathered({"a": str(folder)}, tmp_path / "all")),
        (1, 3, 3),
        strict=True,
    ):
        how = {"loader_module": "sparkmed.learning.model", "pip_requirements": ["sparkmed"]}  # else MLflow loads it to find out
        mlflow.pyfunc.save_model(str(tmp_path / "saved" / name), data_path=str(path), **how)
        command += [str(tmp_path / "saved" / name), str(channels)]
    ended = subprocess.run(command, capture_output=True, text=True)
    shapes = ["(1, 2, 16, 16, 8)"] * 3
    assert ended.stdout.splitlines() == [*shapes, "a pickle would have been seen"], ended.stderr[-2000:]


def test_a_network_of_another_kind_below_a_cascade_is_refused_too(tmp_path):
    _, _, folder = cascade(tmp_path)
    spec = json.loads((folder / "first" / "spec.json").read_text())
    spec["network"] = {"name": "os.system", "command": f"touch {tmp_path}/ran"}
    data = safetensors.torch.save({"x": torch.zeros(1)})
    (folder / "first" / "weights.safetensors").write_bytes(data)
    spec["weights_sha256"] = hashlib.sha256(data).hexdigest()
    (folder / "first" / "spec.json").write_text(json.dumps(spec))
    with pytest.raises(InputError, match="is not the one that was asked for"):
        Model.load(str(folder))
    with pytest.raises(InputError, match="network os.system is refused"):
        Model.load(str(folder / "first"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("digest", ["", "../../elsewhere", "A" * 64])
def test_a_member_or_a_first_model_is_named_by_its_digest_alone(three, tmp_path, digest):
    url = tmp_path / "mean"
    gathered(three[1], url)
    spec = json.loads((url / "spec.json").read_text())
    spec["members"][0]["digest"] = digest
    saved(other(9), url / "members")  # what no digest at all would find
    (url / "spec.json").write_text(json.dumps(spec))
    with pytest.raises(InputError, match="spec.json is not a model spec"):
        Model.load(str(url))
    _, second, folder = cascade(tmp_path)
    unpinned = second.spec.preprocess.cascade.model_copy(update={"digest": ""})
    preprocess = second.spec.preprocess.model_copy(update={"cascade": unpinned})
    second.spec = second.spec.model_copy(update={"preprocess": preprocess})
    second.save(str(folder))
    with pytest.raises(InputError, match="names no digest of its first model"):
        Model.load(str(folder))
