"""Products left P with a left that is mostly zero, and their gradient: shared by cumulative_masks and the ranking.

A block of left that is all zero costs one look at it, so increments of cumulative weights cost about K² per image.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import place

TILE = {"ROWS": 16, "COLUMNS": 64, "num_warps": 1}  # 32 registers a thread


@triton.jit
def entries(i, j, k):
    """Offsets of rows ``i``, columns ``j`` in a K×K matrix, and which of them exist.

    In 32 bits, which halves the registers of an address: a matrix has fewer than 2³¹ entries, a batch may have more.
    """
    return i[:, None] * k + j[None, :], (i < k)[:, None] & (j < k)[None, :]


@triton.jit
def upstream(grad, left, right, b, i, j, k, steps):
    """A tile of ∂ℓ/∂P from the gradient of the output: of P itself, of left P (B,S,K) or of P right (B,K)."""
    if left is not None:
        total = tl.zeros((i.shape[0], j.shape[0]), tl.float32)
        for chunk in range(0, steps, 8):
            s = chunk + tl.arange(0, 8)
            weights = tl.load(left + s[:, None] * k + i[None, :], (s < steps)[:, None] & (i < k)[None, :], 0.0)
            if tl.max(tl.abs(weights)) > 0:
                for n in range(chunk, tl.minimum(chunk + 8, steps)):
                    weight = tl.load(left + n * k + i, i < k, 0.0)
                    total += weight[:, None] * tl.load(grad + (b * steps + n) * k + j, j < k, 0.0)[None, :]
        return total
    elif right is not None:  # noqa: RET505  (only the branch that applies is compiled)
        along = tl.load(right + b * k + j, j < k, 0.0)
        return tl.load(grad + b * k + i, i < k, 0.0)[:, None] * along[None, :]
    else:
        offsets, inside = entries(i, j, k)
        return tl.load(grad + b * k * k + offsets, inside, 0.0)


@triton.jit
def weigh_rows(permutation, left, out, k, steps, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out_s = Σ_i left_si permutation_i: (B,K,K), (S,K) → (B,S,K); a program for each b, s and column block."""
    pair, block = place(tl.cdiv(k, COLUMNS))
    b, s = pair // steps, pair % steps
    j = block * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    for first in range(0, k, ROWS):
        i = first + tl.arange(0, ROWS)
        weight = tl.load(left + s * k + i, i < k, 0.0)
        if tl.max(tl.abs(weight)) > 0:
            offsets, inside = entries(i, j, k)
            total += tl.sum(weight[:, None] * tl.load(permutation + b * k * k + offsets, inside, 0.0), 0)
    tl.store(out + pair * k + j, total, j < k)


@triton.jit
def spread_rows(grad, left, out, k, steps, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out_ij = Σ_s left_si grad_sj: (B,S,K), (S,K) → (B,K,K); a program for each b and tile."""
    down = tl.cdiv(k, ROWS)
    b, tile = place(down * tl.cdiv(k, COLUMNS))
    i = tile % down * ROWS + tl.arange(0, ROWS)
    j = tile // down * COLUMNS + tl.arange(0, COLUMNS)
    offsets, inside = entries(i, j, k)
    tl.store(out + b * k * k + offsets, upstream(grad, left, None, b, i, j, k, steps), inside)


def cumulative_masks(permutation: Tensor, left: Tensor) -> Tensor:
    batch, k, _ = permutation.shape
    steps = left.shape[0]
    out = permutation.new_empty(batch, steps, k)
    if out.numel():
        grid = (batch * steps * triton.cdiv(k, TILE["COLUMNS"]),)
        permutation, left = permutation.contiguous(), left.contiguous()
        weigh_rows[grid](permutation=permutation, left=left, out=out, k=k, steps=steps, **TILE)
    return out


def cumulative_masks_backward(grad: Tensor, left: Tensor) -> Tensor:
    batch, steps, k = grad.shape
    out = torch.empty(batch, k, k, dtype=grad.dtype, device=grad.device)
    if out.numel():
        grid = (batch * triton.cdiv(k, TILE["ROWS"]) * triton.cdiv(k, TILE["COLUMNS"]),)
        spread_rows[grid](grad=grad.contiguous(), left=left.contiguous(), out=out, k=k, steps=steps, **TILE)
    return out
