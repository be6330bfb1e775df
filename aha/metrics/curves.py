"""Scores of curves and of confidences: what the metrics that perturb images compute, as functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import FLOATS, checked
from ..kernels.messages import describe


@checked
def area(curve: Tensor) -> Tensor:
    """Area under curves: (…, S) values at evenly spaced fractions → (…), their mean height by the trapezoid in float64.

    Over fractions of [0, 1] that is the area under the curve.
    """
    _check_curve(curve)
    return torch.trapezoid(curve.double(), dx=1 / (curve.shape[-1] - 1), dim=-1).to(curve.dtype)


@checked
def monotone_response(curve: Tensor, rising: bool) -> Tensor:
    """Curves as MDA scores them: (…, S) confidence from f(I0) to f(I), or falling back → scaled, clipped, monotone.

    f(I0) becomes 0 and f(I) 1, what lies beyond is clipped, and the curve never turns back: cumulative maximum, or
    minimum where it falls. NaN where f(I) ≤ f(I0): there is no response to scale.
    """
    _check_curve(curve)
    low, high = (curve[..., :1], curve[..., -1:]) if rising else (curve[..., -1:], curve[..., :1])
    span = high - low
    scaled = ((curve - low) / span.where(span > 0, torch.nan)).clamp(0, 1)
    return (scaled.cummax(dim=-1) if rising else scaled.cummin(dim=-1)).values


def _check_curve(curve: Tensor) -> None:
    if curve.ndim < 1 or curve.shape[-1] < 2 or curve.dtype not in FLOATS:
        raise ValueError(f"curve is {describe(curve)}: give floating point (…, S), S ≥ 2 points")


def density(maps: Tensor, ranks: Tensor, counts: list[int]) -> Tensor:
    """Share of Σ|A| among the top ``counts`` pixels: maps and ranks (B,H,W) → (B, S) from 0 to 1."""
    size = maps.abs().flatten(1).double()
    size = torch.where(size.sum(dim=1, keepdim=True) > 0, size, 1)
    ordered = torch.zeros_like(size).scatter_(1, ranks.flatten(1).long(), size)
    spent = torch.nn.functional.pad(ordered.cumsum(dim=1), (1, 0))  # [B, pixels + 1]
    return (spent[:, torch.tensor(counts, device=maps.device)] / spent[:, -1:]).float()


def aligned(response: Tensor, share: Tensor, rising: bool) -> Tensor:
    """Curves as MAS scores them: response MR and density DR, (…, S) in [0, 1] → MR − |MR − DR|, clipped to [0, 1].

    Where the response falls, MR + |MR − DR|. The definition rescales to [0, 1] once more: both ends are there already.
    """
    penalty = (response - share).abs()
    return (response - penalty if rising else response + penalty).clamp(0, 1)


def trend(curve: Tensor) -> Tensor:
    """Spearman's ρ of (…, S) values with their position → (…); ties share their mean rank, 0 where all are tied."""
    below = (curve[..., None, :] < curve[..., :, None]).sum(dim=-1)
    tied = (curve[..., None, :] == curve[..., :, None]).sum(dim=-1)
    ranks = below.double() + tied / 2  # up to a constant
    ranks = ranks - ranks.mean(dim=-1, keepdim=True)
    steps = torch.arange(curve.shape[-1], dtype=torch.float64, device=curve.device)
    steps = steps - steps.mean()
    spread = ranks.square().sum(dim=-1) * steps.square().sum()
    rho = (ranks * steps).sum(dim=-1) / spread.sqrt().where(spread > 0, 1)
    return rho.to(curve.dtype).where(torch.isfinite(curve).all(dim=-1), torch.nan)


def average_drop(before: Tensor, after: Tensor) -> Tensor:
    """Confidences (…,) of the image and of what is left of it → what is lost of it in percent, ADP; 0 if none is."""
    # where the softmax underflows to 0 there is nothing to lose: the drop is 0, not 0/0
    return 100 * ((before - after).clamp_min(0) / before.clamp_min(torch.finfo(before.dtype).tiny))


def increase(before: Tensor, after: Tensor) -> Tensor:
    """Confidences (…,) of the image and of what is left of it → 100 where it is higher afterwards, else 0: PIC."""
    return 100 * (after > before).float()
