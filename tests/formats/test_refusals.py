"""Series that are no volume are refused, each with its reason code and the numbers that show it."""

import copy
import dataclasses
import re

import numpy as np
import pydicom
import pytest

from sparkmed import config
from sparkmed.formats import read_archive

from . import dicoms, enhanced
from .dicoms import AXIAL, OBLIQUE, SAGITTAL, classic, phantom
from .enhanced import frames, mosaic, shuffled
from .judges import difference, folder_of

REFUSED: dict[str, tuple] = {}


def refused(name: str, code: str, *shown: str):
    """Add a function that returns datasets which are refused with ``code``, in words that match ``shown`` (expressions)."""

    def add(make):
        REFUSED[name] = (make, code, shown)
        return make

    return add


TILT = np.radians(14)
TILTED = dataclasses.replace(AXIAL, orientation=(1.0, 0.0, 0.0, 0.0, round(np.cos(TILT), 9), round(-np.sin(TILT), 9)))
HEIGHTS = (0, 2.5, 5, 9.3, 11.8)


def upright(k) -> list[float]:
    """Positions that step along z, whatever the slices' normal."""
    return [AXIAL.origin[0], AXIAL.origin[1], AXIAL.origin[2] + AXIAL.gap * k]


def uneven(k) -> list[float]:
    return [AXIAL.origin[0], AXIAL.origin[1], AXIAL.origin[2] + HEIGHTS[k]]


def in_ct(voxels, grid=AXIAL, **elements):
    return classic(voxels, grid, **{"SOPClassUID": dicoms.CT, "Modality": "CT", "EchoTime": None} | elements)


@refused("gantry tilt", "GANTRY_TILT", r"\b14(\.0+)?\b")
def _():
    return in_ct(phantom(), TILTED, GantryDetectorTilt=14, ImagePositionPatient=lambda c, k: upright(k))


@refused("gantry tilt in an enhanced object", "GANTRY_TILT", r"\b14(\.0+)?\b")
def _():
    return [enhanced.enhanced(frames(phantom(), TILTED, position=lambda c, k: upright(k)), enhanced.ENHANCED_CT)]


@refused("half of two times", "MIXED_TIMES", r"\b2\b", "temporal")
def _():
    return classic(phantom(), TemporalPositionIdentifier=lambda c, k: 1 + (k > 1))


@refused("b-values in turn", "MIXED_TIMES", r"\bb\b")
def _():
    return classic(phantom(), DiffusionBValue=lambda c, k: 1000.0 * (k % 2))


@refused("half of two times in an enhanced object", "MIXED_TIMES", "temporal")
def _():
    return [enhanced.enhanced(frames(phantom(), temporal=lambda c, k: 1 + (k > 1)))]


@refused("echo times that jitter", "INTERLEAVED", r"\b3 and 2\b", "echo")
def _():
    return classic(phantom(), EchoTime=lambda c, k: 4.5 + 0.001 * (k % 2))


@refused("an image type on half of the slices", "INTERLEAVED", r"\b3 and 2\b", "type")
def _():
    return classic(phantom(), ImageType=lambda c, k: ["ORIGINAL", "PRIMARY", "M"] + ["NORM"] * (k > 2))


@refused("every other slice of an MR", "MISSING_SLICE", r"\b7\b", r"3\.5")
def _():
    return classic(phantom(), dataclasses.replace(OBLIQUE, gap=7.0), SpacingBetweenSlices=3.5, SliceThickness=3.5)


@refused("a rotation of a CT that lost its last slice", "IRREGULAR_SPACING")
def _():
    heights = [k * 2.5 + 0.35 * (k // 4) for k in range(16)]
    made = in_ct(
        phantom(shape=(12, 10, 16)), AcquisitionNumber=lambda c, k: 1 + k // 4,
        ImagePositionPatient=lambda c, k: [*AXIAL.origin[:2], AXIAL.origin[2] + heights[k]],
    )  # fmt: skip
    return made[:7] + made[8:]


@refused("a rescale on some slices", "MIXED_RESCALE", r"\b4\b", r"\b5\b")
def _():
    return in_ct(phantom(), RescaleSlope=lambda c, k: None if k == 2 else 2, RescaleIntercept=lambda c, k: None if k == 2 else 0)


@refused("three types that interleave", "INTERLEAVED", r"\b4 and 4 and 4\b", "type")
def _():
    return in_ct(phantom(shape=(6, 5, 12)), ImageType=lambda c, k: ["ORIGINAL", "PRIMARY", "AXIAL", f"T{k % 3}"])


@refused("a direction of diffusion per slice", "MIXED_TIMES", r"\b4\b", "direction")
def _():
    directions = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.6, 0.8, 0]]
    return classic(phantom(shape=(6, 5, 4)), DiffusionBValue=1000, DiffusionGradientOrientation=lambda c, k: directions[k])


@refused("units that differ", "MIXED_RESCALE", "HU", "US")
def _():
    rescale = {"RescaleSlope": 1, "RescaleIntercept": 0}
    return in_ct(phantom(), **rescale, RescaleType=lambda c, k: ["HU", "US"][k % 2])


@refused("a header of its own for each of very many frames", "INTERLEAVED", r"\b300\b")
def _():
    return [enhanced.enhanced(frames(phantom(shape=(2, 2, 300)), echo=lambda c, k: 1 + k / 100))]


@refused("more orientations than a radial scan has", "MIXED_ORIENTATION", r"\b64\b")
def _():
    turns = [np.pi * k / 80 for k in range(80)]
    return classic(
        phantom(shape=(4, 4, 80)), ImageOrientationPatient=lambda c, k: [np.cos(turns[k]), np.sin(turns[k]), 0, 0, 0, -1]
    )


@refused("gaps that vary", "IRREGULAR_SPACING", r"2\.5", r"4\.3")
def _():
    return in_ct(phantom(), ImagePositionPatient=lambda c, k: uneven(k))


@refused("gaps that vary in an enhanced object", "IRREGULAR_SPACING", r"2\.5", r"4\.3")
def _():
    return [enhanced.enhanced(frames(phantom(), AXIAL, position=lambda c, k: uneven(k)), enhanced.ENHANCED_CT)]


@refused("missing slice", "MISSING_SLICE", "1 of 5", r"3\.5", r"\b7\b")
def _():
    made = classic(phantom())
    return made[:2] + made[3:]


@refused("missing frame", "MISSING_SLICE", "1 of 5", r"3\.5", r"\b7\b")
def _():
    made = frames(phantom())
    return [enhanced.enhanced(made[:2] + made[3:])]


@refused("missing slice in every time", "MISSING_SLICE", "1 of 5", r"3\.5", r"\b7\b")
def _():
    made = classic(phantom(2), TemporalPositionIdentifier=lambda c, k: c + 1)
    return [ds for n, ds in enumerate(made) if n % 5 != 2]


@refused("one slice missing in one time", "DUPLICATE_POSITION|MISSING_SLICE", r"\b1\b", r"\b2\b")
def _():
    made = classic(phantom(2), TemporalPositionIdentifier=lambda c, k: c + 1)
    return made[:7] + made[8:]


@refused("one position twice", "DUPLICATE_POSITION", r"\b1\b", r"\b2\b")
def _():
    return classic(phantom()) + classic(phantom(start=700), InstanceNumber=9)[2:3]


@refused("two frames at each position and nothing to order them", "DUPLICATE_POSITION", r"\b2\b")
def _():
    return [enhanced.enhanced(shuffled(frames(phantom(2))))]


@refused("one slice of another orientation", "MIXED_ORIENTATION", r"\b5\b", r"\b1\b")
def _():
    return classic(phantom()) + classic(phantom()[..., :1], SAGITTAL, InstanceNumber=9)


@refused("localizer of three planes", "LOCALIZER")
def _():
    kind = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    return [ds for g in (AXIAL, OBLIQUE, SAGITTAL) for ds in classic(phantom()[..., :1], g, ImageType=kind)]


@refused("enhanced localizer", "LOCALIZER")
def _():
    kind = ["ORIGINAL", "PRIMARY", "LOCALIZER", "NONE"]
    made = [f for g in (AXIAL, OBLIQUE, SAGITTAL) for f in frames(phantom()[..., :1], g, type=kind)]
    return [enhanced.enhanced(made, ImageType=kind)]


@refused("one slice without a position", "MISSING_POSITION", "1 of 5")
def _():
    return classic(phantom(), ImagePositionPatient=lambda c, k: None if k == 2 else OBLIQUE.position(k))


@refused("one frame without a position", "MISSING_POSITION", "1 of 5")
def _():
    return [enhanced.enhanced(frames(phantom(), position=lambda c, k: None if k == 2 else OBLIQUE.position(k)))]


@refused("two frames of reference", "FRAME_OF_REFERENCE", r"\b2\b")
def _():
    return classic(phantom(), FrameOfReferenceUID=lambda c, k: f"1.2.3.{k % 2}")


@refused("two frames of reference in two enhanced objects", "FRAME_OF_REFERENCE", r"\b2\b")
def _():
    made = frames(phantom())
    return [enhanced.enhanced(made[:2], FrameOfReferenceUID="1.2.3.1"), enhanced.enhanced(made[2:], FrameOfReferenceUID="1.2.3.2")]


@refused("fewer functional groups than frames", "[A-Z_]+")
def _():
    ds = enhanced.enhanced(frames(phantom()))
    del ds.PerFrameFunctionalGroupsSequence[-1]
    return [ds]


@refused("one of two objects of a concatenation", "[A-Z_]+")
def _():
    elements = {"ConcatenationUID": "1.2.3.4.8", "InConcatenationNumber": 1, "InConcatenationTotalNumber": 2}
    return [enhanced.enhanced(frames(phantom())[:3], ConcatenationFrameOffsetNumber=0, **elements)]


@refused("mosaic without its private header", "MOSAIC")
def _():
    return mosaic(phantom(), header=False)


@refused("mosaic that does not say how many tiles", "MOSAIC")
def _():
    made = mosaic(phantom())
    made[0][0x00291010].value = enhanced.siemens_header(0, OBLIQUE.normal)
    return made


@refused("mosaic of more tiles than it has room for", "MOSAIC", r"\b20\b")
def _():
    made = mosaic(phantom())
    made[0][0x00291010].value = enhanced.siemens_header(20, OBLIQUE.normal)
    return made


@refused("mosaic with a damaged private header", "MOSAIC")
def _():
    made = mosaic(phantom())
    made[0][0x00291010].value = made[0][0x00291010].value[:100]
    return made


@refused("radiotherapy dose", "NOT_AN_IMAGE")
def _():
    return [enhanced.dose(phantom(dtype=np.uint32))]


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path, name):
    make, code, shown = REFUSED[name]
    folder = folder_of(tmp_path, make())
    volumes, rejections = read_archive(str(folder))
    assert volumes == []
    assert sorted(r.uri for r in rejections) == sorted(f"file://{p.resolve()}" for p in folder.iterdir())
    for r in rejections:
        assert re.fullmatch(code, r.reason), (r.reason, r.message)
        for expression in shown:
            assert re.search(expression, r.message), (expression, r.message)


def test_localizer_leaves_the_other_frames_alone(tmp_path):
    """A volume whose series also holds a localizer in another object."""
    voxels = phantom()
    kind = ["ORIGINAL", "PRIMARY", "LOCALIZER", "NONE"]
    made = [enhanced.enhanced(frames(voxels)), enhanced.enhanced(frames(voxels[..., :1], SAGITTAL, type=kind), ImageType=kind)]
    (volume,), rejections = read_archive(str(folder_of(tmp_path, made)))
    assert difference((voxels, OBLIQUE.affine), (volume.array, volume.affine)) == ""
    assert [r.reason for r in rejections] == ["LOCALIZER"]


@pytest.mark.parametrize("other", ["1.2.840.10008.1.2.5", "1.2.840.10008.1.2.4.81"])
def test_same_frames_twice(tmp_path, other):
    """The copy that is not lossy is used, the other is listed."""
    voxels = phantom()
    made = enhanced.enhanced(frames(voxels))
    copy = enhanced.enhanced(frames(voxels))
    copy.compress(other, generate_instance_uid=False)
    folder = dicoms.write(tmp_path, [copy, made], ["a.dcm", "b.dcm"])
    (volume,), rejections = read_archive(str(folder))
    assert difference((voxels, OBLIQUE.affine), (volume.array, volume.affine)) == ""
    assert [r.reason for r in rejections] == ["DUPLICATE_INSTANCE"]


def test_copy_that_can_be_decoded_is_used(tmp_path):
    """The same slices in a syntax nobody decodes here, under names that come first."""
    voxels = phantom()
    made, copies = classic(voxels), classic(voxels)
    for ds in copies:
        ds.PixelData = pydicom.encaps.encapsulate([ds.PixelData])
        ds["PixelData"].VR = "OB"
        ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.100"  # MPEG-2
    folder = dicoms.write(tmp_path, copies + made)
    (volume,), rejections = read_archive(str(folder))
    assert difference((voxels, OBLIQUE.affine), (volume.array, volume.affine)) == ""
    assert len(rejections) == 5


@pytest.mark.parametrize("place", [0, 2, -1])
@pytest.mark.parametrize("reason", ["CONFLICTING_INSTANCE", "BAD_VALUE", "TRUNCATED"])
def test_a_series_that_lost_a_slice_is_no_volume(tmp_path, place, reason):
    """Nor when it is the first or the last one, and the others are a regular grid."""
    made = classic(phantom(), RescaleSlope=1, RescaleIntercept=0)
    extra = []
    if reason == "BAD_VALUE":
        made[place].RescaleSlope = 0
    if reason == "CONFLICTING_INSTANCE":
        extra = [copy.deepcopy(made[place])]
        extra[0].PixelData = bytes(len(extra[0].PixelData))
    folder = dicoms.write(tmp_path, made + extra)
    file = sorted(folder.iterdir())[range(len(made))[place]]
    if reason == "TRUNCATED":
        file.write_bytes(file.read_bytes()[:-20])
    volumes, rejections = read_archive(str(folder))
    reasons = {r.uri.rpartition("/")[2]: r.reason for r in rejections}
    assert volumes == [] and len(rejections) == len(made + extra)
    assert reasons.pop(file.name) == reason
    assert set(reasons.values()) - {reason} == {"MISSING_SLICE"}


def test_slices_of_micrometres(tmp_path):
    fine = dataclasses.replace(AXIAL, spacing=(0.009, 0.009), gap=0.009)
    voxels = phantom()
    (volume,), _ = read_archive(str(folder_of(tmp_path, in_ct(voxels, fine))))
    assert difference((voxels, fine.affine), (volume.array, volume.affine)) == ""
    made = in_ct(voxels, fine)
    _, rejections = read_archive(str(dicoms.write(tmp_path / "less", made[:2] + made[3:])))
    assert {r.reason for r in rejections} == {"MISSING_SLICE"}


def test_same_uid_other_pixels(tmp_path):
    """Nothing tells which of two is the image: neither is taken silently."""
    made, others = classic(phantom()), classic(phantom(start=500))
    for ds, other in zip(made, others, strict=True):
        other.SOPInstanceUID = other.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    volumes, rejections = read_archive(str(dicoms.write(tmp_path, made + others)))
    assert volumes == [] and {r.reason for r in rejections} == {"CONFLICTING_INSTANCE"}


def test_projections_of_nuclear_medicine(tmp_path):
    """A scintigraphy from two sides is two frames without a place: two channels."""
    voxels = phantom(2)[..., :1]
    ds = enhanced.emission(
        np.moveaxis(voxels, 0, -1).reshape(1, 12, 10, 2), ImageType=["ORIGINAL", "PRIMARY", "STATIC", "EMISSION"]
    )
    for name in ("DetectorInformationSequence", "SliceVector", "NumberOfSlices", "SpacingBetweenSlices"):
        del ds[name]
    (volume,), rejections = read_archive(str(folder_of(tmp_path, [ds])))
    assert rejections == [] and volume.array.shape == (2, 12, 10, 1)
    np.testing.assert_array_equal(volume.array, voxels)


@pytest.mark.parametrize("gap", [2.5, 1.3, 1.0], ids="half a slice,off the grid,a fifth".split(","))
def test_two_scans_of_one_region(tmp_path, gap):
    """Acquisitions of a CT that overlap are two volumes, also where their slices would be one regular grid."""
    place = {1: 0.0, 2: gap}
    grid = dataclasses.replace(AXIAL, gap=5.0)
    made = [
        ds
        for n, value in ((1, 100), (2, 900))
        for ds in in_ct(
            phantom() * 0 + value, grid, AcquisitionNumber=n,
            ImagePositionPatient=lambda c, k, n=n: [*AXIAL.origin[:2], AXIAL.origin[2] + 5 * k + place[n]],
        )
    ]  # fmt: skip
    for settings in (config.Volumes(), config.Volumes(resample_spacing=True)):
        volumes, rejections = read_archive(str(folder_of(tmp_path / repr(settings.resample_spacing), made)), settings=settings)
        assert not rejections and sorted(np.unique(v.array).tolist() for v in volumes) == [[100], [900]]


@pytest.mark.parametrize("changed", [
    {"RescaleSlope": 2, "RescaleIntercept": -1024}, {"FrameOfReferenceUID": "1.2.3.9"}, {"PatientID": "somebody-else"},
    {"PhotometricInterpretation": "MONOCHROME1"}, {},
], ids=lambda c: next(iter(c), "nothing"))  # fmt: skip
def test_one_instance_with_two_meanings(tmp_path, changed):
    """The stored pixels are the same, what they mean is not: nobody may choose by the names of folders."""
    same = {"RescaleSlope": 1, "RescaleIntercept": 0, "SOPInstanceUID": lambda c, k: f"1.2.3.7.{k}"}
    one, other = in_ct(phantom(), **same), in_ct(phantom(), **same | changed)
    folder = dicoms.write(tmp_path, one + other, [f"{f}{k}.dcm" for f in "ab" for k in range(5)])
    volumes, rejections = read_archive(str(folder))
    if not changed:
        assert len(volumes) == 1 and {r.reason for r in rejections} == {"DUPLICATE_INSTANCE"}
    else:
        assert not volumes and len(rejections) == 10 and {r.reason for r in rejections} == {"CONFLICTING_INSTANCE"}


def test_lossy_copy_of_other_pixels(tmp_path):
    made = dicoms.dataset(phantom(shape=(32, 32, 1), dtype=np.uint8)[0, :, :, 0].T.copy(), SOPInstanceUID="1.2.3.7", Modality="OT")
    copy = dicoms.dataset(255 - made.pixel_array, SOPInstanceUID="1.2.3.7", Modality="OT")
    copy.compress("1.2.840.10008.1.2.4.81", generate_instance_uid=False)
    copy.LossyImageCompression = None
    volumes, rejections = read_archive(str(dicoms.write(tmp_path, [made, copy])))
    assert not volumes and {r.reason for r in rejections} == {"CONFLICTING_INSTANCE"}


def test_a_sound_copy_counts_where_another_is_broken(tmp_path):
    sound = classic(phantom(), SOPInstanceUID=lambda c, k: f"1.2.3.7.{k}")
    broken = classic(phantom(), SOPInstanceUID=lambda c, k: f"1.2.3.7.{k}")
    for ds in broken:
        ds.compress("1.2.840.10008.1.2.5", generate_instance_uid=False)
        ds.PixelData = ds.PixelData[:90] + b"\xff" * (len(ds.PixelData) - 98) + ds.PixelData[-8:]
    folder = dicoms.write(tmp_path, broken + sound, [f"{f}{k}.dcm" for f in "ab" for k in range(5)])
    (volume,), rejections = read_archive(str(folder))
    assert difference((phantom(), OBLIQUE.affine), (volume.array, volume.affine)) == ""
    assert all("/a" in r.uri and r.reason == "BROKEN_PIXELS" for r in rejections) and len(rejections) == 5


def test_series_uids_that_are_none_stay_apart(tmp_path):
    made = classic(phantom(), SeriesInstanceUID="anon/abc=") + classic(phantom() + 1, SeriesInstanceUID="anon/xyz=")
    volumes, rejections = read_archive(str(folder_of(tmp_path, made)))
    assert len(volumes) == 2 and not rejections and all(v.array.shape[0] == 1 for v in volumes)


def test_times_across_midnight(tmp_path):
    voxels = phantom(3)
    times = ("235800.000000", "235930.000000", "000100.000000")
    made = classic(voxels, AcquisitionTime=lambda c, k: times[c])
    (volume,), _ = read_archive(str(folder_of(tmp_path, shuffled(made))))
    np.testing.assert_array_equal(volume.array, voxels)


def test_slices_that_wander_are_no_tilt(tmp_path):
    places = [upright(k) for k in range(9)]
    for k, place in enumerate(places):
        place[1] += 7.0 * (k % 3)
    made = in_ct(phantom(shape=(12, 10, 9)), TILTED, ImagePositionPatient=lambda c, k: places[k])
    volumes, rejections = read_archive(str(folder_of(tmp_path, made)), settings=config.Volumes(resample_tilt=True))
    assert not volumes and len(rejections) == 9


def test_a_hole_is_not_interpolated(tmp_path):
    heights = (0, 5, 10, 71.7, 76.7)
    made = in_ct(phantom(), ImagePositionPatient=lambda c, k: [*AXIAL.origin[:2], heights[k]])
    volumes, rejections = read_archive(str(folder_of(tmp_path, made)), settings=config.Volumes(resample_spacing=True))
    assert not volumes and {r.reason for r in rejections} == {"IRREGULAR_SPACING"}


def test_a_broken_frame_of_one_of_two_volumes(tmp_path):
    made = enhanced.enhanced(frames(phantom(2), echo=lambda c, k: 4.9 * (c + 1)))
    made.compress("1.2.840.10008.1.2.5", generate_instance_uid=False)
    parts = list(pydicom.encaps.generate_fragments(made.PixelData))
    del parts[0]  # the offset table
    parts[-1] = parts[-1][:66] + b"\xff" * (len(parts[-1]) - 66)
    made.PixelData = pydicom.encaps.encapsulate(parts, has_bot=False)
    volumes, rejections = read_archive(str(folder_of(tmp_path, [made])))
    assert len(volumes) == 1 and [r.reason for r in rejections] == ["BROKEN_PIXELS"]
