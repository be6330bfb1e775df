"""The look of every figure: style, colours, panels of images, and files within `BUDGET` bytes."""

from __future__ import annotations

import contextlib
import io
import textwrap
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image

from .. import overlays
from ..files import write_atomically
from ..overlays import enlarge, to_numpy
from .columns import is_ours, plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BUDGET = 400_000  # bytes per figure: a report inlines them all, and a README loads them
GRID_BUDGET = 2_500_000  # of a grid of photographs: its panels are the figure
DPI = 200
PAGE = 1900  # width of an image grid in pixels, about: more columns make smaller panels

# Okabe & Ito's colours, told apart by colour-blind readers; vermilion is kept for AHA
ACCENT = "#d55e00"
PALETTE = ("#0072b2", "#009e73", "#cc79a7", "#56b4e9", "#b8860b", "#4b3f8f")
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
INK, FAINT = "#24292f", "#6e7781"
_STYLE = Path(__file__).parent / "house.mplstyle"
_COLORS: dict[Any, Any] = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.titlecolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color"), FAINT),
}


def looks(methods: Collection[str]) -> dict[str, dict[str, Any]]:
    """Colour and dash per method: AHA in vermilion, the last of them solid; random in dotted grey."""
    ours = [name for name in methods if is_ours(name)]
    others = [name for name in methods if not is_ours(name) and name != "random"]
    found: dict[str, dict[str, Any]] = {"random": {"color": FAINT, "linestyle": (0, (1, 1.4))}}
    for i, name in enumerate(reversed(ours)):
        found[name] = {"color": ACCENT, "linestyle": DASHES[i % len(DASHES)], "linewidth": 2.2}
    for i, name in enumerate(others):
        found[name] = {"color": PALETTE[i % len(PALETTE)], "linestyle": DASHES[i // len(PALETTE) % len(DASHES)]}
    return found


def batch(name: str, value: Any, count: int | None = None) -> np.ndarray:
    """Images or maps as float32, N of them; ``count`` is the N that is asked for. ValueError for another shape."""
    array = to_numpy(value)
    if array.ndim != 4 or not len(array) or (count is not None and len(array) != count):
        wanted = "(N, 3, H, W)" if count is None else f"({count}, 1, H, W)"
        raise ValueError(f"{name} has shape {array.shape}: give {wanted}")
    return array


def outlined(pixels: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """The enlarged image, with a line around the mask (1, H, W) of the object."""
    large = enlarge(pixels)
    return large if mask is None else overlays.outlined(large, enlarge(mask[0] > 0.5))


def weight(name: str) -> str:
    """Of the letters of a method's name."""
    return "bold" if is_ours(name) else "normal"


class Band(NamedTuple):
    """Rows of panels under one line of names."""

    names: Sequence[str]  # of the columns
    panels: list[list[np.ndarray]]  # rows of (H, W, 3) uint8, all of one size
    notes: Sequence[Sequence[tuple[str, bool]]]  # per row the texts below its panels and whether bold, or nothing


def image_grid(bands: Sequence[Band], path: str | Path, titles: Sequence[str] | None = None) -> Path:
    """Panels edge to edge at whole pixels, so that repeated pixels stay square, names above and notes below. Bands
    stand under each other, ``titles`` at the left of the rows of each."""
    rows = len(bands[0].panels)
    if titles is not None and len(titles) != rows:
        raise ValueError(f"{len(titles)} titles for {rows} images: give one per image")
    columns = max(len(band.names) for band in bands)
    shrunk = [[[_shrunk(pixels, PAGE // columns) for pixels in line] for line in band.panels] for band in bands]
    height, width = shrunk[0][0][0].shape[:2]
    gap, left, note_height = 10, 40 if titles else 10, 34
    longest = max(len(word) for band in bands for name in band.names for word in plain(name).split() or [""])
    size = next((points for points in (9, 8, 7.5) if longest <= _letters(width, points)), 7)  # breaks no word
    heads = [[_broken(name, width, size=size) for name in band.names] for band in bands]
    tops = [14 + round(30 * size / 9) * max(head.count("\n") + 1 for head in line) for line in heads]
    noted = sum(bool(note) for band in bands for note in band.notes)
    total_w = left + columns * (width + gap)
    total_h = sum(tops) + len(bands) * (rows * (height + gap) + 2 * gap) - 2 * gap + note_height * noted
    with sheet(path, total_w / DPI, total_h / DPI, GRID_BUDGET, layout=None) as figure:
        axes = figure.add_axes((0, 0, 1, 1))  # in pixels
        axes.set_axis_off()
        y = 0
        for band, pictures, head, top in zip(bands, shrunk, heads, tops, strict=True):
            y += top
            lefts = [left + column * (width + gap) for column in range(len(band.names))]
            for x, name, text in zip(lefts, band.names, head, strict=True):
                style: Any = {"ha": "center", "va": "baseline", "linespacing": 1.1, "weight": weight(name)}
                axes.text(x + width / 2, y - 13, text, size=size, **style)
            for row, (line, notes) in enumerate(zip(pictures, band.notes, strict=True)):
                for x, pixels in zip(lefts, line, strict=True):
                    axes.imshow(pixels, interpolation="nearest", aspect="auto", extent=(x, x + width, y + height, y))
                for i, (x, (text, best)) in enumerate(zip(lefts, notes, strict=False)):
                    style = {"ha": "center", "va": "top", "weight": "bold" if best else "normal"}
                    style |= {"size": min(8, size), "color": INK if i else FAINT}
                    axes.text(x + width / 2, y + height + 6, text, **style)
                if titles:
                    style = {"ha": "center", "va": "center", "rotation": 90, "size": 8, "color": FAINT}
                    axes.text(18, y + height / 2, _broken(titles[row], height, lines=1), **style)
                y += height + gap + (note_height if notes else 0)
            y += 2 * gap
        axes.set(xlim=(0, total_w), ylim=(total_h, 0))
    return Path(path)


def _shrunk(pixels: np.ndarray, width: int) -> np.ndarray:
    picture = Image.fromarray(pixels)
    picture.thumbnail((width, pixels.shape[0]), Image.Resampling.LANCZOS, reducing_gap=None)
    return np.asarray(picture)


def _letters(pixels: int, size: float) -> int:
    return max(6, int(pixels / (16 * size / 9)))


def _broken(name: str, pixels: int, lines: int = 3, size: float = 9) -> str:
    """A name on as many lines as fit a panel's side of ``pixels``; what is too long for them is cut."""
    return "\n".join(textwrap.wrap(plain(name), _letters(pixels, size), max_lines=lines, placeholder="…"))


@contextlib.contextmanager
def sheet(
    path: str | Path, width: float, height: float, budget: int = BUDGET, layout: Any = "constrained"
) -> Iterator[Figure]:
    """A figure of so many inches in the house style, written as PNG of at most ``budget`` bytes at the end."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install aha-attribution[report]") from error
    with matplotlib.rc_context(_COLORS, fname=_STYLE):
        figure = Figure(figsize=(width, height), dpi=DPI, layout=layout)
        yield figure
        _write(figure, Path(path), budget)


def _write(figure: Figure, path: Path, budget: int) -> None:
    """First with fewer colours, then with fewer pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    drawn = picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    for share in (None, 1.0, 0.85, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2):
        if share is not None:
            smaller = drawn.resize([max(1, round(side * share)) for side in drawn.size], Image.Resampling.LANCZOS)
            picture = smaller.quantize(255, Image.Quantize.MEDIANCUT)
        data = io.BytesIO()
        picture.save(data, "PNG", optimize=True, dpi=(DPI * (share or 1),) * 2)
        if data.tell() <= budget:
            break
    write_atomically(path, data.getvalue())
