"""The public operators: what each computes, and the checks at the door. Inner functions trust these.

Shapes: B images, K regions (cells of a grid, row-major), S fractions, C channels, H×W pixels.
Every function takes ``backend="auto" | "cuda" | "triton" | "cpu" | "reference"``; see `aha.kernels.explain`.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import isfinite
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import convergent, dispatch, random
from .convergent import readable
from .dispatch import Call, Choice
from .messages import MOST_NUMBERS, describe, is_plain, short

_FLOATS = (torch.float32, torch.float64)
_IMAGE_FLOATS = (*_FLOATS, torch.bfloat16, torch.float16)
_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_MOST_ITERATIONS = 10**6  # two numbers of every row are kept for each
# Rounding of a logarithm that still makes a number: e^16 is far from infinity. Scores of standard deviation 100 reach
# it at τ = 1e-3 in float32.
_ROUNDING = 16.0
_MOST_PIXELS = 2**31 - 1
_KEPT_WEIGHTS = 2**16  # numbers; larger weights of rank rows are made anew by every call


@dataclass(frozen=True, eq=False)
class Taps:
    """A banded matrix (pixels × cells) as its non-zeros: pixel p reads ``Σ_t weight[p, t] · grid[cell[p, t]]``.

    Checked once, here: all backends rely on it. Values are read for that, also from a GPU, but not again by ``to``.
    Where they cannot be read (under torch.compile, export or vmap, on meta), only types and shapes are checked.

    Attributes:
        cell: (P, T) int64, values in [0, size); padding taps have weight 0 and any valid cell.
        weight: (P, T) float32 or float64, finite, on the same device.
        size: number of cells, ≥ 1.

    Raises:
        ValueError: types, shapes or values are not these.
    """

    cell: Tensor
    weight: Tensor
    size: int

    def __post_init__(self) -> None:
        _check_integer("size", self.size, 1)
        if not is_plain(self.cell) or self.cell.dtype != torch.int64 or self.cell.ndim != 2:
            raise ValueError(f"cell is {describe(self.cell)}: give (P, T) int64")
        if not is_plain(self.weight) or self.weight.dtype not in _FLOATS or self.weight.shape != self.cell.shape:
            raise ValueError(f"weight is {describe(self.weight)}: give float32 of shape {tuple(self.cell.shape)}")
        _check_device(self.cell, self.weight)
        if not self.cell.numel() or not readable(self.cell) or not readable(self.weight):
            return
        low, high = (int(x) for x in self.cell.aminmax())
        if low < 0 or high >= self.size:
            raise ValueError(f"cell spans {low} … {high}: cells must lie in 0 … size − 1 = {self.size - 1}")
        if not self.weight.isfinite().all():
            raise ValueError("weight holds NaN or infinite values: give finite ones")

    def to(self, device: torch.device | str) -> "Taps":
        """The same taps on another device; ValueError if PyTorch knows none of that name."""
        try:
            return _checked_taps((self.cell.to(device), self.weight.to(device)), self.size)
        except (RuntimeError, TypeError, ValueError, OverflowError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"device={short(device)}: give one of this machine, such as 'cpu' ({reason})") from error

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The (P, size) matrix, in a floating point ``dtype``."""
        if not isinstance(dtype, torch.dtype) or dtype not in _IMAGE_FLOATS:
            raise ValueError(f"dtype={short(dtype)}: give float32, float64, bfloat16 or float16")
        matrix = self.weight.new_zeros(self.cell.shape[0], self.size, dtype=dtype)
        return matrix.scatter_add_(1, self.cell, self.weight.to(dtype))


class Upsampler(NamedTuple):
    """Separable upsampling of a grid of cells to pixels: ``rows.dense() @ grid @ cols.dense().T``.

    Made by `aha.regions`; any pair of `Taps` will do (nearest, bilinear, nearest then Gaussian …).
    """

    rows: Taps
    cols: Taps

    def to(self, device: torch.device | str) -> "Upsampler":
        """The same upsampler on another device."""
        return Upsampler(*(taps.to(device) for taps in self))


def _checked_taps(parts: Any, size: int) -> Taps:
    """Taps of parts that were those of others, which are not checked again."""
    taps = object.__new__(Taps)
    for name, value in zip(("cell", "weight", "size"), (*parts, size), strict=True):
        object.__setattr__(taps, name, value)
    return taps


# arguments of functions that are exported or mapped are taken apart and put together again, around any values
pytree.register_pytree_node(
    Taps,
    lambda taps: ([taps.cell, taps.weight], taps.size),
    _checked_taps,
    serialized_type_name="aha.kernels.Taps",
    flatten_with_keys_fn=lambda taps: (
        [(pytree.GetAttrKey("cell"), taps.cell), (pytree.GetAttrKey("weight"), taps.weight)],
        taps.size,
    ),
)


def log_sinkhorn(logits: Tensor, n_iters: int = 30, *, backend: str = "auto") -> Tensor:
    """Sinkhorn normalisation in the log domain; row then column, columns last (paper §3.2).

    Args:
        logits: (B, K, K) float32 or float64, finite, K ≥ 1. Entries may be as low as they like; the largest of a row or
            column must be a size that the type resolves (1e8 in float32), which is checked on the CPU.
        n_iters: pairs of normalisations, ≥ 1; exactly so many are made.

    Returns:
        (B, K, K) log P. Columns of P sum to 1 to rounding, rows as far as the iterations converged.
    """
    return dispatch.run(_log_sinkhorn(logits, n_iters), backend)


def gumbel_sinkhorn(
    scores: Tensor,
    tau: float | Tensor,
    n_iters: int = 30,
    noise: float = 0.0,
    seed: int | Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Soft permutation that sorts ``scores`` in descending order (paper §3.2).

    P = Sinkhorn(L), L_ij = (−(a_j − p_i)² + noise·γ_ij)/τ with rank targets p = linspace(1, 0, K) and γ ~ Gumbel(0, 1).

    Args:
        scores: (B, K), float32 or float64 (half precision is computed in float32), K ≥ 1. Their squares over tau must
            be a size that the type resolves (1e8 in float32), which is checked on the CPU.
        tau: temperature > 0; a number or a 0-dim tensor, which receives a gradient.
        n_iters: Sinkhorn iterations ≥ 1; exactly so many are made.
        noise: scale of the Gumbel noise ≥ 0.
        seed: of the noise, in [0, 2⁶⁴), or a 0-dim int64 tensor; None draws one from PyTorch's default generator of
            the device, also inside a captured CUDA graph.

    Returns:
        (B, K, K) P; row i is the soft indicator of the region at rank i (0 = most important), columns sum to 1.
    """
    return dispatch.run(_gumbel_sinkhorn(scores, tau, n_iters, noise, seed), backend)


def cumulative_masks(permutation: Tensor, fractions: Tensor | Sequence[float], *, backend: str = "auto") -> Tensor:
    """Soft masks that keep the top fraction of the regions: cumulative sums over rank rows (paper §3.2).

    Args:
        permutation: (B, K, K), row i = rank i.
        fractions: (S,) ascending, in [0, 1]; a fraction that falls between two ranks interpolates linearly.

    Returns:
        (B, S, K) masks in [0, 1] if the columns of ``permutation`` sum to 1.
    """
    return dispatch.run(_cumulative_masks(permutation, fractions), backend)


def soft_topk_masks(
    scores: Tensor,
    fractions: Tensor | Sequence[float],
    tau: float | Tensor,
    n_iters: int = 30,
    noise: float = 0.0,
    seed: int | Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """``cumulative_masks(gumbel_sinkhorn(scores, tau, …), fractions)`` as one operator: (B, K) → (B, S, K).

    Arguments and ranges as in those two functions. A fused backend never stores P.
    """
    return dispatch.run(_soft_topk_masks(scores, fractions, tau, n_iters, noise, seed), backend)


def soft_sort(
    values: Tensor,
    tau: float | Tensor = 0.01,
    n_iters: int = 200,
    noise: float = 0.0,
    seed: int | Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Differentiable sort in descending order: (B, K) → (B, K), at every rank a soft choice among the values.

    For losses on order statistics: quantiles, trimmed means, the largest of many. Values are standardised per row
    before they are ranked, so ``tau`` has no unit: at 1 every rank holds nearly the mean, and the lower, the closer to
    the sorted values, down to 1e-5. Scale does not matter: values·1e38 sort as the values do, and so do their first
    derivatives; second ones (``backend="reference"``) hold to 1e19.

    Iterations start at the hard sort and end, for each row, when every rank's weights sum to 1 ± 0.005; if they do not,
    a warning says so once. The gradient is exact for this start and the iterations made, and as close to the gradient
    of the limit as P is to its limit. Noise is added to the scores of the ranks as in `gumbel_sinkhorn`.

    Args:
        values: (B, K) floating point, K ≥ 1. NaN or infinity in a row makes that row NaN.
        tau: as in `gumbel_sinkhorn`; below 1e-6, float32 cannot tell more.
        n_iters: the most iterations, ≥ 1. Exactly so many are made where values cannot be read: under torch.compile,
            export, vmap and the capture of a CUDA graph.
        noise, seed: as in `gumbel_sinkhorn`.

    Raises:
        ValueError: an argument is not as above.
    """
    return dispatch.run(_soft_sort(values, tau, n_iters, noise, seed), backend)


def soft_rank(
    values: Tensor,
    tau: float | Tensor = 0.01,
    n_iters: int = 200,
    noise: float = 0.0,
    seed: int | Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Differentiable ranks, 0 for the largest value, K − 1 for the smallest: (B, K) → (B, K).

    For losses on ranks, such as Spearman's correlation. Equal values share the mean of their ranks. Arguments, accuracy
    and gradient as in `soft_sort`.
    """
    return dispatch.run(_soft_rank(values, tau, n_iters, noise, seed), backend)


def soft_topk(
    values: Tensor,
    k: int,
    tau: float | Tensor = 0.01,
    n_iters: int = 200,
    noise: float = 0.0,
    seed: int | Tensor | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Differentiable indicator of the ``k`` largest values: (B, K) → (B, K) in [0, 1], rows sum to ``k`` ± 0.005·k.

    For a choice of k among many that a loss can move. ``k`` is an integer in 0 … K; other arguments, accuracy and
    gradient as in `soft_sort`.
    """
    return dispatch.run(_soft_topk(values, k, tau, n_iters, noise, seed), backend)


def perturb(
    images: Tensor,
    references: Tensor,
    masks: Tensor,
    upsampler: Upsampler,
    mean: Tensor | None = None,
    std: Tensor | None = None,
    dtype: torch.dtype | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Upsample soft masks to pixels and blend: both the deletion and the insertion images (paper §3.1).

    With m the upsampled mask: inserted = m·image + (1 − m)·reference, deleted = (1 − m)·image + m·reference;
    both then become (y − mean)/std in ``dtype``. Differentiable in images, references and masks.

    Args:
        images: (B, C, H, W) floating point.
        references: (B, C, H, W) or (1, C, H, W), same dtype.
        masks: (B, S, K) in [0, 1], float32 or float64; K = upsampler.rows.size · upsampler.cols.size.
        upsampler: row and column taps for H and W pixels.
        mean, std: (C,) or None.
        dtype: of the outputs; default that of the images.

    Returns:
        deleted, inserted: (B, S, C, H, W).
    """
    return dispatch.run(_perturb(images, references, masks, upsampler, mean, std, dtype), backend)


def perturb_by_rank(
    images: Tensor,
    references: Tensor,
    ranks: Tensor,
    counts: Tensor | Sequence[int],
    mean: Tensor | None = None,
    std: Tensor | None = None,
    dtype: torch.dtype | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Hard deletion and insertion images: a pixel is kept where ``rank < count`` (paper §3.1, evaluation).

    Args:
        images, references, mean, std, dtype: as in `perturb`.
        ranks: (B, H, W) integer; 0 = most important pixel.
        counts: (S,) integer numbers of pixels, in [0, H·W].

    Returns:
        deleted (top ``count`` pixels replaced), inserted (only they shown): (B, S, C, H, W).
    """
    return dispatch.run(_perturb_by_rank(images, references, ranks, counts, mean, std, dtype), backend)


def _log_sinkhorn(logits: Tensor, n_iters: int) -> Call:
    _check_float("logits", logits, 3)
    _check_square("logits", logits)
    n_iters = _check_integer("n_iters", n_iters, 1, _MOST_ITERATIONS)
    if logits.numel() and _on_cpu(logits):
        tops = (logits.detach().amax(dim).nan_to_num(0, 0, 0).abs().max() for dim in (-1, -2))
        _check_resolution("logits", max(map(float, tops)), logits.dtype, "shift rows and columns towards 0")
    return Call("log_sinkhorn", {"logits": logits, "n_iters": n_iters})


def _gumbel_sinkhorn(scores: Tensor, *ranking: Any) -> Call:
    scores = _check_scores("scores", scores)
    return Call("gumbel_sinkhorn", {"scores": scores, **_check_ranking(scores, *ranking)})


def _cumulative_masks(permutation: Tensor, fractions: Tensor | Sequence[float]) -> Call:
    _check_float("permutation", permutation, 3)
    _check_square("permutation", permutation)
    return Call("cumulative_masks", {"permutation": permutation, "left": _cumulative_weights(fractions, permutation)})


def _soft_topk_masks(scores: Tensor, fractions: Tensor | Sequence[float], *ranking: Any) -> Call:
    scores = _check_scores("scores", scores)
    left = _cumulative_weights(fractions, scores)
    return Call("soft_topk_masks", {"scores": scores, "left": left, **_check_ranking(scores, *ranking)})


def _soft_sort(values: Tensor, *ranking: Any) -> Call:
    values = _check_scores("values", values)
    size = _row_sizes(values)
    # the gradient leaves `convergent.read_right` in this unit
    scores, unit = _in_units(convergent.times_gradient(values, convergent.gradient_unit(size)), size)
    return Call("soft_sort", {"scores": scores, "right": unit, "size": size, **_check_ranking(scores, *ranking)})


def _soft_rank(values: Tensor, *ranking: Any) -> Call:
    scores = _check_values(values)
    left = torch.arange(scores.shape[1], dtype=scores.dtype, device=scores.device)
    return Call("soft_rank", {"scores": scores, "left": left, **_check_ranking(scores, *ranking)})


def _soft_topk(values: Tensor, k: int, *ranking: Any) -> Call:
    scores = _check_values(values)
    k = _check_integer("k", k, 0, scores.shape[1], ", the number of values")
    left = (torch.arange(scores.shape[1], device=scores.device) < k).to(scores.dtype)
    return Call("soft_topk", {"scores": scores, "left": left, **_check_ranking(scores, *ranking)})


def _perturb(images: Tensor, references: Tensor, masks: Tensor, upsampler: Upsampler, *output: Any) -> Call:
    pixels = _check_images(images, references, *output)
    masks = _check_float("masks", masks, 3, _IMAGE_FLOATS)
    if not (isinstance(upsampler, tuple) and len(upsampler) == 2 and all(isinstance(t, Taps) for t in upsampler)):
        raise ValueError(
            f"upsampler is {describe(upsampler)}: give an Upsampler, a pair of Taps (aha.regions makes one)"
        )
    rows, cols = upsampler
    _check_device(images, masks, rows.weight, cols.weight)
    batch, _, height, width = images.shape
    if masks.shape[0] != batch or masks.shape[2] != rows.size * cols.size:
        raise ValueError(
            f"masks has shape {tuple(masks.shape)}: give (B={batch}, S, K={rows.size}·{cols.size}), "
            "one value per cell of the upsampler"
        )
    if (rows.cell.shape[0], cols.cell.shape[0]) != (height, width):
        raise ValueError(
            f"the upsampler makes {rows.cell.shape[0]}×{cols.cell.shape[0]} pixels, images are {height}×{width}"
        )
    return Call("perturb", {**pixels, "masks": masks, "rows": rows, "cols": cols})


def _perturb_by_rank(images: Tensor, references: Tensor, ranks: Tensor, counts: Any, *output: Any) -> Call:
    pixels = _check_images(images, references, *output)
    batch, _, height, width = images.shape
    if not is_plain(ranks) or ranks.dtype not in _INTEGERS or ranks.shape != (batch, height, width):
        raise ValueError(f"ranks is {describe(ranks)}: give integers of shape {(batch, height, width)}")
    counts = _check_sequence("counts", counts, _INTEGERS, torch.int64, "integers")
    if counts.numel() and _on_cpu(counts) and (counts.min() < 0 or counts.max() > height * width):
        raise ValueError(
            f"counts span {int(counts.min())} … {int(counts.max())}: they must lie in 0 … H·W = {height * width}"
        )
    _check_device(images, ranks)
    if height * width > _MOST_PIXELS:
        raise ValueError(
            f"images are {height}×{width}: give at most {_MOST_PIXELS} pixels, which ranks count in 32 bits"
        )
    counts = counts.to(images.device)
    narrow = (_narrow(x, height * width) for x in (ranks, counts))
    return Call("perturb_by_rank", {**pixels, **dict(zip(("ranks", "counts"), narrow, strict=True))})


def _narrow(numbers: Tensor, most: int) -> Tensor:
    """As int32; what is below 0 or above ``most`` stays so, and does not wrap."""
    return (numbers.clamp(-1, most) if numbers.dtype == torch.int64 else numbers).to(torch.int32)


# the public functions, and their checks, which take the same arguments up to ``backend``
OPERATORS: dict[str, tuple[Callable[..., Any], Callable[..., Call]]] = {
    "log_sinkhorn": (log_sinkhorn, _log_sinkhorn),
    "gumbel_sinkhorn": (gumbel_sinkhorn, _gumbel_sinkhorn),
    "cumulative_masks": (cumulative_masks, _cumulative_masks),
    "soft_topk_masks": (soft_topk_masks, _soft_topk_masks),
    "soft_sort": (soft_sort, _soft_sort),
    "soft_rank": (soft_rank, _soft_rank),
    "soft_topk": (soft_topk, _soft_topk),
    "perturb": (perturb, _perturb),
    "perturb_by_rank": (perturb_by_rank, _perturb_by_rank),
}


def explain(operator: str, *args: Any, **kwargs: Any) -> list[Choice]:
    """How ``backend="auto"`` would decide for this call: one `Choice` per backend, in the order of preference.

    >>> aha.kernels.explain("soft_topk_masks", scores, fractions, tau=0.3)

    Raises ValueError for an unknown operator, and whatever the operator itself raises for bad arguments.
    """
    if not isinstance(operator, str) or operator not in OPERATORS:
        raise ValueError(f"operator {short(operator)} is not known: choose one of {', '.join(OPERATORS)}")
    function, check = OPERATORS[operator]
    *parameters, _ = inspect.signature(function).parameters.values()
    given = inspect.Signature(parameters).bind(*args, **kwargs)
    given.apply_defaults()
    return dispatch.explain(check(*given.args))


def _check_device(*tensors: Tensor | None) -> None:
    devices = sorted({str(t.device) for t in tensors if t is not None})
    if len(devices) != 1:
        raise ValueError(f"tensors are on several devices ({', '.join(devices)}): move them to one")


def _check_float(name: str, value: Tensor, ndim: int, dtypes: tuple[torch.dtype, ...] = _FLOATS) -> Tensor:
    if not is_plain(value) or value.ndim != ndim or value.dtype not in dtypes:
        accepted = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{name} is {describe(value)}: give a {ndim}-dim tensor of {accepted}, dense and with values")
    if value.numel() > MOST_NUMBERS:
        raise ValueError(f"{name} is {describe(value)}: give at most {MOST_NUMBERS} numbers")
    return value if value.dtype in _FLOATS else value.float()


def _check_square(name: str, value: Tensor) -> None:
    if value.shape[-1] != value.shape[-2] or value.shape[-1] == 0:
        raise ValueError(f"{name} has shape {tuple(value.shape)}: give square matrices (B, K, K), K ≥ 1")


def _check_scores(name: str, scores: Tensor) -> Tensor:
    scores = _check_float(name, scores, 2, _IMAGE_FLOATS)
    if scores.shape[1] == 0:
        raise ValueError(f"{name} has shape {tuple(scores.shape)}: at least one region is needed")
    return scores


def _check_integer(name: str, value: int, low: int, high: int | None = None, of: str = "") -> int:
    if not isinstance(value, Integral) or isinstance(value, bool) or value < low or (high is not None and value > high):
        accepted = f"≥ {low}" if high is None else f"in {low} … {high}"
        raise ValueError(f"{name}={short(value)}: give an integer {accepted}{of}")
    return value if isinstance(value, int) else int(value)  # under torch.compile it may be symbolic, and stays so


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_values(values: Tensor) -> Tensor:
    """Scores (B,K) of mean ½."""
    values = _check_scores("values", values)
    return _in_units(values, _row_sizes(values))[0]


def _row_sizes(values: Tensor) -> Tensor:
    """(B,1) largest absolute value of every row, 1 where all are 0."""
    largest = torch.linalg.vector_norm(values.detach(), float("inf"), dim=1, keepdim=True)
    return torch.where(largest > 0, largest, 1.0)


def _in_units(values: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (B,K) of mean ½; the values in units of their row's size."""
    unit = values / size
    return _standardize(unit), unit


def _check_ranking(
    scores: Tensor, tau: float | Tensor, n_iters: int, noise: float, seed: int | Tensor | None
) -> dict[str, Any]:
    """The last arguments of every ranking operator: tau and seed as 0-dim tensors on the device of the scores."""
    n_iters = _check_integer("n_iters", n_iters, 1, _MOST_ITERATIONS)
    tau, value = _check_tau(tau, scores)
    if not _is_number(noise) or not 0 <= noise < float("inf"):
        raise ValueError(f"noise={short(noise)}: the scale of the Gumbel noise must be a number, finite and ≥ 0")
    if value is not None and scores.numel() and _on_cpu(scores):
        c = float(torch.linalg.vector_norm(scores.detach(), float("inf"))) + 0.5
        # the largest noise is 16.7; logits and the column potential, c²/τ, are what is rounded
        reach = (max(c, c * c) + 17 * float(noise)) / value
        if isfinite(c):  # images that are not finite become NaN, and no other
            _check_resolution(
                "logits (scores² or noise, over tau)", reach, scores.dtype, "raise tau or lower the scores"
            )
    if seed is None:
        seed = random.draw_seed(scores.device) if noise else 0
    if isinstance(seed, Tensor):
        if not is_plain(seed) or seed.ndim != 0 or seed.dtype != torch.int64:
            raise ValueError(f"seed is {describe(seed)}: give an integer or a 0-dim int64 tensor")
        seed = seed.to(scores.device)
    else:
        seed = random.as_seed(_check_integer("seed", seed, 0, 2**64 - 1), scores.device)
    return {"tau": tau, "n_iters": n_iters, "noise": float(noise), "seed": seed}


def _check_tau(tau: float | Tensor, scores: Tensor) -> tuple[Tensor, float | None]:
    """As a tensor in the type of the scores, and its value where that is known without waiting for a device."""
    value: float | None
    if isinstance(tau, Tensor):
        real = tau.is_floating_point() or tau.dtype in _INTEGERS
        if not is_plain(tau) or tau.ndim != 0 or not real:
            raise ValueError(f"tau is {describe(tau)}: give a number or a 0-dim tensor of real numbers")
        value = float(tau.detach()) if _on_cpu(tau) else None
    elif _is_number(tau):
        value = float(tau)
    else:
        raise ValueError(f"tau={short(tau)}: give a number or a 0-dim tensor, finite and > 0")
    if value is not None and not 0 < value < float("inf"):
        raise ValueError(f"tau={value}: the temperature must be finite and > 0")
    if value is not None and not torch.finfo(scores.dtype).tiny <= value <= torch.finfo(scores.dtype).max:
        held = str(scores.dtype).removeprefix("torch.")
        raise ValueError(f"tau={value} is not a number that {held} holds: give one in its range")
    if isinstance(tau, Tensor):
        return tau.to(scores), value
    return torch.full((), float(tau), dtype=scores.dtype, device=scores.device), value


def _check_resolution(name: str, reach: float, dtype: torch.dtype, remedy: str) -> None:
    """Refuse logarithms so large that their rounding alone is a factor e^`_ROUNDING`: any number could come of them."""
    if reach * torch.finfo(dtype).eps > _ROUNDING:
        held = str(dtype).removeprefix("torch.")
        better = "" if dtype == torch.float64 else ", or give float64"
        raise ValueError(
            f"{name} reach {reach:.1e}, which {held} resolves to {reach * torch.finfo(dtype).eps:.1e} only: "
            f"{remedy}{better}"
        )


def _on_cpu(value: Tensor) -> bool:
    """Whether its values can be read without waiting for a device."""
    return value.device.type == "cpu" and readable(value)


def _check_sequence(name: str, values: Any, dtypes: tuple[torch.dtype, ...], dtype: torch.dtype, what: str) -> Tensor:
    """A 1-dim tensor of one of ``dtypes``; sequences of numbers become ``dtype``, if they are of its kind."""
    given = values
    if not isinstance(values, Tensor):
        try:
            values = torch.as_tensor(values)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"{name}={short(given)}: give a 1-dim sequence of {what}") from None
        # integers are floats too, and nothing at all is anything
        if not values.numel() or (dtype.is_floating_point and values.dtype in _INTEGERS):
            values = values.to(dtype)
        elif values.is_floating_point() and dtype.is_floating_point:
            values = torch.as_tensor(given, dtype=dtype)
    if not is_plain(values) or values.ndim != 1 or values.dtype not in dtypes:
        raise ValueError(f"{name} is {describe(values)}: give a 1-dim sequence of {what}")
    return values


def _cumulative_weights(fractions: Tensor | Sequence[float], like: Tensor) -> Tensor:
    """(S, K): what share of each rank row belongs to the top fraction; linear between two ranks."""
    fractions = _check_sequence("fractions", fractions, _IMAGE_FLOATS, torch.float64, "floats in [0, 1]")
    k = like.shape[-1]
    if not _on_cpu(fractions):
        return _weights(fractions.double(), k).to(like)
    values = fractions.tolist()
    if not all(0 <= x <= 1 for x in values) or any(y < x for x, y in pairwise(values)):
        raise ValueError(f"fractions are {short(values)}: give ascending values in [0, 1]")
    if fractions.requires_grad or not readable(like) or len(values) * k > _KEPT_WEIGHTS:
        return _weights(fractions.double(), k).to(like)
    return _kept_weights(tuple(values), k, like.dtype).to(like.device)


def _weights(fractions: Tensor, k: int) -> Tensor:
    row = torch.arange(k, dtype=torch.float64, device=fractions.device)
    return (fractions[:, None] * k - row).clamp(0, 1)


@lru_cache(maxsize=32)
@torch.inference_mode(False)  # what is made for inference cannot be saved for a gradient later
def _kept_weights(fractions: tuple[float, ...], k: int, dtype: torch.dtype) -> Tensor:
    """Those of the last calls, on the CPU; not to be written to."""
    return _weights(torch.tensor(fractions, dtype=torch.float64, device="cpu"), k).to(dtype)


def _standardize(unit: Tensor) -> Tensor:
    """Each row with mean ½ and standard deviation 0.29, that of the rank targets; constant rows become ½.

    ``unit`` (B,K) has 1 as the largest absolute value of a row: no square of it overflows, or is lost.
    """
    deviation = unit - unit.mean(dim=1, keepdim=True)
    spread = deviation.square().mean(dim=1, keepdim=True)
    constant = spread <= (8 * torch.finfo(unit.dtype).eps) ** 2
    return 0.5 + 0.29 * deviation * torch.rsqrt(torch.where(constant, 1.0, spread))


def _check_images(
    images: Tensor, references: Tensor, mean: Tensor | None, std: Tensor | None, dtype: torch.dtype | None
) -> dict[str, Any]:
    """The arguments of both perturbations: references for all images, the dtype of the outputs."""
    value: Tensor | None
    for name, value in (("images", images), ("references", references)):
        if not is_plain(value) or value.ndim != 4 or value.dtype not in _IMAGE_FLOATS:
            raise ValueError(f"{name} is {describe(value)}: give floating point (B, C, H, W)")
        if value.numel() > MOST_NUMBERS:
            raise ValueError(f"{name} is {describe(value)}: give at most {MOST_NUMBERS} numbers")
    if references.dtype != images.dtype:
        raise ValueError(f"references are {references.dtype}, images {images.dtype}: give the same dtype")
    if references.shape[1:] != images.shape[1:] or references.shape[0] not in (1, images.shape[0]):
        raise ValueError(
            f"references has shape {tuple(references.shape)}: give that of the images, {tuple(images.shape)}, "
            "or one reference for all of them"
        )
    for name, value in (("mean", mean), ("std", std)):
        if value is None:
            continue
        if not is_plain(value) or value.is_complex() or tuple(value.shape) != (images.shape[1],):
            raise ValueError(f"{name} is {describe(value)}: give one value per channel, ({images.shape[1]},)")
    dtype = images.dtype if dtype is None else dtype
    if not isinstance(dtype, torch.dtype) or dtype not in _IMAGE_FLOATS:
        raise ValueError(f"dtype={short(dtype)}: give float32, float64, bfloat16 or float16")
    _check_device(images, references, mean, std)
    return {"images": images, "references": references.expand_as(images), "mean": mean, "std": std, "dtype": dtype}
