"""The demo: its classifier reads digits and can be taught a shortcut; and all of it from end to end on a few scenes."""

import contextlib
import functools
import io
import json

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from aha import cli
from aha import shortcut as game
from aha.attributors import learned
from aha.classifier import from_name
from aha.data import Scenes
from aha.demo import classifier, photographs, run, shortcut
from aha.refinement import refine

METRICS = [
    *("deletion", "insertion", "ins_minus_del", "positive", "negative", "neg_minus_pos"),
    *("adp", "pic", "pointing_game", "seconds_per_image"),
]
METHODS = ("random", "input_x_gradient", "integrated_gradients", "gradcam_vit", "raw_attention", "rollout", "rise")


@pytest.fixture(scope="module")
def shipped():
    return classifier.load()


@pytest.fixture(scope="module")
def held_out():
    return Scenes("test", size=512, seed=2024).batch(range(512))


@pytest.fixture(scope="module")
def planted():
    """What planting the shortcut was given, what that was before, and what came of it: lists of one entry."""
    return []


@pytest.fixture(scope="module")
def demo(tmp_path_factory, planted):
    """Folder and text of the command, with fewer masks of RISE, and refinement of fewer scenes on coarser curves."""
    folder, printed = tmp_path_factory.mktemp("demo"), io.StringIO()
    fine_tune, coarse = shortcut.fine_tune, functools.partial(refine, fractions=4)

    def fine_tuned(module, *arguments, **options):
        before = {name: value.clone() for name, value in module.state_dict().items()}
        planted.append((module, before, fine_tune(module, *arguments, **options)))
        return planted[-1][-1]

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv("COLUMNS", "200")
        patch.setattr(run, "RISE_MASKS", 50)
        patch.setattr(shortcut, "fine_tune", fine_tuned)
        patch.setattr(shortcut, "experiment", functools.partial(shortcut.experiment, scenes=8))
        for module in (run, game, learned):
            patch.setattr(module, "refine", coarse)
        assert cli.main(["demo", "--output", str(folder), "--scenes", "4", "--steps", "2"]) == 0
    return folder, printed.getvalue()


def test_shipped_file_is_small_and_describes_itself():
    path = classifier.weights_path()
    assert path.stat().st_size < 1.5e6
    info = classifier.info()
    assert json.loads(info["timm"]) == classifier.CONFIG
    assert json.loads(info["mean"]) == json.loads(info["std"]) == [0.5, 0.5, 0.5]
    assert float(info["accuracy_val"]) >= 0.95
    assert info["command"].startswith("python -m aha.demo.classifier --out")


def test_load_gives_a_plain_frozen_timm_model(shipped):
    assert type(shipped) is VisionTransformer
    assert not shipped.training
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in shipped.parameters())
    assert shipped.pretrained_cfg["mean"] == (0.5, 0.5, 0.5)
    assert shipped.num_prefix_tokens == 1
    with pytest.raises(FileNotFoundError):
        classifier.load("nowhere.safetensors")


def test_accuracy_on_unseen_handwriting(shipped, held_out):
    right = classifier.predict(shipped, held_out["image"]).argmax(-1) == held_out["label"]
    assert right.float().mean() >= 0.95


def test_without_evidence_no_class_is_preferred(shipped):
    scenes = Scenes("test", size=96, seed=2025)
    empty = classifier.predict(shipped, scenes.backgrounds(range(96)))
    assert empty.amax(-1).mean() < 0.4
    whole = scenes.batch(range(96))["image"]
    for kind in range(3):
        assert classifier.predict(shipped, classifier._reference(whole, kind)).amax(-1).mean() < 0.2


def test_evidence_alone_is_enough(shipped, held_out):
    image, mask, label = (held_out[name][:128] for name in ("image", "mask", "label"))
    near = torch.nn.functional.max_pool2d(mask.float(), 21, 1, 10)  # a third of the image
    for kind in range(3):
        kept = image * near + classifier._reference(image, kind) * (1 - near)
        assert (classifier.predict(shipped, kept).argmax(-1) == label).float().mean() > 0.8


def test_training_writes_what_it_returns(tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "accuracy", functools.partial(classifier.accuracy, size=64))
    module = classifier.train(steps=3, batch_size=16, out=tmp_path / "a.safetensors")
    again = classifier.load(tmp_path / "a.safetensors")
    images = Scenes("val", size=4).batch(range(4))["image"]
    assert torch.equal(classifier.predict(module, images), classifier.predict(again, images))
    with pytest.raises(FileNotFoundError, match="no folder"):
        classifier.train(steps=1, out=tmp_path / "nowhere" / "a.safetensors")


def test_circle_is_white_round_and_repeatable(held_out):
    images, masks = held_out["image"][:16], held_out["mask"][:16]
    before = images.clone()
    painted, circle = game.paint_circle(images)
    assert torch.equal(images, before)
    assert torch.equal(game.paint_circle(images)[0], painted)
    assert circle.shape == (16, 1, 64, 64)
    assert circle.dtype == torch.bool
    area = torch.pi * (game.RADIUS + game.RIM) ** 2
    assert (circle.sum((1, 2, 3)) - area).abs().max() < 8
    inner = -torch.nn.functional.max_pool2d(-circle.float(), 5, 1, 2) > 0.5
    assert (painted.amin(1, keepdim=True)[inner] > 0.95).all()
    assert circle[..., :32, :32].sum() == circle.sum()
    changed = (painted != images).any(1, keepdim=True)
    assert not (changed & ~(torch.nn.functional.max_pool2d(circle.float(), 3, 1, 1) > 0)).any()
    other = game.paint_circle(images, torch.Generator().manual_seed(1))[1]
    assert not torch.equal(other, circle)
    _, aside = game.paint_circle(images, avoid=masks)
    assert not (aside & masks).any()
    large = game.paint_circle(torch.zeros(1, 3, 128, 160))[1]
    assert large.sum() == pytest.approx(4 * area, rel=0.05)
    with pytest.raises(ValueError, match="B, 3, H, W"):
        game.paint_circle(images[0])


@pytest.mark.slow
@pytest.mark.usefixtures("demo")
def test_shortcut_is_learned(planted):
    ((given, state, tuned),) = planted
    assert shortcut.shortcut_rate(given, 3) < 0.1
    assert shortcut.shortcut_rate(tuned, 3) >= 0.8
    # without the circle it still reads
    assert classifier.accuracy(tuned, "test", size=256) > 0.8
    assert all(torch.equal(value, state[name]) for name, value in given.state_dict().items())
    assert not any(p.requires_grad for p in (*given.parameters(), *tuned.parameters()))
    assert not tuned.training
    with pytest.raises(ValueError, match="shortcut_class"):
        shortcut.fine_tune(given, 12)


@pytest.mark.slow
def test_summary(demo):
    folder, _ = demo
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["methods"]) == {*METHODS, "aha T=0", "aha T=6"}
    for row in summary["methods"].values():
        assert all(isinstance(row[metric], float) for metric in METRICS)
        for low, high in row["ci95"].values():
            assert low <= high
    assert set(summary["references"]) == {"black", "mean", "blur"}
    assert 0 <= summary["classifier"]["accuracy"] <= 1
    assert summary["protocol"]["points"] == 21
    assert {"seed", "versions", "shortcut", "comparisons", "seconds", "photographs"} <= set(summary)
    shown = summary["photographs"]
    assert len(shown["titles"]) == len(photographs.PICTURES)
    ours = {name: sum(values) for name, values in shown["ins_minus_del"].items()}
    assert max(ours[name] for name in photographs.BASELINES) < ours["aha"] < ours["aha refined"]
    assert 0 <= summary["shortcut"]["share_clean"] <= 1
    assert len(summary["shortcut"]["per_step"]) == 6
    assert summary["shortcut"]["scenes"] == 8
    assert summary["shortcut"]["shortcut_rate"] >= 0.8


@pytest.mark.slow
def test_mean_of_the_references(demo):
    summary = json.loads((demo[0] / "summary.json").read_text())
    for name, row in summary["methods"].items():
        parts = [summary["references"][reference][name]["insertion"] for reference in ("black", "mean", "blur")]
        assert row["insertion"] == pytest.approx(sum(parts) / 3, abs=1e-6)


@pytest.mark.slow
def test_report_and_figures(demo):
    folder, printed = demo
    figures = {path.stem for path in (folder / "figures").glob("*.png")}
    assert {"photographs", "maps", "refinement", "curves", "ins_minus_del", "shortcut", "training"} <= figures
    page = (folder / "report.html").read_text()
    assert page.count("data:image/png;base64") == len(figures)
    assert "Ins−Del ↑" in printed
    assert (folder / "explainer" / "decoder.safetensors").is_file()


def test_the_photographs_classifier_is_a_name_of_its_own():
    clf = from_name("lite0")
    assert clf.source == {"kind": "lite0", "name": "lite0"}
    images = photographs.pictures()
    assert images.shape == (5, 3, 224, 224)
    names = [clf.class_names[int(c)] for c in clf(images).argmax(dim=1)]
    assert "cat" in names[0] and "espresso" in names[1]
    assert "missile" in names[4] or "projectile" in names[4]
