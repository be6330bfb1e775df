"""Images on disk: class folders, ImageNet's layout, flat folders and single files."""

from __future__ import annotations

import copy
import hashlib
import itertools
import os
import random
import unicodedata
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from aha.checks import check_arguments, checked
from aha.data.images import (
    DEFAULT,
    ImageReadError,
    Preprocessing,
    augmented,
    fitted,
    open_image,
    open_mask,
    to_tensor,
)
from aha.data.images import Image as _Image
from aha.data.labels import is_number, number_names, read_labels, relabel, spelled

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
LABELS = "labels.csv"
MASK = "_mask"  # end of a mask's name where it lies beside its image
CHUNK = 1 << 20  # bytes read at a time for a digest


class ImageFolder(torch.utils.data.Dataset):
    """Images below `root`, resized, centre-cropped and labelled.

    Layouts, found by looking:
    - root/<class>/*.jpg: folders named by numbers (7, 007) are these labels; other labels follow the sorted folder
      names, or `class_names` where given;
    - root/train/... and root/val/... (ImageNet): choose with `split`; each may have any layout of this list;
    - a flat folder with a labels file, columns `file,label` (others ignored): the images it lists;
    - a flat folder: label -1.

    These labels are the folder's own: `fit_labels` brings them into a classifier's numbering. What is reached twice
    through links counts once. Files that cannot be read are listed, and raise on access.

    image_size: side of the square output, pixels.
    preprocessing: how images are resized and cropped, such as `aha.metrics.Protocol.preprocessing`.
    augment: instead, a random crop of 25 to 100 % of the area, aspect 3/4 to 4/3, and a random flip, a
        function of (seed, index) alone. Any index is accepted: index // len(self) is the epoch. Iteration
        stops after one epoch.
    class_names: names of all classes in label order, for a folder that lacks some; None is the sorted names
        found. Case, blanks and underscores may differ where that leaves one.
    labels: the labels file; None looks for root/labels.csv; False leaves labels out: every image below the folder,
        label -1. In the file, labels are class names, or integers throughout (7, 07 and 7.0 are one); paths are
        relative to the folder and stay in it, or are absolute.
    split: subfolder of root to read, such as "train" or "val".
    masks: folder of masks of the object, for the localisation metrics: <name>.png or <name>_mask.png for an image
        <name>.jpg, under the image's relative path or directly in the folder; whatever is not black, or 0, is object.
        They are resized and cropped like their images. An image without one has an empty mask. Where masks lie
        beside their images, files ending in _mask are not taken for images.

    Attributes: samples, [(path, label)]; labelled_by, "names", "numbers" or None without labels; class_names, in label
    order, or None.

    Items are dicts: "image" (3, H, W) float32 RGB in [0, 1], "label" int, "path" str, and with `masks` "mask"
    (1, H, W) bool.
    FileNotFoundError for a missing folder or one without images; ValueError for an ambiguous folder or a bad
    labels file; ImageReadError, on access, for a file that cannot be read, and for a folder that cannot be listed.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        image_size: int = 224,
        preprocessing: Preprocessing = DEFAULT,
        augment: bool = False,
        class_names: Sequence[str] | None = None,
        labels: str | os.PathLike | bool | None = None,
        split: str | None = None,
        seed: int = 0,
        masks: str | os.PathLike | None = None,
    ):
        check_arguments(ImageFolder.__init__, locals())
        if augment and masks is not None:
            raise ValueError("masks are of whole images: leave augment off")
        if isinstance(class_names, str):
            raise ValueError(f"class_names is the text {class_names!r}: give a list of names in label order")
        self.image_size = image_size
        self.preprocessing = preprocessing
        self.resize, self.resample = preprocessing.resize(image_size), preprocessing.resample
        self.augment, self.seed = augment, seed
        self.folder = folder = _folder(Path(root), split)
        names = None if class_names is None else [str(name) for name in class_names]
        self.names_given = names is not None
        self.labelled_by: str | None = None
        self.labels_file: Path | None = None
        if labels is None or labels is True:
            labels = folder / LABELS if (folder / LABELS).is_file() else None
        self.samples: list[tuple[Path, int]]
        if labels is False:
            self.samples = [(path, -1) for path in find_images(folder)]
        elif labels is not None:
            self.labels_file = Path(labels)
            self.samples, names, self.labelled_by = _listed(folder, self.labels_file, names)
        else:
            self.samples, names, self.labelled_by = _by_folder(folder, names)
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
        image = open_image(path, self.resize)
        shape = image.size
        if self.augment:
            # a string seed is hashed by its content, the same in every process
            image = augmented(image, self.image_size, self.resample, random.Random(f"{self.seed},{index}"))
        else:
            image = fitted(image, self.image_size, self.resize, self.resample)
        item = {"image": to_tensor(image), "label": label, "path": str(path)}
        return item if self.masks is None else {**item, "mask": self._mask(self.masks[index], shape)}

    def _mask(self, path: Path | None, shape: tuple[int, int]) -> torch.Tensor:
        """(1, H, W) bool."""
        if path is None:
            return torch.zeros(1, self.image_size, self.image_size, dtype=torch.bool)
        mask = open_mask(path, self.resize, shape)
        return to_tensor(fitted(mask, self.image_size, self.resize, _Image.Resampling.NEAREST)) > 0

    def relabelled(self, numbers: Mapping[int, int], class_names: Sequence[str] | None) -> ImageFolder:
        """The same images with label ``numbers[label]``; shares everything else."""
        other = copy.copy(self)
        other.samples = relabel(self.samples, numbers)
        other.class_names = None if class_names is None else list(class_names)
        other.labelled_by = "numbers"
        return other

    @checked
    def identity(self, content: bool = True, indices: Sequence[int] | None = None) -> dict[str, Any]:
        """What these images are, as JSON types: equal where items are equal, wherever the folder lies.

        Args:
            content: a digest over the bytes, label and mask of every image; else over paths, sizes and labels, for
                folders of which all bytes are too many.
            indices: of the images that count; None is all.
        """
        digest = hashlib.sha256()
        places = range(len(self)) if indices is None else [index % len(self) for index in indices]
        for place in places:
            path, label = self.samples[place]
            mask = self.masks[place] if self.masks is not None else None
            digest.update(f"{_relative(path, self.folder)}\0{label}\0".encode("utf-8", "surrogateescape"))
            for file in (path, mask):
                digest.update(b"-" if file is None else _bytes_of(file) if content else _size_of(file))
        return {
            "type": "ImageFolder",
            "images": len(places),
            "digest": digest.hexdigest(),
            "by": "content" if content else "listing",
            "image_size": self.image_size,
            "resize": self.resize,
            "interpolation": self.resample.name.lower(),
            "augment": self.augment,
            "seed": self.seed if self.augment else None,
            "masks": self.masks is not None,
        }


@checked
def find_images(*paths: str | os.PathLike) -> list[Path]:
    """The image files below folders at any depth, sorted, hidden ones left out; a file is itself.

    A file or folder that is reached again through links counts once, where it comes first. Links to nothing are
    listed, so that whoever reads them can say so; a folder within that cannot be listed is left out with a warning.

    Raises:
        FileNotFoundError: if nothing is at one of ``paths``, or no image is in it.
        ImageReadError: for a folder among them that cannot be listed.
    """
    found: dict[str, Path] = {}
    for given in paths:
        path = Path(given)
        if not os.path.lexists(path):
            raise FileNotFoundError(f"no such file or folder: {path}")
        inside = {os.path.realpath(path): path} if not path.is_dir() else _images(path)[0]
        if not inside:
            raise FileNotFoundError(_nothing_in(path))
        for real, file in inside.items():
            found.setdefault(real, file)
    return list(found.values())


@checked
def output_names(files: Sequence[str | os.PathLike]) -> list[str]:
    """A name for what is made of each file, without suffix: distinct, also where case does not count.

    It is the file's own stem where no other file has it; with its suffix behind it (``1_png``) where the same folder
    has that stem twice; with as many of its folders before it as tell it apart (``cat_1`` and ``dog_1``). What names
    cannot tell apart is numbered. Names do not depend on the order of the files.
    """
    paths = [Path(os.path.abspath(file)) for file in files]
    if not paths:
        return []
    shared = len(Path(os.path.commonpath([path.parent for path in paths])).parts)
    beside = Counter(_folded(str(path.with_suffix(""))) for path in paths)
    choices = []
    for path in paths:
        ambiguous = beside[_folded(str(path.with_suffix("")))] > 1 and path.suffix
        stem = f"{path.stem}_{path.suffix[1:]}" if ambiguous else path.stem
        above = path.parts[shared:-1]
        choices.append(["_".join([*above[len(above) - up :], stem]) for up in range(len(above) + 1)])
    level = [0] * len(paths)
    while longer := [place for group in _clashes(choices, level) for place in _to_lengthen(group, choices, level)]:
        for place in longer:
            level[place] += 1
    names = [choices[place][level[place]] for place in range(len(paths))]
    taken = set(map(_folded, names))
    for group in _clashes(choices, level):
        for place in sorted(group, key=lambda place: (level[place], str(paths[place])))[1:]:
            free = (f"{names[place]}_{number}" for number in itertools.count(2))
            names[place] = next(name for name in free if _folded(name) not in taken)
            taken.add(_folded(names[place]))
    return names


def _clashes(choices: Sequence[Sequence[str]], level: Sequence[int]) -> list[list[int]]:
    """Places of names that are the same."""
    groups: dict[str, list[int]] = {}
    for place, names in enumerate(choices):
        groups.setdefault(_folded(names[level[place]]), []).append(place)
    return sorted((group for group in groups.values() if len(group) > 1), key=lambda group: choices[group[0]][0])


def _to_lengthen(group: Sequence[int], choices: Sequence[Sequence[str]], level: Sequence[int]) -> list[int]:
    """Which of several places of one name take one more folder into it."""
    plain = [place for place in group if level[place] == 0]
    # a stem that nothing but longer names runs into stays as it is
    moving = [place for place in group if level[place]] if len(plain) == 1 else list(group)
    able = [place for place in moving if level[place] + 1 < len(choices[place])]
    return able or [place for place in group if level[place] + 1 < len(choices[place])]


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _nothing_in(folder: Path) -> str:
    return f"no images in {folder}: files ending in {', '.join(SUFFIXES)} are read"


def _images(folder: Path) -> tuple[dict[str, Path], list[tuple[Path, Path]]]:
    """Real path → path of the images below a folder; and (path, path where it came first) of those reached again."""
    found: dict[str, Path] = {}
    again: list[tuple[Path, Path]] = []
    seen: set[str] = set()

    def walk(at: Path, real: str) -> None:
        seen.add(real)
        for entry in _entries(at, warn=at != folder):
            inside = os.path.realpath(entry.path) if entry.is_symlink() else os.path.join(real, entry.name)
            if _is_folder(entry):
                if inside not in seen:
                    walk(Path(entry.path), inside)
            elif entry.name.lower().endswith(SUFFIXES):
                path = Path(entry.path)
                first = found.setdefault(inside, path)
                if first is not path:
                    again.append((path, first))

    walk(folder, os.path.realpath(folder))
    return found, again


def _entries(folder: Path, warn: bool = False) -> list[os.DirEntry]:
    """What is in a folder and not hidden, sorted by name."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        reason = error.strerror or error
        if not warn:
            raise ImageReadError(f"cannot list folder {folder}: {reason}") from error
        warnings.warn(f"cannot list folder {folder} ({reason}): its images are left out", stacklevel=2)
        return []


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # links that lead round in a circle
        return False


def _folder(root: Path, split: str | None) -> Path:
    if not root.is_dir():
        what = "is a file: give the folder it is in" if root.is_file() else None
        raise FileNotFoundError(f"{root} {what}" if what else f"no such folder: {' '.join(str(root).split())}")
    if split is not None:
        if not (root / split).is_dir():
            raise FileNotFoundError(f"no split {split!r} in {root}: there is no folder {root / split}")
        return root / split
    inside = {entry.name for entry in _entries(root) if _is_folder(entry)}
    splits = sorted(inside & {"train", "val", "valid", "validation", "test"})
    if len(splits) == 1 and inside == set(splits):
        return root / splits[0]
    if "train" in splits and len(splits) > 1:
        raise ValueError(f"{root} holds {' and '.join(splits)}: pass split={splits[0]!r} or another")
    return root


def _by_folder(folder: Path, given: list[str] | None):
    """Samples, class names and what labels were read from, of a folder of class folders, or of a flat folder."""
    found_at, again = _images(folder)
    images = list(found_at.values())
    if not images:
        raise FileNotFoundError(_nothing_in(folder))
    classes = [path.relative_to(folder).parts[0] for path in images if path.parent != folder]
    loose = next((path for path in images if path.parent == folder), None)
    if not classes:
        return [(path, -1) for path in images], given, None
    if loose is not None:
        raise ValueError(f"{folder} holds both class folders and loose images such as {loose.name}: move one kind")
    found = set(classes)
    if given is None and not all(map(is_number, found)):
        # a class without images keeps its place in the order
        real = {os.path.realpath(folder / name): name for name in found}
        for entry in _entries(folder):
            if _is_folder(entry):
                real.setdefault(os.path.realpath(entry.path), entry.name)
        real.pop(os.path.realpath(folder), None)
        found = set(real.values())
    try:
        labels, names = number_names(found, given, "class folder")
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    merged: dict[int, str] = {}
    for name in sorted(set(classes)):
        other = merged.setdefault(labels[name], name)
        if other != name:
            raise ValueError(f"{folder}: class folders {other!r} and {name!r} are one class: merge them or rename one")
    for path, first in again:
        here, there = (file.relative_to(folder).parts[0] for file in (path, first))
        if labels.get(here, labels[there]) != labels[there]:
            warnings.warn(f"{path} is the same file as {first}: it counts once, as {there}", stacklevel=2)
    samples = [(path, labels[name]) for path, name in zip(images, classes, strict=True)]
    return samples, names or given, "names" if names else "numbers"


def _listed(folder: Path, file: Path, given: list[str] | None):
    """Samples, class names and what labels were read from, of a labels file."""
    rows = read_labels(file)
    try:
        labels, names = number_names({label for _, _, label in rows}, given, "label")
    except ValueError as error:
        bad = str(error).partition("'")[2].partition("'")[0]
        line = next((line for line, _, label in rows if label == bad), None)
        raise ValueError(f"{file}{f', line {line}' if line else ''}: {error}") from error
    samples: dict[str, tuple[int, Path, int]] = {}
    missing = []
    for line, name, text in rows:
        path = _place(folder, name, f"{file}, line {line}")
        if not os.path.lexists(path):
            missing.append(f"{file}, line {line}: no such image: {path}")
        first, _, label = samples.setdefault(os.path.realpath(path), (line, path, labels[text]))
        if label != labels[text]:
            raise ValueError(f"{file}, line {line}: {name} has another label in line {first}: leave one")
    if len(missing) == len(rows):
        # not files that went away, but the wrong folder
        raise ValueError(missing[0])
    return [(path, label) for _, path, label in samples.values()], names or given, "names" if names else "numbers"


def _place(folder: Path, name: str, where: str) -> Path:
    """Where a file of a labels file is; it may not leave the folder unless its path is absolute."""
    if not os.path.isabs(name) and os.path.normpath(name).split(os.sep)[0] == os.pardir:
        raise ValueError(f"{where}: {name} leads out of {folder}: move the image there, or give its absolute path")
    spellings = dict.fromkeys((name, spelled(name), unicodedata.normalize("NFD", name), name.replace("\\", "/")))
    path = next((folder / other for other in spellings if os.path.lexists(folder / other)), folder / name)
    if path.is_dir():
        raise ValueError(f"{where}: {path} is a folder: give an image")
    return path


def _masks(root: Path, folder: Path, images: list[Path]) -> list[Path | None]:
    """The mask of every image, None where there is none."""
    if not root.is_dir():
        raise FileNotFoundError(f"no folder of masks: {root}")

    def of(image: Path) -> Path | None:
        beside = image.relative_to(folder).parent if image.is_relative_to(folder) else Path()
        places = (root / beside, root)
        names = (f"{image.stem}.png", f"{image.stem}{MASK}.png")
        tried = (place / name for place in places for name in names)
        return next((path for path in tried if path.is_file() and path != image), None)

    found = [of(image) for image in images]
    if not any(found):
        raise ValueError(
            f"{root} holds no mask for {images[0].name} nor for any other image: name it {images[0].stem}.png"
        )
    return found


def _relative(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def _bytes_of(path: Path) -> bytes:
    """A digest of a file, read piece by piece; of nothing where it cannot be read."""
    digest = hashlib.sha256()
    try:
        if not path.is_file():
            return b"unreadable"
        with open(path, "rb") as file:
            while part := file.read(CHUNK):
                digest.update(part)
    except OSError:
        return b"unreadable"
    return digest.digest()


def _size_of(path: Path) -> bytes:
    try:
        return f"{path.stat().st_size};".encode()
    except OSError:
        return b"unreadable"
