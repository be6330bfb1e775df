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
    seed: int | Tensor | None = None,
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
        seed: of the noise, in [0, 2⁶⁴), or a 0-dim int64 tensor; None draws one from PyTorch's default generator of
            the device, also inside a captured CUDA graph.

    Returns:
        (B, K, K) P; row i is the soft indicator of the region at rank i (0 = most important), columns sum to 1.
    """
    scores = _check_scores(scores)
    ranking = _check_ranking(scores, tau, n_iters, noise, seed)
    return dispatch.run("gumbel_sinkhorn", backend, scores.device, scores, *ranking)


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
    weights = _cumulative_weights(fractions, permutation)
    return dispatch.run("cumulative_masks", backend, permutation.device, permutation, weights)


def soft_topk_masks(
    scores: Tensor,
    fractions: Tensor | Sequence[float],
    tau: float | Tensor,
    n_iters: int = 30,
    noise: float = 0.0,
    seed: int | Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """``cumulative_masks(gumbel_sinkhorn(scores, tau, …), fractions)`` as one operator: (B, K) → (B, S, K).

    Arguments and ranges as in those two functions. A fused backend never stores P.
    """
    scores = _check_scores(scores)
    weights = _cumulative_weights(fractions, scores)
    ranking = _check_ranking(scores, tau, n_iters, noise, seed)
    return dispatch.run("soft_topk_masks", backend, scores.device, scores, weights, *ranking)


def soft_sort(
    values: Tensor,
    tau: float | Tensor = 0.01,
    n_iters: int = 200,
    noise: float = 0.0,
    seed: int | Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Differentiable sort in descending order: (B, K) → (B, K), at every rank a soft choice among the values.

    Values are standardised per row before they are ranked, so ``tau`` does not depend on their scale: 1 is close to
    the mean everywhere, 1e-4 close to the sorted values. Other arguments as in `gumbel_sinkhorn`.
    """
    values = _check_scores(values)
    ranking = _check_ranking(values, tau, n_iters, noise, seed)
    return dispatch.run("soft_sort", backend, values.device, _standardize(values), values, *ranking)


def soft_rank(
    values: Tensor,
    tau: float | Tensor = 0.01,
    n_iters: int = 200,
    noise: float = 0.0,
    seed: int | Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Differentiable ranks, 0 for the largest value, K − 1 for the smallest: (B, K) → (B, K). See `soft_sort`."""
    values = _check_scores(values)
    weights = torch.arange(values.shape[1], dtype=values.dtype, device=values.device)
    ranking = _check_ranking(values, tau, n_iters, noise, seed)
    return dispatch.run("soft_rank", backend, values.device, _standardize(values), weights, *ranking)


def soft_topk(
    values: Tensor,
    k: int,
    tau: float | Tensor = 0.01,
    n_iters: int = 200,
    noise: float = 0.0,
    seed: int | Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Differentiable indicator of the ``k`` largest values: (B, K) → (B, K) in [0, 1], rows sum to ``k`` where the
    iterations converged. ``k`` in 0 … K; see `soft_sort`.
    """
    values = _check_scores(values)
    if not isinstance(k, int) or not 0 <= k <= values.shape[1]:
        raise ValueError(f"k={k!r}: give an integer in 0 … {values.shape[1]}, the number of values")
    weights = (torch.arange(values.shape[1], device=values.device) < k).to(values.dtype)
    ranking = _check_ranking(values, tau, n_iters, noise, seed)
    return dispatch.run("soft_topk", backend, values.device, _standardize(values), weights, *ranking)


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
    known = counts.device.type == "cpu" and counts.numel() and not _traced(counts)
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
    scores: Tensor, tau: float | Tensor, n_iters: int, noise: float, seed: int | Tensor | None
) -> tuple[Tensor, int, float, Tensor]:
    """The last arguments of every ranking operator: tau and seed as 0-dim tensors on the device of the scores."""
    _check_iterations(n_iters)
    if isinstance(tau, Tensor):
        if tau.ndim != 0:
            raise ValueError(f"tau is {_describe(tau)}: give a number or a 0-dim tensor")
        # the value of a tensor on a device is not read: that would wait for the device
        known = tau.device.type == "cpu" and not _traced(tau)
        value = float(tau.detach()) if known else 1.0
        tau = tau.to(scores)
    else:
        value = tau
        tau = torch.full((), tau, dtype=scores.dtype, device=scores.device)
    if not 0 < value < float("inf"):
        raise ValueError(f"tau={value}: the temperature must be finite and > 0")
    if not 0 <= noise < float("inf"):
        raise ValueError(f"noise={noise}: the scale of the Gumbel noise must be finite and ≥ 0")
    if seed is None:
        seed = random.draw_seed(scores.device) if noise else 0
    if isinstance(seed, Tensor):
        if seed.ndim != 0 or seed.dtype != torch.int64:
            raise ValueError(f"seed is {_describe(seed)}: give an integer or a 0-dim int64 tensor")
        return tau, n_iters, float(noise), seed.to(scores.device)
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed={seed}: give an integer in [0, 2⁶⁴)")
    return tau, n_iters, float(noise), random.as_seed(seed, scores.device)


def _traced(value: Tensor) -> bool:
    """Whether the values cannot be read: under torch.compile, torch.export or a functorch transform."""
    return torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(value)


def _cumulative_weights(fractions: Tensor | Sequence[float], like: Tensor) -> Tensor:
    """(S, K): what share of each rank row belongs to the top fraction; linear between two ranks."""
    fractions = torch.as_tensor(fractions, dtype=None if isinstance(fractions, Tensor) else torch.float64)
    if fractions.ndim != 1 or not fractions.is_floating_point():
        raise ValueError(f"fractions is {_describe(fractions)}: give a 1-dim sequence of floats in [0, 1]")
    known = fractions.device.type == "cpu" and not _traced(fractions)
    if known and fractions.numel():
        inside = bool(((fractions >= 0) & (fractions <= 1)).all())
        if not inside or bool((fractions.diff() < 0).any()):
            raise ValueError(f"fractions are {fractions.tolist()}: give ascending values in [0, 1]")
    k = like.shape[-1]
    row = torch.arange(k, dtype=torch.float64, device=fractions.device)
    return (fractions.double()[:, None] * k - row).clamp(0, 1).to(like)


def _standardize(values: Tensor) -> Tensor:
    """Each row with mean ½ and standard deviation 0.29, that of the rank targets; constant rows become ½."""
    spread, mean = torch.var_mean(values, dim=1, keepdim=True, correction=0)
    rounding = (8 * torch.finfo(values.dtype).eps * values.detach().abs().amax(dim=1, keepdim=True)).square()
    return 0.5 + 0.29 * (values - mean) * torch.rsqrt(torch.where(spread > rounding, spread, 1.0))


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
