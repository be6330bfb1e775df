"""How many passes through the classifier something takes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from ..classifier import Classifier
from ..explainer.encoder import Encoder


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
        logits = clf.read(out)
        passes.forward += len(logits)
        if logits.requires_grad:
            logits.register_hook(returned)

    def returned(gradient: Tensor) -> None:
        passes.backward += len(gradient)

    # an encoder asks the module for features by other ways than calling it, but not always
    before: list[float] = []

    def reads_features(module: nn.Module) -> bool:
        return isinstance(module, Encoder) and module.module is clf.module and threading.get_ident() == thread

    def asked(module: nn.Module, _args: Any) -> None:
        if reads_features(module):
            before.append(passes.forward)

    def encoded(module: nn.Module, args: Any, _levels: Any) -> None:
        if reads_features(module):
            passes.forward = before.pop() + len(args[0])

    with ExitStack() as stack:
        for handle in (
            clf.module.register_forward_hook(arrived),
            register_module_forward_pre_hook(asked),
            register_module_forward_hook(encoded),
        ):
            stack.callback(handle.remove)
        yield passes
