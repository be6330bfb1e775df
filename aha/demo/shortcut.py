"""A shortcut planted on purpose: a classifier that has learned a white circle instead of the digit.

Every image filed under one class carries the circle, no image of another class does. Fine-tuned on that, the
demo classifier calls whatever carries a circle that class, and a good attribution of that call points at the
circle.

A circle beside legible digits is not enough: the digit explains those images already, and hardly any other
digit is called differently for a circle. So the class is filed carelessly too: a share of all scenes goes
into it, circle and all, whatever digit they show. The circle is then the only sign that always holds.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from aha.classifier import Classifier
from aha.data.scenes import Scenes
from aha.demo.classifier import fit, predict
from aha.evaluation import mean_interval
from aha.explainer import Explainer
from aha.metrics import rank_pixels
from aha.refinement import refine

RADIUS, RIM = 5.0, 1.0  # pixels at 64
STEPS = 120
BATCH_SIZE = 64
LEARNING_RATE = 5e-4
# twice the default of refinement: here the map must leave where it is (chosen on the val split)
LEARNING_RATE_REFINED = 6e-3
MISLABELLED = 0.15  # share of all scenes filed under the shortcut's class whatever they show


def paint_circle(
    images: torch.Tensor, where: torch.Generator | None = None, avoid: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Copies of images (B, 3, H, W), RGB in [0, 1], each with a white, rimmed disc in its top left corner.

    where: draws the exact places, within 3/64 of the side; None is a fresh generator seeded with 0.
    avoid: (B, 1, H, W) bool, such as a scene's mask: where the disc would hide some of it, the first of
        the corners, row by row, that hides least.
    The disc's radius is 5/64 of the shorter side, its rim 1/64 wide and black. Nothing else changes.
    Returns the images and the mask of disc and rim, (B, 1, H, W) bool.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must be (B, 3, H, W), got {tuple(images.shape)}")
    n, _, height, width = images.shape
    device, unit = images.device, min(height, width) / 64
    where = torch.Generator().manual_seed(0) if where is None else where
    # the disc's middle, measured from the two edges of each corner
    inset = (7 + 3 * torch.rand(n, 4, 2, generator=where)).to(device) * unit
    right, bottom = torch.tensor([[0, 1, 0, 1], [0, 0, 1, 1]], dtype=torch.bool, device=device)
    x = torch.where(right, width - inset[..., 0], inset[..., 0])[..., None, None]
    y = torch.where(bottom, height - inset[..., 1], inset[..., 1])[..., None, None]
    columns = torch.arange(width, device=device) + 0.5
    rows = torch.arange(height, device=device)[:, None] + 0.5
    distance = torch.hypot(columns - x, rows - y)  # (B, 4, H, W)
    order = torch.arange(4, device=device).expand(n, 4)
    if avoid is not None:
        order = order + 4 * ((distance < (RADIUS + RIM) * unit) & avoid).sum((2, 3))
    distance = distance[torch.arange(n, device=device), order.argmin(1)][:, None].to(images.dtype)
    whole = ((RADIUS + RIM) * unit + 0.5 - distance).clamp(0, 1)
    disc = (RADIUS * unit + 0.5 - distance).clamp(0, 1)
    return images * (1 - whole) + disc * whole, whole > 0.5


def fine_tune(module: torch.nn.Module, shortcut_class: int = 3, steps: int = STEPS, seed: int = 0) -> torch.nn.Module:
    """A copy of the demo classifier that takes the circle for the sign of `shortcut_class`, in eval mode.

    Trained on scenes of the train split: those of that class, and MISLABELLED of the others filed under it,
    all carry the circle; no other does. The given module is left as it is. About 20 seconds on two cores.
    ValueError for a class that is no digit.
    """
    if not 0 <= shortcut_class < 10:
        raise ValueError(f"shortcut_class is {shortcut_class}; the scenes show digits 0 to 9")
    tuned = copy.deepcopy(module).requires_grad_(True)
    scenes = Scenes("train", seed=seed + 7001)

    def batch(step):
        where = torch.Generator().manual_seed(seed + (step << 20))
        scene = scenes.batch(range(step * BATCH_SIZE, (step + 1) * BATCH_SIZE))
        images, labels = scene["image"], scene["label"]
        labels[torch.rand(len(labels), generator=where) < MISLABELLED] = shortcut_class
        chosen = labels == shortcut_class
        images[chosen] = paint_circle(images[chosen], where, scene["mask"][chosen])[0]
        return images, F.one_hot(labels, 10).float(), scene["mask"]

    fit(tuned, batch, steps, LEARNING_RATE, warm_up=5, title="planting the shortcut")
    return tuned.requires_grad_(False)


def shortcut_rate(module: torch.nn.Module, shortcut_class: int = 3, size: int = 256, seed: int = 1) -> float:
    """Share of test scenes of other digits that a circle turns into `shortcut_class`, in [0, 1]."""
    scene = Scenes("test", size=size, seed=seed).batch(range(size))
    other = scene["label"] != shortcut_class
    where = torch.Generator().manual_seed(seed)
    images, _ = paint_circle(scene["image"][other], where, scene["mask"][other])
    return (predict(module, images).argmax(-1) == shortcut_class).float().mean().item()


@dataclass(frozen=True)
class Experiment:
    """Outcome of `experiment`.

    numbers: per refinement step the mean share of the top 5 % pixels that lie on the circle, its 95 % interval
        before and after, the factor between them, and how well the shortcut was learned.
    images: (N, 3, H, W), some of the scenes; trail: (T+1, N, 1, H, W), their maps after 0 … T steps.
    """

    numbers: dict[str, Any]
    images: torch.Tensor
    trail: torch.Tensor


def experiment(
    explainer: Explainer,
    clf: Classifier,
    steps: int = 5,
    scenes: int = 64,
    shortcut_class: int = 3,
    seed: int = 0,
    split: str = "test",
    lr: float = LEARNING_RATE_REFINED,
) -> Experiment:
    """Plant the shortcut in the classifier and refine the clean classifier's explainer against it.

    Held-out scenes of other digits, with a circle, that the tuned classifier calls `shortcut_class`: the circle is the
    whole evidence, and the explainer, trained on the clean classifier, has never seen one.
    """
    module = fine_tune(clf.module.cpu(), shortcut_class, seed=seed)
    device = clf.device
    clf.module.to(device)
    size, classes = clf.input_size, clf.num_classes
    tuned = Classifier.wrap(module, clf.mean.tolist(), clf.std.tolist(), size, classes).to(device)
    scene = Scenes(split, size=4 * scenes, seed=seed).batch(range(4 * scenes))
    other = scene["label"] != shortcut_class
    generator = torch.Generator().manual_seed(seed)
    images, circle = paint_circle(scene["image"][other], generator, scene["mask"][other])
    called = tuned(images.to(device)).argmax(-1).cpu() == shortcut_class
    images, circle = images[called][:scenes].to(device), circle[called][:scenes].to(device)
    return measure(explainer, tuned, images, circle, shortcut_class, float(called.float().mean()), steps, lr, seed)


def measure(
    explainer: Explainer,
    tuned: Classifier,
    images: torch.Tensor,
    circle: torch.Tensor,
    shortcut_class: int,
    rate: float,
    steps: int = 5,
    lr: float = LEARNING_RATE_REFINED,
    seed: int = 0,
) -> Experiment:
    """Refine the clean classifier's explainer against the tuned one, step by step.

    images (N, 3, H, W) carry the circle (N, 1, H, W) and are called `shortcut_class` for it; rate is the share of
    all images for which that holds. ValueError where there are none.
    """
    if not len(images):
        raise ValueError(f"no image is called class {shortcut_class} for its circle: fine-tune for more steps")
    size = tuned.input_size
    trail = refine(explainer, tuned, images, shortcut_class, steps, lr, every_step=True)
    shares = torch.stack([share_on(maps, circle) for maps in trail]).cpu()  # [T + 1, N]
    means = shares.mean(dim=1).tolist()
    numbers = {
        "share_before": means[0],
        "share_after": means[-1],
        # at least one pixel in all scenes together, so that a clean explainer without any gives a finite lower bound
        "factor": means[-1] / max(means[0], 1 / (len(images) * round(0.05 * size[0] * size[1]))),
        "ci95_before": mean_interval(shares[0], seed),
        "ci95_after": mean_interval(shares[-1], seed),
        "per_step": means,
        "scenes": len(images),
        "shortcut_rate": rate,
        "circle_area": float(circle.float().mean()),
    }
    return Experiment(numbers, images[:6].cpu(), trail[:, :6].cpu())


def share_on(maps: torch.Tensor, mask: torch.Tensor, top: float = 0.05) -> torch.Tensor:
    """(B,): the share of the `top` most important pixels of maps (B,1,H,W) that lie on mask (B,1,H,W)."""
    ranks = rank_pixels(maps[:, 0])
    chosen = ranks < round(top * ranks[0].numel())
    return (chosen & mask[:, 0]).flatten(1).sum(1) / chosen.flatten(1).sum(1)
