"""Other people's packages on our problem: which they are, whether they compute the same, how fast.

`python -m bench.peers --install` tries to install them into this environment, one by one; without it, what is not
there is reported as such. None of them is a dependency of aha; they are used here and nowhere else.

The same operator means: scores → masks, rows (ranks) normalised first, columns (regions) last, T times, gradient
through all of it. That is asserted against the float64 reference before anything is timed.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from torch import Tensor

from aha.files import write_atomically
from aha.kernels.functional import _cumulative_weights

from . import table
from .cases import CASES, TINY, Inputs, Outputs, Size, the
from .operators import measure
from .rows import Run, rows
from .truth import deviation, truth, why


@dataclass(frozen=True)
class Peer:
    """A package and how it is called on our problem.

    Attributes:
        pip: what to install, in this order.
        module: what to import.
        licence: of the package, as it states it.
        operator: ours, that it competes with; its inputs are given to ``run``.
        same: it computes the same operator; else speed and quality are compared in a table of their own.
        what: how it is called, and what it cannot do.
        run: inputs → outputs of ``operator``.
        dtype: the most precise that it takes; "same" is asserted in it.
        gpu: runs on GPUs only.
        backward: has a gradient with respect to the scores.
        regions: K that it is limited to.
    """

    pip: tuple[str, ...]
    module: str
    licence: str
    operator: str
    same: bool
    what: str
    run: Run
    dtype: torch.dtype = torch.float64
    gpu: bool = False
    backward: bool = True
    regions: int | None = None

    def why_not(self, device: str) -> str | None:
        """None if it can run here, else one line."""
        try:
            importlib.metadata.version(self.pip[0])
        except importlib.metadata.PackageNotFoundError:
            return "not installed"
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # some greet on import
                importlib.import_module(self.module)
        except Exception as error:  # whatever a package built for another torch may raise
            return f"cannot run: {type(error).__name__}: {' '.join(str(error).split())[:120]}"
        if self.gpu and device != "cuda":
            return "cannot run: GPU only"
        return None

    def verify(self, device: str) -> float:
        """The error of the masks, and of the gradient if there is one, on a small problem in ``dtype``.

        Raises:
            AssertionError: if this is not the same operator, to the rounding of ``dtype``.
        """
        case, size = CASES[self.operator], replace(TINY, K=self.regions or TINY.K)
        inputs = case.inputs(size, device)
        inputs = {**inputs, **{name: inputs[name].to(self.dtype) for name in case.differentiable}}
        true = truth(case, inputs, size)
        if self.backward:
            outputs, gradients = case.gradients(self.run, inputs, true.cotangents)
            error = deviation((*outputs, *gradients), (*true.outputs, *true.gradients))
        else:
            error = deviation(self.run(inputs), true.outputs)
        bound = 1e-10 if self.dtype == torch.float64 else 1e-4
        assert error <= bound, f"not the same operator: error {error:.3g} exceeds {bound:.3g}"
        return error


def _ranks(scores: Tensor) -> Tensor:
    return torch.linspace(1, 0, scores.shape[1], dtype=scores.dtype, device=scores.device)


def _cost(scores: Tensor) -> Tensor:
    """(B,K) → (B,K,K): (a_j − p_i)², rows are ranks."""
    return (scores[:, None, :] - _ranks(scores)[:, None]) ** 2


def _masks(permutation: Tensor, inputs: Inputs) -> Outputs:
    return (_cumulative_weights(inputs["fractions"], permutation) @ permutation,)


def _pot(inputs: Inputs) -> Outputs:
    from ot.batch import bregman_log_projection_batch

    scores = inputs["scores"]
    k = scores.shape[1]
    uniform = torch.full_like(scores, 1 / k)
    logits = -_cost(scores) / inputs["tau"]
    solved = bregman_log_projection_batch(
        logits, uniform, uniform, max_iter=inputs["n_iters"], tol=0.0, grad="autodiff"
    )
    return _masks(k * solved["T"], inputs)  # its marginals are 1/K, ours 1


def _keops(inputs: Inputs) -> Outputs:
    from pykeops.torch import LazyTensor

    scores, tau = inputs["scores"], inputs["tau"]
    ranks = _ranks(scores)[None, :, None].expand(len(scores), -1, 1).contiguous()
    logits = -((LazyTensor(ranks[:, :, None]) - LazyTensor(scores[:, None, :, None])) ** 2) / tau  # ranks × regions
    column = torch.zeros_like(scores)[..., None]
    for _ in range(inputs["n_iters"]):
        row = -(logits + LazyTensor(column[:, None])).logsumexp(dim=2)
        column = -(logits + LazyTensor(row[:, :, None])).logsumexp(dim=1)
    permutation = (logits + LazyTensor(row[:, :, None]) + LazyTensor(column[:, None])).exp()
    weights = _cumulative_weights(inputs["fractions"], scores).mT[None, :, None].contiguous()
    return ((permutation * LazyTensor(weights)).sum(dim=1).mT,)


def _geomloss(inputs: Inputs) -> Outputs:
    from geomloss import ot

    scores = inputs["scores"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it reads the range of a cost that requires grad
        solved = ot.solve_batch(_cost(scores), reg=inputs["tau"], max_iter=inputs["n_iters"])
        return _masks(scores.shape[1] * solved.plan, inputs)


def _flash_sinkhorn(inputs: Inputs) -> Outputs:
    from flash_sinkhorn.sinkhorn_solvers import sinkhorn_flashstyle_alternating

    scores, tau = inputs["scores"], inputs["tau"]
    ranks, k = _ranks(scores), scores.shape[1]
    uniform = torch.full_like(ranks, 1 / k)
    pairs = [
        sinkhorn_flashstyle_alternating(
            ranks[:, None], one[:, None], uniform, uniform, eps=tau, n_iters=inputs["n_iters"], allow_tf32=False
        )
        for one in scores
    ]
    row, column = (torch.stack(potentials) for potentials in zip(*pairs, strict=True))
    return _masks(((row[:, :, None] + column[:, None] - _cost(scores)) / tau).exp() / k, inputs)


class _MHC(torch.autograd.Function):
    """liger-kernel's Sinkhorn of 4×4 logits, forward and backward; (N,4,4) → (N,4,4)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, n_iters: int) -> Tensor:
        from liger_kernel.ops.mhc import mhc_split_sinkhorn_fwd

        n = logits.shape[1]
        # the coefficients of its two other branches come first, unused here
        mix = torch.cat([logits.new_zeros(len(logits), 2 * n), logits.flatten(1)], dim=1)
        bias, one = mix.new_zeros(mix.shape[1]), mix.new_ones(1)
        options = {"tmax": n_iters, "sinkhorn_eps": 0.0}
        *_, out, history = mhc_split_sinkhorn_fwd(
            mix, bias, one, one, one, pre_eps=0.0, post_mult=1.0, return_hist=True, **options
        )
        ctx.saved, ctx.options = (mix, bias, one, history), options
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        from liger_kernel.ops.mhc import mhc_sinkhorn_bwd

        mix, bias, one, history = ctx.saved
        return mhc_sinkhorn_bwd(mix, bias, one, grad.contiguous(), hist=history, **ctx.options), None


def _liger(inputs: Inputs) -> Outputs:
    return _masks(_MHC.apply(-_cost(inputs["scores"]) / inputs["tau"], inputs["n_iters"]), inputs)


def _torchsort(inputs: Inputs) -> Outputs:
    import torchsort

    # it ranks from 1, ascending
    return (torchsort.soft_rank(-inputs["values"], regularization_strength=0.01) - 1,)


@lru_cache(maxsize=4)
def _network(regions: int, k: int, device: torch.device) -> Any:
    from difftopk import DiffTopkNet

    return DiffTopkNet("bitonic", regions, k, device=device, distribution="cauchy", steepness=100.0)


def _difftopk(inputs: Inputs) -> Outputs:
    values = inputs["values"]
    return (_network(values.shape[1], inputs["k"], values.device)(values)[1].sum(dim=-1),)


PEERS: dict[str, Peer] = {
    "POT": Peer(
        ("POT",),
        "ot.batch",
        "MIT",
        "soft_topk_masks",
        True,
        "`ot.batch.bregman_log_projection_batch` on our logits: rows first, columns last, `tol=0`, gradient by "
        '`grad="autodiff"`; its uniform marginals give P/K. Stores P and all iterations. `ot.sinkhorn` takes one '
        "matrix at a time and normalises columns first.",
        _pot,
    ),
    "KeOps": Peer(
        ("pykeops",),
        "pykeops.torch",
        "MIT",
        "soft_topk_masks",
        True,
        "`LazyTensor` reductions, nothing of size K×K is stored; compiles a formula at its first use. Noise would have "
        "to be stored, so without noise.",
        _keops,
    ),
    "GeomLoss": Peer(
        ("geomloss",),
        "geomloss.ot",
        "MIT",
        "soft_topk_masks",
        False,
        "`ot.solve_batch` with `max_iter=T`: another iteration (temperature annealed, both potentials updated at once "
        "and averaged), so another P until it has converged, and a gradient through its last step only. Its "
        "`SamplesLoss` returns costs or potentials.",
        _geomloss,
    ),
    "flash-sinkhorn": Peer(
        ("flash-sinkhorn",),
        "flash_sinkhorn.sinkhorn_solvers",
        "MIT",
        "soft_topk_masks",
        True,
        "`sinkhorn_flashstyle_alternating` on points of one dimension, one image at a time, without noise; potentials "
        "only: P and the masks are made by us, and there is no gradient through them.",
        _flash_sinkhorn,
        torch.float32,
        gpu=True,
        backward=False,
    ),
    "liger-kernel": Peer(
        ("liger-kernel",),
        "liger_kernel.ops.mhc",
        "BSD-2-Clause",
        "soft_topk_masks",
        True,
        "`mhc_split_sinkhorn_fwd` and `mhc_sinkhorn_bwd` with `sinkhorn_eps=0`; made for 4×4 matrices.",
        _liger,
        torch.float32,
        gpu=True,
        regions=4,
    ),
    "torchsort": Peer(
        ("torchsort",),
        "torchsort",
        "Apache-2.0",
        "soft_rank",
        False,
        "`soft_rank` (l2, strength 0.01): projection onto the permutahedron by isotonic regression, ranks only, no P.",
        _torchsort,
        torch.float32,
    ),
    "difftopk": Peer(
        ("difftopk",),
        "difftopk",
        "MIT",
        "soft_topk",
        False,
        "`DiffTopkNet` (bitonic, Cauchy, steepness 100): relaxed sorting network, top-k indicator of one k.",
        _difftopk,
        torch.float32,
    ),
}


def install_all() -> dict[str, str]:
    """Try to install every peer; its result in a line each."""
    # torchsort compiles against the installed torch; without a visible GPU torch asks for a target
    environment = {"TORCH_CUDA_ARCH_LIST": "9.0", **os.environ}
    found = {}
    for name, peer in PEERS.items():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", *peer.pip]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        last = next((line for line in reversed(done.stderr.splitlines()) if "ERROR" in line), "failed")
        found[name] = "installed" if done.returncode == 0 else last.strip()
    return found


def size_for(peer: Peer, device: str) -> Size:
    """The size a peer is measured at: that of the headlines on a GPU, a moderate one on a CPU."""
    size = replace(the(device), name="peers", K=784 if device == "cuda" else 196)
    return size if peer.regions is None else replace(size, K=peer.regions, B=4096)


def quality(outputs: Outputs, operator: str, inputs: Inputs) -> float:
    """How far a soft answer is from the hard one: mean |difference|, of ranks as a share of K − 1."""
    values = inputs["values"]
    ranks = values.argsort(dim=1, descending=True).argsort(dim=1)
    hard, scale = (ranks, values.shape[1] - 1) if operator == "soft_rank" else (ranks < inputs["k"], 1)
    return ((outputs[0] - hard.to(values)).abs().mean() / scale).item()


def examine(name: str, device: str) -> dict[str, str]:
    """Facts about one peer as text, and whether it can compete here: its "status" is then empty."""
    peer = PEERS[name]
    facts = {
        "peer": name,
        "licence": peer.licence,
        "operator": peer.operator,
        "same": "same" if peer.same else "another",
        "what": peer.what,
    }
    facts |= {"version": "", "error": "", "quality": "", "status": peer.why_not(device) or ""}
    if facts["status"]:
        return facts
    facts["version"] = importlib.metadata.version(peer.pip[0])
    try:
        if peer.same:
            facts["error"] = f"{peer.verify(device):.2g} in {str(peer.dtype).removeprefix('torch.')}"
        else:
            facts["quality"] = _quality(peer, device)
    except Exception as error:  # another one's package must not end the run
        facts["status"] = why(error)
    return facts


def _quality(peer: Peer, device: str) -> str:
    """How far from the hard answer it is, and how far we are: mean |difference|; ranks as a share of K − 1."""
    case, size = CASES[peer.operator], replace(size_for(peer, device), tau=0.01)
    inputs = case.inputs(size, device)
    if peer.operator == "soft_topk_masks":
        return f"{deviation(peer.run(inputs), case.call(inputs, 'reference')):.2g} from our masks at τ = 0.01"
    ranks = inputs["values"].argsort(dim=1, descending=True).argsort(dim=1)
    hard, scale = (ranks, size.K - 1) if peer.operator == "soft_rank" else (ranks < inputs["k"], 1)
    theirs, ours = (
        ((soft[0] - hard.float()).abs().mean() / scale).item()
        for soft in (peer.run(inputs), case.call(inputs, "reference"))
    )
    return f"{theirs:.2g} from the hard answer (ours at τ = 0.01: {ours:.2g})"


def compete(names: Sequence[str], operator: str, size: Size, device: str, seconds: float) -> list[table.Record]:
    """Time peers beside our backends and the reference, in one process, rounds interleaved."""
    case = CASES[operator]
    competitors = {**rows(case, case.inputs(size, device), compiled=False), **{n: PEERS[n].run for n in names}}
    forward_only = [name for name in names if not PEERS[name].backward]
    found = list(measure(case, size, device, competitors, seconds=seconds, unchecked=names, forward_only=forward_only))
    for row in found:
        if row["row"] in names and not PEERS[row["row"]].same and not row["note"]:
            row.update(note=table.ANOTHER, error="", error_reference="")
    return found


def section(found: list[dict[str, str]]) -> str:
    """The part of a results page on peers."""
    lines = ["## Peers", ""]
    for kind, title, column in (("same", "The same operator", "error"), ("another", "Another operator", "quality")):
        lines += [f"### {title}", "", f"| peer | licence | beside our | here | {column} | how |", "|---" * 6 + "|"]
        for facts in (facts for facts in found if facts["same"] == kind):
            cells = [facts[name] for name in ("licence", "operator", "status", column, "what")]
            lines.append(f"| {' | '.join([' '.join([facts['peer'], facts['version']]).strip(), *cells])} |")
        lines.append("")
    return "\n".join(lines)


def main(
    device: Literal["cpu", "cuda"] = "cpu",
    out: Path = Path("bench/results"),
    seconds: float = 1.0,
    install: bool = False,
) -> int:
    """Examine every peer: is it here, is it the same operator, how fast.

    Args:
        device: where.
        out: folder of the results.
        seconds: time for the rounds of a phase.
        install: first try to install all of them with pip.
    """
    console = Console(stderr=True)
    if install:
        for name, said in install_all().items():
            console.print(f"{name}: {said}", highlight=False)
    found = {name: examine(name, device) for name in PEERS}
    groups: dict[tuple[str, Size], list[str]] = {}
    for name, facts in found.items():
        if not facts["status"]:
            groups.setdefault((PEERS[name].operator, size_for(PEERS[name], device)), []).append(name)
    for (operator, size), names in groups.items():
        measured = compete(names, operator, size, device, seconds)
        table.upsert(out / table.CSV, measured)
        for name in names:
            lines = table.select(measured, row=name)
            times = [f"{r['phase']} {r['median_ms']} ms" if r["median_ms"] else r["note"] for r in lines]
            found[name]["status"] = f"{'; '.join(times)} (B = {size.B}, K = {size.K})"
    for name, facts in found.items():
        console.print(f"{name}: {facts['status']} {facts['error']} {facts['quality']}", highlight=False)
    text = json.dumps(list(found.values()), indent=2, ensure_ascii=False)
    write_atomically(out / f"peers_{device}.json", f"{text}\n".encode())
    return 1 if any("failed:" in facts["status"] for facts in found.values()) else 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
