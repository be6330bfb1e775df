"""Executed instructions of the dense CUDA ranking kernels, counted from their machine code without a GPU.

`python -m bench.instructions` compiles the resident kernels for sm_90 (nvcc), disassembles them (nvdisasm: of the
toolkit, or of the triton package), runs the machine code of one cluster thread by thread (`bench.sass`) and counts what
every warp issues. Every image costs the same, so one is enough. What it has computed is compared with the float64
reference before a count is reported.

Numbers of iterations: the counts are linear in T from T = 2 on (no scaling leaves its range here), so T = 2 and T = 3
give T = 30; with --check T = 4 runs too, and must lie on their line.
Parts: by the source line of an instruction and the calls it is inlined into (-lineinfo). What the compiler moves out of
a function is counted where its line is. The readout is what S masks cost more than none, whatever its lines.
  useful FMA, forward    2 K² of an iteration: a dot product and a weighted sum over X
  useful FMA, backward   2 K² of an iteration's sweep, and 2 K² of its share of the rank-2T pass
in warp instructions, K² / 32 each. A ratio of 1 would be a program of FMA alone.
Assumed: nothing of time. The last bits of MUFU differ from those of a GPU, which no branch taken here depends on.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from aha.kernels import reference

from . import ROOT
from .sass import GLOBAL, WARP, Cluster, Program
from .toolkit import tool

SOURCE = """
#include "cuda/sinkhorn_launch.cuh"
template __global__ void aha::resident_forward<%s>(aha::Ranking, aha::ForwardTensors, int);
template __global__ void aha::resident_backward<%s>(aha::Ranking, aha::BackwardTensors, int);
"""
RESULTS = ROOT / "bench/results/instructions_sm90.json"
TITLE = """# Instructions of the dense CUDA ranking kernels

Warp instructions that sm_90 code issues, counted without a GPU by `python -m bench.instructions`, which says how. One
image of K standardised scores, T = 30, 16 masks, tau = 0.3, no noise. Forward, backward, sweep and rank-2T pass: per
useful FMA of an iteration, everything in it included. Readout: share of the 30 iterations. Once: per entry of the K x K
matrix, all that does not grow with T. These are counts, not times.

"""
_POINTER = ctypes.c_uint64


class _Ranking(ctypes.Structure):
    _fields_ = [(name, _POINTER) for name in ("scores", "logits", "tau", "seed", "left", "right", "start")]
    _fields_ += [("readout", ctypes.c_int), ("noise", ctypes.c_float)]
    _fields_ += [(name, ctypes.c_int) for name in ("k", "steps", "iterations")]


class Layout(NamedTuple):
    """A resident plan (sinkhorn_launch.cuh): CTAs of a cluster, columns of a lane, threads of a CTA."""

    ranks: int
    columns: int
    threads: int

    @property
    def template(self) -> str:
        return f"{str(self.ranks > 1).lower()}, {self.columns}"


RANKS = {49: 1, 100: 1, 196: 4, 400: 4, 784: 16}  # for a batch of 32 on 132 multiprocessors


def layout_of(k: int, ranks: int) -> Layout:
    """The plan of ``k`` regions in ``ranks`` CTAs."""
    choice = (2, 4, 7) if ranks == 1 else (7, 13, 25)
    columns = next((n for n in choice if WARP * n >= k), None)
    if columns is None:
        raise ValueError(f"{k} regions in {ranks} CTAs: no resident plan; K is at most {WARP * choice[-1]} there")
    return Layout(ranks, columns, 128 if columns <= 2 else 256)


# A part of a kernel is named after the innermost of these functions that an instruction is inlined into.
_SET_UP = ("start", "start_rows", "restart_rows", "begin", "ones", "exponentiate", "weigh", "weigh_masks", "finish_row")
_COLUMNS = ("column", "gather", "total", "rare_total", "publish", "spread")
PARTS = {
    **dict.fromkeys(_SET_UP, "set-up"),
    **dict.fromkeys(("rows", "sweep", "raised"), "sweep"),
    **dict.fromkeys(("fold", "add_outer"), "fold"),
    **dict.fromkeys(_COLUMNS, "columns"),
    **dict.fromkeys(("after_rows", "after_columns"), "barriers"),
    **dict.fromkeys(("read_left", "sum_left", "used_by", "weigh_rows", "read_rows"), "readout"),
}


def listings(layout: Layout, csrc: Path = ROOT / "csrc") -> dict[str, str]:
    """The disassembly of resident_forward and resident_backward, with source lines, by direction."""
    nvcc, nvdisasm = tool("nvcc"), tool("nvdisasm")
    if not (shutil.which(nvcc) and shutil.which(nvdisasm)):
        raise RuntimeError("there is no nvcc or no nvdisasm; install the CUDA toolkit or set CUDA_HOME")
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernels.cu"), Path(folder, "kernels.cubin")
        source.write_text(SOURCE % (layout.template, layout.template))
        flags = ["-std=c++20", "-O3", "-lineinfo", f"-I{csrc}", "-gencode", "arch=compute_90,code=sm_90", "-cubin"]
        subprocess.run([nvcc, *flags, str(source), "-o", str(cubin)], check=True)
        text = subprocess.run(
            [nvdisasm, "-c", "-g", "--print-line-info-inline", str(cubin)], check=True, capture_output=True, text=True
        ).stdout
    sections = re.split(r"^//-+ \.text\.", text, flags=re.M)[1:]
    found = {}
    for direction in ("forward", "backward"):
        (found[direction],) = (part for part in sections if part.partition(" ")[0].find(f"resident_{direction}") >= 0)
    return found


class Arrays:
    """Global memory of a launch: tensors one after the other, found again by name."""

    def __init__(self, **tensors: np.ndarray):
        self.places: dict[str, tuple[int, np.ndarray]] = {}
        end = 256
        for name, tensor in tensors.items():
            self.places[name] = (end, tensor)
            end += (tensor.nbytes + 255) // 256 * 256
        self.memory = np.zeros(end, np.uint8)
        for start, tensor in self.places.values():
            self.memory[start : start + tensor.nbytes] = np.ascontiguousarray(tensor).view(np.uint8).ravel()

    def address(self, name: str) -> int:
        """0 of a tensor that is not there."""
        return GLOBAL + self.places[name][0] if name in self.places else 0

    def __getitem__(self, name: str) -> np.ndarray:
        start, tensor = self.places[name]
        return self.memory[start : start + tensor.nbytes].view(tensor.dtype).reshape(tensor.shape)


class Case(NamedTuple):
    """One image: standardised scores, masks of S equal steps, gradients of their size."""

    k: int
    iterations: int
    steps: int = 16
    tau: float = 0.3
    noise: float = 0.0

    def inputs(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(self.k)
        ends = np.clip(np.linspace(0, 1, self.steps)[:, None] * self.k - np.arange(self.k), 0, 1)
        return {
            "scores": rng.standard_normal(self.k, np.float32),
            "tau": np.float32([self.tau]),
            "seed": np.int64([12345678901]),
            "left": np.diff(ends, axis=0, prepend=0).astype(np.float32),
            "grad": rng.standard_normal((self.steps, self.k), np.float32),
        }


def run(direction: str, program: Program, layout: Layout, case: Case, state: Arrays | None = None):
    """(instructions issued, arrays) of one launch; the backward takes what the forward left in ``state``."""
    t, k = case.iterations, case.k
    inputs = case.inputs()
    if direction == "forward":
        outputs = {
            "out": np.full((case.steps, k), np.nan, np.float32),
            "scalings": np.full((t + 1, 2, k), np.nan, np.float32),
            "absorbed": np.full(t, -1, np.int32),
        }
        names = ["out", "scalings", "absorbed", "workspace"]
    else:
        assert state is not None
        outputs = {
            "scalings": state["scalings"],
            "absorbed": state["absorbed"],
            "grad_scores": np.full(k, np.nan, np.float32),
            "grad_tau": np.full(1, np.nan, np.float32),
            "kept": np.full(4 * (t + 4) * (k + 32), np.nan, np.float32),
        }
        names = ["grad", "scalings", "absorbed", "grad_scores", "grad_logits", "grad_tau"]
        names += ["grad_right", "grad_start", "kept", "workspace"]
    arrays = Arrays(**inputs, **outputs)
    given = [arrays.address(name) for name in ("scores", "logits", "tau", "seed", "left", "right", "start")]
    ranking = _Ranking(*given, 2, case.noise, k, case.steps, t)
    tensors = np.array([arrays.address(name) for name in names], np.uint64)
    parameters = bytes(ranking) + tensors.tobytes() + np.int32([layout.ranks]).tobytes()
    cluster = Cluster(program, layout.ranks, layout.threads, arrays.memory, parameters)
    return cluster.run(), arrays


def functions(csrc: Path = ROOT / "csrc") -> Callable[[tuple[str, int]], str]:
    """The device function that a source line belongs to."""
    starts: dict[str, list[tuple[int, str]]] = {}
    for path in csrc.rglob("*.cuh"):
        for number, line in enumerate(path.read_text().splitlines(), start=1):
            if found := re.search(r"(?:(?:__device__|AHA_HD)[^=;]*?\b|^\s+(?=resident_))(\w+)\((?!\()", line):
                starts.setdefault(str(path), []).append((number, found[1]))

    def name(place: tuple[str, int]) -> str:
        before = [function for number, function in starts.get(place[0], ()) if number <= place[1]]
        return before[-1] if before else ""

    return name


def by_part(program: Program, issued: np.ndarray, name: Callable[[tuple[str, int]], str]) -> Counter:
    """Instructions issued in every part of a kernel."""
    found: Counter = Counter()
    for chain, count in zip(program.lines, issued.tolist(), strict=True):
        named = [PARTS[f] for place in chain if (f := name(place)) in PARTS]
        found[named[0] if named else "rest"] += count
    return found


def check(case: Case, out: np.ndarray, grad: np.ndarray | None) -> None:
    """Raises AssertionError if the machine code has not computed the ranking of float64."""
    given = {name: torch.from_numpy(x) for name, x in case.inputs().items()}
    scores = given["scores"].double()[None].requires_grad_()
    tau, seed = given["tau"].double()[0], given["seed"][0]
    permutation = reference.log_permutation(scores, tau, case.iterations, case.noise, seed, None).exp()
    masks = given["left"].double() @ permutation
    np.testing.assert_allclose(out, masks[0].detach().numpy(), rtol=0, atol=2e-6)
    if grad is not None:
        (expected,) = torch.autograd.grad(masks, scores, given["grad"].double()[None])
        scale = expected.abs().max().item()
        np.testing.assert_allclose(grad / scale, expected[0].numpy() / scale, rtol=0, atol=2e-5)


def counts(layout: Layout, case: Case, csrc: Path = ROOT / "csrc", checked: bool = False) -> dict:
    """Counts of both directions at T = case.iterations, by part, and per useful FMA."""
    found: dict = {}
    programs = {direction: Program(text) for direction, text in listings(layout, csrc).items()}
    name = functions(csrc)
    fma = case.k**2 / WARP  # one multiply-add for every entry of X
    parts: dict[tuple[str, int], Counter] = {}
    for t in (2, 3, 4) if checked else (2, 3):
        small = case._replace(iterations=t)
        issued, arrays = run("forward", programs["forward"], layout, small)
        parts["forward", t] = by_part(programs["forward"], issued, name)
        back, gradients = run("backward", programs["backward"], layout, small, arrays)
        parts["backward", t] = by_part(programs["backward"], back, name)
        assert not arrays["absorbed"].any()
        check(small, arrays["out"], gradients["grad_scores"])
    without, _ = run("forward", programs["forward"], layout, case._replace(iterations=2, steps=0))
    for direction in ("forward", "backward"):
        two, three = parts[direction, 2], parts[direction, 3]
        step = {part: three[part] - two[part] for part in three}
        if checked:
            four = parts[direction, 4]
            for part in four:
                assert four[part] == three[part] + step[part], f"{direction}, {part}: not linear in T"
        total = {part: two[part] + (case.iterations - 2) * step[part] for part in three}
        once = {part: total[part] - case.iterations * step[part] for part in three}
        iteration = {part: step[part] / fma for part in step if step[part]}
        useful = 2 if direction == "forward" else 4
        found[direction] = {
            "total": sum(total.values()),
            "per_iteration": {part: step[part] for part in sorted(step) if step[part]},
            "once": {part: once[part] for part in sorted(once) if once[part]},
            "per_useful_fma": round(sum(iteration.values()) / useful, 3),
            "once_per_entry": round(sum(once.values()) / fma, 2),
        }
        if direction == "backward":
            fold = iteration.get("fold", 0)
            found[direction]["per_useful_fma_sweep"] = round((sum(iteration.values()) - fold) / 2, 3)
            found[direction]["per_useful_fma_fold"] = round(fold / 2, 3)
        else:
            readout = sum(two.values()) - int(without.sum())
            found[direction]["readout"] = readout
            found[direction]["readout_share"] = round(readout / (case.iterations * sum(step.values())), 4)
    return found


def table(kept: list[dict]) -> str:
    """The counts as a table, a line for every revision and number of regions."""
    head = "code", "K", "CTAs", "forward", "backward", "its sweep", "its rank-2T pass", "readout"
    lines = [f"| {' | '.join(head)} | once forward | once backward |", "|---" * 10 + "|"]
    for row in kept:
        forward, backward = row["forward"], row["backward"]
        cells = [row["code"], row["k"], row["ranks"], f"{forward['per_useful_fma']:.2f}"]
        cells += [f"{backward['per_useful_fma' + part]:.2f}" for part in ("", "_sweep", "_fold")]
        cells += [
            f"{100 * forward['readout_share']:.1f} %",
            *(f"{x['once_per_entry']:.0f}" for x in (forward, backward)),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--k", type=int, default=784, help="regions")
    parser.add_argument("--ranks", type=int, help="CTAs of an image; without it those of a batch of 32")
    parser.add_argument("--noise", type=float, default=0.0)
    parser.add_argument("--csrc", type=Path, default=ROOT / "csrc", help="kernels of another revision")
    parser.add_argument("--check", action="store_true", help="run T = 4 too: the counts must be linear in T")
    parser.add_argument("--label", help=f"append the counts, so named, to {RESULTS.name} and its table")
    options = parser.parse_args()
    layout = layout_of(options.k, options.ranks or RANKS.get(options.k, 1))
    case = Case(options.k, 30, noise=options.noise)
    found = {**case._asdict(), "ranks": layout.ranks, **counts(layout, case, options.csrc.resolve(), options.check)}
    print(json.dumps(found, indent=1))
    if options.label:
        kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
        kept.append({"code": options.label, **found})
        RESULTS.write_text(json.dumps(kept, indent=1) + "\n")
        RESULTS.with_suffix(".md").write_text(TITLE + table(kept))


if __name__ == "__main__":
    main()
