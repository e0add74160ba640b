import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage

from sparkmed.config import FieldQuality
from sparkmed.formats import raster
from sparkmed.hcs.image_quality import flags, measure
from sparkmed.rejection import InputError, Refused

PLAIN = FieldQuality()


def cells(shape=(256, 300), seed=0):
    rng = np.random.default_rng(seed)
    i, j = np.ogrid[: shape[0], : shape[1]]
    field = np.full(shape, 200.0)
    for a, b in rng.random((60, 2)) * shape:
        field[(i - a) ** 2 + (j - b) ** 2 < 64] += 1500
    return field


@pytest.mark.parametrize("exponent", [0, -1, -2, -3])
@pytest.mark.parametrize("shape", [(512, 512), (400, 640), (640, 401)])
def test_a_known_power_law_has_its_slope(exponent, shape):
    """Power is radius ** exponent; a ring of radius r holds about 2 pi r frequencies, so its sum falls by one less. The number of a
    ring is its outer radius, which makes steep slopes a little steeper."""
    phases = np.fft.fft2(np.random.default_rng(0).normal(size=shape))
    phases /= np.abs(phases)
    u, v = np.fft.fftfreq(shape[0], 1 / shape[0]), np.fft.fftfreq(shape[1], 1 / shape[1])
    radius = np.hypot(u[:, None], v[None])
    radius[0, 0] = 1
    field = np.fft.ifft2(phases * radius ** (exponent / 2)).real
    assert measure(field, PLAIN).slope == pytest.approx(exponent + 1, abs=0.25)


def test_rings_are_those_of_the_whole_spectrum():
    """Half of the spectrum, twice, is all of it: even and odd edges."""
    for shape in ((64, 64), (65, 97), (80, 33)):
        field = np.random.default_rng(1).normal(size=shape)
        power = np.abs(np.fft.fft2(field - field.mean())) ** 2
        u, v = (np.fft.fftfreq(n, 1 / n) for n in shape)
        ring = np.floor(np.hypot(u[:, None], v[None])).astype(int) + 1
        rings = np.arange(2, min(shape) // 8)
        sums = [power[ring == r].sum() for r in rings]
        expected = np.polyfit(np.log(rings), np.log(sums), 1)[0] if rings.size > 1 else math.nan
        assert measure(field, PLAIN).slope == pytest.approx(expected, abs=1e-3, nan_ok=True)


def test_blur_lowers_slope_and_focus():
    found = [measure(ndimage.gaussian_filter(cells(), s), PLAIN) for s in (0.5, 1, 2, 4, 8)]
    for one, next_ in zip(found, found[1:], strict=False):
        assert next_.slope < one.slope and next_.focus < one.focus
    assert found[0].slope - found[3].slope > 0.5 and found[0].focus > 20 * found[3].focus


@given(st.floats(0.1, 20), st.floats(-100, 1000))
def test_gain_and_offset_change_neither(gain, offset):
    field = cells((64, 70))
    before, after = measure(field, PLAIN), measure(field * gain + offset, PLAIN)
    assert after.slope == pytest.approx(before.slope, abs=1e-3) and after.focus == pytest.approx(before.focus, rel=1e-3)
    assert after.mean == pytest.approx(before.mean * gain + offset) and after.deviation == pytest.approx(before.deviation * gain)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.int32, np.float32, np.float64])
def test_plain_figures_are_numpys(dtype):
    field = np.random.default_rng(0).integers(0, 120, (50, 70)).astype(dtype)
    field[:3, :5] = 127
    found = measure(field, PLAIN, 12)
    assert found.mean == pytest.approx(field.mean(dtype=np.float64)) and found.deviation == pytest.approx(
        field.std(dtype=np.float64)
    )
    assert found.maximum == 127 and found.at_maximum == 15 / 3500 and found.cells == 12
    assert found.background == np.sort(field.ravel())[math.ceil(0.05 * 3500) - 1]
    laplacian = ndimage.laplace(field.astype(np.float64))[1:-1, 1:-1]
    assert found.focus == pytest.approx(laplacian.var() / field.var(dtype=np.float64), rel=1e-4)
    np.testing.assert_equal(dataclasses.astuple(measure(field.T.copy().T, PLAIN, 12))[2:], dataclasses.astuple(found)[2:])


def test_saturation_is_of_the_bits_of_the_camera():
    field = np.minimum(cells(), 4000).astype(np.uint16)
    field[:10, :30] = 4095
    share = 300 / field.size
    assert measure(field, PLAIN).saturated == 0
    assert measure(field, FieldQuality(bits=12)).saturated == measure(field.astype(float), FieldQuality(bits=12)).saturated == share
    assert measure(field, PLAIN).at_maximum == share and measure(field, PLAIN).maximum == 4095
    assert math.isnan(measure(field.astype(np.float32), PLAIN).saturated)
    full = np.full((9, 9), 255, np.uint8)
    assert measure(full, PLAIN).saturated == 1


@pytest.mark.parametrize("value", [0, 7])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_of_a_flat_field_sharpness_is_undefined(value, dtype):
    found = measure(np.full((64, 64), value, dtype), PLAIN)
    assert math.isnan(found.slope) and math.isnan(found.focus) and math.isnan(found.cells)
    assert (found.deviation, found.mean, found.background) == (0, value, value)
    assert flags(found, FieldQuality(slope=-2, focus=1, least_cells=1)) == ("empty",)


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (1, 50), (23, 400)])
def test_of_a_small_field_the_slope_is_undefined(shape):
    field = np.arange(np.prod(shape)).reshape(shape).astype(np.uint16)
    found = measure(field, PLAIN)
    assert math.isnan(found.slope) and math.isnan(found.focus) == (min(shape) < 3)


@pytest.mark.parametrize(
    ("field", "reason"),
    [
        (np.array([[np.nan, 1]]), "NOT_FINITE"),
        (np.array([[np.inf]]), "NOT_FINITE"),
        (np.array([[1e300]]), "NOT_FINITE"),
        (np.ones((3, 3), complex), "VOXEL_TYPE"),
    ],
)
def test_fields_that_are_refused(field, reason):
    with pytest.raises(Refused, match=reason):
        measure(field, PLAIN)
    with pytest.raises(InputError, match="is .I, J."):
        measure(np.ones((1, 3, 3, 1)), PLAIN)


def test_flags_are_the_limits_of_the_config():
    found = measure(ndimage.gaussian_filter(cells(), 4), PLAIN, 3)
    assert flags(found, PLAIN) == ()
    strict = FieldQuality(slope=found.slope + 0.1, background=found.background - 1, least_cells=4, empty=found.deviation)
    assert flags(found, strict) == ("empty", "blurred", "bright", "few_cells")
    just = FieldQuality(slope=found.slope, focus=found.focus, background=found.background, least_cells=3, empty=None)
    assert flags(found, just) == ()
    assert flags(found, FieldQuality(focus=found.focus * 1.01)) == ("blurred",)
    half = np.zeros((40, 40), np.uint8)
    half[:, :2] = 255
    assert flags(measure(half, PLAIN), PLAIN) == ("saturated",)
    assert flags(measure(half, PLAIN), FieldQuality(saturated=0.05)) == ()
    assert set(flags(found, strict)) <= set(FieldQuality.model_fields["leave_out"].annotation.__args__[0].__args__)


def test_nothing_counted_is_not_few():
    found = measure(cells(), PLAIN)
    assert math.isnan(found.cells) and flags(found, FieldQuality(least_cells=10)) == ()


def test_a_real_field_of_nuclei(shared_data):

    path = shared_data / "hcs_plate" / "images" / "Channel2-05-A-05.tif"
    field = raster.read_array(path.read_bytes())[0, ..., 0]
    found = measure(field, PLAIN)
    blurred = measure(ndimage.gaussian_filter(field.astype(np.float32), 3), PLAIN)
    assert -1.6 < found.slope < -0.8 and blurred.slope < found.slope - 0.5 and blurred.focus < found.focus / 5
    assert found.background <= 5 and flags(found, PLAIN) == ()
