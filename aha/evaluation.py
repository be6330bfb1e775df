"""Evaluation of attribution methods on a data set: every metric per image, with confidence intervals."""

from __future__ import annotations

import csv
import functools
import importlib.metadata
import io
import itertools
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from . import metrics
from ._version import __version__
from .classifier import Classifier
from .files import write_atomically
from .metrics import ConfidenceChange, DeletionInsertion, Endpoints, Localization, Protocol, protocols

TARGETS = ("predicted", "true")
RESAMPLES = 2000
SECONDS = "seconds_per_image"
FAITHFULNESS = (*DeletionInsertion.directions, *ConfidenceChange.directions)
LOCALIZATION = ("pointing_game", "iou", "map")
_HEADINGS = {
    "deletion": "Del",
    "insertion": "Ins",
    "ins_minus_del": "Ins−Del",
    "positive": "Pos",
    "negative": "Neg",
    "neg_minus_pos": "Neg−Pos",
    "adp": "ADP",
    "pic": "PIC",
    "pointing_game": "Pointing",
    "iou": "IoU",
    "map": "mAP",
    SECONDS: "s/image",
}
_PERCENT = ("adp", "pic")

Method = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Failure:
    """Something that could not be computed; all else was.

    Attributes:
        method: the method that raised, or None where the image itself could not be used.
        images: indices into the data set.
        reason: one line.
    """

    method: str | None
    images: tuple[int, ...]
    reason: str


@dataclass
class Evaluation:
    """What `evaluate` measured.

    Attributes:
        per_image: one row per image and method as equally long columns: method, index (into the data), path,
            label, predicted, target, confidence (of the target in the unperturbed image), all metrics (mean
            over the references), ``<reference>/<metric>``, seconds_per_image. NaN where a mask is empty or
            missing.
        curves: method → reference → "deletion" (↓), "insertion" (↑), "positive" (↓), "negative" (↑) → (S,),
            the means over images at evenly spaced fractions of [0, 1].
        failures: what could not be computed.
        classifier: its name, its accuracy on the labelled images (None without labels), and the number of
            images.
        protocol: of the curves.
        target: "predicted" or "true", the class that was explained.
        seed: of the choice of images and of the bootstrap.
        device: where it ran.
    """

    per_image: dict[str, list]
    curves: dict[str, dict[str, dict[str, Tensor]]]
    failures: list[Failure]
    classifier: dict[str, Any]
    protocol: Protocol
    target: str
    seed: int
    device: str

    @functools.cached_property
    def _rows(self) -> dict[str, range]:
        """Method → its rows of ``per_image``, which are contiguous."""
        names = self.per_image["method"]
        firsts = [i for i, name in enumerate(names) if i == 0 or name != names[i - 1]]
        return {names[i]: range(i, j) for i, j in itertools.pairwise([*firsts, len(names)])}

    @property
    def methods(self) -> list[str]:
        """Names of the methods that were measured on at least one image."""
        return list(self._rows)

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics; localisation only where masks exist."""
        located = any(not math.isnan(value) for value in self.per_image["iou"])
        return [*FAITHFULNESS, *(LOCALIZATION if located else ())]

    def values(self, method: str, column: str) -> dict[int, float]:
        """Image index → value of a numeric column of ``per_image``, finite values only."""
        if method not in self._rows:
            raise ValueError(f"method {method!r} was not measured: choose one of {', '.join(self.methods)}")
        if column not in self.per_image:
            raise ValueError(f"metric {column!r} is not known: choose one of {', '.join(self.metrics)}")
        index, values = self.per_image["index"], self.per_image[column]
        return {index[row]: values[row] for row in self._rows[method] if math.isfinite(values[row])}

    def _means(self, method: str) -> dict[str, float | None]:
        means = {metric: _mean(self.values(method, metric).values()) for metric in self.metrics}
        return {**means, SECONDS: statistics.median(self.values(method, SECONDS).values())}

    def summary(self) -> dict[str, Any]:
        """Means over images with 95 % bootstrap intervals, and everything needed to repeat them; JSON-ready.

        ``seconds_per_image`` is the median, which the first batch's warm-up does not move.
        """
        entries = {method: {**self._means(method), "ci95": self._intervals(method)} for method in self.methods}
        references = {
            reference: {
                method: {m: _mean(self.values(method, f"{reference}/{m}").values()) for m in FAITHFULNESS}
                for method in self.methods
            }
            for reference in self.protocol.references
        }
        return {
            "classifier": self.classifier,
            "methods": entries,
            "references": references,
            "protocol": {**asdict(self.protocol), "references": list(self.protocol.references)},
            "target": self.target,
            "seed": self.seed,
            "versions": versions(),
            "device": self.device,
            "failures": [{**asdict(failure), "images": list(failure.images)} for failure in self.failures],
        }

    def _intervals(self, method: str) -> dict[str, list[float] | None]:
        found: dict[str, list[float] | None] = dict.fromkeys(self.metrics)
        # localisation lacks the images with empty masks; within a group all columns have the same images
        for group in (FAITHFULNESS, LOCALIZATION):
            columns = {m: list(self.values(method, m).values()) for m in group if m in found}
            if columns and all(columns.values()):
                values = torch.tensor(list(columns.values()), dtype=torch.float64).T
                found.update(zip(columns, _percentiles(_resampled(values, self.seed)), strict=True))
        return found

    def compare(self, a: str, b: str, metric: str) -> dict[str, Any]:
        """Paired bootstrap over the images that both methods were measured on.

        Returns:
            "difference": mean of ``a`` − ``b``; "ci95": its 95 % percentile interval; "p": two-sided, twice
            the share of resamples on the other side of zero (at least 2/(resamples + 1)).
        """
        first, second = self.values(a, metric), self.values(b, metric)
        both = sorted(first.keys() & second.keys())
        if not both:
            raise ValueError(f"{a} and {b} have no image with {metric} in common")
        differences = torch.tensor([[first[i] - second[i]] for i in both], dtype=torch.float64)
        means = _resampled(differences, self.seed)
        below, above = (means <= 0).sum().item(), (means >= 0).sum().item()
        p = min(1.0, 2 * (min(below, above) + 1) / (len(means) + 1))
        return {"difference": differences.mean().item(), "ci95": _percentiles(means)[0], "p": p}

    def write(self, folder: str | os.PathLike) -> None:
        """Write ``per_image.csv`` and ``summary.json`` into ``folder``, each completely or not at all."""
        folder = Path(folder)
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerow(self.per_image)
        for row in zip(*self.per_image.values(), strict=True):
            writer.writerow(["" if isinstance(v, float) and math.isnan(v) else v for v in row])
        write_atomically(folder / "per_image.csv", text.getvalue().encode())
        summary = json.dumps(self.summary(), indent=2, ensure_ascii=False, allow_nan=False)
        write_atomically(folder / "summary.json", f"{summary}\n".encode())

    def table(self) -> Table:
        """One row per method, one column per metric with ↑ or ↓ for the better direction; the best is bold
        with a *."""
        info = self.classifier
        accuracy = "" if info["accuracy"] is None else f", accuracy {info['accuracy']:.3f} ↑"
        table = Table(
            title=f"{info['name']}: {info['images']} images, {self.target} class{accuracy}",
            caption="\n".join(str(line) for line in self._failure_lines()) or None,
        )
        table.add_column("method")
        entries = {method: self._means(method) for method in self.methods}
        columns = [*self.metrics, SECONDS]
        best = {}
        for column in columns:
            table.add_column(f"{_HEADINGS[column]} {metrics.arrow(column)}", justify="right")
            choose = max if metrics.arrow(column) == "↑" else min
            known = [value for entry in entries.values() if (value := entry[column]) is not None]
            best[column] = choose(known, default=None)
        for method, entry in entries.items():
            cells = []
            for column in columns:
                value = entry[column]
                text = "–" if value is None else f"{value:.{_digits(column)}f}"
                cells.append(f"[bold]{text}*[/bold]" if value is not None and value == best[column] else text)
            table.add_row(method, *cells)
        return table

    def _failure_lines(self) -> Iterator[str]:
        for failure in self.failures:
            what = "not used" if failure.method is None else f"{failure.method} failed on"
            yield f"{what} {len(failure.images)} image{'s' * (len(failure.images) != 1)}: {failure.reason}"


def evaluate(
    clf: Classifier,
    methods: Mapping[str, Method],
    data: torch.utils.data.Dataset,
    target: str = "predicted",
    protocol: str | Protocol = "aha",
    batch_size: int = 32,
    limit: int | None = None,
    seed: int = 0,
    progress: bool = True,
    internal_batch_size: int = metrics.curves.INTERNAL_BATCH_SIZE,
) -> Evaluation:
    """Measure attribution methods on the images of a data set.

    f(I) and f(I0) are computed once per batch, for all methods and metrics. A method that raises, or returns
    maps that are not finite or of the wrong shape, is recorded as failed for that batch; so is an image that
    cannot be read or does not keep the pixel contract. All else goes on.

    Args:
        clf: the classifier; images are moved to its device.
        methods: name → an `Attributor` or any callable (images (B,C,H,W), target (B,)) → maps (B,1,H,W).
        data: items {"image": (C,H,W) in [0,1], "label": int, −1 if unknown, optional "mask": (1,H,W) bool,
            optional "path"}.
        target: explain the "predicted" class, or the "true" one, the label.
        protocol: a preset's name or a `Protocol`.
        batch_size: images given to a method at once.
        limit: number of images, drawn at random with ``seed``; None is all.
        seed: of that draw and of the bootstrap. Methods have seeds of their own.
        progress: show a progress bar.
        internal_batch_size: perturbed images in one forward pass of the metrics.

    Raises:
        ValueError: for bad arguments, in one line, or if no image could be measured by any method.
    """
    if target not in TARGETS:
        raise ValueError(f"target={target!r} is not known: choose one of {', '.join(TARGETS)}")
    if not methods:
        raise ValueError("no methods are given: give at least one, name → callable")
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"batch_size={batch_size}, limit={limit}: give at least one image")
    run = _Run(clf, dict(methods), data, target, protocols.get(protocol), internal_batch_size)
    indices = _choose(len(data), limit, seed)  # type: ignore[arg-type]
    with Progress(disable=not progress) as bar:
        task = bar.add_task("evaluating", total=len(indices) * len(methods))

        def announce(method: str, finished: int) -> None:
            bar.update(task, description=f"evaluating {method}", advance=finished)

        for start in range(0, len(indices), batch_size):
            part = indices[start : start + batch_size]
            run.batch(part, announce)
            bar.update(task, completed=(start + len(part)) * len(methods))
    return run.result(seed)


class _Run:
    """The rows of an evaluation while it is being made."""

    def __init__(self, clf, methods, data, target, protocol, internal_batch_size):
        self.clf, self.methods, self.data = clf, methods, data
        self.target, self.protocol, self.internal_batch_size = target, protocol, internal_batch_size
        self.curves_metric = DeletionInsertion(clf, protocol, internal_batch_size)
        self.change_metric = ConfidenceChange(clf, protocol, internal_batch_size)
        self.blocks: dict[str, list[dict[str, list]]] = {method: [] for method in methods}
        self.curve_sums: dict[str, dict[str, dict[str, Tensor]]] = {method: {} for method in methods}
        self.failures: dict[tuple[str | None, str], list[int]] = {}
        self.labelled = self.right = self.images = 0

    def batch(self, indices: Sequence[int], announce: Callable[[str, int], None]) -> None:
        items = self._load(indices)
        if not items:
            return
        images = torch.stack([item["image"] for item in items]).to(self.clf.device)
        labels = torch.tensor([item["label"] for item in items])
        classes = None if self.target == "predicted" else labels
        try:
            ends = metrics.endpoints(self.clf, images, classes, self.protocol, self.internal_batch_size)
        except Exception as error:  # whatever the classifier raises: the other batches may do
            self._fail(None, [item["index"] for item in items], error)
            return
        predicted = ends.predicted.cpu()
        self.images += len(items)
        self.labelled += int((labels >= 0).sum())
        self.right += int((predicted == labels).sum())
        facts = {
            "index": [item["index"] for item in items],
            "path": [item["path"] for item in items],
            "label": labels.tolist(),
            "predicted": predicted.tolist(),
            "target": ends.target.tolist(),
            "confidence": ends.original.confidence.tolist(),
        }
        masks = torch.stack([item["mask"] for item in items]).to(self.clf.device)
        for name, method in self.methods.items():
            announce(name, 0)
            try:
                self._measure(name, method, images, masks, ends, facts)
            except Exception as error:  # a method may raise anything; the others go on
                self._fail(name, facts["index"], error)
            announce(name, len(items))

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
        image, label, mask = item["image"], int(item.get("label", -1)), item.get("mask")
        self.clf.check(image[None] if isinstance(image, Tensor) else image)
        if label >= self.clf.num_classes or (self.target == "true" and label < 0):
            raise ValueError(f"label {label} is not one of the classes 0 … {self.clf.num_classes - 1}")
        if mask is None:
            mask = torch.zeros(1, *image.shape[1:], dtype=torch.bool)
        elif mask.numel() != image[0].numel():
            raise ValueError(f"mask has shape {tuple(mask.shape)}: give (1, {image.shape[1]}, {image.shape[2]})")
        mask = mask.reshape(1, *image.shape[1:]).bool()
        return {
            "index": index,
            "image": image,
            "label": label,
            "mask": mask,
            "path": str(item.get("path", "")),
        }

    def _measure(self, name: str, method: Method, images: Tensor, masks: Tensor, ends: Endpoints, facts: dict) -> None:
        # copies: a method that works in place must not change what the others see
        own = images.clone(), ends.target.clone()
        started = _clock(images.device)
        maps = method(*own)
        seconds = (_clock(images.device) - started) / len(images)
        rows: dict[str, Any] = {}
        by_reference: dict[str, Any] = {}
        for metric in (self.curves_metric, self.change_metric):
            metric.reset()
            metric.update(images, maps, ends=ends)
            scores = metric.per_image()
            for reference, values in scores.pop("references").items():
                by_reference.update({f"{reference}/{key}": value for key, value in values.items()})
            rows.update(scores)
        localization = Localization()
        localization.update(maps, masks)
        located = localization.per_image()
        rows.update({key: located[key] for key in LOCALIZATION})
        # nothing is stored before everything is measured: a batch counts for all metrics or for none
        for reference, curves in self.curves_metric.curves().items():
            sums = self.curve_sums[name].setdefault(reference, {})
            for key, curve in curves.items():
                sums[key] = sums.get(key, 0) + curve.double().cpu() * len(images)
        numbers = {key: value.double().tolist() for key, value in {**rows, **by_reference}.items()}
        block = {"method": [name] * len(images), **facts, **numbers, SECONDS: [seconds] * len(images)}
        self.blocks[name].append(block)

    def _fail(self, method: str | None, indices: list[int], error: Exception) -> None:
        line = next((line for line in str(error).splitlines() if line.strip()), "").strip()
        reason = line if isinstance(error, ValueError) and line else f"{type(error).__name__}: {line}".rstrip(": ")
        self.failures.setdefault((method, reason), []).extend(indices)

    def result(self, seed: int) -> Evaluation:
        failures = [Failure(method, tuple(indices), reason) for (method, reason), indices in self.failures.items()]
        blocks = [block for method in self.methods for block in self.blocks[method]]
        if not blocks:
            reasons = "; ".join(f"{f.method or 'images'}: {f.reason}" for f in failures) or "the data set is empty"
            raise ValueError(f"nothing could be measured ({reasons})")
        per_image = {key: [value for block in blocks for value in block[key]] for key in blocks[0]}
        curves = {}
        for method, sums in self.curve_sums.items():
            count = sum(len(block["index"]) for block in self.blocks[method])
            if count:
                curves[method] = {
                    reference: {key: (total / count).float() for key, total in named.items()}
                    for reference, named in sums.items()
                }
        classifier = {
            "accuracy": self.right / self.labelled if self.labelled else None,
            "name": self.clf.name,
            "images": self.images,
        }
        device = _describe(self.clf.device)
        return Evaluation(per_image, curves, failures, classifier, self.protocol, self.target, seed, device)


def versions() -> dict[str, str]:
    """Versions of what decides the numbers: Python, aha, and the packages that are installed."""
    found = {"python": platform.python_version(), "aha": __version__}
    for package in ("torch", "torchvision", "timm", "transformers", "torchmetrics", "captum", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _choose(size: int, limit: int | None, seed: int) -> list[int]:
    """Indices in ascending order. Random, because folders are sorted by class: the first few would be of
    one."""
    if limit is None or limit >= size:
        return list(range(size))
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(size, generator=generator)[:limit].sort().values.tolist()


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _describe(device: torch.device) -> str:
    return f"{device}: {torch.cuda.get_device_name(device)}" if device.type == "cuda" else str(device)


def _digits(column: str) -> int:
    return 2 if column in _PERCENT else 4


def _mean(values: Collection[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _resampled(values: Tensor, seed: int) -> Tensor:
    """(N, M) columns → (RESAMPLES, M) bootstrap means; the same images are drawn for all columns."""
    count = len(values)
    generator = torch.Generator().manual_seed(seed)
    means = []
    # in parts: what is drawn never takes more than some ten megabytes
    step = max(1, 2**20 // count)
    for start in range(0, RESAMPLES, step):
        drawn = torch.randint(count, (min(step, RESAMPLES - start), count), generator=generator)
        times = values.new_zeros(drawn.shape).scatter_add_(1, drawn, values.new_ones(()).expand(drawn.shape))
        means.append(times @ values / count)
    return torch.cat(means)


def mean_interval(values: Tensor, seed: int) -> list[float]:
    """Bootstrap 95 % interval of the mean of ``values`` (N,)."""
    return _percentiles(_resampled(values.double()[:, None], seed))[0]


def _percentiles(means: Tensor) -> list[list[float]]:
    """(R, M) → the 95 % interval of each column."""
    return means.quantile(means.new_tensor([0.025, 0.975]), dim=0).T.tolist()
