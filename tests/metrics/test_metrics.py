"""Metrics against closed forms, and against image-by-image loops written here in float64."""

import math

import pytest
import torch
from torch import nn

from aha import metrics, references
from aha.classifier import Classifier
from aha.metrics import ConfidenceChange, DeletionInsertion, Localization, Protocol

from ..toys import SmallNet


class Weighted(nn.Module):
    """Logits [w·x, 0], so the probability of class 0 is sigmoid(w·x)."""

    def __init__(self, weights):
        super().__init__()
        self.register_buffer("weights", weights)
        self.seen = 0

    def forward(self, pixels):
        self.seen += len(pixels)
        score = (pixels * self.weights.to(pixels)).flatten(1).sum(dim=1)
        return torch.stack([score, torch.zeros_like(score)], dim=1)


def wrap(module, size=8, classes=2):
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    return Classifier.wrap(module.eval(), mean, std, input_size=(size, size), num_classes=classes)


@pytest.fixture
def small():
    return wrap(SmallNet(6), classes=3)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(5, 3, 8, 8, generator=generator)
    # few distinct values, so that ties are common
    maps = torch.randint(0, 12, (5, 1, 8, 8), generator=generator).float()
    target = torch.tensor([0, 1, 2, 1, 0])
    return images, maps, target


def test_ranks_are_stable_and_descending():
    maps = torch.tensor([[[1.0, 3.0], [3.0, 2.0]]])
    assert metrics.rank_pixels(maps).tolist() == [[[3, 0], [1, 2]]]
    assert metrics.rank_pixels(torch.zeros(2, 3, 3))[1].flatten().tolist() == list(range(9))
    assert metrics.rank_pixels(maps).dtype == torch.int32


def test_counts_and_area():
    assert metrics.pixel_counts(64, 5) == [0, 16, 32, 48, 64]
    assert metrics.pixel_counts(10, 21)[::10] == [0, 5, 10]
    assert metrics.area(torch.linspace(0, 1, 21)) == pytest.approx(0.5)
    assert metrics.area(torch.tensor([1.0, 0.0, 0.0])) == pytest.approx(0.25)


def test_closed_form_of_a_linear_classifier():
    """White image, black reference: k shown pixels of the optimal order have the k largest weights."""
    weights = torch.linspace(-1, 1, 16).view(4, 4)
    module = Weighted(weights.expand(3, 4, 4) / 3)
    clf = Classifier.wrap(module, input_size=(4, 4), num_classes=2)
    images = torch.ones(1, 3, 4, 4)
    points = 17
    metric = DeletionInsertion(clf, Protocol("test", points=points, references=("black",)))
    metric.update(images, weights[None, None], target=0)

    ordered = sorted(weights.flatten().double().tolist(), reverse=True)
    shown = [1 / (1 + math.exp(-sum(ordered[:k]))) for k in range(points)]
    left = [1 / (1 + math.exp(-sum(ordered[k:]))) for k in range(points)]

    def trapezoid(values):
        return (sum(values) - (values[0] + values[-1]) / 2) / (points - 1)

    computed = metric.compute()
    assert computed["insertion"] == pytest.approx(trapezoid(shown), abs=1e-6)
    assert computed["deletion"] == pytest.approx(trapezoid(left), abs=1e-6)
    assert computed["ins_minus_del"] == pytest.approx(trapezoid(shown) - trapezoid(left), abs=1e-6)
    assert computed["references"]["black"]["insertion"] == computed["insertion"]
    curves = metric.curves()["black"]
    assert torch.allclose(curves["insertion"].double(), torch.tensor(shown, dtype=torch.float64), atol=1e-6)
    # no other order inserts better or deletes faster
    for seed in range(3):
        other = DeletionInsertion(clf, metric.protocol)
        maps = torch.rand(1, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
        other.update(images, maps, target=0)
        assert other.compute()["insertion"] < computed["insertion"]
        assert other.compute()["deletion"] > computed["deletion"]


def test_deletion_mirrors_insertion_of_the_negated_map(small, batch):
    """Deleting the top k of A leaves what inserting the top N − k of −A shows (without ties)."""
    images, _, target = batch
    maps = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(3))
    reference = references.blur(images)
    one = metrics.sweep(small, images, maps, target, reference, points=9)
    other = metrics.sweep(small, images, -maps, target, reference, points=9)
    assert torch.allclose(one.deleted.confidence, other.inserted.confidence.flip(1), atol=1e-6)
    assert torch.equal(one.inserted.correct, other.deleted.correct.flip(1))


def brute_force(clf, images, maps, target, points):
    """Curves of every image and reference, one forward pass per perturbed image, in float64."""
    module = clf.module.double()
    mean, std = clf.mean.double().view(3, 1, 1), clf.std.double().view(3, 1, 1)
    colour = clf.mean_colour
    scores = {}
    for name in ("black", "mean", "blur"):
        rows = []
        for image, one_map, t in zip(images, maps, target, strict=True):
            reference = references.make(name, image[None], colour)[0].double()
            values = one_map.flatten().tolist()
            order = sorted(range(len(values)), key=lambda i: (-values[i], i))
            curves = {key: [] for key in ("deletion", "insertion", "positive", "negative")}
            for i in range(points):
                k = round(i * len(order) / (points - 1))
                top = torch.zeros(len(order), dtype=torch.bool)
                top[order[:k]] = True
                bottom = torch.zeros(len(order), dtype=torch.bool)
                bottom[order[len(order) - k :]] = True
                for key, replaced in (("deletion", top), ("insertion", ~top), ("negative", bottom)):
                    mixed = torch.where(replaced.view(image.shape[1:]), reference, image.double())
                    logits = module(((mixed - mean) / std)[None])[0]
                    right = float(logits.argmax() == t)
                    curves[key].append(right if key == "negative" else logits.softmax(0)[t].item())
                    if key == "deletion":
                        curves["positive"].append(right)
            rows.append({k: (sum(v) - (v[0] + v[-1]) / 2) / (points - 1) for k, v in curves.items()})
        scores[name] = rows
    clf.module.float()
    return scores


def test_agrees_with_an_image_by_image_loop(small, batch):
    images, maps, target = batch
    metric = DeletionInsertion(small, Protocol("test", points=9), internal_batch_size=14)
    metric.update(images[:2], maps[:2], target[:2])
    metric.update(images[2:], maps[2:], target[2:])
    per_image = metric.per_image()
    expected = brute_force(small, images, maps, target, 9)
    for name, rows in expected.items():
        for score in ("deletion", "insertion", "positive", "negative"):
            wanted = torch.tensor([row[score] for row in rows])
            assert torch.allclose(per_image["references"][name][score], wanted, atol=1e-6), (name, score)
    computed = metric.compute()
    for score in metric.directions:
        by_reference = [computed["references"][name][score] for name in expected]
        assert computed[score] == pytest.approx(sum(by_reference) / 3, abs=1e-6)
        assert computed[score] == pytest.approx(per_image[score].mean().item(), abs=1e-6)
    assert computed["neg_minus_pos"] == pytest.approx(computed["negative"] - computed["positive"], abs=1e-6)


@pytest.mark.parametrize("internal_batch_size", [2, 3, 6, 1000])
def test_batch_sizes_do_not_matter(small, batch, internal_batch_size):
    images, maps, target = batch
    whole = DeletionInsertion(small)
    whole.update(images, maps, target)
    split = DeletionInsertion(small, internal_batch_size=internal_batch_size)
    for i in range(5):
        split.update(images[i : i + 1], maps[i : i + 1], target[i : i + 1])
    for name, value in whole.per_image().items():
        if name != "references":
            assert torch.allclose(value, split.per_image()[name], atol=1e-6), name


def test_no_forward_pass_is_spent_twice(small, batch):
    images, maps, target = batch
    module = small.module
    module.seen = 0
    metrics.sweep(small, images, maps, target, references.black(images), points=21)
    assert module.seen == 5 * (2 * 19 + 2)

    module.seen = 0
    ends = metrics.endpoints(small, images, target)
    assert module.seen == 5 * (1 + 3)
    curves, change = DeletionInsertion(small), ConfidenceChange(small)
    curves.update(images, maps, ends=ends)
    assert module.seen == 5 * (1 + 3 + 3 * 2 * 19)
    change.update(images, maps, ends=ends)
    assert module.seen == 5 * (1 + 3 + 3 * 2 * 19 + 3)

    module.seen = 0
    DeletionInsertion(small).update(images, maps)  # the predicted class costs nothing
    assert module.seen == 5 * (1 + 3 + 3 * 2 * 19)


def test_shared_ends_change_nothing(small, batch):
    images, maps, _ = batch
    for kind in (DeletionInsertion, ConfidenceChange):
        alone, shared = kind(small), kind(small)
        alone.update(images, maps)
        shared.update(images, maps, ends=metrics.endpoints(small, images))
        assert alone.compute() == shared.compute()


def test_target_none_is_the_predicted_class(small, batch):
    images, _, _ = batch
    ends = metrics.endpoints(small, images)
    assert torch.equal(ends.target, small(images).argmax(dim=1))
    assert ends.original.correct.all()


def test_confidence_change_against_a_loop(small, batch):
    images, maps, target = batch
    maps = maps.clone()
    maps[4] = 3.0  # constant: nothing is shown
    metric = ConfidenceChange(small, internal_batch_size=2)
    metric.update(images, maps, target)
    per_image = metric.per_image()
    for name in ("black", "mean", "blur"):
        for i in range(5):
            reference = references.make(name, images[i : i + 1], small.mean_colour)
            low, high = maps[i].min(), maps[i].max()
            shade = (maps[i] - low) / (high - low) if high > low else torch.zeros_like(maps[i])
            mixed = shade * images[i : i + 1] + (1 - shade) * reference
            y = small.probabilities(images[i : i + 1])[0, target[i]].item()
            o = small.probabilities(mixed)[0, target[i]].item()
            row = per_image["references"][name]
            assert row["adp"][i].item() == pytest.approx(100 * max(0, y - o) / y, abs=1e-3)
            assert row["pic"][i].item() == (100.0 if o > y else 0.0)
    computed = metric.compute()
    assert computed["adp"] == pytest.approx(per_image["adp"].mean().item(), abs=1e-4)
    assert 0 <= computed["pic"] <= 100


def test_a_vanished_confidence_is_no_drop():
    clf = Classifier.wrap(Weighted(torch.full((3, 4, 4), -100.0)), input_size=(4, 4), num_classes=2)
    metric = ConfidenceChange(clf)
    metric.update(torch.ones(1, 3, 4, 4), torch.rand(1, 1, 4, 4), target=0)
    assert metric.compute()["references"]["mean"]["adp"] == 0


def test_localization_by_hand():
    maps = torch.zeros(1, 1, 4, 4)
    maps[0, 0, 0, :2] = torch.tensor([4.0, 2.0])
    masks = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    masks[0, 0, 0, 1:3] = True
    metric = Localization(tolerance=1)
    metric.update(maps, masks)
    # ranked: a miss, a hit, then 14 tied pixels with the other mask pixel among them
    expected = {"pointing_game": 1, "iou": 1 / 3, "f1": 0.5, "map": (1 / 2 + 2 / 16) / 2}
    computed = metric.compute()
    for name, value in expected.items():
        assert computed[name] == pytest.approx(value), name
    assert (computed["images"], computed["excluded"]) == (1, 0)
    exact = Localization(tolerance=0)
    exact.update(maps, masks)
    assert exact.compute()["pointing_game"] == 0


def test_pointing_game_tolerance_is_euclidean_and_scales_with_the_image():
    maps = torch.zeros(1, 1, 224, 224)
    maps[0, 0, 100, 100] = 1
    for offset, hit in (((0, 15), 1), ((0, 16), 0), ((9, 12), 1), ((11, 11), 0)):
        masks = torch.zeros(1, 1, 224, 224)
        masks[0, 0, 100 + offset[0], 100 + offset[1]] = 1
        metric = Localization()
        metric.update(maps, masks)
        assert metric.compute()["pointing_game"] == hit, offset
    half = torch.zeros(1, 1, 112, 112)
    half[0, 0, 50, 50] = 1
    for offset, hit in ((7, 1), (8, 0)):  # 7.5 px
        metric = Localization()
        metric.update(half, torch.zeros(1, 1, 112, 112).index_put_(_at(50, 50 + offset), torch.ones(())))
        assert metric.compute()["pointing_game"] == hit


def _at(row, col):
    return tuple(torch.tensor([i]) for i in (0, 0, row, col))


def test_average_precision_and_overlap_agree_with_scikit_learn():
    sklearn = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(0)
    maps = torch.randint(0, 20, (6, 1, 9, 7), generator=generator).float() / 20
    masks = torch.rand(6, 1, 9, 7, generator=generator) < 0.3
    metric = Localization()
    metric.update(maps[:1], masks[:1])
    metric.update(maps[1:], masks[1:])
    rows = metric.per_image()
    for i in range(6):
        truth, values = masks[i].flatten().numpy(), maps[i].flatten().numpy()
        marked = values > values.mean(dtype="float64")
        assert rows["map"][i] == pytest.approx(sklearn.average_precision_score(truth, values), abs=1e-6)
        assert rows["f1"][i] == pytest.approx(sklearn.f1_score(truth, marked), abs=1e-6)
        assert rows["iou"][i] == pytest.approx(sklearn.jaccard_score(truth, marked), abs=1e-6)


def test_empty_masks_are_left_out_and_counted():
    generator = torch.Generator().manual_seed(0)
    maps, masks = torch.rand(3, 1, 8, 8, generator=generator), torch.zeros(3, 1, 8, 8, dtype=torch.bool)
    metric = Localization()
    metric.update(maps, masks)
    with pytest.raises(RuntimeError, match="all 3 masks are empty"):
        metric.compute()
    masks[1, 0, :4] = True
    metric = Localization()
    metric.update(maps, masks)
    computed = metric.compute()
    assert (computed["images"], computed["excluded"]) == (1, 2)
    assert torch.isnan(metric.per_image()["iou"]).tolist() == [True, False, True]
    alone = Localization()
    alone.update(maps[1:2], masks[1:2])
    assert alone.compute()["map"] == computed["map"]


def test_a_constant_map_marks_nothing():
    metric = Localization()
    metric.update(torch.full((1, 1, 16, 16), 0.1), torch.ones(1, 1, 16, 16))
    computed = metric.compute()
    assert (computed["iou"], computed["f1"], computed["map"]) == (0, 0, 1)


def test_refusals(small, batch):
    images, maps, target = batch
    for kind in (DeletionInsertion, ConfidenceChange):
        metric = kind(small)
        with pytest.raises(RuntimeError, match="has seen no images"):
            metric.per_image()
        with pytest.raises(ValueError, match="NaN"):
            metric.update(images, maps.clone().fill_(torch.nan))
        with pytest.raises(ValueError, match="one value per pixel"):
            metric.update(images, maps[:, :, :4])
        with pytest.raises(ValueError, match="one class per image"):
            metric.update(images, maps, target[:2])
        with pytest.raises(ValueError, match="batch is empty"):
            metric.update(images[:0], maps[:0])
        ends = metrics.endpoints(small, images, target)
        with pytest.raises(ValueError, match="leave it out"):
            metric.update(images, maps, target, ends)
        with pytest.raises(ValueError, match="give those of these images"):
            metric.update(images[:2], maps[:2], ends=ends)
        assert not metric.rows
    with pytest.raises(ValueError, match="give an integer ≥ 2"):
        DeletionInsertion(small, internal_batch_size=1)
    with pytest.raises(ValueError, match="choose one of aha"):
        DeletionInsertion(small, protocol="rise2")
    with pytest.raises(ValueError, match="black, mean, blur"):
        Protocol("test", references=("grey",))
    with pytest.raises(ValueError, match="give at least 2, the two ends"):
        Protocol("test", points=1)
    metric = Localization()
    with pytest.raises(RuntimeError, match="has seen no images"):
        metric.per_image()
    with pytest.raises(ValueError, match="other than 0 and 1"):
        metric.update(maps, maps)
    with pytest.raises(ValueError, match="one value per pixel"):
        metric.update(maps, torch.ones(5, 1, 4, 4))
    with pytest.raises(ValueError, match="B, 1, H, W"):
        metric.update(maps, torch.ones(5, 3, 8, 8))


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_empty_compute_says_so(small):
    for metric in (DeletionInsertion(small), ConfidenceChange(small), Localization()):
        with pytest.raises(RuntimeError, match="has seen no images: call update"):
            metric.compute()


def test_states_sum_across_processes(small, batch):
    """Two ranks, the second of which has seen nothing."""
    images, maps, _ = batch

    def gather(value, group=None):
        return [value, value.new_zeros(0)]

    options = {"dist_sync_fn": gather, "distributed_available_fn": lambda: True}
    for kind in (DeletionInsertion, ConfidenceChange):
        alone, one_of_two = kind(small), kind(small, **options)
        for metric in (alone, one_of_two):
            metric.update(images[:3], maps[:3])
            metric.update(images[3:], maps[3:])
        assert one_of_two.compute() == alone.compute()
    alone, doubled = Localization(), Localization(**{**options, "dist_sync_fn": lambda v, group=None: [v, v]})
    for metric in (alone, doubled):
        metric.update(maps, maps > 5)
    assert doubled.compute()["images"] == 2 * alone.compute()["images"]
    assert doubled.compute()["map"] == pytest.approx(alone.compute()["map"])


def test_torchmetrics_habits(small, batch):
    images, maps, _ = batch
    metric = DeletionInsertion(small)
    assert metric.higher_is_better
    assert not list(metric.parameters())
    assert not metric.state_dict()
    first = metric(images, maps)  # forward returns the values of this batch
    assert first == metric.compute()
    metric.reset()
    assert not metric.rows
    assert [metrics.arrow(name) for name in ("deletion", "insertion", "adp", "pic", "map")] == list("↓↑↓↑↑")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_the_cpu(small, batch):
    images, maps, target = batch
    here = [kind(small) for kind in (DeletionInsertion, ConfidenceChange)]
    for metric in here:
        metric.update(images, maps, target)
    expected = [metric.compute() for metric in here]
    small.cuda()
    for kind, scores in zip((DeletionInsertion, ConfidenceChange), expected, strict=True):
        metric = kind(small)
        metric.update(images.cuda(), maps.cuda(), target)
        assert metric.rows[0].is_cuda
        computed = metric.compute()
        for reference, named in scores["references"].items():
            assert computed["references"][reference] == pytest.approx(named, rel=1e-3, abs=1e-3)
    alone, there = Localization(), Localization()
    alone.update(maps, maps > 5)
    there.update(maps.cuda(), maps.cuda() > 5)
    assert there.compute() == pytest.approx(alone.compute())
