import itertools

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparkmed.hcs import retrieval
from sparkmed.rejection import InputError


def treatments(signal=4.0, moas=6, compounds=4, doses=2, batches=3, width=20, seed=0):
    """Profiles of compounds whose mechanisms have a direction each; batches in turn."""
    rng = np.random.default_rng(seed)
    centre = rng.normal(0, 1, (moas, width))
    rows = list(itertools.product(range(moas), range(compounds), range(doses)))
    table = pd.DataFrame(
        {
            "moa": [f"m{m}" for m, _, _ in rows],
            "compound": [f"m{m}c{c}" for m, c, _ in rows],
            "dose": [float(d) for *_, d in rows],
            "batch": [f"b{(c + m) % batches}" for m, c, _ in rows],
            "cells": rng.integers(50, 60, len(rows)),
        }
    )
    values = signal * centre[[m for m, *_ in rows]] + rng.normal(0, 1, (len(rows), width))
    features = [f"f{n}" for n in range(width)]
    return pd.concat([table, pd.DataFrame(values, columns=features)], axis=1), features


def by_hand(table, features, apart):
    """Nearest neighbour by two loops."""
    values = table[features].to_numpy()
    right = []
    for i in range(len(table)):
        allowed = [j for j in range(len(table)) if j != i and all(table[c].iloc[i] != table[c].iloc[j] for c in apart)]
        if not any(table["moa"].iloc[j] == table["moa"].iloc[i] for j in allowed):
            continue
        cosine = [values[i] @ values[j] / np.linalg.norm(values[i]) / np.linalg.norm(values[j]) for j in allowed]
        right.append(table["moa"].iloc[allowed[int(np.argmax(cosine))]] == table["moa"].iloc[i])
    return np.mean(right), len(right)


@pytest.mark.parametrize("signal", [0.0, 0.5, 4.0])
def test_neighbours_are_those_of_two_loops(signal):
    table, features = treatments(signal)
    found = retrieval.moa_matching(table, features, "cells")
    for accuracy, apart in ((found.nsc, ["compound"]), (found.nscb, ["compound", "batch"])):
        share, judged = by_hand(table, features, apart)
        assert accuracy.accuracy == pytest.approx(share) and accuracy.judged == judged and accuracy.excluded == 48 - judged
    if signal == 4:
        assert found.nsc.accuracy == found.nscb.accuracy == 1 and found.leak is None
        assert found.cells_nsc.accuracy < 0.4 and found.nsc.chance == pytest.approx(6 / 46)


@settings(max_examples=20)
@given(st.integers(0, 50))
def test_matching_does_not_depend_on_the_order_of_rows(seed):
    table, features = treatments(0.7, seed=seed)
    table["cells"] = table["cells"] // 4  # many are equally near
    mixed = table.sample(frac=1, random_state=seed)
    one, two = (retrieval.moa_matching(t, features, "cells") for t in (table, mixed))
    for a, b in zip(vars(one).values(), vars(two).values(), strict=True):
        if isinstance(a, retrieval.Accuracy):
            assert a.accuracy == pytest.approx(b.accuracy) and a.chance == pytest.approx(b.chance)
            pd.testing.assert_frame_equal(a.mechanisms, b.mechanisms)


def test_equally_near_neighbours_share_one_vote():
    table = pd.DataFrame(
        {"moa": list("aab"), "compound": list("xyz"), "batch": "b", "cells": [5, 5, 5], "f": [1.0, 1, 1], "g": 0.5}
    )
    found = retrieval.moa_matching(table, ["f", "g"], "cells")
    np.testing.assert_array_equal(found.nsc.right, [0.5, 0.5, np.nan])
    np.testing.assert_array_equal(found.cells_nsc.right, [0.5, 0.5, np.nan])


def test_a_mechanism_of_one_compound_is_excluded_and_counted_but_misleads_others():
    table, features = treatments()
    single = table["moa"] == "m0"
    table.loc[single, "compound"] = "m0c0"
    found = retrieval.moa_matching(table, features, "cells").nsc
    assert (found.judged, found.excluded, found.accuracy) == (40, 8, 1)
    row = found.mechanisms.iloc[0]
    assert row[["moa", "compounds", "judged", "excluded"]].tolist() == ["m0", 1, 0, 8] and np.isnan(row["accuracy"])
    table.loc[single, features] = table.loc[table["moa"] == "m1", features].to_numpy() + 1e-9
    assert retrieval.moa_matching(table, features, "cells").nsc.accuracy < 1


def test_what_cannot_be_judged_is_nan_and_says_why():
    table, features = treatments(moas=3, compounds=1)
    found = retrieval.moa_matching(table, features, "cells")
    assert np.isnan(found.nsc.accuracy) and np.isnan(found.nsc.chance) and found.nsc.excluded == 6
    assert found.nsc.reason == "no mechanism has profiles that the rule allows to match" and found.leak is None
    table, features = treatments()
    found = retrieval.moa_matching(table.assign(cells=np.nan), features, "cells")
    assert found.nsc.accuracy == 1 and np.isnan(found.cells_nsc.accuracy) and found.cells_nsc.reason == "there is no cell count"
    one = retrieval.moa_matching(table.assign(batch="b"), features, "cells")
    assert np.isnan(one.nscb.accuracy) and one.leak is None
    table.loc[3, features] = 0.0
    found = retrieval.moa_matching(table, features, "cells").nsc
    assert np.isnan(found.right[3]) and found.excluded == 1
    table.loc[5, "moa"] = None
    assert len(retrieval.moa_matching(table, features, "cells").nsc.right) == 47


def test_mechanisms_that_have_a_batch_each_cannot_be_told_from_it():
    table, features = treatments()
    found = retrieval.moa_matching(table.assign(batch=table["moa"]), features, "cells")
    assert np.isnan(found.nscb.accuracy) and found.leak.startswith("each mechanism lies in one batch")


def test_what_was_trained_on_is_refused_by_name():
    table, features = treatments()
    trained = {"compound": ["m1c0", "m1c1", "m2c3", "m5c1", "zz", None]}
    message = "4 of 24 values of compound that the metric is over were trained on: m1c0, m1c1, m2c3 and 1 more"
    for metric in (retrieval.moa_matching, retrieval.consistency):
        with pytest.raises(InputError, match=message):
            metric(table, features, "cells", trained=trained)
        metric(table[table["moa"] == "m3"].assign(moa=["a"] * 4 + ["b"] * 4), features, "cells", trained=trained)
    with pytest.raises(InputError, match="no column 'site'"):
        retrieval.moa_matching(table, features, "cells", trained={"site": []})
    with pytest.raises(InputError, match="1 of 1 values of plate that the metric is over were trained on: 7;"):
        retrieval.require_disjoint([7, 7], {7}, "plate")


def test_features_and_names_that_are_missing_are_refused():
    table, features = treatments()
    table.loc[[1, 2], "f3"] = np.nan
    for metric in (retrieval.moa_matching, retrieval.consistency):
        with pytest.raises(InputError, match="features f3 are missing in 2 profiles"):
            metric(table, features, "cells")
    with pytest.raises(InputError, match="24 profiles have no batch"):
        retrieval.moa_matching(table.assign(batch=["b", None] * 24), ["f0"], "cells")
    with pytest.raises(InputError, match="24 profiles have no compound"):
        retrieval.average_precision(table.assign(compound=["b", None] * 24), ["f0"], ["compound"], against_differ=["moa"])
    with pytest.raises(InputError, match="columns that positives share"):
        retrieval.average_precision(table, ["f0"], [], against_differ=["moa"])


def expected_precision(positive, negative):
    """The mean over all orders of what is equal."""
    items = [(-v, 1) for v in positive] + [(-v, 0) for v in negative]
    found = []
    for order in itertools.permutations(items):
        if [v for v, _ in order] != sorted(v for v, _ in order):
            continue
        seen, total = 0, 0.0
        for place, (_, relevant) in enumerate(order, 1):
            seen += relevant
            total += relevant * seen / place
        found.append(total / len(positive))
    return np.mean(found)


@settings(max_examples=60)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=3), st.lists(st.integers(0, 2), min_size=1, max_size=4))
def test_precision_is_the_expectation_over_orders_of_what_is_equal(positive, negative):
    found = retrieval._precision(np.array(positive, float), np.array(negative, float))
    assert found == pytest.approx(expected_precision(positive, negative))


@pytest.mark.parametrize("positives, candidates", [(1, 1), (1, 3), (2, 5), (4, 5), (3, 7), (5, 5)])
def test_random_rankings_are_all_equally_likely(positives, candidates):
    subsets = list(itertools.combinations(range(candidates), positives))
    drawn = retrieval._subsets(np.random.default_rng(0), 30_000, positives, candidates)
    codes = {s: n for n, s in enumerate(subsets)}
    counts = np.bincount([codes[tuple(d)] for d in drawn.tolist()], minlength=len(subsets))
    share = 1 / len(subsets)
    assert (np.abs(counts / 30_000 - share) < 5 * np.sqrt(share * (1 - share) / 30_000) + 1e-12).all()
    exact = np.mean([np.mean([(k + 1) / (p + 1) for k, p in enumerate(s)]) for s in subsets])
    assert retrieval.random_precisions(positives, candidates, 30_000).mean() == pytest.approx(exact, rel=0.02)


def test_a_perfect_ranking_that_comes_by_chance_is_no_discovery():
    """One positive among three stands first in a third of all rankings."""
    scores = pd.DataFrame({"g": ["a"], "average_precision": [1.0], "positives": [1], "candidates": [3]})
    found = retrieval.mean_average_precision(scores, ["g"]).iloc[0]
    assert found["p"] == pytest.approx(1 / 3, abs=0.02)


def test_mean_average_precision_of_what_has_none_is_nan():
    scores = pd.DataFrame({"g": ["a", "b"], "average_precision": [np.nan, 0.5], "positives": [0, 2], "candidates": [0, 9]})
    found = retrieval.mean_average_precision(scores, ["g"])
    assert (
        found["profiles"].tolist() == [0, 1] and np.isnan(found["map"][0]) and np.isnan(found["p"][0]) and np.isnan(found["q"][0])
    )
    assert found["q"][1] == found["p"][1]
    assert retrieval.mean_average_precision(scores[:1], ["g"])["map"].isna().all()
    with pytest.raises(InputError, match="null 0"):
        retrieval.mean_average_precision(scores, ["g"], null=0)


def test_consistency_finds_mechanisms_and_stands_beside_the_cell_count():
    table, features = treatments()
    found = retrieval.consistency(table, features, "cells", null=2000)
    assert found["moa"].tolist() == [f"m{n}" for n in range(6)]
    assert (found["map"] > 0.95).all() and (found["q"] < 0.01).all()
    assert (found["map_cells"] < 0.5).all() and (found["p_cells"] > 0.001).all()
    shuffled = table.assign(moa=table.groupby("compound")["moa"].transform("first").sample(frac=1, random_state=0).to_numpy())
    assert (retrieval.consistency(shuffled, features, "cells", null=2000)["q"] > 0.01).all()
    none = retrieval.consistency(table.assign(cells=np.nan), features, "cells", null=100)
    assert none["map_cells"].isna().all() and none["map"].notna().all()


def wells(seed=0, plates=2):
    rng = np.random.default_rng(seed)
    parts = []
    for plate in range(plates):
        kind = ["negative"] * 12 + ["positive"] * 4 + [None] * 24
        name = ["dmso"] * 12 + ["pos"] * 4 + [f"c{n // 4}" for n in range(24)]
        values = rng.normal(0, 1, (40, 10))
        values[16:28] += np.repeat(rng.normal(0, 6, (3, 10)), 4, axis=0) if plate == 0 else 0
        part = pd.DataFrame(values, columns=[f"f{n}" for n in range(10)])
        part.insert(0, "cells", rng.integers(50, 60, 40))
        part.insert(0, "compound", name)
        part.insert(0, "control", kind)
        part.insert(0, "plate", f"P{plate}")
        parts.append(part)
    return pd.concat(parts, ignore_index=True), [f"f{n}" for n in range(10)]


def test_activity_tells_compounds_from_the_controls_of_their_plate():
    table, features = wells()
    found = retrieval.activity(table, features, "cells", ["plate", "compound"], within=["plate"], null=2000)
    assert found[["plate", "compound"]].values.tolist() == [[f"P{p}", f"c{c}"] for p in range(2) for c in range(6)]
    active = (found["plate"] == "P0") & found["compound"].isin(["c0", "c1", "c2"])
    assert (found.loc[active, "q"] < 0.05).all() and (found.loc[~active, "q"] > 0.05).all()
    assert (found["profiles"] == 4).all() and (found["q_cells"] > 0.05).all()
    with pytest.raises(InputError, match="1 wells that are no controls have no compound"):
        table.loc[20, "compound"] = None
        retrieval.activity(table, features, "cells")


RULES = {
    "mechanism": {"same": ["moa"], "differ": ["compound"], "against_differ": ["moa"]},
    "compound": {"same": ["compound"], "against_differ": ["compound"]},
    "across batches": {"same": ["moa"], "differ": ["batch", "compound"], "against_same": ["batch"], "against_differ": ["moa"]},
}


@pytest.mark.parametrize("rule", RULES)
def test_copairs_ranks_to_the_same_numbers(rule, tmp_path):
    pytest.importorskip("copairs", reason="copairs is not installed")
    from copairs import map as peer

    table, features = treatments(0.6, seed=3)
    asked = {"differ": [], "against_same": []} | RULES[rule]
    ours = retrieval.average_precision(table, features, **asked)
    theirs = peer.average_precision(
        table[["moa", "compound", "dose", "batch"]],
        table[features].to_numpy(),
        asked["same"],
        asked["differ"],
        asked["against_same"],
        asked["against_differ"],
        progress_bar=False,
    )
    ranked = theirs["n_pos_pairs"] > 0
    assert ranked.sum() == ours["average_precision"].notna().sum() > 20
    np.testing.assert_allclose(ours["average_precision"][ranked], theirs["average_precision"][ranked], atol=1e-6)
    np.testing.assert_array_equal(ours[["positives", "candidates"]][ranked], theirs[["n_pos_pairs", "n_total_pairs"]][ranked])
    null, by = 20_000, asked["same"]
    ours = retrieval.mean_average_precision(ours, by, null)
    theirs = peer.mean_average_precision(theirs, by, null, 0.05, 0, progress_bar=False, cache_dir=tmp_path).sort_values(by)
    np.testing.assert_allclose(ours["map"], theirs["mean_average_precision"], atol=1e-6)
    error = 5 * np.sqrt(2 * np.maximum(ours["p"] * (1 - ours["p"]), 1 / null) / null)
    if rule == "compound":  # one positive each: random rankings tie with the group's, and copairs leaves those out
        assert (ours["p"].to_numpy() > theirs["p_value"].to_numpy() - error).all()
        return
    assert (np.abs(ours["p"].to_numpy() - theirs["p_value"].to_numpy()) < error).all()
    assert (np.abs(ours["q"].to_numpy() - theirs["corrected_p_value"].to_numpy()) < error.max() * len(ours)).all()


# what copairs 0.5.5 gives for treatments(0.6, seed=3): mean average precision of m0 ... m5 by the rule "mechanism"
GOLDEN = [0.689395058, 0.655096917, 0.378432505, 0.704949911, 0.541330409, 0.616974654]


def test_numbers_are_those_of_copairs():
    table, features = treatments(0.6, seed=3)
    found = retrieval.consistency(table, features, "cells", null=100)
    np.testing.assert_allclose(found["map"], GOLDEN, atol=1e-6)
