"""TIS: attribution by dropping half of the tokens inside a vision transformer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..classifier import Classifier
from ..precision import confidence
from .base import Metadata, register
from .passes import Passes
from .tokens import TokenAttributor

_ARCHITECTURES = "timm vision transformers without relative position bias (ViT, DeiT, EVA, DINOv3)"
# elements of the largest temporary of k-means, 64 MiB in float32
_CHUNK = 1 << 24


@register("tis")
class TIS(TokenAttributor):
    """Transformer input sampling: the mean confidence over token masks that show a patch, Σ_k s_k·m_k / Σ_k m_k.

    Each channel of each block's output is a map over the patches. k-means groups these maps; the K centroids, maps
    too, are made binary masks m_k by their ``keep``·P highest patches (rounded down, at least one). s_k is the softmax
    confidence when only the patches of m_k go through the blocks: the others are dropped after the position
    embedding, so no reference image is needed. Prefix tokens always stay.

    A patch that no mask shows gets 0.

    Args:
        n_masks: K, number of clusters; every channel is its own one where there are no more channels.
        keep: share of the patches that a mask shows, in (0, 1].
        internal_batch_size: images times masks in one pass.
    """

    needs_gradients = False
    metadata = Metadata(
        paper="Englebert et al., ICCV Workshops 2023",
        cost="1F, 1024F of half the tokens",
        architectures=_ARCHITECTURES,
        licence="paper only",
        notes="k-means starts from random channels; a centroid within rounding of a tie may change the mask; bilinear",
        fidelity="equal to the authors' code within the noise of its k-means, compared on photographs with a ViT-Tiny",
    )
    reads = "drops tokens"
    accepts = _ARCHITECTURES

    def __init__(self, clf: Classifier, n_masks: int = 1024, keep: float = 0.5, **options: Any):
        super().__init__(clf, **options)
        if n_masks < 1:
            raise ValueError(f"n_masks={n_masks}: give at least one mask")
        if not 0 < keep <= 1:
            raise ValueError(f"keep={keep}: give the share of patches to keep, above 0 and at most 1")
        names = ("rel_pos_bias", "relative_position_bias_table")
        if any(getattr(module, name, None) is not None for module in clf.module.modules() for name in names):
            self.refuse()
        self.n_masks, self.keep = n_masks, keep

    def passes(self, images: Tensor) -> Passes:
        return Passes(1 + min(self.n_masks, len(self.blocks) * self.structure.channels))

    def kept(self, outputs: list[Tensor]) -> Tensor:
        """(B, K, kept patches) indices of patches, ascending, from the blocks' outputs (B, T, D). Trusts its input."""
        maps = torch.cat([tokens[:, self.prefix :].mT for tokens in outputs], dim=1)  # [B, blocks·D, P]
        centroids = kmeans(maps.float(), self.n_masks, self.seed)
        # 0.29·100 is below 29 in floating point
        count = max(1, math.floor(self.keep * centroids.shape[-1] + 1e-6))
        # stable, unlike topk: a constant centroid keeps the same patches on every device
        order = centroids.argsort(dim=-1, descending=True, stable=True)
        return order[..., :count].sort(dim=-1).values

    @torch.no_grad()
    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        _, inputs, outputs = self.record(images, 0, len(self.blocks) - 1)
        tokens, kept = inputs[0], self.kept(outputs)
        del inputs, outputs
        batch, n_masks, _ = kept.shape
        runs = torch.arange(batch * n_masks, device=images.device)
        answers = []
        for part in runs.split(self.internal_batch_size):
            image = part // n_masks
            logits = self.run(images, tokens, image, kept[image, part % n_masks])
            answers.append(confidence(logits, target[image]))
        scores = torch.cat(answers).view(batch, n_masks)
        masks = scores.new_zeros(batch, n_masks, tokens.shape[1] - self.prefix).scatter_(2, kept, 1.0)
        shown = torch.einsum("bk,bkp->bp", scores, masks)
        return self.upsample(shown / masks.sum(dim=1).clamp_min(1), images)

    def run(self, images: Tensor, tokens: Tensor, image: Tensor, kept: Tensor) -> Tensor:
        """Logits (n, classes) of the prefix and the patches ``kept`` (n, k) of ``tokens[image]``, (B, T, D)[(n,)]."""
        prefix = torch.arange(self.prefix, device=kept.device).expand(len(kept), -1)
        index = torch.cat([prefix, kept + self.prefix], dim=1)
        with self._rotated(kept):
            return self.resume(images, 0, tokens[image[:, None], index])

    @contextmanager
    def _rotated(self, kept: Tensor) -> Iterator[None]:
        """Inside, blocks that get a rotary embedding get that of the patches ``kept`` (n, k) only."""

        def select(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            rope = kwargs.get("rope")
            if rope is None:
                return args, kwargs
            # one for all heads (P, d) or one for each (heads, P, d) → (n, 1 or heads, k, d)
            rope = rope if rope.ndim == 3 else rope[None]
            return args, {**kwargs, "rope": rope[:, kept].transpose(0, 1)}

        with ExitStack() as stack:
            for block in self.blocks:
                stack.callback(block.register_forward_pre_hook(select, with_kwargs=True).remove)
            yield


def kmeans(points: Tensor, clusters: int, seed: int = 0, max_iter: int = 100) -> Tensor:
    """Lloyd's algorithm for a batch of point sets: (B, N, D) → centroids (B, min(clusters, N), D).

    It starts from points drawn without replacement, the same indices in every set, and ends when no point changes
    its cluster or after ``max_iter`` steps. A cluster that loses all points keeps its centroid.
    """
    batch, count, _ = points.shape
    if clusters >= count:
        return points
    start = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:clusters]
    centroids = points[:, start.to(points.device)]
    chunk = max(1, _CHUNK // (batch * clusters))
    nearest: Tensor | None = None
    for _ in range(max_iter):
        half_norm = centroids.square().sum(dim=-1)[:, None] / 2  # [B, 1, clusters]
        sums, sizes = torch.zeros_like(centroids), points.new_zeros(batch, clusters)
        found = []
        for part in points.split(chunk, dim=1):
            # ½‖x − c‖² without ½‖x‖², which all clusters share
            found.append((half_norm - part @ centroids.mT).argmin(dim=-1))
            # a product, because scattered sums on CUDA depend on the order of arrival
            member = part.new_zeros(batch, part.shape[1], clusters).scatter_(2, found[-1][..., None], 1.0)
            sums += member.mT @ part
            sizes += member.sum(dim=1)
        now = torch.cat(found, dim=1)
        if nearest is not None and torch.equal(now, nearest):
            break
        nearest = now
        centroids = torch.where(sizes[..., None] > 0, sums / sizes.clamp_min(1)[..., None], centroids)
    return centroids
