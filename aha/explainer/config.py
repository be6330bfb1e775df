"""What ``config.json`` of a saved explainer says, every entry of it checked before anything is made of it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from ..calibration import Response
from ..checks import check_integer, check_number
from ..files import path_within
from ..kernels.messages import short
from .decoder import DecoderConfig
from .evidence_decoder import EvidenceConfig

FORMAT = 1
EVIDENCE = {"kind": "evidence"}  # where another explainer's encoder is described
WEIGHTS = ("decoder.safetensors", "decoder.1.safetensors")  # in turn, so that the old file is whole until its end
SCORES = ("standardized", "free")
# settings: what refinement continues with, what evidence is of, and what training adds
REFINED_WITH = ("temperature", "scores", "cells")
OPTIONAL = (
    "contrast",
    "by_patch",
    "adds_to_patches",
    "objective",
    "references",
    "players",
    "surrogate",
    "data",
    "response",
)

_CLASSES, _SIDE = 10**7, 4096
# of a timm model's options: a number, and what would load or overwrite files
_OPTION, _LOADING = 2**16, ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir", "pretrained")


@dataclass(frozen=True)
class ExplainerConfig:
    """A saved explainer but for its weights.

    Attributes:
        classifier: how to make the classifier again, see `aha.Classifier.source`.
        fingerprint, num_classes, input_size, class_names: of that classifier.
        encoder: how to make the encoder again; None where there is none.
        decoder: its widths.
        evidence: whether the decoder sees evidence.
        settings: see `aha.Explainer`.
        weights, checksum: the file with the weights in the same folder, and its SHA-256 where it is known.
    """

    classifier: dict[str, Any]
    fingerprint: str
    num_classes: int
    input_size: tuple[int, int]
    class_names: list[str] | None
    encoder: dict[str, Any] | None
    decoder: DecoderConfig | EvidenceConfig
    evidence: bool
    settings: dict[str, Any]
    weights: str
    checksum: str | None

    @classmethod
    def from_json(cls, content: Mapping[str, Any], folder: Path) -> ExplainerConfig:
        """Check what the file in ``folder`` holds; ValueError, in one line, names the entry that does not fit."""
        if content.get("format") != FORMAT:
            raise ValueError(f"format {short(content.get('format'))}: this version reads {FORMAT}, update aha")
        saved = dict(_part(content, "classifier"))
        fingerprint, classes = saved.pop("fingerprint", None), saved.pop("num_classes", None)
        size, names = saved.pop("input_size", None), saved.pop("class_names", None)
        if not _text(fingerprint):
            raise ValueError(f"fingerprint={short(fingerprint)}: give that of the classifier, a text")
        classes = check_integer("num_classes", classes, 1, _CLASSES)
        if names is not None and not (
            _list(names) and len(names) == classes and all(isinstance(n, str) for n in names)
        ):
            raise ValueError(f"class_names: give {classes} texts, or null")
        encoder: dict[str, Any] | None = dict(_part(content, "encoder"))
        if encoder is not None and encoder.get("kind") == EVIDENCE["kind"]:
            encoder = None
        elif encoder is not None and encoder.get("kind") not in ("classifier", "timm", "hf"):
            raise ValueError(f"the encoder's kind={short(encoder.get('kind'))}: give evidence, classifier, timm or hf")
        weights, checksum = _weights(content)
        evidence = content.get("evidence", False)
        if not isinstance(evidence, bool):
            raise ValueError(f"evidence={short(evidence)}: give true or false")
        return cls(
            classifier=_source(saved, "classifier", folder),
            fingerprint=fingerprint,
            num_classes=classes,
            input_size=_pair("input_size", size, _SIDE),
            class_names=None if names is None else list(names),
            encoder=None if encoder is None else _source(encoder, "encoder", folder),
            decoder=_decoder(dict(_part(content, "decoder")), EvidenceConfig if encoder is None else DecoderConfig),
            evidence=evidence,
            settings=_settings(content),
            weights=weights,
            checksum=checksum,
        )


def portable(source: Mapping[str, Any]) -> dict[str, Any]:
    """A classifier's or encoder's source to be saved: files outside the explainer's folder by their absolute path."""
    found = dict(source)
    if found.get("weights") is not None:
        found["weights"] = str(Path(found["weights"]).absolute())
    if found.get("kind") == "hf" and Path(str(found["name"])).is_dir():
        found["name"] = str(Path(found["name"]).absolute())
    return found


def _part(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = content.get(name)
    if not isinstance(part, dict):
        raise ValueError(f"{name}: give an object, not {_described(part)}")
    return part


def _source(source: dict[str, Any], what: str, folder: Path) -> dict[str, Any]:
    """How to make a classifier or encoder, its paths resolved."""
    kind, name = source.get("kind"), source.get("name")
    if not _text(kind) or not _text(name):
        raise ValueError(f"the {what}'s kind={short(kind)} and name={short(name)}: give two texts")
    hub = re.fullmatch(r"[\w:@-][\w.:@-]*(/[\w-][\w.-]*)?", name) and not name.startswith("local-dir:")
    if kind in ("hf", "timm") and not hub and not Path(name.removeprefix("local-dir:")).is_absolute():
        raise ValueError(f"the {what}'s name={short(name)}: give a model's name, or the absolute path of its folder")
    if (weights := source.get("weights")) is not None:
        if not _text(weights):
            raise ValueError(f"the {what}'s weights={short(weights)}: give a path")
        try:
            source["weights"] = str(path_within(folder, weights))
        except ValueError as error:
            raise ValueError(f"the {what}'s weights: {error}") from error
    if source.get("pretrained") not in (None, True, False):
        raise ValueError(f"the {what}'s pretrained={short(source['pretrained'])}: give true or false")
    options = source.get("options", {})
    if not isinstance(options, dict):
        raise ValueError(f"the {what}'s options: give an object, not {_described(options)}")
    for key, value in options.items():
        if key in _LOADING and not (value is None or isinstance(value, bool)):
            raise ValueError(f"the {what}'s option {key} names files: make it yourself and pass classifier=…")
        _check_option(f"the {what}'s option {short(key)}", value)
    return source


def _check_option(name: str, value: Any) -> None:
    if isinstance(value, dict):
        raise ValueError(f"{name}: give a number, a text or a list")
    for part in value if _list(value) else (value,):
        if isinstance(part, (dict, list)) or (isinstance(part, (int, float)) and not abs(part) <= _OPTION):
            raise ValueError(f"{name}={short(part)}: give a text, or a number of at most {_OPTION}")


def _decoder(layout: dict[str, Any], kind: type) -> DecoderConfig | EvidenceConfig:
    known = {field.name for field in dataclasses.fields(kind)}
    if layout.keys() != known:
        raise ValueError(f"the decoder's entries are {short(list(layout))}: give {', '.join(sorted(known))}")
    if _list(layout.get("strides")):
        layout["strides"] = tuple(layout["strides"])
    return kind(**layout)


def _weights(content: Mapping[str, Any]) -> tuple[str, str | None]:
    if "weights" not in content:  # earlier versions kept one file, and no checksum
        return WEIGHTS[0], None
    part = _part(content, "weights")
    name, checksum = part.get("file"), part.get("sha256")
    if name not in WEIGHTS:
        raise ValueError(f"the weights' file={short(name)}: give {' or '.join(WEIGHTS)}")
    if not isinstance(checksum, str) or not re.fullmatch("[0-9a-f]{64}", checksum):
        raise ValueError(f"the weights' sha256={short(checksum)}: give 64 hexadecimal digits")
    return name, checksum


def _settings(content: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: content[name] for name in OPTIONAL if name in content}
    for name in REFINED_WITH:
        if name not in content:
            raise ValueError(f"{name} is missing")
        found[name] = content[name]
    check_number("temperature", found["temperature"], 0, above=True)
    if found["scores"] not in SCORES:
        raise ValueError(f"scores={short(found['scores'])}: give {' or '.join(SCORES)}")
    if "contrast" in found:
        check_number("contrast", found["contrast"], 0, high=1)
    for name in ("by_patch", "adds_to_patches"):
        if not isinstance(found.get(name, False), bool):
            raise ValueError(f"{name}={short(found[name])}: give true or false")
    for name in ("cells", "players"):
        if found.get(name) is not None:
            _pair(name, found[name], _SIDE)
    for name in ("objective", "surrogate"):
        if found.get(name) is not None and not _text(found[name]):
            raise ValueError(f"{name}={short(found[name])}: give a text")
    names = found.get("references")
    if names is not None and not (_list(names) and all(map(_text, names))):
        raise ValueError(f"references={short(names)}: give a list of names")
    if found.get("data") is not None:
        _part(content, "data")
    if found.get("response") is not None:
        Response.from_json(found["response"])  # refuses what is none
    return found


def _pair(name: str, value: Any, high: int) -> tuple[int, int]:
    if not _list(value) or len(value) != 2:
        raise ValueError(f"{name}={short(value)}: give two integers in 1 … {high}")
    return check_integer(name, value[0], 1, high), check_integer(name, value[1], 1, high)


def _text(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and bool(value)


def _list(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, (list, tuple))


def _described(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
