"""What methods say they take is what goes through the classifier."""

import dataclasses

import pytest
import torch
from torch import nn

from aha import Explainer, attributors
from aha.attributors.base import _REGISTRY, Attributor, Metadata, register
from aha.classifier import Classifier
from aha.explainer import encoder

from ..toys import TINY_DECODER
from . import test_matrix
from .architectures import make, pictures

# options that change the passes: variant of the table in test_matrix, kind of classifier, options
CASES = [
    *((variant, "vit", {}) for variant in test_matrix.METHODS),
    *((variant, "convnext", {}) for variant, (_, accepted) in test_matrix.METHODS.items() if "convnext" in accepted),
    ("ablationcam", "swin", {}),
    ("aha", "vit", {"steps": 2}),
    ("aha", "vit", {"steps": 1, "references": ("mean",), "fractions": 4}),
    ("attention_ig", "vit", {"n_steps": 5}),
    ("bi_attention", "vit", {"n_steps": 3}),
    ("caap", "oblong", {"first": 0, "last": 2}),
    ("chefer by gradient", "average", {}),
    ("gradcam_vit", "vit", {"weights": "element"}),
    ("integrated_gradients", "vit", {"n_steps": 7}),
    ("kernel_shap", "convnext", {"n_samples": 100, "cells": 2}),  # all 16 coalitions
    ("kernel_shap", "vit", {"n_samples": 15}),
    ("scorecam", "resnet", {"layer": "layer2"}),
    ("tis", "vit", {"n_masks": 1000}),  # as many as there are channels
    ("vit_cx", "oblong", {"threshold": 0.3}),
]
# they ask the classifier how many channels or masks there are
ASKING = ("ablationcam", "mda", "scorecam", "vit_cx")


def counted(method, images):
    target = method.clf(images).argmax(dim=1)
    with attributors.count_passes(method.clf) as seen:
        method.attribute(images, target)
    return dataclasses.asdict(seen)


def described(case):
    return "-".join(map(str, (case[0], case[1], *case[2].values())))


@pytest.mark.parametrize(("variant", "kind", "options"), CASES, ids=map(described, CASES))
def test_passes_are_those_that_are_counted(models, variant, kind, options):
    clf = models(kind)
    images = pictures(clf)
    method = test_matrix.create(variant, clf, kind, internal_batch_size=2, **options)
    with attributors.count_passes(clf) as asked:
        passes = method.passes(images)
    assert passes is not method.passes(images)  # nobody's to change
    assert passes * 3 == attributors.Passes(**counted(method, images))
    if method.name not in ASKING:
        assert asked == attributors.Passes(), "it went through the classifier to know"
    assert passes != attributors.Passes() or method.name == "random" or method.name in test_matrix.OBJECTIVES


def test_every_method_has_a_case():
    assert {variant.split()[0] for variant, *_ in CASES} == set(attributors.available())


def test_a_method_that_says_nothing_is_counted():
    class Twice(Attributor):
        metadata = Metadata("none", "none", "any", "ours")

        def _attribute(self, images, target):
            images = images.requires_grad_()
            score = (self.clf(images) + self.clf(1 - images)).gather(1, target[:, None]).sum()
            return torch.autograd.grad(score, images)[0].sum(dim=1, keepdim=True)

    try:
        method = register("twice")(Twice)(make("vit"))
        assert method.passes(pictures(method.clf)) == attributors.Passes(2, 2)
    finally:
        _REGISTRY.pop("twice", None)


def explainers():
    plain = make("vit")
    yield plain, Explainer.build(plain, evidence=False, decoder=TINY_DECODER), 1
    # features by hooks, in a pass like any other
    torch.manual_seed(0)
    module = nn.Sequential(
        *(layer for at, of in ((3, 8), (8, 8), (8, 8), (8, 8)) for layer in (nn.Conv2d(at, of, 3, 2, 1), nn.ReLU())),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    own = Classifier.wrap(module, (0.5,) * 3, (0.5,) * 3, 32)
    yield own, Explainer.build(own, evidence=False, decoder=TINY_DECODER), 1
    # an encoder of its own sees the images in the classifier's place
    other = make("vit")
    explainer = Explainer.build(other, evidence=False, decoder=TINY_DECODER)
    yield plain, Explainer(explainer.encoder, explainer.decoder, plain, explainer.settings), 0


def test_an_explainer_that_reads_the_classifier_s_features_takes_a_pass():
    for clf, explainer, expected in explainers():
        images = pictures(clf)
        method = attributors.create("aha", clf, explainer=explainer)
        assert method.passes(images) == attributors.Passes(expected)
        assert counted(method, images) == {"forward": 3 * expected, "backward": 0}


def test_features_of_transformers_models_count():
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=4, num_attention_heads=3, intermediate_size=48, image_size=32, patch_size=8
    )
    config.num_labels = 4
    torch.manual_seed(0)
    module = transformers.ViTForImageClassification(config)
    from aha.classifier import HFLogits

    clf = Classifier.wrap(HFLogits(module), (0.5,) * 3, (0.5,) * 3, 32)
    method = attributors.create("aha", clf, explainer=Explainer.build(clf, evidence=False, decoder=TINY_DECODER))
    assert counted(method, pictures(clf)) == {"forward": 3, "backward": 0}
    assert method.passes(pictures(clf)) == attributors.Passes(1)


@pytest.mark.parametrize("kind", ["bf16", "half", "one logit", "one logit, flat"])
def test_backward_passes_are_seen_where_the_logits_that_are_read_are_a_copy(kind):
    width = 1 if kind.startswith("one") else 3
    layers = [nn.Flatten(), nn.Linear(48, width), *[nn.Flatten(0)] * kind.endswith("flat")]
    module = nn.Sequential(*layers).to(torch.bfloat16 if kind == "half" else torch.float32)
    clf = Classifier.wrap(module, input_size=(4, 4))
    pixels = torch.rand(5, 3, 4, 4, requires_grad=True)
    with attributors.count_passes(clf) as seen, torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
        clf.forward_normalized(pixels)[:, 1].sum().backward()
    assert seen == attributors.Passes(5, 5)


def test_counting_leaves_no_hooks():
    clf = make("vit")
    with attributors.count_passes(clf):
        # one on all modules would slow down what is timed
        assert not nn.modules.module._has_any_global_hook()
    with pytest.raises(ZeroDivisionError), attributors.count_passes(clf):
        raise ZeroDivisionError
    assert not clf.module._forward_hooks
    assert not encoder.READING
