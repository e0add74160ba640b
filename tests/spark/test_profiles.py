"""Profiles on Spark are those of the core, however rows are partitioned."""

import numpy as np
import pandas as pd
import pytest
from pyspark.sql import functions as F

from sparkmed.hcs import profiles
from sparkmed.rejection import InputError
from sparkmed.spark import profiles as on_spark

pytestmark = pytest.mark.engine
FEATURES = [f"f{n}" for n in range(6)]


def cells(seed=0, plates=3, wells=16, per_well=9):
    """Cells with gaps, of which no two plates have the same number."""
    rng = np.random.default_rng(seed)
    count = plates * wells * per_well
    place = np.arange(count) // per_well
    table = pd.DataFrame(rng.normal(0, 1, (count, 6)).astype(np.float32), columns=FEATURES)
    table[FEATURES] += rng.normal(0, 5, (plates, 6)).astype(np.float32)[place // wells]
    table.insert(0, "plate", [f"P{p}" for p in place // wells])
    table.insert(1, "well", [f"{'ABCD'[w % 4]}{w // 4 + 1:02d}" for w in place % wells])
    table.insert(2, "control", np.where(place % wells < 8, "negative", None))
    table.insert(3, "compound", [None if w < 8 else f"c{w % 3}" for w in place % wells])
    table.loc[rng.random(count) < 0.05, "f3"] = np.nan
    table.loc[(table["plate"] == "P1") & (table["well"] == "B02"), "f4"] = np.inf
    return table[rng.random(count) < 0.9].sample(frac=1, random_state=seed)


def ordered(table, by):
    table = table.sort_values(by, ignore_index=True)
    return table.where(table.notna(), None).astype({c: float for c in table if c.startswith(("f", "PC"))})


@pytest.fixture(scope="module")
def table(spark):
    return cells()


@pytest.mark.parametrize("partitions", [1, 13])
def test_medians_of_wells_are_the_cores(spark, table, partitions):
    by = ["plate", "well"]
    frame = spark.createDataFrame(table).repartition(partitions)
    found = on_spark.aggregate(frame, by, FEATURES, keep=["control", "compound"], count="cells")
    expected = profiles.aggregate(table, by, FEATURES, keep=["control", "compound"], count="cells")
    pd.testing.assert_frame_equal(ordered(found.toPandas(), by), ordered(expected, by), check_exact=True)
    assert np.isnan(expected.loc[(expected["plate"] == "P1") & (expected["well"] == "B02"), "f4"]).all()


def test_consensus_of_treatments_is_the_cores(spark, table):
    wells = profiles.aggregate(table, ["plate", "well"], FEATURES, keep=["compound"])
    found = on_spark.aggregate(spark.createDataFrame(wells).repartition(4), ["compound"], FEATURES, "modz", count="wells")
    expected = profiles.aggregate(wells, ["compound"], FEATURES, "modz", count="wells")
    found, expected = ordered(found.toPandas(), ["compound"]), ordered(expected, ["compound"])
    assert found["compound"].tolist() == ["c0", "c1", "c2", None]
    pd.testing.assert_frame_equal(found, expected, rtol=1e-9)


def broken(table):
    """Wells of five plates: one without controls, one whose features depend on each other; features that not all can normalise."""
    wells = profiles.aggregate(table, ["plate", "well"], FEATURES, keep=["control", "compound"])
    none = wells[wells["plate"] == "P0"].assign(plate="P8", control=None)
    sums = wells[wells["plate"] == "P0"].assign(plate="P9")
    sums["f1"] = sums["f0"] + sums["f2"]
    wells = pd.concat([wells, none, sums], ignore_index=True)
    wells["flat"] = np.where(wells["plate"] == "P1", 0.1, wells["f2"] ** 2)
    wells["count"] = np.arange(len(wells)) * 7 % 31
    wells.loc[wells["plate"] == "P9", "f4"] = np.nan
    return wells, [*FEATURES, "flat", "count"]


@pytest.mark.parametrize(
    "method, partitions", [("standardize", 1), ("mad_robustize", 1), ("mad_robustize", 7), ("spherize", 1), ("spherize", 5)]
)
def test_normalising_is_the_cores_and_says_the_same(spark, table, method, partitions):
    wells, features = broken(table)
    found = on_spark.normalize(spark.createDataFrame(wells).repartition(partitions), features, method)
    expected = profiles.normalize(wells, features, method)
    assert (found.features, found.dropped, found.missing) == (expected.features, expected.dropped, expected.missing)
    assert list(found.dropped) == list(expected.dropped) and "flat" in found.dropped
    assert found.refused == expected.refused and [r.uri for r in found.refused] == ["P8", "P9"][: 1 + (method == "spherize")]
    by = ["plate", "well"]
    pd.testing.assert_frame_equal(
        ordered(found.frame.toPandas(), by), ordered(expected.table, by), check_dtype=False, rtol=1e-9, atol=1e-9
    )


def test_a_table_that_no_feature_is_left_of_keeps_its_wells(spark, table):
    wells, _ = broken(table)
    found = on_spark.normalize(spark.createDataFrame(wells), ["flat"], "standardize")
    expected = profiles.normalize(wells, ["flat"], "standardize")
    assert found.features == expected.features == [] and found.dropped == expected.dropped
    assert sorted(found.frame.toPandas()["well"]) == sorted(expected.table["well"])


def test_wrong_arguments_are_said_at_once_and_rows_without_a_plate_too(spark, table):
    frame = spark.createDataFrame(table)
    for arguments, message in (
        ((["plate"], ["zz"]), "no column 'zz'"),
        ((["plate"], ["well"]), "'well' holds object"),
        ((["plate"], FEATURES, "mean"), "wanted median or modz"),
    ):
        with pytest.raises(InputError, match=message):
            on_spark.aggregate(frame, *arguments)
    with pytest.raises(InputError, match="wanted one of"):
        on_spark.normalize(frame, FEATURES, "zscore")
    nameless = frame.withColumn("plate", F.when(F.col("well") != "A01", F.col("plate")))
    with pytest.raises(InputError, match=f"{(table['well'] == 'A01').sum()} rows have no plate"):
        on_spark.normalize(nameless, FEATURES, "standardize")


def test_metadata_that_varies_within_a_group_fails_the_job(spark, table):
    found = on_spark.aggregate(spark.createDataFrame(table), ["plate"], FEATURES, keep=["well"])
    with pytest.raises(Exception, match="'well' says more than one thing"):
        found.collect()


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_groups_are_whole_however_batches_cut_them(size):
    keys = pd.DataFrame({"a": ["x"] * 5 + ["y"] + [None] * 4, "b": [1.0, 1, 1, 2, 2, 2, 2, np.nan, np.nan, np.nan], "n": range(10)})
    batches = [keys[n : n + size] for n in range(0, 10, size)]
    found = [part for part in on_spark._whole_groups(iter([keys[:0], *batches, keys[:0]]), ["a", "b"])]
    assert [n for part in found for n in part["n"]] == list(range(10))
    groups = [set(map(str, part[["a", "b"]].itertuples(index=False, name=None))) for part in found]
    assert sum(map(len, groups)) == len(set().union(*groups)) == 5, "no group is in two parts"
    assert list(on_spark._whole_groups(iter([]), ["a"])) == []
