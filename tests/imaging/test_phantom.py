import numpy as np
import pytest

from sparkmed.imaging import geometry, labels, phantom


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("shape, spacing", [((64, 64, 40), (3, 3, 4)), ((32, 40, 24), (6, 5, 7))])
def test_every_organ_is_there_and_looks_different(seed, shape, spacing):
    image, label = phantom.ct(seed, shape, spacing, organs=3)
    counts = labels.check_label(label, image, 4)
    assert (counts > 20).all()
    means = [image.array[label.array == c].mean() for c in (1, 2, 3)]
    assert 90 < means[0] < 170 and 240 < means[1] < 320 and -500 < means[2] < -400
    assert image.array.dtype == np.int16 and label.array.dtype == np.uint8
    assert image.array.min() >= -1024
    assert (image.array[label.array > 0] > -700).all()  # no organ in the air
    np.testing.assert_allclose(image.spacing, spacing)


def test_seeds_differ_and_repeat():
    a, b, c = (phantom.ct(s)[0].array for s in (1, 1, 2))
    assert np.array_equal(a, b) and not np.array_equal(a, c)
    sizes = {int((phantom.ct(s)[1].array == 1).sum()) for s in range(5)}
    assert len(sizes) == 5


@pytest.mark.parametrize("codes", ["LPS", "RAS", "SAR", "IPL"])
def test_the_body_lies_the_same_way_in_any_storage(codes):
    """The large organ is on the right."""
    image, label = phantom.ct(0, shape=(48, 48, 48), spacing=(4, 4, 4), codes=codes)
    assert geometry.axis_codes(image.affine) == codes
    where = np.argwhere(label.array[0] == 1).mean(axis=0)
    assert (label.affine @ [*where, 1])[0] > 20


@pytest.mark.parametrize("organs", [0, 4])
def test_organs_are_limited(organs):
    with pytest.raises(ValueError, match=f"got {organs}"):
        phantom.ct(0, organs=organs)


def test_radiographs_of_two_kinds():
    abdomen, chest = ([phantom.radiograph(s, k).array for s in range(6)] for k in (0, 1))
    lung = (0, slice(30, 45), slice(45, 75), 0)
    assert max(c[lung].mean() for c in chest) < 75 < 90 < min(a[lung].mean() for a in abdomen)
    assert chest[0].shape == (1, 128, 128, 1) and chest[0].dtype == np.uint8
    assert np.array_equal(chest[0], phantom.radiograph(0, 1).array)
    assert phantom.radiograph(0, 0, size=(50, 70)).array.shape == (1, 50, 70, 1)
    with pytest.raises(ValueError, match="got 2"):
        phantom.radiograph(0, 2)


@pytest.mark.parametrize("spacing", [(1, 1, 1), (0.7, 0.7, 2.0)])
def test_an_ellipsoid_has_its_volume(spacing):
    affine = np.diag([*spacing, 1.0])
    shape = tuple(int(60 / s) for s in spacing)
    inside = phantom.ellipsoid(affine, shape, (29.3, 30.1, 29.9), (20, 15, 10))
    assert inside.sum() * np.prod(spacing) == pytest.approx(4 / 3 * np.pi * 20 * 15 * 10, rel=0.01)
