"""A model over many volumes: packed tasks, one model per Python worker, rows back to the driver."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from pyspark import TaskContext
from pyspark.sql import SparkSession

from sparkmed import scoring, storage
from sparkmed.config import Score
from sparkmed.learning.model import Model
from sparkmed.rejection import Refused, Rejection
from sparkmed.spark.session import decoding, packed

log = logging.getLogger(__name__)
STAGE = "score"
FAILED, WORKER_LOST = "FAILED", "WORKER_LOST"
PASSING = scoring.PASSING | {FAILED, WORKER_LOST}
"""Reasons that may pass, now with a full disk and the like."""
_loaded: dict[str, Model] = {}


@dataclass(frozen=True)
class Refusal(Rejection):
    """Why one volume of a file was refused; the file may hold others."""

    volume: str = ""


def predict(
    spark: SparkSession,
    rows: Sequence[dict],
    model_url: str,
    device: str,
    masks: dict[str, str] | None = None,
    settings: Score | None = None,
    segs: scoring.SegFolder | None = None,
    write: Callable[[list[dict]], Any] | None = None,
    marks: str | None = None,
) -> tuple[list, list[Refusal]]:
    """Prediction rows and refusals of volume rows; ``masks`` maps a volume's uid to the URL of its label map.

    ``settings`` replace those that the model was trained with; ``segs`` is where DICOM SEG go. A volume whose SEG cannot be
    written has a prediction all the same, and a refusal that says why. With ``write`` a task gives its rows to it, and what that
    returns comes back in their place. ``marks`` is a folder for :func:`_surviving`.
    """
    if not rows:
        return [], []
    tasks = packed(list(rows), [math.prod(r["shape"]) for r in rows], 3 * spark.sparkContext.defaultParallelism)

    def run(volumes):
        model = _model(model_url, device, settings)
        predictions, refusals = [], []

        def refuse(row, reasons):
            refusals.extend(Refusal(r.uri, r.stage, r.reason, r.message, row["uid"]) for r in reasons)

        with decoding():
            for row, deadly in _surviving(volumes, marks):
                if deadly:
                    message = "the worker died while it was scored, of too little memory as a rule; it is tried again next time"
                    refuse(row, [Rejection(uri, STAGE, WORKER_LOST, message) for uri in row["sources"]])
                    continue
                try:
                    prediction = scoring.score(model, row, masks[row["uid"]] if masks else None, segs)
                    no_seg = prediction.pop("seg_refused", None)
                    refuse(row, [no_seg.at(uri, STAGE) for uri in row["sources"]] if no_seg else [])
                    predictions.append(prediction)
                except Refused as e:
                    refuse(row, [e.at(uri, STAGE) for uri in row["sources"]])
                except (RuntimeError, ValueError, OSError, MemoryError) as e:  # one volume must not end the night
                    message = f"{type(e).__name__} while it was scored; it is tried again next time"
                    refuse(row, [Rejection(uri, STAGE, FAILED, message) for uri in row["sources"]])
        without = [r for r in refusals if r.volume in {p["volume"] for p in predictions}]
        return [write(predictions)] if write and predictions else predictions, refusals, without

    outcomes = spark.sparkContext.parallelize(tasks, len(tasks)).map(run).collect()
    found, refusals, without = ([x for o in outcomes for x in o[n]] for n in range(3))
    if without:
        message = "%d predictions have no DICOM SEG, such as that of %s: %s (%s)"
        count = len({r.volume for r in without})
        log.warning(message, count, without[0].uri, without[0].message, without[0].reason)
    return found, refusals


def _surviving(volumes: Iterable[dict], marks: str | None) -> Iterator[tuple[dict, bool]]:
    """Each volume, and whether it was at work when an attempt at this task before this one died.

    The first attempt leaves no mark: only when it has died do others write into ``marks`` which volume they are at. So a volume
    that kills its worker, by its size as a rule, costs two attempts of the four that Spark makes.
    """
    tried = marks is not None and TaskContext.get().attemptNumber() > 0
    for row in volumes:
        mark = tried and storage.join(marks, row["uid"])
        deadly = bool(mark) and storage.exists(mark)
        if mark and not deadly:
            storage.write_bytes(mark, b"")
        yield row, deadly
        if mark and not deadly:
            storage.remove(mark)


def _model(url: str, device: str, settings: Score | None) -> Model:
    """The model at ``url``, loaded once per worker process."""
    if url not in _loaded:
        _loaded.clear()
        _loaded[url] = Model.load(url, device)
    model = _loaded[url]
    return model if settings is None else Model(model.spec.model_copy(update={"score": settings}), model.network, model.device)
