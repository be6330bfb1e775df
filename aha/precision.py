"""Mixed precision and memory layout: when bfloat16 and channels last pay, and what switches them on."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .checks import check_choice

PRECISIONS = ("auto", "bf16", "fp32")


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether ``precision`` means bfloat16 on ``device``.

    ``auto`` takes it where the hardware multiplies it natively: CUDA from sm_80, CPUs with AMX tiles. With
    AVX512-BF16 passes take half the time too (bench/results/layouts_cpu.json), by precision="bf16". Elsewhere bfloat16
    is emulated and several times slower than float32.
    """
    check_choice("precision", precision, PRECISIONS)
    if precision != "auto":
        return precision == "bf16"
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and cpu_multiplies()["AMX"]


def cpu_multiplies() -> dict[str, bool]:
    """Which of its ways to multiply bfloat16 this CPU has."""
    ways = {"AMX": "_is_amx_tile_supported", "AVX512-BF16": "_is_avx512_bf16_supported"}
    return {way: bool(getattr(torch.cpu, name, bool)()) for way, name in ways.items()}


def autocast(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """A fresh autocast context; for float32 it switches an outer autocast off."""
    on = uses_bf16(precision, device)
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=on)


def in_fast_layout(pixels: Tensor) -> Tensor:
    """(B,C,H,W) in channels last on a CPU, which convolutions and what follows them keep.

    Passes of convolutional networks take up to a quarter less time, those of others as long as before
    (bench/results/layouts_cpu.json). On GPUs it was not measured, and the layout is left as it is.
    """
    return pixels.contiguous(memory_format=torch.channels_last) if pixels.device.type == "cpu" else pixels


@contextlib.contextmanager
def switched_off(module: nn.Module, *names: str) -> Iterator[None]:
    """Boolean attributes ``names`` of all submodules are False inside, and as before on exit."""
    before = [(m, name, getattr(m, name)) for m in module.modules() for name in names if hasattr(m, name)]
    try:
        for m, name, _ in before:
            setattr(m, name, False)
        yield
    finally:
        for m, name, value in before:
            setattr(m, name, value)


def full_precision(values: Tensor) -> Tensor:
    """Half precision becomes float32; float32 and float64 stay."""
    return values if values.dtype == torch.float64 else values.float()


def confidence(logits: Tensor, classes: Tensor) -> Tensor:
    """Softmax probability of ``classes`` (N,) or (N, M) in ``logits`` (N, C), at least in float32; shaped like them."""
    chosen = classes if classes.ndim == 2 else classes[:, None]
    return full_precision(logits).softmax(dim=-1).gather(1, chosen).view(classes.shape)


def stepwise_attention(module: nn.Module, on: bool = True) -> contextlib.AbstractContextManager:
    """timm attention in separate steps instead of the fused kernel, put back on exit.

    The backward pass of the fused kernel in bfloat16 on CPUs is several times slower than its parts.
    """
    return switched_off(module, "fused_attn") if on else contextlib.nullcontext()
