"""Is it right: forward and backward of the operators against float64, in the order of how likely a kernel hangs."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..cases import CASES, TINY, Inputs, Size
from ..stages import end_with_parent, tell
from ..truth import ATOL, deviation, truth, why
from . import PLAN, PLANS

# one CTA for each image; X in global memory; clusters of 4 and of 16 on Hopper
REGIONS = {"cuda": (49, 196, 1025, 400, 784), "cpu": (49, 196)}
IN_BLOCKS = 2  # bit of `absorbed`, which the operator keeps for each iteration, where the plan is blocks


def plan_of(inputs: Inputs) -> str:
    """The plan that the compiled operator took for the scores of soft_topk_masks."""
    scores = inputs["scores"]
    tau, seed = (torch.tensor(value, device=scores.device) for value in (inputs["tau"], inputs["seed"]))
    left = torch.zeros(1, scores.shape[1], device=scores.device)
    given = scores, tau, seed, left, None, inputs["n_iters"], inputs["noise"], None
    *_, absorbed = torch.ops.aha.gumbel_sinkhorn(*given)
    return PLANS[1] if bool((absorbed & IN_BLOCKS).any()) else PLANS[0]


class NoPlanError(RuntimeError):
    """The compiled operator has no such plan here, which is no failure."""

    def __str__(self) -> str:
        return f"not available: the operator has no {os.environ[PLAN]} plan for this"


def require(inputs: Inputs) -> None:
    """NoPlanError if a plan is asked for that the operator does not take; without one, nothing is run."""
    wanted = os.environ.get(PLAN)
    if wanted and plan_of(inputs) != wanted:
        raise NoPlanError


def check(operator: str, size: Size, device: str, backend: str) -> bool:
    """Whether one operator at one size is within twice the error of the float32 reference."""
    sized = " ".join(f"{field}={getattr(size, field)}" for field in ("B", "K", "T", "noise"))
    name = f"{operator} {sized}" if "K" in CASES[operator].fields else operator
    case = CASES[operator]
    try:
        inputs = case.inputs(size, device)
        if operator == "soft_topk_masks":
            require(inputs)
        true = truth(case, inputs, size)
        start = time.perf_counter()
        outputs, gradients = case.gradients(lambda given: case.call(given, backend), inputs, true.cotangents)
        # of a sum of all, so that it has come to its end
        seconds = time.perf_counter() - start + 0 * float(sum(_sum(value) for value in gradients))
        errors = deviation(outputs, true.outputs), deviation(gradients, true.gradients)
        allowed = 2 * true.error + ATOL
        status = "ok" if all(error <= allowed for error in errors) else "wrong"
        figures = {"outputs": errors[0], "gradients": errors[1], "allowed": allowed}
        return tell(name, status, **{key: f"{value:.2g}" for key, value in figures.items()}, seconds=round(seconds, 3))
    except NoPlanError as none:
        return tell(name, str(none))
    except Exception as error:  # the next size is a fact too
        return tell(name, why(error))


def _sum(value: Tensor) -> Tensor:
    return value.float().sum()


def todo(device: str, backend: str) -> Iterator[tuple[str, Size]]:
    """Operators and sizes: of a plan, the ranking without noise; of dense and Triton, noise and pixels as well."""
    whole = device == "cuda"
    size = Size("smoke", B=2, K=49) if whole else replace(TINY, T=8)
    # compiling for a size takes Triton seconds
    regions = REGIONS[device] if backend != "triton" else tuple(k for k in REGIONS[device] if k in (49, 196, 784))
    for k in regions:
        yield "soft_topk_masks", replace(size, K=k)
    if os.environ.get(PLAN) == PLANS[1]:
        return
    yield "soft_topk_masks", replace(size, K=196, noise=1.0)
    yield "perturb", replace(size, K=196 if whole else 9)
    yield "perturb_by_rank", size


def main(device: str, backend: str) -> int:
    """1 if something is wrong."""
    outcomes = [check(operator, size, device, backend) for operator, size in todo(device, backend)]
    return int(not all(outcomes))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--backend", help="default: the compiled operators of the device")
    given = parser.parse_args()
    end_with_parent()
    sys.exit(main(given.device, given.backend or given.device))
