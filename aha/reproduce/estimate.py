"""What an experiment takes, before it is begun: classifiers, passes, hours, disk.

Costs are those that methods (`Attributor.passes`), protocols and training (`aha.plan`) tell.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table

from .. import terminal
from ..attributors import Passes
from ..classifier import RANDOM, Classifier
from ..evaluation.compare import by_preprocessing
from ..explainer import Explainer
from ..metrics import PROTOCOLS
from ..plan import of_protocols, of_training, time_of_a_pass, untrained
from . import catalog
from .run import Setting, decoder, encoder, specs

TRAINING_IMAGES, VALIDATION_IMAGES = 1_281_167, 50_000  # ImageNet


@dataclass(frozen=True)
class Work:
    """One line of the estimate.

    Attributes:
        what: classifier and what is done with it.
        images: that it is done with.
        forward, backward: passes per image, in full passes.
        hours: at the time of a pass measured here.
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
        clf = untrained(source.classifier)
        sample = _sample(clf, source, setting)
        forward, backward = time_of_a_pass(clf)
        weights = sum(p.numel() * p.element_size() for p in clf.parameters())

        def add(
            what: str,
            images: int,
            passes: Passes,
            size: float,
            clf: Any = clf,
            times: tuple[float, float] = (forward, backward),
        ) -> None:
            hours = images * (passes.forward + times[1] * passes.backward) * times[0] / 3600
            what = f"{clf.name.removeprefix(RANDOM)}: {what}"
            work.append(Work(what, images, passes.forward, passes.backward, hours, size))

        explainer = None
        if experiment.explainers:
            explainer = Explainer.build(
                clf, encoder(setting), pretrained=False, decoder=decoder(setting), evidence=False
            )
        for variant in experiment.explainers:
            assert explainer is not None
            config = setting.training(setting.output, variant.training)
            count = (config.steps or 0) * config.batch_size if setting.small else TRAINING_IMAGES
            add(f"training {variant.name}".strip(), count, of_training(config, clf, explainer), weights * 0.2)
        if experiment.kind != "shortcut":
            count = (source.limit or VALIDATION_IMAGES) * len(experiment.targets)
            shared, per_map = of_protocols(experiment.protocols, clf, sample)
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
        "Hours are passes by the time of a forward and a backward pass on this machine, of random weights in "
        "float32;\nmasks, clusters and blurs are those of a sample; the explainer's encoder, reading of images and "
        "what is kept from earlier runs are not counted."
    )
