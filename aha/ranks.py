"""Which pixel of a map comes first."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import FLOATS, INTEGERS, checked
from .kernels.messages import describe


@checked
def rank_pixels(maps: Tensor) -> Tensor:
    """Ranks of pixels: (B,H,W) attributions → (B,H,W) int32, 0 is the most important pixel, ties in reading order."""
    if maps.ndim < 2 or maps.dtype not in (*FLOATS, *INTEGERS):
        raise ValueError(f"maps is {describe(maps)}: give (B, H, W)")
    order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)
    positions = torch.arange(order.shape[1], dtype=torch.int32, device=maps.device).expand(order.shape)
    return torch.empty_like(order, dtype=torch.int32).scatter_(1, order, positions).view(maps.shape)
