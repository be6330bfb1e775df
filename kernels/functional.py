"""The public operators: what each computes, and the checks at the door. Inner functions trust these.

Shapes: B images, K regions (cells of a grid, row-major), S fractions, C channels, H×W pixels.
Every function takes ``backend="auto" | "cuda" | "triton" | "cpu" | "reference"``; see `aha.kernels.explain`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import dispatch, random

_FLOATS = (torch.float32, torch.float64)
_IMAGE_FLOATS = (*_FLOATS, torch.bfloat16, torch.float16)


class Taps(NamedTuple):
    """A banded matrix (pixels × cells) as its non-zeros: pixel p reads ``Σ_t weight[p, t] · grid[cell[p, t]]``.

    Attributes:
        cell: (P, T) int64, values in [0, size); padding taps have weight 0 and any valid cell.
        weight: (P, T) float32.
        size: number of cells.
    """

    cell: Tensor
    weight: Tensor
    size: int

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The (P, size) matrix."""
        matrix = self.weight.new_zeros(self.cell.shape[0], self.size, dtype=dtype)
        return matrix.scatter_add_(1, self.cell, self.weight.to(dtype))


class Upsampler(NamedTuple):
    """Separable upsampling of a grid of cells to pixels: ``rows.dense() @ grid @ cols.dense().T``.

    Made by `aha.regions`; any pair of `Taps` will do (nearest, bilinear, nearest then Gaussian …).
    """

    rows: Taps
    cols: Taps

    def to(self, device: torch.device | str) -> "Upsampler":
        """The same upsampler on another device."""
        return Upsampler(*(Taps(t.cell.to(device), t.weight.to(device), t.size) for t in self))


def log_sinkhorn(logits: Tensor, n_iters: int = 30, *, backend: str = "auto") -> Tensor:
    """Sinkhorn normalisation in the log domain; row then column, columns last (paper §3.2).

    Args:
        logits: (B, K, K) float32 or float64, finite.
        n_iters: pairs of normalisations, ≥ 1.

    Returns:
        (B, K, K) log P. Columns of P sum to 1 to rounding, rows as far as the iterations converged.
    """
    _check_float("logits", logits, 3)
    if logits.shape[-1] != logits.shape[-2]:
        raise ValueError(f"logits has shape {tuple(logits.shape)}: give square matrices (B, K, K)")
    _check_iterations(n_iters)
    return dispatch.run("log_sinkhorn", backend, logits.device, logits, n_iters)


def gumbel_sinkhorn(
    scores: Tensor,
    tau: float | Tensor,
    n_iters: int = 30,
    noise: float = 0.0,
    seed: int | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Soft permutation that sorts ``scores`` in descending order (paper §3.2).

    P = Sinkhorn(L), L_ij = (−(a_j − p_i)² + noise·γ_ij)/τ with rank targets p = linspace(1, 0, K) and γ ~ Gumbel(0, 1).

    Args:
        scores: (B, K), float32 or float64 (half precision is computed in float32).
        tau: temperature > 0; a float or a 0-dim tensor, which receives a gradient.
        n_iters: Sinkhorn iterations ≥ 1.
        noise: scale of the Gumbel noise ≥ 0.
        seed: of the noise, in [0, 2⁶⁴); None draws one from PyTorch's default generator.

    Returns:
        (B, K, K) P; row i is the soft indicator of the region at rank i (0 = most important), columns sum to 1.
    """
    scores = _check_scores(scores)
    tau, seed = _check_ranking(scores, tau, n_iters, noise, seed)
    return dispatch.run("gumbel_sinkhorn", backend, scores.device, scores, tau, n_iters, float(noise), seed)


def cumulative_masks(permutation: Tensor, fractions: Tensor | Sequence[float], *, backend: str = "auto") -> Tensor:
    """Soft masks that keep the top fraction of the regions: cumulative sums over rank rows (paper §3.2).

    Args:
        permutation: (B, K, K), row i = rank i.
        fractions: (S,) ascending, in [0, 1]; a fraction that falls between two ranks interpolates linearly.

    Returns:
        (B, S, K) masks in [0, 1] if the columns of ``permutation`` sum to 1.
    """
    _check_float("permutation", permutation, 3)
    if permutation.shape[-1] != permutation.shape[-2]:
        raise ValueError(f"permutation has shape {tuple(permutation.shape)}: give square matrices (B, K, K)")
    fractions = _check_fractions(fractions, permutation.device)
    return dispatch.run("cumulative_masks", backend, permutation.device, permutation, fractions)


def soft_topk_masks(
    scores: Tensor,
    fractions: Tensor | Sequence[float],
    tau: float | Tensor,
    n_iters: int = 30,
    noise: float = 0.0,
    seed: int | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """``cumulative_masks(gumbel_sinkhorn(scores, tau, …), fractions)`` as one operator: (B, K) → (B, S, K).

    Arguments and ranges as in those two functions. A fused backend never stores P.
    """
    scores = _check_scores(scores)
    fractions = _check_fractions(fractions, scores.device)
    tau, seed = _check_ranking(scores, tau, n_iters, noise, seed)
    arguments = (scores, fractions, tau, n_iters, float(noise), seed)
    return dispatch.run("soft_topk_masks", backend, scores.device, *arguments)


def perturb(
    images: Tensor,
    references: Tensor,
    masks: Tensor,
    upsampler: Upsampler,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    dtype: torch.dtype | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Upsample soft masks to pixels and blend: both the deletion and the insertion images (paper §3.1).

    With m the upsampled mask: inserted = m·image + (1 − m)·reference, deleted = (1 − m)·image + m·reference;
    both then become (y − mean)/std in ``dtype``. Differentiable in images, references and masks.

    Args:
        images: (B, C, H, W) floating point.
        references: (B, C, H, W) or (1, C, H, W), same dtype.
        masks: (B, S, K) in [0, 1], float32 or float64; K = upsampler.rows.size · upsampler.cols.size.
        upsampler: row and column taps for H and W pixels.
        mean, std: (C,) or None.
        dtype: of the outputs; default that of the images.

    Returns:
        deleted, inserted: (B, S, C, H, W).
    """
    references = _check_images(images, references, mean, std)
    masks = _check_float("masks", masks, 3, _IMAGE_FLOATS)
    rows, cols = upsampler
    dispatch.device_of(images, references, masks, rows.weight, cols.weight, mean, std)
    batch, _, height, width = images.shape
    if masks.shape[0] != batch or masks.shape[2] != rows.size * cols.size:
        raise ValueError(
            f"masks has shape {tuple(masks.shape)}: give (B={batch}, S, K={rows.size}·{cols.size}), "
            "one value per cell of the upsampler"
        )
    if (rows.cell.shape[0], cols.cell.shape[0]) != (height, width):
        raise ValueError(
            f"the upsampler makes {rows.cell.shape[0]}×{cols.cell.shape[0]} pixels, images are {height}×{width}"
        )
    dtype = _check_dtype(dtype or images.dtype)
    arguments = (images, references, masks, rows, cols, mean, std, dtype)
    return dispatch.run("perturb", backend, images.device, *arguments)


def perturb_by_rank(
    images: Tensor,
    references: Tensor,
    ranks: Tensor,
    counts: Tensor | Sequence[int],
    mean: Tensor | None = None,
    std: Tensor | None = None,
    dtype: torch.dtype | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Hard deletion and insertion images: a pixel is kept where ``rank < count`` (paper §3.1, evaluation).

    Args:
        images, references, mean, std, dtype: as in `perturb`.
        ranks: (B, H, W) integer; 0 = most important pixel.
        counts: (S,) integer numbers of pixels, in [0, H·W].

    Returns:
        deleted (top ``count`` pixels replaced), inserted (only they shown): (B, S, C, H, W).
    """
    references = _check_images(images, references, mean, std)
    batch, _, height, width = images.shape
    if not isinstance(ranks, Tensor) or ranks.is_floating_point() or ranks.shape != (batch, height, width):
        raise ValueError(f"ranks is {_describe(ranks)}: give integers of shape {(batch, height, width)}")
    counts = torch.as_tensor(counts)
    if counts.ndim != 1 or counts.is_floating_point():
        raise ValueError(f"counts is {_describe(counts)}: give a 1-dim sequence of integers")
    known = counts.device.type == "cpu" and counts.numel() and not torch.compiler.is_compiling()
    if known and (counts.min() < 0 or counts.max() > height * width):
        raise ValueError(
            f"counts span {int(counts.min())} … {int(counts.max())}: they must lie in 0 … H·W = {height * width}"
        )
    counts = counts.to(images.device, torch.int32)
    dispatch.device_of(images, references, ranks, mean, std)
    dtype = _check_dtype(dtype or images.dtype)
    arguments = (images, references, ranks.to(torch.int32), counts, mean, std, dtype)
    return dispatch.run("perturb_by_rank", backend, images.device, *arguments)


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} of shape {tuple(value.shape)}".removeprefix("torch.")
    return f"a {type(value).__name__}"


def _check_float(name: str, value: Tensor, ndim: int, dtypes: tuple[torch.dtype, ...] = _FLOATS) -> Tensor:
    if not isinstance(value, Tensor) or value.ndim != ndim or value.dtype not in dtypes:
        accepted = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{name} is {_describe(value)}: give a {ndim}-dim tensor of {accepted}")
    return value if value.dtype in _FLOATS else value.float()


def _check_scores(scores: Tensor) -> Tensor:
    scores = _check_float("scores", scores, 2, _IMAGE_FLOATS)
    if scores.shape[1] == 0:
        raise ValueError(f"scores has shape {tuple(scores.shape)}: at least one region is needed")
    return scores


def _check_iterations(n_iters: int) -> None:
    if not isinstance(n_iters, int) or n_iters < 1:
        raise ValueError(f"n_iters={n_iters!r}: give an integer ≥ 1")


def _check_ranking(
    scores: Tensor, tau: float | Tensor, n_iters: int, noise: float, seed: int | None
) -> tuple[float | Tensor, int]:
    _check_iterations(n_iters)
    if isinstance(tau, Tensor):
        if tau.ndim != 0:
            raise ValueError(f"tau is {_describe(tau)}: give a number or a 0-dim tensor")
        tau = tau.to(scores)
    # the value of a tensor on a device is not read: that would wait for the device
    known = not isinstance(tau, Tensor) or (tau.device.type == "cpu" and not torch.compiler.is_compiling())
    if known and not 0 < (value := float(tau.detach() if isinstance(tau, Tensor) else tau)) < float("inf"):
        raise ValueError(f"tau={value}: the temperature must be finite and > 0")
    if not 0 <= noise < float("inf"):
        raise ValueError(f"noise={noise}: the scale of the Gumbel noise must be finite and ≥ 0")
    if seed is None:
        seed = random.draw_seed() if noise else 0
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed}: give an integer in [0, 2⁶⁴)")
    return tau, seed


def _check_fractions(fractions: Tensor | Sequence[float], device: torch.device) -> Tensor:
    fractions = torch.as_tensor(fractions, dtype=None if isinstance(fractions, Tensor) else torch.float64)
    if fractions.ndim != 1 or not fractions.is_floating_point():
        raise ValueError(f"fractions is {_describe(fractions)}: give a 1-dim sequence of floats in [0, 1]")
    if not torch.compiler.is_compiling() and fractions.numel():
        inside = bool(((fractions >= 0) & (fractions <= 1)).all())
        if not inside or bool((fractions.diff() < 0).any()):
            raise ValueError(f"fractions are {fractions.tolist()}: give ascending values in [0, 1]")
    return fractions.to(device)


def _check_images(images: Tensor, references: Tensor, mean: Tensor | None, std: Tensor | None) -> Tensor:
    value: Tensor | None
    for name, value in (("images", images), ("references", references)):
        if not isinstance(value, Tensor) or value.ndim != 4 or value.dtype not in _IMAGE_FLOATS:
            raise ValueError(f"{name} is {_describe(value)}: give floating point (B, C, H, W)")
    if references.dtype != images.dtype:
        raise ValueError(f"references are {references.dtype}, images {images.dtype}: give the same dtype")
    if references.shape[1:] != images.shape[1:] or references.shape[0] not in (1, images.shape[0]):
        raise ValueError(
            f"references has shape {tuple(references.shape)}: give that of the images, {tuple(images.shape)}, "
            "or one reference for all of them"
        )
    for name, value in (("mean", mean), ("std", std)):
        if value is not None and tuple(value.shape) != (images.shape[1],):
            raise ValueError(f"{name} is {_describe(value)}: give one value per channel, ({images.shape[1]},)")
    return references.expand_as(images)


def _check_dtype(dtype: torch.dtype) -> torch.dtype:
    if dtype not in _IMAGE_FLOATS:
        raise ValueError(f"dtype={dtype}: give float32, float64, bfloat16 or float16")
    return dtype
