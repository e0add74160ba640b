"""Fields of a screen on Spark: what each looks like, and what the champion says about those that are there."""

from collections.abc import Sequence

import pandas as pd
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.window import Window

from sparkmed import formats, tables
from sparkmed.config import Plates, digest
from sparkmed.formats.instance import VolumeHeader
from sparkmed.hcs import image_quality, nuclei
from sparkmed.hcs.fields import FORMAT, NAMELESS
from sparkmed.rejection import Refused, Rejection
from sparkmed.spark import catalog, profiles
from sparkmed.spark.session import decoding, packed

STAGE = "screen"
TASK_BYTES = 1e9
"""Of pixels that a task reads."""
FACTS = {
    "plate": "string", "batch": "string", "well": "string", "row": "bigint", "column": "bigint",
}  # fmt: skip
TREATMENT = {
    "compound": "string", "concentration": "double", "unit": "string", "control": "string", "moa": "string",
    "cell_line": "string", "replicate": "string",
}  # fmt: skip


def settings_digest(plates: Plates) -> str:
    """Of how fields are looked at."""
    return digest(plates.quality, plates.nuclei)[:16]


def key(volume: str, settings: str) -> str:
    """Of a row of ``screen/fields``."""
    return digest(volume, settings)[:32]


def examine(
    spark: SparkSession, rows: Sequence[dict], plates: Plates, lake: str, lineage: dict
) -> tuple[list[tables.Keyed], list[Rejection]]:
    """Figures of each field of these volume rows, in files of ``screen/fields`` that no commit names yet; and what was refused."""
    settings = settings_digest(plates)

    def one(row: dict) -> dict:
        header = VolumeHeader.from_row(row)
        array, names = formats.read_volume(header).array, header.facts["channels"]
        cells = None
        if plates.nuclei:
            pixel = header.facts.get("pixel_size_um")
            field = array[names.index(plates.nuclei.channel), ..., 0]
            cells = len(nuclei.find(field, plates.nuclei, pixel and pixel[0]).cells)
        found = [image_quality.measure(field[..., 0], plates.quality, cells) for field in array]
        flags = [f"{c} {flag}" for c, f in zip(names, found, strict=True) for flag in image_quality.flags(f, plates.quality)]
        figures = {name: [getattr(f, name) for f in found] for name in tables.OF_CHANNELS}
        facts = {"key": key(row["uid"], settings), "volume": row["uid"], "settings": settings}
        return facts | {"channels": names, **figures, "flags": flags, "cells": cells}

    def write(some: list[dict]) -> tuple[tables.Keyed | None, list[Rejection]]:
        done, refused = [], []
        with decoding():
            for row in some:
                try:
                    done.append(one(row) | lineage)
                except Refused as e:
                    refused += [e.at(uri, STAGE) for uri in row["sources"]]
        return tables.Keyed(tables.fields(lake).write(done), tuple(r["key"] for r in done)) if done else None, refused

    if not rows:
        return [], []
    weights = [8.0 * row["shape"][0] * row["shape"][1] * row["shape"][2] for row in rows]
    tasks = packed(list(rows), weights, max(3 * spark.sparkContext.defaultParallelism, int(sum(weights) / TASK_BYTES)))
    found = spark.sparkContext.parallelize(tasks, len(tasks)).map(write).collect()
    return [k for k, _ in found if k], [r for _, refused in found for r in refused]


def scored_fields(
    spark: SparkSession, lake: str, model_digest: str, settings: str, plates: Plates, index: int, features: int
) -> DataFrame:
    """A row per field of ``volumes/`` that the model scored: where it lies, what the plate map says of it, ``split``, ``score``
    (the probability of class ``index``), ``cells`` (as they were counted, else those that were scored) and, in ``f0`` and on,
    ``features`` of them.

    Of several predictions under this model that under ``settings`` counts, else the last. Fields with a flag that
    ``plates.quality.leave_out`` names are left out.
    """
    mine = catalog.read(spark, tables.predictions(lake)).where(F.col("model_digest") == model_digest)
    newest = Window.partitionBy("volume").orderBy(F.desc(F.col("config_digest") == settings), F.desc("scored_at"), F.desc("key"))
    mine = mine.withColumn("_n", F.row_number().over(newest)).where("_n = 1")
    volumes = catalog.read(spark, tables.volumes(lake)).where(F.col("format") == FORMAT)
    place = [F.get_json_object("header", f"$.{name}").cast(kind).alias(name) for name, kind in FACTS.items()]
    said = [F.get_json_object("header", f"$.treatment.{name}").cast(kind).alias(name) for name, kind in TREATMENT.items()]
    volumes = volumes.select("uid", "split", *place, *said).fillna(NAMELESS, "plate")
    columns = [F.col("features")[n].cast("double").alias(f"f{n}") for n in range(features)]
    mine = mine.select("volume", F.col("probability")[index].alias("score"), F.col("cells").alias("_scored"), *columns)
    found = volumes.join(mine, volumes["uid"] == mine["volume"]).drop("volume")
    examined = catalog.read(spark, tables.fields(lake)).where(F.col("settings") == settings_digest(plates))
    examined = examined.dropDuplicates(["key"]).select(F.col("volume").alias("uid"), "flags", F.col("cells").cast("double"))
    found = found.join(examined, "uid", "left").withColumn("cells", F.coalesce("cells", F.col("_scored").cast("double")))
    if plates.quality.leave_out:
        pattern = f" ({'|'.join(plates.quality.leave_out)})$"
        bad = F.exists(F.coalesce("flags", F.array()), lambda flag: flag.rlike(pattern))
        found = found.where(~bad)
    return found.drop("flags", "uid", "_scored")


def wells(frame: DataFrame, features: int, method: profiles.Method) -> tuple[pd.DataFrame, profiles.Normalized | None]:
    """A row per well of :func:`scored_fields`, in the order of plates: medians of ``score`` and of the features, on the scale of
    the plate's negative controls; the number of its ``fields``, and its ``cells`` in all. And what was said of features and plates.

    Fields weigh the same. Where single cells are scored, features are medians over the fields of medians over their cells (of the
    probabilities the means), not medians over all cells of the well: a field of few cells counts as much as one of many.
    What comes back is on the driver: it grows with wells, not with fields.
    """
    names, by = [f"f{n}" for n in range(features)], ["plate", "well"]
    head = ["batch", *TREATMENT, "row", "column", "split"]
    medians = profiles.aggregate(frame, by, ["score", *names], "median", head, "fields").cache()
    try:
        table = medians.select(*by, *head, "fields", "score").toPandas().sort_values(["plate", "row", "column"])
        cells = frame.groupBy(*by).agg(F.sum("cells").alias("cells")).toPandas()
        table = table.merge(cells, on=by, how="left", validate="one_to_one")
        if not features or table.empty:
            return table, None
        normal = profiles.normalize(medians.drop("score"), names, method)
        found = normal.frame.select(*by, *normal.features).toPandas()
        return table.merge(found, on=by, how="left", validate="one_to_one"), normal
    finally:
        medians.unpersist()
