from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparkmed.config import Patches
from sparkmed.imaging import patches
from sparkmed.imaging.patches import PatchLocation
from sparkmed.rejection import Refused

sizes = st.tuples(*[st.integers(1, 8)] * 3)
shapes = st.tuples(*[st.integers(1, 12)] * 3)
planes = st.one_of(shapes, shapes.map(lambda s: (s[0], s[1], 1)))


def inside_or_centred(location, shape):
    for n, start, p in zip(shape, location.index, location.size, strict=True):
        if n >= p:
            assert 0 <= start <= n - p
        else:
            before, after = -start, start + p - n
            assert before >= 0 and after >= 0 and abs(before - after) <= 1


@given(planes, sizes, st.floats(0, 0.95))
def test_grid_covers_every_voxel(shape, size, overlap):
    locations = patches.grid(shape, size, overlap)
    seen = np.zeros(shape, int)
    for p in locations:
        inside_or_centred(p, shape)
        seen[tuple(slice(max(s, 0), s + n) for s, n in zip(p.index, p.size, strict=True))] += 1
    assert seen.all()
    assert len(set(locations)) == len(locations)
    if overlap == 0:
        assert len(locations) == np.prod([-(-n // p) for n, p in zip(shape, size, strict=True)])


@given(planes, sizes, st.floats(0, 0.9))
def test_cut_and_stitched_is_the_same_image(shape, size, overlap):
    array = np.random.default_rng(0).integers(0, 100, (2, *shape))
    locations = patches.grid(shape, size, overlap)
    cut = [patches.extract(array, p, pad_value=-999) for p in locations]
    assert all(c.shape == (2, *size) for c in cut)
    assert np.array_equal(patches.stitch(cut, locations, shape), array)


@pytest.mark.parametrize("overlap, starts", [(0, [0, 10, 15]), (0.5, [0, 5, 10, 15]), (0.1, [0, 9, 15]), (0.9, list(range(16)))])
def test_grid_by_hand(overlap, starts):
    assert [p.index[0] for p in patches.grid((25, 1, 1), (10, 1, 1), overlap)] == starts


def test_a_small_image_is_centred_in_one_patch():
    assert patches.grid((3, 10, 1), (8, 5, 1)) == [PatchLocation((-2, 0, 0), (8, 5, 1)), PatchLocation((-2, 5, 0), (8, 5, 1))]
    patch = patches.extract(np.ones((3, 10, 1), np.uint8), PatchLocation((-2, 0, 0), (8, 5, 1)), pad_value=7)
    assert patch[:, 0, 0].tolist() == [7, 7, 1, 1, 1, 7, 7, 7]


@given(planes, sizes, st.tuples(*[st.integers(-15, 15)] * 3))
def test_extract_reads_the_image_and_pads_the_rest(shape, size, index):
    array = np.arange(1, np.prod(shape) + 1, dtype=np.int16).reshape(shape)
    padded = np.pad(array, [(30, 30)] * 3)
    expected = padded[tuple(slice(30 + s, 30 + s + n) for s, n in zip(index, size, strict=True))]
    patch = patches.extract(array, PatchLocation(index, size))
    assert patch.dtype == array.dtype
    assert np.array_equal(patch, expected)
    patch[:] = -1
    assert (array > 0).all()


@given(planes, sizes, st.integers(1, 20), st.sampled_from(("random", "balanced", "foreground")), st.integers(0, 2**16))
def test_samplers_give_just_as_many_patches_as_asked(shape, size, per_volume, sampler, seed):
    label = np.random.default_rng(seed).choice(4, shape, p=[0.9, 0.06, 0.04, 0]).astype(np.uint8)
    spec = Patches(size=size, sampler=sampler, per_volume=per_volume)
    locations, shortfall = patches.sample(shape, spec, f"k{seed}", label, 4)
    assert len(locations) == per_volume
    for p in locations:
        assert p.size == size
        inside_or_centred(p, shape)
    assert all(n > 0 for n in shortfall.values())
    again = patches.sample(shape, spec, f"k{seed}", label.copy(order="F"), 4)
    assert again == (locations, shortfall)


def big_label():
    label = np.zeros((40, 40, 40), np.uint8)
    label[5:10, 5:10, 5:10] = 1
    label[30:33, 30:33, 30:33] = 2
    return label


@pytest.mark.parametrize(
    "per_volume, weights, quotas",
    [
        (9, None, [3, 3, 3]),
        (10, (1, 1, 2), [2.5, 2.5, 5]),
        (6, (0, 1, 1), [0, 3, 3]),
        (7, (0, 0, 1), [0, 0, 7]),
        (90, (5, 3, 1), [50, 30, 10]),
    ],
)
def test_balanced_gives_each_class_its_share(per_volume, weights, quotas):
    spec = Patches(size=(1, 1, 1), sampler="balanced", per_volume=per_volume, class_weights=weights)
    locations, shortfall = patches.sample((40, 40, 40), spec, "a", big_label(), 3)
    found = Counter(int(patches.extract(big_label(), p).item()) for p in locations)
    assert all(abs(found[c] - q) < 1 for c, q in enumerate(quotas))
    assert sum(found.values()) == per_volume
    assert len(set(locations)) == per_volume
    assert shortfall == {}


def test_equal_remainders_go_by_lot_not_to_the_background():
    spec = Patches(size=(1, 1, 1), sampler="balanced", per_volume=1)
    label = big_label()
    firsts = Counter(int(label[patches.sample(label.shape, spec, f"v{n}", label, 3)[0][0].index]) for n in range(300))
    assert min(firsts[c] for c in range(3)) > 70


def test_an_absent_class_is_filled_from_the_others_and_counted():
    spec = Patches(size=(1, 1, 1), sampler="balanced", per_volume=12)
    locations, shortfall = patches.sample((40, 40, 40), spec, "a", big_label(), 4)
    found = Counter(int(patches.extract(big_label(), p).item()) for p in locations)
    assert found == {0: 4, 1: 4, 2: 4}
    assert shortfall == {3: 3}


def test_a_rare_class_gives_each_voxel_once():
    label = np.zeros((20, 20, 20), np.uint8)
    label[3, 4, 5] = label[10, 11, 12] = 1
    spec = Patches(size=(1, 1, 1), sampler="balanced", per_volume=10)
    locations, shortfall = patches.sample((20, 20, 20), spec, "a", label, 2)
    assert shortfall == {1: 3}
    assert len(locations) == len(set(locations)) == 10
    assert {p.index for p in locations} >= {(3, 4, 5), (10, 11, 12)}


def test_weightless_classes_help_before_voxels_are_used_twice():
    label = np.zeros((2, 2, 2), np.uint8)
    label[0, 0, 0] = 1
    spec = Patches(size=(1, 1, 1), sampler="balanced", per_volume=8, class_weights=(0, 1))
    locations, shortfall = patches.sample((2, 2, 2), spec, "a", label, 2)
    assert len(set(locations)) == 8 and shortfall == {1: 7}
    spec = Patches(size=(1, 1, 1), sampler="balanced", per_volume=20, class_weights=(0, 1))
    locations, shortfall = patches.sample((2, 2, 2), spec, "a", label, 2)
    assert len(locations) == 20 and len(set(locations)) == 8 and shortfall == {1: 19}


def test_patches_are_centred_on_their_class():
    spec = Patches(size=(9, 8, 7), sampler="balanced", per_volume=60, class_weights=(0, 2, 1))
    locations, shortfall = patches.sample((40, 40, 40), spec, "a", big_label(), 3)
    assert not shortfall
    middles = Counter(int(big_label()[tuple(s + n // 2 for s, n in zip(p.index, p.size, strict=True))]) for p in locations)
    assert middles == {1: 40, 2: 20}


def test_voxels_of_a_class_are_equally_likely():
    label = np.zeros((4, 4, 1), np.uint8)
    label[1:3, 1:3] = 1
    spec = Patches(size=(1, 1, 1), sampler="balanced", per_volume=1, class_weights=(0, 1))
    counts = Counter(patches.sample((4, 4, 1), spec, str(n), label, 2)[0][0].index for n in range(400))
    assert len(counts) == 4 and min(counts.values()) > 65


def test_foreground_share():
    spec = Patches(size=(5, 5, 5), sampler="foreground", per_volume=12, foreground=0.75)
    locations, shortfall = patches.sample((40, 40, 40), spec, "a", big_label(), 3)
    assert shortfall == {} and len(locations) == 12
    assert sum(big_label()[tuple(s + 2 for s in p.index)] > 0 for p in locations) >= 9


def test_foreground_without_any_is_filled_and_counted():
    spec = Patches(size=(5, 5, 5), sampler="foreground", per_volume=10, foreground=0.5)
    locations, shortfall = patches.sample((40, 40, 40), spec, "a", np.zeros((40, 40, 40), np.uint8), 3)
    assert len(locations) == 10 and shortfall == {1: 5}


def test_the_grid_sampler_is_the_grid():
    spec = Patches(size=(8, 8, 8), sampler="grid", overlap=0.5)
    assert patches.sample((20, 20, 8), spec, "a") == (patches.grid((20, 20, 8), (8, 8, 8), 0.5), {})


def test_the_key_decides():
    spec = Patches(size=(5, 5, 5), sampler="random", per_volume=4)
    a, b, c = (patches.sample((40, 40, 40), spec, k)[0] for k in ("0/x", "0/x", "0/y"))
    assert a == b != c
    assert patches.generator("sparkmed").integers(1 << 32) == patches.generator("sparkmed").integers(1 << 32)


def test_random_patches_reach_both_ends():
    spec = Patches(size=(4, 4, 4), sampler="random", per_volume=200)
    starts = {p.index[0] for p in patches.sample((7, 4, 3), spec, "a")[0]}
    assert starts == {0, 1, 2, 3}


@pytest.mark.parametrize("sampler", ["balanced", "foreground"])
@pytest.mark.parametrize("label", [None, np.zeros((3, 3, 4), np.uint8), np.zeros((3, 3, 3), np.float32)])
def test_label_samplers_want_a_fitting_label(sampler, label):
    with pytest.raises(ValueError, match="wants an integer label of shape"):
        patches.sample((3, 3, 3), Patches(sampler=sampler), "a", label, 2)


def test_labels_beyond_the_classes_are_refused():
    with pytest.raises(Refused, match="LABEL_OUT_OF_RANGE: values 2"):
        patches.sample((40, 40, 40), Patches(sampler="balanced"), "a", big_label(), 2)


def test_balanced_wants_classes_and_their_weights():
    with pytest.raises(ValueError, match="n_classes"):
        patches.sample((40, 40, 40), Patches(sampler="balanced"), "a", big_label())
    with pytest.raises(ValueError, match="3 weights; got 2"):
        patches.sample((40, 40, 40), Patches(sampler="balanced", class_weights=(1, 1)), "a", big_label(), 3)


@pytest.mark.parametrize("shape, size", [((0, 3, 3), (1, 1, 1)), ((3, 3), (1, 1, 1)), ((3, 3, 3), (1, 0, 1))])
def test_empty_shapes_are_refused(shape, size):
    with pytest.raises(ValueError, match="shape and size"):
        patches.grid(shape, size)


@pytest.mark.parametrize("overlap", [-0.1, 1, float("nan")])
def test_wrong_overlaps_are_refused(overlap):
    with pytest.raises(ValueError, match="overlap"):
        patches.grid((3, 3, 3), (2, 2, 2), overlap)


def test_stitching_says_what_is_missing():
    locations = patches.grid((4, 4, 4), (2, 2, 2))[:-1]
    with pytest.raises(ValueError, match="leave 8 of 64 voxels out"):
        patches.stitch([np.zeros((2, 2, 2))] * 7, locations, (4, 4, 4))
    with pytest.raises(ValueError, match="location of size"):
        patches.stitch([np.zeros((3, 2, 2))], locations[:1], (4, 4, 4))
    with pytest.raises(ValueError, match="leave 64"):
        patches.stitch([], [], (4, 4, 4))


def test_extract_wants_an_image():
    with pytest.raises(ValueError, match="got shape"):
        patches.extract(np.zeros((3, 3)), PatchLocation((0, 0, 0), (1, 1, 1)))


def test_values_are_changed_before_they_are_padded():
    array = np.arange(8, dtype=np.int16).reshape(1, 2, 2, 2)
    patch = patches.extract(array, PatchLocation((-1, 0, 0), (4, 2, 2)), change=lambda values: values + np.float32(0.5))
    assert patch.dtype == np.float32
    np.testing.assert_array_equal(patch[0, 1:3], array[0] + 0.5)
    assert not patch[0, [0, 3]].any()
