"""When is a float32 kernel right: as close to float64 as the plain float32 PyTorch loop is, within a factor of two."""

import pytest
import torch
from torch import Tensor

from aha import kernels

DEVICES = {"cuda": "cuda", "triton": "cuda", "cpu": "cpu"}


def assert_accurate(actual: Tensor, single: Tensor, truth: Tensor, atol: float = 1e-6, what: str = "") -> None:
    """|actual − truth| ≤ 2·|single − truth| + atol, all maxima in units of the largest true value (1 at least)."""
    assert torch.isfinite(actual).all(), f"{what}: not finite"
    actual, single, truth = actual.double().cpu(), single.double().cpu(), truth.double().cpu()
    assert actual.shape == truth.shape
    if truth.numel() == 0:
        return
    scale = max(1.0, truth.abs().max().item())
    error, allowed = (actual - truth).abs().max() / scale, 2 * (single - truth).abs().max() / scale + atol
    assert error <= allowed, f"{what}: error {error:.1e}, allowed {allowed:.1e}, in units of {scale:.1e}"


def device_for(backend: str) -> str:
    """The device a compiled backend needs; skips the test where it cannot run."""
    device = DEVICES[backend]
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    rows = kernels.explain("soft_topk_masks", torch.zeros(1, 4, device=device), [0.5], 1.0)
    reason = next(row.reason for row in rows if row.backend == backend)
    if reason is not None:
        pytest.skip(reason)
    return device
