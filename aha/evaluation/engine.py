"""The engine behind `evaluate` and `compare`: methods × metrics on one classifier, batch by batch.

Everything is computed in batches that are fixed beforehand and kept as pieces of a store, so the numbers depend
neither on the number of processes nor on whether a run was interrupted.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..attributors import count_passes
from ..checks import NotFiniteError, check_images, check_integer, check_item, check_label, check_maps
from ..classifier import Classifier, check_classifier
from ..memory import peak_bytes
from ..metrics import Endpoints, Suite
from ..store import Arrays, Key, Memory, Store, pack_maps, unpack_maps
from .pieces import COST, FAILURES, IMAGES, MAPS, PEAK, Pieces, Reasons, failed, scored
from .result import BACKWARD, FORWARD, SECONDS, Evaluation

TARGETS = ("predicted", "true")

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
        ahead: read the images of the next batch in a thread meanwhile.

    Attributes:
        pieces: what the store holds of it, which needs no classifier.
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
        ahead: bool = False,
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
        self.rank, self.world, self.memory, self.ahead = rank, world, memory, ahead
        self.pieces = Pieces(
            self.store,
            clf.name,
            clf.class_names,
            clf.num_classes,
            target,
            {row.name: row.key for row in rows},
            {key: suite.protocol for key, suite in suites.items()},
            data,
            self.batches,
            _describe(clf.device),
        )

    def run(self, announce: Callable[[str, int], None] = lambda method, images: None) -> None:
        """Make the pieces of this process that the store lacks; ``announce(method, images)`` as they are done."""
        for work in self._work():
            for row in self.rows:
                if row not in work.todo or not work.items:
                    announce(row.name, len(self.batches[work.number]))
            if work.items:
                self._measure_batch(work, announce)
            if work.reasons:
                self.store.put({(FAILURES, f"{work.number:06d}"): failed(work.reasons)})

    @property
    def _own(self) -> range:
        return range(self.rank, len(self.batches), self.world)

    @property
    def own_batches(self) -> list[list[int]]:
        """Indices of the images of the batches that are this process's."""
        return [self.batches[number] for number in self._own]

    def maps(self, row: str, indices: Sequence[int]) -> Tensor | None:
        """Kept maps (N, 1, H, W) of a row for images of the data set; None where any is missing."""
        return self.pieces.maps(row, indices)

    def result(self, seed: int, prepared: str | None = None) -> Evaluation:
        """What the store holds, see `Pieces.result`."""
        return self.pieces.result(seed, prepared)

    def _work(self) -> Iterator[_Work]:
        """What is to be done for every batch, its images read; those of one batch more, if ``ahead``."""
        with ThreadPoolExecutor(1) as reader:
            waiting: list[tuple[_Work, Future | None]] = []
            for number in self._own:
                work = self._planned(number)
                reading = reader.submit(self._load, work) if self.ahead and work.reads else None
                waiting.append((work, reading))
                while len(waiting) > (1 if self.ahead else 0):
                    yield self._ready(*waiting.pop(0))
            for last in waiting:
                yield self._ready(*last)

    def _ready(self, work: _Work, reading: Future | None) -> _Work:
        if reading is not None:
            reading.result()
        elif work.reads:
            self._load(work)
        read = [item["index"] for item in work.items]
        if not work.todo and work.facts is not None and work.facts["index"].tolist() == read:
            work.items = []  # what could not be read still cannot
        return work

    def _planned(self, number: int) -> _Work:
        facts = self.pieces.facts(number)
        todo = {row: list(self.suites) for row in self.rows}
        if facts is not None:
            missing = {row: self._missing(row, number, facts["index"]) for row in self.rows}
            todo = {row: suites for row, suites in missing.items() if suites is not None}
        # where an image could not be read, it is tried again
        whole = facts is not None and facts["index"].tolist() == self.batches[number]
        return _Work(number, facts, todo, reads=bool(todo) or not whole)

    def _missing(self, row: Row, number: int, index: np.ndarray) -> list[str] | None:
        """Keys of the suites to measure of a row and batch; None where the store lacks nothing."""
        cost = self.pieces.cost(row.key, number, index)
        if cost is None or (self.store.keeps_maps and self.pieces.maps_of(row.key, number, index) is None):
            return list(self.suites)  # of the maps that will be made
        suites = [key for key in self.suites if self.pieces.scores(row.key, key, number, index) is None]
        return suites if suites or self._lacks_peak(row, number) else None

    def _lacks_peak(self, row: Row, number: int) -> bool:
        return self.memory and number == 0 and self.pieces.peak(row.key) is None

    def _load(self, work: _Work) -> None:
        for index in self.batches[work.number]:
            try:
                item = self._checked(self.data[index], index)
                if work.items and item["image"].shape != (shape := work.items[0]["image"].shape):
                    shapes = tuple(item["image"].shape), tuple(shape)
                    raise ValueError(f"image has shape {shapes[0]} in a batch of {shapes[1]}: give images of one size")
                work.items.append(item)
            except Exception as error:  # a damaged file costs that image, not the evaluation
                work.fail(None, [index], error)

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

    def _measure_batch(self, work: _Work, announce: Callable[[str, int], None]) -> None:
        shared = self._shared(work)
        if shared is None:
            return
        index = shared.facts["index"]
        known = work.facts
        if known is None or known["index"].tolist() != index.tolist():
            self.store.put({(IMAGES, f"{work.number:06d}"): shared.facts})
            missing = {row: self._missing(row, work.number, index) for row in self.rows}
            work.todo = {row: suites for row, suites in missing.items() if suites is not None}
        for row, suites in work.todo.items():
            announce(row.name, 0)
            try:
                made = self._measure(row, work.number, shared, suites)
            except Exception as error:  # a method may raise anything; the others go on
                work.fail(row, index.tolist(), error)
            else:
                # together: a batch counts for all metrics or for none
                self.store.put(made)
            announce(row.name, len(self.batches[work.number]))

    def _shared(self, work: _Work) -> _Shared | None:
        """What the methods share on the images that the classifier has answers for; the others are failures."""
        items = work.items
        while items:
            shared = _Shared(self, items)
            try:
                _ = shared.facts
            except NotFiniteError as error:
                work.fail(None, [items[row]["index"] for row in error.rows], error)
                items = [item for row, item in enumerate(items) if row not in error.rows]
            except Exception as error:  # whatever the classifier raises: the other batches may do
                work.fail(None, [item["index"] for item in items], error)
                return None
            else:
                return shared
        return None

    def _measure(self, row: Row, number: int, shared: _Shared, suites: Sequence[str]) -> dict[Key, Arrays]:
        """The pieces of one row and batch that are missing, from the kept maps where there are any."""
        images, target, index = shared.images, shared.target, shared.facts["index"]
        place = self.pieces.place(number, index)
        kept = self.pieces.maps_of(row.key, number, index) if self.store.keeps_maps else None
        if kept is not None and kept["maps"].shape[2:] != images.shape[2:]:
            kept = None
        cost = self.pieces.cost(row.key, number, index)
        made: dict[Key, Arrays] = {}
        if self._lacks_peak(row, number):
            peak = peak_bytes(lambda: row.method(images[:1].clone(), target[:1].clone()), images.device)
            made[row.key, PEAK] = {"bytes": np.array(peak)}
        if kept is not None and cost is not None:
            maps = unpack_maps(kept, images.device)
        else:
            with count_passes(self.clf) as passes:
                # copies: a method that works in place must not change what the others see
                own = images.clone(), target.clone()
                started = _clock(images.device)
                maps = row.method(*own)
                seconds = _clock(images.device) - started
            maps = check_maps(maps, images)[:, None]
            if self.store.keeps_maps:
                made[row.key, MAPS, place] = packed = pack_maps(maps)
                # what is measured is what is kept: a run that was interrupted gives the same numbers
                maps = unpack_maps(packed, images.device)
            if cost is None:
                per_image = {SECONDS: seconds, FORWARD: passes.forward, BACKWARD: passes.backward}
                made[row.key, COST, place] = {n: np.full(len(images), v / len(images)) for n, v in per_image.items()}
        for key in suites:
            made[row.key, key, place] = scored(self.suites[key].measure(shared.begin(key), maps))
        return made


class _Work:
    """One batch: what is known of it, what is missing, its images once they are read, and what went wrong.

    Attributes:
        number: of the batch.
        facts: of its images, where the store has them.
        todo: rows that lack something → keys of the suites to measure.
        reads: whether the images are needed.
        items: of those that could be read.
        reasons: as a piece keeps them.
    """

    def __init__(self, number: int, facts: Arrays | None, todo: dict[Row, list[str]], reads: bool):
        self.number, self.facts, self.todo, self.reads = number, facts, todo, reads
        self.items: list[dict[str, Any]] = []
        self.reasons: Reasons = {}

    def fail(self, row: Row | None, indices: list[int], error: Exception) -> None:
        """Note why ``row``, or where it is None the images themselves, could not be had."""
        # a position in the batch says nothing to who reads the report
        error = ValueError(error.plain) if isinstance(error, NotFiniteError) else error
        line = next((line for line in str(error).splitlines() if line.strip()), "").strip()
        reason = line if isinstance(error, ValueError) and line else f"{type(error).__name__}: {line}".rstrip(": ")
        self.reasons.setdefault(("" if row is None else row.key, reason), []).extend(indices)


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
