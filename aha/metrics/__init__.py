"""Metrics of attributions (torchmetrics): faithfulness curves, change of confidence, localisation; protocols."""

from ..ranks import rank_pixels
from . import catalog
from .classes import ConfidenceChange, DeletionInsertion, Localization, MagnitudeAlignment, Monotonicity
from .curves import area, monotone_response
from .perturbed import Endpoints, Response, Sweep, endpoints, sweep
from .protocols import PROTOCOLS, Cost, Protocol, pixel_counts
from .suite import Scores, Suite

__all__ = [
    "PROTOCOLS",
    "ConfidenceChange",
    "Cost",
    "DeletionInsertion",
    "Endpoints",
    "Localization",
    "MagnitudeAlignment",
    "Monotonicity",
    "Protocol",
    "Response",
    "Scores",
    "Suite",
    "Sweep",
    "area",
    "arrow",
    "catalog",
    "endpoints",
    "monotone_response",
    "pixel_counts",
    "rank_pixels",
    "sweep",
]


def arrow(metric: str) -> str:
    """ "↑" where higher is better, "↓" where lower is, as for every cost. ValueError for an unknown metric.

    The name of a protocol in front, as in "rise/deletion", does not turn the arrow.
    """
    return catalog.get(metric).arrow
