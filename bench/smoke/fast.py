"""How fast: forward and backward of the headlines, as a CUDA graph is replayed and as a program calls them.

The GPU sleeps before the first event of a round, so that all launches of the call wait in its queue by the time it
wakes: gaps between launches are not measured, neither here nor in a graph. The sleep is counted in cycles of the
multiprocessors, so its own time tells their clock, under the load that the times are of.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from .. import timing
from ..cases import CASES, TINY, Size, the
from ..stages import end_with_parent, tell
from ..truth import why
from .right import NoPlanError, require

ROUNDS = 30
CYCLES = 2_000_000  # of a sleep: a millisecond


def call_of(operator: str, size: Size, device: str, backend: str) -> Callable[[], object]:
    """One forward and backward pass, the reference's or a backend's."""
    case = CASES[operator]
    inputs = case.inputs(size, device)
    if operator == "soft_topk_masks" and backend != "reference":
        require(inputs)
    with torch.no_grad():
        cotangents = case.cotangents(case.call(case.first(inputs, 1), backend), size.B)
    return lambda: case.gradients(lambda given: case.call(given, backend), inputs, cotangents)


def by_events(call: Callable[[], object], rounds: int = ROUNDS) -> timing.Times:
    """Times of calls, the L2 cache flushed before each."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    # what launching takes, at 2 GHz, and half as much again
    cycles = CYCLES + int(3e9 * (time.perf_counter() - start))
    taken = []
    for _ in range(rounds):
        timing.flush()
        torch.cuda._sleep(cycles)
        taken.append(timing.between_events(call))
    return timing.summary(taken)


def by_replay(call: Callable[[], object], rounds: int = ROUNDS) -> timing.Times:
    """Times of a CUDA graph of the call, with the cache as its last replay left it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _kept = call()
    graph.replay()
    taken = []
    for _ in range(rounds):
        torch.cuda._sleep(CYCLES)
        taken.append(timing.between_events(graph.replay))
    return timing.summary(taken)


def clock_mhz() -> int:
    """The multiprocessors' clock: cycles slept over the time that took."""
    return round(10 * CYCLES / timing.between_events(lambda: torch.cuda._sleep(10 * CYCLES)) / 1e3)


def launches(call: Callable[[], object]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and shape of what one call launches of ours, as the profiler sees it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    for event in events:
        if event.get("cat") == "kernel" and "aha::" in event["name"]:
            name = event["name"].partition("(")[0].replace("void ", "").replace("aha::", "")
            args = {key: value for key, value in event["args"].items() if key in _ARGUMENTS}
            yield name, {"ms": event["dur"] / 1e3, **args}


_ARGUMENTS = ("grid", "block", "shared memory", "registers per thread", "blocks per SM")


@contextmanager
def reported(case: str) -> Iterator[list[bool]]:
    """What cannot be had here is a line; the rest is still measured."""
    good = [True]
    try:
        yield good
    except NoPlanError as none:
        good[0] = tell(case, str(none))
    except Exception as error:
        good[0] = tell(case, why(error))


def on_gpu(operator: str) -> bool:
    """Both clocks, then what was launched, then the reference."""
    size, good = the("cuda"), []
    sized = f"{operator} B={size.B} K={size.K} T={size.T} S={size.S}"
    with reported(sized) as outcome:
        call = call_of(operator, size, "cuda", "cuda")
        for way, clock in (("graph", by_replay), ("events", by_events)):
            with reported(f"{sized} {way}") as one:
                times = clock(call)
                tell(f"{sized} {way}", **_rounded(times), sm_mhz=clock_mhz())
            good.append(one[0])
        try:
            for name, figures in launches(call):
                tell(name, **figures)
        except Exception as error:  # profiling may be forbidden
            tell(f"{sized} launches", f"not available: {type(error).__name__}: {error}")
        if operator == "soft_topk_masks":
            call = call_of(operator, size, "cuda", "reference")
            tell(f"{sized} eager, events", **_rounded(by_events(call, rounds=timing.MIN_ROUNDS)))
    return outcome[0] and all(good)


def _rounded(times: timing.Times) -> dict[str, float]:
    return {name: float(f"{value:.4g}") for name, value in times._asdict().items()}


def on_cpu(operator: str) -> bool:
    """The same way, at a small size, by the clock of the CPU."""
    with reported(operator) as outcome:
        call = call_of(operator, replace(TINY, K=64 if operator == "soft_topk_masks" else TINY.K), "cpu", "cpu")
        tell(operator, **_rounded(timing.interleaved({"call": call}, "cpu", seconds=0.0)["call"]))
    return outcome[0]


def main(device: str, operators: list[str]) -> int:
    """1 if one cannot be timed."""
    if device == "cuda":
        tell("copy", gb_per_s=round(timing.copy_bandwidth("cuda")), sm_mhz=clock_mhz())
    outcomes = [(on_gpu if device == "cuda" else on_cpu)(operator) for operator in operators]
    return int(not all(outcomes))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("operators", nargs="+", choices=list(CASES))
    given = parser.parse_args()
    end_with_parent()
    sys.exit(main(given.device, given.operators))
