"""Agreement of attributions with a mask of the object or evidence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import check_maps
from . import protocols
from .state import PerImage, check_index, mean

TOLERANCE = 15 / 224  # of the pointing game, in units of the image's shorter side


class Localization(PerImage):
    """Whether maps lie on the object: pointing game ↑, IoU ↑, mAP ↑ and F1 ↑ against binary masks, all in [0, 1].

    - pointing_game: a mask pixel lies within ``tolerance`` (Euclidean) of the map's maximum; of several
      maxima the first in reading order counts.
    - iou, f1: the pixels above the map's own mean against the mask; the threshold never sees the ground
      truth. A constant map marks nothing.
    - iou_oracle, f1_oracle: the same at the best threshold of every image, picked from the mask: upper bounds, to
      be reported as such.
    - map: average precision of the pixels ranked by the map, tied pixels as one group, averaged over images.

    Images whose mask is empty are left out and counted.

    Args:
        tolerance: in pixels; None is 15 at a shorter side of 224, scaled with the image.
    """

    higher_is_better = True
    directions: ClassVar[dict[str, bool]] = protocols.LOCALISATION

    def __init__(self, tolerance: float | None = None, **options: Any):
        super().__init__(**options)
        if tolerance is not None and not tolerance >= 0:
            raise ValueError(f"tolerance={tolerance}: give a distance in pixels ≥ 0")
        self.tolerance = tolerance

    def update(self, maps: Tensor, masks: Tensor, index: Tensor | Sequence[int] | None = None) -> None:
        """Compare ``maps`` with ``masks``, both (B,1,H,W) or (B,H,W); masks are boolean or 0 and 1.

        Args:
            index: (B,) positions in the data set, as in `ByReference.update`.

        Raises:
            ValueError: for shapes that differ, maps that are not finite, masks that are not binary.
        """
        masks = check_masks(masks)
        maps = check_maps(maps, masks[:, None])
        if index is not None:
            index = check_index(index, len(maps))
        with torch.inference_mode(False):
            self._keep(self._measure(maps, masks), index)

    @torch.no_grad()
    def _measure(self, maps: Tensor, masks: Tensor) -> Tensor:
        """(B, 6) scores of maps (B,H,W) and masks (B,H,W) bool, as `_named` reads them."""
        values, order = maps.flatten(1).sort(dim=1, descending=True)
        found, ends = _retrieved(values, masks.flatten(1).gather(1, order))
        scores = [
            self._pointing(maps, masks),
            *_overlap(maps, masks),
            _average_precision(found, ends),
            *_best_overlap(found, ends),
        ]
        empty = ~masks.flatten(1).any(dim=1)
        return torch.stack(scores, dim=-1).float().masked_fill(empty[:, None], torch.nan)

    @staticmethod
    def _named(rows: Tensor) -> dict[str, Tensor]:
        names = ("pointing_game", "iou", "f1", "map", "iou_oracle", "f1_oracle")
        return dict(zip(names, rows.unbind(dim=-1), strict=True))

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
        return self._named(self._seen())

    def compute(self) -> dict[str, Any]:
        """Means over the images with a mask, "images" that were counted, "excluded" for an empty mask."""
        scores = self.per_image()
        measured = int(torch.isfinite(scores["iou"]).sum())
        if not measured:
            raise RuntimeError(f"all {len(scores['iou'])} masks are empty: localisation needs at least one with pixels")
        means = {name: mean(values) for name, values in scores.items()}
        return {**means, "images": measured, "excluded": len(scores["iou"]) - measured}


def _overlap(maps: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and F1 (B,) of the pixels above the map's mean."""
    # float64: the mean of a constant map is then that constant, and no pixel lies above it
    flat = maps.flatten(1).double()
    marked, wanted = flat > flat.mean(dim=1, keepdim=True), masks.flatten(1)
    both, either = (marked & wanted).sum(dim=1), (marked | wanted).sum(dim=1)
    return both / either.clamp_min(1), 2 * both / (both + either).clamp_min(1)


def _retrieved(values: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Descending ``values`` and whether the mask has these pixels, both (B, N) →

    the mask's pixels among the first k, and the last pixel of the group of tied pixels that each belongs to.
    """
    pixels = values.shape[1]
    index = torch.arange(pixels, device=values.device)
    ends = torch.full_like(values, pixels - 1, dtype=torch.int64)
    ends[:, :-1] = torch.where(values[:, 1:] != values[:, :-1], index[:-1], pixels - 1)
    return wanted.cumsum(dim=1), ends.flip(1).cummin(dim=1).values.flip(1)


def _average_precision(found: Tensor, ends: Tensor) -> Tensor:
    """(B,) Σ (recall step)·precision over the distinct values of the map, from the highest down."""
    # tied pixels enter together: each takes the precision at the end of its group
    precision = (found / torch.arange(1, found.shape[1] + 1, device=found.device)).gather(1, ends)
    wanted = found.diff(dim=1, prepend=torch.zeros_like(found[:, :1]))
    return (precision * wanted).sum(dim=1) / found[:, -1].clamp_min(1)


def _best_overlap(found: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Highest IoU and F1 (B,) over all thresholds, those that mark everything included."""
    both, marked, wanted = found.gather(1, ends), ends + 1, found[:, -1:]
    return (
        (both / (marked + wanted - both)).amax(dim=1),
        (2 * both / (marked + wanted)).amax(dim=1),
    )


def check_masks(masks: Tensor) -> Tensor:
    """Return ``masks`` (B,1,H,W) or (B,H,W) as (B,H,W) bool, or raise ValueError if they are not binary."""
    if not isinstance(masks, Tensor) or masks.ndim not in (3, 4) or (masks.ndim == 4 and masks.shape[1] != 1):
        got = tuple(masks.shape) if isinstance(masks, Tensor) else type(masks).__name__
        raise ValueError(f"masks is {got}: give (B, 1, H, W) or (B, H, W)")
    if masks.dtype != torch.bool and not ((masks == 0) | (masks == 1)).all():
        raise ValueError("masks hold values other than 0 and 1: threshold them first")
    return masks.reshape(len(masks), *masks.shape[-2:]).bool()
