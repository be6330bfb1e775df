"""The C++ and CUDA operators: loads aha._C (schemas, CPU) and aha._C_cuda.

Nothing here raises on import. ``load`` says in one line why a library cannot be used, and keeps that reason.
"""

import importlib.machinery
import importlib.util
import os
from pathlib import Path

import torch

from . import operators

_NAMES = ("_C", "_C_cuda")
_reasons: dict[str, str | None] = {}  # by name, once loading was tried


def path(name: str) -> Path | None:
    """The file of library ``name`` ("_C" or "_C_cuda") in the installed ``aha`` package, or None."""
    spec = importlib.util.find_spec("aha")
    for folder in (spec and spec.submodule_search_locations) or ():
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            file = Path(folder) / f"{name}{suffix}"
            if file.is_file():
                return file
    return None


def load(name: str) -> str | None:
    """Load library ``name`` ("_C" or "_C_cuda") once: None if it is ready, else a one-line reason.

    AHA_DISABLE_NATIVE=1 makes every library unavailable. ValueError for another name.
    """
    if name not in _NAMES:
        raise ValueError(f"native library {name!r} is not known: choose one of {', '.join(_NAMES)}")
    if os.environ.get("AHA_DISABLE_NATIVE", "0") not in ("", "0"):
        return "disabled by AHA_DISABLE_NATIVE"
    if name not in _reasons:
        _reasons[name] = _open(name)
    return _reasons[name]


def _open(name: str) -> str | None:
    if name == "_C_cuda":
        if torch.version.cuda is None:
            return f"this torch ({torch.__version__}) has no CUDA"
        # the schemas that _C_cuda implements are defined in _C
        if reason := load("_C"):
            return f"aha._C_cuda needs aha._C: {reason}"
    file = path(name)
    if file is None:
        mode = "cpu" if name == "_C" else "cuda"
        return f"not built: there is no aha.{name} here; reinstall with AHA_BUILD={mode}"
    try:
        torch.ops.load_library(file)
        if name == "_C":
            operators.register("aha")
    except Exception as error:  # another torch, a truncated file, a library of an older aha
        return f"failed to load: {' '.join(str(error.__cause__ or error).split())}"
    return None


# the public functions on aha._C and aha._C_cuda; usable once `load` has returned None
ops = operators.Operators("aha")

# tried now, so that a first call inside a compiled function only looks the answer up
for _name in _NAMES:
    load(_name)
