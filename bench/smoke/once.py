"""Every path of the ranking once, forward and backward, for the tools that watch kernels: B = 1, T = 2."""

from __future__ import annotations

import argparse
import os
import sys

import torch

from ..cases import CASES, Size
from ..stages import end_with_parent, tell
from ..truth import why
from . import PLAN, PLANS
from .right import REGIONS, NoPlanError, plan_of, require

CLUSTERED = 5000  # scores that a cluster shares in blocks


def main(device: str, regions: list[int]) -> int:
    """1 if a call fails or its result is not finite."""
    case, good = CASES["soft_topk_masks"], True
    for k in regions:
        inputs = case.inputs(Size("once", B=1, K=k, T=2, S=5), device)
        try:
            require(inputs)
            with torch.no_grad():
                cotangents = [torch.ones_like(out) for out in case.call(inputs, device)]
            outputs, gradients = case.gradients(lambda given: case.call(given, device), inputs, cotangents)
            finite = all(bool(torch.isfinite(value).all()) for value in (*outputs, *gradients))
            good &= tell(
                f"K={k}", "ok" if finite else "wrong: not finite", plan=os.environ.get(PLAN) or plan_of(inputs)
            )
        except NoPlanError as none:
            good &= tell(f"K={k}", str(none))
        except Exception as error:  # the next path is watched too
            good &= tell(f"K={k}", why(error))
    return int(not good)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--regions", type=int, nargs="*", help="default: those of bench.smoke.right")
    given = parser.parse_args()
    end_with_parent()
    everything = [*REGIONS[given.device], *([CLUSTERED] if os.environ.get(PLAN) == PLANS[1] else [])]
    sys.exit(main(given.device, given.regions or everything))
