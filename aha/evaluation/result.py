"""What an evaluation has measured: per image, in the mean, with intervals, side by side."""

from __future__ import annotations

import functools
import importlib.metadata
import json
import math
import os
import platform
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import bootstrap
from .._version import __version__
from ..files import write_columns, write_json
from ..metrics import Protocol, catalog
from .records import Key, Records, Series

SECONDS = "seconds_per_image"
FORWARD, BACKWARD = "forward_per_image", "backward_per_image"
PEAK = "peak_bytes_per_image"
HEADLINE = "ins_minus_del"  # the metric that methods are ordered by
IMAGES = "images"


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
        name: as in summaries, e.g. "deletion" for the first protocol, "rise/deletion" for another.
        metric: its key in `aha.metrics.catalog`.
        protocol: that measured it.
        references: names of the references it is averaged over.
    """

    name: str
    metric: str
    protocol: str
    references: tuple[str, ...] = ()


@dataclass
class Evaluation:
    """What `evaluate` measured of one classifier and one kind of target.

    Attributes:
        records: the table of all numbers. Costs (seconds, forward and backward passes through the classifier, peak
            memory of one image) are metrics without a protocol. NaN where an image does not take part, e.g. because its
            mask is empty or missing.
        images: one row per image that could be used, as equally long columns: index (into the data), path, label,
            predicted, target, confidence (of the target in the unperturbed image).
        curves: method → reference → curve → (S,), those that the first protocol's metrics draw (`Metric.curves`): the
            means over images at evenly spaced fractions of `Protocol.span`.
        failures: what could not be computed.
        classifier: its name, its accuracy on the labelled images (None without labels), the number of images.
        protocols: the settings behind the metrics, the first one's metrics carry no prefix.
        target: "predicted" or "true", the class that was explained.
        seed: of the choice of images and of the bootstrap.
        device: where it ran.
        prepared: protocol → how its images were resized and cropped, where that is known.
    """

    records: Records
    images: dict[str, list]
    curves: dict[str, dict[str, dict[str, Tensor]]]
    failures: list[Failure]
    classifier: dict[str, Any]
    protocols: list[Protocol]
    target: str
    seed: int
    device: str
    prepared: Mapping[str, str] = field(default_factory=dict)

    @functools.cached_property
    def methods(self) -> list[str]:
        """Names of the methods that were measured on at least one image."""
        return list(dict.fromkeys(key.method for key in self.records))

    @functools.cached_property
    def columns(self) -> list[Column]:
        """The metrics of all protocols, in their order; localisation has names of its own and needs no prefix."""
        keys = dict.fromkeys((key.protocol, key.metric, key.reference) for key in self.records)
        found = []
        for i, protocol in enumerate(self.protocols):
            prefix = "" if i == 0 or protocol.name == "localisation" else f"{protocol.name}/"
            for metric in protocol.metrics:
                references = tuple(r for of, name, r in keys if r and (of, name) == (protocol.name, metric))
                found.append(Column(f"{prefix}{metric}", metric, protocol.name, references))
        return found

    @functools.cached_property
    def _named(self) -> dict[str, Column]:
        """Name → metric or cost."""
        costs = {key.metric: Column(key.metric, key.metric, "") for key in self.records if not key.protocol}
        return {**costs, **{column.name: column for column in self.columns}}

    @functools.cached_property
    def _columns(self) -> dict[str, Column]:
        return {
            column.name: column
            for column in self.columns
            if any(np.isfinite(self.records[self._key(method, column)].values).any() for method in self.methods)
        }

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics that any image has; localisation only where masks exist."""
        return list(self._columns)

    @property
    def unmeasured(self) -> list[str]:
        """Names of the protocols that no image has a value of: none takes part, or there are no masks."""
        measured = {key.protocol for key, series in self.records.items() if np.isfinite(series.values).any()}
        return [protocol.name for protocol in self.protocols if protocol.name not in measured]

    @property
    def headline(self) -> str:
        """The metric that methods are ordered by: insertion − deletion, or the first of the first protocol."""
        return HEADLINE if HEADLINE in self._columns else self.metrics[0]

    def _key(self, method: str, column: Column, reference: str = "") -> Key:
        return Key(self.classifier["name"], self.target, method, column.protocol, reference, column.metric)

    def series(self, method: str, metric: str, reference: str = "") -> Series:
        """A metric or cost of a method image by image, by one ``reference`` or in the mean of them."""
        if method not in self.methods:
            raise ValueError(f"method {method!r} was not measured: choose one of {', '.join(self.methods)}")
        if metric not in self._named:
            raise ValueError(f"metric {metric!r} is not known: choose one of {', '.join(self.metrics)}")
        return self.records[self._key(method, self._named[metric], reference)]

    def values(self, method: str, metric: str, reference: str = "") -> dict[int, float]:
        """Image index → value of `series`, finite values only."""
        return self.series(method, metric, reference).known()

    def _finite(self, method: str, metric: str, reference: str = "") -> Series:
        """What `values` holds, as arrays: a tenth of the memory."""
        series = self.series(method, metric, reference)
        finite = np.isfinite(series.values)
        return Series(series.images[finite], series.values[finite])

    def _mean(self, method: str, metric: str, reference: str = "") -> float | None:
        return _mean(self._finite(method, metric, reference).values)

    def _means(self, method: str) -> dict[str, float | None]:
        means = {metric: self._mean(method, metric) for metric in self.metrics}
        means[SECONDS] = statistics.median(self._finite(method, SECONDS).values.tolist())
        for name in (FORWARD, BACKWARD, PEAK):
            if name in self._named and (mean := self._mean(method, name)) is not None:
                means[name] = mean
        return means

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
                    mean = self._mean(method, column.name, reference)
                    references.setdefault(reference, {}).setdefault(method, {})[column.name] = mean
        settings = [protocol_settings(protocol) for protocol in self.protocols]
        for setting in settings:
            setting["preprocessing"] = self.prepared.get(setting["name"], "as the data set gives the images")
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
        drawn = self._drawn({metric: self._finite(method, metric) for metric in self.metrics})
        return {
            metric: bootstrap.percentiles(means)[0] if means is not None else None for metric, means in drawn.items()
        }

    def _drawn(self, columns: Mapping[str, Series]) -> dict[str, Tensor | None]:
        """Name → (R, 1) bootstrap means of its values, None without any; those of the same images come together."""
        groups: dict[bytes, list[str]] = {}
        for name, series in columns.items():
            groups.setdefault(series.images.tobytes(), []).append(name)
        found: dict[str, Tensor | None] = dict.fromkeys(columns)
        for images, names in groups.items():
            if images:
                table = torch.from_numpy(np.stack([columns[name].values for name in names])).T
                found.update(zip(names, bootstrap.resampled(table, self.seed).split(1, dim=1), strict=True))
        return found

    def _differences(self, pairs: Mapping[str, tuple[Series, Series]]) -> dict[str, dict]:
        """Name → paired bootstrap of first − second over the images that both have; names without any are left out."""
        columns = {}
        for name, (first, second) in pairs.items():
            images, rows, others = np.intersect1d(first.images, second.images, return_indices=True)
            columns[name] = Series(images, first.values[rows] - second.values[others])
        return {
            name: {
                "difference": _mean(columns[name].values),
                "ci95": bootstrap.percentiles(means)[0],
                "p": bootstrap.two_sided(means[:, 0]),
            }
            for name, means in self._drawn(columns).items()
            if means is not None
        }

    def compare(self, a: str, b: str, metric: str) -> dict[str, Any]:
        """Paired bootstrap over the images that both methods were measured on.

        Returns:
            "difference": mean of ``a`` − ``b``; "ci95": its 95 % percentile interval; "p": two-sided, twice
            the share of resamples on the other side of zero (at least 2/(resamples + 1)).
        """
        found = self._differences({"": (self._finite(a, metric), self._finite(b, metric))})
        if not found:
            raise ValueError(f"{a} and {b} have no image with {metric} in common")
        return found[""]

    def best(self, metric: str) -> str | None:
        """The method with the best mean of ``metric``; None where no method has it."""
        sign = 1 if catalog.get(metric).higher_is_better else -1
        means = {method: self._mean(method, metric) for method in self.methods}
        known = {method: sign * mean for method, mean in means.items() if mean is not None}
        return max(known, key=known.__getitem__, default=None)

    def against_best(self, metric: str) -> dict[str, dict[str, Any]]:
        """Method → its `compare` with the best method as "best", p corrected for the number of methods (Holm)."""
        best = self.best(metric)
        if best is None:
            return {}
        of_best = self._finite(best, metric)
        found = self._differences({m: (self._finite(m, metric), of_best) for m in self.methods if m != best})
        corrected = bootstrap.holm({method: outcome["p"] for method, outcome in found.items()})
        return {method: {"best": best, **outcome, "p": corrected[method]} for method, outcome in found.items()}

    def write(self, folder: str | os.PathLike) -> None:
        """Write scores and images (.parquet, or .csv without pyarrow) and summary.json into ``folder``, each completely
        or not at all."""
        folder = Path(folder)
        self.records.write(folder)
        write_columns(self.images, folder / IMAGES)
        write_summary(self.summary(), folder)

    def extend(self, other: Evaluation) -> None:
        """Join what was measured of the same classifier and target with other protocols on otherwise cropped images;
        the costs, curves and facts stay those of the first."""
        for key, series in other.records.items():
            if key.protocol:
                self.records.add(key, *series)
        self.protocols += other.protocols
        self.failures += [failure for failure in other.failures if failure not in self.failures]
        self.prepared = {**self.prepared, **other.prepared}

    def failure_lines(self) -> Iterator[str]:
        """What could not be computed, one line each."""
        for failure in self.failures:
            what = "not used" if failure.method is None else f"{failure.method} failed on"
            yield f"{what} {len(failure.images)} image{'s' * (len(failure.images) != 1)}: {failure.reason}"


def write_summary(summary: Mapping[str, Any], folder: Path) -> Path:
    """Write ``folder``/summary.json with its checksum, completely or not at all."""
    json.dumps(summary, allow_nan=False)  # NaN is no JSON
    write_json(folder / "summary.json", summary)
    return folder / "summary.json"


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


def _mean(values: np.ndarray) -> float | None:
    return math.fsum(values) / len(values) if len(values) else None
