"""The comparison: specs, pieces on disk, resuming, several processes, and what all of them must not change."""

import dataclasses
import json
import math
import os
import sys

import PIL.Image
import pytest
import torch

from aha import attributors, bootstrap
from aha.attributors.specs import MethodSpec, parse
from aha.classifier import Classifier
from aha.data import Preprocessing
from aha.evaluation import Key, evaluate
from aha.evaluation.compare import compare
from aha.evaluation.engine import Engine, Row
from aha.metrics import PROTOCOLS, Protocol, Suite, catalog
from aha.source import Source
from aha.store import Memory, Packs, pack_maps, unpack_maps

from .. import launch
from ..toys import SmallNet, wide

SHORT = Protocol("short", points=5)


class Images(torch.utils.data.Dataset):
    def __init__(self, size=7):
        self.images = torch.rand(size, 3, 16, 16, generator=torch.Generator().manual_seed(5))

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        mask = torch.zeros(1, 16, 16, dtype=torch.bool)
        mask[:, 4:9, 3:8] = index > 0
        return {"image": self.images[index], "label": index % 3, "mask": mask}


@pytest.fixture
def clf():
    return Classifier.wrap(SmallNet(), input_size=(16, 16), num_classes=3)


def engine(clf, store, methods=("input_x_gradient", "random"), suites=("short",), size=7, **options):
    made = {"short": lambda: Suite(clf, SHORT), "localisation": lambda: Suite(clf, "localisation")}
    rows = [Row(name, name, attributors.create(name, clf)) for name in methods]
    settings = {"target": "predicted", "batch_size": 2, **options}
    return Engine(
        clf, rows, Images(size), range(size), suites={key: made[key]() for key in suites}, store=store, **settings
    )


def outcome(engine):
    """Everything but the times."""
    result = engine.result(seed=0)
    columns = {
        str(key): [part.tolist() for part in series]
        for key, series in result.records.items()
        if key.metric != "seconds_per_image"
    }
    whole = json.dumps([columns, result.images])
    return whole, {m: {r: {n: c.tolist() for n, c in named.items()} for r, named in of.items()}
                                 for m, of in result.curves.items()}  # fmt: skip


def test_specs_are_parsed():
    spec = MethodSpec.parse("rise:n_masks=12,p=0.25")
    assert (spec.name, spec.options, spec.label) == ("rise", {"n_masks": 12, "p": 0.25}, "rise:n_masks=12,p=0.25")
    assert MethodSpec.parse("RISE 12@rise:n_masks=12").label == "RISE 12"
    specs, everything = parse(["input_x_gradient:smooth=2", "all"])
    assert everything
    assert {spec.name for spec in specs} == set(attributors.available())
    assert specs[0].options == {"smooth": 2}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["rolout"], "did you mean 'rollout'"),
        (["rise:n_masks"], "option 'n_masks' has no value"),
        (["rise", "rise"], "rise is given twice"),
    ],
)
def test_bad_specs(texts, message):
    with pytest.raises(ValueError, match=message):
        parse(texts)


def test_unknown_options_are_one_line(clf):
    with pytest.raises(ValueError, match=r"rise does not take these options .*'masks'"):
        MethodSpec.parse("rise:masks=3").create(clf, 0)


def test_keys_differ_with_what_decides_the_maps(tmp_path):
    keys = {MethodSpec.parse(text).key(0) for text in ("rise", "rise:n_masks=3", "a@rise", "rollout")}
    assert len(keys) == 4
    assert MethodSpec.parse("rise").key(0) == MethodSpec.parse("rise").key(0) != MethodSpec.parse("rise").key(1)
    file = tmp_path / "weights"
    spec = MethodSpec("rise", {"cells": str(file)})
    file.write_bytes(b"one")
    before = spec.key(0)
    file.write_bytes(b"two")
    assert spec.key(0) != before


def test_maps_survive_half_precision():
    generator = torch.Generator().manual_seed(0)
    for magnitude in (1e-20, 1.0, 1e20):  # far beyond what half precision holds
        maps = torch.randn(3, 1, 20, 20, generator=generator) * magnitude
        kept = unpack_maps(pack_maps(maps))
        assert ((kept - maps).abs() <= 2**-11 * maps.abs() + 2**-24 * magnitude * 4).all()
    assert torch.equal(unpack_maps(pack_maps(torch.zeros(2, 1, 4, 4))), torch.zeros(2, 1, 4, 4))


def test_a_folder_gives_the_numbers_of_memory(clf, tmp_path):
    one, two = engine(clf, Memory()), engine(clf, Packs(tmp_path))
    one.run()
    two.run()
    kept, measured = two.result(0), one.result(0)
    for name in ("deletion", "insertion", "adp"):
        # half precision may reorder pixels that differ by less than 1/1000
        assert wide(kept)[name] == pytest.approx(wide(measured)[name], abs=0.02 * (100 if name == "adp" else 1))
    assert wide(kept)["index"] == wide(measured)["index"]


@pytest.mark.parametrize("world", [2, 3])
def test_the_number_of_processes_does_not_matter(clf, tmp_path, world):
    alone = engine(clf, Packs(tmp_path / "one"))
    alone.run()
    ranks = [engine(clf, Packs(tmp_path / "many", rank), rank=rank, world=world) for rank in range(world)]
    for rank in reversed(ranks):
        rank.run()
    assert outcome(ranks[0]) == outcome(alone)


def test_an_interrupted_run_continues(clf, tmp_path):
    whole = engine(clf, Packs(tmp_path / "whole"))
    whole.run()
    expected, needed = outcome(whole), clf.module.seen
    clf.module.seen = 0
    calls = 0

    def interrupt(name, images):
        nonlocal calls
        calls += 1
        if calls == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine(clf, Packs(tmp_path / "part")).run(interrupt)
    spent = clf.module.seen
    assert 0 < spent < needed
    again = engine(clf, Packs(tmp_path / "part"))
    again.run()
    assert outcome(again) == expected
    # what is shared by the methods of the batch in which it stopped is made once more
    assert clf.module.seen - spent <= needed - spent + 2 * 4
    clf.module.seen = 0
    last = engine(clf, Packs(tmp_path / "part"))
    last.run()
    assert clf.module.seen == 0
    assert outcome(last) == expected


def test_another_protocol_takes_the_kept_maps(clf, tmp_path):
    engine(clf, Packs(tmp_path)).run()
    both = engine(clf, Packs(tmp_path), suites=("short", "localisation"))
    clf.module.seen = 0
    both.run()
    # f(I) for each protocol and f(I0) for the first; no method and no curve is computed again
    assert clf.module.seen == 7 * (4 + 1)
    result = both.result(0)
    assert "iou" in result.metrics
    assert math.isnan(wide(result)["iou"][0])
    fresh = engine(clf, Packs(tmp_path / "fresh"), suites=("short", "localisation"))
    fresh.run()
    assert outcome(fresh) == outcome(both)


def test_kept_maps_are_found_again(clf, tmp_path):
    made = engine(clf, Packs(tmp_path))
    made.run()
    maps = made.maps("input_x_gradient", [5, 0])
    expected = attributors.create("input_x_gradient", clf).attribute(Images().images[[5, 0]])
    assert torch.allclose(maps, expected, rtol=2e-3, atol=1e-6)
    assert made.maps("input_x_gradient", [99]) is None


def test_what_failed_is_tried_again(clf, tmp_path):
    class Moody:
        broken = True

        def __call__(self, images, target):
            if self.broken and len(images) == 1:
                raise RuntimeError("not today")
            return images.mean(dim=1, keepdim=True)

    moody = Moody()

    def made():
        return Engine(
            clf, [Row("moody", "moody", moody)], Images(), range(7), "predicted", {"s": Suite(clf, SHORT)}, 2,
            Packs(tmp_path),
        )  # fmt: skip

    first = made()
    first.run()
    result = first.result(0)
    assert [(f.method, f.images, f.reason) for f in result.failures] == [("moody", (6,), "RuntimeError: not today")]
    assert wide(result)["index"] == [*range(6)]
    moody.broken = False
    second = made()
    second.run()
    assert second.result(0).failures == []
    assert wide(second.result(0))["index"] == [*range(7)]


def test_an_image_that_becomes_readable_joins(clf, tmp_path):
    class Flaky(Images):
        broken = True

        def __getitem__(self, index):
            if self.broken and index == 3:
                raise OSError("share is away")
            return super().__getitem__(index)

    data = Flaky()

    def made():
        rows = [Row("random", "random", attributors.create("random", clf))]
        return Engine(clf, rows, data, range(7), "predicted", {"s": Suite(clf, SHORT)}, 3, Packs(tmp_path))

    for _ in range(2):  # an image that stays away is reported every time
        engine = made()
        engine.run()
        result = engine.result(0)
        assert wide(result)["index"] == [0, 1, 2, 4, 5, 6]
        assert [(f.method, f.images) for f in result.failures] == [(None, (3,))]
    data.broken = False
    engine = made()
    engine.run()
    whole = engine.result(0)
    assert whole.failures == []
    assert wide(whole)["index"] == [*range(7)]
    fresh = Engine(clf, engine.rows, data, range(7), "predicted", {"s": Suite(clf, SHORT)}, 3, Packs(tmp_path / "new"))
    fresh.run()
    assert outcome(fresh) == outcome(engine)


def test_the_cap_per_class_is_of_the_whole_data_set(clf, tmp_path):
    capped = Protocol("capped", points=4, references=("black",), per_class=1)
    rows = [Row("random", "random", attributors.create("random", clf))]
    engine = Engine(clf, rows, Images(), range(7), "predicted", {"s": Suite(clf, capped)}, 2, Packs(tmp_path))
    engine.run()
    result = engine.result(0)
    shown = [i for i, value in zip(wide(result)["index"], wide(result)["deletion"], strict=True) if value == value]
    assert shown == [0, 1, 2]  # labels are 0, 1, 2, 0, …
    assert result.summary()["methods"]["random"]["deletion"] == pytest.approx(sum(wide(result)["deletion"][:3]) / 3)


def test_passes_and_memory_are_measured(clf, tmp_path):
    made = engine(clf, Packs(tmp_path), memory=True)
    made.run()
    entry = made.result(0).summary()["methods"]
    assert entry["input_x_gradient"]["forward_per_image"] == entry["input_x_gradient"]["backward_per_image"] == 1
    assert entry["random"]["forward_per_image"] == 0
    if sys.platform == "linux":
        assert entry["input_x_gradient"]["peak_bytes_per_image"] >= 0


def test_the_peak_is_that_of_the_call():
    from aha.memory import CLEAR, peak_bytes

    if not os.access(CLEAR, os.W_OK):
        pytest.skip("the kernel does not reset the high-water mark")

    def call():
        return torch.ones(2**24), torch.ones(2**23)  # 64 and 32 MiB

    assert peak_bytes(call, torch.device("cpu")) / 2**20 == pytest.approx(96, abs=6)


def test_holm():
    assert bootstrap.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert bootstrap.holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def test_significance_against_the_best(clf):
    result = evaluate(
        clf,
        {name: attributors.create(name, clf) for name in ("random", "input_x_gradient")},
        Images(20),
        protocol=SHORT,
        progress=False,
    )
    found = result.summary()["significance"]
    for metric, of in found.items():
        best = result.best(metric)
        (other,) = of
        assert of[other]["best"] == best != other
        pair = result.compare(other, best, metric)
        assert of[other]["p"] == pair["p"]
        assert of[other]["ci95"] == pair["ci95"]
        assert (pair["difference"] <= 0) == catalog.get(metric).higher_is_better


def written(records):
    return {key: [part.tolist() for part in series] for key, series in records.items()}


def test_compare_resumes_and_keeps_settings_apart(tmp_path):
    methods, _ = parse(["random", "input_x_gradient"])
    black = dataclasses.replace(SHORT, references=("black",))

    def run(**changed):
        settings = {"protocols": (black,), "targets": ("predicted", "true"), "batch_size": 4}
        return compare([Source(limit=6)], methods, tmp_path, **{**settings, **changed})

    first = run()
    assert set(first.results) == {("scenes", "predicted"), ("scenes", "true")}
    table = written(first.records)
    assert {(key.classifier, key.target, key.method) for key in first.records} == {
        ("scenes", target, method) for target in ("predicted", "true") for method in ("random", "input_x_gradient")
    }
    assert first.images["explained"] == ["predicted"] * 6 + ["true"] * 6
    assert {len(column) for column in first.images.values()} == {12}
    packs = {path: path.read_bytes() for path in tmp_path.rglob("*.pack")}
    assert len(packs) == 2
    again = run()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.pack")} == packs
    assert written(again.records) == table  # also the times: nothing ran
    other = run(protocols=(dataclasses.replace(black, points=7),), targets=("predicted",))
    key = Key("scenes", "predicted", "random", "short", "", "deletion")
    assert other.records[key].values.tolist() != first.records[key].values.tolist()
    assert written(run().records) == table


def test_progress_is_of_all_that_a_classifier_is_measured_with(tmp_path):
    told = []
    compare(
        [Source(limit=3)],
        parse(["random", "input_x_gradient"])[0],
        tmp_path,
        protocols=(SHORT,),
        targets=("predicted", "true"),
        progress=lambda *about: told.append(about),
        batch_size=2,
    )
    assert {(name, maps) for name, maps, _, _ in told} == {("scenes", 2 * 2 * 3)}
    assert {method for _, _, method, _ in told} == {"random", "input_x_gradient"}
    assert sum(more for *_, more in told) == 2 * 2 * 3


def test_compare_says_which_protocol_no_image_takes_part_in(tmp_path):
    specs, _ = parse(["random"])
    sure = dataclasses.replace(SHORT, name="sure", confidence=1.1)
    done = compare([Source(limit=2)], specs, tmp_path / "both", protocols=(sure, SHORT))
    assert done.skipped == ["scenes, predicted: no image takes part in protocol 'sure'"]
    assert done.results["scenes", "predicted"].headline == "short/deletion"
    folder = tmp_path / "images"  # without masks
    folder.mkdir()
    PIL.Image.new("RGB", (80, 70)).save(folder / "one.png")
    with pytest.raises(ValueError, match=r"nothing could be measured \(scenes, predicted: no image takes part in"):
        compare([Source(data=str(folder), labels=False)], specs, tmp_path / "none", protocols=(sure,))


def test_localisation_that_is_asked_for_is_measured_once(tmp_path):
    """On its own crop of a folder's images, not on that of the first protocol besides."""
    folders = tmp_path / "images", tmp_path / "masks"
    for folder in folders:
        folder.mkdir()
        PIL.Image.new("RGB", (90, 70), (200, 90, 30)).save(folder / "one.png")
    tight = dataclasses.replace(SHORT, name="tight", metrics=("deletion",), preprocessing=Preprocessing(1.0))
    source = Source(data=str(folders[0]), masks=folders[1], labels=False)
    done = compare([source], parse(["random"])[0], tmp_path / "out", protocols=(tight, "localisation"))
    (result,) = done.results.values()
    assert [protocol.name for protocol in result.protocols] == ["tight", "localisation"]
    assert [column.name for column in result.columns] == ["deletion", *PROTOCOLS["localisation"].metrics]
    assert result.series("random", "iou").images.tolist() == [0]
    assert "73 px" in result.prepared["localisation"]


def test_what_an_earlier_revision_kept_is_made_again(tmp_path, monkeypatch):
    settings = [Source(limit=2)], parse(["random"])[0], tmp_path, (SHORT,)
    monkeypatch.setattr(sys.modules[compare.__module__], "REVISION", 1)
    before = compare(*settings).pieces["scenes", "predicted"].store.root
    monkeypatch.undo()
    assert compare(*settings).pieces["scenes", "predicted"].store.root != before


def test_compare_refusals(tmp_path):
    specs, _ = parse(["random"])
    with pytest.raises(ValueError, match="given twice"):
        compare([Source(limit=1), Source(limit=1)], specs, tmp_path, protocols=(SHORT,))
    with pytest.raises(ValueError, match="choose one of predicted, true"):
        compare([Source(limit=1)], specs, tmp_path, targets=("both",))


DISTRIBUTED = """
import sys
from pathlib import Path
from aha.evaluation.compare import compare
from aha.attributors.specs import parse
from aha.metrics import PROTOCOLS, Protocol, Suite
from aha.source import Source

done = compare([Source(limit=5)], parse(["random", "rollout"])[0], Path(sys.argv[1]), (Protocol("short", points=4),),
               batch_size=2)
if done is not None:
    table = {key: [part.tolist() for part in series] for key, series in done.records.items()}
    # what is measured of the machine differs
    own = ("seconds_per_image", "peak_bytes_per_image")
    table = {key: series for key, series in table.items() if key.metric not in own}
    Path(sys.argv[1], "table").write_text(str([table, done.images]))
"""


@pytest.mark.slow
def test_two_processes_give_exactly_the_numbers_of_one(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(DISTRIBUTED)
    for count in (1, 2):
        command = [*launch.several(count), script, tmp_path / f"{count}"]
        done = launch.finished(command, timeout=300, CUDA_VISIBLE_DEVICES="")
        assert done.returncode == 0, done.stderr
        assert len(list((tmp_path / f"{count}").rglob("*.pack"))) == count
    assert (tmp_path / "1" / "table").read_text() == (tmp_path / "2" / "table").read_text()
