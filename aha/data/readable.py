"""Data sets of which some files cannot be read, for work that must go on."""

from __future__ import annotations

from typing import Any

import torch

from aha.checks import check_item
from aha.data.images import ImageReadError
from aha.data.split import identity


class Readable(torch.utils.data.Dataset):
    """``data``, with the next readable item in place of one that cannot be read.

    Which item that is depends on the index alone: a resumed training sees the same images, bit for bit. In another
    epoch of a data set with virtual epochs it is that epoch's. Items carry "failed": "", or the line that says why the
    item asked for could not be read; it passes through a DataLoader's workers and collation.

    Args:
        data: any map-style data set whose items are dicts.

    Raises:
        ImageReadError: on access, if not one item can be read.
    """

    def __init__(self, data: Any):
        self.data = data

    @property
    def virtual_epochs(self) -> bool:
        """Whether an index beyond the size is understood."""
        return getattr(self.data, "virtual_epochs", False)

    @property
    def class_names(self) -> Any:
        """Of the data set within, or None."""
        return getattr(self.data, "class_names", None)

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self):
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> dict[str, Any]:
        size = len(self.data)
        epoch, position = divmod(index, size)
        failed = ""
        for step in range(size):
            # within the epoch asked for, so that augmentation stays that epoch's
            asked = epoch * size + (position + step) % size
            try:
                return {**check_item(self.data[asked]), "failed": failed}
            except (ImageReadError, OSError) as error:
                failed = failed or " ".join(str(error).split()) or type(error).__name__
        raise ImageReadError(f"none of the {size} images can be read; the first: {failed}")

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """What a DataLoader asks for: the items of a batch, in one call where the data set within has that."""
        together = getattr(self.data, "__getitems__", None)
        if together is not None:
            try:
                return [{**check_item(item), "failed": ""} for item in together(indices)]
            except (ImageReadError, OSError):
                pass  # one by one, to find out which
        return [self[index] for index in indices]

    def identity(self, content: bool = True) -> dict[str, Any]:
        """That of the data set within."""
        return identity(self.data, content)


def readable(data: Any) -> Readable:
    """``data`` as `Readable`, once."""
    return data if isinstance(data, Readable) else Readable(data)
