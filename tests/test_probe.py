"""A classifier is probed once, when it is made: what is no classifier, or another one than it says, is refused."""

import warnings
from collections import namedtuple

import pytest
import torch
import torchvision
from torch import nn

import aha
from aha.attributors import create
from aha.regions import grid

from .toys import pictures, tiny_vit, wide

SIZE = (32, 32)


class Returns(nn.Module):
    """A linear network whose logits (B, 3) are handed out as ``how`` says."""

    def __init__(self, how, classes=3):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.how = nn.Linear(3, classes), how

    def forward(self, pixels):
        return self.how(self.linear(pixels.mean(dim=(2, 3))))


Output = namedtuple("Output", "features logits")


@pytest.mark.parametrize(
    "how",
    [
        lambda logits: {"logits": logits},
        lambda logits: (logits,),
        lambda logits: [logits, None],
        lambda logits: (logits, [torch.zeros(1, 2, 4, 4)]),
        lambda logits: (logits, 0.3 * logits),  # auxiliary logits
        lambda logits: Output(torch.zeros(len(logits), 512), logits),
    ],
)
def test_what_is_unwrapped(how):
    plain, clf = (aha.Classifier.wrap(Returns(h), input_size=SIZE) for h in (lambda logits: logits, how))
    assert clf.num_classes == 3
    images = pictures()
    assert torch.equal(clf(images), plain(images))
    for name in ("input_x_gradient", "rise"):
        options = {"n_masks": 5} if name == "rise" else {}
        maps = (create(name, c, **options).attribute(images) for c in (clf, plain))
        assert torch.equal(*maps)
    metric = aha.metrics.DeletionInsertion(clf)
    metric.update(images, pictures(seed=1)[:, :1])
    assert 0 < metric.compute()["deletion"] < 1


@pytest.mark.parametrize("how", [lambda logits: logits, lambda logits: logits[:, 0], lambda logits: {"logits": logits}])
def test_one_logit_is_the_sigmoid_of_the_second_of_two_classes(how):
    clf = aha.Classifier.wrap(Returns(how, classes=1), input_size=SIZE, class_names=["cat", "dog"])
    images = pictures()
    logit = clf.module.linear(clf.normalize(images).mean(dim=(2, 3)))[:, 0]
    expected = torch.stack([1 - logit.sigmoid(), logit.sigmoid()], dim=1)
    assert clf.num_classes == 2
    torch.testing.assert_close(clf.probabilities(images), expected)
    assert torch.equal(clf.resolve_target(images), (logit > 0).long())
    # the second class is explained by the gradient of the one logit
    images.requires_grad_()
    (gradient,) = torch.autograd.grad(clf(images)[:, 1].sum(), images)
    assert torch.allclose(gradient[0, :, 0, 0], clf.module.linear.weight[0] / 1024)


def test_a_timm_model_with_one_class():
    clf = aha.Classifier.from_timm("resnet10t", pretrained=False, num_classes=1)
    assert clf.num_classes == 2
    assert aha.attributors.create("gradcam", clf).attribute(torch.rand(1, 3, 64, 64)).shape == (1, 1, 64, 64)


def constant(value):
    return lambda logits: torch.full_like(logits, value)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (Returns(lambda logits: (logits, torch.zeros(1, 512))), r"returns a tuple of \(1, 3\), \(1, 512\)"),
        (Returns(lambda logits: {"out": logits, "aux": logits}), "returns a dict of out, aux"),
        (Returns(lambda logits: None), "returns a NoneType"),
        (Returns(lambda logits: logits[:, :, None, None]), r"shape \(1, 3, 1, 1\).*with a head"),
        (Returns(lambda logits: logits.sum()), r"shape \(\)"),
        (Returns(lambda logits: logits.argmax(1, keepdim=True).repeat(1, 3)), "int64"),
        (Returns(lambda logits: logits.repeat(2, 1)), r"shape \(2, 3\)"),
        (Returns(constant(float("nan"))), "NaN or infinite"),
        (Returns(constant(float("inf"))), "NaN or infinite"),
        (Returns(lambda logits: logits.softmax(dim=1)), "returns probabilities: leave its softmax out"),
        (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(3600, 2)), r"3 channels of 32×32 .*to have 1 chan"),
        (nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, 2)), r"does not take \(1, 3, 32, 32\)"),
        (nn.Sequential(nn.LazyConv2d(2, 3), nn.Flatten(), nn.LazyLinear(2)), "lazy parameters"),
        (tiny_vit(classes=0), "no classification head"),
        (lambda x: x, "module is a function"),
        (None, "module is a NoneType"),
    ],
)
def test_what_is_no_classifier_is_refused_in_one_line(module, message):
    with pytest.raises(ValueError, match=message) as error:
        aha.Classifier.wrap(module, input_size=SIZE)
    assert "\n" not in str(error.value)


def test_a_head_that_was_taken_away():
    net = torchvision.models.resnet18()
    net.fc = nn.Identity()
    with pytest.raises(ValueError, match="ResNet has no classification head"):
        aha.Classifier.wrap(net, input_size=SIZE)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"mean": (123.675, 116.28, 103.53), "std": (58.4, 57.1, 57.4)},
            r"mean 123\.7: .* pixels in \[0, 1\]",
        ),
        ({"std": (255.0,) * 3}, r"std 255: give it for pixels in \[0, 1\]"),
        ({"std": (0, 0, 0)}, "std 0: .* above 0"),
        ({"std": (-0.5,) * 3}, "std -0.5: .* above 0"),
        ({"mean": (float("nan"),) * 3}, "mean nan"),
        ({"mean": 0.5, "std": 0.5}, "mean=0.5: give one number per channel"),
        ({"mean": "imagenet"}, "mean='imagenet': give one number per channel"),
        ({"mean": (0.5,)}, "mean has 1 values, std 3"),
        ({"mean_colour": (120, 110, 100)}, r"mean_colour=\(120, 110, 100\): give 3 values in \[0, 1\]"),
        ({"mean_colour": (0.5,)}, "give 3 values"),
        ({"input_size": "32"}, "input_size='32': give"),
        ({"input_size": (3, 32, 32)}, r"input_size=\(3, 32, 32\): give \(height, width\)"),
        ({"input_size": (0, 32)}, "input_size=0: give an integer in 1 … "),
        ({"num_classes": 1000}, "returns 3 logits, num_classes=1000"),
        ({"class_names": ["a", "b"]}, "2 class names for 3 classes"),
    ],
)
def test_bad_settings_are_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message) as error:
        aha.Classifier.wrap(Returns(lambda logits: logits), **{"input_size": SIZE, **options})
    assert "\n" not in str(error.value)


def test_one_number_is_a_square():
    assert aha.Classifier.wrap(Returns(lambda logits: logits), input_size=48).input_size == (48, 48)


def test_networks_of_other_channels():
    grey = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    clf = aha.Classifier.wrap(grey, mean=(0.1,), std=(0.3,), input_size=28)
    assert create("input_x_gradient", clf).attribute(torch.rand(2, 1, 28, 28)).shape == (2, 1, 28, 28)
    with pytest.raises(ValueError, match=r"give \(B, 1, H, W\)"):
        clf.check(torch.rand(2, 3, 28, 28))


def test_images_of_a_size_that_it_does_not_take(classifier):
    method = create("gradcam", classifier)
    for _ in range(2):  # nothing about the refusal is remembered as good
        with pytest.raises(ValueError, match=r"does not take \(1, 3, 40, 40\).*resize the images to 32×32") as error:
            method.attribute(torch.rand(1, 3, 40, 40))
        assert "\n" not in str(error.value)
    # a convolutional network takes any
    any_size = aha.Classifier.wrap(Returns(lambda logits: logits), input_size=SIZE)
    assert create("input_x_gradient", any_size).attribute(torch.rand(1, 3, 40, 56)).shape == (1, 1, 40, 56)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_pixels_are_cast_to_the_weights_whatever_the_images_are(classifier, images, dtype):
    expected = classifier.probabilities(images)
    clf = aha.Classifier.wrap(tiny_vit().to(dtype), (0.5,) * 3, (0.5,) * 3, SIZE)
    later = aha.Classifier.wrap(tiny_vit(), (0.5,) * 3, (0.5,) * 3, SIZE).to(dtype)
    assert (
        clf.mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) or clf.mean.dtype.itemsize == 4
    )
    bound = {torch.float16: 2e-2, torch.bfloat16: 1e-1, torch.float64: 1e-5}[dtype]
    for one in (clf, later):
        for given in (images, images.double()):
            found = one.probabilities(one.check(given))
            assert (found - expected).abs().max() < bound


def test_numpy_images_in_float64(classifier):
    import numpy as np

    pixels = torch.from_numpy(np.random.default_rng(0).random((1, 3, 32, 32)))
    explainer = aha.Explainer.build(classifier)
    for call in (create("gradcam", classifier).attribute, explainer.attribute):
        torch.testing.assert_close(call(pixels), call(pixels.float()))


def test_quantised_networks_say_what_they_lack():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), {nn.Linear})
    clf = aha.Classifier.wrap(net, input_size=(8, 8))
    images = torch.rand(2, 3, 8, 8)
    assert not clf.differentiable
    assert create("rise", clf, n_masks=8, cells=4).attribute(images).shape == (2, 1, 8, 8)
    for refused in (
        lambda: create("input_x_gradient", clf),
        lambda: create("integrated_gradients", clf),
        lambda: create("gradcam", clf),
    ):
        with pytest.raises(ValueError, match=r"needs gradients, and none reach .*quantised.*: .*such as rise") as error:
            refused()
        assert "\n" not in str(error.value)


def test_a_network_that_switches_gradients_off():
    class Frozen(Returns):
        @torch.no_grad()
        def forward(self, pixels):
            return super().forward(pixels)

    clf = aha.Classifier.wrap(Frozen(lambda logits: logits), input_size=SIZE)
    with pytest.raises(ValueError, match="input_x_gradient needs gradients"):
        create("input_x_gradient", clf)
    explainer = aha.Explainer.build(aha.Classifier.wrap(tiny_vit(3), input_size=SIZE))
    with pytest.raises(ValueError, match="refinement needs gradients"):
        aha.refine(explainer, clf, pictures(), steps=1)
    with pytest.raises(ValueError, match="training for the ranking needs gradients"):
        aha.Trainer(explainer, clf, [{"image": pictures(1)[0]}], aha.TrainConfig(steps=1))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("make", [torch.jit.script, lambda net: torch.jit.trace(net, torch.zeros(1, 3, 32, 32))])
def test_torchscript(make):
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    plain, clf = (aha.Classifier.wrap(n, input_size=SIZE) for n in (net, make(net.eval())))
    images = pictures()
    for name, options in (("input_x_gradient", {}), ("rise", {"n_masks": 5})):
        torch.testing.assert_close(*(create(name, c, **options).attribute(images) for c in (clf, plain)))
    for name in ("gradcam", "rollout", "libragrad"):
        with pytest.raises(ValueError, match=f"{name} looks inside the classifier, .* is a TorchScript module"):
            create(name, clf)
    with pytest.raises(ValueError, match="gives no intermediate features: give encoder="):
        aha.Explainer.build(clf, evidence=False)
    with pytest.raises(ValueError, match=r"evidence looks inside the classifier, .* is a TorchScript module"):
        aha.Explainer.build(clf)


@pytest.mark.parametrize("how", ["whole", "in place", "a block"])
def test_compiled_networks_are_looked_into(how):
    torch._dynamo.reset()
    plain, net = tiny_vit().eval(), tiny_vit().eval()
    given = net
    if how == "whole":
        given = torch.compile(net, backend="eager")
    elif how == "in place":
        net.compile(backend="eager")
    else:
        net.blocks[0] = torch.compile(net.blocks[0], backend="eager")
    expected, clf = (aha.Classifier.wrap(m, (0.5,) * 3, (0.5,) * 3, SIZE) for m in (plain, given))
    images = pictures()
    clf(images)  # compiled once, as in a warm server
    for name in (
        "raw_attention",
        "rollout",
        "legrad",
        "gradcam_vit",
        "gradcam",
        "fullgrad_plus",
        "libragrad",
        "chefer",
    ):
        torch.testing.assert_close(create(name, clf).attribute(images), create(name, expected).attribute(images))
    if how == "in place":
        assert net._compiled_call_impl is not None  # put back


def test_transformers_models_are_read_as_they_are(images):
    from transformers import ViTConfig, ViTForImageClassification, ViTModel

    sizes = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ViTConfig(**sizes, intermediate_size=32, num_labels=4)
    model = ViTForImageClassification(config).eval()
    clf = aha.Classifier.wrap(model, input_size=SIZE)
    assert torch.equal(clf(images), model(images).logits)
    assert aha.Explainer.build(clf).attribute(images).shape == (3, 1, 32, 32)
    with pytest.raises(ValueError, match=r"returns a BaseModelOutput\w* of last_hidden_state, pooler_output") as error:
        aha.Classifier.wrap(ViTModel(config), input_size=SIZE)
    assert "\n" not in str(error.value)


def test_data_sets_of_tuples_are_refused_in_one_line(classifier, images):
    pairs = [(image, 0) for image in images]
    line = 'an item of the data is a tuple: give dicts with "image" and "label"'
    explainer = aha.Explainer.build(classifier)
    with pytest.raises(ValueError, match=line):
        aha.Trainer(explainer, classifier, pairs, aha.TrainConfig(steps=1, batch_size=2)).fit(progress=False)
    with pytest.raises(ValueError, match=line):
        aha.evaluation.evaluate(classifier, {"random": create("random", classifier)}, pairs, progress=False)


def objective(clf, regions, maps=None, references=None):
    images = pictures()
    maps = torch.rand(3, 1, 32, 32) if maps is None else maps
    blanks = [torch.zeros_like(images)] if references is None else references
    return aha.Objective(clf)(images, maps, torch.tensor([0, 1, 2]), blanks, regions, 0.1)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("item", "line"),
    [
        ({"label": 99}, "label 99 is not one of the classes 0 … 4, nor −1 for unknown"),
        ({"label": 2.5}, "label 2.5 is not an integer"),
        ({"image": torch.rand(3, 16, 16)}, r"images of a batch have shapes \(3, 16, 16\), \(3, 32, 32\)"),
        ({"image": torch.full((3, 32, 32), float("nan"))}, "images hold NaN or infinite values"),
    ],
)
def test_training_data_that_do_not_fit(classifier, item, line, workers):
    image = pictures(1)[0]
    data = [{"image": image, "label": 0}, {"image": image, "label": 0, **item}]
    config = aha.TrainConfig(steps=1, batch_size=2, workers=workers)
    with pytest.raises(ValueError, match=line) as error:
        aha.Trainer(aha.Explainer.build(classifier), classifier, data, config).fit(progress=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda clf: create("rise", clf, n_masks="5"), "rise does not take these options"),
        (lambda clf: create("rise", clf, masks=5), r"rise does not take these options \(.*'masks'"),
        (lambda clf: create("rise", clf, seed=None), "seed=None: give an integer in 0"),
        (lambda clf: create("rise", clf, seed=2**64), "seed=18446744073709551616: give an integer"),
        (lambda clf: create("rise", clf, internal_batch_size=2.0), "internal_batch_size=2.0: give an integer ≥ 1"),
        (lambda clf: create("rise", clf.module), "clf is a VisionTransformer: wrap it"),
        (lambda clf: create("rise", clf).attribute(pictures(), "3"), "target='3': give one class index"),
        (lambda clf: create("rise", clf).attribute(pictures(), True), "integer class indices"),
        (lambda clf: create("rise", clf).attribute(pictures(), [0, None, 1]), "target="),
        (lambda clf: create("rise", clf).attribute(pictures().numpy()), "images is a ndarray"),
        (lambda clf: create("rise", clf).attribute(pictures().to_sparse()), "sparse_coo: give a dense tensor"),
        (lambda clf: create("rise", clf).attribute(pictures().to("meta")), "on the meta device"),
        (lambda clf: aha.Objective(clf, fractions="6"), "fractions='6': give an integer ≥ 3"),
        (lambda clf: aha.Objective(clf, chunk=1.5), "chunk=1.5: give an integer ≥ 2"),
        (lambda clf: aha.metrics.DeletionInsertion(clf, internal_batch_size="a"), "internal_batch_size='a'"),
        (lambda clf: aha.TrainConfig(steps="10"), "steps='10': give an integer in 1 … 1099511627776"),
        (lambda clf: aha.TrainConfig(lr=-1.0), "lr=-1.0: give a finite number > 0"),
        (lambda clf: aha.TrainConfig(epochs=float("nan")), "epochs=nan: give a finite number > 0"),
        (lambda clf: aha.refine(aha.Explainer.build(clf), clf, pictures(), steps=True), "steps=True: give an integer"),
        (lambda clf: aha.refine(aha.Explainer.build(clf), clf, pictures(), references="blur"), "references='blur'"),
        (
            lambda clf: aha.evaluation.evaluate(clf, {}, [], batch_size=0),
            "batch_size=0: give an integer ≥ 1|no methods",
        ),
        (lambda clf: aha.evaluation.evaluate(clf, {}, []), "no methods are given"),
        (lambda clf: aha.evaluation.evaluate(clf, ["rise"], []), "methods is a list: give a dict"),
        (lambda clf: aha.refine(None, clf, pictures()), "explainer is a NoneType"),
        (
            lambda clf: aha.refine(aha.Explainer.build(clf), clf.module, pictures()),
            "clf is a VisionTransformer: wrap it",
        ),
        (lambda clf: aha.Explainer.build(clf.module), "clf is a VisionTransformer: wrap it"),
        (lambda clf: aha.Explainer.from_pretrained(None), "None is no path"),
        (lambda clf: aha.Objective(clf.module), "clf is a VisionTransformer: wrap it"),
        (lambda clf: objective(clf, grid(16, 16, 4)), "regions are of 16×16 pixels, images of 32×32"),
        (lambda clf: objective(clf, grid(32, 32, 4), references=[]), "references is empty"),
        (lambda clf: objective(clf, grid(32, 32, 4), maps=torch.rand(3, 32, 32)), r"maps is \(3, 32, 32\): give"),
        (lambda clf: grid(32, 32, 0), "cells=0: give an integer ≥ 1"),
        (lambda clf: grid(32, 32, "4"), "cells='4': give a number"),
        (lambda clf: aha.TrainConfig(cells=(7, 4)), r"cells=\(7, 4\): give the coarsest"),
        (lambda clf: aha.TrainConfig(tau=(0, 0)), "tau=0: give a finite number > 0"),
        (lambda clf: aha.TrainConfig(precision="fp8"), "precision='fp8' is not known"),
    ],
)
def test_wrong_types_are_one_line(classifier, call, message):
    with pytest.raises(ValueError, match=message) as error:
        call(classifier)
    assert "\n" not in str(error.value)


def test_wrappers_that_distribute_are_taken_off():
    net = tiny_vit()
    clf = aha.Classifier.wrap(torch.nn.DataParallel(torch.compile(net, backend="eager")), input_size=SIZE)
    assert clf.module is net
    assert create("rollout", clf).attribute(pictures()).shape == (3, 1, 32, 32)


def test_a_network_on_several_devices_is_refused_and_left_where_it_is():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(3600, 2))
    net[2] = nn.Linear(3600, 2, device="meta")
    with pytest.raises(ValueError, match="Sequential lies on cpu, meta: load it onto one device"):
        aha.Classifier.wrap(net, input_size=SIZE)
    assert net[0].weight.device.type == "cpu"
    assert net[2].weight.is_meta


def test_a_first_operation_that_works_in_place():
    clf = aha.Classifier.wrap(nn.Sequential(nn.ReLU(inplace=True), Returns(lambda logits: logits)), input_size=SIZE)
    assert clf.differentiable
    assert create("input_x_gradient", clf).attribute(pictures()).abs().sum() > 0


def test_probabilities_are_a_door(classifier, images):
    with pytest.raises(ValueError, match="divide 8-bit images by 255"):
        classifier.probabilities((images * 255).byte())
    with pytest.raises(ValueError, match="NaN or infinite"):
        classifier.probabilities(images * float("nan"))


def test_means_may_come_from_an_iterator():
    clf = aha.Classifier.wrap(
        Returns(lambda logits: logits), (v / 255 for v in (120, 110, 100)), map(float, (0.5, 0.5, 1)), input_size=SIZE
    )
    torch.testing.assert_close(clf.mean, torch.tensor([120, 110, 100]) / 255)
    assert clf.std.tolist() == [0.5, 0.5, 1.0]


def test_made_in_inference_mode():
    with torch.inference_mode():
        clf = aha.Classifier.from_timm("resnet10t", pretrained=False, num_classes=3)
        explainer = aha.Explainer.build(clf)
    assert create("input_x_gradient", clf).attribute(torch.rand(1, 3, 32, 32)).abs().sum() > 0
    assert aha.refine(explainer, clf, torch.rand(1, 3, 32, 32), steps=1).shape == (1, 1, 32, 32)
    with torch.inference_mode():
        net = Returns(lambda logits: logits)
        with pytest.raises(ValueError, match="made in inference_mode"):
            aha.Classifier.wrap(net, input_size=SIZE)


def test_nan_from_the_classifier_is_named_everywhere(images):
    class Fragile(Returns):
        """NaN for an image that is bright in the corner."""

        def forward(self, pixels):
            logits = super().forward(pixels)
            return torch.where(pixels[:, :1, 0, 0] > 0.99, torch.nan, logits)

    clf = aha.Classifier.wrap(Fragile(lambda logits: logits), input_size=SIZE)
    images[1, :, 0, 0] = 1.0
    maps = torch.rand(3, 1, 32, 32)
    explainer = aha.Explainer.build(aha.Classifier.wrap(tiny_vit(3), input_size=SIZE))
    object.__setattr__(explainer, "classifier", clf)
    metric = aha.metrics.DeletionInsertion(clf)
    for call in (
        lambda: create("input_x_gradient", clf).attribute(images),
        lambda: create("input_x_gradient", clf).attribute(images, 0),
        lambda: create("rise", clf, n_masks=50).attribute(images, 0),
        lambda: explainer.attribute(images),
        lambda: aha.refine(explainer, clf, images, 0, steps=1, fractions=4),
        lambda: metric.update(images, maps),
        lambda: metric.update(images, maps, 0),
        lambda: clf.resolve_target(images),
    ):
        with pytest.raises(ValueError, match=r"NaN or infinite values (for image|for \d of|while)") as error:
            call()
        assert "\n" not in str(error.value)

    class Data(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return {"image": images[index]}

    found = aha.evaluation.evaluate(clf, {"random": create("random", clf)}, Data(), progress=False)
    assert wide(found)["index"] == [0, 2]
    (failure,) = found.failures
    assert failure.images == (1,)
    assert "Fragile returns NaN or infinite values" in failure.reason
