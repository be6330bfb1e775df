"""Attributors on tiny timm models with random weights: shapes, definitions, state, seeds."""

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aha import attributors
from aha.attributors import Attributor, Metadata, register, undisturbed
from aha.attributors.base import _REGISTRY
from aha.classifier import Classifier

from .architectures import TRANSFORMERS, assert_restored_after_an_exception, assert_well_behaved, make, pictures, state
from .by_hand import gradients_by_hand, prefix, readout

PREFIX = {"registers": 5, "average": 0, "attention_pool": 0, "distilled": 2, "dinov3": 5}
OPTIONS = {"rise": {"n_masks": 12}, "integrated_gradients": {"n_steps": 4}}
ATTENTION = ("raw_attention", "rollout", "gradcam_vit")
NAMES = (*ATTENTION, "input_x_gradient", "integrated_gradients", "random", "rise")


def create(name, clf, **options):
    if name == "integrated_gradients":
        pytest.importorskip("captum")
    return attributors.create(name, clf, **{**OPTIONS.get(name, {}), **options})


@pytest.mark.parametrize("name", NAMES)
def test_batches_modes_and_state(models, name):
    assert_well_behaved(
        lambda clf, **options: create(name, clf, **options), models("vit"), clipped=name == "gradcam_vit"
    )


@pytest.mark.parametrize("name", NAMES)
def test_refusals(models, name):
    clf = models("vit")
    images = pictures(clf)
    method = create(name, clf)
    with pytest.raises(ValueError, match="one class per image"):
        method.attribute(images, [0, 1])
    with pytest.raises(ValueError, match="out of range"):
        method.attribute(images, 4)
    with pytest.raises(ValueError, match="RGB in"):
        method.attribute(images * 255)
    with pytest.raises(ValueError, match="batch is empty"):
        method.attribute(images[:0])
    with pytest.raises(ValueError, match="an integer ≥ 1"):
        create(name, clf, internal_batch_size=0)


@pytest.mark.parametrize("name", NAMES)
def test_state_is_restored_also_after_an_exception(name):
    def method_of(clf, **options):
        return create(name, clf, **options)

    if name == "random":  # never asks the classifier
        clf = make("vit")
        before = state(clf)
        method_of(clf).attribute(pictures(clf))
        assert state(clf) == before
        return
    assert_restored_after_an_exception(method_of)


def test_undisturbed_restores_when_it_cannot_even_start():
    clf = make("vit")
    before = state(clf)
    with (
        pytest.raises(AttributeError, match="register_forward_hook"),
        undisturbed(clf, [(clf.module.head, print), (None, print)], unfused=True),
    ):
        pytest.fail("must not be entered")
    assert state(clf) == before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_cuda_agrees_with_the_cpu(name):
    clf = make("vit")
    images, target = pictures(clf), [1, 3, 0]
    expected = create(name, clf).attribute(images, target)
    maps = create(name, clf.cuda()).attribute(images.cuda(), target)
    assert maps.is_cuda
    # convolutions run in tf32 there
    assert torch.allclose(maps.cpu(), expected, rtol=0.05, atol=0.02 * expected.abs().max().item())


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_attention_of_all_architectures(models, kind):
    clf = models(kind)
    method = attributors.create("rollout", clf)
    assert method.prefix == PREFIX.get(kind, 1)
    assert len(method.blocks) == 3
    rollout = method.rollout(pictures(clf, 2))
    assert torch.allclose(rollout.sum(dim=-1), torch.ones(()), atol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "registers", "distilled", "average"])
def test_attention_methods_by_hand(models, kind):
    clf = models(kind)
    images, target = pictures(clf), [1, 3, 0]
    cams, elements, raws, rolls = [], [], [], []
    for image, t in zip(images, target, strict=True):
        attentions, gradients = gradients_by_hand(clf.module, clf.normalize(image[None]), t)
        tokens = attentions[0].shape[-1]
        read, patches = readout(kind, tokens), slice(prefix(kind), None)
        cam = torch.zeros(16)
        element = torch.zeros(16)
        raw = torch.zeros(16)
        for attention, gradient in zip(attentions[-1], gradients[-1], strict=True):
            row = torch.stack([attention[q, patches] for q in read]).mean(0)
            weight = torch.stack([gradient[q, patches] for q in read]).mean()
            cam += weight * row
            for q in read:
                element += gradient[q, patches] * attention[q, patches] / (3 * len(read))
            raw += row / 3
        joint = torch.eye(tokens)
        for attention in attentions:
            joint = (attention.mean(0) + torch.eye(tokens)) / 2 @ joint
        cams.append(cam.clamp_min(0))
        elements.append(element.clamp_min(0))
        raws.append(raw)
        rolls.append(joint[read, patches].mean(0))
    by_element = attributors.create("gradcam_vit", clf, weights="element")
    found = {name: attributors.create(name, clf) for name in ("gradcam_vit", "raw_attention", "rollout")}
    for method, rows in zip((*found.values(), by_element), (cams, raws, rolls, elements), strict=True):
        grid = torch.stack(rows).view(3, 1, 4, 4)
        expected = F.interpolate(grid, (32, 32), mode="bilinear", align_corners=False)
        maps = method.attribute(images, target)
        assert torch.allclose(maps, expected, atol=1e-3 * expected.abs().max().item()), method.name
    assert torch.stack(cams).max() > 0 and torch.stack(elements).max() > 0
    with pytest.raises(ValueError, match="weights='sum' is not known: choose one of average, element"):
        attributors.create("gradcam_vit", clf, weights="sum")


def test_dynamic_sizes():
    clf = make("vit", dynamic_img_size=True)
    images = torch.rand(2, 3, 40, 24)
    for name in ATTENTION:
        assert attributors.create(name, clf).attribute(images).shape == (2, 1, 40, 24)


def test_input_x_gradient_by_hand(models):
    clf = models("vit")
    images = pictures(clf).requires_grad_()
    target = torch.tensor([0, 3, 1])
    clf(images)[range(3), target].sum().backward()
    expected = (images * images.grad).detach().sum(1, keepdim=True).abs()
    maps = attributors.create("input_x_gradient", clf).attribute(images.detach(), target)
    assert torch.allclose(maps, expected, rtol=1e-4, atol=1e-5)
    smooth = attributors.create("input_x_gradient", clf, smooth=2.0).attribute(images.detach(), target)
    assert smooth.std() < maps.std()
    assert smooth.mean() == pytest.approx(maps.mean().item(), rel=0.1)
    with pytest.raises(ValueError, match="smooth=-1"):
        attributors.create("input_x_gradient", clf, smooth=-1)


def test_integrated_gradients_are_complete(models):
    clf = models("average")
    images = pictures(clf)
    maps = create("integrated_gradients", clf, n_steps=60).attribute(images, 2)
    change = (clf(images) - clf(torch.zeros_like(images)))[:, 2]
    assert torch.allclose(maps.sum(dim=(1, 2, 3)), change, rtol=0.02, atol=0.02 * change.abs().max())
    with pytest.raises(ValueError, match="n_steps=0"):
        create("integrated_gradients", clf, n_steps=0)


def test_missing_captum_names_the_extra(models, monkeypatch):
    monkeypatch.setitem(sys.modules, "captum", None)
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    with pytest.raises(ImportError, match=r"aha-attribution\[captum\]"):
        attributors.create("integrated_gradients", models("vit"))


class Corner(nn.Module):
    """Sees only the mean of the upper left quarter."""

    def forward(self, pixels):
        height, width = pixels.shape[2] // 2, pixels.shape[3] // 2
        score = pixels[:, :, :height, :width].mean(dim=(1, 2, 3))
        return torch.stack([4 * score, torch.zeros_like(score)], dim=1)


def test_rise_by_hand():
    clf = Classifier.wrap(Corner(), (0.2,) * 3, (0.5,) * 3, input_size=(20, 24), num_classes=2)
    images = pictures(clf)
    method = attributors.create("rise", clf, n_masks=50, cells=4, seed=3, internal_batch_size=7)
    masks = torch.cat(list(method.masks(20, 24, chunk=50)))
    assert masks.shape == (50, 20, 24)
    assert 0 <= masks.min() < masks.max() <= 1
    assert torch.equal(masks, torch.cat(list(method.masks(20, 24, chunk=3))))
    expected = torch.zeros(3, 20, 24)
    for mask in masks:
        confidence = clf.forward_normalized(clf.normalize(images) * mask).softmax(dim=1)[:, 0]
        expected += confidence[:, None, None] * mask
    maps = method.attribute(images, 0)
    assert torch.allclose(maps[:, 0], expected / masks.sum(0), atol=1e-5)


def test_rise_finds_the_evidence_and_is_unbiased():
    clf = Classifier.wrap(Corner(), input_size=(24, 24), num_classes=2)
    images = torch.ones(1, 3, 24, 24)
    method = attributors.create("rise", clf, n_masks=2000)
    maps = method.attribute(images, 0)[0, 0]
    assert maps[:12, :12].mean() > maps[12:, 12:].mean() + 0.01
    # far from the evidence a mask says nothing about the confidence: there the map is its plain mean
    masks = torch.cat(list(method.masks(24, 24, 500)))
    assert masks.mean() == pytest.approx(0.5, abs=0.02)
    mean = clf(images * masks[:, None]).softmax(1)[:, 0].mean()
    assert torch.allclose(maps[18:, 18:], mean, atol=0.01)
    # a classifier that does not look gives a constant map, whatever the masks happened to cover
    blind = Classifier.wrap(Blind(), input_size=(24, 24), num_classes=2)
    flat = attributors.create("rise", blind, n_masks=20).attribute(images, 0)
    assert torch.allclose(flat, torch.full((), 0.5), atol=1e-5)


class Blind(nn.Module):
    def forward(self, pixels):
        return pixels.new_zeros(len(pixels), 2)


@pytest.mark.parametrize("name", ["random", "rise"])
def test_seeds(models, name):
    clf = models("vit")
    images = pictures(clf)
    one, same, other = (create(name, clf, seed=seed).attribute(images) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    create(name, clf).attribute(images)
    assert torch.equal(torch.get_rng_state(), before)  # the caller's generator is left alone


def test_random_maps_differ_between_images(models):
    clf = models("vit")
    maps = attributors.create("random", clf).attribute(pictures(clf))
    assert 0 <= maps.min() < maps.max() < 1
    correlation = torch.corrcoef(maps.flatten(1))
    assert correlation[0, 1].abs() < 0.15


def test_rise_refusals(models):
    for options in ({"n_masks": 0}, {"cells": 0}, {"p": 1.0}):
        with pytest.raises(ValueError, match=next(iter(options))):
            attributors.create("rise", models("vit"), **options)


def test_registry(models):
    assert set(NAMES) <= set(attributors.available())
    assert list(attributors.available()) == sorted(attributors.available())
    for name, metadata in attributors.available().items():
        assert isinstance(metadata, Metadata)
        assert metadata.paper, name
        assert metadata.fidelity, name
    with pytest.raises(ValueError, match=r"'rolout' is not known \(did you mean 'rollout'\?\): choose one of") as error:
        attributors.create("rolout", models("vit"))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="registered already"):
        register("rise")(Attributor)


def test_registering_a_method(models):
    class Bright(Attributor):
        metadata = Metadata("none", "none", "any", "ours")
        class_specific = False

        def _attribute(self, images, target):
            return images.mean(dim=1, keepdim=True)

    try:
        register("bright")(Bright)
        maps = attributors.create("bright", models("vit")).attribute(pictures(models("vit")))
        assert maps.shape == (3, 1, 32, 32)
        assert Bright.name == "bright"
    finally:
        _REGISTRY.pop("bright", None)


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_a_pass_may_start_at_any_block(models, kind):
    clf = models(kind)
    images = pictures(clf, 2)
    method = attributors.create("rollout", clf)
    seen = []
    handle = method.blocks[2].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    expected = clf(images)
    handle.remove()
    executed = []
    handles = [
        next(block.children()).register_forward_hook(lambda *_, i=i: executed.append(i))
        for i, block in enumerate(method.blocks)
    ]
    with method.starting_at(2, seen[0]):
        assert torch.allclose(clf(torch.zeros_like(images)), expected, atol=1e-6)
    assert executed == [2]
    for handle in handles:
        handle.remove()
    assert torch.equal(clf(images), expected)
    assert all("forward" not in vars(block) for block in method.blocks)


def test_passes_are_counted(models):
    clf = models("vit")
    images = pictures(clf)
    for name, forward, backward in (("rollout", 3, 0), ("input_x_gradient", 3, 3), ("rise", 36, 0)):
        with attributors.count_passes(clf) as passes:
            create(name, clf, internal_batch_size=2).attribute(images, 0)
        assert (passes.forward, passes.backward) == (forward, backward), name
    assert not clf.module._forward_hooks
