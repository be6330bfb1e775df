"""Runs the stages of a report, and keeps what they say: needs nothing but Python.

A stage is a process group with a limit: a kernel that hangs is killed with all that belongs to it, and the next stage
runs. Its lines are printed as they come. One that is a JSON object (see `tell`) is a record and is kept whole, of the
others the last `TAIL`. The file is written anew, atomically, after every record and at least once a second while lines
come: a run that is cut short, by whatever signal, leaves all it found. A later run in the same folder goes on from
there: what is recorded as ok for the same source files, device and options is not run again.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.metadata
import json
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from aha.files import write_atomically

from . import ROOT

TAIL = 40  # lines kept of what is no record
_SOURCES = ("aha", "kernels", "csrc", "bench", "tests", "setup.py", "pyproject.toml")
_SUFFIXES = (".py", ".h", ".cpp", ".cu", ".cuh", ".toml")
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
_PARENT_DEATH_SIGNAL = 1  # of prctl


class Stage(NamedTuple):
    """A part of a report.

    Attributes:
        command: what is run, in the project's folder.
        limit: seconds after which it is killed.
        environment: variables it gets besides those of this process.
        lasting: its result outlasts the run; else it is run every time, as a build is on a machine that begins bare.
    """

    name: str
    command: Sequence[str]
    limit: float
    environment: Mapping[str, str] = {}
    lasting: bool = True


def tell(case: str, status: str = "ok", /, **figures: Any) -> bool:
    """Print a record, from within a stage. False if it failed; what is "not available" did not."""
    print(json.dumps({"case": case, "status": status, **figures}, ensure_ascii=False), flush=True)
    return status.startswith(("ok", "not available"))


class Results:
    """A report's file: its head, and the result of every stage so far.

    Args:
        head: what the results depend on. Those of a file with another head are dropped.
        again: forget what is there.
    """

    def __init__(self, path: Path, head: Mapping[str, Any], again: bool = False):
        self.path, self.head = path, {**head, "sources": sources(), "torch": version("torch")}
        self.stages: dict[str, dict[str, Any]] = {}
        with contextlib.suppress(OSError, ValueError):  # none, or not of this form
            before = json.loads(path.read_text())
            if not again and all(before.get(name) == value for name, value in self.head.items()):
                self.stages = {result["stage"]: result for result in before["stages"]}

    def run(self, stage: Stage, limit: float | None = None) -> dict[str, Any]:
        """The result of a stage, which is run unless it is done."""
        before = self.stages.get(stage.name)
        if before and before["status"] == "ok" and stage.lasting:
            say(f"{stage.name}: ok in an earlier run")
            return before

        def changed(result: dict[str, Any]) -> None:
            self.stages[stage.name] = result
            self.write()

        return run(stage, stage.limit if limit is None else min(limit, stage.limit), changed)

    def skip(self, stage: Stage, why: str) -> None:
        """Record why a stage is not run."""
        self.stages[stage.name] = {"stage": stage.name, "status": why, "seconds": 0.0, "records": [], "output": []}
        self.write()
        say(f"{stage.name}: {why}")

    def write(self) -> None:
        """Put the file in place."""
        content: dict[str, Any] = {**self.head, "triton": version("triton"), "commit": commit()}
        content["date"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        content["stages"] = list(self.stages.values())
        write_atomically(self.path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def say(line: str) -> None:
    """Print a line at once."""
    print(line, flush=True)


def run(
    stage: Stage, limit: float, changed: Callable[[dict[str, Any]], None], say: Callable[[str], None] = say
) -> dict[str, Any]:
    """A stage's name, status, seconds, records, and the end of its output.

    ``changed`` gets it at the start, after each record, at least once a second while lines come, and at the end.
    """
    result: dict[str, Any] = {"stage": stage.name, "status": "running", "seconds": 0.0, "records": [], "output": []}
    start = last = time.monotonic()
    changed(result)

    def hear(line: str) -> None:
        nonlocal last
        line = _nowhere(line)
        record, now = _record(line), time.monotonic()
        result["seconds"] = round(now - start, 1)
        if record:
            result["records"].append(record)
            say(f"{stage.name}: {sentence(record)}")
        else:
            result["output"] = [*result["output"], line][-TAIL:]
            say(f"{stage.name}| {line}")
        if record or now > last + 1:
            last = now
            changed(result)

    try:
        status = "interrupted"
        status = _run(stage, limit, hear)
    finally:
        result |= {"status": status, "seconds": round(time.monotonic() - start, 1)}
        changed(result)
    say(f"{stage.name}: {result['status']}, {result['seconds']} s")
    return result


def sources() -> str:
    """Twelve characters that differ where any source file does: with or without git, committed or not."""
    digest = hashlib.sha256()
    for name in _SOURCES:
        place = ROOT / name
        for file in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if file.suffix in _SUFFIXES and file.is_file():
                digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def version(package: str) -> str:
    """Of an installed package; empty where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


@functools.lru_cache(maxsize=1)
def commit() -> str:
    """The commit as git describes it; empty without git."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


@contextlib.contextmanager
def ending_on_request() -> Iterator[None]:
    """SIGTERM ends this process as an exception would: the stage that runs is killed, and what it said is written."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def end_with_parent() -> None:
    """Be killed when the process that started this one ends in any way: nothing is left that holds a GPU."""
    if _LIBC is not None:
        _LIBC.prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def _run(stage: Stage, seconds: float, hear: Callable[[str], None]) -> str:
    """The status of a stage that has ended, or was ended."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", **stage.environment}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in (str(ROOT), os.environ.get("PYTHONPATH", "")) if path)
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    end = time.monotonic() + seconds
    try:
        process = subprocess.Popen(
            stage.command, cwd=ROOT, env=environment, start_new_session=True, preexec_fn=end_with_parent, **pipes
        )
    except OSError as error:
        return f"failed: {' '.join(str(error).split())}"
    try:
        late = not _listen(process, end, hear)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        try:
            code: int | None = process.wait(10)
        except subprocess.TimeoutExpired:  # in the driver, where no signal reaches it
            code = None
    if late:
        return f"failed: took longer than {seconds:.0f} s" + ("" if code is not None else "; it cannot be killed")
    if code is not None and code < 0:
        return f"failed: ended by {signal.Signals(-code).name}"
    return "ok" if code == 0 else f"failed: exit status {code}"


def _listen(process: subprocess.Popen, end: float, hear: Callable[[str], None]) -> bool:
    """Pass lines on until the process has ended; False if it has not by ``end``."""
    assert process.stdout is not None
    pipe, rest = process.stdout.fileno(), b""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while (left := end - time.monotonic()) > 0:
            # what it started may hold the pipe open for longer than it lives
            ended = process.poll() is not None
            if not selector.select(min(left, 0.2)):
                if ended:
                    break
                continue
            part = os.read(pipe, 1 << 16)
            if not part:
                break
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                hear(line.decode(errors="replace").rstrip("\r"))
    if rest:
        hear(rest.decode(errors="replace"))
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    return process.poll() is not None


def _record(line: str) -> dict[str, Any] | None:
    if not line.startswith("{"):
        return None
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and {"case", "status"} <= found.keys() else None


def sentence(record: Mapping[str, Any]) -> str:
    """A record as it is read."""
    figures = ", ".join(f"{name} {value}" for name, value in record.items() if name not in ("case", "status"))
    return f"{record['case']}: {record['status']}" + (f" ({figures})" if figures else "")


def _nowhere(line: str) -> str:
    """Without the folder names of this machine: results are published."""
    for folder in (ROOT, Path(sys.prefix), Path(sys.prefix).resolve(), Path.home()):
        if len(folder.parts) > 1:
            line = line.replace(str(folder), "…")
    return line
