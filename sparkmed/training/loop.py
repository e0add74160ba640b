"""The training loop. A batch can be followed from loader to optimizer in :func:`fit`; who launched it is not known here."""

import copy
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from tqdm import tqdm

import sparkmed
from sparkmed import dataset as datasets
from sparkmed import storage
from sparkmed.cache import FileCache
from sparkmed.config import PLACE_KEYS, Config, Train, digest
from sparkmed.learning import losses, metrics, networks
from sparkmed.learning import model as models
from sparkmed.learning.augment import augment
from sparkmed.learning.augment import check as check_augment
from sparkmed.learning.model import DatasetReference, Model, ModelSpec
from sparkmed.rejection import InputError
from sparkmed.training import checkpoint
from sparkmed.training.comm import Comm, LocalComm
from sparkmed.training.dataset import PatchDataset
from sparkmed.training.loader import PatchLoader
from sparkmed.training.schedule import learning_rate
from sparkmed.training.state import State, TrainingError

HISTORY, CHECKPOINTS, MODEL = "history.jsonl", "checkpoints", "model"

MAY_CHANGE = PLACE_KEYS | {"batch_size", "accumulate", "epochs", "max_minutes", "patience"}
"""Keys of ``train`` with which a run may be continued; ranks of another number learn the same if the
global batch is the same and ``scale_lr`` none."""


def fit(config: Config, dataset_url: str, folder_url: str, comm: Comm | None = None) -> dict:
    """Train on the ``train`` split, validate on ``val`` after every epoch, and leave the best epoch as a model in the folder.

    The folder gets ``checkpoints/``, ``history.jsonl`` (a row per epoch, rewritten whole after each) and at the end ``model/``.
    Called again with the same folder it goes on behind the last whole checkpoint, in the middle of an epoch too, with any number of
    processes; checkpoints of another config or dataset are refused (what may change: :data:`MAY_CHANGE`).

    Returns on every rank {"history": rows, "best": row of the best epoch, "stopped": "epochs" | "patience" | "max_minutes",
    "model": URL, "identity", "parameters": count, "ranks", "seconds"}. The best epoch has the highest validation metric and,
    among equals, the lowest validation loss. Raises :class:`InputError` before the first step, :class:`TrainingError` for a loss
    that is not finite.
    """
    comm, train = comm or LocalComm(), config.train
    device = _device(train.device, comm)
    _set_threads(train.threads, comm)
    feed = _loader(config, dataset_url, comm, device, "train", train.batch_size * train.accumulate)
    held_out = _loader(config, dataset_url, comm, device, "val", train.batch_size)
    check(config, feed.dataset)
    if comm.rank == 0:
        _require_disjoint(feed.dataset, held_out.dataset)
    state, identity = State.start(config, feed.dataset, device, comm), run_identity(config, feed.dataset)
    _check_smallest(config, feed, state.network, comm)
    state.restore(comm.broadcast(_saved(folder_url, identity) if comm.rank == 0 else None), feed, comm)
    network, loss_of = state.network, losses.build(train.loss, config.task, config.imports)
    weights = _group_weights(feed.dataset, device)
    forward = torch.compile(network) if train.compile else network
    parameters = [p for p in network.parameters() if p.requires_grad]
    precision = _autocast_type(train.precision, device)
    layout = torch.channels_last_3d if train.channels_last else torch.contiguous_format

    while (stopped := comm.broadcast(_stop(config, state.history))) is None:
        epoch, began = len(state.history), time.perf_counter() - state.seconds
        feed.set_epoch(epoch)
        network.train()
        for batch in _progress(feed, epoch, comm):
            before = feed.position - int(batch["total"])
            torch.manual_seed(_mixed(config.seed, epoch, before, comm.rank))  # dropout
            for group in state.optimizer.param_groups:
                group["lr"] = learning_rate(train, comm.size, epoch + before / feed.dataset.rows)
            state.optimizer.zero_grad(set_to_none=True)
            for part in _parts(feed.to_device(batch, device), train, comm):
                image, label = augment(
                    part["image"], part.get("label"), part["patch_id"], train.augment, config.seed, epoch, config.preprocess.guided
                )
                with torch.autocast(device.type, precision, enabled=precision is not None):
                    output = forward(image.contiguous(memory_format=layout))
                values = loss_of(_in_full(output), part["target"] if label is None else label)
                values = values if weights is None else values * weights[part["group"]]
                state.losses.add(values, part["patch_id"], epoch, state.step)
                state.scaler.scale(values.sum() / part["total"]).backward()  # over ranks: the mean over the global batch
            state.losses.check()
            _fill_missing_gradients(parameters)
            comm.sum_gradients(parameters)
            state.scaler.unscale_(state.optimizer)
            if train.clip_norm is not None:
                nn.utils.clip_grad_norm_(parameters, train.clip_norm)
            state.scaler.step(state.optimizer)
            state.scaler.update()
            state.average_weights(train.ema)
            state.step += 1
            if train.checkpoint_steps and state.step % train.checkpoint_steps == 0 and feed.position < feed.dataset.rows:
                state.seconds = time.perf_counter() - began
                _save(folder_url, config, identity, state, comm, feed)
        state.level(comm)
        trained = time.perf_counter()
        validation = validate(config, state.averaged, loss_of, held_out, comm)
        loss_sum, samples = state.losses.over(comm)
        if not math.isfinite(validation["val_loss"]):
            raise TrainingError(f"validation loss is {validation['val_loss']} in epoch {epoch}; try a lower train.optimizer.lr")
        row = {"epoch": epoch, "lr": state.optimizer.param_groups[0]["lr"], "train_loss": loss_sum / samples, "samples": samples}
        speed = {"seconds": time.perf_counter() - began, "samples_per_s": samples / (trained - began), "ranks": comm.size}
        state.end_epoch(comm.broadcast(row | validation | speed))
        _save(folder_url, config, identity, state, comm)

    return comm.broadcast(_result(config, feed.dataset, folder_url, state, stopped, identity) if comm.rank == 0 else None)


def _group_weights(dataset: PatchDataset, device: torch.device) -> Tensor | None:
    found = dataset.meta.get("group_weights")
    return None if found is None else torch.tensor(found, dtype=torch.float32, device=device)


def validate(config: Config, network: nn.Module, loss_of: losses.Loss, held_out: PatchLoader, comm: Comm) -> dict:
    """Loss and metric of ``network`` over all patches of ``held_out``, merged over ranks: the same numbers on each.

    Of a segmentation this is the likeliest class of each voxel of a patch, without mirrors, blending or postprocessing: components
    and holes end at a patch's edge, and a threshold alone would be another half of what is scored. It picks the best epoch. What is
    scored is what the test figures are made of: whole volumes, by the same function (:meth:`Model.labels`).
    """
    network.eval()
    device = next(network.parameters()).device
    metric = metrics.build(config.train.metric, config.task, len(config.classes), config.imports)
    loss_sum, samples = 0.0, 0
    with torch.inference_mode():
        for batch in held_out:
            batch = held_out.to_device(batch, device)
            if not batch["patch_id"]:
                continue
            truth = batch["target" if config.task == "classification" else "label"]
            output = networks.primary(network(batch["image"]))
            loss_sum += loss_of(output, truth).sum().item()
            samples += len(truth)
            metric.update(output, truth, batch["volume"], batch["weight"])
    merged = metrics.build(config.train.metric, config.task, len(config.classes), config.imports)
    parts = comm.gather((loss_sum, samples, metric.state()))
    for _, _, part in parts:
        merged.merge(part)
    row = {"val_loss": sum(p[0] for p in parts) / sum(p[1] for p in parts), "metric": merged.name, "val_metric": merged.compute()}
    if isinstance(merged, metrics.VolumeDice):
        row["val_per_class"] = dict(zip(config.classes[1:], merged.per_class(), strict=True))
    return row


def check(config: Config, dataset: PatchDataset) -> None:
    """Raises :class:`InputError` when the dataset is not one for this config."""
    if not dataset.rows:
        raise InputError(f"dataset {dataset.url}: split {dataset.split} has no patch")
    meta, truth = dataset.meta, "target" if config.task == "classification" else "label"
    if meta.get("task", config.task) != config.task or truth not in {f.name for f in dataset.fields}:
        raise InputError(f"dataset {dataset.url} is for {meta.get('task')}, the config is for {config.task}")
    if tuple(meta.get("classes", config.classes)) != config.classes:
        raise InputError(f"dataset {dataset.url} has classes {list(meta['classes'])}, the config {list(config.classes)}")
    channels, *size = dataset.field("image").shape
    check_augment(config.train.augment, (channels - config.preprocess.guided, *size))


def _require_disjoint(trained: PatchDataset, judged: PatchDataset) -> None:
    """Raises :class:`InputError` when a subject (a patient, or what ``plates.split_by`` names) is in both: a metric over what was
    trained on says nothing."""
    both = sorted(trained.subjects() & judged.subjects())
    if both:
        raise InputError(
            f"dataset {trained.url}: {len(both)} subjects of split {judged.split} are in {trained.split} too, such as {both[0]}: "
            "the metric would be over what was trained on"
        )


def run_identity(config: Config, dataset: PatchDataset) -> str:
    """Digest of all that decides what is learnt: runs of equal identity may continue each other."""
    train = config.train.model_dump(mode="json", exclude=MAY_CHANGE, exclude_defaults=True)
    return digest(train, config.task, list(config.classes), config.seed, dataset.meta.get("digest", dataset.digest))


def best(history: list[dict]) -> dict:
    """The row of the highest validation metric, among equals of the lowest validation loss; a metric that is nan counts least."""
    return max(history, key=_merit)


def _merit(row: dict) -> tuple[float, float]:
    return (-math.inf if math.isnan(row["val_metric"]) else row["val_metric"], -row["val_loss"])


def _stop(config: Config, history: list[dict]) -> str | None:
    train = config.train
    if len(history) >= train.epochs:
        return "epochs"
    if history and train.max_minutes is not None and sum(r["seconds"] for r in history) >= 60 * train.max_minutes:
        return "max_minutes"
    if history and train.patience is not None and len(history) - 1 - best(history)["epoch"] >= train.patience:
        return "patience"
    return None


def _check_smallest(config: Config, feed: PatchLoader, network: nn.Module, comm: Comm) -> None:
    """Raises :class:`InputError` when some step gives a rank a single patch, and the network cannot learn from one (batch norm)."""
    train, last = config.train, feed.dataset.rows % (feed.batch_size * comm.size)
    shares = {feed.batch_size, last // comm.size, -(-last // comm.size)}
    if train.sync_batch_norm or all(share % train.batch_size != 1 % train.batch_size for share in shares if share):
        return
    device = next(network.parameters()).device
    try:
        with torch.no_grad():
            copy.deepcopy(network).train()(torch.zeros(1, *feed.dataset.field("image").shape, device=device))
    except ValueError as e:
        raise InputError(
            f"{feed.dataset.rows} patches in batches of {train.batch_size} on {comm.size} ranks: some step gives a rank a single "
            f"one, from which network {train.network.name} cannot learn ({e}); change train.batch_size"
        ) from None


def _loader(config: Config, url: str, comm: Comm, device: torch.device, split: str, batch_size: int) -> PatchLoader:
    train = config.train
    return PatchLoader(
        url, batch_size, comm.rank, comm.size, config.seed, shuffle=split == "train", split=split, memory_mb=train.memory_mb,
        pin_memory=device.type == "cuda", cache=FileCache(train.cache_dir, train.cache_gb),
    )  # fmt: skip


def _parts(batch: dict, train: Train, comm: Comm) -> Iterator[dict]:
    """The batch in pieces of at most ``batch_size`` samples (gradient accumulation). The last global batch may leave a rank fewer
    than others; it runs the network on nothing where batch norm wants all ranks together."""
    largest = -(-int(batch["total"]) // comm.size)
    mine = largest if train.sync_batch_norm else len(batch["patch_id"])
    for start in range(0, mine, train.batch_size):
        yield {k: v if k == "total" else v[start : start + train.batch_size] for k, v in batch.items()}


def _in_full(output):
    """float32 of what a network gives: a tensor, or several with deep supervision."""
    return output.float() if isinstance(output, Tensor) else [o.float() for o in output]


def _fill_missing_gradients(parameters: list[nn.Parameter]) -> None:
    """Zeros where a parameter took no part in the loss, so that all ranks sum the same tensors."""
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)


def _saved(folder_url: str, identity: str) -> dict | None:
    saved = checkpoint.latest(storage.join(folder_url, CHECKPOINTS))
    if saved is not None and saved["identity"] != identity:
        raise InputError(f"{folder_url} has checkpoints of another config or dataset: give another folder, or remove that one")
    return saved


def _save(folder_url: str, config: Config, identity: str, state: State, comm: Comm, feed: PatchLoader | None = None) -> None:
    """Rank 0 writes a checkpoint: of the epoch that ended, or with ``feed`` of where it stands. All ranks take part."""
    saved = {"identity": identity, **state.saved(comm, feed)}
    if comm.rank == 0:
        folder = storage.join(folder_url, CHECKPOINTS)
        if feed is None:
            _report(state.history, config.train.epochs, folder_url)
        checkpoint.save(folder, len(state.history) - (feed is None), feed and feed.position, saved)
        checkpoint.prune(folder, config.train.keep_checkpoints, best(state.history)["epoch"] if state.history else None)


def _result(config: Config, dataset: PatchDataset, folder_url: str, state: State, stopped: str, identity: str) -> dict:
    """Write the model of the best epoch that can still be read, and say what came out."""
    ends = {c.epoch: c for c in checkpoint.present(storage.join(folder_url, CHECKPOINTS)) if c.position is None}
    for row in sorted((r for r in state.history if r["epoch"] in ends), key=_merit, reverse=True):
        saved = checkpoint.readable(ends[row["epoch"]])
        if saved:
            break
    else:
        raise TrainingError(f"{folder_url}: no checkpoint of the end of an epoch can be read")
    cascade, folder = config.preprocess.cascade, storage.join(folder_url, MODEL)
    if cascade is not None:
        models.copy(datasets.pinned(config), storage.join(folder, models.FIRST), cascade.digest)
    weights = saved["averaged"] or saved["network"]
    Model.build(model_spec(config, dataset), weights, imports=config.imports).save(folder)
    return {
        "history": state.history, "best": row, "stopped": stopped, "model": folder, "identity": identity,
        "parameters": sum(p.numel() for p in state.network.parameters()), "ranks": state.history[-1]["ranks"],
        "seconds": sum(r["seconds"] for r in state.history),
    }  # fmt: skip


def model_spec(config: Config, dataset: PatchDataset) -> ModelSpec:
    """The spec of a model trained on ``dataset`` with ``config``."""
    channels, *window = dataset.field("image").shape
    reference = {k: str(dataset.meta.get(k, "")) for k in DatasetReference.model_fields}
    return ModelSpec(
        name=config.name, task=config.task, classes=config.classes, network=config.train.network, in_channels=channels,
        spatial_dims=networks.spatial_dims(tuple(window)), preprocess=config.preprocess, window=tuple(window), cells=config.cells,
        score=config.score.numbers, dataset=DatasetReference(**reference), code_version=sparkmed.__version__, seed=config.seed,
    )  # fmt: skip


def _device(wanted: str, comm: Comm) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("train.device is cuda, and this machine has no CUDA device that torch can use")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", comm.local_rank % torch.cuda.device_count())


def _autocast_type(wanted: str, device: torch.device) -> torch.dtype | None:
    """The type to compute in; None, float32, where the device has no instructions for it: emulated, it is slower."""
    if wanted == "float16":
        return torch.float16 if device.type == "cuda" else None
    if wanted == "float32":
        return None
    able = getattr(torch.cpu, "get_capabilities", dict)()
    has = torch.cuda.is_bf16_supported() if device.type == "cuda" else able.get("avx512_bf16") or able.get("amx_bf16")
    return torch.bfloat16 if has else None


def _set_threads(threads: int | None, comm: Comm) -> None:
    if threads is None and comm.size > 1:
        threads = max(1, len(os.sched_getaffinity(0)) // comm.local_size)
    if threads is not None:
        torch.set_num_threads(threads)


def _mixed(*numbers: int) -> int:
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7], "big")


def _progress(feed: PatchLoader, epoch: int, comm: Comm):
    if comm.rank == 0 and sys.stderr.isatty():
        return tqdm(feed, f"epoch {epoch + 1}", leave=False)
    return feed


def _report(history: list[dict], epochs: int, folder_url: str) -> None:
    """One line for people, one row for programs."""
    row = history[-1]
    print(
        f"epoch {row['epoch'] + 1}/{epochs}: train loss {row['train_loss']:.4f}, val loss {row['val_loss']:.4f}, "
        f"{row['metric']} {row['val_metric']:.4f}, {row['seconds']:.1f} s, {row['samples_per_s']:.1f} samples/s",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    storage.write_bytes(storage.join(folder_url, HISTORY), "".join(json.dumps(r) + "\n" for r in history).encode())
