"""How reports order, print and rank what an evaluation measures; what a metric is says `aha.metrics.catalog`.

A metric is called as in a summary: bare for the first protocol ("deletion"), with the protocol in front for the
others ("rise/deletion").
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

if TYPE_CHECKING:
    from ..metrics.catalog import Metric

# how the literature writes a protocol
PROTOCOLS = {"rise": "RISE", "chefer": "Chefer", "mda": "MDA", "mas": "MAS", "monotonicity": "Monotonicity"}
LEVEL = 0.05  # of a test, after the correction for the number of methods
HEADLINE = "ins_minus_del"  # the metric that methods are ordered by

Rows = Mapping[str, Mapping[str, Any]]  # method → {metric: mean, "ci95": {metric: [low, high]}, costs}


def split(metric: str) -> tuple[str, str]:
    """ "rise/deletion" → ("rise", "deletion"); the protocol of a bare name is ""."""
    protocol, _, name = metric.rpartition("/")
    return protocol, name


def _catalog() -> ModuleType:
    # torchmetrics, and with it matplotlib, are not needed to write an overlay
    from ..metrics import catalog

    return catalog


def row(metric: str) -> Metric | None:
    """The metric's row of the catalogue; None for one that it does not know."""
    return _catalog().METRICS.get(split(metric)[1])


def costs() -> tuple[str, ...]:
    """What a map takes: time, passes, memory."""
    return _catalog().names(_catalog().COSTS)


def direction(metric: str) -> bool | None:
    """Whether higher is better; None for a metric that the catalogue does not know."""
    return found.higher_is_better if (found := row(metric)) else None


def plain(name: str) -> str:
    """A name in words."""
    return name.replace("_", " ")


def label(metric: str) -> str:
    """The metric in words, without its protocol, with ↑ where higher is better and ↓ where lower is."""
    return f"{found.title} {found.arrow}" if (found := row(metric)) else plain(split(metric)[1])


def heading(metric: str) -> str:
    """The metric as axes call it: protocol, name and arrow."""
    protocol = split(metric)[0]
    return f"{PROTOCOLS.get(protocol, protocol)} {label(metric)}".strip()


def ordered(metrics: Iterable[str]) -> list[str]:
    """Metrics in the catalogue's order: protocols in order of appearance, costs last."""
    found = dict.fromkeys(metrics)
    protocols = list(dict.fromkeys(["", *(split(metric)[0] for metric in found)]))
    rank = {key: place for place, key in enumerate(_catalog().names())}
    named = sorted(map(split, found), key=lambda of: (protocols.index(of[0]), rank.get(of[1], len(rank))))
    return ["/".join(filter(None, of)) for of in sorted(named, key=lambda of: of[1] in costs())]


def measured(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """The metrics that any row holds a number of, in their order."""
    return ordered(key for of in rows for key, value in of.items() if is_number(value))


def best_first(results: Sequence[Rows], metric: str) -> list[str]:
    """The methods of all results, the best mean of ``metric`` first, behind those that more results have a value of: a
    mean of fewer does not compare."""
    sign = {True: -1, False: 1, None: 0}[direction(metric)]

    def place(method: str) -> tuple[int, float]:
        values = [value for rows in results if is_number(value := rows.get(method, {}).get(metric))]
        return -len(values), sign * math.fsum(values) / max(1, len(values))

    return sorted(dict.fromkeys(method for rows in results for method in rows), key=place)


def number(metric: str, value: float, coarser: int = 0) -> str:
    """A value as text, in the metric's unit and digits, ``coarser`` decimals less; costs with three significant."""
    found = row(metric)
    scale, digits = (found.scale, found.digits) if found else (1.0, 4)
    if digits is None:
        return significant(value * scale)
    text = f"{value * scale:.{max(0, digits - coarser)}f}"
    return text if float(text) else text.lstrip("-")  # no minus before a zero


def significant(value: float) -> str:
    """Three significant digits, never in powers of ten, which would break a column of numbers."""
    if abs(value) >= 100:
        return f"{value:.0f}"
    return np.format_float_positional(value, precision=3, fractional=False, trim="-")


def signed(metric: str, value: float) -> str:
    """A difference as text, with its sign."""
    return f"{'+' if value > 0 else '−' if value < 0 else ''}{number(metric, abs(value))}"


def places(values: Mapping[str, Any], metric: str) -> dict[str, int]:
    """Method → 1 for the best value, 2 for the second; values printed alike share a place. Empty without a direction,
    where all values are alike, and for passes and memory: many methods share the least."""
    found = row(metric)
    if found is None or not found.ranked:
        return {}
    printed = {name: float(number(metric, value)) for name, value in values.items() if is_number(value)}
    first = sorted(set(printed.values()), reverse=found.higher_is_better)[:2]
    return {name: first.index(value) + 1 for name, value in printed.items() if value in first and len(first) == 2}


def interval(of: Mapping[str, Any], metric: str) -> tuple[float, float] | None:
    """The method's 95 % interval of the metric, if it has a finite one."""
    bounds: Sequence[Any] = (of.get("ci95") or {}).get(metric) or ()
    return (bounds[0], bounds[1]) if len(bounds) == 2 and all(map(is_number, bounds)) else None


def interval_text(of: Mapping[str, Any], metric: str) -> str:
    """The method's 95 % interval of the metric as text, "" if it has none."""
    # narrow: twelve columns share a page
    between = "\N{THIN SPACE}…\N{THIN SPACE}"
    return between.join(number(metric, bound, coarser=1) for bound in interval(of, metric) or ())


def inseparable(found: Mapping[str, Any] | None) -> bool:
    """Whether an entry of summary["significance"][metric] says that the method's distance to the best may be
    chance: its corrected p is at least `LEVEL`."""
    p = (found or {}).get("p")
    return is_number(p) and p >= LEVEL


def is_ours(method: str) -> bool:
    """Whether figures and tables emphasise this method."""
    return method.lower().startswith("aha")


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a finite real number (NaN and infinities appear in JSON that Python wrote)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
