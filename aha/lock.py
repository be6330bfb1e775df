"""One process at a time works in a results folder."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .files import writing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NAME = ".lock"
# of file systems that lock nothing, as some clusters mount theirs
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)
_descriptors: set[int] = set()


class FolderInUseError(OSError):
    """Another process works in the folder; the message names its host and process id."""


@contextmanager
def held(folder: str | Path) -> Iterator[None]:
    """The folder is this process's inside: who else asks for it is refused. It is made if it is missing,
    and does not stay empty where what is done inside fails.

    The kernel releases the lock of a process that ends, however it ends. Where the file system knows no locks, the file
    ``.lock`` itself is one: it holds for as long as the process that it names lives.

    Raises:
        FolderInUseError: in one line that names host and process id of who holds the folder.
        OSError: in one line, where the folder cannot be made or written to.
    """
    folder = Path(folder)
    made = not folder.exists()
    try:
        with _held(folder):
            yield
    except BaseException:
        if made:
            with suppress(OSError):  # where something has been kept in it
                folder.rmdir()
        raise


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    path = folder / NAME
    with writing(path):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _taken(path)
    _descriptors.add(descriptor)
    try:
        yield
    finally:
        if descriptor in _descriptors:  # a forked child holds nothing
            with suppress(OSError):  # the folder may have been moved away or become read-only
                if _same(descriptor, path):
                    path.unlink()
            _descriptors.discard(descriptor)
            os.close(descriptor)


def _taken(path: Path) -> int:
    """A descriptor of ``path`` with the kernel's lock on it.

    Where the file system has none: of a file that was not there, or that names a process of this host that has ended.
    """
    while True:
        try:
            descriptor, new = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644), True
        except FileExistsError:
            try:
                descriptor, new = os.open(path, os.O_RDWR), False
            except FileNotFoundError:  # its last holder has just removed it
                continue
        try:
            if _mine(descriptor, path, new):
                _sign(descriptor, path)
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _mine(descriptor: int, path: Path, new: bool) -> bool:
    """Whether the open file is this process's lock; else it has been removed."""
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return _same(descriptor, path)
    except BlockingIOError as error:
        raise _refusal(path) from error
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    if new:
        return True
    host, process = _holder(path)
    if host != socket.gethostname() or _lives(process):
        raise _refusal(path)
    path.unlink(missing_ok=True)
    return False


def _same(descriptor: int, path: Path) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    here = os.fstat(descriptor)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _sign(descriptor: int, path: Path) -> None:
    try:
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{socket.gethostname()} {os.getpid()}\n".encode())
    except OSError:  # one that names nobody would hold for ever where it is itself the lock
        with suppress(OSError):
            path.unlink()
        raise


def _holder(path: Path) -> tuple[str, int]:
    """Host and process id in a lock file; ("", 0) where it names none."""
    with suppress(OSError, ValueError):
        host, process = path.read_text().split()
        return host, int(process)
    return "", 0


def _lives(process: int) -> bool:
    if process <= 0:
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _refusal(path: Path) -> FolderInUseError:
    host, process = _holder(path)
    who = f"process {process} on {host}" if process else "another process"
    return FolderInUseError(
        f"{path.parent} is in use by {who}: wait for it, end it, or give another folder"
        + (f" (if it has ended, remove {path})" if host != socket.gethostname() else "")
    )


def _forked() -> None:
    # a child shares the lock for as long as its descriptor is open, and would keep it when its parent has ended
    while _descriptors:
        with suppress(OSError):
            os.close(_descriptors.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
