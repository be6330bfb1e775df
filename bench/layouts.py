"""Memory layout, bfloat16 and torch.compile of a classifier's passes: `python -m bench.layouts`.

Channels come last in the pixels alone, as `aha.Classifier` gives them to networks of timm on a CPU, or in the weights,
which then no longer save as they are. bfloat16 is that of training and refinement, by autocast. A pass is what the
objective makes most of: forward, and backward to the pixels, of random weights in evaluation mode; and forward alone,
as the metrics make it. Every variant gets the same pixels, channels first, as `aha.kernels.perturb` gives them. Times
are medians of interleaved rounds; differences are to the plain network, relative to its largest value.
"""

from __future__ import annotations

import copy
import json
import time
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from torch import Tensor, nn

from aha import plan
from aha.files import write_atomically
from aha.precision import autocast, in_fast_layout, stepwise_attention

from . import timing

MODELS = ("tf_efficientnet_lite0", "resnet18", "vit_tiny_patch16_224")


def variants(module: nn.Module, compiled: bool) -> dict[str, Callable[[Tensor], Tensor]]:
    """Name → the network in that way."""
    last = copy.deepcopy(module).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def half(pixels: Tensor) -> Tensor:
        pixels = in_fast_layout(pixels)
        with autocast("bf16", pixels.device), stepwise_attention(module, pixels.device.type == "cpu"):
            return module(pixels).float()

    found: dict[str, Callable[[Tensor], Tensor]] = {
        "plain": module,
        "pixels_last": lambda pixels: module(pixels.contiguous(memory_format=torch.channels_last)),
        "weights_last": last,
        "bf16": half,
    }
    return {**found, "compiled": torch.compile(copy.deepcopy(module))} if compiled else found


def measure(
    model: str, batch: int, device: str, seconds: float, clock: Callable[[], float], compiled: bool = True
) -> dict[str, Any]:
    """Milliseconds by variant and pass, and how far the values are from those of the plain network."""
    import timm

    torch.manual_seed(0)
    module = timm.create_model(model, pretrained=False).eval().requires_grad_(False).to(device)
    pixels = torch.randn(batch, *module.default_cfg["input_size"], device=device)
    calls: dict[str, Callable[[], object]] = {}
    found: dict[str, Any] = {}
    values: dict[str, tuple[Tensor, Tensor]] = {}
    for name, run in variants(module, compiled).items():

        def forward(run: Callable[[Tensor], Tensor] = run) -> None:
            with torch.no_grad():
                run(pixels)

        def both(run: Callable[[Tensor], Tensor] = run) -> tuple[Tensor, Tensor]:
            leaf = pixels.clone().requires_grad_()
            logits = run(leaf)
            return logits.detach(), torch.autograd.grad(logits.softmax(dim=1)[:, 0].sum(), leaf)[0]

        start = time.perf_counter()
        values[name] = both()
        forward()
        found[name] = {"first_s": round(time.perf_counter() - start, 1)}
        calls |= {f"{name} forward": forward, f"{name} both": both}
    for name, parts in values.items():
        pairs = zip(parts, values["plain"], strict=True)
        found[name]["difference"] = [float((a - b).abs().max() / b.abs().max()) for a, b in pairs]
    with unittest.mock.patch.object(time, "perf_counter", clock):
        rounds = timing.interleaved(calls, device, seconds, steady=False)
    for name, taken in rounds.items():
        variant, kind = name.split()
        found[variant][f"{kind}_ms"] = [round(value, 1) for value in taken]
    for name in found:
        for kind in ("forward_ms", "both_ms"):
            found[name][kind.replace("ms", "ratio")] = round(found[name][kind][0] / found["plain"][kind][0], 3)
    return {"model": model, "batch": batch, **found}


def main(
    device: Literal["cpu", "cuda"] = "cpu",
    models: tuple[str, ...] = MODELS,
    batch: int = 8,
    seconds: float = 20.0,
    clock: Literal["wall", "process"] = "wall",
    compiled: bool = True,
    out: Path | None = None,
) -> None:
    """Measure and print.

    Args:
        device: where.
        models: timm names, random weights.
        batch: perturbed images in a pass.
        seconds: of the rounds of a model, at least five.
        clock: wall, or the process's own time: one thread on a machine that others use too, without a GPU.
        compiled: with torch.compile, which takes minutes on a CPU.
        out: folder for layouts_<device>.json.
    """
    count = time.perf_counter if clock == "wall" else time.process_time
    whole: dict[str, Any] = {
        "device": plan.device_name(torch.device(device)),
        "torch": torch.__version__,
        "clock": clock,
    }
    whole["models"] = []
    for model in models:
        whole["models"].append(measure(model, batch, device, seconds, count, compiled))
        print(json.dumps(whole["models"][-1], indent=2))
        if out is not None:
            write_atomically(out / f"layouts_{device}.json", (json.dumps(whole, indent=2) + "\n").encode())


if __name__ == "__main__":
    tyro.cli(main)
