"""Peak memory of one forward and backward pass, beyond what was allocated before it.

CUDA: torch.cuda.max_memory_allocated. CPU: a process of its own, whose resident high-water mark (VmHWM of
/proc/self/status) is reset before the pass by writing 5 to /proc/self/clear_refs; peak minus resident size before.
glibc is told to map every block above 128 KiB by itself, so that freed tensors do not stay resident and hide a peak.
A first pass warms caches and compiles. Where there is no /proc, CPU memory is not measured.

`python -m bench.memory soft_topk_masks eager '{"name": "the", "B": 8, "K": 784}'` prints MiB.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from .cases import CASES, Case, Inputs, Size
from .rows import Run, rows

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_mib(case: Case, size: Size, row: str, device: str, timeout: float = 600) -> float | None:
    """MiB at the peak of ``row``, None where it cannot be told.

    Raises:
        RuntimeError: with the last line that the measuring process wrote, if it failed.
    """
    if device == "cuda":
        inputs = case.inputs(size, "cuda")
        return _cuda(case, rows(case, inputs, compiled=row == "torch.compile")[row], inputs)
    if not CLEAR.exists():
        return None
    shape = {field.name: getattr(size, field.name) for field in dataclasses.fields(size) if field.name != "dtype"}
    command = [sys.executable, "-m", "bench.memory", case.operator, row, json.dumps(shape)]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=timeout, cwd=Path(__file__).parent.parent
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
    return float(done.stdout)


def _pass(case: Case, run: Run | str, inputs: Inputs) -> Callable[[], object]:
    """One forward and backward pass; the gradients that it is sent exist before it, as in training."""
    if isinstance(run, str):
        raise RuntimeError(run)
    with torch.no_grad():
        shapes = case.call(case.first(inputs, 1))
    batch = len(inputs[case.differentiable[0]])
    cotangents = [out.new_ones(batch, *out.shape[1:]) for out in shapes]
    return lambda: case.gradients(run, inputs, cotangents)


def _cuda(case: Case, run: Run | str, inputs: Inputs) -> float:
    call = _pass(case, run, inputs)
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _status(field: str) -> float:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def main(operator: str, row: str, shape: str) -> None:
    """Measure one row on the CPU and print MiB."""
    case, size = CASES[operator], Size(**json.loads(shape))
    inputs = case.inputs(size)
    run = rows(case, inputs, compiled=row == "torch.compile")[row]
    call = _pass(case, run, inputs)
    call()
    gc.collect()
    CLEAR.write_text("5")
    before = _status("VmRSS")
    call()
    print(max(0.0, _status("VmHWM") - before))


if __name__ == "__main__":
    main(*sys.argv[1:])
