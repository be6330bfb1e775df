"""Evidence: every role of every architecture, equal to the methods alone, of one forward and one backward pass.

The methods alone are of the target's logit, contrast 0; what contrast adds follows from them, for they are linear.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aha import attributors
from aha.attributors import libra
from aha.attributors.passes import count_passes
from aha.classifier import Classifier
from aha.evidence import ROLES, Evident
from aha.full_gradient import full_gradient
from aha.structure import transformer

from .attributors.architectures import MIXERS, PYRAMIDS, TRANSFORMERS, make, pictures


def standardized(maps):
    variance, mean = torch.var_mean(maps.double(), dim=(2, 3), keepdim=True, correction=0)
    return ((maps - mean) / variance.sqrt()).float()


@pytest.mark.parametrize("kind", [*TRANSFORMERS, *MIXERS])
def test_roles_of_transformers_are_the_methods_alone(kind):
    clf = make(kind)
    images, target = pictures(clf, 2), torch.tensor([3, 1])
    found = Evident(clf, contrast=0)(images, target)
    alone = [("libragrad", {"base": "fullgrad_plus"}), ("libragrad", {"base": "attcam"}), ("raw_attention", {})]
    expected = 1 if kind in MIXERS else 3
    assert found.present.tolist() == [n < expected or n >= 3 for n in range(len(ROLES))]
    for n, (name, options) in enumerate(alone):
        if n >= expected:
            assert not found.maps[:, n].any()
            continue
        maps = attributors.create(name, clf, **options).attribute(images, target)
        assert torch.allclose(found.maps[:, n : n + 1], standardized(maps), atol=1e-3)
    assert torch.equal(found.best, found.maps[:, :1])


@pytest.mark.parametrize("kind", [*TRANSFORMERS, *MIXERS])
def test_parts_of_the_gradient_of_tokens(kind):
    clf = make(kind)
    images, target = pictures(clf, 2), torch.tensor([3, 1])
    found = Evident(clf, contrast=0)(images, target)
    structure = transformer(clf.module, mixers=True)
    rows, cols = structure.grid(*images.shape[-2:])

    def enlarged(tokens):
        maps = tokens[:, structure.prefix :].reshape(-1, 1, rows, cols)
        return F.interpolate(maps, images.shape[-2:], mode="bilinear", align_corners=False)

    # each cut by a pass of its own
    with libra(clf.module):
        terms = [full_gradient(clf, images, target, at=block).inputs.sum(dim=-1) for block in structure.blocks]
    third = max(1, len(terms) // 3)
    total = attributors.create("libragrad", clf, base="fullgrad_plus").attribute(images, target)
    expected = {
        "early": enlarged(sum(terms[:third])),
        "late": enlarged(sum(terms[-third:])),
        "biases": total - enlarged(sum(terms) / len(terms)),
    }
    for role, maps in expected.items():
        n = ROLES.index(role)
        assert torch.allclose(found.maps[:, n : n + 1], standardized(maps), atol=1e-3), role


@pytest.mark.parametrize("kind", PYRAMIDS)
def test_roles_of_other_networks(kind):
    clf = make(kind)
    images, target = pictures(clf, 2), torch.tensor([3, 1])
    found = Evident(clf, contrast=0)(images, target)
    assert found.present.tolist() == [role != "biases" for role in ROLES]
    # HiResCAM by hand, its sign kept
    layer = attributors.create("hirescam", clf)
    with libra(clf.module):
        captured = layer.capture(images)
        (gradient,) = torch.autograd.grad(captured.logits.gather(1, target[:, None]).sum(), captured.output)
    maps, gradient = (layer.maps(values, images).detach() for values in (captured.output, gradient))
    here = (maps * gradient).sum(dim=1, keepdim=True)
    for n, expected in ((1, here), (2, maps.square().sum(dim=1, keepdim=True).sqrt())):
        enlarged = F.interpolate(expected, images.shape[-2:], mode="bilinear", align_corners=False)
        assert torch.allclose(found.maps[:, n : n + 1], standardized(enlarged), atol=1e-3)


def test_the_gradient_of_a_convolutional_network_sums_over_its_resolutions():
    torch.manual_seed(0)
    first, second = (nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.ReLU6(True)) for a, b in ((3, 4), (4, 6)))
    module = nn.Sequential(first, second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))
    clf = Classifier.wrap(module, (0.5,) * 3, (0.02,) * 3, input_size=(16, 16))
    images = pictures(clf, 2)
    cuts = []
    # LibraGrad's rule for ReLU6 is a constant gate
    hidden = clf.normalize(images).requires_grad_()
    for part in (nn.Identity(), first, second):
        weights = part[0].weight if isinstance(part, nn.Sequential) else None
        if weights is not None:
            linear = F.conv2d(hidden, weights, part[0].bias, 2, 1)
            hidden = linear * (linear.clamp(0, 6) / linear).detach()
        hidden.retain_grad()
        cuts.append(hidden)
    module[4](hidden.mean(dim=(2, 3)))[:, 1].sum().backward()
    terms = ((cut.detach() * cut.grad).sum(dim=1, keepdim=True) for cut in cuts)
    early, middle, late = (F.interpolate(term, (16, 16), mode="bilinear", align_corners=False) for term in terms)
    maps = Evident(clf, contrast=0)(images, 1).maps
    for role, expected in (("gradient", early + middle + late), ("early", early), ("late", late)):
        n = ROLES.index(role)
        assert torch.allclose(maps[:, n : n + 1], standardized(expected), atol=1e-4), role


@pytest.mark.parametrize("contrast", [0.5, 1])
@pytest.mark.parametrize("kind", [*TRANSFORMERS, *MIXERS])
def test_contrast_takes_the_maps_of_the_other_classes_away(kind, contrast):
    clf = make(kind)
    images, target = pictures(clf, 2), torch.tensor([3, 1])
    found = Evident(clf, contrast)(images, target)
    # a pass of its own for every class, each with its share of what is not the target's probability
    method = attributors.create("libragrad", clf, base="fullgrad_plus")
    maps = torch.stack([method.attribute(images, c) for c in range(clf.num_classes)], dim=1).double()
    shares = clf(images).double().softmax(dim=1).scatter(1, target[:, None], 0)
    shares = shares / shares.sum(dim=1, keepdim=True)
    rivals = torch.einsum("bk,bkchw->bchw", shares, maps)
    expected = standardized(maps[torch.arange(2), target] - contrast * rivals)
    assert torch.allclose(found.best, expected, atol=2e-3)


@pytest.mark.parametrize("kind", PYRAMIDS)
def test_contrast_of_other_networks(kind):
    clf = make(kind)
    images, target = pictures(clf, 2), torch.tensor([3, 1])
    found = Evident(clf, 1)(images, target)
    # of the log-odds, by autograd
    layer = attributors.create("hirescam", clf)
    with libra(clf.module):
        captured = layer.capture(images)
        chances = captured.logits.log_softmax(dim=1).gather(1, target[:, None])
        odds = chances - torch.log1p(-chances.exp())
        (gradient,) = torch.autograd.grad(odds.sum(), captured.output)
    maps, gradient = (layer.maps(values, images).detach() for values in (captured.output, gradient))
    enlarged = F.interpolate((maps * gradient).sum(dim=1, keepdim=True), images.shape[-2:], mode="bilinear")
    assert torch.allclose(found.maps[:, 1:2], standardized(enlarged), atol=2e-3)


def test_contrast_of_a_sure_decision_and_what_it_may_be():
    clf = make("vit")
    with torch.no_grad():
        clf.module.head.weight.mul_(1e3)  # probabilities of 0 and 1, where a gradient of them vanishes
    images = pictures(clf, 2)
    target = clf(images).argmax(dim=1)
    sure, alone = (Evident(clf, contrast)(images, target) for contrast in (0.5, 0))
    assert sure.maps.isfinite().all()
    assert not torch.allclose(sure.best, alone.best, atol=1e-2)
    for contrast in (-0.1, 1.1, float("nan"), "half"):
        with pytest.raises(ValueError, match=r"contrast=.*: give a finite number ≥ 0 and ≤ 1"):
            Evident(clf, contrast)


@pytest.mark.parametrize("kind", ["vit", "mixer", "resnet", "swin", "cait"])
def test_one_pass_serves_all(kind):
    clf = make(kind)
    images, evident = pictures(clf, 3), Evident(clf)
    logits = clf(images)
    with count_passes(clf) as seen:
        found = evident(images)
    assert (seen.forward, seen.backward) == (3, 3)
    assert torch.allclose(found.logits, logits, atol=1e-5)
    assert torch.equal(found.target, logits.argmax(dim=1))
    with torch.no_grad():
        again = evident(images, found.target)
    assert torch.equal(again.maps, found.maps)
    assert not found.maps.requires_grad
    assert torch.allclose(clf(images), logits)


@pytest.mark.parametrize("kind", ["vit", "mixer", "resnet", "swin", "cait"])
def test_targets_of_an_image_share_the_forward_pass(kind):
    clf = make(kind)
    images, evident = pictures(clf, 2), Evident(clf)
    target = torch.tensor([[3, 1, 0], [2, 2, 3]])
    with count_passes(clf) as seen:
        found = evident(images, target)
    assert (seen.forward, seen.backward) == (2, 6)
    assert found.target.tolist() == [3, 1, 0, 2, 2, 3] and len(found.logits) == 2
    for n in range(3):
        alone = evident(images, target[:, n])
        assert torch.allclose(found.maps[n::3], alone.maps, atol=1e-5)
        assert torch.equal(found.present, alone.present)
    with pytest.raises(ValueError, match=r"target has shape \(1, 2\): give \(2, M\) classes"):
        evident(images, target[:1, :2])


def test_maps_have_one_scale_and_flat_ones_are_0():
    clf = make("vit")
    blocks = clf.module.blocks
    with torch.no_grad():
        clf.module.head.weight.mul_(1e-12)  # gradients of any unit
    images = pictures(clf, 2)
    maps = Evident(clf)(images).maps
    assert torch.allclose(maps.mean(dim=(2, 3)), torch.zeros(2, len(ROLES)), atol=1e-4)
    assert torch.allclose(maps.std(dim=(2, 3), correction=0), torch.ones(2, len(ROLES)), atol=1e-3)
    with torch.no_grad():
        clf.module.head.weight.zero_()
    maps = Evident(clf)(images).maps
    assert [ROLES[n] for n in range(len(ROLES)) if maps[:, n].any()] == ["activity"]
    assert len(blocks)


def test_networks_without_rules_have_plain_gradients():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    clf = Classifier.wrap(module, input_size=(16, 16))
    evident = Evident(clf)
    assert not evident._libra
    found = evident(pictures(clf, 2))
    assert found.present.sum() == len(ROLES) - 1
    assert found.maps[:, :1].any()
