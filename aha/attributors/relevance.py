"""Relevance propagation through transformers: a backward pass by rules that share relevance out, not by derivatives.

The forward pass runs inside `Propagation`, which records every operation. The recorded graph can then be walked
backwards twice: by derivatives as usual, and by these rules (Chefer et al., CVPR 2021, section 3), where R is the
relevance of an operation's output Y and what is summed over outputs i goes to the input j:

- linear layers, α = 1 and β = 0 over the contributions c_ij = x_j·w_ij ≥ 0, eq. 5: R_j = Σ_i c_ij / Σ_k c_ik · R_i;
  biases get nothing;
- sums and products U∘V of two tensors (residuals, attention times values, queries times keys, gates), eq. 2 and 6:
  R_U = U·∂Y/∂U·R/Y, then both normalised so that together they carry ΣR of their image, eq. 9:
  R_U ← R_U · sign(ΣR_U) · ΣR / (|ΣR_U| + |ΣR_V|);
- means, over the contributions that have the sign of the mean;
- activations, normalisations and constant factors or summands: unchanged;
- what moves values (reshaping, slicing, joining): relevance moves along.

The first dimension is the batch. An operation without a rule raises `NoRule`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode, resolve_name

_EPS = 1e-9


class NoRule(ValueError):
    """An operation that relevance cannot be propagated through; ``str()`` is its name."""


class Propagation(TorchFunctionMode):
    """What is computed inside from a tensor that requires gradients can be walked by relevance as well.

    >>> with Propagation() as propagation:
    ...     logits = model(images.requires_grad_())
    >>> with propagation.by_relevance():
    ...     (relevance,) = torch.autograd.grad(logits, images, one_hot)

    Outside `by_relevance`, ``torch.autograd.grad`` gives derivatives; pass ``retain_graph=True`` to have both.
    """

    def __init__(self) -> None:
        super().__init__()
        self.relevance = False

    @contextmanager
    def by_relevance(self) -> Iterator[None]:
        """Inside, gradients of what was recorded are relevances."""
        self.relevance = True
        try:
            yield
        finally:
            self.relevance = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operation = _OPERATIONS.get(func)
        if operation is None:
            result = func(*args, **kwargs)
            if func not in _MOVES and any(map(_bears, result if isinstance(result, tuple | list) else (result,))):
                raise NoRule(_name(func))
            return result
        bearing = tuple(i for i, value in enumerate(args) if _bears(value))
        if any(map(_bears, kwargs.values())) or any(i >= operation.operands for i in bearing):
            raise NoRule(_name(func))
        if not bearing:
            return func(*args, **kwargs)
        return _Recorded.apply(self, operation, args, kwargs, bearing, *(args[i] for i in bearing))


def _bears(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _name(func: Any) -> str:
    return resolve_name(func) or getattr(func, "__name__", repr(func))


class _Recorded(torch.autograd.Function):
    """One operation with a little graph of its own, whose backward is either that graph's or the rule's."""

    @staticmethod
    def forward(
        ctx: Any,
        propagation: Propagation,
        operation: _Operation,
        args: tuple,
        kwargs: dict[str, Any],
        bearing: tuple[int, ...],
        *tensors: Tensor,
    ) -> Tensor:
        inputs = [tensor.detach().requires_grad_() for tensor in tensors]
        args = tuple(inputs[bearing.index(i)] if i in bearing else value for i, value in enumerate(args))
        with torch.enable_grad():
            output = operation.compute(*args, **kwargs)
        ctx.propagation, ctx.rule = propagation, operation.rule
        ctx.call = _Call(operation.compute, args, kwargs, inputs, output)
        return output.detach()

    @staticmethod
    def backward(ctx: Any, received: Tensor) -> tuple[Tensor | None, ...]:
        shares = ctx.rule(ctx.call, received) if ctx.propagation.relevance else ctx.call.derivatives(received)
        return (None,) * 5 + tuple(shares)


@dataclass
class _Call:
    """What a rule needs to know: the operation's arguments, those of them that bear relevance, and its output."""

    compute: Callable
    args: tuple
    kwargs: dict[str, Any]
    inputs: list[Tensor]
    output: Tensor

    def derivatives(self, received: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(self.output, self.inputs, received, retain_graph=True))

    def parts(self, relevance: Tensor) -> list[Tensor]:
        """X·∂Y/∂X·R/Y for every input X (eq. 2)."""
        gradients = self.derivatives(_ratio(relevance, self.output.detach()))
        return [x.detach() * gradient for x, gradient in zip(self.inputs, gradients, strict=True)]


Rule = Callable[[_Call, Tensor], list[Tensor]]


def _unchanged(call: _Call, relevance: Tensor) -> list[Tensor]:
    return [relevance.sum_to_size(call.inputs[0].shape)]


def _linear(call: _Call, relevance: Tensor) -> list[Tensor]:
    weight = call.args[1] if len(call.args) > 1 else call.kwargs["weight"]
    x = call.inputs[0].detach()
    above, below = (x.clamp(min=0), weight.clamp(min=0)), (x.clamp(max=0), weight.clamp(max=0))
    shares = _ratio(relevance, F.linear(*above) + F.linear(*below))
    return [above[0] * (shares @ above[1]) + below[0] * (shares @ below[1])]


def _mixed(call: _Call, relevance: Tensor) -> list[Tensor]:
    parts = call.parts(relevance)
    if len(parts) == 1:
        return parts
    sums = [_per_image(part) for part in parts]
    scale = _ratio(_per_image(relevance), sums[0].abs() + sums[1].abs())
    return [part * (s.sign() * scale).view(-1, *[1] * (part.dim() - 1)) for part, s in zip(parts, sums, strict=True)]


def _elementwise(call: _Call, relevance: Tensor) -> list[Tensor]:
    return (_unchanged if len(call.inputs) == 1 else _mixed)(call, relevance)


def _mean(call: _Call, relevance: Tensor) -> list[Tensor]:
    x = call.inputs[0].detach()
    (sign,) = call.derivatives(call.output.detach().sign())
    alike = torch.where(x * sign > 0, x, 0)
    (weight,) = call.derivatives(_ratio(relevance, call.compute(alike, *call.args[1:], **call.kwargs)))
    return [alike * weight]


def _ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator/denominator, 0 where the denominator is 0."""
    return torch.where(denominator == 0, 0, numerator / (denominator + _EPS * denominator.sign()))


def _per_image(values: Tensor) -> Tensor:
    return values.flatten(1).sum(dim=1)


class _Operation(NamedTuple):
    compute: Callable
    rule: Rule
    # how many arguments, from the first, may bear relevance
    operands: int = 1


_T = torch.Tensor
# x += y and x *= y are computed out of place, as rules need the values that went in
_OPERATIONS: dict[Any, _Operation] = {
    F.linear: _Operation(F.linear, _linear),
    **dict.fromkeys((torch.mean, _T.mean), _Operation(torch.mean, _mean)),
    **dict.fromkeys((torch.div, _T.div, _T.__truediv__), _Operation(torch.div, _unchanged)),
    **dict.fromkeys((torch.matmul, _T.matmul, _T.__matmul__), _Operation(torch.matmul, _mixed, 2)),
    **dict.fromkeys((torch.add, _T.add, _T.__add__, _T.__radd__, _T.__iadd__), _Operation(torch.add, _elementwise, 2)),
    **dict.fromkeys((torch.mul, _T.mul, _T.__mul__, _T.__rmul__, _T.__imul__), _Operation(torch.mul, _elementwise, 2)),
    **{
        func: _Operation(func, _unchanged)
        for func in (
            *(torch.neg, _T.neg, _T.__neg__),
            *(torch.softmax, _T.softmax, F.softmax),
            *(torch.sigmoid, _T.sigmoid, F.sigmoid, torch.tanh, _T.tanh, F.tanh),
            *(torch.relu, _T.relu, F.relu, F.gelu, F.silu),
            *(F.layer_norm, F.rms_norm),
        )
    },
}

# their derivative moves what it is given to where it came from, which is what relevance does
_MOVES: set[Any] = {
    *(_T.__getitem__, torch.unbind, _T.unbind, torch.chunk, _T.chunk, torch.split, _T.split, _T.select, _T.narrow),
    *(torch.cat, torch.stack, _T.reshape, torch.reshape, _T.view, _T.flatten, torch.flatten, _T.unflatten),
    *(_T.permute, torch.permute, _T.transpose, torch.transpose, _T.squeeze, _T.unsqueeze, _T.expand),
    *(_T.mT.__get__, _T.T.__get__, _T.repeat_interleave, torch.repeat_interleave),  # type: ignore[attr-defined]
    *(_T.to, _T.float, _T.type_as, _T.contiguous, _T.clone, _T.requires_grad_),
    # the classifier is in evaluation mode
    F.dropout,
}
