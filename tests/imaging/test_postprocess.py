import numpy as np
import pytest

from sparkmed.imaging import postprocess
from sparkmed.imaging.volume import Volume
from sparkmed.rejection import Refused


def scores(*channels):
    return Volume(np.array(channels, np.float32).reshape(len(channels), -1, 1, 1), np.diag([2.0, 2, 2, 1]), "1.2.3", "CT", ("a",))


def test_the_highest_score_wins_and_ties_go_to_the_lowest_class():
    labels = postprocess.as_labels(scores([0.2, 0.5, 0.3, 0], [0.7, 0.5, 0.3, 0], [0.1, 0, 0.4, 1]))
    assert labels.array.ravel().tolist() == [1, 0, 2, 2]
    assert labels.array.dtype == np.uint8 and labels.array.shape == (1, 4, 1, 1)
    assert (labels.series_uid, labels.modality, labels.sources) == ("1.2.3", "CT", ("a",))
    assert np.array_equal(labels.affine, np.diag([2.0, 2, 2, 1]))


def test_it_is_argmax():
    array = np.random.default_rng(0).integers(0, 4, (5, 6, 7, 8)).astype(np.float32)
    assert np.array_equal(postprocess.as_labels(Volume(array, np.eye(4))).array[0], array.argmax(axis=0))


def test_many_classes_need_two_bytes():
    array = np.eye(300, dtype=np.float32).reshape(300, 300, 1, 1)
    labels = postprocess.as_labels(Volume(array, np.eye(4)))
    assert labels.array.dtype == np.uint16
    assert labels.array.ravel().tolist() == list(range(300))


@pytest.mark.parametrize("channel", [0, 1])
def test_scores_that_are_no_numbers_are_refused(channel):
    broken = [[0.5, 0.5], [0.5, 0.5]]
    broken[channel][0] = np.nan
    with pytest.raises(Refused, match="NOT_FINITE.*1 voxels"):
        postprocess.as_labels(scores(*broken))


def test_the_scores_are_not_changed():
    s = scores([0.2, 0.5], [0.7, 0.1])
    before = s.array.copy()
    postprocess.as_labels(s)
    assert np.array_equal(s.array, before)
