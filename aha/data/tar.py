"""Members of a tar file, from its headers alone: where they lie, so that they can be read at random.

POSIX ustar and pax, and GNU's long names. What leaves memory or time unbounded is not followed: a header is 512 bytes,
a long name or pax header at most `LONGEST_HEADER`, and every step goes forward.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import NamedTuple

BLOCK = 512
LONGEST_HEADER = 1 << 20  # bytes
KINDS = {b"1": "a link", b"2": "a link", b"3": "a device", b"4": "a device", b"5": "a folder", b"6": "a pipe"}
FILES = (b"0", b"\0", b"7")
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class TarError(ValueError):
    """What is wrong with a tar file, as a clause."""


class Member(NamedTuple):
    """An entry of a tar file.

    Attributes:
        name: as written.
        start: first byte of its content.
        size: of its content, in bytes.
        kind: "a file", "a folder", "a link", …
    """

    name: str
    start: int
    size: int
    kind: str


def members(descriptor: int) -> Iterator[Member]:
    """The entries of an open tar file, in order.

    Raises:
        TarError: if it is compressed, damaged or cut off, or holds a sparse file.
    """
    length = os.fstat(descriptor).st_size
    at = 0
    path, size_of_next = "", -1
    while header := _block(descriptor, at, length):
        kind = header[156:157]
        size = _number(header[124:136], at)
        if kind not in (b"L", b"K", b"x", b"g") and size_of_next >= 0:
            size = size_of_next
        if kind in KINDS:
            size = 0  # of links, some give that of the file they lead to
        start = at + BLOCK
        if start + size > length:
            raise TarError(f"it is cut off: it has {length} bytes, a member ends at byte {start + size}")
        at = start + -(-size // BLOCK) * BLOCK
        if kind in (b"L", b"x"):
            if size > LONGEST_HEADER:
                raise TarError(f"it holds a header of {size} bytes at byte {start}; at most {LONGEST_HEADER} are read")
            content = os.pread(descriptor, size, start)
            if kind == b"L":
                path = os.fsdecode(content.partition(b"\0")[0])
            else:
                records = _pax(content, start)
                path = os.fsdecode(records.get(b"path", os.fsencode(path)))
                size_of_next = _decimal(records[b"size"], start) if b"size" in records else size_of_next
                if any(key.startswith(b"GNU.sparse.") for key in records):
                    raise TarError(f"it holds a sparse file at byte {start}: pack it without --sparse")
            continue
        if kind in (b"K", b"g"):
            continue
        if kind == b"S":
            raise TarError(f"it holds a sparse file at byte {start}: pack it without --sparse")
        name = path or _name(header)
        what = "a file" if kind in FILES else KINDS.get(kind, f"of the unknown kind {kind!r}")
        yield Member(name, start, size, "a folder" if what == "a file" and name.endswith("/") else what)
        path, size_of_next = "", -1


def _block(descriptor: int, at: int, length: int) -> bytes:
    """The header at byte ``at``; nothing at the end of the archive."""
    header = os.pread(descriptor, BLOCK, at)
    if at == 0:
        known = next((how for mark, how in COMPRESSED.items() if header.startswith(mark)), None)
        if known is not None:
            raise TarError(f"it is compressed with {known}, and so cannot be read at random: unpack it")
    if len(header) < BLOCK:
        raise TarError(f"it is cut off: it has {length} bytes, and no mark of its end")
    if not any(header):
        return b""
    # the sum is that of the header with blanks in place of the sum
    if sum(header) - sum(header[148:156]) + 8 * 32 != _number(header[148:156], at):
        raise TarError("it is not a tar file" if at == 0 else f"it is damaged: there is no header at byte {at}")
    return header


def _number(field: bytes, at: int) -> int:
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    text = field.strip(b" \0")
    if not re.fullmatch(rb"[0-7]*", text):
        raise TarError("it is not a tar file" if at == 0 else f"it is damaged: there is no header at byte {at}")
    return int(text or b"0", 8)


def _name(header: bytes) -> str:
    name, prefix = header[:100].partition(b"\0")[0], header[345:500].partition(b"\0")[0]
    posix = header[257:263] == b"ustar\0"
    return os.fsdecode(prefix + b"/" + name if posix and prefix else name)


def _pax(content: bytes, at: int) -> dict[bytes, bytes]:
    """Records "length key=value\\n"."""
    records = {}
    while content:
        head, blank, _ = content[:20].partition(b" ")
        length = _decimal(head, at) if blank else 0
        key, equals, value = content[len(head) + 1 : length].partition(b"=")
        if not equals or length > len(content) or not value.endswith(b"\n"):
            raise TarError(f"it is damaged: the pax header at byte {at} cannot be read")
        records[key] = value[:-1]
        content = content[length:]
    return records


def _decimal(text: bytes, at: int) -> int:
    if not re.fullmatch(rb"\d{1,18}", text):
        raise TarError(f"it is damaged: the pax header at byte {at} cannot be read")
    return int(text)
