"""The pixel contract and the checks at the door."""

import copy
from types import SimpleNamespace

import pytest
import torch

import aha
from aha.classifier import _of_imagenet, from_name, from_source
from aha.evidence import Evident
from aha.info import collect
from aha.precision import uses_bf16
from aha.recipes import RECIPES, recipe

from .toys import TINY_DECODER, pictures, tiny_classifier, tiny_vit


def test_it_owns_its_normalisation(classifier, images):
    expected = tiny_vit().eval()((images - 0.5) / 0.5)
    torch.testing.assert_close(classifier(images), expected)
    torch.testing.assert_close(classifier.forward_normalized(classifier.normalize(images)), expected)
    torch.testing.assert_close(classifier.probabilities(images).sum(1), torch.ones(3))


def test_it_is_frozen_but_differentiable_in_the_image(classifier, images):
    classifier.train()
    assert not any(module.training for module in classifier.module.modules())
    images.requires_grad_()
    classifier(images).sum().backward()
    assert images.grad.abs().max() > 0
    assert all(p.grad is None for p in classifier.parameters())


def test_targets(classifier, images):
    assert torch.equal(classifier.resolve_target(images), classifier(images).argmax(1))
    assert classifier.resolve_target(images, 2).tolist() == [2, 2, 2]
    assert classifier.resolve_target(images, [0, 1, 4]).tolist() == [0, 1, 4]


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ([0, 1], r"shape \(2,\): give one class per image, \(3,\)"),
        (5, "target 5 is out of range: the classifier has classes 0 … 4"),
        ([0, -1, 2], "target -1 is out of range"),
        ([0.0, 1.0, 2.0], "integer class indices"),
        (torch.zeros(3, 1, dtype=torch.int64), "one class per image"),
    ],
)
def test_bad_targets(explainer, images, target, message):
    for call in (explainer.attribute, lambda x, t: aha.refine(explainer, explainer.classifier, x, t)):
        with pytest.raises(ValueError, match=message):
            call(images, target)


def broken(value):
    images = torch.rand(2, 3, 32, 32)
    images[1, 2, 3, 4] = value
    return images


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(3, 32, 32), r"give \(B, 3, H, W\)"),
        (torch.rand(2, 1, 32, 32), r"give \(B, 3, H, W\)"),
        (torch.rand(0, 3, 32, 32), "batch is empty"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "divide 8-bit images by 255"),
        (broken(float("nan")), "NaN or infinite"),
        (broken(float("inf")), "NaN or infinite"),
        (broken(-2.0), "not normalised or 8-bit"),
        (broken(255.0), "not normalised or 8-bit"),
        ("photo.jpg", "images is a str"),
    ],
)
def test_bad_images(explainer, images, message):
    for call in (explainer.attribute, lambda x: aha.refine(explainer, explainer.classifier, x)):
        with pytest.raises(ValueError, match=message) as caught:
            call(images)
        assert "\n" not in str(caught.value)


def test_weights_files(tmp_path):
    from safetensors.torch import save_file

    options = {"img_size": 32, "num_classes": 4}
    clf = aha.Classifier.from_timm("vit_tiny_patch16_224", pretrained=False, **options)
    state = {key: value.half() for key, value in clf.module.state_dict().items()}
    path = tmp_path / "weights.safetensors"
    save_file(state, path, metadata={"mean": "0.1,0.2,0.3", "std": "[0.4, 0.5, 0.6]"})
    loaded = aha.Classifier.from_timm("vit_tiny_patch16_224", weights=path, **options)
    torch.testing.assert_close(loaded.mean, torch.tensor([0.1, 0.2, 0.3]))
    torch.testing.assert_close(loaded.std, torch.tensor([0.4, 0.5, 0.6]))
    assert next(loaded.module.parameters()).dtype == torch.float32
    with pytest.raises(FileNotFoundError, match="no weights file"):
        aha.Classifier.from_timm("vit_tiny_patch16_224", weights=tmp_path / "missing.pth")
    with pytest.raises(ValueError, match="of another shape"):
        aha.Classifier.from_timm("vit_tiny_patch16_224", weights=path, img_size=32, num_classes=7)
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="missing"):
        aha.Classifier.from_timm("vit_tiny_patch16_224", weights=tmp_path / "foreign.safetensors", **options)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cut short") as caught:
        aha.Classifier.from_timm("vit_tiny_patch16_224", weights=path, **options)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="timm has no model"):
        aha.Classifier.from_timm("vit_of_nowhere")


def test_class_names_are_counted():
    with pytest.raises(ValueError, match="2 class names for 5 classes"):
        aha.Classifier.wrap(tiny_vit(), input_size=(32, 32), class_names=["a", "b"])


def test_the_names_of_imagenet(tmp_path, monkeypatch):
    """Weights of a timm model trained on ImageNet's 1000 classes have its names, read when they are asked for."""
    import timm
    from timm.data import ImageNetInfo

    path = tmp_path / "weights.pth"
    torch.save(timm.create_model("test_resnet").state_dict(), path)
    read = []
    monkeypatch.setattr("timm.data.ImageNetInfo", lambda: read.append(1) or ImageNetInfo())
    clf = aha.Classifier.from_timm("test_resnet", weights=path)
    assert not read
    assert len(clf.class_names) == 1000
    assert (clf.class_names[1], clf.class_names[207]) == ("goldfish, Carassius auratus", "golden retriever")
    assert len(read) == 1
    names = [f"mine {label}" for label in range(1000)]
    assert aha.Classifier.from_timm("test_resnet", weights=path, class_names=names).class_names == names
    # what is saved beside a source may be other names
    again = from_source(clf.source)
    assert again.class_names is None
    again.class_names = names
    assert again.class_names == names
    # random weights know no class, other heads others
    assert aha.Classifier.from_timm("test_resnet", pretrained=False).class_names is None
    torch.save(timm.create_model("test_resnet", num_classes=7).state_dict(), path)
    assert aha.Classifier.from_timm("test_resnet", weights=path, num_classes=7).class_names is None


@pytest.mark.parametrize(
    ("tag", "classes", "known"),
    [
        ("a1_in1k", 1000, True),
        ("orig_in21k_ft_in1k", 1000, True),
        ("fb_in22k_ft_in1k_384", 1000, True),
        ("in1k_ft_inat21", 1000, False),
        ("openai", 1000, False),
        ("", 1000, False),
        ("a1_in1k", 999, False),
    ],
)
def test_whose_weights_are_of_imagenet(tag, classes, known):
    module = SimpleNamespace(num_classes=classes, pretrained_cfg={"num_classes": 1000, "tag": tag})
    assert _of_imagenet(module) is known


def test_a_classifier_enters_its_name(monkeypatch):
    made = []

    def mine():
        made.append(aha.Classifier.wrap(tiny_vit(), input_size=32, source={"kind": "mine", "name": "mine"}))
        return made[-1]

    with pytest.raises(ValueError, match="timm has no model 'mine'"):
        from_name("mine")
    monkeypatch.setitem(RECIPES, "mine", mine)
    assert from_name("mine") is made[0]
    assert from_source(made[0].source) is made[1]
    with pytest.raises(ValueError, match="a classifier 'scenes' is entered already"):
        recipe("scenes")(mine)


def test_precision():
    assert uses_bf16("bf16", torch.device("cpu"))
    assert not uses_bf16("fp32", torch.device("cpu"))
    with pytest.raises(ValueError, match="auto, bf16, fp32"):
        uses_bf16("fp16", torch.device("cpu"))


@pytest.mark.parametrize("has", ["_is_amx_tile_supported", "_is_avx512_bf16_supported", None])
def test_a_cpu_computes_in_bf16_where_it_multiplies_it(monkeypatch, has):
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name == has)
    assert uses_bf16("auto", torch.device("cpu")) is (has is not None)
    assert collect()["cpu"]["precision auto"] == ("fp32" if has is None else "bf16")


@pytest.mark.parametrize("weights", [torch.float64, torch.float16, torch.bfloat16])
def test_networks_in_other_precisions_keep_their_own(monkeypatch, weights):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    clf = tiny_classifier().to(weights)
    explainer = aha.Explainer.build(clf, evidence=False, decoder=TINY_DECODER)
    images = pictures().to(torch.float64 if weights == torch.float64 else torch.float32)
    own, auto = (aha.refine(explainer, clf, images, steps=1, precision=name) for name in ("fp32", "auto"))
    assert torch.equal(own, auto)
    for asked in (
        lambda: aha.refine(explainer, clf, images, steps=1, precision="bf16"),
        lambda: aha.Objective(clf, precision="bf16"),
        lambda: aha.Trainer(explainer, clf, [{"image": images[0], "label": 0}], aha.TrainConfig(precision="bf16")),
        lambda: aha.attributors.create("mda", clf, precision="bf16"),
    ):
        with pytest.raises(ValueError, match=f'precision="bf16".*{str(weights)[6:]}: give "auto"') as error:
            asked()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_convnext", "test_vit"])
def test_the_layout_of_pixels_does_not_change_what_a_timm_model_says(name):
    clf = from_name(f"random:{name}")
    plain = copy.deepcopy(clf)
    plain._any_layout = False
    images = torch.rand(2, 3, *clf.input_size, generator=torch.Generator().manual_seed(0)).requires_grad_()
    seen = []
    with clf.module.register_forward_pre_hook(lambda _, args: seen.append(args[0])):
        logits = clf(images)
    assert seen[0].is_contiguous(memory_format=torch.channels_last) and not seen[0].is_contiguous()
    expected = plain(images)
    assert torch.allclose(logits, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())
    gradient, other = (torch.autograd.grad(out[:, 0].sum(), images)[0] for out in (logits, expected))
    assert torch.allclose(gradient, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()))
    evidence, alone = (Evident(made)(images.detach(), 1).maps for made in (clf, plain))
    assert torch.allclose(evidence, alone, atol=1e-3)
