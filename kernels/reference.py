"""The operators in plain PyTorch: the ground truth that every other backend is tested against.

Written for clarity: one log-domain Sinkhorn loop, matrix products, autograd. Any device; pixels in half precision are
computed in float32.
"""

import torch
from torch import Tensor

from .random import gumbel


def log_sinkhorn(logits: Tensor, n_iters: int) -> Tensor:
    """(B,K,K) → (B,K,K): ``n_iters`` pairs of row and column normalisation in the log domain, columns last."""
    column = logits.new_zeros(()).expand(logits.shape[0], 1, logits.shape[-1])
    return _normalise(logits, column, n_iters)


def _normalise(logits: Tensor, column: Tensor, n_iters: int) -> Tensor:
    # the matrix stays as it is, only the potentials move: one rounding per entry, not 2·n_iters
    for _ in range(n_iters - 1):
        row = -torch.logsumexp(logits + column, dim=-1, keepdim=True)  # [B, K, 1]
        column = -torch.logsumexp(logits + row, dim=-2, keepdim=True)  # [B, 1, K]
    row = -torch.logsumexp(logits + column, dim=-1, keepdim=True)
    # the last column step takes the largest away first: columns sum to 1 however large the logits
    return torch.log_softmax(logits + row, dim=-2)


def log_permutation(
    scores: Tensor, tau: Tensor, n_iters: int, noise: float, seed: Tensor, start: Tensor | None = None
) -> Tensor:
    """(B,K) → (B,K,K) log P of L_ij = (−(a_j − p_i)² + noise·γ_ij)/τ.

    −(a−p)² is split into the product 2(a−½)(p−½), a column constant, which becomes the first column potential unless
    another ``start`` (B,K) is given, and a row constant, which the first row step removes, as it does a constant of the
    potential: the same operator, far better conditioned when scores are large.
    """
    batch, k = scores.shape
    centred = scores - 0.5  # [B, K]
    ranks = torch.linspace(1, 0, k, dtype=scores.dtype, device=scores.device) - 0.5  # [K]
    logits = 2 * ranks[:, None] * centred[:, None, :]
    if noise:
        logits = logits + noise * gumbel((batch, k, k), seed, scores.device).to(scores.dtype)
    column = _initial(centred[:, None, :], tau) if start is None else start[:, None, :]
    return _normalise(logits / tau, column, n_iters)


def _initial(centred: Tensor, tau: Tensor) -> Tensor:
    """(…,K): −(c² − n²)/τ with n = min |c|; in factors, for the squares may be rounded away, or overflow."""
    nearest = centred.detach().abs().amin(dim=-1, keepdim=True)
    return -4 * ((centred / 2 - nearest / 2) / tau) * (centred / 2 + nearest / 2)


def gumbel_sinkhorn(scores: Tensor, tau: Tensor, n_iters: int, noise: float, seed: Tensor) -> Tensor:
    """(B,K) → (B,K,K) soft permutation; row i holds the region at rank i, every column sums to 1."""
    return log_permutation(scores, tau, n_iters, noise, seed).exp()


def cumulative_masks(permutation: Tensor, left: Tensor) -> Tensor:
    """(B,K,K), (S,K) → (B,S,K): left · P, sums of the rank rows with these weights."""
    return left @ permutation


def soft_topk_masks(scores: Tensor, left: Tensor, tau: Tensor, n_iters: int, noise: float, seed: Tensor) -> Tensor:
    """(B,K), (S,K) → (B,S,K): the two operators above, one after the other."""
    return cumulative_masks(gumbel_sinkhorn(scores, tau, n_iters, noise, seed), left)


def read_left(
    scores: Tensor, start: Tensor, left: Tensor, tau: Tensor, n_iters: int, noise: float, seed: Tensor
) -> tuple[Tensor, Tensor]:
    """(B,K), (B,K), (K,) → (B,K): left · P, for every region the soft choice of a rank's weight; and the row error.

    The row error (B,): the largest |row sum − 1| of P. Columns, normalised last, sum to 1.
    """
    p = log_permutation(scores, tau, n_iters, noise, seed, start).exp()
    return left @ p, _row_error(p)


def read_right(
    scores: Tensor, start: Tensor, right: Tensor, tau: Tensor, n_iters: int, noise: float, seed: Tensor
) -> tuple[Tensor, Tensor]:
    """Thrice (B,K) → (B,K): P · right, at every rank the soft choice of a region's value; and the row error."""
    p = log_permutation(scores, tau, n_iters, noise, seed, start).exp()
    return (p @ right[..., None])[..., 0], _row_error(p)


def _row_error(p: Tensor) -> Tensor:
    return (p.detach().sum(dim=2) - 1).abs().amax(dim=1)


def _precise(pixels: Tensor) -> Tensor:
    return pixels if pixels.dtype == torch.float64 else pixels.float()


def _normalised(pixels: Tensor, mean: Tensor | None, std: Tensor | None, dtype: torch.dtype) -> Tensor:
    if mean is not None:
        pixels = pixels - mean.to(pixels)[:, None, None]
    if std is not None:
        pixels = pixels / std.to(pixels)[:, None, None]
    return pixels.to(dtype)


def perturb(images, references, masks, rows, cols, mean, std, dtype) -> tuple[Tensor, Tensor]:
    """Upsample the masks with banded matrices, blend, normalise: → deleted, inserted (B,S,C,H,W)."""
    batch, steps, _ = masks.shape
    images, references = _precise(images)[:, None], _precise(references)[:, None]
    vertical, horizontal = rows.dense(images.dtype), cols.dense(images.dtype)  # [H, G], [W, G']
    grid = masks.to(images.dtype).reshape(batch, steps, rows.size, cols.size)
    keep = (vertical @ grid @ horizontal.mT)[:, :, None]  # [B, S, 1, H, W]
    inserted = references + keep * (images - references)
    deleted = images + references - inserted
    return _normalised(deleted, mean, std, dtype), _normalised(inserted, mean, std, dtype)


def perturb_by_rank(images, references, ranks, counts, mean, std, dtype) -> tuple[Tensor, Tensor]:
    """Hard masks: the pixels with ``rank < count`` are kept by insertion, replaced by deletion."""
    keep = (ranks[:, None] < counts[None, :, None, None])[:, :, None]  # [B, S, 1, H, W]
    images, references = _precise(images)[:, None], _precise(references)[:, None]
    deleted, inserted = torch.where(keep, references, images), torch.where(keep, images, references)
    return _normalised(deleted, mean, std, dtype), _normalised(inserted, mean, std, dtype)
