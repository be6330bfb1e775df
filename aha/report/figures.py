"""The figures of an evaluation: maps over their images, curves, intervals, costs, comparisons; and of a training run.

Shapes: N images (N, 3, H, W) RGB in [0, 1], maps (N, 1, H, W) of any finite range, S points of a curve, T
steps of refinement. Rows are those of a summary's "methods", results are (model, target) → summary. Every function
writes a PNG of at most `drawing.BUDGET` bytes, or `drawing.GRID_BUDGET` with maps, to ``path`` and returns that;
ImportError without matplotlib, ValueError where the figure would be empty or shapes do not fit.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..overlays import overlay, to_numpy, to_pixels
from . import columns as names
from . import tables
from .columns import HEADLINE, Rows, direction, heading, is_number, is_ours, plain
from .drawing import ACCENT, FAINT, INK, PALETTE, Band, batch, image_grid, looks, outlined, sheet, weight

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PER_BAND = 10  # methods beside each other in a grid; more go onto further lines
SHOWN = 10  # lines with a colour in a plot of curves
PASSES = "passes"
_GREY = {"color": "#ced5dc", "linewidth": 0.8}
_WHITE, _BLUE, _ALIKE = "#ffffff", "#0072b2", "#f6c7a3"

Curves = Mapping[str, Mapping[str, Mapping[str, Any]]]  # method → reference → metric → (S,), at even steps of [0, 1]


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
        titles: N lines at the left of the rows, for example the explained class.
        scores: method → (N,) Ins − Del of its maps, written below them; the best of an image is bold.
        masks: (N, 1, H, W) bool, the evidence where it is known: outlined in every panel.
    """
    if not maps:
        raise ValueError("there are no maps: give at least one method")
    images = batch("images", images)
    count = len(images)
    layers = {name: batch("maps", value, count) for name, value in maps.items()}
    outlines = [None] * count if masks is None else list(batch("masks", masks, count))
    texts = {name: _per_image(name, of, count) for name, of in (scores or {}).items() if name in layers}
    peaks = [max((of[n] for of in texts.values()), key=float, default="") for n in range(count)]
    per_band = math.ceil(len(layers) / math.ceil(len(layers) / PER_BAND))
    bands = []
    for start in range(0, len(layers), per_band):
        part = list(layers)[start : start + per_band]
        panels, notes = [], []
        for n, image in enumerate(images):
            over = (overlay(image, layers[name][n], scale=1) for name in part)
            panels.append([outlined(pixels, outlines[n]) for pixels in (to_pixels(image), *over)])
            below = [texts[name][n] if name in texts else "" for name in part]
            marked = [(text.replace("-", "−"), text != "" and text == peaks[n]) for text in below]
            notes.append([("Ins − Del", False), *marked] if texts else [])
        bands.append(Band(["input", *part], panels, notes))
    return image_grid(bands, path, titles)


def refinement(images: Any, trail: Any, path: str | Path, scores: Any = None) -> Path:
    """What test-time refinement does to the maps: input, then T = 0 … T, one row per image of (N, 3, H, W).

    ``trail`` is (T+1, N, 1, H, W), of `aha.refine(..., every_step=True)`; ``scores`` (T+1, N) as in `qualitative`.
    """
    steps = {f"T = {t}": maps for t, maps in enumerate(trail)}
    if scores is not None and len(scores) != len(steps):
        raise ValueError(f"{len(scores)} scores for {len(steps)} steps: give one per step and image")
    return qualitative(images, steps, path, scores=None if scores is None else dict(zip(steps, scores, strict=True)))


def _per_image(name: str, values: Any, count: int) -> list[str]:
    array = to_numpy(values)
    if array.shape != (count,):
        raise ValueError(f"scores of {name} have shape {array.shape}: give one per image, ({count},)")
    return [names.number(HEADLINE, float(value), coarser=1) for value in array]


def curves(curves: Curves, path: str | Path, summary: Mapping[str, Any] | None = None) -> Path:
    """Deletion and insertion: the classifier's response over the share of pixels, mean of the references.

    ``curves`` is method → reference → {"deletion": (S,), "insertion": (S,)}, at S even steps of [0, 1]. The areas of
    ``summary`` stand in the legend; without it they come from the curves by the trapezoid.
    """
    means = _means(curves)
    reported = (summary or {}).get("methods", {})
    with sheet(path, 8.8, 3.5 + 0.19 * math.ceil(len(curves) / 2)) as figure:
        verbs = {"deletion": "removed", "insertion": "shown"}
        for axes, (metric, verb) in zip(figure.subplots(1, 2, sharey=True), verbs.items(), strict=True):
            areas = {name: reported.get(name, {}).get(metric) for name in curves}
            areas |= {m: _area(means[metric][m]) for m, area in areas.items() if area is None}
            order = sorted(curves, key=areas.__getitem__, reverse=metric == "insertion")
            # the emphasised lines are drawn last, over the others
            lines = _lines(axes, {name: means[metric][name] for name in sorted(curves, key=is_ours)}, looks(curves))
            texts = [f"{names.number(metric, areas[name], coarser=1)}  {plain(name)}" for name in order]
            below: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.17)}
            below |= {"ncols": 2 if len(order) > 3 else 1, "columnspacing": 1.2, "handlelength": 2}
            legend = axes.legend([lines[name] for name in order], texts, **below)
            legend.set_title("area under the curve, best first", {"size": 8})
            legend.get_title().set_color(FAINT)
            for name, text in zip(order, legend.get_texts(), strict=True):
                text.set_weight(weight(name))
            axes.set(title=heading(metric), xlabel=f"pixels {verb}, most important first")
        figure.axes[0].set_ylabel("probability of the explained class")
    return Path(path)


def curves_by_reference(curves: Curves, path: str | Path) -> Path:
    """Deletion and insertion, a row each, with a column per reference; ``curves`` as of the function `curves`. With
    many methods, only ours and the best others, by the area between their curves, have colours."""
    means = _means(curves)
    gains = {name: np.mean(means["insertion"][name]) - np.mean(means["deletion"][name]) for name in curves}
    ordered = sorted(curves, key=gains.__getitem__, reverse=True)
    others = [name for name in ordered if not is_ours(name) and name != "random"]
    named = [name for name in ordered if name not in others[SHOWN:]]
    style = looks([name for name in curves if name in named])
    shown = sorted(curves, key=lambda name: (name in named, is_ours(name)))
    references = list(dict.fromkeys(reference for of in curves.values() for reference in of))
    lines: dict[str, Any] = {}
    rows = math.ceil((len(named) + (len(named) < len(curves))) / 5)  # of the legend
    with sheet(path, 0.5 + 2.6 * len(references), 4.8 + 0.17 * rows) as figure:
        grid = figure.subplots(2, len(references), sharex=True, sharey="row", squeeze=False)
        for row, metric in zip(grid, means, strict=True):
            for axes, reference in zip(row, references, strict=True):
                found = {name: curves[name].get(reference, {}).get(metric) for name in shown}
                lines |= _lines(axes, {name: of for name, of in found.items() if of is not None}, style)
            row[0].set_ylabel(heading(metric))
        for top, bottom, reference in zip(*grid, references, strict=True):
            top.set_title(reference)
            bottom.set(xlabel="pixels removed or shown", xticks=(0, 0.5, 1))
        handles = {plain(name): lines[name] for name in named}
        if len(named) < len(curves):
            handles[f"{len(curves) - len(named)} others"] = lines[others[-1]]
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, handlelength=2.2)
    return Path(path)


def _means(curves: Curves) -> dict[str, dict[str, np.ndarray]]:
    """Metric → method → mean over the references that the metric has."""
    if not curves:
        raise ValueError("there are no curves: give at least one method")
    return {
        metric: {m: np.mean([to_numpy(c[metric]) for c in of.values() if metric in c], 0) for m, of in curves.items()}
        for metric in ("deletion", "insertion")
    }


def _area(curve: np.ndarray) -> float:
    return float(np.trapezoid(curve, dx=1 / (len(curve) - 1)))


def _lines(axes: Axes, curves: Mapping[str, Any], style: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Responses over the share of pixels, in the given order; name → its line."""
    lines = {}
    for name, values in curves.items():
        curve = to_numpy(values)
        (lines[name],) = axes.plot(np.linspace(0, 1, len(curve)), curve, **style.get(name, _GREY))
    axes.set(xlim=(0, 1), ylim=(0, None))
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    return lines


def bars(summary: Mapping[str, Any], metric: str, path: str | Path) -> Path:
    """One metric of all methods with its 95 % confidence interval, the best on top."""
    rows = {name: row for name, row in summary.get("methods", {}).items() if is_number(row.get(metric))}
    if not rows:
        raise ValueError(f"no method has a value of {metric!r}: choose a metric of the summary")
    best_on_top = names.best_first([rows], metric)[::-1]
    with sheet(path, 6.0, 0.75 + 0.27 * len(rows)) as figure:
        axes = figure.subplots()
        for y, name in enumerate(best_on_top):
            value, color = rows[name][metric], ACCENT if is_ours(name) else PALETTE[0]
            if interval := names.interval(rows[name], metric):
                axes.plot(interval, (y, y), color=color, linewidth=2, alpha=0.45)
            axes.plot(value, y, "o", color=color, markersize=5.5)
            text, at = names.number(metric, value, coarser=1), axes.get_yaxis_transform()
            axes.text(1.015, y, text, transform=at, va="center", size=8, color=INK)
        axes.set_yticks(range(len(rows)), list(map(plain, best_on_top)))
        _as_names(axes.get_yticklabels())
        axes.set(ylim=(-0.6, len(rows) - 0.4), xlabel=f"{heading(metric)}   (line: 95 % interval)")
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.margins(x=0.06)
    return Path(path)


def _as_names(labels: Sequence[Any]) -> None:
    for label in labels:
        label.set(color=INK, weight=weight(label.get_text()))


def training(log_path: str | Path, path: str | Path) -> Path:
    """Curves of a training run from its ``log.jsonl``."""
    log = _read_log(Path(log_path))
    panels = {
        "Loss": {"loss": ""},
        "Soft deletion and insertion": {"insertion": "insertion ↑", "deletion": "deletion ↓"},
        "Learning rate × 10⁴": {"lr": ""},
        "Spread of the maps (std)": {"scores_std": ""},
        "Row entropy (0 = sorted)": {"row_entropy": ""},
        "Temperature τ": {"tau": ""},
    }
    with sheet(path, 9.0, 4.4) as figure:
        for axes, (title, series) in zip(figure.subplots(2, 3, sharex=True).flat, panels.items(), strict=True):
            axes.set_title(title)
            for (key, label), color in zip(series.items(), PALETTE[::4], strict=False):
                points = [(r["step"], r[key] * (1e4 if key == "lr" else 1)) for r in log if is_number(r.get(key))]
                if not points:
                    continue
                step, value = np.array(points, dtype=np.float64).T
                # every batch draws its own reference and grid, so values scatter: faint, under their running mean
                window = np.ones(max(1, min(len(value) // 8, 25)))
                if len(window) > 1 and key not in ("lr", "tau"):  # schedules do not scatter
                    axes.plot(step, value, color=color, alpha=0.25, linewidth=0.8)
                    value = np.convolve(value, window, "same") / np.convolve(np.ones(len(value)), window, "same")
                axes.plot(step, value, color=color, label=label)
            if len(series) > 1 and axes.lines:
                axes.legend()
        for axes in figure.axes[3:]:
            axes.set_xlabel("step")
        speeds = [r["images_per_second"] for r in log if is_number(r.get("images_per_second"))]
        if speeds:
            figure.supxlabel(f"{np.median(speeds):.3g} images/s (median)", x=0.99, ha="right", size=8, color=FAINT)
    return Path(path)


def _read_log(path: Path) -> list[dict[str, Any]]:
    records: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        # a run that was killed leaves half a line
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            if isinstance(record, dict) and is_number(record.get("step")):
                records[record["step"]] = record  # a resumed run logs some steps again
    if not records:
        raise ValueError(f"{path} holds no training record: give the log.jsonl of a run")
    return [records[step] for step in sorted(records)]


def tradeoff(rows: Rows, path: str | Path, metric: str = HEADLINE, cost: str = "seconds_per_image") -> Path:
    """One point per method: the metric over the cost on a log scale.

    The line is the Pareto front: every method off it has one on it that is neither worse nor dearer. Vertical bars
    are 95 % intervals. Beside others, "random" is a remark, not a point.

    ``metric`` is one that `aha.metrics.catalog` knows, ``cost`` one of its costs, or "passes" (forward plus backward).
    """
    if cost not in (*names.costs(), PASSES):
        raise ValueError(f"cost={cost!r} is not known: choose one of {', '.join((*names.costs(), PASSES))}")
    better = direction(metric)
    if better is None:
        raise ValueError(f"metric {metric!r} has no better direction: choose one of aha.metrics.catalog")
    points = _points(rows, metric, cost)
    if not points:
        raise ValueError(f"no method has both {metric} and {cost}: choose what the rows hold")
    remarks = ["line: Pareto front"]
    if "random" in points and len(points) > 3:
        # chance lies so far below that its point would take most of the plot
        remarks.append(f"not shown: random, {names.number(metric, points.pop('random')[1], coarser=1)}")
    bars = {name: bounds for name in points if (bounds := names.interval(rows[name], metric))}
    if bars:
        remarks.insert(1, "bars: 95 % intervals")
    front = _front(points, better)
    with sheet(path, 7.4, 4.6, layout=None) as figure:
        from matplotlib.ticker import NullLocator

        # a fixed box: the names are placed in pixels before anything is drawn
        axes = figure.add_axes((0.09, 0.115, 0.895, 0.835))
        steps = np.repeat([x for x, _ in front], 2)[1:], np.repeat([y for _, y in front], 2)[:-1]
        axes.plot(*steps, color=ACCENT, alpha=0.35, linewidth=1.2, zorder=1)
        for name, (x, y) in points.items():
            color = ACCENT if is_ours(name) else FAINT if name == "random" else PALETTE[0]
            if name in bars:
                axes.plot((x, x), bars[name], color=color, linewidth=1.6, alpha=0.35, zorder=2)
            filled = color if (x, y) in front else "white"
            axes.plot(x, y, "o", color=color, markerfacecolor=filled, markersize=5.5, markeredgewidth=1.3, zorder=3)
        if any(x == 0 for x, _ in points.values()):  # which a log scale has no place for
            least = min((x for x, _ in points.values() if x > 0), default=1.0)
            axes.set_xscale("symlog", linthresh=least, linscale=0.6)
        else:
            axes.set_xscale("log")
        axes.margins(0.09, 0.08)
        axes.xaxis.set_major_formatter(lambda x, _: names.significant(x))
        axes.xaxis.set_minor_locator(NullLocator())
        unit = "forward and backward passes per image ↓" if cost == PASSES else heading(cost)
        axes.set(xlabel=unit, ylabel=heading(metric))
        style: Any = {"ha": "right", "va": "bottom", "size": 7.5, "color": FAINT}
        axes.text(1, 1.012, "    ".join(remarks), transform=axes.transAxes, **style)
        _name_points(axes, points)
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


def _name_points(axes: Axes, points: Mapping[str, tuple[float, float]]) -> None:
    """A name beside every point, covering no other name, point or line of the axes where there is room. Limits and
    size of the axes must be the final ones."""
    try:
        import textalloc
    except ImportError as error:
        raise ImportError("names beside points need textalloc: pip install aha-attribution[report]") from error
    axes.autoscale_view()
    pixels = {name: axes.transData.transform(point) for name, point in points.items()}
    crowd = {n: sum(math.dist(pixels[n], other) < 120 for other in pixels.values()) for n in points}
    order = sorted(points, key=lambda name: (is_ours(name), crowd[name]), reverse=True)  # those choose first
    x, y = np.array([points[name] for name in order]).T
    lines = [line for line in (np.asarray(line.get_xydata()) for line in axes.lines) if len(line) > 1]
    style: dict[str, Any] = {"textsize": 7.5, "textcolor": INK, "linecolor": FAINT, "linewidth": 0.6}
    style |= {"fontweight": list(map(weight, order)), "margin": 0.006, "max_distance": 0.3, "nbr_candidates": 600}
    style |= {f"{axis}_lines": [line[:, i] for line in lines] or None for i, axis in enumerate("xy")}
    textalloc.allocate(axes, x, y, list(map(plain, order)), x_scatter=x, y_scatter=y, **style)


def significance_matrix(summary: Mapping[str, Any], path: str | Path) -> Path:
    """`tables.differences` in colours: rows are methods, columns metrics; whether a difference may be chance."""
    table = tables.differences(summary)
    columns = zip(*(row.cells for row in table.rows), strict=True)
    widest = [max((abs(cell.value or 0) for cell in column), default=0) or 1 for column in columns]

    def color(cell: tables.Cell, column: int) -> str:
        if cell.value is None or cell.place:
            return ACCENT if cell.place else _WHITE
        return _ALIKE if cell.mark else _mixed(_BLUE, 0.06 + 0.5 * abs(cell.value) / widest[column])

    colors = [[color(cell, column) for column, cell in enumerate(row.cells)] for row in table.rows]
    chance, worse = f"may be chance (corrected p ≥ {names.LEVEL})", "worse (deeper: further)"
    legend = {"best": ACCENT, chance: _ALIKE, worse: _mixed(_BLUE, 0.4)}
    return _matrix(path, table, colors, legend, "difference to the best")


def models(results: Mapping[tuple[str, str], Mapping[str, Any]], path: str | Path, metric: str = HEADLINE) -> Path:
    """One metric of every method on every classifier and explained class: the deeper, the better in its column."""
    several = len({target for _, target in results}) > 1
    heads = (f"{model} {target}" if several else model for model, target in results)
    table = tables.overview(dict(zip(heads, results.values(), strict=True)), metric)
    values = np.array([[np.nan if c.value is None else c.value for c in row.cells] for row in table.rows])
    low, high = np.nanmin(values, 0), np.nanmax(values, 0)
    share = np.where(high > low, (values - low) / np.where(high > low, high - low, 1), 1)
    if direction(metric) is False:
        share = 1 - share
    colors = [[_WHITE if np.isnan(s) else _mixed(_BLUE, 0.02 + 0.5 * s) for s in line] for line in share]
    return _matrix(path, table, colors, {}, heading(metric))


def _mixed(color: str, share: float) -> str:
    """The colour on white, ``share`` of it in [0, 1]."""
    return "#" + "".join(f"{round(255 + share * (part - 255)):02x}" for part in bytes.fromhex(color[1:]))


def _matrix(
    path: str | Path, table: tables.Table, colors: Sequence[Sequence[str]], legend: Mapping[str, str], title: str
) -> Path:
    """The cells of a table on colours, names at the left, heads above, turned where they do not fit on four lines."""
    rows = [plain(row.name) for row in table.rows]
    # an arrow stays with its word
    heads = [re.sub(" (?=[↑↓])", "\N{NO-BREAK SPACE}", plain(" ".join(c.path).strip())) for c in table.columns]
    wrapped = [textwrap.wrap(head, 11, break_long_words=False) for head in heads]
    turned = any(len(lines) > 4 or max(map(len, lines)) > 11 for lines in wrapped)
    longest = max(map(len, heads)) if turned else 0
    depth = 0.045 * longest + 0.15 * (1 if turned else max(map(len, wrapped)))
    width = 0.4 + 0.068 * max(map(len, rows)) + 0.78 * len(heads) + 0.035 * longest
    width = max(width, 0.3 + sum(0.42 + 0.068 * len(text) for text in legend))
    with sheet(path, width, 0.35 + depth + 0.235 * len(rows) + 0.3 * bool(legend)) as figure:
        from matplotlib.patches import Patch

        axes = figure.subplots()
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        tints = np.array([[[*bytes.fromhex(color[1:])] for color in line] for line in colors])
        axes.pcolormesh(tints / 255, edgecolors="white", linewidth=1.2)
        axes.invert_yaxis()
        for y, row in enumerate(table.rows):
            for x, cell in enumerate(row.cells):
                style: Any = {"size": 7.5, "ha": "center", "va": "center_baseline"}
                style["color"] = "white" if tints[y, x].sum() < 400 else INK
                text = tables.ABSENT if cell.value is None else cell.text
                axes.text(x + 0.5, y + 0.52, text, weight="bold" if cell.place == 1 else "normal", **style)
        axes.xaxis.tick_top()
        axes.set_xticks(np.arange(len(heads)) + 0.5, heads if turned else map("\n".join, wrapped))
        axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
        _as_names([*axes.get_yticklabels(), *axes.get_xticklabels()])
        for label in axes.get_xticklabels() if turned else ():
            label.set(rotation=40, ha="left", va="bottom", rotation_mode="anchor")
        figure.suptitle(title, x=0.01, ha="left", weight="bold", size=9)
        if legend:
            patches = [Patch(facecolor=c, edgecolor="#afb8c1", linewidth=0.5, label=t) for t, c in legend.items()]
            where: Any = {"loc": "outside lower left", "ncols": len(patches)}
            figure.legend(handles=patches, handlelength=1.2, columnspacing=1.4, **where)
    return Path(path)


def ablation(
    values: Mapping[str, Mapping[float, Mapping[str, Any]]],
    path: str | Path,
    metrics: Sequence[str] = (HEADLINE, "insertion", "deletion"),
    xlabel: str = "refinement steps T",
) -> Path:
    """Metrics over a setting, a panel each, with 95 % intervals.

    ``values`` is line → setting → row, as {"ViT-B/16": {0: row, 1: row, 3: row}}; ``xlabel`` says what the setting is.
    Settings that span a factor of 8 stand on a log scale.
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
            axes.set(title=heading(metric), xlabel=xlabel)
        if len(values) > 1:
            figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return Path(path)


def draw(results: Mapping[tuple[str, str], Mapping[str, Any]], folder: str | Path) -> None:
    """Draw the figures that follow from summaries alone into ``folder``, as far as they hold what is needed: of one
    tradeoff, tradeoff_passes and significance, of several models."""
    folder = Path(folder)
    if len(results) > 1:
        if HEADLINE in names.measured(row for summary in results.values() for row in summary["methods"].values()):
            models(results, folder / "models.png")
        return
    (summary,) = results.values()
    for cost, stem in (("seconds_per_image", "tradeoff"), (PASSES, "tradeoff_passes")):
        if len(_points(summary["methods"], HEADLINE, cost)) > 1:
            tradeoff(summary["methods"], folder / f"{stem}.png", cost=cost)
    if any((summary.get("significance") or {}).values()):
        significance_matrix(summary, folder / "significance.png")
