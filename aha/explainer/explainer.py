"""The explainer: one forward pass from an image and a class to a dense attribution map."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import precision as mixed
from .._version import __version__
from ..checks import check_integer, finite_maps
from ..classifier import Classifier, check_classifier, from_source
from ..files import write_atomically
from ..identity import fingerprint
from ..protection import protected
from ..weights import load_weights, read_weights
from .decoder import Decoder, DecoderConfig, upsample
from .encoder import Encoder
from .encoder import build as build_encoder

FORMAT = 1
CONFIG_FILE, WEIGHTS_FILE = "config.json", "decoder.safetensors"
# settings in the configuration: what refinement continues with, and what training adds
REFINED_WITH = ("temperature", "scores", "cells")
TRAINED_FOR = ("objective", "references", "players", "surrogate", "data")


class Explainer(nn.Module):
    """Frozen encoder and trained decoder that explain one classifier.

    >>> explainer = aha.Explainer.build(clf, encoder="vit_large_patch16_dinov3.lvd1689m")
    >>> maps = explainer.attribute(images)          # (B,1,H,W), higher = more important

    Attributes:
        encoder, decoder: see `aha.explainer.encoder` and `aha.explainer.decoder`; only the decoder trains.
        classifier: the classifier it explains.
        settings: what it was trained with and refinement continues with: ``temperature`` (final τ), ``scores`` and
            ``cells``; and where known the ``objective`` it was trained for, with its ``references``, ``players`` and
            ``surrogate`` (see `aha.shapley`), and what identifies the ``data``.
    """

    def __init__(self, encoder: Encoder, decoder: Decoder, classifier: Classifier, settings: dict[str, Any]):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        # not a submodule: it has its own life, and must not enter state dicts or DDP buckets
        object.__setattr__(self, "classifier", classifier)
        self.settings = settings

    classifier: Classifier

    @classmethod
    def build(
        cls,
        classifier: Classifier,
        encoder: str | None = None,
        encoder_weights: str | Path | None = None,
        pretrained: bool | None = None,
        decoder: DecoderConfig | None = None,
        image_size: tuple[int, int] | None = None,
    ) -> Explainer:
        """An untrained explainer for ``classifier``.

        Args:
            encoder: timm name, ``hf:`` and a transformers name or folder, or None for the classifier's own features.
            encoder_weights: local weights file for a timm encoder.
            pretrained: load hub weights for a timm encoder (default: unless a file is given).
            decoder: widths; default the paper's.
            image_size: (H, W); default the classifier's.
        """
        check_classifier(classifier)
        config = decoder or DecoderConfig()
        settings = {"temperature": 0.005, "scores": "standardized", "cells": None}
        with torch.inference_mode(False):  # parameters made in it could never be trained
            made = build_encoder(encoder, classifier, encoder_weights, pretrained, image_size)
            head = Decoder(made.channels, classifier.num_classes, config).float()
            return cls(made, head, classifier, settings).to(classifier.device)

    def features(self, images: Tensor, precision: str = "fp32") -> list[Tensor]:
        """Encoder features in float32, without gradient."""
        with torch.no_grad(), mixed.autocast(precision, images.device):
            return [level.float() for level in self.encoder(images)]

    def forward(self, images: Tensor, target: Tensor, precision: str = "fp32") -> Tensor:
        """Maps for training: (B,C,H,W) in [0,1], target (B,) or (B,M) → (B·M,1,H,W), image-major, on the raw scale."""
        size = images.shape[-2:]
        full = self.encoder.padded_size(*size)
        maps = self.decoder(self.features(images, precision), target, full)
        return maps[..., : size[0], : size[1]]

    def dense(self, images: Tensor, target: Tensor, precision: str = "fp32") -> Tensor:
        """The map (B,c,h,w) that `head_maps` turns into an attribution; what refinement keeps fixed."""
        full = self.encoder.padded_size(*images.shape[-2:])
        return self.decoder.dense(self.features(images, precision), target, full)

    def head_maps(self, raw: Tensor, size: tuple[int, int]) -> Tensor:
        """The head's output (B,1,h,w) → maps (B,1,H,W) for images of ``size``."""
        return upsample(raw, self.encoder.padded_size(*size))[..., : size[0], : size[1]]

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """All that a map is made with: the classifier, the encoder, this explainer."""
        return (self.classifier, self.encoder, self)

    def attribute(
        self,
        images: Tensor,
        target: Tensor | Sequence[int] | int | None = None,
        internal_batch_size: int = 64,
    ) -> Tensor:
        """Attribution maps in one forward pass.

        Args:
            images: (B,C,H,W) RGB in [0,1].
            target: class per image, one int for all, or None: the classifier's prediction.
            internal_batch_size: images per pass, of the classifier and of the explainer; memory is set by it.

        Returns:
            (B,1,H,W) float32, raw scale, higher = more important.

        Raises:
            ValueError: for images or targets outside the contract, and where the classifier or a map is not finite.
        """
        size = check_integer("internal_batch_size", internal_batch_size, 1)
        images = self.classifier.check(images).detach()
        with protected(*self.networks), torch.no_grad():
            target = self.classifier.resolve_target(images, target, size)
            parts = zip(images.split(size), target.split(size), strict=True)
            maps = torch.cat([self(image, classes).float() for image, classes in parts])
            return finite_maps(maps, "the explainer's maps")

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
            "encoder": self.encoder.source,
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
            mark, classes = saved.pop("fingerprint"), saved.pop("num_classes")
            image_size, names = tuple(saved.pop("input_size")), saved.pop("class_names", None)
            source = dict(config["encoder"])
            _ = saved["kind"], source["kind"]
            widths = DecoderConfig(**{**layout, "strides": tuple(layout["strides"])})
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
        if classifier.num_classes != classes:
            raise ValueError(
                f"the explainer in {folder} was trained for {classes} classes, {classifier.name} has "
                f"{classifier.num_classes}: give the classifier it was trained for"
            )
        if fingerprint(classifier) != mark:
            origin = "given" if given else "made again"
            warnings.warn(
                f"the classifier {origin} ({classifier.name}) is not the one this explainer was trained for "
                f"({saved.get('name')}): its maps may be unfaithful until refined",
                stacklevel=2,
            )
        with torch.inference_mode(False):  # parameters made in it could never be refined
            if source["kind"] == "classifier":
                encoder = build_encoder(None, classifier, image_size=image_size)
            elif source["kind"] == "hf":
                encoder = build_encoder(f"hf:{source['name']}", classifier, image_size=image_size)
            else:
                encoder = build_encoder(
                    source["name"], classifier, source.get("weights"), source.get("pretrained"), image_size
                )
            decoder = Decoder(encoder.channels, classes, widths).float()
            state, _ = read_weights(folder / WEIGHTS_FILE)
            load_weights(decoder, state, folder / WEIGHTS_FILE)
            return cls(encoder, decoder, classifier, settings).to(classifier.device).eval()


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
