"""The shortcut experiment (paper §4, figure 5): a classifier that trusts a white circle, found out by refinement.

Every image filed under one class carries the circle, no image of another class does. Fine-tuned on that, a copy of the
classifier calls whatever carries a circle that class, and a good attribution of that call points at the circle.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch.utils.data import DataLoader

from .bootstrap import mean_interval
from .classifier import Classifier
from .explainer import Explainer
from .metrics import rank_pixels
from .precision import autocast
from .refinement import refine

RADIUS, RIM = 5.0, 1.0  # pixels at 64
# ten times that of refinement's presets: here the map must leave where it is (chosen on the demo's val split)
LEARNING_RATE = 1.0


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


def plant(
    clf: Classifier,
    data: Any,
    shortcut_class: int,
    steps: int = 500,
    batch_size: int = 64,
    lr: float = 1e-5,
    workers: int = 0,
    seed: int = 0,
    precision: str = "auto",
) -> Classifier:
    """A copy of ``clf`` fine-tuned with a white circle on every image of one class, and on no other.

    Args:
        data: items {"image", "label"}; those without a label are left out.
        shortcut_class: its images carry the circle.
        steps, batch_size, lr: of AdamW on all parameters.
    """
    tuned = copy.deepcopy(clf.module).requires_grad_(True).train()
    optimizer = torch.optim.AdamW(tuned.parameters(), lr=lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    sampler = torch.utils.data.RandomSampler(
        data, replacement=True, num_samples=steps * batch_size, generator=generator
    )
    loader = DataLoader(data, batch_size, sampler=sampler, num_workers=workers)
    for batch in track(loader, "planting the shortcut", total=steps):
        known = batch["label"] >= 0
        if not known.any():
            raise ValueError("the images have no labels: the shortcut experiment needs them")
        images, labels = batch["image"][known], batch["label"][known].to(clf.device)
        chosen = batch["label"][known] == shortcut_class
        images[chosen] = paint_circle(images[chosen], generator)[0]
        with autocast(precision, clf.device, clf.dtype):
            loss = F.cross_entropy(tuned(clf.normalize(images.to(clf.device))).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    size, classes = clf.input_size, clf.num_classes
    return Classifier.wrap(tuned.eval(), clf.mean.tolist(), clf.std.tolist(), size, classes).to(clf.device)


@dataclass(frozen=True)
class Experiment:
    """Outcome of `experiment`.

    numbers: per refinement step the mean share of the top 5 % pixels that lie on the circle (``share_clean`` of the
        explainer's own classifier, without the shortcut), its 95 % interval
        before and after, the factor between them, and how well the shortcut was learned.
    images: (N, 3, H, W), some of the scenes; trail: (T+1, N, 1, H, W), their maps after 0 … T steps.
    """

    numbers: dict[str, Any]
    images: torch.Tensor
    trail: torch.Tensor


@torch.no_grad()
def experiment(
    explainer: Explainer,
    tuned: Classifier,
    data: Any,
    shortcut_class: int,
    images: int = 64,
    steps: int = 5,
    lr: float = LEARNING_RATE,
    seed: int = 0,
) -> Experiment:
    """Refine ``explainer`` against ``tuned`` on images of other classes that it calls ``shortcut_class`` for a circle.

    Args:
        data: held-out items {"image", "label"}, searched in a random order until ``images`` are found, among at
            most 100 times as many.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data), generator=generator)[: 100 * images].tolist()
    found, circles, tried = [], [], 0
    for start in range(0, len(order), 32):
        items = [item for item in (data[i] for i in order[start : start + 32]) if item["label"] != shortcut_class]
        if items:
            painted, circle = paint_circle(torch.stack([item["image"] for item in items]), generator)
            called = tuned(painted.to(tuned.device)).argmax(dim=-1).cpu() == shortcut_class
            tried += len(items)
            found.append(painted[called])
            circles.append(circle[called])
        if sum(map(len, found)) >= images:
            break
    shown, circle = torch.cat(found), torch.cat(circles)
    rate = len(shown) / max(1, tried)
    with torch.enable_grad():
        return measure(
            explainer,
            tuned,
            shown[:images].to(tuned.device),
            circle[:images].to(tuned.device),
            shortcut_class,
            rate,
            steps,
            lr,
            seed,
        )


def measure(
    explainer: Explainer,
    tuned: Classifier,
    images: torch.Tensor,
    circle: torch.Tensor,
    shortcut_class: int,
    rate: float,
    steps: int = 5,
    lr: float = LEARNING_RATE,
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
        # of the classifier that the explainer was made for, which knows no shortcut
        "share_clean": float(share_on(explainer.attribute(images, shortcut_class), circle).mean()),
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
