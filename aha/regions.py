"""Regions: one map from pixels to grid cells, which serves both pooling and upsampling (paper §3.3)."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import FLOATS, check_integer, check_number, check_size, checked
from .kernels import Taps, Upsampler
from .kernels.messages import describe
from .references import gaussian


@dataclass(frozen=True)
class Regions:
    """A grid laid over H×W pixels.

    Attributes:
        row_index: (H,) int64, the grid row of every pixel row; ascending, every row of the grid occurs.
        col_index: (W,) int64, likewise for columns.
        rows, cols: size of the grid; K = rows · cols, row-major.
    """

    row_index: Tensor
    col_index: Tensor
    rows: int
    cols: int

    @property
    def count(self) -> int:
        """K, the number of regions."""
        return self.rows * self.cols

    def cell_index(self) -> Tensor:
        """The region of every pixel, (H, W) int64."""
        return self.row_index[:, None] * self.cols + self.col_index

    @checked
    def pool(self, maps: Tensor) -> Tensor:
        """Mean of maps over every region, in their precision: (B,1,H,W) → (B,K)."""
        self.check(maps)
        vertical = _pooling(self.row_index, self.rows).to(maps)
        horizontal = _pooling(self.col_index, self.cols).to(maps)
        return _Pool.apply(maps[:, 0], vertical, horizontal).flatten(1)

    def check(self, maps: Tensor) -> None:
        """ValueError in one line for maps of another shape than (B,1,H,W)."""
        size = (len(self.row_index), len(self.col_index))
        if maps.ndim != 4 or maps.shape[1] != 1 or tuple(maps.shape[2:]) != size or maps.dtype not in FLOATS:
            raise ValueError(f"maps is {describe(maps)}: give floating point (B, 1, {size[0]}, {size[1]})")

    @checked
    def upsampler(self, sigma: float = 1.0, kernel: int = 7, device: torch.device | str = "cpu") -> Upsampler:
        """Cells back to pixels: nearest, then a Gaussian with reflect padding (``sigma=0``: nearest only)."""
        check_number("sigma", sigma, 0)
        check_integer("kernel", kernel, 1)
        return Upsampler(
            _taps(self.row_index, self.rows, sigma, kernel), _taps(self.col_index, self.cols, sigma, kernel)
        ).to(device)


class _Pool(torch.autograd.Function):
    """vertical · map · horizontalᵀ in the maps' precision, forward and backward, also where autocast is on."""

    generate_vmap_rule = True

    @staticmethod
    def forward(maps: Tensor, vertical: Tensor, horizontal: Tensor) -> Tensor:
        with torch.autocast(maps.device.type, enabled=False):
            return vertical @ maps @ horizontal.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        vertical, horizontal = ctx.saved_tensors
        with torch.autocast(grads[0].device.type, enabled=False):
            return vertical.mT @ grads[0] @ horizontal, None, None


@checked
def grid(height: int, width: int, cells: int | tuple[int, int], offset: tuple[float, float] = (0.0, 0.0)) -> Regions:
    """A grid of ``cells`` (rows, or (rows, cols)) over height×width pixels, shifted by ``offset`` in cells (|offset| ≤
    ½).

    One number makes nearly square cells: that many along the shorter side. A shift narrows the first cell and widens
    the last, or the other way round; the number of regions stays.
    """
    height, width = check_size("height and width", (height, width))
    if not isinstance(cells, Sequence):
        cells = check_integer("cells", cells, 1)
        short = min(height, width)
        cells = (max(1, round(cells * height / short)), max(1, round(cells * width / short)))
    if len(cells) != 2 or isinstance(cells, str):
        raise ValueError(f"cells={cells!r}: give a number along the shorter side, or (rows, cols)")
    rows, cols = (check_integer("cells", number, 0) for number in cells)
    if not (1 <= rows <= height and 1 <= cols <= width):
        raise ValueError(f"a grid of {rows}×{cols} cells does not fit {height}×{width} pixels: give 1 … one per pixel")
    if max(abs(offset[0]), abs(offset[1])) > 0.5:
        raise ValueError(f"offset={offset}: give at most half a cell, in [-0.5, 0.5]")
    return Regions(_index(height, rows, offset[0]), _index(width, cols, offset[1]), rows, cols)


@checked
def draw(
    height: int,
    width: int,
    cells: tuple[int, int],
    generator: torch.Generator,
    offset: bool = True,
) -> Regions:
    """A random grid: rows uniform in ``cells`` (both ends included), offset uniform up to half a cell."""
    low, high = (check_integer("cells", number, 1) for number in cells)
    if low > high:
        raise ValueError(f"cells={cells}: give the coarsest and the finest grid, the smaller number first")
    rows = int(torch.randint(low, high + 1, (), generator=generator))
    shift = torch.rand(2, dtype=torch.float32, generator=generator) - 0.5 if offset else torch.zeros(2)
    return grid(height, width, rows, (float(shift[0]), float(shift[1])))


@checked
def default_cells(height: int, width: int) -> tuple[int, int]:
    """Cells of 32 to 8 px at 224, scaled with the image: 7…28 cells where the side allows cells of 2 px or more."""
    short = min(check_size("height and width", (height, width)))
    return min(7, max(2, short // 4)), max(2, min(28, short // 4))


def _index(pixels: int, cells: int, offset: float) -> Tensor:
    position = (torch.arange(pixels, dtype=torch.float64) + 0.5) * cells / pixels + offset
    index = position.floor().long().clamp(0, cells - 1)
    if len(index.unique()) != cells:  # cells of one or two pixels: a shift may empty one
        return ((torch.arange(pixels, dtype=torch.float64) + 0.5) * cells / pixels).floor().long()
    return index


def _pooling(index: Tensor, cells: int) -> Tensor:
    member = F.one_hot(index, cells).T.double()  # [cells, pixels]
    return member / member.sum(dim=1, keepdim=True)


def _taps(index: Tensor, cells: int, sigma: float, kernel: int) -> Taps:
    return _cached_taps(tuple(index.tolist()), cells, sigma, kernel)


@lru_cache(maxsize=512)
def _cached_taps(index: tuple[int, ...], cells: int, sigma: float, kernel: int) -> Taps:
    # ordinary tensors also if the first to ask is in inference mode: the next may train
    with torch.inference_mode(False):
        return _make_taps(index, cells, sigma, kernel)


def _make_taps(index: tuple[int, ...], cells: int, sigma: float, kernel: int) -> Taps:
    matrix = F.one_hot(torch.tensor(index), cells).double()  # [pixels, cells]
    if sigma > 0:
        radius = min(kernel // 2, len(index) - 1)
        weights = gaussian(2 * radius + 1, sigma).double()
        padded = F.pad(matrix.T[None], (radius, radius), mode="reflect")  # [1, cells, pixels + 2·radius]
        matrix = F.conv1d(padded.transpose(0, 1), weights[None, None])[:, 0].T
    width = int((matrix > 0).sum(dim=1).max())
    weight, column = matrix.topk(width, dim=1)
    return Taps(column, weight.float(), cells)
