"""Every registered method on every kind of architecture: what it accepts, what it refuses, and its maps."""

import copy
import functools

import pytest
import torch

from aha import Explainer, attributors
from aha.attributors import libragrad, mda

from ..toys import TINY_DECODER
from .architectures import CAIT, MIXERS, PYRAMIDS, TRANSFORMERS, assert_refused, pictures
from .architectures import KINDS as ALL

# few of a random LCNet's channels reach its logits, and with rounding these are others
KINDS = [kind for kind in ALL if kind != "lcnet"]
ANY = {*KINDS}
ATTENTION = {*TRANSFORMERS}
TOKENS = {*TRANSFORMERS, *MIXERS}
MAPS = {*TRANSFORMERS, *CAIT, *PYRAMIDS} & ANY
# variant, the registered name its first word: options, few passes among them, and what it accepts
METHODS = {
    "ablationcam": ({}, MAPS),
    "aha": ({}, ANY),
    "attcam": ({}, ATTENTION),
    "attention_ig": ({"n_steps": 2}, ATTENTION),
    "bi_attention": ({"n_steps": 2}, ATTENTION),
    "bi_attention by token": ({"n_steps": 2, "level": "token"}, ATTENTION - {"parallel"}),  # has no attention module
    "caap": ({}, ATTENTION),
    "chefer": ({}, ATTENTION),
    "chefer by gradient": ({"relevance": "gradient"}, ATTENTION),
    "fastshap": ({}, ANY),
    "fullgrad_plus": ({}, TOKENS),
    "gradcam": ({}, MAPS),
    "gradcam_pp": ({}, MAPS),
    "gradcam_vit": ({}, ATTENTION),
    "hirescam": ({}, MAPS),
    "input_x_gradient": ({}, ANY),
    "integrated_gradients": ({"n_steps": 2}, ANY),
    "kernel_shap": ({"n_samples": 16}, ANY),
    "legrad": ({}, ATTENTION),
    "libragrad of attcam": ({}, ATTENTION),
    "libragrad of chefer": ({}, ATTENTION),
    "libragrad of fullgrad_plus": ({}, TOKENS),
    "libragrad of gradcam": ({}, MAPS),
    "libragrad of gradcam_vit": ({}, ATTENTION),
    "libragrad of input_x_gradient": ({}, ANY),
    "libragrad of integrated_gradients": ({"n_steps": 2}, ANY),
    "lime": ({"n_samples": 16}, ANY),
    "mda": ({"window": 1}, ANY),
    "random": ({}, ANY),
    "raw_attention": ({}, ATTENTION),
    "rise": ({"n_masks": 4}, ANY),
    "rollout": ({}, ATTENTION),
    "scorecam": ({}, MAPS),
    "tis": ({"n_masks": 4}, ATTENTION - {"beit"}),  # a bias by relative position needs the whole grid
    "transition_attention": ({"n_steps": 2}, ATTENTION),
    "vit_cx": ({}, {*TRANSFORMERS, *CAIT}),
    "vit_shapley": ({}, ATTENTION - {"attention_pool"}),  # its pooling would see what is absent
}
# in float64: small differences of scores, and gradients where rounding may move a ReLU across zero
PRECISE = ("caap", "input_x_gradient", "kernel_shap", "libragrad of input_x_gradient", "lime", "mda")
# clipped at zero, so that nothing may be left
CLIPPED = ("ablationcam", "gradcam", "gradcam_pp", "gradcam_vit", "hirescam", "scorecam")
EMPTY = {("scorecam", "attention_pool"), ("gradcam_vit", "eva02_scaled")}
OBJECTIVES = {"aha": "ranking", "fastshap": "fastshap", "vit_shapley": "vit_shapley"}


@functools.cache
def untrained(clf):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Explainer.build(clf, evidence=False, decoder=TINY_DECODER)


def create(variant, clf, kind, **options):
    name, _, base = variant.partition(" of ")
    name = name.split()[0]
    options = {**METHODS[variant][0], **options}
    if base:
        options["base"] = base
    if "integrated_gradients" in (name, base):
        pytest.importorskip("captum")
    if name == "mda" and kind not in TRANSFORMERS:
        options["cells"] = 3
    if name in OBJECTIVES:
        explainer = untrained(clf)
        explainer.settings.update(objective=OBJECTIVES[name], references=("mean",))
        options["explainer"] = explainer
    return attributors.create(name, clf, **options)


@pytest.fixture(scope="module")
def doubles(models):
    return functools.cache(lambda kind: copy.deepcopy(models(kind)).double())


def test_the_table_has_every_method():
    assert {variant.split()[0] for variant in METHODS} == {*attributors.available()}
    assert {variant.split()[-1] for variant in METHODS if " of " in variant} == {*libragrad.BASES}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", METHODS)
def test_method_on_architecture(models, doubles, monkeypatch, variant, kind):
    if kind not in METHODS[variant][1]:
        last = variant.split(" of ")[-1].split()[0]
        assert_refused(lambda clf: create(variant, clf, kind), models(kind), f"{last} .*accepts|{last} .*needs")
        return
    clf = doubles(kind) if variant in PRECISE else models(kind)
    # the 34 stronger blurs that random weights ask for say nothing new
    monkeypatch.setattr(mda, "BLUR_LARGEST", 33)
    images = pictures(clf, 2)
    target = [1, 3]
    # two images' perturbed copies do not fit one pass, those of one do or nearly do
    method = create(variant, clf, kind, internal_batch_size=20)
    maps = method.attribute(images, target)
    assert maps.shape == (2, 1, *clf.input_size)
    assert maps.dtype == torch.float32
    assert torch.isfinite(maps).all()
    alone = torch.cat([method.attribute(image[None], [t]) for image, t in zip(images, target, strict=True)])
    # Ablation-CAM divides by logits, Score-CAM is a softmax over them
    bound = 1e-4 if variant in ("ablationcam", "scorecam") else 1e-5
    assert (maps - alone).abs().max() <= bound * maps.abs().max()
    if variant.split()[-1] in CLIPPED:
        maps = torch.cat([maps, method.attribute(images, [0, 2])])
        assert (maps.flatten(1).std(dim=1) > 0).any() == ((variant, kind) not in EMPTY)
    else:
        assert (maps.flatten(1).std(dim=1) > 0).all()
