"""A trained model as a value: weights, and a spec that pins everything needed to use them."""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from pydantic import ValidationError
from torch import nn

from sparkmed import storage
from sparkmed.config import Component, Preprocess, Score, Section
from sparkmed.imaging import geometry, intensity, patches, postprocess, preprocess
from sparkmed.imaging.geometry import Placed
from sparkmed.imaging.volume import Volume
from sparkmed.learning import inference, networks
from sparkmed.rejection import InputError, Refused

WEIGHTS, SPEC = "weights.safetensors", "spec.json"


class DatasetReference(Section):
    """What a model was trained on."""

    name: str = ""
    version: str = ""
    digest: str = ""


class ModelSpec(Section):
    """What a model is, apart from its weights."""

    format_version: Literal[1] = 1
    name: str
    task: Literal["segmentation", "classification"]
    classes: tuple[str, ...]
    """Class names by label value; class 0 of a segmentation is the background."""
    network: Component
    in_channels: int
    spatial_dims: Literal[2, 3]
    preprocess: Preprocess
    window: tuple[int, int, int]
    """(I, J, K) in voxels after preprocessing that the network sees at once."""
    score: Score = Score()
    dataset: DatasetReference = DatasetReference()
    code_version: str = ""
    seed: int = 0
    weights_sha256: str = ""
    """SHA-256 of the weights file; set when the model is saved."""


class ClassProbabilities(dict[str, float]):
    """Probability by class name, in class order; ``label`` is the likeliest class."""

    @property
    def label(self) -> str:
        return max(self, key=self.__getitem__)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.array(list(self.values()), dtype or np.float32)


@dataclass(frozen=True, eq=False)
class Segmentation:
    """``labels`` (1, I, J, K) on the input's own grid, and per class the ``voxels`` and the mean of its probability there (None: no
    voxel). ``probabilities`` (classes, I, J, K) where they were asked for."""

    labels: Volume
    voxels: list[int]
    means: list[float | None]
    probabilities: Volume | None = None


class Model:
    """A network and its spec. Same volume, same weights, same device: same prediction."""

    def __init__(self, spec: ModelSpec, network: nn.Module, device: str | torch.device = "cpu"):
        self.spec = spec
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(device)
        self.network = network.to(self.device).eval()

    @classmethod
    def build(cls, spec: ModelSpec, weights: dict[str, torch.Tensor], device: str | torch.device = "cpu") -> "Model":
        """The model of ``spec`` with ``weights`` by layer name; :class:`InputError` when they are of another network."""
        network = networks.build(spec.network, spec.in_channels, len(spec.classes), spec.spatial_dims)
        try:
            network.load_state_dict(weights)
        except RuntimeError as e:
            raise InputError(f"weights do not fit network {spec.network.name}: {' '.join(str(e).split())[:400]}") from None
        return cls(spec, network, device)

    def save(self, folder: str) -> None:
        """Write ``weights.safetensors`` and ``spec.json`` to a folder or URL; no pickle. The spec comes last."""
        data = safetensors.torch.save({k: v.detach().cpu().contiguous() for k, v in self.network.state_dict().items()})
        self.spec = self.spec.model_copy(update={"weights_sha256": hashlib.sha256(data).hexdigest()})
        storage.write_bytes(storage.join(folder, WEIGHTS), data)
        storage.write_bytes(storage.join(folder, SPEC), (self.spec.model_dump_json(indent=2) + "\n").encode())

    @classmethod
    def load(cls, folder: str, device: str | torch.device = "cpu") -> "Model":
        """The model in a folder or URL; :class:`InputError` when it is not one, or its weights are not those of its spec."""
        try:
            spec = ModelSpec.model_validate(json.loads(storage.read_bytes(storage.join(folder, SPEC))))
            data = storage.read_bytes(storage.join(folder, WEIGHTS))
        except FileNotFoundError as e:
            raise InputError(f"model {folder}: no {os.path.basename(str(e.filename or e))}") from None
        except (ValidationError, json.JSONDecodeError) as e:
            raise InputError(f"model {folder}: {SPEC} is not a model spec: {' '.join(str(e).split())[:300]}") from None
        found = hashlib.sha256(data).hexdigest()
        if found != spec.weights_sha256:
            raise InputError(f"model {folder}: {WEIGHTS} has SHA-256 {found[:16]}..., its spec says {spec.weights_sha256[:16]}...")
        return cls.build(spec, safetensors.torch.load(data), device)

    def probabilities(self, volume: Volume) -> Volume:
        """Class probabilities (classes, I, J, K) float32 of a segmentation, on the input's own grid.

        Raises :class:`Refused` with CHANNELS for another number of channels than the model was trained with.
        """
        if self.spec.task != "segmentation":
            raise ValueError(f"model {self.spec.name} is a {self.spec.task}; probabilities() is for segmentation, use predict()")
        return self.segment(volume, keep=True).probabilities

    def segment(self, volume: Volume | list[Volume], keep: bool = False) -> Segmentation:
        """The label map of a volume; ``keep`` holds its probabilities too.

        Without them what is held beside the labels is the image on the preprocessed grid (with its stored type unless it is
        resampled) and the sums of a block of windows: :meth:`inference.Windows.held`. A volume in a list is taken out of it, so
        that it need not be held by who calls. Raises what :meth:`probabilities` does.
        """
        given = volume if isinstance(volume, list) else [volume]
        del volume
        image = blank(given[0])
        ready = self.placed(given)
        windows = self.windows(ready.spatial_shape)
        scales = intensity.scales(ready.array, self.spec.preprocess.intensity)

        def read(start: int, stop: int) -> np.ndarray:
            return intensity.scaled(ready.array[windows.across(start, stop)], scales)

        planes = inference.finished_planes(self.network, read, windows, self.device)
        return self.labelled(planes, geometry.grid_of(ready), image, keep)

    def placed(self, given: list[Volume]) -> Volume:
        """The preprocessed image before its intensities are scaled; the one volume in ``given`` is taken out of it."""
        ready = preprocess.place(given.pop(), self.spec.preprocess)
        self._check_channels(ready)
        return ready

    def windows(self, shape: tuple[int, int, int]) -> inference.Windows:
        """The windows over a preprocessed image of ``shape`` (I, J, K)."""
        score = self.spec.score
        return inference.Windows(shape, self.spec.window, score.overlap, score.blending, score.window_batch)

    def labelled(self, planes: Iterable[tuple[int, np.ndarray]], grid: Placed, image: Volume, keep: bool = False) -> Segmentation:
        """The label map from probabilities on the preprocessed ``grid`` as they come: see :func:`inference.averaged`.

        ``image`` is what was preprocessed, or :func:`blank` of it.
        """
        shape, classes = image.spatial_shape, len(self.spec.classes)
        labels = np.zeros((1, *shape), np.uint8 if classes <= 256 else np.uint16)
        kept = np.empty((classes, *shape), np.float32) if keep else None
        voxels, sums = np.zeros(classes, np.int64), np.zeros(classes)
        axis = self.windows(grid.spatial_shape).axis
        for index, scores in preprocess.planes_to_input_grid(planes, axis, grid, image):
            found = postprocess.as_labels(image.with_array(scores)).array
            labels[index] = found
            voxels += np.bincount(found.ravel(), minlength=classes)
            sums += [scores[c][found[0] == c].sum(dtype=np.float64) for c in range(classes)]
            if kept is not None:
                kept[index] = scores
        means = [float(s / n) if n else None for s, n in zip(sums, voxels, strict=True)]
        probabilities = None if kept is None else image.with_array(kept)
        return Segmentation(image.with_array(labels), voxels.tolist(), means, probabilities)

    def predict(self, volume: Volume) -> Volume | ClassProbabilities:
        """A label volume (1, I, J, K) uint8 on the input's own grid, or the probability of each class.

        A classifier that sees less than the whole preprocessed image gives the mean over a grid of its windows. Raises
        :class:`Refused` with CHANNELS for another number of channels than the model was trained with.
        """
        if self.spec.task == "segmentation":
            return self.segment(volume).labels
        ready = preprocess.apply(volume, self.spec.preprocess)
        self._check_channels(ready)
        windows = patches.grid(ready.spatial_shape, self.spec.window, overlap=0.0)
        batch = np.stack([patches.extract(ready.array, w) for w in windows])
        mean = inference.class_scores(self.network, batch, self.spec.score.window_batch, self.device).mean(0, dtype=np.float64)
        return ClassProbabilities(zip(self.spec.classes, (float(p) for p in mean), strict=True))

    def predict_patches(self, batch: np.ndarray) -> np.ndarray:
        """Probabilities (B, classes, ...) float32 of patches (B, C, I, J, K) that are preprocessed already."""
        if batch.ndim != 5 or batch.shape[1] != self.spec.in_channels:
            raise ValueError(f"model {self.spec.name} takes (B, {self.spec.in_channels}, I, J, K); got {batch.shape}")
        if self.spec.task == "classification":
            return inference.class_scores(self.network, batch, self.spec.score.window_batch, self.device)
        score = self.spec.score
        return np.stack(
            [
                inference.scores(self.network, x, self.spec.window, score.overlap, score.blending, score.window_batch, self.device)
                for x in batch
            ]
        )

    def _check_channels(self, ready: Volume):
        if ready.array.shape[0] != self.spec.in_channels:
            raise Refused("CHANNELS", f"image has {ready.array.shape[0]} channels, the model takes {self.spec.in_channels}")


class _PyFunc:
    """What plain ``mlflow.pyfunc`` calls: a frame of URIs, or an array of preprocessed patches."""

    def __init__(self, model: Model):
        self.model = model

    def predict(self, model_input: Any, params: dict | None = None):
        """Of a DataFrame with column ``uri``: one row per image with ``uri`` and, per class, its probability or volume in ml.
        Of an array (B, C, I, J, K): probabilities (B, classes, ...)."""
        if isinstance(model_input, np.ndarray):
            return self.model.predict_patches(model_input)
        if "uri" not in getattr(model_input, "columns", ()):
            raise InputError("the model takes a DataFrame with a column uri, or an array (B, C, I, J, K) of preprocessed patches")
        import pandas as pd

        return pd.DataFrame([self._row(uri) for uri in model_input["uri"]], index=model_input.index)

    def _row(self, uri: str) -> dict[str, Any]:
        from sparkmed import formats  # files are a face of this class only

        volumes, rejections = formats.read_archive(uri)
        volumes = [v for v in volumes if v.modality not in ("SEG", "RTSTRUCT")]
        if len(volumes) != 1:
            reasons = "; ".join(f"{r.reason}: {r.message}" for r in rejections[:3])
            raise InputError(f"{uri}: holds {len(volumes)} volumes, wanted 1" + (f" ({reasons})" if reasons else ""))
        prediction = self.model.predict(volumes[0])
        if isinstance(prediction, dict):
            return {"uri": uri, "label": prediction.label, **{f"probability_{c}": p for c, p in prediction.items()}}
        return {"uri": uri, **{f"ml_{c}": v for c, v in volumes_ml(prediction, self.model.spec.classes).items()}}


def blank(image: Volume) -> Volume:
    """The image without its voxels: one 0 everywhere, which takes no memory."""
    return image.with_array(np.broadcast_to(np.uint8(0), (1, *image.spatial_shape)))


def volumes_ml(labels: Volume, classes: Iterable[str]) -> dict[str, float]:
    """Volume in ml of each foreground class of a label volume."""
    names = list(classes)
    counts = np.bincount(labels.array.reshape(-1), minlength=len(names))
    return {name: float(counts[i] * labels.voxel_ml) for i, name in enumerate(names) if i > 0}


def _load_pyfunc(path: str) -> _PyFunc:
    """Entry point that ``mlflow.pyfunc`` finds by ``loader_module="sparkmed.learning.model"``."""
    return _PyFunc(Model.load(path))
