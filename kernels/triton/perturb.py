"""Deletion and insertion images: from soft masks upsampled by two banded matrices, and from pixel ranks.

    inserted = r + m (x − r),  deleted = x + r − inserted,  then (y − mean)/std and a cast;  arithmetic in float32

Bound by the 2·B·S·C·H·W values written. Gradients are gathered by the programs that own them: no atomics.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import place

# Launch configurations: pixels of a tile (rows × columns), or in a row; warps
PATCH = {"ROWS": 4, "COLUMNS": 128, "num_warps": 4}
SPAN = {"SPAN": 512, "num_warps": 4}
FOLD = {"ROWS": 16, "PIXELS": 32, "num_warps": 4}  # pixel rows × pixel columns folded into cells at a time


@triton.jit
def _upsampled(grid, row_cell, row_weight, col_cell, col_weight, y, x, height, width, cols, row_taps, col_taps):
    """A tile of the mask whose cells start at ``grid``."""
    keep = tl.zeros((y.shape[0], x.shape[0]), tl.float32)
    for a in range(row_taps):
        row = tl.load(row_cell + y * row_taps + a, y < height, 0) * cols
        vertical = tl.load(row_weight + y * row_taps + a, y < height, 0.0)
        for c in range(col_taps):
            cell = tl.load(col_cell + x * col_taps + c, x < width, 0)
            horizontal = tl.load(col_weight + x * col_taps + c, x < width, 0.0)
            keep += vertical[:, None] * horizontal[None, :] * tl.load(grid + row[:, None] + cell[None, :])
    return keep


@triton.jit
def _normalised(value, mean, std, c):
    if mean is not None:
        value -= tl.load(mean + c)
    if std is not None:
        value = tl.div_rn(value, tl.load(std + c))
    return value


@triton.jit
def _patches(height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """How many tiles a plane has."""
    return tl.cdiv(height, ROWS) * tl.cdiv(width, COLUMNS)


@triton.jit
def patch(tile, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pixels of a tile: y, x, the first y·W + x (int64), how far the others are from it (int32), and which exist."""
    across = tl.cdiv(width, COLUMNS)
    top, left = tile // across * ROWS, tile % across * COLUMNS
    down, along = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    y, x = top + down, left + along
    start = top.to(tl.int64) * width + left
    return y, x, start, down[:, None] * width + along[None, :], (y < height)[:, None] & (x < width)[None, :]


@triton.jit
def blend(
    images,
    references,
    masks,
    row_cell,
    row_weight,
    col_cell,
    col_weight,
    mean,
    std,
    deleted,
    inserted,
    steps,
    channels,
    height,
    width,
    rows,
    cols,
    row_taps,
    col_taps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Both images of one (image, step) and one tile of pixels."""
    pair, tile = place(_patches(height, width, ROWS, COLUMNS))
    y, x, start, pixel, inside = patch(tile, height, width, ROWS, COLUMNS)
    grid = masks + pair * rows * cols
    keep = _upsampled(grid, row_cell, row_weight, col_cell, col_weight, y, x, height, width, cols, row_taps, col_taps)
    for c in range(channels):
        at = (pair // steps * channels + c) * height * width + start + pixel
        image = tl.load(images + at, inside, 0.0).to(tl.float32)
        reference = tl.load(references + at, inside, 0.0).to(tl.float32)
        shown = reference + keep * (image - reference)
        gone = image + reference - shown
        to = (pair * channels + c) * height * width + start + pixel
        tl.store(inserted + to, _normalised(shown, mean, std, c).to(inserted.dtype.element_ty), inside)
        tl.store(deleted + to, _normalised(gone, mean, std, c).to(deleted.dtype.element_ty), inside)


@triton.jit
def blend_backward_images(
    grad_deleted,
    grad_inserted,
    masks,
    row_cell,
    row_weight,
    col_cell,
    col_weight,
    std,
    grad_images,
    grad_references,
    steps,
    channels,
    height,
    width,
    rows,
    cols,
    row_taps,
    col_taps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Gradients of one channel of an image and its reference, summed over steps, in one tile."""
    plane, tile = place(_patches(height, width, ROWS, COLUMNS))
    b, c = plane // channels, plane % channels
    y, x, start, pixel, inside = patch(tile, height, width, ROWS, COLUMNS)
    image, reference = tl.zeros((ROWS, COLUMNS), tl.float32), tl.zeros((ROWS, COLUMNS), tl.float32)
    for s in range(steps):
        pair = b * steps + s
        grid = masks + pair * rows * cols
        keep = _upsampled(
            grid, row_cell, row_weight, col_cell, col_weight, y, x, height, width, cols, row_taps, col_taps
        )
        at = (pair * channels + c) * height * width + start + pixel
        gone = tl.load(grad_deleted + at, inside, 0.0).to(tl.float32)
        shown = tl.load(grad_inserted + at, inside, 0.0).to(tl.float32)
        image += gone + keep * (shown - gone)
        reference += shown + keep * (gone - shown)
    at = plane * height * width + start + pixel
    tl.store(grad_images + at, _normalised(image, None, std, c).to(grad_images.dtype.element_ty), inside)
    tl.store(grad_references + at, _normalised(reference, None, std, c).to(grad_references.dtype.element_ty), inside)


@triton.jit
def _band(cell, weight, pixel, pixels, taps, cells):
    """A tile (pixels × cells) of a banded matrix."""
    band = tl.zeros((pixel.shape[0], cells.shape[0]), tl.float32)
    for tap in range(taps):
        at = pixel * taps + tap
        here = tl.load(cell + at, pixel < pixels, -1)
        band += tl.where(here[:, None] == cells[None, :], tl.load(weight + at, pixel < pixels, 0.0)[:, None], 0.0)
    return band


@triton.jit
def fold_columns(
    grad_deleted,
    grad_inserted,
    images,
    references,
    col_cell,
    col_weight,
    std,
    folded,
    steps,
    channels,
    height,
    width,
    cols,
    col_taps,
    ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
    CELLS: tl.constexpr,
):
    """∂ℓ/∂mask of a block of pixel rows, times the column band: (B,S,H,cols)."""
    pair, block = place(tl.cdiv(height, ROWS))
    down, cells = tl.arange(0, ROWS), tl.arange(0, CELLS)
    y, start = block * ROWS + down, block.to(tl.int64) * ROWS * width
    total = tl.zeros((ROWS, CELLS), tl.float32)
    for first in range(0, width, PIXELS):
        x = first + tl.arange(0, PIXELS)
        pixel, inside = down[:, None] * width + x[None, :], (y < height)[:, None] & (x < width)[None, :]
        slope = tl.zeros((ROWS, PIXELS), tl.float32)
        for c in range(channels):
            at = (pair * channels + c) * height * width + start + pixel
            change = tl.load(grad_inserted + at, inside, 0.0).to(tl.float32)
            change -= tl.load(grad_deleted + at, inside, 0.0).to(tl.float32)
            at = (pair // steps * channels + c) * height * width + start + pixel
            image = tl.load(images + at, inside, 0.0).to(tl.float32)
            reference = tl.load(references + at, inside, 0.0).to(tl.float32)
            slope += _normalised(change * (image - reference), None, std, c)
        band = _band(col_cell, col_weight, x, width, col_taps, cells)
        total = tl.dot(slope, band, total, input_precision="ieee")
    at = (pair * height + y)[:, None] * cols + cells[None, :]
    tl.store(folded + at, total, (y < height)[:, None] & (cells < cols)[None, :])


@triton.jit
def fold_rows(
    folded,
    row_cell,
    row_weight,
    grad_masks,
    height,
    rows,
    cols,
    row_taps,
    ROWS: tl.constexpr,
    PIXELS: tl.constexpr,
    CELLS: tl.constexpr,
):
    """The transposed row band times ``folded``: (B,S,rows·cols), a block of cell rows."""
    pair, block = place(tl.cdiv(rows, ROWS))
    row, cells = block * ROWS + tl.arange(0, ROWS), tl.arange(0, CELLS)
    total = tl.zeros((ROWS, CELLS), tl.float32)
    for first in range(0, height, PIXELS):
        y = first + tl.arange(0, PIXELS)
        at = (pair * height + y)[:, None] * cols + cells[None, :]
        part = tl.load(folded + at, (y < height)[:, None] & (cells < cols)[None, :], 0.0)
        band = _band(row_cell, row_weight, y, height, row_taps, row)
        total = tl.dot(tl.trans(band), part, total, input_precision="ieee")
    at = pair * rows * cols + row[:, None] * cols + cells[None, :]
    tl.store(grad_masks + at, total, (row < rows)[:, None] & (cells < cols)[None, :])


@triton.jit
def choose(
    images, references, ranks, counts, mean, std, deleted, inserted, steps, channels, pixels, SPAN: tl.constexpr
):
    """Both images of one (image, count): pixels with rank < count keep the image; one span of pixels."""
    pair, block = place(tl.cdiv(pixels, SPAN))
    pixel = block.to(tl.int64) * SPAN + tl.arange(0, SPAN)
    inside = pixel < pixels
    keep = tl.load(ranks + pair // steps * pixels + pixel, inside, 0) < tl.load(counts + pair % steps)
    for c in range(channels):
        at = (pair // steps * channels + c) * pixels + pixel
        image = _normalised(tl.load(images + at, inside, 0.0).to(tl.float32), mean, std, c)
        reference = _normalised(tl.load(references + at, inside, 0.0).to(tl.float32), mean, std, c)
        to = (pair * channels + c) * pixels + pixel
        tl.store(inserted + to, tl.where(keep, image, reference).to(inserted.dtype.element_ty), inside)
        tl.store(deleted + to, tl.where(keep, reference, image).to(deleted.dtype.element_ty), inside)


@triton.jit
def choose_backward(
    grad_deleted,
    grad_inserted,
    ranks,
    counts,
    std,
    grad_images,
    grad_references,
    steps,
    channels,
    pixels,
    SPAN: tl.constexpr,
):
    """Gradients of one channel of an image and its reference, summed over counts in order, in one span."""
    plane, block = place(tl.cdiv(pixels, SPAN))
    b, c = plane // channels, plane % channels
    pixel = block.to(tl.int64) * SPAN + tl.arange(0, SPAN)
    inside = pixel < pixels
    rank = tl.load(ranks + b * pixels + pixel, inside, 0)
    image, reference = tl.zeros((SPAN,), tl.float32), tl.zeros((SPAN,), tl.float32)
    for s in range(steps):
        at = ((b * steps + s) * channels + c) * pixels + pixel
        gone = tl.load(grad_deleted + at, inside, 0.0).to(tl.float32)
        shown = tl.load(grad_inserted + at, inside, 0.0).to(tl.float32)
        keep = rank < tl.load(counts + s)
        image += tl.where(keep, shown, gone)
        reference += tl.where(keep, gone, shown)
    at = plane * pixels + pixel
    tl.store(grad_images + at, _normalised(image, None, std, c).to(grad_images.dtype.element_ty), inside)
    tl.store(grad_references + at, _normalised(reference, None, std, c).to(grad_references.dtype.element_ty), inside)


def _tiles(height: int, width: int) -> int:
    return triton.cdiv(height, PATCH["ROWS"]) * triton.cdiv(width, PATCH["COLUMNS"])


def _contiguous(**tensors: Tensor | None) -> dict[str, Tensor | None]:
    return {name: None if tensor is None else tensor.contiguous() for name, tensor in tensors.items()}


def _pair(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    return like.new_empty(shape, dtype=dtype), like.new_empty(shape, dtype=dtype)


def _axes(row_cell, row_weight, col_cell, col_weight, rows, cols) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the kernels take for each axis: its cells and taps."""
    in_rows: dict[str, Any] = {"rows": rows, "row_taps": row_cell.shape[1]}
    in_cols: dict[str, Any] = {"cols": cols, "col_taps": col_cell.shape[1]}
    in_rows |= _contiguous(row_cell=row_cell, row_weight=row_weight)
    in_cols |= _contiguous(col_cell=col_cell, col_weight=col_weight)
    return in_rows, in_cols


def _sizes(images: Tensor, steps: int) -> dict[str, int]:
    _, channels, height, width = images.shape
    return {"steps": steps, "channels": channels, "height": height, "width": width}


def perturb(
    images, references, masks, row_cell, row_weight, col_cell, col_weight, rows, cols, mean, std, dtype
) -> tuple[Tensor, Tensor]:
    batch, steps, _ = masks.shape
    deleted, inserted = _pair(images, (batch, steps, *images.shape[1:]), dtype)
    if deleted.numel():
        given = _contiguous(images=images, references=references, masks=masks, mean=mean, std=std)
        in_rows, in_cols = _axes(row_cell, row_weight, col_cell, col_weight, rows, cols)
        blend[(batch * steps * _tiles(*images.shape[2:]),)](
            **given, **in_rows, **in_cols, deleted=deleted, inserted=inserted, **_sizes(images, steps), **PATCH
        )
    return deleted, inserted


def perturb_backward(
    grad_deleted,
    grad_inserted,
    images,
    references,
    masks,
    row_cell,
    row_weight,
    col_cell,
    col_weight,
    rows,
    cols,
    std,
    need_images,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, channels, height, width = images.shape
    steps = masks.shape[1]
    given = _contiguous(grad_deleted=grad_deleted, grad_inserted=grad_inserted, std=std)
    in_rows, in_cols = _axes(row_cell, row_weight, col_cell, col_weight, rows, cols)
    sizes = _sizes(images, steps)

    grad_masks = torch.empty(masks.shape, dtype=masks.dtype, device=masks.device)
    if grad_masks.numel():
        folded = masks.new_empty(batch * steps, height, cols)
        pixels = _contiguous(images=images, references=references)
        fold = {"folded": folded, "CELLS": max(16, triton.next_power_of_2(cols)), **FOLD}
        grid = (batch * steps * triton.cdiv(height, FOLD["ROWS"]),)
        fold_columns[grid](**given, **pixels, **in_cols, **sizes, **fold)
        grid = (batch * steps * triton.cdiv(rows, FOLD["ROWS"]),)
        fold_rows[grid](**in_rows, cols=cols, height=height, grad_masks=grad_masks, **fold)

    grad_images, grad_references = _pair(images, tuple(images.shape) if need_images else (0,), None)
    if grad_images.numel():
        grads = {"grad_images": grad_images, "grad_references": grad_references}
        blend_backward_images[(batch * channels * _tiles(height, width),)](
            **given, masks=masks.contiguous(), **in_rows, **in_cols, **sizes, **grads, **PATCH
        )
    return grad_masks, grad_images, grad_references


def perturb_by_rank(images, references, ranks, counts, mean=None, std=None, dtype=None) -> tuple[Tensor, Tensor]:
    batch, channels, height, width = images.shape
    steps, pixels = counts.shape[0], height * width
    deleted, inserted = _pair(images, (batch, steps, channels, height, width), dtype)
    if deleted.numel():
        given = _contiguous(images=images, references=references, ranks=ranks, counts=counts, mean=mean, std=std)
        grid = (batch * steps * triton.cdiv(pixels, SPAN["SPAN"]),)
        outputs = {"deleted": deleted, "inserted": inserted}
        choose[grid](**given, **outputs, steps=steps, channels=channels, pixels=pixels, **SPAN)
    return deleted, inserted


def perturb_by_rank_backward(grad_deleted, grad_inserted, ranks, counts, std=None, dtype=None) -> tuple[Tensor, Tensor]:
    batch, steps, channels, height, width = grad_deleted.shape
    pixels = height * width
    grad_images, grad_references = _pair(grad_deleted, (batch, channels, height, width), dtype)
    if grad_images.numel():
        given = _contiguous(grad_deleted=grad_deleted, grad_inserted=grad_inserted, ranks=ranks, counts=counts, std=std)
        grads = {"grad_images": grad_images, "grad_references": grad_references}
        grid = (batch * channels * triton.cdiv(pixels, SPAN["SPAN"]),)
        choose_backward[grid](**given, **grads, steps=steps, channels=channels, pixels=pixels, **SPAN)
    return grad_images, grad_references
