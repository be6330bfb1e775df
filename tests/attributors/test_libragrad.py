"""LibraGrad: the gradients account for the whole logit, the values stay, and so does the module."""

import math

import pytest
import torch
import torch.nn.functional as F
from timm.layers import GluMlp, LayerNorm2d, QuickGELU, RmsNorm, SqueezeExcite, SwiGLU
from timm.layers.attention import Attention, AttentionRope
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.grn import GlobalResponseNorm
from torch import nn

import aha.libra as rules
from aha import attributors
from aha.attributors import full_gradient, libra, libragrad
from aha.attributors.base import _REGISTRY
from aha.classifier import Classifier, HFLogits

from .architectures import KINDS, make, pictures, state

PLAIN_TOO = ("resnet",)  # ReLU and batch norm are homogeneous as they are


def cuts(clf):
    module = clf.module
    return [None, *(getattr(module, "blocks", None) or getattr(module, "stages", None) or ())]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_complete_at_every_block(kind):
    clf = make(kind)
    images, target = pictures(clf, 2), torch.tensor([1, 3])
    logits = clf(images)
    with libra(clf.module):
        assert torch.allclose(clf(images), logits, rtol=0, atol=1e-6 * logits.abs().max().item())
        for at in cuts(clf):
            terms = full_gradient(clf, images, target, at)
            assert torch.allclose(terms.logits, logits[[0, 1], target], rtol=1e-5, atol=1e-5)
            assert terms.error.max() < 1e-5 * logits.abs().max()
    scale = logits.abs().max()
    assert (full_gradient(clf, images, target).error.max() < 1e-4 * scale) == (kind in PLAIN_TOO)
    clf.double()
    images = images.double()
    scale = clf(images).abs().max()
    with libra(clf.module):
        for at in cuts(clf):
            assert full_gradient(clf, images, target, at).error.max() < 1e-12 * scale


@pytest.mark.parametrize(
    ("kind", "operation"),
    [
        ("vit", "layer_norm"),
        ("vit", "gelu"),
        ("vit", "scaled_dot_product_attention"),
        ("modern", "rms_norm"),
        ("eva02", "silu"),
        ("modern", "mul"),
        ("se", "hardsigmoid"),
        ("cait", "softmax"),
        ("gmlp", "mul"),
    ],
)
def test_no_rule_is_idle(models, monkeypatch, kind, operation):
    clf = models(kind)
    monkeypatch.setitem(rules._RULES, operation, lambda func, *args, **kwargs: func(*args, **kwargs))
    logits = clf(pictures(clf))
    with libra(clf.module):
        assert full_gradient(clf, pictures(clf), 1).error.max() > 1e-4 * logits.abs().max()


def test_completeness_of_a_transformers_model():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=4)
    torch.manual_seed(0)
    clf = Classifier.wrap(HFLogits(transformers.ViTForImageClassification(config)), input_size=(32, 32)).double()
    images = pictures(clf, 2)
    with libra(clf.module):
        assert full_gradient(clf, images, 1).error.max() < 1e-12 * clf(images).abs().max()
    assert full_gradient(clf, images, 1).error.max() > 1e-2 * clf(images).abs().max()


def heads_of(x, projection, count, heads):
    batch, tokens, _ = x.shape
    return projection(x).reshape(batch, tokens, count, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)


def mixed(q, k, v):
    weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1)
    return (weights.detach() @ v).transpose(1, 2).flatten(2)


def attention(m, x):
    q, k, v = heads_of(x, m.qkv, 3, m.num_heads)
    return m.proj(mixed(m.q_norm(q), m.k_norm(k), v))


def pooling(m, x):
    k, v = heads_of(x, m.kv, 2, m.num_heads)
    q = m.q(m.latent.expand(len(x), -1, -1)).reshape(len(x), -1, m.num_heads, k.shape[-1]).transpose(1, 2)
    x = m.proj(mixed(q, k, v))
    hidden = m.mlp.fc1(x)
    return (x + m.mlp.fc2(gelu(hidden)))[:, 0]


def gelu(x):
    return x * torch.distributions.Normal(0.0, 1.0).cdf(x).detach()


def silu(x):
    return x * x.sigmoid().detach()


def halved(a, b):
    return (a * b.detach() + a.detach() * b) / 2


def layer_norm(m, x, dim=-1):
    shape = (-1, *(1,) * (-dim - 1))
    scale = (x.var(dim, unbiased=False, keepdim=True) + m.eps).rsqrt().detach()
    return (x - x.mean(dim, keepdim=True)) * scale * m.weight.view(shape) + m.bias.view(shape)


def group_norm(m, x):
    parts = x.unflatten(1, (m.num_groups, -1))
    scale = (parts.var((2, 3, 4), unbiased=False, keepdim=True) + m.eps).rsqrt().detach()
    parts = ((parts - parts.mean((2, 3, 4), keepdim=True)) * scale).flatten(1, 2)
    return parts * m.weight[:, None, None] + m.bias[:, None, None]


def rms_norm(m, x):
    return x * (x.square().mean(-1, keepdim=True) + m.eps).rsqrt().detach() * m.weight


def swiglu(m, x):
    return m.fc2(halved(silu(m.fc1_g(x)), m.fc1_x(x)))


def glu(m, x):
    a, b = m.fc1(x).chunk(2, dim=-1)
    return m.fc2(halved(silu(a), b) if not m.gate_last else halved(a, silu(b)))


def grn(m, x):
    norm = x.norm(dim=(1, 2), keepdim=True)
    gate = (norm / (norm.mean(-1, keepdim=True) + m.eps)).detach()
    return x + m.bias + m.weight * x * gate


def se(m, x):
    return x * torch.sigmoid(m.fc2(F.relu(m.fc1(x.mean((2, 3), keepdim=True))))).detach()


class Normalize(nn.Module):
    def forward(self, x):
        return F.normalize(x, dim=-1)


TOKENS, MAP = (2, 5, 12), (2, 12, 4, 3)
RULES = {
    "LayerNorm": (lambda: nn.LayerNorm(12), TOKENS, layer_norm),
    "LayerNorm2d": (lambda: LayerNorm2d(12), MAP, lambda m, x: layer_norm(m, x, -3)),
    "GroupNorm": (lambda: nn.GroupNorm(3, 12), MAP, group_norm),
    "RmsNorm": (lambda: RmsNorm(12), TOKENS, rms_norm),
    "normalize": (Normalize, TOKENS, lambda m, x: x / x.norm(dim=-1, keepdim=True).detach()),
    "GELU": (nn.GELU, TOKENS, lambda m, x: gelu(x)),
    "SiLU": (nn.SiLU, TOKENS, lambda m, x: silu(x)),
    "QuickGELU": (QuickGELU, TOKENS, lambda m, x: x * torch.sigmoid(1.702 * x).detach()),
    "Hardswish": (nn.Hardswish, TOKENS, lambda m, x: x * F.hardsigmoid(x).detach()),
    "Mish": (nn.Mish, TOKENS, lambda m, x: x * F.softplus(x).tanh().detach()),
    "Attention": (lambda: Attention(12, 3, qkv_bias=True), TOKENS, attention),
    "Attention, qk-norm": (lambda: Attention(12, 3, qk_norm=True, norm_layer=nn.LayerNorm), TOKENS, attention),
    "AttentionRope": (lambda: AttentionRope(12, 3), TOKENS, attention),
    "AttentionPoolLatent": (lambda: AttentionPoolLatent(12, num_heads=3), TOKENS, pooling),
    "SwiGLU": (lambda: SwiGLU(12, 16), TOKENS, swiglu),
    "SwiGLUPacked": (lambda: GluMlp(12, 16, act_layer=nn.SiLU, gate_last=False), TOKENS, glu),
    "GluMlp": (lambda: GluMlp(12, 16, act_layer=nn.SiLU), TOKENS, glu),
    "GRN": (lambda: GlobalResponseNorm(12), (2, 4, 3, 12), grn),
    "SqueezeExcite": (lambda: SqueezeExcite(12), MAP, se),
    "ReLU": (lambda: nn.ReLU(inplace=True), TOKENS, lambda m, x: x * (x > 0)),
}


@pytest.mark.parametrize(("rule", "fused"), [*((r, True) for r in RULES), *((r, False) for r in RULES if "tten" in r)])
def test_rules_by_hand(rule, fused):
    build, shape, by_hand = RULES[rule]
    torch.manual_seed(0)
    module = build().double().eval()
    module.fused_attn = fused
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    x = torch.randn(shape, dtype=torch.float64).requires_grad_()
    into = torch.randn_like(module(x.clone()))
    with libra(module):
        y = module(x.clone())
        (gradient,) = torch.autograd.grad((y * into).sum(), x)
    expected = by_hand(module, x)
    (expected_gradient,) = torch.autograd.grad((expected * into).sum(), x)
    assert torch.allclose(y, module(x.clone()), rtol=1e-14, atol=1e-15)
    assert torch.allclose(y, expected, rtol=1e-10, atol=1e-12)
    assert torch.allclose(gradient, expected_gradient, rtol=1e-9, atol=1e-11)
    (plain,) = torch.autograd.grad((module(x.clone()) * into).sum(), x)
    assert torch.allclose(plain, gradient) == (rule == "ReLU")


@pytest.mark.parametrize("activation", [nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.Hardswish(), nn.Mish()])
def test_activations_at_zero_keep_their_slope(activation):
    x = torch.zeros(3, requires_grad=True)
    (slope,) = torch.autograd.grad(activation(x).sum(), x)
    with libra(activation):
        assert torch.allclose(torch.autograd.grad(activation(x).sum(), x)[0], slope, atol=1e-6)


def test_the_gradient_of_the_attention_is_there(models):
    clf = models("vit")
    images = pictures(clf, 2).requires_grad_()
    layer = clf.module.blocks[1].attn
    attention, values = [], []
    hooks = [
        (layer.attn_drop, lambda _m, _a, out: attention.append(out)),
        (layer.norm, lambda _m, _a, out: values.append(out)),
    ]
    with libra(clf.module), attributors.undisturbed(clf, hooks, unfused=True):
        logits = clf(images)
    of_attention, of_values = torch.autograd.grad(logits[:, 1].sum(), [attention[0], values[0]])
    # values are linear in the weights, so both account for the same part of the logit
    part = (values[0] * of_values).sum((1, 2))
    assert torch.allclose((attention[0] * of_attention).sum((1, 2, 3)), part, rtol=1e-4, atol=1e-6)
    assert part.abs().min() > 1e-3


def test_all_is_put_back():
    clf = make("vit")
    images = pictures(clf, 2).requires_grad_()
    clf.module.blocks[0].train()
    clf.module.blocks[1].requires_grad_(True)
    clf.module.set_grad_checkpointing(True)
    before = state(clf)
    expected = torch.autograd.grad(clf(images)[:, 1].sum(), images)[0]
    with libra(clf.module):
        assert state(clf) != before
        clf(images)
    assert state(clf) == before
    handle = clf.module.head.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), libra(clf.module):
        clf(images)
    handle.remove()
    assert state(clf) == before
    assert torch.equal(torch.autograd.grad(clf(images)[:, 1].sum(), images)[0], expected)


def test_a_forward_of_the_instance_is_kept():
    clf = make("vit")
    images = pictures(clf, 2)
    original = clf.module.forward
    clf.module.forward = twice = lambda pixels: 2 * original(pixels)
    with libra(clf.module):
        assert full_gradient(clf, images, 1).error.max() < 1e-5
        assert torch.allclose(clf(images), 2 * original(clf.normalize(images)))
    assert clf.module.forward is twice


def test_contexts_nest(models):
    clf = models("eva02")
    images = pictures(clf, 2).requires_grad_()

    def gradient():
        return torch.autograd.grad(clf(images)[:, 1].sum(), images)[0]

    plain = gradient()
    with libra(clf.module):
        once = gradient()
        with libra(clf.module):
            twice = gradient()
        assert torch.equal(gradient(), once)
    assert torch.allclose(twice, once, rtol=1e-4, atol=1e-6)
    assert torch.equal(gradient(), plain)
    assert not torch.allclose(once, plain, rtol=0.1)


def test_checkpointing_does_not_bring_the_plain_gradient_back():
    clf = make("vit")
    images = pictures(clf, 2).requires_grad_()
    gradients = []
    for checkpointing in (False, True):
        clf.module.set_grad_checkpointing(checkpointing)
        with libra(clf.module):
            gradients += torch.autograd.grad(clf(images)[:, 1].sum(), images)
    assert torch.allclose(*gradients, rtol=1e-4, atol=1e-6)


def test_without_gradients_the_context_changes_nothing(models):
    clf = models("vit")
    images = pictures(clf, 2)
    expected = clf(images)
    with libra(clf.module), torch.no_grad():
        assert torch.equal(clf(images), expected)
        assert not clf(images).requires_grad


class Stack(nn.Module):
    def __init__(self, last):
        super().__init__()
        self.last = last

    def forward(self, pixels):
        return self.last(pixels.mean(dim=(2, 3)))


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (nn.Tanh(), "no rule for tanh in Tanh"),
        (nn.Softplus(), "no rule for softplus in Softplus"),
        (Apply(torch.exp), "no rule for exp in Apply"),
        (Apply(lambda x: 1 / (x + 1)), "no rule for rdiv in Apply"),
        (Apply(lambda x: torch.ones(1, 3) / (x + 1)), "no rule for division by something that depends on the input"),
        (Apply(lambda x: (x + 1).mul_(x)), "no rule for mul in place in Apply"),
        (Apply(lambda x: torch.einsum("bi,bi->bi", x, x)), "no rule for einsum of two factors"),
        (Apply(lambda x: F.pad(x, (0, 1), value=2.0)), "no rule for pad with 2.0"),
        (
            nn.Sequential(nn.Softmax(dim=1), Apply(lambda x: 2 * x)),
            "no gradient reaches the output of Stack under libra.*logits",
        ),
    ],
)
def test_what_has_no_rule_is_refused_when_the_method_is_made(last, message):
    clf = Classifier.wrap(Stack(last), input_size=(8, 8))
    with pytest.raises(ValueError, match=message) as error:
        attributors.create("libragrad", clf)
    assert "\n" not in str(error.value)
    assert "forward" not in vars(clf.module)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_modules_are_refused():
    module = nn.Sequential(torch.jit.script(nn.Linear(3, 3)))
    with (
        pytest.raises(ValueError, match=r"cannot see into a compiled (RecursiveScript|Optimized)Module"),
        libra(module),
    ):
        pytest.fail("must not be entered")


def test_unknown_bases_are_refused(models, monkeypatch):
    clf = models("vit")
    with pytest.raises(ValueError, match="base='rise' is not known: choose one of input_x_gradient, attcam"):
        attributors.create("libragrad", clf, base="rise")
    monkeypatch.delitem(_REGISTRY, "attcam")
    with pytest.raises(ValueError, match="base='attcam' needs the method 'attcam', which is not registered"):
        attributors.create("libragrad", clf, base="attcam")


def test_a_base_refuses_what_it_refuses_alone(models):
    with pytest.raises(ValueError, match="attcam reads attention and accepts timm vision transformers"):
        attributors.create("libragrad", models("mixer"), base="attcam")


def create(clf, base, **options):
    if libragrad._BASES.get(base, (base,))[0] not in (*attributors.available(), "input_x_gradient"):
        pytest.skip(f"{base} is not registered")
    if base == "integrated_gradients":
        pytest.importorskip("captum")
        options = {"n_steps": 4, **options}
    return attributors.create("libragrad", clf, base=base, **options)


@pytest.mark.parametrize("base", libragrad.BASES)
def test_maps_of_every_base(models, base):
    clf = models("vit")
    images = pictures(clf, 3)
    method = create(clf, base, internal_batch_size=8)
    before = state(clf)
    target = torch.tensor([1, 0, 3])
    maps = method.attribute(images, target)
    assert state(clf) == before
    assert maps.shape == (3, 1, 32, 32)
    assert torch.isfinite(maps).all()
    assert maps.std() > 0
    assert not torch.equal(maps, method.attribute(images, 2))
    chunked = create(clf, base, internal_batch_size=2).attribute(images, target)
    assert torch.allclose(maps, chunked, rtol=1e-4, atol=1e-5)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(method.attribute(images.clone(), target), maps)
    if libragrad._BASES.get(base, (base, {}))[1]:
        return
    alone = attributors.create(base, clf, **({"n_steps": 4} if base == "integrated_gradients" else {}))
    assert not torch.allclose(alone.attribute(images, target), maps, rtol=0.01)


@pytest.mark.parametrize("kind", ["vit", "oblong", "mixer", "gated_mixer", "convnext", "resnet"])
def test_input_x_gradient_with_the_bias_terms_is_the_logit(models, kind):
    clf = models(kind)
    images, target = pictures(clf, 2), torch.tensor([2, 0])
    with torch.inference_mode():
        method = attributors.create("libragrad", clf)
    maps = method.attribute(images, target)
    with libra(clf.module):
        terms = full_gradient(clf, images, target)
    logits = clf(images)[[0, 1], target]
    assert torch.allclose(maps.sum((1, 2, 3)) + terms.biases, logits, rtol=1e-4, atol=1e-4)
    assert (maps < 0).any()
    unsigned = attributors.create("libragrad", clf, signed=False)
    assert torch.allclose(unsigned.attribute(images, target), maps.abs(), atol=1e-6)
    assert (
        attributors.create("libragrad", clf, signed=False, smooth=2.0).attribute(images, target).std()
        < maps.abs().std()
    )


def test_cost_is_that_of_the_base(models):
    clf = models("vit")
    images = pictures(clf, 3)
    for base in ("input_x_gradient", "fullgrad_plus", "attcam"):
        method = create(clf, base, internal_batch_size=2)
        with attributors.count_passes(clf) as passes:
            method.attribute(images, 1)
        assert (passes.forward, passes.backward) == (3, 3), base
