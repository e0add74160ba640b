import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkmed.imaging import geometry, labels
from sparkmed.imaging.volume import Volume
from sparkmed.rejection import Refused

from .grids import affines, codes, numbered, shapes


def label_of(values, affine=None):
    return Volume(np.asarray(values).reshape(1, -1, 1, 1), np.eye(4) if affine is None else affine)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint64, np.float32, np.float64, ">i2", bool])
def test_counts(dtype):
    label = label_of(np.array([0, 1, 1, 0, 0], dtype))
    assert labels.check_label(label, label, 4).tolist() == [3, 2, 0, 0]


@pytest.mark.parametrize(
    "values, dtype",
    [([0, 255], np.uint8), ([0, 256], np.uint16), ([0, 65536], np.int32), ([-1, 2], np.int32), ([0.0, 2.0], np.uint8)],
)
def test_labels_take_the_smallest_type(values, dtype):
    label = labels.as_label(label_of(values))
    assert label.array.dtype == dtype
    assert label.array.ravel().tolist() == values


def test_a_label_of_the_right_type_is_left_alone():
    label = label_of(np.array([0, 1], np.uint8))
    assert labels.as_label(label) is label


def test_a_scale_slope_may_leave_a_rest():
    assert labels.as_label(label_of([0.9999999, 2.0000002])).array.ravel().tolist() == [1, 2]


@pytest.mark.parametrize("wrong", [0.5, np.nan, np.inf])
def test_fractions_are_refused_with_examples(wrong):
    with pytest.raises(Refused, match=f"LABEL_NOT_INTEGER: 1 voxels are not whole numbers: {wrong}"):
        labels.as_label(label_of([0.0, wrong, 1.0]))


def test_colours_are_not_labels():
    with pytest.raises(Refused, match="LABEL_CHANNELS.*3"):
        labels.as_label(Volume(np.zeros((3, 2, 2, 1), np.uint8), np.eye(4)))


def test_complex_numbers_are_not_labels():
    with pytest.raises(Refused, match="LABEL_NOT_INTEGER"):
        labels.as_label(label_of(np.zeros(2, complex)))


def test_values_beyond_the_classes_are_named():
    label = label_of([0, 1, 2, 255])
    with pytest.raises(Refused, match=r"LABEL_OUT_OF_RANGE: values 2, 255; the config has 2 classes \(0 to 1\)"):
        labels.check_label(label, label, 2)
    with pytest.raises(Refused, match="values -1"):
        labels.check_label(label_of([0, -1]), label_of([0, 0]), 2)
    with pytest.raises(Refused, match="2, 3, 4, 5, 6 and 3 more"):
        labels.check_label(label_of(range(10)), label_of(range(10)), 2)
    with pytest.raises(Refused, match="LABEL_OUT_OF_RANGE"):
        labels.as_label(label_of([0, 2.0**40]))


@given(shapes, affines(), codes)
def test_a_label_stored_in_another_orientation_is_turned(shape, affine, stored):
    image = numbered(shape, affine)
    turned = geometry.reorient(image, stored)
    back = labels.on_grid(turned, image.affine, image.spatial_shape)
    assert np.array_equal(back.array, image.array)
    assert np.array_equal(back.affine, image.affine)


@given(st.tuples(*[st.integers(2, 6)] * 3), affines(), st.sampled_from((0, 1, 2)), st.sampled_from((0.5, 1, -2)))
def test_a_shifted_label_is_refused(shape, affine, axis, voxels):
    image = numbered(shape, affine)
    moved = image.affine.copy()
    moved[:3, 3] += voxels * moved[:3, axis]
    with pytest.raises(Refused, match="LABEL_GRID_MISMATCH.*mm apart"):
        labels.on_grid(image.with_array(image.array, moved), image.affine, shape)


def test_rounding_in_the_header_is_accepted_and_gone():
    image = numbered((5, 5, 5), np.diag([0.7, 0.7, 3, 1]))
    rounded = image.affine.astype(np.float32).astype(np.float64) + 1e-3
    rounded[3] = [0, 0, 0, 1]
    label = labels.on_grid(image.with_array(image.array, rounded), image.affine, image.spatial_shape)
    assert np.array_equal(label.affine, image.affine)


def test_a_mirrored_label_is_not_taken_for_the_image():
    """Same box of voxels, opposite direction: turned, never used as it lies."""
    image = numbered((4, 4, 4), np.eye(4))
    mirrored = np.diag([-1.0, 1, 1, 1])
    mirrored[0, 3] = 3
    label = labels.on_grid(image.with_array(image.array, mirrored), image.affine, image.spatial_shape)
    assert np.array_equal(label.array, image.array[:, ::-1])


def test_other_shapes_are_named():
    with pytest.raises(Refused, match="label of 4 x 5 x 7 voxels for an image of 4 x 5 x 6"):
        labels.on_grid(numbered((4, 5, 7), np.eye(4)), np.eye(4), (4, 5, 6))


def test_other_spacing_is_refused():
    with pytest.raises(Refused, match="LABEL_GRID_MISMATCH"):
        labels.check_label(numbered((4, 5, 6), np.diag([1, 1, 1.1, 1])), geometry.Grid(np.eye(4), (4, 5, 6)), 200)


def test_count_by_plane():
    label = np.array([[[0, 1]], [[1, 1]]], np.uint8)
    assert labels.count(label, 3).tolist() == [[1, 1, 0], [0, 2, 0]]
