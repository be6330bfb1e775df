"""soft_sort, soft_rank and soft_topk against hard sorts, and against Sinkhorn iterated to its limit in float64."""

import warnings

import numpy as np
import pytest
import torch
from scipy.stats import rankdata

from aha import kernels
from aha.kernels import convergent, native, reference

needs_native = pytest.mark.skipif(native.load("_C") is not None, reason=f"aha._C: {native.load('_C')}")


def draw(batch: int, k: int, power: int = 1) -> torch.Tensor:
    """Normal values; with the power 3, of heavy tails."""
    return torch.randn(batch, k, generator=torch.Generator().manual_seed(0)) ** power


def standardised(values: np.ndarray) -> np.ndarray:
    """Less ½, as the rank targets less ½."""
    return 0.29 * (values - values.mean(1, keepdims=True)) / values.std(1, keepdims=True)


def permutation_at_the_limit(values: torch.Tensor, tau: float) -> np.ndarray:
    """(B, K, K) P of Sinkhorn without noise, in float64 until rows and columns sum to 1, τ lowered step by step."""
    c = standardised(values.double().numpy())
    k = c.shape[1]
    product = 2 * np.linspace(0.5, -0.5, k)[:, None] * c[:, None, :]
    f, g = np.zeros((len(c), k, 1)), np.zeros((len(c), 1, k))  # in units of scores squared: they stay as τ falls
    for t in [tau * 2**n for n in range(10, -1, -1)]:
        for _ in range(40_000):
            f, before = -t * np.logaddexp.reduce((product + g) / t, axis=2, keepdims=True), f
            g = -t * np.logaddexp.reduce((product + f) / t, axis=1, keepdims=True)
            if np.abs(np.expm1((before - f) / t)).max() < (1e-9 if t == tau else 1e-3):
                break
    p = np.exp((product + f + g) / tau)
    assert np.abs(p.sum(2) - 1).max() < 1e-4
    return p


@pytest.mark.parametrize("power", [1, 3])
def test_a_lower_temperature_is_closer_to_the_sort(power):
    values = draw(8, 196, power)
    ordered, order = values.sort(descending=True)
    ranks = order.argsort().float()
    errors = []
    most = 200 * power  # tails take longer
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # all of them converge
        for tau in (1e-2, 1e-3, 1e-4, 1e-5):
            rank = (kernels.soft_rank(values, tau, most) - ranks).abs()
            value = (kernels.soft_sort(values, tau, most) - ordered).abs()
            top = (kernels.soft_topk(values, 30, tau, most) - (ranks < 30).float()).abs()
            errors.append([x for error in (rank, value, top) for x in (error.mean(), error.max())])
    errors = torch.tensor(errors)
    # the largest error of a top-k is at its edge, where two values may be as close as any
    assert (errors[1:, :5] < errors[:-1, :5]).all()
    if power == 1:
        assert errors[2, 0] < 0.5 and errors[3, 0] < 0.25  # ranks, of 196
        assert errors[3, 3] < 0.01  # sorted values, of 8


def test_well_separated_values_are_ranked_exactly():
    # neighbours 1/195 apart in standard form, as far as the ranks: their mixing is exp(−2·0.29/(0.29·195²·τ)), less
    # than a rounding from τ = 3e-6 down
    values = torch.linspace(-1, 1, 196)[torch.randperm(196, generator=torch.Generator().manual_seed(0))][None]
    ranks = values.sort(descending=True).indices.argsort()
    torch.testing.assert_close(kernels.soft_rank(values, 1e-6), ranks.float(), rtol=0, atol=1e-4)
    torch.testing.assert_close(kernels.soft_sort(values, 1e-6), values.sort(descending=True).values, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("tau", [0.3, 1e-2, 1e-3])
@pytest.mark.parametrize("power", [1, 3])
def test_values_are_those_of_the_limit(tau, power):
    values = draw(2, 24, power)
    p = permutation_at_the_limit(values, tau)
    # 24 ranks, each with a weight within the tolerance of 1
    assert np.abs(kernels.soft_rank(values, tau).numpy() - np.arange(24) @ p).max() < 0.1
    assert np.abs(kernels.soft_topk(values, 5, tau).numpy() - p[:, :5].sum(1)).max() < 2 * convergent.TOLERANCE
    expected = (p @ values.double().numpy()[..., None])[..., 0]
    error = np.abs(kernels.soft_sort(values, tau).numpy() - expected).max()
    assert error < 2 * convergent.TOLERANCE * values.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("tau", [0.3, 1e-2, 1e-3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_those_of_the_limit(tau, dtype):
    """Against implicit differentiation of the converged P: [I P; Pᵀ I][f̄; ḡ] = [row; column sums of P∘P̄]."""
    k = 24
    values, cotangent = draw(2, k), torch.randn(2, k, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    p = torch.from_numpy(permutation_at_the_limit(values, tau))
    weighted = p * torch.arange(k)[:, None] * cotangent[:, None, :]
    identity = torch.eye(k, dtype=torch.float64).expand(2, k, k)
    system = torch.cat([torch.cat([identity, p], 2), torch.cat([p.mT, identity], 2)], 1)
    sums = torch.cat([weighted.sum(2), weighted.sum(1)], 1)[..., None]
    adjoint = torch.linalg.pinv(system, rtol=1e-13) @ sums
    logits = weighted - p * (adjoint[:, :k] + adjoint[:, k:].mT)
    of_scores = 2 / tau * (torch.linspace(0.5, -0.5, k, dtype=torch.float64) @ logits)
    exact = values.double().requires_grad_()
    deviation = exact - exact.mean(1, keepdim=True)
    scores = 0.29 * deviation / deviation.square().mean(1, keepdim=True).sqrt()
    (expected,) = torch.autograd.grad(scores, exact, of_scores)

    values = values.to(dtype).requires_grad_()
    (got,) = torch.autograd.grad(kernels.soft_rank(values, tau), values, cotangent.to(dtype))
    assert (got - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("tau", [0.3, 1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_native)])
def test_gradients_are_exact_for_the_iterations_made(tau, backend):
    values = draw(2, 6).double().requires_grad_()
    tau = torch.tensor(tau, dtype=torch.float64, requires_grad=True)
    for operator in (kernels.soft_rank, kernels.soft_sort, lambda v, t, **k: kernels.soft_topk(v, 2, t, **k)):
        # a step small beside τ: the curvature goes with 1/τ²
        eps = min(1e-6, 1e-4 * tau.item())
        call = lambda v, t: operator(v, t, n_iters=20, backend=backend)  # noqa: B023, E731
        assert torch.autograd.gradcheck(call, (values, tau), eps=eps, atol=1e-4, rtol=1e-3)


@needs_native
@pytest.mark.parametrize("tau", [1e-2, 1e-3, 1e-4, 1e-5])
def test_float32_is_close_to_float64_at_every_temperature(tau):
    values = draw(2, 100)
    cotangent = torch.randn(2, 100, generator=torch.Generator().manual_seed(1))

    def run(dtype, backend):
        x = values.to(dtype).requires_grad_()
        out = kernels.soft_rank(x, tau, backend=backend)
        return out.detach(), *torch.autograd.grad(out, x, cotangent.to(dtype))

    for got, exact in zip(run(torch.float32, "cpu"), run(torch.float64, "reference"), strict=True):
        # logits of 1/τ and their rounding of 6e-8/τ, in units of the result
        assert (got - exact).abs().max() < (1e-4 + 2e-7 / tau) * exact.abs().max()


@pytest.mark.parametrize("tau", [1.0, 1e-2, 1e-4, 1e-5])
def test_ties_share_the_mean_of_their_ranks(tau):
    values = torch.randint(0, 6, (4, 50), generator=torch.Generator().manual_seed(0)).float()
    values[3] = 7.0
    ranks = kernels.soft_rank(values, tau)
    for row, rank in zip(values, ranks, strict=True):
        for value in row.unique():
            same = rank[row == value]
            torch.testing.assert_close(same, same[:1].expand_as(same), rtol=0, atol=1e-4)
    torch.testing.assert_close(ranks[3], torch.full((50,), 24.5), rtol=0, atol=1e-4)
    if tau <= 1e-4:
        expected = rankdata(-values.numpy(), method="average", axis=1) - 1
        torch.testing.assert_close(ranks.double(), torch.from_numpy(expected), rtol=0, atol=0.05)


@pytest.mark.parametrize("tau", [0.1, 1e-2, 1e-3, 1e-4])
def test_rows_sum_to_one_within_the_tolerance(tau):
    # one rank is one top-1; the sums of neighbouring top-k differ by the sum of one row
    values = draw(3, 40)
    sums = torch.stack([kernels.soft_topk(values, k, tau).sum(1) for k in range(41)]).diff(dim=0)
    assert (sums - 1).abs().max() <= convergent.TOLERANCE + 1e-5


def test_a_row_alone_is_the_row_in_its_batch():
    # they converge after different numbers of iterations
    values = torch.cat([draw(3, 50), draw(3, 50, 3), torch.linspace(0, 1, 50)[None]])
    for operator in (kernels.soft_rank, kernels.soft_sort):
        together = operator(values, 1e-3)
        for n in range(len(values)):
            torch.testing.assert_close(operator(values[n : n + 1], 1e-3), together[n : n + 1], rtol=1e-5, atol=1e-5)


def counted(monkeypatch) -> list[tuple[int, int]]:
    """(rows, iterations) of every run of the reference from here on."""
    runs = []
    original = reference.read_left

    def spy(scores, start, left, tau, n_iters, noise, seed):
        runs.append((len(scores), n_iters))
        return original(scores, start, left, tau, n_iters, noise, seed)

    monkeypatch.setattr(reference, "read_left", spy)
    return runs


def test_rows_stop_where_they_have_converged(monkeypatch):
    runs = counted(monkeypatch)
    # ties settle at once, heavy tails do not
    values = torch.cat([torch.arange(50.0)[None] // 10, draw(1, 50, 3)])
    kernels.soft_rank(values, 1e-3, n_iters=80, backend="reference")
    assert runs[0] == (2, convergent.FIRST)
    assert runs[1][0] == 1 and runs[1][1] == 2 * convergent.FIRST
    assert all(count <= 80 for _, count in runs)
    runs.clear()
    # with noise, numbered by image, all of them go on
    kernels.soft_rank(values, 1e-3, n_iters=80, noise=0.1, seed=0, backend="reference")
    assert {rows for rows, _ in runs} == {2}


def test_it_warns_once_if_it_has_not_converged(monkeypatch):
    monkeypatch.setattr(convergent, "_warned", False)
    values = draw(2, 50)
    with pytest.warns(UserWarning, match=r"n_iters=3: in 2 of 2 rows .* raise n_iters or tau") as caught:
        kernels.soft_rank(values, 1e-3, n_iters=3)
    assert "\n" not in str(caught[0].message)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernels.soft_rank(values, 1e-3, n_iters=3)


def test_nan_stays_in_its_row():
    values = draw(3, 20)
    values[1, 4] = torch.nan
    ranks = kernels.soft_rank(values)
    assert ranks[1].isnan().all()
    torch.testing.assert_close(ranks[[0, 2]], kernels.soft_rank(values[[0, 2]]))


def test_the_other_operators_make_exactly_so_many_iterations():
    # far from converged, and so different from one iteration to the next
    scores = 0.5 + 0.29 * draw(1, 30)
    for n_iters in (1, 2, 7):
        logits = reference.log_permutation(scores.double(), torch.tensor(1e-3).double(), n_iters, 0.0, None)
        got = kernels.gumbel_sinkhorn(scores.double(), 1e-3, n_iters)
        torch.testing.assert_close(got, logits.exp())
        masks = kernels.soft_topk_masks(scores.double(), [0.5], 1e-3, n_iters)
        torch.testing.assert_close(masks[:, 0], logits.exp()[:, :15].sum(1))
        assert (kernels.gumbel_sinkhorn(scores.double(), 1e-3, n_iters + 1) - got).abs().max() > 1e-3


def test_compiled_and_mapped_calls_make_all_iterations(monkeypatch):
    values = draw(3, 30)
    runs = counted(monkeypatch)
    expected = kernels.soft_rank(values, 0.01, n_iters=200, backend="reference")
    mapped = torch.vmap(lambda v: kernels.soft_rank(v[None], 0.01, backend="reference")[0])(values)
    assert runs[-1] == (1, 200) and runs[0] == (3, convergent.FIRST)
    # more iterations than were needed
    torch.testing.assert_close(mapped, expected, rtol=0, atol=0.1)

    compiled = torch.compile(lambda v: kernels.soft_rank(v, 0.01), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(values), mapped, rtol=0, atol=1e-4)
