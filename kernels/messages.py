"""How a message says what came, in one line; for the checks of this floor and of the one above."""

import torch
from torch import Tensor

MOST_NUMBERS = 2**33  # of a tensor: 34 GB in float32; a tensor that was expanded may claim any number


def is_plain(value: object) -> bool:
    """Whether it is a dense tensor with values: not sparse, nested or on meta."""
    if not isinstance(value, Tensor) or value.is_nested:
        return False
    return value.layout == torch.strided and value.device.type != "meta"


def describe(value: object) -> str:
    """The kind of a value; of a tensor also its type and shape."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    if value.is_nested:
        return "a nested tensor"
    text = f"{value.dtype} of shape {tuple(value.shape)}".removeprefix("torch.")
    if value.device.type == "meta":
        return f"{text} on meta, without values"
    return text if value.layout == torch.strided else f"{str(value.layout).removeprefix('torch.')} {text}"


def short(value: object) -> str:
    """The value itself, at most 60 characters; a tensor as `describe` says it."""
    text = describe(value) if isinstance(value, Tensor) else " ".join(_written(value).split())
    return text if len(text) <= 60 else f"{text[:57]}…"


def _written(value: object) -> str:
    try:
        return repr(value)
    except Exception:  # a value's own code, or an integer of more digits than Python writes
        return describe(value)
