"""A trained model as a value: weights, and a spec that pins everything needed to use them; and several of them as one.

A model is a folder: ``spec.json`` and ``weights.safetensors``; the second of a cascade has the first below ``first/``, an ensemble
has its members below ``members/`` and no weights. A digest of a model is the SHA-256 of its ``spec.json``, which names that of
the weights and the digests of the models below.
"""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import safetensors.torch
import torch
from pydantic import Field
from torch import nn

from sparkmed import storage
from sparkmed.cache import FileCache, version
from sparkmed.config import Cells, Component, Preprocess, Score, Section
from sparkmed.imaging import geometry, intensity, patches, postprocess, preprocess
from sparkmed.imaging.geometry import Grid, Placed
from sparkmed.imaging.volume import Volume
from sparkmed.learning import inference, metrics, networks
from sparkmed.rejection import InputError, Refused

if TYPE_CHECKING:
    import pandas as pd

WEIGHTS, SPEC, FIRST, MEMBERS = "weights.safetensors", "spec.json", "first", "members"


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
    cells: Cells | None = None
    """Of a classifier of single cells how they are found in a field, and cut out; None: it sees whole images."""
    score: Score = Score()
    dataset: DatasetReference = DatasetReference()
    code_version: str = ""
    seed: int = 0
    weights_sha256: str = ""
    """SHA-256 of the weights file; set when the model is saved."""

    def windows(self, shape: tuple[int, int, int]) -> inference.Windows:
        """The windows over a preprocessed image of ``shape`` (I, J, K)."""
        return inference.Windows(shape, self.window, self.score.overlap, self.score.blending, self.score.window_batch)


class Member(Section):
    """A model of an ensemble."""

    name: str
    """Where it came from, such as ``models:/liver/3``."""
    digest: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class EnsembleSpec(Section):
    """What an ensemble is: models of the same classes."""

    format_version: Literal[1] = 1
    name: str
    task: Literal["segmentation", "classification"]
    classes: tuple[str, ...]
    score: Score = Score()
    """How their mean is postprocessed; all else is as each member's own."""
    members: tuple[Member, ...]
    """In the order of their digests, in which their probabilities are added."""


Pieces = Iterator[tuple[tuple[slice, ...], np.ndarray]]
"""Index into (C, I, J, K) on the input's own grid, and the probabilities (classes, ...) there; together all voxels, each once."""


class ClassProbabilities(dict[str, float]):
    """Probability by class name, in class order; ``label`` is the likeliest class."""

    @property
    def label(self) -> str:
        return max(self, key=self.__getitem__)

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        return np.array(list(self.values()), dtype or np.float32)


@dataclass(frozen=True, eq=False)
class CellProbabilities:
    """What a classifier of single cells says of a field, a cell each: its id, its centre along I and J in pixels of the field as it
    is stored, (N, classes) float32 ``probabilities``, and (N, F) float32 ``features`` where they were asked for. N is at least 1.
    """

    cells: tuple[str, ...]
    x: tuple[float, ...]
    y: tuple[float, ...]
    probabilities: np.ndarray
    features: np.ndarray | None = None

    @property
    def of_field(self) -> np.ndarray:
        """(classes,) float64: the mean over the cells."""
        return self.probabilities.mean(0, dtype=np.float64)

    @property
    def profile(self) -> np.ndarray:
        """(F,) float32: the median over the cells of each feature, as profiles are aggregated (Caicedo et al. 2017, Nat Methods
        14:849)."""
        return np.median(self.features, axis=0)


@dataclass(frozen=True, eq=False)
class Segmentation:
    """``labels`` (1, I, J, K) on the input's own grid, cleaned, and per class its ``voxels`` there.

    ``means`` are per class the mean of its probability over the voxels where it was predicted and that cleaning left to it (None:
    there is none). ``probabilities`` (classes, I, J, K) where they were asked for. ``reliability``, where the truth is known, is
    :func:`metrics.reliability` of what the model decided, before cleaning, over the voxels where that or the truth is foreground:
    the background, easy and large, would hide what they are like.
    """

    labels: Volume
    voxels: list[int]
    means: list[float | None]
    probabilities: Volume | None = None
    reliability: list[float] | None = None


class Model:
    """A network and its spec. Same volume, same weights, same device: same prediction."""

    def __init__(self, spec: ModelSpec, network: nn.Module, device: str | torch.device = "cpu", first: "Model | None" = None):
        """``first`` is the first model of a cascade, on the same device; without it the second takes patches only."""
        self.spec = spec
        self.device = _device(device)
        self.network = network.to(self.device).eval()
        self.first = first

    @classmethod
    def build(
        cls,
        spec: ModelSpec,
        weights: dict[str, torch.Tensor],
        device: str | torch.device = "cpu",
        imports: Iterable[str] = (),
        first: "Model | None" = None,
    ) -> "Model":
        """The model of ``spec`` with ``weights`` by layer name; :class:`InputError` when they are of another network, or when the
        network is neither MONAI's nor below one of ``imports``."""
        network = networks.build(spec.network, spec.in_channels, len(spec.classes), spec.spatial_dims, imports)
        try:
            network.load_state_dict(weights)
        except RuntimeError as e:
            raise InputError(f"weights do not fit network {spec.network.name}: {' '.join(str(e).split())[:400]}") from None
        return cls(spec, network, device, first)

    def save(self, folder: str) -> None:
        """Write ``weights.safetensors`` and ``spec.json`` to a folder or URL; no pickle. The spec comes last.

        The weights say which spec they were saved with. The first model of a cascade must be in ``first/`` by then: :func:`copy`.
        """
        cascade = self.spec.preprocess.cascade
        if cascade is not None:
            read_spec(storage.join(folder, FIRST), cascade.digest)
        plain = self.spec.model_dump(mode="json", exclude={"weights_sha256"})
        tensors = {k: v.detach().cpu().contiguous() for k, v in self.network.state_dict().items()}
        data = safetensors.torch.save(tensors, {SPEC: json.dumps(plain, sort_keys=True)})
        self.spec = self.spec.model_copy(update={"weights_sha256": hashlib.sha256(data).hexdigest()})
        storage.write_bytes(storage.join(folder, WEIGHTS), data)
        storage.write_bytes(storage.join(folder, SPEC), (self.spec.model_dump_json(indent=2) + "\n").encode())

    @classmethod
    def load(cls, folder: str, device: str | torch.device = "cpu", imports: Iterable[str] = (), digest: str = "") -> "Model":
        """The model in a folder or URL, of ``digest`` if that is given; nothing is unpickled.

        Raises :class:`InputError` when it is not one; when spec, weights and the models below it do not belong together, digest by
        digest; when the weights were saved with another class list, preprocessing or anything else of the spec, or fit another
        network; and when the network is neither MONAI's nor below one of ``imports``.
        """
        spec = read_spec(folder, digest)
        if isinstance(spec, EnsembleSpec):
            members = [cls.load(_member(folder, m.digest), device, imports, m.digest) for m in spec.members]
            _require_alike(spec, members)
            return Ensemble(spec, members)
        cascade, first = spec.preprocess.cascade, None
        if cascade is not None:
            first = cls.load(storage.join(folder, FIRST), device, imports, cascade.digest)
            if (first.spec.task, first.spec.classes[1:]) != ("segmentation", cascade.classes):
                raise InputError(
                    f"model {folder}: wants a first model of {list(cascade.classes)}, has {list(first.spec.classes[1:])}"
                )
        data = _weights(folder, spec)
        try:
            weights = safetensors.torch.load(data)
        except safetensors.SafetensorError as e:
            raise InputError(f"model {folder}: {WEIGHTS} is not safetensors: {e}") from None
        return cls.build(spec, weights, device, imports, first)

    def with_settings(self, settings: Score) -> "Model":
        """The same, scored as ``settings`` say, and as it was validated where they say nothing; a first model stays as it is."""
        return Model(self.spec.model_copy(update={"score": settings.over(self.spec.score)}), self.network, self.device, self.first)

    def probabilities(self, volume: Volume) -> Volume:
        """Class probabilities (classes, I, J, K) float32 of a segmentation, on the input's own grid, before any postprocessing.

        Raises :class:`Refused` with CHANNELS for another number of channels than the model was trained with.
        """
        if self.spec.task != "segmentation":
            raise ValueError(f"model {self.spec.name} is a {self.spec.task}; probabilities() is for segmentation, use predict()")
        image, pieces = self.pieces([volume])
        out = np.empty((len(self.spec.classes), *image.spatial_shape), np.float32)
        for index, scores in pieces:
            out[index] = scores
        return image.with_array(out)

    def segment(self, volume: Volume | list[Volume], keep: bool = False, truth: np.ndarray | None = None) -> Segmentation:
        """The label map of a volume, cleaned as the settings say; ``keep`` holds its probabilities too. ``truth`` (1, I, J, K) is
        what it ought to be.

        Without them what is held beside the labels is the image on the preprocessed grid (with its stored type unless it is
        resampled), the sums of a block of windows and what the block before left to it (float32, per class, as many planes as a
        window and the overlap have along the image's longest axis), and one probability per voxel where components are cleaned.
        An ensemble holds all probabilities. A volume in a list is taken out of it, so that who calls need not hold it. Raises what
        :meth:`probabilities` does.
        """
        image, pieces = self.pieces(volume if isinstance(volume, list) else [volume])
        return self.labelled(pieces, image, keep, truth)

    def pieces(self, given: list[Volume]) -> tuple[Volume, Pieces]:
        """The volume without its voxels, and its probabilities some planes at a time; it is taken out of ``given``."""
        image = blank(given[0])
        grid, read = self.reader(given)
        windows = self.spec.windows(grid.spatial_shape)
        planes = inference.finished_planes(self.predictor, read, windows, self.device)
        return image, preprocess.planes_to_input_grid(planes, windows.axis, grid, image)

    def reader(self, given: list[Volume]) -> tuple[Grid, Callable[[int, int], np.ndarray]]:
        """The preprocessed grid, and (C, I, J, K) float32 of planes of the preprocessed image along ``windows(shape).axis``.

        The one volume in ``given`` is taken out of it. Raises :class:`Refused` as :func:`preprocess.apply` does.
        """
        guidance, cascade = self._guidance(given[0]), self.spec.preprocess.cascade
        ready = preprocess.place(given.pop(), self.spec.preprocess)
        self._check_channels(len(ready.array))
        scales = intensity.scales(ready.array, self.spec.preprocess.intensity)
        windows = self.spec.windows(ready.spatial_shape)

        def read(start: int, stop: int) -> np.ndarray:
            index = windows.across(start, stop)
            image = intensity.scaled(ready.array[index], scales)
            return image if cascade is None else np.concatenate([image, preprocess.as_channels(guidance[index], cascade)])

        return geometry.grid_of(ready), read

    @property
    def predictor(self) -> inference.Predictor:
        return inference.predictor(self.network, self.spec.score.mirrors or ())

    def labelled(self, pieces: Pieces, image: Volume, keep: bool = False, truth: np.ndarray | None = None) -> Segmentation:
        """The label map of ``image``, whose voxels do not count, from its probabilities as they come."""
        shape, classes, cleaning = image.spatial_shape, len(self.spec.classes), self.spec.score.cleaning
        limits = postprocess.thresholds(self.spec.classes, cleaning)
        changing = any(c.minimum_ml or c.components or c.fill_holes for c in cleaning.values())
        array = np.zeros((1, *shape), np.uint8 if classes <= 256 else np.uint16)
        chosen = np.empty((1, *shape), np.float32) if changing else None
        kept = np.empty((classes, *shape), np.float32) if keep else None
        counts, sums, diagram = np.zeros(classes, np.int64), np.zeros(classes), np.zeros(3 * metrics.RELIABILITY_BINS)

        def count(found: np.ndarray, probability: np.ndarray):
            counts[:] += np.bincount(found, minlength=classes)
            sums[:] += np.bincount(found, probability, classes)

        for index, scores in pieces:
            found = postprocess.as_labels(image.with_array(scores), limits).array
            probability = np.take_along_axis(scores, found.astype(np.intp), 0)
            array[index] = found
            if truth is not None:
                where = (found > 0) | (truth[index] > 0)
                diagram += metrics.reliability(probability[where], found[where] == truth[index][where])
            if chosen is None:
                count(found.ravel(), probability.ravel())
            else:
                chosen[index] = probability
            if kept is not None:
                kept[index] = scores
        voxels = counts
        if chosen is not None:
            before = array.copy()
            postprocess.clean(image.with_array(array), self.spec.classes, cleaning)
            voxels = np.zeros(classes, np.int64)
            for plane, old, probability in zip(array[0], before[0], chosen[0], strict=True):
                voxels += np.bincount(plane.ravel(), minlength=classes)
                count(plane[plane == old], probability[plane == old])
        means = [float(s / n) if n else None for s, n in zip(sums, counts, strict=True)]
        probabilities = None if kept is None else image.with_array(kept)
        reliability = None if truth is None else diagram.tolist()
        return Segmentation(image.with_array(array), voxels.tolist(), means, probabilities, reliability)

    def labels(self, probabilities: Volume) -> Volume:
        """The label map (1, I, J, K) uint8 of :meth:`probabilities`, cleaned as the settings say: in validation and in scoring."""
        return postprocess.labels(probabilities, self.spec.classes, self.spec.score.cleaning)

    def predict(self, volume: Volume, centres: "pd.DataFrame | None" = None) -> Volume | ClassProbabilities:
        """A label volume (1, I, J, K) uint8 on the input's own grid, or the probability of each class.

        A classifier that sees less than the whole preprocessed image gives the mean over a grid of its windows, one of single cells
        the mean over :meth:`cells`; if it was trained on those of a table (:attr:`listed`) ``centres`` are wanted, with columns
        ``cell``, ``x`` and ``y``. Raises :class:`Refused` with CHANNELS for another number of channels than the model was trained
        with, and as :meth:`cells` does.
        """
        if self.spec.task == "segmentation":
            return self.segment(volume).labels
        return self.named(self._of_image(volume, centres))

    def named(self, found: np.ndarray) -> ClassProbabilities:
        """(classes,) probabilities by the names of the classes; raises :class:`Refused` ``NOT_FINITE``."""
        if not np.isfinite(found).all():
            raise Refused("NOT_FINITE", "the probabilities of the image are not numbers")
        return ClassProbabilities(zip(self.spec.classes, (float(p) for p in found), strict=True))

    def embed(self, volume: Volume, centres: "pd.DataFrame | None" = None) -> tuple[ClassProbabilities, np.ndarray]:
        """:meth:`predict` of a classifier, and the (F,) float32 features from which its last layer made the scores: their mean over
        windows and mirrors, of single cells their median over the cells. These are the profiles of learnt screening (Caicedo et al.
        2018, CVPR; Moshkov et al. 2024).

        Raises :class:`InputError` for a segmentation and for a network without a last linear layer.
        """
        if self.spec.task != "classification":
            raise InputError(f"model {self.spec.name} is a segmentation: features are those of a classifier")
        if self.spec.cells is not None:
            found = self.cells(volume, centres, features=True)
            return self.named(found.of_field), found.profile
        with self._seen() as seen:
            probabilities = self.predict(volume)
        return probabilities, torch.cat(seen).mean(0).numpy()

    def cells(self, volume: Volume, centres: "pd.DataFrame | None" = None, features: bool = False) -> CellProbabilities:
        """What a classifier of single cells says of each cell of a field, with the ``features`` from which its last layer made the
        scores (their mean over mirrors) where they are wanted.

        Crops are cut as in training, and no more of them are held than go through the network at once. Raises :class:`Refused`
        ``NO_CELLS`` for a field without any, ``CENTRE_OUTSIDE``, and as :meth:`predict`; :class:`InputError` for a model that sees
        whole images, and for ``centres`` that are wanted and not given, or the other way round.
        """
        if self.spec.cells is None:
            raise InputError(f"model {self.spec.name} sees whole images, not single cells")
        from sparkmed.hcs import crops  # pandas and scikit-image are for those who need them

        there = crops.located(volume, self.spec.cells, centres)
        image, batch, probabilities, profiles = self._preprocessed(volume).array, self.spec.score.window_batch, [], []
        with self._seen() if features else contextlib.nullcontext([]) as seen:
            for start in range(0, len(there), batch):
                cut = np.stack([patches.extract(image, place) for *_, place in there[start : start + batch]])
                probabilities.append(self._class_scores(cut))
                if features:
                    profiles.append(torch.stack(seen).mean(0).numpy())
                    seen.clear()
        names, x, y, _ = zip(*there, strict=True)
        return CellProbabilities(names, x, y, np.concatenate(probabilities), np.concatenate(profiles) if features else None)

    @property
    def listed(self) -> bool:
        """Whether it classifies single cells that a table lists: ``centres`` are wanted to predict."""
        return self.spec.cells is not None and self.spec.cells.listed

    @contextlib.contextmanager
    def _seen(self) -> Iterator[list[torch.Tensor]]:
        """What the last layer sees of each batch, as long as this lasts: (B, F) float32, one per mirror."""
        layer, seen = networks.last_linear(self.network, len(self.spec.classes), self.spec.network.name), []
        hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].detach().float().cpu()))
        try:
            yield seen
        finally:
            hook.remove()

    def guide(self, volume: Volume, output: Literal["labels", "probabilities"]) -> Volume:
        """What the second model of a cascade gets from this one, on the input's own grid: the label map (1, I, J, K) as
        :meth:`predict` gives it, or the probabilities of the foreground classes (classes - 1, I, J, K)."""
        if output == "labels":
            return self.predict(volume)
        probabilities = self.probabilities(volume)
        return probabilities.with_array(probabilities.array[1:])

    def predict_patches(self, batch: np.ndarray) -> np.ndarray:
        """Probabilities (B, classes, ...) float32 of patches (B, C, I, J, K) that are preprocessed already, with the channels of a
        first model if there is one."""
        if batch.ndim != 5 or batch.shape[1] != self.spec.in_channels:
            raise ValueError(f"model {self.spec.name} takes (B, {self.spec.in_channels}, I, J, K); got {batch.shape}")
        return self._class_scores(batch) if self.spec.task == "classification" else np.stack([self._scores(x) for x in batch])

    def _of_image(self, volume: Volume, centres: "pd.DataFrame | None" = None) -> np.ndarray:
        """(classes,) float64 of a classifier."""
        if self.spec.cells is not None:
            return self.cells(volume, centres).of_field
        ready = self._preprocessed(volume)
        windows = patches.grid(ready.spatial_shape, self.spec.window, overlap=0.0)
        return self._class_scores(np.stack([patches.extract(ready.array, w) for w in windows])).mean(0, dtype=np.float64)

    def _scores(self, array: np.ndarray) -> np.ndarray:
        how = self.spec.score
        return inference.scores(
            self.network, array, self.spec.window, how.overlap, how.blending, how.window_batch, self.device, how.mirrors or ()
        )

    def _class_scores(self, batch: np.ndarray) -> np.ndarray:
        how = self.spec.score
        return inference.class_scores(self.network, batch, how.window_batch, self.device, how.mirrors or ())

    def _preprocessed(self, volume: Volume) -> Volume:
        ready = preprocess.apply(volume, self.spec.preprocess, first=self._first_says(volume))
        self._check_channels(len(ready.array) - self.spec.preprocess.guided)
        return ready

    def _guidance(self, volume: Volume) -> np.ndarray | None:
        first = self._first_says(volume)
        return None if first is None else preprocess.guidance(first, self.spec.preprocess)

    def _first_says(self, volume: Volume) -> Volume | None:
        cascade = self.spec.preprocess.cascade
        if cascade is None:
            return None
        if self.first is None:
            raise InputError(f"model {self.spec.name} is the second of a cascade, and its first model is not at hand")
        return self.first.guide(volume, cascade.output)

    def _check_channels(self, found: int) -> None:
        wanted = self.spec.in_channels - self.spec.preprocess.guided
        if found != wanted:
            raise Refused("CHANNELS", f"image has {found} channels, the model takes {wanted}")


class Ensemble(Model):
    """Models of the same classes whose probabilities are averaged; each preprocesses for itself.

    All their weights are held, but the windows and probabilities of one member at a time, beside the sum.
    """

    def __init__(self, spec: EnsembleSpec, members: list[Model]):
        self.spec, self.members, self.device = spec, members, members[0].device

    def save(self, folder: str) -> None:
        raise ValueError("an ensemble is gathered from the folders of its members: gather()")

    def with_settings(self, settings: Score) -> "Ensemble":
        spec = self.spec.model_copy(update={"score": settings.over(self.spec.score)})
        return Ensemble(spec, [m.with_settings(settings) for m in self.members])

    def probabilities(self, volume: Volume) -> Volume:
        return volume.with_array(self._mean(m.probabilities(volume).array for m in self.members))

    def pieces(self, given: list[Volume]) -> tuple[Volume, Pieces]:
        """In one piece: members may preprocess in different ways, so their planes do not come in one order."""
        volume = given.pop()
        return blank(volume), iter([((slice(None),) * 4, self.probabilities(volume).array)])

    def predict_patches(self, batch: np.ndarray) -> np.ndarray:
        if len({(m.spec.preprocess.model_dump_json(), m.spec.in_channels) for m in self.members}) > 1:
            raise ValueError(
                f"ensemble {self.spec.name}: its members preprocess in different ways, so none takes the others' patches"
            )
        return self._mean(m.predict_patches(batch) for m in self.members)

    def embed(self, volume: Volume, centres: "pd.DataFrame | None" = None) -> tuple[ClassProbabilities, np.ndarray]:
        raise InputError(f"ensemble {self.spec.name}: each of its members has features of its own; take one model")

    def cells(self, volume: Volume, centres: "pd.DataFrame | None" = None, features: bool = False) -> CellProbabilities:
        raise InputError(f"ensemble {self.spec.name}: each of its members has cells of its own; take one model")

    @property
    def listed(self) -> bool:
        return any(m.listed for m in self.members)

    def _of_image(self, volume: Volume, centres: "pd.DataFrame | None" = None) -> np.ndarray:
        return self._mean(m._of_image(volume, centres if m.listed else None) for m in self.members)

    def _mean(self, arrays: Iterable[np.ndarray]) -> np.ndarray:
        total = None
        for array in arrays:
            total = array if total is None else np.add(total, array, out=total)
            del array  # the next member is at work before another is bound to the name
        return np.divide(total, len(self.members), out=total)


def read_spec(folder: str, digest: str = "") -> ModelSpec | EnsembleSpec:
    """The spec in a model folder or URL; :class:`InputError` when there is none, or not the one of ``digest``, if that is given."""
    return _read_spec(folder, digest)[0]


def specs(folder: str) -> list[ModelSpec]:
    """Of all networks that a model folder or URL scores with: its own and a first one's, or those of an ensemble."""
    spec = read_spec(folder)
    if isinstance(spec, EnsembleSpec):
        return [s for m in spec.members for s in specs(_member(folder, m.digest))]
    return [spec] if spec.preprocess.cascade is None else [spec, *specs(storage.join(folder, FIRST))]


def model_digest(folder: str) -> str:
    """SHA-256 of the spec in a model folder or URL: see the head of this module."""
    return hashlib.sha256(storage.read_bytes(storage.join(folder, SPEC))).hexdigest()


def copy(source: str, target: str, digest: str = "") -> None:
    """Copy a model from folder or URL to folder or URL with all below it, byte for byte; what comes last says that all is there.

    Raises :class:`InputError` when it is not whole, or not the one of ``digest``, if that is given.
    """
    spec, data = _read_spec(source, digest)
    if isinstance(spec, EnsembleSpec):
        for member in spec.members:
            copy(_member(source, member.digest), _member(target, member.digest), member.digest)
    else:
        if spec.preprocess.cascade is not None:
            copy(storage.join(source, FIRST), storage.join(target, FIRST), spec.preprocess.cascade.digest)
        storage.write_bytes(storage.join(target, WEIGHTS), _weights(source, spec))
    storage.write_bytes(storage.join(target, SPEC), data)


def ensemble(name: str, members: Mapping[str, str], settings: Score) -> tuple[EnsembleSpec, str]:
    """The spec of the mean of models, given by what they are called and where they are, and its digest.

    A model that is given twice counts once. Postprocessing is that of ``settings``, or the members' own. Raises :class:`InputError`
    when their classes differ, or their own postprocessing where ``settings`` say nothing.
    """
    specs = {label: read_spec(folder) for label, folder in members.items()}
    (first, one), *_ = specs.items()
    for label, spec in specs.items():
        if isinstance(spec, EnsembleSpec):
            raise InputError(f"{label} is an ensemble itself: name its members instead")
        if (spec.task, spec.classes) != (one.task, one.classes):
            raise InputError(
                f"an ensemble wants models of the same classes: {first} predicts {list(one.classes)} ({one.task}), {label} "
                f"{list(spec.classes)} ({spec.task})"
            )
        if settings.postprocess is None and spec.score.cleaning != one.score.cleaning:
            raise InputError(f"{first} and {label} postprocess in different ways: say in score.postprocess how their mean is")
    found = {model_digest(folder): label for label, folder in members.items()}
    spec = EnsembleSpec(
        name=name, task=one.task, classes=one.classes, score=Score(postprocess=settings.over(one.score).postprocess),
        members=tuple(Member(name=label, digest=digest) for digest, label in sorted(found.items())),
    )  # fmt: skip
    return spec, hashlib.sha256(_spelt(spec)).hexdigest()


def gather(spec: EnsembleSpec, members: Mapping[str, str], target: str) -> None:
    """Write an ensemble to a folder or URL: copies of its members, which ``members`` has by name, and the spec."""
    for member in spec.members:
        copy(members[member.name], _member(target, member.digest), member.digest)
    storage.write_bytes(storage.join(target, SPEC), _spelt(spec))


def _spelt(spec: EnsembleSpec) -> bytes:
    return (spec.model_dump_json(indent=2) + "\n").encode()


def _member(folder: str, digest: str) -> str:
    return storage.join(folder, MEMBERS, digest[:16])


def _require_alike(spec: EnsembleSpec, members: list[Model]) -> None:
    for member, model in zip(spec.members, members, strict=True):
        if (model.spec.task, model.spec.classes) != (spec.task, spec.classes):
            raise InputError(
                f"ensemble {spec.name}: {member.name} predicts {list(model.spec.classes)}, wanted {list(spec.classes)}"
            )


def _device(wanted: str | torch.device) -> torch.device:
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted)


def _read_spec(folder: str, digest: str) -> tuple[ModelSpec | EnsembleSpec, bytes]:
    try:
        data = storage.read_bytes(storage.join(folder, SPEC))
        plain = json.loads(data)
        kind = EnsembleSpec if isinstance(plain, dict) and "members" in plain else ModelSpec
        spec = kind.model_validate(plain)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"model {folder}: no {SPEC}") from None
    except ValueError as e:
        raise InputError(f"model {folder}: {SPEC} is not a model spec: {' '.join(str(e).split())[:300]}") from None
    cascade = None if isinstance(spec, EnsembleSpec) else spec.preprocess.cascade
    if cascade is not None and not cascade.digest:
        raise InputError(f"model {folder}: {SPEC} names no digest of its first model")
    found = hashlib.sha256(data).hexdigest()
    if digest and found != digest:
        raise InputError(
            f"model {folder} is not the one that was asked for: {SPEC} has SHA-256 {found[:16]}..., not {digest[:16]}..."
        )
    return spec, data


def _weights(folder: str, spec: ModelSpec) -> bytes:
    """The bytes of the weights; :class:`InputError` unless they are those of the spec, and were saved with it."""
    try:
        data = _cached(storage.join(folder, WEIGHTS))
    except FileNotFoundError:
        raise InputError(f"model {folder}: no {WEIGHTS}") from None
    found = hashlib.sha256(data).hexdigest()
    if found != spec.weights_sha256:
        raise InputError(f"model {folder}: {WEIGHTS} has SHA-256 {found[:16]}..., its spec says {spec.weights_sha256[:16]}...")
    plain, recorded = spec.model_dump(mode="json"), _recorded(data)
    other = [k for k in plain if k != "weights_sha256" and recorded and k in recorded and recorded[k] != plain[k]]
    if other:
        raise InputError(f"model {folder}: {SPEC} says another {', '.join(other)} than the weights were saved with")
    return data


def _cached(url: str) -> bytes:
    """The bytes of a file; of a remote one by a copy on this machine, which all its processes share and check."""
    if storage.local_path(url) is not None:
        return storage.read_bytes(url)
    fs, path = storage.filesystem(url)
    with FileCache().open(url, fs.info(path)["size"], version(url)) as file:
        return bytes(file.read())


def _recorded(data: bytes) -> dict:
    """The spec that weights were saved with, empty of weights that do not say: metadata in the header of safetensors."""
    try:
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        recorded = json.loads(header["__metadata__"][SPEC])
        return ModelSpec.model_validate(recorded).model_dump(mode="json")
    except (ValueError, KeyError, TypeError):
        return {}


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


def blank(image: Placed, **facts) -> Volume:
    """A volume on the grid of ``image`` without its voxels: one 0 everywhere, which takes no memory. ``facts`` are other fields."""
    nothing = np.broadcast_to(np.uint8(0), (1, *image.spatial_shape))
    return image.with_array(nothing) if isinstance(image, Volume) else Volume(nothing, image.affine, **facts)


def volumes_ml(labels: Volume, classes: Iterable[str]) -> dict[str, float]:
    """Volume in ml of each foreground class of a label volume."""
    names = list(classes)
    counts = np.bincount(labels.array.reshape(-1), minlength=len(names))
    return {name: float(counts[i] * labels.voxel_ml) for i, name in enumerate(names) if i > 0}


def _load_pyfunc(path: str, model_config: dict[str, Any] | None = None) -> _PyFunc:
    """Entry point that ``mlflow.pyfunc`` finds by ``loader_module="sparkmed.learning.model"``.

    ``mlflow.pyfunc.load_model(uri, model_config={"imports": ["mylab.nets"]})`` allows networks that are not MONAI's. MLflow takes
    the loader, and what ``model_config`` is without that, from the artifact itself: who may write artifacts may run code where
    ``pyfunc`` loads them. :func:`sparkmed.load_model` takes nothing but weights and a spec.
    """
    return _PyFunc(Model.load(path, imports=(model_config or {}).get("imports", ())))
