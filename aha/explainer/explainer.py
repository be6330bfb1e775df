"""The explainer: one forward pass from an image and a class to a dense attribution map."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import precision as mixed
from .._version import __version__
from ..calibration import calibrated, check_scale
from ..checks import check_integer, check_seed, checked, finite_maps
from ..classifier import Classifier, check_classifier, from_source
from ..evidence import CONTRAST, ROLES, Evident
from ..files import DamagedError, digest, read_checked, read_json, tensor_bytes, write_atomically, write_json
from ..identity import fingerprint
from ..patches import by_patch, find_patches
from ..protection import protected
from ..regions import Regions
from ..weights import fitting_weights, load_weights, read_weights
from .config import EVIDENCE, FORMAT, WEIGHTS, ExplainerConfig, portable
from .decoder import Decoder, DecoderConfig, upsample
from .encoder import Encoder
from .encoder import build as build_encoder
from .evidence_decoder import EvidenceConfig, EvidenceDecoder, Sight, with_roles

CONFIG_FILE = "config.json"
COLOURS = 3  # channels of the images that the universal explainer was trained on
UNIVERSAL = Path(__file__).parent / "universal"  # the explainer that ships


class Explainer(nn.Module):
    """What explains a classifier: a trained decoder of the classifier's evidence, of a frozen encoder's features, or of
    both.

    >>> explainer = aha.Explainer.universal(clf)    # any classifier, no training
    >>> maps = explainer.attribute(images)          # (B,1,H,W), higher = more important

    Attributes:
        encoder, decoder: see `aha.explainer.encoder` and `aha.explainer.decoder`; only the decoder trains. With
            evidence (`aha.evidence`) alone there is no encoder, and the decoder is that of `evidence_decoder`.
        classifier: the classifier it explains.
        settings: what it was trained with and refinement continues with: ``temperature`` (final τ), ``scores`` and
            ``cells``; and where known the ``objective`` it was trained for, with its ``references``, ``players`` and
            ``surrogate`` (see `aha.shapley`), what identifies the ``data``, and the mean ``response`` to its maps (see
            `aha.calibration`). With evidence also its ``contrast`` (see `aha.evidence`), and ``by_patch``: whether maps
            of a classifier that reads images by patches rank whole patches (see `aha.patches`); ``adds_to_patches``,
            True where it is not there: whether the decoder adds to the evidence of such a classifier, or leaves it as
            it is.
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
        self._evident: dict[int, Evident] = {}
        if self.sees_evidence:
            _ = self.evidence  # which looks at the classifier once

    classifier: Classifier

    @classmethod
    @checked
    def build(
        cls,
        classifier: Classifier,
        encoder: str | None = None,
        encoder_weights: str | Path | None = None,
        pretrained: bool | None = None,
        decoder: DecoderConfig | EvidenceConfig | None = None,
        image_size: tuple[int, int] | None = None,
        evidence: bool = True,
        seed: int = 0,
    ) -> Explainer:
        """An untrained explainer for ``classifier``.

        Args:
            encoder: timm name, ``hf:`` and a transformers name or folder, or "classifier" for the classifier's own
                features. None: none with evidence, else the classifier's own.
            encoder_weights: local weights file for a timm encoder.
            pretrained: load hub weights for a timm encoder (default: unless a file is given).
            decoder: widths: an EvidenceConfig without an encoder, else a DecoderConfig, the paper's by default.
            image_size: (H, W); default the classifier's.
            evidence: see the image and what the classifier says of its target: few images are enough to train, and
                untrained it equals the full gradient. Without an encoder the explainer serves any classifier. False,
                with an encoder: as published.
            seed: of the weights, which are equal for equal seeds; PyTorch's own generator is left as it is.
        """
        check_classifier(classifier)
        check_seed(seed)
        settings = {"temperature": 0.005, "scores": "standardized", "cells": None}
        if evidence:
            settings |= {"contrast": CONTRAST, "by_patch": True}
        alone = evidence and encoder is None
        kind = EvidenceConfig if alone else DecoderConfig
        if decoder is not None and not isinstance(decoder, kind):
            way = "evidence without an encoder" if alone else "an encoder's features (evidence=False, or encoder=…)"
            raise ValueError(f"decoder is a {type(decoder).__name__}: {way} takes a {kind.__name__}")
        # parameters made in inference mode could never be trained
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = None
            if not alone:
                name = None if encoder == "classifier" else encoder
                made = build_encoder(name, classifier, encoder_weights, pretrained, image_size)
            head = _decoder(classifier, made, decoder or kind(), evidence)
            return cls(made, head, classifier, settings).to(classifier.device)

    @classmethod
    @checked
    def universal(cls, classifier: Classifier) -> Explainer:
        """The explainer that ships, trained on several classifiers to serve any: no training is needed.

        It sees evidence alone. What it was trained on is in its card, ``aha/explainer/universal/README.md``.

        Of a classifier that reads images by patches its map is the full gradient's by whole patches, and training
        further begins at that: what one network learned on several classifiers makes it worse (docs/patches.md).

        Raises:
            ValueError: in one line, for a classifier of other images than RGB, or without gradients and hooks.
        """
        channels = len(check_classifier(classifier).mean)
        if channels != COLOURS:
            raise ValueError(
                f"the universal explainer sees {COLOURS} channels, {classifier.name} takes {channels}: "
                "train one of its own, from Explainer.build"
            )
        explainer = cls.from_pretrained(UNIVERSAL, classifier)
        # not in its files, which are as `aha train --universal` writes them
        explainer.settings["adds_to_patches"] = False
        return explainer

    @checked
    def of(self, classifier: Classifier) -> Explainer:
        """This explainer for another classifier, with the same decoder: itself where it needs features of its own."""
        if self.encoder is not None or classifier is self.classifier:
            return self
        return Explainer(None, self.decoder, check_classifier(classifier), self.settings).train(self.training)

    def features(self, images: Tensor, precision: str = "fp32") -> list[Tensor]:
        """Encoder features in float32, without gradient. Trusts its input."""
        assert self.encoder is not None
        with torch.no_grad(), mixed.autocast(precision, images.device, self.encoder.dtype):
            return [level.float() for level in self.encoder(images)]

    def forward(self, images: Tensor, target: Tensor, precision: str = "fp32", roles: Tensor | None = None) -> Tensor:
        """Maps for training: (B,C,H,W) in [0,1], target (B,) or (B,M) → (B·M,1,H,W), image-major, on the raw scale.

        Trusts its input; `attribute` is the way in from outside.

        ``roles`` (roles,) of evidence that the decoder may see, so that it learns to do without the others.
        """
        patches = self.patches(*images.shape[-2:])
        seen = base = None
        if self.sees_evidence:
            repeats = target.shape[1] if target.ndim == 2 else 1
            each = images if repeats == 1 else images.repeat_interleave(repeats, dim=0)
            found = self.evidence(images, target)
            if patches is not None and not self.settings.get("adds_to_patches", True):
                return by_patch(found.best, patches)
            present = found.present if roles is None else found.present & roles.to(found.present.device)
            seen, base = (each, found.maps, present.expand(len(each), -1)), found.best
        height, width = images.shape[-2:]
        if isinstance(self.decoder, EvidenceDecoder):
            assert seen is not None
            full = self.decoder.padded_size(height, width)
            dense = self.decoder.dense(*seen)
        else:
            assert self.encoder is not None
            full = self.encoder.padded_size(height, width)
            dense = self.decoder.dense(self.features(images, precision), target, full, seen)
        maps = upsample(self.decoder.head(dense), full)[..., :height, :width]
        return by_patch(maps if base is None else base + maps, patches)

    @property
    def sees_evidence(self) -> bool:
        """Whether the decoder reads what the classifier says of its target."""
        return isinstance(self.decoder, EvidenceDecoder) or self.decoder.sight is not None

    @property
    def evidence(self) -> Evident:
        """What reads the evidence of the classifier."""
        # a classifier is looked at once, also where an explainer is trained on several in turn
        found = self._evident.get(id(self.classifier))
        if found is None:
            contrast = self.settings.get("contrast", 0)  # before there was one
            found = self._evident[id(self.classifier)] = Evident(self.classifier, contrast)
        return found

    def patches(self, height: int, width: int) -> Regions | None:
        """What maps of height×width pixels rank as a whole: patches of the classifier; None: single pixels."""
        return self._patches_of(self.classifier, height, width)

    def _patches_of(self, classifier: Classifier, height: int, width: int) -> Regions | None:
        if not self.settings.get("by_patch", False):  # before there was a choice
            return None
        return find_patches(classifier.module, len(classifier.mean), height, width)

    def turn_to(self, classifier: Classifier) -> None:
        """Explain this classifier from now on; only an explainer with evidence can."""
        if classifier is self.classifier:
            return
        if self.encoder is not None:
            raise ValueError("this explainer sees an encoder's features: it explains the classifier it was made for")
        object.__setattr__(self, "classifier", check_classifier(classifier))
        _ = self.evidence

    def prepare_for(self, classifiers: Sequence[Classifier]) -> None:
        """Make ready to be trained on these: what the decoder left as it is it now adds to, beginning at nothing.

        Its last layer starts anew then; what is before it stays.
        """
        if self.settings.get("adds_to_patches", True):
            return
        if any(self._patches_of(classifier, *classifier.input_size) is not None for classifier in classifiers):
            del self.settings["adds_to_patches"]
            self.decoder.head.begin_at_nothing()

    @property
    def passes(self) -> tuple[int, int]:
        """Forward and backward passes of the classifier for one image: evidence, or features of its own."""
        evidence = int(self.sees_evidence)
        own = self.encoder is not None and self.encoder.module is self.classifier.module
        return evidence + own, evidence

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """All that a map is made with: the classifier, the encoder, this explainer."""
        return (self.classifier, self, *([self.encoder] if self.encoder else ()))

    @checked
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

    @checked
    def save_pretrained(self, path: str | Path) -> Path:
        """Write ``config.json`` and the weights (of the trained part only) into the folder ``path``.

        Where an explainer is there already it is replaced as one: the weights go into another file, and
        ``config.json``, written last, names them. Both carry checksums.

        Raises:
            WriteError: in one line, for a full disk or a folder that cannot be written to; what was there is whole.
        """
        path = Path(path)
        content = tensor_bytes(self.decoder.state_dict())
        old = _weights_of(path)
        name = next(name for name in WEIGHTS if name != old)
        config = {
            "format": FORMAT,
            "aha": __version__,
            "classifier": {
                **portable(self.classifier.source),
                "num_classes": self.classifier.num_classes,
                "input_size": list(self.classifier.input_size),
                "class_names": self.classifier.class_names,
                "fingerprint": fingerprint(self.classifier),
            },
            "encoder": portable(self.encoder.source) if self.encoder else EVIDENCE,
            "decoder": dataclasses.asdict(self.decoder.config),
            "evidence": self.sees_evidence,
            **self.settings,
            "weights": {"file": name, "sha256": digest(content)},
        }
        json.dumps(config, default=str)  # before anything is written
        write_atomically(path / name, content)
        write_json(path / CONFIG_FILE, config)
        if old is not None:
            with suppress(OSError):
                (path / old).unlink()
        return path

    @classmethod
    @checked
    def from_pretrained(cls, path_or_hub_id: str | Path, classifier: Classifier | None = None) -> Explainer:
        """Load what `save_pretrained` wrote, from a folder or the Hugging Face hub. No code of a file is run.

        Args:
            classifier: the classifier to explain; default: made again from the saved description. One that differs from
                that of the training warns; one with another number of classes raises.

        Raises:
            FileNotFoundError, ValueError: in one line, for a folder that holds no explainer, for files that were
                changed or damaged since, and for a configuration with an entry that is none.
        """
        folder = _folder(path_or_hub_id)
        try:
            config = ExplainerConfig.from_json(read_json(folder / CONFIG_FILE), folder)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{folder} holds no {CONFIG_FILE}: give a folder written by save_pretrained"
            ) from error
        except DamagedError:
            raise
        except ValueError as error:
            raise ValueError(f"{folder / CONFIG_FILE} is not an explainer's configuration ({error})") from error
        weights = folder / config.weights
        if config.checksum is not None and weights.is_file():
            read_checked(weights, config.checksum)
        state, _ = read_weights(weights)
        state = with_roles(state, len(ROLES))
        given = classifier is not None
        if classifier is None:
            try:
                classifier = from_source(config.classifier)
            except (ValueError, OSError) as error:
                kind = FileNotFoundError if isinstance(error, OSError) else ValueError
                what = f"the classifier that {folder / CONFIG_FILE} names cannot be made"
                raise kind(f"{what} ({error})") from error
        if not given and classifier.class_names is None and len(config.class_names or ()) == classifier.num_classes:
            classifier.class_names = config.class_names
        general = config.encoder is None  # knows no class, and no classifier
        if classifier.num_classes != config.num_classes and not general:
            raise ValueError(
                f"the explainer in {folder} was trained for {config.num_classes} classes, {classifier.name} has "
                f"{classifier.num_classes}: give the classifier it was trained for"
            )
        if fingerprint(classifier) != config.fingerprint and not general:
            origin = "given" if given else "made again"
            warnings.warn(
                f"the classifier {origin} ({classifier.name}) is not the one this explainer was trained for "
                f"({config.classifier['name']}): its maps may be unfaithful until refined",
                stacklevel=2,
            )
        with torch.inference_mode(False):  # parameters made in it could never be refined
            try:
                encoder = _encoder(config, classifier)
            except ValueError as error:
                raise ValueError(f"{folder / CONFIG_FILE} has no encoder for {classifier.name} ({error})") from error
            with torch.device("meta"):  # widths that are not those of the weights ask for no memory
                fitting_weights(_decoder(classifier, encoder, config.decoder, config.evidence), state, weights)
            decoder = _decoder(classifier, encoder, config.decoder, config.evidence)
            load_weights(decoder, state, weights)
            return cls(encoder, decoder, classifier, config.settings).to(classifier.device).eval()


def _encoder(config: ExplainerConfig, classifier: Classifier) -> Encoder | None:
    source = config.encoder
    if source is None:
        return None
    if source["kind"] == "classifier":
        return build_encoder(None, classifier, image_size=config.input_size)
    if source["kind"] == "hf":
        return build_encoder(f"hf:{source['name']}", classifier, image_size=config.input_size)
    return build_encoder(source["name"], classifier, source.get("weights"), source.get("pretrained"), config.input_size)


def _weights_of(folder: Path) -> str | None:
    """The file with the weights of the explainer in ``folder``, which must stay whole; None where there is none."""
    try:
        return ExplainerConfig.from_json(read_json(folder / CONFIG_FILE), folder).weights
    except (OSError, ValueError):
        return None


def _decoder(
    classifier: Classifier,
    encoder: Encoder | None,
    config: DecoderConfig | EvidenceConfig,
    evidence: bool,
) -> Decoder | EvidenceDecoder:
    """An untrained decoder; with evidence its classes are the rows of the classifier's head, where it has one."""
    colours = len(classifier.mean)
    if isinstance(config, EvidenceConfig):
        return EvidenceDecoder(colours, len(ROLES), config).float()
    assert encoder is not None
    sight = Sight(colours, len(ROLES), config.width, min(config.strides)) if evidence else None
    rows = head_rows(classifier) if evidence else None
    return Decoder(encoder.channels, classifier.num_classes, config, sight, rows).float()


def head_rows(classifier: Classifier) -> Tensor | None:
    """(classes, D): the weights of the last linear layer with an output per class, or None."""
    layers = [layer for layer in classifier.module.modules() if isinstance(layer, nn.Linear)]
    layers = [layer for layer in layers if layer.out_features == classifier.num_classes]
    return layers[-1].weight.detach() if layers else None


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
        return Path(snapshot_download(name, allow_patterns=[CONFIG_FILE, *WEIGHTS]))
    except Exception as error:  # the hub's own errors span several hierarchies
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(f"{name} is neither a local folder nor on the hub ({reason})") from error
