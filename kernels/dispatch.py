"""Which implementation runs: one ordered tuple of backends per operator, each able to say why it cannot run.

``why_not`` reads only metadata (devices, dtypes, shapes) and returns None or a one-line reason.
``auto`` takes the first backend without a reason; a backend asked for by name raises its reason.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import convergent, native, reference, triton

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


_FLOAT = (torch.float32,)
_FLOATS = (torch.float32, torch.float64)
_IMAGES = (torch.float32, torch.bfloat16, torch.float16)


def _runs(device: str, load: Callable[[], str | None], dtypes: tuple[torch.dtype, ...]) -> Callable[..., str | None]:
    """A ``why_not`` for operators whose first argument decides: its device, its dtype, then whether code is there."""

    def why_not(first: Tensor, *_: Any) -> str | None:
        if first.device.type != device:
            return f"tensors are on {first.device}, this backend runs on {device}"
        if first.dtype not in dtypes:
            accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            return f"tensors are {str(first.dtype).removeprefix('torch.')}, this backend takes {accepted}"
        return load()

    return why_not


def _makes(why_not: Callable[..., str | None]) -> Callable[..., str | None]:
    """The same for perturbation, whose last argument is the dtype of its outputs: float64 only from float64."""

    def with_outputs(images: Tensor, *args: Any) -> str | None:
        reason, dtype = why_not(images, *args), args[-1]
        if reason is None and torch.float64 in (images.dtype, dtype) and dtype != images.dtype:
            return f"images are {images.dtype}, outputs {dtype}; this backend does not mix in float64"
        return reason

    return with_outputs


def _backends(operator: str, cuda: Any, cpu: Any, on_triton: Any) -> tuple[Backend, ...]:
    return (
        Backend("cuda", cuda, getattr(native.ops, operator)),
        Backend("cpu", cpu, getattr(native.ops, operator)),
        Backend("triton", on_triton, getattr(triton.ops, operator)),
        Backend("reference", lambda *_: None, getattr(reference, operator)),
    )


def _convergent(run: Callable[..., Any], cuda: Any, cpu: Any, on_triton: Any) -> tuple[Backend, ...]:
    """Backends of an operator of `convergent`, which asks each of them for its Sinkhorn iterations."""
    return (
        Backend("cuda", cuda, partial(run, native.ops)),
        Backend("cpu", cpu, partial(run, native.ops)),
        Backend("triton", on_triton, partial(run, triton.ops)),
        Backend("reference", lambda *_: None, partial(run, reference)),
    )


_ranking = (
    _runs("cuda", lambda: native.load("_C_cuda"), _FLOAT),
    _runs("cpu", lambda: native.load("_C"), _FLOATS),
    _runs(triton.DEVICE, triton.load, _FLOAT),
)
_perturbing = (
    _makes(_runs("cuda", lambda: native.load("_C_cuda"), _IMAGES)),
    _makes(_runs("cpu", lambda: native.load("_C"), (*_IMAGES, torch.float64))),
    _makes(_runs(triton.DEVICE, triton.load, _IMAGES)),
)
# on a CPU the matrix product of the reference is as fast or faster: bench/results/cpu.md
_masks = {backend.name: backend for backend in _backends("cumulative_masks", *_ranking)}
BACKENDS: dict[str, tuple[Backend, ...]] = {
    "log_sinkhorn": _backends("log_sinkhorn", *_ranking),
    "gumbel_sinkhorn": _backends("gumbel_sinkhorn", *_ranking),
    "cumulative_masks": (_masks["cuda"], _masks["triton"], _masks["reference"], _masks["cpu"]),
    "soft_topk_masks": _backends("soft_topk_masks", *_ranking),
    "soft_sort": _convergent(convergent.weigh_regions, *_ranking),
    "soft_rank": _convergent(convergent.weigh_ranks, *_ranking),
    "soft_topk": _convergent(convergent.weigh_ranks, *_ranking),
    "perturb": _backends("perturb", *_perturbing),
    "perturb_by_rank": _backends("perturb_by_rank", *_perturbing),
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
