"""How many processes read the images of a training."""

from __future__ import annotations

import os
from typing import Any

from aha.checks import check_integer
from aha.data.labelled import LabelledImages
from aha.launcher import told

MOST = 8


def workers_for(data: Any, asked: int | None = None) -> int:
    """Processes that read ``data`` for a DataLoader: ``asked``, or what keeps decoding off the training process.

    That is, for images on disk and where there are more than two cores for this process, a process for each core but
    one, and at most 8; cores are shared with the other processes that torchrun started on this machine. Else 0.
    """
    if asked is not None:
        return check_integer("workers", asked, 0)
    while not isinstance(data, LabelledImages):
        inner = next((vars(data)[name] for name in ("data", "dataset") if name in getattr(data, "__dict__", {})), None)
        if inner is None:
            return 0
        data = inner
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores = available // told("LOCAL_WORLD_SIZE")
    return min(MOST, cores - 1) if cores > 2 else 0
