import json
import math
import pathlib

import numpy as np
import pytest
import torch

from sparkmed import config
from sparkmed.learning.model import Model
from sparkmed.rejection import InputError
from sparkmed.training import checkpoint, loop
from sparkmed.training.loop import TrainingError
from sparkmed.training.state import State

from . import datasets

TINY = {"name": "UNet", "channels": [4, 8], "strides": [2], "norm": "instance"}


def project(**train) -> config.Config:
    defaults = {
        "network": TINY, "processes": 1, "threads": 1, "batch_size": 4, "epochs": 2, "device": "cpu",
        "optimizer": {"name": "SGD", "lr": 0.02, "momentum": 0.9}, "warmup_epochs": 1, "augment": {"flip": [0, 1], "noise": 0.1},
    }  # fmt: skip
    data = {"name": "balls", "task": "segmentation", "classes": ["background", "organ"], "archive": "none", "seed": 3}
    return config.parse(data | {"train": defaults | train})


def classifier(**train) -> config.Config:
    network = {"name": "DenseNet121", "init_features": 8, "growth_rate": 4, "block_config": [2, 2]}
    data = project(network=network, optimizer={"name": "Adam", "lr": 0.003}, epochs=6, **train).model_dump(mode="json")
    data |= {"task": "classification", "classes": ["small", "large"], "preprocess": {"size": [24, 24, 1]}}
    return config.parse(data)


@pytest.fixture(scope="module")
def balls(tmp_path_factory) -> str:
    splits = {"train": [datasets.balls(18, prefix="t")], "val": [datasets.balls(5, seed=1, prefix="v")]}
    return datasets.write(tmp_path_factory.mktemp("balls"), splits)


def last_weights(folder) -> dict:
    return checkpoint.latest(str(folder / "checkpoints"))["network"]


def same(a: dict, b: dict, tolerance=0.0) -> bool:
    return all(torch.allclose(a[k].double(), b[k].double(), rtol=0, atol=tolerance) for k in a) and a.keys() == b.keys()


def test_it_learns_and_leaves_a_model(balls, tmp_path, capfd):
    adam = {"name": "Adam", "lr": 0.02}
    result = loop.fit(project(epochs=15, ema=0.9, optimizer=adam), balls, str(tmp_path))
    history = result["history"]
    assert [r["epoch"] for r in history] == list(range(15)) and result["stopped"] == "epochs"
    assert history[-1]["train_loss"] < 0.7 * history[0]["train_loss"]
    assert result["best"]["val_metric"] == max(r["val_metric"] for r in history) > 0.7
    assert result["best"]["val_per_class"].keys() == {"organ"} and result["best"]["metric"] == "dice"
    assert all(r["samples"] == 18 and r["seconds"] > 0 and r["samples_per_s"] > 0 and r["lr"] > 0 for r in history)
    assert [json.loads(x) for x in (tmp_path / "history.jsonl").read_text().splitlines()] == history
    assert "epoch 15/15: train loss" in capfd.readouterr().err
    assert len(list((tmp_path / "checkpoints").iterdir())) <= 3
    model = Model.load(result["model"])
    assert model.spec.window == (16, 16, 16) and model.spec.dataset.digest == "d" * 64 and model.spec.spatial_dims == 3
    (row,) = datasets.balls(1, seed=9)
    found = model.predict_patches(row["image"][None])[0].argmax(0)
    assert 2 * ((found == 1) & (row["label"] == 1)).sum() / ((found == 1).sum() + (row["label"] == 1).sum()) > 0.7


def test_the_same_config_gives_the_same_weights(balls, tmp_path):
    for name in ("a", "b"):
        loop.fit(project(), balls, str(tmp_path / name))
    assert same(last_weights(tmp_path / "a"), last_weights(tmp_path / "b"))
    loop.fit(project().model_copy(update={"seed": 4}), balls, str(tmp_path / "c"))
    assert not same(last_weights(tmp_path / "a"), last_weights(tmp_path / "c"))


def test_an_interrupted_run_ends_with_the_weights_it_would_have_had(balls, tmp_path, monkeypatch):
    whole = loop.fit(project(epochs=4, ema=0.9), balls, str(tmp_path / "whole"))
    original, calls = loop.validate, []

    def killed(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(loop, "validate", killed)
    with pytest.raises(KeyboardInterrupt):
        loop.fit(project(epochs=4, ema=0.9), balls, str(tmp_path / "killed"))
    monkeypatch.undo()
    resumed = loop.fit(project(epochs=4, ema=0.9), balls, str(tmp_path / "killed"))
    assert same(last_weights(tmp_path / "whole"), last_weights(tmp_path / "killed"))
    for a, b in zip(whole["history"], resumed["history"], strict=True):
        assert (a["train_loss"], a["val_metric"]) == (b["train_loss"], b["val_metric"])


def test_a_damaged_last_checkpoint_costs_one_epoch(balls, tmp_path):
    whole = loop.fit(project(epochs=3), balls, str(tmp_path))
    weights = last_weights(tmp_path)
    newest = pathlib.Path(checkpoint.present(str(tmp_path / "checkpoints"))[-1].url.removeprefix("file://"))
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    with pytest.warns(UserWarning, match="passed over"):
        again = loop.fit(project(epochs=3), balls, str(tmp_path))
    assert same(weights, last_weights(tmp_path))
    assert [r["val_metric"] for r in again["history"]] == [r["val_metric"] for r in whole["history"]]


def test_a_finished_run_trains_no_more_and_can_be_made_longer(balls, tmp_path, monkeypatch):
    first = loop.fit(project(epochs=1), balls, str(tmp_path))
    longer = loop.fit(project(epochs=2), balls, str(tmp_path))
    assert longer["history"][:1] == first["history"] and len(longer["history"]) == 2
    monkeypatch.setattr(loop, "augment", None)  # a step would fail
    assert loop.fit(project(epochs=2), balls, str(tmp_path)) == longer


def test_a_folder_of_another_config_is_refused(balls, tmp_path):
    loop.fit(project(epochs=1), balls, str(tmp_path))
    with pytest.raises(InputError, match="checkpoints of another config"):
        loop.fit(project(epochs=1, clip_norm=3), balls, str(tmp_path))


def test_stops_early_and_in_time(balls, tmp_path):
    frozen = {"name": "SGD", "lr": 1e-12}
    result = loop.fit(project(epochs=50, patience=2, optimizer=frozen, augment={}), balls, str(tmp_path / "patience"))
    assert result["stopped"] == "patience" and len(result["history"]) <= 8
    result = loop.fit(project(epochs=50, max_minutes=1e-6), balls, str(tmp_path / "time"))
    assert result["stopped"] == "max_minutes" and len(result["history"]) == 1


def test_a_loss_that_is_not_finite_names_the_patch(tmp_path):
    rows = datasets.balls(8)
    rows[5]["image"] = np.full_like(rows[5]["image"], np.nan)
    url = datasets.write(tmp_path / "data", {"train": [rows], "val": [datasets.balls(2, seed=1)]})
    with pytest.raises(TrainingError, match=r"not finite in epoch 0, step \d, patches 0005 \(nan\)"):
        loop.fit(project(), url, str(tmp_path / "run"))


def test_classification(tmp_path):
    size = (24, 24, 1)
    splits = {"train": [datasets.balls(40, size)], "val": [datasets.balls(20, size, seed=1)]}
    url = datasets.write(tmp_path / "data", splits, classes=["small", "large"], task="classification")
    result = loop.fit(classifier(), url, str(tmp_path / "run"))
    assert result["best"]["metric"] == "ROCAUCMetric" and result["best"]["val_metric"] > 0.9
    model = Model.load(result["model"])
    assert model.spec.spatial_dims == 2
    batch = np.stack([r["image"] for r in datasets.balls(6, size, seed=2)])
    assert model.predict_patches(batch).shape == (6, 2)


def test_a_group_that_weighs_double_is_as_if_its_patches_were_there_twice(tmp_path):
    size, held_out = (24, 24, 1), [datasets.balls(4, (24, 24, 1), seed=1)]
    rows = [r | {"group": n % 2} for n, r in enumerate(datasets.balls(4, size))]
    twice = rows + [r | {"patch_id": f"again-{r['patch_id']}"} for r in rows if r["group"]]
    held_out = [[r | {"group": 0} for r in held_out[0]]]
    settings = classifier(augment={}, batch_size=8)
    without = settings.train.network.arguments | {"norm": "instance"}  # batch norm would see who is there twice
    changes = {
        "network": config.Component(name=settings.train.network.name, **without),
        "epochs": 1,
        "optimizer": config.Optimizer(name="SGD", lr=0.02),
    }
    settings = settings.model_copy(update={"train": settings.train.model_copy(update=changes)})
    weights = {}
    for name, train, group_weights in (("weighted", rows, [2 / 3, 4 / 3]), ("twice", twice, None), ("plain", rows, None)):
        splits = {"train": [train], "val": held_out}
        url = datasets.write(tmp_path / name, splits, ["small", "large"], "classification", group_weights=group_weights)
        loop.fit(settings, url, str(tmp_path / f"{name} run"))
        weights[name] = last_weights(tmp_path / f"{name} run")
    assert same(weights["weighted"], weights["twice"], 1e-5) and not same(weights["weighted"], weights["plain"], 1e-4)


def test_subjects_that_are_trained_on_are_not_judged(tmp_path):
    url = datasets.write(tmp_path, {"train": [datasets.balls(8)], "val": [datasets.balls(2, prefix="v")[:1] + datasets.balls(1)]})
    with pytest.raises(InputError, match="1 subjects of split val are in train too, such as 0/0000"):
        loop.fit(project(), url, str(tmp_path / "run"))


def test_components_by_name(balls, tmp_path):
    result = loop.fit(
        project(
            epochs=1, loss={"name": "FocalLoss", "gamma": 1.0}, metric={"name": "MeanIoU"}, schedule="poly",
            network={"name": "BasicUNet", "features": [4, 4, 4, 4, 4, 4], "norm": "batch"},
            optimizer={"name": "RMSprop", "lr": 1e-3},
        ),
        balls, str(tmp_path),
    )  # fmt: skip
    assert result["best"]["metric"] == "MeanIoU" and 0 <= result["best"]["val_metric"] <= 1


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ({"network": TINY | {"name": "UNett"}}, "did you mean UNet"),
        ({"network": TINY | {"chanels": [4]}}, "did you mean channels"),
        ({"network": {"name": "BasicUNet"}}, "BasicUNet does not take patches .1, 16, 16, 16.: ValueError: Expected more"),
        ({"network": {"name": "resnet18"}}, "resnet18 makes .2, 2. of patches .1, 16, 16, 16., wanted .2, 2, 16, 16, 16."),
        ({"network": {"name": "DenseNet121"}}, "DenseNet121 does not take patches .1, 16, 16, 16."),
        ({"loss": {"name": "DiceLos"}}, "did you mean DiceLoss"),
        ({"loss": {"name": "DiceLoss", "batch": True}}, "mixes samples"),
        ({"metric": {"name": "DiceMetrik"}}, "did you mean DiceMetric"),
        ({"optimizer": {"name": "Adam", "lr": 1e-3, "momentum": 0.9}}, "takes no argument momentum"),
        ({"optimizer": {"name": "Adm", "lr": 1e-3}}, "did you mean Adam"),
        ({"initial_weights": "/nowhere.safetensors"}, "no such file"),
    ],
)
def test_wrong_names_are_said_before_the_first_step(balls, tmp_path, train, said):
    with pytest.raises(InputError, match=said):
        loop.fit(project(**train), balls, str(tmp_path))
    assert not (tmp_path / "checkpoints").exists()


def test_a_dataset_of_another_task_or_of_other_classes(balls, tmp_path):
    with pytest.raises(InputError, match="is for segmentation, the config is for classification"):
        loop.fit(classifier(), balls, str(tmp_path))
    other = project().model_copy(update={"classes": ("background", "liver")})
    with pytest.raises(InputError, match="classes .'background', 'organ'., the config .'background', 'liver'."):
        loop.fit(other, balls, str(tmp_path))


def test_transfer_keeps_what_fits(balls, tmp_path):
    first = loop.fit(project(epochs=1), balls, str(tmp_path / "first"))
    start = first["model"] + "/weights.safetensors"
    second = project(epochs=1, initial_weights=start, optimizer={"name": "SGD", "lr": 1e-12})
    result = loop.fit(second, balls, str(tmp_path / "second"))
    assert result["best"]["val_metric"] == pytest.approx(first["best"]["val_metric"], abs=1e-6)


def test_best_prefers_the_metric_then_the_loss():
    def row(epoch, metric, loss):
        return {"epoch": epoch, "val_metric": metric, "val_loss": loss}

    assert loop.best([row(0, 0.9, 1), row(1, 1.0, 3), row(2, 1.0, 2), row(3, math.nan, 0)])["epoch"] == 2
    assert loop.best([row(0, math.nan, 2), row(1, math.nan, 1)])["epoch"] == 1


def test_bfloat16_and_channels_last_learn_as_float32_does(balls, tmp_path):
    plain = loop.fit(project(), balls, str(tmp_path / "a"))["history"]
    rounded = loop.fit(project(channels_last=True, precision="bfloat16"), balls, str(tmp_path / "b"))["history"]
    for a, b in zip(plain, rounded, strict=True):
        assert b["train_loss"] == pytest.approx(a["train_loss"], rel=0.03)


DROPOUT = {"name": "UNet", "channels": [4, 8], "strides": [2], "norm": "batch", "dropout": 0.2}


def stopped_at(step, settings, url, folder, monkeypatch):
    """Train until the process is gone in the middle of step ``step``."""
    original = State.average_weights

    def average(self, ema):
        if self.step == step:
            raise KeyboardInterrupt
        return original(self, ema)

    with monkeypatch.context() as m:
        m.setattr(State, "average_weights", average)
        with pytest.raises(KeyboardInterrupt):
            loop.fit(settings, url, folder)


def test_a_run_interrupted_within_an_epoch_ends_with_the_weights_it_would_have_had(balls, tmp_path, monkeypatch):
    settings = project(epochs=3, ema=0.9, network=DROPOUT, checkpoint_steps=2)
    whole = loop.fit(
        settings.model_copy(update={"train": project(epochs=3, ema=0.9, network=DROPOUT).train}), balls, str(tmp_path / "whole")
    )
    folder = str(tmp_path / "killed")
    for step in (8, 13):  # of five in an epoch: the checkpoints are at 8 and 12
        stopped_at(step, settings, balls, folder, monkeypatch)
    assert checkpoint.present(folder + "/checkpoints")[-1].progress == (2, 8)
    newest = pathlib.Path(checkpoint.present(folder + "/checkpoints")[-1].url.removeprefix("file://"))
    newest.write_bytes(b"half")
    with pytest.warns(UserWarning, match="passed over"):
        resumed = loop.fit(settings, balls, folder)
    assert same(last_weights(tmp_path / "whole"), last_weights(tmp_path / "killed"))
    for a, b in zip(whole["history"], resumed["history"], strict=True):
        assert {k: a[k] for k in ("lr", "samples", "val_metric", "val_loss")} == {
            k: b[k] for k in ("lr", "samples", "val_metric", "val_loss")
        }
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-12)
    assert [c.position for c in checkpoint.present(folder + "/checkpoints")][-1] is None


def test_gradients_of_several_batches_are_those_of_one(balls, tmp_path):
    one = loop.fit(project(scale_lr="none"), balls, str(tmp_path / "one"))["history"]
    several = loop.fit(project(scale_lr="none", batch_size=1, accumulate=4), balls, str(tmp_path / "several"))["history"]
    assert [r["train_loss"] for r in several] == pytest.approx([r["train_loss"] for r in one], abs=1e-6)
    assert same(last_weights(tmp_path / "one"), last_weights(tmp_path / "several"), 1e-5)


def test_half_precision_without_a_gpu_is_float32(balls, tmp_path):
    for name, precision in (("a", "float32"), ("b", "float16")):
        loop.fit(project(epochs=1, precision=precision), balls, str(tmp_path / name))
    assert same(last_weights(tmp_path / "a"), last_weights(tmp_path / "b"))


def test_a_compiled_network_learns_the_same(balls, tmp_path):
    plain = loop.fit(project(epochs=1), balls, str(tmp_path / "a"))["history"]
    compiled = loop.fit(project(epochs=1, compile=True), balls, str(tmp_path / "b"))["history"]
    assert compiled[0]["train_loss"] == pytest.approx(plain[0]["train_loss"], abs=1e-4)


def test_weights_that_are_not_finite_are_never_kept(balls, tmp_path):
    one_step = project(epochs=1, batch_size=18, clip_norm=None, optimizer={"name": "SGD", "lr": 1e38})  # of a finite loss
    with pytest.raises(TrainingError, match="validation loss is nan in epoch 0"):
        loop.fit(one_step, balls, str(tmp_path))
    assert not list(tmp_path.rglob("*.pt"))


def test_the_next_best_model_is_kept_where_the_best_is_damaged(balls, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "_merit", lambda row: -row["epoch"])
    settings = project(epochs=3, keep_checkpoints=3)
    first = loop.fit(settings, balls, str(tmp_path))
    (best,) = tmp_path.glob(f"checkpoints/epoch-{first['best']['epoch']:05d}-*")
    best.write_bytes(best.read_bytes()[:100])
    with pytest.warns(UserWarning, match="passed over"):
        again = loop.fit(settings, balls, str(tmp_path))
    assert (first["best"]["epoch"], again["best"]["epoch"]) == (0, 1)
    assert Model.load(again["model"])


def test_batch_norm_and_a_step_of_one_patch(balls, tmp_path):
    network = {"name": "UNet", "channels": [4, 8, 8, 8, 8], "strides": [2, 2, 2, 2], "norm": "batch", "num_res_units": 1}
    with pytest.raises(InputError, match="18 patches in batches of 17 on 1 ranks: some step gives a rank a single one"):
        loop.fit(project(network=network, batch_size=17), balls, str(tmp_path))


def test_an_empty_split(tmp_path):
    url = datasets.write(tmp_path / "data", {"train": [datasets.balls(4)], "val": [[]]})
    with pytest.raises(InputError, match="split val has no patch"):
        loop.check(project(), loop.PatchDataset(url, "val"))


def test_checkpoints_go_to_any_file_system(balls):
    result = loop.fit(project(epochs=1), balls, "memory://lake/run")
    assert loop.fit(project(epochs=2), balls, "memory://lake/run")["history"][:1] == result["history"]
    assert Model.load(result["model"])
