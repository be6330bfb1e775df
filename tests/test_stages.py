"""Features of networks without an interface for them."""

import pytest
import torch
import torchvision
from torch import nn

import aha

from .toys import TINY_DECODER


@pytest.mark.parametrize(
    ("make", "channels"),
    [
        (torchvision.models.resnet18, [64, 128, 256, 512]),
        (torchvision.models.swin_t, [96, 192, 384, 768]),
        (torchvision.models.convnext_tiny, [96, 192, 384, 768]),
        (torchvision.models.vgg11, [256, 512, 512, 512]),
        (torchvision.models.mobilenet_v3_small, [16, 24, 48, 576]),
        (torchvision.models.densenet121, None),
        (torchvision.models.regnet_y_400mf, [48, 104, 208, 440]),
        (torchvision.models.efficientnet_b0, None),
    ],
)
def test_an_explainer_for_any_torchvision_network(make, channels, tmp_path):
    torch.manual_seed(0)
    clf = aha.Classifier.wrap(make(num_classes=5), input_size=(64, 96))
    explainer = aha.Explainer.build(clf, evidence=False, decoder=TINY_DECODER)
    levels = explainer.features(torch.rand(2, 3, 64, 96))
    heights = [level.shape[-2] for level in levels]
    assert heights == sorted(heights, reverse=True)
    assert len(set(heights)) == 4
    assert all(level.shape[-1] * 2 == level.shape[-2] * 3 for level in levels[:-1])
    if channels:
        assert [level.shape[1] for level in levels] == channels
    images = torch.rand(2, 3, 64, 96)
    maps = explainer.attribute(images)
    assert maps.shape == (2, 1, 64, 96)
    loaded = aha.Explainer.from_pretrained(explainer.save_pretrained(tmp_path), clf)
    torch.testing.assert_close(loaded.attribute(images), maps)
    assert not any(module._forward_hooks for module in clf.modules())


def test_the_features_are_those_of_the_stages():
    torch.manual_seed(0)
    net = torchvision.models.resnet18(num_classes=5).eval()
    clf = aha.Classifier.wrap(net, (0.5,) * 3, (0.25,) * 3, input_size=(64, 64))
    images = torch.rand(2, 3, 64, 64)
    x = net.maxpool(net.relu(net.bn1(net.conv1((images - 0.5) / 0.25))))
    expected = []
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        x = stage(x)
        expected.append(x)
    for got, want in zip(
        aha.Explainer.build(clf, evidence=False, decoder=TINY_DECODER).features(images), expected, strict=True
    ):
        torch.testing.assert_close(got, want)


def test_a_transformer_gives_blocks_a_quarter_apart():
    net = torchvision.models.VisionTransformer(32, 8, 8, 2, 16, 32, num_classes=5)
    clf = aha.Classifier.wrap(net, input_size=(32, 32))
    explainer = aha.Explainer.build(clf, evidence=False, decoder=TINY_DECODER)
    layers = net.encoder.layers
    assert explainer.encoder.stages == [layers[1], layers[3], layers[5], layers[7]]
    assert explainer.attribute(torch.rand(1, 3, 32, 32)).shape == (1, 1, 32, 32)


@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8), nn.ReLU(), nn.Linear(8, 5)),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5)),
    ],
)
def test_a_network_without_maps_names_what_to_give(net):
    clf = aha.Classifier.wrap(net, input_size=(32, 32))
    with pytest.raises(ValueError, match=r"Sequential gives no intermediate features: give encoder= the name") as error:
        aha.Explainer.build(clf, evidence=False)
    assert "\n" not in str(error.value)


def test_in_place_layers_do_not_change_the_features():
    net = nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Flatten(), nn.LazyLinear(5))
    net(torch.rand(1, 3, 32, 32))
    clf = aha.Classifier.wrap(net, input_size=(32, 32))
    explainer = aha.Explainer.build(clf, evidence=False, decoder=TINY_DECODER)
    images = torch.rand(2, 3, 32, 32)
    seen = {
        type(stage): level for stage, level in zip(explainer.encoder.stages, explainer.features(images), strict=True)
    }
    assert (seen[nn.ReLU] >= 0).all()
    if nn.BatchNorm2d in seen:
        assert (seen[nn.BatchNorm2d] < 0).any()
