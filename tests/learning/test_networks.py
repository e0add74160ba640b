import pytest
import torch

from sparkmed.config import Component
from sparkmed.learning import networks
from sparkmed.rejection import InputError

UNET = Component(name="UNet", channels=[4, 8], strides=[2])


@pytest.mark.parametrize(
    "component",
    [
        UNET,
        Component(name="SegResNet", init_filters=8, blocks_down=[1, 1], blocks_up=[1]),
        Component(name="BasicUNet", features=[4, 4, 4, 4, 4, 4], norm="batch"),
        Component(name="DynUNet", kernel_size=[3, 3, 3], strides=[1, 2, 2], upsample_kernel_size=[2, 2], filters=[4, 4, 8]),
        Component(name="AttentionUnet", channels=[4, 8], strides=[2]),
    ],
)
@pytest.mark.parametrize("size", [(16, 16, 16), (32, 16, 1)])
def test_segmentation_networks(component, size):
    dims = networks.spatial_dims(size)
    network = networks.build(component, 2, 3, dims).eval()
    with torch.no_grad():
        assert networks.primary(network(torch.zeros(1, 2, *size))).shape == (1, 3, *size)
    networks.check(network, component.name, (2, *size), 3, "segmentation")


@pytest.mark.parametrize("name", ["DenseNet121", "resnet10", "SEResNet50"])
@pytest.mark.parametrize("size", [(64, 64, 1), (64, 64, 64)])
def test_classifiers(name, size):
    network = networks.build(Component(name=name), 1, 4, networks.spatial_dims(size)).eval()
    with torch.no_grad():
        assert network(torch.zeros(2, 1, *size)).shape == (2, 4)


def test_weights_are_not_downloaded(monkeypatch):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: pytest.fail("downloads"))
    networks.build(Component(name="EfficientNetBN", model_name="efficientnet-b0"), 1, 2, 2)


@pytest.mark.parametrize(
    ("component", "said"),
    [
        (Component(name="UNeet"), "UNeet is not in monai.networks.nets; did you mean UNet"),
        (Component(name="os"), "os is not in"),
        (Component(name="_Loss"), "_Loss is not in"),
        (Component(name="UNet", channels=[4, 8], stride=[2]), "takes no argument stride; did you mean strides"),
        (Component(name="UNet"), "wants channels, strides"),
        (Component(name="UNet", channels=[4, 8], strides=[2, 2, 2, 2], kernel_size=[1, 2, 3, 4]), "UNet"),
        (Component(name="FLEXUNET_BACKBONE"), "network"),
        (Component(name="get_efficientnet_image_size", model_name="efficientnet-b0"), "is not a network but a int"),
    ],
)
def test_wrong_components(component, said):
    with pytest.raises(InputError, match=said):
        networks.build(component, 1, 2, 3)


def test_a_plane_network_refuses_a_volume():
    with pytest.raises(ValueError, match=r"takes \(B, C, I, J, 1\)"):
        networks.build(UNET, 1, 2, 2)(torch.zeros(1, 1, 8, 8, 8))


def test_a_network_of_the_wrong_shape_is_found():
    with pytest.raises(InputError, match="UNet makes .2, 2, 6, 6, 6. of patches .1, 5, 5, 5., wanted .2, 2, 5, 5, 5."):
        networks.check(networks.build(UNET, 1, 2, 3), "UNet", (1, 5, 5, 5), 2, "segmentation")
    with pytest.raises(InputError, match="BasicUNet does not take patches .1, 8, 8, 8."):
        networks.check(networks.build(Component(name="BasicUNet"), 1, 2, 3), "BasicUNet", (1, 8, 8, 8), 2, "segmentation")
    with pytest.raises(InputError, match="wanted .2, 2. for classification into 2 classes"):
        networks.check(networks.build(UNET, 1, 2, 3), "UNet", (1, 8, 8, 8), 2, "classification")


def test_checking_changes_nothing():
    network = networks.build(Component(name="DenseNet121"), 1, 2, 2).eval()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    networks.check(network, "DenseNet121", (1, 64, 64, 1), 2, "classification")
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items()) and not network.training


def test_transfer():
    a, b = (networks.build(UNET, 1, classes, 3) for classes in (2, 5))
    kept = networks.load_matching(b, a.state_dict())
    assert 0 < len(kept) < len(b.state_dict())
    assert all(torch.equal(v, a.state_dict()[k]) for k, v in b.state_dict().items() if k not in kept)
    plane = networks.build(UNET, 1, 2, 2)
    assert networks.load_matching(plane, {k.removeprefix("plane."): v for k, v in plane.state_dict().items()}) == []
    with pytest.raises(InputError, match="none of 1 layers"):
        networks.load_matching(b, {"other": torch.zeros(1)})
