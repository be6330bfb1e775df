"""LeGrad against loops over blocks, heads and queries in float64."""

import pytest
import torch
import torch.nn.functional as F

from aha import attributors

from .architectures import TRANSFORMERS, make, pictures
from .by_hand import assert_keeps_the_contract, forward_by_hand, passes_per_image, prefix

TARGET = [1, 3, 0]


@pytest.mark.parametrize("kind", ["vit", "registers", "distilled", "average"])
def test_by_hand(kind):
    clf = make(kind).double()
    vit, images = clf.module, pictures(clf)
    rows = []
    for i, target in enumerate(TARGET):
        seen = forward_by_hand(vit, clf.normalize(images[i : i + 1]))
        row = 0
        for attention, tokens in zip(seen["attention_heads"], seen["leaving"], strict=True):
            if kind == "average":
                score = vit.head(vit.fc_norm(tokens.mean(dim=0)))[target]
            elif kind == "distilled":
                score = (vit.head(vit.norm(tokens[0]))[target] + vit.head_dist(vit.norm(tokens[1]))[target]) / 2
            else:
                score = vit.head(vit.norm(tokens[0]))[target]
            for weights in torch.autograd.grad(score, attention, retain_graph=True):
                for query in range(len(weights)):
                    row = row + weights[query].clamp(min=0) / (3 * len(weights))
        rows.append(row[prefix(kind) :])
    expected = torch.stack(rows)
    method = attributors.create("legrad", clf)
    patches = method.patches(images, torch.tensor(TARGET))
    assert torch.allclose(patches, expected, rtol=1e-9, atol=1e-12)
    assert expected.max() > 0
    grid = F.interpolate(expected.view(3, 1, 4, 4), (32, 32), mode="bilinear", align_corners=False)
    assert torch.allclose(method.attribute(images, TARGET), grid.float(), rtol=1e-5)


@pytest.mark.parametrize("kind", TRANSFORMERS)
def test_last_block_by_finite_differences(kind):
    """Of the last block, s_L is the classifier's logit: its share of the map is made of true derivatives."""
    clf = make(kind).double()
    image = pictures(clf, 1)
    method = attributors.create("legrad", clf)
    grid = method.grid(image)
    tokens, step = method.prefix + grid[0] * grid[1], 1e-5
    # only the last block is left over when the others are silenced
    key, total = method.prefix + 2, 0.0
    queries = torch.arange(tokens)
    for head in range(3):

        def watch(block, attention, head=head):
            # one copy of the image for each query and direction
            if block < 2:
                return None
            attention = attention.clone()
            attention[2 * queries, head, queries, key] += step
            attention[2 * queries + 1, head, queries, key] -= step
            return attention

        scores = method.forward(image.expand(2 * tokens, -1, -1, -1), watch)[:, 1]
        derivatives = (scores[::2] - scores[1::2]) / (2 * step)
        total += derivatives.clamp(min=0).sum().item() / (3 * tokens)
    del method.blocks[:2], method._softmaxes[:2]
    assert method.patches(image, torch.tensor([1]))[0, 2].item() == pytest.approx(total, rel=1e-5)


def test_batches_modes_and_state(models):
    def create(clf, **options):
        return attributors.create("legrad", clf, **options)

    assert_keeps_the_contract(create, models, ("distilled", "dinov3"))


def test_cost_is_what_the_metadata_says():
    # the short backward passes start inside the classifier and are not seen as whole ones
    assert passes_per_image("legrad") == (1, 0)
    assert attributors.available()["legrad"].cost.startswith("1F, and for every block B of that block")


def test_graphs_end_with_their_block():
    clf = make("vit")
    method = attributors.create("legrad", clf)
    arrived = []
    handles = [block.register_forward_pre_hook(lambda _, args: arrived.append(args[0])) for block in method.blocks]
    method.attribute(pictures(clf), 0)
    for handle in handles:
        handle.remove()
    assert len(arrived) == 3
    assert not any(tokens.requires_grad for tokens in arrived)


def test_refusals():
    clf = make("vit")
    del clf.module.norm
    with pytest.raises(ValueError, match="legrad reads attention"):
        attributors.create("legrad", clf)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_the_cpu():
    clf = make("vit")
    images = pictures(clf)
    expected = attributors.create("legrad", clf).attribute(images, TARGET)
    maps = attributors.create("legrad", clf.cuda()).attribute(images.cuda(), TARGET)
    assert maps.is_cuda
    # convolutions run in tf32 there
    assert torch.allclose(maps.cpu(), expected, rtol=0.05, atol=0.02 * expected.abs().max().item())
