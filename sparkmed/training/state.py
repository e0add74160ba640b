"""What training changes from step to step: weights, their average, the optimizer, the history."""

import copy
from dataclasses import dataclass, field
from typing import Any

import safetensors.torch
import torch
from torch import nn

from sparkmed import storage
from sparkmed.config import Component, Config
from sparkmed.learning import components, networks
from sparkmed.rejection import InputError
from sparkmed.training.dataset import PatchDataset
from sparkmed.training.schedule import averaging_decay


@dataclass
class State:
    """All that a checkpoint holds. ``averaged`` is the network itself when weights are not averaged."""

    network: nn.Module
    averaged: nn.Module
    optimizer: torch.optim.Optimizer
    history: list[dict] = field(default_factory=list)

    @classmethod
    def start(cls, config: Config, dataset: PatchDataset, device: torch.device) -> "State":
        """The state before the first step: a pure function of the config and the dataset's fields, so equal on all ranks."""
        torch.manual_seed(config.seed)
        size = dataset.field("image").shape
        network = networks.build(config.train.network, size[0], len(config.classes), networks.spatial_dims(size[1:]))
        networks.check(network, config.train.network.name, size, len(config.classes), config.task)
        if config.train.initial_weights is not None:
            _start_from(network, config.train.initial_weights)
        if config.train.channels_last:
            network.to(memory_format=torch.channels_last_3d if networks.spatial_dims(size[1:]) == 3 else torch.channels_last)
        network.to(device)
        averaged = copy.deepcopy(network).requires_grad_(False) if config.train.ema else network
        return cls(network, averaged, optimizer(config, network))

    def average_weights(self, ema: float, step: int) -> None:
        """Move the averaged weights towards the network's; running statistics are copied."""
        if self.averaged is self.network:
            return
        with torch.no_grad():
            decay = averaging_decay(ema, step)
            torch._foreach_lerp_(list(self.averaged.parameters()), list(self.network.parameters()), 1 - decay)
            for mine, its in zip(self.averaged.buffers(), self.network.buffers(), strict=True):
                mine.copy_(its)

    def saved(self) -> dict[str, Any]:
        averaged = None if self.averaged is self.network else self.averaged.state_dict()
        weights = {"network": self.network.state_dict(), "averaged": averaged}
        return weights | {"optimizer": self.optimizer.state_dict(), "history": self.history}

    def restore(self, saved: dict[str, Any] | None) -> None:
        """Become what :meth:`saved` gave; None changes nothing."""
        if saved is None:
            return
        self.network.load_state_dict(saved["network"])
        if self.averaged is not self.network:
            self.averaged.load_state_dict(saved["averaged"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.history = list(saved["history"])


def optimizer(config: Config, network: nn.Module) -> torch.optim.Optimizer:
    chosen = config.train.optimizer
    factory = components.find(chosen, [torch.optim], "optimizer")
    if not (isinstance(factory, type) and issubclass(factory, torch.optim.Optimizer)):
        raise InputError(f"optimizer {chosen.name} is not an optimizer of torch.optim")
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
