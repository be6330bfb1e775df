"""The explainer on every kind of backbone, and its files."""

import json
import warnings

import pytest
import torch

import aha
from aha.explainer.encoder import build, quarters
from aha.files import read_json

from ..toys import TINY_DECODER, tiny_classifier

TIMM = {
    "vit_tiny_patch16_224": 64,  # one class token
    "vit_small_patch14_dinov2": 56,  # patch 14, pretrained at 518 px
    "vit_small_patch14_reg4_dinov2": 56,  # register tokens
    "vit_small_patch16_dinov3": 64,  # Eva with rotary positions and registers
    "deit_tiny_distilled_patch16_224": 64,  # two prefix tokens
    "convnext_atto": 64,
    "swin_tiny_patch4_window7_224": 64,
    "resnet10t": 64,
}


@pytest.mark.parametrize("name", TIMM)
def test_timm_backbones(name):
    size = TIMM[name]
    clf = tiny_classifier(img_size=64)
    image_size = (size, size)
    explainer = aha.Explainer.build(
        clf, name, pretrained=False, evidence=False, decoder=TINY_DECODER, image_size=image_size
    )
    images = torch.rand(2, 3, size, size)
    levels = explainer.features(images)
    assert len(levels) == 4
    assert [level.shape[1] for level in levels] == explainer.encoder.channels
    maps = explainer(images, torch.tensor([0, 4]))
    assert maps.shape == (2, 1, size, size)
    maps.sum().backward()
    assert all(p.grad is not None for p in explainer.decoder.parameters())
    assert all(p.grad is None for p in explainer.encoder.parameters())


def hf_models():
    import transformers as t

    small = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48}
    stages = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32], "num_stages": 4}
    return {
        "vit": lambda: t.ViTModel(t.ViTConfig(**small, image_size=32, patch_size=8)),
        "dinov2": lambda: t.Dinov2Model(t.Dinov2Config(**small, image_size=28, patch_size=14)),
        "dinov3": lambda: t.DINOv3ViTModel(t.DINOv3ViTConfig(**small, image_size=32, patch_size=16)),
        "convnext": lambda: t.ConvNextModel(t.ConvNextConfig(**stages)),
        "swin": lambda: t.SwinModel(
            t.SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], image_size=64, window_size=2)
        ),
    }


@pytest.mark.parametrize("name", ["vit", "dinov2", "dinov3", "convnext", "swin"])
def test_transformers_backbones(name, tmp_path):
    torch.manual_seed(0)
    hf_models()[name]().save_pretrained(tmp_path)
    size = 56 if name == "dinov2" else 64
    clf = tiny_classifier(img_size=64)
    explainer = aha.Explainer.build(
        clf, f"hf:{tmp_path}", evidence=False, decoder=TINY_DECODER, image_size=(size, size)
    )
    images = torch.rand(2, 3, size, size)
    assert explainer(images, torch.tensor([1, 2])).shape == (2, 1, size, size)
    rows = [level.shape[-1] for level in explainer.features(images)]
    if name in ("vit", "dinov2", "dinov3"):
        assert rows == [size // {"vit": 8, "dinov2": 14, "dinov3": 16}[name]] * 4
    else:
        assert rows == sorted(rows, reverse=True)


def test_transformers_tokens_are_laid_out_row_by_row(tmp_path):
    # features must follow the image: a change in one corner shows most in that corner
    torch.manual_seed(0)
    hf_models()["vit"]().save_pretrained(tmp_path)
    encoder = build(f"hf:{tmp_path}", tiny_classifier(), image_size=(32, 32)).eval()
    image = torch.rand(1, 3, 32, 32)
    other = image.clone()
    other[..., :8, 24:] = 1 - other[..., :8, 24:]
    with torch.no_grad():
        change = (encoder(image)[0] - encoder(other)[0]).abs().sum(1)[0]
    assert change.argmax().item() == 3


def test_classifier_features_are_those_of_its_blocks(classifier, images):
    explainer = aha.Explainer.build(classifier, evidence=False, decoder=TINY_DECODER)
    tokens = []
    hook = classifier.module.norm.register_forward_hook(lambda *a: tokens.append(a[2]))
    classifier(images)
    hook.remove()
    deepest = explainer.features(images)[-1]
    torch.testing.assert_close(deepest.flatten(2).mT, tokens[0][:, 1:])


def test_transformers_classifier(tmp_path):
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.ViTConfig(**small, image_size=32, patch_size=8, num_labels=3)
    model = transformers.ViTForImageClassification(config)
    model.save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    clf = aha.Classifier.from_hf(str(tmp_path))
    assert (clf.num_classes, clf.input_size) == (3, (32, 32))
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(clf(images), model.eval()(pixel_values=clf.normalize(images)).logits)
    explainer = aha.Explainer.build(clf, evidence=False, decoder=TINY_DECODER)
    path = explainer.save_pretrained(tmp_path / "explainer")
    torch.testing.assert_close(aha.Explainer.from_pretrained(path).attribute(images), explainer.attribute(images))


def test_sizes_that_the_patch_does_not_divide_are_padded():
    clf = tiny_classifier(img_size=64)
    explainer = aha.Explainer.build(clf, "vit_tiny_patch16_224", pretrained=False, evidence=False, decoder=TINY_DECODER)
    assert explainer(torch.rand(1, 3, 50, 70), torch.tensor([0])).shape == (1, 1, 50, 70)
    assert explainer.encoder.padded_size(50, 70) == (64, 80)


def test_a_fixed_size_encoder_refuses_in_one_line(classifier):
    explainer = aha.Explainer.build(classifier, evidence=False, decoder=TINY_DECODER)
    with pytest.raises(ValueError, match="does not take 40×40 images") as caught:
        explainer(torch.rand(1, 3, 40, 40), torch.tensor([0]))
    assert "\n" not in str(caught.value)


def test_several_targets_per_image_share_the_encoder(explainer, images):
    explainer.eval()
    pair = torch.tensor([[0, 1], [2, 3], [4, 0]])
    both = explainer(images, pair)
    assert both.shape == (6, 1, 32, 32)
    for i in range(2):
        torch.testing.assert_close(both[i::2], explainer(images, pair[:, i]))
    assert (both[0] - both[1]).abs().max() > 1e-6  # the class embedding matters


def test_attribute_keeps_the_mode_and_resolves_targets(explainer, classifier, images):
    explainer.train()
    maps = explainer.attribute(images)
    assert explainer.training
    assert not explainer.encoder.module.training
    assert not maps.requires_grad
    predicted = classifier(images).argmax(-1)
    assert torch.equal(explainer.attribute(images, predicted), maps)
    torch.testing.assert_close(explainer.attribute(images, predicted, internal_batch_size=1), maps)


def test_quarters():
    assert quarters(24) == [4, 11, 17, 23]
    assert quarters(12) == [2, 5, 8, 11]
    assert quarters(1) == [0, 0, 0, 0]


def test_save_and_load(explainer, classifier, images, tmp_path):
    explainer.settings["temperature"] = 0.01
    explainer.save_pretrained(tmp_path / "saved")
    assert sorted(p.name for p in (tmp_path / "saved").iterdir()) == ["config.json", "decoder.safetensors"]
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert config["temperature"] == 0.01
    assert config["classifier"]["num_classes"] == 5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = aha.Explainer.from_pretrained(tmp_path / "saved", classifier)
    assert loaded.settings["temperature"] == 0.01
    assert torch.equal(loaded.attribute(images), explainer.attribute(images))
    from safetensors import safe_open

    with safe_open(str(tmp_path / "saved" / "decoder.safetensors"), "pt") as file:
        assert set(file.keys()) == set(explainer.decoder.state_dict())


def test_a_named_classifier_is_made_again(tmp_path):
    torch.manual_seed(0)
    clf = aha.Classifier.from_timm("vit_tiny_patch16_224", pretrained=False, img_size=32, num_classes=4)
    explainer = aha.Explainer.build(clf, evidence=False, decoder=TINY_DECODER)
    explainer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["classifier"]["name"] == "vit_tiny_patch16_224"
    state = {k: v.half() for k, v in clf.module.state_dict().items()}
    torch.save(state, tmp_path / "weights.pth")
    local = {
        "name": "vit_tiny_patch16_224",
        "weights": tmp_path / "weights.pth",
        "img_size": 32,
        "num_classes": 4,
    }
    again = aha.Classifier.from_timm(**local)
    torch.testing.assert_close(again(torch.rand(1, 3, 32, 32)).shape, torch.Size([1, 4]))
    aha.Explainer.build(again, evidence=False, decoder=TINY_DECODER).save_pretrained(tmp_path / "e")
    loaded = aha.Explainer.from_pretrained(tmp_path / "e")
    assert loaded.classifier.source["weights"] == str(tmp_path / "weights.pth")


def test_another_classifier_warns_and_other_classes_raise(explainer, tmp_path):
    explainer.save_pretrained(tmp_path)
    other = tiny_classifier(seed=9)
    with pytest.warns(UserWarning, match="not the one this explainer was trained for"):
        aha.Explainer.from_pretrained(tmp_path, other)
    fewer = tiny_classifier(4)
    with pytest.raises(ValueError, match="trained for 5 classes"):
        aha.Explainer.from_pretrained(tmp_path, fewer)
    with pytest.raises(ValueError, match="pass classifier="):
        aha.Explainer.from_pretrained(tmp_path)


def test_damaged_files(explainer, classifier, tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        aha.Explainer.from_pretrained(tmp_path / "nowhere", classifier)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        aha.Explainer.from_pretrained(tmp_path, classifier)
    explainer.save_pretrained(tmp_path)
    weights = tmp_path / "decoder.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"decoder\.safetensors was changed or damaged"):
        aha.Explainer.from_pretrained(tmp_path, classifier)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="no weights file"):
        aha.Explainer.from_pretrained(tmp_path, classifier)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json cannot be read, it is empty or damaged"):
        aha.Explainer.from_pretrained(tmp_path, classifier)


@pytest.mark.parametrize("key", ["encoder", "decoder", "classifier", "fingerprint", "kind", "strides", "width"])
def test_a_configuration_with_something_missing_or_unknown(explainer, classifier, tmp_path, key):
    path = explainer.save_pretrained(tmp_path) / "config.json"
    config = read_json(path)
    for part in (config, config["classifier"], config["decoder"]):
        if key == "width" and "width" in part:
            part["no such width"] = 3
        elif key != "width":
            part.pop(key, None)
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="is not an explainer's configuration") as error:
        aha.Explainer.from_pretrained(tmp_path, classifier)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"do_normalize": False}, (0.0, 1.0)),
        ({}, (0.5, 0.5)),
        ({"rescale_factor": 1 / 127.5}, "takes pixels in 0 … 2"),
        ({"do_rescale": False}, "takes pixels in 0 … 255"),
        ({"do_flip_channel_order": True}, "takes BGR pixels"),
    ],
)
def test_the_switches_of_a_transformers_processor(tmp_path, settings, expected):
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ViTForImageClassification(ViTConfig(**sizes, intermediate_size=32, num_labels=4)).save_pretrained(tmp_path)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            aha.Classifier.from_hf(str(tmp_path))
    else:
        clf = aha.Classifier.from_hf(str(tmp_path))
        assert (clf.mean.tolist(), clf.std.tolist()) == ([expected[0]] * 3, [expected[1]] * 3)


def test_a_failed_save_leaves_the_old_file(explainer, tmp_path, monkeypatch):
    from aha import files

    path = tmp_path / "file"
    files.write_atomically(path, b"old")
    monkeypatch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        files.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(("name", "message"), [("vit_giant_of_nowhere", "timm has no model"), ("mixer_b16_224", None)])
def test_unknown_encoder(classifier, name, message):
    if message is None:  # mixers give token features too
        clf = tiny_classifier(img_size=64)
        aha.Explainer.build(clf, name, pretrained=False, evidence=False, decoder=TINY_DECODER, image_size=(224, 224))
    else:
        with pytest.raises(ValueError, match=message):
            aha.Explainer.build(classifier, name, evidence=False, decoder=TINY_DECODER)
