"""Patches: what a vision transformer reads its image by, and maps that rank them one after the other.

Half of a patch still tells a transformer what its token says. A map that removes or shows whole patches changes what
the classifier sees sooner, at the same share of the pixels: insertion gains much, deletion loses a little
(docs/patches.md).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .regions import Regions
from .structure import uniform_patch

WITHIN = 0.001  # of the differences within a patch: they say which of its pixels come first
COARSE = 8  # pixels: what convolutional networks begin with is finer


def find_patches(module: nn.Module, channels: int, height: int, width: int) -> Regions | None:
    """The patches of height×width images; None for a network that does not read images by patches.

    That is one with one convolution of the image, which takes every pixel once, and which keeps its tokens: where they
    are merged from block to block, as in Swin, the patches of the beginning are too small to matter.

    Args:
        module: the network.
        channels: of the images.
    """
    stems = [part for part in module.modules() if isinstance(part, nn.Conv2d) and part.in_channels == channels]
    if len(stems) != 1 or isinstance(stems[0].padding, str) or any(stems[0].padding):
        return None
    side = stems[0].stride
    if stems[0].kernel_size != side or (min(side) < COARSE and uniform_patch(module) != side[0]):
        return None
    # the border may cut the last ones off
    rows, cols = (torch.arange(pixels) // step for pixels, step in zip((height, width), side, strict=True))
    return Regions(rows, cols, int(rows[-1]) + 1, int(cols[-1]) + 1)


def aligned(regions: Regions, patches: Regions | None) -> Regions:
    """``regions`` made of whole patches, each in the region that its middle lies in; None: as they are."""
    if patches is None:
        return regions
    rows, height = _aligned(regions.row_index, patches.row_index)
    cols, width = _aligned(regions.col_index, patches.col_index)
    return Regions(rows, cols, height, width)


def by_patch(maps: Tensor, patches: Regions | None) -> Tensor:
    """Maps (B,1,H,W) that rank whole patches by their mean, and within them pixels as before; None: as they are.

    Symmetric as a matrix: a gradient to what it returns, by patch, is the gradient to ``maps``.
    """
    if patches is None:
        return maps
    means = patches.pool(maps)[:, patches.cell_index().to(maps.device)][:, None]
    return torch.lerp(means, maps, WITHIN)


def _aligned(region: Tensor, patch: Tensor) -> tuple[Tensor, int]:
    """The region of every pixel along one axis, and how many there are."""
    sizes = patch.bincount()
    middles = sizes.cumsum(0) - sizes + sizes // 2
    # regions smaller than a patch may hold no middle
    found, kept = region[middles].unique(return_inverse=True)
    return kept[patch], len(found)
