"""Monotonicity: does every further step of the inserted order raise the confidence?"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..classifier import Classifier
from . import protocols
from .by_reference import ByReference, Named
from .perturbed import Probe
from .protocols import Protocol


class Monotonicity(ByReference):
    """Whether confidence rises with every pixel that comes back: Spearman's ρ ↑ in [−1, 1] of inserted pixels with it.

    1: every step raises it; −1: every step lowers it. Tied confidences share their mean rank; where all are tied there
    is no trend and ρ is 0.

    Arguments as in `ByReference`.
    """

    higher_is_better = True
    directions: ClassVar[dict[str, bool]] = protocols.MONOTONICITY

    def __init__(self, clf: Classifier, protocol: str | Protocol = "monotonicity", *args: Any, **options: Any):
        super().__init__(clf, protocol, *args, **options)

    def _rows(self, probe: Probe) -> Tensor:
        return torch.stack([curve.confidence for curve in probe.inserted.values()], dim=1)  # [B, R, S]

    def _named_curves(self, rows: Tensor) -> Named:
        names = self.protocol.inserting
        curves = rows.unflatten(1, (len(names), -1)).unbind(1)
        return {name: {"insertion": curve} for name, curve in zip(names, curves, strict=True)}

    def _scores(self, rows: Tensor) -> Named:
        curves = self._named_curves(rows)
        return {"monotonicity": {name: trend(found["insertion"]) for name, found in curves.items()}}


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
