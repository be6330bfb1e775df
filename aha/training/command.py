"""``aha train``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from ..explainer import Explainer
from ..explainer.decoder import DecoderConfig
from ..source import Source
from ..terminal import failed
from .trainer import TrainConfig, Trainer


def train(
    source: Annotated[Source, tyro.conf.arg(name="")] = Source(),  # noqa: B008 - frozen; tyro shows its fields
    encoder: str | None = None,
    encoder_weights: Path | None = None,
    evidence: bool = False,
    decoder: DecoderConfig = DecoderConfig(),  # noqa: B008
    config: Annotated[TrainConfig, tyro.conf.arg(name="")] = TrainConfig(),  # noqa: B008
    augment: bool = True,
    resume: bool = False,
) -> None:
    """Train an explainer; writes OUTPUT/explainer, checkpoints, log.jsonl and TensorBoard files.

    OUTPUT is runs/train unless given.

    Args:
        encoder: a timm name, hf: and a transformers name or folder; default: the classifier's own features.
        encoder_weights: local weights file for a timm encoder.
        evidence: the explainer sees what the classifier says of its target instead of an encoder's features; --decoder
            does not apply. Few images are enough.
        augment: random crops and flips.
        resume: continue from the newest checkpoint in OUTPUT.
    """
    classifier = source.load_classifier()
    data = source.images(classifier.input_size, training=True, augment=augment, seed=config.seed)
    widths = None if evidence else decoder
    explainer = Explainer.build(classifier, encoder, encoder_weights, decoder=widths, evidence=evidence)
    run = dataclasses.replace(config, output=config.output or "runs/train")
    trainer = Trainer(explainer, classifier, data, run)
    trainer.fit(resume=resume)
    print(f"explainer written to {run.output}/explainer")
    if trainer.failures:
        raise failed(trainer.failures, len(data), "images")
