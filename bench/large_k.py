"""Rankings of up to a million values: `python -m bench.large_k [--keep]`, a minute or two on one core.

Time and memory of one forward and backward pass of every soft sort and of the masks, without noise, in float32; and how
far soft ranks are from hard ones. Each is measured in a process of its own, as in `bench.memory`.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aha import kernels
from aha.files import write_atomically

from .memory import CLEAR, STATUS

RESULTS = Path(__file__).parent / "results"
SIZES = (2**16, 2**18, 2**20)
TAU = 1e-3
FOURTEEN = torch.linspace(0, 1, 16, dtype=torch.float64)[1:-1]
OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "soft_sort": lambda v: kernels.soft_sort(v, TAU),
    "soft_rank": lambda v: kernels.soft_rank(v, TAU),
    "soft_topk": lambda v: kernels.soft_topk(v, v.shape[1] // 10, TAU),
    "soft_topk_masks, 1 budget": lambda v: kernels.soft_topk_masks(0.5 + 0.29 * v, [0.5], TAU),
    "soft_topk_masks, 14 budgets": lambda v: kernels.soft_topk_masks(0.5 + 0.29 * v, FOURTEEN, TAU),
}
ERRORS = [(10**4, 1e-4), (10**5, 1e-3), (10**5, 1e-4), (10**5, 1e-5), (2**20, 1e-4)]


def measure(name: str, k: int) -> dict[str, Any]:
    """One pass over normal values, in this process: seconds, MiB beyond what was there before, without /proc None."""
    operator = OPERATORS[name]
    values = torch.randn(1, k, generator=torch.Generator().manual_seed(0), requires_grad=True)
    operator(values[:, :1000]).sum().backward()
    gc.collect()
    if CLEAR.exists():
        CLEAR.write_text("5")
        before = _resident("VmRSS")
    started = time.perf_counter()
    out = operator(values)
    passed = time.perf_counter()
    (gradient,) = torch.autograd.grad(out.square().mean(), values)
    seconds = {"forward_s": passed - started, "backward_s": time.perf_counter() - passed}
    assert gradient.isfinite().all()
    return {**seconds, "peak_mib": _resident("VmHWM") - before if CLEAR.exists() else None}


def _resident(field: str) -> float:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def distances(k: int, tau: float) -> dict[str, Any]:
    """Mean |soft rank − hard rank| / K, of random normal values and of as many quantiles of the normal distribution."""
    random = torch.randn(k, generator=torch.Generator().manual_seed(0))
    even = torch.special.ndtri((torch.arange(k, dtype=torch.float64) + 0.5) / k).float()
    found: dict[str, Any] = {"K": k, "tau": tau}
    for name, values in (("random", random), ("even", even)):
        hard = values.argsort(descending=True).argsort()
        found[name] = float((kernels.soft_rank(values[None], tau)[0] - hard).abs().mean()) / k
    return found


def page(found: dict[str, Any]) -> str:
    """Two tables in Markdown."""
    lines = [
        f"One row of normal values, float32, noise 0, τ = {TAU:g}, {found['threads']} thread, made by "
        "`python -m bench.large_k`; memory is the peak of both passes, beyond the values.",
        "",
        "| operator | K | forward, s | backward, s | MiB |",
        "|---|---|---|---|---|",
    ]
    for row in found["operators"]:
        peak = "not measured" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        figures = f"{row['K']:,} | {row['forward_s']:.2g} | {row['backward_s']:.2g} | {peak}"
        lines.append(f"| {row['operator']} | {figures} |")
    lines += [
        "",
        "Mean distance of soft ranks from hard ones, over K:",
        "",
        "| K | τ | random normal values | quantiles of the normal distribution |",
        "|---|---|---|---|",
    ]
    lines += [f"| {r['K']:,} | {r['tau']:g} | {r['random']:.2e} | {r['even']:.2e} |" for r in found["distances"]]
    return "\n".join((*lines, ""))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.large_k", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="write bench/results, as the published run does")
    parser.add_argument("--one", nargs=2, metavar=("OPERATOR", "K"), help="measure in this process, print JSON")
    a = parser.parse_args()
    if a.one:
        print(json.dumps(measure(a.one[0], int(a.one[1]))))
        return
    operators = []
    for name in OPERATORS:
        for k in SIZES:
            command = [sys.executable, "-m", "bench.large_k", "--one", name, str(k)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            operators.append({"operator": name, "K": k, **json.loads(done.stdout)})
    found = {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "operators": operators,
        "distances": [distances(k, tau) for k, tau in ERRORS],
    }
    print(page(found))
    if a.keep:
        write_atomically(RESULTS / "large_k_cpu.json", (json.dumps(found, indent=1) + "\n").encode())
        write_atomically(RESULTS / "large_k_cpu.md", page(found).encode())


if __name__ == "__main__":
    main()
