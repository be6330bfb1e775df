"""The ranking at nodes: as exact as float32 allows wherever it is taken, and not taken where it would not be."""

import pytest
import torch

from aha import kernels
from aha.kernels import native

from .accuracy import assert_accurate
from .ranking import Problem, by_reference, increments
from .test_blocks import adversarial

pytestmark = pytest.mark.skipif(native.load("_C") is not None, reason=f"aha._C: {native.load('_C')}")
ABSORBED, AT_NODES = 1, 4


@pytest.fixture
def nodes(monkeypatch):
    monkeypatch.setenv("AHA_RANKING_PLAN", "nodes")


def normal(k, spread=0.29, batch=2):
    scores = torch.randn(batch, k, generator=torch.Generator().manual_seed(k))
    return 0.5 + spread * (scores - scores.mean(1, keepdim=True)) / scores.std(1, keepdim=True)


def make(scores, tau, iterations=30, left=None):
    left = increments(scores.shape[1], 16)[1:-1] if left is None else left
    problem = Problem(scores=scores, tau=torch.tensor(tau), left=left, iterations=iterations)
    return problem, torch.randn(problem.out_shape(), generator=torch.Generator().manual_seed(1))


def run(problem, grad, dtype=torch.float32, need_tau=False):
    """Output, gradient of the scores and of tau where asked for, and of every image whether nodes were taken."""
    op = torch.ops.aha
    given = (problem.scores.to(dtype), problem.tau.to(dtype), problem.seed, problem.left.to(dtype), None)
    out, *state = op.gumbel_sinkhorn(*given, problem.iterations, 0.0, None)
    found = op.gumbel_sinkhorn_backward(grad.to(dtype), *given, *state, 0.0, need_tau, None)
    return [out, *found[: 1 + need_tau]], state[1] & AT_NODES > 0, state[1] & ABSORBED > 0


def check(problem, grad, taken=True):
    found, at_nodes, _ = run(problem, grad)
    assert (at_nodes == taken).all()
    truth, single = (by_reference(problem, grad, dtype) for dtype in (torch.float64, torch.float32))
    assert (found[0] - truth[0]).abs().max() <= 2e-7 * max(1, problem.left.sum(1).abs().max() / problem.scores.shape[1])
    assert_accurate(found[1], single[1], truth[1])


@pytest.mark.parametrize(("k", "tau"), [(100, 0.3), (196, 0.3), (196, 0.05), (300, 1.0), (784, 0.05), (784, 0.005)])
def test_accuracy(nodes, k, tau):
    check(*make(normal(k), tau))


@pytest.mark.parametrize("spread", [0.0, 0.02, 0.1, 0.6])
def test_accuracy_by_spread(nodes, spread):
    check(*make(normal(300, spread), 0.3))


@pytest.mark.parametrize("iterations", [1, 2, 3, 31])
def test_accuracy_by_iterations(nodes, iterations):
    check(*make(normal(400), 0.03, iterations))


@pytest.mark.parametrize("outputs", [1, 2, 15, 16, 17, 32, 40])
def test_outputs_side_by_side(nodes, outputs):
    check(*make(normal(197), 0.1, left=increments(197, outputs + 1)[1:]))


def test_weights_of_any_kind(nodes):
    # signs, outputs that no rank belongs to, ranks of many outputs
    left = torch.randn(20, 250, generator=torch.Generator().manual_seed(0))
    left[::3] = 0
    left[1, 10:] = 0
    problem, grad = make(normal(250), 0.2, left=left)
    found, at_nodes, _ = run(problem, grad)
    assert at_nodes.all()
    truth, single = (by_reference(problem, grad, dtype) for dtype in (torch.float64, torch.float32))
    for ours, theirs, exact in zip(found, single, truth, strict=False):
        assert_accurate(ours, theirs, exact)
    assert not found[0][:, ::3].any()


def test_every_pixel_of_an_image(nodes):
    # 224 x 224, against blocks in float64
    problem, grad = make(normal(224 * 224, batch=1), 0.01)
    found, at_nodes, _ = run(problem, grad)
    assert at_nodes.all()
    double = run(problem, grad, torch.float64)[0]
    assert (found[0] - double[0]).abs().max() < 2e-7
    assert (found[1] - double[1]).abs().max() < 2e-6 * double[1].abs().max()


def test_scalings_move_into_the_potentials(nodes):
    problem, grad = make(normal(2000, 0.4, batch=1), 0.004, 12)
    found, at_nodes, absorbed = run(problem, grad)
    assert at_nodes.all()
    assert absorbed.any()
    double = run(problem, grad, torch.float64)[0]
    assert (found[0] - double[0]).abs().max() < 2e-7
    assert (found[1] - double[1]).abs().max() < 2e-6 * double[1].abs().max()


def test_gaps_at_the_ends_take_more_nodes(nodes):
    problem, grad = make(normal(784), 0.05)
    tails = problem.scores.clone()
    tails[1] = 0.5 + 0.6 / 0.29 * (tails[1] - 0.5)
    found, at_nodes, _ = run(problem._replace(scores=tails), grad)
    assert at_nodes.all()
    truth = by_reference(problem._replace(scores=tails), grad, torch.float64)
    assert (found[0] - truth[0]).abs().max() < 2e-7


@pytest.mark.parametrize("name", adversarial(8))
@pytest.mark.parametrize("tau", [10.0, 0.3, 0.02])
def test_adversarial_scores(nodes, name, tau):
    # whatever plan is taken
    problem, grad = make(adversarial(600)[name], tau)
    found, _, _ = run(problem, grad)
    truth, single = (by_reference(problem, grad, dtype) for dtype in (torch.float64, torch.float32))
    assert (found[0] - truth[0]).abs().max() <= 1e-6
    assert_accurate(found[1], single[1], truth[1])


def random_problem(seed):
    """Scores of one of nine kinds, spread, temperature and iterations at random."""
    g = torch.Generator().manual_seed(seed)
    some, (kind, size, heat, turns, wide) = torch.randn(1, 600, generator=g), torch.rand(5, generator=g).tolist()
    scores = some[:, : int(64 * 9**size)]
    scores = (
        lambda a: a,
        lambda a: a.erf(),
        lambda a: a / a.roll(1).abs().clamp_min(0.05),  # heavy tails
        lambda a: (3 * a).round(),
        lambda a: 0.2 * a + 4 * (a.roll(1) > 0),  # clusters with a gap
        lambda a: a.exp(),
        lambda a: torch.where(a.roll(1) > 0, 0.05 * a, a),
        lambda a: a.abs().log(),
        lambda a: a.abs() ** 0.3,
    )[int(9 * kind)](scores)
    spread = 10 ** (-1.5 + 1.5 * wide)
    scores = 0.5 + spread * (scores - scores.mean()) / scores.std()
    return make(scores, 10 ** (-3 + 4 * heat), (1, 2, 3, 5, 10, 30, 60)[int(7 * turns)])


def test_random_problems(monkeypatch):
    taken = 0
    for seed in range(500):
        problem, grad = random_problem(seed)
        monkeypatch.setenv("AHA_RANKING_PLAN", "nodes")
        found, at_nodes, _ = run(problem, grad)
        if not at_nodes.all():
            continue
        taken += 1
        monkeypatch.setenv("AHA_RANKING_PLAN", "blocks")
        exact, plain = (run(problem, grad, dtype)[0] for dtype in (torch.float64, torch.float32))
        (out, gradient), theirs = (
            [(some - truth).abs().max() for some, truth in zip(of, exact, strict=True)] for of in (found, plain)
        )
        assert out <= 5e-7, seed
        assert gradient <= max(5e-6 * exact[1].abs().max(), 2 * theirs[1]), seed
    assert taken >= 200


@pytest.mark.parametrize(
    ("name", "tau"),
    [("two clusters", 0.02), ("ties", 0.01), ("Cauchy", 0.3), ("one outlier", 0.3), ("far from the ranks", 0.3)],
)
def test_scores_that_nodes_cannot_tell_are_refused(nodes, name, tau):
    assert not run(*make(adversarial(600)[name], tau))[1].any()


def test_narrow_scores_at_low_temperatures_are_refused(nodes):
    # derivatives along the scores would be wrong by 1e-4
    assert not run(*make(normal(784, 0.02), 0.01))[1].any()


def test_each_image_has_its_plan(nodes):
    scores = torch.cat([normal(600, batch=1), adversarial(600)["two clusters"], normal(600, 0.6, batch=1)])
    scores = torch.cat([scores, torch.full((1, 600), torch.nan)])
    problem, grad = make(scores, 0.05)
    found, at_nodes, _ = run(problem, grad)
    assert at_nodes[:, 0].tolist() == [True, False, True, False]
    for n in range(3):
        alone = run(problem._replace(scores=scores[n : n + 1]), grad[n : n + 1])[0]
        assert all(torch.equal(a[n : n + 1], b) for a, b in zip(found, alone, strict=True))
    assert all(some[3].isnan().all() for some in found)


def test_the_gradient_of_tau(nodes):
    problem, grad = make(normal(150), 0.3)
    found, at_nodes, _ = run(problem, grad, need_tau=True)
    assert at_nodes.all()
    truth, single = (by_reference(problem, grad, dtype) for dtype in (torch.float64, torch.float32))
    for ours, theirs, exact in zip(found, single, truth, strict=True):
        assert_accurate(ours, theirs, exact)


def test_gradients_along_a_line(nodes):
    # finite differences of the float64 operator, which knows no nodes
    problem, grad = make(normal(300, batch=1), 0.1)
    along = torch.randn(1, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    step = 1e-5
    outs = [
        run(problem._replace(scores=problem.scores.double() + sign * step * along), grad, torch.float64)[0][0]
        for sign in (-1, 1)
    ]
    slope = ((outs[1] - outs[0]) * grad).sum() / (2 * step)
    ours = (run(problem, grad)[0][1].double() * along).sum()
    assert abs(ours - slope) <= 1e-5 * abs(slope)


@pytest.mark.parametrize("k", [300, 5000])
def test_repeats_bit_for_bit_over_thread_counts(nodes, k):
    before = torch.get_num_threads()
    problem, grad = make(normal(k, batch=3), 0.05, 5)
    try:
        runs = []
        for threads in (1, 2, 5, 1):
            torch.set_num_threads(threads)
            runs.append(run(problem, grad)[0])
    finally:
        torch.set_num_threads(before)
    for found in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, runs[0], strict=True))


def test_a_state_that_no_forward_pass_returned(nodes):
    problem, grad = make(normal(100), 0.3, 3)
    op = torch.ops.aha
    given = (problem.scores, problem.tau, problem.seed, problem.left, None)
    _, scalings, absorbed = op.gumbel_sinkhorn(*given, 3, 0.0, None)
    for bits in (AT_NODES, -1, AT_NODES | 200 << 8, 2**31 - 1):
        for values in (scalings, torch.full_like(scalings, torch.nan), torch.full_like(scalings, 1e38)):
            found = op.gumbel_sinkhorn_backward(grad, *given, values, torch.full_like(absorbed, bits), 0.0, False, None)
            assert found[0].shape == problem.scores.shape


def test_explain_names_what_runs(monkeypatch):
    monkeypatch.delenv("AHA_RANKING_PLAN", raising=False)

    def plan(scores, tau):
        return next(r for r in kernels.explain("soft_topk_masks", scores, [0.5], tau) if r.backend == "cpu").plan

    assert plan(normal(784), 0.3) == "nodes: iterations whose time does not depend on K"
    assert plan(normal(784).double(), 0.3).startswith("blocks: ")
    mixed = torch.cat([normal(600, batch=1), adversarial(600)["two clusters"]])
    assert plan(mixed, 0.05).startswith("blocks for 1, nodes for 1 of 2 images: ")
