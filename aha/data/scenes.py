"""Scenes: a real handwritten digit on a cluttered background, with the pixels of the digit known.

Every scene is a pure function of (seed, split, index, image_size). Its random numbers come from a
counter-based hash, and rendering uses only arithmetic that IEEE 754 rounds exactly (no exp, no matmul, no
reductions), element by element: a scene is the same bit for bit alone or in a batch, in any order and in any
process.

Lengths are given in units of 1/64 of the image's side ("pixels" at the default size).
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from aha.checks import MOST_SIDE, check_arguments, check_choice, check_integer
from aha.kernels.messages import short

SPLITS = {"train": 0.7, "val": 0.1, "test": 0.2}  # shares of the 1797 digit samples
FRAME = 64.0  # side of the frame in which scenes are described
CHUNK = 16  # scenes rendered together: the canvas then stays in the cache

CLUTTER = 12  # strokes, blobs, rectangles and rings per scene, one in five left out
CLUTTER_WINDOW = 24.0
FRAGMENTS = 4  # cut-up pieces of digits per scene
FRAGMENT_WINDOW = 14.0
DIGIT_WINDOW = 40.0
DIGIT_SIZE = 23.0, 32.0  # height of the digits' 8x8 box
COARSE, FINE = 5, 11  # nodes per side of the two background noise fields

CELL = 4  # samples per cell of the 8x8 digits in the upscaled bank
MARGIN = 1  # empty cells around a digit in the bank
BANK = CELL * (8 + 2 * MARGIN)

_LUMA = (0.299, 0.587, 0.114)


class Scenes(torch.utils.data.Dataset):
    """Digits on clutter, labelled, with the mask of the evidence.

    The 1797 handwritten digits of scikit-learn are split by sample into train, val and test, always the same
    way, so held-out scenes show handwriting no training scene has. Fragments in the background come from the
    same split.

    split: "train", "val" or "test".
    size: number of scenes, len(self). Iteration stops there. "train" also accepts any index beyond it, each a
        new scene (virtual epochs); "val" and "test" raise IndexError.
    seed: any integer; another seed gives other scenes of the same handwriting.
    image_size: side in pixels, at least 16.

    Items are dicts: "image" (3, H, W) float32 in [0, 1], "label" int, "mask" (1, H, W) bool, True on the
    strokes. ImportError without scikit-learn; ValueError for an unknown split or a bad size.
    """

    class_names = tuple("0123456789")
    mean_colour = torch.tensor([0.5, 0.5, 0.5])

    def __init__(self, split: str = "train", size: int = 1024, seed: int = 0, image_size: int = 64):
        check_arguments(Scenes.__init__, {"seed": seed, "size": size, "image_size": image_size})
        check_choice("split", split, tuple(SPLITS))
        if size < 1:
            raise ValueError(f"size is {size}; a data set needs at least one scene")
        check_integer("image_size", image_size, 16, MOST_SIDE)
        self.split, self.size, self.seed, self.image_size = split, int(size), int(seed), int(image_size)
        _digits(split)

    def __len__(self) -> int:
        return self.size

    def __iter__(self):
        return (self[index] for index in range(self.size))

    @property
    def virtual_epochs(self) -> bool:
        """Whether an index beyond the size is another scene."""
        return self.split == "train"

    def identity(self, content: bool = True) -> dict[str, Any]:
        """What these scenes are, as JSON types; nothing on disk could change them."""
        about = {"split": self.split, "images": self.size, "seed": self.seed, "image_size": self.image_size}
        return {"type": "Scenes", **about}

    def __getitems__(self, indices: list[int]) -> list[dict]:
        """What a DataLoader asks for: the items of a batch, rendered together."""
        scenes = self.batch(indices)
        rows = zip(scenes["image"], scenes["label"].tolist(), scenes["mask"], strict=True)
        return [{"image": image, "label": label, "mask": mask} for image, label, mask in rows]

    def __getitem__(self, index: int) -> dict:
        scene = self.batch([index])
        return {"image": scene["image"][0], "label": int(scene["label"][0]), "mask": scene["mask"][0]}

    def batch(self, indices) -> dict:
        """The scenes of `indices` (B integers), bit for bit those of `self[index]`, rendered together.

        Returns "image" (B, 3, H, W) float32 in [0, 1], "label" (B,) int64, "mask" (B, 1, H, W) bool.
        """
        canvas, labels, mask = self._render(indices, with_digit=True)
        return {
            "image": torch.from_numpy(canvas),
            "label": torch.from_numpy(labels),
            "mask": torch.from_numpy(mask),
        }

    def backgrounds(self, indices) -> torch.Tensor:
        """The same scenes without their digit: (B, 3, H, W) float32 in [0, 1]."""
        return torch.from_numpy(self._render(indices, with_digit=False)[0])

    def _render(self, indices, with_digit):
        try:
            indices = np.asarray(indices, dtype=np.int64).reshape(-1)
        except (TypeError, ValueError, RuntimeError, OverflowError, MemoryError) as error:
            raise ValueError(f"indices={short(indices)}: give integers, one per scene") from error
        beyond = indices < 0 if self.split == "train" else (indices < 0) | (indices >= self.size)
        if beyond.any():
            raise IndexError(f"no scene {indices[beyond][0]} in a {self.split} set of {self.size}")
        n, side = len(indices), self.image_size
        canvas = np.empty((n, 3, side, side), np.float32)
        labels = np.empty(n, np.int64)
        mask = np.zeros((n, 1, side, side), bool)
        for start in range(0, n, CHUNK):
            part = slice(start, start + CHUNK)
            keys = _keys(self.seed, self.split, indices[part])
            labels[part] = _draw(keys, _digits(self.split), canvas[part], mask[part] if with_digit else None)
        return canvas, labels, mask


def _mix(x: np.ndarray) -> np.ndarray:
    """The splitmix64 finaliser, elementwise on uint64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _keys(seed: int, split: str, indices: np.ndarray) -> np.ndarray:
    """(B,) uint64, one hashed key per scene."""
    stream = np.array([(seed * len(SPLITS) + list(SPLITS).index(split)) % 2**64], np.uint64)
    return _mix(_mix(stream + _GOLDEN) + indices.astype(np.uint64) * _GOLDEN)


class _Numbers:
    """Hands out uniform numbers in [0, 1), per scene, in a fixed order."""

    def __init__(self, keys: np.ndarray):
        self.keys, self.used = keys, 0

    def take(self, *shape: int) -> np.ndarray:
        """(B, *shape) float32."""
        count = int(np.prod(shape, dtype=np.int64))
        counter = np.arange(self.used + 1, self.used + 1 + count, dtype=np.uint64) * _GOLDEN
        self.used += count
        bits = _mix(self.keys[:, None] + counter) >> np.uint64(40)
        return (bits.astype(np.float32) * np.float32(2**-24)).reshape(len(self.keys), *shape)


def _between(u, low, high):
    return low + (high - low) * u


@functools.cache
def _load_digits():
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError("the demo scenes need scikit-learn's digits: pip install aha-attribution[demo]") from None
    digits = load_digits()
    return digits.images.astype(np.float32) / 16, digits.target.astype(np.int64)


@functools.cache
def _split_samples() -> dict[str, np.ndarray]:
    """Which digit samples belong to which split: a fixed shuffle, cut by the shares."""
    count = len(_load_digits()[0])
    order = np.argsort(_mix(np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN), kind="stable")
    cuts = np.cumsum([round(share * count) for share in SPLITS.values()])[:-1]
    return dict(zip(SPLITS, np.split(order, cuts), strict=True))


@functools.cache
def _digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The split's digits upscaled to (n, BANK, BANK), ink in [0, 1], and their labels (n,)."""
    images, labels = _load_digits()
    samples = _split_samples()[split]
    padded = np.pad(images[samples], ((0, 0), (MARGIN + 2,) * 2, (MARGIN + 2,) * 2))
    position = (np.arange(BANK, dtype=np.float32) + 0.5) / CELL - 0.5 + 2
    rows = _cubic(padded, position, axis=1)
    return np.clip(_cubic(rows, position, axis=2), 0, 1), labels[samples]


def _cubic(values: np.ndarray, position: np.ndarray, axis: int) -> np.ndarray:
    """Catmull-Rom interpolation along one axis at fractional positions, each at least one from either end."""
    first = np.floor(position).astype(np.int64) - 1
    t = (position - np.floor(position)).astype(np.float32)
    weights = (
        ((2 - t) * t - 1) * t / 2,
        ((3 * t - 5) * t * t + 2) / 2,
        ((4 - 3 * t) * t + 1) * t / 2,
        (t - 1) * t * t / 2,
    )
    shape = [1] * values.ndim
    shape[axis] = -1
    total: Any = None
    for tap, weight in enumerate(weights):
        term = values.take(first + tap, axis=axis) * weight.reshape(shape)
        total = term if total is None else np.add(total, term, out=total)
    return total


def _draw(keys, digits, canvas, mask) -> np.ndarray:
    """Paints scenes into canvas (B, 3, n, n); with a mask (B, 1, n, n), digits too. Returns labels (B,)."""
    bank, labels = digits
    numbers = _Numbers(keys)
    scale = np.float32(canvas.shape[-1] / FRAME)

    u = numbers.take(12)
    sample = (u[:, 0] * np.float32(len(labels))).astype(np.int64)
    size = _between(u[:, 1], *DIGIT_SIZE)
    centre = size[:, None] / 2 + (FRAME - size[:, None]) * u[:, 2:4]  # (B, 2) as x, y
    turn = _between(u[:, 4], -0.09, 0.09)  # tan of half the angle: up to 10 degrees
    base = _between(u[:, 5], 0.12, 0.88)  # luminance of the background
    # the digit goes to the far side of the background's luminance; near the middle, to either
    lighter = base + 0.16 * (u[:, 6] - 0.5) < 0.5
    contrast = _between(u[:, 7], 0.42, 0.62)
    digit_luma = np.clip(np.where(lighter, base + contrast, base - contrast), 0.02, 0.98)
    side = np.where(lighter, np.float32(1), np.float32(-1))
    hue = u[:, 8]

    _paint_background(canvas, numbers, base, hue, _between(u[:, 9], -0.22, 0.22))
    _paint_clutter(canvas, numbers, base, side, scale)
    _paint_fragments(canvas, numbers, bank, base, side, centre, scale)
    if mask is not None:
        colour = _colour(hue + 0.35 + 0.3 * u[:, 10], _between(u[:, 11], 0.15, 0.75), digit_luma)
        index, dx, dy = _window(centre[:, 0], centre[:, 1], DIGIT_WINDOW, canvas.shape[-1], scale)
        ink = _ink(bank, sample, dx, dy, turn, size)
        _blend(canvas, index, ink, colour)
        scene = np.arange(len(mask))[:, None, None]
        mask.reshape(-1)[index - scene * (2 * mask[0].size)] = ink > 0.5
    np.clip(canvas, 0, 1, out=canvas)
    return labels[sample]


def _colour(hue, saturation, luma) -> np.ndarray:
    """(...,) each, hue in turns -> (..., 3) RGB, not yet clipped."""
    hue = hue - np.floor(hue)
    pure = np.stack(
        [np.clip(np.abs(6 * hue - 3) - 1, 0, 1)] + [np.clip(2 - np.abs(6 * hue - centre), 0, 1) for centre in (2, 4)],
        axis=-1,
    )
    grey = _LUMA[0] * pure[..., 0] + _LUMA[1] * pure[..., 1] + _LUMA[2] * pure[..., 2]
    return luma[..., None] + saturation[..., None] * (pure - grey[..., None])


def _paint_background(canvas, numbers, base, hue, hue_step):
    """Smooth noise between two neighbouring hues, and finer noise in the luminance."""
    side = canvas.shape[-1]
    field = []
    for nodes in (COARSE, FINE):
        grid = numbers.take(nodes, nodes)
        position = 1 + (np.arange(side, dtype=np.float32) + 0.5) / side * (nodes - 3)
        field.append(_cubic(_cubic(grid, position, axis=1), position, axis=2))
    u = numbers.take(4)
    drift = _between(u[:, 0], -0.22, 0.22)
    one = _colour(hue, _between(u[:, 1], 0.08, 0.48), base - drift / 2)
    two = _colour(hue + hue_step, _between(u[:, 2], 0.08, 0.48), base + drift / 2)
    grain = _between(u[:, 3], 0.02, 0.12)[:, None, None] * (field[1] - 0.5)
    step = two - one
    for channel in range(3):
        np.multiply(field[0], step[:, channel, None, None], out=canvas[:, channel])
        canvas[:, channel] += one[:, channel, None, None]
        canvas[:, channel] += grain


def _paint_clutter(canvas, numbers, base, side, scale):
    """Strokes, blobs, rectangles and rings: rounded boxes, half-sizes (a, b), radius r, bent or hollow."""
    u = numbers.take(CLUTTER, 12)
    kind, p, q, r = u[..., 0], u[..., 1], u[..., 2], u[..., 3]
    stroke, blob, rectangle = kind < 0.5, (kind >= 0.5) & (kind < 0.65), (kind >= 0.65) & (kind < 0.85)
    choose = functools.partial(np.select, [stroke, blob, rectangle])
    f32 = np.float32
    zero = np.zeros_like(p)
    half_a = choose([_between(p, 2, 8.5), _between(p, 0, 3), _between(p, 2, 7)], _between(p, 0, 4))
    half_b = choose([zero, zero, _between(q, 1, 5)], _between(q, 0, 3))
    radius = choose([_between(r, 0.7, 1.7), _between(r, 2, 6), zero + f32(0.5)], _between(r, 2, 4.5))
    width = np.where(stroke | blob | rectangle, zero, f32(0.8))  # of a ring's line, half
    bend = np.where(stroke, _between(q, -0.06, 0.06), f32(0))
    softness = np.where(blob, _between(q, 1, 4), f32(1))
    opacity = np.where(u[..., 4] < 0.8, _between(u[..., 5], 0.45, 1), f32(0))
    # towards the digit's luminance only a little, away from it freely: the digit stays legible over anything
    lift = side[:, None] * _between(u[..., 6], -0.38, 0.2)
    colour = _colour(u[..., 7], _between(u[..., 8], 0.1, 0.8), np.clip(base[:, None] + lift, 0, 1))

    index, dx, dy = _window(FRAME * u[..., 9], FRAME * u[..., 10], CLUTTER_WINDOW, canvas.shape[-1], scale)
    cos, sin = _turn(_between(u[..., 11], -1, 1))
    x = cos[..., None, None] * dx + sin[..., None, None] * dy
    y = cos[..., None, None] * dy - sin[..., None, None] * dx
    y += bend[..., None, None] * (x * x)
    np.subtract(np.abs(x, out=x), half_a[..., None, None], out=x)
    np.subtract(np.abs(y, out=y), half_b[..., None, None], out=y)
    inside = np.minimum(np.maximum(x, y), 0)
    np.maximum(x, 0, out=x)
    np.maximum(y, 0, out=y)
    distance = np.sqrt(x * x + y * y)
    distance += inside
    distance -= radius[..., None, None]
    hollow = width[..., None, None]
    distance = np.where(hollow > 0, np.abs(distance) - hollow, distance)
    cover = np.clip(0.5 - distance * (scale / np.maximum(softness * scale, 1))[..., None, None], 0, 1)
    cover *= opacity[..., None, None]
    for shape in range(CLUTTER):
        _blend(canvas, index[:, shape], cover[:, shape], colour[:, shape])


def _paint_fragments(canvas, numbers, bank, base, side, centre, scale):
    """Pieces of other digits, a third of one across, as strong in contrast as the real one, never over it."""
    u = numbers.take(FRAGMENTS, 11)
    # on a torus, at least 22 from the digit's centre along one axis and anywhere along the other
    far = _between(u[..., 0], 22.0, FRAME - 22.0)
    free = FRAME * u[..., 1]
    along_x = u[..., 2] < 0.5
    x = centre[:, None, 0] + np.where(along_x, far, free)
    y = centre[:, None, 1] + np.where(along_x, free, far)
    x, y = x - FRAME * np.floor(x / FRAME), y - FRAME * np.floor(y / FRAME)

    sample = (u[..., 3] * np.float32(len(bank))).astype(np.int64)
    size = _between(u[..., 4], *DIGIT_SIZE)
    # which part of the digit shows: the piece's centre, as an offset in the digit's own box
    off = _between(u[..., 5:7], -0.32, 0.32) * size[..., None]
    luma = np.clip(base[:, None] + side[:, None] * _between(u[..., 7], 0.3, 0.6), 0.02, 0.98)
    colour = _colour(u[..., 8], _between(u[..., 9], 0.15, 0.75), luma)

    index, dx, dy = _window(x, y, FRAGMENT_WINDOW, canvas.shape[-1], scale)
    turn = _between(u[..., 10], -1, 1)
    ink = _ink(bank, sample, dx + off[..., 0, None, None], dy + off[..., 1, None, None], turn, size)
    edge = np.sqrt(dx * dx + dy * dy)
    ink *= np.clip((0.19 * size[..., None, None] - edge) * scale + 0.5, 0, 1)
    for piece in range(FRAGMENTS):
        _blend(canvas, index[:, piece], ink[:, piece], colour[:, piece])


def _turn(t):
    """Cosine and sine of the angle whose half has tangent t, without a transcendental function."""
    square = t * t
    return (1 - square) / (1 + square), 2 * t / (1 + square)


def _window(x, y, extent, side, scale):
    """A square window of the canvas around each centre (x, y), moved inside where it would stick out.

    x, y: (B, ...) in frame units. Returns, each (B, ..., w, w): index, flat index of the pixel's first
    channel in the batch of canvases (B, 3, n, n); dx, dy, frame units from the centre to the pixel's middle.
    """
    w = min(side, int(np.ceil(extent * scale)))
    steps = np.arange(w)
    axes = []
    for centre in (x, y):
        first = np.clip(np.floor(centre * scale - np.float32(w / 2 - 0.5)).astype(np.int64), 0, side - w)
        axes.append(first[..., None] + steps)
    columns, rows = axes
    dx = (columns.astype(np.float32) + np.float32(0.5)) / scale - x[..., None]
    dy = (rows.astype(np.float32) + np.float32(0.5)) / scale - y[..., None]
    batch = np.arange(len(x)).reshape(-1, *[1] * x.ndim) * (3 * side * side)
    index = (batch + rows * side)[..., :, None] + columns[..., None, :]
    return index, dx[..., None, :], dy[..., :, None]


def _ink(bank, sample, dx, dy, turn, size):
    """Coverage in [0, 1] of digit `sample`, `size` frame units tall, at offsets (dx, dy) from its centre."""
    cos, sin = _turn(turn)
    step = np.float32(8 * CELL) / size  # bank samples per frame unit
    cos, sin = (cos * step)[..., None, None], (sin * step)[..., None, None]
    middle = np.float32(BANK / 2 - 0.5)
    last = np.float32(BANK - 1.001)
    u = np.clip(cos * dx + sin * dy + middle, 0, last)
    v = np.clip(cos * dy - sin * dx + middle, 0, last)
    column, row = u.astype(np.int64), v.astype(np.int64)
    u -= column.astype(np.float32)
    v -= row.astype(np.float32)
    at = row * BANK
    at += column
    at += (sample * (BANK * BANK))[..., None, None]
    flat = bank.reshape(-1)
    top = flat[at]
    top += u * (flat[at + 1] - top)
    at += BANK
    bottom = flat[at]
    bottom += u * (flat[at + 1] - bottom)
    value = top + v * (bottom - top)
    t = np.clip((value - np.float32(0.28)) * np.float32(1 / 0.36), 0, 1)
    return t * t * (3 - 2 * t)


def _blend(canvas, index, cover, colour):
    """The pixels at `index` move by `cover` (B, w, w) towards `colour` (B, 3)."""
    plane = canvas.shape[-1] ** 2
    flat = canvas.reshape(-1)
    for channel in range(3):
        values = flat[channel * plane :]
        old = values[index]
        change = colour[:, channel, None, None] - old
        change *= cover
        old += change
        values[index] = old
