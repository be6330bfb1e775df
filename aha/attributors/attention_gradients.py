"""Attribution from attention and its gradients along the path from the mean colour.

All three share W, the integrated gradient of the last block's attention: with x the *normalised* pixels, whose zero is
the classifier's mean colour, W = E_h ReLU(1/n Σ_k ∂logit_t(k/n·x)/∂A_L), k = 1…n, in the readout's row.
"""

from __future__ import annotations

from abc import abstractmethod
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..classifier import Classifier
from .attention import AttentionAttributor
from .base import Metadata, register
from .passes import Passes

# level → first block that counts
LEVELS = {"head": 3, "token": 5}
_PATH = "W is a gradient alone, not times the attention; several readout tokens are averaged"
_FIDELITY = (
    "rebuilt from the authors' definition (gradient of the logit, path from zero in normalised space); equal to loops "
    "in float64"
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
        start = self.clf.mean[:, None, None].to(images)
        total: Tensor | None = None
        for steps in torch.arange(1, self.n_steps + 1, device=images.device).split(count):
            # normalised, share·pixels
            scaled = torch.lerp(start, images, (steps.to(images) / self.n_steps).view(-1, 1, 1, 1, 1))
            classes = target.repeat(len(steps))
            _, (gradient,) = self.gradients(scaled.flatten(0, 1), classes, last_only=True)
            rows = gradient[:, :, self.readout, self.prefix :]
            rows = rows.unflatten(0, (len(steps), len(images))).sum(dim=0)
            total = rows if total is None else total + rows
        assert total is not None
        return F.relu(total / self.n_steps).mean(dim=(1, 2))

    @abstractmethod
    def patches(self, images: Tensor, target: Tensor) -> Tensor:
        """(B, rows·columns) before upsampling. Trusts its input, at most ``internal_batch_size`` images."""

    # what it takes besides the path
    besides: ClassVar[Passes] = Passes()

    def passes(self, images: Tensor) -> Passes:
        return self.n_steps * Passes(1, 1) + self.besides

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
        fidelity=_FIDELITY,
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
        fidelity=_FIDELITY,
    )
    besides = Passes(1)

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
    - "token": E_h A_h · diag(‖W v_j‖/‖x_j‖), x_j what enters the block, before its norm, v_j the token's value of all
      heads, its bias included, and W the attention's output projection without its bias.

    Args:
        level: "head" or "token".
        start: first block that counts, from 0; None is 3 by head and 5 by token; in a shallower model the last block.
    """

    metadata = Metadata(
        paper="Chen et al., Beyond Intuition: Rethinking Token Attributions inside Transformers, TMLR 2023",
        cost='21F, 1B and 20B of the last block; no full B with level="token"',
        architectures=AttentionAttributor.accepts,
        licence="paper only",
        notes=f'{_PATH}; level="head" counts from block 3 on and level="token" from block 5, of 12 and from 0; there '
        "heads count alike",
        fidelity=f"{_FIDELITY}; by token the value's projection without its bias over the block's input",
    )

    def __init__(self, clf: Classifier, level: str = "head", start: int | None = None, **options: Any):
        super().__init__(clf, **options)
        if level not in LEVELS:
            raise ValueError(f"level={level!r} is not known: choose one of {', '.join(LEVELS)}")
        start = LEVELS[level] if start is None else start
        if start < 0:
            raise ValueError(f"start={start}: give a block, from 0")
        projections = [getattr(attention, "proj", None) for attention in self.structure.attentions]
        if level == "token" and not all(isinstance(projection, nn.Linear) for projection in projections):
            kind = type(self.blocks[0]).__name__
            raise ValueError(
                f'{self.name} with level="token" needs block.attn.proj, a {kind} has none: use level="head"'
            )
        self.level = level
        self.start = min(start, len(self.blocks) - 1)

    def passes(self, images: Tensor) -> Passes:
        return super().passes(images) + (Passes(1, 1) if self.level == "head" else Passes(1))

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
        sizes: list[Tensor] = []
        alone = False

        def watch(_block: int, attention: Tensor) -> Tensor | None:
            if alone:
                return torch.eye(attention.shape[-1]).to(attention).expand_as(attention)
            mixed.append(attention.mean(dim=1))
            return None

        def enter(_module: nn.Module, args: tuple, _kwargs: dict) -> None:
            sizes.append(args[0].norm(dim=-1))

        def project(module: nn.Module, _args: tuple, output: Tensor) -> Tensor | None:
            bias: Any = module.bias
            return output - bias if alone and bias is not None else None

        def left(module: nn.Module, args: tuple, kwargs: dict, _output: Tensor) -> None:
            nonlocal alone
            alone = True
            # what tokens that attend to themselves alone would get; not module(…), which would call this hook
            values = module.forward(*args, **kwargs)
            alone = False
            ratio = values.norm(dim=-1) / sizes[-1].clamp_min(torch.finfo(values.dtype).tiny)
            mixed[-1] = mixed[-1] * ratio[:, None]

        with ExitStack() as stack:
            for block in self.blocks:
                attn: Any = block.attn
                stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
                stack.callback(attn.proj.register_forward_hook(project).remove)
                stack.callback(attn.register_forward_hook(left, with_kwargs=True).remove)
            self.forward(images, watch)
        return mixed[self.start :]
