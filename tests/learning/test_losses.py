import monai.losses
import pytest
import torch

from sparkmed.config import Component
from sparkmed.learning import losses
from sparkmed.rejection import InputError

torch.manual_seed(0)
OUTPUT, LABEL = torch.randn(3, 4, 6, 5, 2), torch.randint(0, 4, (3, 1, 6, 5, 2))


@pytest.mark.parametrize(
    "component",
    [
        None,
        Component(name="DiceLoss"),
        Component(name="DiceLoss", include_background=False, squared_pred=True),
        Component(name="DiceCELoss", lambda_ce=0.5, weight=[1, 2, 3, 4]),
        Component(name="GeneralizedDiceLoss"),
        Component(name="FocalLoss", gamma=1.5),
        Component(name="TverskyLoss", alpha=0.3, beta=0.7),
        Component(name="CrossEntropyLoss", label_smoothing=0.1),
    ],
)
def test_a_batch_decomposes_into_samples(component):
    loss = losses.build(component, "segmentation")
    whole = loss(OUTPUT, LABEL)
    assert whole.shape == (3,) and torch.isfinite(whole).all()
    for i in range(3):
        assert torch.allclose(loss(OUTPUT[i : i + 1], LABEL[i : i + 1]), whole[i : i + 1])
    changed = OUTPUT.clone()
    changed[2] = 0
    assert torch.equal(loss(changed, LABEL)[:2], whole[:2])


def test_the_default_is_monais_dice_and_cross_entropy():
    reference = monai.losses.DiceCELoss(to_onehot_y=True, softmax=True)
    assert torch.allclose(losses.build(None, "segmentation")(OUTPUT, LABEL).mean(), reference(OUTPUT, LABEL))


def test_perfect_and_opposite_predictions():
    perfect = torch.nn.functional.one_hot(LABEL[:, 0], 4).movedim(-1, 1) * 100.0
    loss = losses.build(None, "segmentation")
    assert (loss(perfect, LABEL) < 1e-3).all() and (loss(-perfect, LABEL) > 1).all()


@pytest.mark.parametrize("component", [None, Component(name="FocalLoss"), Component(name="CrossEntropyLoss", weight=[1, 3])])
def test_classification(component):
    output, target = torch.tensor([[5.0, -5.0], [5.0, -5.0]]), torch.tensor([0, 1])
    right, wrong = losses.build(component, "classification")(output, target).tolist()
    assert right < 0.01 and wrong > 3


def test_class_weights_count_for_images():
    output, target = torch.randn(4, 2), torch.tensor([0, 1, 1, 0])
    plain = losses.build(None, "classification")(output, target)
    weighted = losses.build(Component(name="CrossEntropyLoss", weight=[1.0, 10.0]), "classification")(output, target)
    assert torch.allclose(weighted, plain * torch.tensor([1.0, 10.0, 10.0, 1.0]))


def test_deep_supervision_weighs_levels_by_halves():
    loss = losses.build(None, "segmentation")
    coarse = torch.randn(3, 4, 3, 5, 1)
    both = loss([OUTPUT, coarse], LABEL)
    small = torch.nn.functional.interpolate(LABEL.float(), (3, 5, 1), mode="nearest-exact").long()
    assert torch.allclose(both, (2 * loss(OUTPUT, LABEL) + loss(coarse, small)) / 3)
    assert torch.allclose(loss(torch.stack([OUTPUT, OUTPUT], 1), LABEL), loss(OUTPUT, LABEL))


@pytest.mark.parametrize(
    ("component", "said"),
    [
        (Component(name="DiceLos"), "did you mean DiceLoss"),
        (Component(name="DiceLoss", squared=True), "takes no argument squared; did you mean squared_pred"),
        (Component(name="DiceLoss", batch=True), "mixes samples"),
        (Component(name="DiceLoss", reduction="sum"), "reduction is mean"),
        (Component(name="DiceLoss", sigmoid=True), "DiceLoss"),
    ],
)
def test_wrong_losses(component, said):
    with pytest.raises(InputError, match=said):
        losses.build(component, "segmentation")
