"""What the metrics keep of every image, and how it is put together from any number of processes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from ..kernels.messages import describe, is_plain, short

_HEAD = 3  # numbers in front of a row: its width, and the index in two parts that float32 holds exactly
_LOW = 1 << 20


class PerImage(Metric):
    """A metric that keeps one row of numbers per image; base of all metrics of this package.

    The one state is a flat list of rows: processes may have seen any share of the images, also none. A row carries the
    index of its image in the data set where `update` was given one. Then repeated indices count once (a distributed
    sampler pads by repetition) and rows are read in the order of the index. Means are exactly rounded sums in float64:
    they do not depend on the order of the images, nor on how these were spread over processes.
    """

    full_state_update = False
    is_differentiable = False
    rows: list[Tensor] | Tensor

    def __init__(self, **options: object):
        super().__init__(**options)
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def keep(self, rows: Tensor, index: Tensor | Sequence[int] | None) -> None:
        """Append ``rows`` (B, …) of the images at ``index`` (B,), None where unknown."""
        rows = rows.flatten(1).float()
        batch, width = rows.shape
        place = torch.full((batch,), -1) if index is None else check_index(index, batch)
        assert isinstance(self.rows, list)
        if self.rows and self.rows[0][0] != width:
            raise ValueError(f"rows of {width} numbers after rows of {int(self.rows[0][0])}: give images of one size")
        place = place.to(rows.device)
        head = torch.stack([torch.full_like(place, width), place.div(_LOW, rounding_mode="floor"), place % _LOW], dim=1)
        self.rows.append(torch.cat([head.float(), rows], dim=1).flatten())

    def seen(self) -> Tensor:
        """(N, width) rows of the images seen so far, by index where they have one; RuntimeError if there are none."""
        flat = dim_zero_cat(self.rows) if len(self.rows) else None
        if flat is None or not flat.numel():
            raise RuntimeError(f"{type(self).__name__} has seen no images: call update before asking for results")
        table = flat.view(-1, _HEAD + int(flat[0]))
        index = table[:, 1].long() * _LOW + table[:, 2].long()
        if (index < 0).all():
            return table[:, _HEAD:]
        if (index < 0).any():
            raise RuntimeError("some updates came with an index and some without: give it to all of them or to none")
        index, order = index.sort(stable=True)
        first = torch.ones_like(index, dtype=torch.bool)
        first[1:] = index[1:] != index[:-1]
        return table[order[first], _HEAD:]


def check_index(index: Tensor | Sequence[int], batch: int) -> Tensor:
    """Return ``index`` as int64 (B,): places of ``batch`` images in the data set, integers ≥ 0."""
    try:
        value = torch.as_tensor(index)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise ValueError(f"index={short(index)}: give {batch} integers ≥ 0, one per image") from None
    if (
        not is_plain(value)
        or value.is_complex()
        or value.is_floating_point()
        or value.dtype == torch.bool
        or tuple(value.shape) != (batch,)
        or (value < 0).any()
    ):
        raise ValueError(f"index is {describe(value)}: give {batch} integers ≥ 0, one per image")
    return value.long()


def mean(values: Tensor) -> float:
    """Mean of the finite entries of ``values`` (N,), exactly rounded and so without an order; NaN if there are none."""
    finite = [value for value in values.tolist() if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def measured(scores: Mapping[str, Tensor]) -> Tensor:
    """(N,) bool: the images with at least one score."""
    return torch.stack([torch.isfinite(values) for values in scores.values()]).any(dim=0)
