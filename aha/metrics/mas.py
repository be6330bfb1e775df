"""Magnitude aligned scoring: curves that also ask whether the map's values are in proportion to the response."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..classifier import Classifier
from . import protocols
from .by_reference import ByReference, Named
from .curves import area, curve_of, monotone_response
from .perturbed import Probe
from .protocols import Protocol


class MagnitudeAlignment(ByReference):
    """Whether magnitudes of a map match the response to its pixels: MAS deletion ↓, insertion ↑, difference ↑.

    The response MR is `monotone_response` of the curve; the density DR is the share of Σ|A| among the pixels inserted
    so far, or among those not yet deleted. The score is MR − |MR − DR| for insertion and MR + |MR − DR| for deletion,
    clipped to [0, 1], and its area by the trapezoid. A map that is 0 everywhere spreads its density evenly.

    Arguments as in `ByReference`.
    """

    higher_is_better = True  # of mas_ins_minus_del; see `directions`
    directions: ClassVar[dict[str, bool]] = protocols.ALIGNMENT

    def __init__(self, clf: Classifier, protocol: str | Protocol = "mas", *args: Any, **options: Any):
        super().__init__(clf, protocol, *args, **options)

    @property
    def _layout(self) -> list[tuple[str, str]]:
        deleting, inserting = self.protocol.deleting, self.protocol.inserting
        return [("deletion", name) for name in deleting] + [("insertion", name) for name in inserting]

    def _rows(self, probe: Probe) -> Tensor:
        curves = [curve_of(probe, side, reference) for side, reference in self._layout]
        return torch.stack([density(probe.maps, probe.ranks, probe.counts), *curves], dim=1)  # [B, 1 + curves, S]

    def _named_curves(self, rows: Tensor) -> Named:
        spent, *curves = rows.unflatten(1, (1 + len(self._layout), -1)).unbind(1)
        named: Named = {}
        for (side, reference), curve in zip(self._layout, curves, strict=True):
            rising = side == "insertion"
            response = monotone_response(curve, rising)
            share = spent if rising else 1 - spent
            penalty = (response - share).abs()
            # the definition rescales to [0, 1] once more: both ends are there already, so nothing would change
            score = (response - penalty if rising else response + penalty).clamp(0, 1)
            named.setdefault(reference, {}).update({f"mas_{side}": score, f"{side}_density": share})
        return named

    def _scores(self, rows: Tensor) -> Named:
        scores: Named = {}
        for reference, curves in self._named_curves(rows).items():
            for name, curve in curves.items():
                if name in self.directions:
                    scores.setdefault(name, {})[reference] = area(curve)
        return scores


def density(maps: Tensor, ranks: Tensor, counts: list[int]) -> Tensor:
    """Share of Σ|A| among the top ``counts`` pixels: maps and ranks (B,H,W) → (B, S) from 0 to 1."""
    size = maps.abs().flatten(1).double()
    size = torch.where(size.sum(dim=1, keepdim=True) > 0, size, 1)
    ordered = torch.zeros_like(size).scatter_(1, ranks.flatten(1).long(), size)
    spent = torch.nn.functional.pad(ordered.cumsum(dim=1), (1, 0))  # [B, pixels + 1]
    return (spent[:, torch.tensor(counts, device=maps.device)] / spent[:, -1:]).float()
