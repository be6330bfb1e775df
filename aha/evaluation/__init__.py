"""Evaluation of attribution methods: every metric per image, with confidence intervals, side by side."""

from ..attributors import MethodSpec
from ..bootstrap import RESAMPLES, mean_interval
from .compare import Comparison, compare
from .engine import TARGETS
from .evaluate import evaluate
from .records import Key, Records
from .result import Column, Evaluation, Failure, versions

__all__ = [
    "RESAMPLES",
    "TARGETS",
    "Column",
    "Comparison",
    "Evaluation",
    "Failure",
    "Key",
    "MethodSpec",
    "Records",
    "compare",
    "evaluate",
    "mean_interval",
    "versions",
]
