"""The ends of what numbers hold: scores far from ½, large logits, tiny temperatures, ranks of 64 bits."""

import pytest
import torch

from aha import kernels
from aha.kernels import native, reference

needs_native = pytest.mark.skipif(native.load("_C") is not None, reason=f"aha._C: {native.load('_C')}")
BACKENDS = ["reference", pytest.param("cpu", marks=needs_native)]
# spread and offset of scores, and tau: their squares over tau were rounded to anything between 1e-2 and 1e2
FAR = [(0.0, 1e4, 1.0), (1.0, 1e4, 1.0), (1.0, 1e3, 0.01), (100.0, 1e4, 1.0), (4000.0, 0.0, 1.0), (100.0, 0.0, 1e-3)]


def by_hand(scores: torch.Tensor, tau: float, n_iters: int) -> torch.Tensor:
    """P of (K,) scores in float64 by the definition itself: −(a − p)²/τ, no split, no noise."""
    a = scores.double()
    logits = -((a - torch.linspace(1, 0, len(a), dtype=torch.float64)[:, None]) ** 2) / tau
    for _ in range(n_iters):
        logits = logits.log_softmax(dim=1).log_softmax(dim=0)
    return logits.exp()


@pytest.mark.parametrize("k", [1, 3, 30])
@pytest.mark.parametrize(("spread", "offset", "tau"), FAR)
@pytest.mark.parametrize("backend", BACKENDS)
def test_scores_far_from_the_ranks(backend, spread, offset, tau, k):
    scores = spread * torch.randn(2, k, generator=torch.Generator().manual_seed(k)) + offset
    if k > 3 and spread == 4000.0:
        scores = scores.clamp(-4000, 4000)  # beyond, squares are refused
    p = kernels.gumbel_sinkhorn(scores, tau, 30, backend=backend)
    torch.testing.assert_close(p.sum(dim=1), torch.ones(2, k), rtol=0, atol=2e-6)
    # what is left: the rounding of the scores themselves over tau
    rounding = torch.finfo(torch.float32).eps * float(scores.abs().max() + 1) / tau
    for one, row in zip(p, scores, strict=True):
        torch.testing.assert_close(one.double(), by_hand(row, tau, 30), rtol=0, atol=2e-6 + 2 * rounding)


@needs_native
@pytest.mark.parametrize("plan", ["dense", "blocks", "nodes"])
@pytest.mark.parametrize("k", [3, 196])
@pytest.mark.parametrize("value", [1e4, 1e5])
def test_equal_scores_far_away_share_evenly(monkeypatch, plan, k, value):
    # by the operator itself: what no check at the door has seen, as on a GPU or in a compiled function
    monkeypatch.setenv("AHA_RANKING_PLAN", plan)
    scores = torch.full((1, k), value)
    masks = native.ops.soft_topk_masks(scores, torch.full((1, k), 0.5), torch.tensor(0.01), 30, 0.0, torch.tensor(0))
    torch.testing.assert_close(masks, torch.full((1, 1, k), 0.5), rtol=0, atol=1e-5)
    p = native.ops.gumbel_sinkhorn(scores, torch.tensor(1.0), 30, 0.0, torch.tensor(0))
    torch.testing.assert_close(p, torch.full((1, k, k), 1 / k), rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [1e5, -1e5, 1e18, 3e38])
def test_one_region_is_the_whole(value):
    scores, tau = torch.full((1, 1), value), torch.tensor(1.0)
    for found in (reference, *([native.ops] if native.load("_C") is None else [])):
        assert found.gumbel_sinkhorn(scores, tau, 3, 0.0, torch.tensor(0)).item() == 1.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kernels.gumbel_sinkhorn(torch.full((1, 1), 1e5), 1.0), r"reach 1\.0e\+10, which float32 resolves to"),
        (lambda: kernels.gumbel_sinkhorn(torch.randn(1, 4), 1e-300), "tau=1e-300 is not a number that float32 holds"),
        (lambda: kernels.gumbel_sinkhorn(torch.randn(1, 4).double(), 1e-300), "which float64 resolves to"),
        (lambda: kernels.log_sinkhorn(torch.full((1, 3, 3), 1e20)), "logits reach 1.0e.20, which float32 resolves"),
    ],
)
def test_what_the_type_cannot_resolve_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@needs_native
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_ranks_and_counts_of_64_bits_do_not_wrap(backend):
    image, blank = torch.ones(1, 1, 1, 4), torch.zeros(1, 1, 1, 4)
    ranks = torch.tensor([[[0, 1, 2**32, -(2**32) - 1]]])  # in 32 bits the last two were 0 and −1 … 0
    deleted, inserted = kernels.perturb_by_rank(image, blank, ranks, [0, 1, 4], backend=backend)
    # kept where rank < count
    expected = torch.tensor([[0.0, 0, 0, 1], [1, 0, 0, 1], [1, 1, 0, 1]]).view(1, 3, 1, 1, 4)
    torch.testing.assert_close(inserted, expected)
    torch.testing.assert_close(deleted, 1 - expected)
