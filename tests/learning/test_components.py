import sys

import monai.networks.nets
import pytest
import torch

from sparkmed.config import Component
from sparkmed.learning import components, losses, metrics, networks
from sparkmed.rejection import InputError

OWN = """
import os
from os import system as shell
from torch import nn

class Tiny(nn.Module):
    def __init__(self, in_channels, out_channels, width=2):
        super().__init__()
        self.layer = nn.Conv3d(in_channels, out_channels, 1)

    def forward(self, x):
        return self.layer(x)

class Square(nn.Module):
    def forward(self, output, truth):
        return (output.softmax(1)[:, 1] - truth[:, 0]).square().mean()
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A package ``ourlab.nets`` that may be imported, and one beside it that must not be."""
    (tmp_path / "ourlab").mkdir()
    (tmp_path / "ourlab" / "__init__.py").write_text("")
    (tmp_path / "ourlab" / "nets.py").write_text(OWN)
    (tmp_path / "ourlaboratory.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    yield "ourlab.nets"
    for name in ("ourlab", "ourlab.nets"):
        sys.modules.pop(name, None)


def find(name, imports=()):
    return components.find(Component(name=name), ["monai.networks.nets"], "network", imports)


def test_full_names_are_names_too():
    assert find("monai.networks.nets.UNet") is find("monai.networks.nets.unet.UNet") is find("UNet") is monai.networks.nets.UNet


@pytest.mark.parametrize(
    "name",
    [
        "os.system", "subprocess.Popen", "builtins.eval", "torch.load", "torch.hub.load", "monai.apps.download_url",
        "monai.networks.nets.os.system", "monai.networks.nets.resnet.torch.load", "monai.networks.nets.unet.warnings.warn",
        "monai.networks.nets.unet.Sequence", "monai.networks.nets.unet.SkipConnection", "monai.networks.netsx.UNet", "Sequence",
        "monai.networks.nets.unet._x", "monai.networks.nets.missing.UNet", ".os.system", "monai.networks.nets..UNet", "os",
    ],
)  # fmt: skip
def test_what_is_not_on_the_list_is_refused(name):
    with pytest.raises(InputError, match="is refused: |is not in |cannot be imported here|has no class"):
        find(name)


def test_the_config_may_allow_a_package(own):
    tiny = Component(name="ourlab.nets.Tiny")
    with pytest.raises(InputError, match="not below monai.networks.nets; the config's imports may allow more"):
        networks.build(tiny, 2, 3, 3)
    for imports in (["ourlab"], ["ourlab.nets"], ["ourlab.nets.Tiny"]):
        assert networks.build(tiny, 2, 3, 3, imports)(torch.zeros(1, 2, 4, 4, 4)).shape == (1, 3, 4, 4, 4)
    loss = losses.build(Component(name="ourlab.nets.Square"), "segmentation", [own])
    assert loss(torch.zeros(2, 2, 4, 4, 4), torch.ones(2, 1, 4, 4, 4, dtype=torch.int64)).tolist() == [0.25, 0.25]


@pytest.mark.parametrize("name", ["ourlab.nets.shell", "ourlab.nets.os.system", "ourlab.nets.nn.Conv3d", "ourlaboratory.Tiny"])
def test_what_an_allowed_package_imports_is_not_allowed(own, name):
    with pytest.raises(InputError, match="is refused|cannot be imported"):
        find(name, [own])


def test_what_is_refused_is_not_even_imported(own):
    with pytest.raises(InputError, match="is refused"):
        find("ourlab.nets.Tiny", ["ourlab.networks"])
    assert "ourlab" not in sys.modules


@pytest.mark.parametrize("name", ["os.system", "torch.load", "monai.networks.nets.UNet"])
def test_losses_and_metrics_have_their_own_lists(name):
    with pytest.raises(InputError, match="is refused: it is not below monai.losses or torch.nn"):
        losses.build(Component(name=name), "segmentation")
    with pytest.raises(InputError, match="is refused: it is not below monai.metrics"):
        metrics.build(Component(name=name), "segmentation", 2)


@pytest.mark.parametrize(
    "component",
    [
        Component(name="resnet18", pretrained=True),
        Component(name="FlexibleUNet", backbone="efficientnet-b0", pretrained=True),
        Component(name="HoVerNet", pretrained_url="http://127.0.0.1:9/x.pt"),
        Component(name="TorchVisionFCModel", weights="DEFAULT"),
        Component(name="Transchex"),
        Component(name="get_pretrained_resnet_medicalnet", resnet_depth=10),
    ],
)
def test_networks_that_fetch_weights_are_refused(component, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *a, **k: pytest.fail("unpickles"))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: pytest.fail("downloads"))
    with pytest.raises(InputError, match="would fetch weights.*train.initial_weights"):
        networks.build(component, 1, 2, 2)
