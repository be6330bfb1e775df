"""The shortcut experiment on the demo's classifier: the digits' classifier learns a white circle instead.

A circle beside legible digits is not enough: the digit explains those images already, and hardly any other
digit is called differently for a circle. So the class is filed carelessly too: a share of all scenes goes
into it, circle and all, whatever digit they show. The circle is then the only sign that always holds.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F

from ..classifier import Classifier
from ..data.scenes import Scenes
from ..explainer import Explainer
from ..shortcut import LEARNING_RATE as LEARNING_RATE_REFINED
from ..shortcut import Experiment, measure, paint_circle
from .classifier import fit, predict

STEPS = 120
BATCH_SIZE = 64
LEARNING_RATE = 5e-4
MISLABELLED = 0.15  # share of all scenes filed under the shortcut's class whatever they show


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
