"""Where the pieces of long work are kept while it is done: in memory, or in a folder that outlives it.

A piece is what was computed for one shard, a fixed run of images, as named numpy arrays. Its key is a path of
names. Pieces are complete or absent, so a run that was interrupted continues where it stopped, and processes that
share a folder never meet in one file.
"""

from __future__ import annotations

import hashlib
import io
import os
import struct
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from .files import put, sync_folder, writing

Arrays = Mapping[str, np.ndarray]
Key = tuple[str, ...]

SUFFIX = ".pack"
ROLL = 2**28  # bytes after which a pack is full and the next one begins

# a record: mark, run, length of the key, length and SHA-256 of the payload; the key; a checksum of that; the payload
_MARK = b"\x93aha\x01\r\n\x1a"
_HEAD = struct.Struct("<8sQIQ32s")
_CHECK = 8  # bytes
_LONGEST = 2**16  # key, in bytes
_LAST = 2**63  # run


class Store(Protocol):
    """Pieces by key."""

    keeps_maps: bool

    def get(self, key: Key) -> Arrays | None: ...

    def put(self, pieces: Mapping[Key, Arrays]) -> None: ...

    def refresh(self) -> None: ...


class Memory:
    """Pieces of this process, until `gather`; maps are measured and forgotten."""

    keeps_maps = False

    def __init__(self) -> None:
        self._pieces: dict[Key, Arrays] = {}

    def get(self, key: Key) -> Arrays | None:
        return self._pieces.get(key)

    def put(self, pieces: Mapping[Key, Arrays]) -> None:
        self._pieces.update(pieces)

    def refresh(self) -> None:
        """Nobody else writes here."""

    def gather(self) -> None:
        """Take in the pieces of the other processes of a run, which call this too."""
        from accelerate.utils import gather_object

        for pieces in gather_object([self._pieces]):
            self._pieces.update(pieces)


class Place(NamedTuple):
    """Where the payload of a record lies; of two records of one key the larger place is the later one."""

    run: int
    pack: str
    offset: int
    length: int
    digest: bytes


class Packs:
    """Pieces as records that are appended to few files under ``root``, ``<writer>-<number>.pack``.

    What is put together is written in one piece and is on the disk when `put` returns. A record that a crash cut short,
    or whose bytes have changed, counts as missing: it is passed over, and the next one of its key takes its place. A
    writer appends to packs of its own; those of other processes are read.

    Args:
        root: made where it is missing, once: a folder that disappears later is an error, not a fresh beginning.
        writer: the number of this process among those that write here at the same time.

    Raises:
        OSError: in one line, also of `get`, `put` and `refresh`, where the folder cannot be written to, the disk is
            full, or the folder has been removed meanwhile.
    """

    keeps_maps = True

    def __init__(self, root: Path, writer: int = 0):
        self.root, self.writer = root, writer
        with writing(root):
            root.mkdir(parents=True, exist_ok=True)
        self._places: dict[str, Place] = {}
        self._ends: dict[str, int] = {}  # pack → end of its last sound record
        self._own: Path | None = None
        self.refresh()
        self._run = 1 + max((place.run for place in self._places.values()), default=0)

    def refresh(self) -> None:
        """Take notice of what other processes have written."""
        try:
            names = sorted(entry.name for entry in os.scandir(self.root) if entry.name.endswith(SUFFIX))
            gone = self._ends.keys() - set(names)
            for name in names:
                with open(self.root / name, "rb") as file:
                    size = os.fstat(file.fileno()).st_size
                    end = self._ends.get(name, 0)
                    if size < end:
                        gone.add(name)
                    for key, place in _records(file.fileno(), name, end, size):
                        end = place.offset + place.length
                        if key not in self._places or self._places[key] < place:
                            self._places[key] = place
                    self._ends[name] = end
        except FileNotFoundError:
            gone = {self.root.name}
        except OSError as error:
            raise OSError(f"{self.root} cannot be read ({error.strerror}): allow it, and run again") from error
        if gone:
            raise self._removed()

    def get(self, key: Key) -> Arrays | None:
        """The arrays of a piece; None where there is none, or it is damaged."""
        place = self._places.get("/".join(key))
        if place is None:
            return None
        try:
            with open(self.root / place.pack, "rb", buffering=0) as file:
                payload = os.pread(file.fileno(), place.length, place.offset)
        except FileNotFoundError:
            raise self._removed() from None
        except OSError:  # a bad sector: made again
            return None
        return _unpacked(payload) if hashlib.sha256(payload).digest() == place.digest else None

    def put(self, pieces: Mapping[Key, Arrays]) -> None:
        """Keep ``pieces``, all of them or, where that fails, none."""
        parts: list[bytes] = []
        places: dict[str, tuple[int, int, bytes]] = {}
        written = 0
        for key, arrays in pieces.items():
            name, payload = "/".join(key), _packed(arrays)
            head, digest = self._head(name, payload)
            parts += [head, payload]
            places[name] = written + len(head), len(payload), digest
            written += len(head) + len(payload)
        pack, start = self._append(b"".join(parts))
        self._ends[pack] = start + written
        for name, (offset, length, digest) in places.items():
            self._places[name] = Place(self._run, pack, start + offset, length, digest)

    def _head(self, name: str, payload: bytes) -> tuple[bytes, bytes]:
        digest, key = hashlib.sha256(payload).digest(), name.encode()
        head = _HEAD.pack(_MARK, self._run, len(key), len(payload), digest) + key
        return head + hashlib.sha256(head).digest()[:_CHECK], digest

    def _append(self, content: bytes) -> tuple[str, int]:
        """Write at the end of this writer's pack; returns its name and where ``content`` begins."""
        if self._own is None or self._ends[self._own.name] >= ROLL:
            self._own = self._next()
        path = self._own
        with writing(path), self._there():
            descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
            try:
                start = os.fstat(descriptor).st_size
                if start != self._ends[path.name]:
                    raise OSError(f"{path} was changed by another program meanwhile: run one comparison per folder")
                _write(descriptor, content, start)
            finally:
                os.close(descriptor)
        return path.name, start

    def _next(self) -> Path:
        """The pack to append to: this writer's last one, if it is sound to its end and not full, or a new one."""
        own = [name for name in self._ends if name.startswith(f"{self.writer:04d}-")]
        number = 0
        if own:
            last = self.root / max(own)
            number = int(last.stem.partition("-")[2]) + 1
            # what a crash has cut short stays as it is: behind it nothing would be found
            if self._ends[last.name] < ROLL and last.is_file() and last.stat().st_size == self._ends[last.name]:
                return last
        while True:
            path = self.root / f"{self.writer:04d}-{number:04d}{SUFFIX}"
            with writing(path), self._there():
                try:
                    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644))
                except FileExistsError:  # of another program
                    number += 1
                    continue
                sync_folder(self.root)
            self._ends[path.name] = 0
            return path

    @contextmanager
    def _there(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise self._removed() from None

    def _removed(self) -> OSError:
        return OSError(f"{self.root} was removed or cut short while it was in use: leave it in place, and run again")


def _write(descriptor: int, content: bytes, start: int) -> None:
    """Append all of ``content``, or nothing."""
    try:
        put(descriptor, content)
    except BaseException:
        with suppress(OSError):  # what is left of it will be passed over
            os.ftruncate(descriptor, start)
        raise


def _records(descriptor: int, pack: str, start: int, size: int) -> Iterator[tuple[str, Place]]:
    """The sound records of a pack from ``start`` on; what lies between them is passed over."""
    at = start
    while at < size:
        found = _record(descriptor, pack, at, size)
        if found is None:
            at = _mark_after(descriptor, at + 1, size)
            continue
        yield found
        at = found[1].offset + found[1].length


def _record(descriptor: int, pack: str, at: int, size: int) -> tuple[str, Place] | None:
    head = os.pread(descriptor, _HEAD.size + 256, at)
    if len(head) < _HEAD.size or not head.startswith(_MARK):
        return None
    _, run, of_key, length, digest = _HEAD.unpack_from(head)
    payload = _HEAD.size + of_key + _CHECK
    if of_key > _LONGEST or run >= _LAST or at + payload + length > size:
        return None
    if len(head) < payload:
        head = os.pread(descriptor, payload, at)
    checked = payload - _CHECK
    if hashlib.sha256(head[:checked]).digest()[:_CHECK] != head[checked:payload]:
        return None
    return head[_HEAD.size : checked].decode(errors="replace"), Place(run, pack, at + payload, length, digest)


def _mark_after(descriptor: int, at: int, size: int) -> int:
    step = 2**20
    while at < size:
        found = os.pread(descriptor, step + len(_MARK) - 1, at).find(_MARK)
        if found >= 0:
            return at + found
        at += step
    return size


def _packed(arrays: Arrays) -> bytes:
    content = io.BytesIO()
    np.savez(content, **dict(arrays))  # type: ignore[arg-type]  # numpy's stub takes names for its flag
    return content.getvalue()


def _unpacked(payload: bytes) -> Arrays | None:
    try:
        with zipfile.ZipFile(io.BytesIO(payload)) as archive:
            # `put` compresses nothing: whatever claims to be larger than its record is not ours
            if sum(member.file_size for member in archive.infolist()) > len(payload):
                return None
        with np.load(io.BytesIO(payload), allow_pickle=False) as file:
            arrays = dict(file)
            # a member that is no array comes as bytes
            return arrays if all(isinstance(array, np.ndarray) for array in arrays.values()) else None
    except Exception:  # whatever zipfile and numpy say of bytes that nobody here has written
        return None


def pack_maps(maps: Tensor) -> dict[str, np.ndarray]:
    """(B, 1, H, W) → half precision relative to each map's largest magnitude, so that no scale over- or underflows."""
    maps = maps.detach().float()
    scale = maps.abs().amax(dim=(1, 2, 3)).clamp_min(torch.finfo(torch.float32).tiny)
    return {"maps": (maps / scale[:, None, None, None]).half().numpy(force=True), "scale": scale.numpy(force=True)}


def unpack_maps(arrays: Arrays, device: torch.device | str = "cpu") -> Tensor:
    """What `pack_maps` packed, rounded: (B, 1, H, W) float32."""
    maps, scale = torch.from_numpy(arrays["maps"]).to(device), torch.from_numpy(arrays["scale"]).to(device)
    return maps.float() * scale[:, None, None, None]
