"""The catalogue: what its rows say holds, and rows from outside are measured like the library's own."""

import dataclasses
import math

import pytest
import torch

from aha import metrics
from aha.attributors import count_passes
from aha.classifier import Classifier
from aha.metrics import PROTOCOLS, Protocol, Suite, catalog
from aha.metrics.catalog import Metric

from ..toys import SmallNet

SIDE = 8


@pytest.fixture
def clf():
    return Classifier.wrap(SmallNet(6).eval(), input_size=(SIDE, SIDE), num_classes=3)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(4, 3, SIDE, SIDE, generator=generator), torch.randn(4, 1, SIDE, SIDE, generator=generator)


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.setattr(catalog, "METRICS", dict(catalog.METRICS))


def test_every_metric_is_a_row_in_the_order_of_tables():
    families = {name: catalog.names(name) for name in dict.fromkeys(row.family for row in catalog.METRICS.values())}
    assert list(families) == [
        "curves",
        "accuracy",
        "confidence",
        "alignment",
        "monotonicity",
        "localisation",
        catalog.COSTS,
    ]
    assert [name for of in families.values() for name in of] == list(catalog.METRICS) == list(catalog.names())
    assert families["curves"] == ("deletion", "insertion", "ins_minus_del")
    lower = {"deletion", "positive", "adp", "mas_deletion", *families[catalog.COSTS]}
    assert {key for key, row in catalog.METRICS.items() if not row.higher_is_better} == lower
    assert {key for key, row in catalog.METRICS.items() if not row.ranked} == set(families[catalog.COSTS][1:])
    assert {key for key, row in catalog.METRICS.items() if row.oracle} == {"iou_oracle", "f1_oracle"}
    assert len({row.title for row in catalog.METRICS.values()}) == len(catalog.METRICS)
    assert all(row.about.endswith(".") and row.key == key for key, row in catalog.METRICS.items())
    for key, row in catalog.METRICS.items():
        assert (row.measure is None) == (key in families[catalog.COSTS] or row.difference is not None)
    assert 3 * 2**20 * catalog.get("peak_bytes_per_image").scale == 3


def test_names_may_carry_a_protocol():
    assert catalog.get("rise/deletion") is catalog.get("deletion") is catalog.METRICS["deletion"]
    assert catalog.known("rise/deletion")
    assert not catalog.known("rise/delete")
    assert metrics.arrow("rise/deletion") == "↓"
    assert [metrics.arrow(name) for name in catalog.names(catalog.COSTS)] == ["↓"] * 4
    for look in (catalog.get, metrics.arrow):
        with pytest.raises(ValueError, match="'rise/delete' is not known: choose one of deletion, insertion"):
            look("rise/delete")


@pytest.mark.parametrize("name", [name for name in PROTOCOLS if name not in ("mda", "mas")])
def test_values_lie_in_their_range(name, clf, batch):
    images, maps = batch
    suite = Suite(clf, name)
    masks = torch.rand(4, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) < 0.3
    scores = suite.measure(suite.begin(images, labels=clf(images).argmax(dim=1), masks=masks), maps)
    for key, values in scores.values.items():
        row = catalog.get(key)
        assert values.min() >= row.low - 1e-6
        assert values.max() <= row.high + 1e-6


def gini(probe):
    """Of |A|: 0 for a constant map."""
    size = probe.maps.abs().flatten(1).sort(dim=1).values.double()
    place = torch.arange(1, size.shape[1] + 1)
    return (2 * (place * size).sum(dim=1) / size.sum(dim=1) - place[-1] - 1) / place[-1]


def half(probe):
    """Confidence once half of the pixels are gone."""
    middle = probe.counts.index(probe.images.shape[-2] * probe.images.shape[-1] // 2)
    return {name: answer.confidence[:, middle] for name, answer in probe.deleted.items()}


def test_a_metric_from_outside_that_needs_no_reference(clf, batch):
    images, maps = batch
    catalog.add(Metric("gini", "Gini", True, "sparsity", measure=gini))
    assert list(catalog.METRICS)[-1] == "gini"
    suite = Suite(clf, Protocol("mine", metrics=("gini", "deletion"), references=("black",)))
    scores = suite.measure(suite.begin(images), maps)
    assert list(scores.values) == ["gini", "deletion"]
    assert set(scores.by_reference["black"]) == {"deletion"}
    assert scores.values["gini"].dtype == torch.float32
    for one, value in zip(maps, scores.values["gini"].tolist(), strict=True):
        size = one.abs().flatten().tolist()
        wanted = math.fsum(abs(a - b) for a in size for b in size) / (2 * len(size) * math.fsum(size))
        assert value == pytest.approx(wanted, abs=1e-6)
    assert [catalog.get(f"mine/{name}").arrow for name in suite.protocol.metrics] == ["↑", "↓"]
    # alone it takes no perturbed image, and no reference
    alone = Suite(clf, Protocol("alone", metrics=("gini",), references=()))
    shared = alone.begin(images)
    with count_passes(clf) as passes:
        assert torch.equal(alone.measure(shared, maps).values["gini"], scores.values["gini"])
    assert passes.forward == alone.protocol.passes(SIDE).per_map == 0
    assert metrics.arrow("mine/gini") == "↑"


def test_a_metric_from_outside_that_reads_the_curves(clf, batch):
    images, maps = batch
    row = Metric("half", "Half", False, "curves", measure=half, reads=("deleted",))
    catalog.add(row)
    catalog.add(Metric("beyond", "Beyond", True, "curves", low=-1, difference=("half", "deletion")))
    protocol = Protocol("mine", metrics=("half", "beyond"), points=5, references=("black", "mean"))
    suite = Suite(clf, protocol)
    shared = suite.begin(images)
    with count_passes(clf) as passes:
        scores = suite.measure(shared, maps)
    assert passes.forward / len(images) == protocol.passes(SIDE).per_map == 2 * 3  # insertion is not asked for
    target = shared.target
    for reference, colour in (("black", torch.zeros(3)), ("mean", clf.mean_colour)):
        for i, image in enumerate(images):
            order = maps[i].flatten().argsort(descending=True)
            pixels = image.flatten(1).clone()
            pixels[:, order[: SIDE**2 // 2]] = colour[:, None]
            left = clf.probabilities(pixels.view(1, 3, SIDE, SIDE))[0, target[i]].item()
            assert scores.by_reference[reference]["half"][i].item() == pytest.approx(left, abs=1e-6)
    named = scores.by_reference["mean"]
    assert set(named) == {"half", "beyond"}
    deletion = metrics.DeletionInsertion(clf, dataclasses.replace(protocol, metrics=("deletion",)))
    deletion.update(images, maps)
    area = deletion.per_image()["references"]["mean"]["deletion"]
    assert torch.allclose(named["beyond"], named["half"] - area, atol=1e-6)
    # undeclared, it would cost what `passes` does not tell
    catalog.METRICS["half"] = dataclasses.replace(row, reads=())
    with pytest.raises(ValueError, match='reads deleted images and does not say so: put "deleted" into its reads'):
        Suite(clf, dataclasses.replace(protocol, metrics=("half",))).measure(shared, maps)


def test_rows_that_cannot_be(clf, batch):
    images, maps = batch
    for row, reason in (
        (Metric("deletion", "Mine", True, "curves"), "'deletion' is there already"),
        (Metric("rise/mine", "Mine", True, "curves"), "without /"),
        (Metric("mine", "Mine", True, "curves", difference=("insertion", "nothing")), "'nothing' is not known"),
        (Metric("mine", "Mine", True, "curves", difference=("insertion", "ins_minus_del")), "two metrics that are"),
        (Metric("mine", "Mine", True, "curves", reads=("deletion",)), "give a tuple of deleted, inserted"),
    ):
        with pytest.raises(ValueError, match=reason):
            catalog.add(row)
    assert "mine" not in catalog.METRICS
    with pytest.raises(ValueError, match="give one or more of deletion"):
        Protocol("test", metrics=("seconds_per_image",))
    with pytest.raises(ValueError, match="give one or more of deletion"):
        Protocol("test", metrics=("rise/deletion",))
    for key, measure, reason in (
        ("scalar", lambda probe: probe.maps.sum(), r"'scalar' measured .*: return \(4,\), or that by reference"),
        ("nothing", lambda probe: {}, "'nothing' measured"),
        ("number", lambda probe: 1.0, "'number' measured"),
        ("masked", lambda probe: probe.masks.flatten(1).sum(dim=1), 'put "masks" into its reads'),
        ("inserted", lambda probe: probe.inserted["black"].confidence[:, 0], 'put "inserted" into its reads'),
        ("shown", lambda probe: probe.shown["black"].confidence, 'put "shown" into its reads'),
    ):
        catalog.add(Metric(key, key, True, "curves", measure=measure))
        suite = Suite(clf, Protocol("test", metrics=(key,)))
        with pytest.raises(ValueError, match=reason):
            suite.measure(suite.begin(images), maps)
