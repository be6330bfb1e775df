"""The decoder that sees the image and evidence, what the classifier says of its target: no encoder, no class table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_integer
from ..kernels.messages import short
from .decoder import WIDEST, Head

STEM = "sight.stem.weight"  # (width, 2 · roles, 3, 3): the maps, then whether they are there


@dataclass(frozen=True)
class EvidenceConfig:
    """Widths of the decoder.

    Attributes:
        width: channels at the finest level; twice as many below.
        stride: pixels per cell of the finest level, 4 or 2.

    Raises:
        ValueError: in one line, for anything else.
    """

    width: int = 48
    stride: int = 4

    def __post_init__(self) -> None:
        check_integer("width", self.width, 1, WIDEST)
        if self.stride not in (2, 4):
            raise ValueError(f"stride={short(self.stride)}: give 4 or 2 pixels per cell")


class EvidenceDecoder(nn.Module):
    """Image and evidence → what is added to the best single evidence map, a U-Net of three levels.

    Nothing in it names a class or a classifier: one decoder serves any number of either. Untrained it adds nothing.
    """

    def __init__(self, channels: int, roles: int, config: EvidenceConfig):
        super().__init__()
        self.config = config
        width = config.width
        self.sight = Sight(channels, roles, width, config.stride)
        self.down = nn.ModuleList((nn.Conv2d(width, 2 * width, 2, 2), nn.Conv2d(2 * width, 2 * width, 2, 2)))
        self.units = nn.ModuleList((Unit(2 * width), Unit(2 * width)))
        self.up = nn.ModuleList((nn.Conv2d(2 * width, width, 1), nn.Conv2d(2 * width, 2 * width, 1)))
        self.merge = nn.ModuleList((Unit(width), Unit(2 * width)))
        self.head = Head(width)
        self.head.begin_at_nothing()

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """The pixels that the cells of the finest level cover."""
        stride = self.config.stride
        return -(-height // stride) * stride, -(-width // stride) * stride

    def dense(self, images: Tensor, maps: Tensor, present: Tensor) -> Tensor:
        """(N, width, h, w) before the head. ``maps`` (N, roles, H, W), ``present`` (N, roles)."""
        levels = [self.sight(images, maps, present)]
        for down, unit in zip(self.down, self.units, strict=True):
            above = levels[-1]
            levels.append(unit(down(F.pad(above, _overhang(above, 2), mode="replicate"))))
        x = levels.pop()
        for up, merge in reversed(list(zip(self.up, self.merge, strict=True))):
            x = F.interpolate(up(x), levels[-1].shape[-2:], mode="bilinear", align_corners=False)
            x = merge(x + levels.pop())
        return x


class Sight(nn.Module):
    """Image and evidence (N, roles, H, W), of which (N, roles) are ``present`` → (N, width, h, w)."""

    def __init__(self, channels: int, roles: int, width: int, stride: int):
        super().__init__()
        self.stride = stride
        # the maps and whether they are there; beside them the image
        self.stem = nn.Conv2d(2 * roles, width, 3, padding=1)
        self.pixels = nn.Conv2d(channels, width, 2 * stride - 1, stride, stride - 1)
        self.first = Unit(width)

    def forward(self, images: Tensor, maps: Tensor, present: Tensor) -> Tensor:
        stride = self.stride
        maps = maps * present[:, :, None, None].to(maps)
        flags = present[:, :, None, None].to(maps).expand(-1, -1, *maps.shape[-2:])
        # cells at the border may hang over it
        seen = F.avg_pool2d(torch.cat([maps, flags], dim=1), stride, ceil_mode=True, count_include_pad=False)
        x = self.stem(seen)
        pixels = self.pixels(F.pad(4 * images - 2, _overhang(images, stride), mode="replicate"))
        return self.first(x + pixels[..., : x.shape[-2], : x.shape[-1]])


def with_roles(state: Mapping[str, Tensor], roles: int) -> dict[str, Tensor]:
    """Weights for ``roles`` of evidence: those that were saved when there were fewer do not see the later ones."""
    state = dict(state)
    stem = state.get(STEM)
    # of no channels a file may claim any number, which cost memory once there are some
    if stem is not None and stem.ndim == 4 and stem.shape[1] in range(2, 2 * roles, 2):
        maps, flags = stem.chunk(2, dim=1)
        state[STEM] = torch.cat([F.pad(part, (0, 0, 0, 0, 0, roles - part.shape[1])) for part in (maps, flags)], dim=1)
    return state


class Unit(nn.Module):
    """x + pointwise(GELU(norm(depthwise 7×7))), as in ConvNeXt; the norm is over channels and knows no batch."""

    def __init__(self, width: int):
        super().__init__()
        self.spread = nn.Conv2d(width, width, 7, padding=3, groups=width)
        self.norm = nn.GroupNorm(1, width)
        self.wide, self.narrow = nn.Conv2d(width, 2 * width, 1), nn.Conv2d(2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(F.gelu(self.wide(self.norm(self.spread(x)))))


def _overhang(x: Tensor, stride: int) -> tuple[int, int, int, int]:
    """What pads the right and the bottom to whole cells."""
    height, width = x.shape[-2:]
    return (0, -width % stride, 0, -height % stride)
