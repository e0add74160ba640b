import numpy as np
import pytest

from sparkmed.config import Cleaning
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


def of(label, classes=3, p=0.9, affine=None):
    """Probabilities of which ``label`` is the likeliest class, and what it cleans to."""
    array = np.full((classes, *label.shape), (1 - p) / (classes - 1), np.float32)
    np.put_along_axis(array, label[None].astype(np.intp), p, 0)
    return Volume(array, np.eye(4) if affine is None else affine)


NAMES = ("background", "liver", "kidney")


def cleaned(label, affine=None, **cleaning):
    return postprocess.labels(of(label, affine=affine), NAMES, {c: Cleaning(**v) for c, v in cleaning.items()}).array[0]


def test_a_threshold_binarises_against_the_background():
    s = scores([0.6, 0.75, 0.5, 0.1, 0.3], [0.4, 0.25, 0.5, 0.35, 0.1], [0.0, 0.0, 0.0, 0.55, 0.6])
    found = [
        postprocess.labels(s, NAMES, {c: Cleaning(threshold=t) for c, t in thresholds.items()}).array.ravel().tolist()
        for thresholds in ({}, {"liver": 0.3}, {"liver": 0.5}, {"liver": 0.3, "kidney": 0.6}, {"kidney": 0.99})
    ]
    assert found == [[0, 0, 0, 2, 2], [1, 0, 1, 2, 2], [0, 0, 1, 2, 2], [1, 0, 1, 1, 2], [0, 0, 0, 1, 0]]


def test_thresholds_are_what_they_say_they_are():
    rng = np.random.default_rng(1)
    array = np.rint(rng.dirichlet(np.ones(4), (7, 8, 9)) * 20).astype(np.float32).transpose(3, 0, 1, 2) / 20
    thresholds = {1: 0.25, 3: 0.6}
    found = postprocess.as_labels(Volume(array, np.eye(4)), thresholds).array[0]
    for at in np.ndindex(found.shape):
        p = array[(slice(None), *at)]
        able = [c for c in (1, 2, 3) if (p[c] >= np.float32(thresholds[c]) if c in thresholds else p[c] > p[0])]
        assert found[at] == max(able, key=lambda c: (p[c], -c), default=0)


def test_small_components_go_then_all_but_the_largest():
    label = np.zeros((12, 9, 5), int)
    label[0:2, 0:2, 0:2] = 1  # 8 voxels
    label[4:7, 0:3, 0:2] = 1  # 18
    label[8:11, 4:8, 1:3] = 1  # 24
    label[0, 8, 4] = 2
    affine = np.diag([2.0, 2, 5, 1])  # 0.02 ml
    sizes = [np.count_nonzero(cleaned(label, affine, liver=c) == 1) for c in
             ({"minimum_ml": 0.16}, {"minimum_ml": 0.17}, {"components": 2}, {"components": 1},
              {"minimum_ml": 0.4, "components": 2}, {"minimum_ml": 1.0, "components": 1})]  # fmt: skip
    assert sizes == [50, 42, 42, 24, 24, 0]
    assert cleaned(label, affine, liver={"components": 1})[0, 8, 4] == 2, "other classes are left alone"
    assert (cleaned(label, affine, liver={"components": 1})[0:7] != 1).all()


def test_of_equal_components_the_first_stays():
    label = np.zeros((9, 4, 4), int)
    for i in (6, 3, 0):
        label[i : i + 2, 1:3, 1] = 1
    for n in (1, 2):
        assert np.unique(np.nonzero(cleaned(label, liver={"components": n}))[0]).tolist() == [0, 1, 3, 4][: 2 * n]


@pytest.mark.parametrize(("connectivity", "largest"), [("faces", 2), ("edges", 3), ("corners", 4)])
def test_what_connects(connectivity, largest):
    label = np.zeros((4, 4, 4), int)
    for at in [(0, 0, 0), (0, 0, 1), (0, 1, 2), (1, 2, 3)]:  # by a face, an edge, a corner
        label[at] = 1
    assert np.count_nonzero(cleaned(label, liver={"components": 1, "connectivity": connectivity})) == largest


def test_components_are_those_of_skimage():
    from skimage import measure

    label = (np.random.default_rng(0).random((14, 15, 16)) < 0.2).astype(int)
    for n, name in enumerate(("faces", "edges", "corners"), start=1):
        theirs = measure.label(label, connectivity=n)
        sizes = np.bincount(theirs.ravel())[1:]
        wanted = np.isin(theirs, 1 + np.flatnonzero(sizes >= 4))
        assert np.array_equal(cleaned(label, liver={"minimum_ml": 0.004, "connectivity": name}) == 1, wanted)


def shell():
    label = np.zeros((9, 9, 9), int)
    label[1:8, 1:8, 1:8] = 1
    label[2:7, 2:7, 2:7] = 0
    return label


def test_holes_are_background_that_the_outside_does_not_reach():
    label = shell()
    label[4, 4, 4] = 2
    filled = cleaned(label, liver={"fill_holes": True})
    assert (filled[1:8, 1:8, 1:8] == 1).sum() == 343 - 1 and filled[4, 4, 4] == 2
    assert filled.sum() == 342 + 2
    open_ = label.copy()
    open_[4, 4, 7] = 0
    assert np.array_equal(cleaned(open_, liver={"fill_holes": True}), open_)
    at_the_edge = label[:, :, 4:]
    assert np.array_equal(cleaned(at_the_edge, liver={"fill_holes": True}), at_the_edge), "open where the image ends"


@pytest.mark.parametrize(("connectivity", "closed"), [("faces", False), ("edges", True), ("corners", True)])
def test_a_wall_closes_as_its_voxels_connect(connectivity, closed):
    ring = np.zeros((5, 5, 1), int)
    for at in [(1, 2), (2, 1), (2, 3), (3, 2)]:  # by corners in the plane
        ring[at] = 1
    assert cleaned(ring, liver={"fill_holes": True, "connectivity": connectivity})[2, 2, 0] == int(closed)
    in_space = np.repeat(np.zeros_like(ring), 3, 2)
    in_space[..., 1] = ring[..., 0]
    assert cleaned(in_space, liver={"fill_holes": True})[2, 2, 1] == 0, "a ring is no hole in three dimensions"


def test_what_was_taken_away_is_a_hole_of_what_is_around_it():
    label = shell()
    label[3, 3, 3] = 1  # an island of liver in the hole
    label[5, 5, 5] = 2
    both = cleaned(label, liver={"components": 1, "fill_holes": True}, kidney={"minimum_ml": 1.0})
    assert (both[1:8, 1:8, 1:8] == 1).all()
    two = np.where(label == 1, 2, np.where(label == 2, 1, 0))
    assert np.array_equal(cleaned(two, kidney={"components": 1, "fill_holes": True}, liver={"minimum_ml": 1.0}) == 2, both == 1)


def test_cleaning_nothing_is_argmax_and_an_absent_class_stays_absent():
    label = np.random.default_rng(2).integers(0, 2, (5, 6, 7))
    everything = {"threshold": 0.5, "minimum_ml": 0.001, "components": 99999, "fill_holes": True}
    assert np.array_equal(cleaned(label), label)
    assert not (cleaned(label, kidney=everything) == 2).any()
