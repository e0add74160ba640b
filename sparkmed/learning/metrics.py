"""Metrics of MONAI by name as mergeable values, and intervals over subjects.

A metric has ``update(output, truth, volumes, weight)``, ``state()``, ``merge(state)`` and ``compute()``; states are plain values
that travel between processes, and merging the states of any division of the data gives the same number.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparkmed.config import Component
from sparkmed.learning import components
from sparkmed.rejection import InputError


class Metric(Protocol):
    """Higher is better."""

    name: str

    def update(self, output: Tensor, truth: Tensor, volumes: Sequence[str], weight: Tensor) -> None: ...
    def state(self) -> dict: ...
    def merge(self, state: dict) -> None: ...
    def compute(self) -> float: ...


def build(component: Component | None, task: str, classes: int, imports: Iterable[str] = ()) -> Metric:
    """A new, empty metric: one of ``monai.metrics``, or :class:`VolumeDice` (segmentation), ROCAUCMetric (classification).

    Raises :class:`InputError` for a name or an argument that is not MONAI's.
    """
    if component is None:
        if task == "segmentation":
            return VolumeDice(classes)
        component = Component(name="ROCAUCMetric")
    factory = components.find(component, ["monai.metrics"], "metric", imports)
    from monai.metrics import Cumulative

    if not (isinstance(factory, type) and issubclass(factory, Cumulative)):
        raise InputError(f"metric {component.name} cannot be merged over processes; wanted a subclass of monai.metrics.Cumulative")
    metric = components.create(factory, component, "metric", {"include_background": task == "classification"})
    return MonaiMetric(component.name, metric, task, classes)


class VolumeDice:
    """Mean over volumes, then over foreground classes, of Dice = 2 |P and T| / (|P| + |T|), from the voxel counts of its patches.

    A class that is neither predicted nor true in a volume is left out of it. Patches that overlap count their common voxels
    more than once; a false alarm in a patch without the class counts, which a mean of Dice per patch would hide.
    """

    name = "dice"

    def __init__(self, classes: int):
        self.classes = classes
        self._counts: dict[str, np.ndarray] = {}  # volume -> (3, classes) voxels: in both, predicted, true

    def update(self, output: Tensor, truth: Tensor, volumes: Sequence[str], weight: Tensor) -> None:
        """``output`` (B, classes, I, J, K), ``truth`` (B, 1, I, J, K) int64; samples of weight 0 are left out."""
        predicted, truth = output.argmax(1).flatten(1), truth[:, 0].flatten(1)
        for p, t, volume, w in zip(predicted, truth, volumes, weight.tolist(), strict=True):
            if w > 0:
                self._add(volume, [torch.bincount(x, minlength=self.classes).tolist() for x in (p[p == t], p, t)])

    def _add(self, volume: str, counts) -> None:
        self._counts[volume] = self._counts.get(volume, 0) + np.asarray(counts, np.int64)

    def state(self) -> dict:
        return {volume: counts.tolist() for volume, counts in self._counts.items()}

    def merge(self, state: dict) -> None:
        for volume, counts in state.items():
            self._add(volume, counts)

    def compute(self) -> float:
        return _mean(self.per_class())

    def per_class(self) -> list[float]:
        """Mean Dice over volumes of each foreground class; nan for a class that occurs nowhere."""
        if not self._counts:
            return []
        both, predicted, true = np.stack(list(self._counts.values())).astype(np.float64)[:, :, 1:].transpose(1, 0, 2)
        dice = np.divide(2 * both, predicted + true, out=np.full_like(both, np.nan), where=predicted + true > 0)
        return [_mean(d) for d in dice.T]


class MonaiMetric:
    """A cumulative metric of MONAI; its state is MONAI's own buffer of values per sample."""

    def __init__(self, name: str, metric: Any, task: str, classes: int):
        self.name = name
        self.task = task
        self.classes = classes
        self._metric = metric
        self._buffers: list[tuple[list, ...]] = []

    def update(self, output: Tensor, truth: Tensor, volumes: Sequence[str], weight: Tensor) -> None:
        """``output`` (B, classes, ...) before softmax, ``truth`` (B, 1, I, J, K) or (B,); samples of weight 0 are left out."""
        keep = weight.to(output.device) > 0
        if not keep.any():
            return
        output, truth = output[keep], truth[keep]
        if self.task == "segmentation":
            predicted = _one_hot(output.argmax(1), self.classes)
            truth = truth[:, 0]
        else:
            predicted = output.softmax(1)
        self._metric.reset()
        self._metric(predicted, _one_hot(truth, self.classes))
        buffer = self._metric.get_buffer()
        parts = buffer if isinstance(buffer, (list, tuple)) else [buffer]
        self._buffers.append(tuple(p.cpu().tolist() for p in parts))

    def state(self) -> dict:
        return {"buffers": list(self._buffers)}

    def merge(self, state: dict) -> None:
        self._buffers.extend(tuple(b) for b in state["buffers"])

    def compute(self) -> float:
        if not self._buffers:
            return math.nan
        self._metric.reset()
        self._metric.extend(*(torch.tensor([row for part in parts for row in part]) for parts in zip(*self._buffers, strict=True)))
        value = self._metric.aggregate()
        while isinstance(value, (list, tuple)):  # the metric comes before the number of values that were not nan
            value = value[0]
        value = torch.as_tensor(value, dtype=torch.float64)
        return float(value[~value.isnan()].mean())


def _mean(values: Sequence[float]) -> float:
    """Mean of what is not nan; nan when nothing is left."""
    values = np.asarray(values, np.float64)
    return float(np.nanmean(values)) if (~np.isnan(values)).any() else math.nan


def _one_hot(truth: Tensor, classes: int) -> Tensor:
    """(B, ...) int64 to (B, classes, ...) float."""
    return F.one_hot(truth, classes).movedim(-1, 1).float()


def roc_auc(probabilities: Sequence[Sequence[float]], targets: Sequence[int]) -> float | None:
    """Area under the ROC curve, one class against the rest, mean over the classes that occur and do not fill all samples.

    ``probabilities`` (samples, classes), ``targets`` class indices. None when no class can be judged.
    """
    from monai.metrics import compute_roc_auc

    scores, truth = torch.tensor(probabilities, dtype=torch.float64), _one_hot(torch.tensor(targets), len(probabilities[0]))
    judged = [c for c in range(truth.shape[1]) if 0 < truth[:, c].sum() < len(truth)]
    return float(np.mean([compute_roc_auc(scores[:, c], truth[:, c]) for c in judged])) if judged else None


RELIABILITY_BINS = 15


def reliability(confidence: np.ndarray, correct: np.ndarray) -> list[float]:
    """A reliability diagram as counts, sums of confidence and sums of correct predictions in 15 bins of equal width, 45 numbers.

    ``confidence`` in [0, 1] of the predicted class and ``correct`` bool are of one shape. Diagrams are merged by adding them, which
    is why the edges are fixed and not quantiles of the data.
    """
    confidence = np.asarray(confidence, np.float64).ravel()
    bins = np.clip(np.ceil(confidence * RELIABILITY_BINS).astype(int) - 1, 0, RELIABILITY_BINS - 1)
    weights = (None, confidence, np.asarray(correct, np.float64).ravel())
    return np.concatenate([np.bincount(bins, w, RELIABILITY_BINS) for w in weights]).tolist()


def calibration_error(diagrams: Sequence[Sequence[float]]) -> float | None:
    """Expected calibration error (Guo et al. 2017, ICML): mean of |accuracy - confidence| over bins, by their share of predictions.

    ``diagrams`` are of :func:`reliability`, one per subject, and weigh the same however many voxels each has. None without any.
    """
    parts = [np.reshape(d, (3, RELIABILITY_BINS)) for d in diagrams]
    shares = [p / p[0].sum() for p in parts if p[0].sum() > 0]
    if not shares:
        return None
    _, confidence, correct = np.mean(shares, 0)
    return float(np.abs(correct - confidence).sum())


def bootstrap_interval(
    values: Sequence[float], confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of ``values``, one per subject (Efron 1979, Annals of Statistics 7:1).

    Values that are nan are left out. Raises ValueError when none is left.
    """
    values = _finite(values)
    means = _resampled_means(values, resamples, seed)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def paired_bootstrap(
    a: Sequence[float], b: Sequence[float], confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of a - b over subjects and its percentile bootstrap interval; both are of the same subjects in the same order.

    Raises ValueError when the lengths differ or no pair is finite.
    """
    if len(a) != len(b):
        raise ValueError(f"a paired comparison wants the same subjects: got {len(a)} and {len(b)} values")
    differences = _finite(np.asarray(a, np.float64) - np.asarray(b, np.float64))
    return float(differences.mean()), *bootstrap_interval(differences, confidence, resamples, seed)


def _finite(values: Sequence[float]) -> np.ndarray:
    values = np.asarray(values, np.float64)
    values = values[~np.isnan(values)]
    if not len(values):
        raise ValueError("no value to take a mean of")
    return values


def _resampled_means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return np.array([values[rng.integers(0, len(values), len(values))].mean() for _ in range(resamples)])
