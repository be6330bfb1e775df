"""Every preset against curves written by hand for a classifier whose probability is linear in the pixels; the suite."""

import math

import pytest
import torch
from torch import nn

from aha import metrics, references
from aha.classifier import Classifier
from aha.metrics import (
    PROTOCOLS,
    ConfidenceChange,
    DeletionInsertion,
    Localization,
    MagnitudeAlignment,
    Monotonicity,
    Protocol,
    Suite,
)
from aha.metrics import perturbed as perturbed_images
from aha.metrics.curves import trend
from bench import metrics as bench_metrics

from ..toys import SmallNet

SIDE = 8
MEAN = (0.5, 0.4, 0.6)
ALIGNED = Protocol(
    "aligned",
    points=17,
    references=("black",),
    metrics=("mas_deletion", "mas_insertion", "mas_ins_minus_del", "deletion", "insertion"),
    monotone=True,
)


class Linear(nn.Module):
    """Class 0 has the probability base + Σ w·z of the normalised pixels z, within (0, 1)."""

    def __init__(self, weights, base):
        super().__init__()
        self.register_buffer("weights", weights)
        self.base, self.seen = base, 0

    def probability(self, z):
        return (self.base + (z * self.weights.to(z)).flatten(1).sum(dim=1)).clamp(1e-6, 1 - 1e-6)

    def forward(self, z):
        self.seen += len(z)
        p = self.probability(z.double())
        return torch.stack([p.log(), (1 - p).log()], dim=1).float()


def wrap(module, classes=2, size=SIDE):
    std, colour = (0.5, 0.25, 0.4), (0.2, 0.3, 0.4)
    return Classifier.wrap(module.eval(), MEAN, std, input_size=(size, size), num_classes=classes, mean_colour=colour)


@pytest.fixture
def small():
    return wrap(SmallNet(6), classes=3)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(5, 3, SIDE, SIDE, generator=generator)
    maps = torch.randint(0, 12, (5, 1, SIDE, SIDE), generator=generator).float() - 4
    masks = torch.rand(5, 1, SIDE, SIDE, generator=generator) < 0.3
    return images, maps, torch.tensor([0, 1, 2, 1, 0]), masks


def right(clf, images):
    """Labels with which the images are classified right."""
    return clf(images).argmax(dim=1)


def pictures():
    """An image whose blur is unlike it, and a classifier that is sure of class 0 there and not in the blur."""
    generator = torch.Generator().manual_seed(4)
    image = torch.rand(1, 3, SIDE, SIDE, generator=generator)
    blurred = references.published_blur(image, torch.tensor(MEAN), 31, 31.0)
    weights = (image - blurred) * torch.rand(image.shape, generator=generator)
    # some of the wrong sign, so that the curves are not monotone
    weights[:, :, :2] *= -0.3
    clf = wrap(Linear(weights[0], 0.0))
    z, z0 = clf.normalize(image), clf.normalize(blurred)
    clf.module.weights *= 0.9 / ((z - z0) * weights).sum()
    clf.module.base = 0.9 - (z * clf.module.weights).sum().item()
    return clf, image


def colour(clf, name, image):
    if name == "adaptive_blur":
        made = references.adaptive_blur(image, lambda images, _: clf.probabilities(images)[:, 0], clf.mean)
        assert made[1] > 0
        return made[0]
    return references.make(name, image, clf.mean_colour, clf.mean)


def gains(clf, image, name):
    """What every pixel adds to the probability as it turns from the reference into the image, float64."""
    z, z0 = (clf.normalize(pixels.double()) for pixels in (image, colour(clf, name, image)))
    return ((z - z0) * clf.module.weights.double()).sum(dim=(0, 1)).flatten().tolist(), clf.module.probability(z0)


def curve_by_hand(clf, image, name, values, counts, inserting):
    """Probability at every count for the descending order of ``values``, by plain sums."""
    gain, _ = gains(clf, image, name)
    z0 = clf.normalize(colour(clf, name, image).double())
    empty = clf.module.base + (z0 * clf.module.weights.double()).sum().item()
    order = sorted(range(len(values)), key=lambda i: (-values[i], i))
    curve = []
    for count in counts:
        shown = order[:count] if inserting else order[count:]
        curve.append(min(max(empty + math.fsum(gain[i] for i in shown), 1e-6), 1 - 1e-6))
    return curve


def scaled_by_hand(curve, inserting):
    low, high = (curve[0], curve[-1]) if inserting else (curve[-1], curve[0])
    out = []
    for value in curve:
        value = min(max((value - low) / (high - low), 0.0), 1.0)
        out.append(value if not out else (max if inserting else min)(out[-1], value))
    return out


def trapezoid(values):
    return (math.fsum(values) - (values[0] + values[-1]) / 2) / (len(values) - 1)


def test_counts_of_the_presets():
    side = 224
    rise = PROTOCOLS["rise"].counts(side, side)
    assert len(rise) == 225
    assert rise[:2] == [0, 224]
    assert rise == PROTOCOLS["mda"].counts(side, side) == PROTOCOLS["mas"].counts(side, side)
    assert PROTOCOLS["rise"].counts(4, 6) == [0, 6, 12, 18, 24]
    assert PROTOCOLS["chefer"].counts(10, 10) == [10, 20, 30, 40, 50, 60, 70, 80, 90]
    assert PROTOCOLS["aha"].counts(side, side) == [round(0.05 * i * side * side) for i in range(21)]
    assert set(PROTOCOLS) == {"aha", "rise", "chefer", "mda", "mas", "monotonicity", "localisation"}
    assert all(protocol.about for protocol in PROTOCOLS.values())


def test_references_of_the_presets(small, batch):
    images = batch[0]
    ends = metrics.endpoints(small, images, protocol="rise")
    zero, blurred = ends.references
    assert torch.equal(zero, small.mean[:, None, None].expand_as(images))
    assert small.normalize(zero).abs().max() == 0
    assert torch.equal(blurred, references.published_blur(images, small.mean, 11, 5.0))
    ends = metrics.endpoints(small, images, protocol="chefer", labels=right(small, images))
    assert ends.references.abs().max() == 0


@pytest.mark.parametrize("name", ["aha", "rise", "mda", "mas"])
def test_areas_are_those_of_sums_by_hand(name):
    clf, image = pictures()
    protocol = PROTOCOLS[name]
    suite = Suite(clf, protocol)
    shared = suite.begin(image, labels=[0])
    generator = torch.Generator().manual_seed(0)
    others = [torch.rand(1, 1, SIDE, SIDE, generator=generator) for _ in range(5)]
    counts = protocol.counts(SIDE, SIDE)
    for reference in protocol.references:
        optimal = torch.tensor(gains(clf, image, reference)[0]).float().view(1, 1, SIDE, SIDE)
        sides = {"deletion": protocol.deleting, "insertion": protocol.inserting}
        bounds = {}
        for maps in (optimal, *others):
            scores = suite.measure(shared, maps)
            for side in (side for side, served in sides.items() if reference in served):
                wanted = curve_by_hand(clf, image, reference, maps.flatten().tolist(), counts, side == "insertion")
                if protocol.monotone:
                    wanted = scaled_by_hand(wanted, side == "insertion")
                assert scores.curves[reference][side][0].tolist() == pytest.approx(wanted, abs=5e-6)
                got = scores.by_reference[reference][side].item()
                assert got == pytest.approx(trapezoid(wanted), abs=2e-6)
                # no order inserts better or deletes faster than that of the gains
                bound = bounds.setdefault(side, got)
                assert maps is optimal or (got < bound if side == "insertion" else got > bound)


def test_deletion_and_insertion_of_rise_are_averaged_apart():
    clf, image = pictures()
    suite = Suite(clf, "rise")
    scores = suite.measure(suite.begin(image, 0), torch.rand(1, 1, SIDE, SIDE))
    assert suite.protocol.references == ("zero", "blur11")
    assert set(scores.by_reference["zero"]) == {"deletion"}
    assert set(scores.by_reference["blur11"]) == {"insertion"}
    values = {name: value.item() for name, value in scores.values.items()}
    assert list(values) == list(suite.protocol.metrics) == ["deletion", "insertion", "ins_minus_del"]
    assert values["ins_minus_del"] == pytest.approx(values["insertion"] - values["deletion"], abs=1e-7)
    assert values["deletion"] == scores.by_reference["zero"]["deletion"].item()


def test_chefer_counts_the_label_not_the_target(small, batch):
    images, maps, _, _ = batch
    labels = right(small, images)
    labels[1] = (labels[1] + 1) % 3
    labels[4] = -1
    suite = Suite(small, "chefer")
    assert suite.protocol.needs == {"label"}
    shared = suite.begin(images, target=torch.tensor([0, 0, 0, 0, 0]), labels=labels)
    assert shared.takes_part.tolist() == [True, True, True, True, False]
    assert torch.allclose(shared.confidence, small.probabilities(images)[:, 0])
    scores = suite.measure(shared, maps)
    fractions = [i / 10 for i in range(1, 10)]
    for i in range(4):
        order = sorted(range(SIDE**2), key=lambda j: (-maps[i].flatten()[j].item(), j))
        for name, removed in (("positive", order), ("negative", order[::-1])):
            seen = []
            for fraction in fractions:
                pixels = images[i].clone().flatten(1)
                pixels[:, removed[: round(fraction * SIDE**2)]] = 0
                seen.append(float(small(pixels.view(1, 3, SIDE, SIDE)).argmax() == labels[i]))
            assert scores.curves["black"][name][i].tolist() == seen
            assert scores.values[name][i].item() == pytest.approx(trapezoid(seen), abs=1e-6)
    assert all(value[4].isnan() for value in scores.values.values())
    metric = DeletionInsertion(small, "chefer")
    metric.update(images, maps, labels=labels)
    computed = metric.compute()
    assert (computed["images"], computed["excluded"]) == (4, 1)
    assert computed["positive"] == pytest.approx(scores.values["positive"][:4].mean().item())
    with pytest.raises(ValueError, match="needs labels: give"):
        suite.begin(images)
    with pytest.raises(ValueError, match="−1 where unknown"):
        suite.begin(images, labels=[0, 1, 2, 3, 0])
    with pytest.raises(ValueError, match="integers"):
        suite.begin(images, labels=[0, 1])


def test_mda_drops_the_wrong_the_unsure_and_those_that_no_blur_hides():
    clf, image = pictures()
    sure, unsure = image, 0.5 * image + 0.5 * colour(clf, "adaptive_blur", image)
    assert 0.3 < clf.probabilities(unsure)[0, 0] < 0.6
    images = torch.cat([sure, sure, unsure, sure])
    labels = torch.tensor([0, 1, 0, -1])
    suite = Suite(clf, "mda")
    assert suite.protocol.needs == {"label"}
    shared = suite.begin(images, labels=labels)
    assert shared.takes_part.tolist() == [True, False, False, False]
    maps = torch.rand(4, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    scores = suite.measure(shared, maps)
    alone = suite.measure(suite.begin(sure, labels=[0]), maps[:1])
    for name, value in scores.values.items():
        assert value.isnan().tolist() == [False, True, True, True]
        assert value[0] == alone.values[name][0]
    # white stays white, however strong the blur
    white = torch.ones_like(image)
    clf.module.base = 0.9 - (clf.normalize(white) * clf.module.weights).sum().item()
    shared = suite.begin(white, labels=[0])
    assert shared.takes_part.tolist() == [False]
    clf.module.seen = 0
    assert suite.measure(shared, maps[:1]).values["insertion"].isnan().all()
    assert clf.module.seen == 0
    metric = DeletionInsertion(clf, "mda")
    metric.update(white, maps[:1], labels=[0])
    with pytest.raises(RuntimeError, match="none of 1 images takes part in protocol 'mda'"):
        metric.compute()


def test_select_caps_every_class():
    protocol = Protocol("test", confidence=0.6, per_class=2)
    labels = torch.tensor([3, 1, 3, 3, 1, 3, -1, 1, 1])
    predicted = torch.tensor([3, 1, 0, 3, 1, 3, 2, 1, 1])
    confidence = torch.tensor([0.7, 0.6, 0.9, 0.9, 0.5, 0.9, 0.9, 0.8, 0.9])
    part = protocol.takes_part(labels, predicted, confidence).tolist()
    assert part == [True, True, False, True, False, True, False, True, True]
    assert protocol.select(labels, predicted, confidence).tolist() == [
        True,
        True,
        False,
        True,
        False,
        False,
        False,
        True,
        False,
    ]
    assert Protocol("test").select(labels, predicted, confidence).all()


def white_and_weights(weights):
    """A white image and a classifier with p = 0.1 for black; pixel i of the image adds 0.8·w_i/Σw."""
    clf = wrap(Linear(torch.zeros(3, SIDE, SIDE), 0.0))
    white = torch.ones(1, 3, SIDE, SIDE)
    step = (clf.normalize(white) - clf.normalize(torch.zeros_like(white)))[0]
    clf.module.weights = (0.8 * weights / weights.sum()).expand(3, SIDE, SIDE) / step / 3
    clf.module.base = 0.1 - (clf.normalize(torch.zeros_like(white)) * clf.module.weights).sum().item()
    return clf, white


def test_a_map_in_proportion_to_the_response_is_not_punished():
    weights = torch.rand(SIDE, SIDE, generator=torch.Generator().manual_seed(2)) + 0.05
    clf, image = white_and_weights(weights)
    suite = Suite(clf, ALIGNED)
    shared = suite.begin(image, 0)
    aligned = suite.measure(shared, weights[None, None])
    for side in ("deletion", "insertion"):
        assert aligned.values[f"mas_{side}"].item() == pytest.approx(aligned.values[side].item(), abs=2e-6)
        density, response = aligned.curves["black"][f"{side}_density"], aligned.curves["black"][side]
        assert torch.allclose(density, response, atol=5e-6)
    # the same order with other magnitudes has the same response and a worse score
    for maps in (weights**3, weights + 5):
        scores = suite.measure(shared, maps[None, None])
        assert scores.values["insertion"] == aligned.values["insertion"]
        assert scores.values["mas_insertion"] < aligned.values["mas_insertion"] - 1e-3
        assert scores.values["mas_deletion"] > aligned.values["mas_deletion"] + 1e-3
    # and so has every other order
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        scores = suite.measure(shared, torch.rand(1, 1, SIDE, SIDE, generator=generator))
        assert scores.values["mas_ins_minus_del"] < aligned.values["mas_ins_minus_del"]


def test_alignment_by_hand():
    """Signed maps, ties and curves that turn back, against the definition with its last rescaling."""
    clf, image = pictures()
    protocol = PROTOCOLS["mas"]
    counts = protocol.counts(SIDE, SIDE)
    suite = Suite(clf, protocol)
    shared = suite.begin(image, labels=[0])
    generator = torch.Generator().manual_seed(3)
    for maps in (
        torch.randn(1, 1, SIDE, SIDE, generator=generator),
        torch.randint(-2, 3, (1, 1, SIDE, SIDE), generator=generator).float(),
        torch.zeros(1, 1, SIDE, SIDE),
    ):
        scores = suite.measure(shared, maps)
        values = maps.flatten().tolist()
        order = sorted(range(len(values)), key=lambda i: (-values[i], i))
        sizes = [abs(values[i]) for i in order] if any(values) else [1.0] * len(values)
        for side, reference in (("deletion", "zero"), ("insertion", "adaptive_blur")):
            inserting = side == "insertion"
            response = scaled_by_hand(curve_by_hand(clf, image, reference, values, counts, inserting), inserting)
            score = []
            for count, value in zip(counts, response, strict=True):
                density = math.fsum(sizes[:count]) / math.fsum(sizes)
                penalty = abs(value - (density if inserting else 1 - density))
                score.append(min(max(value - penalty if inserting else value + penalty, 0.0), 1.0))
            low, high = min(score), max(score)
            wanted = trapezoid([(value - low) / (high - low) for value in score])
            assert scores.values[f"mas_{side}"].item() == pytest.approx(wanted, abs=5e-6)


def test_no_response_is_no_score():
    curve = torch.tensor([[0.2, 0.9, 0.2], [0.5, 0.1, 0.2], [0.1, 0.05, 0.3]])
    rising = metrics.monotone_response(curve, rising=True)
    assert rising[:2].isnan().all()
    assert rising[2].tolist() == [0, 0, 1]
    falling = metrics.monotone_response(curve, rising=False)
    assert falling[[0, 2]].isnan().all()
    assert falling[1].tolist() == [1, 0, 0]


def test_monotonicity_is_one_minus_one_or_zero():
    weights = torch.rand(SIDE, SIDE, generator=torch.Generator().manual_seed(2)) + 0.1
    clf, image = white_and_weights(weights)
    protocol = Protocol("test", points=9, references=("black",), metrics=("monotonicity",), deletion=())
    maps = torch.rand(1, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    for factor, rho in ((1.0, 1.0), (-1.0, -1.0), (0.0, 0.0)):
        other, _ = white_and_weights(weights)
        other.module.base = 0.1 if factor > 0 else 0.9
        black = other.normalize(torch.zeros_like(image))
        other.module.weights = factor * clf.module.weights
        other.module.base -= (black * other.module.weights).sum().item()
        metric = Monotonicity(other, protocol)
        metric.update(image, maps, 0)
        assert metric.compute()["monotonicity"] == pytest.approx(rho, abs=1e-6)


def test_monotonicity_agrees_with_scipy(small, batch):
    stats = pytest.importorskip("scipy.stats")
    images, maps, target, _ = batch
    metric = Monotonicity(small)
    metric.update(images, maps, target)
    rows = metric.per_image()["references"]
    for reference in PROTOCOLS["monotonicity"].references:
        made = references.make(reference, images, small.mean_colour)
        curves = metrics.sweep(small, images, maps, target, made).inserted.confidence
        for i in range(5):
            rho = stats.spearmanr(range(21), curves[i].tolist()).statistic
            assert rows[reference]["monotonicity"][i].item() == pytest.approx(rho, abs=1e-5)
    tied = torch.randint(0, 4, (6, 21), generator=torch.Generator().manual_seed(0)).float()
    wanted = [stats.spearmanr(range(21), row.tolist()).statistic for row in tied]
    assert trend(tied).tolist() == pytest.approx(wanted, abs=1e-6)


def test_oracles_take_the_best_threshold(small, batch):
    images, maps, _, masks = batch
    masks[3] = False
    suite = Suite(small, "localisation")
    assert suite.protocol.references == ()
    assert suite.protocol.needs == {"mask"}
    shared = suite.begin(images, masks=masks)
    scores = suite.measure(shared, maps)
    assert scores.by_reference == scores.curves == {}
    assert torch.equal(shared.predicted, right(small, images))
    for i in range(5):
        if i == 3:
            assert all(value[3].isnan() for value in scores.values.values())
            continue
        best = [0.0, 0.0]
        for threshold in maps[i].unique():
            marked = maps[i] >= threshold
            both, total = (marked & masks[i]).sum().item(), (marked.sum() + masks[i].sum()).item()
            best = [max(best[0], both / (total - both)), max(best[1], 2 * both / total)]
        assert scores.values["iou_oracle"][i].item() == pytest.approx(best[0], abs=1e-6)
        assert scores.values["f1_oracle"][i].item() == pytest.approx(best[1], abs=1e-6)
        assert scores.values["iou"][i] <= scores.values["iou_oracle"][i] + 1e-6
    with pytest.raises(ValueError, match="needs masks: give"):
        suite.begin(images)
    with pytest.raises(ValueError, match="one value per pixel"):
        suite.begin(images, masks=masks[:, :, :4])


@pytest.mark.parametrize("name", [name for name in PROTOCOLS if name != "localisation"])
def test_a_suite_equals_the_classes(name, small, batch):
    images, maps, _, masks = batch
    labels = right(small, images)
    labels[2] = -1
    if name in ("mda", "mas"):  # images that take part are found by another classifier
        small, image = pictures()
        images, labels = image.expand(5, -1, -1, -1).contiguous(), torch.tensor([0, 0, 1, 0, 0])
    suite = Suite(small, name, internal_batch_size=32)
    shared = suite.begin(images, labels=labels, masks=masks)
    scores = suite.measure(shared, maps)
    found = set()
    for kind in (DeletionInsertion, ConfidenceChange, MagnitudeAlignment, Monotonicity):
        if set(kind.directions).isdisjoint(suite.protocol.metrics):
            with pytest.raises(ValueError, match="choose another protocol, or"):
                kind(small, name)
            continue
        metric = kind(small, name, internal_batch_size=32)
        metric.update(images, maps, labels=labels)
        rows = metric.per_image()
        by_reference = rows.pop("references")
        for key, value in rows.items():
            assert torch.equal(value.nan_to_num(-9), scores.values[key].nan_to_num(-9)), key
            found.add(key)
        for reference, named in by_reference.items():
            for key, value in named.items():
                assert torch.equal(value.nan_to_num(-9), scores.by_reference[reference][key].nan_to_num(-9))
        for reference, named in metric.curves().items():
            for key, curve in named.items():
                mean = scores.curves[reference][key].double().nanmean(dim=0).float()
                assert torch.equal(curve, mean), (reference, key)
    assert found == set(suite.protocol.metrics) == set(scores.values)
    assert all(value.shape == (5,) and value.dtype == torch.float32 for value in scores.values.values())


def test_a_suite_of_localisation_equals_the_class(small, batch):
    images, maps, _, masks = batch
    suite = Suite(small, "localisation")
    scores = suite.measure(suite.begin(images, masks=masks), maps)
    metric = Localization()
    metric.update(maps, masks)
    for key, value in metric.per_image().items():
        assert torch.equal(value, scores.values[key])


FORWARDS = {  # of one map, per image, at SIDE
    "aha": 3 * (2 * 19 + 1),
    "rise": 2 * (SIDE - 1),
    "chefer": 2 * 9,
    "mda": 2 * (SIDE**2 - 1),  # 225 points fall on 64 pixels
    "mas": 2 * (SIDE**2 - 1),
    "monotonicity": 3 * 19,
    "localisation": 0,
}


@pytest.mark.parametrize("name", FORWARDS)
def test_a_map_is_sorted_once_and_no_pass_is_spent_twice(name, monkeypatch):
    clf, image = pictures()
    images = image.expand(2, -1, -1, -1).contiguous()
    calls = []

    def counted(maps):
        calls.append(len(maps))
        return metrics.rank_pixels(maps)

    monkeypatch.setattr(perturbed_images, "rank_pixels", counted)
    suite = Suite(clf, name, internal_batch_size=16)
    masks = torch.zeros(2, 1, SIDE, SIDE, dtype=torch.bool)
    shared = suite.begin(images, labels=[0, 0], masks=masks)
    maps = torch.rand(2, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    for method in range(2):
        clf.module.seen = 0
        suite.measure(shared, maps)
        assert clf.module.seen == 2 * FORWARDS[name]
        assert calls == ([2] * (method + 1) if name != "localisation" else [])


@pytest.mark.parametrize("name", ["aha", "mas", "localisation"])
def test_the_benchmark_counts_the_passes_inside(name, small):
    row = bench_metrics.measure(small, name, batch=2, size=16, points=5)
    assert row["forward_passes_per_image"] == {"aha": 3 * (2 * 3 + 1), "mas": 2 * 3, "localisation": 0}[name]
    assert row["share"] is None if name == "localisation" else 0 < row["share"] < 1
    assert row["outside_ms_per_image"] > 0
    assert not small.module._forward_hooks


@pytest.mark.parametrize("name", [name for name in PROTOCOLS if name != "localisation"])
def test_batch_sizes_do_not_matter(name, batch):
    _, maps, _, _ = batch
    clf, image = pictures()
    generator = torch.Generator().manual_seed(0)
    images = (image + 0.02 * torch.rand(5, 3, SIDE, SIDE, generator=generator)).clamp(0, 1)
    labels = [0] * 5
    whole = Suite(clf, name)
    expected = whole.measure(whole.begin(images, labels=labels), maps).values
    for size in (2, 5):
        suite = Suite(clf, name, internal_batch_size=size)
        parts = [
            suite.measure(suite.begin(images[i : i + 2], labels=labels[i : i + 2]), maps[i : i + 2]).values
            for i in range(0, 5, 2)
        ]
        for key, value in expected.items():
            joined = torch.cat([part[key] for part in parts])
            assert torch.allclose(joined, value, atol=1e-4 if key in ("adp", "pic") else 1e-6), key
            assert not value.isnan().any()


def test_oblong_images(small):
    images = torch.rand(2, 3, 6, 10, generator=torch.Generator().manual_seed(0))
    maps = images.mean(dim=1, keepdim=True)
    suite = Suite(small, "rise")
    scores = suite.measure(suite.begin(images), maps)
    assert scores.curves["zero"]["deletion"].shape == (2, 7)
    metric = DeletionInsertion(small, "rise")
    metric.update(images, maps)
    with pytest.raises(ValueError, match="give images of one size"):
        metric.update(images[:, :, :4], maps[:, :, :4])


def test_protocols_refuse_what_they_cannot_do(small):
    for options, reason in (
        ({"metrics": ("auc",)}, "give one or more of deletion"),
        ({"references": ("grey",)}, "adaptive_blur"),
        ({"references": ()}, "give one or more of black"),
        ({"deletion": ("zero",)}, "names out of references"),
        ({"span": (0.5, 0.5)}, "two fractions"),
        ({"deletion": ()}, r"deletion=\(\): give a reference or more"),
        ({"span": (0.1, 1), "monotone": True}, "need both ends"),
        ({"scored": "top5"}, "choose target or label"),
    ):
        with pytest.raises(ValueError, match=reason):
            Protocol("test", **options)
    with pytest.raises(ValueError, match="give an integer ≥ 2"):
        Suite(small, internal_batch_size=1)
