"""Mixed precision: when bfloat16 pays, and the context that switches it on."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

PRECISIONS = ("auto", "bf16", "fp32")


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether ``precision`` means bfloat16 on ``device``.

    ``auto`` takes it where the hardware multiplies it natively: CUDA from sm_80, CPUs with AMX tiles. Elsewhere
    bfloat16 is emulated and several times slower than float32.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is not known: choose one of {', '.join(PRECISIONS)}")
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        supported = getattr(torch.cpu, "_is_amx_tile_supported", None)
        return bool(supported and supported())
    return False


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """A fresh autocast context; for float32 it switches an outer autocast off."""
    on = uses_bf16(precision, device)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=on)


@contextlib.contextmanager
def stepwise_attention(module: nn.Module, on: bool = True) -> Iterator[None]:
    """timm attention in separate steps instead of the fused kernel, put back on exit.

    The backward pass of the fused kernel in bfloat16 on CPUs is several times slower than its parts.
    """
    fused = [m for m in module.modules() if getattr(m, "fused_attn", False)] if on else []
    try:
        for m in fused:
            m.fused_attn = False  # type: ignore[assignment]
        yield
    finally:
        for m in fused:
            m.fused_attn = True  # type: ignore[assignment]
