"""A photograph as a classifier sees it, and the way back: maps over the inputs become one map over the photograph.

Everything is measured in the pixels of the upright photograph, with its EXIF orientation applied, as viewers show it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from aha.checks import MOST_SIDE, check_arguments, check_colour, check_integer, check_size, checked
from aha.data.images import DEFAULT, ImageReadError, Preprocessing, check_shape, cropping, open_image, to_tensor
from aha.kernels.messages import is_plain, short
from aha.overlays import to_numpy

Fit = Literal["crop", "pad", "tile"]
FITS: tuple[str, ...] = get_args(Fit)
ZOOM = 2  # times as fine as the input, of photographs that have the pixels
BACK = Image.Resampling.BILINEAR  # of maps: between pixel centres, and no value beyond theirs
TILES = 32  # a finer view that takes more of them, as that of a panorama, costs more than it shows


@dataclass(frozen=True)
class View:
    """What a classifier gets of a photograph, and the way back from there. `Photograph.view` makes it.

    The photograph is resized to ``scaled``, and every input is a square window of that: exact geometry, with no
    rounding but that of the resized sides to whole pixels.

    Attributes:
        fit: "crop", "pad" or "tile".
        inputs: (N, 3, S, S) float32 RGB in [0, 1]; N is 1 but for tiles.
        size: (H, W) of the upright photograph, in pixels.
        scaled: (h, w) of the resized photograph, of which the inputs are windows.
        corners: (top, left) of every window in the resized photograph; negative where the photograph is padded.
    """

    fit: str
    inputs: Tensor
    size: tuple[int, int]
    scaled: tuple[int, int]
    corners: tuple[tuple[int, int], ...]

    @property
    def seen(self) -> float:
        """The share of the photograph's area that is in the inputs, in (0, 1]."""
        covered = np.zeros(self.scaled, dtype=bool)
        for inner, _ in self._windows():
            covered[inner] = True
        return float(covered.mean())

    @property
    def inside(self) -> Tensor:
        """(N, 1, S, S) bool: which pixels of the inputs show the photograph, and not padding."""
        inside = torch.zeros_like(self.inputs[:, :1], dtype=torch.bool)
        for place, (_, outer) in zip(inside, self._windows(), strict=True):
            place[0][outer] = True
        return inside

    @checked
    def to_photograph(
        self, maps: Any, size: tuple[int, int] | None = None, weights: Sequence[float] | Tensor | None = None
    ) -> np.ndarray:
        """Maps of the inputs as one map of the photograph, NaN where the inputs show nothing of it.

        Maps are enlarged between pixel centres, without overshoot. Tiles are blended with windows that fall smoothly to
        zero at their edges. With ``weights``, every tile's map counts from its lowest value up and times its weight: an
        explainer that standardises its maps finds as much contrast in an empty tile as in that of the object, and the
        target's probability in the tile tells them apart.

        Args:
            maps: (N, 1, S, S) tensor or array, one value per pixel of the inputs.
            size: (H, W) of the result; default: that of the photograph.
            weights: (N,) ≥ 0, one per tile. Ignored for a single input, whose values are kept.

        Returns:
            (H, W) float32.

        Raises:
            ValueError: for maps or weights of another shape, or weights that are negative or not finite.
        """
        count, _, side, _ = self.inputs.shape
        values = to_numpy(maps)
        if values.shape != (count, 1, side, side):
            raise ValueError(f"maps has shape {values.shape}: give ({count}, 1, {side}, {side}), one per input")
        values = values[:, 0]
        if weights is not None:
            factors = to_numpy(weights)
            if factors.shape != (count,) or not (np.isfinite(factors).all() and (factors >= 0).all()):
                raise ValueError(f"weights of shape {factors.shape}: give ({count},), one finite number ≥ 0 per input")
            if count > 1:
                values = (values - values.min(axis=(1, 2), keepdims=True)) * factors[:, None, None]
        total, weight = np.zeros(self.scaled), np.zeros(self.scaled)
        fade = _fade(side)
        for value, (inner, outer) in zip(values, self._windows(), strict=True):
            total[inner] += (value * fade)[outer]
            weight[inner] += fade[outer]
        seen = weight > 0
        rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
        top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
        known = (total[top:bottom, left:right] / weight[top:bottom, left:right]).astype(np.float32)
        around = ((top, self.scaled[0] - bottom), (left, self.scaled[1] - right))
        height, width = check_size("size", self.size if size is None else size)
        # beyond the crop its border goes on, so that enlarging needs no values from there
        whole = np.asarray(Image.fromarray(np.pad(known, around, mode="edge")).resize((width, height), BACK)).copy()
        y, x = (np.arange(height) + 0.5) * self.scaled[0] / height, (np.arange(width) + 0.5) * self.scaled[1] / width
        whole[(y < top) | (y > bottom)] = np.nan
        whole[:, (x < left) | (x > right)] = np.nan
        return whole

    @checked
    def to_inputs(self, heat: Any) -> Tensor:
        """A map of the photograph, (H, W) of any resolution, over every input: (N, 1, S, S) float32, on the CPU.

        Where an input shows padding, it is the lowest value of the map. ValueError for NaN or infinite values, as those
        outside a crop, and for another shape.
        """
        values = to_numpy(heat)
        if values.ndim != 2:
            raise ValueError(f"heat has shape {values.shape}: give (H, W), a map of the photograph")
        if not np.isfinite(values).all():
            raise ValueError("map holds NaN or infinite values: give one of the whole photograph, such as of fit='pad'")
        height, width = self.scaled
        small = np.asarray(Image.fromarray(values).resize((width, height), BACK))
        found = np.full((len(self.inputs), 1, *self.inputs.shape[-2:]), small.min(), dtype=np.float32)
        for place, (inner, outer) in zip(found, self._windows(), strict=True):
            place[0][outer] = small[inner]
        return torch.from_numpy(found)

    def _windows(self) -> list[tuple[tuple[slice, slice], tuple[slice, slice]]]:
        """What each input shows of the resized photograph: where that is in the photograph, and where in the input."""
        side = self.inputs.shape[-1]
        found = []
        for corner in self.corners:
            spans = [(max(0, at), min(length, at + side)) for at, length in zip(corner, self.scaled, strict=True)]
            inner = tuple(slice(*span) for span in spans)
            outer = tuple(slice(span[0] - at, span[1] - at) for span, at in zip(spans, corner, strict=True))
            found.append(((inner[0], inner[1]), (outer[0], outer[1])))
        return found


class Photograph:
    """An image file at its own resolution, upright: what an explanation of the whole of it starts from.

    Attributes:
        path: the file.
        image: PIL's image, RGB, 8 bits, EXIF orientation applied.
    """

    def __init__(self, path: str | os.PathLike):
        """Read a file as `aha.data.load_image` does, whose ImageReadError it raises."""
        check_arguments(Photograph.__init__, {"path": path})
        self.path = Path(path)
        self.image = open_image(self.path, 1)

    @property
    def size(self) -> tuple[int, int]:
        """(H, W), upright, in pixels."""
        return self.image.height, self.image.width

    @checked
    def view(
        self,
        image_size: int = 224,
        fit: Fit = "crop",
        preprocessing: Preprocessing = DEFAULT,
        colour: Sequence[float] | Tensor = (0.5, 0.5, 0.5),
    ) -> View:
        """The photograph as square inputs of a classifier.

        - crop: what `aha.data.load_image` gives: the shorter side is resized and the centre cropped. What lies outside
          is not seen.
        - pad: the whole photograph, its longer side as long as the input, centred on ``colour``.
        - tile: windows that overlap by half or more. The shorter side is one input long, or two where the photograph's
          own shorter side is no shorter than that and 32 tiles are enough.

        Args:
            image_size: side S of the inputs in pixels.
            fit: "crop", "pad" or "tile".
            preprocessing: its filter resizes; its crop_pct is that of the crop.
            colour: (3,) in [0, 1], of the padding: give the classifier's ``mean_colour``.

        Raises:
            ValueError: for an unknown fit, a size or colour that is none.
            ImageReadError: in one line, where the photograph resized would have more pixels than PIL's limit.
        """
        check_arguments(Photograph.view, {"preprocessing": preprocessing})
        side = check_integer("image_size", image_size, 1, MOST_SIDE)
        if fit not in FITS:
            raise ValueError(f"fit={short(fit)}: choose one of {', '.join(FITS)}")
        padding = check_colour(colour.tolist() if isinstance(colour, Tensor) and is_plain(colour) else colour, 3)
        width, height = self.image.size
        corners: list[tuple[int, int]]
        if fit == "crop":
            self._check(preprocessing.resize(side))
            scaled, (left, top) = cropping(self.image.size, side, preprocessing.resize(side))
            corners = [(top, left)]
        elif fit == "pad":
            long = max(width, height)
            scaled = max(1, round(width * side / long)), max(1, round(height * side / long))
            corners = [((scaled[1] - side) // 2, (scaled[0] - side) // 2)]
        else:
            self._check(side)
            scaled, corners = _tiles(self.image.size, side, ZOOM if min(width, height) >= ZOOM * side else 1)
            if len(corners) > TILES:
                scaled, corners = _tiles(self.image.size, side, 1)
        image = self.image
        if image.size != scaled:
            image = image.resize(scaled, preprocessing.resample)
        blank = torch.tensor(padding, dtype=torch.float32)[:, None, None].expand(3, side, side)
        view = View(fit, blank.repeat(len(corners), 1, 1, 1), self.size, (scaled[1], scaled[0]), tuple(corners))
        pixels = to_tensor(image)
        for place, (inner, outer) in zip(view.inputs, view._windows(), strict=True):
            place[:, outer[0], outer[1]] = pixels[:, inner[0], inner[1]]
        return view

    def picture(self, longest: int) -> Image.Image:
        """The photograph to draw on: as it is, or its longer side resized to ``longest`` pixels where it is longer."""
        long = max(self.image.size)
        longest = check_integer("longest", longest, 1)
        if long <= longest:
            return self.image
        width, height = (max(1, round(length * longest / long)) for length in self.image.size)
        return self.image.resize((width, height), Image.Resampling.LANCZOS)

    def _check(self, resize: int) -> None:
        try:
            check_shape(self.image.size, resize)
        except ValueError as error:
            raise ImageReadError(f"cannot read image {self.path}: {error}") from error


def _tiles(shape: tuple[int, int], side: int, zoom: int) -> tuple[tuple[int, int], list[tuple[int, int]]]:
    """Width and height once resized, and the corners (top, left) of the tiles in rows."""
    (width, height), _ = cropping(shape, side, zoom * side)

    def starts(length: int) -> list[int]:
        room = length - side
        steps = math.ceil(2 * room / side)
        return [round(room * i / steps) for i in range(steps + 1)] if steps else [0]

    return (width, height), [(top, left) for top in starts(height) for left in starts(width)]


def _fade(side: int) -> np.ndarray:
    """(S, S): 1 in the middle, falling as sin² towards the edges, where it is small and not 0."""
    line = np.sin(np.pi * (np.arange(side) + 0.5) / side) ** 2
    return line[:, None] * line
