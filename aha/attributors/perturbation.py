"""Attribution by what perturbed images do to the confidence; and the random baseline, which looks at
nothing."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..classifier import Classifier
from ..precision import confidence
from .base import Attributor, Metadata, register
from .passes import Passes


@register("random")
class Random(Attributor):
    """Uniform noise in [0, 1): what a map without information scores.

    The noise is a function of the seed and of the image's pixels, so it differs between images and does not
    depend on the batch or the device.
    """

    needs_gradients = False
    metadata = Metadata(
        paper="baseline", cost="none", architectures="any", licence="ours", fidelity="ours, with no code to equal"
    )
    class_specific = False
    per_image = Passes()

    def _attribute(self, images: Tensor, target: Any) -> Tensor:
        maps = []
        for image in images:
            key = zlib.crc32(image.float().numpy(force=True).tobytes(), self.seed & 0xFFFFFFFF)
            generator = torch.Generator().manual_seed(key)
            maps.append(torch.rand(1, *image.shape[1:], dtype=torch.float32, generator=generator))
        return torch.stack(maps).to(images.device)


@register("rise")
class Rise(Attributor):
    """RISE: the mean confidence over random masks that show a pixel, Σ_i f_t(x⊙M_i)·M_i / Σ_i M_i.

    Masks are ``cells``×``cells`` coin flips, enlarged bilinearly to one cell more than the image and cropped
    at a random offset. Every image sees the same masks. They multiply normalised pixels, as in the paper's
    code, so what is hidden takes the classifier's mean colour.

    The paper divides by N·p, the expected coverage Σ_i M_i. Dividing by the actual coverage has the same
    limit, and removes
    the noise of pixels that happened to be shown more often: a constant classifier gives a constant map.

    Args:
        n_masks: N; 4000 in the paper for ViT-sized images.
        cells: per side.
        p: probability that a cell is shown, in (0, 1).
        internal_batch_size: masked images in one pass; masks are enlarged in chunks and never all stored.
    """

    needs_gradients = False
    metadata = Metadata(
        paper="Petsiuk et al., BMVC 2018",
        cost="500F (the paper: 4000F)",
        architectures="any",
        licence="MIT",
        notes="divided by the actual instead of the expected coverage",
        fidelity="differs: divided by the actual instead of the expected coverage, 500 masks unless n_masks=4000; "
        "equal to loops by hand",
    )

    def __init__(self, clf: Classifier, n_masks: int = 500, cells: int = 7, p: float = 0.5, **options: Any):
        super().__init__(clf, **options)
        if n_masks < 1 or cells < 1:
            raise ValueError(f"n_masks={n_masks}, cells={cells}: give at least one of each")
        if not 0 < p < 1:
            raise ValueError(f"p={p}: give the probability of showing a cell, above 0 and below 1")
        self.n_masks, self.cells, self.p = n_masks, cells, p

    def passes(self, images: Tensor) -> Passes:
        return Passes(self.n_masks)

    def masks(self, height: int, width: int, chunk: int) -> Iterator[Tensor]:
        """All masks, ``chunk`` at a time: (≤ chunk, height, width) in [0, 1], float32 on the classifier's
        device."""
        # all coins are flipped first, on the CPU: neither chunk size nor device changes the masks
        generator = torch.Generator().manual_seed(self.seed)
        coins = torch.rand(self.n_masks, 1, self.cells, self.cells, dtype=torch.float32, generator=generator) < self.p
        offsets = torch.rand(2, self.n_masks, dtype=torch.float32, generator=generator)
        coins, offsets = coins.float().to(self.clf.device), offsets.to(self.clf.device)
        cell_height, cell_width = math.ceil(height / self.cells), math.ceil(width / self.cells)
        size = (height + cell_height, width + cell_width)
        rows, cols = torch.arange(height, device=coins.device), torch.arange(width, device=coins.device)
        for part, down, right in zip(coins.split(chunk), *(o.split(chunk) for o in offsets), strict=True):
            large = F.interpolate(part, size, mode="bilinear", align_corners=False)[:, 0]
            row = rows + (down * cell_height).long()[:, None]
            col = cols + (right * cell_width).long()[:, None]
            index = torch.arange(len(part), device=coins.device)[:, None, None]
            # interpolation may round to just above 1
            yield large[index, row[:, :, None], col[:, None, :]].clamp_(0, 1)

    @torch.no_grad()
    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        batch, _, height, width = images.shape
        pixels = self.clf.normalize(images)
        shown = images.new_zeros(batch, height, width)
        coverage = images.new_zeros(height, width)
        for masks in self.masks(height, width, chunk=max(1, self.internal_batch_size // batch)):
            masks = masks.to(images)
            masked = (pixels[:, None] * masks[None, :, None]).flatten(0, 1)  # [B·m, C, H, W]
            classes = target.repeat_interleave(len(masks))
            answers = confidence(self.clf.forward_normalized(masked), classes).view(batch, -1)
            shown += torch.einsum("bm,mhw->bhw", answers.to(images), masks)
            coverage += masks.sum(dim=0)
        # a pixel that no mask has shown is unknown: it gets 0
        return (shown / coverage.clamp_min(1e-6))[:, None]
