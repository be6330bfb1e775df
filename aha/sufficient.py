"""How little of an image is enough: the top pixels of a map, inserted until the classifier is as sure as before."""

from __future__ import annotations

import torch
from torch import Tensor

from . import references
from .checks import check_answers, check_maps, check_number
from .classifier import Classifier, check_classifier
from .ranks import rank_pixels

# finer where curves rise; 1 is the image itself, which is known
FRACTIONS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.45, 0.65)


def sufficient_fraction(
    clf: Classifier,
    image: Tensor,
    heat: Tensor,
    target: int,
    inside: Tensor | None = None,
    share: float = 0.9,
) -> float | None:
    """The fraction of the most important pixels that keeps ``share`` of the target's probability.

    The image is blurred (`aha.references.blur`) and its pixels are put back by rank, a few fractions of them, as the
    insertion metric does; between two fractions the probability is interpolated. Ten passes, in one batch.

    Args:
        clf: the classifier.
        image: (1, C, H, W) in [0, 1], on the classifier's device.
        heat: (1, 1, H, W) or (1, H, W), higher = more important.
        target: the class.
        inside: (1, 1, H, W) bool, the pixels that count; the others, such as padding, are never blurred. Default: all.
        share: in (0, 1].

    Returns:
        A fraction of the pixels that count, in [0, 1]: the first at which the probability reaches ``share`` of the
        image's own, 0 where the blurred image is enough. None for a constant map, which ranks no pixels.

    Raises:
        ValueError: in one line, for arguments that do not fit, and where the classifier's answer is not finite.
    """
    image = check_classifier(clf).check(image)
    values = check_maps(heat, image).flatten().to(image.device)
    if len(image) != 1:
        raise ValueError(f"image has shape {tuple(image.shape)}: give one image, (1, C, H, W)")
    if check_number("share", share, 0, above=True) > 1:
        raise ValueError(f"share={share!r}: give a number in (0, 1]")
    number = clf.resolve_target(image, target)
    counts = torch.ones_like(values, dtype=torch.bool) if inside is None else inside.flatten().to(image.device)
    if counts.dtype != torch.bool or counts.shape != values.shape or not counts.any():
        raise ValueError(
            f"inside is {counts.dtype} of {len(counts)} values: give bool, one per pixel, some of them true"
        )
    values = values[counts]
    if values.min() == values.max():
        return None
    ranks = rank_pixels(values[None])[0].to(values)
    hidden = torch.zeros_like(counts, dtype=values.dtype)
    hidden[counts] = (ranks + 0.5) / len(values)  # above the fraction: not yet inserted
    levels = torch.tensor(FRACTIONS, device=image.device).to(hidden)
    shown = (hidden <= levels[:, None]).view(-1, 1, *image.shape[-2:])
    steps = torch.cat([torch.where(shown, image, references.blur(image)), image])
    confidence = check_answers(clf.probabilities(steps), clf.name)[:, number[0]].tolist()
    goal = share * confidence[-1]
    fractions = (*FRACTIONS, 1.0)
    place = next(i for i, reached in enumerate(confidence) if reached >= goal)  # the image itself reaches it
    if place == 0:
        return 0.0
    (low, high), (before, after) = confidence[place - 1 : place + 1], fractions[place - 1 : place + 1]
    return before + (after - before) * (goal - low) / (high - low)
