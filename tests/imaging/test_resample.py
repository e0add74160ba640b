import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import ndimage

from sparkmed.imaging import geometry, phantom, resample
from sparkmed.imaging.volume import Volume
from sparkmed.rejection import Refused

from .grids import affines, numbered, ramp, world

STEP = st.floats(0.4, 3.0)


def inside(volume, old, margin):
    """Voxels of ``volume`` more than ``margin`` voxels of ``old`` inside its outer voxel centres."""
    index = world(np.linalg.inv(old.affine) @ volume.affine, volume.spatial_shape)
    last = np.array(old.spatial_shape)[:, None, None, None] - 1
    margin = np.asarray(margin)[:, None, None, None]
    return ((index >= margin - 1e-6) & (index <= last - margin + 1e-6)).all(axis=0)


def reach(old, new):
    """Voxels of ``old`` that smoothing for ``new`` looks away, and one."""
    factors = np.linalg.norm(np.linalg.inv(old.affine)[:3, :3] @ new.affine[:3, :3], axis=1)
    return np.where(factors > 1, np.ceil(4 * np.sqrt(np.maximum(factors**2 - 1, 0) / (8 * np.log(2)))) + 1, 0)


def assert_ramp(new, old):
    expected = ramp(new.affine, new.spatial_shape, dtype=np.float64).array
    where = inside(new, old, reach(old, new))
    np.testing.assert_allclose(new.array[0][where], expected[0][where], rtol=3e-6, atol=3e-3)
    return where.sum()


@given(affines(), st.tuples(STEP, STEP, STEP))
def test_to_spacing_keeps_linear_functions_of_the_world(affine, factors):
    old = ramp(affine, (20, 19, 18))
    wanted = tuple(s * f for s, f in zip(old.spacing, factors, strict=True))
    new = resample.to_spacing(old, wanted)
    np.testing.assert_allclose(new.spacing, wanted, rtol=1.01e-3)
    assert new.array.dtype == np.float32
    assert_ramp(new, old)


@given(affines(sheared=True), st.tuples(*[st.integers(1, 40)] * 3))
def test_to_size_keeps_the_field_of_view_and_linear_functions(affine, size):
    old = ramp(affine, (20, 19, 18))
    new = resample.to_size(old, size)
    assert new.spatial_shape == size
    for edge in (0, 1):  # outer corners of the outer voxels
        ends = [v.affine[:3, :3] @ (np.array(v.spatial_shape) * edge - 0.5) + v.affine[:3, 3] for v in (old, new)]
        np.testing.assert_allclose(*ends, atol=1e-8)
    assert_ramp(new, old)


@given(affines(), affines())
def test_to_grid_keeps_linear_functions_on_any_oblique(affine, turned):
    old = ramp(affine, (12, 13, 14))
    centre = affine @ [5.5, 6, 6.5, 1]
    turned = turned.copy()
    turned[:3, :3] *= 0.9 / np.linalg.norm(np.linalg.inv(affine)[:3, :3] @ turned[:3, :3], axis=1).max()  # finer: not smoothed
    turned[:3, 3] = centre[:3] - turned[:3, :3] @ [4, 4, 4]
    new = resample.to_grid(old, turned, (9, 9, 9), cval=-7777)
    assert assert_ramp(new, old) > 50
    assert np.array_equal(new.affine, turned)


@pytest.mark.parametrize("angle", [0, 30])
def test_to_grid_coarser_keeps_linear_functions_inside(angle):
    old = ramp(np.diag([1.0, 1.0, 1.0, 1.0]), (40, 40, 40))
    c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    turned = np.eye(4)
    turned[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) * 2.5
    turned[:3, 3] = 19.5 - turned[:3, :3] @ [3.5, 3.5, 3.5]
    assert assert_ramp(resample.to_grid(old, turned, (8, 8, 8)), old) >= 64


@given(affines(oblique=False), st.tuples(*[st.integers(0, 4)] * 3))
def test_grids_with_swapped_and_flipped_axes_copy_voxels(affine, first):
    old = numbered((6, 7, 8), affine)
    for codes in ("RAS", "SPL", "AIR"):
        turned = geometry.reorient(old, codes)
        box = turned.affine.copy()
        box[:3, 3] += box[:3, :3] @ first
        shape = tuple(n - f for n, f in zip(turned.spatial_shape, first, strict=True))
        for order in (0, 1):
            new = resample.to_grid(old, box, shape, order)
            assert np.array_equal(new.array, turned.array[:, first[0] :, first[1] :, first[2] :])


@given(affines(), st.sampled_from((0, 1)))
def test_parallel_and_oblique_paths_agree(affine, order):
    shape = (9, 11, 7)  # with these factors no new voxel lies midway between two old ones
    old = ramp(affine, shape) if order else numbered(shape, affine)
    grid = resample.spaced(old, tuple(s * f for s, f in zip(old.spacing, (0.71, 1.6, 1.13), strict=True)))
    to_source = np.linalg.inv(old.affine) @ grid.affine
    a = resample._separable(old.array, to_source, (0, 1, 2), grid.spatial_shape, order, 0.0)
    b = resample._oblique(old.array, to_source, grid.spatial_shape, order, 0.0)
    if order:
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-2)
    else:
        assert np.array_equal(a, b)


def test_a_right_grid_is_left_bit_for_bit():
    volume = Volume(np.random.default_rng(0).normal(size=(2, 5, 6, 1)), np.diag([-0.7, 0.7, 3, 1.0]))
    assert resample.to_spacing(volume, (0.7, 0.7, 3)) is volume
    assert resample.to_spacing(volume, (0.7, 0.7000001, 99)) is volume  # nothing to resample along one slice
    assert resample.to_size(volume, (5, 6, 1)) is volume
    assert resample.to_grid(volume, volume.affine, (5, 6, 1)) is volume


def test_a_right_grid_is_left_even_with_holes():
    volume = Volume(np.full((1, 3, 3, 3), np.nan), np.eye(4))
    assert resample.to_spacing(volume, (1, 1, 1)) is volume


def test_the_field_of_view_is_covered():
    for n, have, want in [(10, 1, 3), (10, 1, 0.3), (7, 2.5, 1), (2, 1, 50), (100, 0.7, 1.5)]:
        grid = resample.spaced(geometry.Grid(np.diag([have, have, 1, 1]), (n, n, 1)), (want, want, 1))
        length = grid.spatial_shape[0] * want
        assert -0.01 * want < length - n * have < want
        middle = grid.affine @ [(grid.spatial_shape[0] - 1) / 2, 0, 0, 1]
        assert middle[0] == pytest.approx((n - 1) / 2 * have)


def test_single_slices_stay_single():
    volume = ramp(np.diag([1.0, 1, 1, 1]), (30, 20, 1))
    new = resample.to_spacing(volume, (2, 2, 0.1))
    assert new.spatial_shape == (15, 10, 1)
    assert new.spacing == (2, 2, 1)
    with pytest.raises(Refused, match="SINGLETON_AXIS.*along K"):
        resample.to_size(volume, (10, 10, 2))


def test_halving_averages_instead_of_skipping():
    stripes = np.zeros((1, 64, 8, 1))
    stripes[:, ::2] = 100
    half = resample.to_size(Volume(stripes, np.eye(4)), (32, 8, 1)).array
    assert np.ptp(half[:, 4:-4]) < 1
    assert half[:, 4:-4].mean() == pytest.approx(50, abs=0.5)
    aliased = resample.to_size(Volume(stripes, np.eye(4)), (32, 8, 1), order=0).array
    assert set(np.unique(aliased)) <= {0, 100}


def test_a_long_axis_shrinks_without_filling_the_memory():
    volume = Volume(np.arange(200_000, dtype=np.float32).reshape(1, -1, 1, 1), np.eye(4))
    new = resample.to_size(volume, (2, 1, 1)).array.ravel()
    assert new[0] + new[1] == pytest.approx(199_999, rel=1e-4)


def test_constant_stays_constant_at_the_edges():
    volume = Volume(np.full((1, 9, 10, 11), 250, np.int16), np.eye(4))
    for new in (resample.to_spacing(volume, (2.2, 0.7, 1.3)), resample.to_size(volume, (3, 30, 11))):
        np.testing.assert_allclose(new.array, 250, rtol=1e-6)


@given(affines(), st.tuples(STEP, STEP, STEP), st.integers(0, 2**16))
def test_labels_get_no_new_values_and_keep_their_type(affine, factors, seed):
    old = Volume(np.random.default_rng(seed).choice([0, 3, 200], (1, 9, 8, 7)).astype(np.uint8), affine)
    new = resample.to_spacing(old, tuple(s * f for s, f in zip(old.spacing, factors, strict=True)), order=0)
    assert new.array.dtype == np.uint8
    assert set(np.unique(new.array)) <= set(np.unique(old.array))


@pytest.mark.parametrize("spacing", [(1, 1, 1), (1.5, 1.5, 3), (0.8, 2.0, 1.1)])
@pytest.mark.parametrize("oblique", [False, True])
def test_a_sphere_keeps_its_millilitres(spacing, oblique):
    affine = np.eye(4)
    if oblique:
        c, s = np.cos(0.4), np.sin(0.4)
        affine[:3, :3] = [[c, -s, 0], [s, c, 0], [0, 0, 1]]
    shape = (60, 60, 60)
    centre = affine[:3, :3] @ [29.5, 29.5, 29.5]
    sphere = Volume(phantom.ellipsoid(affine, shape, centre, (20, 20, 20)).astype(np.uint8)[None], affine)
    true = 4 / 3 * np.pi * 20**3 / 1000
    assert sphere.array.sum() * sphere.voxel_ml == pytest.approx(true, rel=0.005)
    new = resample.to_spacing(sphere, spacing, order=0)
    assert new.array.sum() * new.voxel_ml == pytest.approx(true, rel=0.02)
    soft = resample.to_spacing(sphere, spacing, order=1)
    assert soft.array.sum(dtype=np.float64) * soft.voxel_ml == pytest.approx(true, rel=0.005)
    grid = np.diag([*spacing, 1.0])
    grid[:3, 3] = centre - 30
    upright = resample.to_grid(sphere, grid, tuple(int(60 / s) for s in spacing), order=0)
    assert upright.array.sum() * upright.voxel_ml == pytest.approx(true, rel=0.02)


@pytest.mark.parametrize("size", [(40, 40, 40), (5, 9, 40), (17, 3, 6), (20, 18, 22)])
def test_to_size_agrees_with_scipy(size):
    shape = (20, 18, 22)
    array = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    factors = np.divide(shape, size)
    sigmas = np.sqrt(np.maximum(factors**2 - 1, 0) / (8 * np.log(2)))
    radius = np.ceil(4 * sigmas).astype(int)
    smooth = ndimage.gaussian_filter(array, sigmas, mode="nearest", radius=radius)
    expected = ndimage.zoom(smooth, 1 / factors, order=1, mode="nearest", grid_mode=True)
    np.testing.assert_allclose(resample.to_size(Volume(array[None], np.eye(4)), size).array[0], expected, atol=1e-5)


@pytest.mark.parametrize("factor", [1.5, 2, 3, 4, 6])
def test_labels_stay_where_they_are_when_new_voxels_lie_midway(factor):
    shape = (96, 96, 96)
    ball = phantom.ellipsoid(np.eye(4), shape, (47.5, 47.5, 47.5), (40, 40, 40))
    new = resample.to_spacing(Volume(ball.astype(np.uint8)[None], np.eye(4)), (factor,) * 3, order=0)
    centre = world(new.affine, new.spatial_shape)[:, new.array[0] > 0].mean(axis=1)
    np.testing.assert_allclose(centre, 47.5, atol=0.05 * factor)


@pytest.mark.parametrize("angle", [0, 20])
def test_beyond_the_field_of_view_is_cval_or_the_outer_voxels(angle):
    old = Volume(np.full((2, 10, 10, 10), 5, np.int16), np.eye(4))
    c, s = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    grid = np.eye(4)
    grid[:2, :2] = [[c, -s], [s, c]]
    grid[:3, 3] = (-6, -6, -3)
    for order in (0, 1):
        new = resample.to_grid(old, grid, (20, 20, 16), order, cval=-1)
        index = world(grid, (20, 20, 16))
        within = ((index >= -0.5) & (index <= 9.5)).all(axis=0)
        assert np.array_equal(new.array[1] == 5, within)
        assert np.array_equal(new.array[1] == -1, ~within)
        assert (resample.to_grid(old, grid, (20, 20, 16), order, cval=None).array == 5).all()


def test_each_channel_is_resampled_for_itself():
    volume = Volume(np.stack([np.full((6, 6, 6), c) for c in (1.0, -2.0)]), np.eye(4))
    new = resample.to_spacing(volume, (0.5, 2, 1))
    np.testing.assert_allclose(new.array[0], 1, rtol=1e-6)
    np.testing.assert_allclose(new.array[1], -2, rtol=1e-6)


@given(st.integers(1, 12), st.integers(1, 40), affines(oblique=False))
def test_size_there_and_back_keeps_smooth_images(n, m, affine):
    assume(n <= m and (n > 1 or m == 1))
    old = ramp(affine, (n, 5, 4))
    back = resample.to_size(resample.to_size(old, (m, 5, 4)), (n, 5, 4))
    np.testing.assert_allclose(back.affine, old.affine, atol=1e-8)
    assert back.spatial_shape == old.spatial_shape


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_values_that_would_spread_are_refused(value):
    array = np.zeros((1, 4, 4, 4))
    array[0, 1, 1, 1] = value
    with pytest.raises(Refused, match="NOT_FINITE: 1 voxels"):
        resample.to_spacing(Volume(array, np.eye(4)), (2, 2, 2))


def test_complex_voxels_are_refused():
    with pytest.raises(Refused, match="VOXEL_TYPE"):
        resample.to_spacing(Volume(np.ones((1, 4, 4, 4), complex), np.eye(4)), (2, 2, 2))


def test_a_header_in_the_wrong_unit_does_not_fill_the_memory():
    with pytest.raises(Refused, match="TOO_LARGE"):
        resample.to_spacing(Volume(np.zeros((1, 64, 64, 64)), np.diag([1000.0, 1000, 1000, 1])), (1, 1, 1))
    with pytest.raises(Refused, match="TOO_LARGE"):
        resample.to_grid(Volume(np.zeros((1, 4, 4, 4)), np.eye(4)), np.eye(4), (2**11, 2**11, 2**11))


@pytest.mark.parametrize("spacing", [(0, 1, 1), (-1, 1, 1), (1, 1), (np.nan, 1, 1), (np.inf, 1, 1)])
def test_wrong_spacings_are_refused(spacing):
    with pytest.raises(ValueError, match="spacing"):
        resample.to_spacing(ramp(np.eye(4), (3, 3, 3)), spacing)


def test_wrong_sizes_and_orders_are_refused():
    with pytest.raises(ValueError, match="size"):
        resample.to_size(ramp(np.eye(4), (3, 3, 3)), (0, 3, 3))
    with pytest.raises(ValueError, match="order"):
        resample.to_size(ramp(np.eye(4), (3, 3, 3)), (4, 3, 3), order=3)


@given(st.tuples(*[st.floats(0.5, 2.5)] * 3), st.sampled_from([np.int16, np.float32]))
def test_slabs_give_what_whole_passes_give(spacing, dtype):
    """One pass after the other along whole axes, what shrinks first: the same bits, also where slabs and the image are uneven."""
    array = np.random.default_rng(0).normal(100, 30, (1, 21, 34, 17)).astype(dtype)
    old = Volume(array, np.eye(4))
    grid = resample.spaced(geometry.grid_of(old), spacing)
    expected, passes = array[0].astype(np.float32), []
    for a, (n, m) in enumerate(zip(old.spatial_shape, grid.spatial_shape, strict=True)):
        weights = resample._smooth_linear(resample._positions(grid.affine, a, a, m), n, grid.affine[a, a])
        if not resample._is_identity(weights):
            passes.append((m / n, a, weights))
    for _, a, weights in sorted(passes, key=lambda p: p[0]):
        expected = resample._along(expected, weights, a)
    np.testing.assert_array_equal(resample.to_spacing(old, spacing).array[0], expected)


@given(affines(oblique=False), st.tuples(*[st.integers(1, 30)] * 3), st.integers(1, 9), st.integers(0, 2))
def test_planes_are_those_of_the_whole(affine, size, many, axis):
    rng = np.random.default_rng(0)
    old = Volume(rng.normal(size=(2, 11, 12, 13)).astype(np.float32), affine)
    turned = geometry.reorient(old, "SAL")
    new = resample.sized(geometry.grid_of(turned), size)
    whole = resample.to_grid(old, new.affine, new.spatial_shape, cval=None).array
    way = resample.Planes.between(old, new)
    lows, highs = way.ends(axis)
    to = way.axes[axis]
    for start in range(0, size[to], many):
        stop = min(start + many, size[to])
        low, high = lows[start:stop].min(), highs[start:stop].max()
        part = old.array[(slice(None),) * (1 + axis) + (slice(low, high),)]
        expected = whole[(slice(None),) * (1 + to) + (slice(start, stop),)]
        assert np.array_equal(way.made(part, low, axis, start, stop), expected)


def test_planes_between_oblique_grids_are_none():
    c, s = np.cos(0.3), np.sin(0.3)
    turned = geometry.Grid(np.array([[c, -s, 0, 0], [s, c, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]), (5, 5, 5))
    with pytest.raises(ValueError, match="oblique"):
        resample.Planes.between(geometry.Grid(np.eye(4), (5, 5, 5)), turned)
