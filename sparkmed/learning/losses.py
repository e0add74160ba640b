"""Losses of MONAI and torch by name, one value per sample."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparkmed.config import Component
from sparkmed.learning import components
from sparkmed.rejection import InputError

DEFAULTS = {"segmentation": Component(name="DiceCELoss"), "classification": Component(name="CrossEntropyLoss")}
DICE_CE = "monai.losses.dice.DiceCELoss"

Loss = Callable[[Tensor | list[Tensor], Tensor], Tensor]


def build(component: Component | None, task: str, imports: Iterable[str] = ()) -> Loss:
    """A function of network output and truth that returns one loss per sample, (B,).

    Output: class scores before softmax, (B, classes, I, J, K) with truth (B, 1, I, J, K), or (B, classes) with truth (B,), both
    int64. Each sample's loss depends on that sample alone, so a weighted sum over any division of a batch among processes is the
    same number. With deep supervision (a list of outputs, or (B, n, classes, I, J, K)) output n weighs 1 / 2**n, of sum 1.
    Class weights multiply the loss of an image; of a segmentation, a patch's mean is over the weights of its voxels.
    ``component`` None is Dice + cross-entropy per sample, or cross-entropy.
    """
    component = component or DEFAULTS[task]
    if component.arguments.get("batch"):
        raise InputError(f"loss {component.name}: batch: true mixes samples, so the result would depend on the number of processes")
    if component.arguments.get("reduction", "mean") != "mean":
        raise InputError(f"loss {component.name}: reduction is mean; got {component.arguments['reduction']!r}")
    factory = components.find(component, ["monai.losses", "torch.nn"], "loss", imports)
    component = Component(name=component.name, **_tensors(component.arguments))
    function = components.create(factory, component, "loss", {"to_onehot_y": True, "softmax": True, "use_softmax": True})
    return _PerSample(function, from_torch=factory.__module__.startswith("torch."))


def _tensors(arguments: dict) -> dict:
    """Class weights are written as lists in YAML and wanted as tensors."""
    return {
        k: torch.tensor(v, dtype=torch.float32) if k in ("weight", "alpha") and isinstance(v, (list, tuple)) else v
        for k, v in arguments.items()
    }


class _PerSample:
    def __init__(self, function: nn.Module, from_torch: bool):
        self.function = function
        self.from_torch = from_torch
        self.of_images = isinstance(function, nn.CrossEntropyLoss | nn.NLLLoss)
        self.at_once = f"{type(function).__module__}.{type(function).__name__}" == DICE_CE and function.cross_entropy.weight is None
        if self.at_once:
            function.dice.reduction = function.cross_entropy.reduction = "none"

    def __call__(self, output: Tensor | list[Tensor], truth: Tensor) -> Tensor:
        if isinstance(output, Tensor) and output.ndim == truth.ndim + 1 and truth.ndim > 1:
            output = list(output.unbind(1))
        if isinstance(output, Tensor):
            return self._one(output, truth)
        shares = [0.5**n for n in range(len(output))]
        levels = [self._one(o, _shrunk(truth, o)) for o in output]
        return sum(s / sum(shares) * level for s, level in zip(shares, levels, strict=True))

    def _one(self, output: Tensor, truth: Tensor) -> Tensor:
        if not len(output):
            return output.flatten(1).sum(1)  # (0,), still a function of the network
        self.function.to(output.device)
        if self.at_once:  # the usual loss in one call instead of one per sample
            f = self.function
            dice, entropy = f.dice(output, truth).flatten(1).mean(1), f.ce(output, truth).flatten(1).mean(1)
            return f.lambda_dice * dice + f.lambda_ce * entropy
        if truth.ndim == 1 and self.of_images:  # a mean over one image would divide by its weight what was multiplied by it
            self.function.reduction = "none"
            return self.function(output, truth)
        if truth.ndim > 1 and self.from_torch:
            truth = truth[:, 0]
        elif truth.ndim == 1 and not self.from_torch:
            truth = truth[:, None]
        return torch.stack([self.function(output[i : i + 1], truth[i : i + 1]) for i in range(len(output))])


def _shrunk(truth: Tensor, output: Tensor) -> Tensor:
    if truth.ndim == 1 or truth.shape[2:] == output.shape[2:]:
        return truth
    return F.interpolate(truth.float(), output.shape[2:], mode="nearest-exact").long()
