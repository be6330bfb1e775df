"""The ranking operators against definitions written out independently in NumPy, and finite differences."""

import numpy as np
import pytest
import torch

from aha import kernels
from aha.kernels import random


def sinkhorn_by_definition(matrix: np.ndarray, n_iters: int) -> np.ndarray:
    """Rows, then columns, divided by their sums; logits are shifted first, which Sinkhorn does not see."""
    p = np.exp(matrix - matrix.max(axis=(-1, -2), keepdims=True))
    for _ in range(n_iters):
        p = p / p.sum(axis=-1, keepdims=True)
        p = p / p.sum(axis=-2, keepdims=True)
    return p


def permutation_by_definition(scores: np.ndarray, tau: float, n_iters: int, gamma: np.ndarray | float) -> np.ndarray:
    targets = np.linspace(1, 0, scores.shape[1])
    logits = (-((scores[:, None, :] - targets[None, :, None]) ** 2) + gamma) / tau
    return sinkhorn_by_definition(logits, n_iters)


def masks_by_definition(permutation: np.ndarray, fractions: list[float]) -> np.ndarray:
    batch, k, _ = permutation.shape
    out = np.zeros((batch, len(fractions), k))
    for s, fraction in enumerate(fractions):
        whole = int(np.floor(fraction * k))
        out[:, s] = permutation[:, :whole].sum(axis=1)
        if whole < k:
            out[:, s] += (fraction * k - whole) * permutation[:, whole]
    return out


@pytest.mark.parametrize("k", [1, 2, 9, 49])
@pytest.mark.parametrize("n_iters", [1, 7])
def test_log_sinkhorn_is_its_definition(k, n_iters):
    logits = torch.randn(3, k, k, dtype=torch.float64)
    expected = sinkhorn_by_definition(logits.numpy(), n_iters)
    torch.testing.assert_close(kernels.log_sinkhorn(logits, n_iters).exp().numpy(), expected)
    torch.testing.assert_close(torch.from_numpy(expected).sum(-2), torch.ones(3, k, dtype=torch.float64))


@pytest.mark.parametrize(("tau", "spread", "noise"), [(1.0, 0.3, 0.0), (0.05, 0.3, 0.0), (1.0, 3.0, 1.0)])
def test_gumbel_sinkhorn_is_its_definition(tau, spread, noise):
    scores = torch.randn(2, 25, dtype=torch.float64) * spread
    gamma = noise * random.gumbel((2, 25, 25), 7).double().numpy()
    expected = permutation_by_definition(scores.numpy(), tau, 12, gamma)
    # the noise of another backend may differ in its last bits
    backend = "reference" if noise else "auto"
    actual = kernels.gumbel_sinkhorn(scores, tau, 12, noise, seed=7, backend=backend)
    torch.testing.assert_close(actual.numpy(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("spread", "tau", "noise", "bound"), [(10, 1.0, 1.0, 1e-5), (30, 0.3, 1.0, 5e-5), (100, 0.3, 1.0, 2e-4)]
)
def test_float32_stays_close_to_float64_for_large_scores(spread, tau, noise, bound):
    # the unsplit logits lose up to 1e-2 here; the bounds leave one decimal to the figures of the design
    scores = torch.randn(2, 196, generator=torch.Generator().manual_seed(0)) * spread
    single = kernels.gumbel_sinkhorn(scores, tau, 30, noise, seed=3)
    double = kernels.gumbel_sinkhorn(scores.double(), tau, 30, noise, seed=3)
    assert torch.isfinite(single).all()
    assert (single - double).abs().max() < bound


def test_masks_are_their_definition_and_the_composition():
    scores = torch.randn(2, 10, dtype=torch.float64)
    fractions = [0.0, 0.05, 0.33, 0.5, 0.999, 1.0]
    permutation = kernels.gumbel_sinkhorn(scores, 0.2, 30)
    expected = masks_by_definition(permutation.numpy(), fractions)
    torch.testing.assert_close(kernels.cumulative_masks(permutation, fractions).numpy(), expected)
    torch.testing.assert_close(kernels.soft_topk_masks(scores, fractions, 0.2, 30).numpy(), expected)


def test_first_mask_is_empty_and_last_is_full():
    masks = kernels.soft_topk_masks(torch.randn(4, 36), [0.0, 0.5, 1.0], 0.3, 5)
    torch.testing.assert_close(masks[:, 0], torch.zeros(4, 36))
    torch.testing.assert_close(masks[:, 2], torch.ones(4, 36))
    assert masks.min() >= 0
    assert masks.max() <= 1 + 1e-5


def test_low_temperature_sorts():
    # evenly spread scores in random order, so that every rank has a clear winner
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    scores = torch.linspace(1, 0, 20)[order][None]
    permutation = kernels.gumbel_sinkhorn(scores, 1e-4, 50)
    assert torch.equal(permutation[0].argmax(dim=1), scores[0].argsort(descending=True))
    top = kernels.soft_topk_masks(scores, [0.25], 1e-4, 50)[0, 0]
    assert torch.equal(top.round().bool(), order < 5)


def test_shift_changes_nothing_and_sign_reverses():
    scores = torch.randn(2, 16, dtype=torch.float64)
    permutation = kernels.gumbel_sinkhorn(scores, 0.3, 200)
    torch.testing.assert_close(kernels.gumbel_sinkhorn(scores + 5, 0.3, 200), permutation)
    torch.testing.assert_close(kernels.gumbel_sinkhorn(-scores, 0.3, 200), permutation.flip(1))


def test_ties_share_their_ranks():
    permutation = kernels.gumbel_sinkhorn(torch.full((1, 8), 0.4), 0.1, 30)
    torch.testing.assert_close(permutation, torch.full((1, 8, 8), 1 / 8))


@pytest.mark.parametrize("noise", [0.0, 0.7])
def test_gradients_by_finite_differences(noise):
    scores = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    logits = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    tau = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    fractions = [0.1, 0.45, 0.8]
    check = torch.autograd.gradcheck
    assert check(lambda x: kernels.log_sinkhorn(x, 6), logits)
    assert check(lambda a, t: kernels.gumbel_sinkhorn(a, t, 6, noise, 1), (scores, tau))
    assert check(lambda p: kernels.cumulative_masks(p, fractions), logits)
    assert check(lambda a, t: kernels.soft_topk_masks(a, fractions, t, 6, noise, 1), (scores, tau))


def test_row_gauge_of_the_gradient():
    # a row constant is removed by the first row normalisation, so gradients of the logits sum to 0 over rows
    logits = torch.randn(2, 9, 9, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 9, 9, dtype=torch.float64)
    (gradient,) = torch.autograd.grad((kernels.log_sinkhorn(logits, 3).exp() * weights).sum(), logits)
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(2, 9, dtype=torch.float64), atol=1e-12, rtol=0)


def test_half_precision_and_autocast_compute_in_float32():
    scores = torch.randn(2, 16)
    expected = kernels.soft_topk_masks(scores.bfloat16().float(), [0.5], 0.3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        actual = kernels.soft_topk_masks(scores.bfloat16(), [0.5], 0.3, 5)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


def test_non_contiguous_expanded_and_empty():
    scores = torch.randn(16, 3).T
    torch.testing.assert_close(
        kernels.soft_topk_masks(scores, [0.3], 0.3, 4),
        kernels.soft_topk_masks(scores.contiguous(), [0.3], 0.3, 4),
    )
    expanded = torch.randn(1, 16).expand(3, 16)
    assert torch.equal(*kernels.soft_topk_masks(expanded, [0.3], 0.3, 4)[:2])
    assert kernels.soft_topk_masks(torch.zeros(0, 16), [0.3], 0.3, 4).shape == (0, 1, 16)
    assert kernels.soft_topk_masks(torch.zeros(2, 16), [], 0.3, 4).shape == (2, 0, 16)


def test_philox_known_answers():
    # Random123's vectors for Philox4x32-10
    assert [f"{w:08x}" for w in random.philox(4, 0).tolist()] == [
        "6627e8d5",
        "e169c58d",
        "bc57ac4c",
        "9b00dbd8",
    ]
    assert random.philox(7, 5).tolist() == random.philox(8, 5)[:7].tolist()
    assert not torch.equal(random.philox(8, 1), random.philox(8, 1 << 32))


def test_gumbel_distribution_and_seed():
    noise = random.gumbel((400_000,), 3).double()
    assert torch.isfinite(noise).all()
    assert abs(noise.mean() - 0.5772157) < 5 * 1.2825 / 400_000**0.5
    assert abs(noise.var() - np.pi**2 / 6) < 0.05
    torch.manual_seed(0)
    first = kernels.gumbel_sinkhorn(torch.zeros(1, 9), 1.0, 3, 1.0)
    other = kernels.gumbel_sinkhorn(torch.zeros(1, 9), 1.0, 3, 1.0)
    torch.manual_seed(0)
    assert torch.equal(kernels.gumbel_sinkhorn(torch.zeros(1, 9), 1.0, 3, 1.0), first)
    assert not torch.equal(first, other)


def ranking(**changes):
    given = {
        "scores": torch.zeros(2, 9),
        "fractions": [0.5],
        "tau": 0.3,
        "n_iters": 3,
        "noise": 0.0,
        "seed": 0,
    }
    return lambda: kernels.soft_topk_masks(**{**given, **changes})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (ranking(scores=torch.zeros(9)), r"scores is float32 of shape \(9,\): give a 2-dim"),
        (ranking(scores=torch.zeros(2, 0)), "at least one region"),
        (ranking(scores=torch.zeros(2, 9, dtype=torch.int64)), "scores is int64"),
        (ranking(scores=[[1.0]]), "scores is a list"),
        (ranking(tau=0.0), "finite and > 0"),
        (ranking(tau=-1.0), "finite and > 0"),
        (ranking(tau=float("nan")), "finite and > 0"),
        (ranking(tau=torch.tensor(-2.0)), "finite and > 0"),
        (ranking(tau=torch.ones(2)), "0-dim"),
        (ranking(n_iters=0), "n_iters=0: give an integer in 1 … 1000000"),
        (ranking(n_iters=2**70), f"n_iters={2**70}: give an integer in 1 … 1000000"),
        (ranking(noise=-1.0), "noise=-1.0"),
        (ranking(seed=-1), "seed=-1"),
        (ranking(fractions=[0.5, 0.2]), "ascending"),
        (ranking(fractions=[-0.1]), r"in \[0, 1\]"),
        (ranking(fractions=[1.5]), r"in \[0, 1\]"),
        (ranking(fractions=[float("nan")]), r"in \[0, 1\]"),
        (ranking(fractions=[[0.5]]), "1-dim"),
        (lambda: kernels.log_sinkhorn(torch.zeros(2, 3, 4)), "square"),
        (lambda: kernels.log_sinkhorn(torch.zeros(3, 3)), "3-dim"),
        (lambda: kernels.cumulative_masks(torch.zeros(2, 3, 4), [0.5]), "square"),
        (lambda: kernels.log_sinkhorn(torch.zeros(1, 3, 3), backend="cublas"), "choose one of"),
    ],
)
def test_bad_input_is_one_line(call, message):
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_explain_names_every_backend():
    rows = kernels.explain("soft_topk_masks", torch.zeros(2, 9), [0.5], 0.3)
    assert sum(row.chosen for row in rows) == 1
    assert rows[-1].backend == "reference"
    with pytest.raises(ValueError, match="not known"):
        kernels.explain("softmax", torch.zeros(2, 9))


def test_a_named_backend_says_why_it_cannot_run():
    image = torch.zeros(1, 3, 4, 4)
    ranks = torch.zeros(1, 4, 4, dtype=torch.int32)
    with pytest.raises(kernels.BackendError, match="tensors are on cpu"):
        kernels.perturb_by_rank(image, image, ranks, [1], backend="cuda")
    with pytest.raises(kernels.BackendError, match="log_sinkhorn here: tensors are on cpu"):
        kernels.log_sinkhorn(torch.zeros(1, 3, 3), backend="cuda")
