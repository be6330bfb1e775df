"""Agreement of attributions with a mask of the object or evidence."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ..kernels.messages import describe, is_plain

TOLERANCE = 15 / 224  # of the pointing game, in units of the image's shorter side


class Located:
    """Maps beside their masks, as the metrics of localisation read them.

    Attributes:
        maps: (B, H, W).
        masks: (B, H, W) bool; ValueError if it is read and there are none.
        tolerance: of the pointing game in pixels; None is `TOLERANCE`.
    """

    def __init__(self, maps: Tensor, masks: Tensor | None, tolerance: float | None = None):
        self.maps, self.tolerance, self._masks = maps, tolerance, masks

    @property
    def masks(self) -> Tensor:
        if self._masks is None:
            raise ValueError('a metric reads masks and there are none: put "masks" into its reads')
        return self._masks

    @cached_property
    def retrieved(self) -> tuple[Tensor, Tensor]:
        """`retrieved` of the pixels, sorted once."""
        values, order = self.maps.flatten(1).sort(dim=1, descending=True)
        return retrieved(values, self.masks.flatten(1).gather(1, order))


def pointing(maps: Tensor, masks: Tensor, tolerance: float | None = None) -> Tensor:
    """(B,) 1 where a mask pixel lies within ``tolerance`` pixels (Euclidean) of the map's maximum, else 0.

    Of several maxima the first in reading order counts. None is 15 pixels at a shorter side of 224, scaled.
    """
    height, width = maps.shape[1:]
    tolerance = TOLERANCE * min(height, width) if tolerance is None else tolerance
    peak = maps.flatten(1).argmax(dim=1)
    rows = torch.arange(height, device=maps.device) - (peak // width)[:, None]
    cols = torch.arange(width, device=maps.device) - (peak % width)[:, None]
    near = (rows**2)[:, :, None] + (cols**2)[:, None, :] <= tolerance**2
    return (near & masks).flatten(1).any(dim=1).float()


def overlap(maps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and F1 (B,) of the pixels above the map's mean."""
    # float64: the mean of a constant map is then that constant, and no pixel lies above it
    flat = maps.flatten(1).double()
    marked, wanted = flat > flat.mean(dim=1, keepdim=True), masks.flatten(1)
    both, either = (marked & wanted).sum(dim=1), (marked | wanted).sum(dim=1)
    return both / either.clamp_min(1), 2 * both / (both + either).clamp_min(1)


def retrieved(values: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Descending ``values`` and whether the mask has these pixels, both (B, N) →

    the mask's pixels among the first k, and the last pixel of the group of tied pixels that each belongs to.
    """
    pixels = values.shape[1]
    index = torch.arange(pixels, device=values.device)
    ends = torch.full_like(values, pixels - 1, dtype=torch.int64)
    ends[:, :-1] = torch.where(values[:, 1:] != values[:, :-1], index[:-1], pixels - 1)
    return wanted.cumsum(dim=1), ends.flip(1).cummin(dim=1).values.flip(1)


def average_precision(found: Tensor, ends: Tensor) -> Tensor:
    """(B,) Σ (recall step)·precision over the distinct values of the map, from the highest down."""
    # tied pixels enter together: each takes the precision at the end of its group
    precision = (found / torch.arange(1, found.shape[1] + 1, device=found.device)).gather(1, ends)
    wanted = found.diff(dim=1, prepend=torch.zeros_like(found[:, :1]))
    return (precision * wanted).sum(dim=1) / found[:, -1].clamp_min(1)


def best_overlap(found: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Highest IoU and F1 (B,) over all thresholds, those that mark everything included."""
    both, marked, wanted = found.gather(1, ends), ends + 1, found[:, -1:]
    return (
        (both / (marked + wanted - both)).amax(dim=1),
        (2 * both / (marked + wanted)).amax(dim=1),
    )


def check_masks(masks: Tensor) -> Tensor:
    """Return ``masks`` (B,1,H,W) or (B,H,W) as (B,H,W) bool, or raise ValueError if they are not binary."""
    if not is_plain(masks) or masks.ndim not in (3, 4) or (masks.ndim == 4 and masks.shape[1] != 1):
        raise ValueError(f"masks is {describe(masks)}: give (B, 1, H, W) or (B, H, W)")
    if masks.dtype != torch.bool and not ((masks == 0) | (masks == 1)).all():
        raise ValueError("masks hold values other than 0 and 1: threshold them first")
    return masks.reshape(len(masks), *masks.shape[-2:]).bool()
