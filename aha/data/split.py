"""Parts of a data set that keep its virtual epochs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


class Part(torch.utils.data.Dataset):
    """The items of ``data`` at ``indices``; an index beyond the part's size counts epochs, as in the whole."""

    def __init__(self, data: Any, indices: Sequence[int]):
        self.data = data
        self.indices = list(indices)
        self.virtual_epochs = getattr(data, "virtual_epochs", False)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        epoch, position = divmod(index, len(self.indices))
        if epoch and not self.virtual_epochs:
            raise IndexError(index)
        return self.data[epoch * len(self.data) + self.indices[position]]


def hold_out(size: int, count: int) -> tuple[list[int], list[int]]:
    """Indices (kept for training, held out): ``count`` of ``size`` evenly spaced, the same in every run.

    Raises:
        ValueError: if nothing would be left on one side.
    """
    if not 0 < count < size:
        raise ValueError(f"cannot hold out {count} of {size} images: give 1 … {size - 1}")
    held = {i * size // count for i in range(count)}
    return [i for i in range(size) if i not in held], sorted(held)
