"""What is read of timm's networks, against what the networks do."""

import pytest
import torch
from torch import nn

from aha.structure import feature_count, made_for, transformer, uniform_patch

from .attributors.architectures import MIXERS, PYRAMIDS, TRANSFORMERS, make

PREFIX = {"registers": 5, "average": 0, "attention_pool": 0, "distilled": 2, "dinov3": 5}


def tokens_of(clf, found, images):
    """Tokens (B, T, D) that enter the last block."""
    seen = []
    handle = found.blocks[-1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        clf(images)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_tokens_are_prefix_and_patches(kind):
    clf = make(kind)
    found = transformer(clf.module)
    height, width = clf.input_size
    assert found.plain
    assert found.grid(height, width) == (height // 8, width // 8)
    assert found.patch == (8, 8)
    assert found.prefix == PREFIX.get(kind, 1)
    tokens = tokens_of(clf, found, torch.rand(1, 3, height, width))
    assert tokens.shape == (1, found.prefix + height * width // 64, found.channels)
    assert made_for(clf.module) == (height, width)
    assert uniform_patch(clf.module) == 8
    assert feature_count(clf.module) == len(found.blocks)


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_logits_depend_on_the_readout_alone(kind):
    clf = make(kind)
    found = transformer(clf.module)
    seen = []

    def keep(_module, _args, out):
        seen.append(out.detach().requires_grad_())
        return seen[-1]

    handle = found.blocks[-1].register_forward_hook(keep)
    logits = clf(torch.rand(1, 3, *clf.input_size))
    handle.remove()
    (gradient,) = torch.autograd.grad(logits[0, 1], seen[0])
    count = gradient.shape[1]
    read = (gradient[0].abs().amax(dim=1) > 0).nonzero()[:, 0].tolist()
    assert read == list(range(count))[found.readout]


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_softmaxes_give_rows_that_sum_to_one(kind):
    clf = make(kind)
    found = transformer(clf.module)
    softmaxes = found.softmaxes
    assert len(softmaxes) == len(found.blocks) == len(found.attentions)
    for module in clf.module.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    sums = []
    for module in softmaxes:
        module.register_forward_hook(lambda _module, _args, out: sums.append(out.sum(dim=-1)))
    with torch.no_grad():
        clf(torch.rand(1, 3, *clf.input_size))
    assert len(sums) == len(softmaxes)
    for values in sums:
        torch.testing.assert_close(values, torch.ones_like(values))


@pytest.mark.parametrize("kind", MIXERS)
def test_mixers_are_asked_for(kind):
    clf = make(kind)
    assert transformer(clf.module) is None
    found = transformer(clf.module, mixers=True)
    assert (found.prefix, found.grid(32, 32), found.softmaxes, found.plain) == (0, (4, 4), None, False)
    assert tokens_of(clf, found, torch.rand(1, 3, 32, 32)).shape[1] == 16


def test_other_networks_are_none():
    found = transformer(make("cait").module)
    assert found.softmaxes is None and not found.plain
    for kind in PYRAMIDS:
        module = make(kind).module
        assert transformer(module, mixers=True) is None, kind
        assert uniform_patch(module) is None, kind
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    assert (transformer(plain), made_for(plain), uniform_patch(plain), feature_count(plain)) == (None, None, None, 0)
