import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from sparkmed.config import Intensity
from sparkmed.hcs.plate_intensity import Histogram
from sparkmed.rejection import InputError, Refused

SHARES = [0, 0.005, 0.25, 0.5, 0.9, 0.995, 1]


@given(arrays.arrays(st.sampled_from([np.uint8, np.uint16, np.int16, np.int32]), st.integers(1, 300), elements=st.integers(0, 120)))
def test_whole_numbers_are_exact(values):
    histogram = Histogram.of(values)
    np.testing.assert_allclose([histogram.quantile(s) for s in SHARES], np.quantile(values, SHARES), atol=1e-12)
    assert histogram.mean() == pytest.approx(values.mean(), abs=1e-9)
    assert histogram.deviation() == pytest.approx(values.std(), abs=1e-9)
    assert histogram.pixels == values.size


def test_every_value_of_16_bits_is_its_own():
    values = np.arange(65536, dtype=np.uint16)
    for dtype in (np.uint16, np.int32, np.float32, np.float64):
        np.testing.assert_array_equal(Histogram.of(values.astype(dtype)).values, values)


@given(arrays.arrays(np.float32, st.integers(1, 200), elements=st.floats(-1e6, 1e6, width=32)))
def test_fractions_are_right_to_16_bits(values):
    histogram = Histogram.of(values)
    expected = np.quantile(values.astype(np.float64), SHARES)
    nearest = np.abs(values).max() / 2**16 + 1e-40
    assert np.abs(np.array([histogram.quantile(s) for s in SHARES]) - expected).max() <= nearest
    assert (np.diff(histogram.values) > 0).all()


@given(st.lists(st.integers(0, 3), min_size=6, max_size=6), st.randoms(use_true_random=False))
def test_merging_in_any_order_gives_the_same(parts, random):
    rng = np.random.default_rng(0)
    fields = [rng.normal(50, 40, (9, 8)).astype(np.float32) for _ in parts]
    whole = Histogram.of(np.stack(fields))
    pieces = [Histogram.of(np.stack([f for f, q in zip(fields, parts, strict=True) if q == p])) for p in set(parts)]
    random.shuffle(pieces)
    merged = Histogram.empty()
    for piece in pieces:
        merged = piece.merge(merged)
    np.testing.assert_array_equal(merged.levels, whole.levels)
    np.testing.assert_array_equal(merged.counts, whole.counts)


def test_controls_of_two_plates_come_to_one_scale():
    rng = np.random.default_rng(0)
    truth = rng.gamma(2, 300, (50, 50))
    plates = [(truth * gain + offset).astype(np.uint16) for gain, offset in ((1, 100), (2.5, 900))]
    for spec in (Intensity(kind="zscore"), Intensity(kind="percentile", low=1, high=99)):
        scaled = [Histogram.of(p).compute(spec).apply(p) for p in plates]
        assert scaled[0].dtype == np.float32 and scaled[0].shape == (50, 50)
        np.testing.assert_allclose(scaled[0], scaled[1], atol=5e-3)
    assert scaled[0].max() > 1 and scaled[0].min() < 0  # nothing is cut off
    assert np.quantile(scaled[0], 0.99) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("kind", ["zscore", "percentile"])
def test_what_has_no_scale_says_why(kind):
    with pytest.raises(Refused, match="NO_CONTROLS"):
        Histogram.empty().compute(Intensity(kind=kind))
    with pytest.raises(Refused, match="FLAT_CONTROLS"):
        Histogram.of(np.full((4, 4), 7, np.uint8)).compute(Intensity(kind=kind))
    with pytest.raises(Refused, match="FLAT_CONTROLS"):
        Histogram.of(np.zeros((4, 4), np.uint8)).compute(Intensity(kind=kind))


def test_other_kinds_need_no_controls():
    with pytest.raises(InputError, match="window"):
        Histogram.of(np.arange(9)).compute(Intensity(kind="window", low=0, high=1))
    with pytest.raises(InputError, match="zscore and nonzero True"):
        Histogram.of(np.arange(9)).compute(Intensity(nonzero=True))


def test_of_nothing_all_is_undefined():
    nothing = Histogram.of(np.empty((0, 3), np.float32))
    assert math.isnan(nothing.mean()) and math.isnan(nothing.deviation()) and math.isnan(nothing.quantile(0.5))
    assert nothing.pixels == Histogram.empty().pixels == 0


@pytest.mark.parametrize(
    ("values", "reason"),
    [([np.nan, 1], "NOT_FINITE"), ([np.inf], "NOT_FINITE"), ([1e300], "NOT_FINITE"), ([1j], "VOXEL_TYPE")],
)
def test_values_that_are_none(values, reason):
    with pytest.raises(Refused, match=reason):
        Histogram.of(np.array(values))
