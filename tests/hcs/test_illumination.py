import io
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkmed.config import Illumination
from sparkmed.hcs import illumination
from sparkmed.hcs.illumination import FieldSum, Light
from sparkmed.rejection import InputError, Refused

ONE = Illumination(least_fields=1)


def vignette(shape):
    """Relative light of mean 1 that falls to about half in a corner; its centre is off the middle."""
    u, v = (np.linspace(0, 1, n) for n in shape)
    light = 1 - 0.9 * ((u[:, None] - 0.45) ** 2 + (v[None] - 0.55) ** 2)
    return light / light.mean()


def fields(shape, number, seed=0):
    """uint16 fields of cells on dark ground under the vignette, with the noise of photons."""
    rng, half = np.random.default_rng(seed), max(shape) // 33
    for _ in range(number):
        truth = np.full(shape, 200.0)
        for i, j in rng.integers(-half, np.array(shape) + half, (40, 2)):
            truth[max(i - half, 0) : max(i + half, 0), max(j - half, 0) : max(j + half, 0)] += 400 * rng.random()
        yield rng.poisson(truth * vignette(shape)).astype(np.uint16)


def summed(some):
    total = FieldSum()
    for field in some:
        total = total.merge(FieldSum.of(field))
    return total


@pytest.mark.parametrize("shape", [(300, 260), (96, 128), (257, 301)])
def test_a_known_vignette_is_recovered(shape):
    light = summed(fields(shape, 150)).compute(Illumination())
    error = np.abs(light.function / vignette(shape) - 1)
    assert light.fields == 150 and light.function.shape == shape and light.function.dtype == np.float32
    assert error.mean() < 0.015 and np.quantile(error, 0.99) < 0.05 and error.max() < 0.1


def test_a_corrected_plate_is_even():
    shape = (200, 220)
    some = list(fields(shape, 120))
    light = summed(some).compute(Illumination())
    corrected = [illumination.correct(f[None, ..., None], [light]) for f in fields(shape, 60, seed=1)]
    before, after = (np.mean(list(x), axis=0).squeeze() for x in (fields(shape, 60, seed=1), corrected))
    blocks = [m.reshape(4, 50, 4, 55).mean((1, 3)) for m in (before, after)]
    spread = [q.std() / q.mean() for q in blocks]
    assert spread[0] > 0.09 and spread[1] < 0.03
    assert after.mean() == pytest.approx(before.mean(), rel=0.02)  # a plate keeps its mean


@given(
    st.lists(st.integers(0, 7), min_size=8, max_size=8),
    st.randoms(use_true_random=False),
    st.sampled_from(["u1", "u2", "f4", "f8"]),
)
def test_the_sum_is_the_same_however_it_is_merged(parts, random, dtype):
    rng = np.random.default_rng(0)
    some = [(rng.random((37, 41)) * (255 if dtype != "u2" else 65535)).astype(dtype) for _ in parts]
    groups = {}
    for field, part in zip(some, parts, strict=True):
        groups.setdefault(part, []).append(field)
    totals = [summed(g) for g in groups.values()] + [FieldSum()]
    random.shuffle(totals)
    merged = FieldSum()
    for total in totals:
        merged = total.merge(merged)
    assert merged.fields == len(some)
    np.testing.assert_array_equal(merged.total, summed(some).total)


def test_the_sum_is_that_of_the_means_of_blocks():
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 65536, (2, 130, 64)).astype(np.uint16)
    total = summed([a, b])
    assert total.total.shape == (44, 22)  # blocks of 3 pixels, the last ones narrower
    both = a.astype(np.float64) + b
    assert total.total[0, 0] / 2**20 == pytest.approx(both[:3, :3].mean(), abs=1e-6)
    assert total.total[43, 21] / 2**20 == pytest.approx(both[129:, 63:].mean(), abs=1e-6)


def test_order_of_memory_makes_no_difference():
    field = next(fields((90, 70), 1))
    turned = np.asfortranarray(field)
    np.testing.assert_array_equal(FieldSum.of(field).total, FieldSum.of(turned).total)


def test_even_light_is_one():
    light = summed([np.full((70, 50), 9, np.uint8)] * 3).compute(ONE)
    np.testing.assert_allclose(light.function, 1, atol=1e-6)
    array = np.arange(70 * 50, dtype=np.uint16).reshape(1, 70, 50, 1)
    corrected = illumination.correct(array, [light])
    assert corrected.dtype == np.float32
    np.testing.assert_allclose(corrected, array, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (1, 200), (2, 3), (200, 1)])
def test_tiny_fields_have_light_too(shape):
    light = summed([np.full(shape, 5, np.uint8)]).compute(ONE)
    np.testing.assert_allclose(light.function, np.ones(shape), atol=1e-5)


def test_dark_corners_are_not_divided_by_nearly_nothing():
    field = np.full((64, 64), 1000, np.uint16)
    field[:8, :8] = 0
    light = summed([field] * 3).compute(Illumination(least_fields=3, radius=0.02))
    assert light.function.min() == pytest.approx(0.1, abs=0.06) and np.isfinite(1 / light.function).all()


@pytest.mark.parametrize(
    ("some", "settings", "reason"),
    [
        ([], ONE, "FEW_FIELDS"),
        ([np.ones((8, 8), np.uint8)] * 4, Illumination(least_fields=5), "FEW_FIELDS"),
        ([np.zeros((8, 8), np.uint8)] * 4, ONE, "DARK_PLATE"),
        ([np.full((8, 8), -3.0)] * 4, ONE, "DARK_PLATE"),
        ([np.ones((8, 8)), np.ones((8, 9))], ONE, "FIELD_SHAPE"),
        ([np.full((8, 8), np.nan)], ONE, "NOT_FINITE"),
        ([np.full((8, 8), np.inf)], ONE, "NOT_FINITE"),
        ([np.full((8, 8), 2**31, np.uint32)], ONE, "VOXEL_TYPE"),
        ([np.ones((8, 8), complex)], ONE, "VOXEL_TYPE"),
    ],
)
def test_what_gives_no_light_says_why(some, settings, reason):
    with pytest.raises(Refused) as e:
        summed(some).compute(settings)
    assert e.value.reason == reason


def test_a_field_of_another_shape_is_refused():
    light = Light((8, 9), np.ones((8, 9), np.float32))
    with pytest.raises(Refused, match="a field of 9 x 8 pixels, the light of its plate is of 8 x 9"):
        illumination.correct(np.ones((1, 9, 8, 1)), [light])
    with pytest.raises(InputError, match="2 lights"):
        illumination.correct(np.ones((1, 8, 9, 1)), [light, light])
    with pytest.raises(InputError, match="is .I, J."):
        FieldSum.of(np.ones((2, 8, 9)))


def test_each_channel_has_its_own_light():
    array = np.full((3, 4, 5, 1), 6, np.uint8)
    lights = [Light((4, 5), np.full((4, 5), 2, np.float32)), None, Light((4, 5), np.full((4, 5), 0.5, np.float32))]
    corrected = illumination.correct(array, lights)
    assert [c.mean() for c in corrected] == [3, 6, 12]
    assert (array == 6).all()
    assert illumination.correct(corrected, [None] * 3) is not corrected


def test_light_travels_and_is_kept():
    light = summed(fields((90, 70), 25)).compute(Illumination())
    assert light.function is light.function
    for same in (pickle.loads(pickle.dumps(light)), Light.from_row(light.row())):
        assert same.shape == light.shape and same.fields == 25
        np.testing.assert_array_equal(same.function, light.function)
    assert len(pickle.dumps(light)) < 64 * 64 * 4 + 1000


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def test_functions_of_the_user_are_rows_and_columns(tmp_path):
    rows_columns = np.arange(1, 13, dtype=np.float64).reshape(3, 4)
    (tmp_path / "P1_IllumDNA.npy").write_bytes(npy(rows_columns))
    light = illumination.read(f"{tmp_path}/{{plate}}_Illum{{channel}}.npy", "P1", "DNA")
    assert light.shape == (4, 3) and light.fields == 0
    np.testing.assert_array_equal(light.function, rows_columns.T)
    with pytest.raises(Refused, match="4 x 3"):
        illumination.correct(np.ones((1, 3, 4, 1)), [light])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read"),
        (b"", "not a .npy"),
        (b"\x93NUMPY\x01\x00\xff\xff{", "not a .npy"),
        (npy(np.array([{}])), "not a .npy"),
        (npy(np.ones(5)), "of shape .5,."),
        (npy(np.ones((2, 2), complex)), "complex128"),
        (npy(np.ones((0, 2))), "of shape .0, 2."),
        (npy(np.zeros((2, 2))), "not above 0"),
        (npy(np.array([[1, np.nan]])), "not finite"),
    ],
)
def test_files_that_hold_no_function(tmp_path, content, sentence):
    if content is not None:
        (tmp_path / "f.npy").write_bytes(content)
    with pytest.raises(InputError, match=sentence):
        illumination.read(f"{tmp_path}/f.npy", "P", "C")
