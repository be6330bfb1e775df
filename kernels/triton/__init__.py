"""The operators as Triton kernels: the portable path on GPUs, where aha._C_cuda is not built.

`load` compiles nothing; it defines torch.ops.aha_triton. With TRITON_INTERPRET=1 in the environment the kernels run
in Triton's interpreter, on CPU tensors: slow, for tests.
"""

import os

from .. import operators

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET", "0") == "1" else "cuda"
_reason: list[str | None] = []  # once loading was tried

# the public functions on torch.ops.aha_triton; usable once `load` has returned None
ops = operators.Operators("aha_triton")


def load() -> str | None:
    """Define torch.ops.aha_triton once: None if it is ready, else a one-line reason."""
    if not _reason:
        _reason.append(_define())
    return _reason[0]


def _define() -> str | None:
    return "not written yet"
