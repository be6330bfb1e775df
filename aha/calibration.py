"""Magnitudes that mean something: a map's values become the change of the target's probability that they explain.

Ranking losses fix the order of the pixels and leave their values free. The response R(r) to the share r of the most
important pixels says what the order is worth; its slope at a pixel's rank is that pixel's part of the whole. The order
stays, so every metric of the order does too.

>>> maps = explainer.attribute(images, scale="calibrated")  # Σ = f(I) − f(I0) expected, learnt while training
>>> maps = aha.calibration.calibrated(clf, explainer, images, maps, target, "measured")  # of the image itself
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels, references
from .checks import (
    MOST_POINTS,
    check_answers,
    check_choice,
    check_integer,
    check_maps,
    check_size,
    checked,
    checked_fields,
)
from .classifier import Classifier, check_classifier
from .kernels.messages import describe, is_plain, short
from .memory import per_pass
from .precision import confidence
from .protection import protected
from .ranks import rank_pixels

if TYPE_CHECKING:
    from .explainer import Explainer

SCALES = ("raw", "calibrated", "measured")
# shares of the pixels that `measure` removes and shows: curves bend where the first pixels go
MEASURED_AT = tuple((i / 10) ** 2 for i in range(1, 10))
REFERENCE = "blur"
# slope, in probability, that still parts pixels where the response is flat
FLAT = 1e-6
# neighbours among n pixels of value v are told apart in float32 if they spread over n·v·APART to either side
APART = 2.0**-22


@dataclass(frozen=True, eq=False)
class Response:
    """What the most important pixels are worth: R(r) = ½[(ins(r) − ins(0)) + (del(0) − del(r))], in probability.

    R(0) = 0, and R(1) = f(I) − f(I0) is what a map explains. One response, or one for every image.

    Attributes:
        shares: (n + 1,) float64, r from 0 to 1, increasing.
        values: (n + 1,) or (B, n + 1) float64, R.
    """

    shares: Tensor
    values: Tensor

    @checked_fields
    def __post_init__(self) -> None:
        for name in ("shares", "values"):
            # an expanded tensor would take its whole size; a response has some twenty numbers
            if getattr(self, name).numel() > MOST_POINTS * 2**10:
                raise ValueError(f"{name} is {describe(getattr(self, name))}: give at most {MOST_POINTS} points")
            object.__setattr__(self, name, torch.as_tensor(getattr(self, name)).detach().cpu().double())
        shares, values = self.shares, self.values
        if shares.ndim != 1 or len(shares) < 2 or values.ndim not in (1, 2) or values.shape[-1] != len(shares):
            raise ValueError(
                f"a response of shares {tuple(shares.shape)} and values {tuple(values.shape)}: give (n + 1,) shares of "
                "the pixels, n ≥ 1, and (n + 1,) or (B, n + 1) values"
            )
        if shares[0] != 0 or shares[-1] != 1 or not (shares.diff() > 0).all():
            raise ValueError(f"shares {shares.tolist()}: give increasing shares of the pixels from 0 to 1")
        if not torch.isfinite(values).all() or (values[..., 0] != 0).any():
            raise ValueError("values hold NaN, are infinite or do not start from 0: make it with Response.from_curves")

    @classmethod
    @checked
    def from_curves(cls, deletion: Tensor, insertion: Tensor, fractions: Tensor | Sequence[float]) -> Response:
        """The response behind two curves of the target's probability.

        Args:
            deletion, insertion: (S,) or (B, S), with the top pixels replaced, and with only them shown.
            fractions: (S,) shares of the pixels, increasing from 0 to 1.
        """
        deletion, insertion = torch.as_tensor(deletion).double(), torch.as_tensor(insertion).double()
        if deletion.shape != insertion.shape:
            came = f"{tuple(deletion.shape)} and {tuple(insertion.shape)}"
            raise ValueError(f"deletion and insertion are {came}: give two curves over the same fractions")
        gained, lost = insertion - insertion[..., :1], deletion[..., :1] - deletion
        return cls(torch.as_tensor(fractions), (gained + lost) / 2)

    def slopes(self) -> Tensor:
        """dR/dr between the shares, as it may be for a map whose highest pixels come first: never increasing.

        The least-squares fit to the measured slopes, weighted by the width of their pieces (pool adjacent violators):
        the slopes of the smallest concave curve that is nowhere below R. R(1) stays.

        Returns:
            (n,) or (B, n) float64.
        """
        widths = self.shares.diff()
        rows = self.values.view(-1, len(self.shares)).diff(dim=1)
        fitted = [_pieces(rises.tolist(), widths.tolist()) for rises in rows]
        whole = [[slope for slope, _, count in pieces for _ in range(count)] for pieces in fitted]
        return torch.tensor(whole, dtype=torch.float64).view(*self.values.shape[:-1], len(widths))

    @checked
    def apply(self, maps: Tensor) -> Tensor:
        """Give maps this response's magnitudes, and leave their order as it is, ties included.

        The pixel at rank i of N gets the mean of dR/dr over the ranks i/N … (i + 1)/N, over N: `slopes`, which fall
        within their pieces too, without a change of sign. Tied pixels share the mean of theirs. Where dR/dr is flat,
        values still fall from pixel to pixel, by little more than float32 can tell.

        Args:
            maps: (B,1,H,W) finite, any scale.

        Returns:
            (B,1,H,W) float32: probability per pixel, which sums to R(1).

        Raises:
            ValueError: for maps that are not finite or no maps, or of another number of images than the response.
        """
        if not is_plain(maps) or maps.ndim != 4 or maps.shape[1] != 1 or not maps.numel():
            raise ValueError(f"maps is {describe(maps)}: give (B, 1, H, W)")
        if self.values.ndim == 2 and len(self.values) != len(maps):
            raise ValueError(f"maps are of {len(maps)} images, the response of {len(self.values)}: give one for each")
        flat = check_maps(maps, maps).flatten(1)
        count = flat.shape[1]
        by_rank = torch.stack([_by_rank(self.shares, curve, count) for curve in self.values.view(-1, len(self.shares))])
        by_rank = by_rank.to(flat.device).expand(flat.shape)

        ordered, order = flat.sort(dim=1, descending=True)
        first = torch.ones_like(ordered, dtype=torch.bool)  # of its group of tied pixels
        first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        group = first.flatten().cumsum(dim=0) - 1
        means = torch.segment_reduce(by_rank.flatten(), "mean", lengths=torch.bincount(group))
        values = _falling(means[group].view_as(flat).float(), first)
        return torch.empty_like(flat).scatter_(1, order, values).view(maps.shape)

    def to_json(self) -> dict[str, list[float]]:
        """One response in JSON types."""
        if self.values.ndim != 1:
            raise ValueError(f"the response of {len(self.values)} images: only one that all share is kept")
        return {"shares": self.shares.tolist(), "values": self.values.tolist()}

    @classmethod
    def from_json(cls, kept: Any) -> Response:
        """What `to_json` made; ValueError in one line if it is none."""
        try:
            return cls(*(torch.tensor([float(x) for x in kept[name]], dtype=torch.float64) for name in _KEPT))
        except (TypeError, KeyError, IndexError, RuntimeError) as error:
            raise ValueError(f"{short(kept)} is no response: give lists of shares and values") from error


_KEPT = ("shares", "values")


class MeanCurves:
    """The mean of deletion and insertion curves over many images, seen in any order: what a response is learnt from."""

    def __init__(self) -> None:
        self.total: Tensor | None = None  # [2, S] float64
        self.images = 0.0

    def add(self, curves: Tensor) -> None:
        """Take in curves (B, 2, S), deletion and insertion, of ``B`` images over evenly spaced fractions of [0, 1]."""
        # to the CPU first: not every accelerator has float64
        found = curves.detach().float().cpu().double().sum(dim=0)
        self.total = found if self.total is None else self.total + found
        self.images += len(curves)

    def extend(self, other: MeanCurves) -> None:
        """Take in all that ``other`` has seen."""
        if other.total is not None:
            self.total = other.total if self.total is None else self.total + other.total
            self.images += other.images

    def response(self) -> Response | None:
        """Of the mean curves; None if there were no images."""
        if self.total is None:
            return None
        deletion, insertion = self.total / self.images
        return Response.from_curves(deletion, insertion, torch.linspace(0, 1, len(deletion), dtype=torch.float64))

    def state_dict(self) -> dict[str, Any]:
        """All that it knows, for a checkpoint."""
        return {"total": self.total, "images": self.images}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` kept."""
        self.total, self.images = state["total"], state["images"]


@checked
def learnt(explainer: Explainer) -> Response | None:
    """The mean response that ``explainer`` was trained with; None where it knows none."""
    if not isinstance(getattr(explainer, "settings", None), dict):
        raise ValueError(f"explainer is {describe(explainer)}: give an aha.Explainer")
    kept = explainer.settings.get("response")
    return None if kept is None else Response.from_json(kept)


@checked
def calibrated(
    classifier: Classifier,
    explainer: Explainer,
    images: Tensor,
    maps: Tensor,
    target: Tensor | Sequence[int] | int | None = None,
    scale: str = "calibrated",
    internal_batch_size: int | None = None,
) -> Tensor:
    """Maps on another scale, in the same order.

    Args:
        classifier: what the maps explain.
        explainer: what made the maps; it knows the response of "calibrated".
        images: (B,C,H,W) RGB in [0,1].
        maps: (B,1,H,W) finite.
        target: class per image, one int for all, or None: the classifier's prediction.
        scale: "raw" as they are; "calibrated" by the response that the explainer learnt while training, the same for
            all images, without a pass; "measured" by that of each image, 20 forward passes.
        internal_batch_size: perturbed images per pass, ≥ 2; default: `aha.memory.per_pass`.

    Returns:
        (B,1,H,W) float32; but for "raw" in units of probability, see `Response.apply`.

    Raises:
        ValueError: in one line, for arguments that do not fit, and for "calibrated" where no response is known.
    """
    if check_scale(scale, explainer) == "raw":
        return maps
    if scale == "measured":
        return measure(classifier, images, maps, target, internal_batch_size).apply(maps)
    response = learnt(explainer)
    assert response is not None
    return response.apply(maps)


@checked
def best_scale(explainer: Explainer) -> str:
    """The scale that costs no pass: "calibrated" where ``explainer`` knows its response, else "raw"."""
    return "raw" if learnt(explainer) is None else "calibrated"


@checked
def check_scale(scale: str, explainer: Explainer) -> str:
    """Return ``scale`` if ``explainer`` can give its maps on it, else ValueError."""
    check_choice("scale", scale, SCALES)
    if scale == "calibrated" and learnt(explainer) is None:
        raise ValueError(
            'scale="calibrated" needs the response that training for the ranking learns, and this explainer has none: '
            'take scale="measured", or train it again'
        )
    return scale


@checked
def measure(
    classifier: Classifier,
    images: Tensor,
    maps: Tensor,
    target: Tensor | Sequence[int] | int | None = None,
    internal_batch_size: int | None = None,
) -> Response:
    """The response of every image to its own map: deletion to a blurred copy and insertion from it, `MEASURED_AT`.

    20 forward passes per image (`passes`), and one where the target is to be found.

    Args:
        images: (B,C,H,W) RGB in [0,1].
        maps: (B,1,H,W) finite attributions.
        target: class per image, one int for all, or None: the classifier's prediction.
        internal_batch_size: perturbed images per pass, ≥ 2; default: `aha.memory.per_pass`.

    Raises:
        ValueError: in one line, for arguments that do not fit, and where the classifier is not finite.
    """
    size = per_pass(check_classifier(classifier).device, internal_batch_size, most=64)
    check_integer("internal_batch_size", size, 2)
    images = classifier.check(images).detach()
    ranks = rank_pixels(check_maps(maps, images).view(len(images), *images.shape[-2:]))
    count = ranks[0].numel()
    inner = _inner(count)
    with protected(classifier), torch.no_grad():
        target = classifier.resolve_target(images, target, size)
        reference = references.make(REFERENCE, images, classifier.mean_colour)
        ends = torch.stack([_answers(classifier, side, target, size) for side in (images, reference)])
        curves = images.new_empty(2, len(images), len(inner), dtype=torch.float32)
        at_once = max(1, size // 2)
        for row in range(len(images)):
            of = slice(row, row + 1)
            for start in range(0, len(inner), at_once):
                steps = inner[start : start + at_once]
                pair = kernels.perturb_by_rank(
                    images[of], reference[of], ranks[of], steps, classifier.mean, classifier.std, classifier.dtype
                )
                logits = classifier.forward_normalized(torch.cat([side.flatten(0, 1) for side in pair]))
                found = confidence(logits, target[of].expand(len(logits))).float()
                curves[:, row, start : start + len(steps)] = found.view(2, len(steps))
    original, blank = ends[:, :, None]
    deletion = torch.cat([original, curves[0], blank], dim=1)
    insertion = torch.cat([blank, curves[1], original], dim=1)
    check_answers(torch.stack([deletion, insertion], dim=1), f"{classifier.name}, for perturbed images,")
    shares = torch.tensor([0, *inner, count], dtype=torch.float64) / count
    return Response.from_curves(deletion, insertion, shares)


@checked
def passes(height: int, width: int) -> int:
    """Forward passes of `measure` for an image of that size whose target is known."""
    height, width = check_size("height and width", (height, width))
    return 2 * len(_inner(height * width)) + 2


def _inner(count: int) -> list[int]:
    """Numbers of the ``count`` pixels at `MEASURED_AT`, each once."""
    return sorted({round(share * count) for share in MEASURED_AT} - {0, count})


def _answers(classifier: Classifier, images: Tensor, target: Tensor, size: int) -> Tensor:
    """Probability (B,) of the target in ``images``."""
    parts = zip(images.split(size), target.split(size), strict=True)
    return torch.cat([confidence(classifier(part), classes).float() for part, classes in parts])


def _pieces(
    rises: Iterable[float], widths: Iterable[float], pixels: int | None = None
) -> list[tuple[float, float, int]]:
    """Pool neighbours until slopes fall: (slope, width, how many were pooled) of every piece that is left.

    With ``pixels``, widths are in pixels of so many: until slopes fall so far that each piece can fall by itself.
    """
    found: list[tuple[float, float, int]] = []  # rise, width, count
    for rise, width in zip(rises, widths, strict=True):
        piece = (rise, width, 1)
        while found and _too_close(found[-1], piece, pixels):
            piece = tuple(a + b for a, b in zip(found.pop(), piece, strict=True))  # type: ignore[assignment]
        found.append(piece)
    return [(rise / width, width, count) for rise, width, count in found]


def _too_close(before: tuple[float, float, int], after: tuple[float, float, int], pixels: int | None) -> bool:
    high, low = before[0] / before[1], after[0] / after[1]
    if pixels is None:
        return high < low
    needed = max(_fall(high, before[1], pixels), _fall(low, after[1], pixels))
    return high - low <= 2 * needed


def _fall(slope: float, width: float, pixels: int) -> float:
    """How far above and below its mean a piece of ``width`` pixels must reach for all of them to differ in float32."""
    return max(abs(slope) * width * APART, FLAT / pixels)


def _by_rank(shares: Tensor, curve: Tensor, pixels: int) -> Tensor:
    """The value (pixels,) float64 of every rank, strictly falling; a piece of the response sums to what it rises.

    Within a piece of the isotonic fit values fall linearly: towards both neighbours by half of the smaller step to them
    (a monotone reconstruction of the second order), and not beyond 0, so that a piece keeps its sign.
    """
    # pieces end between two pixels; where several shares round to the same pixel the last one counts
    ends = {round(share * pixels): value for share, value in zip(shares.tolist(), curve.tolist(), strict=True)}
    ends = {0: 0.0, **{place: value for place, value in ends.items() if place}}
    places, values = torch.tensor(list(ends)), torch.tensor(list(ends.values()), dtype=torch.float64)
    pieces = _pieces(values.diff().tolist(), places.diff().tolist(), pixels)
    slopes = torch.tensor([slope for slope, _, _ in pieces], dtype=torch.float64)
    widths = torch.tensor([width for _, width, _ in pieces], dtype=torch.int64)
    steps = -slopes.diff() / 2
    least = torch.tensor([_fall(slope, width, pixels) for slope, width, _ in pieces], dtype=torch.float64)
    if len(pieces) == 1:
        falls = least
    else:
        # the first and the last piece have one neighbour
        nearest = torch.minimum(F.pad(steps, (1, 0), value=torch.inf), F.pad(steps, (0, 1), value=torch.inf))
        falls = torch.maximum(torch.minimum(nearest, slopes.abs()), least)
    slope, fall, width = (part.repeat_interleave(widths) for part in (slopes, falls, widths))
    place = torch.arange(pixels) - (widths.cumsum(dim=0) - widths).repeat_interleave(widths)
    return slope + fall * (1 - (2 * place + 1) / width)


def _falling(values: Tensor, first: Tensor) -> Tensor:
    """Float32 rows (B, N) that fall at every ``first`` pixel of a group and nowhere else.

    They do already, but for images of many millions of pixels: float32 has 2²³ numbers from a value to its double.
    """
    if (values[:, 1:] < values[:, :-1]).equal(first[:, 1:]):
        return values
    # floats of one sign are ordered as their bits: count them from 0, and take the next one down where two are equal
    bits = values.view(torch.int32).long()
    places = torch.where(bits < 0, -(2**31) - bits, bits)
    group = first.cumsum(dim=1)
    places = (places + group).cummin(dim=1).values - group
    return torch.where(places < 0, -(2**31) - places, places).int().view(torch.float32)
