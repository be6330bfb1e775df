"""Images below folders, found fast and held small: a million of them are a few arrays, not a million paths."""

from __future__ import annotations

import functools
import itertools
import os
import stat
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from aha.checks import checked
from aha.data.images import ImageReadError, shown
from aha.data.index import Index

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


class Samples(Sequence):
    """(path, label) of every image, as a list of pairs would give them.

    Processes that are forked share its memory, which a list's reference counts would have them copy.

    Attributes:
        folders: of the images, as text; what is before the name in a path.
        place: (N,) int32, which folder.
        labels: (N,) int64.

    Args:
        parts: (folder, names joined by "/") in order.
        labels: per image.
    """

    def __init__(self, parts: Iterable[tuple[str, str]], labels: Any):
        numbers: dict[str, int] = {}
        counts, places, encoded = [], [], []
        for folder, names in parts:
            if names:
                counts.append(names.count("/") + 1)
                places.append(numbers.setdefault(folder, len(numbers)))
                encoded.append(os.fsencode(names))
        self.folders = list(numbers)
        self.place = np.repeat(np.array(places, np.int32), counts)
        self._text = b"/".join([*encoded, b""])
        self._ends = np.flatnonzero(np.frombuffer(self._text, np.uint8) == ord("/"))
        self.labels = np.array(labels, np.int64)
        assert len(self.labels) == len(self._ends) == len(self.place)

    @classmethod
    def of(cls, pairs: Iterable[tuple[Path, int]]) -> Samples:
        """Of a list of pairs."""
        pairs = list(pairs)
        split = (os.path.split(path) for path, _ in pairs)
        parts = [(folder, "/".join(name for _, name in group)) for folder, group in itertools.groupby(split, _first)]
        return cls(parts, [label for _, label in pairs])

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        return Path(self.folders[self.place[place]], self.name(place)), int(self.labels[place])

    def name(self, place: int) -> str:
        """What comes after the folder in a path."""
        start = self._ends[place - 1] + 1 if place else 0
        return os.fsdecode(self._text[start : self._ends[place]])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def relabelled(self, numbers: Mapping[int, int]) -> Samples:
        """The same paths with label ``numbers[label]``; an unknown label, −1, stays."""
        other = object.__new__(Samples)
        other.__dict__.update(self.__dict__)
        labels, inverse = np.unique(self.labels, return_inverse=True)
        renumbered = [label if label < 0 else numbers[label] for label in labels.tolist()]
        other.labels = np.array(renumbered, np.int64)[inverse]
        return other


def _first(pair: tuple[str, str]) -> str:
    return pair[0]


class Group(NamedTuple):
    """Images of one folder that follow one another in the order of paths.

    Attributes:
        at: the folder's path, by which the images are reached.
        names: theirs, joined by "/".
        real: the folder's real path; of a link, the real path of what it leads to.
        link: whether this is one link.
    """

    at: str
    names: str
    real: str
    link: bool = False

    def reals(self) -> Iterator[str]:
        """The images' real paths."""
        return iter([self.real]) if self.link else (os.path.join(self.real, name) for name in self.names.split("/"))


class Found(NamedTuple):
    """The images below a folder.

    Attributes:
        groups: in the order of paths, each image once, where it comes first.
        again: (path, path where it came first) of those reached again.
    """

    groups: list[Group]
    again: list[tuple[Path, Path]]

    def paths(self) -> Iterator[Path]:
        """Of the images."""
        return (Path(group.at, name) for group in self.groups for name in group.names.split("/"))


@checked
def find_images(*paths: str | os.PathLike) -> list[Path]:
    """The image files below folders at any depth, sorted, hidden ones left out; a file is itself.

    A file or folder that is reached again through links counts once, where it comes first. Links to nothing are
    listed, so that whoever reads them can say so; a folder within that cannot be listed is left out with a warning, and
    one warning tells of links that lead out of a folder.

    Raises:
        FileNotFoundError: if nothing is at one of ``paths``, or no image is in it.
        ImageReadError: for a folder among them that cannot be listed.
    """
    found: dict[str, Path] = {}
    for given in paths:
        path = Path(given)
        if not os.path.lexists(path):
            raise FileNotFoundError(f"no such file or folder: {shown(path)}")
        if not path.is_dir():
            found.setdefault(os.path.realpath(path), path)
            continue
        below = images_below(path)
        if not below.groups:
            raise FileNotFoundError(nothing_in(path))
        reals = (real for group in below.groups for real in group.reals())
        for real, file in zip(reals, below.paths(), strict=True):
            found.setdefault(real, file)
    return list(found.values())


def nothing_in(folder: Path) -> str:
    """The message for a folder without images."""
    return f"no images in {shown(folder)}: files ending in {', '.join(SUFFIXES)}, or shards (.tar) alone, are read"


def images_below(folder: Path) -> Found:
    """The images below a folder: in those that have not changed since, as they were listed before.

    Warns once of links that lead out of the folder.
    """
    index = Index("folders", folder)
    groups = list(_walk(index, str(folder), os.path.realpath(folder)))
    found = _once(groups) if any(group.link for group in groups) else Found(groups, [])
    index.save(_count(found.groups))
    top = os.path.join(os.path.realpath(folder), "")
    warn_of_links(folder, [group for group in found.groups if not os.path.join(group.real, "").startswith(top)])
    return found


def _count(groups: Iterable[Group]) -> int:
    return sum(group.names.count("/") + 1 for group in groups)


def warn_of_links(folder: Path, outside: Sequence[Group], what: str = "images") -> None:
    """One warning of images, or of ``what``, that links out of the folder lead to."""
    if outside:
        first = outside[0]
        path = os.path.join(first.at, first.names.split("/")[0])
        warnings.warn(
            f"{shown(folder)}: links lead out of it to {_count(outside)} of its {what}; the first is {shown(path)}, "
            f"in fact {shown(next(first.reals()))}",
            stacklevel=4,
        )


def _walk(index: Index, top: str, real_top: str) -> Iterator[Group]:
    """Groups in the order of paths, every folder once; links may lead to images that are in other groups too."""
    seen = {real_top}
    # not by recursion: folders may be nested deeper than Python's stack
    open_folders = [(top, real_top, _ordered(index.record(real_top, functools.partial(_listed, top))))]
    while open_folders:
        at, real, entries = open_folders[-1]
        for kind, names in entries:
            if kind == "files":
                yield Group(at, names, real)
                continue
            path = os.path.join(at, names)
            target = os.path.realpath(path) if kind == "links" else os.path.join(real, names)
            if kind == "folders" or os.path.isdir(path):
                if target in seen:
                    continue
                seen.add(target)
                try:
                    record = index.record(target, functools.partial(_listed, path))
                except ImageReadError as error:
                    reason = getattr(error.__cause__, "strerror", error)
                    warnings.warn(f"cannot list folder {shown(path)} ({reason}): its images are left out", stacklevel=4)
                    continue
                open_folders.append((path, target, _ordered(record)))
                break
            if names.lower().endswith(SUFFIXES):
                yield Group(at, names, target, link=True)
        else:
            open_folders.pop()


def _ordered(record: dict[str, str]) -> Iterator[tuple[str, str]]:
    """(kind, name) of a folder's entries by name; files without another kind between them, joined by "/"."""
    others = [(name, kind) for kind in ("folders", "links") for name in record[kind].split("/") if name]
    if not others:
        return iter([("files", record["files"])] if record["files"] else [])
    files = [(name, "files") for name in record["files"].split("/") if name]
    runs = itertools.groupby(sorted(files + others), lambda entry: entry[1])
    joined = ((kind, [name for name, _ in run]) for kind, run in runs)
    return iter([(kind, text) for kind, names in joined for text in (["/".join(names)] if kind == "files" else names)])


def _listed(folder: str) -> dict[str, str]:
    """Names of a folder's images, folders and links, joined by "/"; without what is hidden.

    Where links lead is not kept, for that may change while the folder does not.
    """
    kinds: dict[str, list[str]] = {"files": [], "folders": [], "links": []}
    for entry in entries_of(folder):
        if entry.is_symlink():
            kinds["links"].append(entry.name)
        elif entry.is_dir(follow_symlinks=False):
            kinds["folders"].append(entry.name)
        elif entry.name.lower().endswith(SUFFIXES):
            kinds["files"].append(entry.name)
    return {kind: "/".join(names) for kind, names in kinds.items()}


def entries_of(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """What is in a folder and not hidden, sorted by name; ImageReadError where it cannot be listed."""
    try:
        with os.scandir(os.fspath(folder)) as entries:
            return sorted((entry for entry in entries if not entry.name.startswith(".")), key=lambda entry: entry.name)
    except OSError as error:
        raise ImageReadError(f"cannot list folder {shown(folder)}: {error.strerror or error}") from error


def is_folder(entry: os.DirEntry) -> bool:
    """Whether an entry is a folder, or a link to one."""
    try:
        return entry.is_dir()
    except OSError:  # links that lead round in a circle
        return False


def _once(groups: Sequence[Group]) -> Found:
    """Every image where it comes first, and those reached again."""
    found: dict[str, Path] = {}
    kept: list[Group] = []
    again: list[tuple[Path, Path]] = []
    for group in groups:
        names = []
        for name, real in zip(group.names.split("/"), group.reals(), strict=True):
            path = Path(group.at, name)
            first = found.setdefault(real, path)
            if first is path:
                names.append(name)
            else:
                again.append((path, first))
        if names:
            kept.append(group._replace(names="/".join(names)))
    return Found(kept, again)


def sizes_of(samples: Samples, folder: Path, places: Sequence[int]) -> np.ndarray:
    """(N,) int64, bytes of the files at ``places`` as their folders were first listed; −1 where there is none.

    A file that is written over in place keeps the size it had until something in its folder comes, goes or is renamed.
    """
    index = Index("folders", folder)
    sizes = np.full(len(samples), -1, np.int64)
    wanted = np.zeros(len(samples), bool)
    wanted[places] = True
    bounds = np.flatnonzero(np.diff(samples.place, prepend=-1, append=-1))
    for start, stop in itertools.pairwise(bounds.tolist()):
        asked = np.flatnonzero(wanted[start:stop]) + start
        if not len(asked):
            continue
        at = samples.folders[samples.place[start]]
        # for a few of many files, as of a part that is held out, not all of them
        known = _sizes_in(index, at, make=2 * len(asked) >= stop - start) if stop - start > 1 else {}
        for place in asked.tolist():
            name = samples.name(place)
            sizes[place] = known[name] if name in known else size_of(os.path.join(at, name))
    index.save(len(samples), whole=False)
    return sizes


def _sizes_in(index: Index, folder: str, make: bool) -> dict[str, int]:
    """Bytes of the images of a folder that are no links; none of them unless they are kept, or to ``make``."""
    real = os.path.realpath(folder)
    try:
        names = [name for name in index.record(real, functools.partial(_listed, folder))["files"].split("/") if name]
    except ImageReadError:
        return {}
    sizes = index.kept(real, "sizes")
    if sizes is None:
        if not make:
            return {}
        sizes = [size_of(os.path.join(real, name)) for name in names]
        index.extend(real, "sizes", sizes)
    return dict(zip(names, sizes, strict=True))


def size_of(path: str) -> int:
    """Bytes of a file; −1 where there is none."""
    try:
        about = os.stat(path)
    except OSError:
        return -1
    return about.st_size if stat.S_ISREG(about.st_mode) else -1
