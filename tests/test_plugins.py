"""A metric and a method added from outside: one row and one function, one class; all doors know them."""

import json

import pytest
import torch

import aha
from aha import attributors
from aha.attributors import base
from aha.classifier import Classifier
from aha.evaluation import MethodSpec, Records, evaluate
from aha.evaluation.compare import compare
from aha.metrics import Protocol, catalog
from aha.report import comparison, tables
from aha.source import Source

from .toys import SmallNet


@pytest.fixture
def sparsity(monkeypatch):
    """Hoyer's sparsity of a map, in percent: 0 for a constant map, 100 for a single pixel."""
    monkeypatch.setattr(catalog, "METRICS", dict(catalog.METRICS))

    def measure(probe):
        size = probe.maps.abs().flatten(1).double()
        root = size.shape[1] ** 0.5
        ratio = size.sum(dim=1) / size.square().sum(dim=1).sqrt()
        return (100 * (root - ratio) / (root - 1)).float()

    return catalog.add(
        catalog.Metric(
            "sparsity", "Sparsity", True, family="shape", unit="%", digits=1, low=0, high=100, source="Hoyer, 2004",
            measure=measure,
        )
    )  # fmt: skip


@pytest.fixture
def middle(monkeypatch):
    """A map of one pixel, in the middle."""
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))

    @attributors.register("middle")
    class Middle(attributors.Attributor):
        metadata = attributors.Metadata(paper="none", cost="none", architectures="any", licence="ours")
        class_specific = False

        def _attribute(self, images, target):
            maps = torch.zeros_like(images[:, :1])
            maps[:, :, images.shape[2] // 2, images.shape[3] // 2] = 1
            return maps

    return Middle


def test_a_metric_from_outside_is_measured_and_printed(sparsity):
    clf = Classifier.wrap(SmallNet(), input_size=(8, 8), num_classes=3)
    images = [{"image": torch.rand(3, 8, 8), "label": 0} for _ in range(4)]
    methods = {
        "flat": lambda images, target: torch.ones_like(images[:, :1]),
        "middle": lambda images, target: (
            torch.nn.functional.one_hot(torch.tensor(27), 64).view(1, 1, 8, 8) * torch.ones_like(images[:, :1])
        ),
    }
    found = evaluate(clf, methods, images, protocol=Protocol("mine", metrics=("sparsity", "deletion"), points=5))
    means = found.summary()["methods"]
    assert means["flat"]["sparsity"] == pytest.approx(0, abs=1e-5)
    assert means["middle"]["sparsity"] == pytest.approx(100, abs=1e-5)
    assert found.best("sparsity") == "middle"
    text = tables.of(found).to_markdown()
    assert "Sparsity ↑" in text
    assert "**100.0**" in text
    assert aha.metrics.arrow("mine/sparsity") == "↑"


def test_both_go_through_the_whole_comparison(sparsity, middle, tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("jinja2")
    methods = [MethodSpec.parse(text) for text in ("middle", "random")]
    protocol = Protocol("mine", metrics=("deletion", "sparsity"), points=4, references=("black",))
    done = compare([Source(limit=3)], methods, tmp_path, (protocol,))
    page = comparison.write(done, tmp_path).read_text()
    assert "Sparsity ↑" in page
    assert "middle" in page
    assert "Sparsity" in (tmp_path / "tables" / "comparison.tex").read_text()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["methods"]["middle"]["sparsity"] == pytest.approx(100, abs=1e-3)
    kept = {key.metric: series for key, series in Records.read(tmp_path).items() if key.method == "middle"}
    assert kept["sparsity"].values == pytest.approx([100] * 3, abs=1e-3)
    method = attributors.create("middle", Classifier.wrap(SmallNet(), input_size=(8, 8), num_classes=3))
    assert method.passes(torch.rand(1, 3, 8, 8)) == attributors.Passes(0, 0)
