import dataclasses
import io

import highdicom as hd
import numpy as np
import pydicom
import pytest

from formats import dicoms, enhanced
from sparkmed import storage
from sparkmed.config import Segment, Volumes
from sparkmed.formats import (
    assemble,
    dicom,
    dicom_seg,
    isolation,
    members,
    read_archive,
    read_headers,
    read_instance,
    read_volume,
    segmentation,
)
from sparkmed.imaging.geometry import Grid
from sparkmed.imaging.labels import on_grid
from sparkmed.imaging.volume import Volume
from sparkmed.rejection import InputError, Refused

SHAPE = (9, 7, 6)
OBLIQUE = (0.8, 0.6, 0.0, -0.48, 0.64, 0.6)
ORIENTATIONS = {"axial": (1, 0, 0, 0, 1, 0), "sagittal": (0, 1, 0, 0, 0, -1), "oblique": OBLIQUE}
EVERY = pytest.mark.parametrize("orientation", ORIENTATIONS.values(), ids=ORIENTATIONS)
SEGMENTS = {"liver": Segment(type=(10200004, "SCT", "Liver")), "kidney": Segment()}


def image(shape=SHAPE, **elements):
    return dicoms.series(dicoms.stack(shape), PixelSpacing=[1.5, 1.25], **elements)


def masks(seed=0, shape=SHAPE):
    """(I, J, K, 2): two overlapping boxes, none of them in the first two slices."""
    out = np.zeros((*shape, 2), np.uint8)
    out[1:6, 2:5, 2:5, 0] = 1
    out[4:9, 3:7, 3:6, 1] = 1
    return out


def planes(array):
    """(I, J, K, ...) as highdicom stacks frames: (K, rows, columns, ...)."""
    return np.moveaxis(array, (0, 1, 2), (2, 1, 0))


def labelled(tmp_path, seg):
    """The image and the label of an archive of both."""
    seg.save_as(tmp_path / "seg.dcm")
    volumes, rejections = read_archive(str(tmp_path))
    assert not rejections
    return sorted(volumes, key=lambda v: v.modality)


def header_of(tmp_path, datasets):
    ((header,), rejections) = read_headers(str(dicoms.write(tmp_path / "image", datasets)))
    assert not rejections
    return header


# reading


@EVERY
def test_overlapping_segments_lie_on_the_voxels_of_their_image(tmp_path, orientation):
    sources = image(orientation=orientation)
    dicoms.write(tmp_path, sources)
    ct, label = labelled(tmp_path, dicoms.seg(sources, planes(masks())))
    assert (label.modality, label.array.dtype, ct.modality) == ("SEG", np.uint8, "CT")
    assert np.array_equal(label.array, np.moveaxis(masks(), 3, 0))
    assert np.array_equal(label.affine, ct.affine)


@EVERY
@pytest.mark.parametrize("turn", ["reversed", "part", "turned", "mirrored"])
def test_frames_go_where_their_positions_say(tmp_path, orientation, turn):
    sources = image(orientation=orientation)
    affine = np.reshape(header_of(tmp_path, sources).affine, (4, 4))
    array, step = masks(), np.eye(4)
    if turn == "reversed":
        array, step[2, 2], step[2, 3] = array[:, :, ::-1], -1, SHAPE[2] - 1
    elif turn == "part":
        array, step[:3, 3] = array[1:8, 2:, 3:], (1, 2, 3)
    elif turn == "turned":  # frames along J and K of the image
        array, step = array.transpose(1, 2, 0, 3), step[:, [1, 2, 0, 3]]
    else:
        array, step[0, 0], step[0, 3] = array[::-1], -1, SHAPE[0] - 1
    expected = np.moveaxis(masks(), 3, 0).copy()
    if turn == "part":
        inside = np.zeros(SHAPE, bool)
        inside[1:8, 2:, 3:] = True
        expected[:, ~inside] = 0
    _, label = labelled(tmp_path, dicoms.seg(sources, dicoms.seg_volume(array, affine @ step)))
    assert np.array_equal(label.array, expected)


def test_a_child_process_reads_the_same(tmp_path):
    sources = image()
    dicoms.write(tmp_path, sources)
    with isolation.isolated():
        _, label = labelled(tmp_path, dicoms.seg(sources, planes(masks())))
    assert np.array_equal(label.array, np.moveaxis(masks(), 3, 0))


def test_the_order_of_frames_does_not_matter(tmp_path):
    sources = image()
    dicoms.write(tmp_path, sources)
    labels = masks()[..., 0] + 2 * (masks()[..., 1] & ~masks()[..., 0])
    seg = dicoms.seg(sources, planes(labels), kind="LABELMAP")
    frames = np.frombuffer(seg.PixelData, np.uint8)[: seg.NumberOfFrames * 63].reshape(seg.NumberOfFrames, -1)
    order = np.random.default_rng(1).permutation(seg.NumberOfFrames)
    seg.PixelData = frames[order].tobytes().ljust(len(seg.PixelData), b"\0")
    seg.PerFrameFunctionalGroupsSequence = [seg.PerFrameFunctionalGroupsSequence[int(n)] for n in order]
    _, label = labelled(tmp_path, seg)
    assert np.array_equal(label.array[0] + 2 * label.array[1], labels)


def test_a_fraction_counts_from_one_half(tmp_path):
    sources = image()
    dicoms.write(tmp_path, sources)
    fractions = np.random.default_rng(0).uniform(size=(*SHAPE, 2))
    _, label = labelled(tmp_path, dicoms.seg(sources, planes(fractions), kind="FRACTIONAL"))
    assert np.array_equal(np.moveaxis(label.array, 0, 3), np.rint(fractions * 255) >= 127.5)


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP", "FRACTIONAL"])
def test_an_empty_segmentation_is_empty(tmp_path, kind):
    sources = image()
    dicoms.write(tmp_path, sources)
    _, label = labelled(tmp_path, dicoms.seg(sources, planes(np.zeros((*SHAPE, 2), np.uint8)), kind=kind))
    assert label.array.shape == (2, *SHAPE) and not label.array.any()


def test_what_segments_are_called(tmp_path):
    sources = image()
    dicoms.write(tmp_path, sources)
    dicoms.seg(sources, planes(masks()), labels=("Left kidney", f"{dicoms.SECRET}'s")).save_as(tmp_path / "seg.dcm")
    headers, _ = read_headers(str(tmp_path))
    (label,) = [h for h in headers if segmentation.is_segmentation(h)]
    first, second = label.facts["segments"]
    assert (first["number"], first["label"], first["property"]) == (1, "Left kidney", ["10200004", "SCT", "Liver"])
    assert (second["number"], second["label"]) == (2, segmentation.WITHHELD)
    assert second["property"] == ["64033007", "SCT", "Kidney"] and dicoms.SECRET not in label.header


def shifted(mm):
    step = np.eye(4)
    step[0, 3] = mm / 1.25
    return step


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (shifted(0.3), "0.3 mm beside the voxels of the image, tolerance 0.1 mm"),
        (np.diag([0.5, 0.5, 1, 1.0]), "a frame of 0.625 x 0.75 mm pixels does not lie along the 1.25 x 1.5 x 2.5 mm voxels"),
        (np.diag([1.1, 1, 1, 1.0]), "1 mm beside"),
        (shifted(1.25 * 3), "covers voxels 3 to 11, 0 to 6, 2 to 2 of an image of"),
        (np.array([[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0.5], [0, 0, 0, 1]]), "1.25 mm beside the voxels of the image"),
    ],
    ids=["shifted", "finer", "stretched", "outside", "between"],
)
def test_another_grid_is_refused_with_numbers(tmp_path, step, said):
    sources = image()
    affine = np.reshape(header_of(tmp_path, sources).affine, (4, 4))
    dicoms.seg(sources, dicoms.seg_volume(masks(), affine @ step)).save_as(tmp_path / "seg.dcm")
    volumes, rejections = read_archive(str(tmp_path))
    assert len(volumes) == 1
    assert [(r.reason, r.uri.rpartition("/")[2]) for r in rejections] == [("LABEL_GRID_MISMATCH", "seg.dcm")]
    assert said in rejections[0].message


def test_slices_may_lie_as_far_off_their_grid_as_a_series_allows(tmp_path):
    jitter = [0, 0.06, -0.04, 0.05, -0.06, 0]
    sources = image(ImagePositionPatient=lambda k: [-10, 20, 30 + 2.5 * k + jitter[k]])
    dicoms.write(tmp_path, sources)
    _, label = labelled(tmp_path, dicoms.seg(sources, planes(masks())))
    assert np.array_equal(label.array, np.moveaxis(masks(), 3, 0))


def test_rounding_of_a_header_is_no_shift(tmp_path):
    sources = image()
    affine = np.reshape(header_of(tmp_path, sources).affine, (4, 4))
    _, label = labelled(tmp_path, dicoms.seg(sources, dicoms.seg_volume(masks(), affine @ shifted(0.02))))
    assert np.array_equal(label.array, np.moveaxis(masks(), 3, 0))


@pytest.mark.parametrize(
    ("elements", "reason"),
    [
        ({"ReferencedSeriesSequence": [dicoms.nested(SeriesInstanceUID="9.9")]}, "LABEL_WITHOUT_IMAGE"),
        ({"ReferencedSeriesSequence": []}, "LABEL_WITHOUT_IMAGE"),
        ({"FrameOfReferenceUID": "9.9"}, "FRAME_OF_REFERENCE"),
        ({"PatientID": "another"}, "MIXED_PATIENT"),
        ({"SegmentSequence": []}, "LABEL_WITHOUT_SEGMENT"),
        ({"NumberOfFrames": 3}, "BAD_VALUE"),
        ({"PixelData": b"\0" * 20}, "TRUNCATED"),
        ({"SegmentationType": None}, "BAD_VALUE"),
        ({"SegmentationType": "fractional"}, "BAD_VALUE"),
        ({"SegmentationType": "FRACTIONAL"}, "BAD_VALUE"),
        ({"SegmentationType": "FRACTIONAL", "MaximumFractionalValue": 0}, "BAD_VALUE"),
        ({"Rows": None}, "BAD_VALUE"),
        ({"SegmentSequence": [dicoms.nested(SegmentNumber=1), dicoms.nested(SegmentNumber=1)]}, "BAD_VALUE"),
        ({"PixelData": None}, "NO_PIXEL_DATA"),
        ({"Columns": 8}, "PIXEL_LENGTH"),
    ],
)
def test_what_cannot_be_placed_is_refused(tmp_path, elements, reason):
    sources = image()
    dicoms.write(tmp_path, sources)
    seg = dicoms.seg(sources, planes(masks()))
    for name, value in elements.items():
        setattr(seg, name, value)
        if value is None:
            delattr(seg, name)
    seg.save_as(tmp_path / "seg.dcm")
    volumes, rejections = read_archive(str(tmp_path))
    assert len(volumes) == 1
    assert [r.reason for r in rejections] == [reason]
    assert not any(dicoms.SECRET in r.message for r in rejections)


def test_two_frames_of_one_segment_at_one_position_are_refused(tmp_path):
    sources = image()
    dicoms.write(tmp_path, sources)
    seg = dicoms.seg(sources, planes(masks()))
    first, second = seg.PerFrameFunctionalGroupsSequence[:2]
    second.PlanePositionSequence = first.PlanePositionSequence
    seg.save_as(tmp_path / "seg.dcm")
    _, rejections = read_archive(str(tmp_path))
    assert [r.reason for r in rejections] == ["DUPLICATE_POSITION"]


def test_a_binary_seg_holds_0_and_1(tmp_path):
    sources = image()
    dicoms.write(tmp_path, sources)
    seg = dicoms.seg(sources, planes(masks().astype(float)), kind="FRACTIONAL")
    seg.SegmentationType = "BINARY"
    seg.save_as(tmp_path / "seg.dcm")
    _, rejections = read_archive(str(tmp_path))
    assert [(r.reason, r.message) for r in rejections] == [("BAD_VALUE", "a pixel of a BINARY SEG is 255")]


def test_several_objects_become_one_class_map_unless_they_overlap(tmp_path):
    image_header, first = headers_of(tmp_path / "a", masks()[..., :1])
    affine = np.reshape(image_header.affine, (4, 4))
    corners = affine[:3, :3] @ np.transpose([[-0.5, -0.5, 0], [2.5, -0.5, 0], [2.5, 1.5, 0], [-0.5, 1.5, 0]]) + affine[:3, 3:]
    square = (corners * [[-1], [-1], [1]]).T
    dicoms.write(tmp_path / "b", [dicoms.rtstruct({"Kidney": [square]})])
    fits = [segmentation.on_grid(h, image_header, {1: c}) for c, h in ((1, first), (300, pending(tmp_path / "b")))]
    array = read_volume(segmentation.merged(fits)).array[0]
    expected = masks()[..., 0].astype(np.uint16)
    expected[:3, :2, 0] = 300
    assert array.dtype == np.uint16 and np.array_equal(array, expected)
    _, other = headers_of(tmp_path / "c", masks()[..., 1:])
    fits[1] = segmentation.on_grid(other, image_header, {1: 2})
    with pytest.raises(Refused, match=f"LABEL_OVERLAP: .* overlap in {int(masks().all(axis=3).sum())} voxels"):
        read_volume(segmentation.merged(fits))


def test_copies_count_once_and_two_of_one_name_not_at_all(tmp_path):
    sources = image()
    dicoms.write(tmp_path, sources)
    seg = dicoms.seg(sources, planes(masks()))
    seg.save_as(tmp_path / "a.dcm")
    seg.save_as(tmp_path / "b.dcm")
    volumes, rejections = read_archive(str(tmp_path))
    assert len(volumes) == 2
    assert [(r.uri.rpartition("/")[2], r.reason) for r in rejections] == [("b.dcm", "DUPLICATE_INSTANCE")]
    dicoms.seg(sources, planes(masks()[::-1])).save_as(tmp_path / "b.dcm")
    volumes, rejections = read_archive(str(tmp_path))
    assert len(volumes) == 1 and {r.reason for r in rejections} == {"CONFLICTING_INSTANCE"} and len(rejections) == 2


def test_a_label_fits_the_volumes_of_its_series_that_have_its_grid(tmp_path):
    one = image(EchoTime=10, SOPClassUID=dicoms.MR, Modality="MR")
    two = image(EchoTime=20, SOPClassUID=dicoms.MR, Modality="MR")
    other = image(EchoTime=30, SOPClassUID=dicoms.MR, Modality="MR", orientation=OBLIQUE)
    for name, echo in (("1", one), ("2", two), ("3", other)):
        dicoms.write(tmp_path / name, echo)
    dicoms.seg(one, planes(masks())).save_as(tmp_path / "seg.dcm")
    volumes, rejections = read_archive(str(tmp_path))
    assert not rejections
    assert sorted(v.modality for v in volumes) == ["MR", "MR", "MR", "SEG"]


def test_a_series_uid_of_two_studies_is_told_apart_by_the_study(tmp_path):
    sources = image()
    dicoms.write(tmp_path / "a", sources)
    dicoms.write(tmp_path / "b", image(StudyInstanceUID="9.9", FrameOfReferenceUID="9.9.9"))
    dicoms.seg(sources, planes(masks())).save_as(tmp_path / "seg.dcm")
    headers, rejections = read_headers(str(tmp_path))
    assert not rejections and len(headers) == 3


def test_a_class_map_holds_the_named_segments_only(tmp_path):
    image_header, label = headers_of(tmp_path, masks())
    found = segmentation.named(label.facts["segments"], {"kidney": 7})
    array = read_volume(segmentation.on_grid(label, image_header, found)).array
    assert array.shape == (1, *SHAPE) and np.array_equal(array[0], 7 * masks()[..., 1])


def test_one_class_may_have_several_segments_and_classes_may_not_overlap(tmp_path):
    image_header, label = headers_of(tmp_path, masks())
    both = read_volume(segmentation.on_grid(label, image_header, {1: 1, 2: 1})).array[0]
    assert np.array_equal(both, masks().any(axis=3))
    shared = int(masks().all(axis=3).sum())
    with pytest.raises(Refused, match=f"LABEL_OVERLAP: segments of different classes overlap in {shared} voxels"):
        read_volume(segmentation.on_grid(label, image_header, {1: 1, 2: 2}))


def test_the_class_map_of_other_classes_is_another_label(tmp_path):
    image_header, label = headers_of(tmp_path, masks())
    classes = [None, {1: 1}, {1: 2}, {2: 1}]
    assert len({segmentation.on_grid(label, image_header, c).uid for c in classes}) == 4


def headers_of(tmp_path, array):
    """Headers of an image, and of its SEG before it has a grid."""
    sources = image()
    image_header = header_of(tmp_path, sources)
    dicoms.seg(sources, planes(array), labels=("liver", "kidney")[: array.shape[3]]).save_as(tmp_path / "seg.dcm")
    return image_header, pending(tmp_path / "seg.dcm")


def pending(path):
    """The header of a segmentation before it has a grid."""
    (header,), _ = assemble([read_instance(m) for f in storage.walk(str(path)) for m in members(f)])
    return header


def test_a_cut_off_file_is_refused_and_nothing_else(tmp_path):
    image_header, label = headers_of(tmp_path, masks())
    data = (tmp_path / "seg.dcm").read_bytes()
    grid = Grid(image_header.affine, SHAPE)
    for end in range(200, len(data) - 1, 499):
        with pytest.raises(Refused):
            dicom_seg.read_array(data[:end], label.facts, grid)


def test_the_public_segmentation_has_no_image(shared_data):
    volumes, rejections = read_archive(str(shared_data / "dicom" / "pydicom_test_files" / "test_files" / "liver_1frame.dcm"))
    assert not volumes and [r.reason for r in rejections] == ["LABEL_WITHOUT_IMAGE"]


@pytest.mark.parametrize("name", ["liver_1frame.dcm", "liver_expb_1frame.dcm"])
def test_the_public_segmentation_on_slices_made_up_around_it(shared_data, name):
    path = shared_data / "dicom" / "pydicom_test_files" / "test_files" / name
    label = pending(path)
    assert label.facts["segments"][0]["label"] == "Liver"
    ds = pydicom.dcmread(path)
    pixels = ds.pixel_array
    first = [float(x) for x in ds.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence[0].ImagePositionPatient]
    grid = Grid(
        dicom.slice_affine(np.subtract(first, [0, 0, 2]), label.facts["planes"][0][3:9], [0.810547] * 2, [0, 0, 1]), (512, 512, 6)
    )
    with pytest.raises(Refused, match="BAD_VALUE: 1 frames, but functional groups for 3"):
        dicom_seg.read_array(path.read_bytes(), label.facts, grid)
    ds.PerFrameFunctionalGroupsSequence = ds.PerFrameFunctionalGroupsSequence[:1]
    array = dicom_seg.read_array(dicoms.encoded(ds), label.facts, grid)
    assert np.array_equal(array[0, :, :, 2], pixels.T) and array.sum() == pixels.sum() > 0


# writing


def labels(header, seed=0):
    """A label volume of all values, with the first slice empty."""
    array = np.random.default_rng(seed).integers(0, 3, header.shape).astype(np.uint8)
    array[..., 0] = 0
    return Volume(array, np.reshape(header.affine, (4, 4)))


def written(tmp_path, header, prediction, kind="BINARY", name="out.dcm", **arguments):
    arguments = {"identity": "0123", "model": "organs", "version": "7"} | arguments
    dicom_seg.write(prediction, header, str(tmp_path / name), SEGMENTS, kind, **arguments)
    return tmp_path / name


@EVERY
@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP", "FRACTIONAL"])
def test_what_is_written_is_read_back_voxel_for_voxel(tmp_path, orientation, kind):
    header = header_of(tmp_path, image(orientation=orientation, InstanceNumber=lambda k: 6 - k))
    prediction = labels(header)
    path = written(tmp_path, header, prediction, kind)
    assert np.array_equal(prediction.array, labels(header).array)
    volumes, rejections = read_archive(str(tmp_path))
    (back,) = [v for v in volumes if v.modality == "SEG"]
    assert not rejections
    assert np.array_equal(back.array, np.concatenate([prediction.array == 1, prediction.array == 2]))
    assert np.array_equal(back.affine, prediction.affine)
    assert np.array_equal(dicom_seg.read(str(path), header).array, back.array)


@EVERY
def test_highdicom_finds_it_on_the_source(tmp_path, orientation):
    sources = image(orientation=orientation)
    header = header_of(tmp_path, sources)
    prediction = labels(header)
    seg = hd.seg.segread(written(tmp_path, header, prediction))
    uids = [s.SOPInstanceUID for s in sources]
    pixels = seg.get_pixels_by_source_instance(uids, ignore_spatial_locations=False, assert_missing_frames_are_empty=True)
    assert np.array_equal(pixels[..., 0], planes(prediction.array[0] == 1))
    assert np.array_equal(pixels[..., 1], planes(prediction.array[0] == 2))
    places = {tuple(s.ImagePositionPatient) for s in sources[1:]}
    found = {tuple(f.PlanePositionSequence[0].ImagePositionPatient) for f in seg.PerFrameFunctionalGroupsSequence}
    assert found == places  # the very same numbers, and none of the empty first slice
    (shared,) = seg.SharedFunctionalGroupsSequence
    assert shared.PlaneOrientationSequence[0].ImageOrientationPatient == sources[0].ImageOrientationPatient


def test_a_real_scan_and_its_labels(shared_data, tmp_path):
    folder = shared_data / "dicom" / "totalseg"
    sources = [pydicom.dcmread(p) for p in sorted((folder / "example_ct_dicom").iterdir())]
    for n, ds in enumerate(sources):  # its UIDs were removed
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = "1.2", "1.2.3", "1.2.4"
        ds.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{n}"
    header = header_of(tmp_path, sources)
    ((truth,), _) = read_archive(str(folder / "example_seg_dicom.nii.gz"))
    prediction = on_grid(truth, header.affine, header.shape[1:])
    present = np.unique(prediction.array).tolist()
    segments = {f"label {n}": Segment() for n in range(1, present[-1] + 1)}
    path = str(tmp_path / "seg.dcm")
    dicom_seg.write(prediction, header, path, segments, identity="0123", model="organs")
    back = dicom_seg.read(path, header).array
    assert back.shape == (len(segments), *header.shape[1:])
    assert np.count_nonzero(back) == np.count_nonzero(prediction.array)
    assert len(present) == 32 and all(np.array_equal(back[n - 1], prediction.array[0] == n) for n in present if n)


def test_patient_and_study_are_those_of_the_source(tmp_path):
    header = header_of(tmp_path, image(StudyDate="20200304", StudyTime="050607", SeriesNumber=4))
    seg = pydicom.dcmread(written(tmp_path, header, labels(header)))
    assert (seg.PatientID, seg.StudyInstanceUID, seg.AccessionNumber) == (f"{dicoms.SECRET}-1605", "1.2.3.4", dicoms.SECRET)
    assert seg.ReferencedSeriesSequence[0].SeriesInstanceUID == "1.2.3.4.5"
    assert (seg.StudyDate, seg.ContentDate, seg.InstanceCreationDate, seg.ContentTime) == ("20200304",) * 3 + ("050607",)
    assert (seg.SeriesDescription, seg.SeriesNumber) == ("organs 7", 1004)
    first, second = seg.SegmentSequence
    assert (first.SegmentLabel, first.SegmentedPropertyTypeCodeSequence[0].CodeValue) == ("liver", "10200004")
    assert (second.SegmentLabel, second.SegmentedPropertyTypeCodeSequence[0].CodeMeaning) == ("kidney", "Tissue")
    assert first.SegmentAlgorithmType == "AUTOMATIC"
    assert pending(tmp_path / "out.dcm").facts["predicted"]


def test_the_same_is_written_the_same(tmp_path):
    header = header_of(tmp_path, image())
    one, two = (written(tmp_path, header, labels(header), name=f"{n}.dcm").read_bytes() for n in "ab")
    assert one == two
    other = written(tmp_path, header, labels(header), name="c.dcm", identity="4567")
    assert pydicom.dcmread(other).SOPInstanceUID != pydicom.dcmread(io.BytesIO(one)).SOPInstanceUID


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP", "FRACTIONAL"])
def test_nothing_found_is_a_segmentation_too(tmp_path, kind):
    header = header_of(tmp_path, image())
    empty = labels(header).with_array(np.zeros((1, *SHAPE), np.uint8))
    path = written(tmp_path, header, empty, kind)
    assert not dicom_seg.read(str(path), header).array.any()


def test_probabilities_are_kept_in_steps(tmp_path):
    header = header_of(tmp_path, image())
    share = np.random.default_rng(0).dirichlet([1, 1, 1], SHAPE).astype(np.float32)
    probabilities = labels(header).with_array(np.moveaxis(share, 3, 0))
    path = written(tmp_path, header, labels(header), "FRACTIONAL", probabilities=probabilities)
    uids = [s.SOPInstanceUID for s in image()]
    back = hd.seg.segread(path).get_pixels_by_source_instance(uids, rescale_fractional=True)
    assert np.abs(back - planes(share[..., 1:])).max() <= 0.5 / 255 + 1e-6


def test_a_source_without_patient_or_dates_will_do(tmp_path):
    header = header_of(tmp_path, image(PatientID=None, PatientName=None, AccessionNumber=None))
    seg = pydicom.dcmread(written(tmp_path, header, labels(header)))
    assert (seg.PatientID, seg.StudyDate, seg.ContentDate) == ("", "", "19000101")


def test_a_radiograph_without_a_place_in_space(tmp_path):
    picture = image((9, 7, 1), SOPClassUID="1.2.840.10008.5.1.4.1.1.1.1", Modality="DX", ImagePositionPatient=None,
                    ImageOrientationPatient=None, FrameOfReferenceUID=None)  # fmt: skip
    header = header_of(tmp_path, picture)
    prediction = labels(header)
    prediction.array[:] = 1
    written(tmp_path, header, prediction)
    volumes, rejections = read_archive(str(tmp_path))
    (back,) = [v for v in volumes if v.modality == "SEG"]
    assert not rejections and back.array[0].all() and not back.array[1].any()


@pytest.mark.parametrize("share", [True, False])
def test_a_multi_frame_source_whose_frames_lie_in_any_order(tmp_path, share):
    """Two echoes in one object, slices backwards: each echo has a SEG that refers to its own frames."""
    voxels = np.stack([dicoms.stack(SHAPE, seed=n) for n in range(2)])
    made = enhanced.frames(voxels, echo=lambda c, k: 10 * (c + 1))[::-1]
    ds = enhanced.enhanced(made, dimensions=("stack", "place", "echo"), share=share)
    headers, rejections = read_headers(str(dicoms.write(tmp_path / "image", [ds])))
    assert not rejections and [h.shape for h in headers] == [(1, *SHAPE)] * 2
    for n, header in enumerate(headers):
        prediction = labels(header, seed=n)
        path = written(tmp_path, header, prediction, name=f"{n}.dcm", identity=f"{n}")
        back = dicom_seg.read(str(path), header).array
        assert np.array_equal(back, np.concatenate([prediction.array == 1, prediction.array == 2]))
        for frame in pydicom.dcmread(path).PerFrameFunctionalGroupsSequence:
            place = [float(x) for x in frame.PlanePositionSequence[0].ImagePositionPatient]
            (of,) = frame.DerivationImageSequence[0].SourceImageSequence
            own = made[int(of.ReferencedFrameNumber) - 1]
            assert np.allclose(own["position"], place) and own["echo"] == header.facts["echo"]
    volumes, rejections = read_archive(str(tmp_path))
    assert sorted(v.modality for v in volumes) == ["MR", "MR", "SEG", "SEG"] and not rejections


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"format": "nifti"}, "this image is nifti"),
        ({"shape": (3, *SHAPE)}, "of an image of one channel, this has 3"),
        ({"series_uid": ""}, "no SeriesInstanceUID"),
    ],
)
def test_images_that_no_seg_is_of(tmp_path, change, said):
    header = header_of(tmp_path, image())
    with pytest.raises(Refused, match=f"SEG_SOURCE.*{said}"):
        written(tmp_path, dataclasses.replace(header, **change), labels(header))


def test_a_mosaic_has_no_seg(tmp_path):
    header = header_of(tmp_path, enhanced.mosaic(dicoms.phantom(1, (6, 5, 4))))
    with pytest.raises(Refused, match="SEG_SOURCE.*mosaic"):
        written(tmp_path, header, labels(header))


JAPANESE = {"SpecificCharacterSet": ["", "ISO 2022 IR 87"], "PatientName": "Yamada^Tarou=山田^太郎=やまだ^たろう"}
KOREAN = {"SpecificCharacterSet": ["", "ISO 2022 IR 149"], "PatientName": "Hong^Gildong=洪^吉洞=홍^길동"}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("elements", [
    JAPANESE, KOREAN, {"SpecificCharacterSet": "ISO_IR 100", "PatientName": "Müller^Jörg"},
    {"OtherPatientIDsSequence": [dicoms.nested(PatientID="山田")], **JAPANESE},
    {"PatientBirthDate": "1950"}, {"PatientSex": "U"}, {"StudyDate": "yesterday", "StudyTime": "x"},
    {"ContentDate": "unknown", "ContentTime": "x", "SeriesDate": "20200304"}, {"FrameOfReferenceUID": None},
], ids=str)  # fmt: skip
def test_headers_as_hospitals_write_them(tmp_path, elements):
    header = header_of(tmp_path, image(**elements))
    prediction = labels(header)
    path = written(tmp_path, header, prediction)
    assert np.array_equal(dicom_seg.read(str(path), header).array, np.concatenate([prediction.array == 1, prediction.array == 2]))
    seg = pydicom.dcmread(path)
    assert seg.SpecificCharacterSet == "ISO_IR 192"
    assert seg.PatientName == elements.get("PatientName", f"{dicoms.SECRET}^Don")
    assert (seg.PatientBirthDate, seg.PatientSex) == ("", "")
    if "SeriesDate" in elements:
        assert seg.ContentDate == "20200304"
    again = written(tmp_path, header, prediction, name="again.dcm")
    assert again.read_bytes() == path.read_bytes() and seg.FrameOfReferenceUID


@pytest.mark.parametrize("shape", [(1, 7, 3), (7, 1, 3), (1, 1, 3), (3, 3, 3)])
def test_frames_of_less_than_a_byte(tmp_path, shape):
    header = header_of(tmp_path, image(shape))
    prediction = labels(header)
    path = written(tmp_path, header, prediction)
    assert np.array_equal(dicom_seg.read(str(path), header).array, np.concatenate([prediction.array == 1, prediction.array == 2]))


@pytest.mark.parametrize("name", ["Gefäß", "Kidney (L)", "Tumor/Cyst", "肝臓", "a\\b"])
def test_a_class_comes_back_by_its_name(tmp_path, name):
    header = header_of(tmp_path, image())
    prediction = labels(header).with_array((labels(header).array == 1).astype(np.uint8))
    dicom_seg.write(prediction, header, str(tmp_path / "out.dcm"), {name: Segment()}, identity="0123", model="organs")
    assert [s["label"] for s in pending(tmp_path / "out.dcm").facts["segments"]] == [name]


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL"])
@pytest.mark.parametrize("how", ["tilt", "spacing"])
def test_what_was_resampled_has_its_seg_on_its_own_slices(tmp_path, how, kind):
    """A box in the world: each voxel of the slices is in it when the nearest voxel of the resampled grid is."""
    places = [0, 2.5, 5, 8, 11, 13.5]
    moved = (lambda k: [-10, 20 + 0.9 * k, 30 + 2.5 * k]) if how == "tilt" else (lambda k: [-10, 20, 30 + places[k]])
    sources = image(ImagePositionPatient=moved)
    settings = Volumes(resample_tilt=True, resample_spacing=True)
    ((header,), rejections) = read_headers(str(dicoms.write(tmp_path / "image", sources)), settings=settings)
    assert not rejections and header.facts["resampled"] == how
    affine = np.reshape(header.affine, (4, 4))
    box = np.random.default_rng(0).integers(0, 2, header.shape).astype(np.uint8)
    share = Volume(np.concatenate([1 - box, box]).astype(np.float32), affine)
    path = tmp_path / "out.dcm"
    arguments = {"identity": "0123", "model": "organs"}
    dicom_seg.write(Volume(box, affine), header, str(path), {"liver": Segment()}, kind, share, **arguments)
    found = hd.seg.segread(path).get_pixels_by_source_instance([s.SOPInstanceUID for s in sources])[..., 0] != 0
    for k, source in enumerate(sources):
        own = dicom.slice_affine(*[[float(x) for x in source[n].value] for n in ("ImagePositionPatient", "ImageOrientationPatient",
                                 "PixelSpacing")], [0, 0, 1])  # fmt: skip
        at = np.stack([*np.indices(SHAPE[:2]), np.zeros(SHAPE[:2]), np.ones(SHAPE[:2])]).reshape(4, -1)
        nearest = np.rint((np.linalg.inv(affine) @ own @ at)[:3] + 1e-9).astype(int)
        assert np.array_equal(found[k], box[0][tuple(nearest)].reshape(SHAPE[:2]).T), k


@pytest.mark.parametrize("how", ["tilt", "spacing"])
def test_a_seg_on_slices_as_acquired_is_a_label_of_what_was_resampled(tmp_path, how):
    """Ours, that of another program, and contours: all lie on the acquired slices; and ours comes back as it was."""
    places = [0, 2.5, 5, 8, 11, 13.5]
    moved = (lambda k: [-10, 20 + 0.9 * k, 30 + 2.5 * k]) if how == "tilt" else (lambda k: [-10, 20, 30 + places[k]])
    sources = image(ImagePositionPatient=moved)
    settings = Volumes(resample_tilt=True, resample_spacing=True)
    ((header,), _) = read_headers(str(dicoms.write(tmp_path / "image", sources)), settings=settings)
    drawn = np.random.default_rng(1).integers(0, 2, SHAPE).astype(np.uint8)  # on the slices
    (tmp_path / "image" / "seg.dcm").write_bytes(dicoms.encoded(dicoms.seg(sources, drawn.transpose(2, 1, 0), ("liver",))))
    corners = np.array([[-8.4, 22.4], [-5.6, 22.4], [-5.6, 25.6], [-8.4, 25.6]])
    contour = np.column_stack([corners, np.full(4, float(moved(3)[2]))])
    (tmp_path / "image" / "rs.dcm").write_bytes(dicoms.encoded(dicoms.rtstruct({"organ": [contour]})))
    volumes, rejections = read_archive(str(tmp_path / "image"), settings=settings)
    assert not rejections
    by = {v.modality: v for v in volumes}
    grid = np.reshape(header.affine, (4, 4))
    assert by["SEG"].array.shape[1:] == by["CT"].array.shape[1:] == header.shape[1:] and np.array_equal(by["SEG"].affine, grid)
    assert by["RTSTRUCT"].array.any() and by["RTSTRUCT"].array.shape[1:] == header.shape[1:]
    seg = by["SEG"].array[0]
    for k in range(header.shape[3]):
        world = (grid @ [0, 0, k, 1])[2] - 30
        n = int(np.argmin(np.abs(np.array([moved(m)[2] - 30 for m in range(6)]) - world)))
        assert seg[..., k].sum() == drawn[..., n].sum()
    again = Volume(by["SEG"].array, grid)
    dicom_seg.write(again, header, str(tmp_path / "out.dcm"), {"liver": Segment()}, identity="0123", model="organs")
    assert np.array_equal(dicom_seg.read(str(tmp_path / "out.dcm"), header).array, again.array)


def test_a_source_that_changed_has_no_seg(tmp_path):
    header = header_of(tmp_path, image())
    (tmp_path / "image" / "003.dcm").write_bytes((tmp_path / "image" / "002.dcm").read_bytes())
    with pytest.raises(Refused, match="CHANGED"):
        written(tmp_path, header, labels(header))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda v: v.with_array(v.array[:, 1:]), "not on the grid of the source"),
        (lambda v: v.with_array(v.array, v.affine @ shifted(0.5)), "not on the grid of the source"),
        (lambda v: v.with_array(v.array + 1), "labels reach 3, but 2 segments"),
    ],
)
def test_labels_that_do_not_fit_are_an_error(tmp_path, change, said):
    header = header_of(tmp_path, image())
    with pytest.raises(InputError, match=said):
        written(tmp_path, header, change(labels(header)))


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP", "FRACTIONAL"])
def test_one_class_alone(tmp_path, kind):
    header = header_of(tmp_path, image())
    prediction = labels(header).with_array((labels(header).array == 1).astype(np.uint8))
    path = str(tmp_path / "out.dcm")
    dicom_seg.write(prediction, header, path, {"liver": Segment()}, kind, identity="0123", model="organs")
    assert np.array_equal(dicom_seg.read(path, header).array, prediction.array)
    share = np.random.default_rng(0).uniform(size=(1, *SHAPE)).astype(np.float32)
    probabilities = labels(header).with_array(np.concatenate([1 - share, share]))
    if kind == "FRACTIONAL":
        dicom_seg.write(prediction, header, path, {"liver": Segment()}, kind, probabilities, identity="0123", model="organs")
        assert np.array_equal(dicom_seg.read(path, header).array, np.rint(share * 255) >= 127.5)
