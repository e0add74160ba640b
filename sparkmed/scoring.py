"""What a model says about one volume, as a row and a mask, and how right it is where the truth is known."""

import contextlib
import datetime
import io
import math
import time
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sparkmed import dataset, storage
from sparkmed.config import Segment, digest
from sparkmed.formats import dicom, dicom_seg, nifti
from sparkmed.formats.instance import VolumeHeader
from sparkmed.imaging import intensity, patches, preprocess
from sparkmed.imaging.geometry import Grid
from sparkmed.imaging.volume import Volume
from sparkmed.learning import inference, metrics
from sparkmed.learning.model import CellProbabilities, ClassProbabilities, EnsembleSpec, Model, ModelSpec, Segmentation, blank
from sparkmed.reasons import PASSING
from sparkmed.rejection import Refused

FAILED, WORKER_LOST = "FAILED", "WORKER_LOST"


class Unwritten(Exception):
    """A file of the lake or of ``score.seg_folder`` cannot be written or read again, as when a disk is full: it says nothing of the
    volume."""


@contextlib.contextmanager
def _own_files():
    try:
        yield
    except OSError as e:
        raise Unwritten(f"a file of the lake or of score.seg_folder: {e.strerror or type(e).__name__}") from e


def stays(refusal: dict, attempts: int) -> bool:
    """Whether a volume is not tried again, by a quarantine row of it: it is broken, or has failed ``attempts`` times.

    A row of attempt 0 is of a prediction without its SEG: it says nothing of the volume, and the prediction may not be in yet.
    """
    if refusal["attempt"] == 0:
        return False
    return refusal["reason"] not in PASSING or refusal["attempt"] is None or refusal["attempt"] >= attempts


def key(volume: str, model_digest: str, config_digest: str) -> str:
    """Identity of a prediction: the same volume by the same model under the same settings is scored once."""
    return digest([volume, model_digest, config_digest])[:32]


@dataclass(frozen=True)
class SegFolder:
    """Where DICOM SEG of predictions go, and by which model and settings they are; outside of the lake, for they name patients."""

    url: str
    model: str
    version: str
    model_digest: str
    settings: str


def score(model: Model, row: dict, mask_url: str | None = None, segs: SegFolder | None = None) -> dict:
    """The prediction of one volume row as columns of ``predictions/``; writes the label map to ``mask_url`` and as DICOM SEG into
    ``segs`` (segmentation), as the model's score settings say. Of a model of single cells what it says of each goes to ``mask_url``
    as Parquet (:func:`cell_table`), and the row stands on all ``cells`` of the field: the mean of their probabilities, the median
    of their features.

    ``features`` are what the last layer of a classifier sees, where the settings ask for them. ``ml`` is millilitres per class;
    ``probability`` is per class the probability of the image, or the mean over the voxels where that class was predicted and stayed
    (null where there are none). ``score`` is against the row's label: Dice per class, or 1 and 0 for right and wrong;
    ``reliability`` how far its confidence can be believed. ``quantiles`` are of the image. ``seg_refused``, no column, is why a
    prediction has no SEG where one was wanted; it counts without. Raises :class:`Refused` on pixels that cannot be read or do not
    fit the network, :class:`Unwritten`.
    """
    started = time.perf_counter()
    truth = _truth(row) if model.spec.task == "segmentation" else None
    image = [dataset.read_image(row)]  # held by the list alone: it is gone when its windows are computed
    quantiles = intensity.quantiles(image[0].array)
    if model.spec.task == "segmentation":
        found: Segmentation | ClassProbabilities = model.segment(image, keeps_probabilities(model, segs), truth)
        out = written(model, row, found, mask_url, segs, truth)
    elif not isinstance(model.spec, EnsembleSpec) and model.spec.cells is not None:
        several = model.cells(image.pop(), centres(model, row), model.spec.score.features)
        out = written(model, row, model.named(several.of_field)) | {"cells": len(several.cells)}
        if model.spec.score.features:
            out["features"] = several.profile.tolist()
        if mask_url:
            with _own_files():
                _write_cells(cell_table(several, row, model.spec.classes), mask_url)
    elif model.spec.score.features:
        found, features = model.embed(image.pop())
        out = written(model, row, found) | {"features": features.tolist()}
    else:
        out = written(model, row, model.predict(image.pop(), centres(model, row)))
    return out | {"seconds": time.perf_counter() - started, "quantiles": quantiles}


def centres(model: Model, row: dict):
    """The cells that a table lists of a volume row, as :meth:`Model.predict` wants them; None unless the model does."""
    return dataset.read_centres(row) if model.listed else None


def cell_table(found: CellProbabilities, row: dict, classes: tuple[str, ...]) -> pa.Table:
    """A row per cell of a field: ``volume``, ``plate``, ``well``, ``site``, ``cell``, ``x`` and ``y`` (pixels along I and J of the
    field as it is stored), ``probability_<class>``, and ``features`` where they are kept."""
    facts, many = VolumeHeader.from_row(row).facts, len(found.cells)
    plate, well, site = (facts.get(name) for name in ("plate", "well", "site"))
    columns = {
        "volume": pa.array([row["uid"]] * many, pa.string()),
        "plate": pa.array([plate] * many, pa.string()),
        "well": pa.array([well] * many, pa.string()),
        "site": pa.array([site] * many, pa.int64()),
        "cell": pa.array(found.cells, pa.string()),
        "x": pa.array(found.x, pa.float64()),
        "y": pa.array(found.y, pa.float64()),
    }
    columns |= {f"probability_{c}": pa.array(found.probabilities[:, n].astype(np.float64)) for n, c in enumerate(classes)}
    if found.features is not None:
        columns["features"] = pa.array(list(found.features), pa.list_(pa.float32()))
    return pa.table(columns)


def keeps_probabilities(model: Model, segs: SegFolder | None) -> bool:
    """Whether the probabilities of all voxels are written."""
    return segs is not None and model.spec.score.seg_type == "FRACTIONAL"


def _truth(row: dict) -> np.ndarray | None:
    """(1, I, J, K) labels of a volume row on its image's grid; None without: a broken label is no reason to lose the prediction."""
    if not row["label"]:
        return None
    header = VolumeHeader.from_row(row)
    with contextlib.suppress(Refused):
        labels = dataset.read_label(row, Grid(header.affine, header.shape[1:])).array
        return labels.astype(np.uint8) if labels.max(initial=0) <= 255 else labels
    return None


def written(
    model: Model,
    row: dict,
    found: Segmentation | ClassProbabilities,
    mask_url: str | None = None,
    segs: SegFolder | None = None,
    truth: np.ndarray | None = None,
) -> dict:
    """Write what was found of a volume row; the columns of :func:`score` but for ``seconds`` and ``quantiles``."""
    header, classes = VolumeHeader.from_row(row), model.spec.classes
    out = {
        "volume": row["uid"],
        "subject": row["subject"],
        "split": row["split"],
        "target": row["target"],
        "device": str(model.device),
    }
    if isinstance(found, Segmentation):
        labels = found.labels
        if mask_url:
            with _own_files():
                nifti.write(labels, mask_url)
        if segs:
            try:
                with _own_files():
                    out["seg"] = _write_seg(model, labels, found.probabilities, header, segs)
            except Refused as e:
                if e.reason in PASSING:
                    raise
                out["seg_refused"] = e
        out["ml"] = [n * labels.voxel_ml for n in found.voxels]
        out["probability"] = found.means
        if truth is not None:
            out["score"], out["reliability"] = dice(labels.array[0], truth[0], len(classes)), found.reliability
    else:
        vector = np.asarray(found, np.float64)
        out["probability"] = vector.tolist()
        out["predicted"] = classes[int(vector.argmax())]
        if row["target"] is not None:
            right = vector.argmax() == row["target"]
            out["score"], out["reliability"] = [float(right)], metrics.reliability(vector.max(), right)
    return out | {"scored_at": datetime.datetime.now(datetime.UTC)}


# what a volume costs


def cost(row: dict, spec: ModelSpec, gpu: bool = False) -> float:
    """About how many nanoseconds a volume row takes to score: what tasks are packed by.

    Its windows count, after preprocessing to the model's grid, and its voxels, which are read, decoded, resampled and written; of
    single cells their crops, about as many as there are, and what it takes to find them.
    """
    voxels, network = math.prod(row["shape"]), _NETWORK_GPU_NS if gpu else _NETWORK_NS
    try:
        shape = _preprocessed_shape(row, spec)
    except Refused:  # it will be refused
        return voxels * _VOXEL_NS
    if spec.cells is not None:
        windows, finding = dataset.cell_count(row, spec.cells), 0.0 if spec.cells.listed else math.prod(shape) * _FINDING_NS
    else:
        windows, finding = len(spec.windows(shape) if spec.task == "segmentation" else patches.grid(shape, spec.window)), 0.0
    reading = voxels * (_VOXEL_NS + (_DECODING_NS if _is_compressed(row) else 0))
    return windows * math.prod(spec.window) * network + finding + reading


_NETWORK_NS, _NETWORK_GPU_NS = 2000.0, 20.0  # per voxel of a window: a UNet of MONAI
_VOXEL_NS, _DECODING_NS = 200.0, 60.0  # per voxel of the volume
_FINDING_NS = 400.0  # per pixel in which nuclei are looked for


def megabytes(row: dict, spec: ModelSpec) -> float:
    """MB of a volume row as float32, stored or preprocessed, whichever is more."""
    try:
        preprocessed = spec.in_channels * math.prod(_preprocessed_shape(row, spec))
    except Refused:
        preprocessed = 0
    return 4e-6 * max(math.prod(row["shape"]), preprocessed)


def _preprocessed_shape(row: dict, spec: ModelSpec) -> tuple[int, int, int]:
    return preprocess.output_shape(tuple(row["shape"][1:]), np.reshape(row["affine"], (4, 4)), spec.preprocess)


def _is_compressed(row: dict) -> bool:
    if row["format"] != "dicom":
        return row["format"] == "raster" or row["source_paths"][0].endswith(".gz")
    facts = VolumeHeader.from_row(row).facts
    return bool(facts.get("syntaxes") and dicom.decoder(facts["syntaxes"][0], facts["pixels"][0]))


# a volume in parts


@dataclass(frozen=True)
class Parts:
    """A volume that several tasks score: its preprocessed image, and the sums of its blocks of windows, are files below ``url``.

    Both are float32, plane by plane along the axis of the blocks. ``affine`` and ``shape`` are the preprocessed grid's.
    """

    url: str
    affine: tuple[float, ...]
    shape: tuple[int, int, int]
    seconds: float = 0.0
    quantiles: tuple[float, ...] = ()
    """Of the intensities of the volume as it is stored."""


def spread(model: Model, row: dict, url: str) -> Parts:
    """Write the preprocessed image of a volume row below ``url``; statistics of its intensities are of the whole.

    Holds the volume as it is stored, and as it is placed on the preprocessed grid (the same where nothing is resampled).
    """
    started = time.perf_counter()
    volume = [dataset.read_image(row)]
    quantiles = tuple(intensity.quantiles(volume[0].array))
    grid, read = model.reader(volume)
    axis = model.spec.windows(grid.spatial_shape).axis
    with _own_files(), storage.writing(storage.join(url, "image")) as file:
        for start in range(0, grid.spatial_shape[axis], _PLANES):
            slab = read(start, min(start + _PLANES, grid.spatial_shape[axis]))
            file.write(np.ascontiguousarray(np.moveaxis(slab, 1 + axis, 0)))
    return Parts(url, tuple(grid.affine.ravel().tolist()), grid.spatial_shape, time.perf_counter() - started, quantiles)


_PLANES = 8


def score_block(model: Model, parts: Parts, block: int) -> float:
    """Write the sums of one block of windows; how many seconds it took. Holds its planes of the image, and its sums twice."""
    started, windows = time.perf_counter(), model.spec.windows(parts.shape)
    with _own_files():
        slab = _planes(storage.join(parts.url, "image"), model.spec.in_channels, windows, *windows.planes(block))
    sums = inference.block_sums(model.predictor, slab, windows, block, model.device)
    with _own_files():
        storage.write_bytes(_block_url(parts, block), np.moveaxis(sums, 1 + windows.axis, 0).tobytes())
    return time.perf_counter() - started


def joined(model: Model, row: dict, parts: Parts, mask_url: str | None = None, segs: SegFolder | None = None) -> dict:
    """What :func:`score` gives, from parts whose blocks are all there.

    Blocks are added in their order, so it does not matter who computed which when. Holds the label map, and the sums of two blocks.
    """
    started, header, windows = time.perf_counter(), VolumeHeader.from_row(row), model.spec.windows(parts.shape)
    grid, stored = Grid(parts.affine, parts.shape), Grid(header.affine, header.shape[1:])
    classes = len(model.spec.classes)

    def sums():
        for block in range(len(windows.blocks)):
            first, last = windows.planes(block)
            with _own_files():
                found = _planes(_block_url(parts, block), classes, windows, 0, last - first).copy()
            yield found
            del found

    image = blank(stored, series_uid=header.series_uid, modality=header.modality, sources=header.sources)
    pieces = preprocess.planes_to_input_grid(inference.averaged(sums(), windows), windows.axis, grid, image)
    truth = _truth(row)
    found = model.labelled(pieces, image, keeps_probabilities(model, segs), truth)
    seconds = parts.seconds + time.perf_counter() - started
    return written(model, row, found, mask_url, segs, truth) | {"seconds": seconds, "quantiles": list(parts.quantiles)}


def _block_url(parts: Parts, block: int) -> str:
    return storage.join(parts.url, f"block-{block:05d}")


def _planes(url: str, channels: int, windows: inference.Windows, start: int, stop: int) -> np.ndarray:
    """(channels, I, J, K) float32 of planes ``start`` to ``stop`` in a file."""
    across = [n for a, n in enumerate(windows.shape) if a != windows.axis]
    size = 4 * channels * math.prod(across)
    (data,) = storage.read_ranges([(url, start * size, stop * size)])
    return np.moveaxis(np.frombuffer(data, np.float32).reshape(stop - start, channels, *across), 0, 1 + windows.axis)


# what is written


def _write_seg(model: Model, labels: Volume, probabilities: Volume | None, header: VolumeHeader, segs: SegFolder) -> str:
    """The name of the file, which is a hash; volume, model and settings make the name, the UIDs and the content."""
    settings = model.spec.score
    identity = key(header.uid, segs.model_digest, segs.settings)
    name = f"{dicom_seg.derived_uid(identity, 'instance')}.dcm"
    segments = {c: settings.segments.get(c) or Segment() for c in model.spec.classes[1:]}
    url = storage.join(segs.url, name)
    dicom_seg.write(
        labels, header, url, segments, settings.seg_type, probabilities, identity=identity, model=segs.model, version=segs.version
    )
    return name


def _write_cells(table: pa.Table, url: str):
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    storage.write_bytes(url, buffer.getvalue())


def dice(predicted: np.ndarray, truth: np.ndarray, classes: int) -> list[float | None]:
    """Dice (1945) per class of two label maps of one shape: 2 |A and B| / (|A| + |B|), null where a class is in neither.

    >>> dice(np.array([0, 1, 1]), np.array([0, 0, 1]), 3)
    [0.6666666666666666, 0.6666666666666666, None]
    """
    both, total = np.zeros(classes), np.zeros(classes)
    predicted, truth = predicted.ravel(), truth.ravel()
    for start in range(0, truth.size, _COUNTED):
        p, t = (array[start : start + _COUNTED] for array in (predicted, truth))
        both += np.bincount(t[p == t], minlength=classes)[:classes]
        total += np.bincount(p, minlength=classes)[:classes] + np.bincount(t, minlength=classes)[:classes]
    return [2 * float(b) / float(t) if t else None for b, t in zip(both, total, strict=True)]


_COUNTED = 1 << 20  # voxels at a time: to count them takes 8 bytes of each


def subject_scores(rows: list[dict]) -> dict[str, float]:
    """One number per subject from scored rows: mean over its volumes of Dice over foreground classes, or of correctness."""
    per_subject: dict[str, list[float]] = {}
    for r in rows:
        if r.get("score") is None:
            continue
        values = r["score"][1:] if len(r["score"]) > 1 else r["score"]
        values = [v for v in values if v is not None]
        if values:
            per_subject.setdefault(r["subject"], []).append(float(np.mean(values)))
    return {s: float(np.mean(v)) for s, v in sorted(per_subject.items())}


def mask_path(name: str, version: str, settings: str, subject: str, volume: str) -> str:
    """Where the label map of a volume lies below the lake; holds a pseudonym and digests only."""
    return f"predictions/masks/{storage.component(name)}/{version}/{settings}/{storage.component(subject)}_{volume}.nii.gz"


def cells_path(name: str, version: str, settings: str, subject: str, volume: str) -> str:
    """Where :func:`cell_table` of a field lies below the lake, as :func:`mask_path`."""
    return f"predictions/cells/{storage.component(name)}/{version}/{settings}/{storage.component(subject)}_{volume}.parquet"
