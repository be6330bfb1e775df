"""Checks at the door: one clear line for bad input, before anything is computed."""

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def check_integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """Return ``value`` as an int in ``low`` … ``high``; Python's, NumPy's and PyTorch's integers are taken."""
    if isinstance(value, Tensor) and value.ndim == 0 and not value.is_floating_point():
        value = value.item()
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):
        accepted = f"an integer ≥ {low}" if high is None else f"an integer in {low} … {high}"
        raise ValueError(f"{name}={value!r}: give {accepted}")
    return int(value)


def check_number(name: str, value: Any, low: float, above: bool = False) -> float:
    """Return ``value`` as a finite float ≥ ``low``, or greater if ``above``."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not (value > low if above else value >= low) or value == float("inf"):
        raise ValueError(f"{name}={value!r}: give a finite number {'>' if above else '≥'} {low}")
    return float(value)


def check_seed(seed: Any) -> int:
    """Return ``seed`` as an int in 0 … 2⁶³ − 1."""
    return check_integer("seed", seed, 0, 2**63 - 1)


def check_size(name: str, value: Any) -> tuple[int, int]:
    """Return (H, W) in pixels; one number stands for both."""
    sides = (value, value) if isinstance(value, numbers.Integral) else value
    if not isinstance(sides, Sequence) or isinstance(sides, str) or len(sides) != 2:
        raise ValueError(f"{name}={value!r}: give (height, width) in pixels, or one number for both")
    return check_integer(name, sides[0], 1), check_integer(name, sides[1], 1)


def _per_channel(name: str, values: Any) -> list[float]:
    try:
        return [float(value) for value in values]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}={values!r}: give one number per channel, such as (0.5, 0.5, 0.5)") from error


def check_normalisation(mean: Any, std: Any) -> int:
    """The number of channels of a normalisation (pixels − mean)/std of pixels in [0, 1]; ValueError if it is none."""
    means, stds = _per_channel("mean", mean), _per_channel("std", std)
    if len(means) != len(stds) or not means:
        raise ValueError(f"mean has {len(means)} values, std {len(stds)}: give one of each per channel")
    for value in means:
        if not 0 <= value <= 1:
            raise ValueError(f"mean {value:.4g}: give it for pixels in [0, 1] (a mean of 0 … 255 is divided by 255)")
    for value in stds:
        if not 0 < value <= 1:
            raise ValueError(
                f"std {value:.4g}: give it for pixels in [0, 1], above 0 (a std of 0 … 255 is divided by 255)"
            )
    return len(means)


def check_colour(colour: Any, channels: int) -> list[float]:
    """Return a colour as ``channels`` numbers in [0, 1]."""
    values = _per_channel("mean_colour", colour)
    if len(values) != channels or not all(0 <= value <= 1 for value in values):
        raise ValueError(f"mean_colour={colour!r}: give {channels} values in [0, 1], one per channel")
    return values


class NotFiniteError(ValueError):
    """NaN or infinite values where there must be none.

    Attributes:
        rows: the images concerned, by their position in the batch.
        plain: the message without them.
    """

    def __init__(self, what: str, advice: str, rows: Sequence[int], batch: int):
        where = f"image {rows[0]}" if len(rows) == 1 else f"{len(rows)} of {batch} images"
        super().__init__(f"{what} for {where}: {advice}")
        self.rows = tuple(rows)
        self.plain = f"{what}: {advice}"


def check_answers(values: Tensor, who: str) -> Tensor:
    """Return the classifier's answers (B, …) if they are finite, else `NotFiniteError`.

    Nothing else would show it: the argmax over NaN is a class too.
    """
    return _finite(values, f"{who} returns NaN or infinite values", "nothing can be explained there")


def finite_maps(maps: Tensor, who: str) -> Tensor:
    """Return maps (B, …) if all values are finite, else `NotFiniteError`."""
    return _finite(maps, f"{who} hold NaN or infinite values", "an attribution must be finite")


def _finite(values: Tensor, what: str, advice: str) -> Tensor:
    finite = torch.isfinite(values.detach()).flatten(1).all(dim=1)
    if not finite.all():
        raise NotFiniteError(what, advice, (~finite).nonzero()[:, 0].tolist(), len(finite))
    return values


def check_images(images: Tensor, channels: int = 3) -> Tensor:
    """Return ``images`` if they keep the pixel contract: (B, C, H, W) floating point, finite, in [0, 1], B ≥ 1.

    Raises:
        ValueError: saying what came, what is accepted and what to do.
    """
    if not isinstance(images, Tensor):
        raise ValueError(f"images is a {type(images).__name__}: give a tensor (B, {channels}, H, W)")
    if images.layout != torch.strided or images.is_quantized or images.is_meta:
        kind = "on the meta device" if images.is_meta else "quantised" if images.is_quantized else str(images.layout)
        raise ValueError(f"images are {kind}: give a dense tensor (B, {channels}, H, W) with values")
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
    if maps.is_complex() or maps.dtype == torch.bool:
        raise ValueError(f"maps are {maps.dtype}: give real numbers, one value per pixel")
    return finite_maps(maps.detach().reshape(batch, height, width).float(), "maps")


def check_item(item: Any) -> Mapping[str, Any]:
    """Return an item of a data set if it is a dict that holds an "image"; torchvision's are tuples."""
    if not isinstance(item, Mapping) or "image" not in item:
        raise ValueError(f'an item of the data is a {type(item).__name__}: give dicts with "image" and "label"')
    return item


def check_label(label: Any, classes: int) -> int:
    """Return the label of an item as an int: a class of the classifier, or −1 where it is unknown."""
    value = label.item() if isinstance(label, Tensor) and label.numel() == 1 else label
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or value != int(value):
        raise ValueError(f"label {value!r} is not an integer: give the number of a class, −1 where it is unknown")
    if not -1 <= value < classes:
        raise ValueError(f"label {int(value)} is not one of the classes 0 … {classes - 1}, nor −1 for unknown")
    return int(value)


def check_target(target: Tensor | Sequence[int] | int, batch: int, classes: int, device: torch.device) -> Tensor:
    """Return ``target`` as int64 (B,): an int serves every image, else one class per image is expected."""
    if isinstance(target, numbers.Integral) and not isinstance(target, bool):
        target = [int(target)] * batch
    try:
        value = torch.as_tensor(target)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"target={target!r}: give one class index for all images, or one each") from error
    if value.ndim == 0 and value.numel() == 1:
        value = value.expand(batch)
    if value.is_complex() or value.is_floating_point() or value.dtype == torch.bool:
        raise ValueError(f"target is {value.dtype}: give integer class indices")
    if tuple(value.shape) != (batch,):
        raise ValueError(f"target has shape {tuple(value.shape)}: give one class per image, ({batch},)")
    if batch and (value.min() < 0 or value.max() >= classes):
        bad = value[(value < 0) | (value >= classes)][0].item()
        raise ValueError(f"target {bad} is out of range: the classifier has classes 0 … {classes - 1}")
    with torch.inference_mode(False):  # what autograd meets must not be an inference tensor
        return value.to(device=device, dtype=torch.int64, copy=True)
