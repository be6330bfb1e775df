"""Random calls of the operators, every one from a seed of its own: arguments as documented, or some of them spoiled.

`public_call` draws the arguments of a function of aha.kernels. `raw_call` takes what such a call hands to the compiled
operators, forward and backward, and spoils that: what no check in Python has seen.
"""

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from aha import kernels

FLOATS = (torch.float32, torch.float64)
IMAGES = (*FLOATS, torch.bfloat16, torch.float16)
TYPES = (*IMAGES, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64, torch.float8_e4m3fn)
LONG = 1 << 16  # of a dimension beside an empty one
# none that allocates much, loops long and succeeds
INTEGERS = (0, 1, 2, -1, -(2**31), 2**50, 2**62, 2**63 - 1, -(2**63))
NUMBERS = (0.0, 1.0, -1.0, 1e-30, 1e30, 1e300, float("inf"), float("-inf"), float("nan"))
# 2**70 is more than an operator takes at all
OBJECTS = (None, "text", True, [], [[1]], 1j, object(), float, 2**70, *INTEGERS, *NUMBERS)


class Draw:
    """Random choices and tensors of one call."""

    def __init__(self, *name: Any):
        self.random = random.Random(":".join(map(str, name)))
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(63))

    def one(self, *options: Any) -> Any:
        return self.random.choice(options)

    def chance(self, p: float) -> bool:
        return self.random.random() < p

    def between(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def integers(self, low: int, high: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator)


def _with_an_outlier(values: Tensor) -> Tensor:
    values.view(-1)[:1] = 1000
    return values


# what scores, images, gradients … may hold; only the last is not finite
VALUES: dict[str, Callable[[Draw, Tensor], Tensor]] = {
    "normal": lambda draw, x: x,
    "ties": lambda draw, x: x.round(),
    "equal": lambda draw, x: torch.full_like(x, draw.one(0, 0.5, 1, -3, 50)),
    "sorted": lambda draw, x: x.sort(dim=-1, descending=draw.chance(0.5)).values if x.ndim else x,
    "two clusters": lambda draw, x: 10 * x.sign() + 1e-3 * x,
    "heavy tails": lambda draw, x: x / draw.normal(tuple(x.shape)),
    "outlier": lambda draw, x: _with_an_outlier(x),
    "far": lambda draw, x: 50 + 0.01 * x,
    "large": lambda draw, x: x * 10.0 ** draw.between(1, 4),
    "huge": lambda draw, x: x * 1e30,
    "tiny": lambda draw, x: x * 1e-30,
    "broken": lambda draw, x: torch.where(x > 1, draw.one(*NUMBERS[-3:]), x),
}


def layout(draw: Draw, x: Tensor) -> Tensor:
    """The same values in memory of another kind; what lies between them is NaN, or the most negative integer."""
    kind = draw.one("as it is", "as it is", "margins", "steps", "permuted", "expanded", "negated")
    filler = torch.nan if x.is_floating_point() or x.is_complex() else torch.tensor(-(2**31)).to(x.dtype)
    if kind == "margins":
        before = [draw.between(0, 2) for _ in x.shape]
        around = x.new_full([b + n + draw.between(0, 2) for b, n in zip(before, x.shape, strict=True)], filler)
        inside = around[tuple(slice(b, b + n) for b, n in zip(before, x.shape, strict=True))]
        return inside.copy_(x)
    if kind == "steps":
        steps = [draw.one(1, 2, 3) for _ in x.shape]
        wide = x.new_full([n * step for n, step in zip(x.shape, steps, strict=True)], filler)
        return wide[tuple(slice(None, None, step) for step in steps)].copy_(x)
    if kind == "permuted":
        order = draw.random.sample(range(x.ndim), x.ndim)
        back = sorted(range(x.ndim), key=order.__getitem__)
        return x.permute(order).contiguous().permute(back)
    if kind == "expanded" and x.numel():  # here the values do change: all are the first of some dimension
        dim = draw.between(-x.ndim, -1) if x.ndim else None
        return x if dim is None else x.narrow(dim, 0, 1).expand(x.shape)
    if kind == "negated" and x.dtype in IMAGES:
        return torch._neg_view(-x)
    return x


def floats(draw: Draw, shape: tuple[int, ...], dtype: torch.dtype, kinds: tuple[str, ...] = tuple(VALUES)) -> Tensor:
    values = VALUES[draw.one("normal", *kinds)](draw, draw.normal(shape))
    return layout(draw, values.to(dtype))


def _batch(draw: Draw) -> int:
    return draw.one(1, 1, 2, 2, 3, 5, 0)


def _regions(draw: Draw, most: int = 80) -> int:
    k = draw.one(1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 80, 127, 128, 129, 260)
    return k if k <= most or draw.chance(0.05) else draw.between(1, 16)


def _fractions(draw: Draw) -> Any:
    given = sorted(draw.one(draw.random.random(), draw.random.random(), 0.0, 1.0) for _ in range(draw.between(0, 5)))
    if draw.chance(0.5):
        return given
    return layout(draw, torch.tensor(given, dtype=draw.one(*IMAGES)))


def _ranking(draw: Draw, most: int) -> dict[str, Any]:
    tau: Any = draw.one(0.01, 0.05, 0.3, 1.0, 10.0 ** draw.between(-30, 30))
    if draw.chance(0.3):
        tau = torch.tensor(tau, dtype=draw.one(*FLOATS))
    given: dict[str, Any] = {"tau": tau, "n_iters": draw.one(1, 2, 3, 5, 10, draw.between(1, most))}
    if draw.chance(0.3):
        given |= {"noise": draw.one(0.0, 0.1, 1.0, 1e-30, 10.0)}
        given |= {"seed": draw.one(0, 1, 2**64 - 1, torch.tensor(draw.between(-(2**63), 2**63 - 1)))}
    return given


def _log_sinkhorn(draw: Draw) -> dict[str, Any]:
    k = _regions(draw, 33)
    return {"logits": floats(draw, (_batch(draw), k, k), draw.one(*FLOATS)), "n_iters": draw.one(1, 2, 3, 10)}


def _gumbel_sinkhorn(draw: Draw) -> dict[str, Any]:
    return {"scores": floats(draw, (_batch(draw), _regions(draw)), draw.one(*IMAGES)), **_ranking(draw, 30)}


def _cumulative_masks(draw: Draw) -> dict[str, Any]:
    k = _regions(draw, 33)
    return {"permutation": floats(draw, (_batch(draw), k, k), draw.one(*FLOATS)), "fractions": _fractions(draw)}


def _soft_topk_masks(draw: Draw) -> dict[str, Any]:
    return _gumbel_sinkhorn(draw) | {"fractions": _fractions(draw)}


def _soft_sort(draw: Draw) -> dict[str, Any]:
    return {"values": floats(draw, (_batch(draw), _regions(draw)), draw.one(*IMAGES)), **_ranking(draw, 60)}


def _soft_topk(draw: Draw) -> dict[str, Any]:
    given = _soft_sort(draw)
    return given | {"k": draw.between(0, given["values"].shape[1])}


def _taps(draw: Draw, pixels: int, size: int) -> kernels.Taps:
    shape = (pixels, draw.one(0, 1, 2, 2, 3, 7))
    cell, weight = draw.integers(0, size, shape), floats(draw, shape, draw.one(*FLOATS), ("ties", "equal", "large"))
    return kernels.Taps(layout(draw, cell), weight, size)


def _pixels(draw: Draw) -> dict[str, Any]:
    shape = (_batch(draw), draw.one(1, 3, 3, 4, 0), *(draw.one(1, 2, 5, 8, 17, 33, 0) for _ in range(2)))
    if draw.chance(0.02):  # several tiles
        shape = (*shape[:2], draw.between(1, 5), 1500)
    images = floats(draw, shape, draw.one(*IMAGES))
    references = floats(draw, (draw.one(shape[0], shape[0], 1), *shape[1:]), images.dtype)
    given: dict[str, Any] = {"images": images, "references": references}
    if draw.chance(0.5):
        given["mean"] = floats(draw, shape[1:2], draw.one(*FLOATS), ("equal",))
    if draw.chance(0.5):
        given["std"] = layout(draw, 0.1 + draw.normal(shape[1:2]).abs().to(draw.one(*FLOATS)))
    if draw.chance(0.3):
        given["dtype"] = draw.one(*IMAGES)
    return given


def _perturb(draw: Draw) -> dict[str, Any]:
    given = _pixels(draw)
    batch, _, height, width = given["images"].shape
    rows, cols = _taps(draw, height, draw.between(1, 6)), _taps(draw, width, draw.between(1, 6))
    masks = floats(draw, (batch, draw.between(0, 4), rows.size * cols.size), draw.one(*IMAGES))
    return given | {"masks": masks, "upsampler": kernels.Upsampler(rows, cols)}


def _perturb_by_rank(draw: Draw) -> dict[str, Any]:
    given = _pixels(draw)
    batch, _, height, width = given["images"].shape
    ranks = draw.integers(-3, height * width + 3, (batch, height, width)).to(draw.one(torch.int64, torch.int32))
    counts = draw.integers(0, height * width + 1, (draw.between(0, 4),))
    counts = counts.tolist() if draw.chance(0.3) else layout(draw, counts)
    return given | {"ranks": layout(draw, ranks), "counts": counts}


PUBLIC: dict[str, Callable[[Draw], dict[str, Any]]] = {
    "log_sinkhorn": _log_sinkhorn,
    "gumbel_sinkhorn": _gumbel_sinkhorn,
    "cumulative_masks": _cumulative_masks,
    "soft_topk_masks": _soft_topk_masks,
    "soft_sort": _soft_sort,
    "soft_rank": _soft_sort,
    "soft_topk": _soft_topk,
    "perturb": _perturb,
    "perturb_by_rank": _perturb_by_rank,
}


def public_call(draw: Draw, operator: str) -> tuple[dict[str, Any], bool]:
    """Arguments of a function of aha.kernels, and whether they are as documented, finite or not."""
    given, spoiled = PUBLIC[operator](draw), draw.chance(0.3)
    if spoiled:
        name = draw.one(*given)
        given[name] = spoil(draw, given[name])
    return given, not spoiled


def spoil(draw: Draw, value: Any) -> Any:
    """Another value in its place: for a tensor mostly another tensor."""
    if isinstance(value, kernels.Upsampler) and draw.chance(0.8):
        return value[::-1] if draw.chance(0.5) else type(value)(draw.one(value.rows, None), draw.one(value.cols, 3))
    if not isinstance(value, Tensor) or draw.chance(0.05):
        return draw.one(*OBJECTS, torch.tensor(1.0), torch.zeros(2), torch.zeros(0, dtype=torch.int64))
    return spoil_tensor(draw, value)


def spoil_tensor(draw: Draw, x: Tensor) -> Tensor:
    if x.is_meta or x.layout != torch.strided or max(x.shape, default=0) > LONG:  # as bad as it gets
        return x
    grow = draw.one(*range(x.ndim)) if x.ndim else None
    ways: dict[str, Callable[[], Tensor]] = {
        "type": lambda: x.to(draw.one(*TYPES)),
        "dimension more": lambda: x[None] if draw.chance(0.5) else x[..., None],
        "no dimension": lambda: x.new_zeros(()),
        "meta": lambda: x.to("meta"),
        "sparse": lambda: x.float().to_sparse(),
        "layout": lambda: layout(draw, x),
        "values": lambda: _extremes(draw, x),
    }
    if grow is not None:
        ways |= {
            "shorter": lambda: x.narrow(grow, 0, max(x.shape[grow] - 1, 0)),
            "longer": lambda: torch.cat([x, x.narrow(grow, 0, min(x.shape[grow], 1))], grow),
            "empty": lambda: x.narrow(grow, 0, 0),
            "transposed": lambda: x.mT if x.ndim > 1 else x,
            "repeated": lambda: x.narrow(grow, 0, min(1, x.shape[grow])).expand(
                [-1 if d != grow or not x.shape[d] else draw.between(0, 9) for d in range(x.ndim)]
            ),
        }
    if grow:
        beside = {grow - 1: LONG + 1, grow: 0}
        ways |= {
            "dimension fewer": lambda: x.flatten(grow - 1, grow),
            "long and empty": lambda: x.new_empty([beside.get(d, n) for d, n in enumerate(x.shape)]),
        }
    return ways[draw.one(*ways)]()


def _extremes(draw: Draw, x: Tensor) -> Tensor:
    """Some entries replaced by what arithmetic or indexing may stumble over."""
    where = draw.normal(tuple(x.shape)) > draw.one(-9, 0, 1.5)
    if x.dtype in (torch.int64, torch.int32):
        limits = torch.iinfo(x.dtype)
        return torch.where(where, torch.tensor(draw.one(-1, 1, 6, 1000, limits.min, limits.max), dtype=x.dtype), x)
    return torch.where(where, draw.one(*NUMBERS), x.double()).to(x.dtype)


class Recorder(TorchDispatchMode):
    """Keeps the calls of the compiled operators made under it: (operator, arguments)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, list[Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aha" and not kwargs:
            self.calls.append((func, list(args)))
        return func(*args, **(kwargs or {}))


# which public function makes calls of which compiled operator; each also of its backward pass
COMPILED: dict[str, tuple[str, ...]] = {
    "gumbel_sinkhorn": ("gumbel_sinkhorn", "soft_topk_masks", "soft_sort", "soft_rank", "soft_topk"),
    "log_sinkhorn": ("log_sinkhorn",),
    "cumulative_masks": ("cumulative_masks",),
    "perturb": ("perturb",),
    "perturb_by_rank": ("perturb_by_rank",),
}


def raw_call(draw: Draw, operator: str, backward: bool) -> tuple[Any, list[Any]] | None:
    """A compiled operator and arguments for it, one to three spoiled; None where the public call was refused."""
    public = draw.one(*COMPILED[operator])
    given = PUBLIC[public](draw)
    with Recorder() as recorder:
        try:
            outputs, inputs = differentiable(public, given, "cpu")
            torch.autograd.grad(outputs, inputs, [torch.ones_like(out) for out in outputs])
        except (ValueError, RuntimeError):
            pass  # tau too low, or the dtype is not for this backend
    name = f"{operator}_backward" if backward else operator
    calls = [(func, args) for func, args in recorder.calls if func._opname == name]
    if not calls:
        return None
    func, args = draw.one(*calls)
    args = [arg.detach() if isinstance(arg, Tensor) else arg for arg in args]
    for _ in range(draw.one(1, 1, 1, 2, 3)):
        at = draw.between(0, len(args) - 1)
        args[at] = _spoil_argument(draw, func._schema.arguments[at], args[at])
    return func, args


def _spoil_argument(draw: Draw, argument: Any, value: Any) -> Any:
    kind = str(argument.type)
    if isinstance(value, Tensor):
        return None if "Optional" in kind and draw.chance(0.2) else spoil_tensor(draw, value)
    if "Tensor" in kind:  # absent so far
        return draw.one(torch.zeros(1), torch.zeros(2, 3), torch.zeros((), dtype=torch.int64))
    if argument.name == "dtype":  # its integer
        return draw.one(*TYPES, torch.complex128, torch.qint8, None)
    if kind == "bool":
        return not value
    if kind == "float":
        return draw.one(*NUMBERS)
    return draw.one(*INTEGERS, value + 1, max(value - 1, 0))


def differentiable(operator: str, given: dict[str, Any], backend: str) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs of a public function, and those of its arguments that a gradient goes to."""
    inputs = []
    for name in ("logits", "scores", "permutation", "values", "tau", "images", "references", "masks"):
        value = given.get(name)
        if isinstance(value, Tensor) and value.is_floating_point():
            given = given | {name: value.detach().requires_grad_()}
            inputs.append(given[name])
    outputs = getattr(kernels, operator)(**given, backend=backend)
    return list(outputs) if isinstance(outputs, tuple) else [outputs], inputs
