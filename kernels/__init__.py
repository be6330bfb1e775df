"""Differentiable ranking and perturbation operators, usable alone in anyone's training code.

>>> masks = aha.kernels.soft_topk_masks(scores, fractions, tau=0.3)               # (B, K) -> (B, S, K)
>>> deleted, inserted = aha.kernels.perturb(images, references, masks, upsampler)  # (B, S, C, H, W) each

Importing this package costs a torch import and nothing more.
"""

from .dispatch import BackendError, Choice
from .functional import (
    Taps,
    Upsampler,
    cumulative_masks,
    explain,
    gumbel_sinkhorn,
    log_sinkhorn,
    perturb,
    perturb_by_rank,
    soft_rank,
    soft_sort,
    soft_topk,
    soft_topk_masks,
)

__all__ = [
    "BackendError",
    "Choice",
    "Taps",
    "Upsampler",
    "cumulative_masks",
    "explain",
    "gumbel_sinkhorn",
    "log_sinkhorn",
    "perturb",
    "perturb_by_rank",
    "soft_rank",
    "soft_sort",
    "soft_topk",
    "soft_topk_masks",
]
