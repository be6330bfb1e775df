"""Evaluation protocols: the settings that decide which published numbers a measurement compares with."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import FLOATS, INTEGERS, MOST_POINTS, MOST_SIDE, check_integer, check_size, checked, checked_fields
from ..data import Preprocessing
from ..kernels.messages import describe, short
from ..references import MEASURED, REFERENCES
from . import catalog
from .catalog import Metric


class Cost(NamedTuple):
    """Forward passes that a protocol takes.

    Attributes:
        shared: per image that takes part, for all its maps together: the image, its references and the blurs tried.
        per_map: per map, of perturbed images.
    """

    shared: float
    per_map: int


@dataclass(frozen=True)
class Protocol:
    """What is measured, on which images, and how the curves are made.

    Attributes:
        name: for tables and files.
        points: S ≥ 2 evenly spaced fractions of the pixels, both ends of ``span`` included; None takes one row of
            pixels per step, H + 1 points.
        references: names out of `aha.references.MEASURED`; scores are averaged over them.
        metrics: what is reported, keys of `aha.metrics.catalog`.
        deletion, insertion: those of the references that serve as the replacement while deleting, and as the start
            while inserting; None is all of them.
        span: first and last fraction of the pixels. Areas are divided by its length: a mean height, whatever the span.
        monotone: curves of confidence are scaled so that f(I0) is 0 and f(I) is 1, clipped to [0, 1] and made
            monotone before the area. They do not compare with areas of plain curves.
        scored: the class that confidence and accuracy speak of: the explained "target", or the ground-truth "label".
        confidence: only images that are classified right with at least this top-1 probability take part; None: all.
        per_class: the cap of `select`.
        preprocessing: how images of a folder are resized and cropped; whoever makes the data set obeys it.
        about: paper, steps, references, directions and what the figures compare with.
    """

    name: str
    points: int | None = 21
    references: tuple[str, ...] = REFERENCES
    metrics: tuple[str, ...] = tuple(
        name for family in ("curves", "accuracy", "confidence") for name in catalog.names(family)
    )
    deletion: tuple[str, ...] | None = None
    insertion: tuple[str, ...] | None = None
    span: tuple[float, float] = (0.0, 1.0)
    monotone: bool = False
    scored: str = "target"
    confidence: float | None = None
    per_class: int | None = None
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    about: str = field(default="", compare=False, repr=False)

    @checked_fields
    def __post_init__(self) -> None:
        if self.points is not None and not 2 <= self.points <= MOST_POINTS:
            most = f", and at most {MOST_POINTS}"
            raise ValueError(f"points={self.points}: give at least 2, the two ends of the curve{most}")
        known = [key for key, metric in catalog.METRICS.items() if metric.measure or metric.difference]
        if not self.metrics or not set(known).issuperset(self.metrics):
            raise ValueError(f"metrics={self.metrics}: give one or more of {', '.join(known)}")
        perturbed = not self.reads.isdisjoint(("deleted", "inserted", "shown"))
        if not set(MEASURED).issuperset(self.references) or (perturbed and not self.references):
            raise ValueError(f"references={self.references}: give one or more of {', '.join(MEASURED)}")
        for side, read in (("deletion", "deleted"), ("insertion", "inserted")):
            if not set(self.references).issuperset(getattr(self, side) or ()):
                raise ValueError(f"{side}={getattr(self, side)}: give names out of references={self.references}")
            if getattr(self, side) is not None and not getattr(self, side) and read in self.reads:
                raise ValueError(f"{side}=(): give a reference or more, metrics={self.metrics} measure that side")
        low, high = self.span
        if not 0 <= low < high <= 1:
            raise ValueError(f"span={self.span}: give two fractions in [0, 1], the smaller one first")
        if (self.monotone or "ends" in self.reads) and self.span != (0, 1):
            raise ValueError(f"span={self.span}: scaled curves need both ends, give (0, 1)")
        if self.scored not in ("target", "label"):
            raise ValueError(f"scored={self.scored!r}: choose target or label")

    @property
    def rows(self) -> tuple[Metric, ...]:
        """What is measured, in the order of the catalogue: the metrics, and both sides of differences."""
        wanted = {part for name in self.metrics for part in catalog.METRICS[name].difference or (name,)}
        return tuple(metric for key, metric in catalog.METRICS.items() if key in wanted)

    @property
    def reads(self) -> frozenset[str]:
        """What the metrics take of a `Probe`, see `aha.metrics.catalog.Metric`."""
        return frozenset(name for metric in self.rows for name in metric.reads)

    @checked
    def references_of(self, metric: Metric) -> tuple[str, ...]:
        """References that a metric has a value for, () where it needs none."""
        if "deleted" in metric.reads:
            return self.deleting
        if "inserted" in metric.reads:
            return self.inserting
        return self.references if "shown" in metric.reads else ()

    @property
    def deleting(self) -> tuple[str, ...]:
        """References that pixels are replaced by while deleting, in the order of ``references``."""
        return _among(self.references, self.deletion)

    @property
    def inserting(self) -> tuple[str, ...]:
        """References that insertion starts from, in the order of ``references``."""
        return _among(self.references, self.insertion)

    @property
    def needs(self) -> frozenset[str]:
        """What must come with the images: "label", "mask", both or none."""
        label = self.scored == "label" or self.confidence is not None
        return frozenset(name for name, needed in (("label", label), ("mask", "masks" in self.reads)) if needed)

    @checked
    def counts(self, height: int, width: int) -> list[int]:
        """Numbers of pixels at the S points of the curves of an image."""
        height, width = check_size("height and width", (height, width))
        return pixel_counts(height * width, height + 1 if self.points is None else self.points, self.span)

    @checked
    def passes(self, size: int | tuple[int, int], blurs: float = 1) -> Cost:
        """Forward passes for images of ``size``, as `aha.attributors.count_passes` counts those of `Suite`.

        Args:
            size: (H, W) in pixels, or one number for both.
            blurs: that "adaptive_blur" tries, 1 to 36; a mean over images where it differs.
        """
        height, width = check_size("size", size)
        shared = 1 + (len(self.references) if self.span[1] == 1 else 0)
        inner = len({count for count in self.counts(height, width) if 0 < count < height * width})
        served = {"deleted": self.deleting, "inserted": self.inserting}
        curves = sum(len(references) for side, references in served.items() if side in self.reads)
        return Cost(
            shared + (blurs if "adaptive_blur" in self.references else 0),
            inner * curves + (len(self.references) if "shown" in self.reads else 0),
        )

    @checked
    def takes_part(self, labels: Tensor, predicted: Tensor, confidence: Tensor) -> Tensor:
        """Which images the protocol measures, each judged by itself: (N,) bool.

        Args:
            labels: (N,) ground-truth classes, −1 where unknown.
            predicted, confidence: (N,) top-1 classes and their softmax probability.
        """
        for name, value in (("labels", labels), ("predicted", predicted), ("confidence", confidence)):
            if value.ndim != 1 or value.shape != labels.shape:
                raise ValueError(f"{name} is {describe(value)}: give one number per image, all three (N,)")
            if value.is_floating_point() != (name == "confidence") or value.dtype not in (*FLOATS, *INTEGERS):
                kind = "a probability" if name == "confidence" else "a class"
                raise ValueError(f"{name} is {describe(value)}: give {kind} per image")
        chosen = labels >= 0 if self.scored == "label" else torch.ones_like(labels, dtype=torch.bool)
        if self.confidence is not None:
            chosen = chosen & (labels == predicted) & (confidence >= self.confidence)
        return chosen

    @checked
    def select(self, labels: Tensor, predicted: Tensor, confidence: Tensor) -> Tensor:
        """Which images of a data set count, (N,) bool: `takes_part`, and of each class the first ``per_class``.

        For the (N,) facts of a whole data set in the order of its index: a batch by itself does not know how many of
        a class came before.
        """
        chosen = self.takes_part(labels, predicted, confidence)
        if self.per_class is None:
            return chosen
        classes, order = labels.masked_fill(~chosen, -2).sort(stable=True)
        place = torch.arange(len(classes), device=classes.device)
        first = torch.searchsorted(classes, classes)
        return chosen & torch.empty_like(chosen).scatter_(0, order, place - first < self.per_class)


_AHA = Protocol(
    "aha",
    about="AHA (arXiv 2604.05819) §4: 21 points in steps of 5 % of the pixels, stable order; black, mean colour and "
    "blur (kernel 37, σ 37), averaged; softmax in float32, trapezoid. Deletion, positive and ADP ↓, the others ↑. "
    "Positive and negative perturbation count the explained class as right. Compares with the tables of that "
    "paper.",
)
_RISE = Protocol(
    "rise",
    points=None,
    references=("zero", "blur11"),
    metrics=("deletion", "insertion", "ins_minus_del"),
    deletion=("zero",),
    insertion=("blur11",),
    about="RISE (Petsiuk et al., BMVC 2018): one row of pixels per step (224 at 224 px: 225 points), both ends; "
    "deletion ↓ to zeros after normalisation, insertion ↑ from a blur of normalised pixels (11×11, the response of a "
    "Gaussian filter of σ 5 to an impulse; zeros beyond the border), softmax, trapezoid. Compares with RISE and papers "
    "that follow its evaluation.",
)
_CHEFER = Protocol(
    "chefer",
    points=9,
    references=("black",),
    metrics=("positive", "negative", "neg_minus_pos"),
    span=(0.1, 0.9),
    scored="label",
    about="Chefer et al. (CVPR 2021) §4: 10 % … 90 % of the pixels removed, most important first (positive ↓) or least "
    "important first (negative ↑); accuracy against the ground-truth label, images without one left out. Decided "
    "here: black is pixel value 0 in [0, 1]; the area is the mean height of the trapezoid over 0.1 … 0.9, which "
    "times 0.8 is the plain trapezoid. Compares with papers that follow its perturbation test, up to that factor.",
)
_MDA = Protocol(
    "mda",
    points=225,
    references=("zero", "adaptive_blur"),
    metrics=("deletion", "insertion", "ins_minus_del"),
    deletion=("zero",),
    insertion=("adaptive_blur",),
    monotone=True,
    confidence=0.6,
    per_class=5,
    preprocessing=Preprocessing(crop_pct=1.0, interpolation="bilinear"),
    about="MDA (Walker et al., ICLR 2025): shorter side of images to the input size, bilinear, then the centre; those "
    "classified right with p ≥ 0.6, at most 5 of a class (`select`); 225 points; deletion ↓ to zeros after "
    "normalisation, insertion ↑ from a blur per image, as RISE's with kernel = σ = 31 growing by 2 until p ≤ 1 %, "
    "dropped past 101. Curves are scaled, clipped and made monotone before the area: they "
    "compare with the paper's own table and with no other protocol. Decided here: scaled by f(I) and f(I0); where "
    "f(I) ≤ f(I0) the value is NaN.",
)
PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        _AHA,
        _RISE,
        _CHEFER,
        _MDA,
        replace(
            _MDA,
            name="mas",
            metrics=(*catalog.names("alignment"), *_MDA.metrics),
            about="MAS (Walker et al., 2024), on the images, steps and references of the preset mda as in the MDA "
            "paper: the monotone response MR punished by |MR − DR|, DR the share of |A| spent so far; deletion ↓, "
            "insertion ↑. The areas of mda come along from the same perturbed images. Compares with that paper's "
            "table.",
        ),
        Protocol(
            "monotonicity",
            metrics=("monotonicity",),
            deletion=(),
            about="Spearman's ρ ↑ of the number of inserted pixels, most important first, with the confidence; steps "
            "and references of the preset aha (decided here). Compares within this library.",
        ),
        Protocol(
            "localisation",
            references=(),
            metrics=catalog.names("localisation"),
            about="Agreement with a mask, all ↑: pointing game (15 px at 224), average precision, IoU and F1 at the "
            "map's mean. *_oracle take the best threshold of every image from its mask: upper bounds, not "
            "comparable with the others. No perturbation. Compares where masks and tolerance are the same.",
        ),
    )
}


@checked
def get(protocol: str | Protocol) -> Protocol:
    """The preset of that name; a `Protocol` is returned as it is. ValueError for an unknown name."""
    if isinstance(protocol, Protocol):
        return protocol
    if protocol not in PROTOCOLS:
        raise ValueError(
            f"protocol {short(protocol)} is not known: choose one of {', '.join(PROTOCOLS)} or pass a Protocol"
        )
    return PROTOCOLS[protocol]


@checked
def pixel_counts(pixels: int, points: int, span: tuple[float, float] = (0.0, 1.0)) -> list[int]:
    """Numbers of pixels at ``points`` evenly spaced fractions of ``span``, rounded to whole pixels."""
    pixels, points = check_integer("pixels", pixels, 1, MOST_SIDE**2), check_integer("points", points, 2, MOST_POINTS)
    low, high = span
    if not 0 <= low < high <= 1:
        raise ValueError(f"span={span}: give two fractions in [0, 1], the smaller one first")
    return [round(low * pixels + i * pixels * (high - low) / (points - 1)) for i in range(points)]


def _among(references: tuple[str, ...], some: tuple[str, ...] | None) -> tuple[str, ...]:
    return references if some is None else tuple(name for name in references if name in some)
