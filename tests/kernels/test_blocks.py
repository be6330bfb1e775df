"""The linear-time ranking of the C++ operators: as exact as the dense one where that one is possible, and beyond."""

import warnings

import pytest
import torch

from aha import kernels
from aha.kernels import native

from .accuracy import assert_accurate
from .ranking import Problem, by_reference, increments

pytestmark = pytest.mark.skipif(native.load("_C") is not None, reason=f"aha._C: {native.load('_C')}")
READOUTS = ("steps", "left", "right")


@pytest.fixture
def blocks(monkeypatch):
    monkeypatch.setenv("AHA_RANKING_PLAN", "blocks")


def make(scores, readout="steps", tau=0.3, iterations=30, start=False, steps=16):
    """A problem and the gradient that arrives at its output."""
    batch, k = scores.shape
    g = torch.Generator().manual_seed(k)
    given = {
        "steps": {"left": increments(k, steps)[1:-1]},
        "left": {"left": torch.arange(k, dtype=torch.float32)[None] / k},
        "right": {"right": torch.randn(batch, k, generator=g)},
    }[readout]
    if start:
        given["start"] = torch.randn(batch, k, generator=g)
    problem = Problem(scores=scores, tau=torch.tensor(tau), iterations=iterations, **given)
    return problem, torch.randn(problem.out_shape(), generator=g)


def run(problem: Problem, grad, dtype=torch.float32, need_tau=True):
    """Output and gradients as `by_reference` lists them; the output says whether the image was ranked in blocks."""
    values = [
        None if v is None else v.detach().to(dtype) for v in (problem.scores, problem.tau, problem.left, problem.right)
    ]
    scores, tau, left, right = values
    start = None if problem.start is None else problem.start.detach().to(dtype)
    op = torch.ops.aha
    given = (scores, tau, problem.seed, left, right)
    out, scalings, absorbed = op.gumbel_sinkhorn(*given, problem.iterations, 0.0, start)
    assert bool((absorbed & 2).all())
    found = op.gumbel_sinkhorn_backward(grad.to(dtype), *given, scalings, absorbed, 0.0, need_tau, start)
    gradients = [
        g for g, there in zip(found, (True, need_tau, right is not None, start is not None), strict=True) if there
    ]
    return [out, *gradients]


def check(problem: Problem, grad):
    truth, single = (by_reference(problem, grad, dtype) for dtype in (torch.float64, torch.float32))
    double = run(problem, grad, torch.float64)
    for need_tau in (True, False):  # with tau, all is computed in double
        actual = run(problem, grad, need_tau=need_tau)
        expected = truth if need_tau else [t for n, t in enumerate(truth) if n != 2]
        plain = single if need_tau else [s for n, s in enumerate(single) if n != 2]
        for ours, exact, theirs in zip(actual, expected, plain, strict=True):
            assert_accurate(ours, theirs, exact)
    for n, (ours, exact) in enumerate(zip(double, truth, strict=True)):
        # the gradient of tau is a difference of terms that go with 1 / tau, in the reference too
        scale = max(1.0, exact.abs().max()) / (problem.tau.item() if n == 2 else 1)
        assert (ours - exact).abs().max() <= 2e-9 * scale


@pytest.mark.parametrize("k", [1, 2, 17, 50, 130])
@pytest.mark.parametrize("readout", READOUTS)
def test_accuracy_by_size(blocks, k, readout):
    scores = 0.5 + 0.29 * torch.randn(2, k, generator=torch.Generator().manual_seed(k))
    for iterations in (1, 2, 30):
        for start in (False, True):
            check(*make(scores, readout, 0.3, iterations, start, steps=min(k, 14) + 2))


@pytest.mark.parametrize("spread", [0.0, 0.3, 10.0, 100.0])
@pytest.mark.parametrize("tau", [10.0, 0.3, 0.05, 0.005])
def test_accuracy_by_temperature(blocks, spread, tau):
    scores = 0.5 + spread * torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    for readout in READOUTS:
        check(*make(scores, readout, tau))


@pytest.mark.slow
@pytest.mark.parametrize("k", [196, 784, 1025])
@pytest.mark.parametrize("tau", [0.3, 0.05, 0.005])
def test_accuracy_of_large_matrices(blocks, k, tau):
    scores = 0.5 + 0.29 * torch.randn(1, k, generator=torch.Generator().manual_seed(k))
    check(*make(scores, "steps", tau))


def adversarial(k):
    g = torch.Generator().manual_seed(3)
    uniform, normal = torch.rand(1, k, generator=g), torch.randn(1, k, generator=g)
    return {
        "ties": torch.randint(0, 4, (1, k), generator=g).float(),
        "all equal": torch.full((1, k), 0.3),
        "two clusters": 5.0 * (uniform > 0.5) + 0.01 * normal,
        "Cauchy": (torch.pi * (uniform - 0.5)).tan(),
        "one outlier": torch.cat([torch.full((1, 1), 1000.0), uniform[:, 1:]], 1),
        "far from the ranks": 50 + 0.29 * normal,
        "sorted": uniform.sort(dim=1).values,
        "zeros of both signs": torch.zeros(1, k).copysign(normal),
    }


@pytest.mark.parametrize("name", adversarial(8))
@pytest.mark.parametrize("tau", [10.0, 0.3, 0.02, 1e-3])
def test_adversarial_scores(blocks, name, tau):
    problem, grad = make(adversarial(150)[name], "steps", tau)
    truth, single = (by_reference(problem, grad, dtype) for dtype in (torch.float64, torch.float32))
    actual = run(problem, grad, need_tau=False)
    # masks to 1e-6 however bad the reference is in float32
    assert (actual[0] - truth[0]).abs().max() <= 1e-6
    assert_accurate(actual[1], single[1], truth[1])


def test_gradients_by_finite_differences(blocks):
    scores = torch.randn(2, 70, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    tau = torch.tensor(0.2, dtype=torch.float64, requires_grad=True)
    values = torch.randn(2, 70, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    start = torch.randn(2, 70, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    left = increments(70, 5).double()
    op, seed = torch.ops.aha.gumbel_sinkhorn, torch.tensor(0)
    fast = {"fast_mode": True}
    assert torch.autograd.gradcheck(lambda a, t: op(a, t, seed, left, None, 4, 0.0, None)[0], (scores, tau), **fast)
    assert torch.autograd.gradcheck(
        lambda a, t, r, s: op(a, t, seed, None, r, 4, 0.0, s)[0], (scores, tau, values, start), **fast
    )


@pytest.mark.parametrize("k", [130, 20000])
def test_repeats_bit_for_bit_over_thread_counts(blocks, k):
    before = torch.get_num_threads()
    problem, grad = make(torch.randn(3, k, generator=torch.Generator().manual_seed(0)), tau=0.05, iterations=5)
    runs = []
    try:
        # fewer threads than images, as many, and more: there tiles of blocks are shared out
        for threads in (1, 2, 3, 5, 1):
            torch.set_num_threads(threads)
            runs.append(run(problem, grad, need_tau=False))
    finally:
        torch.set_num_threads(before)
    for found in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, runs[0], strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_images_that_are_not_finite_are_nan_and_no_other(blocks, bad):
    scores = torch.randn(3, 80, generator=torch.Generator().manual_seed(0))
    scores[1, 5] = bad
    for readout in READOUTS:
        problem, grad = make(scores, readout)
        for found in run(problem, grad, need_tau=False):
            assert found[1].isnan().all()
            assert found[[0, 2]].isfinite().all()


def test_the_plan_counts_operations(monkeypatch):
    monkeypatch.delenv("AHA_RANKING_PLAN", raising=False)
    scores = 0.5 + 0.29 * torch.randn(2, 784, generator=torch.Generator().manual_seed(0))

    def plan(scores, tau, **options):
        rows = {row.backend: row for row in kernels.explain("soft_topk_masks", scores, [0.5], tau, **options)}
        assert rows["reference"].plan is None
        return rows["cpu"].plan

    scores = scores.double()  # float32 has a third plan: test_nodes.py
    assert plan(scores, 0.3).startswith("blocks: ")
    assert plan(scores[:, :49], 0.3).startswith("dense: ")  # small matrices
    assert plan(scores[:, :100], 1e-3).startswith("dense: ")  # narrow blocks
    assert plan(scores, 0.3, noise=0.5) == "dense, as the noise is"
    clustered = torch.cat([scores[:1, :120], 1000 * scores[1:, :120]])
    assert plan(clustered, 0.1).startswith("dense for 1, blocks for 1 of 2 images")
    # what explain says is what runs
    for some, tau in ((scores, 0.3), (scores[:, :49], 0.3), (clustered, 0.1)):
        tau = torch.tensor(tau, dtype=some.dtype)
        counts = torch.ops.aha.ranking_plan(some, tau, None)
        left = increments(some.shape[1], 4).to(some.dtype)
        absorbed = torch.ops.aha.gumbel_sinkhorn(some, tau, torch.tensor(0), left, None, 2, 0.0, None)[2]
        assert torch.equal(counts[:, 0] > 0, absorbed[:, 0] & 2 > 0)


def test_a_plan_is_named_or_refused(monkeypatch):
    problem, grad = make(torch.randn(1, 30, generator=torch.Generator().manual_seed(0)))
    monkeypatch.setenv("AHA_RANKING_PLAN", "sparse")
    with pytest.raises(RuntimeError, match="AHA_RANKING_PLAN=sparse is not known: set it to dense, blocks or nodes"):
        run(problem, grad)


def test_every_pixel_of_an_image(blocks):
    # 224 x 224: the dense matrix would take 10 GB
    k = 224 * 224
    scores = 0.5 + 0.29 * torch.randn(1, k, generator=torch.Generator().manual_seed(0))
    problem, _ = make(scores, "steps", 0.05, iterations=6)
    problem = problem._replace(left=increments(k, 16)[1:])  # a partition of the ranks
    grad = torch.randn(problem.out_shape(), generator=torch.Generator().manual_seed(1))
    single, double = (run(problem, grad, dtype, need_tau=False) for dtype in (torch.float32, torch.float64))
    assert (single[0] - double[0]).abs().max() < 2e-6
    assert (single[1] - double[1]).abs().max() < 2e-5 * double[1].abs().max()
    assert (double[0].sum(1) - 1).abs().max() < 2e-7  # float32 weights


@pytest.mark.slow
def test_a_million_values(monkeypatch):
    monkeypatch.delenv("AHA_RANKING_PLAN", raising=False)
    values = torch.randn(1, 2**20, generator=torch.Generator().manual_seed(0), requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # three iterations are not enough, and enough to see them work
        ranks = kernels.soft_rank(values, 1e-3, 3)
    (gradient,) = torch.autograd.grad(ranks.square().mean(), values)
    hard = values.detach().argsort(dim=1, descending=True).argsort(dim=1)
    assert (ranks - hard).abs().mean() < 0.02 * values.shape[1]
    assert gradient.isfinite().all() and gradient.abs().max() > 0
