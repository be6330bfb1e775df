"""How many passes through the classifier something takes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..classifier import Classifier


@dataclass
class Passes:
    """Images that went through the classifier, and images whose logits got a gradient."""

    forward: int = 0
    backward: int = 0


@contextmanager
def count_passes(clf: Classifier) -> Iterator[Passes]:
    """Count what goes through ``clf`` inside the context.

    >>> with count_passes(clf) as passes:
    ...     maps = method.attribute(images)
    >>> passes.forward / len(images)

    A pass that skips blocks, or whose gradient stops half-way, counts as one; a gradient of something else than
    the classifier's output is not seen.
    """
    passes = Passes()

    thread = threading.get_ident()

    def arrived(_module: nn.Module, _args: Any, out: Any) -> None:
        if threading.get_ident() != thread:  # another user of the same network
            return
        logits = clf.read(out)
        passes.forward += len(logits)
        if logits.requires_grad:
            logits.register_hook(returned)

    def returned(gradient: Tensor) -> None:
        passes.backward += len(gradient)

    handle = clf.module.register_forward_hook(arrived)
    try:
        yield passes
    finally:
        handle.remove()
