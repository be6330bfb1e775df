"""What the kernels need of float32 arithmetic and of launching, and Triton does not give.

    exp(x) = 2^h (1 + l ln 2),  h = fl(x log₂e),  l = x log₂e − h

tl.exp rounds x log₂e to one float, of which a GPU's ex2.approx then takes 2 to the power: a relative error of
|x| 2⁻²⁴, 1e-6 at x = −17. Here the rounding is kept as l, and the error is that of ex2.approx itself.
"""

import os

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")
_LOG2E, _LOG2E_LOW = (tl.constexpr(float.fromhex(x)) for x in ("0x1.715476p+0", "0x1.4ae0cp-26"))
_LN2 = tl.constexpr(float.fromhex("0x1.62e43p-1"))
_END = tl.constexpr(110.0)  # beyond it exp is 0 or infinite; an infinite x would make l NaN


@triton.jit
def fma(x, y, z):
    # the interpreter rounds the product too; through float64 the sum is rounded once, as the hardware does
    if _INTERPRETED:
        return (tl.cast(x, tl.float64) * tl.cast(y, tl.float64) + tl.cast(z, tl.float64)).to(tl.float32)
    else:  # noqa: RET505  (both branches are compiled unless the condition decides between them)
        return tl.fma(x, y, z)


@triton.jit
def exp(x):
    """exp(x) of float32 to about 3 ulp on a GPU; 0 at −∞, NaN at NaN."""
    x = tl.clamp(x, -_END, _END, propagate_nan=tl.PropagateNan.ALL)
    high = x * _LOG2E
    low = fma(x, _LOG2E_LOW, fma(x, _LOG2E, -high))
    return tl.exp2(high) * (1.0 + low * _LN2)


@triton.jit
def place(blocks):
    """The image (int64) of this program and its block, of ``blocks`` for each image: the grid has one axis.

    The other axes end at 65535. Images come fastest: what programs of a block share between images stays in the cache.
    """
    images = tl.num_programs(0) // blocks
    return (tl.program_id(0) % images).to(tl.int64), tl.program_id(0) // images
