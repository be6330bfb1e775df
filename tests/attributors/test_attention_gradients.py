"""Attention and its gradients along the path from the mean colour, against loops in float64 and finite differences."""

import pytest
import torch
import torch.nn.functional as F

from aha import attributors

from .architectures import assert_refused, make, pictures
from .by_hand import assert_keeps_the_contract, forward_by_hand, gradients_by_hand, passes_per_image, prefix, readout

METHODS = [
    ("attention_ig", {}),
    ("transition_attention", {}),
    ("bi_attention", {}),
    ("bi_attention", {"level": "token"}),
]
TARGET = [1, 3, 0]


@pytest.mark.parametrize("kind", ["vit", "distilled", "average", "dinov3", "parallel"])
def test_gradients_by_finite_differences(kind):
    clf = make(kind).double()
    images = pictures(clf, 2)
    method = attributors.create("bi_attention", clf)
    attentions, gradients = method.gradients(images, torch.tensor(TARGET[:2]))
    assert [a.shape for a in attentions] == [g.shape for g in gradients]
    tokens = attentions[0].shape[-1]
    step, largest = 1e-5, []
    for block, head, query, key in ((0, 1, 0, tokens - 1), (1, 0, 2, 3), (2, 2, 0, 4), (2, 0, tokens - 1, 0)):
        scores = []
        for change in (step, -step):

            def watch(at, attention, block=block, index=(slice(None), head, query, key), change=change):
                if at == block:
                    attention = attention.clone()
                    attention[index] += change
                return attention

            scores.append(method.forward(images, watch)[range(2), TARGET[:2]])
        expected = (scores[0] - scores[1]) / (2 * step)
        assert torch.allclose(gradients[block][:, head, query, key], expected, rtol=1e-5, atol=1e-8)
        largest.append(expected.abs().max())
    # a patch's query in the last block moves the logits only where patches are read
    assert sum(value > 1e-6 for value in largest) >= 3


def integrated_by_hand(clf, image, target, kind, steps=20):
    rows = 0
    for k in range(1, steps + 1):
        pixels = k / steps * clf.normalize(image[None])
        _, gradients = gradients_by_hand(clf.module, pixels, target)
        rows = rows + gradients[-1] / steps
    tokens = rows.shape[-1]
    read = readout(kind, tokens)
    total = torch.zeros(tokens, dtype=rows.dtype)
    for head in rows:
        for query in read:
            total += head[query].clamp(min=0) / (len(rows) * len(read))
    return total[prefix(kind) :]


def transition_by_hand(clf, image, target, kind, integrated):
    attentions, _ = gradients_by_hand(clf.module, clf.normalize(image[None]), target)
    means = [sum(attention) / len(attention) for attention in attentions]
    read = readout(kind, means[0].shape[0])
    state = sum(means[2][query] for query in read) / len(read)
    state = state + state @ means[1]
    state = state + state @ means[0]
    return state[prefix(kind) :] * integrated


def bi_attention_by_hand(clf, image, target, kind, integrated, level, start):
    vit, pixels = clf.module, clf.normalize(image[None])
    attentions, gradients = gradients_by_hand(vit, pixels, target)
    seen = forward_by_hand(vit, pixels)
    tokens = attentions[0].shape[-1]
    joint = torch.eye(tokens, dtype=pixels.dtype)
    for block in range(start, 3):
        if level == "head":
            importance = [
                (attention.T @ gradient).abs().mean()
                for attention, gradient in zip(attentions[block], gradients[block], strict=True)
            ]
            mixed = sum(i / sum(importance) * a for i, a in zip(importance, attentions[block], strict=True))
        else:
            attn = vit.blocks[block].attn
            mixed = sum(attentions[block]) / 3
            for token in range(tokens):
                x = seen["entering"][block][token]
                values = torch.cat([head[token] for head in seen["values"][block]])
                projected = attn.proj.weight @ values
                mixed[:, token] *= projected.norm() / x.norm()
        joint = joint + mixed @ joint
    row = sum(joint[query] for query in readout(kind, tokens)) / len(readout(kind, tokens))
    return row[prefix(kind) :] * integrated


@pytest.mark.parametrize("kind", ["vit", "registers", "distilled", "average"])
def test_by_hand(kind):
    clf = make(kind).double()
    images = pictures(clf)
    target = torch.tensor(TARGET)
    integrated = [integrated_by_hand(clf, image, t, kind) for image, t in zip(images, TARGET, strict=True)]
    cases = {
        "attention_ig": ({}, lambda _clf, _image, _target, _kind, integrated: integrated, ()),
        "transition_attention": ({}, transition_by_hand, ()),
        "bi_attention": ({}, bi_attention_by_hand, ("head", 2)),
        "all blocks": ({"start": 0}, bi_attention_by_hand, ("head", 0)),
        "token": ({"start": 1, "level": "token"}, bi_attention_by_hand, ("token", 1)),
    }
    for name, (options, by_hand, rest) in cases.items():
        method = attributors.create(name if name in attributors.available() else "bi_attention", clf, **options)
        expected = torch.stack(
            [
                by_hand(clf, image, t, kind, path, *rest).detach()
                for image, t, path in zip(images, TARGET, integrated, strict=True)
            ]
        )
        patches = method.patches(images, target)
        assert torch.allclose(patches, expected, rtol=1e-9, atol=1e-9 * expected.abs().max().item()), name
        assert expected.max() > 0
        grid = F.interpolate(expected.view(3, 1, 4, 4), (32, 32), mode="bilinear", align_corners=False)
        assert torch.allclose(method.attribute(images, target), grid.float(), rtol=1e-5)


def test_path_starts_at_the_mean_colour_and_ends_at_the_image():
    clf = make("vit")
    images = pictures(clf, 1)
    arrived = []
    handle = clf.module.patch_embed.register_forward_pre_hook(lambda _, args: arrived.append(args[0]))
    attributors.create("attention_ig", clf, n_steps=4, internal_batch_size=3).attribute(images, 0)
    handle.remove()
    assert [len(pixels) for pixels in arrived] == [3, 1]
    path = torch.cat(arrived)
    for pixels, share in zip(path, (0.25, 0.5, 0.75, 1.0), strict=True):
        assert torch.allclose(pixels, share * clf.normalize(images)[0], atol=1e-6)


def test_levels_and_start_differ():
    clf = make("vit")
    images = pictures(clf)
    maps = [
        attributors.create("bi_attention", clf, **options).attribute(images, 0)
        for options in ({}, {"start": 0}, {"level": "token"})
    ]
    assert not torch.allclose(maps[0], maps[1], rtol=1e-2)
    assert not torch.allclose(maps[0], maps[2], rtol=1e-2)
    deep = make("vit", depth=7)
    assert attributors.create("bi_attention", deep).start == 3
    assert attributors.create("bi_attention", deep, level="token").start == 5
    # a start beyond a shallow model is its last block
    assert torch.equal(maps[0], attributors.create("bi_attention", clf, start=2).attribute(images, 0))


@pytest.mark.parametrize(("name", "options"), METHODS)
def test_batches_modes_and_state(models, name, options):
    def create(clf, **others):
        return attributors.create(name, clf, **{"n_steps": 2, **options, **others})

    assert_keeps_the_contract(create, models, ("distilled",))


@pytest.mark.parametrize(
    ("name", "options", "passes", "cost"),
    [
        ("attention_ig", {}, (20, 20), "20F, 20B of the last block"),
        ("transition_attention", {}, (21, 20), "21F, 20B of the last block"),
        ("bi_attention", {}, (21, 21), "21F, 1B and 20B of the last block"),
        ("bi_attention", {"level": "token"}, (21, 20), 'no full B with level="token"'),
    ],
)
def test_cost_is_what_the_metadata_says(name, options, passes, cost):
    assert passes_per_image(name, **options) == passes
    assert cost in attributors.available()[name].cost


def test_refusals():
    clf = make("vit")
    for options in ({"n_steps": 0}, {"level": "layer"}, {"start": -1}):
        with pytest.raises(ValueError, match=next(iter(options))):
            attributors.create("bi_attention", clf, **options)
    assert_refused(
        lambda clf: attributors.create("bi_attention", clf, level="token"),
        make("parallel"),
        r"needs block\.attn\.proj, a ParallelScalingBlock has none",
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("name", "options"), METHODS)
def test_cuda_agrees_with_the_cpu(name, options):
    clf = make("vit")
    images = pictures(clf)
    expected = attributors.create(name, clf, **options).attribute(images, TARGET)
    maps = attributors.create(name, clf.cuda(), **options).attribute(images.cuda(), TARGET)
    assert maps.is_cuda
    # convolutions run in tf32 there
    assert torch.allclose(maps.cpu(), expected, rtol=0.05, atol=0.02 * expected.abs().max().item())
