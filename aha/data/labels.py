"""Labels: numbers in every spelling, names of classes, and the one place where both meet a classifier's classes."""

from __future__ import annotations

import copy
import csv
import io
import math
import re
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from aha.data.images import shown

Data = TypeVar("Data")

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(nan|inf|infinity)", re.IGNORECASE)
_WNID = re.compile(r"n\d{8}")
_PLACEHOLDER = re.compile(r"LABEL_\d+")  # transformers' names for classes that were given none
_DELIMITERS = ",;\t"
LARGEST = 1 << 30  # bytes of a labels file


def fit_labels(data: Data, clf: Any) -> Data:
    """The data set with labels in the classifier's numbering: where images with labels and a classifier join.

    Integer labels must be classes, or −1 for unknown. Names are looked for among the classifier's names of its
    classes (exactly, else without regard to case, blanks and underscores); WordNet ids are found in ImageNet's list,
    if the classifier has as many classes as one of its versions. As many names as the classifier has classes, and
    nothing known of those, are in label order, sorted or as ``class_names`` gave them. Whatever renumbers labels
    warns once.

    Args:
        data: an `ImageFolder`, or what wraps one and keeps it as ``data`` or ``dataset`` (`Part`, `Readable`,
            ``torch.utils.data.Subset``). Any other data set comes back as it is.
        clf: the classifier; its ``num_classes``, ``class_names`` and ``name`` are read.

    Returns:
        ``data`` itself where nothing changes, else a copy that shares the files.

    Raises:
        ValueError: in one line that says which labels are not classes, and what to do.
    """
    if isinstance(data, torch.utils.data.ConcatDataset):
        parts = [fit_labels(part, clf) for part in data.datasets]
        if all(a is b for a, b in zip(parts, data.datasets, strict=True)):
            return data
        return torch.utils.data.ConcatDataset(parts)  # type: ignore[return-value]
    if not hasattr(type(data), "relabelled"):
        for name in ("data", "dataset"):
            inner = getattr(data, "__dict__", {}).get(name)
            if isinstance(inner, torch.utils.data.Dataset):
                return _holding(data, name, fit_labels(inner, clf))
        return data
    folder: Any = data
    if folder.labelled_by is None:
        return data
    if folder.labelled_by == "numbers":
        # what was fitted before is in a classifier's numbering already
        numbers = None if getattr(folder, "label_note", None) else _numbered_classes(folder, clf)
        if numbers is None:
            _check_numbers(folder, clf)
            return data
        note = ""
        if any(old != new for old, new in numbers.items()):
            note = f"class folders are numbers, and so are the names of {clf.name}'s classes: labels are mapped by name"
    else:
        numbers, note = _numbers_of(folder, clf)
    if note:
        warnings.warn(note, stacklevel=2)
    if all(old == new for old, new in numbers.items()):
        return data
    fitted = folder.relabelled(numbers, clf.class_names)
    fitted.label_note = note
    return fitted


def _numbered_classes(folder: Any, clf: Any) -> dict[int, int] | None:
    """Number in a folder's name → class of that name, where the classifier's classes are named by numbers too.

    Their order need not be that of the numbers: who sorted the names as text has 0, 1, 10, 2, …
    """
    names = [str(name) for name in clf.class_names or ()]
    if not folder.by_folder or not names or not all(map(is_number, names)):
        return None
    try:
        places = {as_number(name): place for place, name in enumerate(names)}
    except ValueError:
        return None
    used = {*_used(folder)}
    return {label: places[label] for label in used} if used <= places.keys() and len(places) == len(names) else None


def label_note(data: Any) -> str | None:
    """What `fit_labels` had to say of a data set whose labels it renumbered, for reports."""
    while (note := getattr(data, "label_note", None)) is None:
        inner = next((vars(data)[name] for name in ("data", "dataset") if name in getattr(data, "__dict__", {})), None)
        if inner is None:
            return None
        data = inner
    return note


def _holding(wrapper: Any, name: str, inner: Any) -> Any:
    """The wrapper itself, or a copy around another data set."""
    if inner is vars(wrapper)[name]:
        return wrapper
    other = copy.copy(wrapper)
    setattr(other, name, inner)
    return other


def _check_numbers(folder: Any, clf: Any) -> None:
    used = _used(folder)
    wrong = [label for label in used if label >= clf.num_classes]
    if not wrong:
        return
    hint = " (they seem to count from 1)" if max(used) == clf.num_classes and 0 not in used else ""
    first = wrong[0]
    which = f"label {first} is" if len(wrong) == 1 else f"labels {some(wrong)} are"
    path, _ = folder.samples[int((folder.samples.labels == first).argmax())]
    raise ValueError(
        f"{which} not among the classes of {clf.name}, 0 … {clf.num_classes - 1}{hint}; {shown(path)} has {first}: "
        "correct them, or leave the labels out (labels=False)"
    )


def _used(folder: Any) -> list[int]:
    """The labels that images have, sorted, without −1."""
    labels = np.unique(folder.samples.labels)
    return labels[labels >= 0].tolist()


def _numbers_of(folder: Any, clf: Any) -> tuple[dict[int, int], str]:
    """Label in the folder → label in the classifier, for the labels that its images have, and what to say of it."""
    names: list[str] = list(folder.class_names)
    used = _used(folder)
    kind = "class folder" if folder.by_folder and not folder.names_given else "class name"
    classes = list(clf.class_names or ())
    found, how = _by_name([names[label] for label in used], classes), "name"
    if None in found and all(_PLACEHOLDER.fullmatch(str(name)) for name in classes):
        classes = []
        found = [None] * len(used)
    lost = [names[label] for label, number in zip(used, found, strict=True) if number is None]
    if lost and all(_WNID.fullmatch(names[label]) for label in used):
        known = _imagenet(clf.num_classes)
        if known:
            found, how = [known.get(names[label]) for label in used], "wnid"
            lost = [names[label] for label, number in zip(used, found, strict=True) if number is None]
    if lost and not classes and len(names) == clf.num_classes and how == "name":
        return {label: label for label in used}, ""
    if lost:
        some_of = f"{len(lost)} of {len(used)} {kind}s" if len(lost) < len(used) else _count(len(used), kind)
        twice = [name for name in lost if sum(name == other for other in classes) > 1]
        why = f" ({twice[0]} is the name of several)" if twice else ""
        raise ValueError(
            f"{some_of} ({some(lost)}) {'is not a class' if len(lost) == 1 else 'are not classes'} of {clf.name} "
            f"({clf.num_classes} classes){why}: give class_names, a labels.csv of numbers, or leave the labels out "
            "(labels=False)"
        )
    places: dict[int, str] = {}
    for label, number in zip(used, found, strict=True):
        other = places.setdefault(number, names[label])  # type: ignore[arg-type]
        if other != names[label]:
            raise ValueError(
                f"{kind}s {other} and {names[label]} are both class {number} of {clf.name}: merge them or rename one"
            )
    note = ""
    if len(used) < clf.num_classes:
        note = f"{_count(len(used), kind)}, the classifier has {clf.num_classes} classes: labels are mapped by {how}"
    elif any(label != number for label, number in zip(used, found, strict=True)):
        note = f"{kind}s are in another order than the classes: labels are mapped by {how}"
    return dict(zip(used, found, strict=True)), note  # type: ignore[arg-type]


def _imagenet(classes: int) -> dict[str, int]:
    """WordNet id → label of the version of ImageNet with as many classes; empty if there is none."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset({"num_classes": classes})
    if subset is None:
        return {}
    return {wnid: label for label, wnid in enumerate(ImageNetInfo(subset).label_names())}


def _by_name(names: Sequence[str], classes: Sequence[str]) -> list[int | None]:
    """The place of every name among those of the classes; None where there is none, or several."""
    exact, plain, loose = (_places(classes, spelling) for spelling in (str, spelled, _loosely))

    def place(name: str) -> int | None:
        for places, spelling in ((exact, str), (plain, spelled), (loose, _loosely)):
            found = places.get(spelling(name), ())
            if found:
                return found[0] if len(found) == 1 else None
        return None

    return [place(name) for name in names]


def _places(classes: Sequence[str], spelling: Callable[[str], str]) -> dict[str, list[int]]:
    places: dict[str, list[int]] = {}
    for label, name in enumerate(classes):
        places.setdefault(spelling(str(name)), []).append(label)
    return places


def spelled(name: str) -> str:
    """A name without blanks around it, in one of Unicode's spellings of accents."""
    return unicodedata.normalize("NFC", name.strip())


def _loosely(name: str) -> str:
    return re.sub(r"[\s_]+", "", unicodedata.normalize("NFKC", name).casefold())


def some(things: Sequence[Any], count: int = 3) -> str:
    """The first of several things, and a sign of more."""
    return ", ".join(map(shown, things[:count])) + (", …" if len(things) > count else "")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def is_number(text: str) -> bool:
    """Whether a label is written as a number, integer or not."""
    return _NUMBER.fullmatch(text.strip()) is not None


def as_number(text: str) -> int:
    """The integer from −1 to 2³¹ − 1 that a label spells: 7, 07, 7.0, 7e0; ValueError for another number."""
    text = text.strip()
    number = float(text)
    # below 2³¹ a float is exact: a class is written in whichever way
    if not math.isfinite(number) or number != int(number) or not -1 <= number < 2**31:
        raise ValueError(f"label {shown(text)!r} is not an integer from -1 to {2**31 - 1}")
    return int(number)


def number_names(
    names: Iterable[str], given: Sequence[str] | None, kind: str
) -> tuple[dict[str, int], list[str] | None]:
    """The label of each class name as written, and the names of the classes in label order (None for numbers).

    Args:
        names: as found, each once.
        given: names of all classes in label order; None to make them of what was found, sorted.
        kind: "class folder" or "label", for messages.

    Raises:
        ValueError: in one line, if ``given`` lacks one; for a number that is no label; for numbers and names mixed.
    """
    names = sorted(names)
    if given is not None:
        found = _by_name(names, given)
        lost = [name for name, label in zip(names, found, strict=True) if label is None]
        if not lost:
            return dict(zip(names, found, strict=True)), list(given)  # type: ignore[arg-type]
        twice = next((name for name in lost if list(given).count(name) > 1), None)
        if twice is not None:
            raise ValueError(
                f"{kind} {shown(twice)!r} is {list(given).count(twice)} of the class names given: give each once"
            )
        if not all(is_number(name) for name in names):
            raise ValueError(f"{kind} {shown(lost[0])!r} is not one of the {len(given)} class names given")
    numeric = [name for name in names if is_number(name)]
    if numeric and len(numeric) < len(names):
        other = next(name for name in names if not is_number(name))
        raise ValueError(
            f"{kind}s are both numbers and names ({shown(numeric[0])!r}, {shown(other)!r}): use one kind, or give "
            "class_names, the names of all classes in label order"
        )
    if numeric:
        labels = {name: as_number(name) for name in names}
        if given is not None and max(labels.values()) >= len(given):
            worst = max(labels, key=lambda name: labels[name])
            raise ValueError(
                f"{kind} {shown(worst)!r} is not one of the {len(given)} class names given or their numbers"
            )
        return labels, None
    classes = sorted({spelled(name) for name in names})
    place = {name: label for label, name in enumerate(classes)}
    return {name: place[spelled(name)] for name in names}, classes


def read_labels(file: Path) -> list[tuple[int, str, str]]:
    """(line, file, label) of a labels file: a table with columns ``file`` and ``label``, others ignored.

    Columns are separated by commas, semicolons or tabs; the encoding is UTF-8.

    Raises:
        FileNotFoundError: if it is missing or has no rows.
        ValueError: in one line, for anything else that is wrong with it.
    """
    if not file.is_file():
        raise FileNotFoundError(f"no such labels file: {shown(file)}")
    name = shown(file)
    try:
        size = file.stat().st_size
        if size > LARGEST:
            raise ValueError(f"{name} has {size} bytes; at most {LARGEST} are read as labels")
        text = file.read_bytes().decode("utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        reason = "it is not in UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise ValueError(f"{name} cannot be read ({reason}): save it as UTF-8") from error
    if "\0" in text:
        raise ValueError(f"{name} cannot be read (it is not in UTF-8): save it as UTF-8")
    try:
        delimiter = next((mark for mark in _DELIMITERS if {"file", "label"} <= set(_columns(text, mark))), ",")
        columns = _columns(text, delimiter)
    except csv.Error as error:
        raise ValueError(f"{name}, line 1: {error}") from error
    missing = [column for column in ("file", "label") if column not in columns]
    if missing:
        raise ValueError(f"{name} has no column {' or '.join(missing)}; its first line must name both")
    twice = [column for column in ("file", "label") if columns.count(column) > 1]
    if twice:
        raise ValueError(f"{name} has two columns {twice[0]}: leave one")
    name_at, label_at = columns.index("file"), columns.index("label")
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    listed = []
    try:
        next(rows)
        for row in rows:
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            where = f"{name}, line {rows.line_num}"
            if any(cells[len(columns) :]):
                raise ValueError(
                    f"{where}: has {len(cells)} cells, the first line names {len(columns)} columns: put what contains "
                    f"{delimiter!r} in quotes"
                )
            image, label = (cells[at] if at < len(cells) else "" for at in (name_at, label_at))
            if not image or not label:
                raise ValueError(
                    f"{where}: needs a file and a label (-1 for unknown), got {shown(image)!r} and {shown(label)!r}"
                )
            # where semicolons separate, commas are decimal points
            decimal = label.replace(",", ".") if delimiter != "," else label
            listed.append((rows.line_num, image, decimal if is_number(decimal) else label))
    except csv.Error as error:
        raise ValueError(f"{name}, line {rows.line_num}: {error}") from error
    if not listed:
        raise FileNotFoundError(f"no images in {name}: it has no rows")
    return listed


def _columns(text: str, delimiter: str) -> list[str]:
    first = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])
    return [name.strip().casefold() for name in first]
