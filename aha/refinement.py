"""Test-time refinement: a few gradient steps of the same objective on the images at hand (paper §3.6)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import functional_call, vmap

from . import references as reference_images
from .classifier import Classifier
from .explainer import Explainer
from .objective import Objective
from .regions import Regions, grid

# cells along the shorter side of the grids that refinement ranks on, when the explainer does not say
DEFAULT_CELLS = 14


def refine(
    explainer: Explainer,
    classifier: Classifier,
    images: Tensor,
    target: Tensor | Sequence[int] | int | None = None,
    steps: int = 3,
    lr: float = 1e-4,
    references: Sequence[str] = reference_images.REFERENCES,
    cells: Sequence[int] | None = None,
    fractions: int = 16,
    chunk: int = 128,
    precision: str = "auto",
    every_step: bool = False,
) -> Tensor:
    """Maps after ``steps`` gradient steps on the explainer's head, every image with a head of its own.

    All images are refined in one go and independently: the result does not depend on what else is in the batch. The
    explainer is left untouched.

    Args:
        explainer: a trained explainer.
        classifier: the model to be faithful to; may differ from the one the explainer was trained on.
        images: (B,C,H,W) RGB in [0,1].
        target: class per image, one int for all, or None: the classifier's prediction.
        steps: T ≥ 0; 0 returns ``explainer.attribute(images, target)``.
        lr: learning rate of AdamW (no decay).
        references: names of the reference images whose losses are averaged.
        cells: grids to rank on, as cells along the shorter side; their losses are averaged.
        fractions: S, points on the curves.
        chunk: perturbed images in memory at a time.
        precision: of the classifier's passes, "auto" | "bf16" | "fp32".
        every_step: return the maps after 0, 1, …, T steps, (T+1,B,1,H,W).

    Returns:
        (B,1,H,W) float32 maps.
    """
    if steps < 0:
        raise ValueError(f"steps={steps}: give 0 or more")
    classifier.check(images)
    target = classifier.resolve_target(images, target)
    height, width = images.shape[-2:]
    settings = explainer.settings
    grids = [grid(height, width, g) for g in cells or settings.get("refine_cells") or (DEFAULT_CELLS,)]
    objective = Objective(classifier, fractions=fractions, scores=settings["scores"], chunk=chunk, precision=precision)
    blank = [reference_images.make(name, images, classifier.mean_colour) for name in references]
    training = explainer.training
    explainer.eval()
    try:
        with torch.no_grad():
            dense = explainer.dense(images, target)
        heads, shared = _per_image(explainer, len(images))
        optimizer = torch.optim.AdamW(list(heads.values()), lr=lr, weight_decay=0.0)
        trail = []
        for _ in range(steps):
            maps = _maps(explainer, heads, shared, dense, (height, width))
            trail.append(maps.detach())
            optimizer.zero_grad()
            _loss(objective, images, maps, target, blank, grids, settings["temperature"]).backward()
            optimizer.step()
        with torch.no_grad():
            trail.append(_maps(explainer, heads, shared, dense, (height, width)))
    finally:
        explainer.train(training)
    return torch.stack(trail) if every_step else trail[-1]


def _loss(
    objective: Objective,
    images: Tensor,
    maps: Tensor,
    target: Tensor,
    blank: Sequence[Tensor],
    grids: Sequence[Regions],
    tau: float,
) -> Tensor:
    # a sum, not a mean: an image's gradient must not depend on the size of the batch
    losses = [objective(images, maps, target, blank, regions, tau).loss.sum() for regions in grids]
    return torch.stack(losses).sum() / len(grids)


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
    dense: Tensor,
    size: tuple[int, int],
) -> Tensor:
    def one(parameters: dict[str, Tensor], features: Tensor) -> Tensor:
        return functional_call(explainer.decoder.head, {**parameters, **shared}, (features[None],))[0]

    return explainer.head_maps(vmap(one)(heads, dense), size)
