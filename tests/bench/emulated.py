"""A stage of the short report on a CPU, with the CUDA ranking kernels in place of the C++ ones: the emulator runs them.

`python emulated.py FOLDER` is bench.smoke.right in every layout; the kernels are compiled into FOLDER.
"""

import sys
from pathlib import Path

import torch

from bench.smoke import right
from tests.kernels.emulator import Emulator
from tests.kernels.ranking import Problem

SHARED_BYTES, LARGEST_CLUSTER = 24 << 10, 4  # of a card so small that few regions take all its layouts
LAYOUTS = (1, 2, 4, 0)  # one CTA, clusters, streamed
_defined = []


def on_emulator(emulator: Emulator) -> None:
    """Put its kernels in place of those of torch.ops.aha."""

    def problem(scores, tau, seed, left, right, iterations, noise, start):
        tensors = (scores, tau, seed, left, right, start)
        scores, tau, seed, left, right, start = (None if t is None else t.detach().contiguous() for t in tensors)
        return Problem(scores, None, tau, seed, left, right, start, noise, iterations)

    def ranks(k, backward):
        return emulator.planned_ranks(k, backward, SHARED_BYTES, LARGEST_CLUSTER)

    def forward(*given):
        return emulator.forward(problem(*given), ranks(given[0].shape[1], False))

    def backward(grad, scores, tau, seed, left, right, scalings, absorbed, noise, need_tau, start):
        given = problem(scores, tau, seed, left, right, absorbed.shape[1], noise, start)
        found = emulator.backward(given, grad.contiguous(), scalings, absorbed, ranks(scores.shape[1], True))
        return tuple(scores.new_empty(0) if gradient is None else gradient for gradient in found)

    library = torch.library.Library("aha", "IMPL")
    library.impl("gumbel_sinkhorn", forward, "CPU", allow_override=True)
    library.impl("gumbel_sinkhorn_backward", backward, "CPU", allow_override=True)
    _defined.append(library)


if __name__ == "__main__":
    from aha.kernels import native

    assert native.load("_C") is None
    emulator = Emulator(Path(sys.argv[1]))
    on_emulator(emulator)
    planned = {emulator.planned_ranks(k, False, SHARED_BYTES, LARGEST_CLUSTER): k for k in range(150, 8, -1)}
    right.REGIONS["cpu"] = tuple(planned[ranks] for ranks in LAYOUTS)  # the fewest regions of each
    sys.exit(right.main("cpu", "cpu"))
