"""TIS against attention masks, loops by hand and scikit-learn's k-means."""

import pytest
import timm
import torch
import torch.nn.functional as F

from aha import attributors
from aha.attributors import tis
from aha.attributors.tis import kmeans
from aha.classifier import Classifier

from .architectures import (
    TRANSFORMERS,
    assert_refused,
    assert_restored_after_an_exception,
    assert_well_behaved,
    make,
    pictures,
)
from .by_hand import embedded, head

ACCEPTED = [kind for kind in TRANSFORMERS if kind != "beit"]


def create(clf, **options):
    return attributors.create("tis", clf, **{"n_masks": 10, **options})


def outputs_by_hand(clf, images):
    with torch.no_grad():
        tokens, extra = embedded(clf.module, clf.normalize(images))
        outputs = []
        for block, options in zip(clf.module.blocks, extra, strict=True):
            tokens = block(tokens, **options)
            outputs.append(tokens)
    return outputs


def masked_by_hand(clf, image, kept, prefix):
    """Logits of one image: all tokens go through, those not kept are invisible as keys and are left out at the end."""
    with torch.no_grad():
        tokens, extra = embedded(clf.module, clf.normalize(image[None]))
        count = tokens.shape[1]
        visible = [*range(prefix), *(prefix + patch for patch in kept)]
        mask = torch.zeros(count, dtype=torch.bool)
        mask[visible] = True
        mask = mask.expand(1, 1, count, count)
        for block, options in zip(clf.module.blocks, extra, strict=True):
            tokens = block(tokens, attn_mask=mask, **options)
        return head(clf.module, tokens[:, visible])[0]


@pytest.mark.parametrize("kind", ACCEPTED)
def test_exactly_half_of_the_patches_reach_every_block(kind):
    clf = make(kind)
    images = pictures(clf, 2)
    method = create(clf, internal_batch_size=6)
    patches = 24 if kind == "oblong" else 16
    seen = []
    handles = [b.register_forward_hook(lambda _, args, out: seen.append((args[0], out))) for b in method.blocks]
    method.attribute(images, 0)
    for handle in handles:
        handle.remove()
    sizes = [tuple(x.shape[:2]) for x, _ in seen]
    assert all(x.shape == out.shape for x, out in seen)
    whole, half = method.prefix + patches, method.prefix + patches // 2
    assert sizes == [(2, whole)] * 3 + [(6, half)] * 9 + [(2, half)] * 3


@pytest.mark.parametrize("kind", ACCEPTED)
def test_the_map_is_that_of_masked_keys(kind):
    """Dropped inside the model equals invisible to attention: maps from a loop over images and masks."""
    clf = make(kind)
    images = pictures(clf, 2)
    target = [2, 1]
    method = create(clf)
    kept = method.kept(outputs_by_hand(clf, images))
    rows, cols = method.grid(images)
    assert kept.shape == (2, 10, rows * cols // 2)
    grids = torch.zeros(2, 1, rows, cols)
    spread = 0.0
    for i in range(2):
        shown, coverage, confidences = torch.zeros(rows * cols), torch.zeros(rows * cols), []
        for mask in kept[i].tolist():
            assert len(set(mask)) == rows * cols // 2
            confidences.append(masked_by_hand(clf, images[i], mask, method.prefix).softmax(dim=0)[target[i]])
            for patch in mask:
                shown[patch] += confidences[-1]
                coverage[patch] += 1
        grids[i, 0] = torch.where(coverage > 0, shown / coverage, 0).view(rows, cols)
        spread = max(spread, torch.stack(confidences).std().item())
    expected = F.interpolate(grids, clf.input_size, mode="bilinear", align_corners=False)
    tolerance = 1e-5
    assert spread > 300 * tolerance  # masks differ by far more than what is let through
    assert torch.allclose(method.attribute(images, target), expected, atol=tolerance)


def test_masks_are_the_top_half_of_the_clustered_channel_maps():
    clf = make("registers")
    images = pictures(clf, 2)
    outputs = outputs_by_hand(clf, images)
    channels = torch.stack([out[:, 5:, c] for out in outputs for c in range(24)], dim=1)
    assert channels.shape == (2, 72, 16)
    # with as many masks as channels, every channel is one
    for n_masks in (72, 1024):
        kept = create(clf, n_masks=n_masks).kept(outputs)
        assert kept.shape == (2, 72, 8)
        assert torch.equal(kept, channels.topk(8, dim=-1).indices.sort(dim=-1).values)
    kept = create(clf, keep=0.35).kept(outputs)
    expected = kmeans(channels, 10).topk(5, dim=-1).indices.sort(dim=-1).values  # ⌊0.35·16⌋
    assert torch.equal(kept, expected)
    assert create(clf, keep=0.01).kept(outputs).shape == (2, 10, 1)
    large = torch.rand(1, 5 + 100, 24)
    assert create(clf, keep=0.29).kept([large]).shape == (1, 10, 29)  # the product is 28.999…


def test_keeping_every_patch_gives_the_confidence():
    clf = make("dinov3")
    images = pictures(clf)
    maps = create(clf, keep=1.0).attribute(images, 3)
    expected = clf.probabilities(images)[:, 3]
    assert torch.allclose(maps, expected[:, None, None, None].expand_as(maps), atol=1e-5)


def test_odd_grids_round_down_and_dynamic_sizes():
    clf = make("vit", dynamic_img_size=True)
    images = torch.rand(2, 3, 40, 24)
    method = create(clf)
    assert method.kept(outputs_by_hand(clf, images)).shape[-1] == 7  # of 15
    assert method.attribute(images, 0).shape == (2, 1, 40, 24)


def inertia(points, centroids):
    return (torch.cdist(points.double(), centroids.double()).amin(dim=-1) ** 2).sum().item()


def test_kmeans_agrees_with_scikit_learn():
    cluster = pytest.importorskip("sklearn.cluster")
    points = torch.randn(2, 300, 12, generator=torch.Generator().manual_seed(4))
    points[1] *= torch.linspace(0.2, 3, 12)
    found = kmeans(points, 20, seed=3)
    start = torch.randperm(300, generator=torch.Generator().manual_seed(3))[:20]
    for own, centroids in zip(points, found, strict=True):
        theirs = cluster.KMeans(20, init=own[start].numpy(), n_init=1, tol=0, max_iter=100, algorithm="lloyd").fit(
            own.numpy()
        )
        assert 3 < theirs.n_iter_ < 100
        assert inertia(own, centroids) == pytest.approx(theirs.inertia_, rel=1e-5)
        assert inertia(own, centroids) < 0.9 * inertia(own, own[start])


def test_kmeans_finds_separated_clusters_and_keeps_empty_ones():
    generator = torch.Generator().manual_seed(0)
    centres = 100 * torch.eye(4)
    points = (centres.repeat_interleave(25, dim=0) + torch.randn(100, 4, generator=generator))[None]
    start = torch.randperm(100, generator=torch.Generator().manual_seed(8))[:4]
    found = kmeans(points, 4, seed=8)[0]
    assert len(set((start // 25).tolist())) == 4  # one start in every cluster
    means = points.view(4, 25, 4).mean(dim=1)
    assert torch.allclose(found[(start // 25).argsort()], means, atol=1e-4)
    same = torch.ones(1, 9, 3)
    assert torch.equal(kmeans(same, 4), same[:, :4])


def test_kmeans_does_not_depend_on_chunks_batch_or_the_caller(monkeypatch):
    points = torch.randn(3, 120, 6, generator=torch.Generator().manual_seed(4))
    torch.manual_seed(7)
    before = torch.get_rng_state()
    expected = kmeans(points, 9)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.allclose(torch.cat([kmeans(one[None], 9) for one in points]), expected, atol=1e-5)
    monkeypatch.setattr(tis, "_CHUNK", 3 * 9 * 7)
    assert torch.allclose(kmeans(points, 9), expected, atol=1e-5)
    assert not torch.allclose(kmeans(points, 9, seed=1), expected)


@pytest.mark.parametrize("kind", ["distilled", "eva02"])
def test_batches_chunks_and_state(models, kind):
    assert_well_behaved(create, models(kind), [0, 2, 3])


def test_seeds_and_passes():
    clf = make("vit")
    images = pictures(clf)
    maps = [create(clf, seed=seed).attribute(images, 1) for seed in (1, 1, 2)]
    assert torch.equal(maps[0], maps[1])
    assert not torch.equal(maps[0], maps[2])
    with attributors.count_passes(clf) as passes:
        create(clf, internal_batch_size=4).attribute(images, 1)
    assert (passes.forward, passes.backward) == (3 + 30, 0)


@pytest.mark.parametrize("failing_call", [1, 3])
def test_state_after_an_exception(failing_call):
    assert_restored_after_an_exception(lambda clf: create(clf, internal_batch_size=6), "dinov3", at_call=failing_call)


def test_refusals():
    assert_refused(create, make("beit"), "tis drops tokens and accepts .* without relative position bias")
    clf = make("vit")
    for options in ({"n_masks": 0}, {"keep": 0.0}, {"keep": 1.5}):
        with pytest.raises(ValueError, match=next(iter(options))) as error:
            create(clf, **options)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("architecture", ["convit_tiny", "samvit_base_patch16", "hiera_tiny_224"])
def test_other_architectures_with_blocks_are_refused(architecture):
    with torch.device("meta"):
        module = timm.create_model(architecture, num_classes=1000)
    clf = Classifier(module, (0.5,) * 3, (0.5,) * 3, (224, 224), 1000)
    for name in ("tis", "caap"):
        assert_refused(lambda clf, name=name: attributors.create(name, clf), clf, f"{name} .* accepts timm vision")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["vit", "dinov3"])
def test_cuda_agrees_with_the_cpu(kind):
    # one mask per channel: rounding may move a point to another cluster, but not a channel's order
    clf = make(kind).double()
    images = pictures(clf).double()
    expected = create(clf, n_masks=1024).attribute(images, [1, 3, 0])
    maps = create(clf.cuda(), n_masks=1024).attribute(images.cuda(), [1, 3, 0])
    assert torch.allclose(maps.cpu(), expected, atol=1e-4)
