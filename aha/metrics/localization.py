"""Agreement of attributions with a mask of the object or evidence (method §6)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from ..checks import check_maps

TOLERANCE = 15 / 224  # of the pointing game, in units of the image's shorter side


class Localization(Metric):
    """Pointing game ↑, IoU ↑, mAP ↑ and F1 ↑ of attributions against binary masks, all in [0, 1].

    - pointing_game: a mask pixel lies within ``tolerance`` (Euclidean) of the map's maximum; of several
      maxima the first in reading order counts.
    - iou, f1: the pixels above the map's own mean against the mask; the threshold never sees the ground
      truth. A constant map marks nothing.
    - map: average precision of the pixels ranked by the map, tied pixels as one group, averaged over images.

    Images whose mask is empty are left out and counted.

    Args:
        tolerance: in pixels; None is 15 at a shorter side of 224, scaled with the image.
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = True
    directions: ClassVar[dict[str, bool]] = {"pointing_game": True, "iou": True, "map": True, "f1": True}
    rows: list[Tensor] | Tensor

    def __init__(self, tolerance: float | None = None, **options: Any):
        super().__init__(**options)
        if tolerance is not None and not tolerance >= 0:
            raise ValueError(f"tolerance={tolerance}: give a distance in pixels ≥ 0")
        self.tolerance = tolerance
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def update(self, maps: Tensor, masks: Tensor) -> None:
        """Compare ``maps`` with ``masks``, both (B,1,H,W) or (B,H,W); masks are boolean or 0 and 1.

        Raises:
            ValueError: for shapes that differ, maps that are not finite, masks that are not binary.
        """
        if not isinstance(masks, Tensor) or masks.ndim not in (3, 4) or (masks.ndim == 4 and masks.shape[1] != 1):
            got = tuple(masks.shape) if isinstance(masks, Tensor) else type(masks).__name__
            raise ValueError(f"masks is {got}: give (B, 1, H, W) or (B, H, W)")
        if masks.dtype != torch.bool and not ((masks == 0) | (masks == 1)).all():
            raise ValueError("masks hold values other than 0 and 1: threshold them first")
        masks = masks.reshape(len(masks), 1, *masks.shape[-2:])
        maps = check_maps(maps, masks)
        assert isinstance(self.rows, list)
        self.rows.append(self._measure(maps, masks[:, 0].bool()).flatten())

    def _measure(self, maps: Tensor, masks: Tensor) -> Tensor:
        scores = torch.stack(
            [self._pointing(maps, masks), *_overlap(maps, masks), _average_precision(maps, masks)], dim=-1
        )
        empty = ~masks.flatten(1).any(dim=1)
        return scores.masked_fill(empty[:, None], torch.nan)  # [B, 4]

    def _pointing(self, maps: Tensor, masks: Tensor) -> Tensor:
        height, width = maps.shape[1:]
        tolerance = TOLERANCE * min(height, width) if self.tolerance is None else self.tolerance
        peak = maps.flatten(1).argmax(dim=1)
        rows = torch.arange(height, device=maps.device) - (peak // width)[:, None]
        cols = torch.arange(width, device=maps.device) - (peak % width)[:, None]
        near = (rows**2)[:, :, None] + (cols**2)[:, None, :] <= tolerance**2
        return (near & masks).flatten(1).any(dim=1).float()

    def per_image(self) -> dict[str, Tensor]:
        """Name → (N,) scores of the images this process has seen, NaN where the mask is empty."""
        rows = dim_zero_cat(self.rows) if len(self.rows) else None
        if rows is None or not rows.numel():
            raise RuntimeError("Localization has seen no images: call update before asking for results")
        names = ("pointing_game", "iou", "f1", "map")
        return dict(zip(names, rows.view(-1, len(names)).unbind(dim=-1), strict=True))

    def compute(self) -> dict[str, Any]:
        """Means over the images with a mask, "images" that were counted, "excluded" for an empty mask."""
        scores = self.per_image()
        measured = int(torch.isfinite(scores["iou"]).sum())
        if not measured:
            raise RuntimeError(f"all {len(scores['iou'])} masks are empty: localisation needs at least one with pixels")
        means = {name: values.nanmean().item() for name, values in scores.items()}
        return {**means, "images": measured, "excluded": len(scores["iou"]) - measured}


def _overlap(maps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and F1 (B,) of the pixels above the map's mean."""
    # float64: the mean of a constant map is then that constant, and no pixel lies above it
    flat = maps.flatten(1).double()
    marked, wanted = flat > flat.mean(dim=1, keepdim=True), masks.flatten(1)
    both, either = (marked & wanted).sum(dim=1), (marked | wanted).sum(dim=1)
    return both / either.clamp_min(1), 2 * both / (both + either).clamp_min(1)


def _average_precision(maps: Tensor, masks: Tensor) -> Tensor:
    """(B,) Σ (recall step)·precision over the distinct values of the map, from the highest down."""
    values, order = maps.flatten(1).sort(dim=1, descending=True)
    wanted = masks.flatten(1).gather(1, order)
    pixels = values.shape[1]
    index = torch.arange(pixels, device=maps.device)
    precision = wanted.cumsum(dim=1) / (index + 1)
    # tied pixels enter together: each takes the precision at the end of its group
    ends = torch.full_like(order, pixels - 1)
    ends[:, :-1] = torch.where(values[:, 1:] != values[:, :-1], index[:-1], pixels - 1)
    ends = ends.flip(1).cummin(dim=1).values.flip(1)
    precision = precision.gather(1, ends)
    return (precision * wanted).sum(dim=1) / wanted.sum(dim=1).clamp_min(1)
