"""Attribution from attention and its gradients along the path from a black image.

All three share W, the integrated gradient of the last block's attention: with p_t the softmax probability and x the
image, W = E_h ReLU(1/n Σ_k ∂p_t(k/n·x)/∂A_L), k = 1…n, in the readout's row.
"""

from __future__ import annotations

from abc import abstractmethod
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..classifier import Classifier
from .attention import AttentionAttributor
from .base import Metadata, register

LEVELS = ("head", "token")
_PATH = (
    "the path starts at black, 0 in [0, 1], and W is a gradient alone, not times the attention; "
    "several readout tokens are averaged"
)


class IntegratedAttention(AttentionAttributor):
    """Base of the methods that integrate the last block's attention gradient.

    Args:
        n_steps: points on the path ≥ 1.
        internal_batch_size: images times steps in one pass.
    """

    def __init__(self, clf: Classifier, n_steps: int = 20, **options: Any):
        super().__init__(clf, **options)
        if n_steps < 1:
            raise ValueError(f"n_steps={n_steps}: give at least one step of the path")
        self.n_steps = n_steps

    def integrated(self, images: Tensor, target: Tensor) -> Tensor:
        """W (B, rows·columns) ≥ 0. Trusts its input, at most ``internal_batch_size`` images."""
        count = max(1, self.internal_batch_size // len(images))
        total: Tensor | None = None
        for steps in torch.arange(1, self.n_steps + 1, device=images.device).split(count):
            scaled = (steps.to(images) / self.n_steps).view(-1, 1, 1, 1, 1) * images
            classes = target.repeat(len(steps))
            _, (gradient,) = self.gradients(scaled.flatten(0, 1), classes, last_only=True, probability=True)
            rows = gradient[:, :, self.readout, self.prefix :]
            rows = rows.unflatten(0, (len(steps), len(images))).sum(dim=0)
            total = rows if total is None else total + rows
        assert total is not None
        return F.relu(total / self.n_steps).mean(dim=(1, 2))

    @abstractmethod
    def patches(self, images: Tensor, target: Tensor) -> Tensor:
        """(B, rows·columns) before upsampling. Trusts its input, at most ``internal_batch_size`` images."""

    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        return self.upsample(self.patches(images, target), images)


@register("attention_ig")
class AttentionIG(IntegratedAttention):
    """W, the integrated gradient of the last block's attention (see the module)."""

    metadata = Metadata(
        paper='"IG" in the comparisons of Yuan et al., NeurIPS workshop 2021, and Chen et al., TMLR 2023',
        cost="20F, 20B of the last block",
        architectures=AttentionAttributor.accepts,
        licence="papers only",
        notes=_PATH,
    )

    def patches(self, images: Tensor, target: Tensor) -> Tensor:
        return self.integrated(images, target)


@register("transition_attention")
class TransitionAttention(IntegratedAttention):
    """W ⊙ s, where s starts as the readout's row of E_h A_L and s ← s + s·E_h A_l for l = L−1…1."""

    metadata = Metadata(
        paper="Yuan et al., Explaining Information Flow Inside Vision Transformers Using Markov Chain, NeurIPS "
        "workshop 2021",
        cost="21F, 20B of the last block",
        architectures=AttentionAttributor.accepts,
        licence="paper only",
        notes=_PATH,
    )

    def patches(self, images: Tensor, target: Tensor) -> Tensor:
        mixed: list[Tensor] = []
        self.forward(images, lambda _, attention: mixed.append(attention.mean(dim=1)))
        state = mixed.pop()[:, self.readout].mean(dim=1, keepdim=True)
        while mixed:
            state = state + state @ mixed.pop()
        return state[:, 0, self.prefix :] * self.integrated(images, target)


@register("bi_attention")
class BiAttention(IntegratedAttention):
    """W ⊙ the readout's row of R, where R starts as I and R ← R + M_l·R from block ``start`` on.

    M_l (T, T) is the attention of block l as its heads or its tokens matter:

    - "head": Σ_h I_h·A_h, I_h ∝ mean |A_hᵀ·∂logit_t/∂A_h| with Σ_h I_h = 1;
    - "token": E_h A_h · diag(‖v_j‖/‖x_j‖), x_j what enters the attention module and v_j what it would give for the
      token if every token attended to itself alone, its projected value.

    Args:
        level: "head" or "token".
        start: first block that counts, from 0; in a shallower model the last block.
    """

    metadata = Metadata(
        paper="Chen et al., Beyond Intuition: Rethinking Token Attributions inside Transformers, TMLR 2023",
        cost='21F, 1B and 20B of the last block; no full B with level="token"',
        architectures=AttentionAttributor.accepts,
        licence="paper only",
        notes=f'{_PATH}; level="token" follows our reading of the paper: projected values carry the biases, and '
        "heads count alike",
    )

    def __init__(self, clf: Classifier, level: str = "head", start: int = 3, **options: Any):
        super().__init__(clf, **options)
        if level not in LEVELS:
            raise ValueError(f"level={level!r} is not known: choose one of {', '.join(LEVELS)}")
        if start < 0:
            raise ValueError(f"start={start}: give a block, from 0")
        if level == "token" and not all(isinstance(getattr(block, "attn", None), nn.Module) for block in self.blocks):
            kind = type(self.blocks[0]).__name__
            raise ValueError(f'{self.name} with level="token" needs block.attn, a {kind} has none: use level="head"')
        self.level = level
        self.start = min(start, len(self.blocks) - 1)

    def patches(self, images: Tensor, target: Tensor) -> Tensor:
        mixed = self._by_head(images, target) if self.level == "head" else self._by_token(images)
        # the readout's rows of R = (I + M_L)…(I + M_start) are all that is asked for
        row = torch.eye(mixed[0].shape[-1]).to(mixed[0])[self.readout].mean(dim=0).expand(len(images), 1, -1)
        while mixed:
            row = row + row @ mixed.pop()
        return row[:, 0, self.prefix :] * self.integrated(images, target)

    def _by_head(self, images: Tensor, target: Tensor) -> list[Tensor]:
        mixed = []
        for attention, gradient in list(zip(*self.gradients(images, target), strict=True))[self.start :]:
            importance = (attention.mT @ gradient).abs().mean(dim=(2, 3))  # [B, heads]
            total = importance.sum(dim=1, keepdim=True)
            importance = importance / total.clamp_min(torch.finfo(total.dtype).tiny)
            mixed.append(torch.einsum("bh,bhij->bij", importance, attention))
        return mixed

    def _by_token(self, images: Tensor) -> list[Tensor]:
        mixed: list[Tensor] = []
        alone = False

        def watch(_block: int, attention: Tensor) -> Tensor | None:
            if alone:
                return torch.eye(attention.shape[-1]).to(attention).expand_as(attention)
            mixed.append(attention.mean(dim=1))
            return None

        def left(module: nn.Module, args: tuple, kwargs: dict, _output: Tensor) -> None:
            nonlocal alone
            alone = True
            # not module(…), which would call this hook
            values = module.forward(*args, **kwargs)
            alone = False
            size = args[0].norm(dim=-1)
            ratio = values.norm(dim=-1) / size.clamp_min(torch.finfo(size.dtype).tiny)
            mixed[-1] = mixed[-1] * ratio[:, None]

        with ExitStack() as stack:
            for block in self.blocks:
                attn: Any = block.attn
                stack.callback(attn.register_forward_hook(left, with_kwargs=True).remove)
            self.forward(images, watch)
        return mixed[self.start :]
