"""Transformer attribution: attention weighted by its gradient and its relevance, block by block."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..classifier import Classifier
from ..protection import undisturbed
from .attention import AttentionAttributor
from .base import MEASURED, Metadata, register
from .passes import Passes
from .relevance import NoRule, Propagation

RELEVANCES = ("propagation", "gradient")


@register("chefer")
class Chefer(AttentionAttributor):
    """The readout's row of Ā_L…Ā_1 − I with Ā_l = I + E_h ReLU(G_l ⊙ R_l) (eq. 13, 14).

    G_l = ∂logit_t/∂A_l, and R_l (B,heads,T,T) is the relevance of the attention, propagated from a one at logit t
    (see `relevance`), or with ``relevance="gradient"`` the attention itself.

    Args:
        relevance: "propagation" as published, or "gradient" for any architecture that exposes its attention.

    Raises:
        ValueError: for a classifier with an operation that relevance has no rule for. To find out, making a
            "propagation" sends one image through the classifier.
    """

    metadata = Metadata(
        paper="Chefer et al., Transformer Interpretability Beyond Attention Visualization, CVPR 2021",
        cost='1F 2B, derivatives and relevances; 1F 1B with relevance="gradient"',
        architectures=AttentionAttributor.accepts,
        licence="paper only",
        notes="the identity is taken off: it would only add a constant, and only without a class token, where the row "
        "is the patches' mean; beyond the paper: gates and rotary positions follow the rules of products and sums, a "
        "mean goes to the tokens of its sign, constants get none; residuals that nearly cancel make relevances "
        "sensitive to rounding",
        fidelity=f'{MEASURED}; relevance="gradient" takes the attention itself, without propagation',
    )

    def __init__(self, clf: Classifier, relevance: str = "propagation", **options: Any):
        super().__init__(clf, **options)
        if relevance not in RELEVANCES:
            raise ValueError(f"relevance={relevance!r} is not known: choose one of {', '.join(RELEVANCES)}")
        self.relevance = relevance
        if relevance == "propagation":
            if clf.dtype in (torch.float16, torch.bfloat16):
                raise ValueError(
                    f"{self.name} divides by residuals that nearly cancel, too small for the half precision of "
                    f"{clf.name}: give it in float32"
                )
            self._check_rules()

    def passes(self, images: Tensor) -> Passes:
        return Passes(1, 2) if self.relevance == "propagation" else Passes(1, 1)

    def _check_rules(self) -> None:
        image = self.clf.mean.new_zeros(1, len(self.clf.mean), *self.clf.input_size)
        try:
            with undisturbed(self.clf):
                self._recorded(image)
        except NoRule as error:
            raise ValueError(
                f"{self.name} has no rule to propagate relevance through {error} in {self.clf.name}, a "
                f'{type(self.clf.module).__name__}: make it with relevance="gradient"'
            ) from None

    def _recorded(self, images: Tensor) -> tuple[Propagation, Tensor, list[Tensor]]:
        """A forward pass that can be walked by relevance: logits (B, classes), attention of every block."""
        attentions: list[Tensor] = []
        # relevance ends at the first block's tokens, and none is kept for what comes before
        tokens = self.starting_at(0, lambda tokens: tokens.detach().requires_grad_())
        with tokens, Propagation() as propagation:
            logits = self.forward(images, lambda _, attention: attentions.append(attention))
        return propagation, logits, attentions

    def relevances(self, images: Tensor, target: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """R_l and G_l of every block, each (B, heads, T, T). Trusts its input.

        The sums over A_l of R_l are the share of the attention weights in block l's relevance; the relevance of
        the tokens, which it is taken from, sums to 1 at every block.
        """
        with torch.enable_grad():
            if self.relevance == "gradient":
                return self.gradients(images, target)
            propagation, logits, attentions = self._recorded(images)
            start = F.one_hot(target, logits.shape[1]).to(logits)
            gradients = torch.autograd.grad(logits, attentions, start, retain_graph=True)
            with propagation.by_relevance():
                relevances = torch.autograd.grad(logits, attentions, start)
        return list(relevances), list(gradients)

    def patches(self, images: Tensor, target: Tensor) -> Tensor:
        """(B, rows·columns) before upsampling. Trusts its input, at most ``internal_batch_size`` images."""
        pairs = list(zip(*self.relevances(images, target), strict=True))
        tokens = pairs[0][0].shape[-1]
        start = torch.eye(tokens).to(images)[self.readout].mean(dim=0).expand(len(images), 1, -1)
        # the row less the identity's, which would drown the rest in float32 where all patches are read
        row = torch.zeros_like(start)
        while pairs:
            relevance, gradient = pairs.pop()
            row = row + (start + row) @ F.relu(gradient * relevance).mean(dim=1)
        return row[:, 0, self.prefix :]

    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        return self.upsample(self.patches(images, target), images)
