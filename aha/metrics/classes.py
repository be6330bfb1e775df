"""The metrics as torchmetrics classes: what `Suite` measures of every image, kept and averaged over processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..checks import check_maps, check_number
from ..classifier import Classifier
from ..protection import protected
from . import catalog, protocols
from .localization import Located, check_masks
from .perturbed import Endpoints
from .protocols import Protocol
from .state import PerImage, check_index, mean, measured
from .suite import Named, Suite, arranged, scored


def _directions(*families: str) -> dict[str, bool]:
    return {name: catalog.get(name).higher_is_better for family in families for name in catalog.names(family)}


class Averaged(PerImage):
    """Scores of every image, and their means over all processes; base of the classes of this package.

    Attributes:
        directions: name of every score that the class may measure → whether higher is better.
        names: those that it measures.
        layout: (metric, reference) of every score of a row; the reference is "" where there is none.
        drawn: (reference, curve) of every curve that follows them.
    """

    directions: ClassVar[dict[str, bool]] = {}
    names: tuple[str, ...]
    layout: tuple[tuple[str, str], ...]
    drawn: tuple[tuple[str, str], ...] = ()

    def per_image(self) -> dict[str, Any]:
        """(N,) scores of each image this process has seen instead of means, NaN where it takes no part.

        In the order of the index, without repetitions, where `update` was given one; else as they came.
        """
        values, by_reference = self._arranged()
        return {**values, "references": by_reference} if by_reference else dict(values)

    def compute(self) -> dict[str, Any]:
        """Means over the images of all processes.

        Returns:
            name → mean over the references, "references" → {reference: {name: …}} where there are any, "images" that
            took part, "excluded".
        """
        values, by_reference = self._arranged()
        taking = measured(values)
        count = int(taking.sum())
        if not count:
            raise RuntimeError(self._nothing(len(taking)))
        found: dict[str, Any] = {name: mean(value) for name, value in values.items()}
        if by_reference:
            found["references"] = {
                key: {name: mean(value) for name, value in named.items()} for key, named in by_reference.items()
            }
        return {**found, "images": count, "excluded": len(taking) - count}

    def _arranged(self) -> tuple[dict[str, Tensor], Named]:
        scores: Named = {}
        for (name, reference), column in zip(self.layout, self.seen().T, strict=False):
            scores.setdefault(name, {})[reference] = column
        return arranged(scores, self.names)

    def _nothing(self, images: int) -> str:
        """What is wrong where none of ``images`` takes part."""
        raise NotImplementedError


class ByReference(Averaged):
    """Metrics that perturb images towards reference images: those of a protocol that the class knows.

    Images that the protocol leaves out are counted.

    Args:
        clf: the classifier that the maps explain.
        protocol: a preset's name or a `Protocol`; None is the class's own.
        internal_batch_size: perturbed images in one forward pass, ≥ 2; default: `aha.memory.per_pass`.

    Raises:
        ValueError: for a protocol that lists none of the metrics.
    """

    default: ClassVar[str] = "aha"
    clf: Classifier

    def __init__(
        self,
        clf: Classifier,
        protocol: str | Protocol | None = None,
        internal_batch_size: int | None = None,
        **options: Any,
    ):
        super().__init__(**options)
        self.protocol = protocols.get(self.default if protocol is None else protocol)
        self.names = tuple(name for name in self.protocol.metrics if name in self.directions)
        if not self.names:
            raise ValueError(
                f"protocol {self.protocol.name!r} measures {', '.join(self.protocol.metrics)}, "
                f"{type(self).__name__} {', '.join(self.directions)}: choose another protocol, or aha.metrics.Suite"
            )
        rows = dataclasses.replace(self.protocol, metrics=self.names).rows
        # differences are made of what is kept
        self._suite = Suite(
            clf, dataclasses.replace(self.protocol, metrics=tuple(row.key for row in rows)), internal_batch_size
        )
        # past nn.Module, which would put the classifier's weights into the metric's state_dict
        object.__setattr__(self, "clf", clf)
        self.internal_batch_size = self._suite.internal_batch_size
        self.layout = tuple((row.key, name) for row in rows for name in self.protocol.references_of(row))
        self.drawn = tuple(
            (name, curve) for row in rows for curve in row.curves for name in self.protocol.references_of(row)
        )

    def update(
        self,
        images: Tensor,
        maps: Tensor,
        target: Tensor | Sequence[int] | int | None = None,
        ends: Endpoints | None = None,
        index: Tensor | Sequence[int] | None = None,
        labels: Tensor | Sequence[int] | None = None,
    ) -> None:
        """Measure attributions ``maps`` (B,1,H,W) of ``images`` (B,C,H,W) in [0,1].

        Args:
            target: (B,) explained classes, one class for all, or None for the predicted class.
            ends: what `endpoints` returned for the same images and protocol; it carries the target and the labels.
            index: (B,) positions in the data set. With it, results do not depend on the order of the updates nor on
                the number of processes, and an image that comes twice counts once.
            labels: (B,) ground-truth classes, −1 where unknown, for protocols that need them.

        Raises:
            ValueError: for images, maps or a target that do not fit, before any perturbed image is computed.
        """
        images = self.clf.check(images).detach()
        maps = check_maps(maps, images)
        if index is not None:
            index = check_index(index, len(images))
        with protected(self.clf), torch.no_grad():
            scores = self._suite.measure(self._batch(images, target, ends, labels), maps)
            columns = [scores.by_reference[reference][name][:, None] for name, reference in self.layout]
            columns += [scores.curves[reference][curve] for reference, curve in self.drawn]
            self.keep(torch.cat(columns, dim=1), index)

    def _batch(
        self,
        images: Tensor,
        target: Tensor | Sequence[int] | int | None,
        ends: Endpoints | None,
        labels: Tensor | Sequence[int] | None,
    ) -> Endpoints:
        if ends is None:
            return self._suite.begin(images, target, labels)
        if target is not None or labels is not None:
            raise ValueError("target and ends are both given: the ends carry their target and labels, leave it out")
        expected = (len(self.protocol.references), *images.shape)
        if tuple(ends.references.shape) != expected:
            raise ValueError(
                f"ends are of reference images {tuple(ends.references.shape)}: give those of these images "
                f"and of protocol {self.protocol.name!r}, {expected}"
            )
        return ends._replace(images=images)

    def curves(self) -> Named:
        """Mean curves of the images this process has seen: reference → name → (S,) over the fractions.

        Deletion, positive and negative run over the removed fraction, insertion over the inserted one.
        """
        found: Named = {}
        if self.drawn:
            kept = self.seen()[:, len(self.layout) :].unflatten(1, (len(self.drawn), -1))
            for (reference, name), curve in zip(self.drawn, kept.unbind(1), strict=True):
                found.setdefault(reference, {})[name] = curve.double().nanmean(dim=0).float()
        return found

    def _nothing(self, images: int) -> str:
        return f"none of {images} images takes part in protocol {self.protocol.name!r}: give others"


class DeletionInsertion(ByReference):
    """How faithful maps are, by what the classifier says while their most important pixels go or come.

    Deletion ↓ and insertion ↑ are areas under the softmax probability of the explained class, positive ↓ and
    negative ↑ perturbation under its top-1 accuracy, over the replaced fraction of the pixels, in [0, 1]; differences ↑
    in [−1, 1]. A protocol may ask for some of them, for the accuracy of the label (preset "chefer"), or for curves that
    are monotone (preset "mda").

    >>> metric = DeletionInsertion(clf)
    >>> metric.update(images, maps)
    >>> metric.compute()["ins_minus_del"]

    Arguments as in `ByReference`; the protocol is "aha" by default.
    """

    higher_is_better = True  # of the headline, ins_minus_del; see `directions`
    directions: ClassVar[dict[str, bool]] = _directions("curves", "accuracy")


class ConfidenceChange(ByReference):
    """How much confidence is left when an image is shown through its map: ADP ↓ and PIC ↑ in percent.

    With y = f_t(I) and o = f_t(x'), x' as in `Probe.shown`: ADP = 100·mean(max(0, y − o)/y), PIC = 100·mean(o > y).
    Unlike deletion and insertion both depend on the map's values, not only on their order.

    Arguments as in `ByReference`; the protocol is "aha" by default.
    """

    higher_is_better = True  # of pic; see `directions`
    directions: ClassVar[dict[str, bool]] = _directions("confidence")


class MagnitudeAlignment(ByReference):
    """Whether magnitudes of a map match the response to its pixels: MAS deletion ↓, insertion ↑, difference ↑.

    The response MR is `monotone_response` of the curve; the density DR is the share of Σ|A| among the pixels inserted
    so far, or among those not yet deleted. The score is the area by the trapezoid of `curves.aligned`. A map that is 0
    everywhere spreads its density evenly.

    Arguments as in `ByReference`; the protocol is "mas" by default.
    """

    higher_is_better = True  # of mas_ins_minus_del; see `directions`
    directions: ClassVar[dict[str, bool]] = _directions("alignment")
    default = "mas"


class Monotonicity(ByReference):
    """Whether confidence rises with every pixel that comes back: Spearman's ρ ↑ in [−1, 1] of inserted pixels with it.

    1: every step raises it; −1: every step lowers it. Tied confidences share their mean rank; where all are tied there
    is no trend and ρ is 0.

    Arguments as in `ByReference`; the protocol is "monotonicity" by default.
    """

    higher_is_better = True
    directions: ClassVar[dict[str, bool]] = _directions("monotonicity")
    default = "monotonicity"


class Localization(Averaged):
    """Whether maps lie on the object: pointing game ↑, IoU ↑, mAP ↑ and F1 ↑ against binary masks, all in [0, 1].

    - pointing_game: a mask pixel lies within ``tolerance`` (Euclidean) of the map's maximum; of several
      maxima the first in reading order counts.
    - iou, f1: the pixels above the map's own mean against the mask; the threshold never sees the ground
      truth. A constant map marks nothing.
    - iou_oracle, f1_oracle: the same at the best threshold of every image, picked from the mask: upper bounds, to
      be reported as such.
    - map: average precision of the pixels ranked by the map, tied pixels as one group, averaged over images.

    Images whose mask is empty are left out and counted.

    Args:
        tolerance: in pixels; None is 15 at a shorter side of 224, scaled with the image.
    """

    higher_is_better = True
    directions: ClassVar[dict[str, bool]] = _directions("localisation")

    def __init__(self, tolerance: float | None = None, **options: Any):
        super().__init__(**options)
        if tolerance is not None:
            check_number("tolerance", tolerance, 0)  # in pixels
        self.tolerance = tolerance
        self.names = tuple(self.directions)
        self.layout = tuple((name, "") for name in self.names)

    def update(self, maps: Tensor, masks: Tensor, index: Tensor | Sequence[int] | None = None) -> None:
        """Compare ``maps`` with ``masks``, both (B,1,H,W) or (B,H,W); masks are boolean or 0 and 1.

        Args:
            index: (B,) positions in the data set, as in `ByReference.update`.

        Raises:
            ValueError: for shapes that differ, maps that are not finite, masks that are not binary.
        """
        masks = check_masks(masks)
        maps = check_maps(maps, masks[:, None])
        if index is not None:
            index = check_index(index, len(maps))
        with torch.inference_mode(False), torch.no_grad():
            located = Located(maps, masks, self.tolerance)
            self.keep(torch.stack([scored(catalog.get(name), located)[""] for name in self.names], dim=1), index)

    def _nothing(self, images: int) -> str:
        return f"all {images} masks are empty: localisation needs at least one with pixels"
