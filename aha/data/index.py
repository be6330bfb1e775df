"""What lies in folders and shards, kept from run to run outside the data: a million images start in seconds."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aha.files import digest, write_atomically

FORMAT = "aha index 1"
WORTH = 10_000  # images from which a listing is kept: fewer are listed as fast
# ns: what changed so shortly before it was listed may change again within one tick of the file system's clock, unseen
SETTLED = 2_000_000_000


def cache_folder() -> Path | None:
    """Where indices are kept: aha/index in $XDG_CACHE_HOME or ~/.cache; None without a home."""
    given = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(given):  # a relative one is to be ignored, says the XDG specification
        return Path(given, "aha", "index")
    home = os.path.expanduser("~")
    return Path(home, ".cache", "aha", "index") if os.path.isabs(home) else None


class Index:
    """Records of folders or files, by their real paths: each is kept while times, inode and size of its path stand.

    A folder's times change with every entry that comes, goes or is renamed, and cannot be set back (that of the inode
    cannot), but not where a file in it is written over. What changed within the last two seconds is not kept, nor what
    changes while it is read. A cache that is missing, damaged, of another version or not writable is no error: all is
    read anew.

    Args:
        kind: what is recorded: "folders" or "shards".
        root: the data; its real path names the file.
    """

    def __init__(self, kind: str, root: str | os.PathLike):
        place, real = cache_folder(), os.path.realpath(root)
        name = digest(os.fsencode(f"{kind}\0{real}"))[:32]
        self._file = None if place is None else place / f"{name}.json"
        self._known = {} if self._file is None else _read(self._file)
        self._used: dict[str, list[Any]] = {}  # real path: [state, record]
        self._changed = False

    def record(self, real: str, make: Callable[[], Any]) -> Any:
        """The record of the folder or file at ``real``, JSON types; what ``make`` returns where none is kept.

        Raises:
            whatever ``make`` raises.
        """
        if real in self._used:
            return self._used[real][1]
        now, state = time.time_ns(), _state(real)
        known = self._known.get(real)
        if known is not None and known[0] == state:
            self._used[real] = known
            return known[1]
        record = make()
        if state is not None and max(state[:2]) < now - SETTLED and _state(real) == state:
            self._used[real] = [state, record]
            self._changed = True
        return record

    def kept(self, real: str, key: str) -> Any:
        """What `extend` kept as ``key`` of the record at ``real``, or None."""
        return self._used[real][1].get(key) if real in self._used else None

    def extend(self, real: str, key: str, value: Any) -> None:
        """Keep ``value`` as ``key`` of the record at ``real``, where there is one that still stands."""
        used = self._used.get(real)
        if used is not None and _state(real) == used[0]:
            used[1][key] = value
            self._changed = True

    def save(self, images: int, whole: bool = True) -> None:
        """Write the records where there are enough ``images``; ``whole``: those used are all that there are now."""
        stale = whole and len(self._used) < len(self._known)
        if self._file is None or images < WORTH or not (self._changed or stale):
            return
        records = self._used if whole else {**self._known, **self._used}
        content = json.dumps(records, separators=(",", ":")).encode("ascii")
        try:
            write_atomically(self._file, f"{FORMAT} {digest(content)}\n".encode() + content)
        except OSError:
            return
        self._changed = False


def _read(file: Path) -> dict[str, list[Any]]:
    """The records in a file; none where they cannot be had."""
    try:
        head, _, content = file.read_bytes().partition(b"\n")
        if head.decode("ascii") != f"{FORMAT} {digest(content)}":
            return {}
        return json.loads(content)
    except (OSError, ValueError):
        return {}


def _state(real: str) -> list[int] | None:
    """Times of change of content and of inode (ns), inode, size; None where nothing is."""
    try:
        about = os.stat(real)
    except OSError:
        return None
    return [about.st_mtime_ns, about.st_ctime_ns, about.st_ino, about.st_size]
