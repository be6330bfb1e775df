"""Classifiers that go by a name of their own: what offers one enters how it is made.

Light, so that the package can offer a classifier before anything is imported that makes it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from .classifier import Classifier

# name → how to make it; also the kind in `Classifier.source`
RECIPES: dict[str, Callable[[], Classifier]] = {}
R = TypeVar("R", bound="Callable[[], Classifier]")


def recipe(name: str) -> Callable[[R], R]:
    """Decorator: what the function returns is the classifier ``name`` on the command line and in saved explainers.

    Its `Classifier.source` must be ``{"kind": name, "name": name}``. ValueError for a name that is taken.
    """

    def add(make: R) -> R:
        if name in RECIPES:
            raise ValueError(f"a classifier {name!r} is entered already: give another name")
        RECIPES[name] = make
        return make

    return add
