import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sparkmed.hcs import quality
from sparkmed.rejection import InputError

FIGURES = ["z_prime", "robust_z_prime", "ssmd", "robust_ssmd", "v_factor", "signal_window"]
POSITIVE = np.array([99.0, 100, 101, 104])
NEGATIVE = np.array([8.0, 10, 12, 13, 20])


def test_figures_are_their_formulas():
    mp, mn, sp, sn = POSITIVE.mean(), NEGATIVE.mean(), POSITIVE.std(ddof=1), NEGATIVE.std(ddof=1)
    assert quality.z_prime(POSITIVE, NEGATIVE) == pytest.approx(1 - 3 * (sp + sn) / (mp - mn))
    assert quality.ssmd(POSITIVE, NEGATIVE) == pytest.approx((mp - mn) / np.sqrt(sp**2 + sn**2))
    assert quality.ssmd(NEGATIVE, POSITIVE) == pytest.approx(-quality.ssmd(POSITIVE, NEGATIVE))
    assert quality.signal_window(POSITIVE, NEGATIVE) == pytest.approx((mp - mn - 3 * (sp + sn)) / sp)
    assert quality.signal_window(NEGATIVE, POSITIVE) == pytest.approx((mp - mn - 3 * (sp + sn)) / sp), "the higher mean's"
    rp, rn = (stats.median_abs_deviation(v) * 1.4826 for v in (POSITIVE, NEGATIVE))
    assert quality.robust_z_prime(POSITIVE, NEGATIVE) == pytest.approx(1 - 3 * (rp + rn) / (100.5 - 12))
    assert quality.robust_ssmd(POSITIVE, NEGATIVE) == pytest.approx((100.5 - 12) / np.hypot(rp, rn))
    assert quality.v_factor(POSITIVE, NEGATIVE) == pytest.approx(quality.z_prime(POSITIVE, NEGATIVE))
    doses = [np.array([50.0, 52]), np.array([70.0, 70, 76]), np.array([1.0]), np.array([5.0, 5])]
    spread = np.mean([sp, sn, doses[0].std(ddof=1), doses[1].std(ddof=1)])
    assert quality.v_factor(POSITIVE, NEGATIVE, doses) == pytest.approx(1 - 6 * spread / (mp - mn))


@pytest.mark.parametrize(
    "positive, negative",
    [
        ([5.0, 5, 5], [1.0, 2, 3]),
        ([1.0, 2, 3], [0.1, 0.1, 0.1]),  # their mean is not quite 0.1
        ([0.3] * 6, [0.1] * 7),
        ([5.0], [1.0, 2, 3]),
        ([], [1.0, 2, 3]),
        ([5.0, np.nan], [1.0, 2, 3]),
        ([1.0, 2, 3], [3.0, 1, 2]),
        ([np.nan, np.nan], [np.nan]),
        ([np.inf, 5.0, -np.inf], [1.0, 2, 3]),
    ],
)
def test_what_is_not_defined_is_nan_and_never_one(positive, negative):
    for figure in FIGURES:
        assert np.isnan(getattr(quality, figure)(np.array(positive), np.array(negative))), figure


@given(st.integers(0, 1000), st.integers(2, 9), st.integers(2, 9), st.sampled_from(FIGURES))
def test_features_are_told_one_by_one_and_missing_wells_are_no_wells(seed, p, n, figure):
    rng = np.random.default_rng(seed)
    positive, negative = rng.normal(5, 1, (p + 2, 3)), rng.normal(0, 1, (n + 1, 3))
    positive[rng.integers(0, p + 2), 1] = negative[0, 2] = np.nan
    found = getattr(quality, figure)(positive, negative)
    for k in range(3):
        a, b = (v[~np.isnan(v[:, k]), k] for v in (positive, negative))
        np.testing.assert_allclose(found[k], getattr(quality, figure)(a, b), rtol=1e-9)


def plates():
    control = (["positive"] * 4 + ["negative"] * 5 + [None] * 5) * 2
    table = pd.DataFrame({"plate": ["P2"] * 14 + ["P1"] * 14, "control": control})
    table["x"] = np.concatenate([POSITIVE, NEGATIVE, [50, 52, 70, 76, 3], POSITIVE, NEGATIVE, [50, 52, 70, 76, 3]])
    table["flat"] = np.where(table["control"] == "negative", 7.0, table["x"])
    table["compound"] = ([None] * 9 + ["a", "a", "a", "a", "b"]) * 2
    table["dose"] = ([0.0] * 9 + [1, 1, 2, 2, 1]) * 2
    table.loc[14:16, "x"] = np.nan
    return table


def test_a_row_per_plate_and_feature_says_why_a_figure_is_missing():
    found = quality.plate_quality(plates(), ["x", "flat"], replicates=["compound", "dose"])
    assert found[["plate", "feature", "positives", "negatives", "reason"]].values.tolist() == [
        ["P1", "x", 1, 5, "fewer than 2 positive control wells"],
        ["P1", "flat", 4, 5, "all negative controls are equal"],
        ["P2", "x", 4, 5, None],
        ["P2", "flat", 4, 5, "all negative controls are equal"],
    ]
    assert found.loc[[0, 1, 3], FIGURES].isna().all(axis=None) and found.loc[2, FIGURES].notna().all()
    assert found.loc[2, "z_prime"] == quality.z_prime(POSITIVE, NEGATIVE)
    assert found.loc[2, "v_factor"] == quality.v_factor(POSITIVE, NEGATIVE, [np.array([50.0, 52]), np.array([70.0, 76])])


def test_a_robust_figure_may_be_missing_where_the_other_is_not():
    table = plates().query("plate == 'P2'").assign(y=[9.0, 9, 9, 10, 1, 2, 3, 4, 5, 0, 0, 0, 0, 0])
    found = quality.plate_quality(table, ["y"]).iloc[0]
    assert found["z_prime"] < 1 and np.isnan(found["robust_z_prime"])
    assert found["reason"] == "more than half of the positive controls are equal"


def test_no_plates_give_no_rows():
    assert quality.plate_quality(plates()[:0], ["x"]).empty and quality.edge_effects(wells((4, 6))[:0], ["v"], (4, 6)).empty


def wells(shape, seed=0, plate="P1"):
    rows, columns = (n.ravel() + 1 for n in np.indices(shape))
    rng = np.random.default_rng(seed)
    return pd.DataFrame({"plate": plate, "row": rows, "column": columns, "v": rng.normal(10, 1, len(rows))})


def ring(table, shape):
    return table["row"].isin([1, shape[0]]) | table["column"].isin([1, shape[1]])


def test_an_edge_effect_has_its_size_and_its_sign():
    shape = (8, 12)
    table = pd.concat([wells(shape), wells(shape, 1, "P2")], ignore_index=True)
    edge = ring(table, shape) & (table["plate"] == "P2")
    table["shifted"] = table["v"] - 100 * edge
    table["level"] = 4.0
    found = quality.edge_effects(table, ["v", "shifted", "level"], shape).set_index(["plate", "feature"])
    assert found.loc[("P2", "shifted"), "effect"] == -1 and found.loc[("P2", "shifted"), "p"] < 1e-10
    assert abs(found.loc[("P1", "shifted"), "effect"]) < 0.3 and found.loc[("P1", "v"), "p"] > 0.01
    assert np.isnan(found.loc[("P1", "level"), ["effect", "p"]].astype(float)).all()
    assert found.loc[("P1", "v"), ["ring", "inside"]].tolist() == [36, 60]
    outer, inner = (table.loc[(table["plate"] == "P1") & (ring(table, shape) == side), "v"] for side in (True, False))
    above = np.sign(outer.to_numpy()[:, None] - inner.to_numpy()).mean()
    assert found.loc[("P1", "v"), "effect"] == pytest.approx(above)


def test_an_edge_effect_of_few_wells_is_not_defined():
    table = wells((3, 3))
    found = quality.edge_effects(table, ["v"], (3, 3)).iloc[0]
    assert (found["ring"], found["inside"]) == (8, 1) and np.isnan(found["effect"]) and np.isnan(found["p"])


def test_a_heatmap_lies_as_the_plate_does():
    table = wells((2, 3)).assign(v=np.arange(6.0))
    found = quality.heatmap(table.drop(index=4).sample(frac=1, random_state=0), ["v"], (2, 3))
    np.testing.assert_array_equal(found, [[[0, 1, 2], [3, np.nan, 5]]])
    with pytest.raises(InputError, match="2 rows at row 1, column 2"):
        quality.heatmap(pd.concat([table, table[1:2]]), ["v"], (2, 3))
    with pytest.raises(InputError, match="row 2, column 3 lies outside a plate of 2 rows and 2"):
        quality.heatmap(table[5:], ["v"], (2, 2))
    with pytest.raises(InputError, match="plate P1: 2 rows at row 1"):
        quality.b_scores(pd.concat([table, table[1:2]]), ["v"], (2, 3))


def test_median_polish_of_an_additive_table_leaves_nothing():
    plate = np.add.outer([0.0, 5, -3, 8], [1.0, 2, 30, -4, 7])
    np.testing.assert_allclose(quality.median_polish(plate), 0, atol=1e-12)
    plate[2, 3] += 40
    expected = np.zeros((4, 5))
    expected[2, 3] = 40
    np.testing.assert_allclose(quality.median_polish(plate), expected, atol=1e-12)
    plate[0, 0] = np.nan
    expected[0, 0] = np.nan
    np.testing.assert_allclose(quality.median_polish(plate), expected, atol=1e-12)


def test_median_polish_of_tukeys_example():
    """Deaths in sport parachuting (Tukey 1977, as in R's help of medpolish, which says 19 of the sum too)."""
    deaths = np.array([[14, 15, 14], [7, 4, 7], [8, 2, 10], [15, 9, 10], [0, 2, 0]])
    found = quality.median_polish(deaths)
    np.testing.assert_array_equal(found, [[0, 2, 0], [0, -2, 0], [0, -5, 2], [5, 0, 0], [0, 3, 0]])
    assert np.abs(found).sum() == 19


@given(st.integers(0, 100))
def test_b_scores_do_not_know_row_and_column_effects(seed):
    shape = (8, 12)
    rng = np.random.default_rng(seed)
    table = wells(shape, seed)
    shifted = table["v"] + rng.normal(0, 50, 8)[table["row"] - 1] + rng.normal(0, 50, 12)[table["column"] - 1]
    plain = quality.b_scores(table, ["v"], shape)["v"]
    found = quality.b_scores(table.assign(v=shifted), ["v"], shape)["v"]
    assert np.corrcoef(plain, found)[0, 1] > 0.98
    middle = np.median(np.abs(found - np.median(found)))
    assert middle * 1.4826 == pytest.approx(1)


def test_b_scores_are_undefined_without_spread_and_of_missing_wells():
    table = pd.concat([wells((4, 6)), wells((4, 6), plate="P2")], ignore_index=True)
    table["additive"] = table["row"] * 0.1 + table["column"] * 1.3
    table.loc[5, "v"] = np.nan
    found = quality.b_scores(table, ["v", "additive"], (4, 6))
    assert found["additive"].isna().all() and found["v"].isna().to_numpy().nonzero()[0].tolist() == [5]
    assert found.columns.tolist() == table.columns.tolist() and found["row"].equals(table["row"])
