"""Sinkhorn ranking: one log-domain iteration, then u = 1/(X v), v = 1/(Xᵀ u) on X = exp(M + F + G).

M (the logits) and X live in workspaces of the call. A tile is a block of whole rows. Where one tile holds the matrix
(K ≤ 128) one program per image keeps X in registers for all iterations; beyond, an iteration is two launches: `sweep`
over row blocks, which leaves partial column sums, and `reduce`, which adds them up. Both directions have this shape.

When scalings leave 2^±32 they are absorbed into the potentials F, G and X is computed anew from M; the decision is
made on the device, by every program alike. Sums have a fixed order: results repeat bit for bit.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .arithmetic import exp, place
from .noise import QUADS, rank_target, ranking_logits
from .soft_masks import cumulative_masks, entries, upstream

RESIDENT = 128  # regions up to which one program holds a matrix
TILE, TILE_ROWS = 1 << 14, 32  # values in a tile of whole rows, and rows, at most
PER_WARP = 1 << 9  # values of a tile: 16 registers a thread
TILE_WARPS = 16  # at most; a resident matrix may take the 32 of a whole block
REDUCE = {"ROWS": 16, "COLUMNS": 64}  # partial sums × columns at a time
FIELD = {"ROWS": 32, "COLUMNS": 32}  # tile of the rank-2T pass

MOST = 32768  # regions: a matrix has fewer than 2³¹ entries, a row fits a tile
_DRIFT = tl.constexpr(2.0**32)

Given = dict[str, Any]  # arguments of kernels by name; their optional tensors come last and are None if not given


def row_blocks(k: int) -> dict[str, int]:
    """A tile of whole rows, and its warps. ValueError beyond ``MOST`` regions."""
    if k > MOST:
        raise ValueError(f"K = {k}: the Triton kernels rank at most {MOST} regions")
    columns = triton.next_power_of_2(k)
    rows = max(1, min(columns, TILE_ROWS, TILE // columns))
    warps = max(1, min(TILE_WARPS, rows * columns // PER_WARP))
    return {"ROWS": rows, "COLUMNS": columns, "num_warps": warps}


def resident_block(k: int) -> dict[str, int]:
    """The square tile that holds a matrix, and its warps."""
    block = triton.next_power_of_2(k)
    return {"BLOCK": block, "num_warps": max(1, block * block // PER_WARP)}


@triton.jit
def _plan(logits, b, i, j, k, f, g):
    offsets, inside = entries(i, j, k)
    return exp(tl.load(logits + b * k * k + offsets, inside, float("-inf")) + f[:, None] + g[None, :])


@triton.jit
def _row_potential(logits, column, b, i, j, k):
    """A tile of M, and −logsumexp_j(M + h); 0 for rows beyond K."""
    offsets, inside = entries(i, j, k)
    m = tl.load(logits + b * k * k + offsets, inside, float("-inf"))
    shifted = m
    if column is not None:
        shifted += tl.load(column + b * k + j, j < k, 0.0)[None, :]
    top = tl.where(i < k, tl.max(shifted, 1), 0.0)
    total = tl.where(i < k, tl.sum(exp(shifted - top[:, None]), 1), 1.0)
    return m, -top - tl.log(total)


@triton.jit
def _potentials(state, absorbed, i, j, k, n):
    """F and G with the scalings absorbed after iterations 1 … n, added in that order."""
    f, g = tl.load(state + i, i < k, 0.0), tl.load(state + k + j, j < k, 0.0)
    for t in range(1, n + 1):
        if tl.load(absorbed + t - 1) != 0:
            f += tl.log(tl.load(state + 2 * t * k + i, i < k, 1.0))
            g += tl.log(tl.load(state + (2 * t + 1) * k + j, j < k, 1.0))
    return f, g


@triton.jit
def _drifted(scaling):
    return tl.max(tl.maximum(scaling, 1 / scaling)) > _DRIFT


@triton.jit
def first(logits, scalings, partial, k, n_iters, ROWS: tl.constexpr, COLUMNS: tl.constexpr, column=None):
    """Row potentials of iteration 1, and the maxima over each block of rows that give the column potentials."""
    parts = tl.cdiv(k, ROWS)
    b, block = place(parts)
    i, j = block * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    m, f = _row_potential(logits, column, b, i, j, k)
    tl.store(scalings + b * (n_iters + 1) * 2 * k + i, f, i < k)
    tl.store(partial + (b * parts + block) * k + j, tl.max(m + f[:, None], 0), j < k)


@triton.jit(do_not_specialize=("t",))
def sweep(
    logits,
    plan,
    scalings,
    absorbed,
    partial,
    k,
    n_iters,
    t,
    BACKWARD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    adjoint=None,
    row_grad=None,
):
    """Half of iteration t: forward u = 1/(X v), backward z = u(r − u·X y); then the partial column sums of u or z."""
    parts = tl.cdiv(k, ROWS)
    b, block = place(parts)
    i, j = block * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    offsets, inside = entries(i, j, k)
    state, absorbed = scalings + b * (n_iters + 1) * 2 * k, absorbed + b * n_iters
    now, before = state + 2 * t * k, state + 2 * (t - 1) * k
    if BACKWARD:
        adjoint += (b * n_iters + t - 1) * 2 * k
        given = tl.load(adjoint + k + j, j < k, 0.0)
        anew = tl.load(absorbed + t - 1) != 0
    else:
        u, given = tl.load(before + j, j < k, 1.0), tl.load(before + k + j, j < k, 1.0)
        drifted = (_drifted(u) | _drifted(given)) & (t > 1)  # before iteration 1 these are potentials
        tl.store(absorbed + t - 2, drifted.to(tl.int32), (block == 0) & (t > 1))
        anew = drifted | (t == 1)
    if anew:
        if BACKWARD:
            f, g = _potentials(state, absorbed, i, j, k, t - 1)
        else:
            f, g = _potentials(state, absorbed, i, j, k, t - 2)
            if t > 1:  # this very decision: another program may not have written it yet
                f += tl.log(tl.load(before + i, i < k, 1.0))
                g += tl.log(given)
            given = tl.full((COLUMNS,), 1.0, tl.float32)
        x = _plan(logits, b, i, j, k, f, g)
        tl.store(plan + b * k * k + offsets, x, inside)
    else:
        x = tl.load(plan + b * k * k + offsets, inside, 0.0)
    product = tl.sum(x * given[None, :], 1)
    if BACKWARD:
        u = tl.load(now + i, i < k, 0.0)
        value = u * (tl.load(row_grad + b * k + i, (i < k) & (t == n_iters), 0.0) - u * product)
        tl.store(adjoint + i, value, i < k)
    else:
        value = tl.where(i < k, tl.where(t == 1, 1.0, 1 / product), 0.0)
        tl.store(now + i, value, i < k)
    tl.store(partial + (b * parts + block) * k + j, tl.sum(x * value[:, None], 0), j < k)


@triton.jit(do_not_specialize=("t",))
def reduce(
    partial,
    scalings,
    absorbed,
    parts,
    k,
    n_iters,
    t,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    out=None,
):
    """Partial column results (B,parts,K) → the columns' next vector; a program for each image and column block.

    STEP: "potential" G = −max; "scaling" v^t = 1/Σ; "adjoint" y^t = v^t ḡ, where ḡ = Σ at the start (t = T), then
    ḡ = −v^t Σ, v^t as the next iteration saw it; "sum" Σ into ``out`` (B,K).
    """
    b, block = place(tl.cdiv(k, COLUMNS))
    j = block * COLUMNS + tl.arange(0, COLUMNS)
    state = scalings + b * (n_iters + 1) * 2 * k
    if STEP == "potential":
        total = tl.full((ROWS, COLUMNS), float("-inf"), tl.float32)
    else:
        total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for p in range(0, parts, ROWS):
        part = p + tl.arange(0, ROWS)
        at = partial + (b * parts + part)[:, None] * k + j[None, :]
        inside = (part < parts)[:, None] & (j < k)[None, :]
        if STEP == "potential":
            total = tl.maximum(total, tl.load(at, inside, float("-inf")))
        else:
            total += tl.load(at, inside, 0.0)
    if STEP == "potential":
        tl.store(state + k + j, -tl.max(total, 0), j < k)
    elif STEP == "scaling":
        tl.store(state + (2 * t + 1) * k + j, 1 / tl.sum(total, 0), j < k)
    elif STEP == "adjoint":
        v = tl.load(state + (2 * t + 1) * k + j, j < k, 0.0)
        seen = tl.where(tl.load(absorbed + b * n_iters + t - 1) != 0, 1.0, v)
        factor = tl.where(t == n_iters, v, -v * seen)
        tl.store(out + ((b * n_iters + t - 1) * 2 + 1) * k + j, factor * tl.sum(total, 0), j < k)
    else:
        tl.store(out + b * k + j, tl.sum(total, 0), j < k)


@triton.jit
def resident(logits, scalings, absorbed, k, n_iters, BLOCK: tl.constexpr, column=None):
    """All iterations of one matrix that fits one tile."""
    b = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    state, absorbed = scalings + b * (n_iters + 1) * 2 * k, absorbed + b * n_iters
    m, f = _row_potential(logits, column, b, i, j, k)
    g = tl.where(j < k, -tl.max(m + f[:, None], 0), 0.0)
    x = exp(m + f[:, None] + g[None, :])
    u = tl.where(i < k, 1.0, 0.0)
    v = tl.where(j < k, 1 / tl.sum(x, 0), 0.0)
    tl.store(state + i, f, i < k)
    tl.store(state + k + j, g, j < k)
    tl.store(state + 2 * k + i, u, i < k)
    tl.store(state + 3 * k + j, v, j < k)
    for t in range(2, n_iters + 1):
        row, col = tl.where(i < k, u, 1.0), tl.where(j < k, v, 1.0)
        drifted = _drifted(row) | _drifted(col)
        tl.store(absorbed + t - 2, drifted.to(tl.int32))
        if drifted:
            f += tl.log(row)
            g += tl.log(col)
            x = exp(m + f[:, None] + g[None, :])
            v = tl.full((BLOCK,), 1.0, tl.float32)
        u = tl.where(i < k, 1 / tl.sum(x * v[None, :], 1), 0.0)
        v = tl.where(j < k, 1 / tl.sum(x * u[:, None], 0), 0.0)
        tl.store(state + 2 * t * k + i, u, i < k)
        tl.store(state + (2 * t + 1) * k + j, v, j < k)


@triton.jit
def resident_backward(logits, scalings, absorbed, adjoint, row_grad, k, n_iters, BLOCK: tl.constexpr):
    """All backward iterations of one matrix that fits one tile, from y^T."""
    b = tl.program_id(0).to(tl.int64)
    i, j = tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    offsets, inside = entries(i, j, k)
    state, absorbed = scalings + b * (n_iters + 1) * 2 * k, absorbed + b * n_iters
    adjoint += b * n_iters * 2 * k
    m = tl.load(logits + b * k * k + offsets, inside, float("-inf"))
    f, g = _potentials(state, absorbed, i, j, k, n_iters - 1)
    x = exp(m + f[:, None] + g[None, :])
    rest = tl.load(row_grad + b * k + i, i < k, 0.0)
    y = tl.load(adjoint + (2 * n_iters - 1) * k + j, j < k, 0.0)
    for n in range(n_iters):
        t = n_iters - n
        if tl.load(absorbed + t - 1) != 0:
            f, g = _potentials(state, absorbed, i, j, k, t - 1)
            x = exp(m + f[:, None] + g[None, :])
        u = tl.load(state + 2 * t * k + i, i < k, 0.0)
        z = u * (rest - u * tl.sum(x * y[None, :], 1))
        rest = tl.zeros_like(rest)
        tl.store(adjoint + 2 * (t - 1) * k + i, z, i < k)
        if t > 1:
            v = tl.load(state + (2 * t - 1) * k + j, j < k, 0.0)
            seen = tl.where(tl.load(absorbed + t - 2) != 0, 1.0, v)
            y = -v * seen * tl.sum(x * z[:, None], 0)
            tl.store(adjoint + (2 * t - 3) * k + j, y, j < k)


@triton.jit
def read_rows(
    logits,
    scalings,
    absorbed,
    out,
    k,
    n_iters,
    LOG: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    right=None,
):
    """Outputs row by row: P or log P (B,K,K), or P right (B,K)."""
    parts = tl.cdiv(k, ROWS)
    b, block = place(parts)
    i, j = block * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    offsets, inside = entries(i, j, k)
    state = scalings + b * (n_iters + 1) * 2 * k
    f, g = _potentials(state, absorbed + b * n_iters, i, j, k, n_iters - 1)
    u = tl.load(state + 2 * n_iters * k + i, i < k, 1.0)
    v = tl.load(state + (2 * n_iters + 1) * k + j, j < k, 1.0)
    if LOG:
        m = tl.load(logits + b * k * k + offsets, inside, 0.0)
        # as X was made: large potentials cancel the logit before anything small is added
        log_p = (m + f[:, None] + g[None, :]) + (tl.log(u)[:, None] + tl.log(v)[None, :])
        tl.store(out + b * k * k + offsets, log_p, inside)
    else:
        p = u[:, None] * _plan(logits, b, i, j, k, f, g) * v[None, :]
        if right is not None:
            along = tl.load(right + b * k + j, j < k, 0.0)
            tl.store(out + b * k + i, tl.sum(p * along[None, :], 1), i < k)
        else:
            tl.store(out + b * k * k + offsets, p, inside)


@triton.jit
def _upstream_log(grad, left, right, level, p, b, i, j, k, steps, LOG: tl.constexpr):
    """A tile of W = ∂ℓ/∂log P, less P times ``level`` (B,K): columns of P sum to 1, so it changes no gradient.

    With the column sums of W as the level nothing large is left to cancel in the sums that follow.
    """
    w = upstream(grad, left, right, b, i, j, k, steps)
    if level is not None:
        shift = tl.load(level + b * k + j, j < k, 0.0)[None, :]
        return w - p * shift if LOG else p * (w - shift)
    return w if LOG else p * w


@triton.jit
def begin_backward(
    grad,
    logits,
    plan,
    scalings,
    absorbed,
    row_grad,
    partial,
    k,
    steps,
    n_iters,
    LOG: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    left=None,
    right=None,
    level=None,
    right_partial=None,
):
    """X as the last iteration saw it; of W = ∂ℓ/∂log P the row sums r and the partial column sums."""
    parts = tl.cdiv(k, ROWS)
    b, block = place(parts)
    i, j = block * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    offsets, inside = entries(i, j, k)
    state = scalings + b * (n_iters + 1) * 2 * k
    f, g = _potentials(state, absorbed + b * n_iters, i, j, k, n_iters - 1)
    x = _plan(logits, b, i, j, k, f, g)
    tl.store(plan + b * k * k + offsets, x, inside)
    u = tl.load(state + 2 * n_iters * k + i, i < k, 0.0)
    v = tl.load(state + (2 * n_iters + 1) * k + j, j < k, 0.0)
    p = u[:, None] * x * v[None, :]
    w = _upstream_log(grad, left, right, level, p, b, i, j, k, steps, LOG)
    at = (b * parts + block) * k + j
    tl.store(row_grad + b * k + i, tl.sum(w, 1), i < k)
    tl.store(partial + at, tl.sum(w, 0), j < k)
    if right is not None:
        weight = tl.load(grad + b * k + i, i < k, 0.0)
        tl.store(right_partial + at, tl.sum(weight[:, None] * p, 0), j < k)


@triton.jit
def _logits_gradient(
    grad, left, right, level, logits, column, state, absorbed, adjoint, b, i, j, k, steps, n_iters, LOG: tl.constexpr
):
    """A tile of M and of L̄ = W − X Σ_t (u^t y^tᵀ + z^t v^{t−1}ᵀ), each iteration with the X it saw."""
    f, g = tl.load(state + i, i < k, 0.0), tl.load(state + k + j, j < k, 0.0)
    x = _plan(logits, b, i, j, k, f, g)
    v = exp((tl.load(column + b * k + j, j < k, 0.0) if column is not None else 0.0) - g)
    u = tl.full((i.shape[0],), 1.0, tl.float32)
    field, total = tl.zeros_like(x), tl.zeros_like(x)
    for t in range(1, n_iters + 1):
        u = tl.load(state + 2 * t * k + i, i < k, 1.0)
        y = tl.load(adjoint + (2 * t - 1) * k + j, j < k, 0.0)
        z = tl.load(adjoint + 2 * (t - 1) * k + i, i < k, 0.0)
        field += u[:, None] * y[None, :] + z[:, None] * v[None, :]
        v = tl.load(state + (2 * t + 1) * k + j, j < k, 1.0)
        if tl.load(absorbed + t - 1) != 0:
            total += x * field
            field = tl.zeros_like(x)
            f += tl.log(u)
            g += tl.log(v)
            x = _plan(logits, b, i, j, k, f, g)
            v = tl.full((j.shape[0],), 1.0, tl.float32)
    w = _upstream_log(grad, left, right, level, u[:, None] * x * v[None, :], b, i, j, k, steps, LOG)
    offsets, inside = entries(i, j, k)
    # M is read again: kept over all iterations it would take registers that are not there
    return tl.load(logits + b * k * k + offsets, inside, 0.0), tl.where(inside, w - total - x * field, 0.0)


@triton.jit
def end_backward(
    grad,
    level,
    logits,
    scalings,
    absorbed,
    adjoint,
    grad_out,
    k,
    steps,
    n_iters,
    LOG: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    left=None,
    right=None,
    column=None,
    scores=None,
    tau=None,
    grad_tau=None,
    grad_start=None,
):
    """The gradient of the logits (B,K,K), or of scores (B,K) and, if given, of tau (column blocks,B) and the start."""
    b, block = place(tl.cdiv(k, COLUMNS))
    j = block * COLUMNS + tl.arange(0, COLUMNS)
    state, absorbed = scalings + b * (n_iters + 1) * 2 * k, absorbed + b * n_iters
    adjoint += b * n_iters * 2 * k
    weighted, plain, scaled = (tl.zeros((COLUMNS,), tl.float32),) * 3  # Σ_i L̄ q, Σ_i L̄, Σ_i L̄ (M + h + F)
    if not LOG:
        h = tl.load(column + b * k + j, j < k, 0.0)
    for row in range(0, k, ROWS):
        i = row + tl.arange(0, ROWS)
        m, bar = _logits_gradient(
            grad, left, right, level, logits, column, state, absorbed, adjoint, b, i, j, k, steps, n_iters, LOG
        )
        if LOG:
            offsets, inside = entries(i, j, k)
            tl.store(grad_out + b * k * k + offsets, bar, inside)
        else:
            weighted += tl.sum(bar * rank_target(i, k)[:, None], 0)
            plain += tl.sum(bar, 0)
            # rows of L̄ sum to 0, so M + h may be shifted along them: by F, which leaves logarithms of shares
            f = tl.load(state + i, i < k, 0.0)
            scaled += tl.sum(bar * (m + f[:, None] + h[None, :]), 0)
    if not LOG:
        temperature = tl.load(tau)
        c = tl.load(scores + b * k + j, j < k, 0.0) - 0.5
        if grad_start is not None:  # then h is an argument, not a function of scores and tau
            tl.store(grad_start + b * k + j, plain, j < k)
            scaled -= plain * h
            plain = tl.zeros_like(plain)
        tl.store(grad_out + b * k + j, 2 * (weighted - c * plain) / temperature, j < k)
        if grad_tau is not None:  # M and h are proportional to 1/τ
            tl.store(grad_tau + tl.program_id(0), -tl.sum(scaled) / temperature)


def _ranking_logits(scores: Tensor, tau: Tensor, seed: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    batch, k = scores.shape
    logits, column = scores.new_empty(batch, k, k), scores.new_empty(batch, k)
    if batch:
        nearest = (scores - 0.5).abs().amin(dim=1)
        made = {
            "scores": scores,
            "nearest": nearest,
            "tau": tau,
            "seed": seed,
            "logits": logits,
            "column": column,
            "k": k,
        }
        grid = batch * triton.cdiv(k * k + 3, 4 * QUADS)
        ranking_logits[(grid,)](**made, noise=noise, NOISY=bool(noise), QUADS=QUADS, num_warps=4)
    return logits, column


def _state(logits: Tensor, scalings: Tensor, absorbed: Tensor) -> Given:
    return {"scalings": scalings, "absorbed": absorbed, "k": logits.shape[-1], "n_iters": absorbed.shape[1]}


def _reduce(step: str, t: int, partial: Tensor, state: Given, out: Tensor | None = None) -> None:
    batch, parts, k = partial.shape
    grid = (batch * triton.cdiv(k, REDUCE["COLUMNS"]),)
    reduce[grid](partial=partial, out=out, parts=parts, t=t, STEP=step, **state, **REDUCE)


def _iterate(logits: Tensor, column: Tensor | None, state: Given) -> None:
    """Fill the scalings of ``state``, and which of them are absorbed."""
    batch, k, _ = logits.shape
    if k <= RESIDENT:
        resident[(batch,)](logits=logits, column=column, **state, **resident_block(k))
        return
    tile = row_blocks(k)
    parts = triton.cdiv(k, tile["ROWS"])
    partial = logits.new_empty(batch, parts, k)
    start = {name: state[name] for name in ("scalings", "k", "n_iters")}
    first[(batch * parts,)](logits=logits, column=column, partial=partial, **start, **tile)
    _reduce("potential", 0, partial, state)
    passed = {"logits": logits, "plan": torch.empty_like(logits), "partial": partial}
    for t in range(1, state["n_iters"] + 1):
        sweep[(batch * parts,)](t=t, BACKWARD=False, **passed, **state, **tile)
        _reduce("scaling", t, partial, state)


def _forward(
    log: bool, logits: Tensor, n_iters: int, column: Tensor | None, left: Tensor | None, right: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    batch, k, _ = logits.shape
    tile = row_blocks(k)
    scalings = logits.new_empty(batch, n_iters + 1, 2, k)
    absorbed = logits.new_zeros(batch, n_iters, dtype=torch.int32)
    out = torch.empty_like(logits) if right is None else logits.new_empty(batch, k)
    if batch:
        state = _state(logits, scalings, absorbed)
        _iterate(logits, column, state)
        right = None if right is None else right.contiguous()
        read_rows[(batch * triton.cdiv(k, tile["ROWS"]),)](
            logits=logits, right=right, out=out, LOG=log, **state, **tile
        )
    return out if left is None else cumulative_masks(out, left), scalings, absorbed


def _adjoints(upstream: Given, logits: Tensor, state: Given, log: bool, grad_right: Tensor | None) -> Given:
    """z^t and y^t of all iterations (B,T,2,K) and the level (B,K); fills ``grad_right`` if it is given."""
    batch, k, _ = logits.shape
    n_iters, tile = state["n_iters"], row_blocks(k)
    parts = triton.cdiv(k, tile["ROWS"])
    partial, row_grad = logits.new_empty(batch, parts, k), logits.new_empty(batch, k)
    right_partial = None if grad_right is None else torch.empty_like(partial)
    adjoint, level = logits.new_empty(batch, n_iters, 2, k), logits.new_empty(batch, k)
    passed = {"logits": logits, "plan": torch.empty_like(logits), "row_grad": row_grad, "partial": partial}

    def begin(level: Tensor | None) -> None:
        given = {**upstream, "level": level, "right_partial": right_partial, "LOG": log}
        begin_backward[(batch * parts,)](**given, **passed, **state, **tile)

    begin(level=None)
    _reduce("sum", 0, partial, state, level)
    begin(level)
    _reduce("adjoint", n_iters, partial, state, adjoint)
    if right_partial is not None:
        _reduce("sum", 0, right_partial, state, grad_right)
    if k <= RESIDENT:
        resident_backward[(batch,)](logits=logits, adjoint=adjoint, row_grad=row_grad, **state, **resident_block(k))
        return {"adjoint": adjoint, "level": level}
    for t in range(n_iters, 0, -1):
        sweep[(batch * parts,)](adjoint=adjoint, t=t, BACKWARD=True, **passed, **state, **tile)
        if t > 1:
            _reduce("adjoint", t - 1, partial, state, adjoint)
    return {"adjoint": adjoint, "level": level}


def _backward(
    log: bool, logits: Tensor, state: Given, upstream: Given, grad_right: Tensor | None = None, **given: Tensor | None
) -> None:
    """Fill the gradient of the logits, or those of scores, tau (column blocks,B), right and the start."""
    adjoints = _adjoints(upstream, logits, state, log, grad_right)
    grid = (len(logits) * triton.cdiv(state["k"], FIELD["COLUMNS"]),)
    end_backward[grid](logits=logits, LOG=log, **adjoints, **upstream, **given, **state, **FIELD)


def log_sinkhorn(logits: Tensor, n_iters: int) -> tuple[Tensor, Tensor, Tensor]:
    return _forward(True, logits.contiguous(), n_iters, column=None, left=None, right=None)


def gumbel_sinkhorn(scores, tau, seed, left, right, n_iters, noise, start) -> tuple[Tensor, Tensor, Tensor]:
    logits, column = _ranking_logits(scores.contiguous(), tau, seed, noise)
    column = column if start is None else start.contiguous()
    return _forward(False, logits, n_iters, column=column, left=left, right=right)


def log_sinkhorn_backward(grad: Tensor, logits: Tensor, scalings: Tensor, absorbed: Tensor) -> Tensor:
    grad, logits, scalings, absorbed = (x.contiguous() for x in (grad, logits, scalings, absorbed))
    out = torch.empty_like(logits)
    if out.numel():
        _backward(True, logits, _state(logits, scalings, absorbed), {"grad": grad, "steps": 0}, grad_out=out)
    return out


def gumbel_sinkhorn_backward(
    grad, scores, tau, seed, left, right, scalings, absorbed, noise, need_tau, start
) -> tuple[Tensor, ...]:
    grad, scores, scalings, absorbed = (x.contiguous() for x in (grad, scores, scalings, absorbed))
    left, right, start = (None if x is None else x.contiguous() for x in (left, right, start))
    batch, k = scores.shape
    grad_scores = torch.empty_like(scores)
    grad_tau = scores.new_empty(triton.cdiv(k, FIELD["COLUMNS"]), batch) if need_tau else None
    grad_right, grad_start = (None if x is None else torch.empty_like(scores) for x in (right, start))
    if batch:
        logits, column = _ranking_logits(scores, tau, seed, noise)
        state, column = _state(logits, scalings, absorbed), column if start is None else start
        upstream = {"grad": grad, "left": left, "right": right, "steps": 0 if left is None else len(left)}
        given = {"scores": scores, "tau": tau, "column": column, "grad_tau": grad_tau, "grad_start": grad_start}
        _backward(False, logits, state, upstream, grad_right, grad_out=grad_scores, **given)
    grads = None if grad_tau is None else grad_tau.sum(0), grad_right, grad_start
    return grad_scores, *(scores.new_empty(0) if x is None else x for x in grads)
