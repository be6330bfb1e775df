"""Deletion, insertion, positive and negative perturbation from one sweep of perturbed images (paper §4)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from .. import kernels, references
from ..checks import check_maps
from ..classifier import Classifier
from ..precision import autocast
from . import protocols
from .protocols import Protocol

INTERNAL_BATCH_SIZE = 128  # perturbed images in one forward pass


class Response(NamedTuple):
    """What the classifier says about the target class, two float32 tensors of one shape.

    Attributes:
        confidence: softmax probability of the target, in [0, 1].
        correct: 1 where the target is the top-1 class, else 0.
    """

    confidence: Tensor
    correct: Tensor


class Endpoints(NamedTuple):
    """What the curves of all maps of a batch share: f(I) and f(I0) with their inputs. Made by `endpoints`.

    Attributes:
        target: (B,) int64, the explained class.
        predicted: (B,) int64, the top-1 class of the unperturbed image.
        references: (R, B, C, H, W), one set of reference images per name of the protocol.
        original: response to the images, (B,).
        replaced: response to the reference images, (R, B).
    """

    target: Tensor
    predicted: Tensor
    references: Tensor
    original: Response
    replaced: Response


class Sweep(NamedTuple):
    """Responses (B, S) to images with the top fraction of the pixels replaced, and with only it shown.

    ``deleted.confidence`` is the deletion curve and ``deleted.correct`` positive perturbation.
    ``inserted.confidence`` is the insertion curve; ``inserted.correct`` read backwards is negative
    perturbation (least important pixels removed first).
    """

    deleted: Response
    inserted: Response


def rank_pixels(maps: Tensor) -> Tensor:
    """(B,H,W) attributions → (B,H,W) int32 ranks: 0 is the most important pixel, ties in reading order."""
    order = maps.flatten(1).argsort(dim=1, descending=True, stable=True)
    positions = torch.arange(order.shape[1], dtype=torch.int32, device=maps.device).expand(order.shape)
    return torch.empty_like(order, dtype=torch.int32).scatter_(1, order, positions).view(maps.shape)


def pixel_counts(pixels: int, points: int) -> list[int]:
    """Numbers of pixels at ``points`` evenly spaced fractions of [0, 1], rounded to whole pixels."""
    return [round(i * pixels / (points - 1)) for i in range(points)]


def area(curve: Tensor) -> Tensor:
    """(…, S) values at evenly spaced fractions of [0, 1] → (…) area under the curve by the trapezoid."""
    return torch.trapezoid(curve, dx=1 / (curve.shape[-1] - 1), dim=-1)


@torch.no_grad()
def endpoints(
    clf: Classifier,
    images: Tensor,
    target: Tensor | Sequence[int] | int | None = None,
    protocol: str | Protocol = "aha",
    internal_batch_size: int = INTERNAL_BATCH_SIZE,
) -> Endpoints:
    """f(I) and f(I0) of ``images`` (B,C,H,W) in [0,1] for all R references: (1 + R)·B forward passes.

    Compute them once per batch and hand them to `DeletionInsertion.update` and `ConfidenceChange.update` of
    every method.

    Args:
        target: (B,) classes, one class for all, or None for the predicted class (no pass of its own).

    Raises:
        ValueError: for images or targets that `Classifier.check` and `Classifier.resolve_target` refuse.
    """
    clf.check(images)
    names = protocols.get(protocol).references
    if target is not None:
        target = clf.resolve_target(images, target)
    with autocast("fp32", images.device):
        logits = torch.cat([clf(part) for part in images.split(internal_batch_size)])
        predicted = logits.argmax(dim=-1)
        target = predicted if target is None else target
        made = torch.stack([references.make(name, images, clf.mean_colour) for name in names])
        repeated = target.repeat(len(names))
        parts = zip(made.flatten(0, 1).split(internal_batch_size), repeated.split(internal_batch_size), strict=True)
        replaced = _concatenated([_response(clf(part), classes) for part, classes in parts])
    shape = (len(names), len(images))
    return Endpoints(
        target,
        predicted,
        made,
        _response(logits, target),
        Response(*(value.view(shape) for value in replaced)),
    )


@torch.no_grad()
def sweep(
    clf: Classifier,
    images: Tensor,
    maps: Tensor,
    target: Tensor,
    reference: Tensor,
    points: int = 21,
    chunk: int = INTERNAL_BATCH_SIZE,
    ends: tuple[Response, Response] | None = None,
) -> Sweep:
    """One sweep of perturbed images gives all four curves.

    2·(points − 2) forward passes per image, and 2 for the ends unless they are given. A pixel is either kept
    or replaced; ranks come from a stable sort.

    Args:
        images: (B, C, H, W) in [0, 1].
        maps: (B, 1, H, W) or (B, H, W) finite attributions.
        target: (B,) int64.
        reference: (B, C, H, W) reference images I0.
        points: S fractions in [0, 1], both ends included.
        chunk: perturbed images in one forward pass, ≥ 2; memory is set by it.
        ends: responses (B,) to ``images`` and to ``reference``, where they are known already.
    """
    if chunk < 2:
        raise ValueError(f"chunk={chunk}: give at least 2, one deleted and one inserted image")
    ranks = rank_pixels(check_maps(maps, images))
    if ends is None:
        with autocast("fp32", images.device):
            ends = (_response(clf(images), target), _response(clf(reference), target))
    return _sweep(clf, images, ranks, target, reference, points, chunk, ends)


@torch.no_grad()
def _sweep(clf, images, ranks, target, reference, points, chunk, ends) -> Sweep:
    """`sweep` on checked arguments and known ranks."""
    batch, pixels = len(images), images.shape[-2] * images.shape[-1]
    counts = pixel_counts(pixels, points)[1:-1]
    deleted = images.new_empty(2, batch, points, dtype=torch.float32)
    inserted = torch.empty_like(deleted)
    for curve, first, last in ((deleted, *ends), (inserted, *reversed(ends))):
        curve[..., 0], curve[..., -1] = torch.stack(first), torch.stack(last)
    with autocast("fp32", images.device):
        images_at_once = min(batch, chunk // 2)
        steps_at_once = max(1, chunk // (2 * images_at_once))
        for start in range(0, batch, images_at_once):
            rows = slice(start, start + images_at_once)
            for step in range(0, len(counts), steps_at_once):
                part = counts[step : step + steps_at_once]
                pair = kernels.perturb_by_rank(images[rows], reference[rows], ranks[rows], part, clf.mean, clf.std)
                logits = clf.forward_normalized(torch.cat([half.flatten(0, 1) for half in pair]))
                classes = target[rows].repeat_interleave(len(part)).repeat(2)
                response = torch.stack(_response(logits, classes)).view(2, 2, -1, len(part))
                columns = slice(1 + step, 1 + step + len(part))
                deleted[:, rows, columns], inserted[:, rows, columns] = response.unbind(1)
    return Sweep(Response(*deleted), Response(*inserted))


def _response(logits: Tensor, target: Tensor) -> Response:
    confidence = logits.float().softmax(dim=-1).gather(1, target[:, None])[:, 0]
    return Response(confidence, (logits.argmax(dim=-1) == target).float())


def _concatenated(responses: list[Response]) -> Response:
    return Response(*(torch.cat(values) for values in zip(*responses, strict=True)))


class ByReference(Metric):
    """Scores of every image for every reference of a protocol; base of `DeletionInsertion` and others.

    The one state is a flat list of per-image rows: processes may have seen any share of them, also none.

    Attributes:
        directions: name of every score → whether higher is better.
    """

    full_state_update = False
    is_differentiable = False
    directions: ClassVar[dict[str, bool]] = {}
    clf: Classifier
    rows: list[Tensor] | Tensor

    def __init__(
        self,
        clf: Classifier,
        protocol: str | Protocol = "aha",
        internal_batch_size: int = INTERNAL_BATCH_SIZE,
        **options: Any,
    ):
        super().__init__(**options)
        if internal_batch_size < 2:
            raise ValueError(f"internal_batch_size={internal_batch_size}: give at least 2")
        # past nn.Module, which would put the classifier's weights into the metric's state_dict
        object.__setattr__(self, "clf", clf)
        self.protocol = protocols.get(protocol)
        self.internal_batch_size = internal_batch_size
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def update(
        self,
        images: Tensor,
        maps: Tensor,
        target: Tensor | Sequence[int] | int | None = None,
        ends: Endpoints | None = None,
    ) -> None:
        """Measure attributions ``maps`` (B,1,H,W) of ``images`` (B,C,H,W) in [0,1].

        Args:
            target: (B,) explained classes, one class for all, or None for the predicted class.
            ends: what `endpoints` returned for the same images and protocol; it carries the target.

        Raises:
            ValueError: for images, maps or a target that do not fit, before any perturbed image is computed.
        """
        self.clf.check(images)
        maps = check_maps(maps, images)
        if ends is None:
            ends = endpoints(self.clf, images, target, self.protocol, self.internal_batch_size)
        elif target is not None:
            raise ValueError("target and ends are both given: the ends carry their target, leave it out")
        expected = (len(self.protocol.references), *images.shape)
        if tuple(ends.references.shape) != expected:
            raise ValueError(
                f"ends are of reference images {tuple(ends.references.shape)}: give those of these images "
                f"and of protocol {self.protocol.name!r}, {expected}"
            )
        assert isinstance(self.rows, list)
        self.rows.append(self._measure(images, maps, ends).flatten())

    def _measure(self, images: Tensor, maps: Tensor, ends: Endpoints) -> Tensor:
        """(B, …) what is kept of every image."""
        raise NotImplementedError

    def _scores(self) -> dict[str, Tensor]:
        """Name → (N, R) scores of the images seen so far."""
        raise NotImplementedError

    def _seen(self, *shape: int) -> Tensor:
        """(N, *shape) rows of all images seen so far; RuntimeError if there are none."""
        rows = dim_zero_cat(self.rows) if len(self.rows) else None
        if rows is None or not rows.numel():
            raise RuntimeError(f"{type(self).__name__} has seen no images: call update before asking for results")
        return rows.view(-1, *shape)

    def compute(self) -> dict[str, Any]:
        """Means over the images of all processes.

        Returns:
            name → mean over the references, and "references" → {reference: {name: …}}.
        """
        scores = {name: values.mean(dim=0) for name, values in self._scores().items()}
        return self._arranged(scores, lambda value: value.item())

    def per_image(self) -> dict[str, Any]:
        """The same for each image this process has seen, in order: (N,) tensors instead of numbers."""
        return self._arranged(self._scores(), lambda value: value)

    def _arranged(self, scores: dict[str, Tensor], convert: Any) -> dict[str, Any]:
        by_reference = {
            reference: {name: convert(values[..., i]) for name, values in scores.items()}
            for i, reference in enumerate(self.protocol.references)
        }
        means = {name: convert(values.mean(dim=-1)) for name, values in scores.items()}
        return {**means, "references": by_reference}


class DeletionInsertion(ByReference):
    """Deletion ↓, insertion ↑, positive ↓ and negative ↑ perturbation, and their differences ↑ (method §6).

    Deletion and insertion are areas under the target's softmax probability, positive and negative
    perturbation under its top-1 accuracy, over the replaced fraction of the pixels. All values are in [0, 1],
    differences in [−1, 1].

    >>> metric = DeletionInsertion(clf)
    >>> metric.update(images, maps)
    >>> metric.compute()["ins_minus_del"]

    Args:
        clf: the classifier that the maps explain.
        protocol: a preset's name or a `Protocol`.
        internal_batch_size: perturbed images in one forward pass, ≥ 2.
    """

    higher_is_better = True  # of the headline, ins_minus_del; see `directions`
    directions: ClassVar[dict[str, bool]] = {
        "deletion": False,
        "insertion": True,
        "ins_minus_del": True,
        "positive": False,
        "negative": True,
        "neg_minus_pos": True,
    }
    _CURVES = ("deletion", "insertion", "positive", "negative")

    def _measure(self, images: Tensor, maps: Tensor, ends: Endpoints) -> Tensor:
        ranks = rank_pixels(maps)
        per_reference = []
        for i, reference in enumerate(ends.references):
            pair = (ends.original, Response(*(value[i] for value in ends.replaced)))
            swept = _sweep(
                self.clf,
                images,
                ranks,
                ends.target,
                reference,
                self.protocol.points,
                self.internal_batch_size,
                pair,
            )
            curves = (
                swept.deleted.confidence,
                swept.inserted.confidence,
                swept.deleted.correct,
                swept.inserted.correct.flip(-1),
            )
            per_reference.append(torch.stack(curves, dim=1))
        return torch.stack(per_reference, dim=1)  # [B, R, 4, S]

    def _all_curves(self) -> Tensor:
        return self._seen(len(self.protocol.references), len(self._CURVES), self.protocol.points)

    def _scores(self) -> dict[str, Tensor]:
        deletion, insertion, positive, negative = area(self._all_curves()).unbind(dim=-1)
        return {
            "deletion": deletion,
            "insertion": insertion,
            "ins_minus_del": insertion - deletion,
            "positive": positive,
            "negative": negative,
            "neg_minus_pos": negative - positive,
        }

    def curves(self) -> dict[str, dict[str, Tensor]]:
        """Mean curves of the images this process has seen: reference → name → (S,) over the fractions of [0,
        1].

        Deletion, positive and negative run over the removed fraction, insertion over the inserted one.
        """
        mean = self._all_curves().mean(dim=0)
        return {
            reference: dict(zip(self._CURVES, mean[i], strict=True))
            for i, reference in enumerate(self.protocol.references)
        }
