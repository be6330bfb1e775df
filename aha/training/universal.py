"""What the universal weights are trained on, and how: ``aha train --universal`` makes them again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from .. import processes
from ..classifier import Classifier, from_name
from ..data import Scenes
from ..data.photographs import Photographs, fetch
from ..explainer import Explainer
from .trainer import TrainConfig, Trainer

# of different families and sizes, in turn; the scenes ship
CLASSIFIERS = (
    "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    "deit_tiny_patch16_224.fb_in1k",
    "tf_efficientnet_lite0.in1k",
    "tf_efficientnet_lite2.in1k",
    "scenes",
)
# those that ship were made with it
TRAINING = TrainConfig(
    steps=700, batch_size=8, fractions=6, targets=1, lr=1e-3, cells=(7, 28), dropped_roles=0.1, seed=7, save_every=50
)


def subjects(
    names: tuple[str, ...], photographs: Path, weights: Path | None, device: str, seed: int = 0
) -> list[tuple[Classifier, Photographs | Scenes]]:
    """The classifiers, each with its images.

    Args:
        names: of timm, or "scenes".
        photographs: folder for `aha.data.photographs.fetch`.
        weights: folder of ``<name>.safetensors`` (or without the part after the point); None fetches from the hub.
    """
    with processes.main_first():
        fetch(photographs)
    found: list[tuple[Classifier, Photographs | Scenes]] = []
    for name in names:
        clf = from_name(name, weights_file(weights, name)).to(device)
        if name == "scenes":
            found.append((clf, Scenes("train", size=4096, seed=seed, image_size=clf.input_size[0])))
        else:
            found.append((clf, Photographs(photographs, clf.input_size[0], seed)))
    return found


def train(
    output: Path,
    photographs: Path,
    weights: Path | None = None,
    names: tuple[str, ...] | None = None,
    config: TrainConfig | None = None,
    resume: bool = False,
) -> Explainer:
    """Train one explainer on ``names`` in turn and write it to ``output/explainer``.

    Args:
        names: of `CLASSIFIERS`, all of them by default; with ``photographs`` and ``weights`` as of `subjects`.
        config: default: `TRAINING`.
        resume: go on from the newest checkpoint in ``output``.
    """
    names, config = names or CLASSIFIERS, config or TRAINING
    device = "cuda" if torch.cuda.is_available() else "cpu"
    first, *others = subjects(names, photographs, weights, device, config.seed)
    explainer = Explainer.build(first[0], seed=config.seed)
    run = dataclasses.replace(config, output=str(output))
    return Trainer(explainer, *first, run, beside=others).fit(resume=resume)


def weights_file(folder: Path | None, name: str) -> Path | None:
    """``<name>.safetensors`` in ``folder``, with or without what follows the point; None where the hub has it."""
    if folder is None or name == "scenes":
        return None
    for stem in (name, name.split(".")[0]):
        if (path := folder / f"{stem}.safetensors").is_file():
            return path
    raise ValueError(f"{folder} holds no {name}.safetensors: put the weights there, or leave out their folder")
