"""What an evaluation has measured: per image, in the mean, with intervals, side by side."""

from __future__ import annotations

import functools
import importlib.metadata
import itertools
import json
import math
import os
import platform
import statistics
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from .._version import __version__
from ..files import write_atomically, write_csv
from ..metrics import Protocol
from . import bootstrap

SECONDS = "seconds_per_image"
FORWARD, BACKWARD = "forward_per_image", "backward_per_image"
PEAK = "peak_bytes_per_image"
HEADLINE = "ins_minus_del"
_LOCALISATION_SHOWN = ("pointing_game", "iou", "map")
_PERCENT = ("adp", "pic")
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


@dataclass(frozen=True)
class Column:
    """A metric of the table.

    Attributes:
        name: as in ``Evaluation.per_image``, e.g. "deletion" or "rise/deletion".
        protocol: that measured it.
        higher_is_better: its direction.
        references: names of the references it is averaged over, in ``per_image`` as "<reference>/<name>".
    """

    name: str
    protocol: str
    higher_is_better: bool
    references: tuple[str, ...] = ()


@dataclass
class Evaluation:
    """What `evaluate` measured.

    Attributes:
        per_image: one row per image and method as equally long columns: method, index (into the data), path,
            label, predicted, target, confidence (of the target in the unperturbed image), all metrics (mean
            over the references; those of further protocols as ``<protocol>/<metric>``), ``<reference>/<metric>``,
            seconds_per_image, forward_per_image and backward_per_image (passes through the classifier). NaN
            where an image does not take part, e.g. because its mask is empty or missing.
        columns: the metrics.
        curves: method → reference → "deletion" (↓), "insertion" (↑), "positive" (↓), "negative" (↑) → (S,),
            the means over images at evenly spaced fractions of [0, 1], of the first protocol.
        failures: what could not be computed.
        classifier: its name, its accuracy on the labelled images (None without labels), and the number of
            images.
        protocols: the settings behind the metrics, the first one's metrics carry no prefix.
        target: "predicted" or "true", the class that was explained.
        seed: of the choice of images and of the bootstrap.
        device: where it ran.
        peak_bytes: method → memory at the peak of explaining one image, where it was measured.
    """

    per_image: dict[str, list]
    columns: list[Column]
    curves: dict[str, dict[str, dict[str, Tensor]]]
    failures: list[Failure]
    classifier: dict[str, Any]
    protocols: list[Protocol]
    target: str
    seed: int
    device: str
    peak_bytes: dict[str, float] = field(default_factory=dict)

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

    @functools.cached_property
    def _columns(self) -> dict[str, Column]:
        return {
            column.name: column
            for column in self.columns
            if any(math.isfinite(value) for value in self.per_image[column.name])
        }

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics that any image has; localisation only where masks exist."""
        return list(self._columns)

    @property
    def headline(self) -> str:
        """The metric that methods are ordered by: insertion − deletion, or the first of the first protocol."""
        return HEADLINE if HEADLINE in self._columns else self.metrics[0]

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
        passes = {name: _mean(self.values(method, name).values()) for name in (FORWARD, BACKWARD)}
        peak = {PEAK: self.peak_bytes[method]} if math.isfinite(self.peak_bytes.get(method, math.nan)) else {}
        return {**means, SECONDS: statistics.median(self.values(method, SECONDS).values()), **passes, **peak}

    def summary(self) -> dict[str, Any]:
        """Means over images with 95 % bootstrap intervals, and everything needed to repeat them; JSON-ready.

        ``seconds_per_image`` is the median, which the first batch's warm-up does not move. ``significance`` holds
        for every metric the paired comparison of every method with the best one, p corrected for their number.
        """
        entries = {method: {**self._means(method), "ci95": self._intervals(method)} for method in self.methods}
        references: dict[str, dict[str, dict[str, float | None]]] = {}
        for column in self._columns.values():
            for reference in column.references:
                for method in self.methods:
                    mean = _mean(self.values(method, f"{reference}/{column.name}").values())
                    references.setdefault(reference, {}).setdefault(method, {})[column.name] = mean
        settings = [protocol_settings(protocol) for protocol in self.protocols]
        return {
            "classifier": self.classifier,
            "methods": entries,
            "references": references,
            "significance": {metric: self.against_best(metric) for metric in self.metrics},
            "protocol": settings[0],
            "protocols": settings[1:],
            "target": self.target,
            "seed": self.seed,
            "versions": versions(),
            "device": self.device,
            "failures": [{**asdict(failure), "images": list(failure.images)} for failure in self.failures],
        }

    def _intervals(self, method: str) -> dict[str, list[float] | None]:
        found: dict[str, list[float] | None] = dict.fromkeys(self.metrics)
        # metrics that the same images have are drawn together
        groups: dict[tuple[int, ...], dict[str, list[float]]] = {}
        for metric in self.metrics:
            values = self.values(method, metric)
            if values:
                groups.setdefault(tuple(values), {})[metric] = list(values.values())
        for columns in groups.values():
            table = torch.tensor(list(columns.values()), dtype=torch.float64).T
            found.update(zip(columns, bootstrap.percentiles(bootstrap.resampled(table, self.seed)), strict=True))
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
        means = bootstrap.resampled(differences, self.seed)
        return {
            "difference": differences.mean().item(),
            "ci95": bootstrap.percentiles(means)[0],
            "p": bootstrap.two_sided(means),
        }

    def best(self, metric: str) -> str | None:
        """The method with the best mean of ``metric``; None where no method has it."""
        sign = 1 if self._columns[metric].higher_is_better else -1
        means = {method: _mean(self.values(method, metric).values()) for method in self.methods}
        known = {method: sign * mean for method, mean in means.items() if mean is not None}
        return max(known, key=known.__getitem__, default=None)

    def against_best(self, metric: str) -> dict[str, dict[str, Any]]:
        """Method → its `compare` with the best method as "best", p corrected for the number of methods (Holm)."""
        best = self.best(metric)
        if best is None:
            return {}
        groups: dict[tuple[int, ...], dict[str, list[float]]] = {}
        of_best = self.values(best, metric)
        for method in self.methods:
            values = self.values(method, metric)
            both = tuple(index for index in values if index in of_best)
            if method != best and both:
                groups.setdefault(both, {})[method] = [values[index] - of_best[index] for index in both]
        found: dict[str, dict[str, Any]] = {}
        # methods that were measured on the same images are drawn together
        for columns in groups.values():
            table = torch.tensor(list(columns.values()), dtype=torch.float64).T
            means = bootstrap.resampled(table, self.seed)
            intervals = bootstrap.percentiles(means)
            for j, method in enumerate(columns):
                found[method] = {
                    "best": best,
                    "difference": table[:, j].mean().item(),
                    "ci95": intervals[j],
                    "p": bootstrap.two_sided(means[:, j]),
                }
        for method, p in bootstrap.holm({method: outcome["p"] for method, outcome in found.items()}).items():
            found[method]["p"] = p
        return found

    def write(self, folder: str | os.PathLike) -> None:
        """Write ``per_image.csv`` and ``summary.json`` into ``folder``, each completely or not at all."""
        folder = Path(folder)
        write_csv(self.per_image, folder / "per_image.csv")
        summary = json.dumps(self.summary(), indent=2, ensure_ascii=False, allow_nan=False)
        write_atomically(folder / "summary.json", f"{summary}\n".encode())

    def table(self) -> Table:
        """One row per method, one column per metric of the first protocol and localisation, with ↑ or ↓ for the
        better direction; the best is bold with a *."""
        info = self.classifier
        accuracy = "" if info["accuracy"] is None else f", accuracy {info['accuracy']:.3f} ↑"
        table = Table(
            title=f"{info['name']}: {info['images']} images, {self.target} class{accuracy}",
            caption="\n".join(self.failure_lines()) or None,
        )
        table.add_column("method")
        entries = {method: self._means(method) for method in self.methods}
        shown = {
            name: column.higher_is_better
            for name, column in self._columns.items()
            if column.protocol == self.protocols[0].name or name in _LOCALISATION_SHOWN
        }
        shown[SECONDS] = False
        best = {}
        for name, higher in shown.items():
            table.add_column(f"{_HEADINGS.get(name, name)} {'↑' if higher else '↓'}", justify="right")
            known = [value for entry in entries.values() if (value := entry[name]) is not None]
            best[name] = (max if higher else min)(known, default=None)
        for method, entry in entries.items():
            cells = []
            for name in shown:
                value = entry[name]
                text = "–" if value is None else f"{value:.{_digits(name)}f}"
                cells.append(f"[bold]{text}*[/bold]" if value is not None and value == best[name] else text)
            table.add_row(method, *cells)
        return table

    def failure_lines(self) -> Iterator[str]:
        """What could not be computed, one line each."""
        for failure in self.failures:
            what = "not used" if failure.method is None else f"{failure.method} failed on"
            yield f"{what} {len(failure.images)} image{'s' * (len(failure.images) != 1)}: {failure.reason}"


def protocol_settings(protocol: Protocol) -> dict[str, Any]:
    """The settings of a protocol that decide its numbers, JSON-ready."""
    settings = asdict(protocol)
    settings.pop("about")
    return {name: list(value) if isinstance(value, tuple) else value for name, value in settings.items()}


def versions() -> dict[str, str]:
    """Versions of what decides the numbers: Python, aha, and the packages that are installed."""
    found = {"python": platform.python_version(), "aha": __version__}
    for package in ("torch", "torchvision", "timm", "transformers", "torchmetrics", "captum", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _digits(column: str) -> int:
    return 2 if column in _PERCENT else 4


def _mean(values: Collection[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None
