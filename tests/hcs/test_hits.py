import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from sparkmed.hcs import hits
from sparkmed.rejection import InputError

DOSES = np.repeat(10.0 ** np.arange(-2, 2.5, 0.5), 3)


def plate(name="P1", controls=20, tested=30, shift=0.0, seed=0):
    rng = np.random.default_rng(seed)
    kinds = ["negative"] * controls + ["positive"] * 4 + [None] * tested
    scores = np.concatenate([rng.normal(0, 1, controls), np.full(4, 9.0), rng.normal(0, 1, tested)]) + shift
    return pd.DataFrame({"plate": name, "control": kinds, "score": scores})


def test_scores_are_told_against_the_controls_of_their_own_plate():
    table = pd.concat([plate(), plate("P2", shift=100, seed=1)], ignore_index=True)
    found = hits.score_wells(table, "score")
    for name in ("P1", "P2"):
        part = found[found["plate"] == name]
        controls = part.loc[part["control"] == "negative", "score"]
        z = (part["score"] - controls.median()) / (1.4826 * stats.median_abs_deviation(controls))
        np.testing.assert_allclose(part["robust_z"], z)
        others = part["control"] != "negative"
        np.testing.assert_allclose(part.loc[others, "p_robust"], 2 * stats.norm.sf(np.abs(z[others])))
        above = (1 + (controls.to_numpy() >= part["score"].to_numpy()[:, None]).sum(axis=1)) / 21
        below = (1 + (controls.to_numpy() <= part["score"].to_numpy()[:, None]).sum(axis=1)) / 21
        np.testing.assert_allclose(part.loc[others, "p_empirical"], np.minimum(1, 2 * np.minimum(above, below))[others])
    assert found.loc[found["control"] == "negative", ["p_robust", "p_empirical"]].isna().all(axis=None)
    positive = found[found["control"] == "positive"]
    assert (positive["p_empirical"] == 2 / 21).all() and (positive["p_robust"] < 1e-6).all()
    assert positive[["q_robust", "q_empirical"]].isna().all(axis=None)
    tested = found["control"].isna()
    np.testing.assert_allclose(found.loc[tested, "q_robust"], hits.fdr(found.loc[tested, "p_robust"].to_numpy()))


def test_one_side_looks_to_one_side():
    table = plate()
    up, down = (hits.score_wells(table, "score", side=side) for side in ("greater", "less"))
    top = table["control"] == "positive"
    assert (up.loc[top, "p_empirical"] == 1 / 21).all() and (down.loc[top, "p_empirical"] == 1).all()
    assert (up.loc[top, "p_robust"] < 1e-9).all() and (down.loc[top, "p_robust"] > 0.999).all()
    with pytest.raises(InputError, match="wanted two-sided, greater or less"):
        hits.score_wells(table, "score", side="both")


def test_without_controls_or_their_spread_there_is_no_number():
    none = hits.score_wells(plate(controls=1), "score")
    assert none[["robust_z", "p_robust", "p_empirical", "q_robust", "q_empirical"]].isna().all(axis=None)
    table = plate()
    table.loc[table["control"] == "negative", "score"] = 0.1
    table.loc[30, "score"] = np.nan
    flat = hits.score_wells(table, "score")
    assert flat["robust_z"].isna().all() and flat["p_empirical"].notna().sum() == 33, "four positive, 29 of 30 tested"


def test_wells_like_the_controls_are_hits_as_seldom_as_the_rate_says():
    found = pd.concat([hits.score_wells(plate(controls=199, tested=300, seed=s), "score") for s in range(10)])
    tested = found[found["control"].isna()]
    assert 0.03 < (tested["p_empirical"] <= 0.05).mean() < 0.07
    assert (tested["q_robust"] < 0.05).mean() < 0.01


@given(st.lists(st.one_of(st.floats(0, 1), st.just(float("nan"))), max_size=30))
def test_false_discovery_rates_are_those_of_scipy(p):
    p = np.array(p)
    found, told = hits.fdr(p), ~np.isnan(p)
    assert np.isnan(found[~told]).all()
    if told.any():
        np.testing.assert_allclose(found[told], stats.false_discovery_control(p[told]), atol=1e-12)


def curve(doses, start=1.0, end=11.0, hill=1.5, ec50=0.7):
    with np.errstate(divide="ignore"):
        return start + (end - start) / (1 + (ec50 / doses) ** hill)


@pytest.mark.parametrize("start, end", [(1, 11), (11, 1), (-3, -2)])
@pytest.mark.parametrize("hill", [0.6, 1.0, 4.0])
@pytest.mark.parametrize("ec50", [0.05, 0.7, 20.0])
def test_a_curve_without_noise_is_found(start, end, hill, ec50):
    found = hits.dose_response(DOSES, curve(DOSES, start, end, hill, ec50))
    assert found.identified and found.reason is None
    np.testing.assert_allclose([found.ec50, found.hill], [ec50, hill], rtol=1e-4)
    np.testing.assert_allclose([found.start, found.end], [start, end], atol=1e-3)
    assert found.r2 == pytest.approx(1)


def test_wells_without_the_compound_hold_the_start():
    doses = np.concatenate([np.zeros(6), [0.3, 1, 3, 10, 30]])
    found = hits.dose_response(doses, curve(doses, ec50=1.0))
    assert found.ec50 == pytest.approx(1, rel=1e-3) and found.at(np.array([0.0]))[0] == found.start


def test_the_interval_holds_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = {"ec50": 0, "hill": 0, "start": 0, "end": 0}
    truth = {"ec50": 0.7, "hill": 1.5, "start": 1.0, "end": 11.0}
    count = 0
    for _ in range(120):
        found = hits.dose_response(DOSES, curve(DOSES) + rng.normal(0, 1.0, len(DOSES)))
        count += found.identified
        for key, value in truth.items():
            low, high = getattr(found, f"{key}_interval")
            held[key] += low <= value <= high
    assert count == 120
    assert all(0.9 < h / 120 < 1 for h in held.values()), held


@pytest.mark.parametrize("noise", [1e-3, 0.1, 1.0])
def test_least_squares_and_errors_are_those_of_curve_fit(noise):
    responses = curve(DOSES) + np.random.default_rng(3).normal(0, noise, len(DOSES))
    found = hits.dose_response(DOSES, responses)

    def logistic(d, start, end, hill, log):
        return curve(d, start, end, hill, 10**log)

    theta, covariance = optimize.curve_fit(logistic, DOSES, responses, p0=[1, 11, 1.5, np.log10(0.7)])
    np.testing.assert_allclose([found.start, found.end, found.hill, np.log10(found.ec50)], theta, rtol=1e-4)
    half = stats.t.ppf(0.975, len(DOSES) - 4) * np.sqrt(np.diag(covariance))
    np.testing.assert_allclose(found.end_interval, theta[1] + half[1] * np.array([-1, 1]), rtol=1e-3)
    # the profile's interval is the linear one where noise is small, and near it elsewhere
    near = 0.02 if noise < 0.01 else 0.25
    np.testing.assert_allclose(np.log10(found.ec50_interval) - theta[3], half[3] * np.array([-1, 1]), rtol=near)
    np.testing.assert_allclose(np.array(found.hill_interval) - theta[2], half[2] * np.array([-1, 1]), rtol=max(near, 0.3 * noise))


def nothing(found):
    numbers = [v for k, v in vars(found).items() if k not in ("identified", "reason", "wells", "doses", "flat_p")]
    return not found.identified and np.isnan(np.concatenate([np.ravel(v) for v in numbers])).all()


@pytest.mark.parametrize(
    "doses, responses, reason",
    [
        (np.repeat([0.1, 1.0, 10.0], 4), curve(np.repeat([0.1, 1.0, 10.0], 4)), "too few doses"),
        (np.array([0.1, 1.0, 10.0, 100.0]), np.array([0.0, 1, 9, 10]), "too few doses"),
        (np.array([0, 0, 0, 0, 1.0, 10.0]), np.arange(6.0), "too few doses"),
        (np.array([]), np.array([]), "too few doses"),
        (DOSES, np.full(len(DOSES), 0.1), "flat"),
        (DOSES, np.random.default_rng(0).normal(0, 1, len(DOSES)), "flat"),
        (DOSES, curve(DOSES, ec50=1000.0, hill=1.0), "EC50 outside the doses"),
        (DOSES, curve(DOSES, ec50=0.0005, hill=1.0), "EC50 outside the doses"),
        (DOSES, np.where(np.arange(len(DOSES)) < 3, np.nan, np.nan), "too few doses"),
    ],
)
def test_what_the_wells_do_not_tell_is_flagged_and_has_no_number(doses, responses, reason):
    found = hits.dose_response(doses, responses)
    assert found.reason == reason and nothing(found)


def test_an_ec50_whose_interval_has_no_bound_is_flagged():
    """The response still rises at the highest dose, among noise."""
    reasons = []
    for seed in range(20):
        noise = np.random.default_rng(seed).normal(0, 0.7, len(DOSES))
        found = hits.dose_response(DOSES, curve(DOSES, ec50=60.0, hill=1.0) + noise)
        reasons.append(found.reason)
        if found.identified:
            assert np.isfinite(found.ec50_interval).all() and found.ec50 <= DOSES.max()
        else:
            assert nothing(found)
    assert {"EC50 interval unbounded", "EC50 outside the doses"} <= set(reasons)


@settings(max_examples=25)
@given(st.floats(1e-6, 1e6), st.floats(0.01, 1000), st.floats(-1e4, 1e4))
def test_units_of_dose_and_response_do_not_matter(unit, scale, shift):
    responses = curve(DOSES) + np.random.default_rng(5).normal(0, 0.5, len(DOSES))
    one, two = hits.dose_response(DOSES, responses), hits.dose_response(DOSES * unit, responses * scale + shift)
    assert two.identified
    np.testing.assert_allclose(two.ec50 / unit, one.ec50, rtol=1e-3)
    np.testing.assert_allclose(np.array(two.ec50_interval) / unit, one.ec50_interval, rtol=1e-2)
    np.testing.assert_allclose(two.hill, one.hill, rtol=1e-2)


def test_doses_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="0 or more"):
        hits.dose_response(-DOSES, DOSES)
    with pytest.raises(InputError, match="0 or more"):
        hits.dose_response(np.full(27, np.nan), DOSES)
    with pytest.raises(InputError, match="one length"):
        hits.dose_response(DOSES, DOSES[1:])


def test_a_table_of_curves_has_a_row_per_compound():
    rng = np.random.default_rng(0)
    table = pd.concat(
        pd.DataFrame({"compound": name, "concentration": DOSES, "score": curve(DOSES, end=end) + rng.normal(0, 0.3, 27)})
        for name, end in (("b", 1.0), ("a", 9.0))
    )
    found = hits.dose_responses(table, "score")
    assert found["compound"].tolist() == ["a", "b"] and found["reason"].tolist() == [None, "flat"]
    assert found.loc[0, "ec50_low"] < 0.7 < found.loc[0, "ec50_high"] and np.isnan(found.loc[1, "ec50"])
    assert {"start_low", "end_high", "hill_low", "r2", "flat_p"} <= set(found.columns)
    table["concentration"] = table["concentration"].where(table["compound"] == "a", np.nan)
    with pytest.raises(InputError, match="compound b: doses: wanted numbers of 0 or more"):
        hits.dose_responses(table, "score")


def replicates(signal, seed=0, treatments=40, count=4, width=50):
    rng = np.random.default_rng(seed)
    profile = np.repeat(rng.normal(0, signal, (treatments, width)), count, axis=0)
    table = pd.DataFrame(profile + rng.normal(0, 1, profile.shape), columns=[f"f{n}" for n in range(width)])
    table.insert(0, "compound", np.repeat([f"c{n:02d}" for n in range(treatments)], count))
    table.insert(1, "plate", np.tile([f"P{n}" for n in range(count)], treatments))
    return table, [f"f{n}" for n in range(width)]


def test_replicates_agree_where_there_is_a_signal_and_else_as_often_as_chance():
    table, features = replicates(1.0)
    found = hits.reproducibility(table, features, ["compound"])
    assert found.percent == 100 and (found.judged, found.excluded) == (40, 0)
    one = table.loc[table["compound"] == "c07", features].to_numpy()
    expected = np.median(np.corrcoef(one)[np.triu_indices(4, 1)])
    assert found.groups.set_index("compound").loc["c07", "correlation"] == pytest.approx(expected)
    noise = [hits.reproducibility(*replicates(0.0, seed), ["compound"]).percent for seed in range(8)]
    assert 1 < np.mean(noise) < 10, "five percent lie above the 95th percentile"


def test_replicates_that_share_a_plate_only_do_not_count_when_they_must_lie_apart():
    table, features = replicates(0.0, treatments=20)
    plate = np.repeat(np.arange(20), 4) % 5
    table["plate"] = plate
    table[features] += np.random.default_rng(9).normal(0, 3, (5, 50))[plate]
    assert hits.reproducibility(table, features, ["compound"]).percent > 50
    found = hits.reproducibility(table, features, ["compound"], apart="plate")
    assert np.isnan(found.percent) and (found.judged, found.excluded) == (0, 20)
    assert found.groups["replicating"].isna().all()


def test_a_single_profile_is_excluded_and_counted():
    table, features = replicates(1.0)
    found = hits.reproducibility(table[3:], features, ["compound"])
    assert (found.judged, found.excluded) == (39, 1)
    row = found.groups.iloc[0]
    assert row["replicates"] == 1 and np.isnan(row["correlation"]) and row["replicating"] is pd.NA
    empty = hits.reproducibility(table[:0], features, ["compound"])
    assert np.isnan(empty.percent) and not len(empty.groups)
    table.loc[0, "f0"] = np.nan
    with pytest.raises(InputError, match="1 profiles have features that are missing"):
        hits.reproducibility(table, features, ["compound"])
