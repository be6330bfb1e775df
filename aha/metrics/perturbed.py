"""Perturbed images and what the classifier says about them: computed once, shared by all metrics."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import kernels, references
from ..checks import check_answers, check_integer, check_maps, check_target, checked
from ..classifier import Classifier
from ..memory import per_pass
from ..precision import autocast, confidence
from ..protection import protected
from ..ranks import rank_pixels
from . import protocols
from .curves import density
from .localization import Located
from .protocols import Protocol, pixel_counts

_SIDES = ("deleted", "inserted")  # of a `Probe`


class Response(NamedTuple):
    """What the classifier says about a class, two float32 tensors of one shape.

    Attributes:
        confidence: its softmax probability, in [0, 1].
        correct: 1 where it is the top-1 class, else 0.
    """

    confidence: Tensor
    correct: Tensor


class Endpoints(NamedTuple):
    """What all maps of a batch share: f(I) and f(I0) with their inputs. Made by `endpoints` and `Suite.begin`.

    Attributes:
        images: (B, C, H, W) in [0, 1].
        target: (B,) int64, the explained class.
        predicted: (B,) int64, the top-1 class of the unperturbed image.
        references: (R, B, C, H, W), one set of reference images per name of the protocol.
        original: response to the images, (B,).
        replaced: response to the reference images, (R, B); NaN where the protocol's curves do not reach them.
        confidence: (B,) float32, of the target in the unperturbed image.
        scored: (B,) int64, the class that all responses speak of: the target, or the label (`Protocol.scored`).
        takes_part: (B,) bool, whether the protocol measures the image; others are NaN and cost no perturbed image.
        masks: (B, H, W) bool, of the evidence, where the protocol needs them.
    """

    images: Tensor
    target: Tensor
    predicted: Tensor
    references: Tensor
    original: Response
    replaced: Response
    confidence: Tensor
    scored: Tensor
    takes_part: Tensor
    masks: Tensor | None = None

    def of(self, rows: Tensor) -> Endpoints:
        """Those of the images ``rows`` (N,)."""

        def some(value: Any) -> Any:
            if isinstance(value, Response):
                return Response(*(part[..., rows] for part in value))
            return None if value is None else value[rows]

        by_image = self._replace(references=self.references.transpose(0, 1))
        chosen = Endpoints(*map(some, by_image))
        return chosen._replace(references=chosen.references.transpose(0, 1))


class Sweep(NamedTuple):
    """The four curves of one map: responses (B, S) with the top pixels replaced, and with only them shown.

    ``deleted.confidence`` is the deletion curve and ``deleted.correct`` positive perturbation.
    ``inserted.confidence`` is the insertion curve; ``inserted.correct`` read backwards is negative
    perturbation (least important pixels removed first).
    """

    deleted: Response
    inserted: Response


@checked
def endpoints(
    clf: Classifier,
    images: Tensor,
    target: Tensor | Sequence[int] | int | None = None,
    protocol: str | Protocol = "aha",
    internal_batch_size: int | None = None,
    labels: Tensor | Sequence[int] | None = None,
) -> Endpoints:
    """What all methods share on a batch: f(I) and f(I0) of ``images`` (B,C,H,W) in [0,1], in (1 + R)·B forward passes.

    Compute them once per batch and hand them to the `update` of every method's metrics. "adaptive_blur" takes up to 36
    passes more, for the images that take part.

    Args:
        target: (B,) classes, one class for all, or None for the predicted class (no pass of its own).
        labels: (B,) ground-truth classes, −1 where unknown, for protocols that need them.

    Raises:
        ValueError: for images or targets that `Classifier.check` and `Classifier.resolve_target` refuse, for labels
            that are needed and missing, or no classes, and where the classifier is not finite.
    """
    images = clf.check(images).detach()
    protocol = protocols.get(protocol)
    if target is not None:
        target = clf.resolve_target(images, target)
    truth = _labels(clf, protocol, labels, images) if "label" in protocol.needs else None
    size = check_integer("internal_batch_size", per_pass(clf.device, internal_batch_size), 1)
    with protected(clf), torch.no_grad():
        logits = check_answers(torch.cat([clf(part) for part in images.split(size)]), clf.name)
        predicted = logits.argmax(dim=-1)
        target = predicted if target is None else target
        confidence = _response(logits, target).confidence
        scored, takes_part = target, torch.ones_like(target, dtype=torch.bool)
        if truth is not None:
            # an image without a label takes no part: class 0 stands in, so that its rows can be computed
            scored = truth.clamp_min(0) if protocol.scored == "label" else target
            takes_part = protocol.takes_part(truth, predicted, _response(logits, predicted).confidence)
        made = []
        for name in protocol.references:
            if name == "adaptive_blur":
                blurred, takes_part = _adaptive_blur(clf, images, scored, takes_part, size)
                made.append(blurred)
            else:
                made.append(references.make(name, images, clf.mean_colour, clf.mean))
        stacked = torch.stack(made) if made else images.new_empty(0, *images.shape)
        replaced = Response(*(stacked.new_full(stacked.shape[:2], torch.nan) for _ in Response._fields))
        if protocol.span[1] == 1:
            answers = respond(clf, stacked.flatten(0, 1), scored.repeat(len(made)), size)
            check_answers(answers.confidence.view(stacked.shape[:2]).T, f"{clf.name}, for a reference image,")
            replaced = Response(*(value.view(stacked.shape[:2]) for value in answers))
    original = _response(logits, scored)
    return Endpoints(images, target, predicted, stacked, original, replaced, confidence, scored, takes_part)


def _labels(clf: Classifier, protocol: Protocol, labels: Tensor | Sequence[int] | None, images: Tensor) -> Tensor:
    if labels is None:
        raise ValueError(f"protocol {protocol.name!r} needs labels: give (B,) ground-truth classes, −1 where unknown")
    value = torch.as_tensor(labels)
    if value.is_floating_point() or value.dtype == torch.bool or tuple(value.shape) != (len(images),):
        raise ValueError(f"labels is {value.dtype} of shape {tuple(value.shape)}: give ({len(images)},) integers")
    if value.min() < -1 or value.max() >= clf.num_classes:
        raise ValueError(
            f"labels span {value.min()} … {value.max()}: give −1 … {clf.num_classes - 1}, −1 where unknown"
        )
    return value.to(images.device, torch.int64)


def _adaptive_blur(
    clf: Classifier, images: Tensor, classes: Tensor, takes_part: Tensor, size: int
) -> tuple[Tensor, Tensor]:
    """The blur of every image that takes part, and which of them still do: those whose class it hides."""

    def confidence(blurred: Tensor, index: Tensor) -> Tensor:
        return respond(clf, blurred, classes[rows[index]], size).confidence

    rows = takes_part.nonzero()[:, 0]
    reference = images.clone()
    reference[rows], kernel = references.adaptive_blur(images[rows], confidence, clf.mean)
    return reference, takes_part.index_put((rows,), kernel > 0)


@checked
def sweep(
    clf: Classifier,
    images: Tensor,
    maps: Tensor,
    target: Tensor,
    reference: Tensor,
    points: int = 21,
    chunk: int | None = None,
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
        chunk: perturbed images in one forward pass, ≥ 2; memory is set by it. None: `aha.memory.per_pass`.
        ends: responses (B,) to ``images`` and to ``reference``, where they are known already.
    """
    chunk = check_integer("chunk", per_pass(clf.device, chunk), 2)  # one deleted and one inserted image
    images, reference = clf.check(images).detach(), clf.check(reference).detach()
    ranks = rank_pixels(check_maps(maps, images))
    target = check_target(target, len(images), clf.num_classes, images.device)
    counts = pixel_counts(images.shape[-2] * images.shape[-1], points)
    with protected(clf), torch.no_grad():
        if ends is None:
            ends = (_response(clf(images), target), _response(clf(reference), target))
        return Sweep(*_swept(clf, images, ranks, target, reference, counts, chunk, ends, (0, 1)))


def _swept(
    clf: Classifier,
    images: Tensor,
    ranks: Tensor,
    classes: Tensor,
    reference: Tensor,
    counts: list[int],
    chunk: int,
    ends: tuple[Response, Response],
    sides: tuple[int, ...],
) -> list[Response]:
    """Responses (B, S) at ``counts`` (ascending) for each of ``sides``: 0 deletes the top pixels, 1 inserts them."""
    batch, pixels = len(images), images.shape[-2] * images.shape[-1]
    # no forward pass for the ends, nor for a count that rounding repeats
    distinct = sorted(set(counts))
    inner = [count for count in distinct if 0 < count < pixels]
    first = distinct.index(inner[0]) if inner else 0
    curves = images.new_empty(len(sides), 2, batch, len(distinct), dtype=torch.float32)
    for curve, side in zip(curves, sides, strict=True):
        # of deletion the image is the first end, of insertion the last
        for count, end in ((0, ends[side]), (pixels, ends[1 - side])):
            if count in distinct:
                curve[..., distinct.index(count)] = torch.stack(end)
    steps = torch.tensor(inner, dtype=torch.int32, device=images.device)
    images_at_once = max(1, min(batch, chunk // len(sides)))
    steps_at_once = max(1, chunk // (len(sides) * images_at_once))
    for start in range(0, batch, images_at_once):
        rows = slice(start, start + images_at_once)
        for step in range(0, len(inner), steps_at_once):
            part = steps[step : step + steps_at_once]
            pair = kernels.perturb_by_rank(
                images[rows], reference[rows], ranks[rows], part, clf.mean, clf.std, clf.dtype
            )
            halves = [pair[side].flatten(0, 1) for side in sides]
            logits = clf.forward_normalized(halves[0] if len(halves) == 1 else torch.cat(halves))
            repeated = classes[rows].repeat_interleave(len(part)).repeat(len(sides))
            response = torch.stack(_response(logits, repeated)).view(2, len(sides), -1, len(part))
            curves[:, :, rows, first + step : first + step + len(part)] = response.transpose(0, 1)
    check_answers(curves[:, 0].transpose(0, 1), f"{clf.name}, for perturbed images,")
    if len(distinct) < len(counts):
        curves = curves[..., [distinct.index(count) for count in counts]]
    return [Response(*curve) for curve in curves]


def _response(logits: Tensor, classes: Tensor) -> Response:
    return Response(confidence(logits, classes).float(), (logits.argmax(dim=-1) == classes).float())


def respond(clf: Classifier, images: Tensor, classes: Tensor, internal_batch_size: int) -> Response:
    """Responses (N,) to ``images`` (N,C,H,W) in [0,1]; N may be 0."""
    if not len(images):
        return Response(*(images.new_empty(0, dtype=torch.float32) for _ in Response._fields))
    parts = zip(images.split(internal_batch_size), classes.split(internal_batch_size), strict=True)
    answers = [_response(clf(part), chosen) for part, chosen in parts]
    return Response(*(torch.cat(values) for values in zip(*answers, strict=True)))


class Probe(Located):
    """The maps of one method for one batch, of the images that take part; sorted and perturbed when first asked for.

    Attributes:
        images, maps, masks, ends: of the images that take part; maps are (B,H,W), masks (B,H,W) bool.
        protocol: what is measured.
        counts: numbers of pixels at the points of the curves.
    """

    def __init__(
        self,
        clf: Classifier,
        protocol: Protocol,
        ends: Endpoints,
        maps: Tensor,
        internal_batch_size: int,
    ):
        self.clf, self.protocol, self.internal_batch_size = clf, protocol, internal_batch_size
        self.counts = protocol.counts(*maps.shape[-2:])
        self._batch = len(maps)
        self._rows: Tensor | None = None
        if not ends.takes_part.all():
            self._rows = ends.takes_part.nonzero()[:, 0]
            maps, ends = maps[self._rows], ends.of(self._rows)
        super().__init__(maps, ends.masks)
        self.images, self.ends = ends.images, ends
        self._curves: dict[int, dict[str, Response]] = {}

    def spread(self, values: Tensor) -> Tensor:
        """Rows of the images that take part → rows of the whole batch, NaN for the others."""
        if self._rows is None:
            return values
        return values.new_full((self._batch, *values.shape[1:]), torch.nan).index_copy_(0, self._rows, values)

    @cached_property
    def ranks(self) -> Tensor:
        """(B,H,W) of `rank_pixels`."""
        return rank_pixels(self.maps)

    @cached_property
    def density(self) -> Tensor:
        """(B, S) of `curves.density`: share of Σ|A| among the top pixels."""
        return density(self.maps, self.ranks, self.counts)

    @property
    def deleted(self) -> dict[str, Response]:
        """Reference → responses (B, S) with the top pixels replaced."""
        return self._side(0)

    @property
    def inserted(self) -> dict[str, Response]:
        """Reference → responses (B, S) with only the top pixels shown."""
        return self._side(1)

    @cached_property
    def shown(self) -> dict[str, Response]:
        """Reference → responses (B,) to the images seen through their map, x' = Ā·I + (1 − Ā)·I0.

        Ā is the map min-max scaled to [0, 1] per image. A constant map points at nothing: its Ā is 0, so x' = I0.
        """
        self._must_read("shown")
        low, high = self.maps.flatten(1).aminmax(dim=1)
        span = (high - low)[:, None, None]
        shade = torch.where(span > 0, (self.maps - low[:, None, None]) / span, 0)[:, None].to(self.images.dtype)
        found = {}
        with autocast("fp32", self.images.device):
            for name, reference in zip(self.protocol.references, self.ends.references, strict=True):
                mixed = torch.lerp(reference, self.images, shade)
                found[name] = respond(self.clf, mixed, self.ends.scored, self.internal_batch_size)
        return found

    def _side(self, side: int) -> dict[str, Response]:
        """Curves of one side; those of the other come along where the protocol reads them too, in the same batches."""
        self._must_read(_SIDES[side])
        if not self._curves:
            self._sweep({i for i, name in enumerate(_SIDES) if name in self.protocol.reads})
        return self._curves[side]

    def _must_read(self, what: str) -> None:
        # or `Protocol.passes` would not know of it
        if what not in self.protocol.reads:
            raise ValueError(f'a metric reads {what} images and does not say so: put "{what}" into its reads')

    def _sweep(self, wanted: set[int]) -> None:
        served = self.protocol.deleting, self.protocol.inserting
        self._curves.update({side: {} for side in wanted})
        for i, name in enumerate(self.protocol.references):
            sides = tuple(side for side in sorted(wanted) if name in served[side])
            if not sides:
                continue
            replaced = Response(*(value[i] for value in self.ends.replaced))
            curves = _swept(
                self.clf,
                self.images,
                self.ranks,
                self.ends.scored,
                self.ends.references[i],
                self.counts,
                self.internal_batch_size,
                (self.ends.original, replaced),
                sides,
            )
            for side, curve in zip(sides, curves, strict=True):
                self._curves[side][name] = curve
