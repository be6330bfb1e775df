"""Deletion, insertion, positive and negative perturbation from one sweep of perturbed images (paper §4)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from . import protocols
from .by_reference import ByReference, Named
from .perturbed import Probe
from .protocols import DIFFERENCES, Protocol


def area(curve: Tensor) -> Tensor:
    """Area under curves: (…, S) values at evenly spaced fractions → (…), their mean height by the trapezoid in float64.

    Over fractions of [0, 1] that is the area under the curve.
    """
    return torch.trapezoid(curve.double(), dx=1 / (curve.shape[-1] - 1), dim=-1).to(curve.dtype)


def monotone_response(curve: Tensor, rising: bool) -> Tensor:
    """Curves as MDA scores them: (…, S) confidence from f(I0) to f(I), or falling back → scaled, clipped, monotone.

    f(I0) becomes 0 and f(I) 1, what lies beyond is clipped, and the curve never turns back: cumulative maximum, or
    minimum where it falls. NaN where f(I) ≤ f(I0): there is no response to scale.
    """
    low, high = (curve[..., :1], curve[..., -1:]) if rising else (curve[..., -1:], curve[..., :1])
    span = high - low
    scaled = ((curve - low) / span.where(span > 0, torch.nan)).clamp(0, 1)
    return (scaled.cummax(dim=-1) if rising else scaled.cummin(dim=-1)).values


class DeletionInsertion(ByReference):
    """How faithful maps are, by what the classifier says while their most important pixels go or come.

    Deletion ↓, insertion ↑, positive ↓ and negative ↑ perturbation, and their differences ↑.

    Deletion and insertion are areas under the softmax probability of the explained class, positive and negative
    perturbation under its top-1 accuracy, over the replaced fraction of the pixels. All values are in [0, 1],
    differences in [−1, 1]. A protocol may ask for some of them (see `Protocol.metrics`), for the accuracy of the label
    (preset "chefer"), or for curves that are monotone (preset "mda").

    >>> metric = DeletionInsertion(clf)
    >>> metric.update(images, maps)
    >>> metric.compute()["ins_minus_del"]

    Arguments as in `ByReference`.
    """

    higher_is_better = True  # of the headline, ins_minus_del; see `directions`
    directions: ClassVar[dict[str, bool]] = protocols.CURVES

    def _rows(self, probe: Probe) -> Tensor:
        return torch.stack(
            [curve_of(probe, name, reference) for reference, name in layout(self.protocol, self.names)], dim=1
        )  # [B, curves, S]

    def _named_curves(self, rows: Tensor) -> Named:
        places = layout(self.protocol, self.names)
        curves: Named = {}
        for (reference, name), curve in zip(places, rows.unflatten(1, (len(places), -1)).unbind(1), strict=True):
            if self.protocol.monotone and name in ("deletion", "insertion"):
                curve = monotone_response(curve, rising=name == "insertion")
            curves.setdefault(reference, {})[name] = curve
        return curves

    def _scores(self, rows: Tensor) -> Named:
        scores: Named = {}
        for reference, curves in self._named_curves(rows).items():
            for name, curve in curves.items():
                scores.setdefault(name, {})[reference] = area(curve)
        return scores


def layout(protocol: Protocol, names: tuple[str, ...]) -> list[tuple[str, str]]:
    """(reference, curve) of every curve that the metrics ``names`` are made from, in the order rows keep them."""
    wanted = {part for name in names for part in DIFFERENCES.get(name, (name,))}
    served = {
        "deletion": protocol.deleting,
        "insertion": protocol.inserting,
        "positive": protocol.deleting,
        "negative": protocol.inserting,
    }
    return [
        (reference, curve)
        for reference in protocol.references
        for curve, references in served.items()
        if curve in wanted and reference in references
    ]


def curve_of(probe: Probe, name: str, reference: str) -> Tensor:
    """(B, S) deletion, positive or negative over the removed fraction, insertion over the inserted one."""
    if name == "deletion":
        return probe.deleted[reference].confidence
    if name == "insertion":
        return probe.inserted[reference].confidence
    if name == "positive":
        return probe.deleted[reference].correct
    return probe.inserted[reference].correct.flip(-1)
