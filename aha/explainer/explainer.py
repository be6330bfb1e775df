"""The explainer: one forward pass from an image and a class to a dense attribution map."""

from __future__ import annotations

import dataclasses
import functools
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import precision as mixed
from .._version import __version__
from ..calibration import Response, calibrated, check_scale
from ..checks import check_integer, finite_maps
from ..classifier import Classifier, check_classifier, from_source
from ..evidence import ROLES, Evident
from ..files import write_atomically
from ..identity import fingerprint
from ..protection import protected
from ..weights import load_weights, read_weights
from .decoder import Decoder, DecoderConfig, upsample
from .encoder import Encoder
from .encoder import build as build_encoder
from .evidence_decoder import EvidenceConfig, EvidenceDecoder

FORMAT = 1
CONFIG_FILE, WEIGHTS_FILE = "config.json", "decoder.safetensors"
# settings in the configuration: what refinement continues with, and what training adds
REFINED_WITH = ("temperature", "scores", "cells")
EVIDENCE = {"kind": "evidence"}  # where another explainer's encoder is described
TRAINED_FOR = ("objective", "references", "players", "surrogate", "data", "response")


class Fixed(NamedTuple):
    """What refinement keeps fixed: the map (N,c,h,w) that the head reads, and what its maps are added to, or None."""

    dense: Tensor
    base: Tensor | None


class Explainer(nn.Module):
    """What explains a classifier: a trained decoder of a frozen encoder's features, or of evidence.

    >>> explainer = aha.Explainer.build(clf, encoder="vit_large_patch16_dinov3.lvd1689m")
    >>> maps = explainer.attribute(images)          # (B,1,H,W), higher = more important

    Attributes:
        encoder, decoder: see `aha.explainer.encoder` and `aha.explainer.decoder`; only the decoder trains. With
            evidence (`aha.evidence`) there is no encoder, and the decoder is that of `evidence_decoder`.
        classifier: the classifier it explains.
        settings: what it was trained with and refinement continues with: ``temperature`` (final τ), ``scores`` and
            ``cells``; and where known the ``objective`` it was trained for, with its ``references``, ``players`` and
            ``surrogate`` (see `aha.shapley`), what identifies the ``data``, and the mean ``response`` to its maps (see
            `aha.calibration`).
    """

    def __init__(
        self,
        encoder: Encoder | None,
        decoder: Decoder | EvidenceDecoder,
        classifier: Classifier,
        settings: dict[str, Any],
    ):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        # not a submodule: it has its own life, and must not enter state dicts or DDP buckets
        object.__setattr__(self, "classifier", classifier)
        self.settings = settings
        if encoder is None:
            _ = self.evidence  # which looks at the classifier once

    classifier: Classifier

    @classmethod
    def build(
        cls,
        classifier: Classifier,
        encoder: str | None = None,
        encoder_weights: str | Path | None = None,
        pretrained: bool | None = None,
        decoder: DecoderConfig | EvidenceConfig | None = None,
        image_size: tuple[int, int] | None = None,
        evidence: bool = False,
    ) -> Explainer:
        """An untrained explainer for ``classifier``.

        Args:
            evidence: see the image and what the classifier says of its target, no encoder: few images are enough to
                train, and untrained it equals the full gradient.
            encoder: timm name, ``hf:`` and a transformers name or folder, or None for the classifier's own features.
            encoder_weights: local weights file for a timm encoder.
            pretrained: load hub weights for a timm encoder (default: unless a file is given).
            decoder: widths; default the paper's.
            image_size: (H, W); default the classifier's.
        """
        check_classifier(classifier)
        settings = {"temperature": 0.005, "scores": "standardized", "cells": None}
        if evidence != isinstance(decoder, EvidenceConfig) and decoder is not None:
            raise ValueError(f"decoder is a {type(decoder).__name__}: an EvidenceConfig goes with evidence=True")
        if evidence:
            if encoder is not None:
                raise ValueError(f"encoder={encoder!r} with evidence=True: give one of them")
            with torch.inference_mode(False):
                widths = decoder if isinstance(decoder, EvidenceConfig) else EvidenceConfig()
                small = EvidenceDecoder(len(classifier.mean), len(ROLES), widths).float()
                return cls(None, small, classifier, settings).to(classifier.device)
        config = decoder if isinstance(decoder, DecoderConfig) else DecoderConfig()
        with torch.inference_mode(False):  # parameters made in it could never be trained
            made = build_encoder(encoder, classifier, encoder_weights, pretrained, image_size)
            head = Decoder(made.channels, classifier.num_classes, config).float()
            return cls(made, head, classifier, settings).to(classifier.device)

    def of(self, classifier: Classifier) -> Explainer:
        """This explainer for another classifier, with the same decoder: itself where it needs features of its own."""
        if self.encoder is not None or classifier is self.classifier:
            return self
        return Explainer(None, self.decoder, check_classifier(classifier), self.settings).train(self.training)

    def features(self, images: Tensor, precision: str = "fp32") -> list[Tensor]:
        """Encoder features in float32, without gradient."""
        assert self.encoder is not None
        with torch.no_grad(), mixed.autocast(precision, images.device):
            return [level.float() for level in self.encoder(images)]

    def forward(self, images: Tensor, target: Tensor, precision: str = "fp32") -> Tensor:
        """Maps for training: (B,C,H,W) in [0,1], target (B,) or (B,M) → (B·M,1,H,W), image-major, on the raw scale."""
        fixed = self.fixed(images, target, precision)
        height, width = images.shape[-2:]
        return self.head_maps(self.decoder.head(fixed.dense), fixed.base, (height, width))

    def fixed(self, images: Tensor, target: Tensor, precision: str = "fp32") -> Fixed:
        """What `head_maps` turns into attributions, together with what the head makes of ``dense``."""
        if self.encoder is None:
            assert isinstance(self.decoder, EvidenceDecoder)
            repeats = target.shape[1] if target.ndim == 2 else 1
            images, target = images.repeat_interleave(repeats, dim=0), target.flatten()
            found = self.evidence(images, target)
            dense = self.decoder.dense(images, found.maps, found.present.expand(len(images), -1))
            return Fixed(dense, found.best)
        assert isinstance(self.decoder, Decoder)
        full = self.encoder.padded_size(*images.shape[-2:])
        return Fixed(self.decoder.dense(self.features(images, precision), target, full), None)

    def head_maps(self, raw: Tensor, base: Tensor | None, size: tuple[int, int]) -> Tensor:
        """The head's output (B,1,h,w) and what it is added to → maps (B,1,H,W) for images of ``size``."""
        if isinstance(self.decoder, EvidenceDecoder):
            full = self.decoder.padded_size(*size)
        else:
            assert self.encoder is not None
            full = self.encoder.padded_size(*size)
        maps = upsample(raw, full)[..., : size[0], : size[1]]
        return maps if base is None else base + maps

    @functools.cached_property
    def evidence(self) -> Evident:
        """What reads the evidence of the classifier."""
        return Evident(self.classifier)

    @property
    def passes(self) -> tuple[int, int]:
        """Forward and backward passes of the classifier for one image: evidence, or features of its own."""
        if self.encoder is None:
            return 1, 1
        return int(self.encoder.module is self.classifier.module), 0

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """All that a map is made with: the classifier, the encoder, this explainer."""
        return (self.classifier, self, *([self.encoder] if self.encoder else ()))

    def attribute(
        self,
        images: Tensor,
        target: Tensor | Sequence[int] | int | None = None,
        internal_batch_size: int = 64,
        scale: str = "raw",
    ) -> Tensor:
        """Attribution maps in one forward pass.

        Args:
            images: (B,C,H,W) RGB in [0,1].
            target: class per image, one int for all, or None: the classifier's prediction.
            internal_batch_size: images per pass, of the classifier and of the explainer; memory is set by it.
            scale: of the values; the order is the same. "raw" as the decoder makes them; "calibrated": what each pixel
                is expected to add to the target's probability, by the response learnt while training; "measured": by
                that of the image itself, 20 forward passes more. See `aha.calibration`.

        Returns:
            (B,1,H,W) float32, higher = more important.

        Raises:
            ValueError: for images or targets outside the contract, where the classifier or a map is not finite, and for
                "calibrated" where training has learnt no response.
        """
        check_scale(scale, self)
        size = check_integer("internal_batch_size", internal_batch_size, 1)
        images = self.classifier.check(images).detach()
        with protected(*self.networks), torch.no_grad():
            target = self.classifier.resolve_target(images, target, size)
            parts = zip(images.split(size), target.split(size), strict=True)
            maps = torch.cat([self(image, classes).float() for image, classes in parts])
            maps = finite_maps(maps, "the explainer's maps")
            return calibrated(self.classifier, self, images, maps, target, scale, max(2, size))

    def save_pretrained(self, path: str | Path) -> Path:
        """Write ``config.json`` and ``decoder.safetensors`` (the trained part only) into the folder ``path``."""
        from safetensors.torch import save

        config = {
            "format": FORMAT,
            "aha": __version__,
            "classifier": {
                **self.classifier.source,
                "num_classes": self.classifier.num_classes,
                "input_size": list(self.classifier.input_size),
                "class_names": self.classifier.class_names,
                "fingerprint": fingerprint(self.classifier),
            },
            "encoder": self.encoder.source if self.encoder else EVIDENCE,
            "decoder": dataclasses.asdict(self.decoder.config),
            **self.settings,
        }
        text = json.dumps(config, indent=2, default=str) + "\n"  # before anything is written
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        state = {key: value.detach().contiguous().cpu() for key, value in self.decoder.state_dict().items()}
        write_atomically(path / WEIGHTS_FILE, save(state))
        write_atomically(path / CONFIG_FILE, text.encode())
        return path

    @classmethod
    def from_pretrained(cls, path_or_hub_id: str | Path, classifier: Classifier | None = None) -> Explainer:
        """Load what `save_pretrained` wrote, from a folder or the Hugging Face hub.

        Args:
            classifier: the classifier to explain; default: made again from the saved description. One that differs from
                that of the training warns; one with another number of classes raises.
        """
        folder = _folder(path_or_hub_id)
        try:
            config = json.loads((folder / CONFIG_FILE).read_text())
            saved, layout = dict(config["classifier"]), dict(config["decoder"])
            settings = {key: config[key] for key in REFINED_WITH}
            settings.update({key: config[key] for key in TRAINED_FOR if key in config})
            if settings.get("response") is not None:
                Response.from_json(settings["response"])  # refuses what is none
            mark, classes = saved.pop("fingerprint"), saved.pop("num_classes")
            image_size, names = tuple(saved.pop("input_size")), saved.pop("class_names", None)
            source = dict(config["encoder"])
            _ = saved["kind"], source["kind"]
            widths = EvidenceConfig(**layout) if source == EVIDENCE else _widths(layout)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{folder} holds no {CONFIG_FILE}: give a folder written by save_pretrained"
            ) from error
        except (ValueError, KeyError, TypeError) as error:  # JSON's and Unicode's errors are ValueErrors
            raise ValueError(f"{folder / CONFIG_FILE} is not an explainer's configuration ({error})") from error
        if config.get("format") != FORMAT:
            raise ValueError(f"{folder} has format {config.get('format')}, this version reads {FORMAT}: update aha")
        given = classifier is not None
        classifier = classifier if classifier is not None else from_source(saved)
        if not given and classifier.class_names is None and names and len(names) == classifier.num_classes:
            classifier.class_names = list(names)
        general = isinstance(widths, EvidenceConfig)  # knows no class, and no classifier
        if classifier.num_classes != classes and not general:
            raise ValueError(
                f"the explainer in {folder} was trained for {classes} classes, {classifier.name} has "
                f"{classifier.num_classes}: give the classifier it was trained for"
            )
        if fingerprint(classifier) != mark and not general:
            origin = "given" if given else "made again"
            warnings.warn(
                f"the classifier {origin} ({classifier.name}) is not the one this explainer was trained for "
                f"({saved.get('name')}): its maps may be unfaithful until refined",
                stacklevel=2,
            )
        with torch.inference_mode(False):  # parameters made in it could never be refined
            if isinstance(widths, EvidenceConfig):
                encoder = None
            elif source["kind"] == "classifier":
                encoder = build_encoder(None, classifier, image_size=image_size)
            elif source["kind"] == "hf":
                encoder = build_encoder(f"hf:{source['name']}", classifier, image_size=image_size)
            else:
                encoder = build_encoder(
                    source["name"], classifier, source.get("weights"), source.get("pretrained"), image_size
                )
            decoder: Decoder | EvidenceDecoder
            if isinstance(widths, EvidenceConfig):
                decoder = EvidenceDecoder(len(classifier.mean), len(ROLES), widths).float()
            else:
                assert encoder is not None
                decoder = Decoder(encoder.channels, classes, widths).float()
            state, _ = read_weights(folder / WEIGHTS_FILE)
            load_weights(decoder, state, folder / WEIGHTS_FILE)
            return cls(encoder, decoder, classifier, settings).to(classifier.device).eval()


def _widths(layout: dict[str, Any]) -> DecoderConfig:
    return DecoderConfig(**{**layout, "strides": tuple(layout["strides"])})


def _folder(path_or_hub_id: str | Path) -> Path:
    if not isinstance(path_or_hub_id, (str, Path)):
        raise ValueError(f"{path_or_hub_id!r} is no path: give a folder written by save_pretrained, or a hub id")
    path = Path(path_or_hub_id)
    if path.is_dir():
        return path
    name = str(path_or_hub_id)
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise FileNotFoundError(f"no folder {path}: give a folder written by save_pretrained, or a hub id user/name")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]))
    except Exception as error:  # the hub's own errors span several hierarchies
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"{name} is neither a local folder nor on the hub ({reason})") from error
