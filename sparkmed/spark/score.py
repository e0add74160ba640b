"""A model over many volumes: packed tasks, one model per Python worker, rows back to the driver."""

import dataclasses
import gc
import itertools
import logging
import traceback
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pyspark import TaskContext
from pyspark.sql import SparkSession

from sparkmed import scoring, storage
from sparkmed.config import Score
from sparkmed.formats import isolation
from sparkmed.learning import model as models
from sparkmed.learning.model import Model, ModelSpec
from sparkmed.rejection import Refused, Rejection
from sparkmed.spark.session import decoding, packed

log = logging.getLogger(__name__)
STAGE = "score"
WORTH_CUTTING_MB = 256.0
"""A smaller volume is scored in one task, even if that is the longest."""
_loaded: dict[tuple[str, ...], Model] = {}


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
    imports: Sequence[str] = (),
    scratch: str | None = None,
    split_mb: float | None = None,
    write: Callable[[list[dict]], Any] | None = None,
) -> tuple[list, list[Refusal]]:
    """Prediction rows and refusals of volume rows; ``masks`` maps a volume's uid to the URL of its label map, or of what
    is said of each of its cells.

    ``settings`` replace those that the model was trained with; ``segs`` is where DICOM SEG go. A volume whose SEG cannot be
    written has a prediction all the same, and a refusal that says why. ``imports`` are those of the config. With ``write`` a task
    gives its rows to it, and what that returns comes back in their place.

    A segmentation of more than ``split_mb`` MB (:func:`scoring.megabytes`), or so large that it would take longer than a slot's
    share of all, is scored in parts, through files below ``scratch``, which all nodes see. Without ``scratch`` none is.

    Torch has as many threads per task as Spark gives it cores: by ``spark.task.cpus`` Spark sets OMP_NUM_THREADS of its workers.
    """
    if not rows:
        return [], []
    specs = [s if settings is None else s.model_copy(update={"score": settings.over(s.score)}) for s in models.specs(model_url)]
    gpu = device == "cuda" or (device == "auto" and spark.conf.get("spark.task.resource.gpu.amount", "0") != "0")
    costs = {r["uid"]: sum(scoring.cost(r, s, gpu) for s in specs) for r in rows}
    slots, parts, refused = spark.sparkContext.defaultParallelism, {}, {}

    def load() -> Model:
        return _model(model_url, device, settings, imports)

    cut = [] if scratch is None or len(specs) > 1 else _cut(rows, specs[0], costs, slots, split_mb)
    here = storage.join(scratch, uuid.uuid4().hex) if cut else None
    try:
        if here:
            parts, refused = _in_parts(spark, cut, specs[0], load, here, slots)
            costs |= {uid: 0.1 * costs[uid] for uid in parts}  # what is left
        whole = [r for r in rows if r["uid"] not in refused]
        tasks = _tasks(whole, [costs[r["uid"]] for r in whole], slots)

        def run(volumes):
            model, predictions, refusals = load(), [], []
            with decoding():
                for row in volumes:
                    mask = masks[row["uid"]] if masks else None
                    if row["uid"] in parts:
                        prediction, reasons = _tried(row, scoring.joined, model, row, parts[row["uid"]], mask, segs)
                    else:
                        prediction, reasons = _tried(row, scoring.score, model, row, mask, segs)
                    no_seg = prediction.pop("seg_refused", None) if prediction else None
                    refusals += _of(row, [no_seg.at(uri, STAGE) for uri in row["sources"]] if no_seg else reasons)
                    predictions += [prediction] if prediction else []
            without = [r for r in refusals if r.volume in {p["volume"] for p in predictions}]
            return [write(predictions)] if write and predictions else predictions, refusals, without

        outcomes, lost = _all(spark, tasks, run)
    finally:
        if here and storage.exists(here):
            storage.remove(here, recursive=True)
    found, refusals, without = ([x for o in outcomes for x in o[n]] for n in range(3))
    refused |= {row["uid"]: _lost(row) for row in lost}
    refusals += [r for row in rows if row["uid"] in refused for r in _of(row, refused[row["uid"]])]
    if without:
        message = "%d predictions have no DICOM SEG; the first because: %s (%s). Which they are is in the quarantine table"
        log.warning(message, len({r.volume for r in without}), without[0].message, without[0].reason)
    return found, refusals


def _of(row: dict, reasons: list[Rejection]) -> list[Refusal]:
    return [Refusal(r.uri, r.stage, r.reason, r.message, row["uid"]) for r in reasons]


def _lost(row: dict) -> list[Rejection]:
    message = "the worker died while it was scored, of too little memory as a rule; it is tried again next time"
    return [Rejection(uri, STAGE, scoring.WORKER_LOST, message) for uri in row["sources"]]


def _all(spark: SparkSession, tasks: list[list], work: Callable[[list], Any]) -> tuple[list, list]:
    """What ``work`` makes of each task's items, and the items that are given up because they kill their worker.

    A task that has lost two workers, to one item that is too large as a rule, hands its items back, and each is tried alone; one
    that loses two more is given up, and the job goes on, which Spark ends at the fourth of a task. Where executors die as a whole,
    or are taken away, an item may be given up for another's sake. What ``work`` raises twice is not about an item: alone once more,
    and then it is raised.
    """

    def attempt(items):
        number = TaskContext.get().attemptNumber()
        if number > 1:
            return [], items, None
        try:
            return [work(items)], [], None
        except Exception:
            if not number:
                raise
            return [], items, traceback.format_exc()

    def job(tasks):
        return spark.sparkContext.parallelize(tasks, len(tasks)).map(attempt).collect() if tasks else []

    first = job(tasks)
    second = [] if first and all(e for _, _, e in first) else job([[item] for _, back, _ in first for item in back])
    for _, _, error in second or first:
        if error:
            raise RuntimeError(f"a task fails again and again:\n{error}")
    return [made for found, _, _ in first + second for made in found], [item for _, back, _ in second for item in back]


def _tried(row: dict, do: Callable, *arguments) -> tuple[Any, list[Rejection]]:
    """What ``do`` gives, or None and why; one volume must not end the night."""
    try:
        return do(*arguments), []
    except Refused as e:
        return None, [e.at(uri, STAGE) for uri in row["sources"]]
    except (isolation.Unavailable, scoring.Unwritten):  # says nothing of the volume: the task is tried again
        raise
    except Exception as e:  # of any decoder and any network
        message = f"{type(e).__name__} while it was scored; it is tried again next time"
        return None, [Rejection(uri, STAGE, scoring.FAILED, message) for uri in row["sources"]]


def _tasks(items: list, weights: list[float], slots: int) -> list[list]:
    """Groups of equal weight: thrice the slots, for what the weights do not know, but no more than the heaviest item allows."""
    if not items:
        return []
    many = int(sum(weights) / max(weights))
    return packed(items, weights, min(3 * slots, max(slots, many)))


def _cut(rows: Sequence[dict], spec: ModelSpec, costs: dict[str, float], slots: int, split_mb: float | None) -> list[dict]:
    """The rows that are scored in parts."""
    if spec.task != "segmentation":
        return []
    share, chosen = sum(costs.values()) / slots, []
    for row in rows:
        size = scoring.megabytes(row, spec)
        longest = slots > 1 and costs[row["uid"]] > share and size > WORTH_CUTTING_MB
        if longest or (split_mb is not None and size > split_mb):
            chosen.append(row)
    return chosen


def _in_parts(
    spark: SparkSession, rows: list[dict], spec: ModelSpec, load: Callable[[], Model], url: str, slots: int
) -> tuple[dict[str, scoring.Parts], dict[str, list[Rejection]]]:
    """By uid of these volumes their parts, blocks and all, ready to be joined; and why others have none.

    Two jobs: one task per volume that preprocesses it, then tasks of blocks of windows of all of them.
    """

    def spread(volume):
        (n,) = volume
        with decoding():
            return n, *_tried(rows[n], scoring.spread, load(), rows[n], storage.join(url, rows[n]["uid"]))

    def score(blocks):
        model = load()
        return [(n, *_tried(rows[n], scoring.score_block, model, parts[n], block)) for n, block in blocks]

    found, lost = _all(spark, [[n] for n in range(len(rows))], spread)
    parts = {n: p for n, p, _ in found if p}
    refused = {rows[n]["uid"]: reasons for n, _, reasons in found if reasons}
    blocks = [(n, b) for n, p in parts.items() for b in range(len(spec.windows(p.shape).blocks))]
    tasks = _tasks(blocks, [float(spec.windows(parts[n].shape).count(b)) for n, b in blocks], slots)
    found, lost_blocks = _all(spark, tasks, score)
    for n, seconds, reasons in itertools.chain(*found):
        if reasons:
            refused[rows[n]["uid"]] = reasons
        else:
            parts[n] = dataclasses.replace(parts[n], seconds=parts[n].seconds + seconds)
    refused |= {rows[n]["uid"]: _lost(rows[n]) for n in {*lost, *(n for n, _ in lost_blocks)}}
    return {rows[n]["uid"]: p for n, p in parts.items() if rows[n]["uid"] not in refused}, refused


def _model(url: str, device: str, settings: Score | None, imports: Sequence[str]) -> Model:
    """The model at ``url``, loaded once per worker process as long as its spec, which names all digests, is the same."""
    digest = models.model_digest(url)
    key = digest, device, *imports
    if key not in _loaded:
        _loaded.clear()
        gc.unfreeze()
        _loaded[key] = Model.load(url, device, imports, digest)
        gc.collect()
        gc.freeze()  # PySpark collects garbage after every task: without this it looks through all of torch, a quarter of a second
    model = _loaded[key]
    return model if settings is None else model.with_settings(settings)
