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
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..checks import checked
from .curves import aligned, area, average_drop, increase, monotone_response, trend
from .localization import Located, average_precision, best_overlap, overlap, pointing

if TYPE_CHECKING:
    from .perturbed import Probe

READS = ("deleted", "inserted", "ends", "shown", "masks")  # see `Metric.reads`
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
        reads: what ``measure`` takes of the probe and a protocol must provide: "deleted", "inserted" (the perturbed
            images of the curves), "ends" (curves from f(I) to f(I0)), "shown" (one image per reference), "masks".
            `Protocol.passes` and `Protocol.needs` go by it.
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
    measure: Callable[[Any], Tensor | ByReference] | None = None
    difference: tuple[str, str] | None = None
    reads: tuple[str, ...] = ()
    curves: Mapping[str, Callable[[Probe], ByReference]] = field(default_factory=dict)

    @property
    @checked
    def arrow(self) -> str:
        """ "↑" where higher is better, else "↓"."""
        return "↑" if self.higher_is_better else "↓"


METRICS: dict[str, Metric] = {}


def add(metric: Metric) -> Metric:
    """Enter ``metric`` behind the others, which is its place in tables. ValueError if its key is taken or is none, or
    its sides or what it reads are not known."""
    if not metric.key or "/" in metric.key:
        raise ValueError(f"metric {metric.key!r}: give a key without /, which parts a protocol from a metric")
    if not set(READS).issuperset(metric.reads):
        raise ValueError(f"metric {metric.key!r} reads {metric.reads}: give a tuple of {', '.join(READS)}")
    for part in metric.difference or ():
        if get(part).measure is None:
            raise ValueError(f"metric {metric.key!r} is a difference of {part!r}: give two metrics that are measured")
    if metric.key in METRICS:
        raise ValueError(f"metric {metric.key!r} is there already: give another key")
    METRICS[metric.key] = metric
    return metric


@checked
def get(name: str) -> Metric:
    """The row of a metric; a protocol in front, as in "rise/deletion", is dropped. ValueError if it is not known."""
    if not known(name):
        raise ValueError(f"metric {name!r} is not known: choose one of {', '.join(METRICS)}")
    return METRICS[name.rpartition("/")[2]]


@checked
def known(name: str) -> bool:
    """Whether there is such a metric, with or without a protocol in front."""
    return name.rpartition("/")[2] in METRICS


def names(family: str | None = None) -> tuple[str, ...]:
    """Keys of a family, or of all metrics, in the order of tables."""
    return tuple(key for key, metric in METRICS.items() if family in (None, metric.family))


Curves = Callable[["Probe"], ByReference]


def _read(side: str, part: str = "confidence") -> Curves:
    """What the classifier answered, "confidence" or "correct", on a side of the probe that `Metric.reads` names."""
    return lambda probe: {name: getattr(answer, part) for name, answer in getattr(probe, side).items()}


def _each(change: Callable[[Probe, Tensor], Tensor], curves: Curves) -> Curves:
    """``change`` of what every reference has."""
    return lambda probe: {name: change(probe, curve) for name, curve in curves(probe).items()}


def _area(curves: Curves) -> Curves:
    return _each(lambda _, curve: area(curve), curves)


def _response(side: str, rising: bool) -> Curves:
    """Confidence over the removed or the inserted fraction, as the protocol scales it."""
    return _each(
        lambda probe, curve: monotone_response(curve, rising) if probe.protocol.monotone else curve, _read(side)
    )


def _aligned(side: str, rising: bool) -> Curves:
    def score(probe: Probe, curve: Tensor) -> Tensor:
        return aligned(monotone_response(curve, rising), probe.density if rising else 1 - probe.density, rising)

    return _each(score, _read(side))


def _change(score: Callable[[Tensor, Tensor], Tensor]) -> Curves:
    return _each(lambda probe, after: score(probe.ends.original.confidence, after), _read("shown"))


def _on_masks(score: Callable[[Located], Tensor]) -> Callable[[Located], Tensor]:
    """NaN where the mask is empty."""
    return lambda at: score(at).float().masked_fill(~at.masks.flatten(1).any(dim=1), torch.nan)


_RISE, _MAS = "RISE (Petsiuk et al., BMVC 2018)", "MAS (Walker et al., 2024)"
_CHEFER, _DROP = "Chefer et al. (CVPR 2021) §4", "Grad-CAM++ (Chattopadhay et al., WACV 2018)"

_DELETION, _INSERTION = _response("deleted", rising=False), _response("inserted", rising=True)
_ALIGNED = _aligned("deleted", rising=False), _aligned("inserted", rising=True)
# over the removed fraction; least important first, what is left are the most important
_POSITIVE, _NEGATIVE = _read("deleted", "correct"), _each(lambda _, curve: curve.flip(-1), _read("inserted", "correct"))

# fmt: off
for _row in (
    # key, title, whether higher is better, family, sentence for reports; then what is not the default
    Metric("deletion", "Deletion", False, "curves",
           "area under the probability while the most important pixels are removed first.",
           source=_RISE, measure=_area(_DELETION), reads=("deleted",), curves={"deletion": _DELETION}),
    Metric("insertion", "Insertion", True, "curves",
           "area under the probability while the most important pixels are shown first.",
           source=_RISE, measure=_area(_INSERTION), reads=("inserted",), curves={"insertion": _INSERTION}),
    Metric("ins_minus_del", "Ins − Del", True, "curves",
           "insertion minus deletion: the faithfulness of the order of the pixels.",
           low=-1.0, difference=("insertion", "deletion")),
    Metric("positive", "Positive", False, "accuracy",
           "area under the accuracy while the most important pixels are removed first.",
           source=_CHEFER, measure=_area(_POSITIVE), reads=("deleted",), curves={"positive": _POSITIVE}),
    Metric("negative", "Negative", True, "accuracy",
           "area under the accuracy while the least important pixels are removed first.",
           source=_CHEFER, measure=_area(_NEGATIVE), reads=("inserted",), curves={"negative": _NEGATIVE}),
    Metric("neg_minus_pos", "Neg − Pos", True, "accuracy", "negative minus positive perturbation.",
           low=-1.0, difference=("negative", "positive")),
    Metric("adp", "ADP", False, "confidence",
           "average drop of the probability in percent when the map itself is the mask.",
           unit="%", digits=2, high=100.0, source=_DROP, measure=_change(average_drop), reads=("shown",)),
    Metric("pic", "PIC", True, "confidence",
           "share of images in percent whose probability rises when the map itself is the mask.",
           unit="%", digits=2, high=100.0, source=_DROP, measure=_change(increase), reads=("shown",)),
    Metric("mas_deletion", "MAS Deletion", False, "alignment",
           "deletion, raised where the map's magnitudes are out of proportion to the response.",
           source=_MAS, measure=_area(_ALIGNED[0]), reads=("deleted", "ends"),
           curves={"mas_deletion": _ALIGNED[0],
                   "deletion_density": _each(lambda probe, _: 1 - probe.density, _read("deleted"))}),
    Metric("mas_insertion", "MAS Insertion", True, "alignment",
           "insertion, lowered where the map's magnitudes are out of proportion to the response.",
           source=_MAS, measure=_area(_ALIGNED[1]), reads=("inserted", "ends"),
           curves={"mas_insertion": _ALIGNED[1],
                   "insertion_density": _each(lambda probe, _: probe.density, _read("inserted"))}),
    Metric("mas_ins_minus_del", "MAS Ins − Del", True, "alignment", "MAS insertion minus MAS deletion.",
           low=-1.0, difference=("mas_insertion", "mas_deletion")),
    Metric("monotonicity", "Monotonicity", True, "monotonicity",
           "rank correlation of the number of pixels shown with the probability.",
           low=-1.0, measure=_each(lambda _, curve: trend(curve), _read("inserted")),
           reads=("inserted",), curves={"insertion": _read("inserted")}),
    Metric("pointing_game", "Pointing", True, "localisation",
           "how often the highest pixel lies on the evidence or right beside it.",
           source="Zhang et al. (ECCV 2016)", reads=("masks",),
           measure=_on_masks(lambda at: pointing(at.maps, at.masks, at.tolerance))),
    Metric("iou", "IoU", True, "localisation", "overlap of the map, cut at its mean, with the evidence.",
           measure=_on_masks(lambda at: overlap(at.maps, at.masks)[0]), reads=("masks",)),
    Metric("map", "mAP", True, "localisation", "average precision of the pixels against the evidence.",
           measure=_on_masks(lambda at: average_precision(*at.retrieved)), reads=("masks",)),
    Metric("f1", "F1", True, "localisation", "F1 of the map, cut at its mean, against the evidence.",
           measure=_on_masks(lambda at: overlap(at.maps, at.masks)[1]), reads=("masks",)),
    Metric("iou_oracle", "IoU, oracle", True, "localisation",
           "IoU at the best threshold of every image, picked from the evidence: an upper bound.",
           oracle=True, measure=_on_masks(lambda at: best_overlap(*at.retrieved)[0]), reads=("masks",)),
    Metric("f1_oracle", "F1, oracle", True, "localisation",
           "F1 at the best threshold of every image, picked from the evidence: an upper bound.",
           oracle=True, measure=_on_masks(lambda at: best_overlap(*at.retrieved)[1]), reads=("masks",)),
    Metric("seconds_per_image", "s / image", False, COSTS, "time to make one map.",
           unit="s", digits=None, high=math.inf),
    Metric("forward_per_image", "F / image", False, COSTS,
           "forward passes through the classifier for one map.",
           unit="passes", digits=None, high=math.inf, ranked=False),
    Metric("backward_per_image", "B / image", False, COSTS,
           "backward passes through the classifier for one map.",
           unit="passes", digits=None, high=math.inf, ranked=False),
    Metric("peak_bytes_per_image", "MiB / image", False, COSTS,
           "memory at the peak of explaining one image by itself.",
           unit="MiB", digits=None, scale=2.0**-20, high=math.inf, ranked=False),
):
    add(_row)
# fmt: on
