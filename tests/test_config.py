import pathlib

import pytest

from sparkmed import config
from sparkmed.rejection import InputError

LEAST = {"name": "p", "task": "segmentation", "classes": ["background", "organ"], "archive": "a"}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"trian": {}}, "unknown key trian; did you mean train?"),
        ({"train": {"epoch": 3}}, "did you mean train.epochs?"),
        ({"volumes": {"labels": {"patern": "x"}}}, "did you mean volumes.labels.pattern?"),
        ({"train": {"network": {"nam": "UNet"}}}, "train.network.name is missing"),
        ({"train": {"epochs": 0}}, "train.epochs: Input should be greater than 0, got 0"),
        ({"classes": ["a"]}, "classes"),
        ({"classes": ["a", "a"]}, "classes repeat"),
        ({"patches": {"class_weights": [1.0]}}, "wants 2 weights"),
        ({"preprocess": {"intensity": {"kind": "window", "low": 3, "high": 1}}}, "wants low < high"),
        ({"task": "classification"}, "wants preprocess.size"),
        ({"task": "classification", "preprocess": {"size": [8, 8, 1]}, "patches": {"sampler": "balanced"}}, "needs label images"),
        ({"volumes": {"splits": {"train": 0.9, "val": 0.2, "test": 0.1}}}, "train + val + test is 1.2"),
        ({"volumes": {"labels": {"pattern": "l/{subject}", "csv": "l.csv"}}}, "both pattern and csv"),
        ({"preprocess": {"orientation": "RAX"}}, "preprocess.orientation"),
    ],
)
def test_a_wrong_config_is_one_sentence(change, sentence):
    with pytest.raises(InputError, match=sentence.replace("?", r"\?").replace("+", r"\+")):
        config.parse(LEAST | change)


def test_overrides_replace_values_at_any_depth(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("name: p\ntask: segmentation\nclasses: [a, b]\narchive: a\n")
    loaded = config.load(str(path), ["archive=/data", "train.epochs=3", "train.optimizer.lr=0.01", "patches.size=[8,8,8]"])
    assert (loaded.archive, loaded.train.epochs, loaded.train.optimizer.lr, loaded.patches.size) == ("/data", 3, 0.01, (8, 8, 8))
    with pytest.raises(InputError, match="wanted key=value"):
        config.load(str(path), ["train.epochs"])
    with pytest.raises(InputError, match="name is a value, not a section"):
        config.load(str(path), ["name.x=1"])


def test_files_that_are_no_config(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        config.load(str(tmp_path / "missing.yaml"))
    for text, sentence in [("a: [", "not YAML"), ("- a", "wanted a mapping"), ("name: p\nname: q", "occurs twice")]:
        path = tmp_path / "c.yaml"
        path.write_text(text)
        with pytest.raises(InputError, match=sentence):
            config.load(str(path))


def test_a_classifier_sees_whole_images_by_default():
    loaded = config.parse(LEAST | {"task": "classification", "preprocess": {"size": [64, 64, 1]}})
    assert loaded.patches.size == (64, 64, 1)
    assert loaded.patches.sampler == "grid"


def test_digest_follows_values_not_spelling():
    a = config.parse(LEAST | {"seed": 0})
    assert config.digest(a) == config.digest(config.parse(LEAST))
    assert config.digest(a) != config.digest(config.parse(LEAST | {"seed": 1}))


def test_components_keep_their_arguments():
    c = config.parse(LEAST | {"train": {"network": {"name": "UNet", "channels": [4, 8]}}})
    assert c.train.network.arguments == {"channels": [4, 8]}


@pytest.mark.parametrize("path", sorted(pathlib.Path(__file__).parents[1].glob("conf/*.yaml")), ids=lambda p: p.name)
def test_the_configs_that_come_along_are_valid(path):
    assert config.load(str(path)).name
