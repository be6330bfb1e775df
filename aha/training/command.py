"""``aha train``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from .. import processes
from ..explainer import Explainer
from ..explainer.decoder import DecoderConfig
from ..explainer.explainer import COLOURS
from ..source import Source
from ..terminal import failed
from . import universal
from .trainer import CONTINUED, TrainConfig, Trainer


@dataclass(frozen=True)
class Universal:
    """The explainer that ships, made again."""

    universal: bool = False
    """Train it, on several classifiers in turn; the other options do not apply but OUTPUT, STEPS and RESUME."""
    photographs: Path = Path("runs/photographs")
    """Folder of the photographs, Debian packages that are downloaded where they are missing."""
    universal_weights: Path | None = None
    """Folder of the classifiers' weights, NAME.safetensors, instead of the hub."""


def train(
    source: Annotated[Source, tyro.conf.arg(name="")] = Source(),  # noqa: B008 - frozen; tyro shows its fields
    encoder: str | None = None,
    encoder_weights: Path | None = None,
    evidence: bool = True,
    start: Path | None = None,
    fresh: bool = False,
    decoder: DecoderConfig = DecoderConfig(),  # noqa: B008
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = TrainConfig(),  # noqa: B008
    remake: Annotated[Universal, tyro.conf.arg(name="")] = Universal(),
    augment: bool = True,
    resume: bool = False,
) -> None:
    """Train an explainer; writes OUTPUT/explainer, checkpoints, log.jsonl and TensorBoard files.

    OUTPUT is runs/train unless given. Without an encoder the explainer sees what the classifier says of its target and
    starts from the universal weights (docs/training.md has what that brings). Several processes (torchrun
    --nproc-per-node N -m aha.cli train …) share every batch.

    Args:
        encoder: a timm name, hf: and a transformers name or folder, or classifier: the classifier's own features.
        encoder_weights: local weights file for a timm encoder.
        evidence: with --no-evidence the explainer sees an encoder's features alone (the classifier's own unless
            --encoder is given), as published; so do the objectives of Shapley values.
        start: folder of an explainer to start from instead of the universal one. Training further begins at the
            temperature 0.015 unless --tau is given.
        fresh: start untrained.
        decoder: widths, where there is an encoder.
        augment: random crops and flips.
        resume: continue from the newest checkpoint in OUTPUT that is whole. A folder that holds a run is refused
            without it.
    """
    output = config.output or "runs/train"
    if remake.universal:
        run = dataclasses.replace(universal.TRAINING, steps=config.steps or universal.TRAINING.steps)
        universal.train(Path(output), remake.photographs, remake.universal_weights, config=run, resume=resume)
        if processes.join().is_main_process:
            print(f"explainer written to {output}/explainer")
        return
    classifier = source.load_classifier()
    data = source.images(classifier.input_size, training=True, augment=augment, seed=config.seed)
    # Shapley values are no order: they need a map of their own
    evidence = evidence and config.objective == "ranking"
    alone = evidence and encoder is None
    if start is not None and fresh:
        raise ValueError(f"--start {start} and --fresh: give one of them")
    further = start is not None or (alone and not fresh and len(classifier.mean) == COLOURS)
    if start is not None:
        explainer = Explainer.from_pretrained(start, classifier)
    elif further:
        explainer = Explainer.universal(classifier)
    else:
        widths = None if alone else decoder
        explainer = Explainer.build(
            classifier, encoder, encoder_weights, decoder=widths, evidence=evidence, seed=config.seed
        )
    if further and config.tau is None and config.scores == "standardized":
        config = dataclasses.replace(config, tau=CONTINUED)
    trainer = Trainer(explainer, classifier, data, dataclasses.replace(config, output=output))
    trainer.fit(resume=resume)
    if not trainer.accelerator.is_main_process:
        return
    print(f"explainer written to {output}/explainer")
    if trainer.failures:
        raise failed(trainer.failures, len(data), "images")
