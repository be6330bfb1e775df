"""Metrics that perturb images towards reference images; base of all but localisation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_integer, check_maps
from ..classifier import Classifier, check_classifier
from ..protection import protected
from . import protocols
from .perturbed import INTERNAL_BATCH_SIZE, Endpoints, Probe, endpoints
from .protocols import DIFFERENCES, Protocol
from .state import PerImage, check_index, mean, measured

Named = dict[str, dict[str, Tensor]]  # two levels of names, then one value per image


class ByReference(PerImage):
    """Scores of every image for every reference of a protocol.

    Of its metrics it computes those that the protocol lists. Images that the protocol leaves out are counted.

    Args:
        clf: the classifier that the maps explain.
        protocol: a preset's name or a `Protocol`.
        internal_batch_size: perturbed images in one forward pass, ≥ 2.

    Raises:
        ValueError: for a protocol that lists none of the metrics.
    """

    clf: Classifier

    def __init__(
        self,
        clf: Classifier,
        protocol: str | Protocol = "aha",
        internal_batch_size: int = INTERNAL_BATCH_SIZE,
        **options: Any,
    ):
        super().__init__(**options)
        check_integer("internal_batch_size", internal_batch_size, 2)
        check_classifier(clf)
        # past nn.Module, which would put the classifier's weights into the metric's state_dict
        object.__setattr__(self, "clf", clf)
        self.protocol = protocols.get(protocol)
        self.internal_batch_size = internal_batch_size
        self.names = tuple(name for name in self.protocol.metrics if name in self.directions)
        if not self.names:
            raise ValueError(
                f"protocol {self.protocol.name!r} measures {', '.join(self.protocol.metrics)}, "
                f"{type(self).__name__} {', '.join(self.directions)}: choose another protocol, or aha.metrics.Suite"
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
            self._update(images, maps, target, ends, index, labels)

    def _update(self, images, maps, target, ends, index, labels) -> None:
        if ends is None:
            ends = endpoints(self.clf, images, target, self.protocol, self.internal_batch_size, labels)
        elif target is not None or labels is not None:
            raise ValueError("target and ends are both given: the ends carry their target and labels, leave it out")
        expected = (len(self.protocol.references), *images.shape)
        if tuple(ends.references.shape) != expected:
            raise ValueError(
                f"ends are of reference images {tuple(ends.references.shape)}: give those of these images "
                f"and of protocol {self.protocol.name!r}, {expected}"
            )
        probe = Probe(self.clf, self.protocol, images, maps, ends, self.internal_batch_size)
        self._keep(self._measure(probe), index)

    def _measure(self, probe: Probe) -> Tensor:
        """(B, …) what is kept of every image of the batch, NaN where it takes no part."""
        return probe.spread(self._rows(probe))

    def _rows(self, probe: Probe) -> Tensor:
        """(B, …) of the images that take part."""
        raise NotImplementedError

    def _scores(self, rows: Tensor) -> Named:
        """Rows (N, width) → metric → reference → (N,). Differences are left to `arranged`."""
        raise NotImplementedError

    def _named_curves(self, rows: Tensor) -> Named:
        """Rows (N, width) → reference → curve → (N, S)."""
        return {}

    def compute(self) -> dict[str, Any]:
        """Means over the images of all processes.

        Returns:
            name → mean over the references, "references" → {reference: {name: …}}, "images" that took part,
            "excluded" by the protocol.
        """
        values, by_reference = arranged(self._scores(self._seen()), self.names)
        taking = measured(values)
        count = int(taking.sum())
        if not count:
            raise RuntimeError(
                f"none of {len(taking)} images takes part in protocol {self.protocol.name!r}: give others"
            )
        references = {key: {name: mean(value) for name, value in named.items()} for key, named in by_reference.items()}
        means = {name: mean(value) for name, value in values.items()}
        return {**means, "references": references, "images": count, "excluded": len(taking) - count}

    def per_image(self) -> dict[str, Any]:
        """(N,) scores of each image this process has seen instead of means, NaN where it takes no part.

        In the order of the index, without repetitions, where `update` was given one; else as they came.
        """
        values, by_reference = arranged(self._scores(self._seen()), self.names)
        return {**values, "references": by_reference}

    def curves(self) -> Named:
        """Mean curves of the images this process has seen: reference → name → (S,) over the fractions.

        Deletion, positive and negative run over the removed fraction, insertion over the inserted one.
        """
        named = self._named_curves(self._seen())
        return {
            reference: {name: curve.double().nanmean(dim=0).float() for name, curve in curves.items()}
            for reference, curves in named.items()
        }


def arranged(scores: Named, names: Sequence[str]) -> tuple[dict[str, Tensor], Named]:
    """Metric → reference → (N,) as: metric → mean over its references, and reference → metric → (N,).

    Both with the differences, by reference where it has both sides; only what is among ``names``.
    """
    scores = dict(scores)
    means = {name: torch.stack(list(found.values())).double().mean(dim=0) for name, found in scores.items()}
    for name, (first, second) in DIFFERENCES.items():
        if first in scores and second in scores:
            a, b = scores[first], scores[second]
            scores[name] = {reference: a[reference] - b[reference] for reference in a if reference in b}
            means[name] = means[first] - means[second]
    by_reference: Named = {}
    for name in names:
        for reference, values in scores[name].items():
            by_reference.setdefault(reference, {})[name] = values
    return {name: means[name].float() for name in names}, by_reference
