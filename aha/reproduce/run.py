"""Carry out an experiment of the catalogue: train what is missing, measure what is missing, write the page."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import processes, shortcut, terminal
from ..attributors import MethodSpec
from ..classifier import RANDOM
from ..data import ImageFolder, Scenes
from ..demo import run as demo
from ..demo import shortcut as demo_shortcut
from ..evaluation import Comparison, compare
from ..explainer import Explainer
from ..explainer.decoder import DecoderConfig
from ..explainer.explainer import CONFIG_FILE
from ..files import slug, write_json
from ..lock import held
from ..report import comparison as pages
from ..report import figures, html
from ..source import Source
from ..training import TrainConfig, Trainer
from . import catalog
from .catalog import Experiment

SCALES = ("paper", "small")
SMALL_CNN = f"{RANDOM}test_convnext.r160_in1k"
SHORTCUT_CLASS = 3

# images of 64 px have 8×8 tokens: a finer and narrower decoder than the paper's for 224 px
SMALL = DecoderConfig(embedding=64, width=48, head=32, strides=(2, 4, 8, 16))


@dataclasses.dataclass(frozen=True)
class Setting:
    """Where an experiment runs: the paper's scale, or the same path on scenes in a minute or two.

    Attributes:
        scale: "paper" or "small".
        data: ImageNet's folder with train and val; at small scale, scenes.
        output: shared by all experiments, so that what one has trained and measured the others find.
        weights: folder of <classifier>.safetensors files; those that are missing come from the hub.
        encoder_weights: local weights of the explainer's encoder.
        masks: folder of masks, for table6.
        images: number of images instead of the experiment's.
        batch_size: images at a time.
        workers: processes that read training images.
    """

    scale: str
    data: str
    output: Path
    weights: Path | None = None
    encoder_weights: Path | None = None
    masks: Path | None = None
    images: int | None = None
    batch_size: int = 32
    workers: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise ValueError(f"scale={self.scale!r} is not known: choose one of {', '.join(SCALES)}")

    @property
    def small(self) -> bool:
        return self.scale == "small"

    def source(self, classifier: str, experiment: Experiment) -> Source:
        """The classifier and the images to measure on."""
        limit = self.images or experiment.images
        if self.small:
            name = "scenes" if classifier.startswith("vit") else SMALL_CNN
            return Source(name, None, "scenes", limit=self.images or 4)
        file = self.weights / f"{classifier}.safetensors" if self.weights else None
        weights = file if file is not None and file.is_file() else None
        if experiment.masks:
            if self.masks is None:
                raise ValueError(f"{experiment.name} needs masks of the objects: give --masks FOLDER")
            return Source(classifier, weights, self.data, limit=limit, masks=self.masks)
        return Source(classifier, weights, self.data, "val", limit=limit)

    def sources(self, experiment: Experiment) -> list[Source]:
        """One per classifier; at small scale several become one."""
        found = [self.source(classifier, experiment) for classifier in experiment.classifiers]
        return list({source.classifier: source for source in found}.values())

    def steps(self, experiment: Experiment) -> tuple[int, ...]:
        """Refinement steps T of the explainer's rows."""
        return experiment.steps[:2] if self.small else experiment.steps

    def training(self, folder: Path, changes: Mapping[str, Any]) -> TrainConfig:
        """The paper's settings, its batch of 32 over however many processes; or a few steps of the demo's."""
        if self.small:
            base = dataclasses.replace(
                demo.TRAINING, cells=(7, 16), tau=None, steps=3, batch_size=4, fractions=4, log_every=1
            )
            # a second target, so that a shared map differs from one map per target
            changes = {**changes, "targets": 2 if changes.get("shared_map") else 1}
        else:
            base = TrainConfig(workers=self.workers)
        return dataclasses.replace(base, output=str(folder), seed=self.seed or base.seed, **changes)

    def training_images(self, clf: Any) -> Any:
        """Augmented, as for training."""
        if self.small:
            return Scenes("train", size=64, seed=self.seed, image_size=clf.input_size[0])
        return ImageFolder(self.data, image_size=clf.input_size[0], split="train", augment=True, seed=self.seed)


def reproduce(name: str, setting: Setting) -> Path:
    """Carry out an experiment; returns the folder of its page.

    Trained explainers, maps and scores are kept under ``setting.output`` and found again: by the same experiment
    when it was interrupted, and by the others.

    Raises:
        ValueError: for an unknown experiment, or one that lacks its data.
    """
    experiment = catalog.get(name)
    folder = setting.output / name
    if experiment.kind == "shortcut":
        return _shortcut(experiment, setting, folder)
    with terminal.progress() as progress:
        results = [_measured(experiment, source, setting, progress) for source in setting.sources(experiment)]
    done = Comparison()
    for part in results:
        if part is None:  # not the main process
            return folder
        done.results.update(part.results)
        done.pieces.update(part.pieces)
        done.skipped += part.skipped
    published = {clf: figures for clf, figures in experiment.published.items() if not setting.small}
    with held(folder):
        pages.write(done, folder, title=f"{name}: {experiment.title}", published=published)
        if experiment.kind == "ablation":
            _draw_ablation(experiment, done, folder)
    for line in (*done.skipped, *done.failures):
        terminal.console().print(line)
    return folder


def specs(experiment: Experiment, setting: Setting, explainers: Mapping[str, Any]) -> list[MethodSpec]:
    """The rows of an experiment; ``explainers`` is variant → its explainer, or the folder of it."""
    rows = [MethodSpec.parse(text) for text in experiment.methods]
    if setting.small:
        small = catalog.SMALL_OPTIONS
        rows = [dataclasses.replace(row, options={**row.options, **small.get(row.name, {})}) for row in rows]
    for variant, folder in explainers.items():
        rows += [
            MethodSpec("aha", {"explainer": folder, "steps": t}, row_name(variant, t))
            for t in setting.steps(experiment)
        ]
    return rows


def row_name(variant: str, steps: int) -> str:
    """How a table calls an explainer's row."""
    return " ".join(filter(None, ("AHA", variant, f"T={steps}")))


def encoder(setting: Setting) -> str | None:
    """Of the explainers; None is the classifier itself."""
    return None if setting.small else catalog.ENCODER


def decoder(setting: Setting) -> DecoderConfig:
    """Of the explainers."""
    return SMALL if setting.small else DecoderConfig()


def _measured(experiment: Experiment, source: Source, setting: Setting, progress: Any) -> Comparison | None:
    """One classifier's rows."""
    explainers = {variant.name: str(train(source, setting, variant)) for variant in experiment.explainers}
    return compare(
        [source],
        specs(experiment, setting, explainers),
        setting.output,
        experiment.protocols,
        experiment.targets,
        strict=False,
        batch_size=setting.batch_size,
        seed=setting.seed,
        progress=progress,
    )


def train(source: Source, setting: Setting, variant: catalog.Variant) -> Path:
    """The folder of the explainer of a classifier, trained or resumed where it is not there yet."""
    label = "-".join(filter(None, (source.classifier, variant.name)))
    folder = setting.output / "explainers" / slug(label)
    if not (folder / "explainer" / CONFIG_FILE).is_file():  # written last
        clf = source.load_classifier()
        explainer = Explainer.build(
            clf, encoder(setting), setting.encoder_weights, decoder=decoder(setting), evidence=False
        )
        config = setting.training(folder, variant.training)
        Trainer(explainer, clf, setting.training_images(clf), config).fit(resume=True)
    return folder / "explainer"


def _shortcut(experiment: Experiment, setting: Setting, folder: Path) -> Path:
    source = setting.source(experiment.classifiers[0], experiment)
    clf = source.load_classifier()
    trained = train(source, setting, experiment.explainers[0])
    if not processes.join().is_main_process:
        return folder
    explainer = Explainer.from_pretrained(trained, clf).to(clf.device)
    if setting.small:
        found = demo_shortcut.experiment(explainer, clf, scenes=setting.images or 8, seed=setting.seed)
    else:
        data = ImageFolder(setting.data, image_size=clf.input_size[0], split="train", augment=True, seed=setting.seed)
        held_out = ImageFolder(setting.data, image_size=clf.input_size[0], split="val")
        tuned = shortcut.plant(clf, data, SHORTCUT_CLASS, workers=setting.workers, seed=setting.seed)
        found = shortcut.experiment(explainer, tuned, held_out, SHORTCUT_CLASS, setting.images or 64)
    with held(folder):
        figures.refinement(found.images, found.trail, folder / "shortcut.png")
        write_json(folder / "shortcut.json", found.numbers)
    return folder


def _draw_ablation(experiment: Experiment, done: Comparison, folder: Path) -> None:
    """Over T with a line per variant; where variants have a place on an axis, over that with a line per T."""
    steps, placed = experiment.steps, [variant for variant in experiment.variants if variant.x is not None]
    for (model, target), result in done.results.items():
        rows = result.summary()["methods"]
        place = folder if len(done.results) == 1 else folder / slug(model) / target

        def line(points: Any, rows: Mapping[str, Any] = rows) -> dict[float, Any]:
            return {x: rows[name] for x, name in points if name in rows}

        lines = {v.name: line((t, row_name(v.name, t)) for t in steps) for v in experiment.variants}
        figures.ablation(lines, place / "figures" / "ablation_steps.png", xlabel="refinement steps T")
        if placed:
            lines = {f"T={t}": line((v.x, row_name(v.name, t)) for v in placed) for t in steps}
            figures.ablation(lines, place / "figures" / "ablation.png", xlabel=experiment.axis)
        html.write(place)
