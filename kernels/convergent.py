"""Soft ranking until it has converged: what soft_sort, soft_rank and soft_topk do with any backend's Sinkhorn.

Iterations start where τ → 0 ends, at the dual potentials of the sorted assignment, and go on until the rows of P sum
to 1. The gradient is exact for that start and the iterations made. The start is a function of the scores too: it
carries the dependence on them that iterations from elsewhere only find after about 1/τ of them.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TOLERANCE = 5e-3  # of the sum of every row of P; the columns, normalised last, sum to 1
FIRST = 25  # iterations before the rows are looked at; twice as many every time after

_warned = False


def read_left(
    backend: Any, scores: Tensor, left: Tensor, tau: Tensor, n_iters: int, noise: float, seed: Tensor
) -> Tensor:
    """(B,K), (K,) → (B,K): left · P; ``backend`` has the `read_left` of reference.py."""

    def run(images: Any, count: int) -> tuple[Tensor, Tensor]:
        return backend.read_left(scores[images], start[images], left, tau, count, noise, seed)

    start = sorted_start(scores, tau)
    return _converge(run, scores, n_iters, bool(noise))


def read_right(
    backend: Any, scores: Tensor, right: Tensor, size: Tensor, tau: Tensor, n_iters: int, noise: float, seed: Tensor
) -> Tensor:
    """(B,K), (B,K), (B,1) → (B,K): size · P · right; ``backend`` has the `read_right` of reference.py."""

    def run(images: Any, count: int) -> tuple[Tensor, Tensor]:
        return backend.read_right(scores[images], start[images], right[images], tau, count, noise, seed)

    unit = gradient_unit(size)
    if tau.requires_grad:
        tau = times_gradient(tau, unit[0, 0])
    start = sorted_start(scores, tau)
    read = _converge(run, scores, n_iters, bool(noise))
    with_gradient = size / unit * read
    return (size * read).detach() + (with_gradient - with_gradient.detach())


def gradient_unit(size: Tensor) -> Tensor:
    """(B,1) → (1,1), the unit in which gradients are counted between the values and what is read from them.

    That of a score is as large as ``size`` over τ, which may be more than the type holds where that of a value is not:
    their sizes cancel. It is 1 unless the values are beyond 2^±64.
    """
    mean = torch.nan_to_num(size.clamp(min=2.0**-100) / max(len(size), 1), 0, 0, 0).sum(dim=0, keepdim=True)
    return mean / mean.clamp(2.0**-64, 2.0**64)


def times_gradient(value: Tensor, factor: Tensor) -> Tensor:
    """The same value, whose gradient is multiplied by ``factor``."""
    return value.detach() + factor * (value - value.detach())


def sorted_start(scores: Tensor, tau: Tensor) -> Tensor:
    """(B,K) → (B,K) column potential of the sorted assignment, which P approaches for τ → 0.

    With c = a − ½ in descending order and q = p − ½, c_k belongs to q_k. Complementary slackness at the neighbours
    (k, k+1) and (k+1, k) leaves an interval for the difference of their potentials, whose middle is
    (c_k − c_{k+1})(q_k + q_{k+1})/τ. Equal scores get equal potentials.
    """
    gaps = scores.shape[1] - 1
    # sums of terms up to 1/τ; Apple's GPUs have no float64
    precise = scores if scores.device.type == "mps" else scores.double()
    ordered, order = precise.sort(dim=1, descending=True)
    last = 1 - 1 / max(gaps, 1)
    middle = torch.linspace(-last, last, gaps, dtype=ordered.dtype, device=scores.device)  # −(q_k + q_{k+1})
    potential = F.pad((ordered.diff(dim=1) * middle).cumsum(dim=1), (1, 0)) / tau
    return torch.zeros_like(scores).scatter(1, order, potential.to(scores.dtype))


def _converge(run: Callable[[Any, int], tuple[Tensor, Tensor]], scores: Tensor, n_iters: int, together: bool) -> Tensor:
    """``run(images, count)`` → outputs and row errors (B,) of ``count`` iterations, for the count each image needs.

    At most ``n_iters``, and exactly so many where errors cannot be read (`readable`). Starting again is cheaper than
    keeping what the gradient of a continuation needs. Images are ``together`` where their noise is numbered by image.
    """
    everything = slice(None)
    if not readable(scores):
        return run(everything, n_iters)[0]
    count = min(FIRST, n_iters)
    out, error = run(everything, count)
    while True:
        rest = (error > TOLERANCE).nonzero()[:, 0]  # not those that are NaN
        if not len(rest):
            return out
        if count == n_iters:
            _warn(len(rest), len(error), float(error[rest].max()), n_iters)
            return out
        count = min(2 * count, n_iters)
        if together or len(rest) == len(error):
            del out  # with what its gradient would need, as large as half of what comes
            out, error = run(everything, count)
        else:
            better, smaller = run(rest, count)
            out, error = out.index_copy(0, rest, better), error.index_copy(0, rest, smaller)


def readable(value: Tensor) -> bool:
    """Whether values may be read now: not under torch.compile, export, vmap or CUDA graph capture, not on meta."""
    if torch.compiler.is_compiling() or torch._C._functorch.is_functorch_wrapped_tensor(value):
        return False
    if value.is_meta or isinstance(value, torch._subclasses.FakeTensor):
        return False
    return not (value.is_cuda and torch.cuda.is_current_stream_capturing())


def _warn(rows: int, batch: int, error: float, n_iters: int) -> None:
    global _warned
    if not _warned:
        _warned = True
        off = f"the weights of a rank add up to 1 ± {error:.2g}" if n_iters > 1 else "nothing tells how far it is"
        warnings.warn(
            f"soft ranking has not converged after n_iters={n_iters}: in {rows} of {batch} rows of values {off}, where "
            f"± {TOLERANCE} is accepted; raise n_iters or tau (this is said once)",
            stacklevel=6,
        )
