"""CAAP: attribution by activations of the image, patched into the run of a neutral image."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from .. import references
from ..checks import check_images
from ..classifier import Classifier
from .base import Metadata, register
from .passes import Passes
from .tokens import TokenAttributor
from .transformer import ARCHITECTURES


@register("caap")
class CAAP(TokenAttributor):
    """What the class gains when one patch of a neutral image keeps the activations that it has in the image.

    h_l(x)_i is the input of block l at patch i. In the run of the neutral image n, h_l(n)_i is replaced by h_l(x)_i
    for every block l = ``first`` … ``last``; the map is logit_t of that run minus logit_t(n). One run per patch i;
    prefix tokens are never replaced. Blocks before ``first`` run once, blocks after ``last`` run free.

    Args:
        first, last: the range of blocks, both included, counted from 0; of L blocks ⌊L/3⌋ … ⌊3L/4⌋ unless given.
        neutral: "blur", "mean" or "black", or images in [0, 1]: (C, H, W) or (1, C, H, W) for all images, or one
            for each, (B, C, H, W).
        internal_batch_size: images times patches in one pass.
    """

    needs_gradients = False
    metadata = Metadata(
        paper="CAAP, arXiv 2603.13652",
        cost="2F, per patch F of the blocks from the first patched one on",
        architectures=ARCHITECTURES,
        licence="paper only",
        notes="range of blocks, neutral image and score are our choices where the abstract is silent; bilinear",
        fidelity="our reading of the abstract, which is all that was at hand; equal to loops by hand",
    )

    def __init__(
        self,
        clf: Classifier,
        first: int | None = None,
        last: int | None = None,
        neutral: str | Tensor = "blur",
        **options: Any,
    ):
        super().__init__(clf, **options)
        depth = len(self.blocks)
        self.first = depth // 3 if first is None else first
        self.last = 3 * depth // 4 if last is None else last
        if not 0 <= self.first <= self.last < depth:
            raise ValueError(
                f"blocks first={self.first} to last={self.last}: give 0 ≤ first ≤ last < {depth}, the number of blocks"
            )
        if isinstance(neutral, str) and neutral not in references.REFERENCES:
            known = ", ".join(references.REFERENCES)
            raise ValueError(f"neutral={neutral!r} is not known: choose one of {known}, or give images in [0, 1]")
        if isinstance(neutral, Tensor):
            neutral = check_images(neutral[None] if neutral.ndim == 3 else neutral, len(clf.mean)).detach()
        self.neutral = neutral

    def attribute(self, images: Tensor, target: Tensor | Sequence[int] | int | None = None) -> Tensor:
        if isinstance(self.neutral, str):
            return super().attribute(images, target)
        images = self.clf.check(images)
        if self.neutral.shape[1:] != images.shape[1:] or len(self.neutral) not in (1, len(images)):
            raise ValueError(
                f"neutral images {tuple(self.neutral.shape)} for images {tuple(images.shape)}: "
                "give one for all or one for each, of the same size"
            )
        neutral = self.neutral.to(images).expand_as(images)
        classes = None if target is None else self.clf.resolve_target(images, target)
        maps = []
        for start in range(0, len(images), self.internal_batch_size):
            part = slice(start, start + self.internal_batch_size)
            # a copy, so that each part of the images has its part of the neutral ones
            method = copy.copy(self)
            method.neutral = neutral[part]
            maps.append(super(CAAP, method).attribute(images[part], None if classes is None else classes[part]))
        return torch.cat(maps)

    def passes(self, images: Tensor) -> Passes:
        rows, cols = self.grid(images)
        return Passes(2 + rows * cols)

    def patches(self, images: Tensor, target: Tensor) -> Tensor:
        """Gain in the target's logit for each patch, (B, patches). Trusts its input."""
        neutral = self.neutral
        if isinstance(neutral, str):
            neutral = references.make(neutral, images, self.clf.mean_colour)
        _, source, _ = self.record(images, self.first, self.last)
        logits, (context, *_), _ = self.record(neutral, self.first, self.last)
        rows, cols = self.grid(images)
        count = rows * cols
        runs = torch.arange(len(images) * count, device=images.device)
        gains = []
        for part in runs.split(self.internal_batch_size):
            image, token = part // count, part % count + self.prefix
            row = torch.arange(len(part), device=images.device)
            fed = context[image].index_put((row, token), source[0][image, token])
            with ExitStack() as stack:
                for block, tokens in enumerate(source[1:], start=self.first + 1):
                    hook = _patch(row, token, tokens[image, token])
                    stack.callback(self.blocks[block].register_forward_pre_hook(hook).remove)
                patched = self.resume(images, self.first, fed)
            gains.append((patched - logits[image]).gather(1, target[image][:, None])[:, 0])
        return torch.cat(gains).view(len(images), count)

    @torch.no_grad()
    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        return self.upsample(self.patches(images, target), images)


def _patch(row: Tensor, token: Tensor, values: Tensor) -> Any:
    """A forward pre-hook that puts ``values`` (n, D) at ``token`` (n,) of each ``row`` (n,)."""

    def hook(_module: nn.Module, args: tuple) -> tuple:
        # what arrives may be the residual stream of another computation: it is not written to
        return (args[0].index_put((row, token), values), *args[1:])

    return hook
