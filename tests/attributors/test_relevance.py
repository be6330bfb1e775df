"""Relevance propagation and the transformer attribution made of it, against loops in float64 and closed forms."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F

from aha import attributors
from aha.attributors.relevance import NoRule, Propagation

from .architectures import (
    TRANSFORMERS,
    assert_refused,
    make,
    pictures,
)
from .by_hand import (
    assert_keeps_the_contract,
    forward_by_hand,
    gradients_by_hand,
    passes_per_image,
    prefix,
    readout,
)

TARGET = [1, 3, 0]
BOTH = [{}, {"relevance": "gradient"}]


def propagate(compute, relevance, *inputs):
    """Relevance of the inputs of one small computation in float64, the first dimension one image."""
    inputs = [torch.tensor(x, dtype=torch.float64).requires_grad_() for x in inputs]
    with Propagation() as propagation:
        output = compute(*inputs)
    with propagation.by_relevance():
        return torch.autograd.grad(output, inputs, torch.tensor(relevance, dtype=torch.float64))


def test_linear_rule_in_closed_form():
    weight = torch.tensor([[1.0, 2.0, -1.0], [-1.0, 1.0, 1.0]], dtype=torch.float64)
    bias = torch.full((2,), 9.0).double()
    (share,) = propagate(lambda x: F.linear(x, weight, bias), [[3.0, 6.0]], [[2.0, -1.0, 3.0]])
    # contributions ≥ 0 are 2 of the first input to the first output, 3 of the last to the second
    assert torch.allclose(share, torch.tensor([[3.0, 0.0, 6.0]]).double())
    (share,) = propagate(lambda x: F.linear(x, weight, bias), [[3.0, 6.0]], [[2.0, -1.0, -3.0]])
    # 2 and 3 to the first output, none to the second, whose relevance is lost
    assert torch.allclose(share, torch.tensor([[6 / 5, 0, 9 / 5]]).double())


def test_sum_rule_in_closed_form():
    # eq. 2: u/(u+v)·R is (2, 3) and (2, −1), sums 5 and 1 with ΣR = 6: nothing to normalise
    u, v = propagate(torch.add, [[4.0, 2.0]], [[1.0, 3.0]], [[1.0, -1.0]])
    assert torch.allclose(u, torch.tensor([[2.0, 3.0]]).double())
    assert torch.allclose(v, torch.tensor([[2.0, -1.0]]).double())
    # the sums are 6 and −4, ΣR = 2: eq. 9 leaves 6·2/10 and turns −4 into 4·2/10
    u, v = propagate(lambda u, v: u + v, [[2.0]], [[3.0]], [[-2.0]])
    assert torch.allclose(u, torch.tensor([[1.2]]).double())
    assert torch.allclose(v, torch.tensor([[0.8]]).double())


def test_product_rules_in_closed_form():
    u, v = propagate(lambda u, v: u * v, [[4.0, -2.0]], [[2.0, 5.0]], [[3.0, -1.0]])
    assert torch.allclose(u, torch.tensor([[2.0, -1.0]]).double())
    assert torch.allclose(v, torch.tensor([[2.0, -1.0]]).double())
    # two terms 2·3 and 1·(−1) make 5: shares 6/5 and −1/5 of R = 10, half of it for each side
    u, v = propagate(torch.matmul, [[[10.0]]], [[[2.0, 1.0]]], [[[3.0], [-1.0]]])
    assert torch.allclose(u, torch.tensor([[[6.0, -1.0]]]).double())
    assert torch.allclose(v, torch.tensor([[[6.0], [-1.0]]]).double())
    constant = torch.tensor([[[3.0], [-1.0]]]).double()
    (u,) = propagate(lambda u: u @ constant, [[[10.0]]], [[[2.0, 1.0]]])
    assert torch.allclose(u, torch.tensor([[[12.0, -2.0]]]).double())


def test_mean_rule_in_closed_form():
    # the mean −1 is made of −4 and −2; 3 speaks against it
    (x,) = propagate(lambda x: x.mean(dim=1), [[6.0]], [[[-4.0], [3.0], [-2.0]]])
    assert torch.allclose(x, torch.tensor([[[4.0], [0.0], [2.0]]]).double())


@pytest.mark.parametrize(
    "compute",
    [
        lambda x: F.gelu(x),
        lambda x: x.softmax(dim=-1),
        lambda x: F.layer_norm(x, (2,)),
        lambda x: F.rms_norm(x, (2,)),
        lambda x: -3 * x / 2 + torch.ones(2).double(),
        lambda x: F.dropout(x, training=False),
    ],
)
def test_what_leaves_relevance_alone(compute):
    (share,) = propagate(compute, [[5.0, -1.0]], [[0.5, 2.0]])
    assert torch.equal(share, torch.tensor([[5.0, -1.0]]).double())


def test_an_image_of_zeros_stays_finite():
    for compute in (torch.add, torch.mul):
        for share in propagate(compute, [[1.0, 1.0]], [[0.0, 0.0]], [[0.0, 0.0]]):
            assert torch.equal(share, torch.zeros(1, 2).double())


def test_operations_without_a_rule_are_named():
    x = torch.ones(1, 2, requires_grad=True)
    for name, compute in (
        ("amax", lambda: x.amax(dim=1)),
        ("div", lambda: torch.div(torch.ones(1, 2), x)),
        ("rtruediv", lambda: 1 / x),
        ("linear", lambda: F.linear(torch.ones(1, 2), x)),
        ("exp_", lambda: x.clone().exp_()),
    ):
        with pytest.raises(NoRule, match=name), Propagation():
            compute()
    # what carries no relevance may be anything
    with Propagation():
        assert torch.equal(torch.ones(2).exp() + 1, torch.ones(2).exp() + 1)


def test_sums_are_normalised_image_by_image():
    generator = torch.Generator().manual_seed(0)
    u, v, r = (torch.randn(3, 4, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    together = propagate(torch.add, r.tolist(), u.tolist(), v.tolist())
    for i in range(3):
        alone = propagate(torch.add, r[i : i + 1].tolist(), u[i : i + 1].tolist(), v[i : i + 1].tolist())
        assert all(torch.allclose(t[i : i + 1], a) for t, a in zip(together, alone, strict=True))


def linear_by_hand(x, layer, relevance, rows=slice(None)):
    """c[t, i, j] = x_tj·w_ij where it is ≥ 0, shared out term by term."""
    contributions = (x[:, None, :] * layer.weight[rows][None]).clamp(min=0)
    total = contributions.sum(dim=-1, keepdim=True)
    return (torch.where(total > 0, contributions / total, 0) * relevance[..., None]).sum(dim=1)


def sum_by_hand(u, v, relevance):
    parts = [u / (u + v) * relevance, v / (u + v) * relevance]
    sums = [part.sum() for part in parts]
    weight = sum(abs(s) for s in sums)
    return [part * (abs(s) / weight) * (relevance.sum() / s) for part, s in zip(parts, sums, strict=True)]


def product_by_hand(u, v, relevance):
    """Relevance of U (n, k) and V (k, m) in Y = UV, each term's half."""
    terms = u[:, :, None] * v[None]
    shares = terms / terms.sum(dim=1, keepdim=True) * relevance[:, None, :] / 2
    return shares.sum(dim=2), shares.sum(dim=0)


def relevances_by_hand(vit, pixels, target, kind):
    """Relevance of every block's attention (heads, T, T), of the tokens that enter it (T, D): first block first."""
    with torch.no_grad():
        seen = forward_by_hand(vit, pixels)
        final = seen["final"][0]
        tokens, width = final.shape
        read = readout(kind, tokens)
        pooled = final[read].mean(dim=0, keepdim=True)
        start = torch.zeros(1, vit.num_classes, dtype=pixels.dtype)
        start[0, target] = 1
        pooled_relevance = linear_by_hand(vit.fc_norm(pooled), vit.head, start)[0]
        relevance = torch.zeros(tokens, width, dtype=pixels.dtype)
        for channel in range(width):
            column = final[read, channel]
            alike = torch.where(column * pooled[0, channel] > 0, column, 0)
            relevance[read, channel] = alike / alike.sum() * pooled_relevance[channel]

        attentions, entering = [], []
        for at in reversed(range(len(vit.blocks))):
            block = vit.blocks[at]
            value = {name: values[at] for name, values in seen.items() if name not in ("final", "logits")}
            skipped, inner = sum_by_hand(value["between"], value["mlp"], relevance)
            inner = linear_by_hand(value["active"], block.mlp.fc2, inner)
            relevance = skipped + linear_by_hand(value["normed2"], block.mlp.fc1, inner)
            skipped, inner = sum_by_hand(value["entering"], value["mixed"], relevance)
            inner = linear_by_hand(value["heads"], block.attn.proj, inner)
            heads, size = block.attn.num_heads, width // block.attn.num_heads
            into = torch.zeros(tokens, 3 * width, dtype=pixels.dtype)
            attention = []
            for h, part in enumerate(inner.split(size, dim=1)):
                weights, values = product_by_hand(value["attention_heads"][h], value["values"][h], part)
                queries, keys = product_by_hand(value["queries"][h], value["keys"][h].T, weights)
                attention.append(weights)
                for kind_of, share in enumerate((queries, keys.T, values)):
                    first = kind_of * width + h * size
                    into[:, first : first + size] = share
            assert heads == len(attention)
            relevance = skipped + linear_by_hand(value["normed"], block.attn.qkv, into)
            attentions.append(torch.stack(attention))
            entering.append(relevance)
    return attentions[::-1], entering[::-1]


@pytest.mark.parametrize("kind", ["vit", "registers", "average"])
def test_by_hand(kind):
    clf = make(kind).double()
    images = pictures(clf)
    method = attributors.create("chefer", clf)
    relevances, gradients = method.relevances(images, torch.tensor(TARGET))
    rows = []
    for i, target in enumerate(TARGET):
        pixels = clf.normalize(images[i : i + 1])
        expected, entering = relevances_by_hand(clf.module, pixels, target, kind)
        derived = gradients_by_hand(clf.module, pixels, target)[1]
        tokens = expected[0].shape[-1]
        joint = torch.eye(tokens, dtype=torch.float64)
        for block in range(3):
            # what keeps quotients finite is 1e-9 in the denominators
            scale = expected[block].abs().max()
            assert (relevances[block][i] - expected[block]).abs().max() < 1e-5 * scale
            assert torch.allclose(gradients[block][i], derived[block], rtol=1e-9, atol=1e-12)
            assert entering[block].sum() == pytest.approx(1, abs=1e-9)
            positive = sum((g * r).clamp(min=0) for g, r in zip(derived[block], expected[block], strict=True)) / 3
            joint = joint + positive @ joint
        joint = joint - torch.eye(tokens, dtype=torch.float64)
        read = readout(kind, tokens)
        rows.append(sum(joint[query, prefix(kind) :] for query in read) / len(read))
    expected = torch.stack(rows)
    patches = method.patches(images, torch.tensor(TARGET))
    assert (patches - expected).abs().max() < 1e-5 * expected.abs().max()
    grid = F.interpolate(expected.view(3, 1, 4, 4), (32, 32), mode="bilinear", align_corners=False).float()
    assert torch.allclose(method.attribute(images, TARGET), grid, rtol=1e-4)


@pytest.mark.parametrize("kind", ["vit", "distilled"])
def test_gradient_variant_by_hand(kind):
    clf = make(kind).double()
    images = pictures(clf)
    rows = []
    for i, target in enumerate(TARGET):
        attentions, gradients = gradients_by_hand(clf.module, clf.normalize(images[i : i + 1]), target)
        tokens = attentions[0].shape[-1]
        joint = torch.eye(tokens, dtype=torch.float64)
        for attention, gradient in zip(attentions, gradients, strict=True):
            positive = sum((g * a).clamp(min=0) for g, a in zip(gradient, attention, strict=True)) / 3
            joint = (torch.eye(tokens, dtype=torch.float64) + positive) @ joint
        rows.append(joint[readout(kind, tokens), prefix(kind) :].mean(dim=0))
    method = attributors.create("chefer", clf, relevance="gradient")
    assert torch.allclose(method.patches(images, torch.tensor(TARGET)), torch.stack(rows), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_relevance_is_conserved_and_gradients_are_exact(kind):
    clf = make(kind).double()
    images = pictures(clf)
    method = attributors.create("chefer", clf)
    entering = []
    handles = [b.register_forward_pre_hook(lambda _, args: entering.append(args[0])) for b in method.blocks[1:]]
    with torch.enable_grad():
        propagation, logits, attentions = method._recorded(images)
        start = F.one_hot(torch.tensor(TARGET), 4).double()
        gradients = torch.autograd.grad(logits, attentions, start, retain_graph=True)
        with propagation.by_relevance():
            relevances = torch.autograd.grad(logits, entering, start)
    for handle in handles:
        handle.remove()
    for relevance in relevances:
        assert torch.allclose(relevance.sum(dim=(1, 2)), torch.ones(3).double(), atol=1e-6)
        assert relevance.abs().max() < 100
    for mine, usual in zip(gradients, method.gradients(images, torch.tensor(TARGET))[1], strict=True):
        assert torch.allclose(mine, usual, rtol=1e-9, atol=1e-12 * usual.abs().max().item())


@pytest.mark.parametrize("options", BOTH)
def test_batches_modes_and_state(models, options):
    def create(clf, **others):
        return attributors.create("chefer", clf, **options, **others)

    assert_keeps_the_contract(create, models, ("distilled", "dinov3"))


def test_cost_is_what_the_metadata_says():
    assert passes_per_image("chefer") == (1, 2)
    assert passes_per_image("chefer", relevance="gradient") == (1, 1)
    cost = attributors.available()["chefer"].cost
    assert cost.startswith("1F 2B") and '1F 1B with relevance="gradient"' in cost


@pytest.mark.parametrize("unruled", [{"attn_layer": "diff"}, {"class_token": False, "global_pool": "max"}])
def test_architectures_without_rules_point_to_the_gradient(unruled):
    clf = make("vit", **unruled)
    message = 'chefer has no rule to propagate relevance through torch.*relevance="gradient"'
    assert_refused(lambda clf: attributors.create("chefer", clf), clf, message)
    maps = attributors.create("chefer", clf, relevance="gradient").attribute(pictures(clf))
    assert maps.shape == (3, 1, 32, 32)


def test_refusals():
    with pytest.raises(ValueError, match="relevance='lrp' is not known: choose one of propagation, gradient"):
        attributors.create("chefer", make("vit"), relevance="lrp")


def test_graphs_are_freed():
    clf = make("vit")
    method = attributors.create("chefer", clf)
    made = []
    handle = clf.module.blocks[1].mlp.act.register_forward_hook(lambda *call: made.append(weakref.ref(call[2])))
    # by counting references alone: a cycle would keep a graph until the collector comes round
    gc.disable()
    try:
        method.attribute(pictures(clf), 0)
        assert made and all(reference() is None for reference in made)
    finally:
        gc.enable()
        handle.remove()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", BOTH)
@pytest.mark.parametrize("kind", ["vit", "eva02"])
def test_cuda_agrees_with_the_cpu(kind, options):
    clf = make(kind).double()
    images = pictures(clf)
    target = torch.tensor(TARGET)
    expected = attributors.create("chefer", clf, **options).patches(images, target)
    patches = attributors.create("chefer", clf.cuda(), **options).patches(images.cuda(), target.cuda())
    assert patches.is_cuda
    assert torch.allclose(patches.cpu(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())
