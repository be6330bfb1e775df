"""A run that is asked to end finishes its step and keeps it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

# pre-emption; a time limit, as of Slurm's --signal=USR1@120; a person
_ASKING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGINT") if hasattr(signal, name))
GRACE = 60  # seconds that a process which reads images goes on after SIGTERM, for the step to be finished and kept
TEMPORARY = 75  # EX_TEMPFAIL of sysexits.h: run it again


class Interrupted(SystemExit):
    """A run that a signal ended, after its step was kept; a program that does not catch it exits with 75."""

    def __init__(self, message: str):
        super().__init__(TEMPORARY)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Asked:
    """Attributes: signal: the one that asked the run to end, or 0."""

    def __init__(self) -> None:
        self.signal = 0


@contextmanager
def noticed() -> Iterator[Asked]:
    """Signals that ask a process to end are only noticed inside, but for a second SIGINT.

    Outside the main thread, where Python takes no handlers, signals do what they did.
    """
    asked = Asked()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def notice(number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and asked.signal == signal.SIGINT:
            raise KeyboardInterrupt
        asked.signal = number

    before: dict[int, Any] = {number: signal.signal(number, notice) for number in _ASKING}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def ending(number: int, what: str) -> BaseException:
    """What a run raises that signal ``number`` has ended: its name, and ``what`` became of the run."""
    name = signal.Signals(number).name
    return KeyboardInterrupt(f"{name}{what}") if number == signal.SIGINT else Interrupted(f"{name}{what}")


def ignored(_: int = 0) -> None:
    """In a process that reads images: signals to all processes of a job are for the one that trains."""
    for number in _ASKING:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # but a process that nobody waits for any more does not stay
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(GRACE))
