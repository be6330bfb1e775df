"""What an experiment takes, before it is begun: classifiers, passes, hours, disk."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from .. import terminal
from ..attributors import Passes
from ..classifier import RANDOM, Classifier, from_name
from ..evaluation import MethodSpec
from ..metrics import protocols
from . import catalog
from .run import Setting, specs

BACKWARD = 2.0  # a backward pass costs about two forward passes
TRAINING_IMAGES, VALIDATION_IMAGES = 1_281_167, 50_000  # ImageNet


@dataclass(frozen=True)
class Work:
    """One line of the estimate.

    Attributes:
        what: classifier and what is done with it.
        images: that it is done with.
        forward, backward: passes per image, in full passes.
        hours: at the throughput measured here.
        bytes: on disk.
    """

    what: str
    images: int
    forward: float
    backward: float
    hours: float
    bytes: float


def of_method(spec: MethodSpec, patches: int = 196, channels: int = 768, blocks: int = 12) -> Passes:
    """Passes that a method takes for one image, parts of a pass counted by their share of the blocks."""
    options = spec.options

    def option(name: str, default: int) -> int:
        return int(options.get(name, default))

    last = 1 / blocks
    path = option("n_steps", 20)
    window = option("window", round(min(2 * math.sqrt(patches), 28)))
    mda = patches * (window + 1) - window * (window - 1) / 2 + 18
    steps = option("steps", 0)
    table: dict[str, tuple[float, float]] = {
        "random": (0, 0),
        "rollout": (1, 0),
        "raw_attention": (1, 0),
        "input_x_gradient": (1, 1),
        "integrated_gradients": (option("n_steps", 50), option("n_steps", 50)),
        "gradcam_vit": (1, last),
        "gradcam": (1, last),
        "gradcam_pp": (1, last),
        "hirescam": (1, last),
        "scorecam": (channels + 1, 0),
        "ablationcam": (1 + channels * last, 0),
        "attention_ig": (path, path * last),
        "transition_attention": (1 + path, path * last),
        "bi_attention": (1 + path, 1 + path * last),
        "chefer": (1, 2),
        "legrad": (1, 1),
        "tis": (1 + option("n_masks", 1024) / 2, 0),
        "vit_cx": (2 * channels / 4 + 1, 0),  # K, the number of clusters, is known only per image
        "rise": (option("n_masks", 500), 0),
        "lime": (option("n_samples", 1000), 0),
        "kernel_shap": (option("n_samples", 1000), 0),
        "mda": (21 + min(mda, options.get("max_passes") or mda), 1 + 20 * last),
        "caap": (2 + patches * 2 / 3, 0),
        "libragrad": (1, 1),
        "attcam": (1, 1),
        "fullgrad_plus": (1, 1),
        "fastshap": (1, 0),
        "vit_shapley": (1, 0),
        # each step of the refinement sees 2·14 perturbed images and the two ends for three references
        "aha": (1 + steps * 3 * 30, steps * 3 * 28),
    }
    forward, backward = table.get(spec.name, (math.nan, math.nan))
    return Passes(math.ceil(forward) if forward == forward else 0, math.ceil(backward) if backward == backward else 0)


def of_metrics(names: tuple[str, ...]) -> float:
    """Forward passes per map of some protocols."""
    total = 0.0
    for name in names:
        protocol = protocols.get(name)
        points = getattr(protocol, "points", None) or 224
        if name != "localisation":
            total += 2 * (points - 2) * max(1, len(protocol.references)) + len(protocol.references)
    return total


def estimate(name: str, setting: Setting) -> list[Work]:
    """The parts of an experiment; each classifier is built with random weights and timed on this machine."""
    experiment = catalog.get(name)
    work = []
    for classifier in experiment.classifiers:
        source = setting.source(classifier, experiment)
        clf = _with_random_weights(source.classifier)
        speed = throughput(clf)
        images = source.limit or VALIDATION_IMAGES
        weights = sum(p.numel() * p.element_size() for p in clf.parameters())
        height, width = clf.input_size
        patches, channels, blocks = _shape(clf)

        def add(
            what: str,
            count: int,
            forward: float,
            backward: float,
            size: float,
            clf: Classifier = clf,
            speed: float = speed,
        ) -> None:
            hours = count * (forward + BACKWARD * backward) / speed / 3600
            work.append(Work(f"{clf.name.removeprefix(RANDOM)}: {what}", count, forward, backward, hours, size))

        for variant in experiment.explainers:
            config = setting.training(setting.output, variant.training)
            count = TRAINING_IMAGES if not setting.small else (config.steps or 0) * config.batch_size
            perturbed = config.targets * 2 * (config.fractions - 2)
            add(f"training {variant.name}".strip(), count, perturbed + 4, perturbed, weights * 0.2)
        metrics = of_metrics(experiment.protocols)
        for spec in specs(experiment, setting, {variant.name: "" for variant in experiment.explainers}):
            passes = of_method(spec, patches, channels, blocks)
            count = images * len(experiment.targets)
            # maps are kept in half precision
            add(spec.label, count, passes.forward + metrics, passes.backward, count * height * width * 2)
        work.append(Work(f"{clf.name.removeprefix(RANDOM)}: weights", 0, 0, 0, 0, weights))
    return work


def main(name: str, setting: Setting) -> None:
    """Print the estimate as a table."""
    work = estimate(name, setting)
    experiment = catalog.get(name)
    table = Table(title=f"{name}: {experiment.title}", caption=f"decided by this library: {experiment.decided}")
    table.add_column("what")
    for heading in ("images", "forward / image", "backward / image", "hours here", "disk GB"):
        table.add_column(heading, justify="right")
    for part in work:
        table.add_row(
            part.what,
            f"{part.images:,}" if part.images else "",
            f"{part.forward:,.0f}" if part.images else "",
            f"{part.backward:,.0f}" if part.images else "",
            f"{part.hours:,.2f}" if part.images else "",
            f"{part.bytes / 1e9:,.2f}",
        )
    hours, disk = sum(part.hours for part in work), sum(part.bytes for part in work)
    table.add_section()
    table.add_row("all", "", "", "", f"{hours:,.1f}", f"{disk / 1e9:,.2f}")
    console = terminal.console()
    console.print(table)
    console.print(
        "Hours are the passes over the throughput of one classifier pass, timed on this machine with random weights in "
        "float32;\nthe explainer's encoder, reading of images and what is kept from earlier runs are not counted."
    )


def throughput(clf: Classifier, batch: int = 8, seconds: float = 1.0) -> float:
    """Images per second through ``clf``, forward, float32."""
    images = torch.rand(batch, 3, *clf.input_size, device=clf.device)
    with torch.no_grad():
        clf(images)
        done, started = 0, time.perf_counter()
        while True:
            clf(images)
            if images.is_cuda:
                torch.cuda.synchronize()
            done += batch
            elapsed = time.perf_counter() - started
            if elapsed > seconds:
                return done / elapsed


def _with_random_weights(name: str) -> Classifier:
    own = name if name == "scenes" or name.startswith((RANDOM, "hf:")) else f"{RANDOM}{name}"
    return from_name(own).to("cuda" if torch.cuda.is_available() else "cpu")


def _shape(clf: Classifier) -> tuple[int, int, int]:
    """Patches, channels of the last feature map, and blocks."""
    module: Any = clf.module
    blocks = len(getattr(module, "blocks", ())) or 12
    embed = getattr(module, "patch_embed", None)
    patches = getattr(embed, "num_patches", None) or 196
    return int(patches), int(getattr(module, "num_features", 768)), blocks
