"""Pixels of one image file: decoded, upright, in RGB, resized and cropped, with PIL and numpy."""

from __future__ import annotations

import io
import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from aha.checks import MOST_SIDE, check_choice, check_integer, checked, checked_fields

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
CROP_PCT = 0.875
RANGES = (1.0, 255.0, 65535.0)  # tops of the ranges that wide grey values may have
SLACK = 1e-3  # share of the range by which resampled values may lie outside


# what is read, whatever the suffix: decoders in this process alone, for that of EPS is another program. HEIF by plugin
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "HEIF", "BMP", "DIB", "GIF", "TIFF", "PPM", "JPEG2000", "TGA")
LARGEST = 1 << 30  # bytes of a file: more than the most pixels read take without compression
LONGEST = 300  # characters of a path in a message


def shown(path: Any) -> str:
    """A path or another text of unknown content as part of a line: printable, and not too long for one."""
    text = os.fspath(path) if isinstance(path, os.PathLike) else str(path)
    text = "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]}…{text[-LONGEST // 2 :]}"


class ImageReadError(ValueError):
    """A file that is not an image, is damaged, missing or not readable. The message names it."""


class ImageMissingError(ImageReadError, FileNotFoundError):
    """A file that is not there, or a link to nothing."""


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes a square: its shorter side is resized, then the centre is cropped.

    Attributes:
        crop_pct: side of the square over the resized shorter side, above 0 and at most 1.
        interpolation: "nearest", "bilinear", "bicubic" or "lanczos", always with antialiasing.
    """

    crop_pct: float = CROP_PCT
    interpolation: str = "bicubic"

    @checked_fields
    def __post_init__(self) -> None:
        if not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct is {self.crop_pct}; it must be above 0 and at most 1")
        check_choice("interpolation", self.interpolation, tuple(INTERPOLATIONS))

    @checked
    def resize(self, image_size: int) -> int:
        """What the shorter side is resized to for a square of ``image_size``, pixels."""
        return round(check_integer("image_size", image_size, 1, MOST_SIDE) / self.crop_pct)

    @property
    def resample(self) -> Image.Resampling:
        """PIL's filter."""
        return INTERPOLATIONS[self.interpolation]

    @checked
    def describe(self, image_size: int) -> str:
        """In a line, for reports."""
        return f"shorter side to {self.resize(image_size)} px ({self.interpolation}), centre crop of {image_size} px"


DEFAULT = Preprocessing()


@checked
def load_image(path: str | os.PathLike, image_size: int = 224, preprocessing: Preprocessing = DEFAULT) -> torch.Tensor:
    """One image from disk as (3, image_size, image_size) float32 RGB in [0, 1]; arguments as `ImageFolder`.

    EXIF orientation is honoured; every colour mode becomes RGB, and transparency is dropped. 16 bits are scaled to the
    full range, 32 bits and floating point by the smallest of the ranges [0, 1] (floating point alone), [0, 255] and
    [0, 65535] that holds the values.

    Raises:
        ImageReadError: in one line, for a file that is missing (then it is a FileNotFoundError too), damaged, outside
            these ranges, or of more pixels than PIL's limit, as it is or once resized.
    """
    resize = preprocessing.resize(image_size)
    return to_tensor(fitted(open_image(Path(path), resize), image_size, resize, preprocessing.resample))


def open_image(path: Path, resize: int, content: bytes | None = None) -> Image.Image:
    """The whole image, upright, RGB, 8 bits.

    Args:
        path: the file, or what to call ``content``.
        resize: what its shorter side will be.
        content: the bytes of a file within another.
    """
    return _opened(path, resize, _to_rgb, content)


def open_mask(path: Path, resize: int, beside: tuple[int, int]) -> Image.Image:
    """A mask, upright, grey: 255 where it marks the object. ``beside``: width and height of its image."""
    mask = _opened(path, resize, _marks)
    if abs(round(beside[0] * mask.height / beside[1]) - mask.width) > 1:
        raise ImageReadError(
            f"cannot read mask {shown(path)}: it is {mask.width}×{mask.height}, its image {beside[0]}×{beside[1]}: "
            "give both the same shape"
        )
    return mask


def _opened(
    path: Path,
    resize: int,
    convert: Callable[[Image.Image, str | None], Image.Image],
    content: bytes | None = None,
) -> Image.Image:
    """What ``convert`` makes of the upright image and its file format; ImageReadError in one line if it cannot."""
    try:
        if content is None:
            check_file(path)
        with Image.open(path if content is None else io.BytesIO(content), formats=_formats()) as file:
            check_shape(file.size, resize)  # before a pixel is decoded
            file.load()
            check_shape(file.size, resize)  # frames of a GIF may be larger than the file says
            kind = file.format
            ImageOps.exif_transpose(file, in_place=True)  # the largest images take 0.7 GB: no copy more than needed
            return convert(file, kind)
    except ImageReadError:
        raise
    except UnidentifiedImageError as error:
        empty = not (path.stat().st_size if content is None else len(content))
        what = "it is empty" if empty else f"it is none of {', '.join(FORMATS)}, or damaged"
        raise ImageReadError(f"cannot read image {shown(path)}: {what}") from error
    # damaged files raise nearly anything from inside PIL's parsers
    except Exception as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        reason = shown(" ".join(str(reason).split())) or type(error).__name__
        raise ImageReadError(f"cannot read image {shown(path)}: {reason}") from error


def _formats() -> list[str]:
    """Those of `FORMATS` that this Pillow and its plugins know."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def check_file(path: Path) -> None:
    """ImageReadError for what is no regular file, which might never end, or larger than any image that is read."""
    if not path.is_file():
        what = "a link to nothing" if path.is_symlink() else "no such image"
        what = "not a file" if path.exists() else what
        raise ImageMissingError(f"cannot read image {shown(path)}: {what}")
    size = path.stat().st_size
    if size > LARGEST:
        raise ImageReadError(f"cannot read image {shown(path)}: it has {size} bytes; at most {LARGEST} are read")


def check_shape(size: tuple[int, int], resize: int) -> None:
    """ValueError for an image (width, height) of more pixels than PIL's limit, as it is or once its shorter side is
    ``resize``."""
    width, height = size
    short = min(size)
    if short < 1:
        raise ValueError(f"it is {width}×{height} pixels")
    if Image.MAX_IMAGE_PIXELS is None:
        return
    limit = 2 * Image.MAX_IMAGE_PIXELS
    if max(width * height, width * height * (resize / short) ** 2) > limit:
        raise ValueError(
            f"it is {width}×{height} pixels; at most {limit} are read, as it is and with a shorter side of {resize} "
            "(PIL.Image.MAX_IMAGE_PIXELS)"
        )


def _to_rgb(image: Image.Image, kind: str | None) -> Image.Image:
    # PIL clips wide grey values to 255 where it should scale them
    if image.mode.startswith("I;16"):
        image = _scaled(np.asarray(image).astype(np.float32), 65535.0)
    elif image.mode in ("I", "F"):
        values = np.asarray(image)
        top = _top(values, image.mode == "F", kind)
        image = _scaled(values.astype(np.float32), top)
    return image if image.mode == "RGB" else image.convert("RGB")


def _scaled(values: np.ndarray, top: float) -> Image.Image:
    """Grey of 8 bits; overwrites ``values``, float32."""
    values /= np.float32(top)
    np.clip(values, 0, 1, out=values)
    values *= 255
    values += 0.5
    return Image.fromarray(values.astype(np.uint8))


def _top(values: np.ndarray, floating: bool, kind: str | None) -> float:
    """The upper end of the range of wide grey values; ValueError where that is not plain."""
    low, high = float(values.min()), float(values.max())
    what = "floating point" if floating else "32 bit"
    ranges = RANGES if floating else RANGES[1:]
    accepted = ", ".join(f"[0, {top:.0f}]" for top in ranges)
    if not np.isfinite(values).all():
        raise ValueError(f"it holds NaN or infinite values; {what} images are in {accepted}")
    slack = SLACK if floating else 0.0
    top = next((top for top in ranges if high <= top * (1 + slack)), None)
    if top is None or low < -slack * top:
        raise ValueError(f"its values are {low:.6g} … {high:.6g}; {what} images are in {accepted}")
    before = ranges[ranges.index(top) - 1] if top != ranges[0] else 0.0
    if floating and high < 2 * before:
        # a range overshot, or the next one hardly used: the one would be black where the other is white
        raise ValueError(f"its values are {low:.6g} … {high:.6g}, just above {before:.0f}: bring them into {accepted}")
    if not floating and kind in ("PNG", "PPM"):
        return RANGES[-1]  # 16 bits on disk, however dark
    return top


def _marks(image: Image.Image, _: str | None) -> Image.Image:
    """Whatever is not 0 is object; in a palette that does not begin with black, whatever is not black."""
    if image.mode == "P" and not any((image.getpalette() or [0, 0, 0])[:3]):
        values = np.asarray(image)
    elif image.mode in ("1", "L", "I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image)
        if image.mode == "F" and not np.isfinite(values).all():
            raise ValueError("the mask holds NaN or infinite values")
    else:
        values = np.asarray(image.convert("RGB")).max(axis=-1)
    return Image.fromarray((values != 0).astype(np.uint8) * 255)


def fitted(image: Image.Image, size: int, resize: int, resample: Image.Resampling) -> Image.Image:
    """Shorter side to `resize`, then the central square of `size`."""
    (width, height), (left, top) = cropping(image.size, size, resize)
    if image.size != (width, height):
        image = image.resize((width, height), resample)
    return image.crop((left, top, left + size, top + size))


def cropping(shape: tuple[int, int], size: int, resize: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Where `fitted` crops an image of ``shape`` (width, height): its width and height once resized, left and top."""
    short = min(shape)
    # rounded down, as torchvision's Resize does, whose pixels published figures are of
    width, height = int(resize * shape[0] / short), int(resize * shape[1] / short)
    return (width, height), (round((width - size) / 2), round((height - size) / 2))


def augmented(image: Image.Image, size: int, resample: Image.Resampling, rng: random.Random) -> Image.Image:
    """A random crop resized to `size`, flipped half the time."""
    width, height = image.size
    for _ in range(10):
        area = width * height * rng.uniform(0.25, 1.0)
        aspect = (3 / 4) * (16 / 9) ** rng.random()  # evenly on the log scale
        w, h = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            break
    else:
        w = h = min(width, height)
    left, top = rng.randint(0, width - w), rng.randint(0, height - h)
    image = image.resize((size, size), resample, box=(left, top, left + w, top + h))
    return ImageOps.mirror(image) if rng.random() < 0.5 else image


def to_tensor(image: Image.Image) -> torch.Tensor:
    """(C, H, W) float32 in [0, 1]."""
    pixels = np.asarray(image, np.float32)
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return torch.from_numpy(np.ascontiguousarray(pixels)).div_(255)
