"""Evaluation: what is recorded, what a failure costs, and the statistics."""

import dataclasses
import json
import math
import statistics

import pytest
import torch

from aha import bootstrap, metrics, terminal
from aha.classifier import Classifier
from aha.evaluation import RESAMPLES, Failure, Key, evaluate
from aha.files import read_columns, read_json
from aha.memory import peak_bytes
from aha.metrics import ConfidenceChange, DeletionInsertion, Localization, Protocol

from ..toys import SmallNet, wide

SHORT = Protocol("short", points=5)
FAITHFULNESS = (*DeletionInsertion.directions, *ConfidenceChange.directions)
LOCALIZATION = tuple(Localization.directions)
COSTS = ("seconds_per_image", "forward_per_image", "backward_per_image")


class Images(torch.utils.data.Dataset):
    def __init__(self, size=7, masks=True, labels=True):
        generator = torch.Generator().manual_seed(5)
        self.images = torch.rand(size, 3, 8, 8, generator=generator)
        self.masks = torch.rand(size, 1, 8, 8, generator=generator) < 0.3
        self.has_masks, self.has_labels = masks, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        item = {
            "image": self.images[index],
            "label": index % 3 if self.has_labels else -1,
            "path": f"{index}.png",
        }
        return {**item, "mask": self.masks[index]} if self.has_masks else item


@pytest.fixture
def clf():
    return Classifier.wrap(SmallNet(), input_size=(8, 8), num_classes=3)


def bright(images, target):
    return images.mean(dim=1, keepdim=True)


def dark(images, target):
    return -images.mean(dim=1, keepdim=True)


def run(clf, methods, data, **options):
    return evaluate(clf, methods, data, **{"protocol": SHORT, "batch_size": 3, **options})


def test_values_are_those_of_the_metrics(clf):
    data = Images()
    data.masks[2] = False
    evaluation = run(clf, {"bright": bright, "dark": dark}, data)
    curves, change, located = DeletionInsertion(clf, SHORT), ConfidenceChange(clf, SHORT), Localization()
    maps = bright(data.images, None)
    curves.update(data.images, maps)
    change.update(data.images, maps)
    located.update(maps, data.masks)
    entry = evaluation.summary()["methods"]["bright"]
    for metric in (curves, change, located):
        computed = metric.compute()
        for name in {*metric.directions} & {*entry}:
            assert entry[name] == pytest.approx(computed[name], abs=1e-5), name
        for reference, scores in computed.get("references", {}).items():
            table = evaluation.summary()["references"][reference]["bright"]
            assert table == pytest.approx(scores | {k: table[k] for k in table.keys() - scores.keys()}, abs=1e-5)
    for reference, named in curves.curves().items():
        for name, curve in named.items():
            assert torch.allclose(evaluation.curves["bright"][reference][name], curve, atol=1e-6)
    # one row per image and method, the empty mask without localisation
    rows = wide(evaluation)
    assert rows["method"] == ["bright"] * 7 + ["dark"] * 7
    assert rows["index"] == [*range(7)] * 2
    assert rows["path"][3] == "3.png"
    assert rows["target"] == rows["predicted"]
    assert math.isnan(rows["iou"][2])
    assert not math.isnan(rows["iou"][3])
    assert len({len(column) for column in rows.values()}) == 1
    ends = metrics.endpoints(clf, data.images)
    assert rows["confidence"][:7] == pytest.approx(ends.original.confidence.tolist(), abs=1e-6)


def test_summary_has_exactly_these_keys(clf):
    evaluation = run(clf, {"bright": bright}, Images())
    summary = evaluation.summary()
    assert set(summary) == {
        "classifier",
        "methods",
        "references",
        "protocol",
        "protocols",
        "significance",
        "target",
        "seed",
        "versions",
        "device",
        "failures",
    }
    assert set(summary["classifier"]) == {"accuracy", "name", "images"}
    measured = {*FAITHFULNESS, *LOCALIZATION}
    assert set(summary["methods"]["bright"]) == {*measured, *COSTS, "ci95"}
    assert set(summary["methods"]["bright"]["ci95"]) == measured
    assert set(summary["references"]) == {"black", "mean", "blur"}
    assert set(summary["references"]["blur"]["bright"]) == set(FAITHFULNESS)
    assert summary["protocol"].items() >= {"name": "short", "points": 5}.items()
    assert summary["protocol"]["references"] == ["black", "mean", "blur"]
    assert [protocol["name"] for protocol in summary["protocols"]] == ["localisation"]
    assert {"python", "aha", "torch", "timm"} <= set(summary["versions"])
    assert summary["methods"]["bright"]["seconds_per_image"] > 0
    json.dumps(summary, allow_nan=False)
    bare = run(clf, {"bright": bright}, Images(masks=False)).summary()["methods"]["bright"]
    assert set(bare) == {*FAITHFULNESS, *COSTS, "ci95"}


def test_ends_are_computed_once_for_all_methods(clf):
    clf.module.seen = 0
    run(clf, {"bright": bright, "dark": dark, "again": bright}, Images(size=6))
    per_method = 3 * 2 * (5 - 2) + 3  # curves and confidence change, three references
    # f(I) for the curves and for localisation, f(I0) of three references
    assert clf.module.seen == 6 * (2 + 3 + 3 * per_method)


def test_batch_size_does_not_matter(clf):
    one = run(clf, {"bright": bright}, Images(), batch_size=1).summary()["methods"]["bright"]
    all_at_once = run(clf, {"bright": bright}, Images(), batch_size=50).summary()["methods"]["bright"]
    for name in (*FAITHFULNESS, *LOCALIZATION):
        assert one[name] == pytest.approx(all_at_once[name], abs=1e-4 if name in ("adp", "pic") else 1e-6)


def test_true_class(clf):
    data = Images()
    evaluation = run(clf, {"bright": bright}, data, target="true")
    assert wide(evaluation)["target"] == wide(evaluation)["label"] == [0, 1, 2, 0, 1, 2, 0]
    accuracy = (clf(data.images).argmax(1) == torch.tensor([0, 1, 2, 0, 1, 2, 0])).float().mean().item()
    assert evaluation.classifier["accuracy"] == pytest.approx(accuracy)
    unlabelled = Images(labels=False)
    assert run(clf, {"bright": bright}, unlabelled).classifier["accuracy"] is None
    with pytest.raises(ValueError, match=r"nothing could be measured.*label -1"):
        run(clf, {"bright": bright}, unlabelled, target="true")


@pytest.mark.parametrize("name", metrics.PROTOCOLS)
def test_every_protocol_can_be_evaluated(clf, name):
    result = run(clf, {"bright": bright, "dark": dark}, Images(), protocol=name)
    preset = metrics.PROTOCOLS[name]
    assert {column.name for column in result.columns} == {*preset.metrics, *LOCALIZATION}
    # an image may take no part, and then has no value; a value is that of the protocol's suite
    suite = metrics.Suite(clf, name)
    data = Images()
    batch = suite.begin(data.images, labels=[i % 3 for i in range(7)], masks=data.masks)
    expected = suite.measure(batch, bright(data.images, None)).values
    for metric, values in expected.items():
        assert wide(result)[metric][:7] == pytest.approx(values.tolist(), abs=1e-4, nan_ok=True), metric
    json.dumps(result.summary(), allow_nan=False)


def test_a_protocol_that_no_image_takes_part_in(clf):
    sure = dataclasses.replace(SHORT, name="sure", confidence=1.1)
    result = run(clf, {"bright": bright}, Images(), protocol=sure)
    assert result.metrics == list(LOCALIZATION)
    assert result.unmeasured == ["sure"]
    assert result.headline == LOCALIZATION[0]
    with pytest.raises(ValueError, match="nothing could be measured: no image takes part in protocol 'sure'"):
        run(clf, {"bright": bright}, Images(masks=False), protocol=sure)


def test_progress_is_a_bar_or_any_function(clf, capsys):
    with terminal.progress() as bar:
        run(clf, {"bright": bright, "dark": dark}, Images(), progress=bar)
    assert "dark" in (printed := capsys.readouterr().out)
    assert "14/14" in printed
    with pytest.raises(ValueError, match="progress=True: give a function"):
        run(clf, {"bright": bright}, Images(), progress=True)


def test_a_protocol_may_hold_lists(clf):
    listed = metrics.Protocol("listed", points=3, references=["black"], metrics=["deletion"])
    assert run(clf, {"bright": bright}, Images(masks=False), protocol=listed).metrics == ["deletion"]


def test_limit_draws_images_with_the_seed(clf):
    def chosen(seed):
        return wide(run(clf, {"bright": bright}, Images(size=20), limit=5, seed=seed))["index"]

    assert chosen(0) == sorted(chosen(0)) == chosen(0)
    assert len(set(chosen(0))) == 5
    assert chosen(0) != chosen(1)


def test_a_failing_method_does_not_stop_the_others(clf):
    def broken(images, target):
        raise RuntimeError("no such layer\nand a long trace")

    def sometimes(images, target):
        maps = bright(images, target)
        if len(images) == 1:  # the last batch of 7 = 3 + 3 + 1
            maps = maps / 0
        return maps

    evaluation = run(clf, {"broken": broken, "sometimes": sometimes, "bright": bright}, Images())
    assert evaluation.methods == ["sometimes", "bright"]
    assert evaluation.failures == [
        Failure("broken", tuple(range(7)), "RuntimeError: no such layer"),
        Failure("sometimes", (6,), "maps hold NaN or infinite values: an attribution must be finite"),
    ]
    assert wide(evaluation)["index"] == [*range(6), *range(7)]
    assert set(evaluation.summary()["methods"]) == {"sometimes", "bright"}
    assert set(evaluation.curves) == {"sometimes", "bright"}
    assert evaluation.summary()["failures"][1]["images"] == [6]
    with pytest.raises(ValueError, match=r"nothing could be measured.*no such layer"):
        run(clf, {"broken": broken}, Images())


def test_a_bad_image_does_not_stop_the_others(clf):
    class Damaged(Images):
        def __getitem__(self, index):
            if index == 1:
                raise OSError("cannot read 1.png")
            item = super().__getitem__(index)
            if index == 4:
                item["image"] = item["image"] * 255
            if index == 5:
                item["image"] = torch.rand(3, 4, 4)
                item.pop("mask")
            return item

    evaluation = run(clf, {"bright": bright}, Damaged())
    assert wide(evaluation)["index"] == [0, 2, 3, 6]
    assert evaluation.classifier["images"] == 4
    reasons = {failure.images: failure.reason for failure in evaluation.failures}
    assert reasons[1,] == "OSError: cannot read 1.png"
    assert "give RGB in [0, 1]" in reasons[4,]
    assert "images of one size" in reasons[5,]


def test_methods_cannot_disturb_each_other(clf):
    def rude(images, target):
        maps = bright(images, target)
        images.zero_()
        target.zero_()
        return maps

    polite = run(clf, {"bright": bright}, Images())
    after = run(clf, {"rude": rude, "bright": bright}, Images())
    assert after.values("bright", "insertion") == polite.values("bright", "insertion")


def test_bootstrap_intervals(clf):
    evaluation = run(clf, {"bright": bright, "dark": dark}, Images(size=40), batch_size=40)
    entry = evaluation.summary()["methods"]["bright"]
    for metric in (*FAITHFULNESS, *LOCALIZATION):
        low, high = entry["ci95"][metric]
        assert low <= entry[metric] <= high
    values = list(evaluation.values("bright", "insertion").values())
    low, high = entry["ci95"]["insertion"]
    normal = 2 * 1.96 * statistics.stdev(values) / math.sqrt(len(values))
    assert high - low == pytest.approx(normal, rel=0.15)
    assert evaluation.summary()["methods"] == evaluation.summary()["methods"]  # seeded


def test_resampling_takes_the_memory_of_few_images():
    values = torch.randn(10_000, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    means = bootstrap.resampled(values[:50], 0)
    assert means.shape == (RESAMPLES, 20)
    # the draws are those of one generator, however they are cut into parts
    drawn = torch.randint(50, (RESAMPLES, 50), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(means, values[drawn].mean(dim=1), rtol=0, atol=1e-14)
    peak = peak_bytes(lambda: bootstrap.resampled(values, 0), values.device)
    assert math.isnan(peak) or peak < 8 * 2**20


def test_compare_is_paired(clf):
    evaluation = run(clf, {"bright": bright, "dark": dark, "same": bright}, Images(size=20))
    outcome = evaluation.compare("bright", "dark", "insertion")
    a, b = evaluation.values("bright", "insertion"), evaluation.values("dark", "insertion")
    assert outcome["difference"] == pytest.approx(statistics.mean(a.values()) - statistics.mean(b.values()))
    assert outcome["ci95"][0] <= outcome["difference"] <= outcome["ci95"][1]
    assert 0 < outcome["p"] <= 1
    assert evaluation.compare("bright", "same", "insertion") == {"difference": 0, "ci95": [0, 0], "p": 1}
    turned = evaluation.compare("dark", "bright", "insertion")
    assert turned["difference"] == pytest.approx(-outcome["difference"])
    assert turned["p"] == outcome["p"]
    # an order that is always better by the same amount is as sure as the resamples allow
    better = evaluate(clf, {"bright": bright}, Images(size=20), protocol=SHORT)
    key = Key(clf.name, "predicted", "always", "short", "", "pic")
    better.records.add(key, range(20), better.records[key._replace(method="bright")].values + 1)
    assert better.compare("always", "bright", "pic")["p"] == pytest.approx(2 / (RESAMPLES + 1))
    with pytest.raises(ValueError, match="choose one of bright, dark, same"):
        evaluation.compare("bright", "grad", "pic")
    with pytest.raises(ValueError, match="metric 'auc' is not known"):
        evaluation.compare("bright", "dark", "auc")


def test_written_files(clf, tmp_path, monkeypatch):
    data = Images()
    data.masks[0] = False
    evaluation = run(clf, {"bright": bright, "dark": dark}, data)
    folder = tmp_path / "deep" / "results"
    evaluation.write(folder)
    names = sorted(path.name for path in folder.iterdir())
    tables = [
        [f"{name}.{end}{more}" for name in ("images", "scores") for more in ("", ".sha256")]
        for end in ("parquet", "csv")
    ]
    assert names in [[*table, "summary.json"] for table in tables]
    assert read_columns(folder / "images")["path"] == evaluation.images["path"]
    assert read_json(folder / "summary.json", required=True) == json.loads(json.dumps(evaluation.summary()))
    # an interrupted write leaves what was there
    before = (folder / "summary.json").read_text()
    monkeypatch.setattr(json, "dumps", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluation.write(folder)
    assert (folder / "summary.json").read_text() == before
    assert sorted(path.name for path in folder.iterdir()) == names


def test_refusals(clf):
    with pytest.raises(ValueError, match="choose one of predicted, true"):
        run(clf, {"bright": bright}, Images(), target="top1")
    with pytest.raises(ValueError, match="no methods"):
        run(clf, {}, Images())
    with pytest.raises(ValueError, match="batch_size=0: give an integer ≥ 1"):
        run(clf, {"bright": bright}, Images(), batch_size=0)
    with pytest.raises(ValueError, match="protocol 'mda2' is not known"):
        run(clf, {"bright": bright}, Images(), protocol="mda2")
