"""Evaluation of attribution methods on a data set, in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .. import processes
from ..checks import check_integer, check_seed, checked
from ..classifier import Classifier
from ..data import fit_labels
from ..metrics import Protocol, Suite
from ..store import Memory
from .engine import Engine, Method, Progress, Row, announcing
from .result import Evaluation


@checked
def evaluate(
    clf: Classifier,
    methods: Mapping[str, Method],
    data: torch.utils.data.Dataset,
    target: str = "predicted",
    protocol: str | Protocol = "aha",
    batch_size: int = 32,
    limit: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    internal_batch_size: int | None = None,
) -> Evaluation:
    """Measure attribution methods on the images of a data set.

    f(I) and f(I0) are computed once per batch, for all methods and metrics. A method that raises, or returns
    maps that are not finite or of the wrong shape, is recorded as failed for that batch; so is an image that
    cannot be read or does not keep the pixel contract. All else goes on.

    Under ``torchrun`` or ``accelerate launch`` the processes share the batches: call it in each of them. Every one gets
    the whole result, the same numbers as of one process.

    Args:
        clf: the classifier; images are moved to its device.
        methods: name → an `Attributor` or any callable (images (B,C,H,W), target (B,)) → maps (B,1,H,W).
        data: items {"image": (C,H,W) in [0,1], "label": int, −1 if unknown, optional "mask": (1,H,W) bool,
            optional "path"}. Labels of an image folder are brought into the classifier's numbering, or refused, see
            `aha.data.fit_labels`. Images are taken as they come: for a protocol's own crop make the folder with its
            `Protocol.preprocessing`, or use `compare`.
        target: explain the "predicted" class, or the "true" one, the label.
        protocol: a preset's name or a `Protocol`. Localisation is measured beside it where masks exist.
        batch_size: images given to a method at once.
        limit: number of images, drawn at random with ``seed``; None is all.
        seed: of that draw and of the bootstrap. Methods have seeds of their own.
        progress: told of what is done by the main process, e.g. a bar of `aha.terminal.progress`.
        internal_batch_size: perturbed images in one forward pass of the metrics; default: `aha.memory.per_pass`.

    Raises:
        ValueError: for bad arguments, in one line, or if no image could be measured by any method, also because none
            takes part in the protocol.
        ConnectionError: in one line, if another process has ended.
    """
    if not isinstance(methods, Mapping):
        raise ValueError(f"methods is a {type(methods).__name__}: give a dict of names and methods")
    check_seed(seed)
    if limit is not None:
        check_integer("limit", limit, 1)
    data = fit_labels(data, clf)
    suites = [Suite(clf, name, internal_batch_size) for name in (protocol, "localisation")]
    keyed = {suite.protocol.name: suite for suite in suites}
    rows = [Row(name, name, method) for name, method in methods.items()]
    indices = choose(len(data), limit, seed)  # type: ignore[arg-type]
    store = Memory()
    with processes.together() as state:
        rank, world = state.process_index, state.num_processes
        engine = Engine(clf, rows, data, indices, target, keyed, batch_size, store, rank, world)
        engine.run(announcing(progress if state.is_main_process else None, engine))
        if world > 1:
            store.gather()
    result = engine.result(seed, described(data))
    # in an order that does not depend on who found them
    result.failures.sort(key=lambda failure: (failure.images, failure.method or "", failure.reason))
    if len(result.unmeasured) == len(result.protocols):
        raise ValueError(f"nothing could be measured: no image takes part in protocol {suites[0].protocol.name!r}")
    return result


def choose(size: int, limit: int | None, seed: int) -> list[int]:
    """Indices in ascending order; random, for folders are sorted by class: the first few would be of one."""
    if limit is None or limit >= size:
        return list(range(size))
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(size, generator=generator)[:limit].sort().values.tolist()


def described(data: torch.utils.data.Dataset) -> str | None:
    """How a data set of ours resizes and crops its images, in a line; None for others."""
    whole: Any = getattr(data, "data", data)  # of a `Part`
    preprocessing = getattr(whole, "preprocessing", None)
    return None if preprocessing is None else preprocessing.describe(whole.image_size)
