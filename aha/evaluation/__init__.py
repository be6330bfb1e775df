"""Evaluation of attribution methods: every metric per image, with confidence intervals, side by side."""

from .bootstrap import RESAMPLES, mean_interval
from .compare import Comparison, compare
from .engine import TARGETS
from .evaluate import evaluate
from .result import Column, Evaluation, Failure, versions
from .specs import MethodSpec

__all__ = [
    "RESAMPLES",
    "TARGETS",
    "Column",
    "Comparison",
    "Evaluation",
    "Failure",
    "MethodSpec",
    "compare",
    "evaluate",
    "mean_interval",
    "versions",
]
