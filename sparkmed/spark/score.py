"""A model over many volumes: packed tasks, one model per Python worker, rows back to the driver."""

import logging
import math
from collections.abc import Sequence

from pyspark.sql import SparkSession

from sparkmed import scoring
from sparkmed.config import Score
from sparkmed.learning.model import Model
from sparkmed.rejection import Refused, Rejection
from sparkmed.spark.session import decoding, packed

log = logging.getLogger(__name__)
STAGE = "score"
FAILED = "FAILED"
PASSING = scoring.PASSING | {FAILED}
"""Reasons that may pass, now with a full disk and the like."""
_loaded: dict[str, Model] = {}


def predict(
    spark: SparkSession,
    rows: Sequence[dict],
    model_url: str,
    device: str,
    masks: dict[str, str] | None = None,
    settings: Score | None = None,
    segs: scoring.SegFolder | None = None,
    imports: Sequence[str] = (),
) -> tuple[list[dict], list[Rejection]]:
    """Prediction rows and refusals of volume rows; ``masks`` maps a volume's uid to the URL of its label map.

    ``settings`` replace those that the model was trained with; ``segs`` is where DICOM SEG go. A volume whose SEG cannot be
    written has a prediction all the same, and a refusal that says why. ``imports`` are those of the config.
    """
    if not rows:
        return [], []
    tasks = packed(list(rows), [math.prod(r["shape"]) for r in rows], 3 * spark.sparkContext.defaultParallelism)

    def run(volumes):
        model = _model(model_url, device, settings, imports)
        with decoding():
            for row in volumes:
                try:
                    prediction = scoring.score(model, row, masks[row["uid"]] if masks else None, segs)
                    no_seg = prediction.pop("seg_refused", None)
                    yield prediction, no_seg and [no_seg.at(uri, STAGE) for uri in row["sources"]]
                except Refused as e:
                    yield None, [e.at(uri, STAGE) for uri in row["sources"]]
                except (RuntimeError, ValueError, OSError, MemoryError) as e:  # one volume must not end the night
                    message = f"{type(e).__name__} while it was scored; it is tried again next time"
                    yield None, [Rejection(uri, STAGE, FAILED, message) for uri in row["sources"]]

    outcomes = spark.sparkContext.parallelize(tasks, len(tasks)).flatMap(run).collect()
    without = [refused[0] for p, refused in outcomes if p and refused]
    if without:
        message = "%d predictions have no DICOM SEG; the first because: %s (%s). Which they are is in the quarantine table"
        log.warning(message, len(without), without[0].message, without[0].reason)
    return [p for p, _ in outcomes if p], [r for _, refused in outcomes if refused for r in refused]


def _model(url: str, device: str, settings: Score | None, imports: Sequence[str]) -> Model:
    """The model at ``url``, loaded once per worker process."""
    if url not in _loaded:
        _loaded.clear()
        _loaded[url] = Model.load(url, device, imports)
    model = _loaded[url]
    return model if settings is None else model.with_settings(settings)
