import numpy as np
import pytest
import torch
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
