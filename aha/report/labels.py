"""Names beside the points of a plot, without covering each other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .columns import is_ours, plain
from .drawing import FAINT, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def place(
    figure: Figure,
    axes: Axes,
    points: Mapping[str, tuple[float, float]],
    bars: Mapping[str, tuple[float, float] | None],
    front: Sequence[tuple[float, float]],
) -> None:
    """A name beside every point, where it covers no other name, point, bar or the front; far ones get a line.

    Every name tries directions and distances and takes the cheapest; some rounds of that over all names.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    axes.autoscale_view()  # limits are found late, and pixels follow from them
    renderer = FigureCanvasAgg(figure).get_renderer()
    texts = {}
    for name in points:
        weight = "bold" if is_ours(name) else "normal"
        texts[name] = figure.text(0, 0, plain(name), size=7.5, color=INK, weight=weight)
    sizes = {name: text.get_window_extent(renderer) for name, text in texts.items()}
    pixels = {name: axes.transData.transform(point) for name, point in points.items()}
    radius = 10.0
    solid = [(x - radius, y - radius, x + radius, y + radius) for x, y in pixels.values()]
    for name, bounds in bars.items():
        if bounds:
            (x, low), (_, high) = (axes.transData.transform((points[name][0], bound)) for bound in bounds)
            solid.append((x - 3, low, x + 3, high))
    light = []
    for (x, y), (u, v) in itertools.pairwise(axes.transData.transform(point) for point in front):
        light += [(x, y - 2, u, y + 2), (u - 2, min(y, v), u + 2, max(y, v))]
    (left, low), (right, high) = axes.get_window_extent(renderer).get_points()
    candidates = {name: _candidates(pixels[name], np.array(sizes[name].size)) for name in points}
    placed: dict[str, np.ndarray] = {}

    def expense(name: str) -> np.ndarray:
        boxes = candidates[name]
        others = [box for other, box in placed.items() if other != name]
        total = 12 * _overlap(boxes, others, 5) + 10 * _overlap(boxes, solid, 1) + 0.6 * _overlap(boxes, light, 0)
        outside = np.maximum(0, np.subtract((left + 4, low + 4), boxes[:, :2]))
        outside += np.maximum(0, boxes[:, 2:] - (right - 2, high - 2))
        # a name belongs to the point that it is nearest to
        near = sum(np.maximum(0, 1 - _away(boxes, pixels[other]) / 26) for other in points if other != name)
        return total + 1e3 * outside.sum(1) + 4 * _away(boxes, pixels[name]) + 40 * near

    # the crowded ones choose last and so around the others; later rounds mend what the first could not know
    crowd = {n: sum(math.dist(pixels[n], pixels[m]) < 120 for m in points) for n in points}
    for _ in range(6):
        for name in sorted(points, key=crowd.__getitem__):
            placed[name] = candidates[name][np.argmin(expense(name))]
    for name, box in placed.items():
        # the extent of a text starts at its ink's box, which is where it was drawn at (0, 0)
        texts[name].set_position(tuple((box[:2] - sizes[name].min) / figure.bbox.size))
        end = np.clip(pixels[name], box[:2], box[2:])
        if math.dist(end, pixels[name]) > 1.7 * radius:
            line = axes.transData.inverted().transform([pixels[name], end])
            axes.plot(*line.T, color=FAINT, linewidth=0.6, zorder=1, scalex=False, scaley=False)


def _candidates(point: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Boxes (x0, y0, x1, y1) of a label around a point, the nearest first."""
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    gaps = np.array([14, 20, 30, 44, 62, 84, 110, 140])
    # the label's nearest side touches the circle of this radius
    steps = np.stack([np.cos(angles), np.sin(angles)], axis=1) * (gaps[:, None, None] + size / 2)
    centers = point + steps.reshape(-1, 2)
    return np.concatenate([centers - size / 2, centers + size / 2], axis=1)


def _overlap(boxes: np.ndarray, others: Sequence[Any], margin: float) -> np.ndarray:
    """Area in square pixels that each of the boxes (M, 4) shares with all the others, widened by a margin."""
    if not others:
        return np.zeros(len(boxes))
    mine, of = boxes[:, None], np.array(others)[None]
    sides = np.minimum(mine[..., 2:], of[..., 2:] + margin) - np.maximum(mine[..., :2], of[..., :2] - margin)
    return np.maximum(0, sides).prod(-1).sum(1)


def _away(boxes: np.ndarray, point: np.ndarray) -> np.ndarray:
    """Distance of each box (M, 4) from a point, 0 inside."""
    return np.hypot(*np.maximum(0, np.maximum(boxes[:, :2] - point, point - boxes[:, 2:])).T)
