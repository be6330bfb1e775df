"""The pieces of one classifier and one kind of target: what they are called, what must be in them, what follows.

None of this needs the classifier, so a comparison of many holds one at a time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import identity
from ..data import label_note
from ..metrics import Protocol, Scores
from ..store import Arrays, Store, unpack_maps
from .records import Key, Records
from .result import BACKWARD, FORWARD, SECONDS, Evaluation, Failure
from .result import PEAK as PEAK_BYTES

MAPS, COST, IMAGES, PEAK, FAILURES = "maps", "cost", "images", "peak", "failures"
LOST = "its piece is missing or damaged: run again"
COSTS = (SECONDS, FORWARD, BACKWARD)
# the arrays of a piece of scores: columns of the values per image, and of the curves
_SCORES = ("reference", "metric", "value")
_CURVES = ("curve_reference", "curve", "sum", "count")

Reasons = dict[tuple[str, str], list[int]]  # key of the row ("" where it is the image itself), reason → images


@dataclass
class Pieces:
    """What a store holds of one classifier and one kind of target; a piece that is not as it must be counts as missing.

    Pieces of a row are named after the images they are of, so that those of more or fewer images are never taken for
    them.

    Attributes:
        store: where they are.
        classifier: its name.
        class_names: of the classifier, where it has them.
        classes: their number.
        target: "predicted" or "true".
        rows: name → key of the methods.
        protocols: key → what is measured; the first one's names carry no prefix.
        data: the images.
        batches: indices of the images of every batch.
        device: where the classifier runs.
    """

    store: Store
    classifier: str
    class_names: Sequence[str] | None
    classes: int
    target: str
    rows: Mapping[str, str]
    protocols: Mapping[str, Protocol]
    data: Any
    batches: Sequence[Sequence[int]]
    device: str

    def facts(self, number: int) -> Arrays | None:
        """The images of a batch that could be used, ``index`` among them."""
        return self._sound((IMAGES, f"{number:06d}"), functools.partial(_are_facts, self.batches[number], self.classes))

    def place(self, number: int, index: np.ndarray) -> str:
        """What the pieces of a batch are called where its images at ``index`` could be used."""
        whole = index.tolist() == list(self.batches[number])
        return f"{number:06d}" if whole else f"{number:06d}-{identity.of_settings(index.tolist())}"

    def maps_of(self, row: str, number: int, index: np.ndarray) -> Arrays | None:
        """Packed maps of a row (its key) for the images of a batch."""
        return self._sound((row, MAPS, self.place(number, index)), functools.partial(_are_maps, len(index)))

    def cost(self, row: str, number: int, index: np.ndarray) -> Arrays | None:
        """Seconds and passes per image."""
        return self._sound((row, COST, self.place(number, index)), functools.partial(_are_costs, len(index)))

    def scores(self, row: str, suite: str, number: int, index: np.ndarray) -> Arrays | None:
        """What `scored` made of a suite's scores."""
        fits = functools.partial(_are_scores, self.protocols[suite].metrics, len(index))
        return self._sound((row, suite, self.place(number, index)), fits)

    def peak(self, row: str) -> Arrays | None:
        """Bytes at the peak of explaining one image."""
        return self._sound((row, PEAK), _is_peak)

    def reasons(self, number: int) -> Reasons:
        """Why something of a batch is missing, as it was last tried."""
        piece = self._sound((FAILURES, f"{number:06d}"), _are_failures)
        if piece is None:
            return {}
        rows = zip(piece["row"].tolist(), piece["reason"].tolist(), piece["images"].tolist(), strict=True)
        return {(row, reason): [int(image) for image in images.split()] for row, reason, images in rows}

    def _sound(self, key: tuple[str, ...], fits: Callable[[Arrays], bool]) -> Arrays | None:
        piece = self.store.get(key)
        return piece if piece is not None and fits(piece) else None

    def maps(self, row: str, indices: Sequence[int]) -> Tensor | None:
        """Kept maps (N, 1, H, W) of a row (its name) for images of the data set; None where any is missing."""
        found: dict[int, Tensor] = {}
        for number, batch in enumerate(self.batches):
            if not set(batch) & set(indices) or (facts := self.facts(number)) is None:
                continue
            if (kept := self.maps_of(self.rows[row], number, facts["index"])) is not None:
                found.update(zip(facts["index"].tolist(), unpack_maps(kept), strict=True))
        return torch.stack([found[i] for i in indices]) if set(indices) <= found.keys() else None

    def result(self, seed: int, prepared: str | None = None) -> Evaluation:
        """What the store holds, once all processes have run; ``prepared``: how the images were resized and cropped.

        Whatever it lacks is among the failures, with its images and, where one is known, the reason.

        Raises:
            ValueError: if no image could be measured by any method.
        """
        self.store.refresh()
        facts = {n: piece for n in range(len(self.batches)) if (piece := self.facts(n)) is not None}
        failures: dict[tuple[str | None, str], list[int]] = {}
        for number, batch in enumerate(self.batches):
            used = set(facts[number]["index"].tolist()) if number in facts else set()
            self._explain(failures, None, number, [image for image in batch if image not in used])
        left_out = self._left_out(facts.values())
        records = Records()
        curves: dict[str, dict[str, dict[str, Tensor]]] = {}
        for name, row in self.rows.items():
            found = _Row()
            for number, about in facts.items():
                index = about["index"]
                cost = self.cost(row, number, index)
                scores = {suite: self.scores(row, suite, number, index) for suite in self.protocols}
                complete = {suite: piece for suite, piece in scores.items() if piece is not None}
                if cost is None or len(complete) < len(scores):
                    self._explain(failures, name, number, index.tolist())
                    continue
                found.add(index, cost, {self.protocols[suite].name: piece for suite, piece in complete.items()})
            if not found.indices:
                continue
            key = functools.partial(Key, self.classifier, self.target, name)
            found.write(records, key, left_out)
            if found.curves.sums:
                curves[name] = found.curves.means()
            if (peak := self.peak(row)) is not None:
                records.add(key("", "", PEAK_BYTES), found.indices[0][:1], peak["bytes"].reshape(1))
        given = [Failure(method, tuple(sorted(images)), reason) for (method, reason), images in failures.items()]
        if not records:
            reasons = "; ".join(f"{f.method or 'images'}: {f.reason}" for f in given) or "the data set is empty"
            raise ValueError(f"nothing could be measured ({reasons})")
        pieces = list(facts.values())
        about = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
        labelled = int((about["label"] >= 0).sum())
        classifier = {
            "accuracy": int((about["predicted"] == about["label"]).sum()) / labelled if labelled else None,
            "name": self.classifier,
            "images": len(about["label"]),
        }
        if (note := label_note(self.data)) is not None:
            classifier["labels"] = note
        protocols = list(self.protocols.values())
        return Evaluation(
            records,
            {name: column.tolist() for name, column in about.items()},
            curves,
            given,
            classifier,
            protocols,
            self.target,
            seed,
            self.device,
            {protocol.name: prepared for protocol in protocols if prepared},
        )

    def _explain(
        self, failures: dict[tuple[str | None, str], list[int]], name: str | None, number: int, images: list[int]
    ) -> None:
        """Why a row, or where ``name`` is None the image itself, is missing for some images of a batch."""
        rest = set(images)
        if not rest:
            return
        row = "" if name is None else self.rows[name]
        for (of, reason), tried in self.reasons(number).items():
            if of == row and (explained := rest.intersection(tried)):
                failures.setdefault((name, reason), []).extend(explained)
                rest -= explained
        if rest:
            failures.setdefault((name, LOST), []).extend(rest)

    def _left_out(self, facts: Iterable[Arrays]) -> dict[str, list[int]]:
        """Protocol → images beyond its number per class, which only the whole data set can tell."""
        facts = list(facts)
        found: dict[str, list[int]] = {}
        for protocol in self.protocols.values():
            found[protocol.name] = []
            if protocol.per_class is not None and facts:
                index, *about = (
                    torch.from_numpy(np.concatenate([piece[name] for piece in facts]))
                    for name in ("index", "label", "predicted", "confidence")
                )
                found[protocol.name] = index[~protocol.select(*about)].tolist()
        return found


class _Row:
    """What was measured of one method, batch after batch."""

    def __init__(self) -> None:
        self.indices: list[np.ndarray] = []
        self.curves = _Curves()
        self._values: dict[tuple[str, str, str], list[tuple[int, np.ndarray]]] = {}

    def add(self, index: np.ndarray, cost: Arrays, scores: Mapping[str, Arrays]) -> None:
        """Append a batch; ``scores`` is protocol → its piece, the first one's with the curves."""
        batch = len(self.indices)
        self.indices.append(index)
        for protocol, piece in scores.items():
            for reference, metric, values in zip(*(piece[name] for name in _SCORES), strict=True):
                self._values.setdefault((protocol, str(reference), str(metric)), []).append((batch, values))
        for metric in COSTS:
            self._values.setdefault(("", "", metric), []).append((batch, cost[metric]))
        self.curves.add(next(iter(scores.values())))

    def write(self, records: Records, key: Callable[[str, str, str], Key], left_out: Mapping[str, list[int]]) -> None:
        """All numbers; those of images that a protocol leaves out are NaN."""
        everything = np.concatenate(self.indices)
        for (protocol, reference, metric), parts in self._values.items():
            values = np.concatenate([part for _, part in parts])
            # one array for all that have the same images
            index = everything
            if len(parts) < len(self.indices):
                index = np.concatenate([self.indices[batch] for batch, _ in parts])
            if out := left_out.get(protocol):
                values = np.where(np.isin(index, out), math.nan, values)
            records.add(key(protocol, reference, metric), index, values)


class _Curves:
    """Means of curves over all images, from sums per batch, always in the order of the batches."""

    def __init__(self) -> None:
        self.sums: dict[tuple[str, str], np.ndarray] = {}
        self.counts: dict[tuple[str, str], float] = {}

    def add(self, piece: Arrays) -> None:
        for reference, name, total, count in zip(*(piece[part] for part in _CURVES), strict=True):
            key = str(reference), str(name)
            self.sums[key] = self.sums.get(key, 0.0) + total
            self.counts[key] = self.counts.get(key, 0.0) + float(count)

    def means(self) -> dict[str, dict[str, Tensor]]:
        found: dict[str, dict[str, Tensor]] = {}
        for (reference, name), total in self.sums.items():
            if count := self.counts[reference, name]:
                found.setdefault(reference, {})[name] = torch.from_numpy(total / count).float()
        return found


def scored(scores: Scores) -> Arrays:
    """A suite's scores as a piece: values per image; of curves the sum over images and their number."""
    values = {("", name): value for name, value in scores.values.items()}
    values |= {(reference, name): v for reference, of in scores.by_reference.items() for name, v in of.items()}
    curves = {(reference, name): curve for reference, of in scores.curves.items() for name, curve in of.items()}
    taking_part = [curve.double()[torch.isfinite(curve).all(dim=1)] for curve in curves.values()]
    sums = [curve.sum(dim=0).numpy(force=True) for curve in taking_part]
    return {
        "reference": np.array([reference for reference, _ in values], dtype=str),
        "metric": np.array([name for _, name in values], dtype=str),
        "value": np.stack([value.double().numpy(force=True) for value in values.values()]),
        "curve_reference": np.array([reference for reference, _ in curves], dtype=str),
        "curve": np.array([name for _, name in curves], dtype=str),
        "sum": np.stack(sums) if sums else np.empty((0, 0)),
        "count": np.array([len(curve) for curve in taking_part], dtype=float),
    }


def failed(reasons: Reasons) -> Arrays:
    """Reasons as a piece."""
    return {
        "row": np.array([row for row, _ in reasons], dtype=str),
        "reason": np.array([reason for _, reason in reasons], dtype=str),
        "images": np.array([" ".join(map(str, images)) for images in reasons.values()], dtype=str),
    }


# what a piece must be, from kind and shape of its arrays to what would show in a table


def _like(piece: Arrays, **shapes: tuple[str, tuple[int | None, ...]]) -> bool:
    """Whether a piece has these arrays and no others: name → kind of its numbers, shape; None is any length."""

    def fits(array: np.ndarray, kind: str, shape: tuple[int | None, ...]) -> bool:
        sizes = len(array.shape) == len(shape) and all(
            want in (None, size) for size, want in zip(array.shape, shape, strict=True)
        )
        return sizes and (array.dtype.kind == kind if kind == "U" else array.dtype == kind)

    return piece.keys() == shapes.keys() and all(fits(piece[name], *of) for name, of in shapes.items())


def _length(piece: Arrays, name: str) -> int | None:
    return len(piece[name]) if name in piece and piece[name].ndim else None


def _are_facts(batch: Sequence[int], classes: int, piece: Arrays) -> bool:
    count = (_length(piece, "index"),)
    numbers = dict.fromkeys(("index", "label", "predicted", "target"), ("int64", count))
    if not _like(piece, path=("U", count), confidence=("float64", count), **numbers):
        return False
    index = piece["index"].tolist()
    known = set(index)
    inside = all(((piece[name] >= 0) & (piece[name] < classes)).all() for name in ("predicted", "target"))
    labels = ((piece["label"] >= -1) & (piece["label"] < classes)).all()
    return bool(index == [image for image in batch if image in known] and index and inside and labels)


def _are_maps(count: int, piece: Arrays) -> bool:
    shaped = _like(piece, maps=("float16", (count, 1, None, None)), scale=("float32", (count,)))
    return shaped and all(bool(np.isfinite(array).all()) for array in piece.values())


def _are_costs(count: int, piece: Arrays) -> bool:
    return _like(piece, **dict.fromkeys(COSTS, ("float64", (count,)))) and all(
        bool((np.isfinite(values) & (values >= 0)).all()) for values in piece.values()
    )


def _are_scores(metrics: Sequence[str], count: int, piece: Arrays) -> bool:
    rows, curves = _length(piece, "metric"), _length(piece, "curve")
    if not _like(
        piece,
        reference=("U", (rows,)),
        metric=("U", (rows,)),
        value=("float64", (rows, count)),
        curve_reference=("U", (curves,)),
        curve=("U", (curves,)),
        sum=("float64", (curves, None)),
        count=("float64", (curves,)),
    ):
        return False
    pairs = list(zip(piece["reference"].tolist(), piece["metric"].tolist(), strict=True))
    means = {metric for reference, metric in pairs if not reference}
    return means == set(metrics) and len(set(pairs)) == len(pairs)


def _is_peak(piece: Arrays) -> bool:
    return _like(piece, bytes=("float64", ()))


def _are_failures(piece: Arrays) -> bool:
    rows = (_length(piece, "row"),)
    return _like(piece, **dict.fromkeys(("row", "reason", "images"), ("U", rows))) and all(
        image.isdecimal() for images in piece["images"].tolist() for image in images.split()
    )
