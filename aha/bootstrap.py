"""Confidence intervals and paired comparisons of per-image values by bootstrap over the images."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .checks import check_seed, checked
from .kernels.messages import describe

RESAMPLES = 2000


def resampled(values: Tensor, seed: int) -> Tensor:
    """(N, M) columns → (RESAMPLES, M) bootstrap means; the same images are drawn for all columns."""
    count = len(values)
    generator = torch.Generator().manual_seed(seed)
    means = values.new_empty(RESAMPLES, values.shape[1])
    # in parts of a megabyte in one place: a heap that megabytes come to and leave grows to many times their size
    step = min(RESAMPLES, max(1, 2**17 // count))
    drawn, times = torch.empty(step, count, dtype=torch.int64), values.new_empty(step, count)
    one = values.new_ones(()).expand(step, count)
    for part in means.split(step):
        rows = len(part)
        torch.randint(count, (rows, count), generator=generator, out=drawn[:rows])
        torch.matmul(times[:rows].zero_().scatter_add_(1, drawn[:rows], one[:rows]), values, out=part)
    return means.div_(count)


def percentiles(means: Tensor) -> list[list[float]]:
    """(R, M) → the 95 % interval of each column."""
    return means.quantile(means.new_tensor([0.025, 0.975]), dim=0).T.tolist()


@checked
def mean_interval(values: Tensor, seed: int) -> list[float]:
    """Bootstrap 95 % interval of the mean of ``values`` (N,)."""
    check_seed(seed)
    if values.ndim != 1 or not values.numel():
        raise ValueError(f"values is {describe(values)}: give (N,) numbers, N ≥ 1")
    return percentiles(resampled(values.double()[:, None], seed))[0]


def two_sided(means: Tensor) -> float:
    """p of "the mean is 0": twice the share of resampled means (R,) beyond zero, at least 2/(R + 1)."""
    below, above = (means <= 0).sum().item(), (means >= 0).sum().item()
    return min(1.0, 2 * (min(below, above) + 1) / (len(means) + 1))


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """p-values corrected for their number (Holm, 1979): the chance of any false claim stays below each."""
    corrected: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p, key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[name]))
        corrected[name] = largest
    return {name: corrected[name] for name in p}
