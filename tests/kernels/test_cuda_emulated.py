"""The CUDA ranking kernels, run on a CPU by the emulator: against the float64 reference, in every layout."""

import numpy as np
import pytest
import torch
from torch import Tensor

from aha.kernels import random

from .emulator import COMPILER, Emulator
from .ranking import READOUTS, Problem, assert_as_good_as_float32, by_reference, increments, make

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no g++")

STREAMED, ONE_CTA = 0, 1
LAYOUTS = {"one CTA": ONE_CTA, "cluster of 2": 2, "cluster of 4": 4, "streamed": STREAMED}


@pytest.fixture(scope="module")
def emulator(tmp_path_factory) -> Emulator:
    return Emulator(tmp_path_factory.mktemp("emulator"))


def by_kernels(emulator: Emulator, problem: Problem, grad: Tensor, ranks: int, order: int = 0) -> list[Tensor]:
    out, scalings, absorbed = emulator.forward(problem, ranks, order)
    return [x for x in (out, *emulator.backward(problem, grad, scalings, absorbed, ranks, order)) if x is not None]


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_readout_in_every_layout(emulator, layout, readout):
    # the gradient of tau is one number for each image: enough of them for the error of the reference to be typical
    problem, grad = make(21, readout, batch=6, noise=0.0 if readout == "log" else 0.5)
    assert_as_good_as_float32(by_kernels(emulator, problem, grad, LAYOUTS[layout]), problem, grad)


@pytest.mark.slow
@pytest.mark.parametrize("readout", ["left", "right"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_start_and_its_gradient_in_every_layout(emulator, layout, readout):
    # scores so large that scalings are absorbed: the gradient of the start comes with the first segment alone
    for spread, noise in ((0.5, 0.5), (100.0, 0.0)):
        problem, grad = make(21, readout, batch=6, spread=spread, noise=noise, start=True)
        assert_as_good_as_float32(by_kernels(emulator, problem, grad, LAYOUTS[layout]), problem, grad)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scores_far_from_the_ranks(emulator, layout):
    # squares of them over tau are rounded to whole numbers, and more
    for spread, offset, tau in [(0.0, 1e5, 1.0), (1.0, 1e4, 1.0), (1.0, 1e3, 0.01), (100.0, 1e4, 1.0)]:
        scores = spread * torch.randn(2, 21, generator=torch.Generator().manual_seed(1)) + offset
        problem = Problem(scores=scores, tau=torch.tensor(tau), seed=torch.tensor(0), noise=0.0, iterations=30)
        out, scalings, absorbed = emulator.forward(problem, LAYOUTS[layout])
        truth, *_ = by_reference(problem, torch.ones(problem.out_shape()), torch.float64)
        rounding = torch.finfo(torch.float32).eps * float(scores.abs().max()) / tau
        torch.testing.assert_close(out.double(), truth, rtol=0, atol=1e-5 + 2 * rounding)
        grad = torch.randn(problem.out_shape(), generator=torch.Generator().manual_seed(2))
        assert all(
            x is None or x.isfinite().all()
            for x in emulator.backward(problem, grad, scalings, absorbed, LAYOUTS[layout])
        )


@pytest.mark.parametrize("k", [1, 2, 16, 49, 64, 65, 100, 130])
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_sizes_in_one_cta(emulator, k, noise):
    problem, grad = make(k, "left", noise=noise, iterations=3)
    assert_as_good_as_float32(by_kernels(emulator, problem, grad, ONE_CTA), problem, grad)


@pytest.mark.parametrize(
    ("k", "ranks"),
    [(1, 2), (9, 4), (100, 2), (103, 4), (230, 2), (1, 16), (37, 16), (1, STREAMED), (33, STREAMED), (70, STREAMED)],
)
def test_sizes_in_the_other_layouts(emulator, k, ranks):
    # bands of unequal and of no rows; more columns than one lane of the smallest kernel holds
    problem, grad = make(k, "right", batch=4, noise=1.0, iterations=2)
    assert_as_good_as_float32(by_kernels(emulator, problem, grad, ranks), problem, grad)


@pytest.mark.slow
def test_the_largest_resident_kernel(emulator):
    problem, grad = make(420, "left", batch=1, noise=1.0, iterations=2)
    assert_as_good_as_float32(by_kernels(emulator, problem, grad, 8), problem, grad)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_steps_than_a_warp_has_lanes(emulator, layout):
    # steps without an entry for a band, or for any
    problem, _ = make(21, "left")
    left = torch.cat([increments(21, 40), torch.zeros(1, 21), increments(21, 3)])
    problem = problem._replace(left=left)
    grad = torch.randn(2, 44, 21, generator=torch.Generator().manual_seed(0))
    assert_as_good_as_float32(by_kernels(emulator, problem, grad, LAYOUTS[layout]), problem, grad)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_with_a_mean_lose_no_digits(emulator, layout):
    # cumulative masks send the sum of all later gradients to a rank row; the mean of a column is no information, and
    # without it the gradient is far better than that of the reference
    problem, grad = make(60, "left", batch=4, spread=10.0, iterations=30)
    grad = grad.flip(1).cumsum(1).flip(1) + 10
    truth, single = (by_reference(problem, grad, dtype)[1] for dtype in (torch.float64, torch.float32))
    got = by_kernels(emulator, problem, grad, LAYOUTS[layout])[1]
    assert (got - truth).abs().max() < 0.05 * (single - truth).abs().max()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("iterations", [1, 2])
def test_few_iterations(emulator, layout, iterations):
    for readout in ("matrix", "log"):
        problem, grad = make(20, readout, iterations=iterations)
        assert_as_good_as_float32(by_kernels(emulator, problem, grad, LAYOUTS[layout]), problem, grad)


def test_many_iterations(emulator):
    problem, grad = make(49, "left", batch=1, spread=3.0, noise=1.0, iterations=30)
    assert_as_good_as_float32(by_kernels(emulator, problem, grad, ONE_CTA), problem, grad)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("tau", "noise"), [(0.3, 0.5), (0.01, 0.0), (0.001, 1.0)])
def test_large_scores_are_absorbed(emulator, layout, tau, noise):
    problem, grad = make(60, spread=100.0, tau=tau, noise=noise, iterations=12)
    ranks = LAYOUTS[layout]
    absorbed = emulator.forward(problem, ranks, order=1)[2]
    assert absorbed.any() and not absorbed[:, -1].any()
    assert_as_good_as_float32(by_kernels(emulator, problem, grad, ranks), problem, grad)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_p_of_large_logits_keeps_p(emulator, layout):
    # the plain loop in float32 rounds potentials of the size of the logits: P to 3e-5
    problem, _ = make(70, "log", iterations=12)
    logits = 400 * torch.randn(2, 70, 70, generator=torch.Generator().manual_seed(70))
    problem = problem._replace(logits=logits)
    truth = by_reference(problem, torch.zeros(2, 70, 70), torch.float64)[0].exp()
    log_p = emulator.forward(problem, LAYOUTS[layout])[0]
    assert (log_p.double().exp() - truth).abs().max() < 2e-6


def test_absorption_in_log_sinkhorn(emulator):
    problem, grad = make(60, "log", iterations=12)
    steep = torch.linspace(100, -100, 60)[:, None] * torch.randn(2, 1, 60, generator=torch.Generator().manual_seed(0))
    problem = problem._replace(logits=problem.logits + 100 * steep)
    for ranks in LAYOUTS.values():
        assert emulator.forward(problem, ranks)[2].any()
        assert_as_good_as_float32(by_kernels(emulator, problem, grad, ranks), problem, grad)


def test_saved_state_is_what_the_operators_promise(emulator):
    problem, _ = make(16, spread=100.0, tau=0.01, iterations=8)
    out, scalings, absorbed = emulator.forward(problem, ONE_CTA, order=1)
    assert set(absorbed.unique().tolist()) <= {0, 1}
    f, g = scalings.double()[:, 0].unbind(1)
    for t in range(1, problem.iterations):
        moved = absorbed[:, t - 1, None].bool()
        u, v = scalings.double()[:, t].unbind(1)
        f, g = f + torch.where(moved, u.log(), 0), g + torch.where(moved, v.log(), 0)
        outside = torch.cat([u, v], 1).log2().abs().amax(1) > 32
        assert torch.equal(outside, absorbed[:, t - 1].bool())
    u, v = scalings.double()[:, -1].unbind(1)
    ranks = torch.linspace(1, 0, 16, dtype=torch.float64) - 0.5
    logits = 2 * ranks[:, None] * (problem.scores.double() - 0.5)[:, None] / problem.tau.double()
    rebuilt = (logits + (f + u.log())[..., None] + (g + v.log())[:, None]).exp()
    # the potentials reach 1e4, of which float32 keeps 1e-3
    torch.testing.assert_close(out.double(), rebuilt, rtol=1e-2, atol=1e-6)
    torch.testing.assert_close(out.sum(1), torch.ones(2, 16))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("readout", ["left", "right"])
def test_the_order_of_threads_changes_nothing(emulator, layout, readout):
    # absorption, noise and every gradient; a missing barrier would show here
    problem, grad = make(45, readout, spread=100.0, noise=1.0, tau=0.01, iterations=8)
    assert emulator.forward(problem, LAYOUTS[layout])[2].any()
    results = [by_kernels(emulator, problem, grad, LAYOUTS[layout], order) for order in range(4)]
    for result in results[1:]:
        for got, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.parametrize(("k", "ranks"), [(140, ONE_CTA), (37, 16)])
def test_the_order_of_threads_changes_nothing_in_larger_layouts(emulator, k, ranks):
    problem, grad = make(k, "left", batch=1, noise=1.0, iterations=2)
    results = [by_kernels(emulator, problem, grad, ranks, order) for order in range(3)]
    for result in results[1:]:
        for got, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_rows_of_the_gradient_sum_to_zero(emulator):
    # a constant in a row of the logits is removed by the first iteration
    problem, grad = make(33, "log")
    for ranks in LAYOUTS.values():
        gradient = by_kernels(emulator, problem, grad, ranks)[1]
        assert gradient.sum(-1).abs().max() < 2e-5 * gradient.abs().max()


@pytest.mark.parametrize("backward", [False, True])
def test_masks(emulator, backward):
    for k, weights in ((70, increments(70, 7)), (9, torch.randn(40, 9)), (130, torch.randn(3, 130))):
        given = torch.randn(2, len(weights) if backward else k, k)
        matrix = weights.T if backward else weights
        exact, single = matrix.double() @ given.double(), matrix @ given
        bound = 2 * (single - exact).abs().max() + 1e-6
        for order in range(3):
            assert (emulator.masks(given, weights, backward, order) - exact).abs().max() <= bound


def test_noise_is_that_of_every_backend(emulator):
    for k in (7, 19, 32):  # rows that start at each word of a Philox block
        problem, _ = make(k, batch=3, noise=1.0)
        expected = random.gumbel((3, k, k), problem.seed).numpy()
        np.testing.assert_array_max_ulp(emulator.noise(problem).numpy(), expected, maxulp=2)


def test_empty_inputs(emulator):
    problem, grad = make(8, "left", batch=0)
    assert by_kernels(emulator, problem, grad, ONE_CTA)[0].shape == (0, 5, 8)
    for ranks in LAYOUTS.values():
        problem, _ = make(8)
        problem = problem._replace(left=torch.zeros(0, 8))
        _, scores, tau = by_kernels(emulator, problem, torch.zeros(2, 0, 8), ranks)
        assert not scores.any() and not tau.any()


@pytest.mark.parametrize(
    ("k", "shared", "cluster", "forward", "backward"),
    [
        (49, 227, 16, 1, 1),
        (196, 227, 16, 1, 1),
        (196, 163, 1, 1, 1),  # sm_80
        (196, 99, 1, STREAMED, STREAMED),  # sm_86
        (400, 227, 16, 4, 4),
        (784, 227, 16, 16, 16),
        (784, 227, 8, STREAMED, STREAMED),
        (801, 227, 16, STREAMED, STREAMED),
        (100_000, 227, 16, STREAMED, STREAMED),
    ],
)
def test_layout_by_size(emulator, k, shared, cluster, forward, backward):
    assert emulator.planned_ranks(k, False, shared << 10, cluster) == forward
    assert emulator.planned_ranks(k, True, shared << 10, cluster) == backward


@pytest.mark.parametrize(
    ("k", "processors", "ranks"),
    [
        (196, 4, 4),  # a batch of 32 on 132 multiprocessors
        (196, 2, 2),
        (196, 16, 4),  # rows are left for every warp
        (129, 16, 4),
        (128, 16, 1),
        (400, 1, 4),  # memory asks for them
        (400, 8, 8),
        (784, 100, 16),
        (801, 100, STREAMED),
    ],
)
def test_more_ctas_where_processors_would_be_idle(emulator, k, processors, ranks):
    for backward in (False, True):
        assert emulator.planned_ranks(k, backward, 227 << 10, 16, processors) == ranks


def test_the_emulator_runs_a_correct_kernel(emulator):
    expected = 2 * torch.arange(64).roll(-1).float().expand(4, 64)
    for order in range(4):
        assert torch.equal(emulator.faulty(0, order), expected)


@pytest.mark.parametrize(
    ("fault", "order", "message"),
    [
        (1, 0, r"deadlock: 126 threads wait, 2 have finished; thread 0 of CTA 0 waits for its block"),
        (3, 0, "past the end of dynamic shared memory"),
        (4, 1, "a CTA that has finished"),  # it runs before the other in this order
    ],
)
def test_the_emulator_reports_faults(emulator, fault, order, message):
    with pytest.raises(RuntimeError, match=message):
        emulator.faulty(fault, order)


def test_the_emulator_shows_a_missing_barrier_and_uninitialised_memory(emulator):
    results = [emulator.faulty(2, order) for order in range(3)]
    assert not torch.equal(results[0], results[1])
    assert results[0].isnan().any()
    assert emulator.faulty(5).isnan().all()
