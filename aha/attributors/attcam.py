"""Attentive class activation: input×gradient of the hidden tokens, weighted by the attention they get."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from .attention import _ARCHITECTURES, AttentionAttributor
from .base import Metadata, register


@register("attcam")
class AttCAM(AttentionAttributor):
    """Σ_l (E_h A_l)[readout, i]·Σ_d h_l[i,d]·∂logit_t/∂h_l[i,d] for patch i, signed; h_l (B, T, D) enters block l."""

    metadata = Metadata(
        paper="Qiang et al., NeurIPS 2022 (AttCAT), for images",
        cost="1F 1B",
        architectures=_ARCHITECTURES,
        licence="from the paper's formula",
        notes="h_l are the tokens that A_l weighs, the block's input: of the last block's output only the readout has "
        "a gradient. Without a class token the mean over patch queries",
    )

    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        hidden: list[Tensor] = []
        weights: list[Tensor] = []

        def enter(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            # nothing before the first block needs a gradient
            tokens = args[0] if hidden else args[0].detach().requires_grad_()
            hidden.append(tokens)
            return (tokens, *args[1:]), kwargs

        def watch(_block: int, attention: Tensor) -> None:
            weights.append(attention.detach()[:, :, self.readout, self.prefix :].mean(dim=(1, 2)))

        with ExitStack() as stack:
            for block in self.blocks:
                stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
            logits = self.forward(images, watch)
        gradients: tuple[Any, ...] = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), hidden)
        activations = (
            (tokens.detach() * gradient).sum(dim=-1)[:, self.prefix :]
            for tokens, gradient in zip(hidden, gradients, strict=True)
        )
        patches = sum(a * w for a, w in zip(activations, weights, strict=True))
        assert isinstance(patches, Tensor)
        return self.upsample(patches, images)
