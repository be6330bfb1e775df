"""Where the pieces of long work are kept while it is done: in memory, or in a folder that outlives it.

A piece is what was computed for one shard, a fixed run of images, as named numpy arrays. Its key is a path of
names. Pieces are complete or absent, so a run that was interrupted continues where it stopped, and processes that
share a folder never meet in one file.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from .files import write_atomically

Arrays = Mapping[str, np.ndarray]
Key = tuple[str, ...]


class Store(Protocol):
    """Pieces by key."""

    keeps_maps: bool

    def has(self, key: Key) -> bool: ...

    def get(self, key: Key) -> Arrays | None: ...

    def put(self, key: Key, arrays: Arrays) -> None: ...


class Memory:
    """Pieces of this process, until `gather`; maps are measured and forgotten."""

    keeps_maps = False

    def __init__(self) -> None:
        self._pieces: dict[Key, Arrays] = {}

    def has(self, key: Key) -> bool:
        return key in self._pieces

    def get(self, key: Key) -> Arrays | None:
        return self._pieces.get(key)

    def put(self, key: Key, arrays: Arrays) -> None:
        self._pieces[key] = arrays

    def gather(self) -> None:
        """Take in the pieces of the other processes of a run, which call this too."""
        from accelerate.utils import gather_object

        for pieces in gather_object([self._pieces]):
            self._pieces.update(pieces)


class Folder:
    """Pieces as .npz files under ``root``."""

    keeps_maps = True

    def __init__(self, root: Path):
        self.root = root

    def path(self, key: Key) -> Path:
        """The file of a piece."""
        return self.root.joinpath(*key[:-1], f"{key[-1]}.npz")

    def has(self, key: Key) -> bool:
        return self.path(key).is_file()

    def get(self, key: Key) -> Arrays | None:
        try:
            with np.load(self.path(key), allow_pickle=False) as file:
                return dict(file)
        except FileNotFoundError:
            return None
        except (ValueError, EOFError, OSError, zipfile.BadZipFile):
            self.path(key).unlink(missing_ok=True)  # damaged on disk: the next run makes it again
            return None

    def put(self, key: Key, arrays: Arrays) -> None:
        content = io.BytesIO()
        np.savez(content, **dict(arrays))  # type: ignore[arg-type]  # numpy's stub takes names for its flag
        write_atomically(self.path(key), content.getvalue())


def pack_maps(maps: Tensor) -> dict[str, np.ndarray]:
    """(B, 1, H, W) → half precision relative to each map's largest magnitude, so that no scale over- or underflows."""
    maps = maps.detach().float()
    scale = maps.abs().amax(dim=(1, 2, 3)).clamp_min(torch.finfo(torch.float32).tiny)
    return {"maps": (maps / scale[:, None, None, None]).half().numpy(force=True), "scale": scale.numpy(force=True)}


def unpack_maps(arrays: Arrays, device: torch.device | str = "cpu") -> Tensor:
    """What `pack_maps` packed, rounded: (B, 1, H, W) float32."""
    maps, scale = torch.from_numpy(arrays["maps"]).to(device), torch.from_numpy(arrays["scale"]).to(device)
    return maps.float() * scale[:, None, None, None]
