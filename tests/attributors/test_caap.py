"""CAAP against runs patched by hand, one patch at a time."""

import pytest
import torch
import torch.nn.functional as F

from aha import attributors, references

from .architectures import (
    TRANSFORMERS,
    assert_restored_after_an_exception,
    assert_well_behaved,
    make,
    pictures,
)
from .by_hand import embedded, head


def create(clf, **options):
    return attributors.create("caap", clf, **options)


def inputs_by_hand(clf, image):
    """Inputs of all blocks for one image, and its logits."""
    tokens, extra = embedded(clf.module, clf.normalize(image[None]))
    inputs = []
    for block, options in zip(clf.module.blocks, extra, strict=True):
        inputs.append(tokens)
        tokens = block(tokens, **options)
    return inputs, head(clf.module, tokens)[0]


@torch.no_grad()
def by_hand(clf, image, neutral, target, first, last, prefix, patches):
    source, _ = inputs_by_hand(clf, image)
    _, logits = inputs_by_hand(clf, neutral)
    gains = []
    for patch in range(patches):
        tokens, extra = embedded(clf.module, clf.normalize(neutral[None]))
        for index, (block, options) in enumerate(zip(clf.module.blocks, extra, strict=True)):
            if first <= index <= last:
                tokens = tokens.clone()
                tokens[0, prefix + patch] = source[index][0, prefix + patch]
            tokens = block(tokens, **options)
        gains.append(head(clf.module, tokens)[0, target] - logits[target])
    return torch.stack(gains)


@pytest.mark.parametrize(
    ("kind", "span"),
    [*((kind, None) for kind in TRANSFORMERS), *((kind, s) for kind in ("vit", "dinov3") for s in ((0, 2), (2, 2)))],
)
def test_the_map_is_that_of_runs_patched_by_hand(kind, span):
    clf = make(kind)
    images = pictures(clf, 2)
    target = [3, 1]
    first, last = span or (1, 2)
    method = create(clf, internal_batch_size=7, **({"first": first, "last": last} if span else {}))
    assert (method.first, method.last) == (first, last)
    rows, cols = method.grid(images)
    neutral = references.blur(images)
    grid = torch.stack(
        [
            by_hand(clf, images[i], neutral[i], target[i], first, last, method.prefix, rows * cols).view(1, rows, cols)
            for i in range(2)
        ]
    )
    assert grid.flatten(1).std(dim=1).min() > 1e-4
    expected = F.interpolate(grid, clf.input_size, mode="bilinear", align_corners=False)
    maps = method.attribute(images, target)
    assert torch.allclose(maps, expected, atol=1e-5 * max(1.0, expected.abs().max().item()))


@pytest.mark.parametrize("kind", ["oblong", "registers", "average", "distilled", "mixed_rope", "beit", "parallel"])
def test_an_image_patched_into_itself_gains_nothing(kind):
    clf = make(kind)
    images = pictures(clf)
    method = create(clf, neutral=images, first=0, internal_batch_size=2)
    maps = method.attribute(images, 2)
    assert maps.abs().max() < 2e-5
    assert create(clf, first=0).attribute(images, 2).abs().max() > 1e-2


def test_the_default_range():
    for depth, expected in ((1, (0, 0)), (2, (0, 1)), (4, (1, 3)), (12, (4, 9))):
        method = create(make("vit", depth=depth))
        assert (method.first, method.last) == expected


def test_blocks_outside_the_range():
    clf = make("vit", depth=4)
    images = pictures(clf, 2)
    method = create(clf, first=1, last=2, internal_batch_size=32)
    executed = []
    handles = [b.norm1.register_forward_hook(lambda *_, i=i: executed.append(i)) for i, b in enumerate(method.blocks)]
    maps = method.attribute(images, 0)
    for handle in handles:
        handle.remove()
    # two whole runs, the patched ones (32 of them, in one pass) from the first block of the range
    assert executed == [0, 1, 2, 3, 0, 1, 2, 3, 1, 2, 3]
    others = [create(clf, first=first, last=last).attribute(images, 0) for first, last in ((1, 1), (2, 2), (1, 3))]
    assert all((maps - other).abs().max() > 1e-4 for other in others)


def test_neutral_images():
    clf = make("registers")
    images = pictures(clf)
    for name in references.REFERENCES:
        expected = create(clf, neutral=name).attribute(images, 1)
        neutral = references.make(name, images, clf.mean_colour)
        for size in (64, 2):
            method = create(clf, neutral=neutral, internal_batch_size=size)
            assert torch.allclose(method(images, [1, 1, 1]), expected, atol=1e-5)
            assert torch.equal(method.neutral, neutral)
    grey = torch.full((3, 32, 32), 0.25)
    expected = create(clf, neutral=grey.expand(3, 3, 32, 32).contiguous()).attribute(images)
    for neutral in (grey, grey[None]):
        method = create(clf, neutral=neutral, internal_batch_size=2)
        assert torch.allclose(method.attribute(images), expected, atol=1e-5)
        assert torch.allclose(method(images, clf(images).argmax(dim=1)), expected, atol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "dinov3"])
def test_batches_chunks_and_state(models, kind):
    assert_well_behaved(create, models(kind), [0, 2, 3])


def test_passes():
    clf = make("vit")
    images = pictures(clf)
    with attributors.count_passes(clf) as passes:
        create(clf, internal_batch_size=5).attribute(images, 1)
    assert (passes.forward, passes.backward) == (3 * (2 + 16), 0)


@pytest.mark.parametrize("failing_call", [1, 2, 4])
def test_state_after_an_exception(failing_call):
    assert_restored_after_an_exception(lambda clf: create(clf, internal_batch_size=6), "dinov3", at_call=failing_call)


def test_refusals():
    clf = make("vit")
    images = pictures(clf)
    for options, message in (
        ({"first": 3}, "0 ≤ first ≤ last < 3"),
        ({"first": 2, "last": 1}, "0 ≤ first ≤ last < 3"),
        ({"first": -1}, "0 ≤ first ≤ last < 3"),
        ({"neutral": "pink"}, "neutral='pink' is not known: choose one of black, mean, blur"),
        ({"neutral": images * 255}, "RGB in"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            create(clf, **options)
        assert "\n" not in str(error.value)
    for neutral in (images[:2], images[:, :, :16]):
        with pytest.raises(ValueError, match="one for all or one for each") as error:
            create(clf, neutral=neutral).attribute(images)
        assert "\n" not in str(error.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["vit", "dinov3"])
def test_cuda_agrees_with_the_cpu(kind):
    clf = make(kind)
    images, target = pictures(clf), [1, 3, 0]
    expected = create(clf).attribute(images, target)
    maps = create(clf.cuda()).attribute(images.cuda(), target)
    assert maps.is_cuda
    # convolutions run in tf32 there
    assert torch.allclose(maps.cpu(), expected, rtol=0.05, atol=0.02 * expected.abs().max().item())
