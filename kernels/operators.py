"""The compiled operators as PyTorch sees them: schemas, shapes, gradients and batching, once for every backend.

A backend is a namespace of ``torch.ops`` with these operators: "aha" (C++ and CUDA, csrc/) and "aha_triton".
`register` gives a namespace its fake kernels, autograd formulas and vmap rules; `Operators` calls it with the
arguments of the public functions. Formulas: Sinkhorn as in kernels/reference.py, its gradient from the saved scalings
alone (no K×K tensor is kept, the noise is drawn again).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# as in csrc/ops.cpp, which says what each tensor is
SCHEMAS = {
    "gumbel_sinkhorn": "(Tensor scores, Tensor tau, Tensor seed, Tensor? left, Tensor? right, int n_iters, "
    "float noise, Tensor? start) -> (Tensor out, Tensor scalings, Tensor absorbed)",
    "gumbel_sinkhorn_backward": "(Tensor grad, Tensor scores, Tensor tau, Tensor seed, Tensor? left, Tensor? right, "
    "Tensor scalings, Tensor absorbed, float noise, bool need_tau, Tensor? start)"
    " -> (Tensor grad_scores, Tensor grad_tau, Tensor grad_right, Tensor grad_start)",
    "log_sinkhorn": "(Tensor logits, int n_iters) -> (Tensor out, Tensor scalings, Tensor absorbed)",
    "log_sinkhorn_backward": "(Tensor grad, Tensor logits, Tensor scalings, Tensor absorbed) -> Tensor",
    "cumulative_masks": "(Tensor permutation, Tensor left) -> Tensor",
    "cumulative_masks_backward": "(Tensor grad, Tensor left) -> Tensor",
    "perturb": "(Tensor images, Tensor references, Tensor masks, Tensor row_cell, Tensor row_weight, Tensor col_cell, "
    "Tensor col_weight, int rows, int cols, Tensor? mean, Tensor? std, ScalarType? dtype)"
    " -> (Tensor deleted, Tensor inserted)",
    "perturb_backward": "(Tensor grad_deleted, Tensor grad_inserted, Tensor images, Tensor references, Tensor masks, "
    "Tensor row_cell, Tensor row_weight, Tensor col_cell, Tensor col_weight, int rows, int cols, Tensor? std, "
    "bool need_images) -> (Tensor grad_masks, Tensor grad_images, Tensor grad_references)",
    "perturb_by_rank": "(Tensor images, Tensor references, Tensor ranks, Tensor counts, Tensor? mean=None, "
    "Tensor? std=None, ScalarType? dtype=None) -> (Tensor deleted, Tensor inserted)",
    "perturb_by_rank_backward": "(Tensor grad_deleted, Tensor grad_inserted, Tensor ranks, Tensor counts, "
    "Tensor? std=None, ScalarType? dtype=None) -> (Tensor grad_images, Tensor grad_references)",
}

# arguments with one entry per image; vmap folds its dimension into theirs
_PER_IMAGE = {
    "gumbel_sinkhorn": {"scores", "right", "start"},
    "gumbel_sinkhorn_backward": {"grad", "scores", "right", "scalings", "absorbed", "start"},
    "log_sinkhorn": {"logits"},
    "log_sinkhorn_backward": {"grad", "logits", "scalings", "absorbed"},
    "cumulative_masks": {"permutation"},
    "cumulative_masks_backward": {"grad"},
    "perturb": {"images", "references", "masks"},
    "perturb_backward": {"grad_deleted", "grad_inserted", "images", "references", "masks"},
    "perturb_by_rank": {"images", "references", "ranks"},
    "perturb_by_rank_backward": {"grad_deleted", "grad_inserted", "ranks"},
}


class Operators:
    """The public functions on the operators of one namespace; arguments are checked and on one device."""

    def __init__(self, namespace: str):
        self.namespace = namespace

    def _op(self, name: str) -> Any:
        return getattr(getattr(torch.ops, self.namespace), name)

    def log_sinkhorn(self, logits: Tensor, n_iters: int) -> Tensor:
        return self._op("log_sinkhorn")(logits, n_iters)[0]

    def gumbel_sinkhorn(self, scores: Tensor, tau: Tensor, n_iters: int, noise: float, seed: Tensor) -> Tensor:
        return self._rank(scores, tau, n_iters, noise, seed)[0]

    def cumulative_masks(self, permutation: Tensor, left: Tensor) -> Tensor:
        return self._op("cumulative_masks")(permutation, increments(left)).cumsum(1)

    def soft_topk_masks(
        self, scores: Tensor, left: Tensor, tau: Tensor, n_iters: int, noise: float, seed: Tensor
    ) -> Tensor:
        return self._rank(scores, tau, n_iters, noise, seed, left=increments(left))[0].cumsum(1)

    def read_left(
        self, scores: Tensor, start: Tensor, left: Tensor, tau: Tensor, n_iters: int, noise: float, seed: Tensor
    ) -> tuple[Tensor, Tensor]:
        out, *state = self._rank(scores, tau, n_iters, noise, seed, left=left[None], start=start)
        return out[:, 0], _row_error(*state)

    def read_right(
        self, scores: Tensor, start: Tensor, right: Tensor, tau: Tensor, n_iters: int, noise: float, seed: Tensor
    ) -> tuple[Tensor, Tensor]:
        out, *state = self._rank(scores, tau, n_iters, noise, seed, right=right, start=start)
        return out, _row_error(*state)

    def _rank(self, scores, tau, n_iters, noise, seed, left=None, right=None, start=None) -> tuple[Tensor, ...]:
        """What is read out of P, its scalings and which of them were absorbed; see csrc/ops.cpp."""
        return self._op("gumbel_sinkhorn")(scores, tau, seed, left, right, n_iters, noise, start)

    def perturb(self, images, references, masks, rows, cols, mean, std, dtype) -> tuple[Tensor, Tensor]:
        computed = torch.float64 if images.dtype == torch.float64 else torch.float32
        taps = [part for taps in (rows, cols) for part in (taps.cell, taps.weight.to(computed))]
        masks, mean, std = masks.to(computed), _constant(mean, computed), _constant(std, computed)
        return self._op("perturb")(images, references, masks, *taps, rows.size, cols.size, mean, std, dtype)

    def perturb_by_rank(
        self, images, references, ranks, counts, mean=None, std=None, dtype=None
    ) -> tuple[Tensor, Tensor]:
        computed = torch.float64 if images.dtype == torch.float64 else torch.float32
        mean, std = _constant(mean, computed), _constant(std, computed)
        return self._op("perturb_by_rank")(images, references, ranks, counts, mean, std, dtype)


def _row_error(scalings: Tensor, absorbed: Tensor) -> Tensor:
    """(B,) largest |row sum − 1| of P before the last iteration, inf if there was one alone: u^T sets it right."""
    if scalings.shape[1] < 3:
        return scalings.new_full(scalings.shape[:1], torch.inf)
    # absorbed scalings are in the potentials: the next ones count from 1
    before = torch.where(absorbed[:, -2:-1] & 1 > 0, 1, scalings[:, -2, 0])
    return (before / scalings[:, -1, 0] - 1).detach().abs().amax(dim=1)


def _constant(values: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if values is None else values.detach().to(dtype)


def increments(left: Tensor) -> Tensor:
    """Cumulative weights (S,K) as their increments, whose running sum they are: one or two non-zeros per column."""
    return torch.diff(left, dim=0, prepend=left.new_zeros(1, left.shape[1]))


def register(namespace: str) -> None:
    """Fake kernels, gradients and vmap rules for the operators of ``namespace``, which must be defined."""
    for name, fake in _FAKES.items():
        torch.library.register_fake(f"{namespace}::{name}", fake)
    for name in _PER_IMAGE:
        torch.library.register_vmap(f"{namespace}::{name}", _vmap(namespace, name))
    ops = getattr(torch.ops, namespace)
    for name, (keep, backward) in _gradients(ops).items():
        torch.library.register_autograd(f"{namespace}::{name}", backward, setup_context=keep)


def _fake_gumbel_sinkhorn(scores, tau, seed, left, right, n_iters, noise, start):
    batch, k = scores.shape
    shape = (batch, k) if right is not None else (batch, k if left is None else left.shape[0], k)
    return scores.new_empty(shape), *_state(scores, n_iters)


def _fake_gumbel_sinkhorn_backward(grad, scores, tau, seed, left, right, scalings, absorbed, noise, need_tau, start):
    grad_tau = scores.new_empty(scores.shape[0] if need_tau else 0)
    grad_right = scores.new_empty(0) if right is None else scores.new_empty(scores.shape)
    grad_start = scores.new_empty(0) if start is None else scores.new_empty(scores.shape)
    return scores.new_empty(scores.shape), grad_tau, grad_right, grad_start


def _fake_log_sinkhorn(logits, n_iters):
    return logits.new_empty(logits.shape), *_state(logits, n_iters)


def _state(like: Tensor, n_iters: int) -> tuple[Tensor, Tensor]:
    batch, k = like.shape[0], like.shape[-1]
    return like.new_empty(batch, n_iters + 1, 2, k), like.new_empty(batch, n_iters, dtype=torch.int32)


def _fake_perturb(images, references, masks, rc, rw, cc, cw, rows, cols, mean, std, dtype):
    return _pair(images, masks.shape[1], dtype)


def _fake_perturb_backward(
    grad_deleted, grad_inserted, images, references, masks, rc, rw, cc, cw, rows, cols, std, need_images
):
    shape = images.shape if need_images else (0,)
    return masks.new_empty(masks.shape), images.new_empty(shape), images.new_empty(shape)


def _fake_perturb_by_rank(images, references, ranks, counts, mean=None, std=None, dtype=None):
    return _pair(images, counts.shape[0], dtype)


def _pair(images: Tensor, steps: int, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    shape = (images.shape[0], steps, *images.shape[1:])
    return images.new_empty(shape, dtype=dtype), images.new_empty(shape, dtype=dtype)


def _fake_perturb_by_rank_backward(grad_deleted, grad_inserted, ranks, counts, std=None, dtype=None):
    shape = (grad_deleted.shape[0], *grad_deleted.shape[2:])
    return grad_deleted.new_empty(shape, dtype=dtype), grad_deleted.new_empty(shape, dtype=dtype)


_FAKES: dict[str, Callable] = {
    "gumbel_sinkhorn": _fake_gumbel_sinkhorn,
    "gumbel_sinkhorn_backward": _fake_gumbel_sinkhorn_backward,
    "log_sinkhorn": _fake_log_sinkhorn,
    "log_sinkhorn_backward": lambda grad, logits, scalings, absorbed: logits.new_empty(logits.shape),
    "cumulative_masks": lambda permutation, left: permutation.new_empty(permutation.shape[0], *left.shape),
    "cumulative_masks_backward": lambda grad, left: grad.new_empty(grad.shape[0], left.shape[1], left.shape[1]),
    "perturb": _fake_perturb,
    "perturb_backward": _fake_perturb_backward,
    "perturb_by_rank": _fake_perturb_by_rank,
    "perturb_by_rank_backward": _fake_perturb_by_rank_backward,
}


def _gradients(ops: Any) -> dict[str, tuple[Callable, Callable]]:
    def keep_ranking(ctx, inputs, output):
        scores, tau, seed, left, right, _, noise, start = inputs
        _, scalings, absorbed = output
        ctx.mark_non_differentiable(scalings, absorbed)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(scores, tau, seed, left, right, scalings, absorbed, start)
        ctx.noise = noise

    def ranking_backward(ctx, grad, *_):
        if grad is None:
            return (None,) * 8
        need_tau, need_right, need_start = (ctx.needs_input_grad[n] for n in (1, 4, 7))
        *saved, start = ctx.saved_tensors
        scores, tau, right, start = ops.gumbel_sinkhorn_backward(grad, *saved, ctx.noise, need_tau, start)
        right, start = right if need_right else None, start if need_start else None
        return scores, tau.sum() if need_tau else None, None, None, right, None, None, start

    def keep_logits(ctx, inputs, output):
        _, scalings, absorbed = output
        ctx.mark_non_differentiable(scalings, absorbed)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0], scalings, absorbed)

    def logits_backward(ctx, grad, *_):
        return (None if grad is None else ops.log_sinkhorn_backward(grad, *ctx.saved_tensors)), None

    def keep_left(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])

    def perturb_backward(ctx, *grads):
        images, references, masks, *taps, std = ctx.saved_tensors
        need_images = any(ctx.needs_input_grad[:2])
        masks, images, references = ops.perturb_backward(
            *grads, images, references, masks, *taps, *ctx.grid, std, need_images
        )
        needed = zip((images, references, masks), ctx.needs_input_grad, strict=False)
        return *(grad if need else None for grad, need in needed), *(None,) * 9

    def keep_perturb(ctx, inputs, output):
        *tensors, rows, cols, _, std, _ = inputs
        ctx.save_for_backward(*tensors, std)
        ctx.grid = rows, cols

    def keep_ranks(ctx, inputs, output):
        values, _, ranks, counts, *_, std, _ = inputs
        ctx.save_for_backward(ranks, counts, std)
        ctx.dtype = values.dtype

    # perturb_by_rank is linear: twice backward is forward
    def ranks_backward(ctx, *grads):
        ranks, counts, std = ctx.saved_tensors
        return *ops.perturb_by_rank_backward(*grads, ranks, counts, std, ctx.dtype), None, None, None, None, None

    def ranks_backward_backward(ctx, *grads):
        ranks, counts, std = ctx.saved_tensors
        return *ops.perturb_by_rank(*grads, ranks, counts, None, std, ctx.dtype), None, None, None, None

    return {
        "gumbel_sinkhorn": (keep_ranking, ranking_backward),
        "gumbel_sinkhorn_backward": _refuse("gumbel_sinkhorn"),
        "log_sinkhorn": (keep_logits, logits_backward),
        "log_sinkhorn_backward": _refuse("log_sinkhorn"),
        "cumulative_masks": (
            keep_left,
            lambda ctx, grad: (ops.cumulative_masks_backward(grad, *ctx.saved_tensors), None),
        ),
        "cumulative_masks_backward": (
            keep_left,
            lambda ctx, grad: (ops.cumulative_masks(grad, *ctx.saved_tensors), None),
        ),
        "perturb": (keep_perturb, perturb_backward),
        "perturb_backward": _refuse("perturb"),
        "perturb_by_rank": (keep_ranks, ranks_backward),
        "perturb_by_rank_backward": (keep_ranks, ranks_backward_backward),
    }


def _refuse(name: str) -> tuple[Callable, Callable]:
    def backward(ctx, *grads):
        raise RuntimeError(
            f"the gradient of {name} has no gradient of its own in the compiled backends; "
            "for second derivatives call it with backend='reference'"
        )

    return lambda ctx, inputs, output: None, backward


def _vmap(namespace: str, name: str) -> Callable:
    """Fold the mapped dimension into that of the images; where an argument they share is mapped, one call for each.

    Noise is numbered by image, so folding would change it: also one call for each.
    """

    def rule(info, in_dims, *args):
        op = getattr(getattr(torch.ops, namespace), name).default
        names = [argument.name for argument in op._schema.arguments]
        per_image = [argument in _PER_IMAGE[name] for argument in names]
        given = dict(zip(names, args, strict=False))
        mapped = [dim is not None for dim in in_dims]
        size = info.batch_size
        shared = any(m and not p for m, p in zip(mapped, per_image, strict=False))
        if shared and size == 0:
            return _empty(op, args, in_dims)
        if size and (shared or given.get("noise")):
            calls = [op(*_select(args, in_dims, n)) for n in range(size)]
            single = isinstance(calls[0], Tensor)
            out = torch.stack(calls) if single else tuple(map(torch.stack, zip(*calls, strict=True)))
            return out, 0 if single else (0,) * len(out)
        folded = [
            _fold(value, dim, size) if fold and isinstance(value, Tensor) else value
            for value, dim, fold in zip(args, in_dims, per_image, strict=False)
        ]
        images = next(a.movedim(dim, 0).shape[1] for a, dim in zip(args, in_dims, strict=False) if dim is not None)
        out = op(*folded)
        if isinstance(out, Tensor):
            return _unfold(out, size, images), 0
        return tuple(_unfold(o, size, images) for o in out), (0,) * len(out)

    return rule


def _empty(op: Any, args: tuple, in_dims: tuple) -> tuple[Any, Any]:
    """The mapped outputs over no element of a shared argument: their shapes are those of any element."""
    element = [
        a if dim is None else a.new_ones([n for d, n in enumerate(a.shape) if d != dim % a.ndim])
        for a, dim in zip(args, in_dims, strict=False)
    ]
    out = op(*element)
    if isinstance(out, Tensor):
        return out.new_empty(0, *out.shape), 0
    return tuple(o.new_empty(0, *o.shape) for o in out), (0,) * len(out)


def _select(args, in_dims, n: int) -> list:
    return [a if dim is None else a.select(dim, n) for a, dim in zip(args, in_dims, strict=False)]


def _fold(value: Tensor, dim: int | None, size: int) -> Tensor:
    value = value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)
    return value.flatten(0, 1)


def _unfold(value: Tensor, size: int, images: int) -> Tensor:
    return value.reshape(size, images if value.shape[0] == size * images else 0, *value.shape[1:])
