"""Evaluation protocols: the settings that decide which published numbers a measurement compares with."""

from __future__ import annotations

from dataclasses import dataclass

from ..references import REFERENCES


@dataclass(frozen=True)
class Protocol:
    """How curves are measured.

    Attributes:
        name: for tables and files.
        points: S ≥ 2 evenly spaced fractions of the pixels in [0, 1], both ends included.
        references: names known to `aha.references.make`; scores are averaged over them.
    """

    name: str
    points: int = 21
    references: tuple[str, ...] = REFERENCES

    def __post_init__(self) -> None:
        if self.points < 2:
            raise ValueError(f"points={self.points}: give at least 2, the two ends of the curve")
        unknown = [name for name in self.references if name not in REFERENCES]
        if unknown or not self.references:
            raise ValueError(f"references={self.references}: give one or more of {', '.join(REFERENCES)}")


PROTOCOLS = {
    # the AHA paper: 5 % steps, trapezoid, float32, softmax, mean of three references
    "aha": Protocol("aha"),
}


def get(protocol: str | Protocol) -> Protocol:
    """The preset of that name; a `Protocol` is returned as it is. ValueError for an unknown name."""
    if isinstance(protocol, Protocol):
        return protocol
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol!r} is not known: choose one of {', '.join(PROTOCOLS)} or pass a Protocol")
    return PROTOCOLS[protocol]
