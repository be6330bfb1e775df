"""Maps that rank whole patches, against the patches that the networks read and against sorting in numpy."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import aha
from aha.explainer.evidence_decoder import EvidenceConfig
from aha.patches import aligned, by_patch, find_patches
from aha.ranks import rank_pixels
from aha.refinement import Residual
from aha.regions import draw, grid

from .attributors.architectures import MIXERS, PYRAMIDS, TRANSFORMERS, make
from .toys import pictures, tiny_classifier


def blocks(maps, side):
    """(patches, pixels of a patch) of a map (H, W)."""
    rows, cols = maps.shape[0] // side, maps.shape[1] // side
    return maps.reshape(rows, side, cols, side).swapaxes(1, 2).reshape(rows * cols, -1)


def test_patches_are_ranked_by_their_mean_and_pixels_within():
    generator = torch.Generator().manual_seed(0)
    patches = find_patches(nn.Conv2d(3, 4, 8, 8), 3, 24, 32)
    # means that differ by more than what stays of the differences within
    maps = torch.stack([torch.randperm(12, generator=generator) for _ in range(2)]) / 12.0
    maps = maps[:, patches.cell_index()][:, None] + torch.randn(2, 1, 24, 32, generator=generator)
    owner = blocks(np.arange(24 * 32).reshape(24, 32), 8)
    for before, after in zip(maps[:, 0].numpy(), by_patch(maps, patches)[:, 0].numpy(), strict=True):
        values = blocks(before.astype(np.float64), 8)
        expected = [owner[p][np.argsort(-values[p])] for p in np.argsort(-values.mean(axis=1))]
        np.testing.assert_array_equal(np.argsort(-after.ravel()), np.concatenate(expected))
        np.testing.assert_allclose(blocks(after, 8).mean(axis=1), values.mean(axis=1), atol=1e-6)


def test_it_is_symmetric():
    """Refinement takes gradients through it by applying it once more."""
    patches = find_patches(nn.Conv2d(3, 4, 8, 8), 3, 20, 30)
    a, b = torch.randn(2, 3, 1, 20, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close((a * by_patch(b, patches)).sum(), (by_patch(a, patches) * b).sum())


def test_the_border_may_cut_the_last_patches_off():
    patches = find_patches(nn.Conv2d(3, 4, 8, 8), 3, 20, 30)
    assert (patches.rows, patches.cols) == (3, 4)
    assert patches.row_index.bincount().tolist() == [8, 8, 4]
    assert patches.col_index.bincount().tolist() == [8, 8, 8, 6]


@pytest.mark.parametrize("size", [(32, 32), (20, 30)])
@pytest.mark.parametrize("cells", [2, 3, 4, 16])
def test_aligned_regions_are_of_whole_patches(size, cells):
    """Each patch lies in the cell of its middle pixel; cells that hold no middle are gone."""
    height, width = size
    patches = find_patches(nn.Conv2d(3, 4, 8, 8), 3, height, width)
    regions = draw(height, width, (cells, cells), torch.Generator().manual_seed(cells))
    found = aligned(regions, patches)
    before, after = regions.cell_index(), found.cell_index()
    expected = {}
    for top in range(0, height, 8):
        for left in range(0, width, 8):
            inside = after[top : top + 8, left : left + 8]
            assert (inside == inside[0, 0]).all()
            middle = before[(top + min(top + 8, height)) // 2, (left + min(left + 8, width)) // 2]
            expected.setdefault(int(middle), set()).add(int(inside[0, 0]))
    assert all(len(cells) == 1 for cells in expected.values())
    assert len(expected) == found.count == len(after.unique())
    assert (found.row_index.diff() >= 0).all() and (found.col_index.diff() >= 0).all()
    assert aligned(regions, None) is regions


@pytest.mark.parametrize("kind", [*TRANSFORMERS, *MIXERS])
def test_a_patch_is_what_one_token_sees(kind):
    """The embedding of a pixel's patch changes with the pixel, and no other's."""
    clf = make(kind)
    height, width = clf.input_size
    patches = find_patches(clf.module, 3, height, width)
    embed = getattr(clf.module, "patch_embed", None) or clf.module.stem
    images = torch.rand(1, 3, height, width)
    for y, x in ((0, 0), (7, 8), (height - 1, width - 1), (height // 2, 3)):
        changed = images.clone()
        changed[..., y, x] += 1
        with torch.no_grad():
            differs = (embed(changed) - embed(images)).abs().amax(dim=(0, -1)).flatten() > 1e-6
        assert differs.nonzero().flatten().tolist() == [int(patches.cell_index()[y, x])]


@pytest.mark.parametrize("kind", PYRAMIDS)
def test_networks_that_merge_their_tokens_or_begin_with_overlaps_have_none(kind):
    clf = make(kind)
    assert find_patches(clf.module, 3, *clf.input_size) is None


def test_networks_without_one_stem_of_patches_have_none():
    for first in (
        nn.Conv2d(3, 4, 16, 8),
        nn.Conv2d(3, 4, 8, 8, padding=1),
        nn.Conv2d(3, 4, 4, 4),
        nn.Conv2d(1, 4, 8, 8),
    ):
        assert find_patches(nn.Sequential(first), 3, 32, 32) is None
    two = nn.Sequential(nn.Conv2d(3, 3, 8, 8), nn.Conv2d(3, 4, 8, 8))
    assert find_patches(two, 3, 64, 64) is None
    assert find_patches(nn.Linear(3, 3), 3, 32, 32) is None


def test_the_explainer_and_its_refinement_rank_whole_patches():
    clf, images = tiny_classifier(), pictures()
    side = clf.module.patch_embed.patch_size[0]
    explainer = aha.Explainer.build(clf, decoder=EvidenceConfig(width=8))
    patches = find_patches(clf.module, 3, *images.shape[-2:])
    fine = aha.Explainer(None, explainer.decoder, clf, {**explainer.settings, "by_patch": False})
    torch.testing.assert_close(explainer.attribute(images), by_patch(fine.attribute(images), patches))
    trail = aha.refine(explainer, clf, images, steps=2, fractions=4, precision="fp32", every_step=True)
    assert (trail[1] != trail[0]).any()
    for scale in ("raw", "measured"):
        trail = torch.cat([trail, explainer.attribute(images, scale=scale)[None]])
    owner = blocks(np.arange(images[0, 0].numel()).reshape(images.shape[-2:]), side)
    patch_of = np.empty(owner.size, dtype=int)
    patch_of[owner.ravel()] = np.repeat(np.arange(len(owner)), side**2)
    for maps in trail:
        for ranks in rank_pixels(maps[:, 0]).flatten(1):
            order = np.empty(owner.size, dtype=int)
            order[ranks.numpy()] = np.arange(owner.size)
            runs = patch_of[order].reshape(len(owner), -1)
            assert (runs == runs[:, :1]).all()
    ranks = rank_pixels(fine.attribute(images)[:, 0])
    assert not torch.equal(ranks, rank_pixels(explainer.attribute(images)[:, 0]))


def test_training_ranks_whole_patches(monkeypatch):
    """The maps, with their gradient, and the grids."""
    clf, images = tiny_classifier(), pictures(4)
    explainer = aha.Explainer.build(clf, decoder=EvidenceConfig(width=8))
    patches = find_patches(clf.module, 3, *images.shape[-2:])
    data = [{"image": image, "label": 0} for image in images]
    config = aha.TrainConfig(steps=4, batch_size=2, fractions=4, cells=(3, 8), save_every=0, precision="fp32")
    seen, losses = [], aha.Objective.__call__

    def looked_at(self, images, maps, target, references, regions, *rest):
        seen.append((maps, regions))
        return losses(self, images, maps, target, references, regions, *rest)

    monkeypatch.setattr(aha.Objective, "__call__", looked_at)
    aha.Trainer(explainer, clf, data, config).fit(progress=False)
    assert len(seen) == 4
    for maps, regions in seen:
        assert maps.requires_grad
        means = patches.pool(maps.detach())[:, patches.cell_index()][:, None]
        assert (maps.detach() - means).abs().max() < 0.02 * means.std()
        assert (aligned(regions, patches).cell_index() == regions.cell_index()).all()
        assert regions.count <= patches.count


def test_a_step_of_the_residual_is_the_gradient_through_the_patches():
    """Against autograd: a step goes against the gradient to the residual's values, up to Adam's scale."""
    start = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    patches = find_patches(nn.Conv2d(3, 4, 8, 8), 3, 32, 32)
    weights = torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    residual = Residual(start, grid(32, 32, 8), patches)
    for values in residual.values:
        values.requires_grad_()
    expected = torch.autograd.grad((residual() * weights).sum(), residual.values)
    for values in residual.values:
        values.requires_grad_(False)
    residual.descend(weights, 0.1)
    for values, gradient in zip(residual.values, expected, strict=True):
        large = gradient.abs() > 0.01 * gradient.abs().max()
        assert torch.equal(values[large].sign(), -gradient[large].sign())


def test_explainers_of_before_and_as_published_rank_pixels(tmp_path, explainer):
    clf = explainer.classifier
    assert explainer.patches(32, 32) is None
    built = aha.Explainer.build(clf, decoder=EvidenceConfig(width=8))
    assert built.patches(32, 32) is not None
    file = built.save_pretrained(tmp_path) / "config.json"
    saved = json.loads(file.read_text())
    assert saved["by_patch"] is True
    before = {name: value for name, value in saved.items() if name not in ("by_patch", "sha256")}
    file.write_text(json.dumps(before))
    assert aha.Explainer.from_pretrained(tmp_path, clf).patches(32, 32) is None
    file.write_text(json.dumps({**before, "by_patch": "yes"}))
    with pytest.raises(ValueError, match="by_patch='yes': give true or false"):
        aha.Explainer.from_pretrained(tmp_path, clf)
