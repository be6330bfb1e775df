"""Class activation maps on tiny timm models with random weights: definitions, other libraries, layers, state."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from aha import attributors
from aha.attributors.cam import GradCamPlusPlus
from aha.classifier import Classifier

from .architectures import (
    CAIT,
    PYRAMIDS,
    TRANSFORMERS,
    assert_refused,
    assert_restored_after_an_exception,
    assert_well_behaved,
    make,
    pictures,
)

NAMES = ("gradcam", "gradcam_pp", "hirescam", "scorecam", "ablationcam")
GRADIENT = NAMES[:3]
LAYERS = {"convnext": "stages.3", "norm_first": "norm_pre", "resnet": "layer4"}


def create(name):
    return lambda clf, **options: attributors.create(name, clf, **options)


def enlarged(cam, size):
    return F.interpolate(cam.clamp_min(0)[:, None], size, mode="bilinear", align_corners=False)


def layer_of(clf, kind):
    return clf.module.get_submodule(LAYERS.get(kind, "blocks.2.norm1"))


def run_with(clf, layer, images, change=lambda output: output):
    """Logits, and the layer's output, which ``change`` replaces."""
    seen = []

    def hook(_module, _args, output):
        seen.append(change(output))
        return seen[0]

    handle = layer.register_forward_hook(hook)
    logits = clf(images)
    handle.remove()
    return logits, seen[0]


def on_grid(output, kind):
    return output if output.dim() == 4 else output[:, PREFIX.get(kind, 1) :].mT.unflatten(2, GRID.get(kind, (4, 4)))


PREFIX = {"registers": 5, "average": 0, "cait": 0, "distilled": 2, "dinov3": 5}
GRID = {"oblong": (4, 6)}


@pytest.mark.parametrize("kind", ["convnext", "norm_first", "resnet", "vit", "registers", "distilled", "oblong"])
def test_gradient_methods_by_hand(models, kind):
    clf = models(kind)
    images, target = pictures(clf), torch.tensor([1, 3, 0])
    logits, output = run_with(clf, layer_of(clf, kind), images, lambda o: o.detach().requires_grad_())
    (gradient,) = torch.autograd.grad(logits[range(3), target].sum(), output)
    maps, gradients = on_grid(output.detach(), kind).double(), on_grid(gradient, kind).double()
    expected = {name: torch.zeros(3, *maps.shape[2:]).double() for name in GRADIENT}
    for i in range(3):
        for a, g in zip(maps[i], gradients[i], strict=True):
            expected["gradcam"][i] += g.mean() * a
            expected["hirescam"][i] += g * a
            alpha = 1 / (2 + a.sum() * g)  # eq. 19, divided by g²
            expected["gradcam_pp"][i] += (alpha * g.clamp_min(0)).sum() * a
    for name, cam in expected.items():
        maps = attributors.create(name, clf).attribute(images, target)
        assert torch.allclose(maps, enlarged(cam, images.shape[2:]).float(), atol=2e-4 * cam.abs().max().item()), name
        assert maps.max() > 0, name


@pytest.mark.parametrize("kind", ["convnext", "resnet", "vit", "registers"])
def test_scorecam_by_hand(models, kind):
    clf = models(kind)
    images, target = pictures(clf), torch.tensor([1, 3, 0])
    maps = on_grid(run_with(clf, layer_of(clf, kind), images)[1], kind)
    cams = []
    for i in range(3):
        masks = [
            F.interpolate(a[None, None], images.shape[2:], mode="bilinear", align_corners=False)[0, 0] for a in maps[i]
        ]
        masked = [clf.normalize(images[i]) * (m - m.min()) / (m.max() - m.min()) for m in masks]
        scores = torch.cat([clf.forward_normalized(pixels[None])[:, target[i]] for pixels in masked])
        scores = torch.where(maps[i].flatten(1).std(dim=1) > 0, scores, -torch.inf)
        cams.append((scores.softmax(0)[:, None, None] * maps[i]).nansum(0))
    expected = enlarged(torch.stack(cams), images.shape[2:])
    result = attributors.create("scorecam", clf).attribute(images, target)
    assert torch.allclose(result, expected, atol=1e-4 * expected.max().item())
    assert expected.max() > 0


@pytest.mark.parametrize(
    "kind", ["convnext", "norm_first", "resnet", "vit", "distilled", "dinov3", "cait", "post_norm"]
)
def test_ablationcam_by_hand(models, kind):
    clf = models(kind)
    images, target = pictures(clf), torch.tensor([1, 3, 0])
    layer = clf.module.blocks[1] if kind == "post_norm" else layer_of(clf, kind)
    logits, output = run_with(clf, layer, images)
    maps = on_grid(output, kind)
    cam = torch.zeros(3, *maps.shape[2:])
    for c in range(maps.shape[1]):

        def without(output, c=c):
            output = output.clone()
            on_grid(output, kind)[:, c] = 0
            return output

        ablated, _ = run_with(clf, layer, images, without)
        weight = 1 - ablated[range(3), target] / logits[range(3), target]
        cam += weight[:, None, None] * maps[:, c]
    expected = enlarged(cam, images.shape[2:])
    result = attributors.create("ablationcam", clf).attribute(images, target)
    assert torch.allclose(result, expected, atol=1e-3 * cam.abs().max().item())
    assert expected.max() > 0


@pytest.mark.parametrize("kind", ["convnext", "resnet", "norm_first", "swin", "lcnet"])
def test_hirescam_is_gradcam_where_pooling_comes_next(models, kind):
    # mean → norm → linear: the logit depends on a channel through its mean, so its gradient is the same everywhere
    clf = models(kind)
    images = pictures(clf, 4)
    one, other = (attributors.create(name, clf).attribute(images, range(4)) for name in ("gradcam", "hirescam"))
    assert torch.allclose(one, other, atol=1e-5 * one.max().item())
    assert one.max() > 0


def test_hirescam_is_nothing_where_a_norm_of_channels_comes_next(models):
    # the norm does not see a position's scale, so the derivative along A is zero (up to its epsilon)
    clf = models("norm_first")
    images = pictures(clf)
    one, other = (
        attributors.create(name, clf, layer="stages.3").attribute(images, 1) for name in ("gradcam", "hirescam")
    )
    assert other.max() < 1e-5 * one.max()


def test_channels_without_range_do_not_count():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Conv2d(3, 3, 3, stride=4)
            self.head = nn.Linear(3, 2)

        def forward(self, pixels):
            return self.head(self.features(pixels).mean(dim=(2, 3)))

    torch.manual_seed(0)
    network = Network()
    nn.init.zeros_(network.features.weight[1])
    nn.init.constant_(network.features.bias, 0.37)
    clf = Classifier.wrap(network, input_size=(19, 19), num_classes=2)
    images = pictures(clf)
    method = attributors.create("scorecam", clf)
    maps = method.attribute(images, 0)
    with torch.no_grad():
        # the flat channel out of the way, nothing else changed
        network.features.bias[1] = 0
        network.head.bias += 0.37 * network.head.weight[:, 1]
    assert torch.allclose(method.attribute(images, 0), maps, atol=1e-6)
    assert maps.max() > 0
    nn.init.zeros_(network.features.weight)
    assert torch.equal(method.attribute(images, 0), torch.zeros(3, 1, 19, 19))


@pytest.mark.parametrize("kind", ["convnext", "norm_first", "resnet"])
def test_gradcam_agrees_with_captum(models, kind):
    captum = pytest.importorskip("captum.attr")
    clf = models(kind)
    images, target = pictures(clf), torch.tensor([1, 3, 0])
    layer = layer_of(clf, kind)
    expected = captum.LayerGradCam(clf, layer).attribute(images, target, relu_attributions=True)
    assert expected.shape == (3, 1, 2, 2)
    expected = enlarged(expected[:, 0].detach(), images.shape[2:])
    maps = attributors.create("gradcam", clf).attribute(images, target)
    assert torch.allclose(maps, expected, atol=1e-5 * expected.max().item())


@pytest.mark.parametrize("kind", ["resnet", "convnext", "vit"])
@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_pytorch_grad_cam(models, monkeypatch, name, kind):
    library = pytest.importorskip("pytorch_grad_cam")
    target_of = pytest.importorskip("pytorch_grad_cam.utils.model_targets").ClassifierOutputTarget
    if name == "ablationcam" and kind != "resnet":
        pytest.skip("where activations may be negative, that package ablates with a large negative number")
    # it enlarges Score-CAM's masks with aligned corners, and guards α with an ε that small gradients feel
    monkeypatch.setattr(nn, "UpsamplingBilinear2d", lambda size: nn.Upsample(size, mode="bilinear"))
    monkeypatch.setattr(GradCamPlusPlus, "epsilon", 1e-6)
    classes = ["GradCAM", "GradCAMPlusPlus", "HiResCAM", "ScoreCAM", "AblationCAM"]
    clf = models(kind)
    images, target = pictures(clf), [1, 3, 0]
    reshape = None if kind != "vit" else lambda output: on_grid(output, kind)
    # it replaces modules for good when it fails
    private = copy.deepcopy(clf)
    private.requires_grad_(True)
    method = getattr(library, classes[NAMES.index(name)])
    with method(private.module, [layer_of(private, kind)], reshape) as theirs:
        expected = theirs(clf.normalize(images), [target_of(t) for t in target])
    maps = attributors.create(name, clf).attribute(images, target)[:, 0]
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    assert (high > 0).any()
    # both clip the map before they enlarge it; theirs is scaled to [0, 1]
    assert torch.allclose((maps - low) / (high - low + 1e-7), torch.as_tensor(expected), atol=1e-3)


@pytest.mark.parametrize("kind", ["vit", "norm_first"])
@pytest.mark.parametrize("name", NAMES)
def test_batches_modes_and_state(models, name, kind):
    assert_well_behaved(create(name), models(kind), clipped=True, rounding=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_many_channels_that_no_module_gives(models, name):
    clf = models("lcnet")
    images = pictures(clf, 2)
    maps = attributors.create(name, clf).attribute(images, [2, 0])
    assert torch.isfinite(maps).all() and maps.max() > 0
    method = attributors.create(name, clf, internal_batch_size=50)
    alone = torch.cat([method.attribute(image[None], [t]) for image, t in zip(images, [2, 0], strict=True)])
    assert torch.allclose(maps, alone, atol=1e-4 * maps.max().item())


def test_dynamic_sizes():
    clf = make("vit", dynamic_img_size=True)
    images = torch.rand(2, 3, 40, 24)
    for name in NAMES:
        assert attributors.create(name, clf).attribute(images).shape == (2, 1, 40, 24)


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("convnext", ("stages.3", "stages.1", "stages.3.blocks.0.conv_dw")),
        ("resnet", ("layer4", "layer3", "layer4.0.conv1")),
        ("swin", ("norm", "layers.2")),
        ("vit", ("blocks.2.norm1", "blocks.1", "blocks.2.attn", "norm")),
        ("eva02", ("blocks.1.norm2", "norm")),
        ("lcnet", ("blocks", "blocks.5", "blocks.3")),
    ],
)
def test_a_tail_is_what_a_whole_pass_gives(models, kind, names):
    clf = models(kind)
    images = pictures(clf, 2)
    for name in names:
        layer = clf.module.get_submodule(name)
        method = attributors.create("ablationcam", clf, layer=name)
        assert method.layer is layer
        captured = method.capture(images)
        assert torch.allclose(captured.logits, clf(images), atol=1e-5)
        output = captured.output.detach().repeat_interleave(2, dim=0)
        output[1::2] *= 1.1
        expected = torch.stack([run_with(clf, layer, images, lambda o, f=f: o * f)[0] for f in (1, 1.1)], dim=1)
        assert torch.allclose(method.tail(captured, output), expected.flatten(0, 1), atol=1e-4), name


@pytest.mark.parametrize("kind", [*TRANSFORMERS, *CAIT, *PYRAMIDS])
def test_ablation_does_not_run_what_lies_before_the_layer(models, kind):
    clf = models(kind)
    images = pictures(clf, 2)
    channels = 0
    ran = {}

    def count(module, _args, output):
        ran[module] = ran.get(module, 0) + len(output)

    method = attributors.create("ablationcam", clf)
    channels = method.maps(method.capture(images).output, images).shape[1]
    first = (getattr(clf.module, "blocks", None) or list(clf.module.children()))[0]
    # blocks that are skipped do not call their children
    watched = next(module for module in first.modules() if not list(module.children()))
    last = next(m for m in reversed(list(clf.module.modules())) if isinstance(m, nn.Linear))
    handles = [module.register_forward_hook(count) for module in (watched, last)]
    method.attribute(images, 0)
    for handle in handles:
        handle.remove()
    assert ran[last] == 2 * (channels + 1)
    assert ran[watched] == 2


def test_layers_of_other_networks():
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    for build, name in ((torchvision.models.resnet18, "layer4"), (torchvision.models.squeezenet1_1, "features")):
        clf = Classifier.wrap(build(num_classes=4), input_size=(64, 64), num_classes=4)
        images = pictures(clf, 1)
        for method in GRADIENT:
            cam = attributors.create(method, clf)
            assert cam.layer is getattr(clf.module, name)
            assert torch.isfinite(cam.attribute(images)).all()


def test_a_layer_whose_output_is_changed_in_place():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Conv2d(3, 4, 3, stride=4)
            self.act = nn.ReLU(inplace=True)
            self.head = nn.Linear(4, 2)

        def forward(self, pixels):
            return self.head(self.act(self.features(pixels)).mean(dim=(2, 3)))

    torch.manual_seed(0)
    clf = Classifier.wrap(Network(), input_size=(20, 20), num_classes=2)
    images = pictures(clf)
    maps = [attributors.create("hirescam", clf).attribute(images, 0)]
    clf.module.act = nn.ReLU()
    maps.append(attributors.create("hirescam", clf).attribute(images, 0))
    assert torch.equal(*maps)


@pytest.mark.parametrize("kind", ["vit", "resnet", "norm_first"])
@pytest.mark.parametrize("name", NAMES)
def test_state_is_restored_also_after_an_exception(name, kind):
    # the second pass is on perturbed copies
    assert_restored_after_an_exception(create(name), kind, at_call=1 if name in GRADIENT else 2)


@pytest.mark.parametrize(("architecture", "depth"), [("xcit_nano_12_p16_224", 1), ("levit_128s", (1, 1, 1))])
def test_other_architectures_are_refused_at_once(architecture, depth):
    with torch.device("meta"):
        module = timm.create_model(architecture, depth=depth)
    clf = Classifier(module, (0.5,) * 3, (0.5,) * 3, (224, 224), 1000)
    for name in NAMES:
        assert_refused(create(name), clf, f"{name} accepts timm CNNs")


def test_layers_that_do_not_fit_are_refused(models):
    clf = models("resnet")
    images = pictures(clf, 1)
    for layer, what in (("layer5", "'layer5'"), (nn.Identity(), "a Identity")):
        with pytest.raises(ValueError, match=f"layer={what} is no part of"):
            attributors.create("gradcam", clf, layer=layer)
    with pytest.raises(ValueError, match=r"layer fc of ResNet gives \(1, 4\), not maps"):
        attributors.create("gradcam", clf, layer="fc").attribute(images)
    twice = nn.Sequential(nn.Conv2d(3, 4, 3), *[nn.ReLU()] * 2, nn.Flatten(), nn.Linear(144, 4))
    small = Classifier.wrap(twice, input_size=(8, 8))
    with pytest.raises(ValueError, match="layer 1 runs more than once"):
        attributors.create("gradcam", small, layer="1").attribute(pictures(small))
    clf.module.spare = nn.Identity()
    with pytest.raises(ValueError, match="layer spare does not run"):
        attributors.create("gradcam", clf, layer="spare").attribute(images)
    del clf.module.spare
    plain = Classifier.wrap(nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 2)), input_size=(8, 8))
    with pytest.raises(ValueError, match="has no layer known to give maps: pass layer="):
        attributors.create("gradcam", plain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["vit", "resnet", "lcnet"])
@pytest.mark.parametrize("name", NAMES)
def test_cuda_agrees_with_the_cpu(name, kind):
    clf = make(kind)
    images, target = pictures(clf), [1, 3, 0]
    expected = attributors.create(name, clf).attribute(images, target)
    maps = attributors.create(name, clf.cuda()).attribute(images.cuda(), target)
    assert maps.is_cuda
    # convolutions run in tf32 there
    assert torch.allclose(maps.cpu(), expected, rtol=0.05, atol=0.02 * expected.abs().max().item())
