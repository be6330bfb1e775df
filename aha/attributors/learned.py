"""Attribution by trained explainers: the library's own method and its amortised peers.

>>> aha.attributors.create("aha", clf, explainer="runs/train/explainer", steps=3)
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from .. import calibration, references
from ..classifier import Classifier
from ..explainer import Explainer
from ..identity import fingerprint
from ..refinement import plan, refine
from ..shapley import METHODS, ShapleyObjective
from .base import Attributor, Metadata, register
from .passes import Passes

_FIDELITY = "rebuilt from the paper, not compared with the authors' code; differs by the network and what v is"


class LearnedAttributor(Attributor):
    """Base of the methods that need an explainer trained for them.

    Args:
        explainer: an explainer, or what `aha.Explainer.from_pretrained` loads.

    Attributes:
        objective: what the explainer must have been trained for.
    """

    needs_gradients = False

    objective: ClassVar[str]

    def __init__(
        self,
        clf: Classifier,
        explainer: Explainer | str | Path | None = None,
        internal_batch_size: int | None = None,
        seed: int = 0,
    ):
        super().__init__(clf, internal_batch_size, seed)
        if explainer is None:
            raise ValueError(
                f"{self.name} needs a trained explainer: pass explainer=…, made by "
                f"aha train --objective {self.objective}"
            )
        if not isinstance(explainer, Explainer):
            explainer = Explainer.from_pretrained(explainer, clf)
        trained = objective_of(explainer)
        if trained != self.objective:
            raise ValueError(
                f"{self.name} needs an explainer trained with --objective {self.objective}, this one was trained with "
                f"{trained}: use it as {method_of(explainer)}"
            )
        self.explainer = explainer.of(clf)

    @property
    def _encoding(self) -> Passes:
        """What the explainer sees of the classifier."""
        return Passes(*self.explainer.passes)

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        return (self.clf, *self.explainer.networks)


def objective_of(explainer: Explainer) -> str:
    """What an explainer was trained for; one that does not say so ranks."""
    return str(explainer.settings.get("objective", "ranking"))


def method_of(explainer: Explainer) -> str:
    """The registered name of the method that an explainer was trained for."""
    trained = objective_of(explainer)
    return "aha" if trained == "ranking" else trained


@register("aha")
class AHA(LearnedAttributor):
    """An explainer's maps after ``steps`` refinement steps; 0 is one forward pass.

    Args:
        explainer: trained for ``clf``, or for another classifier if it is to be refined; or its folder. Default: the
            universal one, which was trained for none and serves any.
        steps: T ≥ 0, or None: that of the preset.
        scale: of the values, "raw", "calibrated" or "measured", in the same order (see `aha.calibration`); None is
            calibrated where the explainer knows its response, else raw.
        refinement: further arguments of `aha.refine`, such as ``preset``.
    """

    objective = "ranking"
    metadata = Metadata(
        paper="Schinagl et al., Learn to Rank, ECCV 2026 (arXiv 2604.05819)",
        cost="1F and 1B where the explainer sees evidence; T refinement steps at S fractions: T·2·S F and T·2·S B "
        "more, by default 48F and 48B; 20F where magnitudes are measured",
        architectures="any classifier; the explainer that ships serves those with gradients and hooks",
        licence="own implementation from the paper",
        notes="class-conditioned maps, standardized scores, magnitudes by the response learnt while training",
        fidelity="rebuilt from the paper, not compared with the authors' code; differs by a decoder that is given the "
        "class, standardized scores, and a refinement that moves the map instead of the head",
    )

    def __init__(
        self,
        clf: Classifier,
        explainer: Explainer | str | Path | None = None,
        steps: int | None = 0,
        internal_batch_size: int | None = None,
        seed: int = 0,
        scale: str | None = None,
        **refinement: Any,
    ):
        super().__init__(clf, Explainer.universal(clf) if explainer is None else explainer, internal_batch_size, seed)
        named = {name: refinement[name] for name in ("preset", "lr", "fractions") if name in refinement}
        self.plan = plan(steps=steps, **named)
        self.steps = self.plan.steps
        if scale is None:
            scale = calibration.best_scale(self.explainer)
        self.scale = calibration.check_scale(scale, self.explainer)
        self.refinement = refinement

    def passes(self, images: Tensor) -> Passes:
        measured = Passes(calibration.passes(*images.shape[-2:]) if self.scale == "measured" else 0)
        return self._encoding + Passes(*self.plan.passes) + measured

    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        if self.steps:
            maps = refine(self.explainer, self.clf, images, target, self.steps, **self.refinement)
        else:
            maps = self.explainer.attribute(images, target)
        size = max(2, self.internal_batch_size)
        return calibration.calibrated(self.clf, self.explainer, images, maps, target, self.scale, size)


class ShapleyAttributor(LearnedAttributor):
    """Base of FastSHAP and ViT-Shapley: φ per player from one pass of the explainer, enlarged bilinearly.

    φ is in units of probability and efficient, Σφ = v(N) − v(∅) (see `aha.shapley`).

    Args:
        explainer: trained with this objective for ``clf``, or its folder.
        surrogate: the surrogate it was trained with, if there was one.
        internal_batch_size: as everywhere, but v(N) and v(∅) of an image share a pass.
    """

    def __init__(
        self,
        clf: Classifier,
        explainer: Explainer | str | Path | None = None,
        surrogate: Classifier | None = None,
        internal_batch_size: int | None = None,
        seed: int = 0,
    ):
        super().__init__(clf, explainer, internal_batch_size, seed)
        settings = self.explainer.settings
        if settings.get("surrogate") != (fingerprint(surrogate) if surrogate is not None else None):
            expected = "with" if settings.get("surrogate") else "without"
            raise ValueError(
                f"{self.name}: the explainer was trained {expected} a surrogate: pass surrogate= as in its training"
            )
        players = settings.get("players")
        self.game = ShapleyObjective(
            clf,
            absence=next(absence for absence, name in METHODS.items() if name == self.objective),
            players=(players[0], players[1]) if players else None,
            surrogate=surrogate,
            chunk=max(2, self.internal_batch_size),
        )

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        return (*super().networks, self.game.value_model)

    def passes(self, images: Tensor) -> Passes:
        # v(N) and v(∅), with each reference unless patches are dropped
        ends = 2 * (1 if self.game.absence == "tokens" else len(self.explainer.settings.get("references", ())))
        return self._encoding + Passes(ends if self.game.value_model.module is self.clf.module else 0)

    def values(self, images: Tensor, target: Tensor) -> Tensor:
        """φ (B, rows, cols) of the players, for checked images and targets (B,)."""
        regions = self.game.regions(*images.shape[-2:])
        names = self.explainer.settings.get("references", ())
        blanks = [references.make(name, images, self.clf.mean_colour) for name in names]
        maps = self.explainer.attribute(images, target, self.internal_batch_size)
        phi = self.game.values(images, maps, target, blanks, regions)
        return phi.view(-1, regions.rows, regions.cols)

    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        phi = self.values(images, target)
        return F.interpolate(phi[:, None], images.shape[-2:], mode="bilinear", align_corners=False)


@register("fastshap")
class FastSHAP(ShapleyAttributor):
    """FastSHAP: Shapley values of grid cells that are replaced by a reference image, predicted in one pass."""

    objective = "fastshap"
    metadata = Metadata(
        paper="Jethani et al., FastSHAP, ICLR 2022",
        cost="1F of the explainer; 2F for v(N) and v(∅), which do not change the order",
        architectures="any classifier, with an explainer trained for it",
        licence="own implementation from the paper",
        notes="v is the frozen classifier itself unless a surrogate is given, the paper fine-tunes one on masked "
        "images; trained for the prediction and the label or runner-up, the paper draws classes; class-conditioned "
        "decoder of this library instead of the paper's network",
        fidelity=_FIDELITY,
    )


@register("vit_shapley")
class ViTShapley(ShapleyAttributor):
    """ViT-Shapley: Shapley values of patches that are dropped from the sequence of tokens, predicted in one pass."""

    objective = "vit_shapley"
    metadata = Metadata(
        paper="Covert et al., Learning to Estimate Shapley Values with Vision Transformers, ICLR 2023",
        cost="1F of the explainer; 2F for v(N) and v(∅), which do not change the order",
        architectures="timm vision transformers with a class token or average pooling (ViT, DeiT, BEiT, EVA, DINOv3), "
        "with an explainer trained for it",
        licence="own implementation from the paper",
        notes="v is the frozen classifier itself unless a surrogate is given, the paper fine-tunes one on masked "
        "images; patches are dropped by masking them as attention keys in every block, so a pass costs a whole one; "
        "average pooling is over the patches left, zero for none; trained for the prediction and the label or "
        "runner-up, the paper draws classes; class-conditioned decoder of this library instead of the paper's network",
        fidelity=_FIDELITY,
    )
