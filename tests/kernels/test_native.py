"""The compiled perturb_by_rank against the formula it implements; the random numbers of csrc/aha_math.h."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch

from aha.kernels import native
from aha.kernels import random as reference_random

ROOT = Path(__file__).parents[2]

needs_native = pytest.mark.skipif(native.load("_C") is not None, reason=f"aha._C: {native.load('_C')}")


def formula(images, references, ranks, counts, mean=None, std=None, dtype=None):
    """perturb_by_rank in one line of PyTorch per step; half precision is computed in float32."""
    keep = (ranks[:, None] < counts[None, :, None, None])[:, :, None]  # [B, S, 1, H, W]
    x, r = (t[:, None] if t.dtype == torch.float64 else t[:, None].float() for t in (images, references))
    outputs = torch.where(keep, r, x), torch.where(keep, x, r)
    if mean is not None:
        outputs = tuple(y - mean.view(-1, 1, 1) for y in outputs)
    if std is not None:
        outputs = tuple(y / std.view(-1, 1, 1) for y in outputs)
    return tuple(y.to(dtype or images.dtype) for y in outputs)


def case(b=2, s=4, c=3, h=13, w=17, dtype=torch.float32, seed=0):
    """Random images, references, ranks, counts from none to all pixels, mean and std in the type of the arithmetic."""
    g = torch.Generator().manual_seed(seed)
    computed = torch.float64 if dtype == torch.float64 else torch.float32
    images, references = torch.rand(2, b, c, h, w, generator=g, dtype=computed).to(dtype)
    ranks = torch.rand(b, h * w, generator=g).argsort(dim=1).int().view(b, h, w)
    counts = torch.linspace(0, h * w, s).int()
    mean, std = torch.rand(2, c, generator=g, dtype=computed)
    return images, references, ranks, counts, mean, std


def assert_same(outputs, expected):
    for output, value in zip(outputs, expected, strict=True):
        assert output.dtype == value.dtype
        torch.testing.assert_close(output, value, rtol=0, atol=0)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out", [None, torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_forward_is_the_formula_exactly(dtype, out):
    images, references, ranks, counts, mean, std = case(dtype=dtype)
    for shift, scale in ((None, None), (mean, std), (mean, None), (None, std)):
        args = (images, references, ranks, counts, shift, scale, out)
        assert_same(native.ops.perturb_by_rank(*args), formula(*args))


@needs_native
def test_extreme_ranks_and_counts():
    images, references, ranks, counts, _, _ = case(h=1, w=7)
    counts = torch.tensor([-1, 0, 7, 2**31 - 1], dtype=torch.int32)
    ranks[0] = 2**31 - 1  # never kept
    ranks[1] = 3  # ties stay together
    args = (images, references, ranks, counts)
    assert_same(native.ops.perturb_by_rank(*args), formula(*args))


@needs_native
@pytest.mark.parametrize("sizes", [{"b": 0}, {"s": 0}, {"c": 0}, {"h": 0}])
def test_empty_inputs(sizes):
    images, references, ranks, counts, mean, std = case(**sizes)
    images, references = images.requires_grad_(), references.requires_grad_()
    args = (images, references, ranks, counts, mean, std)
    outputs = native.ops.perturb_by_rank(*args)
    assert_same(outputs, formula(*args))
    grads = torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), (images, references))
    assert_same(grads, (torch.zeros_like(images), torch.zeros_like(references)))


@needs_native
def test_non_contiguous_and_expanded_inputs():
    images, references, ranks, counts, mean, std = case(b=3, h=8, w=8)
    images = images.to(memory_format=torch.channels_last)
    references = references[:1].expand(3, -1, -1, -1)
    ranks = ranks.transpose(1, 2)
    counts = torch.arange(0, 64, 8, dtype=torch.int32)[::2]
    mean, std = torch.stack([mean, std], dim=1).unbind(1)
    args = (images, references, ranks, counts, mean, std)
    assert not any(t.is_contiguous() for t in args)
    assert_same(native.ops.perturb_by_rank(*args), formula(*args))


@needs_native
def test_gradients():
    images, references, ranks, counts, mean, std = case(s=3, c=2, h=2, w=3, dtype=torch.float64)

    def run(x, r):
        return native.ops.perturb_by_rank(x, r, ranks, counts, mean, std)

    inputs = images.requires_grad_(), references.requires_grad_()
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out", [None, torch.float64, torch.bfloat16, torch.float16])
def test_backward_matches_autograd_of_the_formula(dtype, out):
    # more than one tile of pixels, and a gradient type that differs from that of the images
    images, references, ranks, counts, mean, std = case(s=5, h=50, w=50, dtype=dtype)
    inputs = images.requires_grad_(), references.requires_grad_()
    grads = []
    for f in (native.ops.perturb_by_rank, formula):
        deleted, inserted = f(*inputs, ranks, counts, mean, std, out)
        grads.append(torch.autograd.grad((deleted.float().sin() + inserted.float() ** 2).sum(), inputs))
    # both round one float32 sum: half precision may fall on two neighbouring values
    rtol = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    for got, expected in zip(*grads, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got, expected, rtol=rtol, atol=1e-4)


@needs_native
def test_gradients_of_half_images_are_summed_in_float32():
    # in bfloat16 a running sum of ones would stop at 256
    images = torch.zeros(1, 1, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    ranks = torch.arange(16, dtype=torch.int32).view(1, 4, 4)
    counts = torch.full((512,), 8, dtype=torch.int32)
    _, inserted = native.ops.perturb_by_rank(images, images.detach(), ranks, counts)
    (grad,) = torch.autograd.grad(inserted.sum(), images)
    assert torch.equal(grad, torch.where(ranks < 8, 512.0, 0.0)[None].bfloat16())


@needs_native
def test_expanded_and_transposed_cotangents():
    images, references, ranks, counts, mean, std = case(h=12, w=12)
    inputs = images.requires_grad_(), references.requires_grad_()
    grads = []
    for f in (native.ops.perturb_by_rank, formula):
        deleted, inserted = f(*inputs, ranks, counts, mean, std)
        grads.append(torch.autograd.grad(3 * deleted.sum() + (inserted.mT**2).sum(), inputs))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-5, atol=1e-4)


@needs_native
def test_opcheck():
    images, references, ranks, counts, mean, std = case(h=3, w=4, dtype=torch.float64)
    inputs = images.requires_grad_(), references.requires_grad_()
    forward, backward = torch.ops.aha.perturb_by_rank.default, torch.ops.aha.perturb_by_rank_backward.default
    torch.library.opcheck(forward, (*inputs, ranks, counts, mean, std, torch.float64))
    plain = tuple(t.detach().float() for t in inputs)
    torch.library.opcheck(forward, (*plain, ranks, counts, None, None, torch.bfloat16))
    grads = torch.rand(2, 2, 4, 3, 3, 4, dtype=torch.float64).unbind()
    torch.library.opcheck(backward, (*(g.requires_grad_() for g in grads), ranks, counts, std))


@needs_native
def test_compiles_without_a_graph_break():
    images, references, ranks, counts, mean, std = case()
    images.requires_grad_()

    def loss(x):
        assert native.load("_C") is None
        deleted, inserted = native.ops.perturb_by_rank(x, references, ranks, counts, mean, std)
        return (deleted.sin() * inserted).sum()

    (expected,) = torch.autograd.grad(loss(images), images)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    (got,) = torch.autograd.grad(compiled(images), images)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@needs_native
def test_repeats_bit_for_bit_over_thread_counts():
    images, references, ranks, counts, mean, std = case(b=3, s=7, h=64, w=64)
    grads = torch.rand(2, 3, 7, 3, 64, 64).unbind()
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            forward = native.ops.perturb_by_rank(images, references, ranks, counts, mean, std)
            results.append((*forward, *torch.ops.aha.perturb_by_rank_backward(*grads, ranks, counts, std)))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert_same(result, results[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("width", [47, 48])  # one pixel per thread, several
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_matches_the_formula(width, dtype, out):
    if reason := native.load("_C_cuda"):
        pytest.skip(reason)
    images, references, ranks, counts, mean, std = (t.cuda() for t in case(b=3, s=5, h=50, w=width, dtype=dtype))
    inputs = images.requires_grad_(), references.requires_grad_()
    results = []
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for f in (native.ops.perturb_by_rank, formula):
            deleted, inserted = f(*inputs, ranks, counts, mean, std, out)
            loss = (deleted.float().sin() + inserted.float() ** 2).sum()
            results.append((deleted, inserted, *torch.autograd.grad(loss, inputs)))
        torch.cuda.synchronize()
    # a sum in another order may round to the next value of a half type
    rtol = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}
    for got, expected in zip(*results, strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=rtol[got.dtype], atol=1e-4)
    deleted, _ = native.ops.perturb_by_rank(*(t[:0] for t in (images, references, ranks)), counts)
    assert deleted.shape == (0, 5, 3, 50, width)


@needs_native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": lambda t: t.long()}, "both must be int32"),
        ({"ranks": lambda t: t[:1]}, r"they must be \(2,13,17\)"),
        ({"references": lambda t: t[..., :-1]}, "with equal sizes"),
        ({"references": lambda t: t.double()}, "must have the type"),
        ({"images": lambda t: t.int(), "references": lambda t: t.int()}, "the type of the images is Int"),
        ({"counts": lambda t: t[None]}, r"must be \(S,\)"),
        ({"mean": lambda t: t[:1]}, r"must be \(C,\) with C = 3"),
        ({"dtype": lambda _: torch.int32}, "use float32, float64, bfloat16 or float16"),
    ],
)
def test_refuses_what_does_not_fit_in_one_line(change, message):
    names = ("images", "references", "ranks", "counts", "mean", "std")
    arguments = dict(zip(names, case(), strict=True), dtype=None)
    arguments |= {name: f(arguments[name]) for name, f in change.items()}
    with pytest.raises(RuntimeError, match=message) as error:
        native.ops.perturb_by_rank(**arguments)
    assert "\n" not in str(error.value)


def test_load_answers_for_every_library():
    with pytest.raises(ValueError, match="choose one of _C, _C_cuda"):
        native.load("_D")
    for name in ("_C", "_C_cuda"):
        reason = native.load(name)
        assert reason == native.load(name)
        assert reason is None or (reason and "\n" not in reason)
        assert (native.path(name) is not None) or reason


def test_load_can_be_disabled(monkeypatch):
    monkeypatch.setenv("AHA_DISABLE_NATIVE", "1")
    assert native.load("_C") == "disabled by AHA_DISABLE_NATIVE"


def test_a_broken_library_is_a_reason_not_a_crash(tmp_path, monkeypatch):
    broken = tmp_path / "_C.abi3.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(native, "path", lambda name: broken)
    monkeypatch.setattr(native, "_reasons", {})
    reason = native.load("_C")
    assert reason.startswith("failed to load: ")
    assert "\n" not in reason


@pytest.fixture(scope="module")
def aha_math(tmp_path_factory):
    """csrc/aha_math.h as a NumPy module."""
    pybind11 = pytest.importorskip("pybind11")
    folder = tmp_path_factory.mktemp("aha_math")
    source = folder / "aha_math_module.cpp"
    source.write_text(
        """
#include <pybind11/numpy.h>
#include <pybind11/stl.h>
#include "aha_math.h"
namespace py = pybind11;
PYBIND11_MODULE(aha_math_module, m) {
  m.def("philox", [](std::array<uint32_t, 4> c, uint32_t k0, uint32_t k1) {
    const aha::Words out = aha::philox({{c[0], c[1], c[2], c[3]}}, k0, k1);
    return std::array<uint32_t, 4>{out.w[0], out.w[1], out.w[2], out.w[3]};
  });
  m.def("words", py::vectorize([](uint64_t seed, uint64_t element) {
    return aha::random_words(seed, element / 4).w[element % 4];
  }));
  m.def("uniform", py::vectorize([](uint32_t word) { return aha::uniform(word); }));
  m.def("gumbel", py::vectorize([](uint32_t word) { return aha::gumbel(word); }));
}
"""
    )
    includes = [ROOT / "csrc", pybind11.get_include(), sysconfig.get_paths()["include"]]
    command = ["c++", "-O1", "-std=c++20", "-shared", "-fPIC", "-fvisibility=hidden", str(source)]
    command += [f"-I{include}" for include in includes]
    if sys.platform == "darwin":
        command += ["-undefined", "dynamic_lookup"]
    try:
        subprocess.run([*command, "-o", str(folder / "aha_math_module.so")], check=True)
    except FileNotFoundError:
        pytest.skip("there is no C++ compiler")
    sys.path.insert(0, str(folder))
    try:
        import aha_math_module
    finally:
        sys.path.remove(str(folder))
    return aha_math_module


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # the published known-answer vectors of Random123
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(aha_math, counter, key, expected):
    assert tuple(aha_math.philox(counter, *key)) == expected


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1])
def test_random_words_are_those_of_the_reference(aha_math, seed):
    words = aha_math.words(np.uint64(seed), np.arange(1003, dtype=np.uint64))
    np.testing.assert_array_equal(words, reference_random.philox(1003, seed).numpy())


def test_random_words_count_beyond_32_bits(aha_math):
    element = 4 * (2**40 + 5) + 2
    expected = aha_math.philox(((2**40 + 5) % 2**32, 2**8, 0, 0), 7, 0)[2]
    assert aha_math.words(np.uint64(7), np.uint64(element)) == expected


def test_gumbel_is_within_two_ulp_of_the_true_value_for_every_word(aha_math):
    cells = np.arange(2**23, dtype=np.uint32)
    uniform = (cells + 0.5) / 2**23
    np.testing.assert_array_equal(aha_math.uniform(cells << 9 | 511), uniform)
    true = -np.log(-np.log(uniform))
    # float64 loses the digits of log u next to 1 that log1p keeps
    upper = uniform > 0.5
    true[upper] = -np.log(-np.log1p(-(1 - uniform[upper])))
    got = aha_math.gumbel(cells << 9)
    assert got.dtype == np.float32
    ulp = np.spacing(np.abs(true).astype(np.float32)).astype(np.float64)
    assert np.max(np.abs(got - true) / ulp) <= 2.0


def test_gumbel_agrees_with_the_reference(aha_math):
    noise = reference_random.gumbel((3, 7, 11), seed=5).flatten().numpy()
    ours = aha_math.gumbel(aha_math.words(np.uint64(5), np.arange(noise.size, dtype=np.uint64)))
    np.testing.assert_array_max_ulp(ours, noise, maxulp=2)
