"""Files: each counts once, none stops a listing, and what cannot be read says so in one line when it is read."""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from aha.data import (
    ImageFolder,
    ImageReadError,
    Part,
    Preprocessing,
    Readable,
    Scenes,
    find_images,
    identity,
    load_image,
    output_names,
    readable,
)


def write(path, value=90, size=(10, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0], 3), value, np.uint8)).save(path)
    return path


def refusal(path, **options):
    with pytest.raises(ImageReadError, match=r"^cannot read image ") as caught:
        load_image(path, 16, **options)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def value_of(path):
    image = load_image(path, 16)
    assert image.std() < 1e-6
    return float(image.mean())


def test_links_count_once(tmp_path):
    image = write(tmp_path / "cls" / "a.png")
    (tmp_path / "cls" / "again").symlink_to("..")
    (tmp_path / "cls" / "self").symlink_to("self")
    (tmp_path / "cls" / "z.png").symlink_to("a.png")
    (tmp_path / "other").symlink_to("cls")
    data = ImageFolder(tmp_path, 8)
    assert data.samples == [(image, 0)]
    assert data.class_names == ["cls"]
    assert find_images(tmp_path) == [image]
    assert find_images(tmp_path, image, tmp_path / "other") == [image]


def test_the_first_way_to_a_folder_counts(tmp_path):
    write(tmp_path / "x" / "real" / "a.png")
    (tmp_path / "x" / "alias").symlink_to("real")
    write(tmp_path / "elsewhere" / "b.png")
    for name in ("one", "two"):
        (tmp_path / "x" / name).symlink_to(tmp_path / "elsewhere")
    with pytest.warns(
        UserWarning, match="links lead out of it to 1 of its images; the first is .*/x/one/b.png, in fact"
    ):
        found = [str(path.relative_to(tmp_path / "x")) for path in find_images(tmp_path / "x")]
    assert found == ["alias/a.png", "one/b.png"]


def test_one_file_in_two_classes_is_said(tmp_path):
    write(tmp_path / "cat" / "a.png")
    write(tmp_path / "dog" / "b.png")
    (tmp_path / "dog" / "c.png").symlink_to("../cat/a.png")
    with pytest.warns(UserWarning, match="dog/c.png is the same file as .*cat/a.png: it counts once, as cat"):
        assert len(ImageFolder(tmp_path)) == 2


def test_bad_files_are_listed_and_raise_on_access(tmp_path):
    write(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("nowhere.png")
    (tmp_path / "c.png").symlink_to("c.png")
    os.mkfifo(tmp_path / "d.png")
    write(tmp_path / "e.png" / "inner.png")
    gone = write(tmp_path / "f.png")
    found = find_images(tmp_path)
    assert [path.name for path in found] == ["a.png", "b.png", "c.png", "d.png", "inner.png", "f.png"]
    gone.unlink()
    for path, says in zip(
        [*found[1:4], gone], ["a link to nothing", "a link to nothing", "not a file", "no such"], strict=True
    ):
        assert says in refusal(path)
        with pytest.raises(FileNotFoundError):
            load_image(path)
    assert find_images(tmp_path / "b.png") == [tmp_path / "b.png"]


def test_files_without_permission(tmp_path, monkeypatch):
    path = write(tmp_path / "a.png")

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Image, "open", denied)
    assert refusal(path).endswith("Permission denied")
    monkeypatch.setattr(Path, "is_file", denied)
    assert refusal(path).endswith("Permission denied")


def test_folders_that_cannot_be_listed(tmp_path, monkeypatch):
    write(tmp_path / "cat" / "a.png")
    write(tmp_path / "locked" / "b.png")
    scan = os.scandir

    def scandir(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.warns(UserWarning, match=r"cannot list folder .*locked \(Permission denied\): its images are left out"):
        assert find_images(tmp_path) == [tmp_path / "cat" / "a.png"]
    with pytest.raises(ImageReadError, match=r"cannot list folder .*locked: Permission denied"):
        find_images(tmp_path / "locked")


def test_missing_rows_of_a_labels_file_raise_on_access(tmp_path):
    write(tmp_path / "a.png")
    (tmp_path / "labels.csv").write_text("file,label\na.png,1\nb.png,2\n")
    data = ImageFolder(tmp_path, 8)
    assert len(data) == 2
    with pytest.raises(ImageReadError, match=r"b\.png: no such image"):
        data[1]


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["a.jpg", "b.png"], ["a", "b"]),
        (["cat/1.jpg", "dog/1.jpg", "2.jpg"], ["cat_1", "dog_1", "2"]),
        (["a.jpg", "a.png"], ["a_jpg", "a_png"]),
        (["x/cat/a.jpg", "x/dog/a.jpg", "x/cat_a.jpg"], ["cat_a_2", "dog_a", "cat_a"]),
        (["v/cat/a.jpg", "w/cat/a.jpg", "w/cat_a.jpg"], ["v_cat_a", "w_cat_a", "cat_a"]),
        (["p/x/a.jpg", "q/x/a.jpg", "q/y/a.jpg"], ["p_x_a", "q_x_a", "y_a"]),
        (["A.png", "a.jpg"], ["A_png", "a_jpg"]),
        (["A.png", "a.png"], ["A_png", "a_png_2"]),
        (["x/A.png", "y/a.png"], ["x_A", "y_a"]),
        (["a.jpg", "a.png", "a_jpg.png"], ["a_jpg", "a_png", "a_jpg_2"]),
        (["a_b/c.jpg", "a/b_c.jpg", "q/c.jpg"], ["a_b_c", "b_c", "q_c"]),
        (["z.png", "z.png"], ["z_png", "z_png_2"]),
        (["../a.jpg", "a.jpg"], None),
        (["a", "b/a", "b/a.x"], None),
        ([], []),
    ],
)
def test_output_names(files, names):
    made = output_names(files)
    assert len({name.casefold() for name in made}) == len(files)
    assert all("/" not in name for name in made)
    if names is not None:
        assert made == names
    by_file = sorted(zip(files, made, strict=True))
    for order in itertools.permutations(range(len(files))):
        again = output_names([files[i] for i in order])
        assert sorted(zip([files[i] for i in order], again, strict=True)) == by_file


def test_output_names_of_any_tree_are_distinct():
    parts = ["a", "b", "a_b", "A"]
    files = [f"{x}/{y}/{z}{s}" for x in parts for y in parts for z in parts for s in (".jpg", ".png")]
    made = output_names(files)
    assert len({name.casefold() for name in made}) == len(files)


WIDE = np.full((10, 10), 51 * 257, np.uint16)
UNIT = np.full((10, 10), 0.2, np.float32)


@pytest.mark.parametrize(
    ("pixels", "suffix"),
    [
        (UNIT, "tif"),
        (UNIT * 255, "tif"),
        (UNIT * 65535, "tif"),
        (WIDE, "tif"),
        (WIDE.astype(">u2"), "tif"),
        (WIDE, "png"),
        (WIDE.astype(np.int32), "tif"),
        (np.full((10, 10), 51, np.int32), "tif"),
        (np.full((10, 10), 51, np.uint8), "tif"),
    ],
)
def test_wide_values_are_read_by_their_range(tmp_path, pixels, suffix):
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}")
    assert value_of(tmp_path / f"a.{suffix}") == pytest.approx(0.2, abs=1e-4)


def test_dark_sixteen_bits_stay_dark(tmp_path):
    dark = np.full((10, 10), 255, np.uint16)
    Image.fromarray(dark).save(tmp_path / "a.png")
    (tmp_path / "a.pgm").write_bytes(b"P5 10 10 65535\n" + dark.astype(">u2").tobytes())
    for name in ("a.png", "a.pgm"):
        assert value_of(tmp_path / name) == pytest.approx(1 / 255, abs=1e-4)
    Image.fromarray(np.zeros((10, 10), np.float32)).save(tmp_path / "black.tif")
    assert value_of(tmp_path / "black.tif") == 0
    Image.fromarray(np.full((10, 10), 1.0001, np.float32)).save(tmp_path / "rounded.tif")
    assert value_of(tmp_path / "rounded.tif") == 1


@pytest.mark.parametrize(
    ("pixels", "says"),
    [
        (-UNIT, "values are -0.2 … -0.2; floating point images are in [0, 1], [0, 255], [0, 65535]"),
        (UNIT * np.nan, "NaN or infinite"),
        (UNIT * np.inf, "NaN or infinite"),
        (UNIT * 1e7, "values are 2e+06"),
        (UNIT * 6, "values are 1.2 … 1.2, just above 1"),
        (UNIT * 1400, "just above 255"),
        (-WIDE.astype(np.int32), "values are -13107 … -13107; 32 bit images are in [0, 255], [0, 65535]"),
        (WIDE.astype(np.int32) * 1000, "32 bit images"),
    ],
)
def test_values_outside_every_range(tmp_path, pixels, says):
    Image.fromarray(pixels.astype(np.int32 if pixels.dtype == np.int32 else np.float32)).save(tmp_path / "a.tif")
    assert says in refusal(tmp_path / "a.tif")


def test_absurd_shapes_are_refused_before_decoding(tmp_path, monkeypatch):
    Image.new("1", (40_000_000, 1)).save(tmp_path / "long.png")
    Image.new("1", (20_000, 20_000)).save(tmp_path / "big.png")
    assert (tmp_path / "long.png").stat().st_size < 100_000
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    for name in ("long.png", "big.png"):
        assert "178956970" in refusal(tmp_path / name)


MASKS = {
    "grey": Image.fromarray(np.eye(10, dtype=np.uint8)),
    "sixteen": Image.fromarray(np.eye(10, dtype=np.uint16)),
    "bits": Image.fromarray(np.eye(10, dtype=bool)),
    "colour": Image.fromarray(np.eye(10, dtype=np.uint8)[..., None] * np.array([0, 0, 1], np.uint8)),
    "clear": Image.fromarray(np.eye(10, dtype=np.uint8)[..., None] * np.array([1, 0, 0, 0], np.uint8), "RGBA"),
}


def palette(first, second, values):
    mask = Image.fromarray(values.astype(np.uint8)).convert("P")
    mask.putdata(values.astype(np.uint8).ravel().tolist())
    mask.putpalette([*first, *second])
    return mask


MASKS["palette"] = palette((0, 0, 0), (128, 0, 0), np.eye(10))
MASKS["black palette"] = palette((0, 0, 0), (0, 0, 0), np.eye(10))
MASKS["palette from white"] = palette((255, 255, 255), (0, 0, 0), 1 - np.eye(10))


@pytest.mark.parametrize("kind", MASKS)
def test_a_mask_of_value_one_is_object(tmp_path, kind):
    write(tmp_path / "in" / "a.png")
    (tmp_path / "masks").mkdir()
    MASKS[kind].save(tmp_path / "masks" / "a.png")
    mask = ImageFolder(tmp_path / "in", 10, Preprocessing(1), masks=tmp_path / "masks")[0]["mask"]
    assert torch.equal(mask[0], torch.eye(10, dtype=torch.bool))


def test_a_mask_of_another_shape_is_refused(tmp_path):
    write(tmp_path / "in" / "a.png", size=(20, 10))
    (tmp_path / "masks").mkdir()
    for size, fits in (((40, 20), True), ((10, 20), False), ((10, 10), False)):
        Image.new("L", size, 1).save(tmp_path / "masks" / "a.png")
        data = ImageFolder(tmp_path / "in", 8, masks=tmp_path / "masks")
        if fits:
            assert data[0]["mask"].all()
            continue
        with pytest.raises(ImageReadError, match=r"masks/a.png: it is .* its image 20×10"):
            data[0]


def bad_folder(root, augment=False):
    """Images b and d of a, b, c, d cannot be read."""
    for name, value in (("a", 10), ("c", 30)):
        write(root / f"{name}.png", value)
    (root / "b.png").symlink_to("nowhere.png")
    (root / "d.png").write_text("text")
    return ImageFolder(root, 8, augment=augment)


def test_the_next_readable_item_takes_a_bad_ones_place(tmp_path):
    data = readable(bad_folder(tmp_path))
    assert readable(data) is data
    items = list(data)
    assert [Path(item["path"]).stem for item in items] == ["a", "c", "c", "a"]
    assert ["b.png" in items[1]["failed"], "d.png" in items[3]["failed"]] == [True, True]
    assert items[0]["failed"] == items[2]["failed"] == ""
    assert "\n" not in items[3]["failed"]
    with pytest.raises(IndexError):
        data[4]


@pytest.mark.parametrize("workers", [0, 2])
def test_failures_pass_through_a_data_loader(tmp_path, workers):
    data = readable(Part(bad_folder(tmp_path), [3, 2]))
    (batch,) = torch.utils.data.DataLoader(data, batch_size=2, num_workers=workers)
    assert ["d.png" in text for text in batch["failed"]] == [True, False]
    assert torch.equal(batch["image"][0], batch["image"][1])


def test_substitutes_depend_on_the_index_alone(tmp_path):
    data = readable(bad_folder(tmp_path, augment=True))
    assert data.virtual_epochs
    assert len(list(data)) == 4
    ahead = [data[index]["image"] for index in range(12)]
    again = readable(ImageFolder(tmp_path, 8, augment=True))
    assert all(torch.equal(again[index]["image"], ahead[index]) for index in reversed(range(12)))
    assert Path(data[7]["path"]).stem == "a"
    assert torch.equal(ahead[7], data.data[4]["image"])


def test_no_readable_image_is_one_line(tmp_path):
    for name in "ab":
        (tmp_path / f"{name}.png").write_text("text")
    with pytest.raises(ImageReadError, match=r"^none of the 2 images can be read; the first: .*b\.png") as caught:
        readable(ImageFolder(tmp_path))[1]
    assert "\n" not in str(caught.value)


def test_any_data_set_can_be_readable():
    class Own(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            if index == 0:
                raise OSError("gone")
            return {"image": torch.ones(1)}

    assert readable(Own())[0]["failed"] == "gone"
    assert not readable(Own()).virtual_epochs
    scenes = Readable(Scenes("val", size=3))
    (batch,) = torch.utils.data.DataLoader(scenes, batch_size=3)
    assert torch.equal(batch["image"], scenes.data.batch(range(3))["image"])
    assert batch["failed"] == ["", "", ""]
    assert identity(scenes) == identity(scenes.data)


def test_identity_tells_what_changed(tmp_path):
    root = tmp_path / "in"
    for name, value in (("cat/a", 1), ("dog/b", 2)):
        write(root / f"{name}.png", value)

    def now(content=True, **options):
        return identity(ImageFolder(root, 8, **options), content)

    content, listing = now(), now(content=False)
    assert now() == content
    assert now(content=False) == listing
    assert content != listing
    size = (root / "cat" / "a.png").stat().st_size
    write(root / "cat" / "a.png", 7)
    assert (root / "cat" / "a.png").stat().st_size == size
    changed = now()
    assert changed != content
    assert now(content=False) == listing  # the same size: only its content tells
    assert now(class_names=["dog", "cat"]) != changed
    assert now(class_names=["dog", "cat"], content=False) != listing
    assert now(preprocessing=Preprocessing(1)) != changed
    assert now(preprocessing=Preprocessing(interpolation="bilinear")) != changed
    root.rename(tmp_path / "moved")
    root = tmp_path / "moved"
    assert now() == changed
    (root / "cat" / "a.png").unlink()
    (root / "cat" / "a.png").symlink_to("nowhere")
    assert now() != changed


def test_identity_of_masks_parts_and_others(tmp_path):
    for name in "abc":
        write(tmp_path / "in" / f"{name}.png")
    (tmp_path / "masks").mkdir()
    seen = []
    for value in (1, 2):
        Image.new("L", (10, 10), value).save(tmp_path / "masks" / "a.png")
        seen.append(identity(ImageFolder(tmp_path / "in", 8, masks=tmp_path / "masks")))
    assert seen[0] != seen[1]
    data = ImageFolder(tmp_path / "in", 8)
    parts = [identity(Part(data, indices)) for indices in ([0, 1], [1, 0], [0, 1], [0, 2])]
    assert parts[0] == parts[2] == identity(torch.utils.data.Subset(data, [0, 1]))
    assert len({part["digest"] for part in parts}) == 3
    assert identity(Part(Part(data, [2, 1, 0]), [2, 1])) == parts[0]
    write(tmp_path / "in" / "c.png", 3)
    assert identity(Part(ImageFolder(tmp_path / "in", 8), [0, 1])) == parts[0]
    assert identity(Scenes("val", size=3)) != identity(Scenes("val", size=3, seed=1))
    assert identity(Part(Scenes("val", size=3), [0])) != identity(Part(Scenes("val", size=3), [1]))
    assert identity([1, 2]) == {"type": "list", "images": 2}
