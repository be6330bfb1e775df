"""Gradients that account for the whole logit: LibraGrad's rules for the backward pass.

A network whose operations are all homogeneous of degree one up to constants satisfies, at every cut h through it,

    Σ h⊙∂f/∂h + Σ c⊙∂f/∂c = f,    c the constants added after the cut (biases, running means, …)

(FullGrad-completeness; Euler's theorem). Linear maps, convolutions, ReLU, pooling, residuals and layer scale are.
For the others a rule leaves the value and replaces the gradient by that of a form that is, where sg is a constant
to the backward pass (stop-gradient):

    layer and group norm    (x − mean x)·sg(1/σ)·w + b          inverse RMS norm    x·sg(1/rms)·w
    GELU, SiLU, ReLU6, …    x·sg(f(x)/x)                        L2 normalisation    x·sg(1/‖x‖)
    attention               sg(softmax(QKᵀ))·V                  gates               x·sg(sigmoid(·))
    products a·b            ½·(a·sg(b) + sg(a)·b)

A product of two functions of the input has degree two: its gradient counts it twice and is halved. This is the gated
MLP, SiLU(g)·u: the activation's own gate is a constant, which makes it of degree one in g, and the product is halved
between g and u.

The rules hold per operation, not per type of module, so architectures need no code of their own; an operation that is
not known to be homogeneous and has no rule is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .checks import checked
from .precision import switched_off
from .protection import undisturbed


@contextmanager
@checked
def libra(module: nn.Module) -> Iterator[None]:
    """Inside, calls of ``module`` have the gradients of LibraGrad; what they return is the same.

    Gradients of attention weights with respect to what follows them exist all the same. The module is in evaluation
    mode, its parameters are frozen, and checkpointing is off, which would repeat the pass without the rules. All is
    as before on exit. May be nested: the rules applied to themselves change nothing.

    The rules see what is called through PyTorch's Python interface; TorchScript modules are refused, what torch.compile
    made runs uncompiled, an operation inside a custom ``autograd.Function`` keeps the gradient that it defines.

    Raises:
        ValueError: on entry for a TorchScript module, and in the pass for an operation without a rule, in one line.
    """
    for part in module.modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise ValueError(
                f"libra cannot see into a compiled {type(part).__name__}: give the module as it was before"
            )
    with undisturbed(module), switched_off(module, "grad_checkpointing"):
        before = vars(module).get("forward")
        forward = module.forward

        def under_the_rules(*args: Any, **kwargs: Any) -> Any:
            with _Rules():
                out = forward(*args, **kwargs)
            if torch.is_grad_enabled() and any(_alive(t) for t in _tensors((args, kwargs))):
                for t in _tensors(out):
                    if t.is_floating_point() and not _alive(t):
                        raise ValueError(
                            f"no gradient reaches the output of {type(module).__name__} under libra, because a gate or "
                            "a softmax is its last word: give a classifier that returns logits"
                        )
            return out

        # an instance attribute hides the class's forward until it is deleted
        vars(module)["forward"] = under_the_rules
        try:
            yield
        finally:
            if before is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = before


class _Rules(TorchFunctionMode):
    """Applies the rules to every operation on something that depends on the input."""

    def __torch_function__(self, func: Callable, types: Any, args: Sequence = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        given = list(_tensors((args, kwargs)))
        if not (torch.is_grad_enabled() and any(map(_alive, given))):
            out = func(*args, **kwargs)
            if any(_pruned(t) for t in given):
                _prune(out)
            return out
        name = operation(func)
        if name in _RULES:
            return _RULES[name](func, *args, **kwargs)
        out = func(*args, **kwargs)
        if name not in _HOMOGENEOUS and any(t.requires_grad for t in _tensors(out)):
            _refuse(name)
        return out


def operation(func: Callable) -> str:
    """The operation's name: ``Tensor.__iadd__``, ``Tensor.add_`` and ``torch.add`` are all "add"."""
    name = getattr(func, "__name__", str(func)).strip("_")
    return _SPELLINGS.get(name, name)


def depends(value: Any) -> bool:
    """Whether ``value`` is a tensor with a gradient path to the input, pruned ones not counted."""
    return isinstance(value, Tensor) and _alive(value)


# what the input still flows through: pruned tensors carry a mark, and what is computed from them alone inherits it


def _alive(tensor: Tensor) -> bool:
    return tensor.requires_grad and not _pruned(tensor)


def _pruned(tensor: Tensor) -> bool:
    return getattr(tensor, "_libra_pruned", False)


def _prune(out: Any) -> Any:
    for tensor in _tensors(out):
        tensor._libra_pruned = True  # type: ignore[attr-defined]
    return out


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(tuple(values.values()))


# the rules; each gets the function and its arguments


class _Carry(torch.autograd.Function):
    """The value of the one, the gradient of the other."""

    @staticmethod
    def forward(_ctx: Any, value: Tensor, surrogate: Tensor) -> Tensor:
        return value.view_as(value)

    @staticmethod
    def backward(_ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def _layer_norm(
    func: Callable,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    value = func(input.detach(), normalized_shape, weight, bias, eps)
    dims = tuple(range(-len(normalized_shape), 0))
    centred = input - input.mean(dims, keepdim=True)
    scale = (centred.detach().square().mean(dims, keepdim=True) + eps).rsqrt()
    return _Carry.apply(value, _affine(centred * scale, weight, bias))


def _group_norm(
    func: Callable,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    value = func(input.detach(), num_groups, weight, bias, eps)
    groups = input.reshape(len(input), num_groups, -1)
    centred = groups - groups.mean(-1, keepdim=True)
    scale = (centred.detach().square().mean(-1, keepdim=True) + eps).rsqrt()
    channels = (-1, *(1,) * (input.ndim - 2))
    weight, bias = (None if p is None else p.view(channels) for p in (weight, bias))
    return _Carry.apply(value, _affine((centred * scale).reshape(input.shape), weight, bias))


def _rms_norm(
    func: Callable,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Tensor:
    value = func(input.detach(), normalized_shape, weight, eps)
    dims = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    scale = (input.detach().square().mean(dims, keepdim=True) + eps).rsqrt()
    return _Carry.apply(value, _affine(input * scale, weight, None))


def _normalize(
    func: Callable, input: Tensor, p: float = 2.0, dim: int | tuple[int, ...] = 1, eps: float = 1e-12, out: None = None
) -> Tensor:
    value = func(input.detach(), p, dim, eps)
    return _Carry.apply(value, input / torch.linalg.vector_norm(input.detach(), p, dim, keepdim=True).clamp_min(eps))


def _activation(slope_at_zero: float) -> Callable:
    """f(x) = x·gate(x) with a constant gate f(x)/x, at x = 0 its limit f'(0)."""

    def rule(func: Callable, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        constant = input.detach()
        in_place = kwargs.get("inplace") is True or any(a is True for a in args)
        # in place it would overwrite the input that the gate multiplies
        value = func(constant.clone() if in_place else constant, *args, **kwargs)
        return _Carry.apply(value, input * torch.where(constant == 0, slope_at_zero, value / constant))

    return rule


def _gate(func: Callable, *args: Any, **kwargs: Any) -> Tensor:
    # a leaf of its own: methods may ask for the gradient of the attention, which then ends there
    return _prune(func(*args, **kwargs).detach().requires_grad_())


def _variance_and_mean(func: Callable, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    variance, mean = func(*args, **kwargs)
    return _prune(variance.detach()), mean


def _attention(func: Callable, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    args = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
    kwargs = {k: v.detach() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    return func(query.detach(), key.detach(), value, *args, **kwargs)


def _product(func: Callable, input: Any, other: Any, **kwargs: Any) -> Tensor:
    if not (depends(input) and depends(other)):
        return func(input, other, **kwargs)
    if _in_place(func):
        _refuse(f"{operation(func)} in place")
    return (func(input, other.detach(), **kwargs) + func(input.detach(), other, **kwargs)) / 2


def _quotient(func: Callable, input: Any, other: Any, **kwargs: Any) -> Tensor:
    if not depends(input):
        _refuse("division by something that depends on the input")
    return func(input, other.detach() if depends(other) else other, **kwargs)


def _at_most_one(func: Callable, *args: Any, **kwargs: Any) -> Tensor:
    """addcmul and einsum: linear unless two of the factors depend on the input."""
    factors = list(_tensors(args[1:]))
    if sum(map(_alive, factors)) > 1:
        _refuse(f"{operation(func)} of two factors that depend on the input")
    return func(*args, **kwargs)


def _pad(
    func: Callable, input: Tensor, pad: Sequence[int], mode: str = "constant", value: float | None = None
) -> Tensor:
    if value:
        _refuse(f"pad with {value}")
    return func(input, pad, mode, value)


def _in_place(func: Callable) -> bool:
    name = func.__name__
    return name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


def _refuse(what: str) -> None:
    raise ValueError(
        f"libra has no rule for {what} in {_caller()}: it accepts networks of linear maps, norms, gated activations, "
        "ReLU, softmax attention and products; choose a method that takes the gradient as it is"
    )


def _caller() -> str:
    """The type of the innermost module that is running."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module):
            return type(owner).__name__
        frame = frame.f_back
    return "the classifier"


_RULES: dict[str, Callable] = {
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "rms_norm": _rms_norm,
    "normalize": _normalize,
    "gelu": _activation(0.5),
    "silu": _activation(0.5),
    "hardswish": _activation(0.5),
    "mish": _activation(0.6),
    "relu6": _activation(0.5),
    "hardtanh": _activation(0.5),
    "var_mean": _variance_and_mean,
    "scaled_dot_product_attention": _attention,
    "div": _quotient,
    "addcmul": _at_most_one,
    "einsum": _at_most_one,
    "pad": _pad,
}
_RULES |= dict.fromkeys(("mul", "matmul", "bmm"), _product)
_RULES |= dict.fromkeys(("softmax", "sigmoid", "hardsigmoid", "var", "std", "norm", "vector_norm"), _gate)

_SPELLINGS = {
    "radd": "add",
    "iadd": "add",
    "rmul": "mul",
    "imul": "mul",
    "multiply": "mul",
    "rmatmul": "matmul",
    "isub": "sub",
    "subtract": "sub",
    "truediv": "div",
    "itruediv": "div",
    "divide": "div",
    "concat": "cat",
    "concatenate": "cat",
    "linalg_vector_norm": "vector_norm",
}

# fmt: off
# f(s·x) = s·f(x) for s > 0 up to constants that are added, which leaves the gradient as it is
_HOMOGENEOUS = frozenset(
    (
        "linear", "conv1d", "conv2d", "conv3d", "conv_transpose2d", "batch_norm", "dropout", "dropout2d", "add", "sub",
        "rsub", "neg", "sum", "mean", "abs", "amax", "amin", "relu", "leaky_relu", "prelu", "max_pool1d", "max_pool2d",
        "avg_pool1d", "avg_pool2d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "interpolate",
        "fold", "unfold", "pixel_shuffle", "pixel_unshuffle", "reshape", "reshape_as", "view", "view_as", "permute",
        "transpose", "swapaxes", "movedim", "t", "flatten", "unflatten", "unsqueeze", "squeeze", "expand", "expand_as",
        "repeat", "repeat_interleave", "tile", "roll", "flip", "contiguous", "clone", "to", "type", "type_as", "float",
        "double", "half", "bfloat16", "cat", "stack", "split", "chunk", "tensor_split", "unbind", "narrow", "select",
        "index_select", "gather", "getitem", "get", "requires_grad",
    )
)
# fmt: on
