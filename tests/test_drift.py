import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sparkmed import drift

FIGURES = 12


def looks(count, then, now, shift=0.0, seed=0, alpha=0.05):
    """Verdicts of looks at new subjects of whom the first of twelve figures is shifted by so many deviations."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        reference = {("s", str(f)): drift.Sample.of(rng.normal(size=then)) for f in range(FIGURES)}
        current = {("s", str(f)): sorted(rng.normal(shift * (f == 0), size=now)) for f in range(FIGURES)}
        yield drift.compare(reference, current, 20, 0.25, alpha)


@pytest.mark.parametrize(("then", "now"), [(30, 30), (40, 150)])
def test_alike_samples_alarm_no_oftener_than_alpha(then, now):
    found = list(looks(100, then, now))
    alarms = sum(any(f.verdict == "drift" for f in look) for look in found)
    assert alarms <= stats.binom.isf(0.001, 100, 0.05)
    # which is not so of either rule alone
    assert sum(any(f.psi > 0.25 for f in look) for look in found) > 50
    assert sum(any(f.p < 0.05 for f in look) for look in found) > 25


@pytest.mark.parametrize(("then", "now", "shift"), [(30, 30, 2.0), (40, 150, 1.2), (300, 200, 0.8)])
def test_shifted_samples_alarm_and_the_right_figure_is_named(then, now, shift):
    found = [{f.figure for f in look if f.verdict == "drift"} for look in looks(30, then, now, shift, alpha=0.01)]
    assert sum("0" in names for names in found) >= 27
    assert sum(bool(names - {"0"}) for names in found) <= 2


def test_a_change_too_small_to_matter_is_no_drift_however_many_subjects():
    rng = np.random.default_rng(0)
    reference = {("s", "f"): drift.Sample.of(rng.normal(size=5000))}
    (found,) = drift.compare(reference, {("s", "f"): rng.normal(0.15, size=5000)}, 20, 0.25, 0.01)
    assert found.adjusted < 1e-6 and found.psi < 0.1 and found.verdict == "fine"


def test_psi_is_below_its_chance_level_as_often_as_said():
    rng = np.random.default_rng(1)
    then = [np.sort(rng.normal(size=400)) for _ in range(300)]
    index = [drift.psi(t, rng.normal(size=400), drift.edges(t)) for t in then]
    chance = drift.psi_by_chance(400, 400, 9, 0.1)
    # edges from the sample itself make its own shares certain, so that the index is smaller if anything
    assert np.mean(np.array(index) > chance) <= 0.1 + 0.05


@given(st.lists(st.floats(-1e6, 1e6), min_size=20, max_size=60), st.lists(st.floats(-1e6, 1e6), min_size=20, max_size=60))
def test_psi_is_no_less_than_nothing_and_nothing_of_the_same(a, b):
    a, b = np.sort(a), np.sort(b)
    assert drift.psi(a, b, drift.edges(a)) >= 0
    assert drift.psi(a, a, drift.edges(a)) == 0


def test_psi_by_hand():
    then, now = np.array([0, 0, 0, 1, 1, 1, 1, 1, 1, 1.0]), np.array([0, 0, 0, 0, 0, 0, 1, 1, 1, 1.0])
    by_hand = (0.6 - 0.3) * np.log(0.6 / 0.3) + (0.4 - 0.7) * np.log(0.4 / 0.7)
    assert drift.psi(then, now, np.array([0.5])) == pytest.approx(by_hand)
    empty = (0.05 - 0.3) * np.log(0.05 / 0.3) + (1.0 - 0.7) * np.log(1 / 0.7)
    assert drift.psi(then, np.ones(10), np.array([0.5])) == pytest.approx(empty)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_bonferroni_in_closed_testing(p):
    """Closure: a figure counts at the level at which every set of figures with it is rejected by Bonferroni."""

    def closed(i):
        sets = [s for n in range(1, len(p) + 1) for s in itertools.combinations(range(len(p)), n) if i in s]
        return max(min(1.0, len(s) * min(p[j] for j in s)) for s in sets)

    assert drift.holm(p) == pytest.approx([closed(i) for i in range(len(p))])


def test_constants():
    same = {("s", "f"): drift.Sample.of([3.0] * 30)}
    (found,) = drift.compare(same, {("s", "f"): [3.0] * 30}, 20, 0.25, 0.01)
    assert found.verdict == "fine"
    for other in (2.0, 4.0):
        (found,) = drift.compare(same, {("s", "f"): [other] * 30}, 20, 0.25, 0.01)
        assert found.verdict == "drift"


def test_too_few_and_unseen():
    reference = {("a", "f"): drift.Sample.of(range(30)), ("b", "f"): drift.Sample.of(range(10))}
    current = {
        ("a", "f"): [9.0] * 10,
        ("b", "f"): [9.0] * 90,
        ("c", "f"): [9.0] * 20,
        ("d", "f"): [9.0] * 19,
        ("a", "g"): [9.0] * 50,
    }
    found = {(f.source, f.figure): f.verdict for f in drift.compare(reference, current, 20, 0.25, 0.01)}
    few = dict.fromkeys([("a", "f"), ("a", "g"), ("b", "f"), ("d", "source")], "few")
    assert found == few | {("c", "source"): "unseen"}


def test_a_subject_counts_once():
    records = [("p", ["a"], {"f": v}) for v in (1.0, 2.0, 9.0)] + [("q", ["a", "b"], {"f": 0.0})]
    assert drift.samples(records) == {("a", "f"): [0.0, 2.0], ("b", "f"): [0.0]}


def test_figures_of_a_volume():
    volume = {"spacing": [0.99999994, 2.0, 1.0], "shape": [2, 10, 10, 10]}
    prediction = {"quantiles": list(range(10)), "ml": [3.0, 1.0, 0.0], "probability": [0.9, 0.8, None]}
    found = drift.figures(volume, prediction, ("background", "liver", "kidneys"))
    assert (found["finest spacing mm"], found["coarsest spacing mm"], found["field ml"]) == (1.0, 2.0, 2.0)
    assert (found["channel 0 intensity p50"], found["channel 1 intensity p99"]) == (2.0, 9.0)
    of_classes = {k: v for k, v in found.items() if k.split()[0] in ("background", "liver", "kidneys")}
    assert of_classes == {"liver ml": 1.0, "kidneys ml": 0.0, "liver probability": 0.8}
    classified = drift.figures(volume, {"probability": [0.25, 0.75], "ml": None}, ("well", "ill"))
    assert "well probability" not in classified and classified["ill probability"] == 0.75


def test_a_rise_of_a_share():
    assert drift.risen((5, 100), (40, 100), 0.1, 0.01)
    assert not drift.risen((5, 100), (14, 100), 0.1, 0.01), "less than wanted"
    assert not drift.risen((5, 100), (2, 10), 0.1, 0.01), "by chance"
    assert not drift.risen((0, 0), (0, 0), 0.1, 0.01)
