"""LeGrad: how the logit of every block's output reacts to that block's attention."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..classifier import Classifier
from ..protection import undisturbed
from .attention import AttentionAttributor
from .base import MEASURED, Metadata, register
from .passes import Passes


@register("legrad")
class LeGrad(AttentionAttributor):
    """Σ_l mean over heads and query rows of ReLU(∂s_l/∂A_l), where s_l = head(norm(pool Z_l))_t reads block l's output.

    The gradient is taken inside block l alone, so each backward pass is short, and what it needs is freed before
    the next block runs. Only the keys that are patches make the map. The map is raw: scale it to [0, 1] to show it.
    """

    metadata = Metadata(
        paper="Bousselham et al., LeGrad, ICCV 2025",
        cost="1F, and for every block B of that block and the head",
        architectures=AttentionAttributor.accepts,
        licence="paper only",
        notes="sum over blocks, not their mean, and no min-max; pooling, norm and head are the classifier's own",
        fidelity=f"{MEASURED}, up to the scale of a map",
    )
    # the backward passes start at logits read from a block, which are not the classifier's
    per_image = Passes(1)

    def __init__(self, clf: Classifier, **options: Any):
        super().__init__(clf, **options)
        if not (hasattr(clf.module, "forward_head") and hasattr(clf.module, "norm")):
            self.refuse()

    def patches(self, images: Tensor, target: Tensor) -> Tensor:
        """(B, rows·columns) before upsampling. Trusts its input, at most ``internal_batch_size`` images."""
        module: Any = self.clf.module
        total: Tensor | None = None
        attention: Tensor | None = None

        def watch(_block: int, arrived: Tensor) -> Tensor:
            nonlocal attention
            attention = arrived.detach().requires_grad_()
            return attention

        def leave(_block: nn.Module, _args: Any, tokens: Tensor) -> Tensor:
            nonlocal total, attention
            assert attention is not None
            logits = self.clf.read(module.forward_head(module.norm(tokens)))
            (gradient,) = torch.autograd.grad(logits.gather(1, target[:, None]).sum(), attention)
            received = F.relu(gradient[..., self.prefix :]).mean(dim=(1, 2))
            total = received if total is None else total + received
            attention = None
            return tokens.detach()

        with undisturbed(self.clf, [(block, leave) for block in self.blocks]):
            self.forward(images, watch)
        assert total is not None
        return total

    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        return self.upsample(self.patches(images, target), images)
