"""Memory: how much goes through a network at a time, what freed memory is for, and the peak of a call."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the command line starts without it
    import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4  # glibc's parameters of these names
_USUAL = {_MMAP_THRESHOLD: 2**25, _MMAP_MAX: 2**16}  # the most that glibc's own adjustment allows, and its default
PER_PASS = 16  # whatever the number of threads: results of one process and of many are the same bit for bit

_kept = False


def per_pass(device: torch.device, asked: int | None = None, *, most: int = 128) -> int:
    """Images in one pass of a network: as ``asked``, else ``most`` on an accelerator and at most 16 on a CPU.

    There more are no faster: what is between two layers no longer fits the caches, and glibc has every large block
    cleared anew by the system (bench/results/allocator_cpu.json).
    """
    if asked is not None:
        return asked
    return most if device.type != "cpu" else min(most, PER_PASS)


def keep_freed() -> bool:
    """Let freed memory stay with this process; whether it does, which takes glibc.

    By default glibc gives large blocks back to the system when they are freed, and what goes through a network is made
    of such blocks: the system clears the same pages again in every layer. With memory that stays, passes on a CPU
    take a tenth to almost half less time (bench/results/allocator_cpu.json); the process goes on holding what it held
    at its peak. The command line does this; a program of one's own may, once, at its start.
    """
    global _kept
    _kept = _set({_MMAP_MAX: 0, _TRIM_THRESHOLD: -1})
    return _kept


def peak_bytes(call: Callable[[], object], device: torch.device) -> float:
    """Bytes at the peak of ``call`` beyond what was allocated before it; NaN where it cannot be told.

    CUDA: what PyTorch's allocator handed out. CPU: the resident high-water mark of the process (Linux), after
    glibc has given back what earlier calls freed and while it gives large blocks back at once. Small tensors may
    still fit into what is left, so this is a lower bound where it is a few MiB.
    """
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return float(torch.cuda.max_memory_allocated(device) - before)
    gc.collect()
    known = _trimmed() and _set({**_USUAL, _MMAP_THRESHOLD: 2**17})
    try:
        known = known and _reset_peak()
        before = _resident("VmRSS") if known else 0
        call()
        return float(_resident("VmHWM") - before) if known else float("nan")
    finally:
        _trimmed()
        _set(_USUAL)
        if _kept:
            keep_freed()


def _set(parameters: dict[int, int]) -> bool:
    """Of glibc's allocator; whether there is one that takes them all."""
    try:
        return all(ctypes.CDLL(None).mallopt(name, value) for name, value in parameters.items())
    except (OSError, AttributeError, TypeError):  # not glibc
        return False


def _trimmed() -> bool:
    """Give freed memory back; whether that can be asked for."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):
        return False
    return True


def _reset_peak() -> bool:
    try:
        CLEAR.write_text("5")
    except OSError:
        return False
    return True


def _resident(field: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024
