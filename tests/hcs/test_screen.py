"""A synthetic screen from wells to answers: what is known of it comes out, what is not there does not."""

import functools

import numpy as np
import pytest
from scipy import stats

from hcs import screens
from sparkmed.hcs import hits, profiles, quality, retrieval


@functools.cache
def made(**settings):
    return screens.screen(**settings)


def treatments(screen, method="mad_robustize"):
    """Profiles of the three highest doses, which all compounds respond to."""
    wells = screen.wells
    if method:
        found = profiles.normalize(wells, screen.features, method)
        assert not found.refused and not found.dropped and not found.missing
        wells = found.table
    tested = wells[wells["control"].isna() & (wells["concentration"] > 0.9)]
    cells = tested.groupby(["batch", "compound", "concentration"], as_index=False)["cells"].mean()
    table = profiles.aggregate(tested, ["batch", "compound", "concentration"], screen.features, "modz", keep=["moa"])
    return table.merge(cells)


def shuffled(table, seed):
    """Compounds keep together, their mechanisms are drawn anew."""
    names = table.groupby("compound")["moa"].first()
    drawn = dict(zip(names.index, np.random.default_rng(seed).permutation(names), strict=True))
    return table.assign(moa=table["compound"].map(drawn))


@pytest.mark.parametrize("method", ["standardize", "robustize", "mad_robustize", "spherize"])
def test_mechanisms_are_found_within_and_across_batches(method):
    screen = made()
    found = retrieval.moa_matching(treatments(screen, method), screen.features, "cells")
    assert found.nsc.accuracy > 0.95 and found.nscb.accuracy > 0.95 and found.leak is None
    assert found.nsc.judged == found.nscb.judged == 12 * 4 * 3
    assert found.cells_nsc.accuracy < 0.35 and found.cells_nscb.accuracy < 0.35


def test_batches_and_plates_hide_them_without_normalising():
    """The nearest lies in the same batch, which holds one compound of each mechanism."""
    found = retrieval.moa_matching(treatments(made(), None), made().features, "cells")
    assert found.nsc.accuracy < 0.1


def test_shuffled_labels_give_chance():
    table, features = treatments(made()), made().features
    found = [retrieval.moa_matching(shuffled(table, seed), features, "cells") for seed in range(20)]
    for rule in ("nsc", "nscb"):
        mean = np.mean([getattr(f, rule).accuracy for f in found])
        chance = np.mean([getattr(f, rule).chance for f in found])
        assert chance == pytest.approx(3 / 47, abs=0.02) and abs(mean - chance) < 0.03
    assert sum(f.leak is not None for f in found) <= 1


def test_without_a_signal_there_is_chance():
    screen = made(signal=0.0)
    found = retrieval.moa_matching(treatments(screen), screen.features, "cells")
    assert found.nsc.accuracy < 0.2 and found.nscb.accuracy < 0.2


@pytest.mark.parametrize("method", ["mad_robustize", "spherize"])
def test_a_batch_that_carries_the_mechanism_is_caught(method):
    """NSC alone would be a triumph."""
    screen = made(signal=0.0, leak=3.0)
    table = treatments(screen, method)
    found = retrieval.moa_matching(table, screen.features, "cells")
    assert found.nsc.accuracy > 0.95
    assert abs(found.nscb.accuracy - found.nscb.chance) < 0.1
    assert found.leak.startswith("the batch gives the mechanism away: of 144 profiles")
    near = retrieval.consistency(table, screen.features, "cells", null=1000)
    across = retrieval.consistency(table, screen.features, "cells", apart=["compound", "batch"], null=1000)
    assert (near["q"] < 0.05).all() and (across["q"] < 0.05).mean() < 0.25


def test_mechanisms_that_are_there_outlive_the_leak():
    screen = made(signal=6.0, leak=1.0)
    found = retrieval.moa_matching(treatments(screen), screen.features, "cells")
    assert found.nscb.accuracy > 0.8 and found.leak is None


def test_precision_of_mechanisms_is_significant_and_that_of_shuffled_ones_is_not():
    table, features = treatments(made()), made().features
    found = retrieval.consistency(table, features, "cells", null=2000)
    assert (found["q"] < 0.01).all() and found["map"].mean() > 0.9
    null = retrieval.consistency(shuffled(table, 3), features, "cells", null=2000)
    assert (null["q"] > 0.05).all()


def test_treatments_replicate_across_plates_and_shuffled_ones_do_not():
    screen = made()
    wells = profiles.normalize(screen.wells, screen.features, "standardize").table
    top = wells[wells["control"].isna() & (wells["concentration"] > 0.9)]
    found = hits.reproducibility(top, screen.features, ["compound", "concentration"], apart="plate", null=200)
    assert found.percent > 95 and found.judged == 144
    mixed = top.assign(compound=np.random.default_rng(0).permutation(top["compound"]))
    assert hits.reproducibility(mixed, screen.features, ["compound", "concentration"], null=200).percent < 30


def test_z_prime_is_its_closed_form_on_every_plate():
    found = quality.plate_quality(made().wells, ["score"])
    assert len(found) == 12 and found["reason"].isna().all()
    np.testing.assert_allclose(found["z_prime"], screens.Z_PRIME, rtol=1e-12)
    np.testing.assert_allclose(found["ssmd"], 100 / np.hypot(6, 4), rtol=1e-12)
    np.testing.assert_allclose(found["signal_window"], (100 - 3 * 10) / 6, rtol=1e-12)


def test_known_half_maximal_doses_lie_in_their_intervals():
    screen = made()
    wells = screen.wells[screen.wells["control"].isna()]
    found = hits.dose_responses(wells, "score").set_index("compound")
    truth = found.index.map(screen.ec50)
    assert found["identified"].all() and len(found) == 48
    held = (found["ec50_low"] <= truth) & (truth <= found["ec50_high"])
    assert stats.binomtest(int(held.sum()), 48, 0.95).pvalue > 0.01, "as often as 95 percent intervals do"
    assert np.abs(np.log10(found["ec50"] / truth)).median() < 0.05


def test_compounds_that_do_nothing_have_no_half_maximal_dose():
    wells = made(reporter=0.0).wells
    found = hits.dose_responses(wells[wells["control"].isna()], "score")
    assert found["identified"].mean() < 0.1 and found.loc[~found["identified"], "ec50"].isna().all()


def test_b_scores_take_known_row_and_column_effects_away():
    wells = made(reporter=0.0, place_effect=20.0).wells
    tested = wells[wells["control"].isna()]
    known = screens.ROWS[tested["row"] - 1] + screens.COLUMNS[tested["column"] - 1]
    assert abs(np.corrcoef(known, tested["score"])[0, 1]) > 0.9
    found = quality.b_scores(tested, ["score"], screens.SHAPE)["score"]
    assert abs(np.corrcoef(known, found)[0, 1]) < 0.1


def test_positive_controls_are_hits_and_inactive_wells_are_not():
    wells = hits.score_wells(made(reporter=0.0).wells, "score")
    assert (wells.loc[wells["control"] == "positive", "p_robust"] < 1e-6).all()
    tested = wells[wells["control"].isna()]
    assert (tested["q_empirical"] < 0.05).mean() < 0.02
    active = hits.score_wells(made().wells, "score")
    top = active["control"].isna() & (active["concentration"] > 5)
    assert (active.loc[top, "q_robust"] < 0.01).mean() > 0.98
