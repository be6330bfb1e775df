"""Calibrated maps: the order is kept to the last tie, and the values are the change of probability they explain."""

import dataclasses
import itertools
import json

import pytest
import torch
from torch import nn

import aha
from aha import attributors, calibration
from aha.calibration import MeanCurves, Response, calibrated, measure
from aha.classifier import from_name
from aha.data import Scenes
from aha.explainer.evidence_decoder import EvidenceConfig
from aha.files import read_json
from aha.metrics import Protocol
from aha.metrics.suite import Suite

from .toys import TINY_DECODER, SmallNet, pictures, tiny_classifier

RESPONSES = {
    "rising": Response(torch.tensor([0, 0.1, 0.3, 0.6, 1]), torch.tensor([0, 0.4, 0.7, 0.8, 0.85])),
    "one slope": Response(torch.tensor([0.0, 1]), torch.tensor([0, 0.3])),
    "late": Response(torch.tensor([0, 0.5, 1]), torch.tensor([0, 0.1, 0.9])),
    "flat at the end": Response(torch.tensor([0, 0.2, 1]), torch.tensor([0, 0.3, 0.3])),
    "beyond": Response(torch.tensor([0, 0.2, 0.4, 1]), torch.tensor([0, 0.4, 0.5, 0.3])),
    "speaks against": Response(torch.tensor([0, 0.5, 1]), torch.tensor([0, -0.1, -0.4])),
    "nothing": Response(torch.tensor([0, 0.5, 1]), torch.zeros(3)),
    "nearly one slope": Response(torch.tensor([0, 0.5, 1]), torch.tensor([0, 0.3 + 1e-9, 0.6], dtype=torch.float64)),
}
UNIFORM = torch.linspace(0, 1, 5, dtype=torch.float64)
CONFIG = aha.TrainConfig(
    steps=6, batch_size=4, accumulate=2, fractions=5, n_iters=5, save_every=0, log_every=2, precision="fp32"
)


def maps_of(kind, *shape):
    generator = torch.Generator().manual_seed(sum(shape))
    if kind == "random":
        return torch.randn(shape, generator=generator)
    if kind == "tied":
        return torch.randint(0, 4, shape, generator=generator) - 2.0
    return torch.full(shape, 3.0)


def order(maps):
    """Place of every pixel, and which are tied."""
    flat = maps.flatten(1)
    tied = torch.stack([row.unique(return_inverse=True)[1] for row in flat])
    return flat.argsort(dim=1, descending=True, stable=True), tied


def assert_same_order(found, maps):
    for a, b in zip(order(found), order(maps), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (64, 48), (512, 512)])
@pytest.mark.parametrize("kind", ["random", "tied", "constant"])
def test_the_order_is_kept_and_the_sum_is_what_is_explained(kind, size):
    maps = maps_of(kind, 2, 1, *size)
    for name, response in RESPONSES.items():
        found = response.apply(maps)
        assert found.dtype == torch.float32
        assert found.shape == maps.shape
        assert_same_order(found, maps)
        explained = response.values[-1].expand(2)
        total = found.double().flatten(1).sum(dim=1)
        torch.testing.assert_close(total, explained, rtol=1e-5, atol=1e-8, msg=lambda text, name=name: f"{name} {text}")


def test_the_order_is_kept_where_float32_is_at_its_end():
    rows = torch.tensor([[1.0, 1, 1, 0, 0, -0.0, -1, -1], [2.0, 2, 2, 2, 2, 2, 2, 2]])
    first = torch.ones_like(rows, dtype=torch.bool)
    first[0, 2] = first[1, 5] = False  # tied with the one before
    found = calibration._falling(rows.clone(), first)
    assert torch.equal(found[:, 1:] < found[:, :-1], first[:, 1:])
    assert torch.equal(found[:, 1:] == found[:, :-1], ~first[:, 1:])
    torch.testing.assert_close(found, rows, rtol=1e-6, atol=1e-40)  # by the next floats
    falling = torch.tensor([[2.0, 1.0, 1.0]])
    assert calibration._falling(falling, torch.tensor([[True, True, False]])) is falling


def test_every_image_has_its_own_response():
    values = torch.stack([RESPONSES["beyond"].values, 2 * RESPONSES["beyond"].values])
    maps = maps_of("random", 2, 1, 9, 9)
    found = Response(RESPONSES["beyond"].shares, values).apply(maps)
    torch.testing.assert_close(found[:1], RESPONSES["beyond"].apply(maps[:1]), rtol=0, atol=0)
    torch.testing.assert_close(found.double().sum(dim=(1, 2, 3)), values[:, -1], rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match=r"maps are of 1 images, the response of 2: give one for each"):
        Response(RESPONSES["beyond"].shares, values).apply(maps[:1])


def test_pixels_get_the_slope_at_their_rank():
    # R(r) = r − r²/2, whose slope 1 − r falls evenly: values are those of the pixels to the last, not in steps
    shares = torch.linspace(0, 1, 11, dtype=torch.float64)
    found = Response(shares, shares - shares**2 / 2).apply(torch.arange(100.0, 0, -1).view(1, 1, 10, 10))
    expected = (1 - (torch.arange(100, dtype=torch.float64) + 0.5) / 100) / 100
    torch.testing.assert_close(found.flatten().double(), expected, rtol=1e-6, atol=1e-9)


def test_a_piece_keeps_its_sign():
    # where nothing is gained any more no pixel speaks against the target
    saturated = Response(torch.tensor([0, 0.1, 0.4, 1]), torch.tensor([0, 0.6, 0.8, 0.81], dtype=torch.float64))
    assert saturated.apply(maps_of("random", 1, 1, 40, 40)).min() >= 0
    found = RESPONSES["beyond"].apply(maps_of("random", 1, 1, 50, 50)).flatten()
    assert int((found < 0).sum()) == 1500  # 60 %


def isotonic(slopes, widths):
    """The best of all ways to pool neighbours whose means fall, by trying them."""
    count, best = len(slopes), (float("inf"), None)
    for cuts in itertools.product((False, True), repeat=count - 1):
        ends = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), count]
        fit = torch.empty(count, dtype=torch.float64)
        for a, b in itertools.pairwise(ends):
            fit[a:b] = (slopes[a:b] * widths[a:b]).sum() / widths[a:b].sum()
        if (fit.diff() <= 0).all():
            error = float((widths * (fit - slopes) ** 2).sum())
            best = min(best, (error, fit), key=lambda pair: pair[0])
    return best[1]


@pytest.mark.parametrize("seed", range(12))
def test_slopes_are_the_isotonic_least_squares_fit(seed):
    generator = torch.Generator().manual_seed(seed)
    widths = torch.rand(7, generator=generator, dtype=torch.float64) + 0.1
    widths /= widths.sum()
    slopes = torch.randn(7, generator=generator, dtype=torch.float64)
    if seed % 3 == 0:
        slopes = slopes.round()  # equal ones
    shares = torch.cat([torch.zeros(1, dtype=torch.float64), widths.cumsum(0)])
    shares[-1] = 1
    values = torch.cat([torch.zeros(1, dtype=torch.float64), (slopes * widths).cumsum(0)])
    found = Response(shares, torch.stack([values, 2 * values])).slopes()
    expected = isotonic(slopes, widths)
    torch.testing.assert_close(found, torch.stack([expected, 2 * expected]), rtol=1e-9, atol=1e-12)


def test_the_response_of_two_curves():
    deletion, insertion = torch.tensor([0.9, 0.5, 0.2, 0.1, 0.05]), torch.tensor([0.05, 0.3, 0.7, 0.95, 0.9])
    response = Response.from_curves(deletion, insertion, UNIFORM)
    torch.testing.assert_close(response.values, torch.tensor([0, 0.325, 0.675, 0.85, 0.85]).double())
    assert response.values[-1] == pytest.approx(0.9 - 0.05)
    batch = Response.from_curves(deletion.expand(3, 5), insertion.expand(3, 5), UNIFORM)
    assert torch.equal(batch.values, response.values.expand(3, 5))


class Additive(nn.Module):
    """Two classes; the probability of the second is ½ + Σ weight·pixel, exactly."""

    def __init__(self, weight):
        super().__init__()
        self.register_buffer("weight", weight)
        self.seen = 0

    def forward(self, pixels):
        self.seen += len(pixels)
        p = 0.5 + (pixels * self.weight).sum(dim=(1, 2, 3))
        return torch.stack([torch.log1p(-p), p.log()], dim=1)


@pytest.fixture
def additive():
    """Images and a classifier whose probability every pixel is known to change, against the blurred image."""
    images = pictures(2, 20, seed=3)
    reference = aha.references.blur(images)
    # as many pixels of a value as lie between the shares that are measured
    counts = torch.tensor([0, *calibration._inner(400), 400]).diff()
    values = torch.tensor([30.0, 20, 12, 9, 6, 4, 2.5, 1, -1, -3]) * 1e-4
    change = values.repeat_interleave(counts)
    places = torch.stack([torch.randperm(400, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    change = torch.empty(2, 400).scatter_(1, places, change.expand(2, 400)).view(2, 1, 20, 20)
    modules = []
    for image, blurred, wanted in zip(images, reference, change, strict=True):
        gap = image - blurred
        modules.append(Additive(wanted * gap / gap.square().sum(dim=0, keepdim=True)))
    clfs = [aha.Classifier.wrap(module, (0.0,) * 3, (1.0,) * 3, (20, 20)) for module in modules]
    return images, change, clfs


def test_what_each_pixel_changes_is_given_back(additive):
    images, change, clfs = additive
    for row, clf in enumerate(clfs):
        clf.module.seen = 0
        image, true = images[row : row + 1], change[row : row + 1]
        raw = (true * 1000).exp()  # in the right order, with magnitudes that mean nothing
        response = measure(clf, image, raw, target=1)
        assert clf.module.seen == calibration.passes(20, 20) == 20
        torch.testing.assert_close(response.apply(raw), true, rtol=1e-3, atol=1e-6)
        # nothing is made up for a map that points nowhere: each pixel has its share
        flat = measure(clf, image, torch.zeros_like(raw), target=1).apply(torch.zeros_like(raw))
        torch.testing.assert_close(flat, true.mean().expand_as(true), rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("size", [2, 3, 64])
def test_measuring_does_not_depend_on_the_batch(size):
    clf, maps = tiny_classifier(), maps_of("random", 3, 1, 32, 32)
    whole = measure(clf, pictures(), maps)
    for row in range(3):
        alone = measure(clf, pictures()[row : row + 1], maps[row : row + 1], internal_batch_size=size)
        torch.testing.assert_close(alone.values[0], whole.values[row], rtol=0, atol=1e-6)
    # by the metrics' own sweep
    reference = aha.references.blur(pictures())
    target = clf(pictures()).argmax(dim=-1)
    swept = aha.metrics.sweep(clf, pictures(), maps, target, reference, points=101)
    at = [round(100 * share) for share in (0, *calibration.MEASURED_AT, 1)]
    expected = Response.from_curves(
        swept.deleted.confidence[:, at], swept.inserted.confidence[:, at], torch.tensor(at).double() / 100
    )
    # fractions are rounded to whole pixels the same way
    torch.testing.assert_close(whole.values, expected.values, rtol=0, atol=1e-6)


def test_mean_curves_are_those_of_all_images_in_any_parts():
    curves = torch.rand(6, 2, 5, generator=torch.Generator().manual_seed(0))
    whole, parts = MeanCurves(), MeanCurves()
    assert whole.response() is None
    whole.add(curves)
    parts.add(curves[:2])
    kept = parts.state_dict()
    parts = MeanCurves()
    parts.load_state_dict(kept)
    parts.add(curves[2:])
    expected = Response.from_curves(curves[:, 0].mean(0), curves[:, 1].mean(0), UNIFORM)
    for found in (whole.response(), parts.response()):
        torch.testing.assert_close(found.values, expected.values, rtol=0, atol=1e-7)
        assert torch.equal(found.shares, UNIFORM)


def fit(config, **options):
    clf = tiny_classifier()
    torch.manual_seed(3)
    explainer = aha.Explainer.build(clf, evidence=False, decoder=TINY_DECODER)
    data = [{"image": image, "label": i % 5} for i, image in enumerate(pictures(10))]
    return aha.Trainer(explainer, clf, data, config).fit(progress=False, **options)


@pytest.mark.parametrize("step", [3, 4])  # before and after the first curve that counts
def test_the_response_is_learnt_and_resumed_bit_for_bit(tmp_path, step):
    config = dataclasses.replace(CONFIG, save_every=step, output=str(tmp_path / "whole"))
    whole = fit(config)
    learnt = whole.settings["response"]
    assert learnt["shares"] == UNIFORM.tolist()
    other = dataclasses.replace(config, output=str(tmp_path / "other"))
    resumed = fit(other, resume=tmp_path / "whole" / "checkpoints" / f"step_{step:08d}")
    assert resumed.settings["response"] == learnt
    written = json.loads((tmp_path / "other" / "explainer" / "config.json").read_text())
    assert written["response"] == learnt
    loaded = aha.Explainer.from_pretrained(tmp_path / "other" / "explainer", whole.classifier)
    maps = loaded.attribute(pictures(), scale="calibrated")
    assert torch.equal(maps, Response.from_json(learnt).apply(whole.attribute(pictures())))


def test_the_learnt_response_is_that_of_the_curves(monkeypatch):
    seen = []
    add = MeanCurves.add
    monkeypatch.setattr(MeanCurves, "add", lambda self, curves: (seen.append(curves), add(self, curves)))
    explainer = fit(dataclasses.replace(CONFIG, targets=2))
    # 3 of 6 steps in 2 parts of 2 images each: the prediction's curves, not those of the second target
    assert [tuple(curves.shape) for curves in seen] == [(2, 2, 5)] * 6
    deletion, insertion = torch.cat(seen).double().mean(dim=0)
    expected = Response.from_curves(deletion, insertion, UNIFORM)
    torch.testing.assert_close(Response.from_json(explainer.settings["response"]).values, expected.values)


@pytest.mark.parametrize("options", [{"ends": False}, {"objective": "fastshap", "precision": "fp32"}])
def test_without_curves_there_is_no_response(options):
    explainer = fit(dataclasses.replace(CONFIG, coalitions=4, players=(2, 2), **options))
    assert explainer.settings["response"] is None
    with pytest.raises(ValueError, match=r'^scale="calibrated" needs the response .* take scale="measured"'):
        explainer.attribute(pictures(), scale="calibrated")


def test_the_curves_of_the_objective_are_behind_its_areas():
    clf, images = tiny_classifier(), pictures()
    maps, target = maps_of("random", 3, 1, 32, 32), torch.tensor([0, 3, 1])
    blanks = [torch.zeros_like(images), aha.references.blur(images)]
    found = {}
    for chunk in (None, 4, 10, 1000):
        objective = aha.Objective(clf, fractions=6, n_iters=10, chunk=chunk)
        losses = objective(images, maps, target, blanks, aha.regions.grid(32, 32, 8), 0.05)
        assert not losses.curves.requires_grad
        areas = torch.trapezoid(losses.curves, dx=0.2, dim=-1)
        torch.testing.assert_close(areas, torch.stack([losses.deletion, losses.insertion], dim=1), rtol=0, atol=1e-6)
        found[chunk] = losses.curves
        p = clf(images).softmax(dim=-1).gather(1, target[:, None])[:, 0]
        torch.testing.assert_close(losses.curves[:, 0, 0], p)
        torch.testing.assert_close(losses.curves[:, 1, -1], p)
    for curves in found.values():
        torch.testing.assert_close(curves, found[None], rtol=0, atol=1e-6)


@pytest.fixture
def known(explainer):
    """An explainer that knows a response."""
    explainer.settings["response"] = RESPONSES["rising"].to_json()
    return explainer.eval()


def test_an_explainer_gives_every_scale(known, classifier, images):
    raw = known.attribute(images)
    assert torch.equal(known.attribute(images, scale="raw"), raw)
    shared = known.attribute(images, scale="calibrated")
    assert torch.equal(shared, RESPONSES["rising"].apply(raw))
    target = classifier(images).argmax(dim=-1)
    own = known.attribute(images, target, scale="measured")
    assert_same_order(own, raw)
    # the change of probability from reference to image
    ends = [
        classifier(x).softmax(dim=-1).gather(1, target[:, None])[:, 0] for x in (images, aha.references.blur(images))
    ]
    torch.testing.assert_close(own.sum(dim=(1, 2, 3)), ends[0] - ends[1], rtol=1e-4, atol=1e-6)
    assert torch.equal(calibrated(classifier, known, images, raw, target, "calibrated"), shared)
    assert calibrated(classifier, known, images, raw, target, "raw") is raw


def test_measuring_takes_twenty_passes():
    clf = aha.Classifier.wrap(SmallNet(), (0.5,) * 3, (0.5,) * 3, (32, 32))
    explainer = aha.Explainer.build(clf, evidence=True).eval()
    clf.module.seen = 0
    explainer.attribute(pictures(), target=1)
    plain, clf.module.seen = clf.module.seen, 0
    explainer.attribute(pictures(), target=1, scale="measured")
    assert (clf.module.seen - plain) / 3 == calibration.passes(32, 32) == 20


@pytest.mark.parametrize("steps", [0, 1])
def test_the_method_calibrates_where_it_can(known, classifier, images, steps, coarse):
    def create(**options):
        return attributors.create("aha", classifier, explainer=known, steps=steps, **options)

    maps = {scale: create(scale=scale).attribute(images) for scale in ("raw", "calibrated", "measured")}
    assert torch.equal(create().attribute(images), maps["calibrated"])
    assert torch.equal(maps["calibrated"], RESPONSES["rising"].apply(maps["raw"]))
    assert_same_order(maps["measured"], maps["raw"])
    with attributors.count_passes(classifier) as counted:
        create(scale="measured").attribute(images, target=1)
    assert counted.forward == 3 * create(scale="measured").passes(images).forward
    known.settings.pop("response")
    assert torch.equal(create().attribute(images), maps["raw"])
    with pytest.raises(ValueError, match=r'^scale="calibrated" needs the response'):
        create(scale="calibrated")


def test_bad_input_in_one_line(known, classifier, images, tmp_path):
    maps = known.attribute(images)
    for scale in ("loud", None):
        with pytest.raises(ValueError, match="is not known: choose one of raw, calibrated, measured"):
            known.attribute(images, scale=scale)
    with pytest.raises(ValueError, match=r"give \(B, 1, H, W\)"):
        RESPONSES["rising"].apply(maps[:, 0])
    with pytest.raises(ValueError, match="NaN"):
        RESPONSES["rising"].apply(maps / 0)
    with pytest.raises(ValueError, match="maps is"):
        measure(classifier, images, maps[..., 1:])
    with pytest.raises(ValueError, match="from 0 to 1"):
        Response(torch.tensor([0.1, 1]), torch.tensor([0, 0.5]))
    with pytest.raises(ValueError, match="from 0 to 1"):
        Response(torch.tensor([0, 0.5, 0.5, 1]), torch.zeros(4))
    with pytest.raises(ValueError, match="start from 0"):
        Response(torch.tensor([0.0, 1]), torch.tensor([0.1, 0.5]))
    with pytest.raises(ValueError, match=r"\(n \+ 1,\) shares"):
        Response(torch.tensor([0.0, 1]), torch.zeros(3))
    with pytest.raises(ValueError, match="two curves over the same fractions"):
        Response.from_curves(torch.zeros(3), torch.zeros(4), [0, 0.5, 1])
    with pytest.raises(ValueError, match="only one that all share is kept"):
        Response(torch.tensor([0.0, 1]), torch.zeros(2, 2)).to_json()
    known.save_pretrained(tmp_path)
    config = read_json(tmp_path / "config.json")
    for damaged in ({"shares": [0, 1]}, {"shares": [0, 1], "values": "ab"}, 3, {"shares": [0, 1], "values": [0, None]}):
        (tmp_path / "config.json").write_text(json.dumps({**config, "response": damaged}))
        with pytest.raises(ValueError, match="is not an explainer's configuration"):
            aha.Explainer.from_pretrained(tmp_path, classifier)


def test_magnitudes_that_are_measured_align_with_the_response():
    clf = from_name("scenes")
    scenes = Scenes("val", 4, seed=11)
    images = torch.stack([scenes[i]["image"] for i in range(4)])
    explainer = aha.Explainer.build(clf, evidence=True, decoder=EvidenceConfig()).eval()
    suite = Suite(clf, Protocol("alignment", metrics=("mas_ins_minus_del", "ins_minus_del"), references=("blur",)))
    batch = suite.begin(images)
    found = {
        scale: suite.measure(batch, explainer.attribute(images, scale=scale)).values for scale in ("raw", "measured")
    }
    assert torch.equal(found["raw"]["ins_minus_del"], found["measured"]["ins_minus_del"])
    raw, own = (found[scale]["mas_ins_minus_del"].nanmean() for scale in ("raw", "measured"))
    assert own > raw + 0.05
