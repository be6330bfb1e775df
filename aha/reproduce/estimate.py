"""What an experiment takes, before it is begun: classifiers, passes, hours, disk.

Costs are those that methods (`Attributor.passes`), protocols (`Protocol.passes`), the objective and the training tell.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from .. import terminal
from ..attributors import Passes, count_passes
from ..classifier import RANDOM, Classifier, from_name
from ..evaluation.compare import by_preprocessing
from ..explainer import Explainer
from ..metrics import PROTOCOLS, Suite
from ..objective import Objective
from ..recipes import RECIPES
from ..training.trainer import TrainConfig, make_objective
from . import catalog
from .catalog import Experiment
from .run import Setting, decoder, encoder, specs

BACKWARD = 2.0  # a backward pass costs about two forward passes
TRAINING_IMAGES, VALIDATION_IMAGES = 1_281_167, 50_000  # ImageNet
BLURS = 3.4  # that "adaptive_blur" tries per photograph: bench/results/mda_table_cpu.json


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


def estimate(name: str, setting: Setting) -> list[Work]:
    """The parts of an experiment; each classifier is built with random weights and timed on this machine."""
    experiment = catalog.get(name)
    work = []
    for source in setting.sources(experiment):
        clf = _with_random_weights(source.classifier)
        sample = _sample(clf, source, setting)
        speed = throughput(clf)
        weights = sum(p.numel() * p.element_size() for p in clf.parameters())

        def add(what: str, images: int, passes: Passes, size: float, clf: Any = clf, speed: float = speed) -> None:
            hours = images * (passes.forward + BACKWARD * passes.backward) / speed / 3600
            what = f"{clf.name.removeprefix(RANDOM)}: {what}"
            work.append(Work(what, images, passes.forward, passes.backward, hours, size))

        explainer = None
        if experiment.explainers:
            explainer = Explainer.build(
                clf, encoder(setting), pretrained=False, decoder=decoder(setting), evidence=False
            )
        for variant in experiment.explainers:
            config = setting.training(setting.output, variant.training)
            count = (config.steps or 0) * config.batch_size if setting.small else TRAINING_IMAGES
            add(f"training {variant.name}".strip(), count, of_training(config, clf, explainer), weights * 0.2)
        if experiment.kind != "shortcut":
            count = (source.limit or VALIDATION_IMAGES) * len(experiment.targets)
            shared, per_map = of_protocols(experiment, clf, sample)
            add("what all methods share", count, shared, 0)
            height, width = clf.input_size
            crops = len(by_preprocessing([PROTOCOLS[name] for name in experiment.protocols], source))
            for spec in specs(experiment, setting, {variant.name: explainer for variant in experiment.explainers}):
                own = spec.create(clf, setting.seed).passes(sample["image"])
                # every crop has maps of its own, kept in half precision; memory is measured on one image more
                once = own * (len(experiment.targets) / count)
                add(spec.label, count, crops * own + once + per_map, crops * count * height * width * 2)
        work.append(Work(f"{clf.name.removeprefix(RANDOM)}: weights", 0, 0, 0, 0, weights))
    return work


def of_training(config: TrainConfig, clf: Classifier, explainer: Any) -> Passes:
    """Passes that training takes for one image: its target classes, the explainer's features and the perturbed images;
    the diagnosis of four images for every line of the log."""
    features = Passes(*explainer.passes)
    objective = make_objective(config, clf)
    assert isinstance(objective, Objective)  # the catalogue trains for the ranking alone
    diagnosed = min(4, config.batch_size) / config.batch_size / config.log_every
    maps = 1 if config.shared_map else config.targets
    return (Passes(1) + features) * (1 + diagnosed) + Passes(*objective.passes) * maps


def of_protocols(experiment: Experiment, clf: Classifier, sample: dict[str, Any]) -> tuple[Passes, Passes]:
    """Forward passes that the protocols of an experiment take: per image for all methods together, and per map."""
    shared = per_map = 0.0
    for name in dict.fromkeys((*experiment.protocols, "localisation")):
        suite = Suite(clf, name)
        blurs, share = BLURS, 1.0
        if "label" in sample:
            with count_passes(clf) as counted:
                batch = suite.begin(sample["image"], None, sample["label"], sample["mask"])
            fewest = suite.protocol.passes(clf.input_size, blurs=0).shared
            blurs = counted.forward / len(sample["image"]) - fewest
            share = float(batch.takes_part.float().mean())
        cost = suite.protocol.passes(clf.input_size, blurs=blurs)
        shared, per_map = shared + cost.shared, per_map + share * cost.per_map
    return Passes(shared), Passes(per_map)


def _sample(clf: Classifier, source: Any, setting: Setting) -> dict[str, Any]:
    """Images that tell what depends on them: at small scale those of the experiment, else one of noise."""
    if not setting.small:
        generator = torch.Generator().manual_seed(0)
        return {"image": torch.rand(1, 3, *clf.input_size, generator=generator).to(clf.device)}
    data = source.images(clf.input_size, training=False, seed=setting.seed)
    return torch.utils.data.default_collate([data[index] for index in range(len(data))])


def main(name: str, setting: Setting) -> None:
    """Print the estimate as a table."""
    work = estimate(name, setting)
    experiment = catalog.get(name)
    table = Table(title=f"{name}: {experiment.title}", caption=f"decided by this library: {experiment.decided}")
    table.add_column("what")
    for heading in ("images", "forward / image", "backward / image", "hours here", "disk GB"):
        table.add_column(heading, justify="right")
    for part in work:
        known = (f"{part.images:,}", f"{part.forward:,.1f}", f"{part.backward:,.1f}", f"{part.hours:,.2f}")
        table.add_row(part.what, *(known if part.images else [""] * 4), f"{part.bytes / 1e9:,.2f}")
    hours, disk = sum(part.hours for part in work), sum(part.bytes for part in work)
    table.add_section()
    table.add_row("all", "", "", "", f"{hours:,.1f}", f"{disk / 1e9:,.2f}")
    console = terminal.console()
    console.print(table)
    console.print(
        "Hours are the passes over the throughput of one classifier pass, timed on this machine with random weights in "
        "float32;\nmasks, clusters and blurs are those of a sample; the explainer's encoder, reading of images and "
        "what is kept from earlier runs are not counted."
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
    own = name if name in RECIPES or name.startswith((RANDOM, "hf:")) else f"{RANDOM}{name}"
    return from_name(own).to("cuda" if torch.cuda.is_available() else "cpu")
