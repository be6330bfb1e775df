"""Images on disk: class folders, ImageNet's layout, flat folders and single files."""

from __future__ import annotations

import hashlib
import itertools
import os
import stat
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from aha.checks import check_arguments, checked
from aha.data.images import (
    DEFAULT,
    ImageReadError,
    Preprocessing,
    check_file,
    fitted,
    open_image,
    open_mask,
    shown,
    to_tensor,
)
from aha.data.labelled import LabelledImages
from aha.data.labels import is_number, number_names, read_labels, spelled
from aha.data.listing import (
    Group,
    Samples,
    entries_of,
    images_below,
    is_folder,
    nothing_in,
    size_of,
    sizes_of,
    warn_of_links,
)

LABELS = "labels.csv"
MASK = "_mask"  # end of a mask's name where it lies beside its image
CHUNK = 1 << 20  # bytes read at a time for a digest
SPLITS = frozenset({"train", "val", "valid", "validation", "test"})


class ImageFolder(LabelledImages):
    """Images below `root`, resized, centre-cropped and labelled.

    Layouts, found by looking:
    - root/<class>/*.jpg: folders named by numbers (7, 007) are these labels; other labels follow the sorted folder
      names, or `class_names` where given;
    - root/train/... and root/val/... (ImageNet): choose with `split`; each may have any layout of this list;
    - a flat folder with a labels file, columns `file,label` (others ignored): the images it lists;
    - a flat folder: label -1.

    These labels are the folder's own: `fit_labels` brings them into a classifier's numbering. What is reached twice
    through links counts once; one warning tells of links that lead out of the folder. Files that cannot be read are
    listed, and raise on access. Of ten thousand images and more the listing is kept (docs/data.md).

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

    Attributes: samples, a sequence of (path, label); labelled_by, "names", "numbers" or None without labels;
    class_names, in label order, or None.

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
        super().__init__(image_size, preprocessing, augment, class_names, seed)
        self.folder = folder = split_folder(Path(root), split)
        names = None if class_names is None else [str(name) for name in class_names]
        self.labelled_by: str | None = None
        if labels is None or labels is True:
            labels = folder / LABELS if (folder / LABELS).is_file() else None
        self.by_folder = labels is None
        if labels is False:
            found = images_below(folder)
            if not found.groups:
                raise FileNotFoundError(nothing_in(folder))
            self.samples = _samples(found.groups, itertools.repeat(-1))
        elif labels is not None:
            self.samples, names, self.labelled_by = _listed(folder, Path(labels), names)
        else:
            self.samples, names, self.labelled_by = _by_folder(folder, names)
        self.class_names = names
        self.masks: list[Path | None] | None = None
        if masks is not None:
            self.samples = Samples.of(sample for sample in self.samples if not sample[0].stem.endswith(MASK))
            self.masks = _masks(Path(masks), folder, [path for path, _ in self.samples])

    def _open(self, place: int, path: Path) -> Image.Image:
        return open_image(path, self.resize)

    def _beside(self, place: int, shape: tuple[int, int]) -> dict[str, Any]:
        return {} if self.masks is None else {"mask": self._mask(self.masks[place], shape)}

    def _mask(self, path: Path | None, shape: tuple[int, int]) -> torch.Tensor:
        """(1, H, W) bool."""
        if path is None:
            return torch.zeros(1, self.image_size, self.image_size, dtype=torch.bool)
        mask = open_mask(path, self.resize, shape)
        return to_tensor(fitted(mask, self.image_size, self.resize, Image.Resampling.NEAREST)) > 0

    @checked
    def identity(self, content: bool = True, indices: Sequence[int] | None = None) -> dict[str, Any]:
        """See `LabelledImages.identity`."""
        return {**super().identity(content, indices), "masks": self.masks is not None}

    def _marks(self, places: Sequence[int], content: bool) -> Iterable[bytes]:
        sizes = None if content else sizes_of(self.samples, self.folder, places)
        for place in places:
            mark = _bytes_of(self.samples[place][0]) if sizes is None else _size(int(sizes[place]))
            mask = None if self.masks is None else self.masks[place]
            if mask is None:
                yield mark + b"-"
            else:
                yield mark + (_bytes_of(mask) if content else _size(size_of(str(mask))))


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


def split_folder(root: Path, split: str | None) -> Path:
    """The folder to read: ``root``, or of its splits the one asked for.

    Raises:
        FileNotFoundError: if it is not there.
        ValueError: if there are several to choose from, or ``split`` leads out of ``root``.
    """
    if not root.is_dir():
        what = "is a file: give the folder it is in" if root.is_file() else None
        raise FileNotFoundError(f"{shown(root)} {what}" if what else f"no such folder: {shown(root)}")
    if split is not None:
        if os.path.isabs(split) or os.pardir in Path(split).parts:
            raise ValueError(f"split {shown(split)!r} leads out of {shown(root)}: give the name of a folder in it")
        if not (root / split).is_dir():
            raise FileNotFoundError(f"no split {split!r} in {root}: there is no folder {shown(root / split)}")
        return root / split
    inside = {entry.name for entry in entries_of(root) if is_folder(entry)}
    splits = sorted(inside & SPLITS)
    if len(splits) == 1 and inside == set(splits):
        return root / splits[0]
    if "train" in splits and len(splits) > 1:
        raise ValueError(f"{shown(root)} holds {' and '.join(splits)}: pass split={splits[0]!r} or another")
    return root


def _samples(groups: Sequence[Group], labels: Iterable[int]) -> Samples:
    """Samples of which ``labels`` has one label per group."""
    counts = [group.names.count("/") + 1 for group in groups]
    per_group = np.array([label for label, _ in zip(labels, groups, strict=False)], np.int64)
    return Samples([(group.at, group.names) for group in groups], np.repeat(per_group, counts))


def _by_folder(folder: Path, given: list[str] | None):
    """Samples, class names and what labels were read from, of a folder of class folders, or of a flat folder."""
    groups, again = images_below(folder)
    if not groups:
        raise FileNotFoundError(nothing_in(folder))
    above = len(folder.parts)
    # of every group; "" of loose images
    classes = [next(iter(Path(group.at).parts[above:]), "") for group in groups]
    if not any(classes):
        return _samples(groups, itertools.repeat(-1)), given, None
    if "" in classes:
        loose = groups[classes.index("")].names.split("/")[0]
        raise ValueError(
            f"{shown(folder)} holds both class folders and loose images such as {shown(loose)}: move one kind"
        )
    found = set(classes)
    if given is None and not all(map(is_number, found)):
        # a class without images keeps its place in the order
        real = {os.path.realpath(folder / name): name for name in found}
        for entry in entries_of(folder):
            if is_folder(entry):
                real.setdefault(os.path.realpath(entry.path), entry.name)
        real.pop(os.path.realpath(folder), None)
        found = set(real.values())
    try:
        labels, names = number_names(found, given, "class folder")
    except ValueError as error:
        raise ValueError(f"{shown(folder)}: {error}") from error
    merged: dict[int, str] = {}
    for name in sorted(set(classes)):
        other = merged.setdefault(labels[name], name)
        if other != name:
            raise ValueError(f"{folder}: class folders {other!r} and {name!r} are one class: merge them or rename one")
    for path, first in again:
        here, there = (file.relative_to(folder).parts[0] for file in (path, first))
        if labels.get(here, labels[there]) != labels[there]:
            warnings.warn(f"{shown(path)} is the same file as {shown(first)}: it counts once, as {there}", stacklevel=2)
    return _samples(groups, [labels[name] for name in classes]), names or given, "names" if names else "numbers"


def _listed(folder: Path, file: Path, given: list[str] | None):
    """Samples, class names and what labels were read from, of a labels file."""
    rows = read_labels(file)
    try:
        labels, names = number_names({label for _, _, label in rows}, given, "label")
    except ValueError as error:
        bad = str(error).partition("'")[2].partition("'")[0]
        line = next((line for line, _, label in rows if label == bad), None)
        raise ValueError(f"{shown(file)}{f', line {line}' if line else ''}: {error}") from error
    samples: dict[str, tuple[int, Path, int]] = {}
    missing, outside = [], []
    top = os.path.join(os.path.realpath(folder), "")
    real_parents: dict[str, str] = {}
    for line, name, text in rows:
        where = f"{shown(file)}, line {line}"
        path, about = _place(folder, name, where)
        if about is None:
            missing.append(f"{where}: no such image: {shown(path)}")
        parent, last = os.path.split(path)
        if parent not in real_parents:
            real_parents[parent] = os.path.realpath(parent)
        linked = about is not None and stat.S_ISLNK(about.st_mode)
        real = os.path.realpath(path) if linked else os.path.join(real_parents[parent], last)
        if about is not None and not os.path.isabs(name) and not real.startswith(top):
            outside.append(Group(parent, last, real, link=True))
        first, _, label = samples.setdefault(real, (line, path, labels[text]))
        if label != labels[text]:
            raise ValueError(f"{where}: {shown(name)} has another label in line {first}: leave one")
    if len(missing) == len(rows):
        # not files that went away, but the wrong folder
        raise ValueError(missing[0])
    warn_of_links(folder, outside)
    listed = Samples.of((path, label) for _, path, label in samples.values())
    return listed, names or given, "names" if names else "numbers"


def _place(folder: Path, name: str, where: str) -> tuple[Path, os.stat_result | None]:
    """Where a file of a labels file is, and what is there; it may not leave the folder unless its path is absolute."""
    for other in dict.fromkeys((name, spelled(name), unicodedata.normalize("NFD", name), name.replace("\\", "/"))):
        if not os.path.isabs(other) and os.path.normpath(other).split(os.sep)[0] == os.pardir:
            raise ValueError(
                f"{where}: {shown(name)} leads out of {shown(folder)}: move the image there, or give its absolute path"
            )
        path = folder / other
        try:
            about = os.lstat(path)
        except OSError:
            continue
        if stat.S_ISDIR(about.st_mode) or (stat.S_ISLNK(about.st_mode) and os.path.isdir(path)):
            raise ValueError(f"{where}: {shown(path)} is a folder: give an image")
        return path, about
    return folder / name, None


def _masks(root: Path, folder: Path, images: list[Path]) -> list[Path | None]:
    """The mask of every image, None where there is none."""
    if not root.is_dir():
        raise FileNotFoundError(f"no folder of masks: {shown(root)}")

    def of(image: Path) -> Path | None:
        beside = image.relative_to(folder).parent if image.is_relative_to(folder) else Path()
        places = (root / beside, root)
        names = (f"{image.stem}.png", f"{image.stem}{MASK}.png")
        tried = (place / name for place in places for name in names)
        return next((path for path in tried if path.is_file() and path != image), None)

    found = [of(image) for image in images]
    if not any(found):
        raise ValueError(
            f"{shown(root)} holds no mask for {shown(images[0].name)} nor for any other image: name it "
            f"{shown(images[0].stem)}.png"
        )
    return found


def _bytes_of(path: Path) -> bytes:
    """A digest of a file, read piece by piece; of nothing where it cannot be read."""
    digest = hashlib.sha256()
    try:
        check_file(path)
        with open(path, "rb") as file:
            while part := file.read(CHUNK):
                digest.update(part)
    except (ImageReadError, OSError):
        return b"unreadable"
    return digest.digest()


def _size(size: int) -> bytes:
    return b"unreadable" if size < 0 else f"{size};".encode()
