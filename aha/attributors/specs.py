"""Methods as they are written on the command line and in tables of settings."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from .. import identity
from ..checks import checked, checked_fields
from ..classifier import Classifier
from ..files import slug
from .base import Attributor, available, create, find


@dataclass(frozen=True)
class MethodSpec:
    """A method of the registry with options.

    Attributes:
        name: see `aha.attributors.available`.
        options: of its class.
        label: its name in tables; default: as it is written, ``name:option=value``.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""

    @checked_fields
    def __post_init__(self) -> None:
        find(self.name)
        if not self.label:
            written = ",".join(f"{key}={value}" for key, value in self.options.items())
            object.__setattr__(self, "label", f"{self.name}:{written}" if written else self.name)

    @classmethod
    @checked
    def parse(cls, text: str) -> MethodSpec:
        """``[label@]name[:option=value,…]``, e.g. ``rise:n_masks=4000`` or ``RISE@rise``.

        Values are Python literals, or else text.

        Raises:
            ValueError: for an unknown method or an option without a value.
        """
        label, _, rest = text.rpartition("@")
        name, _, written = rest.partition(":")
        options = {}
        for part in filter(None, written.split(",")):
            key, equals, value = part.partition("=")
            if not equals or not key:
                raise ValueError(f"{text!r}: option {part!r} has no value, write name:option=value,option=value")
            options[key.strip()] = _literal(value.strip())
        return cls(name, options, label)

    @checked
    def create(self, clf: Classifier, seed: int) -> Attributor:
        """The method for ``clf``; an option that it does not know is a ValueError."""
        return create(self.name, clf, **{"seed": seed, **self.options})

    @checked
    def key(self, seed: int) -> str:
        """A folder's name that differs where the maps may differ."""
        # a file or folder named by an option counts with its content
        options = {key: _content(value) for key, value in self.options.items()}
        return f"{slug(self.label)}-{identity.of_settings([self.name, options, seed])}"


def _content(value: Any) -> str:
    """What tells two values of an option apart: the content of files and networks, else what is written."""
    if isinstance(value, (str, Path)) and Path(value).exists():
        return identity.of_files(Path(value))
    if isinstance(value, nn.Module):
        return f"{type(value).__name__} {identity.fingerprint(value)} {getattr(value, 'settings', '')}"
    return repr(value)


def parse(texts: Sequence[str]) -> tuple[list[MethodSpec], bool]:
    """Specs of what is written, and whether ``all`` is among it: then every method of the registry follows.

    Raises:
        ValueError: for an unknown method, or two with one label.
    """
    everything = "all" in texts
    specs = [MethodSpec.parse(text) for text in texts if text != "all"]
    if everything:
        named = {spec.label for spec in specs}
        specs += [MethodSpec(name) for name in available() if name not in named]
    labels = [spec.label for spec in specs]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} is given twice: write label@name to tell them apart")
    return specs, everything


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
