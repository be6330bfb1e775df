"""How many passes through the classifier something takes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..checks import checked
from ..classifier import Classifier
from ..explainer.encoder import READING, Encoder


@dataclass
class Passes:
    """Images that went through the classifier, and images whose logits got a gradient; or both per image.

    >>> Passes(1, 1) + 20 * Passes(1)
    Passes(forward=21, backward=1)
    """

    forward: float = 0
    backward: float = 0

    def __add__(self, other: Passes) -> Passes:
        return Passes(self.forward + other.forward, self.backward + other.backward)

    def __mul__(self, times: float) -> Passes:
        return Passes(self.forward * times, self.backward * times)

    __rmul__ = __mul__


@contextmanager
@checked
def count_passes(clf: Classifier) -> Iterator[Passes]:
    """Count what goes through ``clf`` inside the context.

    >>> with count_passes(clf) as passes:
    ...     maps = method.attribute(images)
    >>> passes.forward / len(images)

    A pass that skips blocks, or whose gradient stops half-way, counts as one, and so does one for the features that an
    explainer reads where the classifier is its encoder. A gradient of something else than the classifier's output is
    not seen.
    """
    passes = Passes()

    thread = threading.get_ident()

    def arrived(_module: nn.Module, _args: Any, out: Any) -> None:
        if threading.get_ident() != thread:  # another user of the same network
            return
        # not a copy in another precision, which nobody else sees and no gradient comes back to
        logits = clf.own_answer(out)
        passes.forward += len(logits)
        if logits.requires_grad:
            logits.register_hook(returned)

    def returned(gradient: Tensor) -> None:
        passes.backward += len(gradient)

    @contextmanager
    def read(encoder: Encoder, images: Tensor) -> Iterator[None]:
        if encoder.module is not clf.module or threading.get_ident() != thread:
            yield
            return
        # an encoder asks the module for features by other ways than calling it, but not always
        before = passes.forward
        yield
        passes.forward = before + len(images)

    # no hook on all modules: it would slow down what is timed
    with ExitStack() as stack:
        stack.callback(clf.module.register_forward_hook(arrived).remove)
        READING.append(read)
        stack.callback(READING.remove, read)
        yield passes
