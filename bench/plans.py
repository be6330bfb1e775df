"""Both plans of the noise-free ranking on a GPU, by size and temperature: `python -m bench.plans [--keep]`, a minute.

The operators alone, forward and backward, as a CUDA graph is replayed; every plan in a process of its own, as the
operators read which is wanted once. What `blocks_pay` in csrc/cuda/block_launch.cuh goes by.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from aha.files import write_atomically
from aha.kernels import native

from . import ROOT
from .smoke import PLAN, PLANS
from .smoke.fast import by_replay
from .truth import why

SIZES: tuple[tuple[int, int], ...] = (
    *((1, 784), (8, 784), (32, 784), (256, 784), (32, 196), (256, 196), (32, 400), (256, 400), (1, 1025), (8, 1025)),
    *((1, 4096), (8, 4096), (1, 50176), (1, 2**18), (1, 2**20)),
)
TAUS = (0.3, 0.05, 0.005)
STEPS, ITERATIONS = 16, 30
DENSE_ENTRIES = 3e8  # of all matrices: more take seconds and gigabytes


def measure(plan: str) -> None:
    """A line of JSON for every size and temperature, in this process, whose environment names the plan."""
    for name in ("_C", "_C_cuda"):
        if reason := native.load(name):
            raise SystemExit(f"aha.{name}: {reason}")
    seed = torch.tensor(0, device="cuda")
    for batch, k in SIZES:
        if plan == "dense" and batch * k * k > DENSE_ENTRIES:
            continue
        scores = 0.5 + torch.randn(batch, k, generator=torch.Generator().manual_seed(k)).cuda()
        left = (torch.arange(k, device="cuda") * STEPS // k == torch.arange(STEPS, device="cuda")[:, None]).float()
        grad = torch.randn(batch, STEPS, k, device="cuda")
        for tau in (torch.tensor(value, device="cuda") for value in TAUS):
            record = {"plan": plan, "B": batch, "K": k, "tau": round(tau.item(), 6)}
            try:
                record |= _times((scores, tau, seed, left, None), grad, 10 if k <= 4096 else 5)
            except Exception as error:  # the next size is a fact too
                record["status"] = why(error)
            print(json.dumps(record), flush=True)


def _times(given: tuple, grad: torch.Tensor, rounds: int) -> dict[str, float]:
    def forward() -> tuple[torch.Tensor, ...]:
        return torch.ops.aha.gumbel_sinkhorn(*given, ITERATIONS, 0.0, None)

    _, scalings, absorbed = forward()

    def backward() -> tuple[torch.Tensor, ...]:
        return torch.ops.aha.gumbel_sinkhorn_backward(grad, *given, scalings, absorbed, 0.0, False, None)

    return {
        "forward_ms": float(f"{by_replay(forward, rounds).median_ms:.4g}"),
        "backward_ms": float(f"{by_replay(backward, rounds).median_ms:.4g}"),
    }


def markdown(found: dict) -> str:
    """Both plans side by side: forward and backward together."""
    totals = {
        (r["plan"], r["B"], r["K"], r["tau"]): r["forward_ms"] + r["backward_ms"]
        for r in found["records"]
        if "forward_ms" in r
    }
    lines = ["# The ranking without noise: dense or in blocks", "", f"{found['device']}. Forward and backward, T = 30,"]
    lines += ["S = 16, standard normal scores, ms; CUDA graph replay, medians. `python -m bench.plans --keep`.", ""]
    lines += ["| B | K | τ | dense | blocks | dense / blocks |", "|---|---|---|---|---|---|"]
    for batch, k in SIZES:
        for tau in TAUS:
            dense, blocks = (totals.get((plan, batch, k, tau)) for plan in PLANS)
            cells = ["not measured" if ms is None else f"{ms:.3g}" for ms in (dense, blocks)]
            cells.append("" if dense is None or blocks is None else f"{dense / blocks:.2g}")
            lines.append(f"| {batch} | {k:,} | {tau:g} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(keep: bool, out: Path) -> int:
    """2 where there is no GPU."""
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} sees no GPU; nothing was measured", file=sys.stderr)
        return 2
    records = []
    for plan in PLANS:
        command = [sys.executable, "-m", "bench.plans", "--plan", plan]
        with subprocess.Popen(
            command, cwd=ROOT, env={**os.environ, PLAN: plan}, stdout=subprocess.PIPE, text=True
        ) as process:
            for line in process.stdout or ():
                print(line, end="", flush=True)
                records.append(json.loads(line))
    found = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "records": records}
    if keep:
        write_atomically(out / "plans_cuda.json", f"{json.dumps(found, indent=1)}\n".encode())
        write_atomically(out / "plans_cuda.md", markdown(found).encode())
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", action="store_true", help="write plans_cuda.json and plans_cuda.md")
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results", help="folder of the results")
    parser.add_argument("--plan", choices=PLANS, help="measure one in this process; used by the above")
    given = parser.parse_args()
    if given.plan:
        measure(given.plan)
    else:
        sys.exit(main(given.keep, given.out))
