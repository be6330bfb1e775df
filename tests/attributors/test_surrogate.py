"""LIME and Kernel SHAP against exact Shapley values, scikit-learn and captum."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from aha import attributors
from aha.classifier import Classifier

from .architectures import assert_restored_after_an_exception, assert_well_behaved, make, pictures

NAMES = ("lime", "kernel_shap")


@pytest.fixture(scope="module")
def vit():
    return make("vit")


class Game(nn.Module):
    """Confidence .1 + .8·v, v a polynomial of the mean of each cell of a 3×2 grid, in [0, 1] for images in [0, 1]."""

    linear = torch.tensor([0.3, 0.05, 0.0, 0.1, 0.2, 0.05])

    def __init__(self, additive):
        super().__init__()
        self.additive = additive

    def forward(self, pixels):
        x = F.adaptive_avg_pool2d(pixels.mean(1, keepdim=True), (3, 2)).flatten(1)
        value = x @ self.linear
        if not self.additive:
            value = value + 0.1 * x[:, 0] * x[:, 5] + 0.2 * x[:, 1] * x[:, 2] * x[:, 3] - 0.2 * x[:, 0] * x[:, 4]
        p = (0.1 + 0.8 * value)[:, None]
        return torch.cat([p.log(), (1 - p).log()], dim=1)


def game(additive):
    return Classifier.wrap(Game(additive), input_size=(12, 10), num_classes=2)


def shapley(players, value):
    """By enumeration: the mean gain of a player over all orders of arrival."""
    values = torch.zeros(players, dtype=torch.float64)
    for player in range(players):
        others = [other for other in range(players) if other != player]
        for size in range(players):
            weight = 1 / (players * math.comb(players - 1, size))
            for group in itertools.combinations(others, size):
                values[player] += weight * (value({*group, player}) - value(set(group)))
    return values


def masked(image, group, rows, cols, hidden):
    out = torch.full_like(image, hidden)
    height, width = image.shape[-2] // rows, image.shape[-1] // cols
    for player in group:
        row, col = divmod(player, cols)
        part = (..., slice(row * height, (row + 1) * height), slice(col * width, (col + 1) * width))
        out[part] = image[part]
    return out


@pytest.mark.parametrize("additive", [True, False])
def test_kernel_shap_is_exact_where_all_coalitions_fit(additive):
    clf = game(additive)
    images = pictures(clf, 2)
    method = attributors.create("kernel_shap", clf, cells=2, n_samples=16, reference="black")
    assert len(method.coalitions(4)) == 16
    assert len({tuple(z) for z in method.coalitions(4).tolist()}) == 16
    found = method.patches(images, torch.tensor([0, 1]))
    for i, image in enumerate(images):

        def value(group, image=image, i=i):
            return clf.probabilities(masked(image, group, 2, 2, 0.0)[None])[0, i].item()

        expected = shapley(4, value)
        assert expected.std() > 0.01
        assert torch.allclose(found[i], expected, atol=1e-6)


@pytest.mark.parametrize("players", [1, 2, 3, 7])
def test_the_kernel_weights_give_shapley_values_of_any_game(players):
    clf = game(True)
    method = attributors.create("kernel_shap", clf, n_samples=128)
    coalitions = method.coalitions(players)
    table = torch.rand(2, len(coalitions), dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    lookup = {frozenset(z.nonzero()[:, 0].tolist()): i for i, z in enumerate(coalitions)}
    assert len(lookup) == 2**players
    found = method.fit(coalitions.double(), table)
    for row, values in zip(found, table, strict=True):
        expected = shapley(players, lambda group, values=values: values[lookup[frozenset(group)]].item())
        assert torch.allclose(row, expected, atol=1e-10)


def test_drawn_coalitions_are_pairs_of_the_published_sizes():
    players = 10
    method = attributors.create("kernel_shap", game(True), n_samples=1001)
    drawn = method.coalitions(players)
    assert drawn.shape == (1001, players)
    assert not drawn[0].any()
    assert drawn[1].all()
    pairs = drawn[2:1000].view(-1, 2, players)
    assert (pairs[:, 0] ^ pairs[:, 1]).all()
    sizes = torch.bincount(drawn[2:].sum(dim=1), minlength=players + 1).double() / 999
    expected = torch.tensor([0.0, *(1 / (s * (players - s)) for s in range(1, players)), 0.0]).double()
    assert torch.allclose(sizes, expected / expected.sum(), atol=0.04)
    assert sizes[0] == sizes[players] == 0
    assert drawn[2:].double().mean(dim=0).sub(0.5).abs().max() < 0.06


def test_sampled_kernel_shap_is_exact_up_to_pairs_and_converges_beyond():
    players = 12
    generator = torch.Generator().manual_seed(5)
    linear = torch.randn(players, generator=generator, dtype=torch.float64)
    pairs = torch.randn(players, players, generator=generator, dtype=torch.float64)
    method = attributors.create("kernel_shap", game(True), n_samples=400)
    z = method.coalitions(players).double()
    assert len(z) == 400
    quadratic = z @ linear + torch.einsum("ni,ij,nj->n", z, pairs, z)
    expected = linear + pairs.diagonal() + (pairs + pairs.T).fill_diagonal_(0).sum(dim=1) / 2
    # a coalition and its complement cancel what pairs of players do together: no sampling error is left
    assert torch.allclose(method.fit(z, quadratic[None])[0], expected, atol=1e-8)

    errors = []
    expected = torch.tensor([1 / 3] * 3 + [0] * 9, dtype=torch.float64)
    for n_samples in (400, 3600):
        errors.append(0.0)
        for seed in range(8):
            method = attributors.create("kernel_shap", game(True), n_samples=n_samples, seed=seed)
            z = method.coalitions(players).double()
            found = method.fit(z, (z[:, 0] * z[:, 1] * z[:, 2])[None])[0]
            assert found.sum() == pytest.approx(1, abs=1e-9)
            errors[-1] += (found - expected).square().mean().item() / 8
    # nine times as many coalitions, a third of the error
    assert errors[1] ** 0.5 == pytest.approx(errors[0] ** 0.5 / 3, rel=0.3)


def test_fewer_coalitions_than_patches_still_share_everything():
    method = attributors.create("kernel_shap", game(True), n_samples=6)
    z = method.coalitions(20).double()
    values = torch.rand(2, 6, dtype=torch.float64)
    found = method.fit(z, values)
    assert torch.allclose(found.sum(dim=1), values[:, 1] - values[:, 0])
    share = (values[:, 1] - values[:, 0])[:, None] / 20
    centred = z[2:] - z[2:].mean(dim=1, keepdim=True)
    rest = values[:, 2:] - values[:, :1] - share * z[2:].sum(dim=1)
    # this driver gives the shortest solution
    shortest = torch.linalg.lstsq(centred, rest.T, driver="gelsd").solution.T
    assert torch.allclose(found - share, shortest, atol=1e-9)


def test_completeness(vit):
    images = pictures(vit)
    target = torch.tensor([0, 3, 1])
    method = attributors.create("kernel_shap", vit, n_samples=60, reference="black")
    total = method.patches(images, target).sum(dim=1)
    change = (vit.probabilities(images) - vit.probabilities(torch.zeros_like(images)))[range(3), target]
    assert change.abs().min() > 1e-4
    assert torch.allclose(total.float(), change, atol=1e-6)


def feature_mask(height, width, rows, cols):
    return ((torch.arange(height) * rows // height)[:, None] * cols + torch.arange(width) * cols // width)[None, None]


def test_kernel_shap_agrees_with_captum_on_equal_coalitions(vit):
    captum = pytest.importorskip("captum.attr")
    pytest.importorskip("sklearn")
    images = pictures(vit, 2)
    method = attributors.create("kernel_shap", vit, n_samples=80, reference="black")
    coalitions = method.coalitions(16)

    class Given(captum.KernelShap):
        def kernel_shap_perturb_generator(self, original_inp, **kwargs):
            for z in coalitions:
                yield z[None].long()

    mask = feature_mask(32, 32, 4, 4)
    with torch.no_grad():
        found = method.patches(images, torch.tensor([2, 0])).float()
        for i, target in enumerate((2, 0)):
            explained = Given(vit.probabilities)
            expected = explained.attribute(
                images[i : i + 1],
                target=target,
                feature_mask=mask,
                n_samples=80,
                perturbations_per_eval=16,
                return_input_shape=False,
            )
            # captum's weight for the two ends is 10⁶, ours is infinite
            assert torch.allclose(found[i], expected[0], atol=2e-3 * expected.abs().max().item())


def test_lime_is_the_published_ridge():
    linear_model = pytest.importorskip("sklearn.linear_model")
    metrics = pytest.importorskip("sklearn.metrics")
    clf = game(False)
    images = pictures(clf, 2)
    method = attributors.create("lime", clf, n_samples=200, cells=3)
    z = method.coalitions(9)
    assert z[0].all()
    assert z[1:].double().mean() == pytest.approx(0.5, abs=0.05)
    values = torch.rand(2, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found = method.fit(z.double(), values)
    distance = metrics.pairwise_distances(z.double(), torch.ones(1, 9), metric="cosine")[:, 0]
    weights = [math.sqrt(math.exp(-(d**2) / 0.25**2)) for d in distance]
    for row, y in zip(found, values, strict=True):
        ridge = linear_model.Ridge(alpha=1, fit_intercept=True).fit(z.double(), y, sample_weight=weights)
        assert torch.allclose(row, torch.as_tensor(ridge.coef_), atol=1e-9)
    assert method.patches(images, torch.tensor([0, 1])).shape == (2, 9)


def test_lime_survives_an_empty_coalition():
    method = attributors.create("lime", game(True), n_samples=40)
    z = method.coalitions(2).double()
    assert (z.sum(dim=1) == 0).any()
    assert torch.isfinite(method.fit(z, torch.rand(1, 40, dtype=torch.float64))).all()


def test_lime_agrees_with_captum_on_equal_coalitions():
    captum = pytest.importorskip("captum.attr")
    models = pytest.importorskip("captum._utils.models.linear_model")
    pytest.importorskip("sklearn")
    lime = pytest.importorskip("captum.attr._core.lime")
    clf = make("vit")
    # on a white image and a black reference the distance of images is that of coalitions
    image = torch.ones(1, 3, 32, 32)
    method = attributors.create("lime", clf, n_samples=80, reference="black")
    coalitions = iter(method.coalitions(16))
    explained = captum.Lime(
        clf.probabilities,
        interpretable_model=models.SkLearnRidge(alpha=1.0),
        similarity_func=lime.get_exp_kernel_similarity_function("cosine", kernel_width=0.25),
        perturb_func=lambda *_, **__: next(coalitions)[None].long(),
    )
    with torch.no_grad():
        expected = explained.attribute(
            image,
            target=1,
            feature_mask=feature_mask(32, 32, 4, 4),
            n_samples=80,
            perturbations_per_eval=16,
            return_input_shape=False,
        )
        found = method.patches(image, torch.tensor([1])).float()
    assert expected.abs().max() > 1e-4
    assert torch.allclose(found, expected, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("name", NAMES)
def test_a_linear_classifier_is_recovered(name):
    clf = game(True)
    image = torch.ones(1, 3, 12, 10)
    method = attributors.create(name, clf, n_samples=60, reference="black", cells=None)
    method.grid = lambda _: (3, 2)
    found = method.patches(image, torch.tensor([0]))[0]
    expected = 0.8 * Game.linear.double()
    if name == "kernel_shap":
        assert torch.allclose(found, expected, atol=1e-6)
        return
    # the ridge shrinks, but keeps the order and the player without influence
    assert torch.corrcoef(torch.stack([found, expected]))[0, 1] > 0.99
    assert found.abs().sum() < expected.sum()


@pytest.mark.parametrize("name", NAMES)
def test_values_by_hand(name):
    clf = game(False)
    images = pictures(clf, 2)
    for reference, hidden in (("black", 0.0), ("mean", clf.mean_colour[0].item())):
        method = attributors.create(name, clf, n_samples=12, cells=2, reference=reference, internal_batch_size=5)
        z = method.coalitions(4)
        values = method.values(images, torch.tensor([1, 0]), z)
        for i, target in enumerate((1, 0)):
            for n, row in enumerate(z):
                image = masked(images[i], row.nonzero()[:, 0].tolist(), 2, 2, hidden)
                assert values[i, n].item() == pytest.approx(clf.probabilities(image[None])[0, target].item(), abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["vit", "oblong"])
def test_batches_chunks_and_state(models, name, kind):
    clf = models(kind)
    assert attributors.create(name, clf).grid(pictures(clf)) == ((4, 6) if kind == "oblong" else (4, 4))
    assert_well_behaved(lambda clf, **options: attributors.create(name, clf, n_samples=21, **options), clf, [0, 2, 3])


@pytest.mark.parametrize("name", NAMES)
def test_any_classifier_and_size(name):
    clf = game(False)
    for size, cells, grid in (((12, 10), None, (12, 10)), ((30, 50), None, (14, 14)), ((30, 50), 3, (3, 3))):
        images = torch.rand(2, 3, *size)
        method = attributors.create(name, clf, n_samples=20, cells=cells)
        assert method.grid(images) == grid
        maps = method.attribute(images, 0)
        assert maps.shape == (2, 1, *size)
        assert torch.isfinite(maps).all()


@pytest.mark.parametrize("name", NAMES)
def test_seeds_and_passes(name, vit):
    images = pictures(vit)
    maps = [attributors.create(name, vit, n_samples=30, seed=seed).attribute(images, 1) for seed in (1, 1, 2)]
    assert torch.equal(maps[0], maps[1])
    assert not torch.equal(maps[0], maps[2])
    with attributors.count_passes(vit) as passes:
        attributors.create(name, vit, n_samples=30, internal_batch_size=4).attribute(images, 1)
    assert (passes.forward, passes.backward) == (90, 0)


@pytest.mark.parametrize("name", NAMES)
def test_state_after_an_exception(name):
    assert_restored_after_an_exception(
        lambda clf: attributors.create(name, clf, n_samples=8, internal_batch_size=6), "dinov3", at_call=3
    )


@pytest.mark.parametrize("name", NAMES)
def test_refusals(name, vit):
    for options in ({"n_samples": 1}, {"cells": 0}, {"reference": "pink"}):
        with pytest.raises(ValueError, match=next(iter(options))) as error:
            attributors.create(name, vit, **options)
        assert "\n" not in str(error.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
def test_cuda_agrees_with_the_cpu(name):
    clf = make("vit")
    images = pictures(clf)
    expected = attributors.create(name, clf, n_samples=40).attribute(images, [1, 3, 0])
    maps = attributors.create(name, clf.cuda(), n_samples=40).attribute(images.cuda(), [1, 3, 0])
    assert torch.allclose(maps.cpu(), expected, rtol=0.05, atol=0.02 * expected.abs().max().item())
