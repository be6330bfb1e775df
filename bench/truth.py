"""What is right: the float64 reference, how far an implementation may be from it, and a failure in one line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .cases import Case, Inputs, Outputs, Size

ATOL = 1e-6  # relative to the largest entry: some rounding errors of float32
WITHOUT_REFERENCE = 1e-5  # that of more regions than the reference in float32 can be asked about
TRUTH_BYTES = 512 << 20  # more images than fit here are timed, but not compared


class WrongError(AssertionError):
    """A row computes something else than the operator."""


@dataclass(frozen=True)
class Truth:
    """What the rows of a case are compared with, on its first images.

    Attributes:
        outputs, gradients: in float64, of the reference or what stands in for it.
        error: of the float32 reference (of half precision, where the inputs are), see `deviation`; None if it was not
            run.
        cotangents: gradients sent backward, for all images.
    """

    outputs: Outputs
    gradients: Outputs
    error: float | None
    cotangents: list[Tensor]

    def check(self, outputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> float:
        """The error of a row's outputs and gradients.

        Raises:
            WrongError: beyond twice the error of the reference plus `ATOL`, or `WITHOUT_REFERENCE`.
        """
        error = deviation((*outputs, *gradients), (*self.outputs, *self.gradients))
        bound = WITHOUT_REFERENCE if self.error is None else 2 * self.error + ATOL
        if not error <= bound:
            theirs = "" if self.error is None else f", the reference has {self.error:.3g}"
            raise WrongError(f"wrong: error {error:.3g} exceeds {bound:.3g}{theirs}")
        return error


def deviation(values: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Largest |value − exact| over the largest |exact|, the worst over pairs; compared on the first images."""
    worst = 0.0
    for value, true in zip(values, exact, strict=True):
        scale = true.abs().max().item() or 1.0
        gap = (value[: len(true)].double() - true).abs().max().item() / scale
        worst = gap if not gap <= worst else worst  # NaN stays
    return worst


def truth(case: Case, inputs: Inputs, size: Size, backend: str = "reference") -> Truth:
    """Runs the reference in float64 and in float32 on as many images as `TRUTH_BYTES` allow, at least one.

    Another ``backend`` is run in float64 only, in its place.
    """
    per_image = case.reference_bytes(size, 8) / size.B
    some = case.first(inputs, min(size.B, max(1, int(TRUTH_BYTES / per_image))))
    with torch.no_grad():
        outputs = case.call(case.first(inputs, 1), backend)
    cotangents = case.cotangents(outputs, size.B)
    few = [c[: len(some[case.differentiable[0]])] for c in cotangents]
    exact = case.truth(some, few, backend)
    if backend != "reference":
        return Truth(*exact, None, cotangents)
    single = case.gradients(lambda given: case.call(given, "reference"), some, few)
    error = deviation((*single[0], *single[1]), (*exact[0], *exact[1]))
    return Truth(*exact, error, cotangents)


def why(error: BaseException) -> str:
    """A failure in one short line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "does not fit: out of memory"
    if isinstance(error, WrongError):
        return str(error)
    first = (str(error).strip().splitlines() or [""])[0]
    return f"failed: {type(error).__name__}: {first[:120]}"
