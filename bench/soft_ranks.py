"""Soft ranks of many values, ours and other packages': time, distance from the hard ranks, error of the gradient.

`python -m bench.soft_ranks`, minutes; `python -m bench.peers --install` installs the others. Smoothing means another
thing to everyone, so each is measured twice: at the smallest power of ten that it can use, and at the one that brings
it as near to the hard ranks as the others are. Errors of ranks are shares of K. The error of a gradient is that of
float32 against the same method in float64 on the same values, sent the same normal weights of the ranks.
"""

from __future__ import annotations

import json
import math
import sys
import unittest.mock
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro
from rich.console import Console
from torch import Tensor

from aha import kernels
from aha.files import write_atomically
from aha.kernels import convergent

from . import operators, table, timing
from .peers import PEERS
from .truth import why

REGIONS = (10**3, 10**4, 10**5)
MATCHED = 5e-3  # mean error of the ranks ÷ K at which all are compared
GRADIENT = 0.1  # of a smoothing that can be used: largest error of its gradient
POWERS = range(1, -9, -1)  # of ten, smoothings that are tried
POT_ITERATIONS = 50  # from potentials of 0; autograd keeps 2 matrices of each, and 7 more, 43 GB at K = 10⁴


class Method(NamedTuple):
    """Soft ranks by one package.

    Attributes:
        peer: in `bench.peers`; None for ours.
        rank: values (1,K), smoothing → ranks (1,K), 0 for the largest.
        what: the smoothing, and what else there is to know.
        converged: whether it has, by the measure of soft_rank: weights of every rank sum to 1 ± 0.005.
        matrices: (K,K) that it holds, forward alone and with a gradient.
    """

    peer: str | None
    rank: Callable[[Tensor, float], Tensor]
    what: str
    converged: Callable[[Tensor, float], bool] = lambda values, smoothing: True
    matrices: tuple[int, int] = (0, 0)

    def lacks(self, k: int, backward: bool) -> str | None:
        """What it needs, if that is more than there is."""
        need = 4 * k**2 * self.matrices[backward]
        return f"needs {need / 1e9:.0f} GB" if need > operators._memory("cpu") else None


def _ours_converged(values: Tensor, tau: float) -> bool:
    with unittest.mock.patch.object(convergent, "_warned", False), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        kernels.soft_rank(values, tau)
    return not caught


def _torchsort(kind: str) -> Callable[[Tensor, float], Tensor]:
    def rank(values: Tensor, strength: float) -> Tensor:
        import torchsort

        # it ranks from 1, ascending
        return torchsort.soft_rank(-values, regularization=kind, regularization_strength=strength) - 1

    return rank


def _pot_plan(values: Tensor, tau: float) -> Tensor:
    from ot.batch import bregman_log_projection_batch

    k = values.shape[1]
    scores = 0.5 + 0.29 * (values - values.mean()) / values.std(correction=0)
    logits = -((scores[:, None, :] - torch.linspace(1, 0, k, dtype=values.dtype)[:, None]) ** 2) / tau
    uniform = torch.full_like(values, 1 / k)
    tolerance = convergent.TOLERANCE / k  # of the marginals, which are 1/K
    options = {"max_iter": POT_ITERATIONS, "tol": tolerance, "grad": "autodiff"}
    return k * bregman_log_projection_batch(logits, uniform, uniform, **options)["T"]


def _pot(values: Tensor, tau: float) -> Tensor:
    return torch.arange(values.shape[1], dtype=values.dtype) @ _pot_plan(values, tau)


def _pot_converged(values: Tensor, tau: float) -> bool:
    return bool(((_pot_plan(values, tau).sum(dim=2) - 1).abs() <= convergent.TOLERANCE).all())


METHODS: dict[str, Method] = {
    "aha": Method(
        None, kernels.soft_rank, "`soft_rank`: τ of the Sinkhorn limit, started at the hard sort", _ours_converged
    ),
    "torchsort, l2": Method(
        "torchsort",
        _torchsort("l2"),
        "strength; projection onto the permutahedron. A value that shares no rank with another gets no gradient",
    ),
    "torchsort, kl": Method("torchsort", _torchsort("kl"), "strength; the entropic projection, one of products"),
    "POT": Method(
        "POT",
        _pot,
        f"τ of the same limit; `bregman_log_projection_batch` from potentials of 0, at most {POT_ITERATIONS} "
        "iterations, gradient by autograd",
        _pot_converged,
        (3, 2 * POT_ITERATIONS + 7),
    ),
}


def values_and_weights(k: int) -> tuple[Tensor, Tensor]:
    """Normal values (1,K), and weights of their ranks, whose sum is differentiated."""
    generator = torch.Generator().manual_seed(k)
    return torch.randn(1, k, generator=generator), torch.randn(1, k, generator=generator)


def rank_errors(method: Method, values: Tensor, smoothing: float) -> tuple[float, float]:
    """Mean and largest |soft rank − hard rank| / K."""
    k = values.shape[1]
    hard = values.argsort(dim=1, descending=True).argsort(dim=1)
    with torch.no_grad():
        errors = (method.rank(values, smoothing).double() - hard).abs() / k
    return errors.mean().item(), errors.max().item()


def gradient(method: Method, values: Tensor, weights: Tensor, smoothing: float) -> Tensor:
    """(1,K) that of the weighted sum of the ranks."""
    leaf = values.detach().requires_grad_()
    return torch.autograd.grad(method.rank(leaf, smoothing), leaf, weights.to(values))[0]


def gradient_figures(method: Method, values: Tensor, weights: Tensor, smoothing: float) -> dict[str, float]:
    """Relative error in float32; the share of the values that carry the gradient, (Σ|g|)² / (K Σg²), .64 if normal."""
    single = gradient(method, values, weights, smoothing).double()
    exact = gradient(method, values.double(), weights, smoothing)
    share = exact.abs().sum() ** 2 / (exact.numel() * exact.square().sum())
    return {"gradient_error": ((single - exact).norm() / exact.norm()).item(), "carried": share.item()}


def smallest(method: Method, values: Tensor, weights: Tensor) -> float | None:
    """The smallest power of ten that can be used: converged, ranks and gradient finite, and that to `GRADIENT`."""
    backward = method.lacks(values.shape[1], backward=True) is None
    found = None
    for power in POWERS:
        smoothing = 10.0**power
        try:
            with torch.no_grad():
                good = method.converged(values, smoothing) and math.isfinite(rank_errors(method, values, smoothing)[0])
            if good and backward:
                good = gradient_figures(method, values, weights, smoothing)["gradient_error"] <= GRADIENT
        except ValueError:  # what float32 does not resolve, we refuse
            good = False
        if good:
            found = smoothing
        elif found is not None:
            break
    return found


def matched(method: Method, values: Tensor) -> float:
    """The smoothing of mean error `MATCHED`, by bisection of its logarithm."""
    low, high = float(POWERS[-1]), float(POWERS[0])
    for _ in range(24):
        middle = (low + high) / 2
        # what is not a number is from a smoothing too small
        low, high = (low, middle) if rank_errors(method, values, 10**middle)[0] > MATCHED else (middle, high)
    return 10**low


def measure(k: int, seconds: float) -> Iterator[dict[str, Any]]:
    """A row for every method and smoothing at one K; times of both phases are interleaved between them."""
    values, weights = values_and_weights(k)
    rows: list[dict[str, Any]] = []
    level = matched(METHODS["aha"], values)
    for name, method in METHODS.items():
        reason = (PEERS[method.peer].why_not("cpu") if method.peer else None) or method.lacks(k, backward=False)
        if reason:
            rows.append({"K": k, "method": name, "note": reason})
            continue
        # the limit that POT iterates to is ours
        kinds = {"smallest": lambda m=method: smallest(m, values, weights)}
        kinds["matched"] = (lambda: level) if method.matrices[0] else (lambda m=method: matched(m, values))
        for kind, choose in kinds.items():
            row: dict[str, Any] = {"K": k, "method": name, "kind": kind}
            rows.append(row)
            try:
                if (smoothing := choose()) is None:
                    row["note"] = "none can be used"
                    continue
                row["smoothing"] = smoothing
                row["mean_error"], row["max_error"] = rank_errors(method, values, smoothing)
                if lack := method.lacks(k, backward=True):
                    row["note"] = f"a gradient {lack}"
                else:
                    row |= gradient_figures(method, values, weights, smoothing)
            except Exception as error:  # another one's package must not end the run
                row["note"] = why(error)
    for phase, key in zip(table.PHASES, ("mean_error", "gradient_error"), strict=True):
        calls = {str(number): _call(row, values, weights, phase) for number, row in enumerate(rows) if key in row}
        for number, times in timing.interleaved(calls, "cpu", seconds).items():
            rows[int(number)][phase] = times._asdict()
    yield from rows


def _call(row: dict[str, Any], values: Tensor, weights: Tensor, phase: str) -> Callable[[], object]:
    method, smoothing = METHODS[row["method"]], row["smoothing"]
    if phase == table.PHASES[1]:
        return lambda: gradient(method, values, weights, smoothing)
    return torch.no_grad()(lambda: method.rank(values, smoothing))


def section(found: dict[str, Any]) -> str:
    """The part of a results page."""
    lines = [
        "## Soft ranks of many values",
        "",
        f"One row of K normal values, float32, {found['device']}. Milliseconds, median (p20 to p80) of rounds "
        "interleaved at one K. Errors of ranks: |soft − hard| ÷ K. Error of the gradient: float32 against the same "
        "method in float64. Carried: share of the values that the gradient of a random weighted sum of ranks is spread "
        "over, (Σ|g|)² ÷ (K Σg²), .64 for a normal one. `smallest`: the smallest power of ten with a converged, finite "
        f"result and a gradient within {100 * GRADIENT:.0f} %; `matched`: mean error {MATCHED:g}.",
        "",
        "| K | method | smoothing | forward | forward+backward | mean error | max error | gradient error | carried |",
        "|---" * 9 + "|",
    ]
    for row in found["rows"]:
        smoothing = f"{row['smoothing']:.3g}, {row['kind']}" if "smoothing" in row else row.get("kind", "")
        times = [_times(row, phase) for phase in table.PHASES]
        figures = [
            f"{row[name]:.2g}" if name in row else ""
            for name in ("mean_error", "max_error", "gradient_error", "carried")
        ]
        lines.append(f"| {row['K']:,} | {row['method']} | {smoothing} | {' | '.join([*times, *figures])} |")
    lines += ["", *(f"- {name}: {method.what}." for name, method in METHODS.items()), ""]
    return "\n".join(lines)


def _times(row: dict[str, Any], phase: str) -> str:
    if phase not in row:
        return str(row.get("note", table.NOT_MEASURED))
    return "{median_ms:.4g} ({p20_ms:.4g} to {p80_ms:.4g})".format(**row[phase])


def main(
    out: Path = Path("bench/results"), regions: tuple[int, ...] = REGIONS, seconds: float = 1.0, install: bool = False
) -> int:
    """Measure all methods that are installed; writes soft_ranks_cpu.json.

    Args:
        out: folder of the results.
        regions: K, numbers of values.
        seconds: time for the rounds of a phase; at least five are run.
        install: first try to install the other packages with pip.
    """
    console, rows = Console(stderr=True, soft_wrap=True), []
    if install:
        from .peers import install_all

        for name, said in install_all().items():
            console.print(f"{name}: {said}", highlight=False)
    for k in regions:
        for row in measure(k, seconds):
            rows.append(row)
            console.print(json.dumps(row), highlight=False)
    found = {"device": table.device_name("cpu"), **table.made(), "rows": rows}
    text = json.dumps(found, indent=1, ensure_ascii=False)
    write_atomically(out / "soft_ranks_cpu.json", f"{text}\n".encode())
    return 1 if any(str(row.get("note", "")).startswith("failed") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
