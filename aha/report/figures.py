"""The figures of a report.

Shapes: N images (N, 3, H, W) RGB in [0, 1], maps (N, 1, H, W) of any finite range, S points of a curve, T
steps of refinement. Every figure is a PNG of at most `drawing.BUDGET` bytes; without matplotlib, ImportError.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .columns import direction, heading, is_number, is_ours
from .drawing import ACCENT, DPI, FAINT, INK, PALETTE, Band, batch, drawing, image_grid, looks, outlined, write
from .overlays import enlarge, overlay, to_numpy, to_pixels

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def map_grid(
    images: Any,
    maps: Mapping[str, Any],
    path: str | Path,
    titles: Sequence[str] | None = None,
    masks: Any = None,
) -> Path:
    """One row per image, one column per method, the image first. Returns the path.

    Args:
        images: (N, 3, H, W) in [0, 1].
        maps: method → (N, 1, H, W).
        titles: N lines to stand at the left of the rows, for example the explained class.
        masks: (N, 1, H, W) bool, the evidence where it is known: outlined in the first column.
    """
    images = batch("images", images)
    columns = {name: batch("maps", value, len(images)) for name, value in maps.items()}
    panels = []
    for n, image in enumerate(images):
        first = to_pixels(image)
        outline = None if masks is None else batch("masks", masks, len(images))[n]
        panels.append([outlined(first, outline), *(overlay(image, value[n]) for value in columns.values())])
    with drawing():
        figure = image_grid([Band(["input", *columns], panels)], titles)
        return write(figure, path)


def refinement(images: Any, trail: Any, path: str | Path, scores: Any = None) -> Path:
    """What test-time refinement does to the maps: input, then T = 0 … T, one row per image. Returns the path.

    Args:
        images: (N, 3, H, W) in [0, 1].
        trail: (T+1, N, 1, H, W), as `aha.refine(..., every_step=True)` returns it.
        scores: (T+1, N) Ins − Del of every map, or (T+1,) their means; written below the maps.
    """
    images = batch("images", images)
    trail = [batch("trail", maps, len(images)) for maps in trail]
    panels = []
    for n, image in enumerate(images):
        first = enlarge(to_pixels(image))
        panels.append([first, *(overlay(image, maps[n]) for maps in trail)])
    notes: list[list[str]] = []
    if scores is not None:
        values = to_numpy(scores)
        if values.shape not in ((len(trail),), (len(trail), len(images))):
            raise ValueError(f"scores has shape {values.shape}: give one value per map, {(len(trail), len(images))}")
        if values.ndim == 1:
            notes = [[]] * (len(images) - 1) + [["mean Ins − Del", *(f"{v:.3f}" for v in values)]]
        else:
            notes = [["Ins − Del", *(f"{v:.3f}" for v in row)] for row in values.T]
    with drawing():
        return write(image_grid([Band(["input", *(f"T = {t}" for t in range(len(trail)))], panels, notes)]), path)


def curves(
    curves: Mapping[str, Mapping[str, Mapping[str, Any]]],
    path: str | Path,
    summary: Mapping[str, Any] | None = None,
) -> Path:
    """Deletion and insertion: the classifier's response over the share of pixels, mean of the references.

    Args:
        curves: method → reference → {"deletion": (S,), "insertion": (S,)}, at S even steps of [0, 1].
        summary: its areas stand in the legend; without it they come from the curves by the trapezoid.

    Returns:
        The path.
    """
    if not curves:
        raise ValueError("there are no curves: give at least one method")
    reported = (summary or {}).get("methods", {})
    style = looks(curves)
    with drawing():
        from matplotlib.figure import Figure

        rows = math.ceil(len(curves) / 2)
        figure = Figure(figsize=(8.8, 3.5 + 0.19 * rows), dpi=DPI, layout="constrained")
        verbs = {"deletion": "removed", "insertion": "shown"}
        for axes, (metric, verb) in zip(figure.subplots(1, 2, sharey=True), verbs.items(), strict=True):
            means = {name: _mean_curve(of, metric) for name, of in curves.items()}
            areas = {name: reported.get(name, {}).get(metric) for name in means}
            areas = {name: _area(means[name]) if area is None else area for name, area in areas.items()}
            order = sorted(means, key=areas.__getitem__, reverse=bool(direction(metric)))
            # the emphasised lines are drawn last, over the others
            for name in sorted(means, key=is_ours):
                axes.plot(np.linspace(0, 1, len(means[name])), means[name], label=name, **style[name])
            lines = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
            legend = axes.legend(
                [lines[name] for name in order],
                [f"{_number(areas[name])}  {name.replace('_', ' ')}" for name in order],
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
            axes.set(xlim=(0, 1), ylim=(0, None), xlabel=f"pixels {verb}, most important first")
            axes.xaxis.set_major_formatter(_percent)
        figure.axes[0].set_ylabel("probability of the explained class")
        return write(figure, path)


def bars(summary: Mapping[str, Any], metric: str, path: str | Path) -> Path:
    """One metric of all methods with its 95 % confidence interval, the best on top. Returns the path."""
    rows = {
        name: (values[metric], values.get("ci95", {}).get(metric))
        for name, values in summary.get("methods", {}).items()
        if is_number(values.get(metric))
    }
    if not rows:
        raise ValueError(f"no method has a value of {metric!r}: choose a metric of the summary")
    best_on_top = sorted(rows, key=lambda name: rows[name][0], reverse=direction(metric) is False)
    with drawing():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.0, 0.75 + 0.27 * len(rows)), dpi=DPI, layout="constrained")
        axes = figure.subplots()
        for y, name in enumerate(best_on_top):
            value, interval = rows[name]
            color = ACCENT if is_ours(name) else PALETTE[0]
            if interval:
                axes.plot(interval, (y, y), color=color, linewidth=2, alpha=0.45)
            axes.plot(value, y, "o", color=color, markersize=5.5)
            axes.annotate(
                _number(value),
                (1.015, y),
                xycoords=("axes fraction", "data"),
                va="center",
                size=8,
                color=INK,
                annotation_clip=False,
            )
        axes.set_yticks(range(len(rows)), [name.replace("_", " ") for name in best_on_top])
        for name, label in zip(best_on_top, axes.get_yticklabels(), strict=True):
            label.set(color=INK, weight="bold" if is_ours(name) else "normal")
        axes.set(ylim=(-0.6, len(rows) - 0.4), xlabel=f"{heading(metric)}   (line: 95 % interval)")
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.margins(x=0.06)
        return write(figure, path)


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
    with drawing():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9.0, 4.4), dpi=DPI, layout="constrained")
        for axes, (title, series) in zip(figure.subplots(2, 3, sharex=True).flat, panels.items(), strict=True):
            for (key, label), color in zip(series.items(), PALETTE[::4], strict=False):
                unit = 1e4 if key == "lr" else 1
                points = [(r["step"], r[key] * unit) for r in log if is_number(r.get(key))]
                if points and key in ("lr", "tau"):  # schedules do not scatter
                    axes.plot(*zip(*points, strict=True), color=color)
                elif points:
                    step, value = np.array(points, dtype=np.float64).T
                    _noisy_line(axes, step, value, color, label)
            axes.set_title(title)
            if len(series) > 1 and axes.lines:
                axes.legend()
        for axes in figure.axes[3:]:
            axes.set_xlabel("step")
        speeds = [r["images_per_second"] for r in log if is_number(r.get("images_per_second"))]
        if speeds:
            figure.supxlabel(f"{np.median(speeds):.3g} images/s (median)", x=0.99, ha="right", size=8, color=FAINT)
        return write(figure, path)


def _noisy_line(axes: Axes, step: np.ndarray, value: np.ndarray, color: str, label: str) -> None:
    # every batch draws its own reference and grid, so values scatter: faint, under their running mean
    window = np.ones(max(1, min(len(value) // 8, 25)))
    if len(window) > 1:
        axes.plot(step, value, color=color, alpha=0.25, linewidth=0.8)
        value = np.convolve(value, window, "same") / np.convolve(np.ones(len(value)), window, "same")
    axes.plot(step, value, color=color, label=label)


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


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _percent(value: float, _: int) -> str:
    return f"{100 * value:.0f} %"
