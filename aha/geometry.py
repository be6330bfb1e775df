"""How what a layer gives lies over the image: maps with channels first or last, tokens in rows, padding included.

Nothing is assumed of a network's layout that the image's own shape can tell: a grid of cells has to have the image's
proportions. Wrongly read maps would be silently wrong attributions.
"""

from __future__ import annotations

import math

from torch import Tensor

Size = tuple[int, int]

# class, distillation and register tokens that come before the patches
_PREFIXES = (0, 1, 2, 5)


def mismatch(grid: Size, image: Size) -> float:
    """How many rows ``grid`` (h, w) is away from the proportions of ``image`` (H, W); infinite where it cannot be one.

    A row is always allowed, for padding to whole cells, and a quarter of them, for convolutions that lose the border.
    """
    (rows, cols), (height, width) = grid, image
    off = abs(rows - cols * height / width)
    slack = max(1.0, rows / 4)
    return off if off <= slack and rows <= 1.25 * height and cols <= 1.25 * width else math.inf


def channels_first(output: Tensor, image: Size, last: bool | None = None) -> Tensor | None:
    """A view of maps (N, C, h, w) or (N, h, w, C) as (N, C, h, w); None if neither fits the image.

    Args:
        last: whether channels come last, where the network says so or the user knows; None: where only that fits, or
            fits exactly while channels first does not.
    """
    first = mismatch((output.shape[2], output.shape[3]), image)
    other = mismatch((output.shape[1], output.shape[2]), image)
    if last is None:
        last = math.isinf(first) or (other == 0 and first > 0)
    if math.isinf(other if last else first):
        return None
    return output.permute(0, 3, 1, 2) if last else output


def token_grid(tokens: int, image: Size) -> tuple[int, int, int] | None:
    """How ``tokens`` cover the image with square patches: (prefix tokens, rows, cols), else None."""
    height, width = image
    for prefix in _PREFIXES:
        patches = tokens - prefix
        if patches < 2:
            continue
        rows = max(1, round(math.sqrt(patches * height / width)))
        for guess in (rows, rows - 1, rows + 1):
            if guess < 1 or patches % guess:
                continue
            cols = patches // guess
            # patches of one size, the last ones perhaps padded
            fitting = range(math.ceil(height / guess), math.ceil(height / max(1, guess - 1)) + 1)
            if any(-(-height // side) == guess and -(-width // side) == cols for side in fitting):
                return prefix, guess, cols
    return None


def as_maps(output: Tensor, image: Size, last: bool | None = None) -> Tensor | None:
    """A view of what a layer gives for images of size ``image`` as (N, C, h, w), prefix tokens left out; None if it is
    neither maps nor tokens of the image."""
    if output.dim() == 4:
        return channels_first(output, image, last)
    if output.dim() == 3 and (found := token_grid(output.shape[1], image)):
        prefix, rows, cols = found
        return output[:, prefix:].transpose(1, 2).unflatten(-1, (rows, cols))
    return None
