"""Attribution from the attention of vision transformers.

A_l is the attention (B, heads, T, T) of block l after the softmax, T = prefix tokens + patches. Maps are read
from the rows of the readout, the tokens that the classification head reads (see `transformer`). Patch maps become
pixels bilinearly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..classifier import Classifier
from ..protection import undisturbed
from .base import MEASURED, Metadata, register
from .passes import Passes
from .transformer import TransformerAttributor

WEIGHTS = ("average", "element")
_ARCHITECTURES = "timm vision transformers with softmax attention (ViT, DeiT, BEiT, EVA, DINOv3)"


class AttentionAttributor(TransformerAttributor):
    """Base of the methods that read attention; refuses other architectures when it is made."""

    reads = "reads attention"
    accepts = _ARCHITECTURES

    def __init__(self, clf: Classifier, **options: Any):
        super().__init__(clf, **options)
        self._softmaxes = self.structure.softmaxes or self.refuse()

    def forward(self, images: Tensor, watch: Callable[[int, Tensor], Tensor | None], last_only: bool = False) -> Tensor:
        """Logits (B, classes) while ``watch(block, A)`` sees the attention (B,heads,T,T), block after block.

        What ``watch`` returns replaces the attention, None leaves it.
        """
        rows, cols = self.grid(images)
        tokens = self.prefix + rows * cols

        def hook_of(block: int) -> Callable:
            def hook(_module: nn.Module, _args: tuple, attention: Tensor) -> Tensor | None:
                if tuple(attention.shape[2:]) != (tokens, tokens):
                    raise ValueError(
                        f"{self.name}: attention of block {block} is {tuple(attention.shape)}, not one row "
                        f"and column for each of {tokens} tokens; accepted are {_ARCHITECTURES}"
                    )
                return watch(block, attention)

            return hook

        hooks = [(module, hook_of(block)) for block, module in enumerate(self._softmaxes)]
        with undisturbed(self.clf, hooks[-1:] if last_only else hooks, unfused=True):
            return self.clf(images)

    def gradients(self, images: Tensor, target: Tensor, last_only: bool = False) -> tuple[list[Tensor], list[Tensor]]:
        """Attention A_l of every block and G_l = ∂logit_t/∂A_l, each (B, heads, T, T), detached.

        The derivative is total: what changes in later blocks is part of it. The backward pass ends at the first
        attention asked for. Works with gradients switched off around it.

        Args:
            last_only: only of the last block.
        """
        seen: list[Tensor] = []

        def watch(_block: int, attention: Tensor) -> Tensor:
            # the first is where the graph begins, the others are part of it
            seen.append(attention if seen else attention.detach().requires_grad_())
            return seen[-1]

        with torch.enable_grad():
            logits = self.forward(images, watch, last_only)
            gradients = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), seen)
        return [attention.detach() for attention in seen], list(gradients)


@register("raw_attention")
class RawAttention(AttentionAttributor):
    """Attention of the readout to the patches in the last block, mean over heads."""

    needs_gradients = False
    metadata = Metadata(
        paper="baseline of Chefer et al., CVPR 2021",
        cost="1F",
        architectures=_ARCHITECTURES,
        licence="well-known",
        notes="the same for every class; without a class token the mean over patch queries",
        fidelity=f"{MEASURED} (Chefer et al.)",
    )
    per_image = Passes(1)
    class_specific = False

    def _attribute(self, images: Tensor, target: Any) -> Tensor:
        seen: list[Tensor] = []
        self.forward(images, lambda _, attention: seen.append(attention), last_only=True)
        patches = seen[0][:, :, self.readout, self.prefix :].mean(dim=(1, 2))
        return self.upsample(patches, images)


@register("rollout")
class Rollout(AttentionAttributor):
    """Attention rollout: the readout's row of Π_l norm(I + E_h A_l), rows normalised to sum to 1."""

    needs_gradients = False
    metadata = Metadata(
        paper="Abnar and Zuidema, ACL 2020",
        cost="1F",
        architectures=_ARCHITECTURES,
        licence="well-known",
        notes="the same for every class; all blocks; without a class token the mean over patch rows",
        fidelity=f"{MEASURED} (as in Chefer et al.)",
    )
    per_image = Passes(1)
    class_specific = False

    def rollout(self, images: Tensor) -> Tensor:
        """The product over blocks (B, T, T); every row sums to 1. Trusts its input."""
        product: Tensor | None = None

        def watch(_block: int, attention: Tensor) -> None:
            # only the running product is kept, not the attention of every block
            nonlocal product
            mixed = attention.float().mean(dim=1)
            mixed = mixed + torch.eye(mixed.shape[-1], device=mixed.device)
            mixed = mixed / mixed.sum(dim=-1, keepdim=True)
            product = mixed if product is None else mixed @ product

        self.forward(images, watch)
        assert product is not None
        return product

    def _attribute(self, images: Tensor, target: Any) -> Tensor:
        return self.upsample(self.rollout(images)[:, self.readout, self.prefix :].mean(dim=1), images)


@register("gradcam_vit")
class GradCamViT(AttentionAttributor):
    """Grad-CAM on the last block, in the readout's row of its attention A_h, with G_h = ∂logit_t/∂A_h:

    - weights="average": ReLU Σ_h w_h·A_h, w_h the patch mean of G_h, as Chefer et al. compare with;
    - weights="element": ReLU E_h(G_h⊙A_h), each patch by its own gradient, the Grad-CAM of MDA's tables.

    The backward pass stops at the last block's attention, so it costs a fraction of a full one. Maps without
    any positive evidence are zero everywhere.

    Args:
        weights: "average" or "element".
    """

    metadata = Metadata(
        paper="Selvaraju et al., ICCV 2017, as adapted by Chefer et al., CVPR 2021",
        cost="1F, B of the last block",
        architectures=_ARCHITECTURES,
        licence="Chefer et al., MIT",
        notes='without a class token attention and gradient, or with weights="element" their product, are averaged '
        "over patch queries",
        fidelity=f'{MEASURED} (Chefer et al.); weights="element" is the definition behind MDA\'s tables',
    )
    per_image = Passes(1, 1)

    def __init__(self, clf: Classifier, weights: str = "average", **options: Any):
        super().__init__(clf, **options)
        if weights not in WEIGHTS:
            raise ValueError(f"weights={weights!r} is not known: choose one of {', '.join(WEIGHTS)}")
        self.weights = weights

    def patches(self, images: Tensor, target: Tensor) -> Tensor:
        """(B, rows·columns) before upsampling. Trusts its input, at most ``internal_batch_size`` images."""
        attention, gradient = (
            values[0][:, :, self.readout, self.prefix :] for values in self.gradients(images, target, last_only=True)
        )
        if self.weights == "element":
            return F.relu((gradient * attention).mean(dim=(1, 2)))
        weights = gradient.mean(dim=(2, 3))  # [B, heads]
        return F.relu(torch.einsum("bh,bhqp->bp", weights, attention) / attention.shape[2])

    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        return self.upsample(self.patches(images, target), images)
