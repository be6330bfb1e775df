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
    means = []
    # in parts: what is drawn never takes more than some ten megabytes
    step = max(1, 2**20 // count)
    for start in range(0, RESAMPLES, step):
        drawn = torch.randint(count, (min(step, RESAMPLES - start), count), generator=generator)
        times = values.new_zeros(drawn.shape).scatter_add_(1, drawn, values.new_ones(()).expand(drawn.shape))
        means.append(times @ values / count)
    return torch.cat(means)


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
