"""The figures of a comparison: many methods, several references, models and targets.

Inputs are the plain data of a summary: rows are method → {metric: mean, "ci95": {metric: [low, high]}, costs},
results are (model, target) → summary. Every figure is a PNG; without matplotlib, ImportError.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import columns as names
from . import labels
from .columns import heading, is_number, is_ours
from .drawing import ACCENT, DPI, FAINT, INK, PALETTE, Band, batch, drawing, image_grid, looks, outlined, write
from .overlays import overlay, to_numpy, to_pixels

PASSES = "passes"
PER_BAND = 10  # methods beside each other in a grid; more go onto further lines
GRID_BUDGET = 2_500_000  # bytes of a grid of photographs: its panels are the figure
SHOWN = 10  # lines with a colour in a plot of curves

_COSTS = {
    "seconds_per_image": "seconds per image",
    PASSES: "forward and backward passes per image",
    "peak_bytes_per_image": "peak memory per image in MiB",
}
_GREY, _WHITE = "#ced5dc", "#ffffff"
_WORSE, _ALIKE = "#0072b2", "#f6c7a3"

Rows = Mapping[str, Mapping[str, Any]]


def tradeoff(rows: Rows, path: str | Path, metric: str = "ins_minus_del", cost: str = "seconds_per_image") -> Path:
    """One point per method: the metric over the cost on a log scale. Returns the path.

    The line is the Pareto front: every method off it has one on it that is neither worse nor dearer. Vertical bars
    are 95 % intervals. A cost of zero stands at the left edge. Beside others, "random" is a remark, not a point.

    Args:
        rows: method → its metrics and costs.
        path: of the PNG.
        metric: higher or lower better, as `aha.metrics.arrow` knows it.
        cost: "seconds_per_image", "passes" (forward plus backward) or "peak_bytes_per_image".

    Raises:
        ValueError: for another cost, a metric without a direction, or if no method has both.
    """
    if cost not in _COSTS:
        raise ValueError(f"cost={cost!r} is not known: choose one of {', '.join(_COSTS)}")
    better = names.direction(metric)
    if better is None:
        raise ValueError(f"metric {metric!r} has no better direction: choose one that aha.metrics.arrow knows")
    points = _points(rows, metric, cost)
    if not points:
        raise ValueError(f"no method has both {metric} and {cost}: choose what the rows hold")
    remarks = ["line: Pareto front"]
    if "random" in points and len(points) > 3:
        # chance lies so far below that its point would take most of the plot
        remarks.append(f"not shown: random, {names.number(metric, points.pop('random')[1], digits=3)}")
    bars = {name: names.interval(rows[name], metric) for name in points}
    if any(bars.values()):
        remarks.insert(1, "bars: 95 % intervals")
    zero = min((x for x, _ in points.values() if x > 0), default=1.0) / 4
    at = {name: (x if x > 0 else zero, y) for name, (x, y) in points.items()}
    with drawing():
        from matplotlib.figure import Figure
        from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

        figure = Figure(figsize=(7.4, 4.6), dpi=DPI)
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
        exponents = np.log10([x for x, _ in at.values()])
        low, high = exponents.min(), exponents.max()
        room = max(0.15, 0.09 * (high - low))
        axes.set_xlim(10 ** (low - room), 10 ** (high + room))
        axes.margins(y=0.08)
        axes.set(xlabel=f"{_COSTS[cost]} ↓", ylabel=heading(metric))
        within = np.array(LogLocator().tick_values(*axes.get_xlim()))
        ticks = {float(x): names.number("seconds_per_image", float(x)) for x in within if x >= 10 ** (low - room)}
        if any(x == 0 for x, _ in points.values()):
            ticks = {zero: "0", **{x: text for x, text in ticks.items() if x > 2 * zero}}
        ticks = {x: text for x, text in ticks.items() if x <= 10 ** (high + room)}
        axes.xaxis.set_major_locator(FixedLocator(list(ticks)))
        axes.set_xticklabels(ticks.values())
        axes.xaxis.set_minor_locator(NullLocator())
        axes.text(
            1, 1.012, "    ".join(remarks), transform=axes.transAxes, ha="right", va="bottom", size=7.5, color=FAINT
        )
        labels.place(figure, axes, at, bars, front)
        return write(figure, path)


def _points(rows: Rows, metric: str, cost: str) -> dict[str, tuple[float, float]]:
    found = {}
    for name, row in rows.items():
        x = names.passes(row) if cost == PASSES else row.get(cost)
        y = row.get(metric)
        if is_number(x) and is_number(y) and x >= 0:
            found[name] = (x / 2**20 if cost == "peak_bytes_per_image" else float(x), float(y))
    return found


def _front(points: Mapping[str, tuple[float, float]], better: bool) -> list[tuple[float, float]]:
    """The points that none beats in one respect without being worse in the other, the cheapest first."""
    sign = 1 if better else -1
    front: list[tuple[float, float]] = []
    for x, y in sorted(set(points.values()), key=lambda point: (point[0], -sign * point[1])):
        if not front or sign * y > sign * front[-1][1]:
            front.append((x, y))
    return front


def significance_matrix(summary: Mapping[str, Any], path: str | Path, metrics: Sequence[str] | None = None) -> Path:
    """Rows are methods, columns metrics: the difference to the best of the column, and whether it may be chance.

    Args:
        summary: "methods", and "significance": metric → method → {"best", "difference", "p"} with p corrected for
            the number of methods.
        path: of the PNG.
        metrics: the columns; None is all that were tested.

    Raises:
        ValueError: if none was tested.
    """
    tested = summary.get("significance") or {}
    chosen = [m for m in (names.measured(summary["methods"].values()) if metrics is None else metrics) if tested.get(m)]
    if not chosen:
        raise ValueError("the summary has no significance of these metrics: give one of a comparison")
    methods = _best_first(summary["methods"], chosen[0])
    texts = [[""] * len(chosen) for _ in methods]
    colors = [[_WHITE] * len(chosen) for _ in methods]
    for column, metric in enumerate(chosen):
        bests = {found.get("best") for found in tested[metric].values()}
        differences = {m: d for m, found in tested[metric].items() if is_number(d := found.get("difference"))}
        widest = max(map(abs, differences.values()), default=0) or 1
        for row, method in enumerate(methods):
            if method in bests:
                texts[row][column], colors[row][column] = "best", ACCENT
            elif method not in differences:
                texts[row][column] = "–"
            else:
                texts[row][column] = _signed(metric, differences[method])
                depth = 0.06 + 0.5 * abs(differences[method]) / widest
                alike = names.inseparable(tested[metric][method])
                colors[row][column] = _ALIKE if alike else _mixed(_WORSE, depth)
    legend = {
        "best": ACCENT,
        f"may be chance (corrected p ≥ {names.LEVEL})": _ALIKE,
        "worse (deeper: further)": _mixed(_WORSE, 0.4),
    }
    bold = [(i, j) for i, line in enumerate(texts) for j, text in enumerate(line) if text == "best"]
    heads = [heading(metric) for metric in chosen]
    return _matrix(path, methods, heads, texts, colors, legend, "difference to the best", bold)


def pairwise_matrix(
    pairs: Mapping[tuple[str, str], Mapping[str, Any]], path: str | Path, metric: str = "ins_minus_del"
) -> Path:
    """Every method against every other: row minus column, white where the difference may be chance.

    Args:
        pairs: (a, b) → {"difference": a − b, "p"}, one order of each pair is enough.
        path: of the PNG.
        metric: what was compared; tells which sign is better.

    Raises:
        ValueError: if there are no pairs, or the metric has no better direction.
    """
    better = names.direction(metric)
    if not pairs or better is None:
        raise ValueError("give at least one pair of methods and a metric that aha.metrics.arrow knows")
    both = {(b, a): {**found, "difference": -found["difference"]} for (a, b), found in pairs.items()} | dict(pairs)
    methods = list(dict.fromkeys(name for pair in pairs for name in pair))
    wins = {
        a: sum(o["difference"] for (first, _), o in both.items() if first == a) * (1 if better else -1) for a in methods
    }
    methods.sort(key=lambda name: -wins[name])
    widest = max(abs(found["difference"]) for found in both.values()) or 1
    texts, colors = [], []
    for a in methods:
        line, tints = [], []
        for b in methods:
            found = both.get((a, b))
            text, color = "", "#f0f2f4" if a == b else _WHITE
            if found is not None:
                text = _signed(metric, found["difference"], digits=3)
                if not names.inseparable(found):
                    hue = "#009e73" if (found["difference"] > 0) is better else "#cc79a7"
                    color = _mixed(hue, 0.12 + 0.6 * abs(found["difference"]) / widest)
            line.append(text)
            tints.append(color)
        texts.append(line)
        colors.append(tints)
    legend = {"row is better": _mixed("#009e73", 0.5), "row is worse": _mixed("#cc79a7", 0.5), "may be chance": _WHITE}
    return _matrix(path, methods, methods, texts, colors, legend, f"{heading(metric)}\nrow − column")


def models(
    results: Mapping[tuple[str, str], Mapping[str, Any]], path: str | Path, metric: str = "ins_minus_del"
) -> Path:
    """One metric of every method on every classifier and explained class: the deeper, the better in its column.

    Args:
        results: (model, target) → summary.
        path: of the PNG.
        metric: the value in the cells.

    Raises:
        ValueError: if no result holds the metric.
    """
    rows = {key: summary.get("methods") or {} for key, summary in results.items()}
    better = names.direction(metric)
    means: dict[str, list[float]] = {}
    for of in rows.values():
        for method, row in of.items():
            if is_number(row.get(metric)):
                means.setdefault(method, []).append(row[metric])
    if not means:
        raise ValueError(f"no result has a value of {metric!r}: choose a metric of the summaries")
    # methods that ran everywhere come first: a mean of fewer results does not compare
    sign = -1 if better is not False else 1
    methods = sorted(means, key=lambda name: (-len(means[name]), sign * float(np.mean(means[name]))))
    several = len({target for _, target in results}) > 1
    heads = [f"{model} {target}" if several else model for model, target in results]
    texts = [["–"] * len(rows) for _ in methods]
    colors = [[_WHITE] * len(rows) for _ in methods]
    bold = []
    for column, of in enumerate(rows.values()):
        values = {m: of[m][metric] for m in methods if m in of and is_number(of[m].get(metric))}
        places = names.places(values, metric)
        low, high = (min(values.values()), max(values.values())) if values else (0, 0)
        for row, method in enumerate(methods):
            if method in values:
                share = (values[method] - low) / (high - low) if high > low else 1.0
                texts[row][column] = names.number(metric, values[method], digits=3)
                colors[row][column] = _mixed(_WORSE, 0.02 + 0.5 * (share if better is not False else 1 - share))
                if places.get(method) == 1:
                    bold.append((row, column))
    return _matrix(path, methods, heads, texts, colors, {}, heading(metric), bold)


def _best_first(rows: Rows, metric: str) -> list[str]:
    better = names.direction(metric)
    worst = -math.inf if better is not False else math.inf

    def value(name: str) -> float:
        found = rows[name].get(metric)
        return found if is_number(found) else worst

    return sorted(rows, key=value, reverse=better is not False)


def _signed(metric: str, value: float, digits: int = 4) -> str:
    return f"{'+' if value > 0 else '−' if value < 0 else ''}{names.number(metric, abs(value), digits)}"


def _mixed(color: str, share: float) -> str:
    """The colour on white, ``share`` of it in [0, 1]."""
    parts = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(255 + share * (part - 255)):02x}" for part in parts)


def _matrix(
    path: str | Path,
    rows: Sequence[str],
    heads: Sequence[str],
    texts: Sequence[Sequence[str]],
    colors: Sequence[Sequence[str]],
    legend: Mapping[str, str],
    title: str = "",
    bold: Collection[tuple[int, int]] = (),
) -> Path:
    """Coloured cells with a text each, names at the left, heads above, turned where they do not fit; the title stands
    in the corner."""
    with drawing():
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch, Rectangle

        letter, cell_w, cell_h, line_h = 0.068, 0.78, 0.235, 0.15  # inches, at 8 points
        # an arrow stays with its word
        heads = [re.sub(" (?=[↑↓])", "\N{NO-BREAK SPACE}", head.replace("_", " ")) for head in heads]
        wrapped = ["\n".join(textwrap.wrap(head, int(cell_w / letter))) for head in heads]
        turned = any(max(map(len, head.split())) * letter > cell_w or head.count("\n") > 3 for head in wrapped)
        longest = max(map(len, heads)) * letter
        corner = [part for line in title.split("\n") for part in textwrap.wrap(line, max(14, *map(len, rows)))]
        left = 0.15 + letter * max(14 if title else 0, *map(len, rows), *map(len, corner))
        depth = max(line_h * max(head.count("\n") + 1 for head in wrapped), 1.2 * line_h * len(corner))
        top = 0.14 + max(depth, 0.66 * longest + 0.1 if turned else 0)
        bottom = 0.34 if legend else 0.06
        spare = 0.5 * longest if turned else 0.1
        width = max(left + cell_w * len(heads) + spare, 0.3 + sum(0.42 + letter * len(text) for text in legend))
        height = top + cell_h * len(rows) + bottom
        figure = Figure(figsize=(width, height), dpi=DPI)
        axes = figure.add_axes(
            (left / width, bottom / height, cell_w * len(heads) / width, cell_h * len(rows) / height),
            xlim=(0, len(heads)),
            ylim=(len(rows), 0),
        )
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        for row, (line, tints) in enumerate(zip(texts, colors, strict=True)):
            for column, (text, color) in enumerate(zip(line, tints, strict=True)):
                axes.add_patch(Rectangle((column, row), 1, 1, facecolor=color, edgecolor="white", linewidth=1.2))
                axes.text(
                    column + 0.5,
                    row + 0.52,
                    text,
                    color="white" if _is_dark(color) else INK,
                    weight="bold" if (row, column) in bold else "normal",
                    size=7.5,
                    ha="center",
                    va="center_baseline",
                )
        axes.set_yticks([i + 0.5 for i in range(len(rows))], [name.replace("_", " ") for name in rows])
        axes.xaxis.tick_top()
        axes.set_xticks([i + 0.5 for i in range(len(heads))], heads if turned else wrapped)
        for label in (*axes.get_yticklabels(), *axes.get_xticklabels()):
            label.set(color=INK, weight="bold" if is_ours(label.get_text()) else "normal")
        if turned:
            for label in axes.get_xticklabels():
                label.set(rotation=40, ha="left", va="bottom", rotation_mode="anchor")
        corner_at = (left - 0.06) / width, 1 - (top - 0.06) / height
        figure.text(*corner_at, "\n".join(corner), ha="right", va="bottom", weight="bold", size=8)
        if legend:
            patches = [Patch(facecolor=c, edgecolor="#afb8c1", linewidth=0.5, label=t) for t, c in legend.items()]
            figure.legend(handles=patches, loc="lower left", ncols=len(patches), handlelength=1.2, columnspacing=1.4)
        return write(figure, path)


def _is_dark(color: str) -> bool:
    return sum(int(color[i : i + 2], 16) for i in (1, 3, 5)) < 400


def qualitative(
    images: Any,
    maps: Mapping[str, Any],
    path: str | Path,
    titles: Sequence[str] | None = None,
    scores: Mapping[str, Any] | None = None,
    masks: Any = None,
) -> Path:
    """Rows are images, columns methods; more than ten methods go onto further lines, each with the input in front.

    Args:
        images: (N, 3, H, W) in [0, 1].
        maps: method → (N, 1, H, W).
        path: of the PNG.
        titles: N lines at the left of the rows, for example the explained class.
        scores: method → (N,) Ins − Del of its maps, written below them; the best of an image is bold.
        masks: (N, 1, H, W) bool, the evidence where it is known: outlined in every panel.

    Raises:
        ValueError: for other shapes, or if there are no maps.
    """
    if not maps:
        raise ValueError("there are no maps: give at least one method")
    images = batch("images", images)
    count = len(images)
    layers = {name: batch("maps", value, count) for name, value in maps.items()}
    outlines = [None] * count if masks is None else list(batch("masks", masks, count))
    values = {name: _per_image(name, (scores or {})[name], count) for name in layers if name in (scores or {})}
    peaks = [max((_short(of[n]) for of in values.values()), key=float, default="") for n in range(count)]
    per_band = math.ceil(len(layers) / math.ceil(len(layers) / PER_BAND))
    bands = []
    for start in range(0, len(layers), per_band):
        part = list(layers)[start : start + per_band]
        panels, notes, best = [], [], []
        for n, image in enumerate(images):
            over = (overlay(image, layers[name][n], scale=1) for name in part)
            panels.append([outlined(pixels, outlines[n]) for pixels in (to_pixels(image), *over)])
            written = [_short(values[name][n]) if name in values else "" for name in part]
            notes.append(["Ins − Del", *(text.replace("-", "−") for text in written)] if values else [])
            best.append([i for i, text in enumerate(written, 1) if text and text == peaks[n]])
        bands.append(Band(["input", *part], panels, notes, best))
    with drawing():
        return write(image_grid(bands, titles), path, GRID_BUDGET)


def _short(value: float) -> str:
    return names.number("ins_minus_del", float(value), digits=2)


def _per_image(name: str, values: Any, count: int) -> np.ndarray:
    array = to_numpy(values)
    if array.shape != (count,):
        raise ValueError(f"scores of {name} have shape {array.shape}: give one per image, ({count},)")
    return array


def ablation(
    values: Mapping[str, Mapping[float, Mapping[str, Any]]],
    path: str | Path,
    metrics: Sequence[str] = ("ins_minus_del", "insertion", "deletion"),
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
    with drawing():
        from matplotlib.figure import Figure
        from matplotlib.ticker import NullLocator

        figure = Figure(figsize=(2.75 * len(shown) + 0.2, 2.6 + 0.2 * (len(values) > 1)), dpi=DPI, layout="constrained")
        colors = [ACCENT, *PALETTE]
        for axes, metric in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
            for i, (line, of) in enumerate(values.items()):
                found = [
                    (x, of[x][metric], names.interval(of[x], metric))
                    for x in sorted(of)
                    if is_number(of[x].get(metric))
                ]
                color, marker = colors[i % len(colors)], "osD^v"[i % 5]
                axes.plot(
                    [x for x, *_ in found],
                    [y for _, y, _ in found],
                    marker=marker,
                    markersize=4,
                    color=color,
                    label=line,
                )
                spread = [(x, *bounds) for x, _, bounds in found if bounds]
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
        return write(figure, path)


def curves_by_reference(
    curves: Mapping[str, Mapping[str, Mapping[str, Any]]],
    path: str | Path,
    metrics: Sequence[str] = ("deletion", "insertion"),
) -> Path:
    """Response over the share of pixels, a row per metric and a column per reference. Returns the path.

    With many methods, ours and the best of the others have colours, by the area between the last metric's curve and
    the first's; the rest are grey.

    Args:
        curves: method → reference → metric → (S,), at S even steps of [0, 1].
        path: of the PNG.
        metrics: of the rows: "deletion", "insertion", "positive" or "negative".

    Raises:
        ValueError: if there are no curves.
    """
    if not curves:
        raise ValueError("there are no curves: give at least one method")
    references = list(dict.fromkeys(reference for of in curves.values() for reference in of))

    def gain(method: str) -> float:
        ends = [[np.mean(to_numpy(of[m])) for m in metrics] for of in curves[method].values()]
        return float(np.mean([end[-1] - end[0] for end in ends]))

    ordered = sorted(curves, key=gain, reverse=True)
    others = [name for name in ordered if not is_ours(name) and name != "random"]
    named = {name for name in ordered if name not in others[SHOWN:]}
    style = looks({name: None for name in curves if name in named})
    grey = {"color": _GREY, "linewidth": 0.8}
    with drawing():
        from matplotlib.figure import Figure

        rows = math.ceil((len(named) + (len(named) < len(curves))) / 5)
        size = 0.5 + 2.6 * len(references), 0.6 + 2.1 * len(metrics) + 0.17 * rows
        figure = Figure(figsize=size, dpi=DPI, layout="constrained")
        grid = figure.subplots(len(metrics), len(references), sharex=True, sharey="row", squeeze=False)
        for line, metric in zip(grid, metrics, strict=True):
            for axes, reference in zip(line, references, strict=True):
                for name in sorted(curves, key=lambda name: (name in named, is_ours(name))):
                    if metric in curves[name].get(reference, {}):
                        curve = to_numpy(curves[name][reference][metric])
                        axes.plot(np.linspace(0, 1, len(curve)), curve, label=name, **style.get(name, grey))
                axes.set(xlim=(0, 1), ylim=(0, None))
                axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
            line[0].set_ylabel(heading(metric))
        for top, bottom, reference in zip(grid[0], grid[-1], references, strict=True):
            top.set_title(reference)
            bottom.set_xlabel("pixels removed or shown")
            bottom.set_xticks((0, 0.5, 1))
        drawn = {
            text: handle for axes in figure.axes for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        handles = {name.replace("_", " "): drawn[name] for name in ordered if name in named}
        if len(named) < len(curves):
            handles[f"{len(curves) - len(named)} others"] = drawn[others[-1]]
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, handlelength=2.2)
        return write(figure, path)


def draw(summary: Mapping[str, Any], folder: str | Path) -> list[Path]:
    """Draw the figures that follow from a summary alone into ``folder``: tradeoff, tradeoff_passes, significance.
    What the summary does not hold is left out. Returns the paths."""
    folder = Path(folder)
    rows = summary.get("methods") or {}
    made = []
    for cost, stem in (("seconds_per_image", "tradeoff"), (PASSES, "tradeoff_passes")):
        if len(_points(rows, "ins_minus_del", cost)) > 1:
            made.append(tradeoff(rows, folder / f"{stem}.png", cost=cost))
    if any((summary.get("significance") or {}).values()):
        made.append(significance_matrix(summary, folder / "significance.png"))
    return made


def draw_results(results: Mapping[tuple[str, str], Mapping[str, Any]], folder: str | Path) -> list[Path]:
    """Draw what follows from several summaries together into ``folder``: models. Returns the paths."""
    if any(is_number(row.get("ins_minus_del")) for s in results.values() for row in s["methods"].values()):
        return [models(results, Path(folder) / "models.png")]
    return []
