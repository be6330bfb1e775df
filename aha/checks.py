"""Checks at the door: one clear line for bad input, before anything is computed."""

import collections.abc
import dataclasses
import functools
import inspect
import math
import numbers
import os
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from .kernels.messages import MOST_NUMBERS, describe, is_plain, short

P = ParamSpec("P")
R = TypeVar("R")

MOST_SIDE = 2**15  # pixels of an image: 12 GB as RGB in float32
MOST_POINTS = 2**16  # of a curve
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # that can be computed with


class _Kind(NamedTuple):
    """What an annotation accepts, and how to say it."""

    fits: Callable[[Any], bool]
    words: str


# what Python and PyTorch raise from inside where an argument is of another kind than expected
_INSIDE = (
    TypeError,
    AttributeError,
    RuntimeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    MemoryError,
    ValueError,
    OSError,
)


def _is_clear(error: Exception) -> bool:
    """Whether it is one of this library's own lines, which say what came: what is accepted."""
    return isinstance(error, (ValueError, OSError)) and ": " in str(error) and "\n" not in str(error)


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: bad arguments are one line, also those that no check of ``function`` itself has in mind.

    What fails inside is laid to the first argument that is not of the kind its annotation says: numbers are finite,
    tensors dense and real, with values. So is what takes more memory than there is; other errors stay as they are.
    """
    signature = inspect.signature(function)
    # a generator fails later than when it is called
    at_once = inspect.isgeneratorfunction(function)

    @functools.wraps(function)
    def door(*args: P.args, **kwargs: P.kwargs) -> R:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and not value.is_nested and value.numel() > MOST_NUMBERS:
                raise ValueError(f"a tensor is {describe(value)}: give at most {MOST_NUMBERS} numbers")
        if at_once:
            check_arguments(function, signature.bind(*args, **kwargs).arguments)
        try:
            return function(*args, **kwargs)
        except _INSIDE as error:
            if _is_clear(error):
                raise
            try:
                given = signature.bind(*args, **kwargs).arguments
            except TypeError:  # arguments that it does not have
                raise error from None
            try:
                check_arguments(function, given)
            except ValueError as reason:
                raise reason from error
            if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
                raise ValueError(f"{function.__name__} takes more memory than there is: give less at a time") from error
            raise

    return door


def check_arguments(function: Any, arguments: Mapping[str, Any]) -> None:
    """ValueError for the first of ``arguments``, by name, that is not of the kind that ``function`` annotates."""
    for name, kind in _kinds(function).items():
        if name in arguments and not kind.fits(arguments[name]):
            raise ValueError(f"{name}={short(arguments[name])}: give {kind.words}")


def checked_fields(check: Callable[[Any], None]) -> Callable[[Any], None]:
    """Decorator of a dataclass's ``__post_init__``: the same for its fields, also for those that ``check`` ignores."""

    @functools.wraps(check)
    def door(settings: Any) -> None:
        try:
            check(settings)
        except _INSIDE as error:
            if _is_clear(error):
                raise
            try:
                _check_fields(settings)
            except ValueError as reason:
                raise reason from error
            raise
        _check_fields(settings)

    return door


def _check_fields(settings: Any) -> None:
    given = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings) if field.init}
    check_arguments(type(settings), given)


@functools.cache
def _kinds(function: Any) -> dict[str, _Kind]:
    """By name, of the annotations that say something now; a name that is imported for type checkers says nothing."""
    where = vars(inspect.getmodule(function)) if inspect.isclass(function) else function.__globals__
    kinds = {}
    for name, hint in inspect.get_annotations(function).items():
        try:
            hint = typing.get_type_hints(types.SimpleNamespace(__annotations__={name: hint}), where)[name]
        except NameError:
            continue
        kinds[name] = _kind(hint)
    if not inspect.isclass(function):
        for parameter in inspect.signature(function).parameters.values():
            if parameter.kind == inspect.Parameter.VAR_KEYWORD:
                kinds.pop(parameter.name, None)
            elif parameter.kind == inspect.Parameter.VAR_POSITIONAL and parameter.name in kinds:
                kinds[parameter.name] = _each(kinds[parameter.name])
    kinds.pop("return", None)
    return kinds


_ANYTHING = _Kind(lambda value: True, "anything")


def _kind(hint: Any) -> _Kind:
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if hint in _SIMPLE:
        return _SIMPLE[hint]
    if origin in (typing.Union, types.UnionType):
        kinds = [_kind(part) for part in inside]
        words = dict.fromkeys(kind.words for kind in kinds)
        return _Kind(lambda value: any(kind.fits(value) for kind in kinds), " or ".join(words))
    if origin is typing.Literal:
        return _Kind(
            lambda value: any(type(value) is type(x) and value == x for x in inside),
            f"one of {', '.join(map(repr, inside))}",
        )
    if origin is tuple and inside[1:] != (...,):
        parts = [_kind(part) for part in inside]
        return _Kind(
            lambda value: (
                _is_sequence(value)
                and len(value) == len(parts)
                and all(part.fits(one) for part, one in zip(parts, value, strict=True))
            ),
            f"({', '.join(part.words for part in parts)})",
        )
    if origin in (tuple, list, collections.abc.Sequence):
        return _each(_kind(inside[0]))
    if origin in (dict, collections.abc.Mapping):
        return _Kind(lambda value: isinstance(value, Mapping), "a dict")
    if origin is collections.abc.Callable:
        return _Kind(callable, "a function")
    if isinstance(hint, type) and not getattr(hint, "_is_protocol", False):
        article = "an" if hint.__name__[0] in "AEIOU" else "a"
        return _Kind(lambda value: isinstance(value, hint), f"{article} {hint.__name__}")
    return _ANYTHING


def _each(kind: _Kind) -> _Kind:
    return _Kind(lambda value: _is_sequence(value) and all(map(kind.fits, value)), f"a list, each of it {kind.words}")


def _is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and -(2**63) <= int(value) < 2**63


def _is_finite(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(_as_float(value))


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer beyond all floats
        return math.inf


_SIMPLE: dict[Any, _Kind] = {
    Any: _ANYTHING,
    object: _ANYTHING,
    type(None): _Kind(lambda value: value is None, "None"),
    bool: _Kind(lambda value: isinstance(value, bool), "True or False"),
    int: _Kind(_is_whole, "an integer"),
    float: _Kind(_is_finite, "a finite number"),
    str: _Kind(lambda value: isinstance(value, str) and "\0" not in value, "a text"),
    os.PathLike: _Kind(lambda value: isinstance(value, os.PathLike), "a path"),
    Tensor: _Kind(
        lambda value: (
            is_plain(value) and not value.is_quantized and not value.is_complex() and value.numel() <= MOST_NUMBERS
        ),
        "a dense tensor of real numbers",
    ),
}


def check_integer(name: str, value: Any, low: int, high: int | None = None) -> int:
    """Return ``value`` as an int in ``low`` … ``high``; Python's, NumPy's and PyTorch's integers are taken."""
    if isinstance(value, Tensor) and value.ndim == 0 and not value.is_floating_point():
        value = value.item()
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < low or (high is not None and value > high):
        accepted = f"an integer ≥ {low}" if high is None else f"an integer in {low} … {high}"
        raise ValueError(f"{name}={short(value)}: give {accepted}")
    return int(value)


def check_number(name: str, value: Any, low: float, above: bool = False, high: float | None = None) -> float:
    """Return ``value`` as a finite float ≥ ``low``, or greater if ``above``, and ≤ ``high`` if given."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    most = math.nextafter(math.inf, 0) if high is None else high
    if not real or not (low < value <= most if above else low <= value <= most):
        accepted = f"{'>' if above else '≥'} {low}" + ("" if high is None else f" and ≤ {high}")
        raise ValueError(f"{name}={short(value)}: give a finite number {accepted}")
    return float(value)


def check_choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """Return ``value`` if it is one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}={short(value)} is not known: choose one of {', '.join(choices)}")
    return value


def check_pixels(name: str, images: Tensor) -> Tensor:
    """Return ``images`` if they are floating point (B, C, H, W) with pixels, in any range."""
    if images.ndim != 4 or images.dtype not in FLOATS or 0 in images.shape[1:]:
        raise ValueError(f"{name} is {describe(images)}: give floating point (B, C, H, W) with at least one pixel")
    return images


def check_seed(seed: Any) -> int:
    """Return ``seed`` as an int in 0 … 2⁶³ − 1."""
    return check_integer("seed", seed, 0, 2**63 - 1)


def check_size(name: str, value: Any) -> tuple[int, int]:
    """Return (H, W) in pixels; one number stands for both."""
    sides = (value, value) if isinstance(value, numbers.Integral) else value
    if not isinstance(sides, Sequence) or isinstance(sides, str) or len(sides) != 2:
        raise ValueError(f"{name}={short(value)}: give (height, width) in pixels, or one number for both")
    return check_integer(name, sides[0], 1, MOST_SIDE), check_integer(name, sides[1], 1, MOST_SIDE)


def _per_channel(name: str, values: Any) -> list[float]:
    try:
        return [float(value) for value in values]
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{name}={short(values)}: give one number per channel, such as (0.5, 0.5, 0.5)") from error


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
        raise ValueError(f"mean_colour={short(colour)}: give {channels} values in [0, 1], one per channel")
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
    if not is_plain(images) or images.is_quantized:
        layout = "nested" if images.is_nested else str(images.layout)
        kind = "on the meta device" if images.is_meta else "quantised" if images.is_quantized else layout
        raise ValueError(f"images are {kind}: give a dense tensor (B, {channels}, H, W) with values")
    shape = tuple(images.shape)
    if images.ndim != 4 or shape[1] != channels:
        raise ValueError(f"images has shape {shape}: give (B, {channels}, H, W)")
    if 0 in shape:
        raise ValueError(f"images has shape {shape}: the batch is empty, give at least one image")
    if images.dtype not in FLOATS:
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
    if not is_plain(maps) or tuple(maps.shape) not in (
        (batch, 1, height, width),
        (batch, height, width),
    ):
        got = tuple(maps.shape) if is_plain(maps) else describe(maps)
        raise ValueError(f"maps is {got}: give ({batch}, 1, {height}, {width}), one value per pixel of the images")
    if maps.is_complex() or maps.is_quantized or maps.dtype == torch.bool:
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
        raise ValueError(f"label {short(value)} is not an integer: give the number of a class, −1 where it is unknown")
    if not -1 <= value < classes:
        raise ValueError(f"label {int(value)} is not one of the classes 0 … {classes - 1}, nor −1 for unknown")
    return int(value)


def check_target(target: Tensor | Sequence[int] | int, batch: int, classes: int, device: torch.device) -> Tensor:
    """Return ``target`` as int64 (B,): an int serves every image, else one class per image is expected."""
    if isinstance(target, numbers.Integral) and not isinstance(target, bool):
        target = [int(target)] * batch
    try:
        value = torch.as_tensor(target)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise ValueError(f"target={short(target)}: give one class index for all images, or one each") from error
    if not is_plain(value):
        raise ValueError(f"target is {describe(value)}: give integer class indices")
    if value.ndim == 0:
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
