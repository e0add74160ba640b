import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from skimage import measure

from sparkmed.config import Nuclei
from sparkmed.formats import raster
from sparkmed.hcs import nuclei
from sparkmed.hcs.nuclei import Matches
from sparkmed.rejection import InputError, Refused

SIZED = Nuclei(diameter=20)


def painted(shape, centres, radius=10.0, levels=(800,), ground=100, noise=5.0):
    """uint16 field of round nuclei, and its labels (later ones over earlier ones)."""
    i, j = np.ogrid[: shape[0], : shape[1]]
    truth, field = np.zeros(shape, np.int32), np.full(shape, float(ground))
    for n, (a, b) in enumerate(centres):
        inside = (i - a) ** 2 + (j - b) ** 2 <= radius**2
        truth[inside] = n + 1
        field[inside] = ground + levels[n % len(levels)]
    noisy = field + np.random.default_rng(0).normal(0, noise, shape)
    return np.clip(noisy, 0, 65535).astype(np.uint16), truth


GRID = [(a, b) for a in (30, 70, 110) for b in (25, 60, 95, 130)]


@pytest.mark.parametrize("threshold", ["otsu", "li", "local"])
@pytest.mark.parametrize("diameter", [20, None])
def test_separate_nuclei_are_found_where_they_are(threshold, diameter):
    field, truth = painted((140, 160), GRID, levels=(300, 500, 700))
    found = nuclei.find(field, Nuclei(threshold=threshold, diameter=diameter))
    assert nuclei.matches(found.labels, truth, 0.8) == Matches(right=12)
    assert found.labels.dtype == np.int32
    centres = found.cells[["x", "y"]].to_numpy()
    assert {tuple(c) for c in centres.round().astype(int)} == set(GRID)
    assert found.diameter == pytest.approx(20, abs=2)


def test_dim_nuclei_beside_bright_ones_are_found():
    field, truth = painted((140, 160), GRID, levels=(4000, 1700), ground=200, noise=20)
    assert nuclei.matches(nuclei.find(field, SIZED).labels, truth) == Matches(right=12)


def test_nuclei_on_uneven_ground_are_found():
    """Ground that falls from 1000 to 300 grey levels, nuclei that stand out by a third of it."""
    field, truth = painted((400, 400), [(a, b) for a in range(30, 400, 45) for b in range(25, 400, 50)], ground=1000, levels=(330,))
    u, v = np.meshgrid(np.linspace(-1, 1, 400), np.linspace(-1, 1, 400), indexing="ij")
    uneven = (field * (1 - 0.35 * (u**2 + v**2))).astype(np.uint16)
    found = {kind: nuclei.find(uneven, Nuclei(diameter=20, threshold=kind)).labels for kind in ("local", "otsu")}
    assert nuclei.matches(found["local"], truth, 0.7).f1 > 0.95
    assert nuclei.matches(found["otsu"], truth).f1 < 0.7


@pytest.mark.parametrize("diameter", [1, 40, 500, None])
@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (3, 3), (7, 30)])
def test_fields_smaller_than_a_nucleus(shape, diameter):
    field = np.random.default_rng(0).integers(0, 200, shape).astype(np.uint8)
    assert nuclei.find(field, Nuclei(diameter=diameter)).labels.shape == shape


@pytest.mark.parametrize("apart", [14, 16, 18])
def test_touching_nuclei_are_divided(apart):
    field, truth = painted((80, 90), [(40, 40), (40, 40 + apart)])
    found = nuclei.find(field, SIZED)
    assert nuclei.matches(found.labels, truth) == Matches(right=2)


def test_an_oval_nucleus_stays_one():
    i, j = np.ogrid[:80, :80]
    field = np.where(((i - 40) / 18) ** 2 + ((j - 40) / 9) ** 2 <= 1, 900, 100).astype(np.uint16)
    assert len(nuclei.find(field, SIZED).cells) == 1


def test_holes_are_filled():
    field, _ = painted((60, 60), [(30, 30)])
    field[27:33, 27:33] = 100
    found = nuclei.find(field, SIZED)
    assert len(found.cells) == 1 and found.labels[30, 30] == 1


def test_size_and_border_decide_who_stays():
    field, _ = painted((100, 100), [(50, 50), (0, 20), (99, 80)])
    field[20:23, 20:23] = 900  # a speck
    kept = nuclei.find(field, SIZED).cells
    assert len(kept) == 3 and kept.border.tolist() == [True, False, True]
    removed = nuclei.find(field, Nuclei(diameter=20, border="removed"))
    assert len(removed.cells) == 1 and not removed.cells.border.any() and removed.labels.max() == 1
    assert len(nuclei.find(field, Nuclei(diameter=20, smallest=0)).cells) == 4
    assert len(nuclei.find(field, Nuclei(diameter=20, largest=0.8)).cells) == 2


def test_the_table_is_that_of_a_peer():
    field, _ = painted((140, 160), [*GRID, (0, 5), (70, 74)])
    found = nuclei.find(field, SIZED)
    peer = measure.regionprops_table(found.labels, field, ["label", "centroid", "area", "mean_intensity"])
    for ours, theirs in zip(["cell", "x", "y", "area", "mean"], peer.values(), strict=True):
        np.testing.assert_allclose(found.cells[ours], theirs, rtol=1e-12)
    assert list(found.cells.columns) == nuclei.COLUMNS


@pytest.mark.parametrize("diameter", [20, None])
@pytest.mark.parametrize(
    "field",
    [
        np.zeros((50, 60), np.uint8),
        np.full((50, 60), 7.5),
        np.ones((1, 1)),
        np.random.default_rng(0).poisson(300, (300, 300)).astype(np.uint16),
        np.random.default_rng(0).normal(0, 1, (200, 100)),
    ],
    ids=["black", "flat", "one pixel", "photons", "noise"],
)
def test_a_field_without_nuclei_has_none(field, diameter):
    found = nuclei.find(field, Nuclei(diameter=diameter))
    assert len(found.cells) <= (0 if diameter else 3) or found.diameter < 3  # what is estimated from noise is no larger than noise
    assert found.labels.shape == field.shape


def test_a_field_with_few_nuclei_has_those():
    field, truth = painted((400, 400), [(100, 100), (300, 250)], noise=30)
    assert nuclei.matches(nuclei.find(field, SIZED).labels, truth, 0.7) == Matches(right=2)


def test_brightness_and_order_of_memory_make_no_difference():
    field, _ = painted((140, 160), GRID)
    found = nuclei.find(field, SIZED)
    np.testing.assert_array_equal(nuclei.find(np.asfortranarray(field), SIZED).labels, found.labels)
    np.testing.assert_array_equal(nuclei.find((field * 4).astype(np.uint16), SIZED).labels, found.labels)


def test_a_diameter_in_um_needs_the_pixel():
    field, truth = painted((140, 160), GRID)
    settings = Nuclei(diameter=13, unit="um")
    found = nuclei.find(field, settings, 0.65)
    assert found.diameter == pytest.approx(20) and len(found.cells) == 12
    for wrong in (None, 0, -1, math.nan):
        with pytest.raises(InputError, match="size of a pixel"):
            nuclei.find(field, settings, wrong)


@pytest.mark.parametrize(
    ("field", "reason"),
    [(np.full((5, 5), np.nan), "NOT_FINITE"), (np.array([[1e300]]), "NOT_FINITE"), (np.ones((5, 5), complex), "VOXEL_TYPE")],
)
def test_fields_that_are_refused(field, reason):
    with pytest.raises(Refused, match=reason):
        nuclei.find(field, SIZED)
    with pytest.raises(InputError, match="is .I, J."):
        nuclei.find(np.ones((1, 5, 5, 1)), SIZED)


def mask(shape, box):
    found = np.zeros(shape, np.uint8)
    found[box] = 255
    return found


def test_masks_become_one_label():
    a, b = mask((20, 30), np.s_[2:8, 3:9]), mask((20, 30), np.s_[7:15, 3:9])  # share one row of six
    label = nuclei.joined([a, b[None, ..., None]], overlap=0.2)
    assert label.dtype == np.int32 and label.shape == (20, 30)
    assert (label[2:8, 3:9] == 1).all() and (label[8:15, 3:9] == 2).all() and np.count_nonzero(label) == 36 + 42


@pytest.mark.parametrize(
    ("masks", "reason"),
    [
        ([mask((9, 9), np.s_[1:5, 1:5]), mask((9, 9), np.s_[3:8, 1:5])], "MASK_OVERLAP"),
        ([mask((9, 9), np.s_[1:5, 1:5])] * 2, "MASK_OVERLAP"),
        ([mask((9, 9), np.s_[1:5, 1:5]), mask((9, 9), np.s_[0:0])], "MASK_EMPTY"),
        ([mask((9, 9), np.s_[1:5, 1:5]), mask((9, 8), np.s_[6:9])], "MASK_SHAPE"),
    ],
)
def test_masks_that_do_not_fit(masks, reason):
    with pytest.raises(Refused, match=reason):
        nuclei.joined(masks)


def test_no_mask_is_no_nucleus_of_a_known_shape():
    assert nuclei.joined([], (4, 5)).tolist() == [[0] * 5] * 4
    with pytest.raises(InputError, match="no shape"):
        nuclei.joined([])
    with pytest.raises(Refused, match="MASK_SHAPE"):
        nuclei.joined([np.ones((3, 3))], (4, 5))


def test_matches_by_hand():
    truth = np.zeros((10, 30), int)
    truth[0:4, 0:4], truth[0:4, 10:14], truth[0:4, 20:24] = 5, 9, 2
    labels = np.zeros((10, 30), int)
    labels[0:4, 0:3] = 7  # IoU 12/16
    labels[0:4, 12:16] = 3  # IoU 8/24
    labels[8:10, 0:5] = 1
    found = nuclei.matches(labels, truth)
    assert found == Matches(right=1, false=2, missed=2)
    assert found.f1 == pytest.approx(1 / 3)
    assert nuclei.matches(labels, truth, 0.75) == Matches(0, 3, 3)


@given(st.integers(0, 2**31), st.sampled_from([0.5, 0.6, 0.75]))
def test_matches_are_those_of_pair_by_pair(seed, iou):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 4, (6, 7)) * rng.integers(0, 2)
    labels = np.where(rng.random((6, 7)) < 0.8, truth * 3, rng.integers(0, 4, (6, 7)))
    right = 0
    for a in set(labels.ravel()) - {0}:
        for b in set(truth.ravel()) - {0}:
            one, other = labels == a, truth == b
            right += (one & other).sum() / (one | other).sum() > iou
    found, true = (len(set(x.ravel()) - {0}) for x in (labels, truth))
    assert nuclei.matches(labels, truth, iou) == Matches(right, found - right, true - right)


def test_matches_of_nothing_and_of_full_fields():
    nothing, full = np.zeros((3, 3), int), np.ones((3, 3), int)
    assert math.isnan(nuclei.matches(nothing, nothing).f1)
    assert nuclei.matches(full, full) == Matches(1) and nuclei.matches(full, full).f1 == 1
    assert nuclei.matches(full, nothing) == Matches(false=1) and nuclei.matches(nothing, full).f1 == 0
    assert nuclei.matches(full, full).merge(nuclei.matches(full, nothing)) == Matches(1, 1)
    with pytest.raises(InputError, match="may match two"):
        nuclei.matches(full, full, 0.4)
    with pytest.raises(InputError, match="of shape"):
        nuclei.matches(full, full[:2])


def test_what_is_fluorescence():
    field, _ = painted((60, 60), [(30, 30)])
    grey = field[None, ..., None]
    assert nuclei.is_fluorescence(grey) and nuclei.is_fluorescence(np.repeat(grey, 3, 0))
    assert not nuclei.is_fluorescence(1000 - grey.astype(int))
    assert not nuclei.is_fluorescence(np.concatenate([grey, grey + 1, grey]))


@pytest.mark.parametrize(("start", "least"), [("1740b0a6", 0.95), ("7aa1aaa5", 0.85), ("8c3ef7aa", 0.85), ("ea00f5a9", 0.9)])
def test_nuclei_drawn_by_hand_are_found(shared_data, start, least):
    (case,) = (shared_data / "nuclei").glob(f"{start}*")
    image = raster.read_array(next(case.glob("images/*.png")).read_bytes())
    truth = nuclei.joined(raster.read_array(m.read_bytes()) for m in sorted(case.glob("masks/*.png")))
    assert nuclei.is_fluorescence(image)
    assert nuclei.matches(nuclei.find(image[0, ..., 0], Nuclei()).labels, truth).f1 >= least


@pytest.mark.parametrize("start", ["01d44a26", "8d05fb18"])  # stained tissue; bright field
def test_other_pictures_are_no_fluorescence(shared_data, start):
    (case,) = (shared_data / "nuclei").glob(f"{start}*")
    assert not nuclei.is_fluorescence(raster.read_array(next(case.glob("images/*.png")).read_bytes()))


def test_areas_that_nothing_fits_are_no_settings():
    with pytest.raises(ValueError, match="smallest < largest"):
        Nuclei(smallest=2, largest=2)
