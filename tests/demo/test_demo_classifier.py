"""The shipped classifier reads digits, knows when there are none, and can be taught a shortcut."""

import json

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from aha.data import Scenes
from aha.demo import classifier, shortcut


@pytest.fixture(scope="module")
def shipped():
    return classifier.load()


@pytest.fixture(scope="module")
def held_out():
    return Scenes("test", size=512, seed=2024).batch(range(512))


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


def test_training_writes_what_it_returns(tmp_path):
    module = classifier.train(steps=3, batch_size=16, out=tmp_path / "a.safetensors")
    again = classifier.load(tmp_path / "a.safetensors")
    images = Scenes("val", size=4).batch(range(4))["image"]
    assert torch.equal(classifier.predict(module, images), classifier.predict(again, images))
    with pytest.raises(FileNotFoundError, match="no folder"):
        classifier.train(steps=1, out=tmp_path / "nowhere" / "a.safetensors")


def test_circle_is_white_round_and_repeatable(held_out):
    images, masks = held_out["image"][:16], held_out["mask"][:16]
    before = images.clone()
    painted, circle = shortcut.paint_circle(images)
    assert torch.equal(images, before)
    assert torch.equal(shortcut.paint_circle(images)[0], painted)
    assert circle.shape == (16, 1, 64, 64)
    assert circle.dtype == torch.bool
    area = torch.pi * (shortcut.RADIUS + shortcut.RIM) ** 2
    assert (circle.sum((1, 2, 3)) - area).abs().max() < 8
    inner = -torch.nn.functional.max_pool2d(-circle.float(), 5, 1, 2) > 0.5
    assert (painted.amin(1, keepdim=True)[inner] > 0.95).all()
    assert circle[..., :32, :32].sum() == circle.sum()
    changed = (painted != images).any(1, keepdim=True)
    assert not (changed & ~(torch.nn.functional.max_pool2d(circle.float(), 3, 1, 1) > 0)).any()
    other = shortcut.paint_circle(images, torch.Generator().manual_seed(1))[1]
    assert not torch.equal(other, circle)
    _, aside = shortcut.paint_circle(images, avoid=masks)
    assert not (aside & masks).any()
    large = shortcut.paint_circle(torch.zeros(1, 3, 128, 160))[1]
    assert large.sum() == pytest.approx(4 * area, rel=0.05)
    with pytest.raises(ValueError, match="B, 3, H, W"):
        shortcut.paint_circle(images[0])


def test_shortcut_is_learned(shipped):
    state = {name: value.clone() for name, value in shipped.state_dict().items()}
    before = shortcut.shortcut_rate(shipped, 3)
    tuned = shortcut.fine_tune(shipped, 3)
    assert before < 0.1
    assert shortcut.shortcut_rate(tuned, 3) >= 0.8
    # without the circle it still reads
    assert classifier.accuracy(tuned, "test", size=256) > 0.8
    assert all(torch.equal(value, state[name]) for name, value in shipped.state_dict().items())
    assert not any(p.requires_grad for p in shipped.parameters())
    assert not tuned.training
    with pytest.raises(ValueError, match="shortcut_class"):
        shortcut.fine_tune(shipped, 12)
