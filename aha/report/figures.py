"""The figures of a report.

Shapes: N images (N, 3, H, W) RGB in [0, 1], maps (N, 1, H, W) of any finite range, S points of a curve, T
steps of refinement. Every figure is a PNG of at most `BUDGET` bytes; without matplotlib, ImportError.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
from PIL import Image

from .overlays import enlarge, enlargement, overlay, to_numpy, to_pixels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BUDGET = 400_000  # bytes per figure: a report inlines them all, and a README loads them
DPI = 200
PAGE = 1900  # width of an image grid in pixels, about: more columns make smaller panels

# Okabe & Ito's colours, told apart by colour-blind readers; vermilion is kept for AHA
_ACCENT = "#d55e00"
_PALETTE = ("#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#b8860b", "#4b3f8f")
_DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
_INK, _FAINT = "#24292f", "#6e7781"
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same page everywhere
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": "#afb8c1",
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#eaeef2",
    "grid.linewidth": 0.8,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.4,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "white",
}

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
    "seconds_per_image": "s / image",
}


def direction(metric: str) -> bool | None:
    """Whether higher is better; None for a metric this library does not know."""
    from ..metrics import DIRECTIONS

    return {**DIRECTIONS, "seconds_per_image": False}.get(metric)


def heading(metric: str) -> str:
    """The metric as tables and axes call it, with ↑ where higher is better and ↓ where lower is."""
    better = direction(metric)
    return LABELS.get(metric, metric.replace("_", " ")) + {True: " ↑", False: " ↓", None: ""}[better]


def is_ours(method: str) -> bool:
    """Whether figures and tables emphasise this method."""
    return method.lower().startswith("aha")


# ---- image grids


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
    images = _batch("images", images)
    columns = {name: _batch("maps", value, len(images)) for name, value in maps.items()}
    panels = []
    for n, image in enumerate(images):
        first = to_pixels(image)
        outline = None if masks is None else _batch("masks", masks, len(images))[n]
        panels.append([_outlined(first, outline), *(overlay(image, value[n]) for value in columns.values())])
    with _drawing():
        figure = _image_grid(panels, ["input", *columns], titles)
        return _write(figure, path)


def refinement(images: Any, trail: Any, path: str | Path, scores: Any = None) -> Path:
    """What test-time refinement does to the maps: input, then T = 0 … T, one row per image. Returns the path.

    Args:
        images: (N, 3, H, W) in [0, 1].
        trail: (T+1, N, 1, H, W), as `aha.refine(..., every_step=True)` returns it.
        scores: (T+1, N) Ins − Del of every map, or (T+1,) their means; written below the maps.
    """
    images = _batch("images", images)
    trail = [_batch("trail", maps, len(images)) for maps in trail]
    panels = []
    for n, image in enumerate(images):
        first = enlarge(to_pixels(image))
        panels.append([first, *(overlay(image, maps[n]) for maps in trail)])
    notes: list[list[str]] | None = None
    if scores is not None:
        values = to_numpy(scores)
        if values.shape not in ((len(trail),), (len(trail), len(images))):
            raise ValueError(f"scores has shape {values.shape}: give one value per map, {(len(trail), len(images))}")
        if values.ndim == 1:
            notes = [[]] * (len(images) - 1) + [["mean Ins − Del", *(f"{v:.3f}" for v in values)]]
        else:
            notes = [["Ins − Del", *(f"{v:.3f}" for v in row)] for row in values.T]
    with _drawing():
        return _write(_image_grid(panels, ["input", *(f"T = {t}" for t in range(len(trail)))], notes=notes), path)


def _batch(name: str, value: Any, count: int | None = None) -> np.ndarray:
    array = to_numpy(value)
    if array.ndim != 4 or not len(array) or (count is not None and len(array) != count):
        wanted = "(N, 3, H, W)" if count is None else f"({count}, 1, H, W)"
        raise ValueError(f"{name} has shape {array.shape}: give {wanted}")
    return array


def _outlined(pixels: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """The enlarged image, with a two-tone line just outside the mask: visible on bright and on dark."""
    scale = enlargement(pixels.shape[:2])
    large = enlarge(pixels, scale)
    if mask is None:
        return large
    inside = (mask[0] > 0.5).repeat(scale, axis=0).repeat(scale, axis=1)
    width = max(1, min(large.shape[:2]) // 160)
    near = _dilated(inside, width)
    large[_dilated(near, width) & ~near] = 0
    large[near & ~inside] = 255
    return large


def _dilated(mask: np.ndarray, steps: int) -> np.ndarray:
    for _ in range(steps):
        wider = mask.copy()
        wider[1:] |= mask[:-1]
        wider[:-1] |= mask[1:]
        wider[:, 1:] |= mask[:, :-1]
        wider[:, :-1] |= mask[:, 1:]
        mask = wider
    return mask


def _image_grid(
    panels: list[list[np.ndarray]],
    names: Sequence[str],
    titles: Sequence[str] | None = None,
    notes: Sequence[Sequence[str]] | None = None,
) -> Figure:
    """Panels edge to edge at whole pixels, so that repeated pixels stay square; names above, notes below."""
    from matplotlib.figure import Figure

    if titles is not None and len(titles) != len(panels):
        raise ValueError(f"{len(titles)} titles for {len(panels)} images: give one per image")
    panels = [[_shrunk(pixels, PAGE // len(names)) for pixels in line] for line in panels]
    height, width = panels[0][0].shape[:2]
    gap = 10
    heads = [_broken(name, width) for name in names]
    top = 14 + 30 * max(head.count("\n") + 1 for head in heads)
    left = 40 if titles else gap
    notes = notes or [[]] * len(panels)
    below = [34 if line else 0 for line in notes]
    total_w = left + len(names) * (width + gap)
    total_h = top + sum(below) + len(panels) * (height + gap)
    figure = Figure(figsize=(total_w / DPI, total_h / DPI), dpi=DPI)
    y = top
    for row, line in enumerate(panels):
        for column, pixels in enumerate(line):
            x = left + column * (width + gap)
            box = (x / total_w, 1 - (y + height) / total_h, width / total_w, height / total_h)
            axes = figure.add_axes(box)
            axes.imshow(pixels, interpolation="nearest", aspect="auto")
            axes.set_axis_off()
            if row == 0:
                weight = "bold" if is_ours(names[column]) else "normal"
                figure.text(
                    (x + width / 2) / total_w,
                    1 - (y - 13) / total_h,
                    heads[column],
                    ha="center",
                    va="baseline",
                    weight=weight,
                    linespacing=1.1,
                )
            if below[row]:
                center, base = (x + width / 2) / total_w, 1 - (y + height + 6) / total_h
                color = _FAINT if column == 0 else _INK
                figure.text(center, base, notes[row][column], ha="center", va="top", size=8, color=color)
        if titles:
            middle = 1 - (y + height / 2) / total_h
            figure.text(
                18 / total_w,
                middle,
                _broken(titles[row], height, lines=1),
                rotation=90,
                ha="center",
                va="center",
                size=8,
                color=_FAINT,
            )
        y += height + gap + below[row]
    return figure


def _shrunk(pixels: np.ndarray, width: int) -> np.ndarray:
    if pixels.shape[1] <= width:
        return pixels
    size = (width, max(1, round(pixels.shape[0] * width / pixels.shape[1])))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


def _broken(name: str, pixels: int, lines: int = 3) -> str:
    """A name on as many lines as fit a panel's side of ``pixels``; what is too long for them is cut."""
    room = max(6, pixels // 16)
    return "\n".join(textwrap.wrap(name.replace("_", " "), room, max_lines=lines, placeholder="…"))


# ---- plots


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
    looks = _looks(curves)
    with _drawing():
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
                axes.plot(np.linspace(0, 1, len(means[name])), means[name], label=name, **looks[name])
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
            legend.get_title().set_color(_FAINT)
            for name, text in zip(order, legend.get_texts(), strict=True):
                text.set_weight("bold" if is_ours(name) else "normal")
            axes.set_title(heading(metric))
            axes.set(xlim=(0, 1), ylim=(0, None), xlabel=f"pixels {verb}, most important first")
            axes.xaxis.set_major_formatter(_percent)
        figure.axes[0].set_ylabel("probability of the explained class")
        return _write(figure, path)


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
    with _drawing():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.0, 0.75 + 0.27 * len(rows)), dpi=DPI, layout="constrained")
        axes = figure.subplots()
        for y, name in enumerate(best_on_top):
            value, interval = rows[name]
            color = _ACCENT if is_ours(name) else _PALETTE[0]
            if interval:
                axes.plot(interval, (y, y), color=color, linewidth=2, alpha=0.45)
            axes.plot(value, y, "o", color=color, markersize=5.5)
            axes.annotate(
                _number(value),
                (1.015, y),
                xycoords=("axes fraction", "data"),
                va="center",
                size=8,
                color=_INK,
                annotation_clip=False,
            )
        axes.set_yticks(range(len(rows)), [name.replace("_", " ") for name in best_on_top])
        for name, label in zip(best_on_top, axes.get_yticklabels(), strict=True):
            label.set(color=_INK, weight="bold" if is_ours(name) else "normal")
        axes.set(ylim=(-0.6, len(rows) - 0.4), xlabel=f"{heading(metric)}   (line: 95 % interval)")
        axes.grid(axis="y", visible=False)
        axes.spines["left"].set_visible(False)
        axes.margins(x=0.06)
        return _write(figure, path)


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
    with _drawing():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9.0, 4.4), dpi=DPI, layout="constrained")
        for axes, (title, series) in zip(figure.subplots(2, 3, sharex=True).flat, panels.items(), strict=True):
            for (key, label), color in zip(series.items(), _PALETTE[::4], strict=False):
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
            figure.supxlabel(f"{np.median(speeds):.3g} images/s (median)", x=0.99, ha="right", size=8, color=_FAINT)
        return _write(figure, path)


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


def _looks(methods: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Colour and dash per method: AHA in vermilion, the last of them solid; random in dotted grey."""
    ours = [name for name in methods if is_ours(name)]
    others = [name for name in methods if not is_ours(name) and name != "random"]
    looks: dict[str, dict[str, Any]] = {"random": {"color": _FAINT, "linestyle": (0, (1, 1.4))}}
    for i, name in enumerate(reversed(ours)):
        looks[name] = {"color": _ACCENT, "linestyle": _DASHES[i % len(_DASHES)], "linewidth": 2.2}
    for i, name in enumerate(others):
        dash = _DASHES[i // len(_PALETTE) % len(_DASHES)]
        looks[name] = {"color": _PALETTE[i % len(_PALETTE)], "linestyle": dash}
    return looks


def _mean_curve(by_reference: Mapping[str, Mapping[str, Any]], metric: str) -> np.ndarray:
    return np.mean([to_numpy(both[metric]) for both in by_reference.values()], axis=0)


def _area(curve: np.ndarray) -> float:
    return float(np.mean((curve[1:] + curve[:-1]) / 2))


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def _percent(value: float, _: int) -> str:
    return f"{100 * value:.0f} %"


def is_number(value: Any) -> TypeGuard[float]:
    """Whether it is a finite real number (NaN and infinities appear in JSON that Python wrote)."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


# ---- files


@contextlib.contextmanager
def _drawing() -> Iterator[None]:
    """The house style, for one figure; ImportError with what to install if there is no matplotlib."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install aha-attribution[report]") from error
    with matplotlib.rc_context(_STYLE):
        yield


def _write(figure: Figure, path: str | Path) -> Path:
    """Save as PNG within `BUDGET`: first with fewer colours, then with fewer pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    data = _png(picture)
    full = picture.size
    for share in (1.0, 0.85, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2):
        if len(data) <= BUDGET:
            break
        size = [max(1, round(side * share)) for side in full]
        smaller = picture.resize(size, Image.Resampling.LANCZOS)
        data = _png(smaller.quantize(255, Image.Quantize.MEDIANCUT), DPI * share)
    path.write_bytes(data)
    return path


def _png(picture: Image.Image, dpi: float = DPI) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True, dpi=(dpi, dpi))
    return buffer.getvalue()
