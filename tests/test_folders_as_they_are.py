"""Folders as people have them, through the commands: the good images are done, the others named, exit code 1."""

import contextlib
import dataclasses
import io
import os

import numpy as np
import pytest
import torch
from PIL import Image

import aha
from aha import cli
from aha.attributors.specs import MethodSpec
from aha.classifier import from_name
from aha.data import ImageFolder, Preprocessing
from aha.evaluation import compare
from aha.source import Source

from .toys import TINY_DECODER, wide

pytestmark = pytest.mark.usefixtures("coarse")


def command(*arguments) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([*map(str, arguments)])
    return code, out.getvalue(), " ".join(err.getvalue().split())


def picture(path, seed=0, size=64):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.fixture
def untidy(tmp_path):
    """A dangling link, a loop, a truncated file, a float TIFF, two equal names, beside plain images."""
    folder = tmp_path / "in"
    for number, name in enumerate(("plain.png", "one/same.png", "two/same.png", "two/same.bmp")):
        picture(folder / name, number)
    os.symlink("nowhere.png", folder / "dangling.png")
    os.symlink("..", folder / "one" / "loop")
    os.symlink("plain.png", folder / "twice.png")
    whole = (folder / "plain.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    values = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
    Image.fromarray(values).save(folder / "float.tif")
    Image.fromarray(values - 0.5).save(folder / "negative.tif")
    return folder


@pytest.fixture
def explainer(tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "explainer"
    aha.Explainer.build(from_name("scenes"), evidence=False, decoder=TINY_DECODER).save_pretrained(folder)
    return folder


def test_explain(untidy, explainer, tmp_path):
    out = tmp_path / "out"
    code, printed, error = command("explain", untidy, "--explainer", explainer, "--output", out)
    assert code == 1
    done = {"plain", "same", "same_png", "same_bmp", "float"}
    assert {path.stem for path in out.glob("*.npy")} == {path.stem for path in out.glob("*.png")} == done
    assert "3 of 8 images failed" in error
    for name in ("dangling.png", "cut.png", "negative.tif"):
        assert name in error
        assert f"{name}:" not in printed
    # each map is that of its own image
    loaded = aha.Explainer.from_pretrained(explainer)
    for stem, name in (("same", "one/same.png"), ("same_png", "two/same.png"), ("float", "float.tif")):
        view = aha.data.Photograph(untidy / name).view(loaded.classifier.input_size[0])
        assert torch.equal(view.inputs[0], aha.data.load_image(untidy / name, loaded.classifier.input_size[0]))
        heat = view.to_photograph(loaded.attribute(view.inputs))
        np.testing.assert_allclose(np.load(out / f"{stem}.npy"), heat, rtol=1e-5, atol=1e-5)


def test_float_images_by_their_range(untidy):
    data = ImageFolder(untidy / "two", 64, Preprocessing(1))
    assert len(data) == 2
    image = aha.data.load_image(untidy / "float.tif", 64, Preprocessing(1))
    expected = torch.linspace(0, 1, 64 * 64).view(64, 64)
    assert (image - expected).abs().max() <= 0.5 / 255 + 1e-6


@pytest.mark.parametrize("workers", [0, 1])
def test_train(untidy, tmp_path, workers):
    numbers = {"steps": 4, "batch-size": 4, "fractions": 3, "targets": 1, "embedding": 8, "width": 8, "head": 8}
    options = [text for name, value in {**numbers, "workers": workers}.items() for text in (f"--{name}", value)]
    code, _, error = command("train", "--data", untidy, "--no-labels", "--output", tmp_path / "run", *options)
    assert code == 1
    assert "3 of 8 images failed" in error
    for name in ("dangling.png", "cut.png", "negative.tif"):
        assert error.count(name) == 1
    assert (tmp_path / "run" / "explainer" / "decoder.safetensors").is_file()


def test_training_on_bad_images_resumes_bit_for_bit(untidy, tmp_path):
    clf = from_name("scenes")
    config = aha.TrainConfig(steps=4, batch_size=4, fractions=3, targets=1, save_every=2)

    def trained(output, resume=False):
        torch.manual_seed(0)
        made = aha.Explainer.build(clf, evidence=False, decoder=TINY_DECODER)
        run = dataclasses.replace(config, output=str(tmp_path / output))
        trainer = aha.Trainer(made, clf, ImageFolder(untidy, 64, labels=False), run)
        trainer.fit(resume=resume, progress=False)
        return made.decoder.state_dict(), trainer.failures

    whole, failures = trained("whole")
    resumed, later = trained("again", tmp_path / "whole" / "checkpoints" / "step_00000002")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert len(failures) == 3
    assert set(later) <= set(failures)


def test_nothing_can_be_read(tmp_path, explainer):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(b"")
    code, _, error = command("explain", tmp_path / "in", "--explainer", explainer, "--output", tmp_path / "out")
    assert (code, "1 of 1 images failed" in error) == (1, True)
    code, _, error = command("train", "--data", tmp_path / "in", "--output", tmp_path / "run", "--steps", "1")
    assert code == 1
    assert "none of the 1 images can be read" in error
    assert not (tmp_path / "run" / "explainer").exists()


def test_classes_of_another_classifier_are_refused_by_every_command(tmp_path, explainer):
    for name in ("cat", "dog"):
        picture(tmp_path / "in" / name / "a.png")
    common = ("--data", tmp_path / "in", "--output", tmp_path / "out")
    for arguments in (
        ("train", *common, "--steps", "1"),
        ("evaluate", *common, "--explainer", explainer),
        ("compare", *common, "--methods", "random"),
    ):
        code, _, error = command(*arguments)
        assert code == 1
        assert "2 class folders (cat, dog) are not classes of scenes (10 classes)" in error, error
    code, _, error = command("compare", *common, "--methods", "random", "--no-labels")
    assert code == 0, error


def test_labels_in_numbers_however_they_are_spelled(tmp_path):
    for number, name in enumerate(("7", "03", "0")):
        picture(tmp_path / "in" / name / f"{number}.png", number)
    clf = from_name("scenes")
    data = ImageFolder(tmp_path / "in", 64)
    found = aha.evaluation.evaluate(clf, {"random": aha.attributors.create("random", clf)}, data, progress=False)
    by_file = dict(zip(map(os.path.basename, wide(found)["path"]), wide(found)["label"], strict=True))
    assert by_file == {"0.png": 7, "1.png": 3, "2.png": 0}


def test_classes_that_are_named_by_numbers_in_the_order_of_text(tmp_path):
    """torchvision's ImageFolder sorts 0, 1, 10, 2, …: the classifier trained on it has its classes in that order."""
    for number in range(11):
        picture(tmp_path / "in" / str(number) / "a.png", number)
    names = sorted(map(str, range(11)))
    clf = aha.Classifier.from_timm("resnet10t", pretrained=False, num_classes=11, class_names=names)
    with pytest.warns(UserWarning, match="mapped by name"):
        fitted = aha.data.fit_labels(ImageFolder(tmp_path / "in", 32), clf)
    assert all(names[label] == path.parent.name for path, label in fitted.samples)
    assert aha.data.fit_labels(fitted, clf) is fitted


def test_class_names_survive_saving(tmp_path):
    clf = aha.Classifier.from_timm("resnet10t", pretrained=False, num_classes=2, class_names=["dog", "cat"])
    clf.source["options"]["pretrained"] = False
    saved = aha.Explainer.build(clf, evidence=False, decoder=TINY_DECODER).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="is not the one"):  # random weights are others when made again
        assert aha.Explainer.from_pretrained(saved).classifier.class_names == ["dog", "cat"]


@pytest.mark.parametrize("change", ["label", "image", "mask"])
def test_compare_does_not_give_old_numbers(tmp_path, change):
    """The same names and sizes with other content: the same output folder gives what a new one gives."""

    def data(label=8, seed=1, top=64):
        for number in range(3):
            picture(tmp_path / "in" / f"{number}.bmp", 10 * seed + number)
            mask = np.zeros((64, 64), np.uint8)
            mask[:top] = 255
            (tmp_path / "masks").mkdir(exist_ok=True)
            Image.fromarray(mask).save(tmp_path / "masks" / f"{number}.bmp.png")
            Image.fromarray(mask).save(tmp_path / "masks" / f"{number}.png")
        rows = "".join(f"{number}.bmp,{label}\n" for number in range(3))
        (tmp_path / "in" / "labels.csv").write_text("file,label\n" + rows)

    source = Source(data=str(tmp_path / "in"), masks=tmp_path / "masks")

    def numbers(out):
        done = compare([source], [MethodSpec("input_x_gradient")], tmp_path / out, progress=False)
        ((_, result),) = done.results.items()
        method = result.summary()["methods"]["input_x_gradient"]
        return [result.classifier["accuracy"], method["deletion"], method.get("iou")]

    data()
    old = numbers("kept")
    data(**{"label": {"label": 2}, "image": {"seed": 2}, "mask": {"top": 20}}[change])
    new = numbers("kept")
    assert new == numbers("fresh")
    assert new != old
    data()
    assert numbers("kept") == old


def test_names_that_no_encoding_knows(tmp_path, explainer):
    name = os.fsdecode(b"caf\xe9.png")
    try:
        picture(tmp_path / "in" / name)
    except OSError:
        pytest.skip("this file system takes no such names")
    code, _, error = command("explain", tmp_path / "in", "--explainer", explainer, "--output", tmp_path / "out")
    assert code == 0, error
    assert len(list((tmp_path / "out").glob("*.npy"))) == 1
    assert command("compare", "--data", tmp_path / "in", "--methods", "random", "--output", tmp_path / "c")[0] == 0
