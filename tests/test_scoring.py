import numpy as np
import pytest
import torch
from monai.metrics import compute_dice

from sparkmed import scoring


def test_dice_equals_monai():
    rng = np.random.default_rng(0)
    predicted, truth = rng.integers(0, 3, (2, 6, 7, 8))
    one_hot = [torch.nn.functional.one_hot(torch.from_numpy(x), 4).permute(3, 0, 1, 2)[None] for x in (predicted, truth)]
    expected = compute_dice(*one_hot, ignore_empty=True)[0].tolist()
    found = scoring.dice(predicted, truth, 4)
    assert found[:3] == pytest.approx(expected[:3])
    assert found[3] is None and np.isnan(expected[3])


def test_an_empty_prediction_of_something_there_is_zero():
    assert scoring.dice(np.zeros(4, int), np.array([0, 1, 1, 0]), 2)[1] == 0.0


def test_subject_scores_average_volumes_first_then_leave_absent_classes_out():
    rows = [
        {"subject": "a", "score": [1.0, 0.5, None]},
        {"subject": "a", "score": [1.0, 1.0, 0.0]},
        {"subject": "b", "score": [1.0, None, None]},
        {"subject": "c", "score": [1.0]},
    ]
    assert scoring.subject_scores(rows) == {"a": 0.5, "c": 1.0}


def test_the_key_depends_on_all_three():
    keys = {scoring.key(*k) for k in [("v", "m", "c"), ("w", "m", "c"), ("v", "n", "c"), ("v", "m", "d")]}
    assert len(keys) == 4


def test_mask_paths_hold_no_path_of_the_archive():
    path = scoring.mask_path("a model/x", "3", "5e77", "sub 1", "abc")
    assert path == "predictions/masks/a%20model%2Fx/3/5e77/sub%201_abc.nii.gz"
