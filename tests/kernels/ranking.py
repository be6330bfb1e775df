"""Problems for the ranking operators and their truth, shared by the tests of the CUDA kernels.

Truth is the float64 reference on the same float32 inputs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from aha.kernels import reference

from .accuracy import assert_accurate

READOUTS = ("matrix", "log", "left", "dense left", "right")


class Problem(NamedTuple):
    """The inputs of gumbel_sinkhorn (``scores`` (B, K)) or of log_sinkhorn (``logits`` (B, K, K))."""

    scores: Tensor | None = None
    logits: Tensor | None = None
    tau: Tensor = torch.tensor(1.0)
    seed: Tensor = torch.tensor(0)
    left: Tensor | None = None
    right: Tensor | None = None
    start: Tensor | None = None
    noise: float = 0.0
    iterations: int = 5

    @property
    def shape(self) -> tuple[int, int]:
        given = self.scores if self.logits is None else self.logits
        return given.shape[0], given.shape[-1]

    def out_shape(self) -> tuple[int, ...]:
        batch, k = self.shape
        return (batch, k) if self.right is not None else (batch, k if self.left is None else len(self.left), k)

    def to(self, device: str) -> "Problem":
        return Problem(*(value.to(device) if isinstance(value, Tensor) else value for value in self))


def increments(k: int, steps: int) -> Tensor:
    """(steps, k): what each step adds to a cumulative mask, one or two non-zeros in a column."""
    weights = (torch.linspace(0, 1, steps, dtype=torch.float64)[:, None] * k - torch.arange(k)).clamp(0, 1)
    return torch.diff(weights, dim=0, prepend=torch.zeros(1, k)).float()


def make(
    k, readout="matrix", batch=2, spread=0.5, tau=0.3, noise=0.0, iterations=5, start=False
) -> tuple[Problem, Tensor]:
    """A problem and the gradient that arrives at its output; with `spread` large, scalings leave their range."""
    g = torch.Generator().manual_seed(k)
    settings = {"noise": noise, "iterations": iterations}
    scores = torch.randn(batch, k, generator=g) * spread
    if readout == "log":
        problem = Problem(logits=torch.randn(batch, k, k, generator=g) * 3, **settings)
    else:
        choice = {
            "matrix": {},
            "left": {"left": increments(k, 5)},
            "dense left": {"left": torch.randn(2, k, generator=g)},
            "right": {"right": torch.randn(batch, k, generator=g)},
        }[readout]
        seed = torch.tensor(-12345678901234)  # both words of the key are used
        if start:
            choice["start"] = spread * torch.randn(batch, k, generator=g)
        problem = Problem(scores=scores, tau=torch.tensor(tau), seed=seed, **choice, **settings)
    return problem, torch.randn(problem.out_shape(), generator=g)


def by_reference(problem: Problem, grad: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """out and the gradients of scores, tau (B,), right, start; of log_sinkhorn: out and the gradient of the logits."""
    if problem.logits is not None:
        logits = problem.logits.to(dtype).requires_grad_()
        out = reference.log_sinkhorn(logits, problem.iterations)
        return [out.detach(), *torch.autograd.grad(out, logits, grad.to(dtype))]
    scores = problem.scores.to(dtype).requires_grad_()
    # one temperature for each image: its gradient is one number, whose error at a single image may be small by chance
    tau = problem.tau.to(dtype).expand(len(scores), 1, 1).clone().requires_grad_()
    optional = (problem.right, problem.start)
    right, start = (None if given is None else given.to(dtype).requires_grad_() for given in optional)
    given = scores, tau, problem.iterations, problem.noise, problem.seed, start
    out = (reference.log_permutation(*given) if dtype == torch.float64 else plain_loop(*given)).exp()
    if problem.left is not None:
        out = problem.left.to(dtype) @ out
    elif right is not None:
        out = (out @ right[..., None])[..., 0]
    inputs = [x for x in (scores, tau, right, start) if x is not None]
    scores_grad, tau_grad, *others = torch.autograd.grad(out, inputs, grad.to(dtype))
    return [out.detach(), scores_grad, tau_grad.flatten(), *others]


def plain_loop(
    scores: Tensor, tau: Tensor, n_iters: int, noise: float, seed: Tensor, start: Tensor | None = None
) -> Tensor:
    """log P as a loop of PyTorch has it, squares and all: the float32 that kernels are measured by."""
    centred = scores - 0.5
    ranks = torch.linspace(1, 0, scores.shape[1], dtype=scores.dtype)[:, None] - 0.5
    logits = 2 * ranks * centred[:, None, :]
    if noise:
        logits = logits + noise * reference.gumbel(tuple(logits.shape), seed, scores.device).to(scores.dtype)
    column = -(centred**2)[:, None, :] / tau if start is None else start[:, None, :]
    logits = logits / tau
    for _ in range(n_iters):
        row = -torch.logsumexp(logits + column, dim=-1, keepdim=True)
        column = -torch.logsumexp(logits + row, dim=-2, keepdim=True)
    return logits + row + column


def assert_as_good_as_float32(got: list[Tensor], problem: Problem, grad: Tensor) -> None:
    """``got`` in the order of `by_reference`."""
    names = ("out", "inputs", "tau", "right or start", "start")
    truth, single = (by_reference(problem, grad, dtype) for dtype in (torch.float64, torch.float32))
    for name, ours, exact, theirs in zip(names, got, truth, single, strict=False):
        assert_accurate(ours, theirs, exact, what=name)
    assert len(got) == len(truth)
