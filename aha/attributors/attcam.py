"""Attentive class activation: input×gradient of the hidden tokens, weighted by the attention they get."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from ..classifier import Classifier
from .attention import _ARCHITECTURES, AttentionAttributor
from .base import Metadata, register
from .passes import Passes

VARIANTS = ("published", "readout")


@register("attcam")
class AttCAM(AttentionAttributor):
    """Attention to a token times the token's evidence, summed over blocks l = 1…L, signed, for patch i.

    With h_l (B, T, D) entering block l and its evidence e_l[i] = Σ_d h_l[i,d]·∂logit_t/∂h_l[i,d]:

    - variant="published": Σ_{l<L} (E_h E_q A_l)[q, i]·e_{l+1}[i], the mean over *all* queries q of a block's attention
      with the tokens that leave the block, L − 1 terms, as LibraGrad compares with it. The last term is only rounding
      in a plain backward pass: a norm, blind to scale, is all that reads the patches from there on;
    - variant="readout": Σ_l (E_h A_l)[readout, i]·e_l[i], ours: the readout's row with the tokens it weighs, L terms.

    Args:
        variant: "published" or "readout".

    Raises:
        ValueError: also for a classifier of one block, of which "published" has no term.
    """

    metadata = Metadata(
        paper="Qiang et al., NeurIPS 2022 (AttCAT), for images",
        cost="1F 1B",
        architectures=_ARCHITECTURES,
        licence="from the paper's formula",
        notes='variant="readout", ours, weighs the tokens that enter a block by the readout\'s row of its attention, '
        "without a class token the mean over patch queries",
        fidelity="rebuilt from LibraGrad's definition (mean over all queries, the next block's tokens, L − 1 terms); "
        "equal to loops in float64",
    )
    per_image = Passes(1, 1)

    def __init__(self, clf: Classifier, variant: str = "published", **options: Any):
        super().__init__(clf, **options)
        if variant not in VARIANTS:
            raise ValueError(f"variant={variant!r} is not known: choose one of {', '.join(VARIANTS)}")
        if variant == "published" and len(self.blocks) == 1:
            raise ValueError(
                f"{self.name} weighs a block by the one before, {clf.name} has one block: give variant=readout"
            )
        self.variant = variant

    def patches(self, images: Tensor, target: Tensor) -> Tensor:
        """(B, rows·columns) before upsampling. Trusts its input, at most ``internal_batch_size`` images."""
        published = self.variant == "published"
        queries = slice(None) if published else self.readout
        hidden: list[Tensor] = []
        weights: list[Tensor] = []

        def enter(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            # nothing before the first tokens that count needs a gradient
            tokens = args[0] if hidden else args[0].detach().requires_grad_()
            hidden.append(tokens)
            return (tokens, *args[1:]), kwargs

        def watch(_block: int, attention: Tensor) -> None:
            weights.append(attention.detach()[:, :, queries, self.prefix :].mean(dim=(1, 2)))

        with ExitStack() as stack:
            for block in self.blocks[1:] if published else self.blocks:
                stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
            logits = self.forward(images, watch)
        gradients: tuple[Any, ...] = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), hidden)
        activations = (
            (tokens.detach() * gradient).sum(dim=-1)[:, self.prefix :]
            for tokens, gradient in zip(hidden, gradients, strict=True)
        )
        # published, the last block's attention weighs nothing
        patches = sum(a * w for a, w in zip(activations, weights, strict=not published))
        assert isinstance(patches, Tensor)
        return patches

    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        return self.upsample(self.patches(images, target), images)
