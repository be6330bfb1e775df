"""Checks at the door: one clear line for bad input, before anything is computed."""

from collections.abc import Sequence

import torch
from torch import Tensor


def check_images(images: Tensor, channels: int = 3) -> Tensor:
    """Return ``images`` if they keep the pixel contract: (B, C, H, W) floating point, finite, in [0, 1], B ≥ 1.

    Raises:
        ValueError: saying what came, what is accepted and what to do.
    """
    if not isinstance(images, Tensor):
        raise ValueError(f"images is a {type(images).__name__}: give a tensor (B, {channels}, H, W)")
    shape = tuple(images.shape)
    if images.ndim != 4 or shape[1] != channels:
        raise ValueError(f"images has shape {shape}: give (B, {channels}, H, W)")
    if 0 in shape:
        raise ValueError(f"images has shape {shape}: the batch is empty, give at least one image")
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}: give floating point in [0, 1] (divide 8-bit images by 255)")
    low, high = images.detach().aminmax()
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise ValueError("images hold NaN or infinite values: give finite pixels in [0, 1]")
    if low < -1e-3 or high > 1 + 1e-3:
        raise ValueError(
            f"images span {low.item():.3g} … {high.item():.3g}: give RGB in [0, 1], not normalised or 8-bit pixels"
        )
    return images


def check_maps(maps: Tensor, images: Tensor) -> Tensor:
    """Return ``maps`` as (B, H, W) float32 if they are finite attributions of ``images``."""
    batch, _, height, width = images.shape
    if not isinstance(maps, Tensor) or tuple(maps.shape) not in (
        (batch, 1, height, width),
        (batch, height, width),
    ):
        got = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
        raise ValueError(f"maps is {got}: give ({batch}, 1, {height}, {width}), one value per pixel of the images")
    if not torch.isfinite(maps).all():
        raise ValueError("maps hold NaN or infinite values: an attribution must be finite")
    return maps.detach().reshape(batch, height, width).float()


def check_target(target: Tensor | Sequence[int] | int, batch: int, classes: int, device: torch.device) -> Tensor:
    """Return ``target`` as int64 (B,): an int serves every image, else one class per image is expected."""
    if isinstance(target, int):
        target = [target] * batch
    value = torch.as_tensor(target)
    if value.is_floating_point() or value.dtype == torch.bool:
        raise ValueError(f"target is {value.dtype}: give integer class indices")
    if tuple(value.shape) != (batch,):
        raise ValueError(f"target has shape {tuple(value.shape)}: give one class per image, ({batch},)")
    if batch and (value.min() < 0 or value.max() >= classes):
        bad = value[(value < 0) | (value >= classes)][0].item()
        raise ValueError(f"target {bad} is out of range: the classifier has classes 0 … {classes - 1}")
    return value.to(device=device, dtype=torch.int64)
