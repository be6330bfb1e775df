"""The processes of one run, as torchrun or accelerate launch start them: joined, and ended with the first that ends."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env

from .launcher import told

# seconds between two beats, until one that is still counts as ended, and to find that out in a collective
BEAT, SILENCE, GRACE = 2.0, 30.0, 5.0
SETTLE = 0.3  # seconds, before the interpreter goes
# between two collectives a process may read slow files or write results for long: it is the watch that finds the dead
PATIENCE = timedelta(days=7)
ENDED = "another process of this run has ended, its own output says why: start them all again"


def join() -> PartialState:
    """This process among those of the run, and its device; the first call waits for the others.

    Without a GPU processes meet over gloo, with GPUs over nccl.

    Raises:
        ValueError: where the launcher has started more processes than would work together, or says what is no number.
    """
    expected, local = told("WORLD_SIZE"), told("LOCAL_WORLD_SIZE")
    for name in ("RANK", "LOCAL_RANK"):
        told(name, 0, 0)
    if not PartialState._shared_state:
        cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or (expected > 1 and not torch.cuda.is_available())
        if not cpu and local > (gpus := torch.cuda.device_count()) > 0:
            raise ValueError(f"{local} processes for {gpus} GPUs: start at most one process per GPU")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "OMP_NUM_THREADS")  # that it shares the cores is what we want
            # asked for a device that is not there, accelerate takes every process for the only one
            PartialState(cpu=cpu)
    state = PartialState()
    if state.num_processes < expected:
        raise ValueError(
            f"WORLD_SIZE={expected} but accelerate sees {state.num_processes} process, which would do the work of all: "
            "set RANK, LOCAL_RANK, MASTER_ADDR and MASTER_PORT too, as torchrun does, and make no Accelerator before"
        )
    if state.num_processes > 1 and not _watch:
        dist.distributed_c10d._set_pg_timeout(PATIENCE)
        _watch.append(_watching(state))
    return state


@contextmanager
def together() -> Iterator[PartialState]:
    """While processes wait for one another: where one ends, so do the others, within a minute.

    Raises:
        ConnectionError: in one line, where another process has ended. A process that cannot raise it, for it waits in
            a collective that does not return, prints the line and exits with code 1.
        ValueError: see `join`.
    """
    state = join()
    if state.num_processes == 1:
        yield state
        return
    watch = _watch[0]
    if watch is not None:
        watch.enter()
    failed = True
    try:
        yield state
        failed = False
    except BaseException as error:
        if not _lost(error):
            raise
        raise ConnectionError(ENDED) from error
    finally:
        if watch is not None:
            watch.leave(failed)


@contextmanager
def main_first() -> Iterator[None]:
    """The main process goes first, the others find what it has made, such as files that were downloaded."""
    with together() as state, state.main_process_first():
        yield


def wait() -> None:
    """Return when all processes have come here."""
    with together() as state:
        state.wait_for_everyone()


def gathered(items: list[Any]) -> list[Any]:
    """The items of all processes, in the order of these; small ones."""
    with together() as state:
        return gather_object(items) if state.num_processes > 1 else items


@contextmanager
def alone() -> Iterator[None]:
    """What is done inside waits for nobody: that another process has ended is met afterwards."""
    watch = _watch[0] if _watch else None
    if watch is None:
        yield
        return
    depth, watch.depth = watch.depth, 0
    try:
        yield
    finally:
        watch.depth = depth


def any_asked(number: int) -> int:
    """The signal that asks this process to end, which is ``number``, or a few seconds later any other; 0: none does.

    Others hear of it between collectives, each when it asks here; they have to agree in one before they act on it.
    """
    watch = _watch[0] if _watch else None
    if watch is None:
        return number
    watch.asked = max(watch.asked, number)
    return number or watch.heard


def _lost(error: BaseException) -> bool:
    """Whether a collective failed for want of a peer; gloo has no type for it."""
    text = str(error)
    network = "gloo" in text and any(word in text for word in ("onnection", "imed out", "timeout", "pair closure"))
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and network)


class _Watch:
    """Beats together with the other processes, over gloo in a thread: a beat fails where one of them is gone or still.

    A group of its own, for the processes' other collectives may rightly take hours.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.depth = 0
        self.asked = self.heard = 0  # signals, here and anywhere
        self._over = self._told = self._lost = False
        self._group = group
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._look)]
        for thread in self._threads:
            thread.start()
        atexit.register(self._finish)

    def enter(self) -> None:
        """From now on an end of the others concerns this process."""
        self.depth += 1
        self._over = False

    def leave(self, failed: bool) -> None:
        """No longer; where it ``failed``, the others hear of it with the next beat, if this process lives that long."""
        self.depth -= 1
        self._over = self._over or failed
        if self.depth == 0:
            self.asked = self.heard = 0

    def _beat(self) -> None:
        while not self._lost and not self._stop.wait(BEAT):
            try:
                news = torch.tensor([int(self._over), self.asked])
                dist.all_reduce(news, op=dist.ReduceOp.MAX, group=self._group)
                over, heard = news.tolist()
                self._told, self.heard = bool(over), heard
            except RuntimeError:
                self._lost = True

    def _look(self) -> None:
        while not self._stop.wait(BEAT):
            if self._must_end():
                self._end()

    def _must_end(self) -> bool:
        return self.depth > 0 and (self._lost or self._told)

    def _end(self) -> None:
        """Leave the main thread the time to find out, then end the process: nothing else ends its collective."""
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline:
            if self._stop.wait(0.1) or not self._must_end():
                return
        print(f"aha: error: {ENDED}", file=sys.stderr, flush=True)
        os._exit(1)

    def _finish(self) -> None:
        self._stop.set()
        # a thread that comes back from gloo when the interpreter has gone aborts the process; a beat takes no longer
        for thread in self._threads:
            thread.join(SILENCE + GRACE)
        # gloo's own threads need the interpreter once more, to let go of the tensors of the last collectives
        time.sleep(SETTLE)


def _watching(state: PartialState) -> _Watch | None:
    """None where gloo, unlike nccl, does not get from every machine to every other."""
    state.wait_for_everyone()
    reason = ""
    try:
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=SILENCE))
    except RuntimeError as error:
        reason = str(error).splitlines()[0] or "gloo failed"
    reasons = [line for line in gather_object([reason]) if line]
    if not reasons:
        return _Watch(group)
    if state.is_main_process:
        warnings.warn(
            f"gloo cannot connect the processes ({reasons[0]}): where one ends, the others will not notice by "
            "themselves; GLOO_SOCKET_IFNAME names the network interface to use",
            stacklevel=3,
        )
    return None


_watch: list[_Watch | None] = []
