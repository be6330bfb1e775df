"""Average drop and increase of the confidence when the map itself is the mask (method §6)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from ..precision import autocast
from .curves import ByReference, Endpoints, _concatenated, _response


class ConfidenceChange(ByReference):
    """ADP ↓ and PIC ↑ in percent: x' = Ā·I + (1 − Ā)·I0 with Ā the map min-max scaled to [0, 1] per image.

    With y = f_t(I) and o = f_t(x'): ADP = 100·mean(max(0, y − o)/y), PIC = 100·mean(o > y). Unlike deletion
    and insertion both depend on the map's values, not only on their order. A constant map points at nothing:
    its Ā is 0, so x' = I0.

    Arguments as in `DeletionInsertion`.
    """

    higher_is_better = True  # of pic; see `directions`
    directions: ClassVar[dict[str, bool]] = {"adp": False, "pic": True}

    @torch.no_grad()
    def _measure(self, images: Tensor, maps: Tensor, ends: Endpoints) -> Tensor:
        low, high = maps.flatten(1).aminmax(dim=1)
        span = (high - low)[:, None, None]
        shade = torch.where(span > 0, (maps - low[:, None, None]) / span, 0)[:, None]
        shade = shade.to(images.dtype)
        answers = []
        with autocast("fp32", images.device):
            step = self.internal_batch_size
            for reference in ends.references:
                parts = zip(*(value.split(step) for value in (images, reference, shade, ends.target)), strict=True)
                answers.append(
                    _concatenated([_response(self.clf(torch.lerp(r, i, m)), t) for i, r, m, t in parts]).confidence
                )
        masked = torch.stack(answers, dim=1)
        return torch.stack([ends.original.confidence[:, None].expand_as(masked), masked], dim=-1)  # [B, R, 2]

    def _scores(self) -> dict[str, Tensor]:
        original, masked = self._seen(len(self.protocol.references), 2).unbind(dim=-1)
        # where the softmax underflows to 0 there is nothing to lose: the drop is 0, not 0/0
        drop = (original - masked).clamp_min(0) / original.clamp_min(torch.finfo(original.dtype).tiny)
        return {"adp": 100 * drop, "pic": 100 * (masked > original).float()}
