import numpy as np
import pytest

from formats import dicoms
from sparkmed import storage
from sparkmed.formats import assemble, members, read_archive, read_headers, read_instance, read_volume, rtstruct, segmentation
from sparkmed.imaging import geometry
from sparkmed.rejection import Refused

SHAPE = (24, 20, 5)
OBLIQUE = (0.8, 0.6, 0.0, -0.48, 0.64, 0.6)


def image(**elements):
    return dicoms.series(dicoms.stack(SHAPE), PixelSpacing=[1.5, 1.25], **elements)


def on_slice(affine, k, corners):
    """(n, 3) LPS mm of (n, 2) corners in voxels on slice ``k``."""
    index = np.column_stack([corners, np.full(len(corners), float(k)), np.ones(len(corners))])
    return (geometry.lps_to_ras(affine) @ index.T)[:3].T


def circle(radius, centre=(11.3, 9.1), count=3000):
    angle = np.linspace(0, 2 * np.pi, count, endpoint=False)
    return np.column_stack([centre[0] + radius * np.cos(angle), centre[1] + radius * np.sin(angle)])


def disc(radius, centre=(11.3, 9.1)):
    i, j = np.meshgrid(np.arange(SHAPE[0]), np.arange(SHAPE[1]), indexing="ij")
    return np.hypot(i - centre[0], j - centre[1]) < radius


def affine_of(tmp_path, datasets):
    (header,), _ = read_headers(str(dicoms.write(tmp_path, datasets)))
    return np.reshape(header.affine, (4, 4))


def struct(tmp_path, rois, name="rs.dcm", **elements):
    (tmp_path / name).write_bytes(dicoms.encoded(dicoms.rtstruct(rois, **elements)))


@pytest.mark.parametrize("orientation", [(1, 0, 0, 0, 1, 0), (0, 1, 0, 0, 0, -1), OBLIQUE], ids=["axial", "sagittal", "oblique"])
def test_a_ring_is_the_voxels_whose_centres_it_holds(tmp_path, orientation):
    affine = affine_of(tmp_path, image(orientation=orientation))
    ring = [on_slice(affine, 2, circle(7.3)), on_slice(affine, 2, circle(3.1)), on_slice(affine, 3, circle(2.2))]
    struct(tmp_path, {"ring": ring, "marker": [("POINT", on_slice(affine, 1, np.array([[3, 3]])))], "all": [ring[0]]})
    volumes, rejections = read_archive(str(tmp_path))
    ct, label = sorted(volumes, key=lambda v: v.modality)
    assert not rejections and label.modality == "RTSTRUCT" and label.array.dtype == np.uint8
    assert label.array.shape == (3, *SHAPE) and np.array_equal(label.affine, ct.affine)
    expected = np.zeros(SHAPE, bool)
    expected[:, :, 2] = disc(7.3) & ~disc(3.1)
    expected[:, :, 3] = disc(2.2)
    assert np.array_equal(label.array[0], expected)
    assert not label.array[1].any()
    assert np.array_equal(label.array[2, :, :, 2], disc(7.3))


def test_rois_become_a_class_map_and_classes_may_not_overlap(tmp_path):
    affine = affine_of(tmp_path, image())
    big, small = on_slice(affine, 2, circle(6.0)), on_slice(affine, 2, circle(2.0))
    struct(tmp_path, {"body": [big], "organ": [small], "Organ 2": [on_slice(affine, 4, circle(2.0))]})
    headers, _ = read_headers(str(tmp_path))
    (ct,) = [h for h in headers if h.modality == "CT"]
    label = segmentation.on_grid(pending(tmp_path / "rs.dcm"), ct, {2: 1, 3: 1})
    expected = np.zeros(SHAPE)
    expected[:, :, 2] = expected[:, :, 4] = disc(2.0)
    assert np.array_equal(read_volume(label).array[0], expected)
    with pytest.raises(Refused, match=f"LABEL_OVERLAP: .* overlap in {int(disc(2.0).sum())} voxels"):
        read_volume(segmentation.on_grid(pending(tmp_path / "rs.dcm"), ct, {1: 1, 2: 2}))


def pending(path):
    """The header of a segmentation before it has a grid."""
    (header,), _ = assemble([read_instance(m) for f in storage.walk(str(path)) for m in members(f)])
    return header


def test_names_of_rois_are_facts_unless_they_name_the_patient(tmp_path):
    names = ["GTV+", "PTV 60/30", "Bowel_Bag*", "Ödem", "50% isodose", "~Brainstem", f"for {dicoms.SECRET}"]
    struct(tmp_path, {name: [] for name in names})
    dicoms.write(tmp_path, image())
    headers, _ = read_headers(str(tmp_path))
    (label,) = [h for h in headers if h.modality == "RTSTRUCT"]
    assert [s["label"] for s in label.facts["segments"]] == [*names[:-1], segmentation.WITHHELD]
    assert dicoms.SECRET not in label.header


def test_two_rois_of_one_number_are_refused(tmp_path):
    rois = [dicoms.nested(ROINumber=1, ROIName=name) for name in ("a", "b")]
    struct(tmp_path, {"a": []}, StructureSetROISequence=rois)
    dicoms.write(tmp_path, image())
    _, rejections = read_headers(str(tmp_path))
    assert [(r.reason, r.message) for r in rejections] == [("BAD_VALUE", "2 segments have 1 numbers")]


@pytest.mark.parametrize(
    ("change", "reason", "said"),
    [
        (lambda p: p + [0, 0, 0.4], "LABEL_GRID_MISMATCH", "up to 0.4 mm off the nearest slice, tolerance 0.1 mm"),
        (lambda p: p + [0, 0, 2.5 * 4], "LABEL_GRID_MISMATCH", "5 mm off"),
        (lambda p: p * [1, 1, np.nan], "BAD_VALUE", "contour"),
        (lambda p: p[:2], "BAD_VALUE", "6 coordinates"),
    ],
)
def test_contours_that_are_no_area_of_a_slice_are_refused(tmp_path, change, reason, said):
    affine = affine_of(tmp_path, image())
    struct(tmp_path, {"organ": [change(on_slice(affine, 2, circle(5.0, count=40)))]})
    volumes, rejections = read_archive(str(tmp_path))
    assert len(volumes) == 1
    assert [(r.reason, said in r.message) for r in rejections] == [(reason, True)]


@pytest.mark.parametrize(
    ("elements", "reason"),
    [
        ({"series": "9.9"}, "LABEL_WITHOUT_IMAGE"),
        ({"frame": "9.9"}, "FRAME_OF_REFERENCE"),
        ({"PatientID": "another"}, "MIXED_PATIENT"),
        ({"ReferencedFrameOfReferenceSequence": []}, "LABEL_WITHOUT_IMAGE"),
        ({"StructureSetROISequence": []}, "LABEL_WITHOUT_SEGMENT"),
    ],
)
def test_what_belongs_to_no_image_is_refused(tmp_path, elements, reason):
    dicoms.write(tmp_path, image())
    struct(tmp_path, {"organ": []}, **elements)
    volumes, rejections = read_archive(str(tmp_path))
    assert len(volumes) == 1 and [r.reason for r in rejections] == [reason]
    assert not any(dicoms.SECRET in r.message for r in rejections)


def test_squares_that_share_an_edge_share_no_voxel():
    left, right = np.array([[1, 1], [4, 1], [4, 5], [1, 5]]), np.array([[4, 1], [6, 1], [6, 5], [4, 5]])
    a, b = rtstruct.inside([left], (8, 8)), rtstruct.inside([right], (8, 8))
    assert a.sum() == 12 and b.sum() == 8 and not (a & b).any()
    assert np.array_equal(rtstruct.inside([left, right], (8, 8)), a | b)


def test_a_hole_through_a_channel_is_a_hole():
    outer, inner = np.array([[0, 0], [9, 0], [9, 9], [0, 9], [0, 0]]), np.array([[3, 3], [3, 6], [6, 6], [6, 3], [3, 3]])
    keyhole = rtstruct.inside([np.vstack([outer, inner])], (10, 10))
    assert np.array_equal(keyhole, rtstruct.inside([outer], (10, 10)) ^ rtstruct.inside([inner], (10, 10)))


def test_what_reaches_over_the_border_is_cut_off():
    assert rtstruct.inside([np.array([[-1e7, -1e7], [1e7, -1e7], [1e7, 1e7], [-1e7, 1e7]])], (6, 5)).all()
    assert not rtstruct.inside([np.array([[-9, 1], [-2, 1], [-2, 4]])], (6, 5)).any()


def test_a_polygon_of_many_edges_is_filled_in_little_time_and_memory():
    """Each edge crosses all rows: what a hostile file of some megabytes could ask for."""
    count = 40_001
    zigzag = np.column_stack([np.linspace(0, 500, count), np.where(np.arange(count) % 2, 1e6, -1e6)])
    assert rtstruct.inside([zigzag], (512, 512)).shape == (512, 512)


def test_any_polygon_is_what_winding_says():
    rng = np.random.default_rng(3)
    for _ in range(30):
        corners = rng.uniform(-2, 14, (rng.integers(3, 40), 2))
        found = rtstruct.inside([corners], (12, 11))
        for i, j in rng.integers(0, (12, 11), (12, 2)):
            assert found[i, j] == even_odd(corners, i, j)


def even_odd(corners, x, y):
    """Crossings of a ray to the left, edge by edge (Shimrat 1962)."""
    crossings = 0
    for (x0, y0), (x1, y1) in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        if (y0 < y) != (y1 < y):
            crossings += x0 + (y - y0) * (x1 - x0) / (y1 - y0) < x
    return crossings % 2 == 1


def test_a_cut_off_file_is_refused(tmp_path):
    affine = affine_of(tmp_path, image())
    data = dicoms.encoded(dicoms.rtstruct({"organ": [on_slice(affine, 2, circle(5.0))]}))
    (header, *_), _ = read_headers(str(tmp_path))
    grid = geometry.Grid(header.affine, header.shape[1:])
    facts = {"segments": [{"number": 1, "label": "organ"}]}
    assert rtstruct.read_array(data, facts, grid).any()
    for end in range(200, len(data) - 1, 997):
        try:
            rtstruct.read_array(data[:end], facts, grid)
        except Refused:
            continue


def test_the_public_structure_set_has_no_image(shared_data):
    volumes, rejections = read_archive(str(shared_data / "dicom" / "pydicom_test_files" / "test_files" / "rtstruct.dcm"))
    assert not volumes
    assert [r.reason for r in rejections] == ["LABEL_WITHOUT_IMAGE"]


def square(low, high):
    return np.array([[low, low], [high, low], [high, high], [low, high]], float)


def painted(tmp_path, *contours, **changes):
    """The voxels of a ROI of these contours on slice 2."""
    affine = affine_of(tmp_path, image())
    ds = dicoms.rtstruct({"organ": [(kind, on_slice(affine, 2, corners)) for kind, corners in contours]})
    for contour in ds.ROIContourSequence[0].ContourSequence:
        for name, value in changes.items():
            setattr(contour, name, value)
    (header, *_), _ = read_headers(str(tmp_path))
    facts = {"segments": [{"number": 1, "label": "organ"}]}
    return rtstruct.read_array(dicoms.encoded(ds), facts, geometry.Grid(header.affine, header.shape[1:]))[0, :, :, 2]


def test_a_contour_twice_counts_once_and_crossing_ones_are_refused(tmp_path):
    one, two = square(1.5, 10.5), square(5.5, 14.5)
    whole = painted(tmp_path, ("CLOSED_PLANAR", one))
    assert whole.sum() == 81
    assert np.array_equal(painted(tmp_path, ("CLOSED_PLANAR", one), ("CLOSED_PLANAR", np.roll(one, 1, axis=0)[::-1])), whole)
    with pytest.raises(Refused, match="BAD_VALUE: .*cross"):
        painted(tmp_path, ("CLOSED_PLANAR", one), ("CLOSED_PLANAR", two))
    assert painted(tmp_path, ("CLOSEDPLANAR_XOR", one), ("CLOSEDPLANAR_XOR", two)).sum() == 2 * (81 - 25)
    beside = square(11.5, 14.5)
    hole = square(3.5, 6.5)
    several = painted(tmp_path, *(("CLOSED_PLANAR", c) for c in (hole, beside, one)))
    assert several.sum() == 81 - 9 + 9


@pytest.mark.parametrize("kind", ["", "CLOSED", None])
def test_a_contour_of_no_known_type_is_refused(tmp_path, kind):
    with pytest.raises(Refused, match="BAD_VALUE: ContourGeometricType"):
        painted(tmp_path, ("CLOSED_PLANAR", square(1.5, 10.5)), ContourGeometricType=kind)


def test_rois_of_another_frame_of_reference_are_left_out(tmp_path):
    affine = affine_of(tmp_path, image())
    rois = {"here": [on_slice(affine, 2, circle(6.0))], "there": [on_slice(affine, 2, circle(2.0))]}
    ds = dicoms.rtstruct(rois)
    for roi, frame in zip(ds.StructureSetROISequence, ("1.2.3.4.6", "1.2.9.9"), strict=True):
        roi.ReferencedFrameOfReferenceUID = frame
    (tmp_path / "rs.dcm").write_bytes(dicoms.encoded(ds))
    volumes, rejections = read_archive(str(tmp_path))
    (label,) = [v for v in volumes if v.modality == "RTSTRUCT"]
    assert not rejections and label.array.shape[0] == 1 and label.array.sum() == disc(6.0).sum()
    headers, _ = read_headers(str(tmp_path))
    (ct,) = [h for h in headers if h.modality == "CT"]
    with pytest.raises(Refused, match="FRAME_OF_REFERENCE: 1 segments"):
        segmentation.on_grid(pending(tmp_path / "rs.dcm"), ct, {1: 1, 2: 2})
    assert read_volume(segmentation.on_grid(pending(tmp_path / "rs.dcm"), ct, {1: 1, 2: 1})).array.sum() == disc(6.0).sum()
