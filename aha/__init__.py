"""Learned visual attribution: which pixels made a frozen image classifier decide as it did.

Names are imported on first use, so that ``import aha`` and ``import aha.kernels`` stay light.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__
from .recipes import recipe

if TYPE_CHECKING:
    from . import attributors, calibration, data, evaluation, kernels, metrics, references, regions, report, terminal
    from .classifier import Classifier
    from .explainer import Explainer
    from .objective import Objective
    from .refinement import refine
    from .shapley import ShapleyObjective
    from .training import TrainConfig, Trainer

_NAMES = {
    "Classifier": "classifier",
    "Explainer": "explainer",
    "Objective": "objective",
    "ShapleyObjective": "shapley",
    "TrainConfig": "training",
    "Trainer": "training",
    "refine": "refinement",
}
_MODULES = (
    "attributors",
    "calibration",
    "data",
    "evaluation",
    "kernels",
    "metrics",
    "references",
    "regions",
    "report",
    "terminal",
)

__all__ = ["__version__", *_NAMES, *_MODULES]


@recipe("scenes")
def _scenes() -> "Classifier":
    from .demo.classifier import scenes

    return scenes()


def __getattr__(name: str) -> Any:
    if name in _NAMES:
        value = getattr(importlib.import_module(f".{_NAMES[name]}", __name__), name)
    elif name in _MODULES:
        value = importlib.import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
