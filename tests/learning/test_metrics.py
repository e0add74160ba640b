import math

import numpy as np
import pytest
import torch

from sparkmed.config import Component
from sparkmed.learning import metrics
from sparkmed.rejection import InputError


def segmentation(n=12, classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, classes, (n, 1, 4, 4, 2), generator=generator)
    output = torch.randn(n, classes, 4, 4, 2, generator=generator)
    return output + 2 * torch.nn.functional.one_hot(truth[:, 0], classes).movedim(-1, 1), truth


def classification(n=12, seed=0):
    truth = torch.arange(n) % 2
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed)) + torch.nn.functional.one_hot(truth, 2), truth


CASES = [
    (None, "segmentation"), (Component(name="DiceMetric"), "segmentation"), (Component(name="MeanIoU"), "segmentation"),
    (Component(name="GeneralizedDiceScore"), "segmentation"), (None, "classification"),
    (Component(name="AveragePrecisionMetric"), "classification"),
]  # fmt: skip


@pytest.mark.parametrize(("component", "task"), CASES)
def test_merged_in_any_division_it_is_the_same_number(component, task):
    output, truth = segmentation() if task == "segmentation" else classification()
    classes, volumes = output.shape[1], [f"v{i // 3}" for i in range(12)]

    def over(parts):
        total = metrics.build(component, task, classes)
        for part in parts:
            metric = metrics.build(component, task, classes)
            for i in part:  # batches of two, with a padded sample of nonsense
                rows = [i, 0]
                metric.update(output[rows], truth[rows], [volumes[r] for r in rows], torch.tensor([1.0, 0.0]))
            total.merge(metric.state())
        return total.compute()

    whole = metrics.build(component, task, classes)
    whole.update(output, truth, volumes, torch.ones(12))
    assert 0 < whole.compute() < 1
    for parts in ([range(12)], [range(5), range(5, 12)], [range(6, 12), [], range(6)], [[i] for i in range(12)]):
        assert over(parts) == pytest.approx(whole.compute(), abs=1e-6)


def test_dice_of_a_volume_cut_in_patches_is_that_of_the_volume():
    output, truth = segmentation(6)
    metric = metrics.build(None, "segmentation", 3)
    metric.update(output, truth, ["one"] * 6, torch.ones(6))
    predicted = output.argmax(1)
    expected = [2 * ((predicted == c) & (truth[:, 0] == c)).sum() / ((predicted == c).sum() + (truth == c).sum()) for c in (1, 2)]
    assert metric.per_class() == pytest.approx([float(e) for e in expected])
    assert metric.compute() == pytest.approx(float(np.mean(expected)))


def test_dice_by_hand():
    """Volume a: class 1 half found. Volume b: nothing of class 1, nothing said. Volume c: a false alarm."""
    truth, output = torch.zeros(3, 1, 4, 1, 1, dtype=torch.int64), torch.zeros(3, 3, 4, 1, 1)
    truth[0, 0, :2] = 1
    output[:, 0] = 1
    output[0, 1, 1:3] = 2
    output[2, 1, 0] = 2
    metric = metrics.build(None, "segmentation", 3)
    metric.update(output, truth, ["a", "b", "c"], torch.ones(3))
    assert metric.per_class()[0] == pytest.approx((0.5 + 0) / 2) and math.isnan(metric.per_class()[1])
    assert metric.compute() == pytest.approx(0.25)


@pytest.mark.parametrize(("component", "task"), CASES)
def test_empty(component, task):
    assert math.isnan(metrics.build(component, task, 2).compute())


def test_perfect_classification():
    truth = torch.tensor([0, 1, 1])
    metric = metrics.build(None, "classification", 2)
    metric.update(torch.nn.functional.one_hot(truth, 2) * 9.0, truth, ["a", "b", "c"], torch.ones(3))
    assert metric.compute() == 1 and metric.name == "ROCAUCMetric"


@pytest.mark.parametrize(
    ("component", "said"),
    [
        (Component(name="DiceMetrc"), "did you mean DiceMetric"),
        (Component(name="DiceMetric", background=True), "did you mean include_background"),
        (Component(name="FIDMetric"), "cannot be merged"),
        (Component(name="compute_dice"), "cannot be merged"),
    ],
)
def test_wrong_metrics(component, said):
    with pytest.raises(InputError, match=said):
        metrics.build(component, "segmentation", 2)


def test_bootstrap_covers_the_mean():
    rng = np.random.default_rng(0)
    covered = 0
    for i in range(100):
        low, high = metrics.bootstrap_interval(rng.normal(0.8, 0.1, 40), 0.95, 500, seed=i)
        covered += low <= 0.8 <= high
    assert 85 <= covered <= 100


def test_bootstrap_is_a_function_of_its_arguments():
    values = [*np.random.default_rng(0).uniform(0, 1, 30), math.nan]
    assert metrics.bootstrap_interval(values) == metrics.bootstrap_interval(values[:30])
    assert metrics.bootstrap_interval(values, seed=1) != metrics.bootstrap_interval(values, seed=2)
    assert metrics.bootstrap_interval([0.7, 0.7]) == (pytest.approx(0.7), pytest.approx(0.7))
    with pytest.raises(ValueError, match="no value"):
        metrics.bootstrap_interval([math.nan])


def test_pairs_see_a_small_steady_difference():
    rng = np.random.default_rng(1)
    b = rng.uniform(0.5, 1, 30)
    difference, low, high = metrics.paired_bootstrap(b + 0.01 + rng.normal(0, 0.002, 30), b)
    assert difference == pytest.approx(0.01, abs=2e-3) and 0 < low < difference < high
    assert metrics.paired_bootstrap(b, b) == (0, 0, 0)
    with pytest.raises(ValueError, match="same subjects"):
        metrics.paired_bootstrap(b, b[:3])


def test_calibration_error_by_hand():
    bins = metrics.reliability(np.array([0.9, 0.9, 0.9, 0.9, 0.55, 0.55]), np.array([1, 1, 1, 0, 1, 0]))
    assert metrics.calibration_error([bins]) == pytest.approx(4 / 6 * 0.15 + 2 / 6 * 0.05)
    assert metrics.calibration_error([]) is None and metrics.calibration_error([[0.0] * 45]) is None


def test_diagrams_merge_by_adding_and_subjects_weigh_the_same():
    rng = np.random.default_rng(0)
    confidence, correct = rng.uniform(size=500), rng.uniform(size=500) < 0.5
    whole = metrics.reliability(confidence, correct)
    parts = [metrics.reliability(confidence[s], correct[s]) for s in (slice(100), slice(100, 500))]
    assert np.sum(parts, 0) == pytest.approx(whole)
    perfect, wrong = metrics.reliability(np.ones(1000), np.ones(1000)), metrics.reliability(np.ones(10), np.zeros(10))
    assert metrics.calibration_error([perfect, wrong]) == 0.5


def test_calibrated_confidence_has_a_small_error():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(size=200_000)
    assert metrics.calibration_error([metrics.reliability(confidence, rng.uniform(size=200_000) < confidence)]) < 0.01
    for edge in (0.0, 1.0):
        assert sum(metrics.reliability(np.array([edge]), np.array([True]))[:15]) == 1
