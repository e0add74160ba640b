"""Profiles on Spark: :mod:`sparkmed.hcs.profiles` on whole wells, treatments or plates, by workers.

Medians are those of the core rather than of Spark SQL: ``percentile_approx`` is not exact, and the exact ``percentile`` and
``median`` keep a map from values to counts for each group and feature, which is many times the cells' own size where all values
differ, and take NaN for the largest value. Each group comes to one worker whole, so no answer depends on how rows are partitioned;
the driver holds what is said of features and of refused plates, and no rows.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql.types import DoubleType, LongType, StructField, StructType

from sparkmed.hcs import profiles
from sparkmed.hcs.profiles import CONTROL, MIN_CONTROLS, NEGATIVE, STAGE, Method, Whitening
from sparkmed.rejection import InputError, Rejection

_FACTS = "kind string, place string, feature string, said string, number long"
_REFUSED, _UNFIT, _MISSING, _NAMELESS = "refused", "unfit", "missing", "nameless"


@dataclass(frozen=True)
class Normalized:
    """As :class:`sparkmed.hcs.profiles.Normalized`, with a Spark frame."""

    frame: DataFrame
    features: list[str]
    dropped: dict[str, str]
    missing: dict[str, int]
    refused: list[Rejection]


def aggregate(
    frame: DataFrame,
    by: Sequence[str],
    features: Sequence[str],
    method: Literal["median", "modz"] = "median",
    keep: Sequence[str] = (),
    count: str | None = None,
) -> DataFrame:
    """:func:`sparkmed.hcs.profiles.aggregate` of a frame, in no order; a worker holds a batch of rows, or a group if that is more.

    Wrong columns are an :class:`InputError` at once; ``keep`` that varies in a group, when the frame is computed.
    """
    by, features, keep = list(by), list(features), list(keep)
    profiles.aggregate(_head(frame), by, features, method, keep, count)  # says what is wrong with the arguments
    fields = [frame.schema[c] for c in [*by, *keep]] + ([StructField(count, LongType())] if count else [])
    schema = StructType(fields + [StructField(f, DoubleType()) for f in features])

    def streamed(batches: Iterator[pd.DataFrame]) -> Iterator[pd.DataFrame]:
        for groups in _whole_groups(batches, by):
            yield profiles.aggregate(groups, by, features, method, keep, count)[schema.names]

    together = frame.select(*by, *keep, *features).repartition(*by).sortWithinPartitions(*by)
    return together.mapInPandas(streamed, schema)


def normalize(
    frame: DataFrame,
    features: Sequence[str],
    method: Method,
    by: str = "plate",
    control: str = CONTROL,
    reference: str = NEGATIVE,
    whitening: Whitening = "ZCA-cor",
    epsilon: float | None = None,
) -> Normalized:
    """:func:`sparkmed.hcs.profiles.normalize` of a frame, in no order; a worker holds the wells of one plate at a time.

    Runs once over the frame to see which features all plates can normalise (under ``spherize``, twice, for plates whose features
    depend on each other); the normalised frame is computed when it is used.
    """
    features = list(features)
    profiles.normalize(_head(frame), features, method, by, control, reference, whitening, epsilon)  # says what is wrong with them
    plates = frame.select(by, control, *features).groupBy(by)

    def examined(plate: pd.DataFrame) -> pd.DataFrame:
        return _frame(_facts(plate, features, method, by, control, reference))

    facts = plates.applyInPandas(examined, _FACTS).groupBy("kind", "feature", F.when(F.col("kind") == _REFUSED, F.col("place")))
    first = F.min(F.struct("place", "said"))
    found = facts.agg(first.alias("first"), F.count("*").alias("times"), F.sum("number").alias("number")).collect()
    of = {kind: [r for r in found if r.kind == kind] for kind in (_REFUSED, _UNFIT, _MISSING, _NAMELESS)}
    if of[_NAMELESS]:
        raise InputError(f"{of[_NAMELESS][0].number} rows have no {by}")
    unfit = {r.feature: profiles.dropped_because(r.first.said, r.first.place, r.times) for r in of[_UNFIT]}
    refused = [Rejection(r.first.place, STAGE, "NO_CONTROLS", r.first.said) for r in of[_REFUSED]]
    left = [f for f in features if f not in unfit]
    names = profiles.named(left, method, whitening)
    if method == "spherize" and left:

        def dependent(plate: pd.DataFrame) -> pd.DataFrame:
            done = profiles.normalize(plate, left, method, by, control, reference, whitening, epsilon)
            return _frame([(_REFUSED, r.uri, None, r.message, 0) for r in done.refused if r.reason == "DEPENDENT_FEATURES"])

        rows = plates.applyInPandas(dependent, _FACTS).collect()
        refused += [Rejection(r.place, STAGE, "DEPENDENT_FEATURES", r.said) for r in rows]
    others = [f for f in frame.schema.fields if f.name not in features]
    schema = StructType(others + [StructField(f, DoubleType()) for f in names])

    def one(plate: pd.DataFrame) -> pd.DataFrame:
        if not left:
            enough = (plate[control] == reference).sum() >= MIN_CONTROLS
            return plate[[f.name for f in others]] if enough else plate[[f.name for f in others]][:0]
        return profiles.normalize(plate, left, method, by, control, reference, whitening, epsilon).table

    normal = frame.select(*(f.name for f in others), *left).groupBy(by).applyInPandas(one, schema)
    missing = {r.feature: r.number for r in of[_MISSING] if r.feature not in unfit}
    order = {f: n for n, f in enumerate(features)}
    return Normalized(
        normal,
        names,
        {f: unfit[f] for f in sorted(unfit, key=order.__getitem__)},
        {f: missing[f] for f in sorted(missing, key=order.__getitem__)},
        sorted(refused, key=lambda r: (r.reason != "NO_CONTROLS", r.uri)),
    )


def _whole_groups(batches: Iterator[pd.DataFrame], by: list[str]) -> Iterator[pd.DataFrame]:
    """Rows that come sorted by ``by``, so that each group is whole: the last of a batch waits for what follows.

    A call per group instead takes nine times as long for wells of 50 cells and 200 features: each hands all columns over.
    """
    waiting: list[pd.DataFrame] = []
    for batch in batches:
        if not len(batch):
            continue
        keys = batch[by]
        last = keys.iloc[-1]
        ended = ~((keys == last) | (keys.isna() & last.isna())).all(axis=1).to_numpy()
        if waiting:
            before = waiting[-1][by].iloc[-1]
            if ended.any() or not ((last == before) | (last.isna() & before.isna())).all():
                yield pd.concat([*waiting, batch[ended]], ignore_index=True)
                waiting = []
        elif ended.any():
            yield batch[ended]
        waiting.append(batch[~ended])
    if waiting:
        yield pd.concat(waiting, ignore_index=True)


def _facts(plate: pd.DataFrame, features, method, by, control, reference) -> Iterator[tuple]:
    name = plate[by].iloc[0]
    if pd.isna(name):
        yield _NAMELESS, None, None, None, len(plate)
        return
    values = profiles.numbers(plate, features)
    controls = (plate[control] == reference).to_numpy(bool, na_value=False)
    if controls.sum() < MIN_CONTROLS:
        yield _REFUSED, str(name), None, profiles.no_controls(by, name, int(controls.sum()), reference).message, 0
        return
    for feature, why in profiles.unfit_features(values, controls, features, method).items():
        yield _UNFIT, f"{by} {name}", feature, why, 0
    counts = np.isnan(values).sum(axis=0)
    for n in np.flatnonzero(counts):
        yield _MISSING, f"{by} {name}", features[n], None, int(counts[n])


def _frame(facts) -> pd.DataFrame:
    return pd.DataFrame(list(facts), columns=["kind", "place", "feature", "said", "number"])


def _head(frame: DataFrame) -> pd.DataFrame:
    """No rows, with the types of the columns."""
    return frame.limit(0).toPandas()
