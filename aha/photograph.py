"""The explanation of a photograph, and not of its crop: maps in the file's geometry, and what they say in words."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch import Tensor

from .checks import check_answers
from .classifier import Classifier, check_classifier
from .data.photograph import Fit, Photograph
from .sufficient import sufficient_fraction

SHARE = 0.9  # of the probability that the outlined pixels keep
LONGEST = 2048  # longer side of pictures and maps in pixels: what is finer than a screen only costs


@dataclass(frozen=True)
class Explanation:
    """Why a classifier sees a class in a photograph.

    Attributes:
        picture: the photograph, upright, its longer side at most as asked.
        maps: (T, H, W) float32 over the picture, one per step of a refinement; NaN where nothing was seen.
        target: the class explained.
        name: its name, or "".
        probability: of the class, in [0, 1]; for tiles, of the whole photograph, padded to a square.
        seen: the share of the photograph's area that the classifier saw.
        kept: the fraction of the pixels seen, the top ones of the last map, that keep 90 % of the probability, see
            `aha.sufficient.sufficient_fraction`; None for a constant map.
        fit: "crop", "pad" or "tile".
    """

    picture: Image.Image
    maps: np.ndarray
    target: int
    name: str
    probability: float
    seen: float
    kept: float | None
    fit: Fit

    def caption(self) -> list[str]:
        """What a reader of the picture should know, in lines: class and probability, what was seen, what is enough."""
        lines = [f"class {self.target}{' ' * bool(self.name)}{self.name}, p = {self.probability:.3f}"]
        what = f"{SHARE:.0%} of p where the rest is blurred".replace("%", " %")
        if self.kept is None:
            lines.append("the map is constant: no pixel is more important than another")
        elif self.kept == 0:
            lines.append("no pixels are needed: blurred all over, the image keeps " + what.split(" where")[0])
        else:
            lines.append(f"the top {100 * self.kept:.2g} % of the pixels keep {what}")
        if self.seen < 1:
            lines.append(f"the crop sees {100 * self.seen:.0f} % of the photograph")
        else:
            lines.append("all of the photograph is seen" + (", in tiles" if self.fit == "tile" else ""))
        return lines


def explain(
    path: str | os.PathLike,
    classifier: Classifier,
    make_maps: Callable[[Tensor, Tensor], Tensor],
    target: int | None = None,
    fit: Fit = "crop",
    longest: int = LONGEST,
) -> Explanation:
    """Explain what a classifier sees in an image file, in the geometry of the file.

    With ``fit="tile"`` every tile is explained for the class of the whole photograph, and its map counts by the
    probability of that class in the tile.

    Args:
        path: the file.
        classifier: the classifier to explain.
        make_maps: maps of images (N, 3, S, S) and classes (N,), both on the classifier's device: (N, 1, S, S), or
            (T, N, 1, S, S) for steps; such as ``explainer.attribute``.
        target: the class; None: the one predicted, for tiles that of the whole photograph padded to a square.
        fit: how the photograph becomes inputs, see `aha.data.Photograph.view`.
        longest: of the picture's and the maps' sides, in pixels.

    Raises:
        ImageReadError: for a file that cannot be read.
        ValueError: in one line, for arguments that do not fit, and where the classifier or a map is not finite.
    """
    side = check_classifier(classifier).input_size[0]
    photograph = Photograph(path)
    picture = photograph.picture(longest)
    view = photograph.view(side, fit, colour=classifier.mean_colour)
    # one look at everything, to name it and to measure on; the class of a photograph is not that of its parts
    whole = photograph.view(side, "pad", colour=classifier.mean_colour) if fit == "tile" else view
    one = whole.inputs.to(classifier.device)
    confidence = check_answers(classifier.probabilities(one), classifier.name)[0]
    number = int(confidence.argmax() if target is None else classifier.resolve_target(one, target))
    inputs = view.inputs.to(classifier.device)
    trail = make_maps(inputs, classifier.resolve_target(inputs, number)).detach()
    trail = trail if trail.ndim == 5 else trail[None]
    weights = classifier.probabilities(inputs)[:, number] if len(inputs) > 1 else None
    maps = np.stack([view.to_photograph(each, (picture.height, picture.width), weights) for each in trail])
    last = whole.to_inputs(maps[-1]) if whole is not view else trail[-1]
    kept = sufficient_fraction(classifier, one, last, number, whole.inside, SHARE)
    names = classifier.class_names
    name = names[number] if names else ""
    return Explanation(picture, maps, number, name, float(confidence[number]), view.seen, kept, fit)
