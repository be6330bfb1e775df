"""What every attribution method shares: the checks at the door, the state it puts back, the registry."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..checks import check_arguments, check_integer, check_seed, checked, finite_maps
from ..classifier import Classifier, check_classifier
from ..kernels.messages import short
from ..memory import per_pass
from ..protection import protected
from .passes import Passes, count_passes


@dataclass(frozen=True)
class Metadata:
    """Where a method comes from and what it asks for.

    Attributes:
        paper: authors, venue, year.
        cost: forward (F) and backward (B) passes per image.
        architectures: classifiers it accepts.
        licence: of the source that was followed; the code here is our own.
        notes: choices made and approximations.
        fidelity: equal to the authors' code, checked how and to what; or by which definition it differs.
    """

    paper: str
    cost: str
    architectures: str
    licence: str
    notes: str = ""
    fidelity: str = ""


# what Metadata.fidelity says of the methods that were compared
MEASURED = "equal to the authors' code to rounding, compared on photographs with a ViT-Tiny"
BY_HAND = "the paper's definition, equal to a computation by hand; not compared with the authors' code"


class Attributor(ABC):
    """Attribution maps of a frozen classifier's decisions; a subclass implements `_attribute`.

    Args:
        clf: the classifier to explain.
        internal_batch_size: images in one pass of the classifier, ≥ 1; memory is set by it, results are not. Default:
            `aha.memory.per_pass`.
        seed: of whatever is random; the same seed gives the same maps.
    """

    name: ClassVar[str]
    metadata: ClassVar[Metadata]
    # False where the map is the same for all classes: then no pass is spent on finding the predicted one
    class_specific: ClassVar[bool] = True
    # what the classifier must give: gradients to the images or to what is inside, and hooks on its parts
    needs_gradients: ClassVar[bool] = True
    looks_inside: ClassVar[bool] = False
    # forward and backward passes for one image, where neither options nor images change them
    per_image: ClassVar[Passes | None] = None

    def __init__(self, clf: Classifier, internal_batch_size: int | None = None, seed: int = 0):
        check_classifier(clf).require(self.name, self.needs_gradients, self.looks_inside)
        self.clf = clf
        size = per_pass(clf.device, internal_batch_size, most=64)
        self.internal_batch_size = check_integer("internal_batch_size", size, 1)
        self.seed = check_seed(seed)

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """All that a map is made with, the classifier first."""
        return (self.clf,)

    def attribute(self, images: Tensor, target: Tensor | Sequence[int] | int | None = None) -> Tensor:
        """Attribute the classifier's decision to the pixels.

        Whatever the computation changes in the classifier (hooks, gradient flags, fused attention, training
        mode) is put back, also after an exception. Works inside ``torch.no_grad`` and ``inference_mode``,
        computes in float32 also under autocast, and threads that share a classifier wait for one another.

        Args:
            images: (B, C, H, W) RGB in [0, 1] on the classifier's device.
            target: (B,) classes to explain, one class for all, or None for the predicted class.

        Returns:
            (B, 1, H, W) float32 on the same device, on the method's own scale; higher is more important.

        Raises:
            ValueError: for images or targets that do not fit, and where the classifier or the map is not finite, in
                one line.
        """
        images = self.clf.check(images)
        if target is not None:
            target = self.clf.resolve_target(images, target)
        maps = []
        with protected(*self.networks), self.clf.watched(self.name):
            for start in range(0, len(images), self.internal_batch_size):
                part = images[start : start + self.internal_batch_size].detach()
                classes = None if target is None else target[start : start + self.internal_batch_size]
                if self.class_specific:
                    classes = self.clf.resolve_target(part, classes)
                maps.append(self._attribute(part, classes).detach().float())
            return finite_maps(torch.cat(maps), f"{self.name}: maps of {self.clf.name}")

    def passes(self, images: Tensor) -> Passes:
        """What `attribute` takes with the target given, as `count_passes` counts it, per image: their mean.

        Known without a pass of the classifier where the method says what it takes (`per_image`, or an override) and
        that does not depend on the images; counted on the first image for a method that says nothing. Where the target
        matters it is the predicted class.

        Args:
            images: as for `attribute`.
        """
        if self.per_image is not None:
            return replace(self.per_image)
        image = self.clf.check(images)[:1]
        target = self.clf.resolve_target(image, None)
        with count_passes(self.clf) as counted:
            self.attribute(image, target)
        return counted

    @abstractmethod
    def _attribute(self, images: Tensor, target: Any) -> Tensor:
        """At most ``internal_batch_size`` checked images and their targets (B,) → (B, 1, H, W).

        ``target`` is a tensor if the method is ``class_specific``, else it may be None. Gradients are
        enabled, parameters do not require them.
        """

    def __call__(self, images: Tensor, target: Tensor | Sequence[int] | int | None = None) -> Tensor:
        return self.attribute(images, target)


_REGISTRY: dict[str, type[Attributor]] = {}
A = TypeVar("A", bound=type[Attributor])


def register(name: str) -> Callable[[A], A]:
    """Class decorator: make an `Attributor` with ``metadata`` known to `create` as ``name``."""

    def add(cls: A) -> A:
        if name in _REGISTRY:
            raise ValueError(f"attributor {name!r} is registered already, as {_REGISTRY[name].__name__}")
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return add


def available() -> dict[str, Metadata]:
    """Name → metadata of all methods, by name."""
    return {name: _REGISTRY[name].metadata for name in sorted(_REGISTRY)}


def create(name: str, clf: Classifier, **options: Any) -> Attributor:
    """The method of that name for ``clf``; options go to its class, ``internal_batch_size`` and ``seed`` to
    all.

    Raises:
        ValueError: for an unknown name, or a classifier whose architecture the method does not accept.
        ImportError: naming the extra to install, where the method needs one.
    """
    cls = find(name)
    try:
        made = cls(clf, **options)
    except (TypeError, AttributeError, RuntimeError, LookupError) as error:  # an option that is not known, or no such
        _check_options(cls, options, error)
        if isinstance(error, TypeError):
            raise _not_taken(name, error) from error
        raise
    _check_options(cls, options)
    return made


def _check_options(cls: type[Attributor], options: dict[str, Any], failed: Exception | None = None) -> None:
    try:
        check_arguments(cls.__init__, options)
    except ValueError as error:
        raise _not_taken(cls.name, error) from failed or error


def _not_taken(name: str, error: Exception) -> ValueError:
    reason = " ".join(str(error).split()).split("__init__() ")[-1]
    return ValueError(f"{name} does not take these options ({reason}): see help(aha.attributors.find({name!r}))")


@checked
def find(name: str) -> type[Attributor]:
    """The class of that name; ValueError for an unknown one."""
    if name not in _REGISTRY:
        close = difflib.get_close_matches(name, _REGISTRY, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        known = ", ".join(sorted(_REGISTRY))
        raise ValueError(f"attributor {short(name)} is not known{hint}: choose one of {known}")
    return _REGISTRY[name]
