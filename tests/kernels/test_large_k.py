"""Rankings of tens of thousands of values, where a matrix would take gigabytes: soft sorts and masks, values and
gradients, and how close soft ranks come to hard ones."""

import math
import warnings

import numpy as np
import pytest
import torch

from aha import kernels
from aha.kernels import native

pytestmark = pytest.mark.skipif(native.load("_C") is not None, reason=f"aha._C: {native.load('_C')}")
K = 2**16
TAU = 1e-3
FRACTIONS = torch.linspace(0, 1, 6, dtype=torch.float64)[1:-1]
# a fixed number of iterations, so that the function that is differentiated is one
ITERATIONS = 25
OPERATORS = {
    "soft_sort": lambda v: kernels.soft_sort(v, TAU, ITERATIONS),
    "soft_rank": lambda v: kernels.soft_rank(v, TAU, ITERATIONS) / K,
    "soft_topk": lambda v: kernels.soft_topk(v, K // 10, TAU, ITERATIONS),
    "one mask": lambda v: kernels.soft_topk_masks(0.5 + 0.29 * v, [0.3], TAU, ITERATIONS),
    "four masks": lambda v: kernels.soft_topk_masks(0.5 + 0.29 * v, FRACTIONS, TAU, ITERATIONS),
}


def draw(k: int = K, seed: int = 0) -> torch.Tensor:
    return torch.randn(1, k, generator=torch.Generator().manual_seed(seed))


def ranks(values: torch.Tensor) -> torch.Tensor:
    return values.argsort(dim=1, descending=True).argsort(dim=1)


@pytest.fixture(autouse=True)
def silent():
    """Where the iterations are fixed, the warning that they were too few is no news."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "soft ranking has not converged")
        yield


@pytest.mark.parametrize("name", OPERATORS)
def test_gradient_by_central_differences(name):
    operator, values = OPERATORS[name], draw().double().requires_grad_()
    out = operator(values)
    g = torch.Generator().manual_seed(1)
    arriving = torch.randn(out.shape, generator=g, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(out, values, arriving)
    direction = gradient / gradient.norm() + torch.randn(values.shape, generator=g, dtype=torch.float64) / K**0.5
    # steps well below the window of sqrt(tau) over which values are averaged
    step = 1e-4
    with torch.no_grad():
        above, below = ((operator(values + s * direction) * arriving).sum() for s in (step, -step))
    torch.testing.assert_close((above - below) / (2 * step), (gradient * direction).sum(), rtol=1e-5, atol=0)
    single = values.detach().float().requires_grad_()
    (rounded,) = torch.autograd.grad(operator(single), single, arriving.float())
    # rounding is largest at the two or three extreme values; the plain loop is off by 3e-2 at K = 2048 already
    assert (rounded - gradient).norm() < 5e-3 * gradient.norm()


def test_soft_sorts_approach_hard_ones():
    values = draw()
    ordered = values.sort(dim=1, descending=True).values
    # what the window of ranks, sqrt(tau / 2), hides; most at the ends, where values are far apart
    assert (kernels.soft_sort(values, TAU) - ordered).abs().mean() < 5e-3
    chosen = kernels.soft_topk(values, K // 10, TAU)
    assert (chosen - (ranks(values) < K // 10).float()).abs().mean() < 0.02
    assert chosen.sum() == pytest.approx(K // 10, rel=5e-3)
    assert kernels.soft_topk(values, K // 10, 1e-5)[ranks(values) < K // 11].min() > 0.99


def test_masks_of_several_budgets_are_those_of_each():
    scores = 0.5 + 0.29 * draw()
    together = kernels.soft_topk_masks(scores, FRACTIONS, TAU)
    assert (together >= -1e-6).all() and (together <= 1 + 1e-6).all()
    assert (together.diff(dim=1) >= -1e-6).all()
    for n, fraction in enumerate(FRACTIONS.tolist()):
        alone = kernels.soft_topk_masks(scores, [fraction], TAU)[:, 0]
        torch.testing.assert_close(together[:, n], alone, rtol=0, atol=1e-6)
        hard = (ranks(scores) < fraction * K).float()
        assert (alone - hard).abs().mean() < 0.05
    # the last column step gives every region to some rank
    torch.testing.assert_close(kernels.soft_topk_masks(scores, [1.0], TAU), torch.ones(1, 1, K), rtol=0, atol=1e-6)


def off(values: torch.Tensor, tau: float) -> float:
    """Mean |soft rank − hard rank|, in units of K."""
    return float((kernels.soft_rank(values, tau) - ranks(values)).abs().mean()) / values.shape[1]


def test_soft_ranks_of_evenly_spread_normal_values():
    # quantiles: nothing is left but the blur, at both ends
    even = torch.special.ndtri((torch.arange(10**5, dtype=torch.float64) + 0.5) / 10**5).float()
    shuffled = even[torch.randperm(10**5, generator=torch.Generator().manual_seed(0))][None]
    assert off(shuffled, 1e-4) <= 2e-5


def hidden(k: int, tau: float) -> float:
    """Mean |soft rank − hard rank| / K of K random normal values by theory, without the two ends.

    A rank is the number of values above, and that of random values is uneven from place to place: counting noise,
    white, 1/K per unit of rank. Entropic transport between densities that are smooth but for a wave of length 2π/κ,
    to first order, lets a part x/(eˣ − 1) of the wave through, where x = κ²·ε·ρ, ε = τ/2 and ρ is the density of
    the scores. What it hides has the variance sqrt(ε·ρ)/(πK) · ∫ (1 − x/(eˣ − 1))²/y² dy, x = y².
    """
    y = np.linspace(1e-3, 25, 10**6)
    passes = y**2 / np.expm1(y**2)
    integral = np.trapezoid((1 - passes) ** 2 / y**2, y) + 1 / y[-1]
    z = np.linspace(-8, 8, 10**5)
    normal = np.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    deviation = np.sqrt(np.sqrt(tau / 2 * normal / 0.29) * integral / (math.pi * k))
    return math.sqrt(2 / math.pi) * np.trapezoid(normal * deviation, z)


@pytest.mark.parametrize(("k", "tau"), [(10**5, 1e-4), (10**5, 1e-5), (2**17, 3e-5)])
def test_soft_ranks_of_random_values_hide_what_their_window_averages(k, tau):
    found = np.mean([off(draw(k, seed), tau) for seed in range(3)])
    # no more than P itself: neither the start nor the stop of the iterations adds to it
    assert found == pytest.approx(hidden(k, tau), rel=0.1)
