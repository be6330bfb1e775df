"""How layers lie over the image."""

import pytest
import torch
import torch.nn.functional as F
import torchvision

import aha
from aha.attributors import create
from aha.geometry import as_maps, channels_first, token_grid


@pytest.mark.parametrize(
    ("shape", "image", "last"),
    [
        ((1, 768, 2, 3), (64, 96), False),
        ((1, 2, 3, 768), (64, 96), True),
        ((1, 7, 7, 8), (224, 224), True),  # hardly more channels than columns
        ((1, 8, 7, 7), (224, 224), False),
        ((1, 7, 7, 7), (224, 224), False),  # both fit: channels first
        ((2, 24, 18, 14), (70, 53), False),  # both nearly fit: channels first
        ((1, 512, 8, 11), (227, 340), False),  # padded to whole cells
        ((1, 64, 109, 157), (224, 320), False),  # a border lost
        ((1, 16, 224, 224), (224, 224), False),
        ((1, 1, 1, 16), (32, 32), True),
        ((1, 16, 1, 1), (32, 32), False),
    ],
)
def test_layouts(shape, image, last):
    output = torch.rand(shape)
    expected = output.permute(0, 3, 1, 2) if last else output
    assert torch.equal(channels_first(output, image), expected)


@pytest.mark.parametrize(
    ("shape", "image"), [((1, 16, 3, 2), (64, 96)), ((1, 5, 40, 7), (224, 224)), ((1, 300, 2, 300), (224, 224))]
)
def test_what_does_not_lie_over_the_image(shape, image):
    assert channels_first(torch.rand(shape), image) is None


def test_the_user_decides_where_both_fit():
    output = torch.rand(1, 7, 7, 7)
    assert torch.equal(channels_first(output, (224, 224), last=True), output.permute(0, 3, 1, 2))


@pytest.mark.parametrize(
    ("tokens", "image", "found"),
    [
        (196, (224, 224), (0, 14, 14)),
        (197, (224, 224), (1, 14, 14)),
        (198, (224, 224), (2, 14, 14)),  # class and distillation token
        (261, (224, 224), (5, 16, 16)),  # registers
        (1 + 4 * 6, (32, 48), (1, 4, 6)),
        (1 + 5 * 7, (65, 100), (1, 5, 7)),  # the last patches padded
        (200, (224, 224), None),
        (24, (32, 32), None),
    ],
)
def test_token_grids(tokens, image, found):
    assert token_grid(tokens, image) == found


def test_tokens_become_maps_in_reading_order():
    tokens = torch.arange(1 + 6.0)[None, :, None].expand(1, 7, 2)
    assert as_maps(tokens, (32, 48))[0, 0].tolist() == [[1, 2, 3], [4, 5, 6]]
    assert as_maps(torch.rand(1, 5), (32, 32)) is None


def gradcam_by_hand(net, layer, images, arrange):
    kept = []
    hook = layer.register_forward_hook(lambda _module, _args, out: kept.append(out))
    out = net(images.clone().requires_grad_())
    hook.remove()
    (gradient,) = torch.autograd.grad(out.max(dim=1).values.sum(), kept[0])
    maps, gradient = arrange(kept[0].detach()), arrange(gradient)
    cam = F.relu((gradient.mean(dim=(2, 3), keepdim=True) * maps).sum(dim=1, keepdim=True))
    return F.interpolate(cam, images.shape[-2:], mode="bilinear")


@pytest.mark.parametrize(
    ("make", "layer", "arrange"),
    [
        (torchvision.models.swin_t, "features", lambda out: out.permute(0, 3, 1, 2)),
        (torchvision.models.swin_v2_t, "features", lambda out: out.permute(0, 3, 1, 2)),
        (torchvision.models.convnext_tiny, "features", lambda out: out),
        (torchvision.models.mobilenet_v3_small, "features", lambda out: out),
        (torchvision.models.vgg11, "features", lambda out: out),
    ],
)
def test_gradcam_of_torchvision_networks_on_oblong_images(make, layer, arrange):
    torch.manual_seed(0)
    net = make(num_classes=5).eval()
    clf = aha.Classifier.wrap(net, input_size=(64, 96))
    images = torch.rand(2, 3, 64, 96)
    expected = gradcam_by_hand(net, net.get_submodule(layer), images, arrange)
    torch.testing.assert_close(create("gradcam", clf).attribute(images), expected)


def test_gradcam_on_tokens_of_torchvision_s_vit():
    torch.manual_seed(0)
    net = torchvision.models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5).eval()
    torch.nn.init.normal_(net.heads.head.weight)
    clf = aha.Classifier.wrap(net, input_size=(32, 32))
    layer = "encoder.layers.encoder_layer_1.ln_1"
    images = torch.rand(2, 3, 32, 32)
    arrange = lambda out: out[:, 1:].transpose(1, 2).unflatten(-1, (4, 4))  # noqa: E731
    expected = gradcam_by_hand(net, net.get_submodule(layer), images, arrange)
    assert expected.abs().sum() > 0
    torch.testing.assert_close(create("gradcam", clf, layer=layer).attribute(images), expected)


def test_a_layer_that_does_not_lie_over_the_image_is_refused():
    class Turned(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = torch.nn.Conv2d(3, 6, 8, stride=8), torch.nn.Linear(6, 2)
            self.turn = torch.nn.Identity()

        def forward(self, pixels):
            return self.fc(self.turn(self.conv(pixels).transpose(2, 3)).mean(dim=(2, 3)))

    clf = aha.Classifier.wrap(Turned(), input_size=(32, 96))
    with pytest.raises(ValueError, match=r"layer turn of Turned gives \(1, 6, 12, 4\), not maps.*32×96") as error:
        create("gradcam", clf, layer="turn").attribute(torch.rand(1, 3, 32, 96))
    assert "\n" not in str(error.value)
    assert create("gradcam", clf, layer="conv").attribute(torch.rand(1, 3, 32, 96)).shape == (1, 1, 32, 96)
