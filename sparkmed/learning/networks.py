"""Networks of MONAI by name, all called with (B, C, I, J, K)."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparkmed.config import Component
from sparkmed.learning import components
from sparkmed.rejection import InputError


class InPlane(nn.Module):
    """A 2-D network called with (B, C, I, J, 1); a map that comes out gets its K = 1 back, class scores stay (B, classes)."""

    def __init__(self, plane: nn.Module):
        super().__init__()
        self.plane = plane

    def forward(self, batch: Tensor):
        if batch.ndim != 5 or batch.shape[4] != 1:
            raise ValueError(f"a 2-D network takes (B, C, I, J, 1); got {tuple(batch.shape)}")
        return _with_depth(self.plane(batch[..., 0]))


def _with_depth(output):
    if isinstance(output, (list, tuple)):
        return type(output)(_with_depth(o) for o in output)
    return output.unsqueeze(-1) if output.ndim > 2 else output


def spatial_dims(size: tuple[int, int, int]) -> int:
    """2 when patches of ``size`` (I, J, K) are planes, else 3."""
    return 2 if size[2] == 1 else 3


def build(component: Component, in_channels: int, out_channels: int, spatial_dims: int, imports: Iterable[str] = ()) -> nn.Module:
    """A network of ``monai.networks.nets``, or of ``imports``, that takes (B, ``in_channels``, I, J, K).

    Returns (B, ``out_channels``, I, J, K) class scores before softmax from a segmentation network, (B, ``out_channels``) from
    a classifier; with deep supervision a list of them while training. ``spatial_dims`` 2 wants K = 1. Never downloads weights.
    Raises :class:`InputError` for a name or an argument that is not MONAI's, naming the nearest, and for one by which a network
    fetches weights of its own.
    """
    if spatial_dims not in (2, 3):
        raise InputError(f"network {component.name}: spatial_dims {spatial_dims}, wanted 2 or 3")
    factory = components.find(component, ["monai.networks.nets"], "network", imports)
    given = {
        "spatial_dims": spatial_dims, "in_channels": in_channels, "n_input_channels": in_channels, "out_channels": out_channels,
        "num_classes": out_channels, "pretrained": False, "classification": True,
    }  # fmt: skip
    _require_no_weights(factory, component, given)
    network = components.create(factory, component, "network", given)
    if not isinstance(network, nn.Module):
        raise InputError(f"network {component.name} is not a network but a {type(network).__name__}")
    return InPlane(network) if spatial_dims == 2 else network


def _require_no_weights(factory, component: Component, given: Mapping[str, Any]) -> None:
    """Networks of MONAI that fetch weights unpickle what they get."""
    known = {k: None if p.default is p.empty else p.default for k, p in components.parameters(factory).items()}
    fetching = [k for k in known if k.startswith("pretrained") or k in ("weights", "path_or_repo_id")]
    wanted = [k for k in fetching if (known | given | component.arguments)[k]]
    if wanted or "pretrained" in component.name:
        raise InputError(
            f"network {component.name} would fetch weights{f' ({wanted[0]})' if wanted else ''}, which may hold code; give "
            "safetensors to train.initial_weights instead"
        )


def check(network: nn.Module, name: str, patch: tuple[int, int, int, int], classes: int, task: str) -> None:
    """Raises :class:`InputError` unless the network makes class scores of patches (C, I, J, K); runs it once on zeros."""
    wanted = (2, classes, *patch[1:]) if task == "segmentation" else (2, classes)
    try:
        with torch.no_grad():
            output = copy.deepcopy(network).train()(torch.zeros(2, *patch))
    except Exception as e:  # a network says in many ways that a size does not suit it
        said = " ".join(str(e).split())[:300]
        raise InputError(f"network {name} does not take patches {patch}: {type(e).__name__}: {said}") from e
    if isinstance(output, Tensor) and output.ndim == len(wanted) + 1:  # deep supervision
        output = output[:, 0]
    found = tuple(getattr(primary(output), "shape", ()))
    if found != wanted:
        raise InputError(f"network {name} makes {found} of patches {patch}, wanted {wanted} for {task} into {classes} classes")


def last_linear(network: nn.Module, classes: int, name: str) -> nn.Linear:
    """The layer that makes class scores of a classifier, whose input is what the network makes of an image.

    Raises :class:`InputError` for a network whose scores do not come from one linear layer.
    """
    layers = [m for m in network.modules() if isinstance(m, nn.Linear)]
    if not layers or layers[-1].out_features != classes:
        raise InputError(f"network {name} has no last linear layer into {classes} classes, whose input would be the features")
    return layers[-1]


def primary(output: Tensor | list[Tensor] | tuple) -> Tensor:
    """The one output that counts at inference: the first of several (deep supervision, hidden states)."""
    return output[0] if isinstance(output, (list, tuple)) else output


def load_matching(network: nn.Module, weights: dict[str, Tensor]) -> list[str]:
    """Copy into ``network`` the weights whose name and shape it has; returns the names of its layers that kept their values.

    The names of a 2-D network are tried with and without the prefix of :class:`InPlane`. Raises :class:`InputError` when
    nothing fits.
    """
    state = network.state_dict()
    spelt = weights | {f"plane.{k}": v for k, v in weights.items()} | {k.removeprefix("plane."): v for k, v in weights.items()}
    fitting = {k: spelt[k] for k, v in state.items() if k in spelt and spelt[k].shape == v.shape}
    if not fitting:
        raise InputError(f"initial weights: none of {len(weights)} layers has a name and a shape of the network's {len(state)}")
    with torch.no_grad():
        network.load_state_dict(state | fitting)
    return [k for k in state if k not in fitting]
