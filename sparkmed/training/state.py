"""What training changes from step to step: weights, their average, the optimizer, the history."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from sparkmed import storage
from sparkmed.config import Component, Config
from sparkmed.learning import components, networks
from sparkmed.rejection import InputError
from sparkmed.training.comm import Comm, synchronised
from sparkmed.training.dataset import PatchDataset
from sparkmed.training.loader import PatchLoader
from sparkmed.training.schedule import averaging_decay


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where it stopped and why."""


class Losses:
    """The sum of an epoch's losses on the device. One that is not finite is found a step later, when the device has it anyway."""

    def __init__(self, total: float = 0.0, samples: int = 0):
        self._total: Tensor | float = total
        self._samples = samples
        self._present: list[tuple] = []
        self._before: list[tuple] = []

    def add(self, values: Tensor, patch_ids: Sequence[str], epoch: int, step: int) -> None:
        """Count ``values`` (B,), one loss per patch."""
        values = values.detach()
        self._present.append((values, patch_ids, epoch, step))
        self._total = self._total + values.double().sum()
        self._samples += len(patch_ids)

    def over(self, comm: Comm) -> tuple[float, int]:
        """Sum and number over all ranks. Raises :class:`TrainingError` that names patches whose loss is not finite."""
        self.check()
        self.check()
        parts = comm.gather((float(self._total), self._samples))
        return sum(p[0] for p in parts), sum(p[1] for p in parts)

    def check(self) -> None:
        """Look at the losses of the step before, where ranks meet: the one that has such a patch is the one that says so."""
        for values, ids, epoch, step in self._before:
            wrong = ", ".join(f"{p} ({v:g})" for p, v in zip(ids, values.tolist(), strict=True) if not math.isfinite(v))
            if wrong:
                raise TrainingError(
                    f"loss is not finite in epoch {epoch}, step {step}, patches {wrong}; try a lower train.optimizer.lr"
                )
        self._before, self._present = self._present, []


@dataclass
class State:
    """All that a checkpoint holds. ``averaged`` is the network itself when weights are not averaged."""

    network: nn.Module
    averaged: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    history: list[dict] = field(default_factory=list)
    step: int = 0
    losses: Losses = field(default_factory=Losses)
    """Of the present epoch, as ``seconds`` is."""
    seconds: float = 0.0

    @classmethod
    def start(cls, config: Config, dataset: PatchDataset, device: torch.device, comm: Comm) -> "State":
        """The state before the first step: a pure function of the config and the dataset's fields, so equal on all ranks."""
        torch.manual_seed(config.seed)
        size = dataset.field("image").shape
        network = networks.build(
            config.train.network, size[0], len(config.classes), networks.spatial_dims(size[1:]), config.imports
        )
        networks.check(network, config.train.network.name, size, len(config.classes), config.task)
        if config.train.initial_weights is not None:
            _start_from(network, config.train.initial_weights)
        if config.train.channels_last:
            network.to(memory_format=torch.channels_last_3d if networks.spatial_dims(size[1:]) == 3 else torch.channels_last)
        network.to(device)
        if config.train.sync_batch_norm:
            network = synchronised(network, comm)
        averaged = copy.deepcopy(network).requires_grad_(False) if config.train.ema else network
        scaled = config.train.precision == "float16" and device.type == "cuda"
        return cls(network, averaged, optimizer(config, network), torch.amp.GradScaler(device.type, enabled=scaled))

    def average_weights(self, ema: float) -> None:
        """Move the averaged weights towards the network's; running statistics are copied."""
        if self.averaged is self.network:
            return
        with torch.no_grad():
            decay = averaging_decay(ema, self.step)
            torch._foreach_lerp_(list(self.averaged.parameters()), list(self.network.parameters()), 1 - decay)
            for mine, its in zip(self.averaged.buffers(), self.network.buffers(), strict=True):
                mine.copy_(its)

    def level(self, comm: Comm) -> None:
        """Make running statistics equal on all ranks: their mean, and rank 0's counts."""
        buffers = list({id(b): b for b in [*self.network.buffers(), *self.averaged.buffers()]}.values())
        comm.average(buffers)
        counts = [b for b in buffers if not b.is_floating_point()]
        if counts:
            for count, first in zip(counts, comm.broadcast([c.cpu() for c in counts]), strict=True):
                count.copy_(first)

    def end_epoch(self, row: dict) -> None:
        self.history.append(row)
        self.losses, self.seconds = Losses(), 0.0

    def saved(self, comm: Comm, feed: PatchLoader | None) -> dict[str, Any]:
        """Tensors and plain values; with ``feed``, within an epoch, also what differs between ranks. All ranks call it."""
        if not all(torch.isfinite(p).all() for p in self.network.parameters()):
            raise TrainingError(f"weights are not finite after step {self.step}; try a lower train.optimizer.lr")
        averaged = None if self.averaged is self.network else self.averaged.state_dict()
        saved = {"network": self.network.state_dict(), "averaged": averaged, "optimizer": self.optimizer.state_dict()}
        saved |= {"scaler": self.scaler.state_dict(), "step": self.step, "history": self.history, "partial": None}
        if feed is not None:
            total, samples = self.losses.over(comm)
            buffers = comm.gather([b.cpu() for b in self.network.buffers()])
            sums = {"loss": total, "samples": samples, "seconds": self.seconds}
            saved["partial"] = {"loader": feed.state_dict(), "buffers": buffers, **sums}
        return saved

    def restore(self, saved: dict[str, Any] | None, feed: PatchLoader, comm: Comm) -> None:
        """Become what :meth:`saved` gave, and set ``feed`` to where it stood; None changes nothing."""
        self.scaler.scale(torch.zeros((), device=next(self.network.parameters()).device))  # a rank may begin without samples
        if saved is None:
            return
        self.network.load_state_dict(saved["network"])
        if self.averaged is not self.network:
            self.averaged.load_state_dict(saved["averaged"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        self.step, self.history = saved["step"], list(saved["history"])
        if partial := saved["partial"]:
            feed.load_state_dict(partial["loader"])
            self.seconds = partial["seconds"]
            self.losses = Losses(partial["loss"], partial["samples"]) if comm.rank == 0 else Losses()
            self._restore_buffers(partial["buffers"], comm)

    def _restore_buffers(self, of_ranks: list[list[Tensor]], comm: Comm) -> None:
        """Running statistics of this rank; their mean when there were more or fewer ranks."""
        alike = len(of_ranks) == comm.size
        for i, buffer in enumerate(self.network.buffers()):
            theirs = [b[i] for b in of_ranks]
            floating = buffer.is_floating_point() and not alike
            buffer.copy_(torch.stack(theirs).mean(0) if floating else theirs[comm.rank if alike else 0])


def optimizer(config: Config, network: nn.Module) -> torch.optim.Optimizer:
    chosen = config.train.optimizer
    factory = components.find(chosen, ["torch.optim"], "optimizer", config.imports)
    if not (isinstance(factory, type) and issubclass(factory, torch.optim.Optimizer)):
        raise InputError(f"optimizer {chosen.name} is not a torch.optim.Optimizer")
    parameters = [p for p in network.parameters() if p.requires_grad]
    component = Component(name=chosen.name, **chosen.arguments)
    return components.create(factory, component, "optimizer", {"params": parameters, "lr": chosen.lr})


def _start_from(network: nn.Module, url: str) -> None:
    try:
        weights = safetensors.torch.load(storage.read_bytes(url))
    except FileNotFoundError:
        raise InputError(f"train.initial_weights {url}: no such file") from None
    except safetensors.SafetensorError as e:
        raise InputError(f"train.initial_weights {url}: not safetensors: {e}") from None
    networks.load_matching(network, weights)
