"""Names beside the points of a plot, without covering each other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .columns import is_ours
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

    renderer = FigureCanvasAgg(figure).get_renderer()
    texts = {}
    for name in points:
        weight = "bold" if is_ours(name) else "normal"
        texts[name] = figure.text(0, 0, name.replace("_", " "), size=7.5, color=INK, weight=weight)
    sizes = {name: text.get_window_extent(renderer) for name, text in texts.items()}
    pixels = {name: axes.transData.transform(point) for name, point in points.items()}
    radius = 10.0
    solid = [(x - radius, y - radius, x + radius, y + radius) for x, y in pixels.values()]
    for name, bounds in bars.items():
        if bounds:
            x = pixels[name][0]
            low, high = (axes.transData.transform((points[name][0], bound))[1] for bound in bounds)
            solid.append((x - 3, low, x + 3, high))
    light = []
    corners = [axes.transData.transform(point) for point in front]
    for (x, y), (u, v) in itertools.pairwise(corners):
        light += [(x, y - 2, u, y + 2), (u - 2, min(y, v), u + 2, max(y, v))]
    frame = axes.get_window_extent(renderer)
    placed: dict[str, tuple[float, float, float, float]] = {}
    candidates = {name: _candidates(pixels[name], sizes[name].width, sizes[name].height) for name in points}

    def expense(name: str, of: np.ndarray) -> np.ndarray:
        others = [box for other, box in placed.items() if other != name]
        total = 12 * _overlap(of, others, 5) + 10 * _overlap(of, solid, 1) + 0.6 * _overlap(of, light, 0)
        outside = np.maximum(0, frame.x0 + 4 - of[:, 0]) + np.maximum(0, of[:, 2] - frame.x1 + 2)
        outside += np.maximum(0, frame.y0 + 4 - of[:, 1]) + np.maximum(0, of[:, 3] - frame.y1 + 2)
        x, y = pixels[name]
        away = np.hypot(
            np.maximum(0, np.maximum(of[:, 0] - x, x - of[:, 2])), np.maximum(0, np.maximum(of[:, 1] - y, y - of[:, 3]))
        )
        # a name belongs to the point that it is nearest to
        others_near = sum(_near(of, pixels[other]) for other in points if other != name)
        return total + 1e3 * outside + 4 * away + 40 * others_near

    # the crowded ones choose last and so around the others; later rounds mend what the first could not know
    crowd = {n: sum(float(np.hypot(*(pixels[n] - pixels[m])) < 120) for m in points) for n in points}
    for _ in range(6):
        for name in sorted(points, key=lambda n: crowd[n]):
            boxes = candidates[name]
            placed[name] = tuple(boxes[np.argmin(expense(name, boxes))].tolist())
    for name, (x0, y0, x1, y1) in placed.items():
        x, y = pixels[name]
        # the extent of a text starts at its ink's box, which is where it was drawn at (0, 0)
        texts[name].set_position(
            ((x0 - sizes[name].x0) / figure.bbox.width, (y0 - sizes[name].y0) / figure.bbox.height)
        )
        end = min(max(x, x0), x1), min(max(y, y0), y1)
        if math.dist(end, (x, y)) > 1.7 * radius:
            line = axes.transData.inverted().transform([(x, y), end])
            axes.plot(*line.T, color=FAINT, linewidth=0.6, zorder=1, scalex=False, scaley=False)


def _candidates(point: np.ndarray, width: float, height: float) -> np.ndarray:
    """Boxes (x0, y0, x1, y1) of a label around a point, the nearest first."""
    half = np.array([width / 2, height / 2])
    boxes = []
    for gap in (14, 20, 30, 44, 62, 84, 110, 140):
        for angle in np.linspace(0, 2 * np.pi, 24, endpoint=False):
            dx, dy = np.cos(angle), np.sin(angle)
            # the label's nearest side touches the circle of this radius
            center = point + np.array([dx, dy]) * (gap + half)
            boxes.append(np.concatenate([center - half, center + half]))
    return np.array(boxes)


def _overlap(boxes: np.ndarray, others: Sequence[tuple[float, ...]], margin: float) -> np.ndarray:
    """Area in square pixels that each of the boxes (M, 4) shares with all the others, widened by a margin."""
    if not others:
        return np.zeros(len(boxes))
    of = np.array(others)[None]
    mine = boxes[:, None]
    wide = np.minimum(mine[..., 2], of[..., 2] + margin) - np.maximum(mine[..., 0], of[..., 0] - margin)
    high = np.minimum(mine[..., 3], of[..., 3] + margin) - np.maximum(mine[..., 1], of[..., 1] - margin)
    return (np.maximum(0, wide) * np.maximum(0, high)).sum(1)


def _near(boxes: np.ndarray, point: np.ndarray, reach: float = 26.0) -> np.ndarray:
    """How deep each box (M, 4) reaches into the surroundings of a point, in [0, 1]."""
    x, y = point
    across = np.maximum(0, np.maximum(boxes[:, 0] - x, x - boxes[:, 2]))
    along = np.maximum(0, np.maximum(boxes[:, 1] - y, y - boxes[:, 3]))
    return np.maximum(0, 1 - np.hypot(across, along) / reach)
