"""The compiled operators: loads aha._C (schemas, CPU) and aha._C_cuda and gives them fakes and gradients.

Nothing here raises on import. ``load`` says in one line why a library cannot be used, and keeps that reason.
"""

import importlib.machinery
import importlib.util
import os
from pathlib import Path

import torch
from torch import Tensor

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
            _register()
    except Exception as error:  # another torch, a truncated file, a library of an older aha
        return f"failed to load: {' '.join(str(error.__cause__ or error).split())}"
    return None


def perturb_by_rank(
    images: Tensor,
    references: Tensor,
    ranks: Tensor,
    counts: Tensor,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Delete or insert the ``counts[s]`` most important pixels: -> deleted, inserted, both (B, S, C, H, W).

    images, references: (B, C, H, W), float32, on the CPU also float64. ranks: (B, H, W) int32, 0 = most
    important. counts: (S,) int32. mean, std: (C,), taken as constants. dtype: of the outputs, default that of
    the images. Differentiable in images and references. RuntimeError if the arguments do not fit together.
    """
    mean, std = _constant(mean, images), _constant(std, images)
    return torch.ops.aha.perturb_by_rank(images, references, ranks, counts, mean, std, dtype)


def perturb_by_rank_backward(
    grad_deleted: Tensor,
    grad_inserted: Tensor,
    ranks: Tensor,
    counts: Tensor,
    std: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Gradients of the outputs (B, S, C, H, W) -> those of the inputs (B, C, H, W), summed in ``dtype``."""
    return torch.ops.aha.perturb_by_rank_backward(grad_deleted, grad_inserted, ranks, counts, std, dtype)


def _constant(values: Tensor | None, like: Tensor) -> Tensor | None:
    return None if values is None else values.detach().to(like)


def _register() -> None:
    """Shapes for the compiler, gradients for autograd. The operator is linear: twice backward is forward."""
    register_fake, register_autograd = torch.library.register_fake, torch.library.register_autograd

    @register_fake("aha::perturb_by_rank")
    def _(images, references, ranks, counts, mean=None, std=None, dtype=None):
        batch, channels, height, width = images.shape
        shape = (batch, counts.shape[0], channels, height, width)
        return images.new_empty(shape, dtype=dtype), images.new_empty(shape, dtype=dtype)

    @register_fake("aha::perturb_by_rank_backward")
    def _(grad_deleted, grad_inserted, ranks, counts, std=None, dtype=None):
        batch, _, channels, height, width = grad_deleted.shape
        shape = (batch, channels, height, width)
        return grad_deleted.new_empty(shape, dtype=dtype), grad_deleted.new_empty(shape, dtype=dtype)

    def keep(ctx, inputs, output):
        values, _, ranks, counts, *_, std, _ = inputs
        ctx.save_for_backward(ranks, counts, std)
        ctx.dtype = values.dtype

    def backward(ctx, grad_deleted, grad_inserted):
        ranks, counts, std = ctx.saved_tensors
        grads = perturb_by_rank_backward(grad_deleted, grad_inserted, ranks, counts, std, ctx.dtype)
        return *grads, None, None, None, None, None

    def backward_backward(ctx, grad_images, grad_references):
        ranks, counts, std = ctx.saved_tensors
        grads = perturb_by_rank(grad_images, grad_references, ranks, counts, None, std, ctx.dtype)
        return *grads, None, None, None, None

    register_autograd("aha::perturb_by_rank", backward, setup_context=keep)
    register_autograd("aha::perturb_by_rank_backward", backward_backward, setup_context=keep)


# tried now, so that a first call inside a compiled function only looks the answer up
for _name in _NAMES:
    load(_name)
