import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkmed.config import Intensity
from sparkmed.imaging import intensity
from sparkmed.rejection import Refused

KINDS = [
    Intensity(kind="none"),
    Intensity(kind="zscore"),
    Intensity(kind="zscore", nonzero=True),
    Intensity(kind="window", low=-100, high=300),
    Intensity(kind="percentile"),
    Intensity(kind="percentile", nonzero=True),
]


@given(st.floats(-1e6, 1e6), st.floats(1e-2, 1e5), st.sampled_from([np.float32, np.float64, np.int32]))
def test_zscore_is_blind_to_scale_and_offset(offset, scale, dtype):
    values = np.random.default_rng(0).normal(size=(2, 6, 7, 8))
    array = (values * scale * 100 + offset).astype(dtype)
    result = intensity.normalise(array, Intensity())
    if array.std() > 1e-4 * np.abs(array).max():
        np.testing.assert_allclose(result.mean(axis=(1, 2, 3)), 0, atol=3e-3)
        np.testing.assert_allclose(result.std(axis=(1, 2, 3)), 1, atol=3e-3)


@pytest.mark.parametrize("spec", KINDS)
@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32, np.float64, np.int32])
def test_a_part_is_scaled_as_in_the_whole(spec, dtype):
    array = np.random.default_rng(0).normal(90, 30, (2, 9, 110, 1200)).astype(dtype).transpose(0, 3, 2, 1)
    whole = intensity.normalise(array, spec)
    part = (slice(None), slice(3, 50), slice(None), slice(2, 4))
    np.testing.assert_array_equal(intensity.scaled(array[part], intensity.scales(array, spec)), whole[part])


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_zscore_in_blocks_is_that_of_the_whole(order):
    """More voxels than a block, not a multiple of one: the bits of numpy's own mean and deviation."""
    array = np.random.default_rng(0).normal(40, 300, (131, 101, 97)).astype(np.int16).transpose(order)
    values = array.astype(np.float32)
    mean = values.mean(dtype=np.float64)
    deviation = np.sqrt(np.square(values - np.float32(mean)).mean(dtype=np.float64))
    expected = (values - np.float32(mean)) / np.float32(deviation)
    np.testing.assert_array_equal(intensity.normalise(array[None], Intensity())[0], expected)


def test_percentiles_of_small_integers_far_apart_do_not_wrap():
    array = np.array([-30000, 30000], np.int16).repeat(500).reshape(1, 10, 10, 10)
    spec = Intensity(kind="percentile", low=20, high=49.99)
    np.testing.assert_array_equal(intensity.normalise(array, spec), intensity.normalise(array.astype(np.float32), spec))


def test_each_channel_has_its_own_scale():
    array = np.stack([np.arange(8.0), 1000 * np.arange(8.0)]).reshape(2, 2, 2, 2)
    result = intensity.normalise(array, Intensity())
    np.testing.assert_allclose(result[0], result[1], atol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64, np.int64, bool])
@pytest.mark.parametrize("spec", KINDS, ids=lambda s: f"{s.kind}-{s.nonzero}")
def test_constants_give_no_nan(spec, dtype):
    for value in (0, 1, 0.1, 113, 1.7e6):
        array = np.full((2, 3, 4, 1), value).astype(dtype)
        result = intensity.normalise(array, spec)
        assert result.dtype == np.float32 and result.shape == array.shape
        assert np.isfinite(result).all()
        if spec.kind in ("zscore", "percentile"):
            assert not result.any()


def test_rounding_errors_are_not_blown_up():
    array = np.full((1, 9, 9, 9), 100, np.float32)
    array[0, 3] = np.nextafter(np.float32(100), np.float32(200))
    assert not intensity.normalise(array, Intensity()).any()


def test_nonzero_takes_statistics_from_the_voxels_that_are_not_zero():
    array = np.zeros((1, 4, 4, 4))
    array[0, 0] = np.arange(1, 17).reshape(4, 4)
    result = intensity.normalise(array, Intensity(nonzero=True))
    np.testing.assert_allclose(result[0, 0].mean(), 0, atol=1e-6)
    np.testing.assert_allclose(result[0, 0].std(), 1, rtol=1e-6)
    assert result[0, 1, 0, 0] == pytest.approx(-np.arange(1, 17).mean() / np.arange(1, 17).std())


def test_window_by_hand():
    array = np.array([-2000, -100, 0, 100, 300, 5000], np.int16).reshape(1, 6, 1, 1)
    result = intensity.normalise(array, Intensity(kind="window", low=-100, high=300))
    np.testing.assert_allclose(result.ravel(), [0, 0, 0.25, 0.5, 1, 1])


def test_percentiles_clip_outliers():
    array = np.arange(1000.0).reshape(1, 10, 10, 10)
    array[0, 0, 0, 0], array[0, 9, 9, 9] = -1e6, 1e6
    result = intensity.normalise(array, Intensity(kind="percentile"))
    assert result.min() == 0 and result.max() == 1
    assert result[0, 5, 0, 0] == pytest.approx(0.5, abs=0.01)


def test_a_few_bright_voxels_survive_percentiles():
    array = np.zeros((1, 20, 20, 20))
    array[0, 3, 3, 3] = 50
    result = intensity.normalise(array, Intensity(kind="percentile"))
    assert result[0, 3, 3, 3] == 1 and result.sum() == 1


def test_unscaled_values_are_the_values():
    array = np.array([[-5, 300]], np.int16).reshape(1, 2, 1, 1)
    assert np.array_equal(intensity.normalise(array, Intensity(kind="none")), array)


@pytest.mark.parametrize("spec", KINDS, ids=lambda s: f"{s.kind}-{s.nonzero}")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_holes_are_refused(spec, value):
    array = np.ones((1, 3, 3, 3))
    array[0, 1, 1, 1] = value
    with pytest.raises(Refused, match="NOT_FINITE: 1 voxels"):
        intensity.normalise(array, spec)


def test_values_beyond_float32_are_refused_not_made_infinite():
    with pytest.raises(Refused, match="beyond float32"):
        intensity.normalise(np.full((1, 2, 2, 2), 1e200), Intensity(kind="none"))


@pytest.mark.parametrize("dtype", [complex, "V3"])
def test_other_voxel_types_are_refused(dtype):
    with pytest.raises(Refused, match="VOXEL_TYPE"):
        intensity.normalise(np.zeros((1, 2, 2, 2), dtype), Intensity())


@pytest.mark.parametrize("low, high", [(-1, 50), (0, 101), (60, 40), (50, 50)])
def test_wrong_percentiles_are_named(low, high):
    with pytest.raises(ValueError, match=f"got {low} and {high}"):
        Intensity(kind="percentile", low=low, high=high)


def test_quantiles_are_of_each_channel():
    array = np.stack([np.arange(1000.0), -np.arange(1000.0)]).reshape(2, 10, 10, 10)
    found = np.reshape(intensity.quantiles(array), (2, -1))
    assert found == pytest.approx(np.quantile(array.reshape(2, -1), intensity.QUANTILES, axis=1).T)
    many = intensity.quantiles(np.concatenate([array] * 5).astype(np.int16))
    assert many == pytest.approx(np.quantile(array, intensity.QUANTILES), abs=1e-6)


def test_quantiles_of_a_part_are_near_those_of_all(monkeypatch):
    monkeypatch.setattr(intensity, "_COUNTED", 5000)
    i, j, k = np.indices((64, 32, 30))
    array = (i + 100.0 * (j % 2) + 1000 * (k % 3))[None]  # a step that divides an edge would see one row or slice in two
    rank = [(array < q).mean() for q in intensity.quantiles(array)]
    assert rank == pytest.approx(intensity.QUANTILES, abs=0.02)


def test_quantiles_copy_no_image():
    stored = np.zeros((1, 50, 40, 30), np.int16)
    assert np.shares_memory(stored.transpose(0, 3, 2, 1)[0].ravel("K"), stored)
