"""Training of explainers on accelerate."""

from ..signals import Interrupted
from .trainer import TrainConfig, Trainer

__all__ = ["Interrupted", "TrainConfig", "Trainer"]
