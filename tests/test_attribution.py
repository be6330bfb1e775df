"""From any torch module to a map in one call."""

import contextlib

import pytest
import timm
import torch
from torch import nn

import aha
from aha.attribution import MEAN, STD

from .toys import pictures


def own():
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def test_any_module_and_what_is_known_of_it():
    images = pictures(2, 64)
    model = own()
    maps = aha.attribute(model, images)
    assert maps.shape == (2, 1, 64, 64) and maps.isfinite().all()
    clf = aha.Classifier.wrap(own(), MEAN, STD, 64)
    clf.module.load_state_dict(model.state_dict())
    assert torch.equal(maps, aha.Explainer.universal(clf).attribute(images))
    assert torch.equal(maps, aha.attribute(clf, images))
    assert not torch.equal(maps, aha.attribute(model, images, mean=(0, 0, 0), std=(1, 1, 1)))
    assert torch.equal(aha.attribute(model, images, 2), aha.attribute(model, images, [2, 2]))


def test_timm_models_say_their_normalisation():
    torch.manual_seed(0)
    model = timm.create_model("tf_efficientnet_lite0", pretrained=False, num_classes=4)
    assert tuple(model.pretrained_cfg["mean"]) != MEAN
    images = pictures(1, 64)
    half = (0.5,) * 3
    assert torch.equal(aha.attribute(model, images), aha.attribute(model, images, mean=half, std=half))


def test_the_model_is_left_as_it_was():
    model = own().train()
    model[1].eval()
    model[4].bias.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for call in (lambda: aha.attribute(model, pictures(1, 64)), lambda: aha.attribute(model, pictures(1, 64), 99)):
        with contextlib.suppress(ValueError):
            call()
        assert [m.training for m in model] == [True, False, True, True, True]
        assert [p.requires_grad for p in model.parameters()] == [True, True, True, False]
        assert not any(m._forward_hooks for m in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_presets_refine():
    model, images = own(), pictures(1, 64)
    assert not torch.equal(aha.attribute(model, images, preset="fast"), aha.attribute(model, images))


@pytest.mark.parametrize(
    ("model", "images", "message"),
    [
        ("resnet50", pictures(1, 64), "model is a str: give a torch.nn.Module"),
        (own(), pictures(1, 64)[0], "images"),
        (own(), 255 * pictures(1, 64), "images"),
        (own(), None, "images"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(model, images, message):
    with pytest.raises(ValueError, match=message) as error:
        aha.attribute(model, images)
    assert "\n" not in str(error.value)
