"""FullGrad+: the full gradient (`aha.full_gradient`) of the tokens before every block."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..classifier import Classifier
from ..full_gradient import TokenTerms
from ..precision import switched_off
from .base import MEASURED, Metadata, register
from .passes import Passes
from .transformer import TransformerAttributor


@register("fullgrad_plus")
class FullGradPlus(TransformerAttributor):
    """Mean over the cuts l before each block of the full gradient there, signed, per patch:

        (1/L) Σ_l [ Σ_d h_l⊙∂logit_t/∂h_l + Σ_{c after l} Σ_d c⊙∂logit_t/∂c ],    h_l (B, T, D) the input of block l.

    Inside `libra` the bracket sums to the logit for every l over all tokens, but for the biases that belong to no
    token: those after pooling and of token mixing, which are left out, and those of the prefix tokens. A bias that
    follows k of the L cuts therefore counts k/L.
    """

    metadata = Metadata(
        paper="Srinivas and Fleuret, NeurIPS 2019 (FullGrad); FullGrad+ of Mehri et al., CVPR 2025",
        cost="1F 1B",
        architectures="timm vision transformers (ViT, DeiT, BEiT, EVA, DINOv3) and MLP-Mixers",
        licence="from the papers' definition of the full gradient",
        notes="on hidden tokens instead of pixels: mean over blocks of input×gradient and of the bias terms that "
        "follow, summed over channels with the sign kept, where FullGrad takes absolute values and rescales each "
        "layer; biases without a token of their own (after pooling, inside token mixing, of query and key norms) "
        "are left out",
        fidelity=f"under libragrad {MEASURED}",
    )
    per_image = Passes(1, 1)
    accepts = "timm vision transformers (ViT, DeiT, BEiT, EVA, DINOv3) and MLP-Mixers"
    mixers = True

    def __init__(self, clf: Classifier, **options: Any):
        super().__init__(clf, **options)
        if self.structure.joined_late:
            self.refuse()

    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        rows, cols = self.grid(images)
        terms = TokenTerms(self.blocks, self.prefix + rows * cols)
        with switched_off(self.clf.module, "grad_checkpointing"), terms.recorded():
            logits = self.clf(images)
        terms.trace(logits.gather(1, target[:, None]).sum())
        return self.upsample(terms.total[:, self.prefix :], images)
