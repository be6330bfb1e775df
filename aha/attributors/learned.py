"""The library's own method as an attributor: a trained explainer, refined on request."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..classifier import Classifier
from ..explainer import Explainer
from ..refinement import refine
from .base import Attributor, Metadata


class AHA(Attributor):
    """An explainer's maps after ``steps`` refinement steps; 0 is one forward pass.

    Not in the registry: it needs a trained explainer.

    Args:
        explainer: trained for ``clf``, or for another classifier if it is to be refined.
        steps: T ≥ 0.
        refinement: further arguments of `aha.refine`, such as ``lr``.
    """

    name = "aha"
    metadata = Metadata(
        paper="Schinagl et al., Learn to Rank, ECCV 2026 (arXiv 2604.05819)",
        cost="1F, and per refinement step 2·S·references F and B",
        architectures="any classifier, with an explainer trained for it",
        licence="own implementation from the paper",
        notes="class-conditioned maps, standardized scores",
    )

    def __init__(
        self,
        clf: Classifier,
        explainer: Explainer,
        steps: int = 0,
        internal_batch_size: int = 32,
        seed: int = 0,
        **refinement: Any,
    ):
        super().__init__(clf, internal_batch_size, seed)
        if steps < 0:
            raise ValueError(f"steps={steps}: give 0 or more")
        self.explainer = explainer
        self.steps = steps
        self.refinement = refinement

    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        if self.steps == 0:
            return self.explainer.attribute(images, target)
        return refine(self.explainer, self.clf, images, target, self.steps, **self.refinement)
