"""Start the ranks of a training: in this process, or as Spark tasks by Horovod or by TorchDistributor."""

import importlib.util
import itertools
import json
import logging
import os
import traceback
from collections.abc import Callable, MutableMapping, Sequence

from sparkmed import storage
from sparkmed.config import Config
from sparkmed.learning import losses, metrics, networks
from sparkmed.rejection import InputError
from sparkmed.training import comm, loop, state
from sparkmed.training.comm import Comm, HorovodComm, LocalComm, LostContact, TorchComm
from sparkmed.training.dataset import PatchDataset
from sparkmed.training.loop import TrainingError

RANKS = "ranks"
"""Folder below a training's own, gone when it ends: ``{turn}.json`` when all ranks have started for the turn-th time from 0, and
``{turn}-{rank}.json`` how each of them ended."""

Launcher = Callable[[Config, str, str], None]
"""Runs :func:`_rank` on every rank with a config, the dataset's URL and the training folder's, and returns when all have ended."""

log = logging.getLogger(__name__)


def run(config: Config, dataset_url: str, folder_url: str, slots: int | None = None, python: str | None = None) -> dict:
    """The result of :func:`sparkmed.training.loop.fit` with ``config.train.processes`` ranks.

    One process trains here, without a launcher. More are tasks of the active SparkContext, of which ``slots`` can run at a time
    (None: not known); ``python`` is the interpreter of Horovod's ranks, None this one. When a rank is lost all are started
    again, up to ``config.train.restarts`` times, and go on from the last checkpoint. Raises :class:`InputError` before anything
    starts for more ranks than slots, missing Horovod, or a dataset that does not fit; :class:`TrainingError` with the traceback of
    the rank that failed first, or the number of the rank that was lost too often.
    """
    ranks = config.train.processes
    if slots is not None and ranks > slots:
        raise InputError(f"train.processes is {ranks}, but only {slots} Spark tasks can run at a time")
    for split in ("train", "val"):
        loop.check(config, PatchDataset(dataset_url, split))
    if ranks == 1:
        return loop.fit(config, dataset_url, folder_url, LocalComm())
    launch = _by_torch() if config.train.launcher == "torch" else _by_horovod(python)
    _forget(folder_url)
    try:
        return _until_done(launch, config, dataset_url, folder_url)
    finally:
        _forget(folder_url)


def _until_done(launch: Launcher, config: Config, dataset_url: str, folder_url: str) -> dict:
    """Rank 0's result, from as many turns as it takes and ``config.train.restarts`` allows."""
    ranks, turns = config.train.processes, 0
    while True:
        before, stopped = turns, None
        try:
            launch(config, dataset_url, folder_url)
        except Exception as e:  # a rank that raised has written it down; what comes here are ranks that never were, or were killed
            stopped = e
        turns = _turns(folder_url)
        if turns == before:
            why = f"{type(stopped).__name__}: {stopped}" if stopped else "no rank has written down how it ended"
            raise TrainingError(f"{config.train.launcher} could not start {ranks} ranks: {why}") from stopped
        outcomes = _outcomes(folder_url, turns - 1, ranks)
        lost = _lost(outcomes)
        if not lost:
            return outcomes[0]["result"]
        if turns > config.train.restarts:
            raise TrainingError(f"{lost}; tried {turns} times (train.restarts is {config.train.restarts})") from stopped
        log.warning("%s; the ranks start again and go on from the last checkpoint", lost)


def check(config: Config) -> None:
    """Raises :class:`InputError` for names and arguments in ``train`` that cannot work: the network is built and tried on zeros."""
    train, classes, size = config.train, len(config.classes), (1, *config.patches.size)
    network = networks.build(train.network, 1, classes, networks.spatial_dims(config.patches.size), config.imports)
    networks.check(network, train.network.name, size, classes, config.task)
    state.optimizer(config, network)
    losses.build(train.loss, config.task, config.imports)
    metrics.build(train.metric, config.task, classes, config.imports)
    if train.initial_weights is not None and not storage.exists(train.initial_weights):
        raise InputError(f"train.initial_weights {train.initial_weights} does not exist")
    if train.processes > 1 and train.launcher == "horovod" and importlib.util.find_spec("horovod") is None:
        raise InputError(comm.MISSING_HOROVOD)


def _by_horovod(python: str | None) -> Launcher:
    try:
        import horovod.spark
    except ImportError as e:
        raise InputError(f"{comm.MISSING_HOROVOD} ({e})") from None

    def launch(config: Config, dataset_url: str, folder_url: str) -> None:
        horovod.spark.run(
            _horovod_rank, args=(config, dataset_url, folder_url), num_proc=config.train.processes,
            start_timeout=config.train.start_timeout, use_gloo=True, env=_environment(config), executable=python, verbose=0,
        )  # fmt: skip

    return launch


def _by_torch() -> Launcher:
    from pyspark.ml.torch.distributor import SparkSession, TorchDistributor

    def train(environment: dict[str, str], *arguments) -> None:  # pickled whole: what only passes it on does not load torch
        os.environ.update(environment)
        from sparkmed.training import launch

        launch._torch_rank(*arguments)

    def launch(config: Config, dataset_url: str, folder_url: str) -> None:
        assigned = SparkSession.active().conf.get("spark.task.resource.gpu.amount", "0") != "0"
        use_gpu = assigned and config.train.device != "cpu"
        distributor = TorchDistributor(config.train.processes, local_mode=False, use_gpu=use_gpu)
        distributor.run(train, _environment(config), config, dataset_url, folder_url)

    return launch


def _horovod_rank(config: Config, dataset_url: str, folder_url: str) -> None:
    from horovod.spark.task import get_available_devices

    pin(get_available_devices(), os.environ)
    _rank(config, dataset_url, folder_url, lambda: HorovodComm(config.train.compression == "fp16"))


def _torch_rank(config: Config, dataset_url: str, folder_url: str) -> None:
    _rank(config, dataset_url, folder_url, lambda: TorchComm(config.train.compression == "fp16", config.train.fusion_mb))


def pin(addresses: Sequence[str], environment: MutableMapping[str, str]) -> None:
    """Let this process see only the GPUs that Spark assigned to its task; before CUDA is first used.

    None assigned changes nothing, and neither does a machine that limits its GPUs already: as TorchDistributor does it.
    """
    if addresses:
        environment.setdefault("CUDA_VISIBLE_DEVICES", ",".join(addresses))


def _rank(config: Config, dataset_url: str, folder_url: str, join: Callable[[], Comm]) -> None:
    """Runs in every rank. How it ends is written down: raised, it would make Spark try the task again and the others wait.

    Spark starts a barrier stage that lost a task again by itself, so turns are counted here; those above the budget do nothing.
    """
    group = join()
    try:
        turn = group.broadcast(_turns(folder_url) if group.rank == 0 else None)
        if turn > config.train.restarts:
            return
        if group.rank == 0:
            storage.write_bytes(_turn(folder_url, turn), b"{}")
        try:
            outcome = {"result": loop.fit(config, dataset_url, folder_url, group)}
        except Exception as e:
            kind = "input" if isinstance(e, InputError) else "lost" if isinstance(e, LostContact) else "error"
            outcome = {"kind": kind, "message": str(e), "traceback": traceback.format_exc()}
        storage.write_bytes(_turn(folder_url, turn, group.rank), json.dumps(outcome).encode())
    finally:
        group.close()


def _lost(outcomes: list[dict | None]) -> str | None:
    """Which ranks were lost, by their outcomes, None for one that has left none; None when every rank has a result.

    Raises the error of the rank that failed for a reason of its own, which comes before those that lost contact to it.
    """
    for rank, outcome in enumerate(outcomes):
        if outcome and outcome.get("kind") == "input":
            raise InputError(outcome["message"])
        if outcome and outcome.get("kind") == "error":
            raise TrainingError(f"rank {rank} of {len(outcomes)} failed: {outcome['message']}\n{outcome['traceback']}")
    gone = [str(rank) for rank, outcome in enumerate(outcomes) if outcome is None]
    if gone:
        return f"rank {' and '.join(gone)} of {len(outcomes)} lost: killed, or its machine is gone"
    for rank, outcome in enumerate(outcomes):
        if "result" not in outcome:
            return f"rank {rank} of {len(outcomes)} lost contact to the others: {outcome['message']}"
    return None


def _turn(folder_url: str, turn: int, rank: int | None = None) -> str:
    return storage.join(folder_url, RANKS, f"{turn}.json" if rank is None else f"{turn}-{rank}.json")


def _turns(folder_url: str) -> int:
    return next(turn for turn in itertools.count() if not storage.exists(_turn(folder_url, turn)))


def _outcomes(folder_url: str, turn: int, ranks: int) -> list[dict | None]:
    urls = [_turn(folder_url, turn, rank) for rank in range(ranks)]
    return [storage.read_json(url) if storage.exists(url) else None for url in urls]


def _forget(folder_url: str) -> None:
    if storage.exists(storage.join(folder_url, RANKS)):
        storage.remove(storage.join(folder_url, RANKS), recursive=True)


def _environment(config: Config) -> dict[str, str]:
    """Variables of the ranks; thread pools other than torch's read theirs when they are loaded."""
    threads = str(config.train.threads or 1)
    return {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "HOROVOD_FUSION_THRESHOLD": str(config.train.fusion_mb * 2**20)}
