"""Metrics of attributions (torchmetrics): faithfulness curves, change of confidence, localisation; protocols."""

from .confidence import ConfidenceChange
from .curves import DeletionInsertion, area, monotone_response
from .localization import Localization
from .mas import MagnitudeAlignment
from .monotonicity import Monotonicity
from .perturbed import INTERNAL_BATCH_SIZE, Endpoints, Response, Sweep, endpoints, rank_pixels, sweep
from .protocols import DIRECTIONS, PROTOCOLS, Protocol, pixel_counts
from .suite import Batch, Scores, Suite

_COSTS = ("seconds_per_image", "forward_per_image", "backward_per_image", "peak_bytes_per_image")

__all__ = [
    "DIRECTIONS",
    "INTERNAL_BATCH_SIZE",
    "PROTOCOLS",
    "Batch",
    "ConfidenceChange",
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
    "endpoints",
    "monotone_response",
    "pixel_counts",
    "rank_pixels",
    "sweep",
]


def arrow(metric: str) -> str:
    """ "↑" where higher is better, "↓" where lower is, as for every cost. KeyError for an unknown metric.

    The name of a protocol in front, as in "rise/deletion", does not turn the arrow.
    """
    name = metric.rpartition("/")[2]
    return "↑" if {**DIRECTIONS, **dict.fromkeys(_COSTS, False)}[name] else "↓"
