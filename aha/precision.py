"""Mixed precision and memory layout: when bfloat16 and channels last pay, and what switches them on."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .checks import check_choice

PRECISIONS = ("auto", "bf16", "fp32")


def uses_bf16(precision: str, device: torch.device, weights: torch.dtype = torch.float32) -> bool:
    """Whether ``precision`` means bfloat16 for a network with these ``weights`` on ``device``.

    ``auto`` takes it for weights in float32 where the hardware multiplies it natively: CUDA from sm_80, CPUs with AMX
    tiles or AVX512-BF16, whose passes take half the time (bench/results/layouts_cpu.json). Elsewhere bfloat16 is
    emulated and several times slower than float32. Networks in other precisions keep their own: float64 was asked for
    by whoever made them, and autocast does not mix with half precision.

    Raises:
        ValueError: in one line, for another ``precision``, and for "bf16" where the weights are not in float32.
    """
    check_choice("precision", precision, PRECISIONS)
    if precision == "auto" and weights == torch.float32:
        if device.type == "cuda":
            return torch.cuda.get_device_capability(device) >= (8, 0)
        return device.type == "cpu" and any(cpu_multiplies().values())
    if precision == "bf16" and weights != torch.float32:
        name = str(weights).removeprefix("torch.")
        raise ValueError(f'precision="bf16" computes networks in float32 faster, this one is in {name}: give "auto"')
    return precision == "bf16"


def cpu_multiplies() -> dict[str, bool]:
    """Which of its ways to multiply bfloat16 this CPU has."""
    ways = {"AMX": "_is_amx_tile_supported", "AVX512-BF16": "_is_avx512_bf16_supported"}
    return {way: bool(getattr(torch.cpu, name, bool)()) for way, name in ways.items()}


def autocast(
    precision: str, device: torch.device, weights: torch.dtype = torch.float32
) -> contextlib.AbstractContextManager:
    """A fresh autocast context for a network with these ``weights``; without bfloat16 it switches an outer one off."""
    on = uses_bf16(precision, device, weights)
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
