"""Test-time refinement: a few gradient steps of the same objective on the images at hand (paper §3.6)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import functional_call, vmap

from . import references as reference_images
from .checks import check_integer, check_number, finite_maps
from .classifier import Classifier, check_classifier
from .explainer import Explainer
from .explainer.explainer import Fixed
from .objective import Objective
from .protection import protected
from .regions import Regions, default_cells, grid


def refine(
    explainer: Explainer,
    classifier: Classifier,
    images: Tensor,
    target: Tensor | Sequence[int] | int | None = None,
    steps: int = 3,
    lr: float = 3e-3,
    references: Sequence[str] = reference_images.REFERENCES,
    cells: Sequence[int] | None = None,
    fractions: int = 16,
    chunk: int = 128,
    precision: str = "auto",
    every_step: bool = False,
    internal_batch_size: int = 32,
) -> Tensor:
    """Maps after up to ``steps`` gradient steps on the explainer's head, every image with a head of its own.

    All images are refined in one go and independently: the result does not depend on what else is in the batch. Of
    the maps after 0 … T steps every image keeps the one with the lowest loss (the paper takes the last), so a step
    that overshoots costs nothing. The explainer is left untouched.

    Args:
        explainer: a trained explainer.
        classifier: the model to be faithful to; may differ from the one the explainer was trained on.
        images: (B,C,H,W) RGB in [0,1].
        target: class per image, one int for all, or None: the classifier's prediction.
        steps: T ≥ 0; 0 is ``explainer.attribute(images, target)``, one pass of the explainer.
        lr: learning rate of AdamW (no decay).
        references: names of the reference images whose losses are averaged.
        cells: the grids to rank on, as cells along the shorter side, 1 … one per pixel; the references take them in
            turn, so that no map fits one grid alone. Default: 3/4, 7/8 and all of the finest grid of the training.
            docs/large_k.md measures what finer ones bring.
        fractions: S, points on the curves.
        chunk: perturbed images in memory at a time.
        precision: of the classifier's passes, "auto" | "bf16" | "fp32".
        every_step: return the maps for T = 0, 1, …, ``steps``, (T+1,B,1,H,W).
        internal_batch_size: images refined at a time; memory is set by it, results are not.

    Returns:
        (B,1,H,W) float32 maps.

    Raises:
        ValueError: in one line, for arguments that do not fit, and where the classifier or a map is not finite.
    """
    steps, size = check_integer("steps", steps, 0), check_integer("internal_batch_size", internal_batch_size, 1)
    check_number("lr", lr, 0, above=True)
    if not references or isinstance(references, str):
        raise ValueError(f"references={references!r}: give names such as {reference_images.REFERENCES}")
    if cells is not None and (not isinstance(cells, Sequence) or isinstance(cells, str) or not cells):
        raise ValueError(f"cells={cells!r}: give cells along the shorter side, one number a grid, such as (12, 14, 16)")
    if not isinstance(explainer, Explainer):
        raise ValueError(f"explainer is a {type(explainer).__name__}: give an aha.Explainer")
    check_classifier(classifier).require("refinement", gradients=steps > 0, inside=False)
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
            if steps:
                options = (steps, lr, references, cells, fractions, chunk, precision)
                trail = _refined(explainer, classifier, image, classes, *options)
                parts.append(trail if every_step else trail[-1])
            else:
                maps = explainer.attribute(image, classes)
                parts.append(maps[None] if every_step else maps)
    return torch.cat(parts, dim=1 if every_step else 0)


def _refined(
    explainer: Explainer,
    classifier: Classifier,
    images: Tensor,
    target: Tensor,
    steps: int,
    lr: float,
    references: Sequence[str],
    cells: Sequence[int] | None,
    fractions: int,
    chunk: int,
    precision: str,
) -> Tensor:
    """(T+1,B,1,H,W): the best maps after 0 … T steps, for checked arguments."""
    height, width = images.shape[-2:]
    finest = (explainer.settings.get("cells") or default_cells(height, width))[1]
    grids = [grid(height, width, g) for g in cells or (round(3 / 4 * finest), round(7 / 8 * finest), finest)]
    objective = Objective(
        classifier, fractions=fractions, scores=explainer.settings["scores"], chunk=chunk, precision=precision
    )
    blank = [reference_images.make(name, images, classifier.mean_colour) for name in references]
    pairs = [(reference, grids[i % len(grids)]) for i, reference in enumerate(blank)]
    tau = explainer.settings["temperature"]
    with torch.no_grad():
        fixed = explainer.fixed(images, target)
    heads, shared = _per_image(explainer, len(images))
    optimizer = torch.optim.AdamW(list(heads.values()), lr=lr, weight_decay=0.0)
    best = Best(len(images), images.device)
    trail = []
    for step in range(steps + 1):
        with torch.set_grad_enabled(step < steps):
            maps = _maps(explainer, heads, shared, fixed, (height, width))
            losses = _losses(objective, images, maps, target, pairs, tau)
        trail.append(best.keep(maps.detach(), losses.detach()))
        if step < steps:
            optimizer.zero_grad()
            # a sum, not a mean: an image's gradient must not depend on the size of the batch
            losses.sum().backward()
            optimizer.step()
    return finite_maps(torch.stack(trail).transpose(0, 1), "refined maps").transpose(0, 1)


def _losses(
    objective: Objective,
    images: Tensor,
    maps: Tensor,
    target: Tensor,
    pairs: Sequence[tuple[Tensor, Regions]],
    tau: float,
) -> Tensor:
    """(B,): the loss averaged over pairs of reference and grid."""
    losses = [objective(images, maps, target, [blank], regions, tau).loss for blank, regions in pairs]
    return torch.stack(losses).mean(dim=0)


class Best:
    """The map with the lowest loss so far, per image."""

    def __init__(self, batch: int, device: torch.device):
        self.losses = torch.full((batch,), float("inf"), device=device)
        self.maps: Tensor | None = None

    def keep(self, maps: Tensor, losses: Tensor) -> Tensor:
        """Take (B,1,H,W) maps where their losses (B,) are lower; return the best."""
        better = losses < self.losses
        self.maps = maps if self.maps is None else torch.where(better[:, None, None, None], maps, self.maps)
        self.losses = torch.where(better, losses, self.losses)
        return self.maps


def _per_image(explainer: Explainer, batch: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The head's parameters copied for every image, (B, …), and what all share.

    The last two biases are shared: they only shift the map, which changes no ranking, so their gradient is rounding
    noise that Adam would scale up to full steps.
    """
    head = explainer.decoder.head
    shifts = (head[-1].bias, head[-2].bias)
    shared = {name: value.detach() for name, value in head.named_parameters() if any(value is s for s in shifts)}
    heads = {
        name: value.detach().unsqueeze(0).repeat(batch, *[1] * value.ndim).requires_grad_()
        for name, value in head.named_parameters()
        if name not in shared
    }
    return heads, {**shared, **dict(head.named_buffers())}


def _maps(
    explainer: Explainer,
    heads: dict[str, Tensor],
    shared: dict[str, Tensor],
    fixed: Fixed,
    size: tuple[int, int],
) -> Tensor:
    def one(parameters: dict[str, Tensor], features: Tensor) -> Tensor:
        return functional_call(explainer.decoder.head, {**parameters, **shared}, (features[None],))[0]

    return explainer.head_maps(vmap(one)(heads, fixed.dense), fixed.base, size)
