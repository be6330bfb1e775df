"""Every metric in one row: its name, direction, unit, range and source, and what computes it.

Nothing else in the library names a metric's properties. A new metric is one row and one function:

>>> from aha.metrics import Protocol, catalog
>>> def total(probe):  # (B,) from the maps of the images that take part
...     return probe.maps.flatten(1).sum(dim=1)
>>> catalog.add(catalog.Metric("total", "Total", False, family="sparsity", measure=total))
>>> Protocol("mine", metrics=("total", "deletion"))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from .perturbed import Probe

COSTS = "cost"  # family of what an evaluation counts itself: time, passes, memory
ByReference = dict[str, Tensor]  # reference → one value, or one curve, per image


@dataclass(frozen=True)
class Metric:
    """What a metric is.

    Attributes:
        key: its name in protocols, tables of results and files, without a protocol in front.
        title: as tables and axes write it.
        higher_is_better: its direction.
        family: what stands together in a table.
        about: a sentence for reports.
        unit: of the printed value, "" for a plain number.
        digits: decimals in print; None: three significant digits.
        scale: the printed value is the value times this.
        low, high: range of the value.
        source: paper and section or equation, "" for what this library defines.
        ranked: whether tables mark the best and the second.
        oracle: an upper bound that looks at the ground truth: it does not compare with the others.
        measure: from a `Probe`, which holds the maps of the images that take part and perturbs on demand, to the value
            of each: (B,), or (B,) by reference. Without gradients. None for costs and differences.
        difference: (first, second): first − second of two other metrics.
        reads: what ``measure`` takes of the probe that is not there already: "deleted", "inserted" (the perturbed
            images of the curves), "shown" (one image per reference), "masks". `Protocol.passes` and
            `Protocol.needs` go by it.
        curves: name → the curves (B, S) by reference that reports draw of it.
    """

    key: str
    title: str
    higher_is_better: bool
    family: str
    about: str = ""
    unit: str = ""
    digits: int | None = 4
    scale: float = 1.0
    low: float = 0.0
    high: float = 1.0
    source: str = ""
    ranked: bool = True
    oracle: bool = False
    measure: Callable[[Probe], Tensor | ByReference] | None = None
    difference: tuple[str, str] | None = None
    reads: tuple[str, ...] = ()
    curves: Mapping[str, Callable[[Probe], ByReference]] = field(default_factory=dict)

    @property
    def arrow(self) -> str:
        """ "↑" where higher is better, else "↓"."""
        return "↑" if self.higher_is_better else "↓"


METRICS: dict[str, Metric] = {}


def add(metric: Metric) -> Metric:
    """Enter ``metric`` behind the others, which is its place in tables. ValueError if its key is taken or is none."""
    if not metric.key or "/" in metric.key:
        raise ValueError(f"metric {metric.key!r}: give a key without /, which parts a protocol from a metric")
    if metric.key in METRICS:
        raise ValueError(f"metric {metric.key!r} is there already: give another key")
    METRICS[metric.key] = metric
    return metric


def get(name: str) -> Metric:
    """The row of a metric; a protocol in front, as in "rise/deletion", is dropped. ValueError if it is not known."""
    if not known(name):
        raise ValueError(f"metric {name!r} is not known: choose one of {', '.join(METRICS)}")
    return METRICS[name.rpartition("/")[2]]


def known(name: str) -> bool:
    """Whether there is such a metric, with or without a protocol in front."""
    return name.rpartition("/")[2] in METRICS


def names(family: str | None = None) -> tuple[str, ...]:
    """Keys of a family, or of all metrics, in the order of tables."""
    return tuple(key for key, metric in METRICS.items() if family in (None, metric.family))


_RISE = "RISE (Petsiuk et al., BMVC 2018) §3.1"
_CHEFER = "Chefer et al. (CVPR 2021) §4"
_MAS = "MAS (Walker et al., 2024)"

for _row in (
    Metric(
        "deletion",
        "Deletion",
        False,
        family="curves",
        about="area under the probability while the most important pixels are removed first.",
        source=_RISE,
    ),
    Metric(
        "insertion",
        "Insertion",
        True,
        family="curves",
        about="area under the probability while the most important pixels are shown first.",
        source=_RISE,
    ),
    Metric(
        "ins_minus_del",
        "Ins − Del",
        True,
        family="curves",
        about="insertion minus deletion: the faithfulness of the order of the pixels.",
        low=-1.0,
        difference=("insertion", "deletion"),
    ),
    Metric(
        "positive",
        "Positive",
        False,
        family="accuracy",
        about="area under the accuracy while the most important pixels are removed first.",
        source=_CHEFER,
    ),
    Metric(
        "negative",
        "Negative",
        True,
        family="accuracy",
        about="area under the accuracy while the least important pixels are removed first.",
        source=_CHEFER,
    ),
    Metric(
        "neg_minus_pos",
        "Neg − Pos",
        True,
        family="accuracy",
        about="negative minus positive perturbation.",
        low=-1.0,
        difference=("negative", "positive"),
    ),
    Metric(
        "adp",
        "ADP",
        False,
        family="confidence",
        about="average drop of the probability in percent when the map itself is the mask.",
        unit="%",
        digits=2,
        high=100.0,
        source="Grad-CAM++ (Chattopadhay et al., WACV 2018) §4.1",
    ),
    Metric(
        "pic",
        "PIC",
        True,
        family="confidence",
        about="share of images in percent whose probability rises when the map itself is the mask.",
        unit="%",
        digits=2,
        high=100.0,
        source="Grad-CAM++ (Chattopadhay et al., WACV 2018) §4.1",
    ),
    Metric(
        "mas_deletion",
        "MAS Deletion",
        False,
        family="alignment",
        about="deletion, raised where the map's magnitudes are out of proportion to the response.",
        source=_MAS,
    ),
    Metric(
        "mas_insertion",
        "MAS Insertion",
        True,
        family="alignment",
        about="insertion, lowered where the map's magnitudes are out of proportion to the response.",
        source=_MAS,
    ),
    Metric(
        "mas_ins_minus_del",
        "MAS Ins − Del",
        True,
        family="alignment",
        about="MAS insertion minus MAS deletion.",
        low=-1.0,
        difference=("mas_insertion", "mas_deletion"),
    ),
    Metric(
        "monotonicity",
        "Monotonicity",
        True,
        family="monotonicity",
        about="rank correlation of the number of pixels shown with the probability.",
        low=-1.0,
    ),
    Metric(
        "pointing_game",
        "Pointing",
        True,
        family="localisation",
        about="how often the highest pixel lies on the evidence or right beside it.",
        source="Zhang et al. (ECCV 2016)",
    ),
    Metric(
        "iou",
        "IoU",
        True,
        family="localisation",
        about="overlap of the map, cut at its mean, with the evidence.",
    ),
    Metric(
        "map",
        "mAP",
        True,
        family="localisation",
        about="average precision of the pixels against the evidence.",
    ),
    Metric(
        "f1",
        "F1",
        True,
        family="localisation",
        about="F1 of the map, cut at its mean, against the evidence.",
    ),
    Metric(
        "iou_oracle",
        "IoU, oracle",
        True,
        family="localisation",
        about="IoU at the best threshold of every image, picked from the evidence: an upper bound.",
        oracle=True,
    ),
    Metric(
        "f1_oracle",
        "F1, oracle",
        True,
        family="localisation",
        about="F1 at the best threshold of every image, picked from the evidence: an upper bound.",
        oracle=True,
    ),
    Metric(
        "seconds_per_image",
        "s / image",
        False,
        family=COSTS,
        about="time to make one map.",
        unit="s",
        digits=None,
        high=math.inf,
    ),
    Metric(
        "forward_per_image",
        "F / image",
        False,
        family=COSTS,
        about="forward passes through the classifier for one map.",
        unit="passes",
        digits=None,
        high=math.inf,
        ranked=False,
    ),
    Metric(
        "backward_per_image",
        "B / image",
        False,
        family=COSTS,
        about="backward passes through the classifier for one map.",
        unit="passes",
        digits=None,
        high=math.inf,
        ranked=False,
    ),
    Metric(
        "peak_bytes_per_image",
        "MiB / image",
        False,
        family=COSTS,
        about="memory at the peak of explaining one image by itself.",
        unit="MiB",
        digits=None,
        scale=2.0**-20,
        high=math.inf,
        ranked=False,
    ),
):
    add(_row)
