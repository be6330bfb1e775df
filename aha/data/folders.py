"""Images on disk: class folders, ImageNet's layout, flat folders and single files, with PIL and numpy."""

from __future__ import annotations

import csv
import os
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
CROP_PCT = 0.875
LABELS = "labels.csv"
MASK = "_mask"  # end of a mask's name where it lies beside its image


class ImageReadError(ValueError):
    """A file that is not an image, or is damaged or cut short. The message names it."""


class ImageFolder(torch.utils.data.Dataset):
    """Images below `root`, resized, centre-cropped and labelled.

    Layouts, found by looking:
    - root/<class>/*.jpg: labels follow the sorted folder names, or `class_names` where given;
    - root/train/... and root/val/... (ImageNet): choose with `split`; each may have any layout of this list;
    - a flat folder with a labels file, columns `file,label` (others ignored): the images it lists;
    - a flat folder: label -1.

    image_size: side of the square output, pixels.
    resize: the shorter side before the centre crop, pixels; None is round(image_size / crop_pct).
    interpolation: "nearest", "bilinear", "bicubic" or "lanczos", always with antialiasing.
    augment: instead, a random crop of 25 to 100 % of the area, aspect 3/4 to 4/3, and a random flip, a
        function of (seed, index) alone. Any index is accepted: index // len(self) is the epoch. Iteration
        stops after one epoch.
    class_names: names of all classes in label order, for a folder that lacks some; None is the sorted names
        found.
    labels: the labels file; None looks for root/labels.csv. Its labels are class names, or integers
        throughout.
    split: subfolder of root to read, such as "train" or "val".
    masks: folder of masks of the object, for the localisation metrics: <name>.png or <name>_mask.png for an image
        <name>.jpg, under the image's relative path or directly in the folder; whatever is not black is object.
        They are resized and cropped like their images. An image without one has an empty mask. Where masks lie
        beside their images, files ending in _mask are not taken for images.

    Items are dicts: "image" (3, H, W) float32 RGB in [0, 1], "label" int, "path" str, and with `masks` "mask"
    (1, H, W) bool.
    FileNotFoundError for a missing folder or one without images; ValueError for an ambiguous folder or a bad
    labels file; ImageReadError, on access, for a file that cannot be read.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        image_size: int = 224,
        resize: int | None = None,
        crop_pct: float = CROP_PCT,
        interpolation: str = "bicubic",
        augment: bool = False,
        class_names: Sequence[str] | None = None,
        labels: str | os.PathLike | None = None,
        split: str | None = None,
        seed: int = 0,
        masks: str | os.PathLike | None = None,
    ):
        if augment and masks is not None:
            raise ValueError("masks are of whole images: leave augment off")
        self.image_size = image_size
        self.resize = _shorter_side(image_size, resize, crop_pct)
        self.resample = _resample(interpolation)
        self.augment, self.seed = augment, seed
        folder = _folder(Path(root), split)
        names = None if class_names is None else list(class_names)
        if labels is None and (folder / LABELS).is_file():
            labels = folder / LABELS
        if labels is not None:
            self.samples, names = _listed(folder, Path(labels), names)
        else:
            self.samples, names = _by_folder(folder, names)
        self.class_names = names
        self.masks: list[Path | None] | None = None
        if masks is not None:
            self.samples = [sample for sample in self.samples if not sample[0].stem.endswith(MASK)]
            self.masks = _masks(Path(masks), folder, [path for path, _ in self.samples])

    @property
    def virtual_epochs(self) -> bool:
        """Whether an index beyond the size is another crop of an image."""
        return self.augment

    def __len__(self) -> int:
        return len(self.samples)

    def __iter__(self):
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> dict:
        if index < 0 or (index >= len(self) and not self.augment):
            raise IndexError(f"no image {index} among {len(self)}")
        path, label = self.samples[index % len(self)]
        image = _open(path)
        if self.augment:
            # a string seed is hashed by its content, the same in every process
            image = _augmented(image, self.image_size, self.resample, random.Random(f"{self.seed},{index}"))
        else:
            image = _fitted(image, self.image_size, self.resize, self.resample)
        item = {"image": _to_tensor(image), "label": label, "path": str(path)}
        return item if self.masks is None else {**item, "mask": self._mask(self.masks[index])}

    def _mask(self, path: Path | None) -> torch.Tensor:
        """(1, H, W) bool."""
        if path is None:
            return torch.zeros(1, self.image_size, self.image_size, dtype=torch.bool)
        fitted = _fitted(_open(path), self.image_size, self.resize, Image.Resampling.NEAREST)
        return _to_tensor(fitted).amax(dim=0, keepdim=True) > 0


def load_image(
    path: str | os.PathLike,
    image_size: int = 224,
    resize: int | None = None,
    crop_pct: float = CROP_PCT,
    interpolation: str = "bicubic",
) -> torch.Tensor:
    """One image from disk as (3, image_size, image_size) float32 RGB in [0, 1]; arguments as `ImageFolder`.

    EXIF orientation is honoured; every colour mode becomes RGB, 16 bits are scaled to the full range, and
    transparency is dropped. FileNotFoundError for a missing file, ImageReadError for an unreadable one.
    """
    resize, resample = _shorter_side(image_size, resize, crop_pct), _resample(interpolation)
    return _to_tensor(_fitted(_open(Path(path)), image_size, resize, resample))


def find_images(path: str | os.PathLike) -> list[Path]:
    """The image files below a folder at any depth, sorted, hidden ones left out; a file is itself.

    FileNotFoundError where nothing is at `path`, or no image is in it.
    """
    path = Path(path)
    if path.is_file():
        return [path]
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    found = _images(path)
    if not found:
        raise FileNotFoundError(f"no images in {path}: files ending in {', '.join(SUFFIXES)} are read")
    return found


# ---- which files, which labels


def _images(folder: Path) -> list[Path]:
    found = []
    for at, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(at, name) for name in files if _is_image(name)]
    return sorted(found)


def _is_image(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _folder(root: Path, split: str | None) -> Path:
    if not root.is_dir():
        raise FileNotFoundError(f"no such folder: {root}")
    if split is not None:
        if not (root / split).is_dir():
            raise FileNotFoundError(f"no split {split!r} in {root}: there is no folder {root / split}")
        return root / split
    inside = {entry.name for entry in root.iterdir() if entry.is_dir()}
    splits = sorted(inside & {"train", "val", "valid", "validation", "test"})
    if len(splits) == 1 and inside == set(splits):
        return root / splits[0]
    if "train" in splits and len(splits) > 1:
        raise ValueError(f"{root} holds {' and '.join(splits)}: pass split={splits[0]!r} or another")
    return root


def _by_folder(folder: Path, names: list[str] | None):
    """Samples and class names of a folder of class folders, or of a flat folder."""
    images = find_images(folder)
    loose = [path for path in images if path.parent == folder]
    if len(loose) == len(images):
        return [(path, -1) for path in images], names
    if loose:
        raise ValueError(f"{folder} holds both class folders and loose images such as {loose[0].name}: move one kind")
    classes = [path.relative_to(folder).parts[0] for path in images]
    if names is None:
        names = sorted(e.name for e in folder.iterdir() if e.is_dir() and not e.name.startswith("."))
    index = {name: label for label, name in enumerate(names)}
    for name in classes:
        if name not in index:
            raise ValueError(f"class folder {folder / name} is not among the {len(names)} class names given")
    return [(path, index[name]) for path, name in zip(images, classes, strict=True)], names


def _masks(root: Path, folder: Path, images: list[Path]) -> list[Path | None]:
    """The mask of every image, None where there is none."""
    if not root.is_dir():
        raise FileNotFoundError(f"no folder of masks: {root}")

    def of(image: Path) -> Path | None:
        places = (root / image.relative_to(folder).parent, root)
        names = (f"{image.stem}.png", f"{image.stem}{MASK}.png")
        tried = (place / name for place in places for name in names)
        return next((path for path in tried if path.is_file() and path != image), None)

    found = [of(image) for image in images]
    if not any(found):
        raise ValueError(
            f"{root} holds no mask for {images[0].name} nor for any other image: name it {images[0].stem}.png"
        )
    return found


def _listed(folder: Path, labels: Path, names: list[str] | None):
    """Samples and class names of a labels file; file names are relative to the folder of images."""
    if not labels.is_file():
        raise FileNotFoundError(f"no such labels file: {labels}")
    listed = []
    with open(labels, newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        missing = {"file", "label"} - set(rows.fieldnames or ())
        if missing:
            raise ValueError(f"{labels} has no column {' or '.join(sorted(missing))}; its first line must name both")
        for row in rows:
            where = f"{labels}, line {rows.line_num}"
            name, label = (row["file"] or "").strip(), (row["label"] or "").strip()
            if not name or not label:
                raise ValueError(f"{where}: needs a file and a label, got {name!r} and {label!r}")
            if not (folder / name).is_file():
                raise ValueError(f"{where}: no such image: {folder / name}")
            listed.append((where, folder / name, label))
    if not listed:
        raise FileNotFoundError(f"no images in {labels}: it has no rows")
    if names is None and not all(_is_number(label) for _, _, label in listed):
        names = sorted({label for _, _, label in listed})
    return [(path, _label(label, names, where)) for where, path, label in listed], names


def _is_number(text: str) -> bool:
    return text.removeprefix("-").isdecimal()


def _label(text: str, names: list[str] | None, where: str) -> int:
    if names is not None and text in names:
        return names.index(text)
    label = int(text) if _is_number(text) else None
    if label is None or label < -1 or (names is not None and label >= len(names)):
        known = "an integer from -1" if names is None else f"one of the {len(names)} class names or their numbers"
        raise ValueError(f"{where}: label {text!r} is not {known}")
    return label


# ---- pixels


def _shorter_side(image_size: int, resize: int | None, crop_pct: float) -> int:
    if image_size < 1:
        raise ValueError(f"image_size is {image_size}; it must be at least 1 pixel")
    if resize is None:
        if not 0 < crop_pct <= 1:
            raise ValueError(f"crop_pct is {crop_pct}; it must be above 0 and at most 1")
        return round(image_size / crop_pct)
    if resize < image_size:
        raise ValueError(f"resize is {resize}, smaller than image_size {image_size}: the crop would not fit")
    return resize


def _resample(interpolation: str) -> Image.Resampling:
    if interpolation not in INTERPOLATIONS:
        raise ValueError(f"interpolation is {interpolation!r}; it must be one of {', '.join(INTERPOLATIONS)}")
    return INTERPOLATIONS[interpolation]


def _open(path: Path) -> Image.Image:
    """The whole image, upright, RGB, 8 bits."""
    if not path.is_file():
        raise FileNotFoundError(f"no such image: {path}")
    try:
        with Image.open(path) as file:
            file.load()
            return _to_rgb(ImageOps.exif_transpose(file))
    # damaged files raise nearly anything from inside PIL's parsers
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ImageReadError(f"cannot read image {path}: {reason}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        # PIL clips wide grey values to 255 where it should scale them
        values = np.asarray(image).astype(np.float32)
        if image.mode == "F":
            top = 1.0 if values.max() <= 1 else 255.0
        else:
            top = 65535.0 if image.mode.startswith("I;16") or values.max() > 255 else 255.0
        image = Image.fromarray((np.clip(values / top, 0, 1) * 255 + 0.5).astype(np.uint8))
    return image.convert("RGB")


def _fitted(image, size: int, resize: int, resample) -> Image.Image:
    """Shorter side to `resize`, then the central square of `size`."""
    width, height = image.size
    short = min(width, height)
    width, height = max(resize, round(width * resize / short)), max(resize, round(height * resize / short))
    if image.size != (width, height):
        image = image.resize((width, height), resample)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def _augmented(image, size: int, resample, rng: random.Random) -> Image.Image:
    """A random crop resized to `size`, flipped half the time."""
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(0.25, 1.0)
        aspect = (3 / 4) * (16 / 9) ** rng.random()  # evenly on the log scale
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        w = h = min(width, height)
    left, top = rng.randint(0, width - w), rng.randint(0, height - h)
    image = image.resize((size, size), resample, box=(left, top, left + w, top + h))
    return ImageOps.mirror(image) if rng.random() < 0.5 else image


def _to_tensor(image: Image.Image) -> torch.Tensor:
    pixels = np.asarray(image, np.float32).transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(pixels)).div_(255)
