"""The random-number contract: the same Philox4x32-10 bits and Gumbel values on every backend.

Element ``e`` of the flattened (B, K, K) noise takes word ``e % 4`` of the Philox block with counter ``e // 4`` and
key ``seed`` (two 32-bit words, low first). Own code, because the generators that frameworks ship change between
versions and differ between devices.
"""

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def philox(n: int, seed: int | Tensor, device: torch.device | str = "cpu") -> Tensor:
    """The first ``n`` 32-bit words of Philox4x32-10 for ``seed``, as int64 values in [0, 2³²), shape (n,).

    A tensor is a 0-dim int64 seed; negative numbers are the seeds above 2⁶³.
    """
    block = torch.arange((n + 3) // 4, dtype=torch.int64, device=device)
    c0, c1 = block & _LOW, block >> 32
    c2, c3 = torch.zeros_like(block), torch.zeros_like(block)
    k0, k1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(10):
        # the int64 product wraps, but its 64 bits are those of the unsigned product
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        high0, high1 = (product0 >> 32) & _LOW, (product1 >> 32) & _LOW
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & _LOW, high0 ^ c3 ^ k1, product0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return torch.stack([c0, c1, c2, c3], dim=-1).flatten()[:n]


def gumbel(shape: tuple[int, ...], seed: int | Tensor, device: torch.device | str = "cpu") -> Tensor:
    """Standard Gumbel noise −log(−log u) of ``shape``, float32 correctly rounded from float64.

    ``u = (word >> 9 + ½)·2⁻²³`` lies strictly inside (0, 1), so the values are finite: −2.8 … 16.6.
    """
    n = 1
    for size in shape:
        n *= size
    uniform = ((philox(n, seed, device) >> 9).double() + 0.5) * 2.0**-23
    return (-torch.log(-torch.log(uniform))).float().view(shape)


def draw_seed(device: torch.device | str = "cpu") -> Tensor:
    """A fresh 63-bit seed, 0-dim int64, from PyTorch's default generator of ``device``: `torch.manual_seed` governs it.

    Drawn where it is used: no transfer, and a captured CUDA graph draws anew at every replay.
    """
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)


def as_seed(seed: int, device: torch.device | str = "cpu") -> Tensor:
    """An integer in [0, 2⁶⁴) as the 0-dim int64 tensor with the same bits."""
    return torch.full((), seed - 2**64 if seed >= 2**63 else seed, dtype=torch.int64, device=device)
