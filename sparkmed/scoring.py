"""What a model says about one volume, as a row and a mask, and how right it is where the truth is known."""

import contextlib
import datetime
import time
from dataclasses import dataclass

import numpy as np

from sparkmed import dataset, formats, storage
from sparkmed.config import Segment, digest
from sparkmed.formats import dicom_seg, nifti
from sparkmed.formats.instance import VolumeHeader
from sparkmed.imaging import intensity, postprocess
from sparkmed.imaging.volume import Volume
from sparkmed.learning import metrics
from sparkmed.learning.model import Model
from sparkmed.rejection import Refused

PASSING = frozenset({"UNREADABLE", "CHANGED"})
"""Reasons that may pass, such as a folder that is not mounted; every other one is about the volume and stays."""


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
    ``segs`` (segmentation), as the model's score settings say.

    ``ml`` is millilitres per class; ``probability`` is per class the probability of the image, or the mean over the voxels where
    that class was predicted (null where it was not). ``score`` is against the row's label: Dice per class, or 1 and 0 for right
    and wrong; ``reliability`` how far its confidence can be believed. ``quantiles`` are of the image. ``seg_refused``, no column,
    is why a prediction has no SEG where one was wanted; it counts without. Raises :class:`Refused` on pixels that cannot be read
    or do not fit the network.
    """
    started = time.perf_counter()
    header = VolumeHeader.from_row(row)
    image = formats.read_volume(header)
    out = {
        "volume": row["uid"],
        "subject": row["subject"],
        "split": row["split"],
        "target": row["target"],
        "device": str(model.device),
    }
    classes = model.spec.classes
    if model.spec.task == "segmentation":
        probabilities = model.probabilities(image)
        labels = postprocess.as_labels(probabilities)
        if mask_url:
            nifti.write(labels, mask_url)
        if segs:
            try:
                out["seg"] = _write_seg(model, labels, probabilities, header, segs)
            except Refused as e:
                if e.reason in PASSING:
                    raise
                out["seg_refused"] = e
        counts = np.bincount(labels.array.ravel(), minlength=len(classes))
        out["ml"] = (counts * image.voxel_ml).tolist()
        sums = [float(probabilities.array[c][labels.array[0] == c].sum(dtype=np.float64)) for c in range(len(classes))]
        out["probability"] = [s / n if n else None for s, n in zip(sums, counts.tolist(), strict=True)]
        if row["label"]:
            with contextlib.suppress(Refused):  # a broken label is no reason to lose the prediction
                truth = dataset.read_label(row, image).array[0]
                out["score"] = dice(labels.array[0], truth, len(classes))
                out["reliability"] = _reliability(probabilities.array, labels.array[0], truth)
    else:
        vector = np.asarray(model.predict(image), np.float64)
        out["probability"] = vector.tolist()
        out["predicted"] = classes[int(vector.argmax())]
        if row["target"] is not None:
            right = vector.argmax() == row["target"]
            out["score"], out["reliability"] = [float(right)], metrics.reliability(vector.max(), right)
    out["seconds"] = time.perf_counter() - started
    out["quantiles"] = intensity.quantiles(image.array)
    out["scored_at"] = datetime.datetime.now(datetime.UTC)
    return out


def _write_seg(model: Model, labels: Volume, probabilities: Volume, header: VolumeHeader, segs: SegFolder) -> str:
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


def _reliability(probabilities: np.ndarray, predicted: np.ndarray, truth: np.ndarray) -> list[float]:
    """Of the voxels that are predicted or true foreground: the background, easy and large, would hide what they are like."""
    where = (predicted > 0) | (truth > 0)
    predicted, truth = predicted[where], truth[where]
    confidence = np.take_along_axis(probabilities[:, where], predicted[None].astype(np.intp), 0)[0]
    return metrics.reliability(confidence, predicted == truth)


def dice(predicted: np.ndarray, truth: np.ndarray, classes: int) -> list[float | None]:
    """Dice (1945) per class of two label maps of one shape: 2 |A and B| / (|A| + |B|), null where a class is in neither.

    >>> dice(np.array([0, 1, 1]), np.array([0, 0, 1]), 3)
    [0.6666666666666666, 0.6666666666666666, None]
    """
    both = np.bincount(truth[predicted == truth].ravel(), minlength=classes)
    total = np.bincount(predicted.ravel(), minlength=classes) + np.bincount(truth.ravel(), minlength=classes)
    return [2 * float(b) / float(t) if t else None for b, t in zip(both[:classes], total[:classes], strict=True)]


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
