"""Which implementation runs a `Call`: one ordered tuple of backends per operator, each able to say why it cannot run.

``why_not`` reads only metadata (devices, dtypes, shapes) and returns None or a one-line reason.
``auto`` takes the first backend without a reason; a backend asked for by name raises its reason.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import convergent, native, reference, triton
from .messages import short

NAMES = ("auto", "cuda", "triton", "cpu", "reference")


@dataclass(frozen=True, eq=False)
class Call:
    """An operator and its checked arguments, to be run or explained.

    Attributes:
        operator: its name in `BACKENDS`.
        arguments: by name, as every backend's ``run`` takes them. The device of the first is that of the call.
    """

    operator: str
    arguments: Mapping[str, Any]

    @property
    def first(self) -> Tensor:
        """The argument whose device and dtype decide."""
        return next(iter(self.arguments.values()))


def _no_choice(call: Call) -> str | None:
    return None


class Backend(NamedTuple):
    """An implementation of one operator; ``plan`` says how it would run a call, where it has a choice."""

    name: str
    why_not: Callable[[Call], str | None]
    run: Callable[..., Any]
    plan: Callable[[Call], str | None] = _no_choice


class Choice(NamedTuple):
    """One row of `explain`: the backend, whether "auto" would take it, the reason if it cannot run, and how it would.

    ``plan`` is None where there is nothing to choose, or nothing to choose by: under torch.compile, on meta.
    """

    backend: str
    chosen: bool
    reason: str | None
    plan: str | None = None


class BackendError(RuntimeError):
    """The backend asked for by name cannot run this call."""


_FLOAT = (torch.float32,)
_FLOATS = (torch.float32, torch.float64)
_IMAGES = (torch.float32, torch.bfloat16, torch.float16)


def _runs(device: str, load: Callable[[], str | None], dtypes: tuple[torch.dtype, ...]) -> Callable[[Call], str | None]:
    """A ``why_not`` for operators whose first argument decides: its device, its dtype, then whether code is there."""

    def why_not(call: Call) -> str | None:
        first = call.first
        if first.device.type != device:
            return f"tensors are on {first.device}, this backend runs on {device}"
        if first.dtype not in dtypes:
            accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            return f"tensors are {str(first.dtype).removeprefix('torch.')}, this backend takes {accepted}"
        return load()

    return why_not


def _makes(why_not: Callable[[Call], str | None]) -> Callable[[Call], str | None]:
    """The same for perturbation, which has the dtype of its outputs as an argument: float64 only from float64."""

    def with_outputs(call: Call) -> str | None:
        reason, given, made = why_not(call), call.first.dtype, call.arguments["dtype"]
        if reason is None and torch.float64 in (given, made) and made != given:
            return f"images are {given}, outputs {made}; this backend does not mix in float64"
        return reason

    return with_outputs


_PLANS = ("dense", "blocks", "nodes")  # as csrc/cpu/sinkhorn.cpp numbers them


def _ranking_plan(call: Call) -> str | None:
    """Dense, in blocks (csrc/blocks.h) or at nodes (csrc/cpu/node_ranking.cpp), as C++ finds for each image."""
    arguments = call.arguments
    scores, tau = arguments["scores"], arguments["tau"]
    if arguments["noise"]:
        return "dense, as the noise is"
    if not convergent.readable(scores) or not convergent.readable(tau):
        return None
    start = None if call.operator == "soft_topk_masks" else convergent.sorted_start(scores, tau)
    counts = torch.ops.aha.ranking_plan(scores.detach(), tau.detach(), None if start is None else start.detach())
    if not len(counts):
        return None
    images = [int((counts[:, 0] == plan).sum()) for plan in range(len(_PLANS))]
    taken = [f"{name} for {n}" for name, n in zip(_PLANS, images, strict=True) if n]
    name = taken[0].split()[0] if len(taken) == 1 else f"{', '.join(taken)} of {len(counts)} images"
    if name == _PLANS[-1]:
        return f"{name}: iterations whose time does not depend on K"
    blocks, dense = (f"{float(column.double().mean()):.2g}" for column in counts[:, 4:].T)
    return f"{name}: vector operations of an iteration {blocks} in blocks, {dense} dense"


def _backends(
    of: Callable[[Any], Callable[..., Any]],
    cuda: Any,
    cpu: Any,
    on_triton: Any,
    plan: Callable[[Call], str | None] = _no_choice,
) -> tuple[Backend, ...]:
    """``of`` finds the operator in whatever implements all of them; ``plan`` is that of the C++ operator."""
    return (
        Backend("cuda", cuda, of(native.ops)),
        Backend("cpu", cpu, of(native.ops), plan),
        Backend("triton", on_triton, of(triton.ops)),
        Backend("reference", lambda call: None, of(reference)),
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
_masks = {backend.name: backend for backend in _backends(attrgetter("cumulative_masks"), *_ranking)}
BACKENDS: dict[str, tuple[Backend, ...]] = {
    "log_sinkhorn": _backends(attrgetter("log_sinkhorn"), *_ranking),
    "gumbel_sinkhorn": _backends(attrgetter("gumbel_sinkhorn"), *_ranking),
    "cumulative_masks": (_masks["cuda"], _masks["triton"], _masks["reference"], _masks["cpu"]),
    "soft_topk_masks": _backends(attrgetter("soft_topk_masks"), *_ranking, _ranking_plan),
    "soft_sort": _backends(lambda ops: partial(convergent.read_right, ops), *_ranking, _ranking_plan),
    "soft_rank": _backends(lambda ops: partial(convergent.read_left, ops), *_ranking, _ranking_plan),
    "soft_topk": _backends(lambda ops: partial(convergent.read_left, ops), *_ranking, _ranking_plan),
    "perturb": _backends(attrgetter("perturb"), *_perturbing),
    "perturb_by_rank": _backends(attrgetter("perturb_by_rank"), *_perturbing),
}


def run(call: Call, backend: str) -> Any:
    """The result of ``call``, computed in the precision of its arguments also under autocast.

    Raises:
        ValueError: ``backend`` is not one of `NAMES`.
        BackendError: it cannot run this call, or has no such operator.
    """
    chosen = _choose(call, backend)
    with torch.autocast(call.first.device.type, enabled=False):
        try:
            return chosen.run(**call.arguments)
        except (MemoryError, RuntimeError) as error:
            # what PyTorch says of the CPU's memory, and what it says of it through the stable ABI
            short_of = ("can't allocate memory", "aten::new_empty", "aten::new_zeros")
            if not any(words in str(error) for words in short_of):
                raise
            raise ValueError(f"{call.operator} takes more memory than there is: give less at a time") from error


def _choose(call: Call, backend: str) -> Backend:
    if not isinstance(backend, str) or backend not in NAMES:
        raise ValueError(f"backend={short(backend)} is not known: choose one of {', '.join(NAMES)}")
    candidates = BACKENDS[call.operator]
    for candidate in candidates:
        if backend == "auto":
            if candidate.why_not(call) is None:
                return candidate
        elif candidate.name == backend:
            reason = candidate.why_not(call)
            if reason is not None:
                raise BackendError(f"backend={backend!r} cannot run {call.operator} here: {reason}")
            return candidate
    raise BackendError(
        f"backend={backend!r} has no {call.operator}: it is implemented by {', '.join(c.name for c in candidates)}"
    )


def explain(call: Call) -> list[Choice]:
    """How ``backend="auto"`` would decide: one `Choice` per backend, in the order of preference."""
    backends = {backend: backend.why_not(call) for backend in BACKENDS[call.operator]}
    chosen = next((backend.name for backend, reason in backends.items() if reason is None), None)
    return [
        Choice(backend.name, backend.name == chosen, reason, backend.plan(call) if reason is None else None)
        for backend, reason in backends.items()
    ]
