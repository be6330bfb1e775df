"""Test-time refinement: independent per image, faithful to T = 0, the explainer untouched."""

import copy

import pytest
import torch

import aha
from aha.kernels import native
from aha.objective import Objective
from aha.references import REFERENCES, make
from aha.regions import grid

from .toys import TINY_DECODER, pictures, tiny_classifier

OPTIONS = {"precision": "fp32", "cells": (6,), "fractions": 6, "chunk": 32, "lr": 5e-3}


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
    together = aha.refine(explainer, classifier, images, steps=3, **OPTIONS)
    alone = torch.cat([aha.refine(explainer, classifier, image[None], steps=3, **OPTIONS) for image in images])
    split = aha.refine(explainer, classifier, images, steps=3, internal_batch_size=2, **OPTIONS)
    trail = aha.refine(explainer, classifier, images, steps=3, internal_batch_size=2, every_step=True, **OPTIONS)
    moved = (together - explainer.attribute(images)).abs().max()
    assert (together - alone).abs().max() < 1e-3 * moved
    assert (together - split).abs().max() < 1e-3 * moved
    assert torch.equal(trail[-1], split)


def test_one_step_is_adamw_on_a_copy_of_the_head(explainer, classifier, images):
    image, target = images[:1], classifier.resolve_target(images[:1])
    own = copy.deepcopy(explainer).eval()
    object.__setattr__(own, "classifier", classifier)
    optimizer = torch.optim.AdamW(own.decoder.head.parameters(), lr=OPTIONS["lr"], weight_decay=0.0)
    before = loss_of(explainer, classifier, image, own(image, target), target)
    before.sum().backward()
    optimizer.step()
    with torch.no_grad():
        expected = own(image, target)
    assert loss_of(explainer, classifier, image, expected, target) < before  # else the step would be refused
    actual = aha.refine(explainer, classifier, image, target, steps=1, **OPTIONS)
    # a constant shift has no gradient but rounding noise, which the copy follows and refinement leaves out
    difference = (actual - actual.mean()) - (expected - expected.mean())
    moved = (actual - explainer.attribute(image, target)).abs().max()
    assert difference.abs().max() < 1e-3 * moved


def test_the_loss_never_rises_whatever_the_learning_rate(explainer, classifier, images):
    target = classifier.resolve_target(images)
    options = {**OPTIONS, "lr": 0.3}
    trail = aha.refine(explainer, classifier, images, target, steps=6, every_step=True, **options)
    assert trail.shape == (7, 3, 1, 32, 32)
    torch.testing.assert_close(trail[-1], aha.refine(explainer, classifier, images, target, steps=6, **options))
    losses = torch.stack([loss_of(explainer, classifier, images, maps, target) for maps in trail])
    assert (losses.diff(dim=0) <= 1e-6).all()
    assert (losses[-1] < losses[0]).any()


@pytest.mark.parametrize(("height", "width"), [(32, 32), (32, 48)])
def test_down_to_one_pixel_per_cell(height, width):
    classifier = tiny_classifier(img_size=(height, width))
    torch.manual_seed(1)
    explainer = aha.Explainer.build(classifier, evidence=False, decoder=TINY_DECODER)
    images = pictures(2, 48)[..., :height, :width]
    target = classifier.resolve_target(images)
    trail = aha.refine(explainer, classifier, images, target, steps=3, every_step=True, **{**OPTIONS, "cells": (32,)})
    losses = torch.stack([loss_of(explainer, classifier, images, maps, target, 32) for maps in trail])
    assert (losses.diff(dim=0) <= 1e-6).all()
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


def test_references_take_the_grids_in_turn(explainer, classifier, images):
    target = classifier.resolve_target(images)
    one = aha.refine(explainer, classifier, images, target, steps=1, **{**OPTIONS, "cells": (6,)})
    two = aha.refine(explainer, classifier, images, target, steps=1, **{**OPTIONS, "cells": (6, 7)})
    assert (one - two).abs().max() > 0


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
