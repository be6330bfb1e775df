"""MDA: the search and the map against float64 loops of one candidate at a time, the curve fit against scipy."""

import copy
import functools
import itertools
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from aha import attributors
from aha.attributors import Passes, count_passes
from aha.attributors.mda import BLURS, concave_increments, fixed_passes, response
from aha.classifier import Classifier
from aha.metrics import DeletionInsertion, Protocol
from aha.references import adaptive_blur

from . import architectures
from .architectures import assert_restored_after_an_exception, pictures

# few passes, for all candidates are tried by hand as well
SHAPES = {"vit": {"depth": 2}, "oblong": {"depth": 2, "img_size": (16, 40)}}


def make(kind):
    return architectures.make(kind, **SHAPES[kind])


@pytest.fixture(scope="module")
def models():
    return functools.cache(make)


class Additive(nn.Module):
    """Logit of class 0: a weight for every pixel; the other classes 0."""

    def __init__(self, weights, classes=2):
        super().__init__()
        self.register_buffer("weights", weights)
        self.classes = classes

    def forward(self, pixels):
        score = (pixels.mean(dim=1) * self.weights).sum(dim=(1, 2)) - 3
        return F.pad(score[:, None], (0, self.classes - 1))


def additive(size=32, cell=8, seed=0, sign=None, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(size // cell, size // cell, generator=generator)
    weights = weights if sign is None else weights.abs() * sign
    weights = weights.repeat_interleave(cell, 0).repeat_interleave(cell, 1) / cell**2
    return Classifier.wrap(Additive(scale * weights), input_size=(size, size), num_classes=2)


def create(clf, internal_batch_size=64, **options):
    return attributors.create("mda", clf, internal_batch_size=internal_batch_size, **options)


def confidence(clf, images, target):
    with torch.no_grad():
        return clf(images).double().softmax(dim=-1)[:, target]


class ByHand:
    """MDA of one image (C, H, W) in NumPy and float64, one candidate per pass.

    Attributes:
        order, inserted: patches, most important first, and how many of them insertion found.
        insertion, deletion: lists of p at H + 1 points.
        values: of the patches, rows × columns, for γ = 0; `enlarged` makes them the map.
    """

    def __init__(self, clf, image, target, prior, cells, window, tau=0.9):
        self.clf, self.target = copy.deepcopy(clf).double(), target
        mean, std = (value.double().numpy()[:, None, None] for value in (clf.mean, clf.std))
        self.image = (image.double().numpy() - mean) / std
        self.blurred = self.blur()
        self.zero = np.zeros_like(self.image)
        height, width = image.shape[1:]
        rows, cols = cells
        self.patch = np.arange(rows * cols).reshape(cells).repeat(height // rows, 0).repeat(width // cols, 1)
        self._search(list(np.argsort(-np.asarray(prior), kind="stable")), window, tau)

        count = rows * cols
        ranks = np.zeros(count)
        ranks[self.order] = np.arange(count, 0, -1)
        pixels = np.argsort(-self.enlarged(ranks.reshape(cells)).ravel(), kind="stable")
        self.insertion, self.deletion = [], []
        for step in range(height + 1):
            top = np.zeros(height * width, dtype=bool)
            top[pixels[: step * width]] = True
            top = top.reshape(height, width)
            self.insertion.append(self.p(np.where(top, self.image, self.blurred)))
            self.deletion.append(self.p(np.where(top, self.zero, self.image)))
        self.values = np.zeros(count)
        for rank, (patch, step) in enumerate(zip(self.order, self.steps(count), strict=True), 1):
            self.values[patch] = step * (count / (height * width) + (count - rank) / count)
        self.values = self.values.reshape(cells)

    def p(self, pixels):
        with torch.no_grad():
            logits = self.clf.module(torch.from_numpy(pixels)[None])[0].numpy()
        exponentials = np.exp(logits - logits.max())
        return exponentials[self.target] / exponentials.sum()

    def blur(self):
        ndimage = pytest.importorskip("scipy.ndimage")
        for kernel in range(31, 102, 2):
            impulse = np.zeros(kernel)
            impulse[kernel // 2] = 1
            weights = ndimage.gaussian_filter(impulse, kernel)
            blurred = self.image
            for axis in (1, 2):
                blurred = ndimage.correlate1d(blurred, weights, axis, mode="constant")
            if self.p(blurred) <= 0.01:
                break
        return blurred

    def shown(self, patches, reference):
        return self.p(np.where(np.isin(self.patch, patches), self.image, reference))

    def _search(self, ranked, window, tau):
        p_blur, p = self.p(self.blurred), self.p(self.image)
        first, last = [], []
        while len(first) < len(ranked) - 1:
            pool = [patch for patch in ranked if patch not in first][:window]
            scores = [self.shown([*first, patch], self.blurred) for patch in pool]
            first.append(pool[np.argmax(scores)])
            if max(scores) - p_blur >= tau * abs(p - p_blur):
                break
        while len(first) + len(last) < len(ranked):
            pool = [patch for patch in reversed(ranked) if patch not in first + last][:window]
            scores = [self.shown([*last, patch], self.zero) for patch in pool]
            last.append(pool[np.argmin(scores)])
        self.order, self.inserted = [int(patch) for patch in first + last[::-1]], len(first)

    def steps(self, count):
        """Increments of the concave curve: non-negative least squares of ramps, with the rise all but fixed."""
        nnls = pytest.importorskip("scipy.optimize").nnls

        def scaled(curve, reference, original):
            return np.clip((np.array(curve) - reference) / abs(original - reference), 0, 1)

        inserted = np.maximum.accumulate(scaled(self.insertion, self.insertion[0], self.insertion[-1]))
        deleted = np.minimum.accumulate(scaled(self.deletion, self.deletion[-1], self.deletion[0]))
        points = np.linspace(0, 1, len(inserted))
        curve = np.interp(np.linspace(0, 1, count + 1), points, (inserted + 1 - deleted) / 2)
        ends = np.arange(1, count + 1)
        ramps = np.minimum(ends[:, None] / ends, 1)
        left = np.concatenate([ramps[:-1], np.full((1, count), 1e6)])
        weights, _ = nnls(left, np.append(curve[1:-1] - curve[0], 1e6 * (curve[-1] - curve[0])), maxiter=100 * count)
        return np.diff(ramps @ weights, prepend=0)

    def enlarged(self, values):
        """Bilinearly, between the centres of patches."""
        sides = []
        for cells, pixels in zip(values.shape, self.image.shape[1:], strict=True):
            centre = ((np.arange(pixels) + 0.5) * cells / pixels - 0.5).clip(0, cells - 1)
            sides.append(np.maximum(0, 1 - abs(centre[:, None] - np.arange(cells))))
        return sides[0] @ values @ sides[1].T


def searched(method, images, target, prior):
    regions = method.regions(images)
    scene = method.scene(images, target, regions)
    found = method.search(scene, prior, method.window_for(regions.count, images.shape[-2], 0))
    return scene, found, *method.curves(scene, found.order())


@pytest.mark.parametrize("kind", ["vit", "oblong"])
@pytest.mark.parametrize("window", [None, 3])
def test_order_and_curves_equal_one_candidate_at_a_time(models, kind, window):
    clf = models(kind)
    images, target = pictures(clf), [2, 1, 0]
    rows, cols = clf.input_size[0] // 8, clf.input_size[1] // 8
    prior = torch.rand(3, rows * cols, generator=torch.Generator().manual_seed(2))
    method = create(clf, window=window, internal_batch_size=5)
    _, found, insertion, deletion = searched(method, images, torch.tensor(target), prior)
    lengths = set()
    for i in range(3):
        used = window or math.floor(2 * math.sqrt(rows * cols))
        hand = ByHand(clf, images[i], target[i], prior[i].numpy(), (rows, cols), used)
        assert found.order()[i].tolist() == hand.order
        assert found.inserted[i] == hand.inserted
        assert np.allclose(insertion[i], hand.insertion, atol=1e-5)
        assert np.allclose(deletion[i], hand.deletion, atol=1e-5)
        lengths.add(hand.inserted)
    assert len(lengths) > 1  # images pass from insertion to deletion at different steps


def test_optimal_order_of_an_additive_model():
    clf = additive()
    images = pictures(clf, 4)
    images[1] *= 0.5
    method = create(clf, window=16, cells=4)
    scene, found, *_ = searched(method, images, torch.zeros(4, dtype=torch.int64), torch.zeros(4, 16))
    gains = []
    for reference in (scene.blurred, torch.zeros_like(images)):
        gain = (images - reference).mean(dim=1) * clf.module.weights
        gains.append(gain.unflatten(1, (4, 8)).unflatten(3, (4, 8)).sum(dim=(2, 4)).flatten(1))
    start = (scene.blurred.mean(dim=1) * clf.module.weights).sum(dim=(1, 2)) - 3
    end = (images.mean(dim=1) * clf.module.weights).sum(dim=(1, 2)) - 3
    for i, order in enumerate(found.order().tolist()):
        best = gains[0][i].argsort(descending=True)
        p = torch.sigmoid(start[i] + gains[0][i][best].cumsum(0))
        low = start[i].sigmoid()
        reached = (p - low >= 0.9 * (end[i].sigmoid() - low).abs()).tolist()
        length = min(reached.index(True) + 1, 15)
        assert found.inserted[i] == length
        assert order[:length] == best[:length].tolist()
        rest = [patch for patch in gains[1][i].argsort(descending=True).tolist() if patch not in order[:length]]
        assert order[length:] == rest


def test_ties_go_to_the_prior():
    blind = Classifier.wrap(Additive(torch.zeros(16, 16)), input_size=(16, 16), num_classes=2)
    prior = torch.tensor([[3.0, 9, 1, 7]])
    method = create(blind, cells=2, window=4)
    # nothing changes p, so one step of insertion is enough
    _, found, *_ = searched(method, pictures(blind, 1), torch.zeros(1, dtype=torch.int64), prior)
    assert found.order().tolist() == [[1, 3, 0, 2]]
    assert found.inserted.tolist() == [1]


def test_insertion_that_never_reaches_the_confidence_orders_all_patches():
    # patches only speak against the class: the blur, brighter at dark patches, keeps p above
    clf = additive(16, 8, sign=-1)
    images = torch.zeros(1, 3, 16, 16)
    images[..., :8, :8] = 1
    images[..., 8:, 8:] = 0.3
    method = create(clf, cells=2, window=4, prior="random")
    target = torch.zeros(1, dtype=torch.int64)
    scene, found, insertion, deletion = searched(method, images, target, torch.rand(1, 4))
    assert found.inserted.tolist() == [3] or insertion.max() >= 0.9 * scene.original
    assert sorted(found.order()[0].tolist()) == [0, 1, 2, 3]
    dark = [confidence(clf, images * 0, 0), confidence(clf, images, 0)]
    assert deletion[0, [-1, 0]].tolist() == pytest.approx([p.item() for p in dark], abs=1e-6)
    assert torch.isfinite(method.attribute(images, 0)).all()


@pytest.mark.parametrize(("kind", "window"), [("vit", None), ("oblong", 1), ("vit", 99)])
def test_passes_are_those_of_the_formula(models, kind, window):
    clf = models(kind)
    images = pictures(clf)
    height = clf.input_size[0]
    method = create(clf, prior="raw_attention", window=window, internal_batch_size=7)
    patches = clf.input_size[0] * clf.input_size[1] // 64
    used = {None: 8, 1: 1, 99: patches}[window]
    target = clf(images).argmax(dim=1)
    _, kernels = adaptive_blur(
        images, lambda x, index: clf.probabilities(x).gather(1, target[index, None])[:, 0], clf.mean
    )
    tried = torch.where(kernels > 0, (kernels - 31) // 2 + 1, BLURS)
    for given, extra in ((target, 0), (None, 1)):
        with count_passes(clf) as counted:
            method.attribute(images, given)
        # search, curves, image and zero; blurs; the prior's; the predicted class
        expected = patches * used - used * (used - 1) // 2 + 2 * height + tried + 1 + extra
        assert counted.forward == expected.sum()
        assert counted.backward == 0
    assert method.passes(images) == Passes((expected - extra).double().mean().item())


def test_passes_of_other_priors(models):
    clf = models("vit")
    images, target = pictures(clf, 2), torch.tensor([1, 0])
    own = create(clf, prior=torch.rand(2, 1, 32, 32), window=2).passes(images)
    method = attributors.create("gradcam_vit", clf)
    for prior in (method, lambda x, t: method.attribute(x, t)):
        made = create(clf, prior=prior, window=2)
        assert made.passes(images) == own + Passes(1, 1)
        with count_passes(clf) as counted:
            made.attribute(images, target)
        tried = made._blurred(images, target)[2] - made._blurred(images, clf.resolve_target(images))[2]
        assert counted == 2 * made.passes(images) + Passes(tried.sum().item())


def test_published_setting_costs_thousands_of_passes():
    assert fixed_passes(196, 28, 224) == 5558
    method = create(additive(), prior="random")
    assert method.window_for(196, 224, 0) == 28
    assert method.window_for(49, 224, 0) == 14
    assert method.window_for(784, 224, 0) == 28
    assert method.window_for(3, 224, 0) == 3


def test_blur_stops_when_the_class_is_gone():
    module = Additive(torch.full((32, 32), -40 / 32**2), classes=200)  # dark speaks for the class
    clf = Classifier.wrap(module, input_size=(32, 32), num_classes=200)
    images = torch.ones(2, 3, 32, 32)
    images[0] = 0
    images[0, :, 16] = 1
    method = create(clf, prior="random", cells=2)
    _, found, tried = method._blurred(images, torch.zeros(2, dtype=torch.int64))
    assert tried[1] == 1
    assert (found <= 0.01).tolist() == [True, True] or tried[0] == BLURS


@pytest.mark.parametrize("bound", [120, 140, 220])
def test_max_passes_are_kept(models, bound):
    clf = models("vit")
    images = pictures(clf)
    method = create(clf, prior="raw_attention", max_passes=bound)
    with count_passes(clf) as counted:
        method.attribute(images)
    assert counted.forward <= 3 * bound
    # one candidate more would not fit, or is more than W
    window = method.window_for(16, 32, 1)
    assert window == 8 or fixed_passes(16, window + 1, 32) + BLURS + 2 > bound
    assert fixed_passes(16, window, 32) + BLURS + 2 <= bound
    free = create(clf, prior="raw_attention").window_for(16, 32, 1)
    assert window <= free == 8


def test_max_passes_that_are_too_few(models):
    method = create(models("vit"), prior="raw_attention", max_passes=50)
    with pytest.raises(ValueError, match=r"max_passes=50 is too few: 16 patches take 80 .* give 118 ") as error:
        method.attribute(pictures(models("vit")))
    assert "\n" not in str(error.value)
    method.max_passes = 118
    assert method.window_for(16, 32, 1) == 1
    method.attribute(pictures(models("vit"), 1))


def curves(kind, batch, count):
    generator = torch.Generator().manual_seed(count)
    t = torch.linspace(0, 1, count + 1, dtype=torch.float64).repeat(batch, 1)
    noise = torch.randn(batch, count + 1, generator=generator, dtype=torch.float64)
    return {
        "noise": 0.5 + 0.2 * noise,
        "saturating": 1 - torch.exp(-12 * t) + 0.05 * noise,
        "late": torch.sigmoid(20 * (t - 0.6)) + 0.02 * noise,
        "concave": 1 - torch.exp(-4 * t),
        "falls at the end": t * (1.6 - t),
        "straight": t,
    }[kind].clamp(0, 1)


KINDS = ("noise", "saturating", "late", "concave", "falls at the end", "straight")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [1, 2, 3, 16, 60])
def test_concave_fit_equals_non_negative_least_squares(kind, count):
    nnls = pytest.importorskip("scipy.optimize").nnls
    c = curves(kind, 4, count)
    fitted = c[:, :1] + concave_increments(c).cumsum(dim=1)
    i = torch.arange(1.0, count + 1, dtype=torch.float64)
    ramps = torch.minimum(i[:, None] / i, torch.ones(()))
    for curve, found in zip(c, fitted, strict=True):
        rise = (curve[-1] - curve[0]).clamp_min(0)
        # the sum of the weights is fixed by an equation that outweighs all others
        left = torch.cat([ramps[:-1], torch.full((1, count), 1e6)])
        right = torch.cat([curve[1:-1] - curve[0], 1e6 * rise[None]])
        weights, _ = nnls(left.numpy(), right.numpy(), maxiter=100 * count)
        expected = curve[0] + ramps @ torch.from_numpy(weights) if rise > 0 else curve[0].expand(count)
        assert torch.allclose(found, expected, atol=1e-6, rtol=0)


def test_concave_fit_equals_a_general_solver():
    minimize = pytest.importorskip("scipy.optimize").minimize
    c = curves("late", 2, 9)
    for curve, found in zip(c.numpy(), concave_increments(c).cumsum(dim=1).numpy() + c[:, :1].numpy(), strict=True):
        rules = [
            {"type": "eq", "fun": lambda x, curve=curve: [x[0] - curve[0], x[-1] - curve[-1]]},
            {"type": "ineq", "fun": lambda x: 2 * x[1:-1] - x[:-2] - x[2:]},
            {"type": "ineq", "fun": lambda x: x[1:] - x[:-1]},
        ]
        solution = minimize(
            lambda x, curve=curve: ((x - curve) ** 2).sum(),
            curve,
            jac=lambda x, curve=curve: 2 * (x - curve),
            bounds=[(0, 1)] * 10,
            constraints=rules,
            options={"ftol": 1e-14, "maxiter": 500},
        )
        assert abs(solution.x[1:] - found).max() < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [7, 196, 784])
def test_concave_fit_meets_its_conditions(kind, count):
    c = curves(kind, 5, count)
    increments = concave_increments(c)
    assert (increments.diff(dim=1) <= 0).all() and (increments >= 0).all()
    rise = (c[:, -1] - c[:, 0]).clamp_min(0)
    assert torch.allclose(increments.sum(dim=1), rise, atol=1e-12)
    fitted = c[:, :1] + increments.cumsum(dim=1)
    assert fitted.min() >= 0 and fitted.max() <= 1 + 1e-12
    # a move towards any ramp never helps, and along a ramp that is used it does nothing
    i = torch.arange(1, count + 1, dtype=torch.float64)
    ramps = torch.minimum(i[:, None] / i, torch.ones(()))
    gradient = (fitted - c[:, 1:]) @ ramps
    weights = -torch.cat([increments[:, 1:], torch.zeros(5, 1)], dim=1).sub(increments) * i
    for slope, weight, height in zip(gradient, weights, rise, strict=True):
        if height > 0:
            level = (slope * weight).sum() / height
            assert (slope - level).min() > -1e-9
            assert ((slope - level) * weight).abs().max() < 1e-9


def test_curves_that_cannot_rise():
    c = torch.stack([torch.linspace(1, 0, 6), torch.full((6,), 0.3), torch.tensor([0.2, 0.9, 0, 1, 0.5, 0.1])])
    assert torch.equal(concave_increments(c), torch.zeros(3, 5, dtype=torch.float64))
    # alone or in company, a curve is fitted the same
    c = torch.cat([c, curves("late", 3, 5).float()])
    together, alone = concave_increments(c), torch.cat([concave_increments(one[None]) for one in c])
    assert torch.allclose(together, alone, atol=1e-14)
    assert together[3:].max() > 0


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_values_keep_the_order_strictly(gamma):
    method = create(additive(), prior="random", gamma=gamma)
    for kind, count in itertools.product((*KINDS, "falls"), (2, 16, 196, 784)):
        c = curves("straight", 3, count).flip(1) if kind == "falls" else curves(kind, 3, count)
        values = method.magnitudes(c, 256)
        assert values.dtype == torch.float32
        assert (values.diff(dim=1) < 0).all(), kind
        assert values.min() >= 0


def test_values_by_hand():
    c = torch.tensor([[0.0, 0.6, 0.6, 0.9, 0.9]])  # nearest: 0 .6 .75 .9 .9 is not concave at the third
    increments = concave_increments(c)[0].tolist()
    later = [(3 - i) / 4 for i in range(4)]
    sparse = [increments[i] * (1 / 50 + later[i]) + 1e-6 * later[i] for i in range(4)]

    def values(**options):
        return create(additive(), prior="random", **options).magnitudes(c, 50)[0].tolist()

    assert values() == pytest.approx(sparse)
    kept = [sparse[i] < 0.1 for i in range(4)]
    assert True in kept and not kept[0]
    dense = [(sparse[i] if kept[i] else later[i]) * sparse[0] / 0.75 for i in range(4)]
    assert values(gamma=1.0, kappa=0.1) == pytest.approx(dense)
    mixed = [0.7 * a + 0.3 * b for a, b in zip(sparse, dense, strict=True)]
    assert values(gamma=0.3, kappa=0.1) == pytest.approx(mixed)


def test_responses_are_scaled_clipped_and_never_turn_back():
    rising = torch.tensor(
        [[0.1, 0.0, 0.5, 0.3, 0.8, 0.6], [0.5, 0.7, 0.1, 0.2, 0.2, 0.2], [0.4, 0.3, 0.7, 0.5, 0.5, 0.4]]
    )
    scaled = response(rising, rising[:, 0], rising[:, -1], rising=True)
    assert torch.allclose(scaled[0], torch.tensor([0, 0, 0.8, 0.8, 1, 1]).double())
    # where the image is worse than its reference, or no better, everything stays finite
    assert torch.allclose(scaled[1], torch.tensor([0, 2 / 3, 2 / 3, 2 / 3, 2 / 3, 2 / 3]).double())
    assert torch.allclose(scaled[2], torch.tensor([0, 0, 0.3, 0.3, 0.3, 0.3]).double())
    falling = response(rising.flip(1), rising[:, 0], rising[:, -1], rising=False)
    assert torch.allclose(falling[0], torch.tensor([1, 1, 0.4, 0.4, 0, 0]).double())


def test_images_candidates_and_targets(models):
    clf = models("vit")
    images = pictures(clf, 2)
    method = create(clf, window=2)
    maps = method.attribute(images)
    assert torch.equal(maps, method(images, clf(images).argmax(dim=1)))
    # image by image, and candidate by candidate
    alone = create(clf, window=2, internal_batch_size=1, seed=5).attribute(images)
    assert torch.allclose(maps, alone, atol=1e-5)


@pytest.mark.parametrize("kind", ["vit", "oblong"])
def test_maps_by_hand(models, kind):
    clf = models(kind)
    images, target = pictures(clf, 2), torch.tensor([3, 0])
    rows, cols = (side // 8 for side in clf.input_size)
    cells = torch.rand(2, 1, rows, cols, generator=torch.Generator().manual_seed(3))
    prior = cells.repeat_interleave(8, 2).repeat_interleave(8, 3)
    maps = create(clf, prior=prior).attribute(images, target)
    window = math.isqrt(4 * rows * cols)
    for i in range(2):
        hand = ByHand(clf, images[i], int(target[i]), cells[i].flatten().numpy(), (rows, cols), window)
        expected = hand.enlarged(hand.values)
        assert expected.max() > 0.05
        assert np.allclose(maps[i, 0], expected, atol=1e-5 * expected.max() + 1e-6)  # a flat curve's steps


def test_convolutional_network_and_cells():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 6, 5, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 4))
    clf = Classifier.wrap(module, input_size=(30, 21), num_classes=4)
    images = pictures(clf, 2)
    for cells, expected in ((None, (20, 14)), (3, (4, 3)), ((2, 5), (2, 5))):
        method = create(clf, prior="input_x_gradient", cells=cells, max_passes=760)
        regions = method.regions(images)
        assert (regions.rows, regions.cols) == expected
        maps = method.attribute(images, [3, 0])
        assert maps.shape == (2, 1, 30, 21)
        assert torch.isfinite(maps).all()
    assert create(clf, cells=(4, 4), window=2).attribute(images).std() > 0


def test_patches_that_the_border_cuts_off():
    clf = architectures.make("vit", depth=2, dynamic_img_size=True, dynamic_img_pad=True)
    images = torch.rand(1, 3, 20, 29)
    method = create(clf, prior="random", window=1)
    regions = method.regions(images)
    assert (regions.rows, regions.cols) == (3, 4)
    assert regions.row_index.tolist() == [i // 8 for i in range(20)]
    assert regions.col_index.tolist() == [i // 8 for i in range(29)]
    assert method.attribute(images).shape == (1, 1, 20, 29)


def test_hierarchical_transformers_get_a_grid():
    with torch.device("meta"):
        module = timm.create_model("swin_tiny_patch4_window7_224")
    clf = Classifier(module, (0.5,) * 3, (0.5,) * 3, (224, 224), 1000)
    regions = create(clf, prior="random").regions(torch.zeros(1, 3, 224, 224))
    assert (regions.rows, regions.cols) == (14, 14)


def test_insertion_minus_deletion_near_the_optimum():
    scores = dict.fromkeys(("optimum", "free", "mda", "random"), 0.0)
    for seed in range(3):
        clf = additive(seed=seed, sign=1, scale=0.9)
        images = F.interpolate(torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(seed)), scale_factor=8)
        gains = F.avg_pool2d(images.mean(dim=1, keepdim=True) * clf.module.weights, 8)
        maps = {
            "optimum": F.interpolate(gains, scale_factor=8, mode="bilinear"),
            "free": create(clf, prior="random", cells=4, window=16).attribute(images, 0),
            "mda": create(clf, prior="random", cells=4).attribute(images, 0),
            "random": F.interpolate(torch.rand(6, 1, 4, 4), scale_factor=8, mode="bilinear"),
        }
        for name, values in maps.items():
            metric = DeletionInsertion(clf, Protocol("test", points=17))
            metric.update(images, values, 0)
            scores[name] += metric.compute()["ins_minus_del"] / 3
    assert scores["random"] + 0.1 < scores["mda"]
    # a window holds back what the prior hides; without one the order is nearly the best
    assert scores["mda"] < scores["free"]
    assert scores["free"] > 0.9 * scores["optimum"] > 0


def test_vit_insertion_minus_deletion_on_its_own_references(models):
    clf = models("vit")
    images = pictures(clf, 6)
    target = clf(images).argmax(dim=1)
    method = create(clf, prior="raw_attention")
    maps = attributors.create("raw_attention", clf).attribute(images)
    _, found, insertion, deletion = searched(method, images, target, F.avg_pool2d(maps, 8).flatten(1))
    gained = (insertion - deletion).mean(dim=1)
    # the prior's order, by a search that has no choice
    one = create(clf, prior="raw_attention", window=1)
    _, alone, before, after = searched(one, images, target, F.avg_pool2d(maps, 8).flatten(1))
    assert torch.equal(alone.order(), F.avg_pool2d(maps, 8).flatten(1).argsort(dim=1, descending=True, stable=True))
    assert gained.mean() > (before - after).mean(dim=1).mean() + 0.02
    assert not torch.equal(found.order(), alone.order())


def test_kinds_of_priors(models):
    clf = models("vit")
    images, target = pictures(clf), torch.tensor([1, 0, 2])
    named = create(clf, prior="gradcam_vit", window=2).attribute(images, target)
    made = attributors.create("gradcam_vit", clf)
    maps = made.attribute(images, target)
    for prior in (made, maps[:, 0], lambda x, t: made.attribute(x, t)):
        method = create(clf, prior=prior, window=2, internal_batch_size=2)
        assert torch.allclose(method.attribute(images, target), named, atol=1e-5)
    other = create(clf, prior="input_x_gradient", window=2).attribute(images, target)
    assert not torch.allclose(other, named, atol=1e-5)
    with pytest.raises(ValueError, match=r"maps is \(3, 1, 32, 32\): give \(2, 1, 32, 32\)"):
        create(clf, prior=maps).attribute(images[:2])
    with pytest.raises(ValueError, match="prior is a int: give a method's name"):
        create(clf, prior=3)
    with pytest.raises(ValueError, match="'nonsense' is not known"):
        create(clf, prior="nonsense")


def test_default_prior_accepts_the_classifier(models):
    known = attributors.available()
    prior = create(models("vit")).prior
    assert prior.name == ("bi_attention" if "bi_attention" in known else prior.name)
    prior = create(additive()).prior
    assert prior.name in ("gradcam", "input_x_gradient")
    assert create(models("vit"), internal_batch_size=3).prior.internal_batch_size == 3


def test_state_is_restored_also_after_an_exception(models):
    def search(clf):
        return create(clf, prior="gradcam_vit", window=2, precision="bf16")

    assert_restored_after_an_exception(search, at_call=45)  # in the search
    method, images = search(models("vit")), pictures(models("vit"))
    with torch.inference_mode():
        maps = method.attribute(images.clone())
    assert torch.equal(maps, method.attribute(images))


def test_bf16_mostly_agrees(models):
    clf = models("vit")
    images = pictures(clf, 4)
    seen = []
    handle = clf.module.head.register_forward_hook(lambda _module, _args, out: seen.append(out.dtype))
    ranks = []
    for precision in ("fp32", "bf16"):
        method = create(clf, prior="raw_attention", precision=precision)
        maps = F.avg_pool2d(method.attribute(images, [0, 1, 2, 3]), 8).flatten(1)
        ranks.append(maps.argsort(dim=1).argsort(dim=1).float())
    handle.remove()
    assert torch.bfloat16 in seen and torch.float32 in seen
    correlation = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(*ranks, strict=True)]
    assert sum(correlation) / 4 > 0.7


def test_refusals(models):
    clf = models("vit")
    for name, value in (
        ("window", 0),
        ("gamma", 1.5),
        ("kappa", -1),
        ("tau", 0),
        ("tau", 1.1),
        ("precision", "fp8"),
        ("internal_batch_size", 0),
    ):
        with pytest.raises(ValueError, match=f"{name}=") as error:
            create(clf, prior="raw_attention", **{name: value})
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="give cells=2 or more"):
        create(clf, prior="raw_attention", cells=(1, 1)).attribute(pictures(clf))
    with pytest.raises(ValueError, match="does not fit 32×32"):
        create(clf, prior="raw_attention", cells=(40, 1)).attribute(pictures(clf))
    with pytest.raises(ValueError, match="RGB in"):
        create(clf, prior="raw_attention").attribute(pictures(clf) * 255)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_the_cpu():
    clf = additive()
    images = pictures(clf)
    expected = create(clf, prior="input_x_gradient", cells=4).attribute(images, 0)
    maps = create(clf.cuda(), prior="input_x_gradient", cells=4).attribute(images.cuda(), 0)
    assert maps.is_cuda
    assert torch.allclose(maps.cpu(), expected, atol=1e-4)
