"""The CUDA kernels of perturb and perturb_by_rank, run on a CPU by the emulator, against the reference in float64."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from aha import kernels, regions

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("g++")
MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no g++")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    file = tmp_path_factory.mktemp("emulator") / "perturb_on_host.so"
    source = Path(__file__).parent / "emulator" / "perturb_on_host.cpp"
    includes = [ROOT / "csrc", Path(torch.__file__).parent / "include"]
    command = [COMPILER, "-O1", "-std=c++20", "-shared", "-fPIC"]
    subprocess.run([*command, *(f"-I{folder}" for folder in includes), str(source), "-o", str(file)], check=True)
    return ctypes.CDLL(str(file))


def references_of(scene, soft, dtype, cotangents, precise):
    """Outputs and gradients of images, references and, if soft, masks; from the reference backend."""
    images, references, masks, upsampler, ranks, counts = scene
    if precise:
        images, references, masks = images.double(), references.double(), masks.double()
    inputs = [x.detach().requires_grad_() for x in (images, references, masks)]
    if soft:
        outputs = kernels.perturb(*inputs, upsampler, MEAN, STD, dtype, backend="reference")
    else:
        outputs = kernels.perturb_by_rank(*inputs[:2], ranks, counts, MEAN, STD, dtype, backend="reference")
    grads = [c.to(y.dtype) for c, y in zip(cotangents, outputs, strict=True)]
    return *outputs, *torch.autograd.grad(outputs, inputs if soft else inputs[:2], grads)


def by_kernels(library, scene, soft, dtype, cotangents, vector, order):
    """The same from the kernels, with ``vector`` pixels per thread."""
    images, references, masks, (rows, cols), ranks, counts = scene
    shared = references.stride(0) == 0 and references.shape[0] > 1
    outputs = [torch.full(cotangents[0].shape, float("nan"), dtype=dtype) for _ in range(2)]
    grads = [torch.full(images.shape, float("nan"), dtype=images.dtype) for _ in range(2)]
    grad_masks = torch.full_like(masks, float("nan"))
    taps = [t.contiguous() for axis in (rows, cols) for t in (axis.cell, axis.weight)]
    tensors = [masks, *taps, ranks, counts, grad_masks, images, references, MEAN, STD, *outputs]
    tensors += [*(c.to(dtype) for c in cotangents), *grads]
    size = [*cotangents[0].shape, rows.size, cols.size, rows.cell.shape[1], cols.cell.shape[1], shared]
    name = "_".join(str(d).removeprefix("torch.") for d in (images.dtype, dtype))
    run = getattr(library, f"{name}_{vector}")
    run.restype = ctypes.c_char_p
    pointers = (ctypes.c_void_p * len(tensors))(*(t.data_ptr() for t in tensors))
    error = run((ctypes.c_int64 * len(size))(*size), ctypes.c_bool(soft), ctypes.c_uint(order), pointers)
    assert error is None, error
    return *outputs, *grads, *([grad_masks] if soft else [])


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize(
    ("dtypes", "vector", "sizes", "cells"),
    [
        ((torch.float32, torch.float32), 1, (3, 9, 13, 17), (4, 5)),  # two turns of every kind, one cut short
        ((torch.float32, torch.float32), 4, (2, 5, 150, 16), (12, 4)),  # two tiles of rows
        ((torch.float32, torch.float32), 4, (1, 3, 3, 2060), (3, 40)),  # two strips of columns
        ((torch.float32, torch.bfloat16), 8, (1, 6, 12, 104), (3, 4)),
        ((torch.bfloat16, torch.bfloat16), 8, (2, 5, 24, 16), (24, 16)),
        ((torch.bfloat16, torch.bfloat16), 1, (1, 6, 7, 9), (3, 4)),
    ],
)
@pytest.mark.parametrize("shared", [False, True])
def test_kernels_are_as_accurate_as_the_reference(library, soft, dtypes, vector, sizes, cells, shared):
    generator = torch.Generator().manual_seed(0)
    dtype, out = dtypes
    batch, steps, height, width = sizes
    images, references = torch.rand(2, batch, 3, height, width, generator=generator).to(dtype)
    if shared:
        references = references[:1].expand_as(images)
    grid = regions.grid(height, width, cells, (0.3, -0.2))
    masks = torch.rand(batch, steps, grid.count, generator=generator)
    ranks = torch.rand(batch, height * width, generator=generator).argsort(1).int().view(batch, height, width)
    counts = torch.linspace(0, height * width, steps).int()
    scene = images, references, masks, grid.upsampler(), ranks, counts
    cotangents = torch.rand(2, batch, steps, 3, height, width, generator=generator).bfloat16().double()
    cotangents[0].neg_()
    truth = references_of(scene, soft, None, cotangents, precise=True)
    single = references_of(scene, soft, out, cotangents, precise=False)
    for order in (0, 1):
        actual = by_kernels(library, scene, soft, out, cotangents, vector, order)
        for got, reference, exact in zip(actual, single, truth, strict=True):
            assert got.dtype == reference.dtype
            bound = 2 * (reference.double() - exact).abs().max() + 2e-7 * exact.abs().max()
            assert (got.double() - exact).abs().max() <= bound
