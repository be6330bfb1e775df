"""Maps as heat over their images; needs numpy and pillow only, as `aha explain` does."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .checks import MOST_SIDE, check_integer, checked
from .files import write_atomically
from .kernels.messages import short

SMALL = 96  # images up to this side are enlarged by repeating pixels: their pixels are what is ranked
CELL = 256  # pixels that an enlarged image measures, at least
GAP = 6
FLAT = 0.05  # of a map's magnitude: what differs by less is drawn with less contrast
NARROW = 340  # pixels that a caption needs
INK, FAINT = (36, 41, 47), (110, 119, 129)

# after inferno (van der Walt and Smith, CC0), without its near-white top, which looks empty on bright images
_COLORS = np.frombuffer(
    bytes.fromhex("0d083c 330a5f 57106e 781c6d 9a2765 bb3754 d84c3e ed6925 f98e09 fbb41a f6d746"), np.uint8
).reshape(-1, 3)
_RAMP = np.stack([np.interp(np.linspace(0, 1, 1024), np.linspace(0, 1, len(_COLORS)), c) for c in _COLORS.T], -1)
_RAMP = (_RAMP / 255).astype(np.float32)


@checked
def overlay(image: Any, map: Any, scale: int | None = None) -> np.ndarray:
    """The map as heat over the image: (H·scale, W·scale, 3) uint8.

    The map is stretched between its 1st and 99th percentile. Important pixels are warm and opaque; the others
    show the image, nearly grey so that a strong colour is the map's.

    A constant map shows the image alone, and a nearly flat one looks flat: where the two percentiles differ by less
    than 5 % of their magnitude, the colours span that 5 % and the map uses its part of them, the lower one.

    Args:
        image: (3, H, W) tensor or array in [0, 1]; ValueError for another shape.
        map: (1, H, W) or (H, W), finite; otherwise ValueError.
        scale: whole enlargement ≥ 1; None enlarges images up to 96 px to at least 256, others not.
    """
    rgb, heat = _image(image), _map(map)
    if rgb.shape[:2] != heat.shape:
        raise ValueError(f"map is {heat.shape}, the image {rgb.shape[:2]}: give one value per pixel of the image")
    return enlarge(_heated(rgb, _stretch(heat, *limits(heat))), scale)


@checked
def limits(map: Any) -> tuple[float, float]:
    """The values of the map between which `overlay` stretches its colours, low and high; NaN is left out.

    They are the 1st and the 99th percentile; equal for a constant map, and for any other at least 5 % of their
    magnitude apart, so that what is nearly flat looks it.
    """
    values = to_numpy(map)
    values = values[np.isfinite(values)]
    if not len(values):
        raise ValueError("map holds no finite value: an attribution must be finite")
    low, high = (float(value) for value in np.percentile(values, (1, 99)))
    # a map that is constant but for a few pixels has equal percentiles; then its extremes say more
    if not high > low:
        low, high = float(values.min()), float(values.max())
    return low, max(high, low + FLAT * max(abs(low), abs(high))) if high > low else high


def save_figure(
    image: Any, maps: Any, path: str | Path, caption: Sequence[str] = (), kept: float | None = None, side: int = 2048
) -> Path:
    """Write a photograph under its maps as PNG, with a caption and a colour bar below. Returns the path.

    Pixels where a map is NaN, those outside a crop, are darkened, and the rest is framed. Several maps stand side by
    side, all in the colours of one bar, whose ends are the values of `limits` over all of them.

    Args:
        image: (H, W, 3) uint8 or PIL's image, RGB.
        maps: (T, H, W), one value per pixel of the image, NaN where the classifier saw nothing.
        path: its folder is made.
        caption: lines of text; what is too long for the picture is broken.
        kept: the fraction of the pixels seen, the top ones of the last map, that is outlined on it; None: no outline.
        side: the longer side of a panel in pixels, at most. Images up to 96 px are enlarged to at least 256.

    Raises:
        ValueError: in one line, for a shape that does not fit, or a map without a finite value.
        WriteError: in one line, for a full disk or a folder that cannot be written to.
    """
    picture = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
    picture = picture.convert("RGB")
    heats = to_numpy(maps)
    if heats.ndim != 3 or not len(heats) or heats.shape[1:] != (picture.height, picture.width):
        raise ValueError(
            f"maps has shape {heats.shape}: give (T, {picture.height}, {picture.width}), a value per pixel of the image"
        )
    if max(picture.size) > side:
        width, height = (max(1, round(length * side / max(picture.size))) for length in picture.size)
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        nearest = Image.Resampling.NEAREST  # NaN spreads with any other filter
        heats = np.stack([np.asarray(Image.fromarray(heat).resize((width, height), nearest)) for heat in heats])
    low, high = limits(heats)
    pixels = np.asarray(picture, dtype=np.float32) / 255
    panels = [_panel(pixels, heat, low, high, None) for heat in heats[:-1]]
    panels.append(_panel(pixels, heats[-1], low, high, kept))
    gap = np.full((len(panels[0]), GAP, 3), 255, dtype=np.uint8)
    body = np.concatenate([part for panel in panels for part in (gap, panel)][1:], axis=1)
    path = Path(path)
    content = io.BytesIO()
    figure = _captioned(body, caption, low, high)
    figure.save(content, "PNG", compress_level=3)  # a third of the time of 6, a tenth larger
    write_atomically(path, content.getvalue())
    return path


def enlarge(pixels: np.ndarray, scale: int | None = None) -> np.ndarray:
    """(H, W, …) → (H·scale, W·scale, …), every pixel repeated; the default scale is that of `overlay`."""
    if scale is not None:
        check_integer("scale", scale, 1, MOST_SIDE // max(pixels.shape[:2]))
    else:
        side = max(pixels.shape[:2])
        scale = math.ceil(CELL / side) if side <= SMALL else 1
    return pixels.repeat(scale, axis=0).repeat(scale, axis=1)


def to_numpy(value: Any) -> np.ndarray:
    """A tensor on any device, or an array, as float32."""
    try:
        if hasattr(value, "detach"):
            value = value.detach().cpu().float().numpy()
        return np.asarray(value, dtype=np.float32)
    except (TypeError, ValueError, RuntimeError, OverflowError, NotImplementedError) as error:
        raise ValueError(f"{short(value)}: give a tensor or an array of real numbers") from error


def to_pixels(image: Any) -> np.ndarray:
    """(3, H, W) in [0, 1] → (H, W, 3) uint8."""
    return _bytes(_image(image))


def _image(image: Any) -> np.ndarray:
    """(3, H, W) → (H, W, 3) float32 in [0, 1]."""
    values = to_numpy(image)
    if values.ndim != 3 or values.shape[0] != 3:
        raise ValueError(f"image has shape {values.shape}: give (3, H, W) in [0, 1]")
    return np.clip(values.transpose(1, 2, 0), 0, 1)


def _map(map: Any) -> np.ndarray:
    """(1, H, W) or (H, W) → (H, W) float32."""
    values = to_numpy(map)
    if values.ndim != 2 and (values.ndim, *values.shape[:1]) != (3, 1):
        raise ValueError(f"map has shape {values.shape}: give (1, H, W) or (H, W)")
    if not np.isfinite(values).all():
        raise ValueError("map holds NaN or infinite values: an attribution must be finite")
    return values.reshape(values.shape[-2:])


def _stretch(heat: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.clip((heat - low) / (high - low), 0, 1) if high > low else np.zeros_like(heat)


def _heated(rgb: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Heat (H, W) in [0, 1] over an image (H, W, 3) in [0, 1]; (H, W, 3) uint8."""
    grey = rgb @ np.array([[0.299], [0.587], [0.114]], dtype=np.float32)
    opacity = 0.92 * (0.55 * heat + 0.45 * heat**2)[..., None]
    faded = 0.12 + 0.8 * (0.25 * rgb + 0.75 * grey)
    return _bytes(faded * (1 - opacity) + _RAMP[np.rint(heat * (len(_RAMP) - 1)).astype(np.intp)] * opacity)


def _panel(rgb: np.ndarray, heat: np.ndarray, low: float, high: float, kept: float | None) -> np.ndarray:
    """One map over the photograph: what was not seen darkened, the rest framed, the top ``kept`` of it outlined."""
    seen = np.isfinite(heat)
    panel = _heated(rgb, np.where(seen, _stretch(heat, low, high), 0).astype(np.float32))
    panel[~seen] = panel[~seen] // 3
    panel = enlarge(panel)
    if not seen.all():
        panel = outlined(panel, enlarge(seen))
    if kept is not None and seen.any():
        values = np.sort(heat[seen])
        count = min(len(values), round(kept * len(values)))
        if count:
            panel = outlined(panel, enlarge(seen & (heat >= values[len(values) - count])))
    return panel


def outlined(pixels: np.ndarray, inside: np.ndarray) -> np.ndarray:
    """The image (H, W, 3) uint8 with a two-tone line just outside a region (H, W) bool: visible on bright and dark."""
    pixels = pixels.copy()
    width = max(1, min(pixels.shape[:2]) // 160)
    near = _dilated(inside, width)
    pixels[_dilated(near, width) & ~near] = 0
    pixels[near & ~inside] = 255
    return pixels


def _dilated(mask: np.ndarray, steps: int) -> np.ndarray:
    """Whatever is within ``steps`` rows and columns of the mask (H, W) bool; PIL's filter needs seconds for that."""
    wide = np.pad(mask, steps)
    for axis in (0, 1):
        width, wide = 1, wide.swapaxes(0, axis)
        while width < 2 * steps + 1:
            shift = min(width, 2 * steps + 1 - width)
            wide, width = wide[:-shift] | wide[shift:], width + shift
        wide = wide.swapaxes(0, axis)
    return wide


def _captioned(body: np.ndarray, caption: Sequence[str], low: float, high: float) -> Image.Image:
    """Lines of text and a colour bar below the picture, beside one another where there is room."""
    height, width = body.shape[:2]
    size = min(40, max(13, width // 48))
    font: Any = ImageFont.load_default(size)
    margin, line, across = size // 2, round(1.4 * size), max(width, NARROW)
    bar = min(across - 2 * margin, 16 * size)
    beside = across >= 3 * bar
    room = across - 2 * margin - (bar + 2 * margin if beside else 0)
    texts = [part for text in caption for part in _broken(text, font, room)]
    text_height, bar_height = line * len(texts), round(2.6 * size)
    below = max(text_height, bar_height) if beside else text_height + (margin if texts else 0) + bar_height
    sheet = Image.new("RGB", (across, height + below + 2 * margin), "white")
    sheet.paste(Image.fromarray(body), ((across - width) // 2, 0))
    draw = ImageDraw.Draw(sheet)
    top = height + margin
    for place, text in enumerate(texts):
        draw.text((margin, top + place * line), text, font=font, fill=FAINT if place else INK)
    left = across - margin - bar if beside else margin
    top = top if beside else height + below + margin - bar_height
    # as it looks over a mid-grey image: what is of low importance shows the image
    heat = np.broadcast_to(np.linspace(0, 1, bar, dtype=np.float32) if high > low else np.float32(0), (size, bar))
    sheet.paste(Image.fromarray(_heated(np.full((size, bar, 3), 0.5, np.float32), heat)), (left, top))
    ends = ("less important", f"{low:.3g}"), ("more", f"{high:.3g}")
    if not high > low:
        ends = ("flat map:", f"{low:.3g}"), ("", "everywhere")
    row = top + round(1.2 * size)
    small: Any = ImageFont.load_default(max(11, round(0.8 * size)))
    draw.text((left, row), " ".join(ends[0]), font=small, fill=FAINT)
    draw.text((left + bar, row), " ".join(ends[1]).strip(), font=small, fill=FAINT, anchor="ra")
    return sheet


def _broken(text: str, font: Any, room: int) -> list[str]:
    """A line on as many lines as it needs, between words; a word that is longer than a line stays whole."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= room:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)
