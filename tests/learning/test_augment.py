import pytest
import torch

from sparkmed import config
from sparkmed.config import Augment
from sparkmed.learning.augment import augment, check
from sparkmed.rejection import InputError

ALL = Augment(flip=[0, 1, 2], rotate=20, scale=0.2, translate=2, elastic=2, gamma=0.3, brightness=0.1, contrast=0.1, noise=0.1)
IDS = ["a", "b", "c"]


def batch(shape=(12, 10, 8), channels=2):
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(3, channels, *shape, generator=generator)
    return image, torch.randint(0, 5, (3, 1, *shape), generator=generator)


def ball(shape=(24, 24, 24), centre=(11.5, 11.5, 11.5), radius=6.0):
    grid = torch.stack(torch.meshgrid(*[torch.arange(n, dtype=torch.float32) for n in shape], indexing="ij"))
    inside = ((grid - torch.tensor(centre)[:, None, None, None]) ** 2).sum(0) <= radius**2
    return inside.float()[None, None], inside.long()[None, None]


def test_nothing_asked_nothing_changed():
    image, label = batch()
    out, truth = augment(image, label, IDS, Augment(), 0, 0)
    assert torch.equal(out, image) and torch.equal(truth, label)


def test_a_function_of_seed_epoch_and_patch():
    image, label = batch()
    first, truth = augment(image, label, IDS, ALL, 1, 2)
    again, same = augment(image, label, IDS, ALL, 1, 2)
    assert torch.equal(first, again) and torch.equal(truth, same)
    for seed, epoch, ids in ((2, 2, IDS), (1, 3, IDS), (1, 2, ["x", "y", "z"])):
        assert not torch.allclose(augment(image, label, ids, ALL, seed, epoch)[0], first)


def test_a_sample_does_not_depend_on_its_batch():
    image, label = batch()
    whole, truth = augment(image, label, IDS, ALL, 0, 0)
    for i, name in enumerate(IDS):
        alone, its = augment(image[i : i + 1], label[i : i + 1], [name], ALL, 0, 0)
        assert torch.allclose(alone[0], whole[i], atol=1e-5) and torch.equal(its[0], truth[i])


def test_global_randomness_plays_no_part():
    image, label = batch()
    torch.manual_seed(1)
    first, state = augment(image, label, IDS, ALL, 0, 0)[0], torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(augment(image, label, IDS, ALL, 0, 0)[0], first)


def test_labels_keep_their_values_and_follow_the_image():
    image, label = ball()
    for epoch in range(10):
        spec = Augment(flip=[0, 1, 2], rotate=30, scale=0.2, translate=3, elastic=2)
        out, truth = augment(image, label, ["p"], spec, 0, epoch)
        assert set(truth.unique().tolist()) <= {0, 1} and truth.dtype == label.dtype
        found = (out > 0.5).long()
        assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.95
        assert not torch.equal(truth, label)


def test_flips_are_exact():
    image, label = batch()
    seen = set()
    for epoch in range(60):
        out, truth = augment(image, label, IDS, Augment(flip=[0, 2]), 0, epoch)
        for i in range(3):
            matches = [a for a in ((), (1,), (3,), (1, 3)) if torch.allclose(out[i], image[i].flip(a), atol=1e-4)]
            assert len(matches) == 1 and torch.equal(truth[i], label[i].flip(matches[0]))
            seen.add(matches[0])
    assert len(seen) == 4


def test_shift_and_zoom_are_as_large_as_said():
    image, label = ball()
    volume, moved = [], []
    grid = torch.stack(torch.meshgrid(*[torch.arange(24.0)] * 3, indexing="ij"))
    for epoch in range(60):
        volume.append(augment(image, label, ["p"], Augment(scale=0.2), 0, epoch)[1].sum() / label.sum())
        truth = augment(image, label, ["p"], Augment(translate=3), 0, epoch)[1][0, 0]
        moved.append((grid * truth).sum((1, 2, 3)) / truth.sum() - 11.5)
    assert 0.8**3 - 0.05 < min(volume) < 0.7 and 1.4 < max(volume) < 1.2**3 + 0.05
    moved = torch.stack(moved)
    assert 2 < moved.abs().max() <= 3.1 and moved.mean(0).abs().max() < 1


def test_rotation_keeps_volume_and_turns():
    shape = (24, 24, 24)
    label = torch.zeros(1, 1, *shape, dtype=torch.int64)
    label[..., 4:20, 11:13, 11:13] = 1
    angles = []
    for epoch in range(30):
        truth = augment(label.float(), label, ["p"], Augment(rotate=40), 0, epoch)[1][0, 0]
        assert 0.7 < truth.sum() / label.sum() < 1.3
        points = truth.nonzero().float()
        axis = torch.linalg.svd(points - points.mean(0))[2][0]
        angles.append(torch.rad2deg(torch.acos(axis[0].abs().clamp(max=1))))
    assert 20 < max(angles) < 62  # about two axes, 40 degrees each


@pytest.mark.parametrize("spec", [ALL, Augment(rotate=90), Augment(elastic=3), Augment(scale=0.5), Augment(translate=4)])
def test_planes_stay_planes(spec):
    image, label = ball((24, 24, 1), (11.5, 11.5, 0), 6)
    out, truth = augment(image, label, ["p"], spec.model_copy(update={"noise": 0.0}), 0, 1)
    assert out.shape == image.shape and truth.shape == label.shape
    assert out.max() > 0.8 and truth.sum() > 20  # nothing was turned out of the plane


def test_gamma_keeps_mean_and_deviation():
    image, _ = batch()
    out, _ = augment(image, None, IDS, Augment(gamma=0.5), 0, 0)
    assert not torch.allclose(out, image, atol=1e-2)
    assert torch.allclose(out.mean((2, 3, 4)), image.mean((2, 3, 4)), atol=1e-4)
    assert torch.allclose(out.std((2, 3, 4)), image.std((2, 3, 4)), atol=1e-4)
    flat = torch.full((1, 1, 4, 4, 4), 3.0)
    assert torch.equal(augment(flat, None, ["p"], Augment(gamma=0.5), 0, 0)[0], flat)


def test_intensity_changes_are_as_large_as_said():
    image, label = torch.ones(1, 1, 20, 20, 20), None
    bright = torch.stack([augment(image, label, ["p"], Augment(brightness=0.2), 0, e)[0].mean() for e in range(50)])
    contrast = torch.stack([augment(image, label, ["p"], Augment(contrast=0.3), 0, e)[0].mean() for e in range(50)])
    noise = torch.stack([augment(image, label, ["p"], Augment(noise=0.5), 0, e)[0].std() for e in range(50)])
    assert 0.8 <= bright.min() < 0.85 and 1.15 < bright.max() <= 1.2
    assert 0.7 <= contrast.min() < 0.75 and 1.25 < contrast.max() <= 1.3
    assert noise.min() < 0.1 and 0.4 < noise.max() < 0.52


def waves(depth=8):
    """Two samples of two channels (12, 10, depth) that differ from voxel to voxel, and labels 0 to 4."""
    index = torch.arange(12 * 10 * 8).reshape(1, 1, 12, 10, 8)[..., :depth]
    image = torch.cat([torch.sin(index * 0.37), torch.cos(index * 0.11)], 1)
    return image.repeat(2, 1, 1, 1, 1), (index % 5).repeat(2, 1, 1, 1, 1)


HIPPOCAMPUS = Augment(rotate=15, scale=0.2, translate=3, elastic=2, gamma=0.3, noise=0.1)
PINNED = [
    (ALL, 8, 1, 2, [-0.0626819, -0.5952943, -0.0384123, 0.5558105], [3, 1, 3, 1, 4, 4, 1, 2, 2, 4, 0, 2, 4, 4, 2, 4, 1, 2, 1, 1]),
    (
        HIPPOCAMPUS,
        8,
        0,
        7,
        [0.0752361, -0.5160401, -0.1329756, 0.2418086],
        [1, 4, 4, 3, 1, 4, 1, 2, 0, 3, 2, 4, 0, 3, 0, 2, 2, 0, 4, 4],
    ),
    (ALL, 1, 0, 7, [0.2434173, -0.2165228, 0.2467453, 0.6354787], [2, 4, 1, 3, 0, 2, 4, 1, 3, 0, 2, 4, 1, 3, 0, 2, 4, 1, 3, 0]),
]


@pytest.mark.parametrize(("spec", "depth", "seed", "epoch", "values", "labels"), PINNED)
def test_changes_are_those_that_models_were_trained_with(spec, depth, seed, epoch, values, labels):
    out, truth = augment(*waves(depth), ["a", "b"], spec, seed, epoch)
    k = 5 if depth == 8 else 0
    assert torch.allclose(out[:, :, 3, 4, k].flatten(), torch.tensor(values), atol=1e-4)
    assert truth[:, 0, 5, :, 3 if depth == 8 else 0].flatten().tolist() == labels


@pytest.mark.parametrize(("axis", "shape"), [(0, (5, 6, 6)), (1, (6, 5, 6)), (2, (6, 6, 5)), (2, (6, 6, 1))])
def test_quarter_turns_move_voxels_and_labels_alike(axis, shape):
    image, label = batch(shape)
    plane = [a + 1 for a in range(3) if a != axis]
    seen = []
    for epoch in range(200):
        out, truth = augment(image, label, IDS, Augment(rot90=[axis]), 0, epoch)
        for i in range(3):
            turns = [k for k in range(4) if torch.equal(out[i], image[i].rot90(k, plane))]
            assert len(turns) == 1 and torch.equal(truth[i], label[i].rot90(turns[0], plane))
            seen += turns
    assert all(120 < seen.count(k) < 180 for k in range(4))


def test_turns_about_all_axes_reach_every_orientation_of_a_cube():
    image, label = batch((4, 4, 4), channels=1)
    spec = Augment(rot90=[2, 0, 1, 1])  # neither order nor repeats matter
    found = {augment(image[:1], None, [str(i)], spec, 0, 0)[0].numpy().tobytes() for i in range(300)}
    assert len(found) == 24
    assert torch.equal(augment(image, label, IDS, spec, 0, 3)[0], augment(image, label, IDS, Augment(rot90=[0, 1, 2]), 0, 3)[0])


def test_turns_and_dropout_leave_the_other_changes_as_they_are():
    image, label = batch((8, 8, 8))
    spec = Augment(noise=0.3, gamma=0.2)
    turned = augment(image, label, IDS, spec.model_copy(update={"rot90": (2,)}), 0, 0)[0]
    plain = augment(augment(image, label, IDS, Augment(rot90=[2]), 0, 0)[0], None, IDS, spec, 0, 0)[0]
    assert torch.equal(turned, plain)
    dropped = augment(image, label, IDS, spec.model_copy(update={"channel_dropout": 0.5}), 0, 0)[0]
    plain = augment(image, label, IDS, spec, 0, 0)[0]
    kept = dropped.abs().amax((2, 3, 4)) > 0
    assert not kept.all() and torch.equal(dropped[kept], plain[kept])


@pytest.mark.parametrize(
    "spec", [Augment(rot90=[2], channel_dropout=0.5), ALL.model_copy(update={"rot90": (2,), "channel_dropout": 0.3})]
)
def test_turns_and_dropout_are_a_function_of_seed_epoch_and_patch(spec):
    image, label = batch((8, 8, 6))
    for epoch in range(5):
        whole, truth = augment(image, label, IDS, spec, 0, epoch)
        reverse, turned = augment(image.flip(0), label.flip(0), IDS[::-1], spec, 0, epoch)
        assert torch.allclose(reverse.flip(0), whole, atol=1e-5) and torch.equal(turned.flip(0), truth)
        for i, name in enumerate(IDS):
            alone, its = augment(image[i : i + 1], label[i : i + 1], [name], spec, 0, epoch)
            assert torch.allclose(alone[0], whole[i], atol=1e-5) and torch.equal(its[0], truth[i])


def test_channels_are_dropped_as_often_as_said_but_never_all():
    image = torch.ones(200, 3, 2, 2, 2)
    ids = [str(i) for i in range(200)]
    for probability in (0.1, 0.5, 0.9):
        out, _ = augment(image, None, ids, Augment(channel_dropout=probability), 0, 0)
        assert set(out.unique().tolist()) == {0, 1}
        kept = out.amax((2, 3, 4))
        assert torch.equal(kept, out.amin((2, 3, 4))) and kept.sum(1).min() >= 1
        expected = probability - probability**3 / 3  # of three dropped one comes back
        assert abs(float(1 - kept.mean()) - expected) < 0.06
        assert kept.sum(0).min() > 0.6 * kept.sum(0).max()


def test_what_does_not_fit_the_samples_is_refused():
    image, label = batch((6, 5, 6), channels=1)
    with pytest.raises(InputError, match=r"rot90 about axis 2 wants equal edges there, got patches of \[6, 5, 6\] voxels"):
        augment(image, label, IDS, Augment(rot90=[1, 2]), 0, 0)
    with pytest.raises(InputError, match="two channels or more"):
        augment(image, label, IDS, Augment(channel_dropout=0.1), 0, 0)
    check(Augment(rot90=[1]), (1, 6, 5, 6))
    check(Augment(channel_dropout=0.1), (2, 6, 5, 6))


def test_a_config_that_cannot_be_is_refused_at_the_door():
    least = {"name": "p", "task": "segmentation", "classes": ["background", "organ"], "archive": "a"}

    def parse(**augmentation):
        sections = {"train": {"augment": augmentation}, "patches": {"size": [32, 32, 16]}, "preprocess": {"channels": "gray"}}
        return config.parse(least | sections)

    assert parse(rot90=[2]).train.augment.rot90 == (2,)
    with pytest.raises(InputError, match=r"rot90 about axis 0 wants patches of equal edges there, patches.size is \[32, 32, 16\]"):
        parse(rot90=[2, 0])
    with pytest.raises(InputError, match="train.augment.rot90"):
        parse(rot90=[3])
    with pytest.raises(InputError, match="channel_dropout wants two channels or more, preprocess.channels gray makes one"):
        parse(channel_dropout=0.1)
    for wrong in (-0.1, 1.0):
        with pytest.raises(InputError, match="train.augment.channel_dropout"):
            parse(channel_dropout=wrong)


def test_a_batch_of_nothing_stays_nothing():
    image, label = batch()
    out, truth = augment(image[:0], label[:0], [], ALL, 0, 0)
    assert len(out) == len(truth) == 0


def test_the_channels_of_a_first_model_move_with_the_image_and_keep_their_values():
    torch.manual_seed(0)
    image, said = torch.randn(2, 1, 8, 8, 8), (torch.rand(2, 2, 8, 8, 8) > 0.5).float()
    spec = Augment(flip=(0, 1, 2), noise=0.3, gamma=0.5, brightness=0.4, contrast=0.3)
    found, _ = augment(torch.cat([image, said], 1), None, ["a", "b"], spec, 0, 1, guided=2)
    alone, _ = augment(image, None, ["a", "b"], spec, 0, 1)
    moved, _ = augment(torch.cat([image, said], 1), None, ["a", "b"], Augment(flip=(0, 1, 2)), 0, 1)
    assert torch.equal(found[:, :1], alone) and torch.equal(found[:, 1:], moved[:, 1:]) and not torch.equal(found[:, 1:], said)
    with pytest.raises(InputError, match="two channels or more"):
        augment(torch.cat([image, said], 1), None, ["a", "b"], Augment(channel_dropout=0.5), 0, 1, guided=2)
