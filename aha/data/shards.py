"""Images in .tar files, as WebDataset writes them, read at random by an index of their members."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import posixpath
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from aha.checks import checked
from aha.data.folders import SPLITS, ImageFolder, split_folder
from aha.data.images import DEFAULT, LARGEST, ImageReadError, Preprocessing, open_image, shown
from aha.data.index import Index
from aha.data.labelled import LabelledImages
from aha.data.labels import number_names
from aha.data.listing import SUFFIXES, Group, Samples, entries_of, is_folder, warn_of_links
from aha.data.tar import Member, TarError, members

SUFFIX = ".tar"
IMAGES = frozenset(suffix[1:] for suffix in SUFFIXES)
LABELS = ("cls", "json", "txt")  # the first that a sample has is its label
IN_JSON = ("label", "cls")
LONGEST_NAME = 4096  # characters
LONGEST_LABEL = 300  # characters; what is longer is a caption
LARGEST_LABEL = 1 << 20  # bytes of a member with a label


class Shards(LabelledImages):
    """Images in the .tar files of a folder, as WebDataset lays them out: items, labels and options as `ImageFolder`.

    A sample is the members of one key, which is what comes before the first dot of a name: <key>.jpg (or another
    suffix of images, in any case) and its label, <key>.cls, else "label" or "cls" in <key>.json, else <key>.txt; an
    integer or the name of a class. A sample without a label has label -1. Other members count for nothing.

    Unlike WebDataset's own, this data set is map-style: any image is read where it lies, by an index made from the
    headers once and kept (docs/data.md), so that the order of a training is a function of its step. Shards are
    uncompressed. Names that are absolute or contain ``..``, links, devices and members of more than 1 GiB are left out,
    with one warning.

    Args:
        root: folder of the shards, or with folders train and val of them.
        image_size, preprocessing, augment, class_names, seed: as `ImageFolder`.
        labels: False leaves labels out, as where .txt are captions.
        split: subfolder, or where there is none the shards with this word in their name, as in data-train-0001.tar.

    Attributes:
        shards: the .tar files.
        samples: a sequence of (path, label); in a path the member's name follows that of its shard.

    Raises:
        FileNotFoundError: for a missing folder, or one without shards or images.
        ImageReadError: in one line, for a shard that is damaged, cut off or compressed.
        ValueError: for labels that are none, or several splits to choose from.
    """

    @checked
    def __init__(
        self,
        root: str | os.PathLike,
        image_size: int = 224,
        preprocessing: Preprocessing = DEFAULT,
        augment: bool = False,
        class_names: Sequence[str] | None = None,
        labels: bool = True,
        split: str | None = None,
        seed: int = 0,
    ):
        super().__init__(image_size, preprocessing, augment, class_names, seed)
        self.folder, self.shards = _shards(Path(root), split)
        if not self.shards:
            raise FileNotFoundError(f"no shards in {shown(self.folder)}: files ending in {SUFFIX} are read")
        self.by_folder = False
        index = Index("shards", self.folder)
        records = [index.record(os.path.realpath(path), functools.partial(_listed, path)) for path in self.shards]
        counts = [len(record["starts"]) for record in records]
        index.save(sum(counts))
        if not sum(counts):
            raise FileNotFoundError(f"no images in the shards of {shown(self.folder)}: members are named as 0001.jpg")
        _warn(self.folder, self.shards, records)
        # of every image: its shard, and where it lies there
        self._shard = np.repeat(np.arange(len(records), dtype=np.int32), counts)
        self._starts, self._sizes = (
            np.concatenate([np.array(record[key], np.int64) for record in records]) for key in ("starts", "sizes")
        )
        self._states = [tuple(record["state"]) for record in records]
        names = None if class_names is None else [str(name) for name in class_names]
        numbers, self.class_names, self.labelled_by = self._labels(records, names) if labels else (None, names, None)
        parts = (part for path, record in zip(self.shards, records, strict=True) for part in _parts(path, record))
        self.samples = Samples(parts, np.full(sum(counts), -1) if numbers is None else numbers)

    def _labels(self, records: Sequence[dict[str, Any]], given: list[str] | None):
        """The label of every image, class names, and what labels were read from; None without any label."""
        bad = next((record["bad"] for record in records if record["bad"]), None)
        if bad:
            raise ValueError(f"{bad}: leave the labels out (labels=False), or correct it")
        texts = [text for record in records for text in record["labels"].split("\n")[: len(record["starts"])]]
        found = {text for text in texts if text}
        if not found:
            return None, given, None
        try:
            numbers, names = number_names(found, given, "label")
        except ValueError as error:
            raise ValueError(f"shards of {shown(self.folder)}: {error}") from error
        if "" in texts:
            without = texts.count("")
            path = Path(self.shards[self._shard[texts.index("")]])
            warnings.warn(
                f"{without} of {len(texts)} images have no label: the first of them is in {shown(path)}", stacklevel=4
            )
        labels = [numbers[text] if text else -1 for text in texts]
        return labels, names or given, "names" if names else "numbers"

    def _open(self, place: int, path: Path) -> Image.Image:
        return open_image(path, self.resize, self._content(place, path))

    def _content(self, place: int, path: Path) -> bytes:
        """The bytes of a member. Its shard is opened anew each time: no process shares a file's position."""
        shard, start, size = self.shards[self._shard[place]], int(self._starts[place]), int(self._sizes[place])
        try:
            with open(shard, "rb", buffering=0) as file:
                about = os.fstat(file.fileno())
                if (about.st_size, about.st_mtime_ns) != self._states[self._shard[place]]:
                    raise ImageReadError(f"cannot read image {shown(path)}: its shard has changed since it was listed")
                content = os.pread(file.fileno(), size, start)
        except OSError as error:
            raise ImageReadError(f"cannot read image {shown(path)}: {error.strerror or error}") from error
        if len(content) < size:
            raise ImageReadError(f"cannot read image {shown(path)}: its shard is cut off")
        return content

    def _marks(self, places: Sequence[int], content: bool) -> Iterable[bytes]:
        for place in places:
            if not content:
                yield f"{self._sizes[place]};".encode()
                continue
            try:
                yield hashlib.sha256(self._content(place, self.samples[place][0])).digest()
            except ImageReadError:
                yield b"unreadable"


@checked
def images_in(
    root: str | os.PathLike,
    labels: bool = True,
    split: str | None = None,
    masks: str | os.PathLike | None = None,
    **options: Any,
) -> ImageFolder | Shards:
    """The images of a folder, whatever it holds.

    Returns:
        `Shards` of .tar files, where there are neither images nor folders beside them, else an `ImageFolder`; with
        ``options``, which are those of both.
    """
    root = Path(root)
    if not _holds_shards(root, split):
        return ImageFolder(root, labels=None if labels else False, split=split, masks=masks, **options)
    if masks is not None:
        raise ValueError(f"{shown(root)} holds shards, for which no masks are read: unpack them")
    return Shards(root, labels=labels, split=split, **options)


def _holds_shards(root: Path, split: str | None) -> bool:
    if not root.is_dir():
        return False
    named = split is not None and not (root / split).is_dir()
    folder = root if named or _only_shards(root) else split_folder(root, split)
    return _only_shards(folder)


def _only_shards(folder: Path) -> bool:
    entries = entries_of(folder)
    others = (entry for entry in entries if is_folder(entry) or entry.name.lower().endswith(SUFFIXES))
    return any(entry.name.lower().endswith(SUFFIX) for entry in entries) and not any(others)


def _shards(root: Path, split: str | None) -> tuple[Path, list[Path]]:
    """The folder of the shards, and which they are."""
    shards = _tars(root) if root.is_dir() else []
    if not shards or (split is not None and (root / split).is_dir()):
        folder = split_folder(root, split)
        return folder, _tars(folder)
    splits = sorted({word for path in shards for word in _words(path)} & SPLITS)
    if split is None and len(splits) > 1:
        raise ValueError(f"{shown(root)} holds shards of {' and '.join(splits)}: pass split={splits[0]!r} or another")
    chosen = [path for path in shards if split is None or split in _words(path)]
    if not chosen:
        raise FileNotFoundError(f"no split {split!r} in {shown(root)}: there is no such folder, nor shard of that name")
    return root, chosen


def _words(path: Path) -> list[str]:
    return re.split(r"[^a-z]+", path.stem.lower())


def _tars(folder: Path) -> list[Path]:
    """The shards right in a folder."""
    return [
        folder / entry.name
        for entry in entries_of(folder)
        if entry.name.lower().endswith(SUFFIX) and not is_folder(entry)
    ]


def _listed(path: Path) -> dict[str, Any]:
    """What is known of a shard: JSON types.

    Keys: names, joined by newlines; starts and sizes of the images in bytes; labels, joined by newlines; left, how many
    members were left out; first, which and why; bad, what is wrong with a label; state, size and time of the file.
    """
    if not path.is_file():
        raise ImageReadError(f"cannot read shard {shown(path)}: it is not a file")
    try:
        with open(path, "rb", buffering=0) as file:
            return _read(file.fileno(), path)
    except OSError as error:
        raise ImageReadError(f"cannot read shard {shown(path)}: {error.strerror or error}") from error
    except TarError as error:
        raise ImageReadError(f"cannot read shard {shown(path)}: {error}") from error


def _read(descriptor: int, path: Path) -> dict[str, Any]:
    about = os.fstat(descriptor)
    images: dict[str, tuple[str, Member]] = {}
    notes: dict[str, dict[str, Member]] = {}
    left: list[str] = []
    for member in members(descriptor):
        if member.kind == "a folder":
            continue
        name, why = _proper(member)
        if why:
            left.append(f"{shown(member.name)} ({why})")
            continue
        if any(part.startswith(".") for part in name.split("/")):
            continue
        folder, base = posixpath.split(name)
        stem, _, kind = base.partition(".")
        key, kind = posixpath.join(folder, stem), kind.lower()
        if kind in IMAGES:
            if key in images:
                raise TarError(f"{shown(key)} has two images, {shown(images[key][0])} and {shown(name)}: leave one")
            images[key] = name, member
        elif kind in LABELS:
            notes.setdefault(key, {})[kind] = member
    labels, bad = [], ""
    for key in images:
        try:
            labels.append(_label(descriptor, notes.get(key, {})))
        except ValueError as error:
            bad = bad or f"{shown(path)}: {shown(key)}: {error}"
            labels.append("")
    return {
        "names": "\n".join(name for name, _ in images.values()),
        "starts": [member.start for _, member in images.values()],
        "sizes": [member.size for _, member in images.values()],
        "labels": "\n".join(labels),
        "left": len(left),
        "first": left[0] if left else "",
        "bad": bad,
        "state": [about.st_size, about.st_mtime_ns],
    }


def _proper(member: Member) -> tuple[str, str]:
    """The name of a member made plain, and why it is left out."""
    name = member.name
    if member.kind != "a file":
        return name, f"it is {member.kind}"
    if name.startswith("/"):
        return name, "its name is absolute"
    if ".." in name.split("/"):
        return name, "its name leads out of the shard"
    if not name or len(name) > LONGEST_NAME or any(ord(letter) < 32 or letter == "\x7f" for letter in name):
        return name, "it has no proper name"
    if member.size > LARGEST:
        return name, f"it has {member.size} bytes; at most {LARGEST} are read"
    return posixpath.normpath(name), ""


def _label(descriptor: int, notes: dict[str, Member]) -> str:
    """The label as written, "" where there is none; ValueError for what is no label."""
    kind = next((kind for kind in LABELS if kind in notes), None)
    if kind is None:
        return ""
    member = notes[kind]
    if member.size > LARGEST_LABEL:
        raise ValueError(f"its .{kind} has {member.size} bytes; at most {LARGEST_LABEL} are read as a label")
    try:
        text = os.pread(descriptor, member.size, member.start).decode("utf-8").strip()
        if kind == "json":
            about = json.loads(text)
            value = next((about[name] for name in IN_JSON if name in about), "") if isinstance(about, dict) else about
            if isinstance(value, bool) or not isinstance(value, (str, int, float)):
                raise ValueError
            text = str(value).strip()
    except (ValueError, RecursionError):
        raise ValueError(f"its .{kind} cannot be read as a label") from None
    if len(text) > LONGEST_LABEL or not text.isprintable():
        raise ValueError(f"its .{kind} is not a label of one line with at most {LONGEST_LABEL} characters")
    return text


def _parts(path: Path, record: dict[str, Any]) -> Iterable[tuple[str, str]]:
    """(folder, names joined by "/") of the images of a shard, as `Samples` takes them."""
    if not record["starts"]:
        return
    names = record["names"]
    if "/" not in names:
        yield str(path), names.replace("\n", "/")
        return
    for name in names.split("\n"):
        folder, base = posixpath.split(name)
        yield os.path.join(path, folder) if folder else str(path), base


def _warn(folder: Path, shards: Sequence[Path], records: Sequence[dict[str, Any]]) -> None:
    """One warning of members that were left out, and one of shards that are links out of the folder."""
    left = sum(record["left"] for record in records)
    if left:
        path, record = next((path, record) for path, record in zip(shards, records, strict=True) if record["left"])
        warnings.warn(
            f"members of shards left out: {left}; the first, of {shown(path)}, is {record['first']}", stacklevel=3
        )
    top = os.path.join(os.path.realpath(folder), "")
    reals = [os.path.realpath(path) for path in shards]
    outside = [
        Group(str(folder), path.name, real, link=True)
        for path, real in zip(shards, reals, strict=True)
        if not real.startswith(top)
    ]
    warn_of_links(folder, outside, "shards")
