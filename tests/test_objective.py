"""The streamed objective against the plain one, against a loop over masks, and against finite differences."""

import dataclasses

import numpy as np
import pytest
import torch

import aha
from aha import kernels, objective, references, regions
from aha.kernels import native
from aha.kernels.reference import gumbel_sinkhorn
from aha.objective import Objective, sharpness, standardize, strata

from .toys import tiny_classifier

needs_native = pytest.mark.skipif(native.load("_C") is not None, reason=f"aha._C: {native.load('_C')}")


@pytest.fixture
def setting(classifier, images):
    maps = torch.randn(3, 1, 32, 32, generator=torch.Generator().manual_seed(1))
    blank = [references.blur(images), references.black(images)]
    return (
        classifier,
        images,
        maps,
        classifier.resolve_target(images),
        blank,
        regions.grid(32, 32, 5, (0.2, -0.3)),
    )


def loss_and_gradient(objective, images, maps, *arguments):
    maps = maps.clone().requires_grad_()
    out = objective(images, maps, *arguments)
    (gradient,) = torch.autograd.grad(out.loss.sum(), maps)
    return out, gradient


def test_without_ends_the_value_is_the_midpoint_rule_with_masks_in_steps(setting):
    clf, images, maps, target, blank, grid = setting
    fractions = (torch.arange(4, dtype=torch.float64) + 0.5) / 4
    masks = kernels.soft_topk_masks(grid.pool(standardize(maps)), fractions, 0.1)
    deleted, inserted = kernels.perturb(images, blank[0], masks, grid.upsampler(sigma=0))
    found = [
        torch.stack([clf.probabilities(part[:, s])[torch.arange(3), target] for s in range(4)], dim=1).mean(dim=1)
        for part in (deleted, inserted)
    ]
    objective = Objective(clf, fractions=4, ends=False, smooth=0.0, chunk=6)
    out = objective(images, maps, target, blank[:1], grid, 0.1)
    torch.testing.assert_close(out.deletion, found[0])
    torch.testing.assert_close(out.insertion, found[1])
    smooth = dataclasses.replace(objective, smooth=1.0)(images, maps, target, blank[:1], grid, 0.1)
    assert (smooth.deletion - out.deletion).abs().max() > 1e-5


def seen_by(clf):
    """The images that go through the classifier, one number a pass, and how to stop counting."""
    seen = []
    return seen, clf.module.register_forward_hook(lambda module, inputs, logits: seen.append(len(logits)))


def test_even_fractions_of_ones_own_are_the_default_but_for_the_ends(setting):
    clf, images, maps, target, blank, grid = setting
    arguments = (images, maps, target, blank, grid, 0.1)
    default = Objective(clf, fractions=4, chunk=12)
    even = torch.linspace(0, 1, 4, dtype=torch.float64)[1:-1]
    expected, gradient = loss_and_gradient(default, *arguments)
    out, own = loss_and_gradient(default, *arguments, 0.0, None, even, torch.full((2,), 1 / 3))
    torch.testing.assert_close(own, gradient, rtol=1e-5, atol=1e-9)
    # f(I), and f(I0) of two references, at half a step of a third
    ends = [clf.probabilities(pixels)[torch.arange(3), target] / 6 for pixels in (images, *blank)]
    ends = ends[0] + (ends[1] + ends[2]) / 2
    torch.testing.assert_close(out.deletion + ends, expected.deletion)
    torch.testing.assert_close(out.insertion + ends, expected.insertion)
    midpoints = dataclasses.replace(default, ends=False)
    expected, gradient = loss_and_gradient(midpoints, *arguments)
    shares = (torch.arange(4, dtype=torch.float64) + 0.5) / 4
    out, own = loss_and_gradient(default, *arguments, 0.0, None, shares)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(own, gradient, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("chunk", [None, 4, 100])
def test_fractions_and_weights_of_ones_own(setting, chunk):
    clf, images, maps, target, blank, grid = setting
    shares, weights = torch.tensor([0.05, 0.3, 0.8], dtype=torch.float64), torch.rand(3, 3)
    masks = kernels.soft_topk_masks(grid.pool(standardize(maps)), shares, 0.1)
    expected = []
    for side in kernels.perturb(images, blank[0], masks, grid.upsampler()):
        curve = torch.stack([clf.probabilities(side[:, s])[torch.arange(3), target] for s in range(3)], dim=1)
        expected.append((weights * curve).sum(dim=1))
    objective = Objective(clf, chunk=chunk)
    arguments = (images, maps, target, blank[:1], grid, 0.1)
    seen, handle = seen_by(clf)
    out, gradient = loss_and_gradient(objective, *arguments, 0.0, None, shares, weights)
    handle.remove()
    assert sum(seen) == 3 * 2 * 3  # and none for the ends
    torch.testing.assert_close(out.deletion, expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.insertion, expected[1], rtol=1e-4, atol=1e-5)
    # the same weights for all images, for one of them alone
    for i in range(3):
        alone = (*(a[i : i + 1] for a in arguments[:3]), [blank[0][i : i + 1]], grid, 0.1)
        one = loss_and_gradient(objective, *alone, 0.0, None, shares, weights[i])
        torch.testing.assert_close(one[0].loss, out.loss[i : i + 1], rtol=1e-4, atol=1e-5)
        assert (one[1] - gradient[i]).norm() < 1e-4 * gradient[i].norm()


@pytest.mark.parametrize(
    ("fractions", "weights", "what"),
    [
        (None, torch.ones(3), "weights without fractions"),
        (torch.tensor([0.5, 0.2]), None, r"fractions=\[0.5, 0.2\d*\]: give \(S,\) ascending shares in \[0, 1\]"),
        (torch.tensor([0.5, 1.2]), None, "ascending shares"),
        (torch.tensor([0.5, torch.nan]), None, "ascending shares"),
        (torch.tensor([]), None, "S ≥ 1"),
        (torch.rand(2, 2), None, "ascending shares"),
        (torch.tensor([0.5]), torch.ones(2), r"weights is \(2,\): give \(1,\) or \(3, 1\) finite numbers"),
        (torch.tensor([0.5]), torch.tensor([torch.inf]), "finite numbers"),
    ],
)
def test_bad_fractions_and_weights(setting, fractions, weights, what):
    clf, *arguments = setting
    with pytest.raises(ValueError, match=what):
        Objective(clf)(*arguments, 0.1, fractions=fractions, weights=weights)


@pytest.mark.parametrize("power", [1.0, 1.5, 2.0])
def test_strata_are_an_unbiased_estimate_of_the_areas_and_of_their_gradient(setting, power):
    clf, images, maps, target, blank, grid = setting
    objective = Objective(clf, fractions=101, weight_regularizer=0.0)
    arguments = (images[:1], maps[:1], target[:1], [blank[0][:1]], grid, 0.1)
    dense, slope = loss_and_gradient(objective, *arguments)
    # the slope along one direction, for a gradient has more entries than there are draws
    along = slope / slope.norm()
    found = []
    generator = torch.Generator().manual_seed(0)
    for shift in torch.rand(80, generator=generator, dtype=torch.float64).tolist():
        out, gradient = loss_and_gradient(objective, *arguments, 0.0, None, *strata(3, shift, power))
        found.append([float(out.deletion), float(out.insertion), float((gradient * along).sum())])
    found = torch.tensor(found, dtype=torch.float64)
    expected = torch.tensor([float(dense.deletion), float(dense.insertion), float(slope.norm())])
    error = found.std(dim=0) / len(found) ** 0.5
    assert ((found.mean(dim=0) - expected).abs() < 3 * error + 1e-4 * expected.abs()).all()
    assert (error < 0.05 * expected.abs()).all()  # so that a bias of a seventh would be seen


def test_strata():
    shares, weights = strata(4, 0.5, 1.0)
    torch.testing.assert_close(shares, torch.tensor([0.125, 0.375, 0.625, 0.875], dtype=torch.float64))
    assert (weights == 0.25).all()
    shares, weights = strata(4, 0.25, 2.0)
    u = torch.tensor([1, 5, 9, 13], dtype=torch.float64) / 16
    torch.testing.assert_close(shares, u**2)
    torch.testing.assert_close(weights, u / 2)


@pytest.mark.parametrize("chunk", [2, 6, 14, 16, 1000])
@pytest.mark.parametrize("scores", ["standardized", "free"])
def test_streamed_is_unstreamed(setting, chunk, scores):
    clf, images, maps, target, blank, grid = setting
    arguments = (images, maps, target, blank, grid, 0.1, 0.5, 3)
    plain = Objective(clf, fractions=6, chunk=None, scores=scores)
    expected, gradient = loss_and_gradient(plain, *arguments)
    actual, streamed = loss_and_gradient(dataclasses.replace(plain, chunk=chunk), *arguments)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert gradient.abs().max() > 0
    assert (streamed - gradient).norm() < 1e-5 * gradient.norm()


def test_value_is_the_trapezoid_of_both_curves(setting):
    clf, images, maps, target, blank, grid = setting
    tau, points = 0.1, 6
    fractions = torch.linspace(0, 1, points, dtype=torch.float64)
    masks = kernels.soft_topk_masks(grid.pool(standardize(maps)), fractions, tau)
    expected = {"deletion": torch.zeros(3), "insertion": torch.zeros(3)}
    for reference in blank:
        deleted, inserted = kernels.perturb(images, reference, masks, grid.upsampler())
        for name, perturbed in (("deletion", deleted), ("insertion", inserted)):
            curve = torch.stack(
                [clf.probabilities(perturbed[:, s])[torch.arange(3), target] for s in range(points)], dim=1
            )
            expected[name] += torch.trapezoid(curve, fractions.float(), dim=1) / len(blank)
    out = Objective(clf, fractions=points)(images, maps, target, blank, grid, tau)
    torch.testing.assert_close(out.deletion, expected["deletion"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(out.insertion, expected["insertion"], rtol=1e-4, atol=1e-5)
    total = out.deletion - out.insertion + 2.5e-3 * sharpness(standardize(maps))
    torch.testing.assert_close(out.loss, total, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [None, 8])
@pytest.mark.parametrize("scores", ["standardized", "free"])
def test_gradient_by_finite_differences(setting, chunk, scores):
    clf, images, maps, target, blank, grid = setting
    clf = clf.double()
    objective = Objective(clf, fractions=5, chunk=chunk, scores=scores, n_iters=8)
    images, blank = images[:1].double(), [blank[0][:1].double()]
    maps = maps[:1].double().requires_grad_()

    def call(x):
        return objective(images, x, target[:1], blank, grid, 0.3, 0.5, 3).loss

    assert torch.autograd.gradcheck(call, (maps,), fast_mode=True)


def every_pixel(height, width):
    """A tiny ViT for height×width pixels, and the arguments of the objective with one pixel per cell."""
    side = min(height, width)
    clf = tiny_classifier(img_size=(height, width), patch_size=side // 4)
    images = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    maps = torch.randn(1, 1, height, width, generator=torch.Generator().manual_seed(1))
    grid = regions.grid(height, width, side)
    assert grid.count == height * width
    return clf, images, maps, clf.resolve_target(images), [references.blur(images)], grid


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 36)])
def test_one_pixel_per_cell_is_the_plain_loop_in_double(height, width):
    clf, images, maps, target, blank, grid = every_pixel(height, width)
    ours = Objective(clf, fractions=5, n_iters=5)
    expected, truth = loss_and_gradient(
        Objective(clf.double(), fractions=5, n_iters=5, backend="reference", chunk=None),
        *(images.double(), maps.double(), target, [b.double() for b in blank], grid, 0.05),
    )
    clf.float()
    actual, gradient = loss_and_gradient(ours, images, maps, target, blank, grid, 0.05)
    for name, value in actual._asdict().items():
        torch.testing.assert_close(value.double(), getattr(expected, name), rtol=1e-5, atol=1e-6, msg=name)
    assert (gradient - truth).norm() < 1e-4 * truth.norm()


@needs_native
def test_one_pixel_per_cell_by_finite_differences():
    clf, images, maps, target, blank, grid = every_pixel(32, 32)
    rank = Objective(clf.double(), fractions=5, n_iters=8)
    images, blank = images.double(), [blank[0].double()]
    maps = maps.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: rank(images, x, target, blank, grid, 0.05).loss, (maps,), fast_mode=True)


@needs_native
def test_every_pixel_of_a_photograph():
    # 50,176 cells: one matrix would take 10 GB
    clf, images, maps, target, blank, grid = every_pixel(224, 224)
    rank = Objective(clf, fractions=6)
    _, gradient = loss_and_gradient(rank, images, maps, target, blank, grid, 0.005)
    assert gradient.isfinite().all()
    # the slope along the gradient, by a central difference
    step = 1e-3 * maps.norm() / gradient.norm()
    above, below = (rank(images, maps + s * gradient, target, blank, grid, 0.005).loss for s in (step, -step))
    torch.testing.assert_close((above - below) / (2 * step), gradient.square().sum()[None], rtol=0.01, atol=0)
    assert 0 < rank.diagnose(maps, grid, 0.005)["row_entropy"] < 1


def test_row_entropy_by_the_matrix(setting, monkeypatch):
    clf, _, maps, *_ = setting
    rank = Objective(clf, n_iters=5)
    for cells in (6, 24):
        grid = regions.grid(32, 32, cells)
        scores = grid.pool(standardize(maps.double()))
        p = gumbel_sinkhorn(scores, torch.tensor(0.01).double(), 5, 0.0, None)
        p = (p / p.sum(dim=2, keepdim=True)).numpy()
        expected = -(p * np.log(p)).sum(2).mean() / np.log(grid.count)
        assert rank.diagnose(maps, grid, 0.01)["row_entropy"] == pytest.approx(expected, rel=1e-5)
    # of 36 ranks the middle one each
    monkeypatch.setattr(objective, "DIAGNOSED", 16 * grid.count)
    assert rank.diagnose(maps, grid, 0.01)["row_entropy"] == pytest.approx(expected, rel=1e-2)


def test_images_are_independent(setting):
    clf, images, maps, target, blank, grid = setting
    objective = Objective(clf, fractions=6, chunk=10)
    whole = objective(images, maps, target, blank, grid, 0.1).loss
    alone = [
        objective(images[i : i + 1], maps[i : i + 1], target[i : i + 1], [b[i : i + 1] for b in blank], grid, 0.1).loss
        for i in range(3)
    ]
    torch.testing.assert_close(torch.cat(alone), whole, rtol=1e-5, atol=1e-6)


def test_noise_of_a_seed_per_map_does_not_depend_on_the_batch(setting):
    clf, images, maps, target, blank, grid = setting
    objective, seeds = Objective(clf, fractions=6), torch.tensor([3, 2**62 - 1, 3])

    def losses(rows, seed):
        some = [images[rows], maps[rows], target[rows], [part[rows] for part in blank]]
        return objective(*some, grid, 0.3, 1.0, seed).loss

    whole = losses(slice(None), seeds)
    for i in range(3):
        torch.testing.assert_close(losses(slice(i, i + 1), seeds[i : i + 1]), whole[i : i + 1])
        torch.testing.assert_close(losses(slice(i, i + 1), int(seeds[i])), whole[i : i + 1])
    assert (losses(slice(None), torch.tensor([4, 5, 6])) - whole).abs().min() > 1e-6
    for bad in (seeds[:2], seeds.float()):
        with pytest.raises(ValueError, match=r"give an integer, or \(3,\) int64"):
            losses(slice(None), bad)


def test_targets_that_share_a_map_are_averaged(setting):
    clf, images, maps, _, blank, grid = setting
    objective = Objective(clf, fractions=6, weight_regularizer=0.0)
    pair = torch.tensor([[0, 1], [2, 3], [4, 0]])
    both = objective(images, maps, pair, blank, grid, 0.1).loss
    single = [objective(images, maps, pair[:, i], blank, grid, 0.1).loss for i in range(2)]
    torch.testing.assert_close(both, (single[0] + single[1]) / 2, rtol=1e-5, atol=1e-6)


class Counting(torch.nn.Module):
    """Counts images, and those whose pass is differentiated."""

    def __init__(self, module):
        super().__init__()
        self.module = module
        self.forwards = self.backwards = self.largest = 0

    def forward(self, pixels):
        self.forwards += len(pixels)
        self.largest = max(self.largest, len(pixels))
        if pixels.requires_grad:
            self.backwards += len(pixels)
        return self.module(pixels)


def test_passes_and_memory_of_a_step(setting):
    clf, images, maps, target, blank, grid = setting
    counting = Counting(clf.module)
    counted = aha.Classifier.wrap(counting, (0.5,) * 3, (0.5,) * 3, (32, 32))
    counting.forwards = counting.backwards = 0  # of the blank pass that probes it
    objective = Objective(counted, fractions=16, chunk=12)
    loss_and_gradient(objective, images, maps, target, blank[:1], grid, 0.1)
    # 14 interior fractions, two curves, three images; the ends are constants and cost one pass without gradient each
    assert counting.backwards == 2 * 14 * 3
    assert counting.forwards == counting.backwards + 2 * 3
    assert counting.largest <= 12


def test_a_constant_map_is_ranked_without_nan(setting):
    clf, images, maps, target, blank, grid = setting
    out, gradient = loss_and_gradient(
        Objective(clf, fractions=5), images, torch.zeros_like(maps), target, blank, grid, 0.1
    )
    assert torch.isfinite(out.loss).all()
    assert torch.isfinite(gradient).all()


def test_standardize_and_sharpness():
    maps = torch.randn(4, 1, 32, 32) * torch.tensor([1.0, 10.0, 1e-2, 1e3])[:, None, None, None] + 7
    scaled = standardize(maps)
    torch.testing.assert_close(scaled.mean(dim=(1, 2, 3)), torch.full((4,), 0.5), atol=1e-4, rtol=0)
    torch.testing.assert_close(scaled.std(dim=(1, 2, 3), correction=0), torch.full((4,), 0.29), atol=1e-4, rtol=0)
    assert sharpness(torch.full((1, 1, 32, 32), 3.0)).item() < 1e-10
    spike = torch.zeros(1, 1, 32, 32)
    spike[..., 16, 16] = 1.0  # box of 3 px at 32
    torch.testing.assert_close(sharpness(spike), torch.tensor([(8 / 9) ** 2 / 32**2]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scores": "softmax"}, "standardized, free"),
        ({"fractions": 2}, "give an integer ≥ 3"),
        ({"chunk": 1}, "give an integer ≥ 2"),
    ],
)
def test_bad_settings(classifier, options, message):
    with pytest.raises(ValueError, match=message):
        Objective(classifier, **options)
