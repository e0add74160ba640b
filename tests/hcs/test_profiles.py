import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkmed.hcs import profiles
from sparkmed.rejection import InputError

FEATURES = ["a", "b", "c", "d"]
METHODS = ["standardize", "robustize", "mad_robustize", "spherize"]
WHITENINGS = ["ZCA", "PCA", "ZCA-cor", "PCA-cor"]


def screen(plates=2, wells=24, features=FEATURES):
    """A table whose numbers need no random generator: eight controls, then four compounds, on each plate."""
    n = np.arange(plates * wells)
    place = n % wells
    values = {f: np.sin(n * (k + 1.37) + k) * (k + 1) + np.cos(n * n * 0.11 + k) + 3 * k for k, f in enumerate(features)}
    meta = {
        "plate": np.array([f"P{p + 1}" for p in range(plates)])[n // wells],
        "well": [f"{'ABCD'[p % 4]}{p // 4 + 1:02d}" for p in place],
        "control": np.where(place < 8, "negative", None),
        "compound": np.where(place < 8, "dmso", np.array(["c0", "c1", "c2", "c3"])[place % 4]),
    }
    return pd.DataFrame(meta | values)


def random_table(seed, wells=60, width=12, plates=("P1",)):
    rng = np.random.default_rng(seed)
    parts = []
    for plate in plates:
        values = rng.normal(rng.normal(0, 5, width), rng.uniform(0.5, 4, width), (wells, width)) @ rng.normal(0, 1, (width, width))
        part = pd.DataFrame(values, columns=[f"f{n}" for n in range(width)])
        part.insert(0, "control", ["negative"] * (wells // 2) + [None] * (wells - wells // 2))
        part.insert(0, "plate", plate)
        parts.append(part)
    return pd.concat(parts, ignore_index=True), [f"f{n}" for n in range(width)]


def test_median_of_a_well_is_that_of_its_cells():
    table = pd.DataFrame({"well": list("BABAB"), "x": [1.0, 2, 5, 4, 3], "y": [1, np.nan, 2, 7, np.inf], "cell": list("qwert")})
    found = profiles.aggregate(table, ["well"], ["x", "y"], count="cells")
    expected = pd.DataFrame({"well": ["A", "B"], "cells": [2, 3], "x": [3.0, 3.0], "y": [7.0, 1.5]})
    pd.testing.assert_frame_equal(found, expected)


def test_what_is_missing_in_all_cells_stays_missing_and_a_group_without_a_name_is_one():
    table = pd.DataFrame({"well": ["A", "A", None], "x": [np.nan, np.inf, 1.0]})
    found = profiles.aggregate(table, ["well"], ["x"])
    assert found["well"].isna().tolist() == [False, True]
    assert np.isnan(found["x"][0]) and found["x"][1] == 1


@pytest.mark.parametrize("method", ["median", "modz"])
def test_metadata_is_kept_where_it_says_one_thing(method):
    table = screen()
    found = profiles.aggregate(table, ["plate", "compound"], FEATURES, method, keep=["control"], count="wells")
    assert found.columns.tolist() == ["plate", "compound", "control", "wells", *FEATURES]
    assert found["wells"].tolist() == [4, 4, 4, 4, 8] * 2
    assert found["control"].where(found["control"].notna(), None).tolist() == [None, None, None, None, "negative"] * 2
    with pytest.raises(InputError, match="'compound' says more than one thing in 1 groups, the first is P2"):
        one = table[(table["plate"] == "P2") | (table["compound"] == "c1")]
        profiles.aggregate(one, ["plate"], FEATURES, method, keep=["compound"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((["nowhere"], ["a"]), "no column 'nowhere'"),
        ((["plate"], ["zz"]), "no column 'zz'"),
        ((["plate"], []), "one feature or more"),
        (([], ["a"]), "one column to group by"),
        ((["plate"], ["a", "b", "a"]), "'a' is named twice"),
        ((["plate"], ["plate"]), "'plate' is named twice"),
        ((["plate"], ["well"]), "'well' holds object, wanted numbers"),
        ((["plate"], ["a"], "mean"), "wanted median or modz"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        profiles.aggregate(screen(), *arguments)


def test_modz_gives_the_replicate_that_agrees_with_nobody_the_least_weight():
    profile = np.linspace(-2, 2, 50)
    off = profile[::-1].copy()
    found = profiles.modz(np.stack([profile, profile, profile, off]))
    share = 0.01 / (0.01 + 3 * (2 / 3))  # what is left after the floor, of three others' mean of 1, 1 and 0
    np.testing.assert_allclose(found, profile * (1 - 2 * share), atol=2e-4 * 2)


def test_modz_of_one_and_of_constant_profiles():
    assert profiles.modz(np.array([[3.0, np.nan]]))[0] == 3
    np.testing.assert_allclose(profiles.modz(np.array([[1.0, 1, 1], [3, 3, 3]])), 2)


def test_modz_leaves_out_what_is_missing_and_the_others_make_up_for_it():
    values = np.array([[1.0, 2, 3, 4], [1, 2, 3, np.nan], [1, 2, 3, 4]])
    np.testing.assert_allclose(profiles.modz(values), [1, 2, 3, 4], atol=1e-3)
    assert np.isnan(profiles.modz(np.array([[1.0, 2, np.nan], [1, 3, np.nan]]))[2])


@pytest.mark.parametrize("count", [3, 700, 30_000])
def test_modz_keeps_the_scale_however_many_replicates(count):
    """Rounded to four digits, 30000 equal weights are 0."""
    values = np.tile(np.array([1.0, 2.0]), (count, 1))
    correlated = profiles.modz(values) if count < 2000 else profiles.modz(values[:2000])
    np.testing.assert_allclose(correlated, [1, 2], rtol=0.01)


@given(st.integers(0, 1000), st.sampled_from(METHODS), st.sampled_from(WHITENINGS))
def test_normalising_does_not_depend_on_the_order_of_rows(seed, method, whitening):
    table, features = random_table(seed, 40, 5, ("P1", "P2"))
    mixed = table.sample(frac=1, random_state=seed)
    one = profiles.normalize(table, features, method, whitening=whitening)
    two = profiles.normalize(mixed, features, method, whitening=whitening)
    a, b = one.table[one.features], two.table.sort_index()[two.features]
    if whitening.startswith("PCA"):
        a, b = a.abs(), b.abs()  # the sign of an axis means nothing
    np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("method", METHODS[:3])
def test_scale_and_shift_of_a_plate_are_gone(method):
    table, features = random_table(0, 40, 5, ("P1", "P2"))
    once = profiles.normalize(table, features, method).table
    on = table["plate"] == "P2"
    table.loc[on, features] = table.loc[on, features] * 7 - 1000
    np.testing.assert_allclose(profiles.normalize(table, features, method).table[features], once[features], rtol=1e-6)


@pytest.mark.parametrize("whitening", WHITENINGS)
def test_spherized_controls_are_uncorrelated(whitening):
    table, features = random_table(3)
    found = profiles.normalize(table, features, "spherize", whitening=whitening, epsilon=1e-12)
    controls = found.table.loc[found.table["control"] == "negative", found.features]
    np.testing.assert_allclose(np.cov(controls.T), np.eye(12), atol=1e-5)
    assert found.features == ([f"PC{n}" for n in range(1, 13)] if whitening.startswith("PCA") else features)


def test_epsilon_tames_directions_that_hardly_vary():
    table, features = random_table(3)
    wild = profiles.normalize(table, features, "spherize").table[features].to_numpy()
    tame = profiles.normalize(table, features, "spherize", epsilon=10.0).table[features].to_numpy()
    assert np.abs(tame).max() < np.abs(wild).max() / 2


def test_constant_features_are_dropped_from_all_plates_and_named():
    table = screen()
    table["flat"] = 0.1
    table["odd"] = np.where(table["plate"] == "P2", 0.3, table["a"])
    table["mostly"] = np.where(np.arange(len(table)) % 24 < 6, 1.0, table["b"])
    table.loc[table["plate"] == "P1", "gone"] = 5.0 + table["c"]
    found = profiles.normalize(table, [*FEATURES, "flat", "odd", "mostly", "gone"], "mad_robustize")
    assert found.dropped == {
        "flat": "is constant in the controls of plate P1 and 1 more",
        "odd": "is constant in the controls of plate P2",
        "mostly": "has the same value in most controls of plate P1 and 1 more",
        "gone": "is missing in all controls of plate P2",
    }
    assert found.features == FEATURES and found.table.columns.tolist() == ["plate", "well", "control", "compound", *FEATURES]
    assert profiles.normalize(table, ["mostly", "a"], "standardize").features == ["mostly", "a"], "its deviation is not 0"


def test_missing_values_stay_missing_and_are_counted_but_cannot_be_spherized():
    table = screen()
    table.loc[[3, 30], "b"] = [np.nan, np.inf]
    found = profiles.normalize(table, FEATURES, "robustize")
    assert found.missing == {"b": 2} and np.isnan(found.table["b"][3]) and np.isnan(found.table["b"][30])
    found = profiles.normalize(table, FEATURES, "spherize")
    assert found.dropped == {"b": "is missing in wells of plate P1 and 1 more"} and found.missing == {}


def test_a_plate_without_controls_is_refused_by_name_and_the_others_go_on():
    table = pd.concat([screen(), screen().replace({"P1": "P8", "P2": "P9"})])
    table.loc[table["plate"] == "P8", "control"] = None
    table.loc[(table["plate"] == "P9") & (table["well"] != "A01"), "control"] = "positive"
    found = profiles.normalize(table, FEATURES, "standardize")
    assert [(r.uri, r.reason, r.message) for r in found.refused] == [
        ("P8", "NO_CONTROLS", "plate P8 has no negative control wells, normalising takes 2 or more"),
        ("P9", "NO_CONTROLS", "plate P9 has 1 negative control wells, normalising takes 2 or more"),
    ]
    assert set(found.table["plate"]) == {"P1", "P2"} and not found.dropped


def test_no_plate_with_controls_gives_no_rows_and_no_numbers():
    found = profiles.normalize(screen().assign(control=None), FEATURES, "spherize")
    assert not len(found.table) and len(found.refused) == 2


def test_features_that_are_sums_of_others_cannot_be_spherized():
    table = screen()
    table["e"] = np.where(table["plate"] == "P1", table["a"] + table["b"], np.sin(table.index * 9.0))
    found = profiles.normalize(table, [*FEATURES, "e"], "spherize")
    assert [(r.uri, r.reason) for r in found.refused] == [("P1", "DEPENDENT_FEATURES")]
    assert "rank 4" in found.refused[0].message and set(found.table["plate"]) == {"P2"}


def test_wrong_methods_and_rows_without_a_plate_are_refused():
    for arguments in ({"method": "zscore"}, {"method": "spherize", "whitening": "zca"}):
        with pytest.raises(InputError, match="wanted one of"):
            profiles.normalize(screen(), FEATURES, **arguments)
    with pytest.raises(InputError, match="epsilon -1"):
        profiles.normalize(screen(), FEATURES, "spherize", epsilon=-1)
    with pytest.raises(InputError, match="1 rows have no plate"):
        profiles.normalize(screen().replace({"well": {"zz": "A"}}).assign(plate=[None] + ["P"] * 47), FEATURES, "robustize")


@given(st.integers(0, 10_000), st.integers(1, 30), st.sampled_from([0.0, 0.3, 1.0]))
def test_quantiles_are_numpys(seed, count, missing):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(count, 4)).round(1)
    values[rng.random(values.shape) < missing] = np.nan
    found = profiles.quantiles(values, [0, 0.25, 0.5, 0.9])
    for n in range(4):
        there = values[~np.isnan(values[:, n]), n]
        expected = np.quantile(there, [0, 0.25, 0.5, 0.9]) if len(there) else np.full(4, np.nan)
        np.testing.assert_allclose(found[:, n], expected, atol=1e-12)


# what pycytominer 1.7.1 gives for screen(): wells 0, 9 and 20 of plate P1; consensus of the five compounds
GOLDEN = {
    "standardize": [
        [0.6389060304, 1.487587053, 1.334046847, -0.1639379065],
        [-1.705713281, -1.063042578, 1.321673001, -1.201357015],
        [1.493342705, -0.9542498467, 0.2259740921, 0.5962097011],
    ],
    "robustize": [
        [0.4673051526, 1.084591684, 1.093701327, -0.01746830466],
        [-1.060831101, -0.6508374492, 1.082947215, -0.5840288359],
        [1.024195413, -0.5768156963, 0.1306749664, 0.3976673229],
    ],
    "mad_robustize": [
        [0.6257803702, 1.520106653, 1.120283752, -0.02301032345],
        [-1.42058626, -0.9121795334, 1.10926826, -0.7693186419],
        [1.371526467, -0.8084345382, 0.1338510231, 0.5238318144],
    ],
    "ZCA": [
        [0.3997467061, 1.580259477, 1.302075864, 0.2353059438],
        [-1.490817181, -1.446641111, 1.09647882, -1.438675067],
        [1.621460247, -0.958154246, 0.2416429796, 0.4343424771],
    ],
    "PCA": [
        [0.4642051206, 1.013256063, -1.775663762, 0.1123914971],
        [0.8433323055, 1.352649188, 2.058892093, 0.8985834797],
        [-0.6139657744, 0.3176817385, 0.1588761095, -1.814144518],
    ],
    "ZCA-cor": [
        [0.4380006941, 1.537651153, 1.303356965, 0.3909366101],
        [-1.511082695, -1.2740814, 1.105640497, -1.567884172],
        [1.579585962, -1.045144371, 0.2421435055, 0.3849486252],
    ],
    "PCA-cor": [
        [-1.036225555, -0.8357285729, 0.7053795006, 1.462197182],
        [0.4021345188, -1.966844898, -1.088632832, -1.540144],
        [0.2812857407, 0.375128203, 1.742338871, -0.7339277284],
    ],
    "modz": [
        [-0.3397990192, 2.987427408, 4.341318662, 8.884492805],
        [-0.1810803931, 3.043873166, 7.317674243, 9.299367159],
        [0.2163352308, 2.833177891, 4.634626331, 9.189894312],
        [0.2325784648, 2.753424827, 6.943969224, 8.946728544],
        [0.3872737503, 3.368356459, 6.317848067, 9.18884771],
    ],
}


def signless(values, method):
    """The sign of a principal axis is a matter of the linear algebra library."""
    return np.abs(values) if method.startswith("PCA") else values


@pytest.mark.parametrize("method", [*METHODS[:3], *WHITENINGS])
def test_numbers_are_those_of_pycytominer(method):
    whitening = {"whitening": method} if method in WHITENINGS else {}
    found = profiles.normalize(screen(), FEATURES, "spherize" if whitening else method, **whitening)
    values = found.table[found.features].to_numpy()[[0, 9, 20]]
    np.testing.assert_allclose(signless(values, method), signless(np.array(GOLDEN[method]), method), rtol=1e-6, atol=1e-6)


def test_modz_is_that_of_pycytominer():
    found = profiles.aggregate(screen(), ["compound"], FEATURES, "modz")
    np.testing.assert_allclose(found[FEATURES], GOLDEN["modz"], atol=1e-6)


@pytest.mark.parametrize("wells, width", [(60, 12), (30, 40)])
@pytest.mark.parametrize("method", [*METHODS[:3], *WHITENINGS])
def test_pycytominer_normalises_a_plate_to_the_same_numbers(method, wells, width):
    peer = pytest.importorskip("pycytominer", reason="pycytominer is not installed")
    table, features = random_table(7, wells, width)
    whitening = {"whitening": method} if method in WHITENINGS else {}
    ours = profiles.normalize(table, features, "spherize" if whitening else method, **whitening)
    theirs = peer.normalize(
        table,
        features,
        meta_features=["plate", "control"],
        samples="control == 'negative'",
        method="spherize" if whitening else method,
        **({"spherize_method": method} if whitening else {}),
    )
    defined = min(width, wells // 2 - 1) if method.startswith("PCA") else width  # axes without controls along them are anybody's
    a, b = ours.table[ours.features].to_numpy()[:, :defined], theirs[ours.features].to_numpy()[:, :defined]
    np.testing.assert_allclose(signless(a, method), signless(b, method), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("operation", ["median", "modz"])
def test_pycytominer_aggregates_to_the_same_numbers(operation):
    peer = pytest.importorskip("pycytominer", reason="pycytominer is not installed")
    rng = np.random.default_rng(1)
    table = pd.DataFrame(rng.normal(size=(300, 30)), columns=[f"f{n}" for n in range(30)])
    table[table.columns[3]] = table[table.columns[3]].round()  # ties
    features = list(table.columns)
    table.insert(0, "compound", [f"c{n}" for n in np.minimum(rng.integers(0, 60, 300), 40)])
    ours = profiles.aggregate(table, ["compound"], features, operation)
    theirs = peer.consensus(table, ["compound"], operation, features).sort_values("compound")
    assert ours["compound"].tolist() == theirs["compound"].tolist() and (ours.shape[0] > 30)
    np.testing.assert_allclose(ours[features], theirs[features], atol=1e-6)
