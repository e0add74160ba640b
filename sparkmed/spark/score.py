"""A model over many volumes: packed tasks, one model per Python worker, rows back to the driver."""

import math
from collections.abc import Sequence

from pyspark.sql import SparkSession

from sparkmed import scoring
from sparkmed.config import Score
from sparkmed.learning.model import Model
from sparkmed.rejection import Refused, Rejection
from sparkmed.spark.session import packed

STAGE = "score"
FAILED = "FAILED"
PASSING = {FAILED, "UNREADABLE", "CHANGED"}
"""Reasons that may pass, such as a full disk or a folder that is not mounted; every other one is about the volume and stays."""
_loaded: dict[str, Model] = {}


def predict(
    spark: SparkSession,
    rows: Sequence[dict],
    model_url: str,
    device: str,
    masks: dict[str, str] | None = None,
    settings: Score | None = None,
) -> tuple[list[dict], list[Rejection]]:
    """Prediction rows and refusals of volume rows; ``masks`` maps a volume's uid to the URL of its label map.

    ``settings`` replace those that the model was trained with.
    """
    if not rows:
        return [], []
    tasks = packed(list(rows), [math.prod(r["shape"]) for r in rows], 3 * spark.sparkContext.defaultParallelism)

    def run(volumes):
        model = _model(model_url, device, settings)
        for row in volumes:
            try:
                yield scoring.score(model, row, masks[row["uid"]] if masks else None), None
            except Refused as e:
                yield None, [e.at(uri, STAGE) for uri in row["sources"]]
            except (RuntimeError, ValueError, OSError, MemoryError) as e:  # one volume must not end the night
                message = f"{type(e).__name__} while it was scored; it is tried again next time"
                yield None, [Rejection(uri, STAGE, FAILED, message) for uri in row["sources"]]

    outcomes = spark.sparkContext.parallelize(tasks, len(tasks)).flatMap(run).collect()
    return [p for p, _ in outcomes if p], [r for _, refused in outcomes if refused for r in refused]


def _model(url: str, device: str, settings: Score | None) -> Model:
    """The model at ``url``, loaded once per worker process."""
    if url not in _loaded:
        _loaded.clear()
        _loaded[url] = Model.load(url, device)
    model = _loaded[url]
    return model if settings is None else Model(model.spec.model_copy(update={"score": settings}), model.network, model.device)
