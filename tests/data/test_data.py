"""Scenes and folders: the same pictures every time, and a clear line when a picture cannot be had."""

import csv
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from aha.data import ImageFolder, ImageReadError, Preprocessing, Scenes, find_images, load_image
from aha.data import scenes as scenes_module


def same(a, b):
    return a["label"] == b["label"] and torch.equal(a["image"], b["image"]) and torch.equal(a["mask"], b["mask"])


@pytest.mark.parametrize("image_size", [64, 40, 96])
def test_scene_shapes_and_ranges(image_size):
    scene = Scenes("val", size=4, image_size=image_size)[2]
    assert scene["image"].shape == (3, image_size, image_size)
    assert scene["image"].dtype == torch.float32
    assert scene["mask"].shape == (1, image_size, image_size)
    assert scene["mask"].dtype == torch.bool
    assert scene["image"].min() >= 0
    assert scene["image"].max() <= 1
    assert isinstance(scene["label"], int)
    assert 0 <= scene["label"] <= 9


@pytest.mark.parametrize("image_size", [64, 50])
def test_batch_is_items_bit_for_bit(image_size):
    scenes = Scenes("train", size=100, seed=5, image_size=image_size)
    indices = [7, 0, 99, 3, 3, 12345, *range(20, 40)]
    batch = scenes.batch(indices)
    assert batch["image"].is_contiguous()
    assert batch["label"].dtype == torch.int64
    for i, index in enumerate(indices):
        assert same(scenes[index], {name: value[i] for name, value in batch.items()})
    empty = scenes.batch([])
    assert empty["image"].shape == (0, 3, image_size, image_size)


def test_scene_is_independent_of_process_and_order():
    here = Scenes("test", size=50, seed=11).batch([41, 3])["image"].double().sum((1, 2, 3))
    code = (
        "from aha.data import Scenes\n"
        "s = Scenes('test', size=90, seed=11)\n"
        "print(*(s[i]['image'].double().sum().item().hex() for i in (3, 41)))"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert there[::-1] == [value.item().hex() for value in here]


def test_seed_split_and_index_give_other_scenes():
    first = Scenes("train", seed=0)[0]["image"]
    for other in (Scenes("train", seed=1)[0], Scenes("val", seed=0)[0], Scenes("train", seed=0)[1]):
        assert (other["image"] - first).abs().mean() > 0.01


def test_splits_share_no_handwriting():
    samples = scenes_module._split_samples()
    everything = np.concatenate(list(samples.values()))
    assert len(everything) == len(set(everything.tolist())) == 1797
    assert [len(samples[split]) for split in ("train", "val", "test")] == [1258, 180, 359]


def test_mask_covers_the_digit_and_only_the_digit():
    scenes = Scenes("val", size=64)
    batch = scenes.batch(range(64))
    change = (batch["image"] - scenes.backgrounds(range(64))).abs().amax(1, keepdim=True)
    assert (change[batch["mask"]] > 0.02).float().mean() > 0.995
    # outside the mask only the strokes' soft edges differ
    outside = change.masked_fill(batch["mask"], 0) > 0
    ring = torch.nn.functional.max_pool2d(batch["mask"].float(), 7, 1, 3) > 0
    assert not (outside & ~ring).any()
    share = batch["mask"].float().mean((1, 2, 3))
    assert share.min() > 0.01
    assert share.max() < 0.15


def test_digits_contrast_with_what_is_around_them():
    batch = Scenes("val", size=128).batch(range(128))
    luma = (batch["image"] * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    mask = batch["mask"]
    ring = (torch.nn.functional.max_pool2d(mask.float(), 7, 1, 3) > 0) & ~mask
    gap = (luma * mask).sum((1, 2, 3)) / mask.sum((1, 2, 3)) - (luma * ring).sum((1, 2, 3)) / ring.sum((1, 2, 3))
    assert gap.abs().min() > 0.1
    assert gap.abs().mean() > 0.3


def test_mean_colour_and_class_balance():
    batch = Scenes("train", seed=3).batch(range(1024))
    assert torch.allclose(batch["image"].mean((0, 2, 3)), Scenes.mean_colour, atol=0.02)
    assert batch["label"].bincount(minlength=10).min() > 60


def test_iteration_ends_and_only_train_goes_on():
    train, val = Scenes("train", size=3), Scenes("val", size=3)
    assert len(train) == len(list(train)) == len(list(val)) == 3
    assert not torch.equal(train[3]["image"], train[0]["image"])
    for bad in (3, -1):
        with pytest.raises(IndexError):
            val[bad]
    with pytest.raises(IndexError):
        train[-1]


def test_scenes_in_a_data_loader():
    scenes = Scenes("val", size=6)
    loader = torch.utils.data.DataLoader(scenes, batch_size=6, num_workers=1)
    (batch,) = loader
    assert torch.equal(batch["image"], scenes.batch(range(6))["image"])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [({"split": "dev"}, "train, val, test"), ({"size": 0}, "size"), ({"image_size": 8}, "16")],
)
def test_bad_scene_arguments(arguments, says):
    with pytest.raises(ValueError, match=says):
        Scenes(**arguments)


def test_without_scikit_learn_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"pip install aha-attribution\[demo\]$"):
        scenes_module._load_digits.__wrapped__()


def write(path, size=(80, 60), colour=(200, 30, 60), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


def noise(path, size=(120, 90), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def test_class_folders(tmp_path):
    for name in ("cat/a.jpg", "cat/deep/b.png", "ant/c.JPEG", ".hidden/d.jpg"):
        write(tmp_path / name)
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    data = ImageFolder(tmp_path, image_size=32)
    assert data.class_names == ["ant", "cat"]
    assert len(data) == 3
    assert [item["label"] for item in data] == [0, 1, 1]
    item = data[1]
    assert item["image"].shape == (3, 32, 32)
    assert item["image"].dtype == torch.float32
    assert item["path"] == str(tmp_path / "cat" / "a.jpg")
    assert torch.allclose(item["image"].mean((1, 2)) * 255, torch.tensor([200.0, 30.0, 60.0]), atol=3)
    with pytest.raises(IndexError):
        data[3]
    given = ImageFolder(tmp_path, image_size=32, class_names=["zebra", "cat", "ant"])
    assert [item["label"] for item in given] == [2, 1, 1]
    with pytest.raises(ValueError, match="'ant' is not one of the 1 class names"):
        ImageFolder(tmp_path, class_names=["cat"])


def test_imagenet_layouts(tmp_path):
    for name in ("train/n02/a.jpg", "train/n01/b.jpg", "val/n01/c.jpg"):
        write(tmp_path / name)
    assert [s[1] for s in ImageFolder(tmp_path, split="train").samples] == [0, 1]
    assert ImageFolder(tmp_path, split="val").class_names == ["n01"]
    with pytest.raises(ValueError, match="pass split="):
        ImageFolder(tmp_path)
    with pytest.raises(FileNotFoundError, match="no split 'dev'"):
        ImageFolder(tmp_path, split="dev")


def labels_file(path, rows, header=("file", "label", "extra")):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


def test_flat_folder_with_labels(tmp_path):
    for name in "abc":
        write(tmp_path / f"{name}.jpg")
    labels_file(tmp_path / "labels.csv", [("c.jpg", 7, "x"), ("a.jpg", 0, "y")])
    data = ImageFolder(tmp_path, image_size=32)
    assert [(item["path"][-5:], item["label"]) for item in data] == [("c.jpg", 7), ("a.jpg", 0)]
    named = labels_file(tmp_path / "named.csv", [("a.jpg", "cat", ""), ("b.jpg", "ant", "")])
    assert [s[1] for s in ImageFolder(tmp_path, labels=named).samples] == [1, 0]
    assert [s[1] for s in ImageFolder(tmp_path, labels=named, class_names=["cat", "dog", "ant"]).samples] == [
        0,
        2,
    ]


@pytest.mark.parametrize(
    ("rows", "header", "says"),
    [
        ([("zz.jpg", 1)], ("file", "label"), "line 2: no such image: .*zz.jpg"),
        ([("a.jpg", 1), ("a.jpg",)], ("file", "label"), "line 3: needs a file and a label"),
        ([("a.jpg", 1)], ("name", "label"), "no column file"),
        ([("a.jpg", -2)], ("file", "label"), "label '-2' is not an integer"),
        ([("a.jpg", "dog")], ("file", "label"), "label 'dog' is not one of the 1 class names"),
    ],
)
def test_bad_labels_files(tmp_path, rows, header, says):
    write(tmp_path / "a.jpg")
    labels_file(tmp_path / "labels.csv", rows, header)
    with pytest.raises(ValueError, match=says) as caught:
        ImageFolder(tmp_path, class_names=["cat"] if "class names" in says else None)
    assert "\n" not in str(caught.value)


def test_flat_folder_without_labels(tmp_path):
    write(tmp_path / "a.jpg")
    data = ImageFolder(tmp_path, image_size=32)
    assert data[0]["label"] == -1
    assert data.class_names is None


def test_missing_empty_and_mixed_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        ImageFolder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no images in"):
        ImageFolder(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file or folder"):
        find_images(tmp_path / "nowhere")
    write(tmp_path / "a.jpg")
    write(tmp_path / "cat" / "b.jpg")
    with pytest.raises(ValueError, match="both class folders and loose images"):
        ImageFolder(tmp_path)
    assert find_images(tmp_path) == [tmp_path / "a.jpg", tmp_path / "cat" / "b.jpg"]
    assert find_images(tmp_path / "a.jpg") == [tmp_path / "a.jpg"]


def test_bad_images_name_the_file(tmp_path):
    whole = noise(tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "empty.jpg").write_bytes(b"")
    for name in ("cut.jpg", "text.png", "empty.jpg"):
        with pytest.raises(ImageReadError, match=f"cannot read image .*{name}") as caught:
            load_image(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="no such image"):
        load_image(tmp_path / "none.jpg")
    with pytest.raises(ImageReadError):
        ImageFolder(tmp_path)[0]


def test_every_colour_mode_becomes_rgb(tmp_path):
    grey = np.full((40, 40), 51, np.uint8)
    wide = np.full((40, 40), 51 * 257, np.uint16)
    pictures = {
        "grey.png": Image.fromarray(grey),
        "wide.png": Image.fromarray(wide),
        "wide.tif": Image.fromarray(wide),
        "float.tif": Image.fromarray(grey.astype(np.float32) / 255),
        "palette.png": Image.new("RGB", (40, 40), (51, 51, 51)).convert("P"),
        "alpha.png": Image.new("RGBA", (40, 40), (51, 51, 51, 128)),
        "cmyk.jpg": Image.new("RGB", (40, 40), (51, 51, 51)).convert("CMYK"),
        "bits.png": Image.new("1", (40, 40), 0),
    }
    for name, picture in pictures.items():
        picture.save(tmp_path / name)
        image = load_image(tmp_path / name, image_size=32)
        expected = 0.0 if name == "bits.png" else 0.2
        assert image.shape == (3, 32, 32)
        assert torch.allclose(image, torch.tensor(expected), atol=0.02), name


def test_exif_orientation(tmp_path):
    pixels = np.zeros((60, 60, 3), np.uint8)
    pixels[:30] = 255  # white above
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    image = load_image(tmp_path / "a.png", 32, Preprocessing(crop_pct=1))
    assert image[:, :12].max() < 0.1
    assert image[:, -12:].min() > 0.9


def test_resize_and_crop(tmp_path):
    path = noise(tmp_path / "a.png", size=(100, 50))
    whole = load_image(path, 50, Preprocessing(crop_pct=1))
    with Image.open(path) as file:
        middle = np.asarray(file)[:, 25:75] / 255
    assert np.allclose(whole.permute(1, 2, 0).numpy(), middle, atol=1e-6)
    for arguments in ({"interpolation": "cubic"}, {"crop_pct": 0}, {"crop_pct": 1.1}):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            Preprocessing(**arguments)
    with pytest.raises(ValueError, match="image_size"):
        load_image(path, 0)
    assert Preprocessing(1, "bilinear").describe(224) == "shorter side to 224 px (bilinear), centre crop of 224 px"
    assert Preprocessing().describe(224) == "shorter side to 256 px (bicubic), centre crop of 224 px"


@pytest.mark.parametrize("size", [(97, 50), (50, 97), (64, 64), (101, 333)])
@pytest.mark.parametrize("crop_pct", [0.875, 1.0])
def test_pixels_are_those_of_torchvision(tmp_path, size, crop_pct):
    transforms = pytest.importorskip("torchvision.transforms")
    path = noise(tmp_path / "a.png", size=size)
    for name in ("bilinear", "bicubic"):
        way = transforms.InterpolationMode(name)
        resize = transforms.Resize(round(28 / crop_pct), way)
        theirs = transforms.Compose([resize, transforms.CenterCrop(28), transforms.ToTensor()])
        with Image.open(path) as file:
            assert torch.equal(load_image(path, 28, Preprocessing(crop_pct, name)), theirs(file.convert("RGB")))


def test_augmentation_is_a_function_of_seed_and_index(tmp_path):
    for name in "ab":
        noise(tmp_path / f"{name}.png")
    data, again = (ImageFolder(tmp_path, image_size=32, augment=True, seed=4) for _ in range(2))
    views = [data[index]["image"] for index in range(8)]
    assert all(torch.equal(again[index]["image"], views[index]) for index in reversed(range(8)))
    assert data[6]["path"] == data[0]["path"]
    assert not torch.equal(views[6], views[0])
    assert len(list(data)) == 2
    other = ImageFolder(tmp_path, image_size=32, augment=True, seed=5)
    assert not torch.equal(other[0]["image"], views[0])
