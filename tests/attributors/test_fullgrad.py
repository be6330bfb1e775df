"""Full gradients and what is built from them: closed forms, terms gathered by hand, state."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aha import attributors
from aha.attributors import full_gradient, libra
from aha.classifier import Classifier
from aha.full_gradient import Constants

from .architectures import MIXERS, assert_refused, assert_well_behaved, make, pictures


class Affine(nn.Module):
    """(B, 3, 4, 4) → (B, 2), a·pixels + b."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 48))
        self.offset = nn.Parameter(torch.randn(2))

    def forward(self, pixels):
        return pixels.flatten(1) @ self.weight.T + self.offset


def test_full_gradient_of_an_affine_classifier():
    torch.manual_seed(0)
    module = Affine()
    clf = Classifier.wrap(module, (0.5,) * 3, (0.25,) * 3, input_size=(4, 4))
    images = pictures(clf, 2)
    terms = full_gradient(clf, images, [1, 0])
    weight = module.weight[[1, 0]].reshape(2, 3, 4, 4)
    assert torch.allclose(terms.inputs, clf.normalize(images) * weight, atol=1e-6)
    assert torch.allclose(terms.biases, module.offset[[1, 0]])
    assert torch.allclose(terms.logits, clf(images)[[0, 1], [1, 0]])
    assert terms.error.max() < 1e-5


def test_bias_terms_are_those_of_the_parameters():
    """For parameters that are added as they are, c⊙∂f/∂c is autograd's own."""
    clf = make("vit").double()
    module = clf.module
    images = pictures(clf, 2)
    added = [p for name, p in module.named_parameters() if name.endswith("bias") or name in ("pos_embed", "cls_token")]
    for parameter in added:
        parameter.requires_grad_(True)
    for image, target in zip(images, (3, 1), strict=True):
        gradients = torch.autograd.grad(clf(image[None])[0, target], added)
        expected = sum((p * g).sum() for p, g in zip(added, gradients, strict=True))
        terms = full_gradient(clf, image[None], target)
        assert torch.allclose(terms.biases, expected, rtol=1e-10)
    assert all(parameter.requires_grad for parameter in added)


def test_only_what_follows_the_cut_counts():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4, 6), nn.ReLU(True), nn.Linear(6, 2))
    clf = Classifier.wrap(module, input_size=(4, 4))
    images = pictures(clf, 2)
    total = full_gradient(clf, images, 1)
    last = full_gradient(clf, images, 1, at=module[-1])
    assert torch.allclose(last.biases, module[-1].bias[1].expand(2))
    hidden = module[:-1](images)
    assert torch.allclose(last.inputs, hidden * module[-1].weight[1], atol=1e-6)
    assert max(terms.error.max() for terms in (total, last)) < 1e-6
    assert not torch.allclose(total.biases, last.biases)
    with pytest.raises(ValueError, match="do not depend on what enters Linear") as error:
        full_gradient(clf, images, 1, at=nn.Linear(2, 2))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("function", "constant"),
    [
        (lambda x, c: x + c, 1),
        (lambda x, c: c + x, 1),
        (lambda x, c: x.add(c, alpha=3), 3),
        (lambda x, c: x - c, -1),
        (lambda x, c: c - x, 1),
        (lambda x, c: torch.rsub(x, c), 1),
        (lambda x, c: x.clone().add_(c), 1),
        (lambda x, c: x.clone().sub_(c), -1),
        (lambda x, c: torch.addcmul(c, x, torch.ones(3)), 1),
        (lambda x, c: torch.addcmul(x, c, torch.ones(3), value=2), 2),
        (lambda x, c: F.linear(x, torch.eye(3), c), 1),
        (lambda x, c: F.relu_(F.linear(x, torch.eye(3), c)), None),
        (lambda x, c: torch.stack([x, c.expand_as(x)]).sum(0), 1),
        (lambda x, c: torch.cat([x, c[None]]).sum(0, keepdim=True), 1),
        (lambda x, c: F.batch_norm(x, -c, torch.ones(3), eps=1e-12), 1),
        (lambda x, c: F.layer_norm(x, (3,), None, c), 1),
        (lambda x, c: F.group_norm(x, 1, None, c), 1),
        (lambda x, c: F.conv1d(x[..., None], torch.eye(3)[..., None], c)[..., 0], 1),
        (lambda x, c: x * c, 0),
        (lambda x, c: x + x, 0),
        (lambda x, c: x + 0.0, 0),
    ],
)
def test_constants_that_are_added(function, constant):
    x, c = torch.tensor([[0.5, -1.0, 2.0]], requires_grad=True), torch.tensor([0.3, 0.2, -0.7])
    found = []
    weights = torch.tensor([1.0, 2.0, -3.0])
    with Constants(lambda c: lambda gradient: found.append((c * gradient).sum())):
        y = function(x, c)
    (y * weights).sum().backward()
    # a ReLU in place after the sum: its mask is in the gradient
    mask = (x[0] + c > 0) if constant is None else constant
    expected = (weights * c * mask).sum()
    assert torch.allclose(torch.as_tensor(float(sum(found))), expected.detach(), atol=1e-6)


def test_hooks_and_flags_are_put_back():
    clf = make("vit")
    clf.module.set_grad_checkpointing(True)
    clf.module.blocks[1].requires_grad_(True)
    handle = clf.module.head.register_forward_hook(lambda *_: 1 / 0)
    for call in (
        lambda: full_gradient(clf, pictures(clf), 1, at=clf.module.blocks[0]),
        lambda: attributors.create("fullgrad_plus", clf).attribute(pictures(clf), 1),
        lambda: attributors.create("attcam", clf).attribute(pictures(clf), 1),
    ):
        with pytest.raises(ZeroDivisionError):
            call()
        assert not any(m._forward_pre_hooks for m in clf.modules())
        assert [m for m in clf.modules() if m._forward_hooks] == [clf.module.head]
        assert clf.module.grad_checkpointing
        assert clf.module.blocks[1].mlp.fc1.weight.requires_grad
        assert not clf.module.blocks[0].mlp.fc1.weight.requires_grad
        assert clf.module.blocks[0].attn.fused_attn
    handle.remove()


def shares_by_hand(clf, image, target):
    """Per token, from the outputs of the modules that have a bias; (T,) for one image."""
    blocks = list(clf.module.blocks)
    hidden, outputs = [], []
    handles = [
        b.register_forward_pre_hook(lambda _m, args: (hidden.append(args[0].clone()), hidden[-1])[1]) for b in blocks
    ]
    for stage, part in [*enumerate(blocks, start=1), (len(blocks), clf.module.norm)]:
        for name, module in part.named_modules():
            bias = getattr(module, "beta", getattr(module, "bias", None))
            mixing = name.startswith(("mlp_tokens", "linear_tokens")) or name == "mlp_channels.gate.proj"
            if bias is not None and not mixing:
                keep = lambda _m, _a, out, stage=stage, bias=bias: outputs.append((stage, bias, out))  # noqa: E731
                handles.append(module.register_forward_hook(keep))
    logit = clf(image[None].clone().requires_grad_())[0, target]
    for handle in handles:
        handle.remove()
    gradients = torch.autograd.grad(logit, [*hidden, *(out for _, _, out in outputs)])
    shares = 0
    for h, g in zip(hidden, gradients, strict=False):
        shares = shares + (h * g)[0].sum(-1) / len(blocks)
    for (stage, bias, _), g in zip(outputs, gradients[len(hidden) :], strict=True):
        shares = shares + (bias * g)[0].sum(-1) * stage / len(blocks)
    return shares.detach()


@pytest.mark.parametrize("kind", ["vit", "registers", "oblong", *MIXERS])
@pytest.mark.parametrize("inside", [True, False])
def test_fullgrad_plus_by_hand(models, kind, inside):
    clf = models(kind)
    images, target = pictures(clf, 2), [1, 3]
    context = libra(clf.module) if inside else attributors.undisturbed(clf)
    with context:
        shares = torch.stack([shares_by_hand(clf, image, t) for image, t in zip(images, target, strict=True)])
    rows, cols = (size // 8 for size in clf.input_size)
    prefix = getattr(clf.module, "num_prefix_tokens", 0)
    grid = shares[:, prefix:].reshape(2, 1, rows, cols)
    expected = F.interpolate(grid, clf.input_size, mode="bilinear", align_corners=False)
    name, options = ("libragrad", {"base": "fullgrad_plus"}) if inside else ("fullgrad_plus", {})
    maps = attributors.create(name, clf, **options).attribute(images, target)
    assert torch.allclose(maps, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_fullgrad_plus_sums_to_the_logit_without_the_biases_after_pooling(models):
    clf = models("average")
    images, target = pictures(clf, 2), torch.tensor([0, 2])
    maps = attributors.create("libragrad", clf, base="fullgrad_plus").attribute(images, target)
    head, norm = clf.module.head, clf.module.fc_norm
    after_pooling = head.bias[target] + head.weight[target] @ norm.bias
    # 16 patches of 8 × 8 pixels: bilinear upsampling keeps the mean
    assert torch.allclose(maps.sum((1, 2, 3)) / 64, clf(images)[[0, 1], target] - after_pooling, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["vit", "registers", "distilled", "average", "parallel"])
def test_attcam_by_hand(models, kind):
    clf = models(kind)
    images, target = pictures(clf, 2), [2, 1]
    prefix = clf.module.num_prefix_tokens
    rows = {0: range(16), 2: range(2)}.get(prefix, range(1))
    hidden, weights = [], []
    hooks = [
        ((block if kind == "parallel" else block.attn).attn_drop, lambda _m, _a, out: weights.append(out))
        for block in clf.module.blocks
    ]
    handles = [
        block.register_forward_pre_hook(lambda _m, args: hidden.append(args[0].requires_grad_()))
        for block in clf.module.blocks
    ]
    with attributors.undisturbed(clf, hooks, unfused=True):
        logits = clf(images.clone().requires_grad_())
        gradients = torch.autograd.grad(logits[0, 2] + logits[1, 1], hidden)
    for handle in handles:
        handle.remove()
    # the attention of a block, with the evidence of the tokens that leave it, or of those that enter it
    for options, queries, terms in (
        ({}, range(prefix + 16), [(0, 1), (1, 2)]),
        ({"variant": "readout"}, rows, [(0, 0), (1, 1), (2, 2)]),
    ):
        expected = torch.zeros(2, 16)
        for attention, tokens in terms:
            for image in range(2):
                for patch in range(16):
                    received = [weights[attention][image, h, q, prefix + patch] for h in range(3) for q in queries]
                    evidence = hidden[tokens][image, prefix + patch] @ gradients[tokens][image, prefix + patch]
                    expected[image, patch] += (sum(received) / len(received) * evidence).item()
        expected = F.interpolate(expected.reshape(2, 1, 4, 4), (32, 32), mode="bilinear", align_corners=False)
        maps = attributors.create("attcam", clf, **options).attribute(images, target)
        assert torch.allclose(maps, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
        assert (maps < 0).any()


def test_attcam_refuses_what_it_does_not_know(models):
    with pytest.raises(ValueError, match="variant='same' is not known: choose one of published, readout"):
        attributors.create("attcam", models("vit"), variant="same")
    shallow = make("vit", depth=1)
    with pytest.raises(ValueError, match="has one block: give variant=readout"):
        attributors.create("attcam", shallow)
    assert attributors.create("attcam", shallow, variant="readout").attribute(pictures(shallow), 0).std() > 0


@pytest.mark.parametrize(
    ("name", "options"), [("fullgrad_plus", {}), ("attcam", {}), ("attcam", {"variant": "readout"})]
)
@pytest.mark.parametrize("kind", ["distilled", "dinov3"])
def test_batches_modes_and_state(models, name, options, kind):
    assert_well_behaved(lambda clf, **others: attributors.create(name, clf, **options, **others), models(kind))


@pytest.mark.parametrize("kind", ["convnext", "swin", "mixer"])
def test_other_architectures_are_refused(models, kind):
    for name in ("attcam", *(() if kind == "mixer" else ("fullgrad_plus",))):
        message = f"{name} reads .* and accepts timm vision transformers"
        assert_refused(lambda clf, name=name: attributors.create(name, clf), models(kind), message)
