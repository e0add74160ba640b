import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkmed.config import Intensity, Preprocess
from sparkmed.imaging import geometry, intensity, phantom, preprocess
from sparkmed.imaging.volume import Volume
from sparkmed.rejection import Refused

from .grids import affines, codes, numbered, ramp, world

PLAIN = Intensity(kind="none")


@st.composite
def specs(draw):
    spacing = draw(st.none() | st.tuples(*[st.floats(0.5, 4)] * 3))
    size = None if spacing else draw(st.none() | st.tuples(*[st.integers(1, 12)] * 3))
    return Preprocess(orientation=draw(st.none() | codes), spacing=spacing, size=size, intensity=PLAIN)


@given(st.tuples(*[st.integers(2, 9)] * 3), affines(), specs())
def test_shape_and_grid_are_known_without_pixels(shape, affine, spec):
    volume = numbered(shape, affine, channels=2)
    image = preprocess.apply(volume, spec)
    assert preprocess.output_shape(shape, affine, spec) == image.spatial_shape
    np.testing.assert_allclose(preprocess.output_grid(volume, spec).affine, image.affine, atol=1e-6)
    assert image.array.dtype == np.float32 and image.array.shape[0] == 2


@given(st.tuples(*[st.integers(2, 9)] * 3), affines(), specs(), st.none() | codes)
def test_image_and_label_get_one_grid(shape, affine, spec, stored):
    volume = ramp(affine, shape)
    label = volume.with_array((volume.array > np.median(volume.array)).astype(np.uint8))
    if stored:
        label = geometry.reorient(label, stored)
    image, truth = preprocess.apply(volume, spec, label)
    assert truth.array.shape == image.array.shape
    assert np.array_equal(truth.affine, image.affine)
    assert truth.array.dtype == np.uint8
    assert set(np.unique(truth.array)) <= set(np.unique(label.array))


@pytest.mark.parametrize("stored", ["LPS", "SAR", "RAS"])
@pytest.mark.parametrize(
    "spec",
    [
        Preprocess(orientation="RAS", intensity=PLAIN),
        Preprocess(orientation="IPL", spacing=(2, 2, 2), intensity=PLAIN),
        Preprocess(orientation=None, spacing=(0.8, 1.7, 2.9), intensity=PLAIN),
        Preprocess(orientation="RAS", size=(30, 50, 20), intensity=PLAIN),
    ],
)
def test_a_label_made_from_the_image_stays_on_it(spec, stored):
    """Label 1 is where the smooth image is positive: it must be so after preprocessing, but for a voxel at the border."""
    c, s = np.cos(0.3), np.sin(0.3)
    affine = np.array([[c, -s, 0, -20], [s, c, 0, -15], [0, 0, 1.5, 7], [0, 0, 0, 1.0]]) @ np.diag([1, 1.2, 1, 1])
    volume = ramp(affine, (40, 36, 30), offset=0)
    volume = volume.with_array(volume.array - np.float32(np.median(volume.array)))
    label = geometry.reorient(volume.with_array((volume.array > 0).astype(np.uint8)), stored)
    image, truth = preprocess.apply(volume, spec, label)
    slope = np.array([0.5, -1.0, 0.25])
    step = sum(np.abs(slope @ a[:3, :3]).sum() for a in (image.affine, affine))
    far = np.abs(image.array) > step
    assert far.mean() > 0.5
    assert np.array_equal((image.array > 0)[far], truth.array[far] == 1)


@pytest.mark.parametrize("orientation", ["RAS", "PIR", None])
def test_to_input_grid_undoes_flips_exactly(orientation):
    volume = numbered((5, 6, 7), np.diag([-1.0, -2.0, 3.0, 1.0]), channels=2)
    spec = Preprocess(orientation=orientation, intensity=PLAIN)
    back = preprocess.to_input_grid(preprocess.apply(volume, spec), volume)
    assert np.array_equal(back.array, volume.array)
    assert np.array_equal(back.affine, volume.affine)


@given(affines(), specs())
def test_to_input_grid_of_a_smooth_image_is_close(affine, spec):
    volume = ramp(affine, (16, 15, 14), slope=(0.1, 0.1, 0.1), offset=0)
    if spec.size:
        spec = spec.model_copy(update={"size": tuple(max(8, 2 * s) for s in spec.size)})
    if spec.spacing:
        spec = spec.model_copy(update={"spacing": tuple(min(s, 1.5 * min(volume.spacing)) for s in spec.spacing)})
    back = preprocess.to_input_grid(preprocess.apply(volume, spec), volume)
    assert back.array.shape == volume.array.shape
    middle = (0, *[slice(5, -5)] * 3)
    np.testing.assert_allclose(back.array[middle], volume.array[middle], atol=0.01, rtol=1e-4)


def test_probabilities_stay_probabilities_and_reach_every_voxel():
    image, label = phantom.ct(0, shape=(30, 30, 20), organs=2)
    spec = Preprocess(orientation="RAS", spacing=(4.1, 3.7, 5.3))
    ready, truth = preprocess.apply(image, spec, label)
    scores = ready.with_array(np.stack([truth.array[0] == c for c in range(3)]).astype(np.float32))
    back = preprocess.to_input_grid(scores, image)
    assert back.array.shape == (3, 30, 30, 20)
    np.testing.assert_allclose(back.array.sum(axis=0), 1, atol=1e-5)


def test_the_steps_in_order():
    array = np.random.default_rng(0).integers(0, 255, (3, 6, 5, 1)).astype(np.uint8)
    volume = Volume(array, np.diag([-1.0, -1.0, 1.0, 1.0]))
    spec = Preprocess(orientation="RAS", channels="gray", intensity=Intensity(kind="zscore"))
    image = preprocess.apply(volume, spec)
    gray = array[0] * 0.299 + array[1] * 0.587 + array[2] * 0.114
    expected = intensity.normalise(gray[None, ::-1, ::-1].astype(np.float32), spec.intensity)
    np.testing.assert_allclose(image.array, expected, atol=1e-5)


def test_gray_of_gray_is_itself():
    volume = phantom.radiograph(0, 1)
    spec = Preprocess(orientation=None, channels="gray", intensity=PLAIN)
    assert np.array_equal(preprocess.apply(volume, spec).array, volume.array)


@pytest.mark.parametrize("channels", [2, 4])
def test_gray_of_other_channels_is_refused(channels):
    volume = Volume(np.zeros((channels, 4, 4, 1)), np.eye(4))
    with pytest.raises(Refused, match=f"CHANNELS.*this image has {channels}"):
        preprocess.apply(volume, Preprocess(channels="gray"))


def test_flat_images_stay_flat():
    image = preprocess.apply(phantom.radiograph(0, 1, size=(50, 40)), Preprocess(orientation="RAS", spacing=(2, 2, 5)))
    assert image.array.shape == (1, 25, 20, 1)
    image = preprocess.apply(phantom.radiograph(0, 0, size=(50, 40)), Preprocess(orientation=None, size=(64, 64, 1)))
    assert image.array.shape == (1, 64, 64, 1)
    with pytest.raises(Refused, match="SINGLETON_AXIS"):
        preprocess.apply(phantom.radiograph(0, 0), Preprocess(size=(64, 64, 32)))


def test_a_flat_image_seen_from_the_side_keeps_its_single_slice():
    sagittal = np.array([[0, 0, 5, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]])
    image = preprocess.apply(Volume(np.zeros((1, 20, 30, 1)), sagittal), Preprocess(orientation="RAS", spacing=(2, 2, 2)))
    assert image.spatial_shape == (1, 10, 15)
    assert image.spacing == (5, 2, 2)


def test_nothing_to_do_changes_nothing():
    array = np.random.default_rng(0).normal(size=(1, 4, 5, 6)).astype(np.float32)
    volume = Volume(array, np.diag([1.5, 1.5, 1.5, 1]), series_uid="1.2", modality="CT", sources=("a",))
    image = preprocess.apply(volume, Preprocess(spacing=(1.5, 1.5, 1.5), intensity=PLAIN))
    assert np.array_equal(image.array, array)
    assert np.array_equal(image.affine, volume.affine)
    assert (image.series_uid, image.modality, image.sources) == ("1.2", "CT", ("a",))


def test_the_input_is_not_changed():
    volume, label = phantom.ct(0, shape=(16, 16, 8))
    before = volume.array.copy(), label.array.copy()
    preprocess.apply(volume, Preprocess(orientation="LPS"), label)
    assert np.array_equal(volume.array, before[0]) and np.array_equal(label.array, before[1])


def test_values_go_with_places():
    """A bright spot is found at its place in the world after every step."""
    affine = np.array([[0, 0, 2.0, -30], [-1.1, 0, 0, 12], [0, 0.9, 0, 5], [0, 0, 0, 1]])
    place = affine @ [8, 13, 9, 1]
    away = np.linalg.norm(world(affine, (21, 25, 17)) - place[:3, None, None, None], axis=0)
    array = 100 * np.exp(-0.5 * (away[None] / 2) ** 2)
    image = preprocess.apply(Volume(array, affine), Preprocess(spacing=(1, 1, 1), intensity=PLAIN))
    centre = np.einsum("ijk,wijk->w", image.array[0], world(image.affine, image.spatial_shape)) / image.array.sum()
    np.testing.assert_allclose(centre, place[:3], atol=0.02)
    assert image.array.sum() * image.voxel_ml == pytest.approx(100 * (2 * np.pi * 4) ** 1.5 / 1000, rel=0.01)


def test_a_label_of_another_image_is_refused():
    image, _ = phantom.ct(0, shape=(16, 16, 8))
    _, label = phantom.ct(0, shape=(16, 16, 9))
    with pytest.raises(Refused, match="LABEL_GRID_MISMATCH"):
        preprocess.apply(image, Preprocess(), label)


def test_holes_are_refused():
    with pytest.raises(Refused, match="NOT_FINITE"):
        preprocess.apply(Volume(np.full((1, 3, 3, 3), np.nan), np.eye(4)), Preprocess())


def test_spacing_and_size_contradict_each_other():
    with pytest.raises(ValueError, match="spacing and size both"):
        Preprocess(spacing=(1, 1, 1), size=(2, 2, 2))


def test_codes_that_name_an_axis_twice_are_refused():
    with pytest.raises(ValueError, match="RLS"):
        Preprocess(orientation="RLS")


def test_organs_of_a_ct_keep_their_volume_and_density(shared_data):
    nibabel = pytest.importorskip("nibabel")
    folder = shared_data / "dicom" / "totalseg"
    files = [nibabel.load(folder / name) for name in ("example_ct_sm.nii.gz", "example_seg.nii.gz")]
    volume, label = (Volume(np.asarray(f.dataobj)[None], f.affine) for f in files)
    label = geometry.reorient(label, "PSL")
    image, truth = preprocess.apply(volume, Preprocess(orientation="LPS", spacing=(2, 2, 2), intensity=PLAIN), label)
    label = geometry.reorient(label, geometry.axis_codes(volume.affine))
    organs = [c for c in np.unique(label.array) if c and (label.array == c).sum() * label.voxel_ml > 50]
    assert len(organs) > 5
    for c in organs:
        before, after = (label.array == c).sum() * label.voxel_ml, (truth.array == c).sum() * truth.voxel_ml
        assert after == pytest.approx(before, rel=0.06)
        density = volume.array[label.array == c]  # at the border an interpolated voxel holds some of the neighbour
        assert image.array[truth.array == c].mean() == pytest.approx(density.mean(), abs=0.6 * density.std())


def test_a_label_of_another_series_is_refused(shared_data):
    nibabel = pytest.importorskip("nibabel")
    folder = shared_data / "dicom" / "totalseg"
    files = [nibabel.load(folder / name) for name in ("example_ct.nii.gz", "example_seg.nii.gz")]
    volume, label = (Volume(np.asarray(f.dataobj)[None], f.affine) for f in files)
    with pytest.raises(Refused, match="122 x 101 x 30 voxels for an image of 122 x 101 x 112"):
        preprocess.apply(volume, Preprocess(), label)
