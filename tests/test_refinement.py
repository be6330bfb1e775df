"""Test-time refinement: independent per image, faithful to T = 0, the explainer untouched."""

import copy

import pytest
import torch
import torch.nn.functional as F

import aha
from aha.kernels import native
from aha.objective import Objective, strata
from aha.references import REFERENCES, make
from aha.refinement import PRESETS, TEMPERATURE
from aha.regions import grid

from .toys import TINY_DECODER, pictures, tiny_classifier

OPTIONS = {"precision": "fp32", "cells": (6,), "fractions": 4, "chunk": 32}


def loss_of(explainer, classifier, images, maps, target, cells=6):
    blank = [make(name, images, classifier.mean_colour) for name in REFERENCES]
    objective = Objective(classifier, fractions=6)
    tau = explainer.settings["temperature"]
    return objective(images, maps, target, blank, grid(*images.shape[-2:], cells), tau).loss


def test_zero_steps_is_attribute(explainer, classifier, images):
    maps = aha.refine(explainer, classifier, images, steps=0)
    torch.testing.assert_close(maps, explainer.attribute(images))


def test_the_explainer_is_untouched(explainer, classifier, images):
    explainer.train()
    before = copy.deepcopy(explainer.state_dict())
    flags = [p.requires_grad for p in explainer.parameters()]
    aha.refine(explainer, classifier, images, steps=2, **OPTIONS)
    after = explainer.state_dict()
    assert explainer.training
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert flags == [p.requires_grad for p in explainer.parameters()]
    assert all(p.grad is None for p in explainer.parameters())


def test_images_do_not_see_each_other(explainer, classifier, images):
    def refined(images, **options):
        return aha.refine(explainer, classifier, images, steps=3, **{**OPTIONS, **options})

    together = refined(images)
    moved = (together - explainer.attribute(images)).abs().max()
    alone = torch.cat([refined(image[None]) for image in images])
    for other in (alone, refined(images, internal_batch_size=2), refined(images, chunk=6)):
        assert (together - other).abs().max() < 1e-3 * moved
    trail = refined(images, every_step=True)
    assert torch.equal(trail[0], explainer.attribute(images))
    assert torch.equal(trail[-1], together)
    assert torch.equal(trail[2], aha.refine(explainer, classifier, images, steps=2, **OPTIONS))


def test_nothing_is_random(explainer, classifier, images):
    torch.manual_seed(0)
    one = aha.refine(explainer, classifier, images, steps=2, **OPTIONS)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(drawn, torch.rand(1))
    assert torch.equal(one, aha.refine(explainer, classifier, images, steps=2, **OPTIONS))


def test_two_steps_by_hand(explainer, classifier, images):
    image, target = images[:1], classifier.resolve_target(images[:1])
    start = explainer.attribute(image, target)
    sides = (2, 3, 6)  # 6 cells, half and a quarter of them
    levels = [torch.zeros(1, 1, side, side, requires_grad=True) for side in sides]

    def maps():
        enlarged = [F.interpolate(level, (32, 32), mode="bilinear", align_corners=False) for level in levels]
        return start + start.std(correction=0) * sum(enlarged)

    objective = Objective(classifier)
    mean, square = [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]
    for turn, name in enumerate(("black", "mean")):
        fractions, weights = strata(4, (0.5 + turn * (5**0.5 - 1) / 2) % 1)
        blank = [make(name, image, classifier.mean_colour)]
        arguments = (image, maps(), target, blank, grid(32, 32, 6), TEMPERATURE)
        loss = objective(*arguments, fractions=fractions, weights=weights).loss
        gradients = torch.autograd.grad(loss.sum(), levels)
        for i, gradient in enumerate(gradients):
            mean[i] = 0.5 * mean[i] + 0.5 * gradient
            square[i] = 0.9 * square[i] + 0.1 * gradient.square()
            size = (square[i] / (1 - 0.9 ** (turn + 1))).sqrt()
            direction = mean[i] / (1 - 0.5 ** (turn + 1)) / (size + 1e-3 * size.max())
            levels[i] = (levels[i] - 0.05 * direction).detach().requires_grad_()
    actual = aha.refine(explainer, classifier, image, target, steps=2, lr=0.05, **OPTIONS)
    assert (actual - maps()).abs().max() < 1e-3 * (actual - start).abs().max()


def test_the_loss_falls(explainer, classifier, images):
    target = classifier.resolve_target(images)
    trail = aha.refine(explainer, classifier, images, target, steps=6, every_step=True, **OPTIONS)
    assert trail.shape == (7, 3, 1, 32, 32)
    losses = torch.stack([loss_of(explainer, classifier, images, maps, target) for maps in trail])
    assert (losses[-1] < losses[0]).all()
    assert losses[-1].mean() < losses[2].mean() < losses[0].mean()


def test_presets(explainer, classifier, images):
    assert sum(PRESETS["default"].passes) + sum(explainer.passes) <= 120
    target = classifier.resolve_target(images)
    losses, passes = [], []
    for preset in ("fast", "default", "best"):
        maps = aha.refine(explainer, classifier, images, target, preset=preset, cells=(6,), precision="fp32")
        losses.append(float(loss_of(explainer, classifier, images, maps, target).mean()))
        passes.append(PRESETS[preset].passes)
    assert losses[0] > losses[1] > losses[2]
    assert passes[0] < passes[1] < passes[2]
    taken = aha.refine(explainer, classifier, images, target, precision="fp32")
    steps = PRESETS["default"].steps
    torch.testing.assert_close(taken, aha.refine(explainer, classifier, images, target, steps, precision="fp32"))
    with pytest.raises(ValueError, match="preset='slow' is not known: choose one of fast, default, best"):
        aha.refine(explainer, classifier, images, preset="slow")


@pytest.mark.parametrize(
    "options", [{"steps": 2}, {"preset": "fast"}, {"steps": 1, "fractions": 3, "references": ("blur",)}]
)
def test_passes_are_what_hooks_count(explainer, classifier, images, options):
    seen = [0, 0]

    def forward(module, inputs, logits):
        seen[0] += len(logits)
        if logits.requires_grad:
            logits.register_hook(backward)

    def backward(gradient):
        seen[1] += len(gradient)

    target = classifier.resolve_target(images)
    handle = classifier.module.register_forward_hook(forward)
    aha.refine(explainer, classifier, images, target, **options)
    handle.remove()
    method = aha.attributors.create("aha", classifier, explainer=explainer, **{"steps": None, **options})
    # the features of the explainer, which a hook on the whole classifier does not see
    expected = method.passes(images) + aha.attributors.Passes(-1)
    assert tuple(seen) == (len(images) * expected.forward, len(images) * expected.backward)


def test_an_image_without_a_gradient_stays(explainer, images):
    class Blind(torch.nn.Module):
        def forward(self, pixels):
            return 0 * pixels.mean(dim=(2, 3)) + torch.tensor([0.0, 1.0, 2.0])

    blind = aha.Classifier.wrap(Blind(), input_size=(32, 32))
    start = torch.zeros_like(images[:, :1])
    own = explainer.of(explainer.classifier)
    own.attribute = lambda images, target: start[: len(images)]
    assert torch.equal(aha.refine(own, blind, images, 1, steps=2, **OPTIONS), start)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 48)])
def test_down_to_one_pixel_per_cell(height, width):
    classifier = tiny_classifier(img_size=(height, width))
    torch.manual_seed(1)
    explainer = aha.Explainer.build(classifier, evidence=False, decoder=TINY_DECODER)
    images = pictures(2, 48)[..., :height, :width]
    target = classifier.resolve_target(images)
    trail = aha.refine(explainer, classifier, images, target, steps=3, every_step=True, **{**OPTIONS, "cells": (32,)})
    losses = torch.stack([loss_of(explainer, classifier, images, maps, target, 32) for maps in trail])
    assert (losses[-1] < losses[0]).all()
    coarse = aha.refine(explainer, classifier, images, target, steps=3, **OPTIONS)
    assert (trail[-1] - coarse).abs().max() > 0
    with pytest.raises(ValueError, match=r"a grid of 33×.* does not fit"):
        aha.refine(explainer, classifier, images, target, steps=1, **{**OPTIONS, "cells": (33,)})


@pytest.mark.skipif(native.load("_C") is not None, reason=f"aha._C: {native.load('_C')}")
def test_every_pixel_of_a_photograph():
    # 50,176 cells: one matrix would take 10 GB
    classifier = tiny_classifier(img_size=224, patch_size=32)
    torch.manual_seed(1)
    explainer = aha.Explainer.build(classifier, evidence=False, decoder=TINY_DECODER)
    images, target = pictures(1, 224), torch.tensor([2])
    trail = aha.refine(explainer, classifier, images, target, steps=1, every_step=True, **{**OPTIONS, "cells": (224,)})
    first, last = (loss_of(explainer, classifier, images, maps, target, 224) for maps in trail)
    assert (last < first).all()


def test_every_reference_meets_every_grid(explainer, classifier, images, monkeypatch):
    seen, call = [], Objective.__call__

    def recorded(self, images, maps, target, references, regions, tau, **options):
        seen.append((float(references[0].sum()), regions.rows, tuple(options["fractions"].tolist())))
        return call(self, images, maps, target, references, regions, tau, **options)

    monkeypatch.setattr(Objective, "__call__", recorded)
    aha.refine(explainer, classifier, images, 0, steps=9, **{**OPTIONS, "cells": (5, 6, 7)})
    assert len({(blank, rows) for blank, rows, _ in seen}) == 9
    assert len({blank for blank, *_ in seen[:3]}) == len({rows for _, rows, _ in seen[:3]}) == 3
    first = sorted(fractions[0] for *_, fractions in seen)
    # nine shifts of one stratum, nowhere further apart than twice the even distance
    u = torch.tensor(first) ** (1 / 1.5) * 4
    assert u.diff().max() < 2 / 9


def test_another_classifier_can_be_the_target(explainer, images):
    other = tiny_classifier(seed=5)
    target = other.resolve_target(images)
    ours = aha.refine(explainer, explainer.classifier, images, target, steps=2, **OPTIONS)
    theirs = aha.refine(explainer, other, images, target, steps=2, **OPTIONS)
    assert (ours - theirs).abs().max() > 1e-5


@pytest.mark.parametrize("cells", [16, "16", ()])
def test_bad_cells(explainer, classifier, images, cells):
    with pytest.raises(ValueError, match="one number a grid"):
        aha.refine(explainer, classifier, images, cells=cells)


def test_negative_steps(explainer, classifier, images):
    with pytest.raises(ValueError, match="an integer ≥ 0"):
        aha.refine(explainer, classifier, images, steps=-1)
