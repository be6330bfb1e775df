"""ViT-CX: its clustering against scipy, its scores by hand, batching, seeds."""

import functools
import zlib

import pytest
import torch
import torch.nn.functional as F

from aha import attributors
from aha.attributors.vit_cx import complete_linkage

from . import architectures
from .architectures import assert_restored_after_an_exception, assert_well_behaved


def make(kind):
    clf = architectures.make(kind)
    for layer in (clf.module.patch_embed.proj, clf.module.head):
        layer.weight.data *= 4  # confidences that differ between images and masks
    return clf


@pytest.fixture(scope="module")
def models():
    return functools.cache(make)


def pictures(clf, count=3):
    # of different smoothness, for different numbers of clusters
    noise = torch.rand(count, 3, *clf.input_size, generator=torch.Generator().manual_seed(1))
    weight = torch.linspace(0, 1, count)[:, None, None, None]
    return weight * noise + (1 - weight) * noise.mean(dim=-1, keepdim=True)


def create(clf, **options):
    return attributors.create("vit_cx", clf, **options)


def clusters_by_scipy(distances, threshold):
    hierarchy = pytest.importorskip("scipy.cluster.hierarchy")
    condensed = distances[torch.triu(torch.ones_like(distances), 1).bool()].numpy()
    labels = hierarchy.fcluster(hierarchy.linkage(condensed, "complete"), threshold, "distance")
    return {frozenset(torch.nonzero(torch.tensor(labels == label))[:, 0].tolist()) for label in set(labels)}


@pytest.mark.parametrize("count", [2, 3, 17, 200])
def test_complete_linkage_is_that_of_scipy(count):
    generator = torch.Generator().manual_seed(count)
    points = torch.rand(4, count, 5, generator=generator).double()
    points[1] = F.normalize(points[1], dim=-1) + 3 * torch.randint(0, 3, (count, 1), generator=generator)
    directions = F.normalize(points, dim=-1)
    for distances in (torch.cdist(points, points), 1 - directions @ directions.mT):
        sizes = set()
        for threshold in (0.0, 0.02, 0.1, 0.4, 1.0, 9.0):
            labels = complete_linkage(distances, threshold)
            assert labels.shape == (4, count)
            for i in range(4):
                found = {
                    frozenset(torch.nonzero(labels[i] == label)[:, 0].tolist()) for label in set(labels[i].tolist())
                }
                assert all(labels[i, list(members)].eq(min(members)).all() for members in found)
                assert found == clusters_by_scipy(distances[i], threshold)
                sizes.add(len(found))
        assert {1, count} <= sizes


def test_complete_linkage_with_ties_and_strangers():
    # two threes of equals; farther pairs that share a threshold; a member at infinity
    points = torch.tensor([0.0, 0.0, 5.0, 0.0, 5.0, 5.0, 6.0, torch.inf])
    distances = (points[:, None] - points[None, :]).abs().nan_to_num(nan=torch.inf, posinf=torch.inf)
    assert complete_linkage(distances[None], 0.5).tolist() == [[0, 0, 2, 0, 2, 2, 6, 7]]
    assert complete_linkage(distances[None], 1.0).tolist() == [[0, 0, 2, 0, 2, 2, 6, 7]]  # at the threshold: apart
    assert complete_linkage(distances[None], 1.1).tolist() == [[0, 0, 2, 0, 2, 2, 2, 7]]
    even = torch.ones(1, 6, 6)
    assert complete_linkage(even, 1.0).tolist() == [list(range(6))]
    assert complete_linkage(even, 1.5).tolist() == [[0] * 6]
    # a chain of ones: single linkage would join it all
    chain = torch.arange(6.0)
    assert complete_linkage((chain[:, None] - chain).abs()[None], 1.5).tolist() == [[0, 0, 2, 2, 4, 4]]


@pytest.mark.parametrize(
    ("kind", "prefix", "grid"), [("vit", 1, (4, 4)), ("registers", 5, (4, 4)), ("oblong", 1, (4, 6))]
)
def test_by_hand(models, kind, prefix, grid):
    clf = models(kind)
    images = pictures(clf)
    target = clf(images).argmax(dim=1)
    seen = []
    handle = clf.module.blocks[-1].norm1.register_forward_hook(lambda _m, _a, output: seen.append(output))
    whole = clf.probabilities(images)
    handle.remove()
    tokens = seen[0][:, prefix:]
    sizes = []
    for i in range(3):
        maps = tokens[i].T.double().unflatten(1, grid)
        maps = F.interpolate(maps[None], clf.input_size, mode="bilinear", align_corners=False)[0].flatten(1)
        maps = torch.stack([(m - m.min()) / (m.max() - m.min()) for m in maps])
        distances = 1 - F.cosine_similarity(maps[:, None], maps[None], dim=-1)
        clusters = sorted(clusters_by_scipy(distances, 0.1), key=min)
        sizes.append(len(clusters))
        total, coverage = torch.zeros(clf.input_size), torch.zeros(clf.input_size)
        for k, members in enumerate(clusters):
            mean = maps[sorted(members)].mean(0)
            mask = ((mean - mean.min()) / (mean.max() - mean.min())).view(clf.input_size).float()
            generator = torch.Generator().manual_seed(zlib.crc32(f"5 {k}".encode()))
            noise = 0.1 * torch.randn(3, *clf.input_size, generator=generator)
            pixels = clf.normalize(images[i])
            shown = clf.forward_normalized((pixels * mask + noise * (1 - mask))[None]).softmax(1)[0, target[i]]
            disturbed = clf.forward_normalized((pixels + noise * (1 - mask))[None]).softmax(1)[0, target[i]]
            total += (shown - disturbed + whole[i, target[i]]) * mask
            coverage += mask
        result = attributors.create("vit_cx", clf, seed=5).attribute(images[i : i + 1], target[i : i + 1])
        # maps are f(x) and small differences, which the bound is for
        assert torch.allclose(result[0, 0], total / coverage, rtol=0, atol=0.01 * result.std().item())
        assert result.std() > 2e-4
    assert len(set(sizes)) > 1 and 1 < min(sizes) < 24, sizes


@pytest.mark.parametrize("kind", ["vit", "oblong"])
def test_batches_modes_and_state(models, kind):
    assert_well_behaved(create, models(kind))


def test_passes_are_those_of_the_masks_together(models):
    clf = models("vit")
    images = pictures(clf)
    sizes = []
    handle = clf.module.register_forward_hook(lambda _m, _a, logits: sizes.append(len(logits)))
    method = attributors.create("vit_cx", clf, internal_batch_size=10)
    with attributors.count_passes(clf) as passes:
        method.attribute(images, 0)
    handle.remove()
    owner = method.masks(method.maps(method.capture(images).output.detach(), images), clf.input_size)[1]
    assert passes.forward == 3 + 2 * len(owner)
    assert passes.backward == 0
    # the masks of all images fill the passes: only the last is smaller
    assert sizes[0] == 3 and set(sizes[1:-2]) == {10} and sizes[-1] == sizes[-2] == (len(owner) % 10 or 10)


def test_seeds_and_options(models):
    clf = models("vit")
    images = pictures(clf)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, same, other = (attributors.create("vit_cx", clf, seed=seed).attribute(images) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    silent = [attributors.create("vit_cx", clf, noise=0.0, seed=seed).attribute(images) for seed in (1, 2)]
    assert torch.equal(*silent)
    method = attributors.create("vit_cx", clf, threshold=2.0)
    masks, owner = method.masks(method.maps(method.capture(images).output.detach(), images), clf.input_size)
    assert owner.tolist() == [0, 1, 2]
    enlarged = F.interpolate(masks[:, None], clf.input_size, mode="bilinear", align_corners=False).flatten(1)
    assert torch.allclose(enlarged.amin(1), torch.zeros(3), atol=1e-6)
    assert torch.allclose(enlarged.amax(1), torch.ones(3), atol=1e-6)
    for options in ({"threshold": 0.0}, {"noise": -1.0}, {"threshold": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(options))):
            attributors.create("vit_cx", clf, **options)


def test_maps_of_one_value_make_no_masks(models):
    clf = models("vit")
    images = pictures(clf)
    method = attributors.create("vit_cx", clf)
    maps = torch.rand(3, 24, 4, 4, generator=torch.Generator().manual_seed(0))
    maps[1] = 0.3
    maps[2, 1:] = -1.0
    _, owner = method.masks(maps, (32, 32))
    assert owner.tolist()[-1] == 2 and owner.eq(2).sum() == 1 and not owner.eq(1).any()
    handle = clf.module.blocks[-1].norm1.register_forward_hook(lambda _m, _a, output: torch.ones_like(output))
    assert torch.equal(method.attribute(images), torch.zeros(3, 1, 32, 32))
    handle.remove()


def test_state_is_restored_also_after_an_exception():
    assert_restored_after_an_exception(create, at_call=2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_the_cpu():
    clf = make("vit")
    images, target = pictures(clf), [1, 3, 0]
    expected = attributors.create("vit_cx", clf).attribute(images, target)
    maps = attributors.create("vit_cx", clf.cuda()).attribute(images.cuda(), target)
    assert maps.is_cuda
    # convolutions run in tf32 there
    assert torch.allclose(maps.cpu(), expected, rtol=0.05, atol=0.02 * expected.abs().max().item())
