"""The operators as Triton kernels: the portable path on GPUs, where aha._C_cuda is not built.

`load` compiles nothing; it defines torch.ops.aha_triton. With TRITON_INTERPRET=1 in the environment the kernels run
in Triton's interpreter, on CPU tensors: slow, for tests.
"""

import os
import shutil
from typing import Any

import torch

from .. import operators

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET", "0") == "1" else "cuda"
_reason: list[str | None] = []  # once loading was tried
_library: list[torch.library.Library] = []  # its definitions live as long as it does

# the public functions on torch.ops.aha_triton; usable once `load` has returned None
ops = operators.Operators("aha_triton")


def load() -> str | None:
    """Define torch.ops.aha_triton once: None if it is ready, else a one-line reason."""
    if not _reason:
        _reason.append(_define())
    return _reason[0]


# a compiled function takes the answer as it is: importing triton is nothing to trace
load._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler's decorator would import dynamo


def _define() -> str | None:
    try:
        from . import perturb, sinkhorn, soft_masks
    except ImportError as error:
        return f"triton cannot be imported: {' '.join(str(error).split())}"
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if DEVICE == "cuda" and not compiler:
        return "triton needs a C compiler: there is no gcc or clang on the path and CC is not set"
    library = torch.library.Library("aha_triton", "DEF")
    _library.append(library)
    for name, schema in operators.SCHEMAS.items():
        library.define(name + schema)
        module: Any = next(m for m in (sinkhorn, soft_masks, perturb) if hasattr(m, name))
        library.impl(name, _on_device(getattr(module, name)), DEVICE.upper())
    operators.register("aha_triton")
    return None


def _on_device(kernel: Any) -> Any:
    def run(first: torch.Tensor, *args: Any) -> Any:
        with torch.cuda.device_of(first):  # Triton launches on the current device
            return kernel(first, *args)

    return run
