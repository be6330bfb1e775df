"""The CUDA kernels of the ranking in blocks, run on a CPU by the emulator: against the float64 reference."""

import pytest
import torch
from torch import Tensor

from aha.kernels import native

from .accuracy import assert_accurate
from .emulator import COMPILER, Emulator
from .ranking import Problem, by_reference, increments
from .test_blocks import READOUTS, adversarial, make

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no g++")

# "in global memory": as where an image's vectors do not fit into shared memory
LAYOUTS = {"one CTA": 1, "in global memory": 0, "cluster of 2": 2, "cluster of 4": 4}
IN_BLOCKS = 2


@pytest.fixture(scope="module")
def emulator(tmp_path_factory) -> Emulator:
    return Emulator(tmp_path_factory.mktemp("emulator"))


def by_kernels(emulator: Emulator, problem: Problem, grad: Tensor, ranks: int = 1, order: int = 0) -> list[Tensor]:
    """The output, and the gradients of scores, ``right`` and ``start``: that of tau is the dense plan's."""
    out, scalings, absorbed = emulator.forward(problem, ranks, order, "blocks_")
    assert bool((absorbed & IN_BLOCKS).all())
    scores, tau, right, start = emulator.backward(problem, grad, scalings, absorbed, ranks, order, "blocks_")
    assert bool(tau.isnan().all())
    return [x for x in (out, scores, right, start) if x is not None]


def references(problem: Problem, grad: Tensor) -> list[list[Tensor]]:
    """In float64 and in float32, without the gradient of tau."""
    return [
        [value for n, value in enumerate(by_reference(problem, grad, dtype)) if n != 2]
        for dtype in (torch.float64, torch.float32)
    ]


def check(emulator: Emulator, problem: Problem, grad: Tensor, ranks: int = 1) -> None:
    truth, single = references(problem, grad)
    for ours, exact, plain in zip(by_kernels(emulator, problem, grad, ranks), truth, single, strict=True):
        assert_accurate(ours, plain, exact)


def normal(k: int, spread: float = 0.29) -> Tensor:
    return 0.5 + spread * torch.randn(2, k, generator=torch.Generator().manual_seed(k))


@pytest.mark.parametrize("k", [1, 2, 17, 50, 130])
@pytest.mark.parametrize("readout", READOUTS)
def test_accuracy_by_size(emulator, k, readout):
    for iterations, start in ((1, False), (2, True), (6, False)):
        check(emulator, *make(normal(k), readout, 0.3, iterations, start, steps=min(k, 14) + 2))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("readout", READOUTS)
def test_every_readout_in_every_layout(emulator, layout, readout):
    # several tiles of a block, and scalings that are absorbed
    for tau, start in ((0.3, True), (0.02, False)):
        check(emulator, *make(normal(200, 1.0), readout, tau, 5, start), LAYOUTS[layout])


@pytest.mark.parametrize("spread", [0.0, 0.3, 100.0])
@pytest.mark.parametrize("tau", [10.0, 0.3, 0.005])
def test_accuracy_by_temperature(emulator, spread, tau):
    for readout in READOUTS:
        check(emulator, *make(normal(100, spread), readout, tau, 12))


@pytest.mark.parametrize("name", adversarial(8))
@pytest.mark.parametrize("tau", [10.0, 0.3, 1e-3])
def test_adversarial_scores(emulator, name, tau):
    problem, grad = make(adversarial(150)[name], "steps", tau, 12)
    truth, single = references(problem, grad)
    out, gradient = by_kernels(emulator, problem, grad)
    assert (out - truth[0]).abs().max() <= 1e-6
    assert_accurate(gradient, single[1], truth[1])


@pytest.mark.skipif(native.load("_C") is not None, reason="counts pairs by the C++ operator")
@pytest.mark.parametrize("readout", READOUTS)
def test_pairs_without_room_are_computed_entry_by_entry(emulator, readout):
    # at a low temperature blocks are of a few scores each, and their pairs more than there is room for
    problem, grad = make(normal(100), readout, 2e-4, 4, start=readout == "right")
    pairs = torch.ops.aha.ranking_plan(problem.scores, problem.tau, problem.start)[:, 3]
    assert bool((pairs > emulator.block_slots(100)).all())
    check(emulator, problem, grad)


@pytest.mark.parametrize("outputs", [31, 32, 45])
def test_more_outputs_than_are_kept_at_a_time(emulator, outputs):
    problem, _ = make(normal(120), "steps", 0.3, 3)
    left = torch.cat([increments(120, outputs - 2), torch.zeros(1, 120), 0.1 * torch.ones(1, 120)])
    problem = problem._replace(left=left)
    check(emulator, problem, torch.randn(2, outputs, 120, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_order_of_threads_changes_nothing(emulator, layout):
    problem, grad = make(normal(150, 1.0), "steps", 0.02, 4)
    runs = [by_kernels(emulator, problem, grad, LAYOUTS[layout], order) for order in (0, 1, 2, 3)]
    for found in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, runs[0], strict=True))


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_give_none(emulator, broken):
    problem, grad = make(normal(40), "steps", 0.3, 2)
    scores = problem.scores.clone()
    scores[1, 7] = broken
    out, gradient = by_kernels(emulator, problem._replace(scores=scores), grad)
    intact = by_kernels(emulator, problem, grad)
    for got, whole in zip((out, gradient), intact, strict=True):
        assert got[1].isnan().all()
        assert torch.equal(got[0], whole[0])


def test_when_blocks_are_taken(emulator):
    plans = {(b, k): emulator.blocks_pay(b, k) for b in (1, 32, 256) for k in (196, 400, 784, 1025, 4096)}
    taken = {size for size, pay in plans.items() if pay}
    assert taken >= {(32, 784), (256, 784), (32, 1025), (1, 4096), (256, 400)}
    assert not taken & {(1, 784), (32, 196), (256, 196), (32, 400)}
