"""The papers' tables and figures, from weights and images to the finished page: ``aha reproduce``."""

from .catalog import EXPERIMENTS, Experiment
from .run import reproduce

__all__ = ["EXPERIMENTS", "Experiment", "reproduce"]
