"""Every operator once, forward and backward, at small awkward sizes: what compute-sanitizer watches.

`compute-sanitizer --tool memcheck python -m bench.sweep`. It is slow under a sanitizer, so nothing is timed or checked
here beyond finite results.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from .cases import CASES, TINY
from .rows import REFERENCE_ROWS, rows
from .truth import why

REGIONS = (1, 2, 49, 50, 196, 257)


def main(device: str = "cuda") -> int:
    """Run all backends of ``device``; 1 if one fails."""
    failed = 0
    for case in CASES.values():
        for k in REGIONS if "K" in case.fields else REGIONS[:1]:
            # pixels enough for a cell each
            size = replace(TINY, K=k, side=260 if k == 257 else 36, noise=1.0)
            inputs = case.inputs(size, device)
            for name, run in rows(case, inputs, compiled=False).items():
                if name in REFERENCE_ROWS or isinstance(run, str):
                    continue
                try:
                    with torch.no_grad():
                        cotangents = [torch.ones_like(out) for out in run(inputs)]
                    outputs, gradients = case.gradients(run, inputs, cotangents)
                    finite = all(torch.isfinite(value).all() for value in (*outputs, *gradients))
                    said = "ok" if finite else "not finite"
                except Exception as error:  # the next operator is watched too
                    said = why(error)
                failed += said != "ok"
                print(f"{case.operator} K={k} {name}: {said}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
