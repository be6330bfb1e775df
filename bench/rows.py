"""Who competes: for one case, every implementation as a function of its inputs, or the reason why it cannot run."""

from __future__ import annotations

import unittest.mock
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from aha.kernels import reference

from .cases import Case, Inputs, Outputs

Run = Callable[[Inputs], Outputs]
REFERENCE_ROWS = ("eager", "torch.compile", "checkpoint")
DEVICE_ROWS = {"cpu": ("cpu", *REFERENCE_ROWS), "cuda": ("cuda", "triton", *REFERENCE_ROWS)}


def rows(case: Case, inputs: Inputs, compiled: bool = True) -> dict[str, Run | str]:
    """The backends that `aha.kernels.explain` knows for this device, then the reference in three guises.

    Args:
        compiled: whether "torch.compile" competes; it takes up to minutes per size.
    """
    found: dict[str, Run | str] = {}
    device = next(inputs[name] for name in case.differentiable).device.type
    for choice in case.explain(inputs):
        # a backend of another device is no competitor here
        if choice.backend in DEVICE_ROWS[device]:
            found[choice.backend] = choice.reason or _backend(case, choice.backend)
    found["eager"] = _backend(case, "reference")
    if compiled:
        torch.compiler.reset()  # sizes count as recompilations of one function, which end after a few
        found["torch.compile"] = torch.compile(_backend(case, "reference"), dynamic=False)
    found["checkpoint"] = _checkpointed(case)
    return found


def _backend(case: Case, name: str) -> Run:
    return lambda inputs: case.call(inputs, name)


def _checkpointed(case: Case) -> Run:
    """The reference that keeps potentials only: iterations, or all of an operator without any, run again backward."""
    if "T" not in case.fields:
        return lambda inputs: checkpoint(case.call, inputs, "reference", use_reentrant=False)

    def run(inputs: Inputs) -> Outputs:
        with unittest.mock.patch.object(reference, "_normalise", _normalise):
            return case.call(inputs, "reference")

    return run


def _normalise(logits: Tensor, column: Tensor, n_iters: int) -> Tensor:
    """As in the reference, with every pair of normalisations checkpointed."""
    for _ in range(n_iters):
        row, column = checkpoint(_pair, logits, column, use_reentrant=False)
    return logits + row + column


def _pair(logits: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    row = -torch.logsumexp(logits + column, dim=-1, keepdim=True)
    return row, -torch.logsumexp(logits + row, dim=-2, keepdim=True)
