"""nvcc on the ranking kernels: no warnings, registers and spills within budget, for old and new cards.

The kernels are free of torch, so that a source of a few lines compiles them all.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc", path=os.pathsep.join([f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin", os.defpath]))

pytestmark = [pytest.mark.slow, pytest.mark.skipif(NVCC is None, reason="there is no nvcc; set CUDA_HOME")]

SOURCE = """
#include "cuda/block_launch.cuh"
using namespace aha;
void every_kernel(const Plan& plan, const BlockPlan& blocks, const Ranking& p, const ForwardTensors& f,
                  const BackwardTensors& b) {
  const auto launch = [](const Shape&, auto* kernel, const auto&... arguments) { kernel<<<1, 32>>>(arguments...); };
  run_forward(plan, p, f, 1, launch);
  run_backward(plan, p, b, 1, launch);
  run_blocks_forward(blocks, p, f, 1, launch);
  run_blocks_backward(blocks, p, b, 1, launch);
  run_masks(nullptr, nullptr, nullptr, 1, 1, 1, launch);
  run_masks_backward(nullptr, nullptr, nullptr, 1, 1, 1, launch);
}
"""

# Registers of a thread. 65536 / (threads of a CTA · CTAs wanted on an SM), in steps of 8.
BUDGET = {
    "resident_forward<false,2>": 128,  # 4 CTAs of 128
    "resident_forward<false,4>": 128,  # 2 CTAs of 256
    "resident_forward<false,7>": 168,
    "resident_forward<true,7>": 168,
    "resident_forward<true,13>": 255,  # X fills the shared memory: one CTA of 256
    "resident_forward<true,25>": 255,
    "resident_backward<false,2>": 168,  # 3 CTAs of 128
    "resident_backward<false,4>": 255,
    "resident_backward<false,7>": 255,
    "resident_backward<true,7>": 255,
    "resident_backward<true,13>": 255,
    "resident_backward<true,25>": 255,
    "streamed_forward_rows": 128,  # 2 CTAs of 256, to have enough reads on their way
    "streamed_forward_columns": 64,
    "streamed_forward_left": 64,
    "streamed_backward_rows": 128,
    "streamed_backward_tiles": 255,
    "streamed_backward_columns": 64,
    "streamed_backward_tau": 64,
    "masks_forward": 64,
    "masks_backward": 64,
    "blocks_forward<false>": 128,  # one CTA of 512
    "blocks_forward<true>": 128,
    "blocks_backward<false>": 128,
    "blocks_backward<true>": 128,
}
# Bytes that may be stored where registers do not last. Those of the cluster are for cards that have one: 56 there.
SPILLS = {"blocks_forward<true>": 128, "blocks_backward<false>": 32, "blocks_backward<true>": 256}


def kernel_name(mangled: str) -> str:
    """aha::name<bool, int> or <bool>, as the budgets write it."""
    name = re.search(r"3aha(\d+)(\w+)", mangled)
    plain, rest = name[2][: int(name[1])], name[2][int(name[1]) :]
    template = re.match(r"ILb([01])E(?:Li(\d+)E)?", rest)
    if template is None:
        return plain
    values = ["true" if template[1] == "1" else "false", *([template[2]] if template[2] else [])]
    return f"{plain}<{','.join(values)}>"


@pytest.mark.parametrize("architecture", ["80", "90", "100"])
def test_resources(architecture, tmp_path):
    source = tmp_path / "every_kernel.cu"
    source.write_text(SOURCE)
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    flags = [
        "-std=c++20",
        "-O3",
        f"-I{ROOT / 'csrc'}",
        "-gencode",
        target,
        "-Xptxas",
        "-v",
        "-Xcompiler",
        "-Wall",
        "-cubin",
    ]
    command = [NVCC, *flags, str(source), "-o", str(tmp_path / "kernels.cubin")]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    assert "warning" not in report
    entries = re.split(r"Compiling entry function '", report)[1:]
    found = {}
    for entry in entries:
        name = kernel_name(entry[: entry.index("'")])
        spills = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry)
        found[name] = int(re.search(r"Used (\d+) registers", entry)[1])
        if name in SPILLS:
            assert int(spills[2]) <= SPILLS[name], f"{name} spills: {spills[0]}"
        else:
            assert [int(n) for n in spills.groups()] == [0, 0, 0], f"{name} spills: {spills[0]}"
    assert found.keys() == BUDGET.keys()
    over = {name: used for name, used in found.items() if used > BUDGET[name]}
    assert not over, f"registers over budget: {over}"
