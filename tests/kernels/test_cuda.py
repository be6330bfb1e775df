"""The compiled CUDA ranking operators on a GPU, against the float64 reference: test_cuda_emulated.py at real sizes."""

import pytest
import torch
from torch import Tensor

from aha import kernels
from aha.kernels import native

from .ranking import READOUTS, Problem, assert_as_good_as_float32, make

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(native.load("_C_cuda") is not None, reason=f"aha._C_cuda: {native.load('_C_cuda')}"),
]

SIZES = [1, 2, 49, 50, 64, 65, 128, 196, 224, 225, 400, 416, 417, 784, 800, 801, 1025, 1300]
SETTINGS = {  # spread of the scores, tau, noise
    "usual": (0.5, 0.3, 0.0),
    "noisy": (3.0, 1.0, 1.0),
    "steep": (100.0, 0.3, 1.0),
    "very steep": (100.0, 0.01, 0.0),
}


def by_operators(problem: Problem, grad: Tensor) -> list[Tensor]:
    """As `by_reference`, by the compiled operators."""
    ops = torch.ops.aha
    if problem.logits is not None:
        out, *state = ops.log_sinkhorn(problem.logits, problem.iterations)
        return [out, ops.log_sinkhorn_backward(grad, problem.logits, *state)]
    inputs = (problem.scores, problem.tau, problem.seed, problem.left, problem.right)
    out, *state = ops.gumbel_sinkhorn(*inputs, problem.iterations, problem.noise, problem.start)
    grads = ops.gumbel_sinkhorn_backward(grad, *inputs, *state, problem.noise, True, problem.start)
    wanted = (True, True, problem.right is not None, problem.start is not None)
    return [out, *(g for g, want in zip(grads, wanted, strict=True) if want)]


def scores_of(k: int) -> Tensor:
    return make(k, batch=3)[0].scores.cuda()


def check(k: int, readout: str, **settings) -> None:
    problem, grad = make(k, readout, batch=8, **settings)
    problem, grad = problem.to("cuda"), grad.cuda()
    assert_as_good_as_float32(by_operators(problem, grad), problem, grad)


@pytest.mark.parametrize("k", SIZES)
@pytest.mark.parametrize("setting", SETTINGS)
def test_settings(k, setting):
    spread, tau, noise = SETTINGS[setting]
    check(k, "left", spread=spread, tau=tau, noise=noise, iterations=30)


@pytest.mark.parametrize("k", SIZES)
def test_a_start_and_its_gradient(k):
    for readout in ("left", "right"):
        check(k, readout, iterations=10, start=True)


@pytest.mark.parametrize("k", SIZES)
@pytest.mark.parametrize("readout", READOUTS)
def test_readouts(k, readout):
    check(k, readout, iterations=10, noise=0.0 if readout == "log" else 0.5)


@pytest.mark.parametrize("k", [49, 196, 784, 1025])
@pytest.mark.parametrize("iterations", [1, 2])
def test_few_iterations(k, iterations):
    check(k, "right", iterations=iterations)


@pytest.mark.parametrize("k", [1, 49, 130, 784, 1300])
@pytest.mark.parametrize("steps", [1, 16, 300])
def test_masks(k, steps):
    permutation = torch.rand(2, k, k, generator=torch.Generator().manual_seed(0)).cuda()
    fractions = torch.linspace(0, 1, steps)

    def run(dtype: torch.dtype, backend: str) -> tuple[Tensor, Tensor]:
        p = permutation.to(dtype).requires_grad_()
        out = kernels.cumulative_masks(p, fractions, backend=backend)
        return out.detach(), *torch.autograd.grad(out.square().sum(), p)

    truth, single = run(torch.float64, "reference"), run(torch.float32, "reference")
    for got, exact, theirs in zip(run(torch.float32, "cuda"), truth, single, strict=True):
        assert (got - exact).abs().max() <= 2 * (theirs - exact).abs().max() + 1e-6 * exact.abs().max()


@pytest.mark.parametrize("k", [49, 196, 784, 1025])
def test_repeats_bit_for_bit_also_on_another_stream(k):
    problem, grad = make(k, "left", batch=40, spread=100.0, tau=0.05, noise=1.0, iterations=10)
    problem, grad = problem.to("cuda"), grad.cuda()
    runs = [by_operators(problem, grad) for _ in range(3)]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        runs.append(by_operators(problem, grad))
    torch.cuda.synchronize()
    for run in runs[1:]:
        for got, expected in zip(run, runs[0], strict=True):
            assert torch.equal(got, expected)


@pytest.mark.parametrize("k", [49, 196, 784, 1025])
def test_graph_replay_reads_new_inputs(k):
    scores, tau = scores_of(k).requires_grad_(), torch.tensor(0.5, device="cuda")
    seed, fractions = torch.tensor(3, device="cuda"), torch.tensor([0.2, 0.6], device="cuda")

    def run() -> tuple[Tensor, Tensor]:
        masks = kernels.soft_topk_masks(scores, fractions, tau, 5, 1.0, seed, backend="cuda")
        return masks.detach(), *torch.autograd.grad(masks.square().sum(), scores)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        scores.copy_(100 * scores)  # absorption is decided on the device, in the replay as well
        tau.fill_(0.2)
        seed.fill_(99)
    graph.replay()
    expected = run()
    torch.cuda.synchronize()
    for got, value in zip(captured, expected, strict=True):
        assert torch.equal(got, value)


def test_opcheck():
    scores = scores_of(9).requires_grad_()
    tau = torch.tensor(0.3, device="cuda", requires_grad=True)
    seed = torch.tensor(5, device="cuda")
    left, right = torch.rand(2, 9, device="cuda"), torch.rand(3, 9, device="cuda", requires_grad=True)
    op = torch.ops.aha.gumbel_sinkhorn.default
    for weights in ((None, None), (left, None), (None, right)):
        torch.library.opcheck(op, (scores, tau, seed, *weights, 4, 0.5, None))
        out, scalings, absorbed = (t.detach() for t in op(scores, tau, seed, *weights, 4, 0.5, None))
        backward = torch.ops.aha.gumbel_sinkhorn_backward.default
        state = (scores.detach(), tau.detach(), seed, *(None if w is None else w.detach() for w in weights))
        torch.library.opcheck(backward, (torch.rand_like(out), *state, scalings, absorbed, 0.5, True, None))
    logits = torch.randn(2, 9, 9, device="cuda", requires_grad=True)
    torch.library.opcheck(torch.ops.aha.log_sinkhorn.default, (logits, 4))
    torch.library.opcheck(torch.ops.aha.cumulative_masks.default, (logits, left))


def test_non_contiguous_expanded_and_empty():
    scores = scores_of(16).T.contiguous().T
    same = kernels.soft_topk_masks(scores.contiguous(), [0.3], 0.3, 4, backend="cuda")
    assert torch.equal(kernels.soft_topk_masks(scores, [0.3], 0.3, 4, backend="cuda"), same)
    expanded = kernels.soft_topk_masks(scores[:1].expand(3, 16), [0.3], 0.3, 4, backend="cuda")
    assert torch.equal(expanded[0], expanded[2])
    assert kernels.soft_topk_masks(scores[:0], [0.3], 0.3, 4, backend="cuda").shape == (0, 1, 16)
    assert kernels.soft_topk_masks(scores, [], 0.3, 4, backend="cuda").shape == (3, 0, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": torch.zeros(9)}, r"scores must be \(B,K\)"),
        ({"tau": torch.zeros(1)}, "tau and seed must have no dimension"),
        ({"left": torch.zeros(2, 8)}, r"left must be \(S,K\), K = 9"),
        ({"right": torch.zeros(2, 9)}, r"right must be \(B,K\) as the scores"),
        ({"left": torch.zeros(2, 9), "right": torch.zeros(3, 9)}, "give left or right, not both"),
        ({"n_iters": 0}, "at least 1"),
    ],
)
def test_refuses_what_does_not_fit_in_one_line(change, message):
    arguments = {"scores": torch.zeros(3, 9), "tau": torch.tensor(1.0), "seed": torch.tensor(0), "left": None}
    arguments |= {"right": None, "n_iters": 3, "noise": 0.0, "start": None} | change
    on_gpu = {name: value.cuda() if isinstance(value, Tensor) else value for name, value in arguments.items()}
    with pytest.raises(RuntimeError, match=message) as error:
        torch.ops.aha.gumbel_sinkhorn(**on_gpu)
    assert "\n" not in str(error.value)
