"""Maps as heat over their images; needs numpy and pillow only, as `aha explain` does."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

SMALL = 96  # images up to this side are enlarged by repeating pixels: their pixels are what is ranked
CELL = 256  # pixels that an enlarged image measures, at least
GAP = 6

# after inferno (van der Walt and Smith, CC0), without its near-white top, which looks empty on bright images
_COLORS = np.frombuffer(
    bytes.fromhex("0d083c 330a5f 57106e 781c6d 9a2765 bb3754 d84c3e ed6925 f98e09 fbb41a f6d746"), np.uint8
).reshape(-1, 3)


def overlay(image: Any, map: Any, scale: int | None = None) -> np.ndarray:
    """The map as heat over the image: (H·scale, W·scale, 3) uint8.

    The map is stretched between its 1st and 99th percentile. Important pixels are warm and opaque; the others
    show the image, nearly grey so that a strong colour is the map's. A constant map shows the image alone.

    Args:
        image: (3, H, W) tensor or array in [0, 1]; ValueError for another shape.
        map: (1, H, W) or (H, W), finite; otherwise ValueError.
        scale: whole enlargement ≥ 1; None enlarges images up to 96 px to at least 256, others not.
    """
    rgb, heat = _image(image), _map(map)
    if rgb.shape[:2] != heat.shape:
        raise ValueError(f"map is {heat.shape}, the image {rgb.shape[:2]}: give one value per pixel of the image")
    heat = _stretch(heat)
    grey = rgb @ np.array([[0.299], [0.587], [0.114]], dtype=np.float32)
    opacity = 0.92 * (0.55 * heat + 0.45 * heat**2)[..., None]
    faded = 0.12 + 0.8 * (0.25 * rgb + 0.75 * grey)
    place = np.linspace(0, 1, len(_COLORS))
    color = np.stack([np.interp(heat, place, channel) for channel in _COLORS.T], axis=-1) / 255
    return enlarge(_bytes(faded * (1 - opacity) + color * opacity), scale)


def save_strip(image: Any, maps: Any, path: str | Path) -> Path:
    """Write the image and the overlays of its maps (T, 1, H, W) side by side. Returns the path."""
    panels = [enlarge(to_pixels(image)), *(overlay(image, map) for map in maps)]
    gap = np.full((panels[0].shape[0], GAP, 3), 255, dtype=np.uint8)
    spaced = [part for panel in panels for part in (gap, panel)][1:]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.concatenate(spaced, axis=1)).save(path)
    return path


def enlarge(pixels: np.ndarray, scale: int | None = None) -> np.ndarray:
    """(H, W, …) → (H·scale, W·scale, …), every pixel repeated; the default scale is that of `overlay`."""
    if scale is None:
        side = max(pixels.shape[:2])
        scale = math.ceil(CELL / side) if side <= SMALL else 1
    return pixels.repeat(scale, axis=0).repeat(scale, axis=1)


def to_numpy(value: Any) -> np.ndarray:
    """A tensor on any device, or an array, as float32."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().float().numpy()
    return np.asarray(value, dtype=np.float32)


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


def _stretch(heat: np.ndarray) -> np.ndarray:
    low, high = np.percentile(heat, (1, 99))
    # a map that is constant but for a few pixels has equal percentiles; then its extremes say more
    if not high > low:
        low, high = heat.min(), heat.max()
    return np.clip((heat - low) / (high - low), 0, 1) if high > low else np.zeros_like(heat)


def _bytes(values: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(values, 0, 1) * 255).astype(np.uint8)
