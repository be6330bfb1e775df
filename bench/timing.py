"""Clocks: rounds interleaved between the implementations, so that a busy machine slows all of them alike."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from functools import lru_cache
from statistics import quantiles
from typing import NamedTuple

import torch

MIN_ROUNDS, MAX_ROUNDS = 5, 200
STEADY_MS = 20.0


class Times(NamedTuple):
    """Median and the 20th and 80th percentiles; the names are columns of the results."""

    median_ms: float
    p20_ms: float
    p80_ms: float


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    device: torch.device | str,
    seconds: float = 2.0,
    rounds: int = MIN_ROUNDS,
    steady: bool = True,
) -> dict[str, Times]:
    """Time every call in turn, for ``rounds`` rounds and then until ``seconds`` have passed.

    Every call runs once untimed. On a CPU, short calls are repeated for `STEADY_MS` and the first is left out: it finds
    caches, branch predictors and threads as another implementation's seconds of work left them, which costs a call of
    any operator about a millisecond. With ``steady`` off, the first is the one that counts: what a call finds in a
    training step. On CUDA, events around a single call, with the L2 cache flushed before it.
    """
    clock = _cuda_ms if torch.device(device).type == "cuda" else _steady_ms if steady else _cpu_ms
    names = list(calls)
    if not names:
        return {}
    for name in names:
        clock(calls[name])
    taken: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    for number in range(MAX_ROUNDS):
        if number >= rounds and time.perf_counter() >= end:
            break
        # another one goes first in every round
        for name in names[number % len(names) :] + names[: number % len(names)]:
            taken[name].append(clock(calls[name]))
    return {name: summary(values) for name, values in taken.items()}


def summary(milliseconds: list[float]) -> Times:
    """Median, p20 and p80 of at least two values."""
    fifths = quantiles(milliseconds, n=10, method="inclusive")
    return Times(fifths[4], fifths[1], fifths[7])


def _cpu_ms(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def _steady_ms(call: Callable[[], object]) -> float:
    first = _cpu_ms(call)
    if first >= STEADY_MS:
        return first
    count, start = 0, time.perf_counter()
    while (taken := 1e3 * (time.perf_counter() - start)) < STEADY_MS:
        call()
        count += 1
    return taken / count


def _cuda_ms(call: Callable[[], object]) -> float:
    flush()
    return between_events(call)


def between_events(call: Callable[[], object]) -> float:
    """Milliseconds that the GPU takes for what ``call`` launches."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def flush() -> None:
    """Evict everything from the L2 cache, by writing twice as much as it holds."""
    _twice_the_cache().zero_()


@lru_cache(maxsize=1)
def _twice_the_cache() -> torch.Tensor:
    return torch.empty(2 * torch.cuda.get_device_properties().L2_cache_size, dtype=torch.uint8, device="cuda")


def finished(call: Callable[[], object], device: torch.device | str) -> Callable[[], object]:
    """``call`` that returns when the device is done, for clocks that know no devices."""
    if torch.device(device).type != "cuda":
        return call

    def run() -> None:
        call()
        torch.cuda.synchronize()

    return run


def copy_bandwidth(device: torch.device | str, mib: int = 256) -> float:
    """GB/s read plus written by a copy of ``mib`` MiB: the bound of every operator that only moves pixels."""
    source = torch.zeros(mib << 20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = interleaved({"copy": lambda: target.copy_(source)}, device, seconds=0.5)
    return 2 * source.numel() / (times["copy"].median_ms * 1e6)


if __name__ == "__main__":
    print(f"copy: {copy_bandwidth(sys.argv[1]):.1f} GB/s read and written")
