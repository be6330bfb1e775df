"""The figures of a comparison: many methods, several models and targets.

Inputs are the plain data of a summary: rows are method → {metric: mean, "ci95": {metric: [low, high]}, costs},
results are (model, target) → summary. Every figure is a PNG; without matplotlib, ImportError.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import columns as names
from . import labels, tables
from .columns import HEADLINE, Rows, heading, is_number, is_ours, plain
from .drawing import ACCENT, FAINT, INK, PALETTE, sheet
from .table import Table

PASSES = "passes"
_WHITE, _BLUE, _ALIKE = "#ffffff", "#0072b2", "#f6c7a3"


def tradeoff(rows: Rows, path: str | Path, metric: str = HEADLINE, cost: str = "seconds_per_image") -> Path:
    """One point per method: the metric over the cost on a log scale. Returns the path.

    The line is the Pareto front: every method off it has one on it that is neither worse nor dearer. Vertical bars
    are 95 % intervals. A cost of zero stands at the left edge. Beside others, "random" is a remark, not a point.

    Args:
        rows: method → its metrics and costs.
        path: of the PNG.
        metric: that `aha.metrics.catalog` knows.
        cost: of the catalogue, for example "seconds_per_image", or "passes" (forward plus backward).

    Raises:
        ValueError: for another cost, a metric without a direction, or if no method has both.
    """
    if cost not in (*names.costs(), PASSES):
        raise ValueError(f"cost={cost!r} is not known: choose one of {', '.join((*names.costs(), PASSES))}")
    better = names.direction(metric)
    if better is None:
        raise ValueError(f"metric {metric!r} has no better direction: choose one of aha.metrics.catalog")
    points = _points(rows, metric, cost)
    if not points:
        raise ValueError(f"no method has both {metric} and {cost}: choose what the rows hold")
    remarks = ["line: Pareto front"]
    if "random" in points and len(points) > 3:
        # chance lies so far below that its point would take most of the plot
        remarks.append(f"not shown: random, {names.number(metric, points.pop('random')[1], coarser=1)}")
    bars = {name: names.interval(rows[name], metric) for name in points}
    if any(bars.values()):
        remarks.insert(1, "bars: 95 % intervals")
    zero = min((x for x, _ in points.values() if x > 0), default=1.0) / 4
    at = {name: (x if x > 0 else zero, y) for name, (x, y) in points.items()}
    with sheet(path, 7.4, 4.6, layout=None) as figure:
        from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

        # a fixed box: the names are placed in pixels before anything is drawn
        axes = figure.add_axes((0.09, 0.115, 0.895, 0.835))
        axes.set_xscale("log")
        front = _front(at, better)
        axes.step(*zip(*front, strict=True), where="post", color=ACCENT, alpha=0.35, linewidth=1.2, zorder=1)
        for name, (x, y) in at.items():
            color = ACCENT if is_ours(name) else FAINT if name == "random" else PALETTE[0]
            if bounds := bars[name]:
                axes.plot((x, x), bounds, color=color, linewidth=1.6, alpha=0.35, zorder=2)
            filled = color if (x, y) in front else "white"
            axes.plot(x, y, "o", color=color, markerfacecolor=filled, markersize=5.5, markeredgewidth=1.3, zorder=3)
        low, high = np.log10([min(x for x, _ in at.values()), max(x for x, _ in at.values())])
        room = max(0.15, 0.09 * (high - low))
        edges = 10 ** (low - room), 10 ** (high + room)
        axes.set_xlim(*edges)
        axes.margins(y=0.08)
        unit = "forward and backward passes per image ↓" if cost == PASSES else heading(cost)
        axes.set(xlabel=unit, ylabel=heading(metric))
        free = any(x == 0 for x, _ in points.values())
        within = [x for x in LogLocator().tick_values(*edges) if (2 * zero if free else edges[0]) < x <= edges[1]]
        ticks = ({zero: "0"} if free else {}) | {float(x): names.significant(float(x)) for x in within}
        axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
        axes.set_xticklabels(ticks.values())
        axes.xaxis.set_minor_locator(NullLocator())
        style: Any = {"ha": "right", "va": "bottom", "size": 7.5, "color": FAINT}
        axes.text(1, 1.012, "    ".join(remarks), transform=axes.transAxes, **style)
        labels.place(figure, axes, at, bars, front)
    return Path(path)


def _points(rows: Rows, metric: str, cost: str) -> dict[str, tuple[float, float]]:
    parts = ("forward_per_image", "backward_per_image") if cost == PASSES else (cost,)
    scales = {part: found.scale for part in parts if (found := names.row(part))}
    points = {}
    for name, row in rows.items():
        counted = [row[part] * scale for part, scale in scales.items() if is_number(row.get(part))]
        if counted and is_number(row.get(metric)):
            points[name] = float(sum(counted)), float(row[metric])
    return points


def _front(points: Mapping[str, tuple[float, float]], better: bool) -> list[tuple[float, float]]:
    """The points that none beats in one respect without being worse in the other, the cheapest first."""
    sign = 1 if better else -1
    front: list[tuple[float, float]] = []
    for x, y in sorted(set(points.values()), key=lambda point: (point[0], -sign * point[1])):
        if not front or sign * y > sign * front[-1][1]:
            front.append((x, y))
    return front


def significance_matrix(summary: Mapping[str, Any], path: str | Path) -> Path:
    """Rows are methods, columns metrics: the difference to the best of the column, and whether it may be chance.

    Args and errors as in `tables.differences`.
    """
    table = tables.differences(summary)
    columns = zip(*(row.cells for row in table.rows), strict=True)
    widest = [max((abs(cell.value or 0) for cell in column), default=0) or 1 for column in columns]

    def color(cell: tables.Cell, column: int) -> str:
        if cell.value is None or cell.place:
            return ACCENT if cell.place else _WHITE
        return _ALIKE if cell.mark else _mixed(_BLUE, 0.06 + 0.5 * abs(cell.value) / widest[column])

    colors = [[color(cell, column) for column, cell in enumerate(row.cells)] for row in table.rows]
    legend = {
        "best": ACCENT,
        f"may be chance (corrected p ≥ {names.LEVEL})": _ALIKE,
        "worse (deeper: further)": _mixed(_BLUE, 0.4),
    }
    return _matrix(path, table, colors, legend, "difference to the best")


def models(results: Mapping[tuple[str, str], Mapping[str, Any]], path: str | Path, metric: str = HEADLINE) -> Path:
    """One metric of every method on every classifier and explained class: the deeper, the better in its column.

    Args:
        results: (model, target) → summary.
        path: of the PNG.
        metric: the value in the cells.

    Raises:
        ValueError: if no result holds the metric.
    """
    several = len({target for _, target in results}) > 1
    heads = (f"{model} {target}" if several else model for model, target in results)
    table = tables.overview(dict(zip(heads, results.values(), strict=True)), metric)
    values = np.array([[np.nan if c.value is None else c.value for c in row.cells] for row in table.rows])
    low, high = np.nanmin(values, 0), np.nanmax(values, 0)
    share = np.where(high > low, (values - low) / np.where(high > low, high - low, 1), 1)
    if names.direction(metric) is False:
        share = 1 - share
    colors = [[_WHITE if np.isnan(s) else _mixed(_BLUE, 0.02 + 0.5 * s) for s in line] for line in share]
    return _matrix(path, table, colors, {}, heading(metric))


def _mixed(color: str, share: float) -> str:
    """The colour on white, ``share`` of it in [0, 1]."""
    return "#" + "".join(f"{round(255 + share * (part - 255)):02x}" for part in bytes.fromhex(color[1:]))


def _matrix(
    path: str | Path, table: Table, colors: Sequence[Sequence[str]], legend: Mapping[str, str], title: str
) -> Path:
    """The cells of a table on colours, names at the left, heads above, turned where they do not fit; the title stands
    in the corner."""
    rows = [plain(row.name) for row in table.rows]
    # an arrow stays with its word
    heads = [" ".join(filter(None, column.path)) for column in table.columns]
    heads = [re.sub(" (?=[↑↓])", "\N{NO-BREAK SPACE}", plain(head)) for head in heads]
    letter, cell_w, cell_h, line_h = 0.068, 0.78, 0.235, 0.15  # inches, at 8 points
    wrapped = ["\n".join(textwrap.wrap(head, int(cell_w / letter))) for head in heads]
    turned = any(max(map(len, head.split())) * letter > cell_w or head.count("\n") > 3 for head in wrapped)
    longest = max(map(len, heads)) * letter
    corner = textwrap.wrap(title, max(14, *map(len, rows)))
    left = 0.15 + letter * max(14, *map(len, (*rows, *corner)))
    depth = max(line_h * max(head.count("\n") + 1 for head in wrapped), 1.2 * line_h * len(corner))
    top = 0.14 + max(depth, 0.66 * longest + 0.1 if turned else 0)
    bottom = 0.34 if legend else 0.06
    spare = 0.5 * longest if turned else 0.1
    width = max(left + cell_w * len(heads) + spare, 0.3 + sum(0.42 + letter * len(text) for text in legend))
    height = top + cell_h * len(rows) + bottom
    with sheet(path, width, height, layout=None) as figure:
        from matplotlib.patches import Patch, Rectangle

        box = (left / width, bottom / height, cell_w * len(heads) / width, cell_h * len(rows) / height)
        axes = figure.add_axes(box, xlim=(0, len(heads)), ylim=(len(rows), 0))
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        for y, (row, tints) in enumerate(zip(table.rows, colors, strict=True)):
            for x, (cell, color) in enumerate(zip(row.cells, tints, strict=True)):
                axes.add_patch(Rectangle((x, y), 1, 1, facecolor=color, edgecolor="white", linewidth=1.2))
                weight = "bold" if cell.place == 1 else "normal"
                ink = "white" if sum(bytes.fromhex(color[1:])) < 400 else INK
                text = tables.ABSENT if cell.value is None else cell.text
                style: Any = {"size": 7.5, "ha": "center", "va": "center_baseline"}
                axes.text(x + 0.5, y + 0.52, text, color=ink, weight=weight, **style)
        axes.set_yticks([i + 0.5 for i in range(len(rows))], rows)
        axes.xaxis.tick_top()
        axes.set_xticks([i + 0.5 for i in range(len(heads))], heads if turned else wrapped)
        for label in (*axes.get_yticklabels(), *axes.get_xticklabels()):
            label.set(color=INK, weight="bold" if is_ours(label.get_text()) else "normal")
        for label in axes.get_xticklabels() if turned else ():
            label.set(rotation=40, ha="left", va="bottom", rotation_mode="anchor")
        corner_at = (left - 0.06) / width, 1 - (top - 0.06) / height
        figure.text(*corner_at, "\n".join(corner), ha="right", va="bottom", weight="bold", size=8)
        if legend:
            patches = [Patch(facecolor=c, edgecolor="#afb8c1", linewidth=0.5, label=t) for t, c in legend.items()]
            figure.legend(handles=patches, loc="lower left", ncols=len(patches), handlelength=1.2, columnspacing=1.4)
    return Path(path)


def ablation(
    values: Mapping[str, Mapping[float, Mapping[str, Any]]],
    path: str | Path,
    metrics: Sequence[str] = (HEADLINE, "insertion", "deletion"),
    xlabel: str = "refinement steps T",
) -> Path:
    """Metrics over a setting, a panel each, with 95 % intervals. Returns the path.

    Args:
        values: line → setting → row, as {"ViT-B/16": {0: row, 1: row, 3: row}}; a row is that of a summary's
            "methods".
        path: of the PNG.
        metrics: of the panels.
        xlabel: what the setting is. Settings that span a factor of 8 stand on a log scale.

    Raises:
        ValueError: if no row has one of the metrics.
    """
    shown = [m for m in metrics if any(is_number(row.get(m)) for of in values.values() for row in of.values())]
    if not shown:
        raise ValueError(f"no row has a value of {', '.join(metrics)}: choose metrics of the rows")
    settings = sorted({setting for of in values.values() for setting in of})
    colors = [ACCENT, *PALETTE]
    with sheet(path, 2.75 * len(shown) + 0.2, 2.6 + 0.2 * (len(values) > 1)) as figure:
        from matplotlib.ticker import NullLocator

        for axes, metric in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
            for i, (line, of) in enumerate(values.items()):
                color = colors[i % len(colors)]
                found = {x: of[x] for x in sorted(of) if is_number(of[x].get(metric))}
                means = [row[metric] for row in found.values()]
                axes.plot(list(found), means, marker="osD^v"[i % 5], markersize=4, color=color, label=line)
                spread = [(x, *bounds) for x, row in found.items() if (bounds := names.interval(row, metric))]
                if spread:
                    axes.fill_between(*zip(*spread, strict=True), color=color, alpha=0.13, linewidth=0)
            if settings[0] > 0 and settings[-1] / settings[0] >= 8:
                axes.set_xscale("log", base=2)
                axes.xaxis.set_minor_locator(NullLocator())
            axes.set_xticks(settings, [f"{x:g}" for x in settings])
            axes.set_title(heading(metric))
            axes.set_xlabel(xlabel)
        if len(values) > 1:
            figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return Path(path)


def draw(results: Mapping[tuple[str, str], Mapping[str, Any]], folder: str | Path) -> None:
    """Draw the figures that follow from summaries alone into ``folder``, as far as they hold what is needed: of one
    tradeoff, tradeoff_passes and significance, of several models."""
    folder = Path(folder)
    rows = [row for summary in results.values() for row in summary["methods"].values()]
    if len(results) > 1:
        if HEADLINE in names.measured(rows):
            models(results, folder / "models.png")
        return
    (summary,) = results.values()
    for cost, stem in (("seconds_per_image", "tradeoff"), (PASSES, "tradeoff_passes")):
        if len(_points(summary["methods"], HEADLINE, cost)) > 1:
            tradeoff(summary["methods"], folder / f"{stem}.png", cost=cost)
    if any((summary.get("significance") or {}).values()):
        significance_matrix(summary, folder / "significance.png")
