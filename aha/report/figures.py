"""The figures of an evaluation: maps over their images, curves, intervals, and those of a training run.

Shapes: N images (N, 3, H, W) RGB in [0, 1], maps (N, 1, H, W) of any finite range, S points of a curve, T
steps of refinement. Every figure is a PNG of at most `drawing.BUDGET` bytes, or `drawing.GRID_BUDGET` with maps;
without matplotlib, ImportError.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import columns as names
from .columns import HEADLINE, direction, heading, is_number, is_ours, plain
from .drawing import ACCENT, FAINT, INK, PALETTE, Band, batch, image_grid, looks, outlined, sheet
from .overlays import overlay, to_numpy, to_pixels

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PER_BAND = 10  # methods beside each other in a grid; more go onto further lines
SHOWN = 10  # lines with a colour in a plot of curves
_GREY = {"color": "#ced5dc", "linewidth": 0.8}

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
    """What test-time refinement does to the maps: input, then T = 0 … T, one row per image. Returns the path.

    Args:
        images: (N, 3, H, W) in [0, 1].
        trail: (T+1, N, 1, H, W), as `aha.refine(..., every_step=True)` returns it.
        scores: (T+1, N) Ins − Del of every map, written below them; the best of an image is bold.
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

    Args:
        curves: method → reference → {"deletion": (S,), "insertion": (S,)}, at S even steps of [0, 1].
        path: of the PNG.
        summary: its areas stand in the legend; without it they come from the curves by the trapezoid.

    Returns:
        The path.

    Raises:
        ValueError: if there are no curves.
    """
    if not curves:
        raise ValueError("there are no curves: give at least one method")
    reported = (summary or {}).get("methods", {})
    style = looks(curves)
    with sheet(path, 8.8, 3.5 + 0.19 * math.ceil(len(curves) / 2)) as figure:
        verbs = {"deletion": "removed", "insertion": "shown"}
        for axes, (metric, verb) in zip(figure.subplots(1, 2, sharey=True), verbs.items(), strict=True):
            means = {name: _mean_curve(of, metric) for name, of in curves.items()}
            known = {name: reported.get(name, {}).get(metric) for name in means}
            areas = {name: _area(means[name]) if area is None else area for name, area in known.items()}
            order = sorted(means, key=areas.__getitem__, reverse=bool(direction(metric)))
            # the emphasised lines are drawn last, over the others
            lines = _lines(axes, {name: means[name] for name in sorted(means, key=is_ours)}, style)
            legend = axes.legend(
                [lines[name] for name in order],
                [f"{names.number(metric, areas[name], coarser=1)}  {plain(name)}" for name in order],
                loc="upper center",
                bbox_to_anchor=(0.5, -0.17),
                ncols=2 if len(order) > 3 else 1,
                columnspacing=1.2,
                handlelength=2,
                title="area under the curve, best first",
                title_fontproperties={"size": 8},
            )
            legend.get_title().set_color(FAINT)
            for name, text in zip(order, legend.get_texts(), strict=True):
                text.set_weight("bold" if is_ours(name) else "normal")
            axes.set_title(heading(metric))
            axes.set_xlabel(f"pixels {verb}, most important first")
        figure.axes[0].set_ylabel("probability of the explained class")
    return Path(path)


def curves_by_reference(curves: Curves, path: str | Path) -> Path:
    """Deletion and insertion, a row each, with a column per reference. Args, errors and return as of `curves`.

    With many methods, ours and the best of the others have colours, by the area between the two curves; the rest are
    grey.
    """
    if not curves:
        raise ValueError("there are no curves: give at least one method")
    references = list(dict.fromkeys(reference for of in curves.values() for reference in of))
    gains = {
        m: np.mean(_mean_curve(of, "insertion")) - np.mean(_mean_curve(of, "deletion")) for m, of in curves.items()
    }
    ordered = sorted(curves, key=gains.__getitem__, reverse=True)
    others = [name for name in ordered if not is_ours(name) and name != "random"]
    named = [name for name in ordered if name not in others[SHOWN:]]
    style = looks([name for name in curves if name in named])
    shown = sorted(curves, key=lambda name: (name in named, is_ours(name)))
    lines: dict[str, Any] = {}
    rows = math.ceil((len(named) + (len(named) < len(curves))) / 5)
    with sheet(path, 0.5 + 2.6 * len(references), 4.8 + 0.17 * rows) as figure:
        grid = figure.subplots(2, len(references), sharex=True, sharey="row", squeeze=False)
        for line, metric in zip(grid, ("deletion", "insertion"), strict=True):
            for axes, reference in zip(line, references, strict=True):
                found = {name: curves[name].get(reference, {}).get(metric) for name in shown}
                lines |= _lines(axes, {name: of for name, of in found.items() if of is not None}, style)
            line[0].set_ylabel(heading(metric))
        for top, bottom, reference in zip(*grid, references, strict=True):
            top.set_title(reference)
            bottom.set_xlabel("pixels removed or shown")
            bottom.set_xticks((0, 0.5, 1))
        handles = {plain(name): lines[name] for name in named}
        if len(named) < len(curves):
            handles[f"{len(curves) - len(named)} others"] = lines[others[-1]]
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=5, handlelength=2.2)
    return Path(path)


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
    """One metric of all methods with its 95 % confidence interval, the best on top. Returns the path."""
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
        for name, label in zip(best_on_top, axes.get_yticklabels(), strict=True):
            label.set(color=INK, weight="bold" if is_ours(name) else "normal")
        axes.set(ylim=(-0.6, len(rows) - 0.4), xlabel=f"{heading(metric)}   (line: 95 % interval)")
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.margins(x=0.06)
    return Path(path)


def training(log_path: str | Path, path: str | Path) -> Path:
    """Curves of a training run from its ``log.jsonl``. Returns the path.

    Raises:
        ValueError: if the file holds no record.
    """
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
            for (key, label), color in zip(series.items(), PALETTE[::4], strict=False):
                unit = 1e4 if key == "lr" else 1
                points = [(r["step"], r[key] * unit) for r in log if is_number(r.get(key))]
                if points and key in ("lr", "tau"):  # schedules do not scatter
                    axes.plot(*zip(*points, strict=True), color=color)
                elif points:
                    # every batch draws its own reference and grid, so values scatter: faint, under their running mean
                    step, value = np.array(points, dtype=np.float64).T
                    window = np.ones(max(1, min(len(value) // 8, 25)))
                    if len(window) > 1:
                        axes.plot(step, value, color=color, alpha=0.25, linewidth=0.8)
                        value = np.convolve(value, window, "same") / np.convolve(np.ones(len(value)), window, "same")
                    axes.plot(step, value, color=color, label=label)
            axes.set_title(title)
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


def _mean_curve(by_reference: Mapping[str, Mapping[str, Any]], metric: str) -> np.ndarray:
    """Mean over the references that the metric has."""
    return np.mean([to_numpy(curves[metric]) for curves in by_reference.values() if metric in curves], axis=0)


def _area(curve: np.ndarray) -> float:
    return float(np.mean((curve[1:] + curve[:-1]) / 2))
