"""Peak memory of a call."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_MMAP_THRESHOLD = -3  # glibc's M_MMAP_THRESHOLD


def peak_bytes(call: Callable[[], object], device: torch.device) -> float:
    """Bytes at the peak of ``call`` beyond what was allocated before it; NaN where it cannot be told.

    CUDA: what PyTorch's allocator handed out. CPU: the resident high-water mark of the process (Linux), after
    glibc has given back what earlier calls freed and while it gives large blocks back at once. Small tensors may
    still fit into what is left, so this is a lower bound where it is a few MiB.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return float(torch.cuda.max_memory_allocated(device) - before)
    gc.collect()
    known = _return_blocks_above(2**17)
    try:
        known = known and _reset_peak()
        before = _resident("VmRSS") if known else 0
        call()
        return float(_resident("VmHWM") - before) if known else float("nan")
    finally:
        _return_blocks_above(2**25)  # the most that glibc's own adjustment allows


def _return_blocks_above(size: int) -> bool:
    try:
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)
        return bool(libc.mallopt(_MMAP_THRESHOLD, size))
    except (OSError, AttributeError, TypeError):  # not glibc
        return False


def _reset_peak() -> bool:
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _resident(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
