import builtins
import sys
import time

import numpy as np
import pytest

from sparkmed.rejection import InputError
from sparkmed.training import checkpoint, launch, loop
from sparkmed.training.comm import HorovodComm
from sparkmed.training.loop import TrainingError

from . import datasets
from .test_loop import last_weights, project, same


@pytest.fixture(scope="module")
def balls(tmp_path_factory) -> str:
    """9 training patches: with a global batch of 4 the last step has one sample, and none for rank 1."""
    splits = {"train": [datasets.balls(9, prefix="t")], "val": [datasets.balls(5, seed=1, prefix="v")]}
    return datasets.write(tmp_path_factory.mktemp("balls"), splits, row_group=2)


def test_one_process_trains_here(balls, tmp_path):
    result = launch.run(project(), balls, str(tmp_path))
    assert result["ranks"] == 1 and len(result["history"]) == 2


def test_more_ranks_than_slots(balls, tmp_path):
    with pytest.raises(InputError, match="train.processes is 3, but only 2 Spark tasks can run at a time"):
        launch.run(project(processes=3), balls, str(tmp_path), slots=2)


def test_without_horovod(balls, tmp_path, monkeypatch):
    original = builtins.__import__

    def blocked(name, *arguments, **named):
        if name.startswith("horovod"):
            raise ImportError("No module named 'horovod'")
        return original(name, *arguments, **named)

    for name in [m for m in sys.modules if m.split(".")[0] == "horovod"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", blocked)
    assert launch.run(project(epochs=1), balls, str(tmp_path / "one"))["ranks"] == 1
    for start in (lambda: launch.run(project(processes=2), balls, str(tmp_path / "two")), HorovodComm):
        with pytest.raises(InputError, match="make horovod"):
            start()


def test_a_wrong_dataset_is_found_before_ranks_start(balls, tmp_path):
    only_train = datasets.write(tmp_path / "data", {"train": [datasets.balls(3)]})
    with pytest.raises(InputError, match="no Parquet file of split val"):
        launch.run(project(processes=2), only_train, str(tmp_path / "run"))


def test_the_rank_that_failed_first_is_named():
    outcomes = [
        {"rank": 0, "kind": "lost", "message": "Horovod has been shut down.", "traceback": "..."},
        {"rank": 1, "kind": "error", "message": "loss is not finite", "traceback": "Traceback of rank 1"},
    ]
    with pytest.raises(TrainingError, match="rank 1 of 2 failed: loss is not finite\nTraceback of rank 1"):
        launch._checked(outcomes)
    with pytest.raises(InputError, match="^no such network$"):
        launch._checked([{"rank": 0, "kind": "input", "message": "no such network", "traceback": ""}] * 2)
    assert launch._checked([{"rank": 0, "result": 1}, {"rank": 1, "result": 1}]) == 1


@pytest.mark.engine
def test_two_ranks_train_as_one_process_does(spark, balls, tmp_path):
    """Same global batch, so the same gradients, weights, losses and metrics; then one process goes on where two stopped."""
    changes = {"flip": [0, 1, 2], "rotate": 10, "gamma": 0.2, "noise": 0.1}
    settings = {"scale_lr": "none", "augment": changes, "epochs": 2, "ema": 0.9}
    two = launch.run(project(**settings, processes=2, batch_size=2), balls, str(tmp_path / "two"), slots=2)
    one = launch.run(project(**settings, processes=1, batch_size=4), balls, str(tmp_path / "one"))
    assert two["ranks"] == 2 and one["ranks"] == 1
    assert same(last_weights(tmp_path / "one"), last_weights(tmp_path / "two"), 1e-5)
    averaged = [checkpoint.latest(str(tmp_path / f / "checkpoints"))["averaged"] for f in ("one", "two")]
    assert same(*averaged, 1e-5)
    for a, b in zip(one["history"], two["history"], strict=True):
        assert a["samples"] == b["samples"] == 9
        for key in ("train_loss", "val_loss", "val_metric", "lr"):
            assert a[key] == pytest.approx(b[key], abs=1e-5), key
    longer = project(**settings | {"epochs": 3}, processes=1, batch_size=2)
    assert [r["ranks"] for r in loop.fit(longer, balls, str(tmp_path / "two"))["history"]] == [2, 2, 1]


@pytest.mark.engine
def test_a_rank_that_raises_ends_the_job_with_its_traceback(spark, tmp_path):
    rows = datasets.balls(8)
    rows[5]["image"] = np.full_like(rows[5]["image"], np.inf)
    url = datasets.write(tmp_path / "data", {"train": [rows], "val": [datasets.balls(2, seed=1)]})
    began = time.monotonic()
    said = r"rank \d of 2 failed: loss is not finite in epoch 0, step \d, patches 0005(.|\n)*Traceback"
    with pytest.raises(TrainingError, match=said):
        launch.run(project(processes=2, batch_size=1, augment={}), url, str(tmp_path / "run"), slots=2)
    assert time.monotonic() - began < 90
    assert spark.sparkContext.parallelize(range(4), 2).sum() == 6  # the slots are free again
