"""The engine behind `evaluate` and `compare`: methods × metrics on one classifier, batch by batch.

Everything is computed in batches that are fixed beforehand and kept as pieces of a store, so the numbers depend
neither on the number of processes nor on whether a run was interrupted.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..attributors import count_passes
from ..checks import NotFiniteError, check_images, check_integer, check_item, check_label, check_maps
from ..classifier import Classifier, check_classifier
from ..data import label_note
from ..memory import peak_bytes
from ..metrics import Endpoints, Scores, Suite
from ..store import Arrays, Memory, Store, pack_maps, unpack_maps
from .records import Key, Records
from .result import BACKWARD, FORWARD, SECONDS, Evaluation, Failure
from .result import PEAK as PEAK_BYTES

TARGETS = ("predicted", "true")
MAPS, COST, IMAGES, PEAK = "maps", "cost", "images", "peak"
FAILURES = "failures"
# the arrays of a piece of scores: columns of the values per image, and of the curves
_SCORES = ("reference", "metric", "value")
_CURVES = ("curve_reference", "curve", "sum", "count")

Method = Callable[[Tensor, Tensor], Tensor]
# told the classifier, how many maps it is measured with, the method at work, and how many of its maps are done more
Progress = Callable[[str, int, str, int], None]


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: in the table.
        key: of its pieces in the store; differs where the settings differ.
        method: an `Attributor` or any callable (images (B,C,H,W), target (B,)) → maps (B,1,H,W).
    """

    name: str
    key: str
    method: Method


class Engine:
    """Measures rows on the images of ``data`` that ``indices`` name.

    Args:
        clf: the classifier; images are moved to its device.
        rows: the methods.
        data: items {"image", "label", optional "mask", optional "path"} as for `evaluate`.
        indices: the images, in ascending order.
        target: one of `TARGETS`.
        suites: key → the metrics; the first one's names carry no prefix.
        batch_size: images at a time.
        store: where pieces are kept.
        rank, world: this process takes every ``world``-th batch.
        memory: measure the memory that one image takes, once per row, before its first batch.
    """

    def __init__(
        self,
        clf: Classifier,
        rows: Sequence[Row],
        data: Any,
        indices: Sequence[int],
        target: str,
        suites: Mapping[str, Suite],
        batch_size: int = 32,
        store: Store | None = None,
        rank: int = 0,
        world: int = 1,
        memory: bool = False,
    ):
        if target not in TARGETS:
            raise ValueError(f"target={target!r} is not known: choose one of {', '.join(TARGETS)}")
        check_classifier(clf)
        if not rows:
            raise ValueError("no methods are given: give at least one, name → callable")
        batch_size = check_integer("batch_size", batch_size, 1)
        self.clf, self.rows, self.data, self.target, self.suites = clf, list(rows), data, target, dict(suites)
        self.batches = [list(indices[start : start + batch_size]) for start in range(0, len(indices), batch_size)]
        self.store: Store = Memory() if store is None else store
        self.rank, self.world, self.memory = rank, world, memory
        self._failures: dict[tuple[str | None, str], list[int]] = {}

    def run(self, announce: Callable[[str, int], None] = lambda method, images: None) -> None:
        """Make the pieces of this process that the store lacks; ``announce(method, images)`` as they are done."""
        for number in self._own:
            self._batch(number, announce)
        failed = {
            "method": np.array([method or "" for method, _ in self._failures], dtype=str),
            "reason": np.array([reason for _, reason in self._failures], dtype=str),
            "images": np.array([" ".join(map(str, images)) for images in self._failures.values()], dtype=str),
        }
        self.store.put((FAILURES, f"{self.rank}"), failed)

    @property
    def _own(self) -> range:
        return range(self.rank, len(self.batches), self.world)

    @property
    def own_batches(self) -> list[list[int]]:
        """Indices of the images of the batches that are this process's."""
        return [self.batches[number] for number in self._own]

    def maps(self, row: str, indices: Sequence[int]) -> Tensor | None:
        """Kept maps (N, 1, H, W) of a row for images of the data set; None where any is missing."""
        key = next(r.key for r in self.rows if r.name == row)
        found: dict[int, Tensor] = {}
        for number, batch in enumerate(self.batches):
            if not set(batch) & set(indices):
                continue
            kept, facts = self.store.get((key, MAPS, f"{number:06d}")), self.store.get((IMAGES, f"{number:06d}"))
            if kept is not None and facts is not None:
                found.update(zip(facts["index"].tolist(), unpack_maps(kept), strict=True))
        return torch.stack([found[i] for i in indices]) if set(indices) <= found.keys() else None

    def _missing(self, number: int) -> dict[Row, list[str]]:
        """Rows whose pieces of a batch the store lacks → keys of the suites to measure."""
        batch = f"{number:06d}"
        todo = {row: [key for key in self.suites if not self.store.has((row.key, key, batch))] for row in self.rows}
        return {row: keys for row, keys in todo.items() if keys or not self.store.has((row.key, COST, batch))}

    def _batch(self, number: int, announce: Callable[[str, int], None]) -> None:
        batch, indices, todo = f"{number:06d}", self.batches[number], self._missing(number)
        known = self.store.get((IMAGES, batch))
        # where an image could not be read, it is tried again
        whole = known is not None and len(known["index"]) == len(indices)
        items = [] if whole and not todo else self._load(indices)
        for row in self.rows:
            if row not in todo or not items:
                announce(row.name, len(indices))
        unchanged = known is not None and known["index"].tolist() == [item["index"] for item in items]
        if not items or (unchanged and not todo):
            return
        shared = self._shared(items)
        if shared is None:
            return
        facts = shared.facts
        if known is not None and known["index"].tolist() != facts["index"].tolist():
            known, todo = None, {row: list(self.suites) for row in self.rows}
        if known is None:
            self.store.put((IMAGES, batch), facts)
        for row, suites in todo.items():
            announce(row.name, 0)
            try:
                self._measure(row, batch, shared, suites, again=known is None)
            except Exception as error:  # a method may raise anything; the others go on
                self._fail(row.name, facts["index"].tolist(), error)
            announce(row.name, len(indices))

    def _shared(self, items: list[dict[str, Any]]) -> _Shared | None:
        """What the methods share on the images that the classifier has answers for; the others are failures."""
        while items:
            shared = _Shared(self, items)
            try:
                _ = shared.facts
            except NotFiniteError as error:
                self._fail(None, [items[row]["index"] for row in error.rows], error)
                items = [item for row, item in enumerate(items) if row not in error.rows]
            except Exception as error:  # whatever the classifier raises: the other batches may do
                self._fail(None, [item["index"] for item in items], error)
                return None
            else:
                return shared
        return None

    def _load(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = []
        for index in indices:
            try:
                item = self._checked(self.data[index], index)
                if items and item["image"].shape != items[0]["image"].shape:
                    shapes = tuple(item["image"].shape), tuple(items[0]["image"].shape)
                    raise ValueError(f"image has shape {shapes[0]} in a batch of {shapes[1]}: give images of one size")
                items.append(item)
            except Exception as error:  # a damaged file costs that image, not the evaluation
                self._fail(None, [index], error)
        return items

    def _checked(self, item: Mapping[str, Any], index: int) -> dict[str, Any]:
        item = check_item(item)
        image, label, mask = item["image"], check_label(item.get("label", -1), self.clf.num_classes), item.get("mask")
        check_images(image[None] if isinstance(image, Tensor) else image, len(self.clf.mean))
        if self.target == "true" and label < 0:
            raise ValueError(f"label {label} is not one of the classes 0 … {self.clf.num_classes - 1}")
        if mask is None:
            mask = torch.zeros(1, *image.shape[1:], dtype=torch.bool)
        elif mask.numel() != image[0].numel():
            raise ValueError(f"mask has shape {tuple(mask.shape)}: give (1, {image.shape[1]}, {image.shape[2]})")
        mask = mask.reshape(1, *image.shape[1:]).bool()
        return {"index": index, "image": image, "label": label, "mask": mask, "path": _printable(item.get("path", ""))}

    def _measure(self, row: Row, batch: str, shared: _Shared, suites: Sequence[str], again: bool) -> None:
        """Scores of one row; ``again`` does not trust kept maps, which may be of fewer images."""
        images, target = shared.images, shared.target
        kept = self.store.get((row.key, MAPS, batch)) if self.store.keeps_maps and not again else None
        cost: Arrays | None = self.store.get((row.key, COST, batch))
        if kept is not None and cost is not None:
            maps = unpack_maps(kept, images.device)
        else:
            if self.memory and not self.store.has((row.key, PEAK)):
                peak = peak_bytes(lambda: row.method(images[:1].clone(), target[:1].clone()), images.device)
                self.store.put((row.key, PEAK), {"bytes": np.array(peak)})
            with count_passes(self.clf) as passes:
                # copies: a method that works in place must not change what the others see
                own = images.clone(), target.clone()
                started = _clock(images.device)
                maps = row.method(*own)
                seconds = _clock(images.device) - started
            maps = check_maps(maps, images)[:, None]
            if self.store.keeps_maps:
                packed = pack_maps(maps)
                # what is measured is what is kept: a run that was interrupted gives the same numbers
                maps = unpack_maps(packed, images.device)
            per_image = {SECONDS: seconds, FORWARD: passes.forward, BACKWARD: passes.backward}
            cost = {name: np.full(len(images), value / len(images)) for name, value in per_image.items()}
        measured = {key: _piece(self.suites[key].measure(shared.begin(key), maps)) for key in suites}
        # nothing is stored before everything is measured: a batch counts for all metrics or for none
        if self.store.keeps_maps and kept is None:
            self.store.put((row.key, MAPS, batch), packed)
        for key, arrays in measured.items():
            self.store.put((row.key, key, batch), arrays)
        self.store.put((row.key, COST, batch), cost)

    def _fail(self, method: str | None, indices: list[int], error: Exception) -> None:
        # a position in the batch says nothing to who reads the report
        error = ValueError(error.plain) if isinstance(error, NotFiniteError) else error
        line = next((line for line in str(error).splitlines() if line.strip()), "").strip()
        reason = line if isinstance(error, ValueError) and line else f"{type(error).__name__}: {line}".rstrip(": ")
        self._failures.setdefault((method, reason), []).extend(indices)

    def result(self, seed: int, prepared: str | None = None) -> Evaluation:
        """What the store holds, once all processes have run; ``prepared``: how the images were resized and cropped.

        Raises:
            ValueError: if no image could be measured by any method.
        """
        failures = self._all_failures()
        names = [f"{number:06d}" for number in range(len(self.batches))]
        facts = {batch: piece for batch in names if (piece := self.store.get((IMAGES, batch))) is not None}
        left_out = self._left_out(facts.values())
        records = Records()
        curves: dict[str, dict[str, dict[str, Tensor]]] = {}
        for row in self.rows:
            total = _Curves()
            of = functools.partial(Key, self.clf.name, self.target, row.name)
            for batch, about in facts.items():
                index = about["index"]
                scores = [self.store.get((row.key, key, batch)) for key in self.suites]
                cost = self.store.get((row.key, COST, batch))
                complete = [piece for piece in scores if piece is not None]
                if cost is None or len(complete) < len(scores):
                    continue
                for suite, piece in zip(self.suites.values(), complete, strict=True):
                    protocol = suite.protocol.name
                    for reference, metric, values in zip(*(piece[name] for name in _SCORES), strict=True):
                        measured = np.where(np.isin(index, left_out[protocol]), math.nan, values)
                        records.add(of(protocol, str(reference), str(metric)), index, measured)
                for metric, values in cost.items():
                    records.add(of("", "", metric), index, values)
                total.add(complete[0])
            if total.sums:
                curves[row.name] = total.means()
            peak, images = self.store.get((row.key, PEAK)), records[of("", "", SECONDS)].images
            if peak is not None and len(images):
                records.add(of("", "", PEAK_BYTES), images[:1], peak["bytes"].reshape(1))
        if not records:
            reasons = "; ".join(f"{f.method or 'images'}: {f.reason}" for f in failures) or "the data set is empty"
            raise ValueError(f"nothing could be measured ({reasons})")
        pieces = list(facts.values())
        about = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
        labelled = int((about["label"] >= 0).sum())
        classifier = {
            "accuracy": int((about["predicted"] == about["label"]).sum()) / labelled if labelled else None,
            "name": self.clf.name,
            "images": len(about["label"]),
        }
        if (note := label_note(self.data)) is not None:
            classifier["labels"] = note
        protocols = [suite.protocol for suite in self.suites.values()]
        return Evaluation(
            records,
            {name: column.tolist() for name, column in about.items()},
            curves,
            failures,
            classifier,
            protocols,
            self.target,
            seed,
            _describe(self.clf.device),
            {protocol.name: prepared for protocol in protocols if prepared},
        )

    def _left_out(self, facts: Iterable[Arrays]) -> dict[str, list[int]]:
        """Protocol → images beyond its number per class, which only the whole data set can tell."""
        facts = list(facts)
        found: dict[str, list[int]] = {}
        for suite in self.suites.values():
            protocol = suite.protocol
            found[protocol.name] = []
            if protocol.per_class is not None and facts:
                index, *about = (
                    torch.from_numpy(np.concatenate([piece[name] for piece in facts]))
                    for name in ("index", "label", "predicted", "confidence")
                )
                found[protocol.name] = index[~protocol.select(*about)].tolist()
        return found

    def _all_failures(self) -> list[Failure]:
        found: dict[tuple[str | None, str], list[int]] = {}
        for rank in range(self.world):
            piece = self.store.get((FAILURES, f"{rank}"))
            if piece is not None:
                for method, reason, images in zip(piece["method"], piece["reason"], piece["images"], strict=True):
                    key = (str(method) or None, str(reason))
                    found.setdefault(key, []).extend(map(int, str(images).split()))
        return [Failure(method, tuple(sorted(images)), reason) for (method, reason), images in found.items()]


class _Shared:
    """What the methods share on one batch of images; a suite's part is made when it is first needed."""

    def __init__(self, engine: Engine, items: Sequence[Mapping[str, Any]]):
        clf, self._suites = engine.clf, engine.suites
        self.images = torch.stack([item["image"] for item in items]).to(clf.device)
        self.labels = torch.tensor([item["label"] for item in items]).to(clf.device)
        self.masks = torch.stack([item["mask"] for item in items]).to(clf.device)
        self._classes = None if engine.target == "predicted" else self.labels
        self._items = items
        self._begun: dict[str, Endpoints] = {}

    @functools.cached_property
    def target(self) -> Tensor:
        return self.begin(next(iter(self._suites))).target

    def begin(self, key: str) -> Endpoints:
        if key not in self._begun:
            classes = self.target if self._begun else self._classes
            self._begun[key] = self._suites[key].begin(self.images, classes, self.labels, self.masks)
        return self._begun[key]

    @functools.cached_property
    def facts(self) -> dict[str, np.ndarray]:
        first = self.begin(next(iter(self._suites)))
        return {
            "index": np.array([item["index"] for item in self._items]),
            "path": np.array([item["path"] for item in self._items], dtype=str),
            "label": self.labels.numpy(force=True),
            "predicted": first.predicted.numpy(force=True),
            "target": first.target.numpy(force=True),
            "confidence": first.confidence.double().numpy(force=True),
        }


class _Curves:
    """Means of curves over all images, from sums per batch."""

    def __init__(self) -> None:
        self.sums: dict[tuple[str, str], list[np.ndarray]] = {}
        self.counts: dict[tuple[str, str], float] = {}

    def add(self, piece: Arrays) -> None:
        for reference, name, total, count in zip(*(piece[part] for part in _CURVES), strict=True):
            key = str(reference), str(name)
            self.sums.setdefault(key, []).append(total)
            self.counts[key] = self.counts.get(key, 0.0) + float(count)

    def means(self) -> dict[str, dict[str, Tensor]]:
        found: dict[str, dict[str, Tensor]] = {}
        for (reference, name), sums in self.sums.items():
            if count := self.counts[reference, name]:
                # an exact sum: it does not depend on how the images were batched
                total = [math.fsum(values) / count for values in zip(*sums, strict=True)]
                found.setdefault(reference, {})[name] = torch.tensor(total, dtype=torch.float32)
        return found


def _piece(scores: Scores) -> Arrays:
    """A suite's scores as a piece of the store: values per image; of curves the sum over images and their number."""
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


def announcing(progress: Progress | None, *engines: Engine) -> Callable[[str, int], None]:
    """Whom `Engine.run` of each of ``engines``, of one classifier, tells of its work; nobody where ``progress`` is None
    or False. ValueError if it cannot be called."""
    if not progress or not engines:
        return lambda method, images: None
    if not callable(progress):
        raise ValueError(f"progress={progress!r}: give a function, such as a bar of aha.terminal.progress(), or None")
    maps = sum(sum(map(len, engine.own_batches)) * len(engine.rows) for engine in engines)
    return functools.partial(progress, engines[0].clf.name, maps)


def _printable(path: Any) -> str:
    """A path as text that any file can hold: bytes that no encoding knows are escaped."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _describe(device: torch.device) -> str:
    return f"{device}: {torch.cuda.get_device_name(device)}" if device.type == "cuda" else str(device)
