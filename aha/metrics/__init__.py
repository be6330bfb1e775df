"""Metrics of attributions (torchmetrics): faithfulness curves, change of confidence, localisation."""

from .confidence import ConfidenceChange
from .curves import (
    DeletionInsertion,
    Endpoints,
    Response,
    Sweep,
    area,
    endpoints,
    pixel_counts,
    rank_pixels,
    sweep,
)
from .localization import Localization
from .protocols import PROTOCOLS, Protocol

DIRECTIONS = {**DeletionInsertion.directions, **ConfidenceChange.directions, **Localization.directions}

__all__ = [
    "DIRECTIONS",
    "PROTOCOLS",
    "ConfidenceChange",
    "DeletionInsertion",
    "Endpoints",
    "Localization",
    "Protocol",
    "Response",
    "Sweep",
    "area",
    "arrow",
    "endpoints",
    "pixel_counts",
    "rank_pixels",
    "sweep",
]


def arrow(metric: str) -> str:
    """ "↑" where higher is better, "↓" where lower is; time is better low. KeyError for an unknown metric."""
    return "↑" if {**DIRECTIONS, "seconds_per_image": False}[metric] else "↓"
