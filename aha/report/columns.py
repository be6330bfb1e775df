"""How reports name, order, print and rank what an evaluation measures.

A metric is called as in a summary: bare for the protocol aha ("deletion"), with the protocol in front for the
others ("rise/deletion").
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeGuard

import numpy as np

COSTS = ("seconds_per_image", "forward_per_image", "backward_per_image", "peak_bytes_per_image")
LABELS = {
    "ins_minus_del": "Ins − Del",
    "insertion": "Insertion",
    "deletion": "Deletion",
    "neg_minus_pos": "Neg − Pos",
    "negative": "Negative",
    "positive": "Positive",
    "adp": "ADP",
    "pic": "PIC",
    "pointing_game": "Pointing",
    "iou": "IoU",
    "map": "mAP",
    "f1": "F1",
    "iou_oracle": "IoU, oracle",
    "f1_oracle": "F1, oracle",
    "mas_deletion": "MAS Deletion",
    "mas_insertion": "MAS Insertion",
    "mas_ins_minus_del": "MAS Ins − Del",
    "monotonicity": "Monotonicity",
    "seconds_per_image": "s / image",
    "forward_per_image": "F / image",
    "backward_per_image": "B / image",
    "peak_bytes_per_image": "MiB / image",
}
PROTOCOLS = {
    "rise": "RISE",
    "chefer": "Chefer",
    "mda": "MDA",
    "mas": "MAS",
    "monotonicity": "Monotonicity",
}
# what stands together in a table
FAMILIES = (
    ("deletion", "insertion", "ins_minus_del"),
    ("positive", "negative", "neg_minus_pos"),
    ("adp", "pic"),
    ("mas_deletion", "mas_insertion", "mas_ins_minus_del"),
    ("monotonicity",),
    ("pointing_game", "iou", "map", "f1"),
    COSTS,
)
LEVEL = 0.05  # of a test, after the correction for the number of methods

_PERCENT = ("adp", "pic")
_PASSES = ("forward_per_image", "backward_per_image")


def split(metric: str) -> tuple[str, str]:
    """ "rise/deletion" → ("rise", "deletion"); the protocol of a bare name is ""."""
    protocol, _, name = metric.rpartition("/")
    return protocol, name


def direction(metric: str) -> bool | None:
    """Whether higher is better; None for a metric this library does not know."""
    # torchmetrics, and with it matplotlib, are not needed to write an overlay
    from ..metrics import arrow

    try:
        return arrow(metric) == "↑"
    except KeyError:
        return None


def label(metric: str) -> str:
    """The metric in words, without its protocol."""
    name = split(metric)[1]
    return LABELS.get(name, name.replace("_", " "))


def protocol_label(protocol: str) -> str:
    """How the literature writes the protocol."""
    return PROTOCOLS.get(protocol, protocol)


def heading(metric: str) -> str:
    """The metric as tables and axes call it, with ↑ where higher is better and ↓ where lower is."""
    protocol = split(metric)[0]
    text = f"{protocol_label(protocol)} {label(metric)}" if protocol else label(metric)
    return text + arrow_after(metric)


def arrow_after(metric: str) -> str:
    """ " ↑", " ↓" or, for a metric this library does not know, nothing."""
    return {True: " ↑", False: " ↓", None: ""}[direction(metric)]


def family(metric: str) -> tuple[str, int]:
    """(protocol, index into `FAMILIES`): metrics with the same stand together."""
    protocol, name = split(metric)
    return protocol, next((i for i, names in enumerate(FAMILIES) if name in names), len(FAMILIES))


def measured(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The metrics that any row holds a number of, in the order of `FAMILIES`: those of the protocol aha, of the
    others in order of appearance, and the costs last."""
    found = dict.fromkeys(key for row in rows for key, value in row.items() if is_number(value))
    protocols = list(dict.fromkeys(["", *(split(metric)[0] for metric in found)]))
    rank = {name: i for i, name in enumerate(name for names in FAMILIES for name in names)}

    def place(metric: str) -> tuple[bool, int, int]:
        protocol, name = split(metric)
        return metric in COSTS, protocols.index(protocol), rank.get(name, len(rank))

    return sorted(found, key=place)


def number(metric: str, value: float, digits: int = 4) -> str:
    """A value as text: ``digits`` decimals, two less for percentages; costs with three significant digits, memory
    in MiB."""
    name = split(metric)[1]
    if name == "peak_bytes_per_image":
        return _significant(value / 2**20)
    if name in COSTS:
        return _significant(value)
    text = f"{value:.{digits - 2 * (name in _PERCENT)}f}"
    return text if float(text) else text.lstrip("-")  # no minus before a zero


def _significant(value: float) -> str:
    # never in powers of ten, which would break a column of numbers
    if abs(value) >= 100:
        return f"{value:.0f}"
    return np.format_float_positional(value, precision=3, fractional=False, trim="-")


def places(values: Mapping[str, Any], metric: str) -> dict[str, int]:
    """Method → 1 for the best value, 2 for the second. Values printed alike share a place.

    Empty without a direction, where all values are alike, and for passes and memory: many methods share the least.
    """
    better = direction(metric)
    if better is None or split(metric)[1] in COSTS[1:]:
        return {}
    printed = {name: float(number(metric, value)) for name, value in values.items() if is_number(value)}
    distinct = sorted(set(printed.values()), reverse=better)
    if len(distinct) < 2:
        return {}
    return {name: distinct.index(value) + 1 for name, value in printed.items() if value in distinct[:2]}


def interval(row: Mapping[str, Any], metric: str) -> tuple[float, float] | None:
    """The row's 95 % interval of the metric, if it has a finite one."""
    bounds = (row.get("ci95") or {}).get(metric)
    if not isinstance(bounds, (list, tuple)) or len(bounds) != 2 or not all(map(is_number, bounds)):
        return None
    return bounds[0], bounds[1]


def inseparable(found: Mapping[str, Any] | None) -> bool:
    """Whether an entry of summary["significance"][metric] says that the method's distance to the best may be
    chance: its corrected p is at least `LEVEL`."""
    p = (found or {}).get("p")
    return is_number(p) and p >= LEVEL


def passes(row: Mapping[str, Any]) -> float | None:
    """Forward plus backward passes per image; None where neither was counted."""
    counted = [row[name] for name in _PASSES if is_number(row.get(name))]
    return float(sum(counted)) if counted else None


def is_ours(method: str) -> bool:
    """Whether figures and tables emphasise this method."""
    return method.lower().startswith("aha")


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a finite real number (NaN and infinities appear in JSON that Python wrote)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
