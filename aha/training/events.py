"""TensorBoard's files of scalars, written by the thread that trains.

TensorBoard's own writer has a thread: a disk that refuses is met there, with a traceback, and told some steps later.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path


class Events:
    """A new file in ``folder``; what others there say of steps from ``step`` on is no longer shown.

    Raises:
        OSError: also of `write`, where it cannot be written.
    """

    def __init__(self, folder: Path, step: int):
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.0"
        self._file = open(folder / name, "ab", buffering=0)  # noqa: SIM115 - closed in close()
        self._records, self._event, self._summary = RecordWriter(self._file), Event, Summary
        self._put(file_version="brain.Event:2")
        self._put(step=step, session_log=SessionLog(status=SessionLog.START))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """One number per name."""
        scalars = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._put(step=step, summary=self._summary(value=scalars))

    def close(self) -> None:
        self._file.close()

    def _put(self, **content: object) -> None:
        self._records.write(self._event(wall_time=time.time(), **content).SerializeToString())
