import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkmed.imaging import geometry
from sparkmed.imaging.geometry import Grid
from sparkmed.rejection import InputError

from .grids import affines, codes, numbered, shapes, world


def at_places(volume):
    """Value by place in micrometres: what a volume says about the world."""
    places = np.rint(world(volume.affine, volume.spatial_shape).reshape(3, -1).T * 1e3).astype(int)
    return dict(zip(map(tuple, places), volume.array[0].ravel().tolist(), strict=True))


@given(shapes, affines(sheared=True), codes)
def test_reorienting_moves_no_voxel_in_the_world(shape, affine, wanted):
    volume = numbered(shape, affine)
    turned = geometry.reorient(volume, wanted)
    assert sorted(turned.array.ravel()) == sorted(volume.array.ravel())
    index = np.unravel_index(np.argsort(turned.array.ravel()), turned.spatial_shape)
    places = world(turned.affine, turned.spatial_shape)[(slice(None), *index)]
    np.testing.assert_allclose(places, world(affine, shape).reshape(3, -1), atol=1e-9)


@given(shapes, affines(), codes)
def test_reorienting_gives_the_codes_and_is_undone_exactly(shape, affine, wanted):
    volume = numbered(shape, affine)
    turned = geometry.reorient(volume, wanted)
    assert geometry.axis_codes(turned.affine) == wanted
    assert turned.array.flags.c_contiguous
    grid = geometry.reoriented(geometry.grid_of(volume), wanted)
    assert grid.spatial_shape == turned.spatial_shape
    assert np.array_equal(grid.affine, turned.affine)
    back = geometry.reorient(turned, geometry.axis_codes(affine))
    assert np.array_equal(back.array, volume.array)
    np.testing.assert_allclose(back.affine, affine, atol=1e-9)


def test_a_known_flip():
    volume = numbered((2, 3, 4), np.diag([-1.0, -2.0, 3.0, 1.0]))
    turned = geometry.reorient(volume, "RAS")
    assert np.array_equal(turned.array, volume.array[:, ::-1, ::-1])
    assert np.array_equal(turned.affine, [[1, 0, 0, -1], [0, 2, 0, -4], [0, 0, 3, 0], [0, 0, 0, 1]])
    assert at_places(turned) == at_places(volume)


def test_the_right_orientation_is_left_alone():
    volume = numbered((2, 3, 4), np.eye(4))
    assert geometry.reorient(volume, "RAS") is volume


@pytest.mark.parametrize("wrong", ["RRS", "RA", "RASL", "XYZ", "ras", ""])
def test_wrong_codes_are_named(wrong):
    with pytest.raises(InputError, match=repr(wrong)):
        geometry.reorient(numbered((2, 2, 2), np.eye(4)), wrong)


@pytest.mark.parametrize("degrees, expected", [(0, "RAS"), (44, "RAS"), (46, "ALS"), (90, "ALS"), (136, "LPS"), (180, "LPS")])
def test_codes_of_obliques_are_the_closest(degrees, expected):
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    assert geometry.axis_codes(np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])) == expected


def test_codes_at_45_degrees_use_each_axis_once():
    h = np.sqrt(0.5)
    codes = geometry.axis_codes(np.array([[h, h, 0, 0], [h, -h, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]))
    assert sorted(codes.translate(str.maketrans("LPI", "RAS"))) == ["A", "R", "S"]


@given(affines())
def test_codes_agree_with_nibabel(affine):
    from nibabel.orientations import aff2axcodes

    cosines = np.abs(affine[:3, :3]) / np.linalg.norm(affine[:3, :3], axis=0)
    if cosines.max(axis=0).min() > 0.8:  # beyond, two answers are close and nibabel goes by another rule
        assert geometry.axis_codes(affine) == "".join(aff2axcodes(affine))


def test_lps_to_ras_is_its_own_inverse():
    matrix = np.arange(16.0).reshape(4, 4)
    assert np.array_equal(geometry.lps_to_ras(geometry.lps_to_ras(matrix)), matrix)
    assert geometry.lps_to_ras(np.eye(4))[0, 0] == -1


@given(affines(), shapes)
def test_corners_are_centres_of_the_corner_voxels(affine, shape):
    corners = geometry.corners(affine, shape)
    np.testing.assert_allclose(corners[0], affine[:3, 3])
    np.testing.assert_allclose(corners[-1], world(affine, shape)[:, -1, -1, -1], atol=1e-9)
    np.testing.assert_allclose(corners[1], world(affine, shape)[:, 0, 0, -1], atol=1e-9)


@pytest.mark.parametrize(
    "spacing, shift, same",
    [(1, 0.09, True), (1, 0.11, False), (20, 0.19, True), (20, 0.21, False), (0.001, 0.0002, True), (0.001, 0.0003, False)],
)
def test_tolerance_follows_the_voxel(spacing, shift, same):
    a = Grid(np.diag([spacing, spacing, spacing, 1]), (5, 5, 5))
    moved = a.affine.copy()
    moved[0, 3] += shift
    assert geometry.same_grid(a, Grid(moved, (5, 5, 5))) is same


def test_a_small_error_of_spacing_adds_up_over_the_image():
    a, b = (Grid(np.diag([s, s, s, 1]), (500, 500, 10)) for s in (1.0, 1.001))
    assert not geometry.same_grid(a, b)
    assert geometry.same_grid(a, b, tolerance=1.0)


def test_slice_thickness_of_a_single_slice_does_not_count():
    a, b = (Grid(np.diag([1, 1, s, 1]), (50, 50, 1)) for s in (0.01, 5))
    assert geometry.same_grid(a, b)


def test_other_shapes_are_other_grids():
    assert not geometry.same_grid(Grid(np.eye(4), (5, 5, 5)), Grid(np.eye(4), (5, 5, 6)), tolerance=100)


@pytest.mark.parametrize("affine", [np.zeros((4, 4)), np.full((4, 4), np.nan), np.eye(3)])
def test_grid_refuses_what_is_no_affine(affine):
    with pytest.raises(ValueError, match="affine"):
        Grid(affine, (2, 2, 2))


@given(st.integers(-3, 0))
def test_grid_refuses_empty_shapes(n):
    with pytest.raises(ValueError, match="spatial_shape"):
        Grid(np.eye(4), (2, n, 2))


def test_grid_takes_sixteen_numbers():
    assert Grid(np.diag([1, 2, 3, 1]).ravel().tolist(), (1, 1, 1)).affine[2, 2] == 3
