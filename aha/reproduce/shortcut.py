"""The shortcut experiment on any classifier and any labelled images (paper §4, figure 5)."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch.utils.data import DataLoader

from ..classifier import Classifier
from ..demo.shortcut import Experiment, measure, paint_circle
from ..explainer import Explainer
from ..precision import autocast


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
        with autocast(precision, clf.device):
            loss = F.cross_entropy(tuned(clf.normalize(images.to(clf.device))).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    size, classes = clf.input_size, clf.num_classes
    return Classifier.wrap(tuned.eval(), clf.mean.tolist(), clf.std.tolist(), size, classes).to(clf.device)


@torch.no_grad()
def experiment(
    explainer: Explainer,
    tuned: Classifier,
    data: Any,
    shortcut_class: int,
    images: int = 64,
    steps: int = 5,
    lr: float = 3e-3,
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
