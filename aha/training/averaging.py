"""The mean of the weights over the last steps: less of what single batches are worth than the last step's weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


class MeanWeights:
    """The mean of a module's weights and running statistics, as they were after each of the steps that were added."""

    def __init__(self) -> None:
        self.mean: dict[str, Tensor] = {}
        self.steps = 0

    @torch.no_grad()
    def add(self, module: nn.Module) -> None:
        """Take in the weights as they are."""
        self.steps += 1
        for name, value in module.state_dict().items():
            if name in self.mean and value.is_floating_point():
                self.mean[name] += (value - self.mean[name]) / self.steps
            else:  # counters do not average
                self.mean[name] = value.detach().clone()

    def give(self, module: nn.Module) -> None:
        """Put the mean into ``module``, which stays as it is where nothing was added."""
        if self.steps:
            module.load_state_dict(self.mean)

    def state_dict(self) -> dict[str, Any]:
        """All that it knows, for a checkpoint."""
        return {"mean": self.mean, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any], module: nn.Module) -> None:
        """Go on from what `state_dict` kept, on the device of ``module``."""
        devices = {name: value.device for name, value in module.state_dict().items()}
        self.mean = {name: value.to(devices[name]) for name, value in state["mean"].items()}
        self.steps = state["steps"]
