"""What is done to volumes only when the config asks: tilt and spacing resampled, PET as uptake values."""

import dataclasses
import re

import numpy as np
import pytest
from pydicom.sequence import Sequence

from sparkmed import config
from sparkmed.formats import read_archive, read_headers

from . import dicoms, enhanced
from .dicoms import AXIAL, OBLIQUE, classic, phantom
from .enhanced import frames
from .judges import difference, folder_of
from .test_refusals import TILTED, in_ct, uneven, upright

SLOPE = np.array([90.0, 70.0, 130.0])


def field(points: np.ndarray) -> np.ndarray:
    """A linear function of (..., 3) RAS+ mm: linear interpolation reproduces it, so a resampled volume must."""
    return 20000 + points @ SLOPE


def sampled(grid: dicoms.Grid, positions: list) -> np.ndarray:
    """(1, I, J, K) of the field at slices with these positions (LPS)."""
    i, j = np.meshgrid(np.arange(12), np.arange(10), indexing="ij")
    row, column = np.asarray(grid.orientation[:3]) * grid.spacing[1], np.asarray(grid.orientation[3:]) * grid.spacing[0]
    lps = [np.asarray(p) + i[..., None] * row + j[..., None] * column for p in positions]
    return np.stack([field(p * [-1, -1, 1]) for p in lps], -1)[None].round().astype(np.uint16)


def resampled(tmp_path, made, asked) -> tuple:
    """(volume, facts) of a series that becomes one volume only because of ``asked``."""
    folder = folder_of(tmp_path, made)
    assert read_archive(str(folder))[0] == []
    assert read_archive(str(folder), settings=config.Volumes())[0] == []
    (volume,), rejections = read_archive(str(folder), settings=asked)
    (header,), _ = read_headers(str(folder), settings=asked)
    assert rejections == [] and set(header.shape) == set(volume.array.shape)
    return volume, header.facts


def check_field(volume, positions: list, grid: dicoms.Grid):
    """The grid is orthogonal and covers the slices; inside of them the volume is the field."""
    columns = volume.affine[:3, :3] / np.linalg.norm(volume.affine[:3, :3], axis=0)
    np.testing.assert_allclose(columns.T @ columns, np.eye(3), atol=1e-5)
    np.testing.assert_allclose(sorted(volume.spacing[:2]), sorted(grid.spacing), rtol=1e-6)
    shape = volume.array.shape[1:]
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    ras = index @ volume.affine[:3, :3].T + volume.affine[:3, 3]
    # where a point lies in the original stack: slice by its distance along z over the tilted planes, then the plane's own axes
    lps = ras * [-1, -1, 1]
    normal = grid.normal
    first, last = np.asarray(positions[0]), np.asarray(positions[-1])
    share = (lps - first) @ normal / ((last - first) @ normal)
    inplane = lps - first - share[..., None] * (last - first)
    i, j = inplane @ grid.orientation[:3] / grid.spacing[1], inplane @ grid.orientation[3:] / grid.spacing[0]
    inside = (share >= 0) & (share <= 1) & (i >= 0) & (i <= 11) & (j >= 0) & (j <= 9)
    assert inside.mean() > 0.4
    np.testing.assert_allclose(volume.array[0][inside], field(ras)[inside], atol=2.5)


def test_tilt_resampled_on_request(tmp_path):
    positions = [upright(k) for k in range(9)]
    voxels = sampled(TILTED, positions)
    made = in_ct(voxels, TILTED, GantryDetectorTilt=14, ImagePositionPatient=lambda c, k: upright(k))
    volume, facts = resampled(tmp_path, made, config.Volumes(resample_tilt=True))
    assert facts["resampled"] == "tilt"
    check_field(volume, positions, TILTED)


@pytest.mark.parametrize("degrees", [5, 12, -17])
def test_slices_that_are_moved_keep_their_edges(tmp_path, degrees):
    """All is 1000 but a voxel of -1000: within a slice nothing becomes the least value of the volume."""
    a = np.radians(degrees)
    tilted = dataclasses.replace(
        AXIAL, origin=(-120.5, -100.25, 33.7), orientation=(1.0, 0.0, 0.0, 0.0, round(np.cos(a), 9), round(-np.sin(a), 9))
    )
    voxels = np.full((1, 12, 10, 8), 1000, np.int16)
    voxels[0, 5, 5, 3] = -1000
    made = in_ct(voxels, tilted, ImagePositionPatient=lambda c, k: [-120.5, -100.25, 33.7 + AXIAL.gap * k])
    (volume,), _ = read_archive(str(folder_of(tmp_path, made)), settings=config.Volumes(resample_tilt=True))
    moved = volume.array[0]
    first = moved[..., 0] if volume.affine[2, 2] > 0 else moved[..., -1]
    assert (first == 1000).sum() >= 12 * 10, "the first slice is where it was, whole"
    columns = np.argwhere((moved == 1000).any(axis=(1, 2)))
    assert len(columns) == 12


def test_spacing_resampled_on_request(tmp_path):
    positions = [uneven(k) for k in range(5)]
    made = in_ct(sampled(AXIAL, positions), ImagePositionPatient=lambda c, k: uneven(k))
    volume, facts = resampled(tmp_path, made, config.Volumes(resample_spacing=True))
    assert facts["resampled"] == "spacing"
    check_field(volume, positions, AXIAL)
    ends = volume.affine @ np.array([[0, 0, 0, 1], [0, 0, volume.array.shape[3] - 1, 1]]).T
    np.testing.assert_allclose(sorted(ends[2]), [positions[0][2], positions[-1][2]], atol=volume.spacing[2] / 2 + 1e-6)


def test_frames_resampled_on_request(tmp_path):
    """Frames of an enhanced object like slices; the rescale comes first."""
    positions = [uneven(k) for k in range(5)]
    made = frames(sampled(AXIAL, positions), AXIAL, position=lambda c, k: uneven(k), slope=1, intercept=0)
    volume, facts = resampled(tmp_path, [enhanced.enhanced(made, enhanced.ENHANCED_CT)], config.Volumes(resample_spacing=True))
    assert facts["resampled"] == "spacing"
    check_field(volume, positions, AXIAL)


@pytest.mark.parametrize("asked", [{"resample_spacing": True}, {"suv": True}])
def test_tilt_is_not_resampled_for_another_wish(tmp_path, asked):
    made = in_ct(phantom(), TILTED, ImagePositionPatient=lambda c, k: upright(k))
    volumes, rejections = read_archive(str(folder_of(tmp_path, made)), settings=config.Volumes(**asked))
    assert volumes == [] and {r.reason for r in rejections} == {"GANTRY_TILT"}


def test_regular_series_are_not_resampled(tmp_path):
    voxels = phantom()
    folder = folder_of(tmp_path, classic(voxels))
    asked = config.Volumes(resample_tilt=True, resample_spacing=True)
    (header,), _ = read_headers(str(folder), settings=asked)
    (volume,), _ = read_archive(str(folder), settings=asked)
    assert "resampled" not in header.facts
    assert difference((voxels, OBLIQUE.affine), (volume.array, volume.affine)) == ""


# ---- on request: standardised uptake values


def tracer(**changed):
    """What a PET header needs for SUVbw: 300 MBq of half-life 6586.2 s given 3600 s before the scan, 75 kg."""
    dose = {
        "RadionuclideTotalDose": "300000000",
        "RadionuclideHalfLife": "6586.2",
        "RadiopharmaceuticalStartTime": "091112.000000",
    }
    dose = enhanced.item(**dose | changed.pop("dose", {}))
    elements = {
        "SOPClassUID": dicoms.PET,
        "Modality": "PT",
        "EchoTime": None,
        "Units": "BQML",
        "DecayCorrection": "START",
        "CorrectedImage": ["ATTN", "DECY"],
        "PatientWeight": "75",
        "SeriesDate": "20200102",
        "SeriesTime": "101112.000000",
        "AcquisitionDate": "20200102",
        "AcquisitionTime": "101112.000000",
        "RadiopharmaceuticalInformationSequence": Sequence([dose]),
        "RescaleSlope": lambda c, k: dicoms.decimal(0.5 * (k + 1)),
        "RescaleIntercept": 0,
    }
    return elements | changed


REMAINING = 2 ** (-3600 / 6586.2)


@pytest.mark.parametrize("changed, factor", [
    ({}, 75000 / (3e8 * REMAINING)),
    ({"DecayCorrection": "ADMIN"}, 75000 / 3e8),
    ({"SeriesTime": "150000"}, 75000 / (3e8 * REMAINING)),  # a series made anew: its acquisition says when the scan began
    ({"AcquisitionTime": lambda c, k: f"10{11 + k}12"}, 75000 / (3e8 * REMAINING)),  # the scan began with the series
    ({"dose": {"RadiopharmaceuticalStartDateTime": "20200102091112"}}, 75000 / (3e8 * REMAINING)),
    ({"SeriesDate": "20200103", "AcquisitionDate": "20200103", "SeriesTime": "001112", "AcquisitionTime": "001112",
      "dose": {"RadiopharmaceuticalStartDateTime": "20200102231112", "RadiopharmaceuticalStartTime": None}},
     75000 / (3e8 * REMAINING)),
    ({"Units": "GML", "SUVType": "BW"}, 1.0),
    ({"Units": "GML"}, 1.0),  # PS3.3 C.8.9.1: without SUVType it is body weight
])  # fmt: skip
def test_uptake_on_request(tmp_path, changed, factor):
    voxels = phantom()
    folder = folder_of(tmp_path, classic(voxels, AXIAL, **tracer(**changed)))
    asked = config.Volumes(suv=True)
    (volume,), rejections = read_archive(str(folder), settings=asked)
    (header,), _ = read_headers(str(folder), settings=asked)
    assert rejections == [] and header.facts["units"] == "SUVbw"
    np.testing.assert_allclose(volume.array, voxels * 0.5 * np.arange(1, 6) * factor, rtol=1e-5)
    np.testing.assert_allclose(volume.affine, AXIAL.affine, atol=1e-6)


def test_activity_without_the_wish(tmp_path):
    voxels = phantom()
    (volume,), _ = read_archive(str(folder_of(tmp_path, classic(voxels, AXIAL, **tracer()))), settings=config.Volumes())
    np.testing.assert_allclose(volume.array, voxels * 0.5 * np.arange(1, 6), rtol=1e-6)


@pytest.mark.parametrize("changed, word", [
    ({"PatientWeight": None}, "weight"),
    ({"PatientWeight": "0"}, "weight"),
    ({"Units": "CNTS"}, "CNTS|units"),
    ({"Units": "GML", "SUVType": "LBM"}, "LBM"),
    ({"DecayCorrection": "NONE"}, "decay"),
    ({"RadiopharmaceuticalInformationSequence": None}, "dose|radiopharmaceutical"),
    ({"dose": {"RadionuclideTotalDose": None}}, "dose"),
    ({"dose": {"RadionuclideHalfLife": None}}, "half"),
    ({"dose": {"RadiopharmaceuticalStartTime": None}}, "time"),
    ({"dose": {"RadiopharmaceuticalStartTime": "111112"}}, "time|after|before"),  # given after the scan
])  # fmt: skip
def test_uptake_that_cannot_be_told(tmp_path, changed, word):
    """Refused with a reason that names what is missing; no weight of a person is said."""
    folder = folder_of(tmp_path, classic(phantom(), AXIAL, **tracer(**changed)))
    volumes, rejections = read_archive(str(folder), settings=config.Volumes(suv=True))
    assert volumes == [] and len(rejections) == 5
    (reason,) = {r.reason for r in rejections}
    (message,) = {r.message for r in rejections}
    assert re.search(word, message, re.IGNORECASE), (reason, message)
    assert "75" not in message and dicoms.SECRET not in message


def test_other_modalities_have_no_uptake(tmp_path):
    voxels = phantom()
    (volume,), rejections = read_archive(str(folder_of(tmp_path, classic(voxels))), settings=config.Volumes(suv=True))
    assert rejections == []
    np.testing.assert_array_equal(volume.array, voxels)
