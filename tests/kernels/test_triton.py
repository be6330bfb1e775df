"""The Triton kernels in Triton's interpreter, against float64.

TRITON_INTERPRET=1 has to be in the environment before triton is imported: in an ordinary run one test starts pytest on
this file again with it, and the others wait for that.
"""

import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from aha import kernels, regions
from aha.kernels import dispatch, random, reference
from aha.kernels import triton as backend

from .ranking import plain_loop

INTERPRETED = backend.DEVICE == "cpu"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in the interpreter, started by the first test")

if INTERPRETED:
    triton = pytest.importorskip("triton")
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    assert backend.load() is None
    from aha.kernels.triton import arithmetic, noise, perturb, sinkhorn

    @triton.jit
    def words_of(seed, out, first, N: tl.constexpr):
        quad = first + tl.arange(0, N).to(tl.int64)
        words = noise.philox(tl.load(seed), quad)
        for n in tl.static_range(4):
            tl.store(out + 4 * tl.arange(0, N) + n, words[n].to(tl.int64))

    @triton.jit
    def gumbel_of(out, first, N: tl.constexpr):
        cell = first + tl.arange(0, N)
        tl.store(out + tl.arange(0, N), noise.gumbel(cell.to(tl.uint32) << 9))

    @triton.jit
    def exp_of(x, out, SPLIT: tl.constexpr, N: tl.constexpr):
        at = tl.arange(0, N)
        value = tl.load(x + at)
        tl.store(out + at, arithmetic.exp(value) if SPLIT else tl.exp2(value * 1.4426950408889634))

    @triton.jit
    def pixels_of(out, tile, height, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        pixels = perturb.patch(tile, height, width, ROWS, COLUMNS)  # y, x, first, how far from it, which exist
        at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
        tl.store(out + at, tl.where(pixels[4], pixels[2] + pixels[3], -1))

    @triton.jit
    def places_of(out, blocks):
        image, block = arithmetic.place(blocks)
        tl.store(out + tl.program_id(0), image * 1000 + block)


@pytest.mark.skipif(INTERPRETED, reason="starts the interpreter")
@pytest.mark.slow
def test_in_the_interpreter():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", run.stdout)[1]) > 20


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is loaded already")
def test_importing_the_kernels_does_not_import_triton():
    script = "import sys, aha.kernels; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])


@interpreted
@pytest.mark.parametrize("seed", [0, 5, 1 << 32, 2**63 - 1, -1])
@pytest.mark.parametrize("first", [0, (1 << 32) - 100])
def test_philox_bits(seed, first):
    out = torch.empty(1024, dtype=torch.int64)
    words_of[(1,)](torch.tensor(seed), out, first, 256)
    if first == 0:
        assert torch.equal(out, random.philox(1024, torch.tensor(seed)))
    else:  # the upper half of the counter is in use: the last of these blocks, computed by hand
        assert out[4 * 255 :].tolist() == philox_by_hand(first + 255, seed)


def philox_by_hand(counter: int, seed: int) -> list[int]:
    c, k = [counter & 0xFFFFFFFF, counter >> 32, 0, 0], [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for _ in range(10):
        p, q = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(q >> 32) ^ c[1] ^ k[0], q & 0xFFFFFFFF, (p >> 32) ^ c[3] ^ k[1], p & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


@interpreted
def test_gumbel_within_2_ulp_for_every_uniform():
    size = 1 << 20
    out = torch.empty(size)
    for first in range(0, 1 << 23, size):
        gumbel_of[(1,)](out, first, size)
        uniform = (torch.arange(first, first + size).double() + 0.5) * 2.0**-23
        exact = -torch.log(-torch.log(uniform))
        size_of = exact.float().abs()
        ulp = (torch.nextafter(size_of, torch.tensor(torch.inf)) - size_of).double()
        assert ((out.double() - exact).abs() / ulp).max() < 2


def exp2_of_a_gpu(side):
    """2^x as badly as ex2.approx.ftz.f32 may: 2⁻²² relative and 2 ulp, up, down, or as the bits of x fall."""

    def approximate(x):
        exact = np.exp2(x.astype(np.float64))
        sign = side or 1.0 - 2.0 * (x.view(np.int32) * 40503 >> 7 & 1)
        with np.errstate(over="ignore"):
            found = (exact * (1 + sign * 2.0**-22) + sign * 2 * np.spacing(exact.astype(np.float32))).astype(np.float32)
        return np.where(found < 2.0**-126, np.float32(0), found)

    return lambda self, x: self.unary_op(x, approximate)


def exp_errors(split):
    x = torch.linspace(-87, 88.7, 1 << 16)
    out = torch.empty_like(x)
    exp_of[(1,)](x, out, split, len(x))
    exact = x.double().exp()
    return (out.double() / exact - 1).abs()


@interpreted
def test_exp_is_as_exact_as_the_exp2_it_rests_on(monkeypatch):
    # 1 + l ln 2 and the last product round once each; the last digit of l adds nothing
    own = 2.0**-23
    exact = lambda self, x: self.unary_op(x, lambda v: np.exp2(v.astype(np.float64)).astype(np.float32))  # noqa: E731
    monkeypatch.setattr(InterpreterBuilder, "create_exp2", exact)
    assert exp_errors(True).max() < own + 2.0**-24 * 1.01
    for side in (1.0, -1.0, 0.0):
        monkeypatch.setattr(InterpreterBuilder, "create_exp2", exp2_of_a_gpu(side))
        assert exp_errors(True).max() < own + 2.0**-22 + 2 * 2.0**-23 + 2.0**-24  # the last is the trial's own rounding
        assert exp_errors(False).max() > 4e-6  # what rounding x log2 e alone would leave


@interpreted
def test_exp_at_its_ends():
    inf = torch.inf
    x = torch.tensor([-inf, -1e30, -104.0, 0.0, 1.0, 89.0, inf, torch.nan])
    out = torch.empty_like(x)
    exp_of[(1,)](x, out, True, 8)
    assert out[:3].tolist() == [0, 0, 0] and out[3] == 1 and out[5:7].tolist() == [inf, inf] and out[7].isnan()


@interpreted
@pytest.mark.parametrize("streamed", [False, True])
def test_ranking_with_the_exp2_of_a_gpu(streamed, monkeypatch):
    monkeypatch.setattr(InterpreterBuilder, "create_exp2", exp2_of_a_gpu(0.0))
    if streamed:
        monkeypatch.setattr(sinkhorn, "RESIDENT", 0)
        monkeypatch.setattr(sinkhorn, "TILE", 64)
    for std, tau in ((0.3, 0.3), (0.3, 0.01), (100.0, 0.3)):
        check_ranking("soft_topk_masks", 2, 9, 3, std, tau, 0.0)


@interpreted
@pytest.mark.parametrize(("height", "width"), [(16384, 16384), (70000, 50000)])
def test_pixels_of_large_images_are_numbered_in_64_bits(height, width):
    rows, columns = perturb.PATCH["ROWS"], perturb.PATCH["COLUMNS"]
    across = -(-width // columns)
    for tile in (0, across - 1, across, perturb._tiles(height, width) - 1):
        top, left = tile // across * rows, tile % across * columns
        out = torch.empty(rows, columns, dtype=torch.int64)
        pixels_of[(1,)](out, tile, height, width, rows, columns)
        y, x = top + torch.arange(rows)[:, None], left + torch.arange(columns)
        assert torch.equal(out, torch.where((y < height) & (x < width), y * width + x, -1))


@interpreted
def test_one_axis_counts_images_first_and_then_their_blocks():
    out = torch.empty(3 * 5, dtype=torch.int64)
    places_of[(15,)](out, 5)
    assert out.tolist() == [image * 1000 + block for block in range(5) for image in range(3)]


@interpreted
@pytest.mark.parametrize("k", [1, 3, 7, 16])
def test_noise_is_numbered_as_everywhere(k):
    # with scores ½ and tau 1 the logits are the noise; odd sizes start matrices inside a block of four words
    assert_close_ulp(noise_of((3, k, k), torch.tensor(9)), random.gumbel((3, k, k), 9))


def noise_of(shape, seed, device="cpu"):
    logits, column = sinkhorn._ranking_logits(torch.full(shape[:2], 0.5), torch.tensor(1.0), torch.as_tensor(seed), 1.0)
    assert not column.any()
    return logits


def assert_close_ulp(actual, expected):
    size_of = expected.abs()
    ulp = torch.nextafter(size_of, torch.tensor(torch.inf)) - size_of
    assert ((actual - expected).abs() <= 2 * ulp).all()


def ranking(name, b, k, n_iters, std, tau, noise, seed):
    """Inputs, and the operator as a function of them and of the backend."""
    generator = torch.Generator().manual_seed(seed)
    scores = std * torch.randn(b, k, generator=generator)
    tau, key = torch.tensor(tau), torch.tensor(7)
    weights = torch.rand(3, k, generator=generator).sort(dim=0).values  # dense: nothing to skip
    fractions = kernels.functional._cumulative_weights([0.15, 0.5, 0.8], scores)  # steps: mostly zero
    values = torch.randn(b, k, generator=generator)
    start = torch.randn(b, k, generator=generator)
    if name == "log_sinkhorn":
        inputs = (scores[:, None] * torch.randn(b, k, k, generator=generator) / tau,)
        return inputs, lambda run, x: run.log_sinkhorn(x, n_iters)
    if name == "read_right":
        given = (scores, tau, values, start)
        return given, lambda run, a, t, v, s: run.read_right(a, s, v, t, n_iters, noise, key)[0]
    if name == "gumbel_sinkhorn":
        return (scores, tau), lambda run, a, t: run.gumbel_sinkhorn(a, t, n_iters, noise, key)
    if name == "read_left":
        given = (scores, tau, start)
        return given, lambda run, a, t, s: run.read_left(a, s, weights[0].to(a), t, n_iters, noise, key)[0]
    given = fractions if name == "soft_topk_masks" else weights
    return (scores, tau), lambda run, a, t: run.soft_topk_masks(a, given.to(a), t, n_iters, noise, key)


def outcome(run, f, inputs, dtype):
    """Output and gradients of a random linear function of it, in float64."""
    inputs = tuple(x.to(dtype, copy=True).requires_grad_() for x in inputs)
    out = f(run, *inputs)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    return [x.detach().double() for x in (out, *torch.autograd.grad((out * weight).sum(), inputs))]


@contextmanager
def same_noise():
    """The noise is an input here: the reference takes that of the kernels, tested above."""
    original, reference.gumbel = reference.gumbel, noise_of
    try:
        yield
    finally:
        reference.gumbel = original


def check_ranking(name, b, k, n_iters, std, tau, noise):
    """Errors within twice those of float32 in PyTorch, the largest of four draws: one sum may be right by chance.

    PyTorch is the reference; for the gradient of tau it is the plain loop, as in the tests of the other backends: that
    gradient is one number, a sum over matrices of terms of the size of the logits, in another order everywhere.
    """
    with same_noise():
        allowed = []
        for seed in range(4):
            inputs, f = ranking(name, b, k, n_iters, std, tau, noise, seed)
            truth = outcome(reference, f, inputs, torch.float64)
            single = outcome(reference, f, inputs, torch.float32)
            if name != "log_sinkhorn":
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(reference, "log_permutation", plain_loop)
                    single[2] = outcome(reference, f, inputs, torch.float32)[2]
            allowed.append([(x - y).abs().max() for x, y in zip(single, truth, strict=True)])
        # of the last draw
        for n, (x, y) in enumerate(zip(outcome(backend.ops, f, inputs, torch.float32), truth, strict=True)):
            error, bound = (x - y).abs().max(), 2 * max(draw[n] for draw in allowed) + 1e-6
            assert error <= bound, f"{n}: error {error:.1e}, allowed {bound:.1e}"


OPERATORS = ["gumbel_sinkhorn", "soft_topk_masks", "any weights", "read_left", "read_right", "log_sinkhorn"]


@interpreted
@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize(("std", "tau", "noise"), [(0.3, 0.3, 1.0), (0.3, 0.01, 0.0), (100.0, 0.3, 0.0)])
@pytest.mark.parametrize("streamed", [False, True])
def test_ranking(name, std, tau, noise, streamed, monkeypatch):
    if streamed:  # several row blocks, as for a K of hundreds
        monkeypatch.setattr(sinkhorn, "RESIDENT", 0)
        monkeypatch.setattr(sinkhorn, "TILE", 64)
    check_ranking(name, 2, 9, 3, std, tau, noise)


@interpreted
@pytest.mark.parametrize(
    ("k", "n_iters"),
    [(1, 3), (2, 8), (16, 1), (16, 30), (49, 8), (100, 2)],
)
@pytest.mark.parametrize(("std", "tau", "noise"), [(0.3, 0.3, 0.0), (100.0, 0.01, 1.0)])
def test_sizes(k, n_iters, std, tau, noise):
    check_ranking("soft_topk_masks", 1, k, n_iters, std, tau, noise)


@interpreted
@pytest.mark.parametrize("streamed", [False, True])
def test_absorbed_scalings(streamed, monkeypatch):
    if streamed:
        monkeypatch.setattr(sinkhorn, "RESIDENT", 0)
        monkeypatch.setattr(sinkhorn, "TILE", 128)
    inputs, _ = ranking("gumbel_sinkhorn", 2, 16, 12, 100.0, 0.3, 0.0, 3)
    args = (*inputs, torch.tensor(7), None, None, 12, 0.0, None)
    _, scalings, absorbed = torch.ops.aha_triton.gumbel_sinkhorn(*args)
    assert absorbed.any() and not absorbed.all() and not absorbed[:, -1].any()
    assert torch.isfinite(scalings).all()
    check_ranking("gumbel_sinkhorn", 2, 16, 12, 100.0, 0.3, 0.0)


@interpreted
def test_both_paths_are_one_algorithm(monkeypatch):
    inputs, _ = ranking("gumbel_sinkhorn", 2, 13, 6, 100.0, 0.3, 1.0, 0)
    args = (*inputs, torch.tensor(7), None, None, 6, 1.0, None)
    expected = torch.ops.aha_triton.gumbel_sinkhorn(*args)
    monkeypatch.setattr(sinkhorn, "RESIDENT", 0)
    monkeypatch.setattr(sinkhorn, "TILE", 64)
    again = [torch.ops.aha_triton.gumbel_sinkhorn(*args) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*again, strict=True))
    assert torch.equal(again[0][2], expected[2])
    torch.testing.assert_close(again[0][0], expected[0], rtol=0, atol=2e-5)


@interpreted
@pytest.mark.parametrize("streamed", [False, True])
def test_a_hard_permutation_has_no_gradient(streamed, monkeypatch):
    # one rounding of a sum of order 1, magnified by 2c/tau = 2e4, would be 1e-3: it must cancel entry by entry before
    if streamed:
        monkeypatch.setattr(sinkhorn, "RESIDENT", 0)
        monkeypatch.setattr(sinkhorn, "TILE", 128)
    inputs, f = ranking("soft_topk_masks", 2, 16, 6, 100.0, 0.01, 0.0, 0)
    truth = outcome(reference, f, inputs, torch.float64)
    for got, exact in zip(outcome(backend.ops, f, inputs, torch.float32)[1:], truth[1:], strict=True):
        assert exact.abs().max() < 1e-5
        assert (got - exact).abs().max() < 1e-4


@interpreted
def test_too_many_regions():
    with pytest.raises(ValueError, match="at most 32768"):
        sinkhorn.row_blocks(32769)


@interpreted
def test_cumulative_masks():
    permutation, weights = torch.rand(2, 37, 37, requires_grad=True), torch.zeros(5, 37)
    weights[0] = torch.randn(37)
    weights[2, 30:] = 1.0
    grad = torch.randn(2, 5, 37)
    out = torch.ops.aha_triton.cumulative_masks(permutation, weights)
    torch.testing.assert_close(out, weights @ permutation)
    (got,) = torch.autograd.grad(out, permutation, grad)
    torch.testing.assert_close(got, weights.mT @ grad)


@interpreted
def test_empty():
    seed, tau = torch.tensor(0), torch.tensor(0.3)
    for b, s in ((0, 2), (2, 0)):
        scores = torch.randn(b, 9, requires_grad=True)
        masks = backend.ops.soft_topk_masks(scores, torch.zeros(s, 9), tau, 3, 0.0, seed)
        assert masks.shape == (b, s, 9)
        (grad,) = torch.autograd.grad(masks.sum(), scores)
        assert torch.equal(grad, torch.zeros(b, 9))
    assert backend.ops.log_sinkhorn(torch.zeros(0, 3, 3), 2).shape == (0, 3, 3)
    assert backend.ops.cumulative_masks(torch.zeros(0, 3, 3), torch.zeros(2, 3)).shape == (0, 2, 3)


def scene(dtype, b=2, s=3, h=11, w=13, c=3):
    generator = torch.Generator().manual_seed(0)
    images, references = torch.rand(2, b, c, h, w, generator=generator).to(dtype)
    cells = regions.grid(h, w, (3, 4), (0.3, -0.2))
    masks = torch.rand(b, s, cells.count, generator=generator)
    mean, std = torch.tensor([0.4, 0.5, 0.6])[:c], torch.tensor([0.2, 0.3, 0.4])[:c]
    return images, references, masks, cells.upsampler(), mean, std


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("normalised", [False, True])
def test_perturb(dtype, normalised):
    images, references, masks, upsampler, mean, std = scene(dtype)
    mean, std = (mean, std) if normalised else (None, None)
    results = []
    for run, exact in ((backend.ops, dtype), (reference, torch.float64)):
        inputs = tuple(x.detach().to(exact).requires_grad_() for x in (images, references))
        inputs = *inputs, masks.to(torch.float32 if exact == dtype else exact).requires_grad_()
        outputs = run.perturb(*inputs, *upsampler, mean, std, exact)
        weights = torch.randn(2, *outputs[0].shape, generator=torch.Generator().manual_seed(2)).to(dtype).to(exact)
        results.append((*outputs, *torch.autograd.grad(sum((outputs[n] * weights[n]).sum() for n in (0, 1)), inputs)))
    # the interpreter cuts bfloat16 off instead of rounding it: one unit in the last place
    bound = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
    for got, exact in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), exact, rtol=bound[got.dtype], atol=2e-5)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_perturb_by_rank(dtype):
    images, references, *_, mean, std = scene(dtype)
    ranks = torch.stack([torch.randperm(143).view(11, 13) for _ in range(2)]).int()
    counts = torch.tensor([0, 1, 70, 143], dtype=torch.int32)
    results = []
    for run in (backend.ops, reference):
        inputs = tuple(x.clone().requires_grad_() for x in (images, references))
        outputs = run.perturb_by_rank(*inputs, ranks, counts, mean, std, torch.float32)
        loss = (outputs[0].sin() + outputs[1] ** 2).sum()
        results.append((*outputs, *torch.autograd.grad(loss, inputs)))
    for got, expected in zip(results[0][:2], results[1][:2], strict=True):
        assert torch.equal(got, expected)
    for got, expected in zip(results[0][2:], results[1][2:], strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got, expected, rtol=1e-5 if dtype == torch.float32 else 2**-10, atol=1e-4)


@interpreted
def test_perturb_with_nothing_to_do():
    images, references, masks, upsampler, mean, std = scene(torch.float32)
    deleted, _ = backend.ops.perturb(images, references, masks[:, :0], *upsampler, mean, std, torch.float32)
    assert deleted.shape == (2, 0, 3, 11, 13)
    inserted = backend.ops.perturb(images[:0], references[:0], masks[:0], *upsampler, None, None, torch.float32)[1]
    assert inserted.shape == (0, 3, 3, 11, 13)


@interpreted
def test_opcheck():
    ops = torch.ops.aha_triton
    scores, tau, seed = torch.randn(2, 5, requires_grad=True), torch.tensor(0.3, requires_grad=True), torch.tensor(1)
    left, right = torch.rand(2, 5), torch.rand(2, 5, requires_grad=True)
    images, references, masks, upsampler, mean, std = scene(torch.float32, s=2, h=4, w=5, c=1)
    taps = [part for band in upsampler for part in (band.cell, band.weight)]
    ranks, counts = torch.arange(40, dtype=torch.int32).view(2, 4, 5), torch.tensor([3], dtype=torch.int32)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    for op, args in (
        (ops.gumbel_sinkhorn, (scores, tau, seed, left, None, 2, 1.0, None)),
        (ops.gumbel_sinkhorn, (scores, tau, seed, None, right, 2, 0.0, None)),
        (ops.gumbel_sinkhorn, (scores, tau, seed, None, None, 2, 0.0, right)),
        (ops.log_sinkhorn, (torch.randn(2, 5, 5, requires_grad=True), 2)),
        (ops.cumulative_masks, (torch.randn(2, 5, 5, requires_grad=True), left)),
        (ops.perturb, (images, references, masks.requires_grad_(), *taps, 3, 4, mean, std, torch.bfloat16)),
        (ops.perturb_by_rank, (images.requires_grad_(), references, ranks, counts, mean, std)),
    ):
        torch.library.opcheck(op.default, args, test_utils=checks)


@interpreted
def test_compiles_as_the_first_thing_that_loads_it():
    script = """
import torch
from aha import kernels
def f(a):
    return kernels.soft_topk_masks(a, [0.5], 0.3, 3, backend="triton")
a = torch.randn(1, 4)
compiled = torch.compile(f, fullgraph=True, backend="aot_eager")(a)
assert torch.equal(compiled, f(a))
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[2])


@interpreted
def test_named_backend_and_its_reasons():
    scores = torch.randn(2, 6)
    got = kernels.soft_topk_masks(scores, [0.5], 0.3, 3, backend="triton")
    torch.testing.assert_close(got, kernels.soft_topk_masks(scores, [0.5], 0.3, 3, backend="reference"))
    with pytest.raises(kernels.BackendError, match="this backend takes float32"):
        kernels.soft_topk_masks(scores.double(), [0.5], 0.3, 3, backend="triton")
    assert {"triton"} <= {b.name for b in dispatch.BACKENDS["perturb"]}
