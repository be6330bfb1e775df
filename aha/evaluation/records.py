"""The one table between measuring and showing: a row per number, with its image, method, protocol and reference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..checks import checked
from ..files import read_columns, write_parts
from ..kernels.messages import short

NAME = "scores"
AT_ONCE = 2**16  # rows that are written together


class Key(NamedTuple):
    """What a run of numbers is of.

    Attributes:
        classifier: its name.
        target: "predicted" or "true", the class that was explained.
        method: the row of the table.
        protocol: that measured it; "" for costs.
        reference: the reference image; "" for the mean over them, or where there are none.
        metric: a key of `aha.metrics.catalog`.
    """

    classifier: str
    target: str
    method: str
    protocol: str
    reference: str
    metric: str


class Series(NamedTuple):
    """Numbers of one key: ``images`` (N,) int64 places in the data set, ``values`` (N,) float64, NaN for "none"."""

    images: np.ndarray
    values: np.ndarray

    def known(self) -> dict[int, float]:
        """Image → value, finite values only."""
        finite = np.isfinite(self.values)
        return dict(zip(self.images[finite].tolist(), self.values[finite].tolist(), strict=True))


class Records:
    """The long table (classifier, target, method, protocol, reference, metric, image, value), by its keys."""

    def __init__(self) -> None:
        self._parts: dict[Key, list[Series]] = {}

    @checked
    def add(self, key: Key, images: Sequence[int] | np.ndarray, values: Sequence[float] | np.ndarray) -> None:
        """Append numbers of ``key``; ValueError unless there is one value per image."""
        try:
            part = Series(np.asarray(images, dtype=np.int64), np.asarray(values, dtype=np.float64))
        except (TypeError, ValueError, OverflowError, RuntimeError) as error:
            raise ValueError(f"images={short(images)}, values={short(values)}: give one value per image") from error
        if part.images.ndim != 1 or part.images.shape != part.values.shape:
            raise ValueError(f"images {part.images.shape}, values {part.values.shape}: give one value per image")
        self._parts.setdefault(key, []).append(part)

    @checked
    def extend(self, other: Records) -> None:
        """Append all of ``other``."""
        for key, series in other.items():
            self.add(key, *series)

    def __iter__(self) -> Iterator[Key]:
        return iter(self._parts)

    def __len__(self) -> int:
        return sum(len(series.images) for _, series in self.items())

    def items(self) -> Iterator[tuple[Key, Series]]:
        """Keys and their numbers, in the order in which the keys came."""
        return ((key, self[key]) for key in self._parts)

    def __getitem__(self, key: Key) -> Series:
        """Numbers of ``key`` in the order in which they came, none for an unknown one."""
        parts = self._parts.get(key)
        if not parts:
            return Series(np.empty(0, np.int64), np.empty(0))
        if len(parts) > 1:
            parts[:] = [Series(*map(np.concatenate, zip(*parts, strict=True)))]
        return parts[0]

    @checked
    def write(self, folder: str | Path) -> Path:
        """Write the table as ``folder``/scores.parquet, or scores.csv where pyarrow is missing; NaN is empty."""
        return write_parts(self._parts_of_table(), Path(folder) / NAME)

    def _parts_of_table(self) -> Iterator[dict[str, np.ndarray]]:
        """The columns of some keys after others, at least once."""
        waiting: list[tuple[Key, Series]] = []
        for found in self.items():
            waiting.append(found)
            if sum(len(series.images) for _, series in waiting) >= AT_ONCE:
                yield _columns(waiting)
                waiting = []
        if waiting or not self._parts:
            yield _columns(waiting)

    @classmethod
    @checked
    def read(cls, folder: str | Path) -> Records:
        """What `write` wrote.

        Raises:
            FileNotFoundError, ValueError: in one line, where there is nothing, and for a table that is none of these.
        """
        columns = read_columns(Path(folder) / NAME)
        # runs of equal keys, as they were written
        if missing := [name for name in (*Key._fields, "image", "value") if name not in columns]:
            raise ValueError(f"{Path(folder) / NAME} has no column {', '.join(missing)}: give a folder of results")
        rows = list(zip(*(columns[name] for name in Key._fields), strict=True))
        bounds = [i for i in range(len(rows)) if i == 0 or rows[i] != rows[i - 1]]
        table = cls()
        try:
            for start, stop in pairwise([*bounds, len(rows)]):
                values = [np.nan if value in (None, "") else float(value) for value in columns["value"][start:stop]]
                table.add(Key(*rows[start]), [int(image) for image in columns["image"][start:stop]], values)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"{Path(folder) / NAME} holds an image or value that is no number ({str(error)[:100]}): give a folder "
                "of results"
            ) from error
        return table


def _columns(found: Sequence[tuple[Key, Series]]) -> dict[str, np.ndarray]:
    lengths = [len(series.images) for _, series in found]
    names = [np.repeat(np.array([key[i] for key, _ in found], dtype=object), lengths) for i in range(len(Key._fields))]
    images, values = (
        np.concatenate([series[i] for _, series in found] or [np.empty(0)]) for i in range(len(Series._fields))
    )
    columns = dict(zip(Key._fields, names, strict=True))
    return {**columns, "image": images.astype(np.int64), "value": values}
