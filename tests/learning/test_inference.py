import itertools

import numpy as np
import pytest
import torch
from monai.inferers import sliding_window_inference
from torch import nn

from sparkmed.learning import inference


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
