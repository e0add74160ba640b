"""Start the ranks of a training: in this process, or by Horovod as Spark tasks."""

import importlib.util
import traceback

from sparkmed import storage
from sparkmed.config import Config
from sparkmed.learning import losses, metrics, networks
from sparkmed.rejection import InputError
from sparkmed.training import comm, loop, state
from sparkmed.training.dataset import PatchDataset
from sparkmed.training.loop import TrainingError


def run(config: Config, dataset_url: str, folder_url: str, slots: int | None = None, python: str | None = None) -> dict:
    """The result of :func:`sparkmed.training.loop.fit` with ``config.train.processes`` ranks.

    One process trains here, without Horovod. More are tasks of the active SparkContext, of which ``slots`` can run at a time
    (None: not known); ``python`` is the interpreter of the ranks, None this one. Raises :class:`InputError` before anything starts
    for more ranks than slots, missing Horovod, or a dataset that does not fit; :class:`TrainingError` with the traceback of the
    rank that failed first.
    """
    ranks = config.train.processes
    if slots is not None and ranks > slots:
        raise InputError(f"train.processes is {ranks}, but only {slots} Spark tasks can run at a time")
    for split in ("train", "val"):
        loop.check(config, PatchDataset(dataset_url, split))
    if ranks == 1:
        return loop.fit(config, dataset_url, folder_url, comm.LocalComm())
    try:
        import horovod.spark
    except ImportError as e:
        raise InputError(f"{comm.MISSING_HOROVOD} ({e})") from None
    try:
        outcomes = horovod.spark.run(
            _rank, args=(config, dataset_url, folder_url), num_proc=ranks, start_timeout=config.train.start_timeout, use_gloo=True,
            env=_environment(config), executable=python, verbose=0,
        )  # fmt: skip
    except Exception as e:  # a rank failure is an outcome; what comes here are ranks that never were, or were killed
        raise TrainingError(f"Horovod lost its {ranks} ranks: {type(e).__name__}: {e}") from e
    return _checked(outcomes)


def check(config: Config) -> None:
    """Raises :class:`InputError` for names and arguments in ``train`` that cannot work: the network is built and tried on zeros."""
    train, classes, size = config.train, len(config.classes), (1, *config.patches.size)
    network = networks.build(train.network, 1, classes, networks.spatial_dims(config.patches.size))
    networks.check(network, train.network.name, size, classes, config.task)
    state.optimizer(config, network)
    losses.build(train.loss, config.task)
    metrics.build(train.metric, config.task, classes)
    if train.initial_weights is not None and not storage.exists(train.initial_weights):
        raise InputError(f"train.initial_weights {train.initial_weights} does not exist")
    if train.processes > 1 and importlib.util.find_spec("horovod") is None:
        raise InputError(comm.MISSING_HOROVOD)


def _rank(config: Config, dataset_url: str, folder_url: str) -> dict:
    """Runs in every rank. A failure is an outcome: raised, it would make Spark try the task again and the others wait."""
    group = None
    try:
        group = comm.HorovodComm()
        return {"rank": group.rank, "result": loop.fit(config, dataset_url, folder_url, group)}
    except Exception as e:
        kind = "input" if isinstance(e, InputError) else "lost" if type(e).__name__ == "HorovodInternalError" else "error"
        return {"rank": getattr(group, "rank", None), "kind": kind, "message": str(e), "traceback": traceback.format_exc()}
    finally:
        if group is not None:
            group.close()


def _checked(outcomes: list[dict]) -> dict:
    """Rank 0's result; the error of the rank that failed for a reason of its own comes before those that lost contact to it."""
    failed = sorted((o for o in outcomes if "result" not in o), key=lambda o: o["kind"] == "lost")
    if not failed:
        return outcomes[0]["result"]
    first = failed[0]
    if first["kind"] == "input":
        raise InputError(first["message"])
    raise TrainingError(f"rank {first['rank']} of {len(outcomes)} failed: {first['message']}\n{first['traceback']}")


def _environment(config: Config) -> dict[str, str]:
    """Variables of the ranks; thread pools other than torch's read theirs when they are loaded."""
    threads = str(config.train.threads or 1)
    return {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
