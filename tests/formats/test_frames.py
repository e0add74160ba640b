import numpy as np
import pytest
from pydicom.dataset import Dataset

from sparkmed import config, read_archive
from sparkmed.formats import dicom, frames, inspect, read_headers
from sparkmed.imaging import patches
from tests.formats import dicoms


def level(uid: str, size: int, tile: int, sparse: bool = False, **elements):
    """(one level of a slide in tiles, its (rows, columns, 3) picture), random colours."""
    whole = np.random.default_rng(size).integers(0, 255, (size, size + 3, 3)).astype(np.uint8)
    corners = [(r, c) for r in range(0, size, tile) for c in range(0, size + 3, tile)]
    padded = np.pad(whole, ((0, tile), (0, tile), (0, 0)), constant_values=255)
    tiles = np.stack([padded[r : r + tile, c : c + tile] for r, c in corners])
    nowhere = dict.fromkeys(("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"))
    own = {
        "SOPClassUID": dicom.SLIDE, "Modality": "SM", "ImageType": ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"], "SOPInstanceUID": uid,
        "NumberOfFrames": len(tiles), "TotalPixelMatrixColumns": size + 3, "TotalPixelMatrixRows": size,
        "ImageOrientationSlide": [0, -1, 0, -1, 0, 0],
    } | nowhere | elements  # fmt: skip
    ds = dicoms.dataset(tiles[0], **own)
    origin, measures, shared = Dataset(), Dataset(), Dataset()
    origin.XOffsetInSlideCoordinateSystem, origin.YOffsetInSlideCoordinateSystem = 20, 40
    measures.PixelSpacing, measures.SliceThickness = [0.25 / size, 0.25 / size], 0.001
    shared.PixelMeasuresSequence = [measures]
    ds.TotalPixelMatrixOriginSequence, ds.SharedFunctionalGroupsSequence = [origin], [shared]
    order = list(range(len(tiles)))
    if sparse:
        order = order[::-1][:-1]  # backwards, and the first tile is nowhere
        whole[:tile, :tile] = 255
        places = []
        for r, c in (corners[n] for n in order):
            place, item = Dataset(), Dataset()
            place.RowPositionInTotalImagePixelMatrix, place.ColumnPositionInTotalImagePixelMatrix = r + 1, c + 1
            item.PlanePositionSlideSequence = [place]
            places.append(item)
        ds.PerFrameFunctionalGroupsSequence, ds.NumberOfFrames = places, len(order)
    ds.PixelData = tiles[order].tobytes()
    return ds, whole


@pytest.mark.parametrize("sparse", [False, True])
def test_slide_is_one_picture(tmp_path, sparse):
    ds, whole = level("1.2.9.1", 40, 16, sparse)
    (volume,), rejections = read_archive(str(dicoms.write(tmp_path, [ds])))
    np.testing.assert_array_equal(volume.array[..., 0], whole.transpose(2, 1, 0))
    assert not rejections
    # the first pixel lies 20 mm along x and 40 mm along y; columns run against y, rows against x; then LPS to RAS
    spacing = 0.25 / 40
    np.testing.assert_allclose(volume.affine[:2], [[0, spacing, 0, -20], [spacing, 0, 0, -40]], atol=1e-12)


def test_levels_of_a_slide_and_its_label(tmp_path):
    fine, coarse = level("1.2.9.1", 40, 16)[0], level("1.2.9.2", 20, 16)[0]
    label = level("1.2.9.3", 12, 16, ImageType=["ORIGINAL", "PRIMARY", "LABEL", "NONE"])[0]
    url = str(dicoms.write(tmp_path, [fine, coarse, label]))
    headers, rejections = read_headers(url)
    assert {h.shape: h.facts["part"] for h in headers} == {
        (3, 43, 40, 1): {"matrix": [43, 40]},
        (3, 23, 20, 1): {"matrix": [23, 20]},
    }
    assert [r.reason for r in rejections] == ["SLIDE_LABEL"]
    (one,), rejections = read_headers(url, settings=config.Volumes(slide_level=1))
    assert one.shape == (3, 23, 20, 1) and sorted(r.reason for r in rejections) == ["OTHER_LEVEL", "SLIDE_LABEL"]
    assert "43 x 40, 23 x 20" in next(r.message for r in rejections if r.reason == "OTHER_LEVEL")
    assert "matrix" in inspect(url)


@pytest.mark.parametrize("elements, reason", [
    ({"TotalPixelMatrixFocalPlanes": 2}, "TOO_MANY_DIMENSIONS"),
    ({"TotalPixelMatrixRows": 30}, "BAD_SHAPE"),
    ({"TotalPixelMatrixColumns": 2**31 - 1, "TotalPixelMatrixRows": 2**31 - 1}, "TOO_LARGE"),
])  # fmt: skip
def test_slides_that_cannot_be(tmp_path, elements, reason):
    volumes, (rejection,) = read_archive(str(dicoms.write(tmp_path, [level("1.2.9.1", 40, 16, **elements)[0]])))
    assert not volumes and rejection.reason == reason


def test_reconstruction_of_nuclear_medicine(tmp_path):
    voxels = dicoms.stack((6, 5, 4))
    detector = Dataset()
    detector.ImagePositionPatient, detector.ImageOrientationPatient = [-10, 5, 30], [1, 0, 0, 0, 1, 0]
    nowhere = {"ImagePositionPatient": None, "ImageOrientationPatient": None}
    vectors = {"NumberOfFrames": 4, "SpacingBetweenSlices": -3.0, "SliceVector": [1, 2, 3, 4]}
    ds = dicoms.dataset(voxels[..., 0].T, Modality="NM", SOPClassUID="1.2.840.10008.5.1.4.1.1.20", **nowhere, **vectors)
    ds.PixelData, ds.DetectorInformationSequence = voxels.transpose(2, 1, 0).tobytes(), [detector]
    (volume,), _ = read_archive(str(dicoms.write(tmp_path, [ds])))
    np.testing.assert_array_equal(volume.array[0], voxels[..., ::-1])  # a negative gap stacks them against the normal
    np.testing.assert_allclose(volume.affine[:3, 3], [10, -5, 30 - 9])


def test_frames_without_a_place_are_channels(tmp_path):
    cine = dicoms.stack((6, 5, 7), np.uint8)
    nowhere = dict.fromkeys(("ImagePositionPatient", "ImageOrientationPatient", "FrameOfReferenceUID"))
    ds = dicoms.dataset(cine[..., 0].T, Modality="XA", SOPClassUID="1.2.840.10008.5.1.4.1.1.12.1", NumberOfFrames=7, **nowhere)
    ds.PixelData = cine.transpose(2, 1, 0).tobytes()
    url = str(dicoms.write(tmp_path, [ds]))
    (volume,), _ = read_archive(url)
    np.testing.assert_array_equal(volume.array[..., 0], cine.transpose(2, 0, 1))
    assert read_headers(url)[0][0].facts["axis"] == "frame"


@pytest.mark.parametrize("data", [b"SV10", b"SV10" + b"\xff" * 200, b"SV10\4\3\2\1" + (1000).to_bytes(4, "little") + b"\0" * 90])
def test_damaged_private_headers_hold_nothing(data):
    assert frames.csa_values(data) == {}


def lost_tiles(ds):
    ds.NumberOfFrames, ds.PixelData = 4, ds.PixelData[: 4 * 16 * 16 * 3]


def two_at_one_place(ds):
    ds.PerFrameFunctionalGroupsSequence[1].PlanePositionSlideSequence = ds.PerFrameFunctionalGroupsSequence[
        0
    ].PlanePositionSlideSequence


def one_without_a_place(ds):
    del ds.PerFrameFunctionalGroupsSequence[2].PlanePositionSlideSequence


def cut_into_objects(ds):
    ds.ConcatenationUID, ds.InConcatenationNumber = "1.2.9.9", 1


def almost_nothing_of_a_giant(ds):
    ds.TotalPixelMatrixColumns = ds.TotalPixelMatrixRows = 20_000


@pytest.mark.parametrize("sparse, change, reason", [
    (False, lost_tiles, "BAD_SHAPE"),
    (True, two_at_one_place, "TOO_MANY_DIMENSIONS"),
    (True, one_without_a_place, "BAD_SHAPE"),
    (False, cut_into_objects, "SLIDE_IN_PARTS"),
    (True, almost_nothing_of_a_giant, "TOO_LARGE"),
])  # fmt: skip
def test_slides_that_are_not_whole(tmp_path, sparse, change, reason):
    """No tile is painted over another, left out or guessed."""
    ds, _ = level("1.2.9.1", 40, 16, sparse)
    change(ds)
    volumes, (rejection,) = read_archive(str(dicoms.write(tmp_path, [ds])))
    assert not volumes and rejection.reason == reason


def test_tiles_of_a_level_are_patches(tmp_path):
    """A level is cut like any 2-D image, on the grid of patches and not on that of the file's tiles."""
    ds, whole = level("1.2.9.1", 40, 16)
    (volume,), _ = read_archive(str(dicoms.write(tmp_path, [ds])), settings=config.Volumes(slide_level=0))
    cut = {p.index: patches.extract(volume.array, p) for p in patches.grid(volume.array.shape[1:], (12, 10, 1))}
    assert len(cut) == 4 * 4
    for (i, j, _), patch in cut.items():
        np.testing.assert_array_equal(patch[..., 0], whole[j : j + 10, i : i + 12].transpose(2, 1, 0))
