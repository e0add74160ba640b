"""The training loop. A batch can be followed from loader to optimizer in :func:`fit`; who launched it is not known here."""

import hashlib
import json
import math
import os
import sys
import time

import torch
from torch import Tensor, nn
from tqdm import tqdm

import sparkmed
from sparkmed import storage
from sparkmed.config import Config, digest
from sparkmed.learning import losses, metrics, networks
from sparkmed.learning.augment import augment
from sparkmed.learning.model import DatasetReference, Model, ModelSpec
from sparkmed.rejection import InputError
from sparkmed.training import checkpoint
from sparkmed.training.comm import Comm, LocalComm
from sparkmed.training.dataset import PatchDataset
from sparkmed.training.loader import PatchLoader
from sparkmed.training.schedule import learning_rate
from sparkmed.training.state import State

HISTORY, CHECKPOINTS, MODEL = "history.jsonl", "checkpoints", "model"

MAY_CHANGE = {"processes", "threads", "epochs", "max_minutes", "patience", "device", "keep_checkpoints", "start_timeout"}
"""Keys of ``train`` with which a run may be continued."""


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where it stopped and why."""


def fit(config: Config, dataset_url: str, folder_url: str, comm: Comm | None = None) -> dict:
    """Train on the ``train`` split, validate on ``val`` after every epoch, and leave the best epoch as a model in the folder.

    The folder gets ``checkpoints/``, ``history.jsonl`` (a row per epoch, rewritten whole after each) and at the end ``model/``.
    Called again with the same folder it goes on behind the last whole checkpoint, with any number of processes; checkpoints of
    another config or dataset are refused (what may change: :data:`MAY_CHANGE`).

    Returns on every rank {"history": rows, "best": row of the best epoch, "stopped": "epochs" | "patience" | "max_minutes",
    "model": URL, "identity", "parameters": count, "ranks", "seconds"}. The best epoch has the highest validation metric and,
    among equals, the lowest validation loss. Raises :class:`InputError` before the first step, :class:`TrainingError` for a loss
    that is not finite.
    """
    comm, train = comm or LocalComm(), config.train
    device = _device(train.device, comm)
    _set_threads(train.threads, comm)
    feed = PatchLoader(dataset_url, train.batch_size, comm.rank, comm.size, config.seed, split="train")
    held_out = PatchLoader(dataset_url, train.batch_size, comm.rank, comm.size, config.seed, shuffle=False, split="val")
    check(config, feed.dataset)
    state, identity = State.start(config, feed.dataset, device), run_identity(config, feed.dataset)
    state.restore(comm.broadcast(_saved(folder_url, identity) if comm.rank == 0 else None))
    network, optimizer, loss_of = state.network, state.optimizer, losses.build(train.loss, config.task)
    parameters = [p for p in network.parameters() if p.requires_grad]
    half = train.precision == "bfloat16" and _computes_bfloat16(device)
    layout = torch.channels_last_3d if train.channels_last else torch.contiguous_format

    while (stopped := comm.broadcast(_stop(config, state.history))) is None:
        epoch, began = len(state.history), time.perf_counter()
        feed.set_epoch(epoch)
        torch.manual_seed(_mixed(config.seed, epoch, comm.rank))  # dropout
        network.train()
        loss_sum, samples = 0.0, 0
        for step, batch in enumerate(_progress(feed, epoch, comm)):
            lr = learning_rate(train, comm.size, epoch + step / len(feed))
            optimizer.zero_grad(set_to_none=True)
            batch = _real(batch, device)
            if ids := batch["patch_id"]:  # the last global batch may hold nothing for this rank
                image, label = augment(batch["image"], batch.get("label"), ids, train.augment, config.seed, epoch)
                with torch.autocast(device.type, torch.bfloat16, enabled=half):
                    output = network(image.contiguous(memory_format=layout))
                values = loss_of(_in_full(output), batch["target"] if label is None else label)
                _check_finite(values, ids, epoch, step)
                (values.sum() / batch["total"]).backward()  # summed over ranks: the gradient of the mean over the global batch
                loss_sum, samples = loss_sum + values.sum().item(), samples + len(ids)
            _fill_missing_gradients(parameters)
            comm.sum_gradients(parameters)
            if train.clip_norm is not None:
                nn.utils.clip_grad_norm_(parameters, train.clip_norm)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            state.average_weights(train.ema, epoch * len(feed) + step)
        comm.average([*network.buffers(), *state.averaged.buffers()])  # running statistics; weights are equal already
        trained = time.perf_counter()
        validation = validate(config, state.averaged, loss_of, held_out, comm)
        row = {"epoch": epoch, "lr": lr, **_train_loss(comm.gather((loss_sum, samples))), **validation}
        row |= {"seconds": time.perf_counter() - began, "samples_per_s": feed.dataset.rows / (trained - began), "ranks": comm.size}
        state.history.append(comm.broadcast(row))
        if comm.rank == 0:
            _report(state.history, train.epochs, folder_url)
            checkpoint.save(storage.join(folder_url, CHECKPOINTS), epoch, {"identity": identity, **state.saved()})
            checkpoint.prune(storage.join(folder_url, CHECKPOINTS), train.keep_checkpoints, best(state.history)["epoch"])

    return comm.broadcast(_result(config, feed.dataset, folder_url, state, stopped, identity) if comm.rank == 0 else None)


def validate(config: Config, network: nn.Module, loss_of: losses.Loss, held_out: PatchLoader, comm: Comm) -> dict:
    """Loss and metric of ``network`` over all patches of ``held_out``, merged over ranks: the same numbers on each."""
    network.eval()
    device = next(network.parameters()).device
    metric = metrics.build(config.train.metric, config.task, len(config.classes))
    loss_sum, samples = 0.0, 0
    with torch.inference_mode():
        for batch in held_out:
            batch = _real(batch, device)
            if not batch["patch_id"]:
                continue
            truth = batch["target" if config.task == "classification" else "label"]
            output = networks.primary(network(batch["image"]))
            loss_sum += loss_of(output, truth).sum().item()
            samples += len(truth)
            metric.update(output, truth, batch["volume"], batch["weight"])
    merged = metrics.build(config.train.metric, config.task, len(config.classes))
    parts = comm.gather((loss_sum, samples, metric.state()))
    for _, _, part in parts:
        merged.merge(part)
    row = {"val_loss": sum(p[0] for p in parts) / sum(p[1] for p in parts), "metric": merged.name, "val_metric": merged.compute()}
    if isinstance(merged, metrics.VolumeDice):
        row["val_per_class"] = dict(zip(config.classes[1:], merged.per_class(), strict=True))
    return row


def check(config: Config, dataset: PatchDataset) -> None:
    """Raises :class:`InputError` when the dataset is not one for this config."""
    meta, truth = dataset.meta, "target" if config.task == "classification" else "label"
    if meta.get("task", config.task) != config.task or truth not in {f.name for f in dataset.fields}:
        raise InputError(f"dataset {dataset.url} is for {meta.get('task')}, the config is for {config.task}")
    if tuple(meta.get("classes", config.classes)) != config.classes:
        raise InputError(f"dataset {dataset.url} has classes {list(meta['classes'])}, the config {list(config.classes)}")


def run_identity(config: Config, dataset: PatchDataset) -> str:
    """Digest of all that decides what is learnt: runs of equal identity may continue each other."""
    train = config.train.model_dump(mode="json", exclude=MAY_CHANGE, exclude_defaults=True)
    return digest(train, config.task, list(config.classes), config.seed, dataset.meta.get("digest", dataset.digest))


def best(history: list[dict]) -> dict:
    """The row of the highest validation metric, among equals of the lowest validation loss; a metric that is nan counts least."""

    def merit(row: dict) -> tuple[float, float]:
        return (-math.inf if math.isnan(row["val_metric"]) else row["val_metric"], -row["val_loss"])

    return max(history, key=merit)


def _stop(config: Config, history: list[dict]) -> str | None:
    train = config.train
    if len(history) >= train.epochs:
        return "epochs"
    if history and train.max_minutes is not None and sum(r["seconds"] for r in history) >= 60 * train.max_minutes:
        return "max_minutes"
    if history and train.patience is not None and len(history) - 1 - best(history)["epoch"] >= train.patience:
        return "patience"
    return None


def _real(batch: dict, device: torch.device) -> dict:
    """The batch on ``device`` without its padding."""
    n = int(batch["weight"].sum())
    return {k: v if k == "total" else v[:n].to(device) if isinstance(v, Tensor) else v[:n] for k, v in batch.items()}


def _in_full(output):
    """float32 of what a network gives: a tensor, or several with deep supervision."""
    return output.float() if isinstance(output, Tensor) else [o.float() for o in output]


def _fill_missing_gradients(parameters: list[nn.Parameter]) -> None:
    """Zeros where a parameter took no part in the loss, so that all ranks sum the same tensors."""
    for p in parameters:
        if p.grad is None:
            p.grad = torch.zeros_like(p)


def _check_finite(values: Tensor, patch_ids: list[str], epoch: int, step: int) -> None:
    finite = torch.isfinite(values.detach())
    if not finite.all():
        wrong = ", ".join(f"{p} ({v:g})" for p, v, ok in zip(patch_ids, values.tolist(), finite.tolist(), strict=True) if not ok)
        raise TrainingError(f"loss is not finite in epoch {epoch}, step {step}, patches {wrong}; try a lower train.optimizer.lr")


def _train_loss(parts: list[tuple[float, int]]) -> dict:
    return {"train_loss": sum(p[0] for p in parts) / sum(p[1] for p in parts), "samples": sum(p[1] for p in parts)}


def _saved(folder_url: str, identity: str) -> dict | None:
    saved = checkpoint.latest(storage.join(folder_url, CHECKPOINTS))
    if saved is not None and saved["identity"] != identity:
        raise InputError(f"{folder_url} has checkpoints of another config or dataset: give another folder, or remove that one")
    return saved


def _result(config: Config, dataset: PatchDataset, folder_url: str, state: State, stopped: str, identity: str) -> dict:
    """Write the model of the best epoch, and say what came out."""
    row = best(state.history)
    folder = storage.join(folder_url, CHECKPOINTS)
    chosen = [c for c in checkpoint.present(folder) if c.epoch == row["epoch"]]
    if not chosen:
        raise TrainingError(f"{folder}: the checkpoint of epoch {row['epoch']}, the best, is gone")
    saved = checkpoint.load(chosen[-1])
    Model.build(model_spec(config, dataset), saved["averaged"] or saved["network"]).save(storage.join(folder_url, MODEL))
    return {
        "history": state.history, "best": row, "stopped": stopped, "model": storage.join(folder_url, MODEL), "identity": identity,
        "parameters": sum(p.numel() for p in state.network.parameters()), "ranks": state.history[-1]["ranks"],
        "seconds": sum(r["seconds"] for r in state.history),
    }  # fmt: skip


def model_spec(config: Config, dataset: PatchDataset) -> ModelSpec:
    """The spec of a model trained on ``dataset`` with ``config``."""
    channels, *window = dataset.field("image").shape
    reference = {k: str(dataset.meta.get(k, "")) for k in DatasetReference.model_fields}
    return ModelSpec(
        name=config.name, task=config.task, classes=config.classes, network=config.train.network, in_channels=channels,
        spatial_dims=networks.spatial_dims(tuple(window)), preprocess=config.preprocess, window=tuple(window), score=config.score,
        dataset=DatasetReference(**reference), code_version=sparkmed.__version__, seed=config.seed,
    )  # fmt: skip


def _device(wanted: str, comm: Comm) -> torch.device:
    if wanted == "cuda" and not torch.cuda.is_available():
        raise InputError("train.device is cuda, and this machine has no CUDA device that torch can use")
    if wanted == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", comm.local_rank % torch.cuda.device_count())


def _computes_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for it; emulated, it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported()
    able = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


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
