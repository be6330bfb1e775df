"""Parts of a data set that keep its virtual epochs, and what identifies a data set."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from aha.checks import checked
from aha.kernels.messages import short


class Part(torch.utils.data.Dataset):
    """The items of ``data`` at ``indices``; an index beyond the part's size counts epochs, as in the whole."""

    def __init__(self, data: Any, indices: Sequence[int]):
        self.data = data
        try:
            self.indices = [int(index) for index in indices]
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ValueError(f"indices={short(indices)}: give integers, places in the data set") from error
        self.virtual_epochs = getattr(data, "virtual_epochs", False)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self):
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> dict[str, Any]:
        epoch, position = divmod(index, len(self.indices))
        if epoch and not self.virtual_epochs:
            raise IndexError(index)
        return self.data[epoch * len(self.data) + self.indices[position]]

    def identity(self, content: bool = True) -> dict[str, Any]:
        """What these items are, as JSON types; see `identity`."""
        return _identity_of_part(self.data, self.indices, content)


def identity(data: Any, content: bool = True) -> dict[str, Any]:
    """What a data set is, as JSON types: the key of kept results, or what a resumed training must share.

    Args:
        data: a data set with a method ``identity(content)``, such as `ImageFolder`, `Part`, `Scenes` and `Readable`;
            ``torch.utils.data.Subset`` of one. Of others, only the type and the length are known.
        content: read every image, so that a changed one is noticed; else paths, sizes and labels.
    """
    if callable(getattr(data, "identity", None)):
        return data.identity(content)
    if isinstance(data, torch.utils.data.Subset):
        return _identity_of_part(data.dataset, data.indices, content)
    known = {"type": type(data).__name__}
    try:
        return {**known, "images": len(data)}
    except (TypeError, RuntimeError):  # it has none, or is an array without dimensions
        return known


def _identity_of_part(data: Any, indices: Sequence[int], content: bool) -> dict[str, Any]:
    indices = [int(index) for index in indices]
    # a part of a part is one of the whole: of a large folder, only the few images that count are read
    while isinstance(data, Part):
        indices, data = [data.indices[index] for index in indices], data.data
    if hasattr(type(data), "relabelled"):  # a folder digests the part alone
        return data.identity(content, indices)
    digest = hashlib.sha256(",".join(map(str, indices)).encode()).hexdigest()
    return {"type": "Part", "images": len(indices), "indices": digest, "of": identity(data, content)}


@checked
def hold_out(size: int, count: int) -> tuple[list[int], list[int]]:
    """Indices (kept for training, held out): ``count`` of ``size`` evenly spaced, the same in every run.

    Raises:
        ValueError: if nothing would be left on one side.
    """
    if not 0 < count < size:
        raise ValueError(f"cannot hold out {count} of {size} images: give 1 … {size - 1}")
    held = {i * size // count for i in range(count)}
    return [i for i in range(size) if i not in held], sorted(held)
