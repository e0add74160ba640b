import hashlib
import io
import json

import numpy as np
import pandas as pd
import pytest
import safetensors.torch
import torch
from formats import dicoms

from sparkmed.config import Cells, Component, Crops, Intensity, Nuclei, Preprocess, Score
from sparkmed.imaging import postprocess, preprocess
from sparkmed.imaging.volume import Volume
from sparkmed.learning import inference, networks
from sparkmed.learning import model as models
from sparkmed.learning.model import ClassProbabilities, Model, ModelSpec
from sparkmed.rejection import InputError, Refused

OBLIQUE = np.array([[-0.8, 0.1, 0, 5], [0.08, 1.0, 0.1, -7], [0, -0.1, 2.0, 9], [0, 0, 0, 1]])


def segmenter(**more) -> Model:
    spec = ModelSpec(
        **{
            "name": "organs", "task": "segmentation", "classes": ("background", "liver", "spleen"),
            "in_channels": 1, "spatial_dims": 3, "window": (16, 16, 8),
            "network": Component(name="UNet", channels=[4, 8], strides=[2]),
            "preprocess": Preprocess(orientation="RAS", spacing=(1, 1, 2)), "score": Score(overlap=0.25),
        }
        | more
    )  # fmt: skip
    torch.manual_seed(0)
    return Model(spec, networks.build(spec.network, spec.in_channels, len(spec.classes), spec.spatial_dims))


def classifier(window=(16, 16, 1)) -> Model:
    return segmenter(
        task="classification", classes=("abd", "chst"), spatial_dims=2, window=window, network=Component(name="resnet10"),
        preprocess=Preprocess(orientation=None, size=(16, 16, 1), channels="gray", intensity=Intensity(kind="percentile")),
    )  # fmt: skip


def volume(shape=(1, 20, 18, 7), affine=OBLIQUE, seed=0) -> Volume:
    array = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return Volume(array, affine, series_uid="1.2.3", modality="MR", sources=("file:///a.nii.gz",))


@pytest.mark.parametrize("shape", [(1, 20, 18, 7), (1, 5, 40, 3), (1, 33, 4, 1)])
def test_labels_are_on_the_inputs_own_grid(shape):
    prediction = segmenter().predict(volume(shape))
    assert prediction.array.shape == shape and prediction.array.dtype == np.uint8
    assert np.array_equal(prediction.affine, OBLIQUE)
    assert (prediction.series_uid, prediction.modality, prediction.sources) == ("1.2.3", "MR", ("file:///a.nii.gz",))


def test_probabilities_add_up_and_agree_with_the_labels():
    model = segmenter()
    scores = model.probabilities(volume())
    assert scores.array.shape == (3, 20, 18, 7) and np.allclose(scores.array.sum(0), 1, atol=1e-4)
    assert np.array_equal(scores.array.argmax(0), model.predict(volume()).array[0])
    assert np.array_equal(model.predict(volume()).array, model.predict(volume()).array)


@pytest.mark.parametrize("orientation", ["RAS", "SPL", None])
@pytest.mark.parametrize("spacing", [None, (0.6, 1.7, 1.1)])
def test_planes_as_they_come_are_those_of_the_whole(orientation, spacing):
    model = segmenter(preprocess=Preprocess(orientation=orientation, spacing=spacing))
    image = volume((1, 40, 18, 33))
    ready = preprocess.apply(image, model.spec.preprocess)
    scores = inference.scores(model.network, ready.array, model.spec.window, 0.25)
    whole = preprocess.to_input_grid(ready.with_array(scores), image)
    found = model.segment(image, keep=True)
    assert np.array_equal(found.probabilities.array, whole.array)
    labels = postprocess.as_labels(whole).array
    assert np.array_equal(found.labels.array, labels) and len(np.unique(labels)) > 1
    assert found.voxels == [int((labels == c).sum()) for c in range(3)]
    for c, mean in enumerate(found.means):
        assert mean == (pytest.approx(whole.array[c][labels[0] == c].mean(dtype=np.float64)) if found.voxels[c] else None)


def test_a_volume_in_a_list_is_taken_out_of_it():
    given = [volume()]
    assert np.array_equal(segmenter().segment(given).labels.array, segmenter().predict(volume()).array)
    assert given == []


def test_saved_and_loaded_it_predicts_the_same(tmp_path):
    model = segmenter()
    model.save(str(tmp_path / "model"))
    loaded = Model.load(str(tmp_path / "model"))
    assert loaded.spec == model.spec and len(loaded.spec.weights_sha256) == 64
    assert np.array_equal(loaded.predict(volume()).array, model.predict(volume()).array)
    assert {p.name for p in (tmp_path / "model").iterdir()} == {"weights.safetensors", "spec.json"}


def flip_a_byte(folder):
    data = bytearray((folder / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "weights.safetensors").write_bytes(data)


def changed(change):
    """A spec that somebody wrote anew."""

    def damage(folder):
        spec = json.loads((folder / "spec.json").read_text())
        change(spec)
        (folder / "spec.json").write_text(json.dumps(spec))

    return damage


def with_weights(data):
    """Other bytes of weights, of which the spec knows."""

    def damage(folder):
        (folder / "weights.safetensors").write_bytes(data)
        changed(lambda s: s.update(weights_sha256=hashlib.sha256(data).hexdigest()))(folder)

    return damage


def pickled():
    stream = io.BytesIO()
    torch.save({"x": torch.zeros(1)}, stream)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (flip_a_byte, "weights.safetensors has SHA-256"),
        (changed(lambda s: s["network"].update(channels=[4, 16])), "another network than the weights were saved with"),
        (changed(lambda s: s.update(classes=["background", "spleen", "liver"])), "says another classes than the weights"),
        (changed(lambda s: s["preprocess"].update(spacing=[1, 1, 1])), "says another preprocess than the weights"),
        (changed(lambda s: s["score"].update(mirrors=[0])), "says another score than the weights"),
        (changed(lambda s: s.update(window=[8, 8, 8], seed=1)), "says another window, seed than the weights"),
        (with_weights(safetensors.torch.save({"x": torch.zeros(3)})), "weights do not fit network UNet: .*Missing key"),
        (with_weights(pickled()), "weights.safetensors is not safetensors"),
        (changed(lambda s: s["network"].update(name="os.system")), "says another network"),
        (changed(lambda s: s.pop("task")), "spec.json is not a model spec.*task"),
        (lambda f: (f / "spec.json").write_text("[1]"), "spec.json is not a model spec"),
        (lambda f: (f / "spec.json").write_bytes(b"\xff\xfe"), "spec.json is not a model spec"),
        (lambda f: (f / "spec.json").write_text("{"), "spec.json is not a model spec"),
        (lambda f: (f / "spec.json").unlink(), "no spec.json"),
        (lambda f: (f / "weights.safetensors").unlink(), "no weights.safetensors"),
    ],
)
def test_damaged_models_are_refused(tmp_path, damage, said):
    segmenter().save(str(tmp_path))
    damage(tmp_path)
    with pytest.raises(InputError, match=said):
        Model.load(str(tmp_path))


@pytest.mark.parametrize("model", [segmenter(), classifier()])
def test_another_number_of_channels_is_refused(model):
    two = volume((2, 20, 18, 7) if model.spec.task == "segmentation" else (2, 20, 18, 1))
    with pytest.raises(Refused) as e:
        model.predict(two)
    assert e.value.reason == "CHANNELS"


@pytest.mark.parametrize("window", [(16, 16, 1), (8, 8, 1)])
def test_class_probabilities(window):
    prediction = classifier(window).predict(volume((3, 50, 40, 1), np.eye(4)))
    assert list(prediction) == ["abd", "chst"] and sum(prediction.values()) == pytest.approx(1, abs=1e-5)
    assert prediction.label == max(prediction, key=prediction.get)
    assert np.asarray(prediction).tolist() == pytest.approx(list(prediction.values()))
    with pytest.raises(ValueError, match="is a classification"):
        classifier().probabilities(volume())


@pytest.mark.parametrize("window", [(16, 16, 1), (8, 8, 1)])
@pytest.mark.parametrize("mirrors", [(), (0, 1)])
def test_features_are_what_the_last_layer_sees(window, mirrors):
    model = classifier(window).with_settings(Score(mirrors=mirrors))
    image = volume((3, 40, 30, 1))
    probabilities, features = model.embed(image)
    assert probabilities == model.predict(image) and features.dtype == np.float32 and features.shape == (512,)
    seen, layer = [], model.network.plane.fc
    hook = layer.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output)))
    model.predict(image)
    hook.remove()
    into, out = (torch.cat(x) for x in zip(*seen, strict=True))
    assert len(into) == (16 // window[0]) ** 2 * 2 ** len(mirrors)
    np.testing.assert_allclose(features, into.mean(0), atol=1e-6)
    np.testing.assert_allclose(list(probabilities.values()), out.softmax(1).mean(0), atol=1e-6)


FOUND = Cells(crops=Crops(size=16), nuclei=Nuclei(diameter=9), channel=1)


def cell_classifier(cells=FOUND, **more) -> Model:
    return segmenter(
        task="classification", classes=("dead", "alive"), spatial_dims=2, window=(16, 16, 1), in_channels=2, cells=cells,
        network=Component(name="DenseNet121", init_features=4, growth_rate=2, block_config=[1, 1]),
        preprocess=Preprocess(orientation=None), **more,
    )  # fmt: skip


def cells(many=7, seed=0) -> Volume:
    """A field of nuclei in two channels, some at its border."""
    rng = np.random.default_rng(seed)
    array = rng.normal(20, 2, (2, 90, 80, 1)).astype(np.float32)
    i, j = np.ogrid[:90, :80]
    for a, b in [(20, 20), (20, 50), (45, 30), (50, 62), (75, 15), (70, 45), (88, 70)][:many]:
        array[1, (i - a) ** 2 + (j - b) ** 2 < 20, 0] += 100
    return Volume(array, np.diag([-1, -1, 1, 1]))


@pytest.mark.parametrize("mirrors", [(), (0, 1)])
def test_a_field_is_what_is_said_of_its_cells(mirrors):
    model, field = cell_classifier(score=Score(mirrors=mirrors, window_batch=4)), cells()
    batches, profiles, seen = [], [], []
    hooks = [
        model.network.plane.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0]))),
        networks.last_linear(model.network, 2, "").register_forward_pre_hook(lambda _, inputs: profiles.append(inputs[0])),
    ]
    found = model.cells(field, features=True)
    assert batches == [4] * 2 ** len(mirrors) + [2] * 2 ** len(mirrors), "no more than a batch is cut at a time"
    assert len(found.cells) == len(set(found.cells)) == 6 and "7" not in found.cells, "one lies at the border"
    ready = preprocess.apply(field, model.spec.preprocess).array
    for x, y in zip(found.x, found.y, strict=True):
        i, j = round(x), round(y)
        seen.append(ready[:, i - 8 : i + 8, j - 8 : j + 8])
    profiles.clear()
    by_hand = model.predict_patches(np.stack(seen))
    np.testing.assert_allclose(found.probabilities, by_hand, atol=1e-5)
    of_cells = torch.stack([torch.cat(profiles[m :: 2 ** len(mirrors)]) for m in range(2 ** len(mirrors))]).mean(0)
    probabilities, profile = model.embed(field)
    np.testing.assert_allclose(profile, np.median(of_cells.numpy(), 0), atol=1e-5)
    assert probabilities == model.predict(field) and np.asarray(probabilities) == pytest.approx(by_hand.mean(0), abs=1e-5)
    for hook in hooks:
        hook.remove()


def test_cells_of_a_table_are_given(tmp_path):
    finder, field = cell_classifier(), cells()
    found = finder.cells(field)
    model = cell_classifier(Cells(crops=Crops(size=16)))
    centres = pd.DataFrame({"cell": found.cells, "x": found.x, "y": found.y})
    assert model.listed and not finder.listed and model.predict(field, centres) == finder.predict(field)
    model.save(str(tmp_path))
    loaded = Model.load(str(tmp_path))
    assert loaded.spec.cells == model.spec.cells and loaded.predict(field, centres) == finder.predict(field)
    with pytest.raises(InputError, match="wanted centres with columns cell, x and y"):
        model.predict(field)
    with pytest.raises(InputError, match="wanted no centres"):
        finder.predict(field, centres)
    spec = models.EnsembleSpec(name="e", task="classification", classes=("dead", "alive"), members=())
    both = models.Ensemble(spec, [finder, model])
    assert both.listed and np.asarray(both.predict(field, centres)) == pytest.approx(np.asarray(finder.predict(field)), abs=1e-6)
    with pytest.raises(InputError, match="cells of its own"):
        both.cells(field, centres)


def test_a_field_that_cannot_be_told_by_its_cells_is_refused():
    for model, field, reason in (
        (cell_classifier(), cells(0), "NO_CELLS"),
        (cell_classifier(FOUND.model_copy(update={"channel": 2})), cells(), "CHANNELS"),
        (cell_classifier(), cells().with_array(cells().array[:1]), "CHANNELS"),
    ):
        with pytest.raises(Refused) as e:
            model.predict(field)
        assert e.value.reason == reason
    with pytest.raises(InputError, match="sees whole images"):
        classifier().cells(cells())


def test_features_of_what_has_none_are_refused():
    with pytest.raises(InputError, match="is a segmentation"):
        segmenter().embed(volume())
    with pytest.raises(InputError, match="no last linear layer into 3 classes"):
        networks.last_linear(classifier().network, 3, "resnet10")
    ensemble = models.Ensemble(classifier().spec, [classifier(), classifier()])
    with pytest.raises(InputError, match="take one model"):
        ensemble.embed(volume())


def test_patches():
    assert segmenter().predict_patches(np.zeros((2, 1, 16, 16, 8), np.float32)).shape == (2, 3, 16, 16, 8)
    assert classifier().predict_patches(np.zeros((5, 1, 16, 16, 1), np.float32)).shape == (5, 2)
    for wrong in ((1, 16, 16, 8), (2, 3, 16, 16, 8)):
        with pytest.raises(ValueError, match=r"takes \(B, 1, I, J, K\)"):
            segmenter().predict_patches(np.zeros(wrong, np.float32))


def test_volumes_in_ml():
    array = np.zeros((1, 10, 10, 10), np.uint8)
    array[0, :5] = 1
    found = models.volumes_ml(Volume(array, np.diag([2.0, 2, 2, 1])), ("background", "liver", "spleen"))
    assert found == {"liver": pytest.approx(500 * 0.008), "spleen": 0.0}


def test_as_pyfunc(tmp_path):
    nibabel = pytest.importorskip("nibabel")
    uris = []
    for i in range(2):
        nibabel.save(nibabel.Nifti1Image(volume(seed=i).array[0], OBLIQUE), tmp_path / f"{i}.nii.gz")
        uris.append(f"file://{tmp_path}/{i}.nii.gz")
    model = segmenter()
    model.save(str(tmp_path / "model"))
    loaded = models._load_pyfunc(str(tmp_path / "model"))
    rows = loaded.predict(pd.DataFrame({"uri": uris}, index=[5, 6]))
    assert list(rows.columns) == ["uri", "ml_liver", "ml_spleen"] and list(rows.index) == [5, 6]
    expected = models.volumes_ml(model.predict(volume()), model.spec.classes)
    assert rows.loc[5, "ml_liver"] == pytest.approx(expected["liver"], rel=0.01, abs=1e-3)
    patches = np.zeros((1, 1, 16, 16, 8), np.float32)
    assert np.array_equal(loaded.predict(patches), model.predict_patches(patches))
    with pytest.raises(InputError, match="column uri"):
        loaded.predict(pd.DataFrame({"path": uris}))
    with pytest.raises(InputError, match="0 volumes, wanted 1"):
        (tmp_path / "broken.nii.gz").write_bytes(b"broken")
        loaded.predict(pd.DataFrame({"uri": [f"file://{tmp_path}/broken.nii.gz"]}))


class Touch(torch.nn.Module):
    """A network that is not MONAI's: building it leaves a trace."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.layer = torch.nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, x):
        return self.layer(x)


def test_a_spec_cannot_allow_its_own_network(tmp_path):
    foreign = Component(name=f"{Touch.__module__}.Touch")
    spec = segmenter().spec.model_copy(update={"network": foreign})
    Model(spec, Touch(1, 3)).save(str(tmp_path))
    with pytest.raises(InputError, match=f"network {foreign.name} is refused: it is not below monai.networks.nets"):
        Model.load(str(tmp_path))
    with pytest.raises(InputError, match="is refused"):
        models._load_pyfunc(str(tmp_path))
    for loaded in (
        Model.load(str(tmp_path), imports=[Touch.__module__]),
        models._load_pyfunc(str(tmp_path), {"imports": [Touch.__module__]}).model,
    ):
        assert isinstance(loaded.network, Touch)


@pytest.mark.parametrize("name", ["os.system", "subprocess.Popen", "torch.load", "monai.networks.nets.unet.SkipConnection"])
def test_a_spec_that_names_something_else_is_refused(tmp_path, name):
    model = segmenter()
    named = Component(name=name, command=f"touch {tmp_path}/ran", args=["touch", f"{tmp_path}/ran"], f=str(tmp_path))
    Model(model.spec.model_copy(update={"network": named}), model.network).save(str(tmp_path))
    with pytest.raises(InputError, match=f"network {name} is refused"):
        Model.load(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_a_model_that_is_not_the_one_of_the_digest_is_refused(tmp_path):
    segmenter().save(str(tmp_path))
    digest = models.model_digest(str(tmp_path))
    assert Model.load(str(tmp_path), digest=digest).spec.name == "organs"
    with pytest.raises(InputError, match="is not the one that was asked for: spec.json has SHA-256"):
        Model.load(str(tmp_path), digest="0" * 64)


def test_weights_of_before_that_do_not_say_their_spec_are_taken(tmp_path):
    model = segmenter()
    model.save(str(tmp_path))
    with_weights(safetensors.torch.save(model.network.state_dict()))(tmp_path)
    assert np.array_equal(Model.load(str(tmp_path)).predict(volume()).array, model.predict(volume()).array)


def test_plain_mlflow_loads_it(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    segmenter().save(str(tmp_path / "data"))
    how = {"loader_module": "sparkmed.learning.model", "pip_requirements": ["sparkmed"]}  # else MLflow loads it to find out
    mlflow.pyfunc.save_model(str(tmp_path / "saved"), data_path=str(tmp_path / "data"), **how)
    loaded = mlflow.pyfunc.load_model(str(tmp_path / "saved"))
    assert loaded.predict(np.zeros((1, 1, 16, 16, 8), np.float32)).shape == (1, 3, 16, 16, 8)


def test_segmentations_beside_an_image_are_not_scored(tmp_path):
    sources = dicoms.series(dicoms.stack((12, 10, 6)))
    dicoms.write(tmp_path, sources)
    dicoms.seg(sources, np.ones((6, 10, 12), np.uint8), ("liver",)).save_as(tmp_path / "seg.dcm")
    answer = models._PyFunc(segmenter()).predict(pd.DataFrame({"uri": [str(tmp_path)]}))
    assert list(answer.columns) == ["uri", "ml_liver", "ml_spleen"] and len(answer) == 1


def test_class_probabilities_are_a_plain_mapping():
    p = ClassProbabilities(a=0.25, b=0.75)
    assert p.label == "b" and dict(p) == {"a": 0.25, "b": 0.75} and np.asarray(p, np.float64).dtype == np.float64


def test_probabilities_that_are_no_numbers_are_refused():
    model = classifier()
    with torch.no_grad():
        next(model.network.parameters()).fill_(float("nan"))
    with pytest.raises(Refused, match="are not numbers") as refused:
        model.predict(volume((1, 16, 16, 1)))
    assert refused.value.reason == "NOT_FINITE"
