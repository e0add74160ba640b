import builtins
import pathlib
import shutil
import signal
import sys
import threading
import time

import numpy as np
import psutil
import pytest

from sparkmed import storage
from sparkmed.rejection import InputError
from sparkmed.training import checkpoint, launch, loop
from sparkmed.training.comm import HorovodComm
from sparkmed.training.loop import TrainingError

from . import datasets
from .test_loop import last_weights, project, same, stopped_at


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


def ended(*outcomes):
    """A launcher: each turn leaves the outcomes of its ranks, as the ranks do, and raises when one left none."""
    turns = iter(outcomes)

    def launcher(config, dataset_url, folder_url):
        turn = launcher.turns
        launcher.turns += 1
        storage.write_bytes(launch._turn(folder_url, turn), b"{}")
        for rank, outcome in enumerate(found := next(turns)):
            if outcome:
                storage.write_json(launch._turn(folder_url, turn, rank), outcome)
        if None in found:
            raise RuntimeError("a process exited with non-zero status")

    launcher.turns = 0
    return launcher


def failed(kind: str, message: str) -> dict:
    return {"kind": kind, "message": message, "traceback": f"Traceback: {message}"}


LOST, DONE = failed("lost", "Connection closed by peer"), ({"result": 1}, {"result": 1})


@pytest.mark.parametrize("killed", [(None, LOST), (LOST, None), (None, None), (LOST, LOST)])
def test_lost_ranks_start_again_within_the_budget(killed, tmp_path, caplog):
    config = project(processes=2, restarts=2)
    launcher = ended(killed, killed, DONE)
    assert launch._until_done(launcher, config, "", str(tmp_path / "a")) == 1 and launcher.turns == 3
    assert caplog.text.count("the ranks start again and go on from the last checkpoint") == 2
    launcher = ended(killed, killed, killed, DONE)
    with pytest.raises(TrainingError, match=r"rank .*lost.*; tried 3 times \(train.restarts is 2\)"):
        launch._until_done(launcher, config, "", str(tmp_path / "b"))
    assert launcher.turns == 3


def test_the_lost_rank_is_named(tmp_path):
    for outcomes, said in [
        ((LOST, None), "rank 1 of 2 lost: killed, or its machine is gone; tried 1 times"),
        ((None, None), "rank 0 and 1 of 2 lost: killed, or its machine is gone; tried 1 times"),
        ((DONE[0], LOST), "rank 1 of 2 lost contact to the others: Connection closed by peer; tried 1 times"),
    ]:
        folder = str(tmp_path / said[:10])
        with pytest.raises(TrainingError, match=f"^{said}"):
            launch._until_done(ended(outcomes), project(processes=2, restarts=0), "", folder)
        launch._forget(folder)


@pytest.mark.parametrize("other", [LOST, None, DONE[0]])
def test_an_error_in_a_rank_is_not_tried_again(other, tmp_path):
    config = project(processes=2, restarts=2)
    launcher = ended((other, failed("error", "loss is not finite")))
    with pytest.raises(TrainingError, match="^rank 1 of 2 failed: loss is not finite\nTraceback: loss is not finite"):
        launch._until_done(launcher, config, "", str(tmp_path / "a"))
    launcher = ended((other, failed("input", "no such network")))
    with pytest.raises(InputError, match="^no such network$"):
        launch._until_done(launcher, config, "", str(tmp_path / "b"))


def test_ranks_that_cannot_start_are_not_tried_again(tmp_path):
    calls = []

    def launcher(*arguments):
        calls.append(arguments)
        raise TimeoutError("timed out waiting for tasks to start")

    with pytest.raises(TrainingError, match="^horovod could not start 2 ranks: TimeoutError: timed out waiting"):
        launch._until_done(launcher, project(processes=2), "", str(tmp_path))
    assert len(calls) == 1


def test_a_rank_sees_the_gpus_that_spark_assigned():
    """Without a GPU: what is decided, not what CUDA makes of it."""
    for addresses, before, after in [
        ([], {}, {}),
        (["3"], {}, {"CUDA_VISIBLE_DEVICES": "3"}),
        (["0", "2"], {}, {"CUDA_VISIBLE_DEVICES": "0,2"}),
        (["0"], {"CUDA_VISIBLE_DEVICES": "5"}, {"CUDA_VISIBLE_DEVICES": "5"}),
    ]:
        environment = dict(before)
        launch.pin(addresses, environment)
        assert environment == after


CHANGES = {"flip": [0, 1, 2], "rotate": 10, "gamma": 0.2, "noise": 0.1}
SETTINGS = {"scale_lr": "none", "augment": CHANGES, "epochs": 20, "ema": 0.9}


@pytest.fixture(scope="module", params=["horovod", "torch"])
def two_ranks(request, spark, balls, tmp_path_factory) -> tuple[str, dict, pathlib.Path]:
    """A launcher, what two ranks that it started came to, and their folder."""
    folder = tmp_path_factory.mktemp(request.param)
    config = project(**SETTINGS, processes=2, batch_size=2, launcher=request.param)
    return request.param, launch.run(config, balls, str(folder), slots=2), folder


@pytest.mark.engine
def test_two_ranks_train_as_one_process_does(two_ranks, balls, tmp_path):
    """Same global batch, so the same gradients, weights, losses and metrics; then one process goes on where two stopped."""
    _, two, folder = two_ranks
    one = launch.run(project(**SETTINGS, processes=1, batch_size=4), balls, str(tmp_path / "one"))
    assert two["ranks"] == 2 and one["ranks"] == 1 and not (folder / launch.RANKS).exists()
    assert same(last_weights(tmp_path / "one"), last_weights(folder), 1e-5)
    averaged = [checkpoint.latest(str(f / "checkpoints"))["averaged"] for f in (tmp_path / "one", folder)]
    assert same(*averaged, 1e-5)
    for a, b in zip(one["history"], two["history"], strict=True):
        assert a["samples"] == b["samples"] == 9
        for key in ("train_loss", "val_loss", "val_metric", "lr"):
            assert a[key] == pytest.approx(b[key], abs=1e-5), key
    shutil.copytree(folder, tmp_path / "two")
    longer = project(**SETTINGS | {"epochs": 21}, processes=1, batch_size=2)
    assert [r["ranks"] for r in loop.fit(longer, balls, str(tmp_path / "two"))["history"]] == [2] * 20 + [1]


@pytest.mark.engine
def test_a_killed_rank_costs_nothing_but_time(two_ranks, balls, tmp_path):
    """SIGKILL for rank 1 within an epoch: training comes back by itself, and ends with the same weights."""
    launcher, undisturbed, folder = two_ranks
    killed = []

    def kill():
        while not killed:
            if list((tmp_path / "checkpoints").glob("*-at-*")):
                killed.extend(p for p in psutil.Process().children(recursive=True) if is_rank(p, "1"))
                for process in killed:
                    process.send_signal(signal.SIGKILL)
            time.sleep(0.01)

    threading.Thread(target=kill, daemon=True).start()
    config = project(**SETTINGS, processes=2, batch_size=2, launcher=launcher, restarts=1, checkpoint_steps=1)
    result = launch.run(config, balls, str(tmp_path), slots=2)
    assert len(killed) == 1
    assert same(last_weights(tmp_path), last_weights(folder))
    for a, b in zip(result["history"], undisturbed["history"], strict=True):
        assert (a["val_loss"], a["val_metric"]) == (b["val_loss"], b["val_metric"])
        assert a["train_loss"] == pytest.approx(b["train_loss"], abs=1e-12)


@pytest.mark.engine
def test_two_ranks_go_on_within_an_epoch_where_one_process_stopped(spark, balls, tmp_path, monkeypatch):
    settings = {"scale_lr": "none", "augment": CHANGES, "epochs": 3, "checkpoint_steps": 1}
    one = project(**settings, processes=1, batch_size=4)
    loop.fit(one, balls, str(tmp_path / "whole"))
    stopped_at(4, one, balls, str(tmp_path / "stopped"), monkeypatch)  # in the second step of the second epoch
    assert checkpoint.present(str(tmp_path / "stopped" / "checkpoints"))[-1].progress == (1, 4)
    two = project(**settings, processes=2, batch_size=2, launcher="torch")
    result = launch.run(two, balls, str(tmp_path / "stopped"), slots=2)
    assert [r["ranks"] for r in result["history"]] == [1, 2, 2]
    assert same(last_weights(tmp_path / "whole"), last_weights(tmp_path / "stopped"), 1e-5)


def is_rank(process: psutil.Process, rank: str) -> bool:
    try:
        variables = process.environ()
    except psutil.Error:
        return False
    return variables.get("HOROVOD_RANK") == rank or ("LOCAL_RANK" in variables and variables["RANK"] == rank)


@pytest.mark.engine
@pytest.mark.parametrize("launcher", ["horovod", "torch"])
def test_a_rank_that_raises_ends_the_job_with_its_traceback(spark, launcher, tmp_path):
    rows = datasets.balls(8)
    rows[5]["image"] = np.full_like(rows[5]["image"], np.inf)
    url = datasets.write(tmp_path / "data", {"train": [rows], "val": [datasets.balls(2, seed=1)]})
    began = time.monotonic()
    said = r"^rank \d of 2 failed: loss is not finite in epoch 0, step \d, patches 0005(.|\n)*Traceback"
    with pytest.raises(TrainingError, match=said):
        launch.run(project(processes=2, batch_size=1, augment={}, launcher=launcher), url, str(tmp_path / "run"), slots=2)
    assert time.monotonic() - began < 90
    assert spark.sparkContext.parallelize(range(4), 2).sum() == 6  # the slots are free again
