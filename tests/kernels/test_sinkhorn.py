"""The compiled ranking operators: accuracy against float64, exact gradients, determinism, compiler and vmap support."""

import pytest
import torch

from aha import kernels
from aha.kernels import native, operators

from .accuracy import assert_accurate, device_for

BACKENDS = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.gpu),
    pytest.param("triton", marks=pytest.mark.gpu),
]
FRACTIONS = torch.tensor([0.0, 0.013, 0.1, 0.33, 0.5, 0.5, 0.77, 1.0], dtype=torch.float64)
OPERATORS = {
    "soft_topk_masks": lambda a, t, **k: kernels.soft_topk_masks(a, FRACTIONS, t, **k),
    "gumbel_sinkhorn": lambda a, t, **k: kernels.gumbel_sinkhorn(a, t, **k),
    "soft_rank": lambda a, t, **k: kernels.soft_rank(a, t, **k) / a.shape[1],
    "soft_sort": lambda a, t, **k: kernels.soft_sort(a, t, **k),
    "soft_topk": lambda a, t, **k: kernels.soft_topk(a, a.shape[1] // 3, t, **k),
}


def results(operator, scores, tau, dtype, device, **options):
    """Output and gradients to scores and tau under a fixed random cotangent."""
    scores = scores.to(device, dtype).requires_grad_()
    tau = torch.tensor(tau, device=device, dtype=dtype, requires_grad=True)
    out = OPERATORS[operator](scores, tau, **options)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return out.detach(), *torch.autograd.grad((out * cotangent).sum(), (scores, tau))


def check(operator, scores, tau, backend, device, **options):
    truth = results(operator, scores, tau, torch.float64, "cpu", backend="reference", **options)
    single = results(operator, scores, tau, torch.float32, "cpu", backend="reference", **options)
    actual = results(operator, scores, tau, torch.float32, device, backend=backend, **options)
    # Gumbel noise may differ by 2 ulp, at most 2e-6, between backends; its effect goes with 1 / tau
    atol = 2e-6 + 4e-6 * (options["noise"] > 0) / tau
    for what, a, s, t in zip(("output", "scores", "tau"), actual, single, truth, strict=True):
        # the gradient of tau is one number, whose error in the reference may be small by chance
        assert_accurate(a, s, t, max(atol, 2e-5) if what == "tau" else atol, f"{operator} {what}")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("k", [1, 2, 49, 50, 65, 130])
@pytest.mark.parametrize("n_iters", [1, 2, 30])
def test_accuracy_by_size(backend, operator, k, n_iters):
    device = device_for(backend)
    scores = 0.5 + 0.29 * torch.randn(2, k, generator=torch.Generator().manual_seed(k))
    for noise in (0.0, 0.5):
        check(operator, scores, 0.3, backend, device, n_iters=n_iters, noise=noise, seed=5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("spread", [0.0, 0.3, 10, 100])
@pytest.mark.parametrize("tau", [10.0, 0.3, 0.01, 1e-3])
def test_accuracy_by_temperature(backend, spread, tau):
    # down to where scalings leave the range of floats and are absorbed
    device = device_for(backend)
    scores = spread * torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    for operator in ("soft_topk_masks", "gumbel_sinkhorn"):
        check(operator, scores, tau, backend, device, n_iters=30, noise=0.0, seed=5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_scalings_are_absorbed_where_they_grow(backend):
    device = device_for(backend)
    ops = getattr(torch.ops, "aha_triton" if backend == "triton" else "aha")
    tau, seed = torch.tensor(0.3, device=device), torch.tensor(0, device=device)

    def absorbed(spread):
        scores = spread * torch.randn(2, 196, generator=torch.Generator().manual_seed(0)).to(device)
        return ops.gumbel_sinkhorn(scores, tau, seed, None, None, 30, 1.0, None)[2].sum()

    assert absorbed(0.3) == 0
    assert absorbed(100.0) > 0


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [196, 784, 1025])
def test_accuracy_of_large_matrices(backend, k):
    device = device_for(backend)
    scores = 0.5 + 0.29 * torch.randn(1, k, generator=torch.Generator().manual_seed(k))
    check("soft_topk_masks", scores, 0.3, backend, device, n_iters=10, noise=1.0, seed=5)
    check("soft_topk_masks", 30 * scores, 0.3, backend, device, n_iters=30, noise=0.0, seed=5)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_in_many_regions(backend):
    device = device_for(backend)
    scores = 100 * torch.randn(1, 4096, generator=torch.Generator().manual_seed(0))
    call = {"fractions": FRACTIONS, "tau": 0.3, "n_iters": 30, "noise": 0.0}
    truth = kernels.soft_topk_masks(scores.double(), **call, backend="reference")
    single = kernels.soft_topk_masks(scores, **call, backend="reference")
    scores = scores.to(device).requires_grad_()
    masks = kernels.soft_topk_masks(scores, **call, backend=backend)
    assert_accurate(masks.detach(), single, truth)
    (gradient,) = torch.autograd.grad(masks.square().sum(), scores)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("k", "spread"), [(1, 1.0), (2, 1.0), (49, 1.0), (70, 400.0)])
def test_log_sinkhorn_and_its_gradient(backend, k, spread):
    device = device_for(backend)
    logits = spread * torch.randn(2, k, k, generator=torch.Generator().manual_seed(k))
    cotangent = torch.randn(2, k, k, generator=torch.Generator().manual_seed(1))

    def run(dtype, device, backend):
        x = logits.to(device, dtype).requires_grad_()
        out = kernels.log_sinkhorn(x, 12, backend=backend)
        # log P is very negative off the support; its size there is not what a loss looks at
        (gradient,) = torch.autograd.grad((out * cotangent.to(out)).sum(), x)
        return out.detach().exp(), out.detach(), gradient

    truth, single = (run(dtype, "cpu", "reference") for dtype in (torch.float64, torch.float32))
    actual = run(torch.float32, device, backend)
    for what, a, s, t in zip(("P", "log P", "gradient"), actual, single, truth, strict=True):
        assert_accurate(a, s, t, what=what)
    # a row constant is removed by the first row normalisation
    assert actual[2].sum(-1).abs().max() < 1e-4 * cotangent.abs().sum(-1).max()


@pytest.mark.parametrize("backend", BACKENDS)
def test_cumulative_masks_and_their_gradient(backend):
    device = device_for(backend)
    permutation = torch.rand(3, 37, 37, generator=torch.Generator().manual_seed(0))
    cotangent = torch.rand(3, len(FRACTIONS), 37, generator=torch.Generator().manual_seed(1))

    def run(dtype, device, backend):
        p = permutation.to(device, dtype).requires_grad_()
        out = kernels.cumulative_masks(p, FRACTIONS, backend=backend)
        return out.detach(), *torch.autograd.grad((out * cotangent.to(out)).sum(), p)

    truth, single = (run(dtype, "cpu", "reference") for dtype in (torch.float64, torch.float32))
    for a, s, t in zip(run(torch.float32, device, backend), single, truth, strict=True):
        assert_accurate(a, s, t)


needs_native = pytest.mark.skipif(native.load("_C") is not None, reason=f"aha._C: {native.load('_C')}")


@needs_native
@pytest.mark.parametrize("noise", [0.0, 0.7])
@pytest.mark.parametrize("operator", OPERATORS)
def test_gradients_by_finite_differences(operator, noise):
    scores = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    tau = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    options = {"n_iters": 6, "noise": noise, "seed": 1, "backend": "cpu"}
    assert torch.autograd.gradcheck(lambda a, t: OPERATORS[operator](a, t, **options), (scores, tau))


@needs_native
def test_gradients_of_logits_and_permutations_by_finite_differences():
    matrix = torch.randn(2, 5, 5, dtype=torch.float64, requires_grad=True)
    large = (200 * matrix.detach()).requires_grad_()  # scalings are absorbed
    for logits in (matrix, large):
        assert torch.autograd.gradcheck(lambda x: kernels.log_sinkhorn(x, 6, backend="cpu"), logits)
    masks = lambda p: kernels.cumulative_masks(p, [0.1, 0.5, 0.9], backend="cpu")  # noqa: E731
    assert torch.autograd.gradcheck(masks, matrix)
    assert torch.autograd.gradgradcheck(masks, matrix)


@needs_native
@pytest.mark.parametrize("k", [49, 200])
def test_repeats_bit_for_bit_over_thread_counts(k):
    before = torch.get_num_threads()
    scores = torch.randn(3, k, generator=torch.Generator().manual_seed(0))
    runs = []
    try:
        # fewer threads than matrices, as many, and more: there blocks of rows are shared out
        for threads in (1, 2, 3, 5, 1):
            torch.set_num_threads(threads)
            runs.append(results("soft_topk_masks", scores, 0.3, torch.float32, "cpu", noise=1.0, seed=2, backend="cpu"))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_any_sign_and_density(backend):
    # the operators skip zeros; weights without any must come out the same
    device = device_for(backend)
    scores = torch.randn(2, 33, generator=torch.Generator().manual_seed(0))
    weights = torch.randn(3, 33, generator=torch.Generator().manual_seed(1))
    ops = getattr(torch.ops, "aha_triton" if backend == "triton" else "aha")
    tau, seed = torch.tensor(0.3), torch.tensor(9)
    inputs = (t.to(device) for t in (scores, tau, seed, weights))
    out = ops.gumbel_sinkhorn(*inputs, None, 8, 1.0, None)[0]
    expected = weights @ kernels.gumbel_sinkhorn(scores, 0.3, 8, 1.0, 9, backend="reference")
    torch.testing.assert_close(out.cpu(), expected, rtol=1e-5, atol=2e-5)


@needs_native
def test_nan_scores_give_nan_and_nothing_else_breaks():
    scores = torch.randn(2, 20)
    scores[0, 3] = float("nan")
    masks = kernels.soft_topk_masks(scores, [0.5], 0.3, 5, backend="cpu")
    assert masks[0].isnan().all()
    assert masks[1].isfinite().all()


def arguments(dtype=torch.float64, grad=True):
    scores = torch.randn(2, 6, dtype=dtype, requires_grad=grad)
    tau = torch.tensor(0.4, dtype=dtype, requires_grad=grad)
    return scores, tau, torch.tensor(3)


@needs_native
@pytest.mark.parametrize("readout", ["permutation", "left", "right", "start"])
def test_opcheck(readout):
    scores, tau, seed = arguments()
    left = torch.rand(3, 6, dtype=torch.float64) if readout == "left" else None
    right = torch.rand(2, 6, dtype=torch.float64, requires_grad=True) if readout == "right" else None
    start = torch.rand(2, 6, dtype=torch.float64, requires_grad=True) if readout == "start" else None
    ops = torch.ops.aha
    torch.library.opcheck(ops.gumbel_sinkhorn.default, (scores, tau, seed, left, right, 4, 0.5, start))
    with torch.no_grad():
        out, scalings, absorbed = ops.gumbel_sinkhorn(scores, tau, seed, left, right, 4, 0.5, start)
        start = None if start is None else start.detach()
        saved = tuple(None if t is None else t.detach() for t in (scores, tau, seed, left, right, scalings, absorbed))
    for need_tau in (False, True):
        args = (torch.rand_like(out), *saved, 0.5, need_tau, start)
        torch.library.opcheck(ops.gumbel_sinkhorn_backward.default, args)


@needs_native
def test_opcheck_of_matrices():
    ops, matrix = torch.ops.aha, torch.randn(2, 6, 6, requires_grad=True)
    weights = torch.rand(3, 6)
    torch.library.opcheck(ops.log_sinkhorn.default, (matrix, 4))
    with torch.no_grad():
        out, *state = ops.log_sinkhorn(matrix, 4)
    torch.library.opcheck(ops.log_sinkhorn_backward.default, (torch.rand_like(out), matrix.detach(), *state))
    torch.library.opcheck(ops.cumulative_masks.default, (matrix, weights))
    torch.library.opcheck(ops.cumulative_masks_backward.default, (torch.rand(2, 3, 6, requires_grad=True), weights))


@needs_native
def test_schemas_are_those_of_the_library():
    for name, schema in operators.SCHEMAS.items():
        assert str(getattr(torch.ops.aha, name).default._schema) == str(torch._C.parse_schema(f"aha::{name}{schema}"))


@needs_native
def test_compiles_and_exports_without_a_graph_break():
    def loss(scores, tau):
        masks = kernels.soft_topk_masks(scores, [0.2, 0.5], tau, 5, noise=0.5)
        ranks = kernels.soft_rank(scores, 0.1, 5)
        return (masks.sum(1) * ranks).square().sum() + kernels.soft_topk_masks(scores, [0.4], tau, 5).sum()

    scores, tau = torch.randn(2, 9, requires_grad=True), torch.tensor(0.3, requires_grad=True)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    expected = torch.autograd.grad(loss(scores, tau), (scores, tau))
    torch.manual_seed(0)
    got = torch.autograd.grad(compiled(scores, tau), (scores, tau))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)

    class Ranks(torch.nn.Module):
        def forward(self, scores):
            return kernels.soft_topk_masks(scores, [0.2, 0.5], 0.3, 5)

    exported = torch.export.export(Ranks(), (scores.detach(),))
    torch.testing.assert_close(exported.module()(scores.detach()), Ranks()(scores.detach()))


@needs_native
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_vmap(noise):
    scores = torch.randn(3, 2, 9)

    def masks(a):
        return kernels.soft_topk_masks(a, [0.2, 0.5], 0.3, 5, noise, 7)

    expected = torch.stack([masks(a) for a in scores])
    torch.testing.assert_close(torch.vmap(masks)(scores), expected)
    # gradients through a mapped call, and a mapped backward pass
    inputs = scores.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(torch.vmap(masks)(inputs).square().sum(), inputs)
    (wanted,) = torch.autograd.grad(sum(masks(a).square().sum() for a in inputs), inputs)
    torch.testing.assert_close(gradient, wanted)
    one = inputs[0]
    cotangents = torch.randn(4, *expected[0].shape)
    (rows,) = torch.autograd.grad(masks(one), one, cotangents, is_grads_batched=True)
    for row, cotangent in zip(rows, cotangents, strict=True):
        torch.testing.assert_close(row, *torch.autograd.grad(masks(one), one, cotangent))
    taus = torch.tensor([0.1, 0.5, 2.0])
    over_tau = torch.vmap(lambda t: kernels.gumbel_sinkhorn(scores[0], t, 5))(taus)
    torch.testing.assert_close(over_tau[1], kernels.gumbel_sinkhorn(scores[0], 0.5, 5))


@needs_native
def test_second_derivatives_are_refused_in_one_line():
    scores, tau, _ = arguments()
    out = kernels.soft_topk_masks(scores, [0.5], tau, 4, backend="cpu")
    (gradient,) = torch.autograd.grad(out.square().sum(), scores, create_graph=True)
    with pytest.raises(RuntimeError, match="call it with backend='reference'") as caught:
        gradient.sum().backward()
    assert "\n" not in str(caught.value)


@needs_native
def test_only_the_scalings_are_kept_for_the_backward_pass():
    k, n_iters = 100, 30
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        kernels.soft_topk_masks(torch.randn(2, k, requires_grad=True), [0.2, 0.5], 0.3, n_iters, 1.0, backend="cpu")
    assert sum(kept) < 2 * 2 * (n_iters + 3) * k


def test_soft_sort_rank_and_topk_become_hard():
    values = torch.tensor([[3.0, 1.0, 2.0, 10.0, -4.0], [0.0, -1.0, 5.0, 2.0, 9.0]])
    sorted_values, order = values.sort(descending=True)
    torch.testing.assert_close(kernels.soft_sort(values, 1e-4), sorted_values, atol=2e-2, rtol=0)
    torch.testing.assert_close(kernels.soft_rank(values, 1e-4), order.argsort().float(), atol=2e-2, rtol=0)
    top = kernels.soft_topk(values, 2, 1e-4)
    torch.testing.assert_close(top, (order.argsort() < 2).float(), atol=2e-2, rtol=0)
    torch.testing.assert_close(kernels.soft_topk(values * 1e4 + 7, 2, 0.05), kernels.soft_topk(values, 2, 0.05))
    assert torch.isfinite(kernels.soft_rank(torch.ones(1, 4))).all()
    with pytest.raises(ValueError, match=r"k=6: give an integer in 0 … 5"):
        kernels.soft_topk(values, 6)


@needs_native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tau": torch.ones(2)}, "no dimension"),
        ({"tau": torch.tensor(1.0, dtype=torch.float64)}, "type and the device"),
        ({"seed": torch.tensor(1.0)}, "seed must be int64"),
        ({"left": torch.ones(2, 4)}, r"left must be \(S,K\)"),
        ({"right": torch.ones(1, 9)}, r"right must be \(B,K\)"),
        ({"left": torch.ones(1, 9), "right": torch.ones(2, 9)}, "not both"),
        ({"start": torch.ones(9)}, r"start must be \(B,K\)"),
        ({"n_iters": 0}, "at least 1"),
        ({"n_iters": 2**31 - 1}, "below 2"),
        ({"scores": torch.ones(2, 0)}, "K >= 1"),
        ({"scores": torch.ones(2, 9, dtype=torch.bfloat16), "tau": torch.tensor(1.0).bfloat16()}, "use float32"),
    ],
)
def test_the_operator_itself_checks_its_arguments(change, message):
    given = {
        "scores": torch.ones(2, 9),
        "tau": torch.tensor(1.0),
        "seed": torch.tensor(0),
        "left": None,
        "right": None,
        "n_iters": 3,
        "noise": 0.0,
        "start": None,
    }
    with pytest.raises(RuntimeError, match=message):
        torch.ops.aha.gumbel_sinkhorn(**{**given, **change})


@needs_native
def test_the_fastest_backend_runs_by_itself(monkeypatch):
    calls = []
    run = type(native.ops)._op
    monkeypatch.setattr(type(native.ops), "_op", lambda self, name: calls.append(name) or run(self, name))
    kernels.soft_topk_masks(torch.randn(2, 9), [0.5], 0.3)
    kernels.log_sinkhorn(torch.randn(2, 4, 4))
    assert calls == ["gumbel_sinkhorn", "log_sinkhorn"]
