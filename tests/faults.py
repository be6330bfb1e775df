"""Faults on request: a process that is killed, or a disk that refuses, at the n-th change it makes to its files.

>>> changes = faults.changes(work, folder)                  # what work() does to the files below folder, in order
>>> for number in range(len(changes)):
...     faults.killed(work, folder, number)                 # SIGKILL instead of that change
...     faults.killed(work, folder, number, torn=True)      # or in the middle of it, where it is a write
...     faults.refused(work, folder, number, errno.ENOSPC)  # the exception that work() then ends with

Each call runs ``work`` in a forked child, so that hundreds of faults cost one set of imports. What is counted goes
through the functions of ``os`` in `CHANGES`; a file object's own ``write`` does not, and neither does reading.
"""

from __future__ import annotations

import errno
import os
import pathlib
import pickle
import signal
import threading
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

CHANGES = ("open", "write", "fsync", "replace", "rename", "mkdir", "unlink", "remove", "rmdir", "link", "truncate")
# what a full or broken disk still does; a read-only one does not
_FREEING = ("unlink", "remove", "rmdir")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Outcome(NamedTuple):
    """How a child ended: the signal that killed it or 0, what ``work`` returned, the exception it raised."""

    signal: int
    value: Any = None
    error: BaseException | None = None
    trace: str = ""


def forked(work: Callable[[], Any]) -> Outcome:
    """Run ``work`` in a child and wait for it."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            try:
                found = Outcome(0, work())
            except BaseException as error:  # SystemExit and KeyboardInterrupt are outcomes too
                found = Outcome(0, None, error, traceback.format_exc())
            try:
                content = pickle.dumps(found)
            except Exception:
                content = pickle.dumps(found._replace(error=RuntimeError(f"{type(found.error)}: {found.error}")))
            with os.fdopen(writing, "wb") as pipe:
                pipe.write(content)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        content = pipe.read()
    _, status = os.waitpid(child, 0)
    return Outcome(os.WTERMSIG(status)) if os.WIFSIGNALED(status) else pickle.loads(content)


def changes(work: Callable[[], Any], folder: Path) -> list[str]:
    """What ``work`` changes below ``folder``, as "name path"."""

    def watched() -> list[str]:
        found: list[str] = []
        _watch(folder, lambda number, name, path, call: (found.append(f"{name} {path}"), call())[1])
        work()
        return found

    done = forked(watched)
    assert done.error is None, done.trace
    return done.value


def killed(work: Callable[[], Any], folder: Path, number: int, torn: bool = False) -> None:
    """Run ``work`` until its ``number``-th change, and kill it there with SIGKILL."""

    def meet(at: int, name: str, path: str, call: Callable) -> Any:
        if at == number:
            if torn and name == "write":
                call(half=True)
            os.kill(os.getpid(), signal.SIGKILL)
        return call()

    done = forked(lambda: (_watch(folder, meet), work()))
    assert done.signal == signal.SIGKILL, f"change {number} never came: {done.trace or done}"


def refused(work: Callable[[], Any], folder: Path, number: int, reason: int = errno.ENOSPC) -> Outcome:
    """Run ``work`` with a disk that refuses its ``number``-th change and all that follow, for ``reason``.

    Files can still be removed, unless the disk is read-only.
    """

    def meet(at: int, name: str, path: str, call: Callable) -> Any:
        if at >= number and (name not in _FREEING or reason == errno.EROFS):
            raise OSError(reason, os.strerror(reason), path)
        return call()

    return forked(lambda: (_watch(folder, meet), work())[1])


def _watch(folder: Path, meet: Callable[[int, str, str, Callable], Any]) -> None:
    """From now on, in this process, every change below ``folder`` is met: (number, name, path, what does it)."""
    below, counted, guard = f"{folder}{os.sep}", [0], threading.RLock()
    descriptors: dict[int, str] = {}

    def place_of(name: str, arguments: tuple, options: dict) -> str | None:
        if not arguments:
            return None
        first = arguments[0]
        if isinstance(first, int):
            return descriptors.get(first)
        if name == "open" and not (len(arguments) > 1 and arguments[1] & _WRITES):
            return None
        path = os.fsdecode(first)
        if not os.path.isabs(path) and options.get("dir_fd") is not None:
            path = os.path.join(os.readlink(f"/proc/self/fd/{options['dir_fd']}"), path)
        path = os.path.abspath(path)
        return path if f"{path}{os.sep}".startswith(below) else None

    def watching(name: str) -> Callable:
        original = getattr(os, name)

        def call(*arguments: Any, **options: Any) -> Any:
            place = place_of(name, arguments, options)

            def act(half: bool = False) -> Any:
                if half:
                    return original(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                done = original(*arguments, **options)
                if name == "open":
                    path = os.path.abspath(os.fsdecode(arguments[0]))
                    if f"{path}{os.sep}".startswith(below):
                        descriptors[done] = path
                return done

            if place is None:
                return act()
            with guard:
                number = counted[0]
                counted[0] += 1
            return meet(number, name, place, act)

        return call

    accessor = getattr(pathlib, "_NormalAccessor", None)  # Python 3.10's own copy of these functions
    for name in CHANGES:
        setattr(os, name, watching(name))
        if hasattr(accessor, name):
            setattr(accessor, name, staticmethod(getattr(os, name)))
    closing = os.close

    def close(descriptor: int) -> None:
        descriptors.pop(descriptor, None)
        closing(descriptor)

    os.close = close


def flipped(path: Path, bit: int) -> None:
    """Flip one bit of a file, counted from its beginning; beyond its end it is counted again from there."""
    content = bytearray(path.read_bytes())
    bit %= 8 * len(content)
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def cut(path: Path, share: float = 0.5) -> None:
    """Keep the first ``share`` of a file; 0 empties it."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
