import copy
import dataclasses
import itertools
import random

import nibabel as nib
import numpy as np
import pytest

from sparkmed import formats, storage
from sparkmed.formats import assemble, read_archive, read_headers

from . import dicoms


def reasons(rejections):
    return sorted({r.reason for r in rejections})


def one(folder):
    volumes, rejections = read_archive(str(folder))
    assert rejections == []
    (volume,) = volumes
    return volume


def refused(folder, reason):
    """The message, after checking that nothing but refusals of this reason came out, one for each file."""
    volumes, rejections = read_archive(str(folder))
    assert volumes == [] and reasons(rejections) == [reason]
    assert sorted(r.uri for r in rejections) == sorted(f.uri for f in storage.walk(str(folder)))
    assert len({r.message for r in rejections}) == 1
    return rejections[0].message


def test_series_written_out_of_order(tmp_path):
    voxels = dicoms.stack((6, 5, 7))
    made = dicoms.series(voxels, 2.5, (-10, 20, 30), PixelSpacing=[0.5, 0.25], InstanceNumber=lambda k: (k * 3) % 7)
    random.Random(3).shuffle(made)
    volume = one(dicoms.write(tmp_path, made))
    np.testing.assert_array_equal(volume.array, voxels[None])
    assert volume.array.dtype == np.uint16
    # LPS to RAS: columns step 0.25 mm to the left (-R), rows 0.5 mm to the back (-A), slices up
    np.testing.assert_array_equal(volume.affine, [[-0.25, 0, 0, 10], [0, -0.5, 0, -20], [0, 0, 2.5, 30], [0, 0, 0, 1]])
    assert (volume.modality, volume.series_uid, len(volume.sources)) == ("CT", "1.2.3.4.5", 7)


def test_order_of_the_input_does_not_matter(tmp_path):
    dicoms.write(tmp_path, dicoms.series(dicoms.stack((6, 5, 4))))
    members = [m for f in storage.walk(str(tmp_path)) for m in formats.members(f)]
    instances = [formats.read_instance(m) for m in members]
    results = [assemble(p) for p in itertools.permutations(instances)]
    assert all(r == results[0] for r in results)


@pytest.mark.parametrize("seed", range(5))
def test_oblique_series(tmp_path, seed):
    """Every voxel centre is where PS3.3 C.7.6.2.1.1 says, in RAS."""
    rotation, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    orientation = (*rotation[:, 0], *rotation[:, 1])
    voxels = dicoms.stack((4, 3, 5))
    made = dicoms.series(voxels, 3.3, (11, -22, 33), orientation, PixelSpacing=[0.7, 0.9])
    volume = one(dicoms.write(tmp_path, reversed(made)))
    np.testing.assert_array_equal(volume.array[0], voxels)
    for i, j, k in ((0, 0, 0), (3, 2, 4), (1, 2, 3)):
        position, o = np.array(made[k].ImagePositionPatient, float), np.array(made[k].ImageOrientationPatient, float)
        lps = position + o[:3] * 0.9 * i + o[3:] * 0.7 * j
        np.testing.assert_allclose(volume.affine @ [i, j, k, 1], [-lps[0], -lps[1], lps[2], 1], atol=1e-9)


def test_rescale_of_each_slice(tmp_path):
    voxels = dicoms.stack((6, 5, 3))
    slopes = [0.5, 2.25, 1.0]
    made = dicoms.series(voxels, RescaleSlope=lambda k: slopes[k], RescaleIntercept=lambda k: k - 1.5)
    volume = one(dicoms.write(tmp_path, made))
    assert volume.array.dtype == np.float32
    np.testing.assert_allclose(volume.array[0], voxels * np.array(slopes) + np.array([-1.5, -0.5, 0.5]), rtol=1e-6)


def test_hounsfield_units_are_integers(tmp_path):
    voxels = dicoms.stack((6, 5, 3)) + np.uint16(3990)
    made = dicoms.series(voxels, RescaleSlope=1, RescaleIntercept=-1024, BitsStored=12)
    made[0].PixelData = np.zeros((5, 6), np.uint16).tobytes()
    volume = one(dicoms.write(tmp_path, made))
    assert volume.array.dtype == np.int16
    assert (volume.array[0, :, :, 0] == -1024).all()
    np.testing.assert_array_equal(volume.array[0, :, :, 1:], voxels[:, :, 1:].astype(int) - 1024)


def test_wide_integers_do_not_wrap(tmp_path):
    voxels = np.full((2, 2, 2), 65535, np.uint16)
    volume = one(dicoms.write(tmp_path, dicoms.series(voxels, RescaleSlope=1, RescaleIntercept=-1000)))
    assert (volume.array == 64535).all()


def test_missing_slice(tmp_path):
    made = dicoms.series(dicoms.stack((6, 5, 6)), 2.5)
    message = refused(dicoms.write(tmp_path, made[:2] + made[3:]), "MISSING_SLICE")
    assert message == "1 of 6 slices are missing: gaps from 2.5 to 5 mm"


def test_two_runs_of_missing_slices(tmp_path):
    made = dicoms.series(dicoms.stack((6, 5, 12)), 1.25)
    message = refused(dicoms.write(tmp_path, made[:3] + made[5:8] + made[9:]), "MISSING_SLICE")
    assert message.startswith("3 of 12 slices")


def test_irregular_spacing(tmp_path):
    heights = [0, 2, 4, 6.7, 8.7]
    made = dicoms.series(dicoms.stack((6, 5, 5)), ImagePositionPatient=lambda k: [0, 0, heights[k]])
    assert refused(dicoms.write(tmp_path, made), "IRREGULAR_SPACING") == "slice gaps from 2 to 2.7 mm, expected uniform spacing"


def test_slices_beside_their_line(tmp_path):
    made = dicoms.series(dicoms.stack((6, 5, 5)), ImagePositionPatient=lambda k: [0.8 if k == 2 else 0, 0, 2 * k])
    assert "0.8 mm beside" in refused(dicoms.write(tmp_path, made), "IRREGULAR_SPACING")


def test_rounded_positions_are_regular(tmp_path):
    made = dicoms.series(dicoms.stack((6, 5, 30)), ImagePositionPatient=lambda k: [0, 0, round(k * 1.3333333, 2)])
    assert one(dicoms.write(tmp_path, made)).spacing[2] == pytest.approx(1.3333, abs=1e-3)


def test_gantry_tilt(tmp_path):
    tilt = np.radians(14)
    orientation = (1, 0, 0, 0, np.cos(tilt), -np.sin(tilt))
    made = dicoms.series(dicoms.stack((6, 5, 4)), orientation=orientation, ImagePositionPatient=lambda k: [0, 0, 5 * k])
    assert refused(dicoms.write(tmp_path, made), "GANTRY_TILT") == "slices are stacked 14.00 degrees off their normal"


def test_one_position_twice(tmp_path):
    made = dicoms.series(dicoms.stack((6, 5, 5)), ImagePositionPatient=lambda k: [0, 0, min(k, 3)])
    assert refused(dicoms.write(tmp_path, made), "DUPLICATE_POSITION") == "from 1 to 2 images at each of 4 positions"


def test_all_at_one_position(tmp_path):
    made = dicoms.series(dicoms.stack((6, 5, 3)), ImagePositionPatient=[0, 0, 0], Modality="MR")
    refused(dicoms.write(tmp_path, made), "DUPLICATE_POSITION")


def test_stray_orientation(tmp_path):
    made = dicoms.series(dicoms.stack((5, 5, 6)))
    made += dicoms.series(dicoms.stack((5, 5, 2), seed=1), orientation=(0, 1, 0, 0, 0, -1))
    assert "2 images of normal (-1.000, 0.000, 0.000)" in refused(dicoms.write(tmp_path, made), "MIXED_ORIENTATION")


def test_orientations_are_split(tmp_path):
    a, b = dicoms.stack((5, 5, 6)), dicoms.stack((5, 5, 4), seed=1)
    dicoms.write(tmp_path, dicoms.series(a) + dicoms.series(b, orientation=(0, 1, 0, 0, 0, -1)))
    volumes, rejections = read_archive(str(tmp_path))
    assert rejections == [] and sorted(v.array.shape[3] for v in volumes) == [4, 6]
    for voxels in (a, b):
        assert any(np.array_equal(v.array[0], voxels) for v in volumes)


def test_image_without_position(tmp_path):
    made = dicoms.series(dicoms.stack((6, 5, 4)), ImagePositionPatient=lambda k: None if k == 1 else [0, 0, k])
    assert refused(dicoms.write(tmp_path, made), "MISSING_POSITION") == "1 of 4 images have no position or orientation"


def test_two_frames_of_reference(tmp_path):
    made = dicoms.series(dicoms.stack((6, 5, 4)), FrameOfReferenceUID=lambda k: f"1.2.{k % 2}")
    refused(dicoms.write(tmp_path, made), "FRAME_OF_REFERENCE")


def test_frame_of_reference_may_be_absent(tmp_path):
    assert one(dicoms.write(tmp_path, dicoms.series(dicoms.stack((6, 5, 4)), FrameOfReferenceUID=None)))


def test_two_sizes(tmp_path):
    made = dicoms.series(dicoms.stack((6, 5, 2))) + dicoms.series(dicoms.stack((5, 6, 2)), origin=(0, 0, 50))
    assert "5 x 6, 6 x 5" in refused(dicoms.write(tmp_path, made), "MIXED_SHAPE")


def test_two_spacings(tmp_path):
    made = dicoms.series(dicoms.stack((6, 5, 4)), PixelSpacing=lambda k: [1, 1.1 if k == 3 else 1])
    refused(dicoms.write(tmp_path, made), "MIXED_SPACING")


def test_two_patients_in_one_series(tmp_path):
    made = dicoms.series(dicoms.stack((6, 5, 4)), PatientID=lambda k: f"{dicoms.SECRET}{k % 2}")
    assert dicoms.SECRET not in refused(dicoms.write(tmp_path, made), "MIXED_PATIENT")


@pytest.mark.parametrize("elements", [
    {"PixelSpacing": None}, {"PixelSpacing": [0, 1]}, {"ImageOrientationPatient": [1, 0, 0, 1, 0, 0]},
    {"ImageOrientationPatient": [2, 0, 0, 0, 1, 0]},
])  # fmt: skip
def test_impossible_geometry(tmp_path, elements):
    _, rejections = read_archive(str(dicoms.write(tmp_path, dicoms.series(dicoms.stack((6, 5, 4)), **elements))))
    assert len(rejections) == 4 and reasons(rejections)[0] in ("BAD_GEOMETRY", "MISSING_SPACING")


def test_localizer_leaves_the_volume(tmp_path):
    voxels = dicoms.stack((5, 5, 5))
    kind = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    scout = dicoms.series(dicoms.stack((5, 5, 1), seed=9), orientation=(0, 1, 0, 0, 0, -1), ImageType=kind)
    volumes, rejections = read_archive(str(dicoms.write(tmp_path, dicoms.series(voxels) + scout)))
    assert reasons(rejections) == ["LOCALIZER"] and len(rejections) == 1
    np.testing.assert_array_equal(volumes[0].array[0], voxels)


@pytest.mark.parametrize("by", [
    {"EchoTime": 4.2}, {"ImageType": ["ORIGINAL", "PRIMARY", "P"]}, {"EchoNumbers": 2}, {"ImageType": ["DERIVED", "SECONDARY"]},
])  # fmt: skip
def test_split_by_what_makes_images_incomparable(tmp_path, by):
    a, b = dicoms.stack((5, 4, 4)), dicoms.stack((5, 4, 4), seed=1)
    made = dicoms.series(a, Modality="MR", EchoTime=2.1, EchoNumbers=1)
    made += dicoms.series(b, **({"Modality": "MR", "EchoTime": 2.1, "EchoNumbers": 1} | by))
    volumes, rejections = read_archive(str(dicoms.write(tmp_path, made)))
    assert rejections == [] and len(volumes) == 2
    for voxels in (a, b):
        assert any(np.array_equal(v.array[0], voxels) for v in volumes)


def test_ct_phases_are_split_by_acquisition(tmp_path):
    a, b = dicoms.stack((5, 4, 4)), dicoms.stack((5, 4, 4), seed=1)
    made = dicoms.series(a, AcquisitionNumber=1) + dicoms.series(b, AcquisitionNumber=2)
    volumes, rejections = read_archive(str(dicoms.write(tmp_path, made)))
    assert rejections == [] and [v.array.shape for v in volumes] == [(1, 5, 4, 4)] * 2


def test_acquisition_of_its_own_for_each_slice(tmp_path):
    voxels = dicoms.stack((5, 4, 4))
    dicoms.write(tmp_path, dicoms.series(voxels, AcquisitionNumber=lambda k: k))
    np.testing.assert_array_equal(one(tmp_path).array[0], voxels)


@pytest.mark.parametrize("elements, axis", [
    (lambda t: {"TemporalPositionIdentifier": t + 1}, "temporal"),
    (lambda t: {"DiffusionBValue": 500.0 * t}, "b"),
    (lambda t: {"AcquisitionNumber": t}, "acquisition"),
    (lambda t: {"InstanceNumber": lambda k: 100 * t + k}, "number"),
    (lambda t: {"InstanceNumber": lambda k: 3 * k + t}, "number"),
])  # fmt: skip
def test_times_are_channels(tmp_path, elements, axis):
    voxels = dicoms.stack((3, 5, 4, 6))
    made = []
    for t in (2, 0, 1):
        made += dicoms.series(voxels[t], Modality="MR", SOPClassUID=dicoms.MR, SeriesDescription=str(t), **elements(t))
    random.Random(0).shuffle(made)
    volume = one(dicoms.write(tmp_path, made))
    np.testing.assert_array_equal(volume.array, voxels)
    headers, _ = read_headers(str(tmp_path))
    assert headers[0].facts["axis"] == axis


@pytest.mark.parametrize("modality", ["CT", "MR"])
def test_times_that_nothing_orders(tmp_path, modality):
    made = []
    for t in range(3):
        made += dicoms.series(dicoms.stack((5, 4, 4), seed=t), Modality=modality, SeriesDescription=str(t))
    assert "nothing in the headers orders them" in refused(dicoms.write(tmp_path, made), "DUPLICATE_POSITION")


def test_interleaved_instance_numbers_are_no_time(tmp_path):
    made = dicoms.series(dicoms.stack((5, 4, 4)), Modality="MR", InstanceNumber=lambda k: [1, 2, 4, 7][k])
    made += dicoms.series(dicoms.stack((5, 4, 4), seed=1), Modality="MR", InstanceNumber=lambda k: [6, 3, 5, 8][k])
    refused(dicoms.write(tmp_path, made), "DUPLICATE_POSITION")


def test_unfinished_last_time(tmp_path):
    made = [ds for t in range(3) for ds in dicoms.series(dicoms.stack((5, 4, 4), seed=t), Modality="MR", AcquisitionNumber=t)]
    refused(dicoms.write(tmp_path, made[:-1]), "DUPLICATE_POSITION")


def test_same_instance_twice(tmp_path):
    voxels = dicoms.stack((5, 4, 4))
    made = dicoms.series(voxels)
    dicoms.write(tmp_path / "a", made)
    dicoms.write(tmp_path / "b", made[1:3])
    volumes, rejections = read_archive(str(tmp_path))
    np.testing.assert_array_equal(volumes[0].array[0], voxels)
    assert [(r.reason, r.uri.rsplit("/", 2)[-2]) for r in rejections] == [("DUPLICATE_INSTANCE", "b")] * 2


def test_two_images_under_one_uid(tmp_path):
    made = dicoms.series(dicoms.stack((5, 4, 4)), SOPInstanceUID="1.2.3.9")
    refused(dicoms.write(tmp_path, made), "CONFLICTING_INSTANCE")


def test_series_without_uids_is_its_folder(tmp_path):
    a, b = dicoms.stack((5, 4, 4)), dicoms.stack((5, 4, 4), seed=1)
    for name, voxels in (("a", a), ("b", b)):
        nothing = {"SeriesInstanceUID": None, "SOPInstanceUID": None, "StudyInstanceUID": None}
        made = dicoms.series(voxels, **nothing)
        for ds in made:
            ds.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
        dicoms.write(tmp_path / name, made)
    volumes, rejections = read_archive(str(tmp_path))
    assert rejections == [] and len(volumes) == 2


def test_uid_is_the_content(tmp_path):
    made = dicoms.series(dicoms.stack((5, 4, 4)))
    first, _ = read_headers(str(dicoms.write(tmp_path / "a", made)))
    moved, _ = read_headers(str(dicoms.write(tmp_path / "b" / "c", reversed(made))))
    changed = [copy.deepcopy(ds) for ds in made]
    changed[0].PixelData = bytes(len(made[0].PixelData))
    other, _ = read_headers(str(dicoms.write(tmp_path / "d", changed)))
    assert len(first[0].uid) == 32
    assert first[0].uid == moved[0].uid != other[0].uid
    assert dataclasses.replace(moved[0], sources=(), source_paths=()) == dataclasses.replace(first[0], sources=(), source_paths=())


def test_pictures_of_one_series_are_volumes_of_their_own(tmp_path):
    nowhere = dict.fromkeys(("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"))
    pictures = [dicoms.stack((5, 6, 1), seed=s)[:, :, 0] for s in (0, 1)]
    made = [dicoms.dataset(p, SOPClassUID=dicoms.CR, Modality="CR", ImagerPixelSpacing=[0.2, 0.1], **nowhere) for p in pictures]
    volumes, rejections = read_archive(str(dicoms.write(tmp_path, made)))
    assert rejections == [] and [v.array.shape for v in volumes] == [(1, 6, 5, 1)] * 2
    assert volumes[0].spacing == (0.1, 0.2, 1.0)


def test_computed_tomography_with_its_label(shared_data):
    """The label of the CT series was written on the same grid by another program."""
    (image,), _ = read_archive(str(shared_data / "dicom/totalseg/example_ct_dicom"))
    label = nib.load(shared_data / "dicom/totalseg/example_seg_dicom.nii.gz")
    mine = nib.Nifti1Image(image.array[0], image.affine)
    mine, label = nib.as_closest_canonical(mine), nib.as_closest_canonical(label)
    np.testing.assert_array_equal(mine.affine, label.affine)
    assert mine.shape == label.shape
    (read,), _ = read_archive(str(shared_data / "dicom/totalseg/example_seg_dicom.nii.gz"))
    liver_or_so = nib.as_closest_canonical(nib.Nifti1Image(read.array[0], read.affine)).get_fdata() > 0
    hounsfield = mine.get_fdata()
    assert hounsfield[liver_or_so].mean() > hounsfield[~liver_or_so].mean() + 200  # organs are not air


def test_series_that_are_no_volume(shared_data):
    failing = shared_data / "dicom/dicom2nifti/failing"
    for folder, reason in (("gantrytilting/001", "GANTRY_TILT"), ("notavolume/001", "DUPLICATE_POSITION"),
                           ("sliceorientation/001", "MIXED_ORIENTATION")):  # fmt: skip
        refused(failing / folder, reason)


@pytest.mark.parametrize("case", [
    "anatomical/001", "generic/anatomical/001_implicit", "generic/compressed/001", "generic/compressed_jpeg/001", "ge/dti/002",
    "generic/compressed_jpegls/001", "generic/compressed_rle/001", "generic/rgb/001", "ge/fmri/001", "siemens/dti_classic/001",
])  # fmt: skip
def test_against_dicom2nifti(shared_data, case):
    folder = shared_data / "dicom/dicom2nifti" / case
    volume = one(folder)
    truth = nib.load(f"{folder}_ground_truth.nii.gz")
    data = np.asanyarray(truth.dataobj)
    if data.dtype.names:
        data = np.stack([data[n] for n in "RGB"], -1)
    data = data.reshape(*data.shape[:3], -1)
    mine = nib.as_closest_canonical(nib.Nifti1Image(np.moveaxis(volume.array, 0, -1).astype(np.float64), volume.affine))
    theirs = nib.as_closest_canonical(nib.Nifti1Image(data.astype(np.float64), truth.affine))
    np.testing.assert_array_equal(mine.get_fdata(), theirs.get_fdata())
    np.testing.assert_allclose(mine.affine, theirs.affine, atol=1e-4)


def test_four_dimensional_series_of_a_scanner(shared_data):
    volume = one_of(read_archive(str(shared_data / "dicom/dcm_qa_nih/In/20180918GE/mr_0004")))
    truth = nib.load(shared_data / "dicom/dcm_qa_nih/Ref/DCM2NIIX_regression_test_4.nii")
    mine = nib.as_closest_canonical(nib.Nifti1Image(np.moveaxis(volume.array, 0, -1), volume.affine))
    theirs = nib.as_closest_canonical(truth)
    np.testing.assert_array_equal(np.asanyarray(mine.dataobj), np.asanyarray(theirs.dataobj))
    np.testing.assert_allclose(mine.affine, theirs.affine, atol=1e-3)


def one_of(result):
    volumes, rejections = result
    assert reasons(rejections) == ["UNKNOWN_FORMAT"]  # a README
    return volumes[0]
