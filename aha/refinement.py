"""Test-time refinement: a few gradient steps of the same objective on the images at hand (paper §3.6).

The paper moves the explainer's head. Here the map itself moves, by a residual on a few grids: from one reference and
four fractions a step the head takes harm, the map does not (docs/refinement.md).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import references as reference_images
from .checks import check_integer, check_number, checked, finite_maps
from .classifier import Classifier, check_classifier
from .explainer import Explainer
from .memory import per_pass
from .objective import Objective, strata
from .patches import by_patch
from .protection import protected
from .regions import Regions, default_cells, grid

GOLDEN = (math.sqrt(5) - 1) / 2
LEVELS = (4, 2, 1)  # cells of the finest grid along the side of a residual's cell
TEMPERATURE = 0.015  # softer than the end of a training: a few fractions have to move all ranks between them
MOMENTA = (0.5, 0.9)


@dataclass(frozen=True)
class Plan:
    """How test-time refinement spends its passes.

    Attributes:
        steps: T, gradient steps.
        lr: how far a step moves a value of a residual, in standard deviations of the map that is refined.
        fractions: S, points on each of the two curves that a step looks at.
        references: references that a step looks at; they take turns.
    """

    steps: int
    lr: float
    fractions: int
    references: int

    @property
    def passes(self) -> tuple[int, int]:
        """Forward and backward passes of the classifier for one image, beside those of the explainer."""
        perturbed = self.steps * self.references * 2 * self.fractions
        return perturbed, perturbed


PRESETS = {
    "fast": Plan(steps=3, lr=0.1, fractions=4, references=1),
    "default": Plan(steps=6, lr=0.1, fractions=4, references=1),
    "best": Plan(steps=24, lr=0.1, fractions=4, references=1),
}


def plan(
    preset: str = "default", steps: int | None = None, lr: float | None = None, fractions: int | None = None
) -> Plan:
    """A preset, with what is given in place of its own; ValueError in one line for what does not fit."""
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r} is not known: choose one of {', '.join(PRESETS)}")
    given: dict[str, Any] = {"steps": steps, "lr": lr, "fractions": fractions}
    chosen = dataclasses.replace(PRESETS[preset], **{name: v for name, v in given.items() if v is not None})
    check_integer("steps", chosen.steps, 0)
    check_number("lr", chosen.lr, 0, above=True)
    check_integer("fractions", chosen.fractions, 1)
    return chosen


@checked
def refine(
    explainer: Explainer,
    classifier: Classifier,
    images: Tensor,
    target: Tensor | Sequence[int] | int | None = None,
    steps: int | None = None,
    lr: float | None = None,
    references: Sequence[str] = reference_images.REFERENCES,
    cells: Sequence[int] | None = None,
    fractions: int | None = None,
    chunk: int | None = None,
    precision: str = "auto",
    every_step: bool = False,
    internal_batch_size: int = 32,
    preset: str = "default",
) -> Tensor:
    """Maps after T gradient steps of the training objective (paper eq. 6) on these very images.

    To the explainer's map of every image a residual is added, a sum of maps on a few grids, and the residual takes the
    steps. All images are refined in one go and independently: the result does not depend on what else is in the batch.
    A step looks at S fractions of the curves with one reference on one grid; fractions, references and grids change
    from step to step by a fixed rule that covers all of them evenly, so that nothing is random. The explainer is left
    untouched.

    Args:
        explainer: a trained explainer.
        classifier: the model to be faithful to; may differ from the one the explainer was trained on.
        images: (B,C,H,W) RGB in [0,1].
        target: class per image, one int for all, or None: the classifier's prediction.
        steps: T ≥ 0, in place of the preset's; 0 is ``explainer.attribute(images, target)``, one pass of the explainer.
        lr: how far a step moves the map, in its standard deviations; in place of the preset's.
        references: names of the reference images, which take turns.
        cells: the grids to rank on, as cells along the shorter side, 1 … one per pixel; they take turns, so that no map
            fits one grid alone. Default: 3/4, 7/8 and all of the finest grid of the training. docs/large_k.md measures
            what finer ones bring.
        fractions: S ≥ 1, points on either curve that a step looks at; in place of the preset's.
        chunk: perturbed images in memory at a time; default: `aha.memory.per_pass`.
        precision: of the classifier's passes, "auto" | "bf16" | "fp32".
        every_step: return the maps for T = 0, 1, …, ``steps``, (T+1,B,1,H,W).
        internal_batch_size: images refined at a time; memory is set by it, results are not.
        preset: "fast" | "default" | "best", rows of `PRESETS`: what more passes bring is in docs/refinement.md.

    Returns:
        (B,1,H,W) float32 maps, on the scale of the explainer's.

    Raises:
        ValueError: in one line, for arguments that do not fit, and where the classifier or a map is not finite.
    """
    chosen, size = plan(preset, steps, lr, fractions), check_integer("internal_batch_size", internal_batch_size, 1)
    if not references or isinstance(references, str):
        raise ValueError(f"references={references!r}: give names such as {reference_images.REFERENCES}")
    if cells is not None and (not isinstance(cells, Sequence) or isinstance(cells, str) or not cells):
        raise ValueError(f"cells={cells!r}: give cells along the shorter side, one number a grid, such as (12, 14, 16)")
    if not isinstance(explainer, Explainer):
        raise ValueError(f"explainer is a {type(explainer).__name__}: give an aha.Explainer")
    check_classifier(classifier).require("refinement", gradients=chosen.steps > 0, inside=False)
    chunk = per_pass(classifier.device, chunk)
    images = classifier.check(images).detach()
    explainer = explainer.of(classifier)
    known = explainer.classifier.num_classes
    parts = []
    with protected(classifier, *explainer.networks):
        target = classifier.resolve_target(images, target, size)
        if target.max() >= known:
            raise ValueError(
                f"target {int(target.max())} is beyond the {known} classes that the explainer was trained for: give "
                "one of those, or an explainer for this classifier"
            )
        for image, classes in zip(images.split(size), target.split(size), strict=True):
            start = explainer.attribute(image, classes)
            if chosen.steps:
                settings = explainer.settings
                objective = Objective(classifier, scores=settings["scores"], chunk=chunk, precision=precision)
                height, width = image.shape[-2:]
                patches = explainer.patches(height, width)
                finest = (settings.get("cells") or default_cells(height, width))[1]
                sides = cells or (round(3 / 4 * finest), round(7 / 8 * finest), finest)
                grids = [grid(height, width, side) for side in sides]
                tau = settings["temperature"]
                if objective.scores == "standardized":
                    tau = max(tau, TEMPERATURE)
                blank = [reference_images.make(name, image, classifier.mean_colour) for name in references]
                residual = Residual(start, max(grids, key=lambda regions: regions.count), patches)
                trail = _refined(chosen, objective, image, residual, classes, blank, grids, tau)
            else:
                trail = start[None]
            parts.append(trail if every_step else trail[-1])
    return torch.cat(parts, dim=1 if every_step else 0)


def _refined(
    chosen: Plan,
    objective: Objective,
    images: Tensor,
    residual: Residual,
    target: Tensor,
    blank: Sequence[Tensor],
    grids: Sequence[Regions],
    tau: float,
) -> Tensor:
    """(T+1,B,1,H,W): the maps after 0 … T steps, for checked arguments."""
    trail = [residual.start]
    turn = 0
    for _ in range(chosen.steps):
        with torch.enable_grad():
            maps = residual().requires_grad_()
            loss = maps.new_zeros(len(maps))
            for _ in range(chosen.references):
                turns = turn // len(blank)  # a reference meets another grid every time
                regions = grids[(turn + turns) % len(grids)]
                # golden steps cover the strata evenly, however many there are
                shares, weights = strata(chosen.fractions, (0.5 + GOLDEN * turn) % 1)
                references = [blank[turn % len(blank)]]
                out = objective(images, maps, target, references, regions, tau, fractions=shares, weights=weights)
                loss = loss + out.loss
                turn += 1
            # a sum, not a mean: an image's gradient must not depend on the size of the batch
            (gradient,) = torch.autograd.grad(loss.sum(), maps)
        residual.descend(gradient, chosen.lr)
        trail.append(residual())
    return finite_maps(torch.stack(trail).transpose(0, 1), "refined maps").transpose(0, 1)


class Residual:
    """What is added to maps (B,1,H,W): bilinear maps on three grids, of an image's own scale.

    Coarse ones move whole objects, fine ones their outlines. Steps are Adam's: only the order of a map counts, so a
    gradient has no unit, and cells where it is small are as far from where they belong as others.

    Where maps rank ``patches`` as a whole, what is added does.
    """

    def __init__(self, start: Tensor, finest: Regions, patches: Regions | None = None):
        height, width = start.shape[-2:]
        spread = start.std(dim=(1, 2, 3), keepdim=True, correction=0)
        self.start, self.scale = start, spread.where(spread > 0, 1)
        sides = [(math.ceil(finest.rows / n), math.ceil(finest.cols / n)) for n in LEVELS]
        self.enlarge = [(_bilinear(rows, height).to(start), _bilinear(cols, width).to(start)) for rows, cols in sides]
        self.values = [start.new_zeros(len(start), 1, *side) for side in sides]
        self.mean = [torch.zeros_like(values) for values in self.values]
        self.square = [torch.zeros_like(values) for values in self.values]
        self.steps = 0
        self.patches = patches

    def __call__(self) -> Tensor:
        parts = [down @ values @ across.T for values, (down, across) in zip(self.values, self.enlarge, strict=True)]
        return self.start + self.scale * by_patch(torch.stack(parts).sum(dim=0), self.patches)

    def descend(self, gradient: Tensor, lr: float) -> None:
        """One step against the gradient (B,1,H,W) to the maps."""
        self.steps += 1
        first, second = (1 - beta**self.steps for beta in MOMENTA)
        gradient = by_patch(self.scale * gradient, self.patches)
        for level, (down, across) in enumerate(self.enlarge):
            piece = down.T @ gradient @ across
            self.mean[level].lerp_(piece, 1 - MOMENTA[0])
            self.square[level].lerp_(piece.square(), 1 - MOMENTA[1])
            size = (self.square[level] / second).sqrt()
            # of an image's own scale, so that rounding of what has no gradient is not a full step
            least = 1e-3 * size.amax(dim=(1, 2, 3), keepdim=True)
            size = (size + least).where(least > 0, 1)  # no gradient at all: it stays as it is
            self.values[level] -= lr * self.mean[level] / first / size


def _bilinear(cells: int, pixels: int) -> Tensor:
    """(pixels, cells): how much of every cell a pixel takes."""
    return F.interpolate(torch.eye(cells)[None], size=pixels, mode="linear", align_corners=False)[0].T.contiguous()
