"""Everything a protocol measures, for engines that compare many methods on the same images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_integer, check_maps, checked
from ..classifier import Classifier, check_classifier
from ..memory import per_pass
from ..protection import protected
from . import catalog, protocols
from .catalog import Metric
from .localization import Located, check_masks
from .perturbed import Endpoints, Probe, endpoints
from .protocols import Protocol

Named = dict[str, dict[str, Tensor]]  # two levels of names, then one value per image


@dataclass(frozen=True)
class Scores:
    """What `Suite.measure` found out about the maps of one batch; NaN where an image takes no part.

    Attributes:
        values: metric → (B,) float32, the mean over the references.
        by_reference: reference → metric → (B,); {} where there are none.
        curves: reference → curve → (B, S) over the fractions of `Protocol.counts`; {} where there are none. Deletion,
            positive and negative run over the removed fraction, insertion over the inserted one.
    """

    values: dict[str, Tensor]
    by_reference: dict[str, dict[str, Tensor]]
    curves: dict[str, dict[str, Tensor]]


class Suite:
    """All metrics of one protocol, without a state: scores of every image as they are measured.

    The rows of `aha.metrics.catalog` that the protocol names, from one set of perturbed images per map.

    >>> suite = Suite(clf, "aha")
    >>> batch = suite.begin(images)
    >>> suite.measure(batch, maps).values["insertion"]

    Args:
        clf: the classifier that the maps explain.
        protocol: a preset's name or a `Protocol`.
        internal_batch_size: perturbed images in one forward pass, ≥ 2; default: `aha.memory.per_pass`.

    Attributes:
        protocol: what is measured; its ``needs`` is what `begin` must be given besides the images.
    """

    def __init__(self, clf: Classifier, protocol: str | Protocol = "aha", internal_batch_size: int | None = None):
        self.clf = check_classifier(clf)
        self.internal_batch_size = check_integer("internal_batch_size", per_pass(clf.device, internal_batch_size), 2)
        self.protocol = protocols.get(protocol)

    @checked
    def begin(
        self,
        images: Tensor,
        target: Tensor | Sequence[int] | int | None = None,
        labels: Tensor | Sequence[int] | None = None,
        masks: Tensor | None = None,
    ) -> Endpoints:
        """What all methods share on ``images`` (B,C,H,W) in [0,1]: (1 + R)·B forward passes, see `endpoints`.

        Args:
            target: (B,) explained classes, one class for all, or None for the predicted class.
            labels: (B,) ground-truth classes, −1 where unknown.
            masks: (B,1,H,W) or (B,H,W), boolean or 0 and 1; all 0 where unknown.

        Raises:
            ValueError: for arguments that do not fit, and for labels or masks that the protocol needs and lacks.
        """
        images = self.clf.check(images).detach()
        ends = endpoints(self.clf, images, target, self.protocol, self.internal_batch_size, labels)
        if "mask" not in self.protocol.needs:
            return ends
        if masks is None:
            raise ValueError(f"protocol {self.protocol.name!r} needs masks: give (B, 1, H, W), all 0 where unknown")
        chosen = check_masks(masks).to(images.device)
        expected = (len(images), *images.shape[-2:])
        if tuple(chosen.shape) != expected:
            raise ValueError(f"masks is {tuple(masks.shape)}: give {expected}, one value per pixel of the images")
        return ends._replace(masks=chosen)

    @checked
    def measure(self, batch: Endpoints, maps: Tensor) -> Scores:
        """Scores of ``maps`` (B,1,H,W), finite attributions of the images and targets of ``batch``."""
        with protected(self.clf), torch.no_grad():
            return self._measured(batch, maps)

    def _measured(self, batch: Endpoints, maps: Tensor) -> Scores:
        probe = Probe(self.clf, self.protocol, batch, check_maps(maps, batch.images), self.internal_batch_size)
        rows = self.protocol.rows
        found = {row.key: {name: probe.spread(value) for name, value in scored(row, probe).items()} for row in rows}
        curves: Named = {}
        for row in rows:
            for name, draw in row.curves.items():
                for reference, curve in draw(probe).items():
                    curves.setdefault(reference, {})[name] = probe.spread(curve)
        return Scores(*arranged(found, self.protocol.metrics), curves)


def scored(metric: Metric, probe: Located) -> dict[str, Tensor]:
    """Reference → (B,) float32 of a row of the catalogue; the reference is "" where it needs none."""
    assert metric.measure is not None  # costs are not among a protocol's metrics, differences follow from `arranged`
    value = metric.measure(probe)
    values = {"": value} if isinstance(value, Tensor) else value
    expected = (len(probe.maps),)
    if not isinstance(values, Mapping) or not values or any(tuple(v.shape) != expected for v in values.values()):
        shapes = {name: tuple(v.shape) for name, v in values.items()} if isinstance(values, Mapping) else type(value)
        raise ValueError(f"metric {metric.key!r} measured {shapes}: return {expected}, or that by reference")
    return {name: value.float() for name, value in values.items()}


def arranged(scores: Named, names: Sequence[str]) -> tuple[dict[str, Tensor], Named]:
    """Metric → reference → (N,) as: metric → mean over its references, and reference → metric → (N,).

    Both with the differences, by reference where it has both sides; only what is among ``names``.
    """
    scores = dict(scores)
    means = {name: torch.stack(list(found.values())).double().mean(dim=0) for name, found in scores.items()}
    for name in names:
        if difference := catalog.get(name).difference:
            a, b = (scores[side] for side in difference)
            scores[name] = {reference: a[reference] - b[reference] for reference in a if reference in b}
            means[name] = means[difference[0]] - means[difference[1]]
    by_reference: Named = {}
    for name in names:
        for reference, values in scores[name].items():
            if reference:
                by_reference.setdefault(reference, {})[name] = values
    return {name: means[name].float() for name in names}, by_reference
