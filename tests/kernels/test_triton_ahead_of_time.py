"""Every Triton kernel compiled for GPUs that need not be here: it compiles, and does not spill.

The launchers run on CPU tensors with the launch itself replaced: what they would launch is compiled instead.
"""

import re
import subprocess
from pathlib import Path

import pytest
import torch

from aha import regions
from aha.kernels import triton as backend

triton = pytest.importorskip("triton")
if backend.DEVICE == "cpu":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

from aha.kernels.triton import perturb, sinkhorn, soft_masks  # noqa: E402

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64"}

# bytes of stack a thread may use; 0 where a kernel is not named
STACK = {
    # 128 × 128 values in 1024 threads of 64 registers: M and X take half of them
    "resident": 96,
    "resident_backward": 32,
    # two registers, where ptxas stops at 64 or 128 so that another block fits a multiprocessor
    "first": 8,
    "read_rows": 8,
    "begin_backward": 8,
}


LOG2E_LOW = "0f32A57060"  # of the split argument of exp, as PTX writes it


class Launches(dict):
    """What would be launched, once each: kernel, signature, constants, hints, warps; and every grid."""

    def __init__(self):
        super().__init__()
        self.grids = []

    def record(self, kernel, grid, warmup, num_warps=4, **given):
        optional = {p.name: p.default for p in kernel.params if p.has_default}
        assert given.keys() <= set(kernel.arg_names) <= given.keys() | optional.keys()
        assert len(grid) == 1 and 0 < grid[0] < 2**31  # the other axes end at 65535
        self.grids.append(grid[0])
        signature, constants, hints = {}, {}, {}
        for n, parameter in enumerate(kernel.params):
            value = (optional | given)[parameter.name]
            special = type(value) is int and not parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (special and value == 1):
                signature[parameter.name], constants[n,] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = "*" + TYPES[value.dtype]
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, torch.Tensor) or (special and value % 16 == 0):
                hints[n,] = [["tt.divisibility", 16]]
        launch = kernel, signature, constants, hints, num_warps
        self[(kernel.__name__, *map(str, launch[1:]))] = launch


@pytest.fixture
def launches(monkeypatch):
    recorded = Launches()
    monkeypatch.setattr(JITFunction, "run", lambda kernel, **given: recorded.record(kernel, **given))
    return recorded


def rank(k: int, left: bool, right: bool, noise: float, started: bool) -> None:
    scores, tau, seed = torch.zeros(1, k), torch.tensor(0.3), torch.tensor(0)
    weights, values = torch.zeros(3, k) if left else None, torch.zeros(1, k) if right else None
    start = torch.zeros(1, k) if started else None
    out, *state = sinkhorn.gumbel_sinkhorn(scores, tau, seed, weights, values, 3, noise, start)
    sinkhorn.gumbel_sinkhorn_backward(out, scores, tau, seed, weights, values, *state, noise, True, start)


def rank_logits(k: int) -> None:
    logits, weights = torch.zeros(1, k, k), torch.zeros(3, k)
    out, *state = sinkhorn.log_sinkhorn(logits, 3)
    sinkhorn.log_sinkhorn_backward(out, logits, *state)
    soft_masks.cumulative_masks_backward(soft_masks.cumulative_masks(logits, weights), weights)


def blend(dtype: torch.dtype) -> None:
    images, masks, std = torch.zeros(1, 3, 224, 224, dtype=dtype), torch.zeros(1, 4, 196), torch.ones(3)
    taps = [part for band in regions.grid(224, 224, (14, 14)).upsampler() for part in (band.cell, band.weight)]
    outputs = perturb.perturb(images, images, masks, *taps, 14, 14, std, std, dtype)
    perturb.perturb_backward(*outputs, images, images, masks, *taps, 14, 14, std, True)
    ranks, counts = torch.zeros(1, 224, 224, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    outputs = perturb.perturb_by_rank(images, images, ranks, counts, std, std, dtype)
    perturb.perturb_by_rank_backward(*outputs, ranks, counts, std, dtype)


def compile_all(launches: Launches, capability: int, folder: Path) -> dict[str, str]:
    """Resources of what goes over its budget, by launch."""
    over = {}
    assert launches
    for name, (kernel, signature, constants, hints, warps) in launches.items():
        source = ASTSource(kernel, signature, constants, hints)
        compiled = triton.compile(source, GPUTarget("cuda", capability, 32), {"num_warps": warps})
        assert compiled.metadata.shared <= 48 << 10
        if kernel.__name__ == "ranking_logits" and "True" in str(constants):
            assert "fma.rn.f32" in compiled.asm["ptx"]  # the noise rests on them
        # with each power of 2 comes what rounding its exponent took away; Blackwell adds that in pairs
        powers = len(re.findall(r"\bex2\.", compiled.asm["ptx"]))
        corrections = len(re.findall(rf"fma\.rn\.f32 .*{LOG2E_LOW}", compiled.asm["ptx"]))
        assert corrections == powers or (capability == 100 and LOG2E_LOW in compiled.asm["ptx"])
        file = folder / "kernel.cubin"
        file.write_bytes(compiled.asm["cubin"])
        report = subprocess.run([CUOBJDUMP, "--dump-resource-usage", file], capture_output=True, text=True, check=True)
        usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report.stdout)
        registers, stack, local = map(int, usage.groups())
        assert registers * warps * 32 <= 65536 and local == 0
        if stack > STACK.get(kernel.__name__, 0):
            over[" ".join(name)] = usage[0]
    return over


@pytest.mark.slow
@pytest.mark.parametrize(("k", "started"), [(49, False), (784, False), (196, True)])
def test_soft_masks_for_hopper(k, started, launches, tmp_path, monkeypatch):
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    rank(k, True, False, 1.0, started)
    assert not compile_all(launches, 90, tmp_path)


def test_perturbation_for_hopper(launches, tmp_path, monkeypatch):
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    blend(torch.bfloat16)
    assert len(launches) == 6
    assert not compile_all(launches, 90, tmp_path)


@pytest.mark.parametrize("side", [16384, 40000])
def test_images_of_any_size_can_be_launched(side, launches):
    # on tensors without memory: nothing is read before the launch
    with torch.device("meta"):
        images, masks = torch.zeros(2, 3, side, side, dtype=torch.bfloat16), torch.zeros(2, 4, 196)
        taps = [torch.zeros(side, 2, dtype=dtype) for _ in range(2) for dtype in (torch.int64, torch.float32)]
        ranks, counts = torch.zeros(2, side, side, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    outputs = perturb.perturb(images, images, masks, *taps, 14, 14, None, None, torch.bfloat16)
    perturb.perturb_backward(*outputs, images, images, masks, *taps, 14, 14, None, True)
    outputs = perturb.perturb_by_rank(images, images, ranks, counts, None, None, torch.bfloat16)
    perturb.perturb_by_rank_backward(*outputs, ranks, counts, None, torch.bfloat16)
    rows, columns, span = perturb.PATCH["ROWS"], perturb.PATCH["COLUMNS"], perturb.SPAN["SPAN"]
    tiles, spans = -(-side // rows) * -(-side // columns), -(-(side**2) // span)
    assert launches.grids[0] == 2 * 4 * tiles and launches.grids[3] == 2 * 3 * tiles
    assert launches.grids[4:] == [2 * 4 * spans, 2 * 3 * spans]
    assert tiles > 65535 and spans > 65535


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_everything(capability, launches, tmp_path, monkeypatch):
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    for k in (49, 100, 196, 784):
        for left, right, noise in ((True, False, 1.0), (False, True, 0.0), (False, False, 0.0)):
            rank(k, left, right, noise, started=False)
        rank(k, True, False, 0.0, started=True)
        rank_logits(k)
    for dtype in (torch.float32, torch.float16):
        blend(dtype)
    assert not compile_all(launches, capability, tmp_path)
