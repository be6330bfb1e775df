"""Logits of the ranking, with their Gumbel noise: the bits and the polynomial of csrc/aha_math.h.

Every multiply-add that matters is an explicit fma, so noise agrees with the other backends to 2 ulp.
"""

import triton
import triton.language as tl

from .arithmetic import fma

QUADS = 256  # Philox blocks of four words per program

_LN2_HIGH, _LN2_LOW = (tl.constexpr(float.fromhex(x)) for x in ("0x1.62e43p-1", "-0x1.05c61p-29"))
_E_HIGH, _E_LOW = (tl.constexpr(float.fromhex(x)) for x in ("0x1.5bf0a8p+1", "0x1.628aeep-24"))
# log(1 + f) = f + f² P(f), |f| ≤ 1/3, highest power first
_P = tl.constexpr(
    tuple(
        float.fromhex(x)
        for x in (
            "0x1.e9cfbp-4",
            "-0x1.06c2bap-3",
            "0x1.b91f52p-4",
            "-0x1.f3b02cp-4",
            "0x1.24eb6cp-3",
            "-0x1.55978cp-3",
            "0x1.9997eep-3",
            "-0x1.ffff18p-3",
            "0x1.555556p-2",
            "-0x1p-1",
        )
    )
)


@triton.jit
def philox(seed, quad):
    """Four words (uint32) for every counter in ``quad`` (int64): Philox4x32-10 with the key ``seed`` (int64)."""
    M0: tl.constexpr = 0xD2511F53
    M1: tl.constexpr = 0xCD9E8D57
    k0, k1 = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    c0, c1 = (quad & 0xFFFFFFFF).to(tl.uint32), (quad >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    for _ in tl.static_range(10):
        high0, low0 = tl.umulhi(c0, M0), tl.mul(c0, M0, sanitize_overflow=False)
        high1, low1 = tl.umulhi(c2, M1), tl.mul(c2, M1, sanitize_overflow=False)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def _log_pair(high, low):
    """log(high + low), as an unevaluated sum of two floats; ``high`` positive and normal."""
    bits = high.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F2AAAAB) >> 23  # 0x3f2aaaab is 2/3
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    p = fma(f, _P[0], _P[1])
    for n in tl.static_range(2, 10):
        p = fma(p, f, _P[n])
    e = exponent.to(tl.float32)
    big = fma(e, _LN2_HIGH, f)
    lost = fma(e, _LN2_HIGH, -big) + f  # what rounding took from big
    small = fma(p, f * f, fma(e, _LN2_LOW, lost + low / high))
    total = big + small
    return total, (big - total) + small


@triton.jit
def gumbel(word):
    """−log(−log u), u = (word >> 9 + ½)·2⁻²³: float32 within 2 ulp. Around its zero, u = 1/e, −log u = 1 − log(e u)."""
    u = ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2⁻²³
    near_one = u > 0.60653066  # exp(−½): from there on −log u itself is the accurate form
    scaled = u * _E_HIGH
    rest = fma(u, _E_LOW, fma(u, _E_HIGH, -scaled))
    high, low = _log_pair(tl.where(near_one, u, scaled), tl.where(near_one, 0.0, rest))
    distance = 1.0 - high
    exponential = tl.where(near_one, -high, distance)
    value, _ = _log_pair(exponential, tl.where(near_one, -low, ((1.0 - distance) - high) - low))
    return -value


@triton.jit
def rank_target(i, k):
    """q_i = ½ − i/(K − 1), centred targets of the ranks; one rounding, also near zero."""
    last = tl.maximum(k - 1, 1)
    return tl.div_rn((last - 2 * i).to(tl.float32), (2 * last).to(tl.float32))


@triton.jit
def ranking_logits(scores, nearest, tau, seed, logits, column, k, noise, NOISY: tl.constexpr, QUADS: tl.constexpr):
    """M_ij = (2 q_i c_j + noise·γ_ij)/τ (B,K,K), and h_j = −(c_j² − n²)/τ (B,K), with c = scores − ½, n = min |c| (B,).

    In factors: the squares of large scores may be rounded away, or overflow.
    """
    # one grid axis: the second ends at 65535. Matrices need not start at a multiple of 4, so the first block of words
    # may belong to two of them, and there may be one block more
    spans = tl.cdiv(k * k + 3, 4 * QUADS)
    b = (tl.program_id(0) // spans).to(tl.int64)
    first = b * k * k
    quad = first // 4 + tl.program_id(0) % spans * QUADS + tl.arange(0, QUADS)
    entry = (quad * 4 - first).to(tl.int32)[:, None] + tl.arange(0, 4)[None, :]
    inside = (entry >= 0) & (entry < k * k)
    i, j = entry // k, entry % k
    c = tl.load(scores + b * k + j, inside, 0.0) - 0.5
    temperature = tl.load(tau)
    value = 2 * rank_target(i, k) * c
    if NOISY:
        w0, w1, w2, w3 = philox(tl.load(seed), quad)
        word = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (QUADS, 4))
        value += noise * gumbel(word)
    tl.store(logits + first + entry, tl.div_rn(value, temperature), inside)
    least = tl.load(nearest + b)
    constant = -4 * tl.div_rn(c / 2 - least / 2, temperature) * (c / 2 + least / 2)
    tl.store(column + b * k + j, constant, inside & (i == 0))
