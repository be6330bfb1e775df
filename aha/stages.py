"""Features of a network without an interface for them: forward hooks on the modules that close its last stages."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .geometry import as_maps

LEVELS = 4


class _Seen(NamedTuple):
    """What one module gave in a pass: its place over the image, how deep it is nested, whether it is one of a row of
    equal blocks."""

    module: nn.Module
    grid: tuple[int, int]
    depth: int
    block: bool


def quarters(depth: int) -> list[int]:
    """Four block indices spread over ``depth`` blocks, the last one included; a shallow network repeats some."""
    if depth == 24:
        return [4, 11, 17, 23]
    return [max(0, round((i + 1) * depth / LEVELS) - 1) for i in range(LEVELS)]


def find_stages(module: nn.Module, pixels: Tensor, name: str) -> list[nn.Module]:
    """The `LEVELS` modules whose outputs are the features of ``module``, shallow to deep, from one pass of ``pixels``.

    A stage is what gives maps of one size; the last of the least nested modules that do closes it: inside the next
    stage's first block others may still give that size. A network of one size, such as a vision transformer, gives
    the outputs of blocks a quarter of its depth apart.

    Raises:
        ValueError: in one line, if nothing inside gives maps over the image; it says to name an encoder.
    """
    size = (int(pixels.shape[-2]), int(pixels.shape[-1]))
    seen: list[_Seen] = []
    runs: dict[nn.Module, int] = {}
    depths = {part: place.count(".") for place, part in module.named_modules()}
    siblings = {
        block
        for row in module.modules()
        if isinstance(row, (nn.Sequential, nn.ModuleList)) and len(row) > 1
        for block in row
        if sum(type(other) is type(block) for other in row) > 1 and next(block.children(), None) is not None
    }

    def note(part: nn.Module, _args: Any, out: Any) -> None:
        runs[part] = runs.get(part, 0) + 1
        # what does not come once for every image, such as a table of position biases, is no feature of theirs
        of_images = isinstance(out, Tensor) and out.dim() > 2 and len(out) == len(pixels)
        maps = as_maps(out, size) if of_images else None
        if maps is not None and maps.shape[-2] * maps.shape[-1] > 1:
            grid = (int(maps.shape[-2]), int(maps.shape[-1]))
            seen.append(_Seen(part, grid, depths[part], part in siblings))

    with ExitStack() as stack:
        for part in depths:
            # hooks see nothing in TorchScript
            if part is not module and not isinstance(part, torch.jit.ScriptModule):
                stack.callback(part.register_forward_hook(note).remove)
        module(pixels)
    stages: dict[tuple[int, int], list[_Seen]] = {}
    for entry in seen:
        # what enlarges maps again, such as pooling to a fixed size, ends the network's own; and a module that runs more
        # than once, such as a shared activation, is no place
        if runs[entry.module] == 1 and (entry.grid in stages or all(entry.grid < grid for grid in stages)):
            stages.setdefault(entry.grid, []).append(entry)
    if not stages:
        raise ValueError(
            f"{name} gives no intermediate features: give encoder= the name of a timm model, such as "
            "'vit_small_patch14_dinov2.lvd142m'"
        )
    if len(stages) == 1:
        (only,) = stages.values()
        row = [entry for entry in only if entry.block] or only
        return [row[index].module for index in quarters(len(row))]
    closing = [_closing(stage) for stage in list(stages.values())[-LEVELS:]]
    return [closing[0]] * (LEVELS - len(closing)) + closing


def _closing(stage: Sequence[_Seen]) -> nn.Module:
    least = min(entry.depth for entry in stage)
    return [entry.module for entry in stage if entry.depth == least][-1]


def seen_at(stages: Sequence[nn.Module], module: nn.Module, pixels: Tensor) -> list[Tensor]:
    """(N, C, h, w) of each of ``stages`` in one pass of ``module``."""
    size = (int(pixels.shape[-2]), int(pixels.shape[-1]))
    found: dict[nn.Module, Tensor] = {}

    def keep(part: nn.Module, _args: Any, out: Tensor) -> None:
        maps = as_maps(out, size)
        if maps is None:
            raise ValueError(
                f"{type(part).__name__} gives {tuple(out.shape)} for images of {size[0]}×{size[1]}, no maps over them: "
                "resize them, or name another encoder"
            )
        # a copy, for what follows may work in place
        found[part] = maps.clone()

    with ExitStack() as stack:
        for part in dict.fromkeys(stages):
            stack.callback(part.register_forward_hook(keep).remove)
        module(pixels)
    return [found[stage] for stage in stages]
