"""Average drop and increase of the confidence when the map itself is the mask."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..precision import autocast
from . import protocols
from .by_reference import ByReference, Named
from .perturbed import Probe, respond


class ConfidenceChange(ByReference):
    """How much confidence is left when an image is shown through its map: ADP ↓ and PIC ↑ in percent.

    x' = Ā·I + (1 − Ā)·I0 with Ā the map min-max scaled to [0, 1] per image.

    With y = f_t(I) and o = f_t(x'): ADP = 100·mean(max(0, y − o)/y), PIC = 100·mean(o > y). Unlike deletion
    and insertion both depend on the map's values, not only on their order. A constant map points at nothing:
    its Ā is 0, so x' = I0.

    Arguments as in `ByReference`.
    """

    higher_is_better = True  # of pic; see `directions`
    directions: ClassVar[dict[str, bool]] = protocols.CHANGE

    def _rows(self, probe: Probe) -> Tensor:
        low, high = probe.maps.flatten(1).aminmax(dim=1)
        span = (high - low)[:, None, None]
        shade = torch.where(span > 0, (probe.maps - low[:, None, None]) / span, 0)[:, None].to(probe.images.dtype)
        size, ends = self.internal_batch_size, probe.ends
        answers = []
        with autocast("fp32", probe.images.device):
            for reference in ends.references:
                mixed = torch.lerp(reference, probe.images, shade)
                answers.append(respond(self.clf, mixed, ends.scored, size).confidence)
        masked = torch.stack(answers, dim=1)
        return torch.stack([ends.original.confidence[:, None].expand_as(masked), masked], dim=-1)  # [B, R, 2]

    def _scores(self, rows: Tensor) -> Named:
        original, masked = rows.view(len(rows), -1, 2).unbind(dim=-1)
        # where the softmax underflows to 0 there is nothing to lose: the drop is 0, not 0/0
        drop = (original - masked).clamp_min(0) / original.clamp_min(torch.finfo(original.dtype).tiny)
        rise = (masked > original).float().where(torch.isfinite(original), torch.nan)
        names = self.protocol.references
        return {
            "adp": dict(zip(names, (100 * drop).unbind(1), strict=True)),
            "pic": dict(zip(names, (100 * rise).unbind(1), strict=True)),
        }
