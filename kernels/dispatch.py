"""Which implementation runs: one ordered tuple of backends per operator, each able to say why it cannot run.

``why_not`` reads only metadata (devices, dtypes, shapes) and returns None or a one-line reason.
``auto`` takes the first backend without a reason; a backend asked for by name raises its reason.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import native, reference

NAMES = ("auto", "cuda", "triton", "cpu", "reference")
_EXPLAIN = "explain"  # what `explain` passes as backend to get the table instead of a result


class Backend(NamedTuple):
    """An implementation of one operator."""

    name: str
    why_not: Callable[..., str | None]
    run: Callable[..., Any]


class Choice(NamedTuple):
    """One row of `explain`: the backend, whether "auto" would take it, and the reason if it cannot run."""

    backend: str
    chosen: bool
    reason: str | None


class BackendError(RuntimeError):
    """The backend asked for by name cannot run this call."""


def _always(*_: Any) -> None:
    return None


def _cpu_perturb_by_rank(images, references, ranks, counts, mean, std, dtype) -> str | None:
    if images.device.type != "cpu":
        return f"images are on {images.device}, this backend runs on the CPU"
    if images.dtype not in (torch.float32, torch.float64):
        return f"images are {images.dtype}; this backend takes float32 or float64"
    if torch.float64 in (images.dtype, dtype) and dtype != images.dtype:
        return f"images are {images.dtype}, outputs {dtype}; this backend does not mix in float64"
    return native.load("_C")


def _cuda_perturb_by_rank(images, references, ranks, counts, mean, std, dtype) -> str | None:
    if images.device.type != "cuda":
        return f"images are on {images.device}, this backend runs on CUDA devices"
    if images.dtype != torch.float32:
        return f"images are {images.dtype}; this backend takes float32 images"
    if dtype == torch.float64:
        return "outputs are float64; this backend makes float32, bfloat16 and float16"
    return native.load("_C_cuda")


BACKENDS: dict[str, tuple[Backend, ...]] = {
    "log_sinkhorn": (Backend("reference", _always, reference.log_sinkhorn),),
    "gumbel_sinkhorn": (Backend("reference", _always, reference.gumbel_sinkhorn),),
    "cumulative_masks": (Backend("reference", _always, reference.cumulative_masks),),
    "soft_topk_masks": (Backend("reference", _always, reference.soft_topk_masks),),
    "perturb": (Backend("reference", _always, reference.perturb),),
    "perturb_by_rank": (
        Backend("cuda", _cuda_perturb_by_rank, native.perturb_by_rank),
        Backend("cpu", _cpu_perturb_by_rank, native.perturb_by_rank),
        Backend("reference", _always, reference.perturb_by_rank),
    ),
}


def run(operator: str, backend: str, device: torch.device, *args: Any) -> Any:
    """Run ``operator`` on checked arguments, in their own precision also under autocast."""
    candidates = BACKENDS[operator]
    if backend == _EXPLAIN:
        return _table(candidates, args)
    chosen = _choose(operator, candidates, backend, args)
    with torch.autocast(device.type, enabled=False):
        return chosen.run(*args)


def _choose(operator: str, candidates: tuple[Backend, ...], backend: str, args: tuple) -> Backend:
    if backend not in NAMES:
        raise ValueError(f"backend={backend!r} is not known: choose one of {', '.join(NAMES)}")
    for candidate in candidates:
        if backend == "auto":
            if candidate.why_not(*args) is None:
                return candidate
        elif candidate.name == backend:
            reason = candidate.why_not(*args)
            if reason is not None:
                raise BackendError(f"backend={backend!r} cannot run {operator} here: {reason}")
            return candidate
    raise BackendError(
        f"backend={backend!r} has no {operator}: it is implemented by {', '.join(c.name for c in candidates)}"
    )


def _table(candidates: tuple[Backend, ...], args: tuple) -> list[Choice]:
    rows: list[Choice] = []
    taken = False
    for candidate in candidates:
        reason = candidate.why_not(*args)
        rows.append(Choice(candidate.name, reason is None and not taken, reason))
        taken = taken or reason is None
    return rows


def explain(operator: str, *args: Any, **kwargs: Any) -> list[Choice]:
    """How ``backend="auto"`` would decide for this call: one `Choice` per backend, in the order of preference.

    >>> aha.kernels.explain("soft_topk_masks", scores, fractions, tau=0.3)

    Raises ValueError for an unknown operator, and whatever the operator itself raises for bad arguments.
    """
    from . import functional

    if operator not in BACKENDS:
        raise ValueError(f"operator {operator!r} is not known: choose one of {', '.join(BACKENDS)}")
    return getattr(functional, operator)(*args, **kwargs, backend=_EXPLAIN)


def device_of(*tensors: Tensor | None) -> torch.device:
    """The one device all tensors are on; ValueError if they are not on one."""
    devices = {t.device for t in tensors if t is not None}
    if len(devices) != 1:
        names = ", ".join(sorted(str(d) for d in devices))
        raise ValueError(f"tensors are on several devices ({names}): move them to one")
    return devices.pop()
