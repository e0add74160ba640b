import itertools
import random

import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference
from torch import nn

from sparkmed.config import Component
from sparkmed.learning import inference, networks
from sparkmed.learning.inference import Windows


class Threshold(nn.Module):
    """Class 1 where the value is above 0: every voxel by itself."""

    def forward(self, x):
        return torch.cat([-x[:, :1], x[:, :1]], 1) * 50


@pytest.mark.parametrize("shape", [(20, 17, 9), (8, 8, 8), (3, 30, 5), (1, 1, 1), (9, 8, 40)])
@pytest.mark.parametrize("blending", ["gaussian", "constant"])
def test_any_shape_comes_back_as_it_was(shape, blending):
    array = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
    out = inference.scores(Threshold(), array, (8, 8, 8), 0.5, blending, 3)
    assert out.shape == (2, *shape) and out.dtype == np.float32
    assert np.allclose(out.sum(0), 1, atol=1e-5)
    clear = abs(array[0]) > 0.1
    assert ((out[1] > 0.5) == (array[0] > 0))[clear].all()


def test_planes_of_a_volume_by_a_plane_network():
    class Plane(Threshold):
        def forward(self, x):
            assert x.shape[-1] == 1
            return super().forward(x)

    array = np.random.default_rng(0).normal(size=(1, 20, 12, 3)).astype(np.float32)
    assert inference.scores(Plane(), array, (16, 16, 1)).shape == (2, 20, 12, 3)


def test_deep_supervision_gives_the_first():
    class Deep(Threshold):
        def forward(self, x):
            return [super().forward(x), torch.zeros(1)]

    assert inference.scores(Deep(), np.ones((1, 4, 4, 4), np.float32), (8, 8, 8))[1].min() > 0.9


def test_classes_in_batches():
    class Mean(nn.Module):
        def forward(self, x):
            mean = x.mean((1, 2, 3, 4))
            return torch.stack([-mean, mean], 1)

    arrays = np.random.default_rng(0).normal(size=(7, 1, 4, 4, 1)).astype(np.float32)
    out = inference.class_scores(Mean(), arrays, batch=3)
    assert out.shape == (7, 2) and np.allclose(out.sum(1), 1)
    assert ((out[:, 1] > 0.5) == (arrays.mean((1, 2, 3, 4)) > 0)).all()


@pytest.fixture(scope="module")
def unet():
    torch.manual_seed(0)
    return networks.build(Component(name="UNet", channels=[4, 8], strides=[2]), 2, 3, 3).eval()


SHAPES = [(40, 33, 21), (16, 16, 8), (5, 40, 9), (16, 17, 3), (1, 1, 1), (70, 10, 16), (9, 12, 30)]


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5, 0.7])
@pytest.mark.parametrize("blending", ["gaussian", "constant"])
def test_stitched_as_monai_stitches(unet, overlap, blending):
    for shape in SHAPES:
        array = np.random.default_rng(0).normal(size=(2, *shape)).astype(np.float32)
        with torch.inference_mode():
            expected = sliding_window_inference(
                torch.from_numpy(array)[None], (16, 16, 8), 4, lambda x: unet(x).softmax(1), overlap=overlap, mode=blending
            )[0].numpy()
        found = inference.scores(unet, array, (16, 16, 8), overlap, blending, 4)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5, err_msg=str(shape))


@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_hold_every_window_once_and_fill_batches(shape):
    windows = Windows(shape, (16, 16, 8), 0.5, batch=4)
    assert sum(windows.count(b) for b in range(len(windows.blocks))) == len(windows)
    assert all(windows.count(b) >= 4 for b in range(len(windows.blocks) - 1))
    ends = [windows.planes(b) for b in range(len(windows.blocks))]
    assert (ends[0][0], ends[-1][1]) == (0, shape[windows.axis])
    assert all(later[0] <= sooner[1] for sooner, later in zip(ends, ends[1:], strict=False)), "no plane is left out"


def test_blocks_in_any_order_and_place_give_the_same_bits(unet):
    array = np.random.default_rng(0).normal(size=(2, 40, 33, 21)).astype(np.float32)
    windows = Windows(array.shape[1:], (16, 16, 8), 0.7)
    order = list(range(len(windows.blocks)))
    random.Random(0).shuffle(order)
    slabs = {b: np.ascontiguousarray(array[windows.across(*windows.planes(b))]) for b in order}
    sums = {b: inference.block_sums(inference.predictor(unet), slabs[b], windows, b) for b in order}
    planes = [p for _, p in inference.averaged((sums[b] for b in range(len(order))), windows)]
    together = np.concatenate([p.copy() for p in planes], 1 + windows.axis)
    assert np.array_equal(together, inference.scores(unet, array, (16, 16, 8), 0.7)) and len(order) > 3


def uneven(classes=3, spatial=True):
    """A network that sees left from right."""
    torch.manual_seed(3)
    net = nn.Conv3d(2, classes, 3, padding=1)
    return net if spatial else nn.Sequential(net, nn.AvgPool3d((4, 2, 1)), nn.Flatten(), nn.LazyLinear(classes))


def by_hand(net, x, mirrors):
    """Mean over flips, one at a time."""
    found = []
    for flips in itertools.product(*[(False, True) if a in mirrors else (False,) for a in range(3)]):
        axes = [2 + a for a, f in enumerate(flips) if f]
        p = torch.flip(net(torch.flip(x, axes)), axes if net(x).ndim > 2 else []).softmax(1)
        found.append(p)
    return torch.stack(found).mean(0)


@pytest.mark.parametrize("mirrors", [(), (0,), (1, 2), (0, 1, 2)])
def test_mirrors_are_the_mean_over_all_flips(mirrors):
    array, net = np.random.default_rng(0).normal(size=(2, 8, 6, 4)).astype(np.float32), uneven()
    with torch.no_grad():
        wanted = by_hand(net, torch.from_numpy(array)[None], mirrors)[0].numpy()
    found = inference.scores(net, array, (8, 6, 4), 0.0, mirrors=mirrors)
    np.testing.assert_allclose(found, wanted, atol=1e-6)
    assert (np.abs(found - inference.scores(net, array, (8, 6, 4), 0.0)).max() > 0.01) == bool(mirrors)


def test_mirrors_are_of_each_window():
    array, net = np.random.default_rng(1).normal(size=(2, 13, 9, 7)).astype(np.float32), uneven()
    with torch.no_grad():
        wanted = sliding_window_inference(
            torch.from_numpy(array)[None], (8, 6, 4), 1, lambda x: by_hand(net, x, (0, 2)), overlap=0.25, mode="gaussian"
        )[0].numpy()
    np.testing.assert_allclose(inference.scores(net, array, (8, 6, 4), 0.25, mirrors=(0, 2)), wanted, atol=1e-6)


def test_mirrored_classes_and_planes():
    net = uneven(spatial=False)
    arrays = np.random.default_rng(2).normal(size=(5, 2, 8, 6, 1)).astype(np.float32)
    with torch.no_grad():
        wanted = by_hand(net, torch.from_numpy(arrays), (0, 1)).numpy()
    np.testing.assert_allclose(inference.class_scores(net, arrays, 2, mirrors=(0, 1)), wanted, atol=1e-6)
    calls = []
    net.register_forward_hook(lambda *_: calls.append(1))
    inference.class_scores(net, arrays, 5, mirrors=(0, 1, 2))
    assert len(calls) == 4, "a plane has no mirror image along its normal"
