"""DPT decoder with a class embedding, and the head that draws its map (paper §3.5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..checks import check_integer
from ..kernels.messages import short

WIDEST = 2**14  # channels of a layer


@dataclass(frozen=True)
class DecoderConfig:
    """Widths of the decoder; the defaults are the paper's.

    Attributes:
        embedding: size of the learned class embedding.
        width: channels of the fusion blocks.
        head: channels of the finest map.
        strides: pixels per cell of the four levels, fine to coarse.

    Raises:
        ValueError: in one line, for what is no width, or beyond `WIDEST`.
    """

    embedding: int = 1024
    width: int = 256
    head: int = 128
    strides: tuple[int, int, int, int] = (4, 8, 16, 32)

    def __post_init__(self) -> None:
        for name in ("embedding", "width", "head"):
            check_integer(name, getattr(self, name), 1, WIDEST)
        if not isinstance(self.strides, tuple) or len(self.strides) != 4:
            raise ValueError(f"strides={short(self.strides)}: give four integers, pixels per cell")
        for stride in self.strides:
            check_integer("strides", stride, 1, 1024)


class Decoder(nn.Module):
    """Four feature maps and a class → one attribution map.

    Args:
        channels: of the feature maps.
        sight: what reads image and evidence, where it does: what it sees joins the finest level, and the head starts
            at 0, for its map is added to the best single evidence.
        rows: (classes, D) of the classifier's head, of which the class embedding is then a linear map; else it is a
            table.
    """

    embedding: nn.Module
    rows: Tensor | None

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        config: DecoderConfig,
        sight: nn.Module | None = None,
        rows: Tensor | None = None,
    ):
        super().__init__()
        self.config = config
        self.sight = sight
        # the classifier's own, which a loaded explainer reads again
        self.register_buffer("rows", None if rows is None else _normalized(rows), persistent=False)
        if rows is None:
            table = nn.Embedding(num_classes, config.embedding)
            nn.init.normal_(table.weight, std=0.02)
            self.embedding = table
        else:
            self.embedding = nn.Linear(rows.shape[1], config.embedding, bias=False)
        self.levels = nn.ModuleList(Level(c, config.embedding, config.width) for c in channels)
        self.fusions = nn.ModuleList(Fusion(config.width, deepest=i == 3) for i in range(len(channels)))
        self.finest = nn.Conv2d(config.width, config.head, 3, padding=1)
        self.head = Head(config.head)
        if sight is not None:
            self.head.begin_at_nothing()

    def dense(
        self,
        features: Sequence[Tensor],
        target: Tensor,
        size: tuple[int, int],
        seen: tuple[Tensor, Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The finest map (N, head, h, w) before the head, for images of ``size``.

        ``target`` is (B,), or (B, M) for M maps per image: N = B·M, image-major. ``seen``: N images, their evidence
        and which of it is present, for `sight`.
        """
        repeats = target.shape[1] if target.ndim == 2 else 1
        condition = self.embedding(target.flatten() if self.rows is None else self.rows[target.flatten()])
        x: Tensor | None = None
        for i in reversed(range(len(self.levels))):
            stride = self.config.strides[i]
            grid = (-(-size[0] // stride), -(-size[1] // stride))
            level = self.levels[i](features[i], condition, repeats)
            level = F.interpolate(level, grid, mode="bilinear", align_corners=False)
            x = self.fusions[i](level, x)
        assert x is not None
        if self.sight is not None and seen is not None:
            # cells that hang over the image's border are empty
            x = x + _fitted(self.sight(*seen), (x.shape[-2], x.shape[-1]))
        return self.finest(x)


class Level(nn.Module):
    """concat(feature, class embedding) → linear → GELU → project.

    The linear map of the concatenation is the sum of two, so the one over the features runs once for all classes.
    """

    def __init__(self, channels: int, embedding: int, width: int):
        super().__init__()
        self.feature = nn.Conv2d(channels, channels, 1)
        self.condition = nn.Linear(embedding, channels, bias=False)
        self.project = nn.Conv2d(channels, width, 1)

    def forward(self, feature: Tensor, condition: Tensor, repeats: int) -> Tensor:
        x = self.feature(feature)
        if repeats > 1:
            x = x.repeat_interleave(repeats, dim=0)
        return self.project(F.gelu(x + self.condition(condition)[:, :, None, None]))


class Fusion(nn.Module):
    """Add a level to the deeper result (bilinear ×2 to its size) and refine."""

    def __init__(self, width: int, deepest: bool):
        super().__init__()
        self.lateral = None if deepest else ResidualUnit(width)
        self.refine = ResidualUnit(width)
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, level: Tensor, deeper: Tensor | None) -> Tensor:
        x = level
        if self.lateral is not None and deeper is not None:
            x = self.lateral(level) + F.interpolate(deeper, level.shape[-2:], mode="bilinear", align_corners=False)
        return self.out(self.refine(x))


class ResidualUnit(nn.Module):
    """x + conv(relu(conv(relu(x))))."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class Head(nn.Sequential):
    """Depthwise-separable conv and 3×3 conv, each with GELU and batch norm, then one channel."""

    def __init__(self, width: int):
        last = nn.Conv2d(width, 1, 1)
        assert last.bias is not None
        nn.init.normal_(last.weight, std=0.01)
        nn.init.zeros_(last.bias)
        super().__init__(
            nn.Conv2d(width, width, 3, padding=1, groups=width),
            nn.Conv2d(width, width, 1),
            nn.GELU(),
            BatchNorm(width),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GELU(),
            BatchNorm(width),
            last,
        )

    def begin_at_nothing(self) -> None:
        """The last layer starts anew, what is before it stays: the map is zero until it is trained."""
        for parameter in self[-1].parameters():
            nn.init.zeros_(parameter)


class BatchNorm(nn.BatchNorm2d):
    """Batch norm over the images of all processes, which may have different numbers of them.

    Norms of their own would train another explainer than one process with the same batch does. `nn.SyncBatchNorm`,
    which has the same state, refuses CPUs.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(input)
        from torch.distributed.nn.functional import all_reduce  # differentiable; slow to import

        variance, mean = (part.double() for part in torch.var_mean(input, dim=(0, 2, 3), correction=0))
        count = mean.new_full((1,), input.numel() / len(mean))
        # in double precision the mean square less the squared mean is as good as any other way
        sums = torch.cat([count, count * mean, count * (variance + mean.square())])
        moments = all_reduce(sums, group=dist.group.WORLD)
        count, mean, square = moments.split([1, len(mean), len(mean)])
        mean = mean / count
        variance = square / count - mean.square()
        with torch.no_grad():
            assert self.running_mean is not None and self.running_var is not None and self.momentum is not None
            self.num_batches_tracked += 1  # type: ignore[assignment, operator]
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            self.running_var.lerp_((variance * count / (count - 1)).to(self.running_var), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps).to(self.weight)
        return (input - _channels(mean.to(input))) * _channels(scale) + _channels(self.bias)


def _channels(values: Tensor) -> Tensor:
    return values[:, None, None]


def _normalized(rows: Tensor) -> Tensor:
    """Of norm 1 on average, their mean taken away: what all classes share tells none."""
    rows = rows.detach().float()
    rows = rows - rows.mean(dim=0)
    return rows / rows.norm(dim=1).mean().clamp(min=1e-12)


def _fitted(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Zeros added at the right and the bottom, or cells cut off."""
    return F.pad(x, (0, size[1] - x.shape[-1], 0, size[0] - x.shape[-2]))


def upsample(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """(N,1,h,w) → (N,1,H,W), bilinear."""
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)
