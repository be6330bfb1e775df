"""ViT-CX: masks made of a transformer's own feature maps, scored by what they do to the confidence."""

from __future__ import annotations

import math
import zlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..classifier import Classifier
from ..precision import confidence
from ..protection import protected
from .base import Metadata, register
from .cam import Captured, LayerAttributor
from .passes import Passes
from .transformer import ARCHITECTURES

# images whose D×D distances, float64, are held at once: 8 MB each for D = 1024
_CLUSTERED_AT_ONCE = 8


@register("vit_cx")
class ViTCX(LayerAttributor):
    """ViT-CX: Σ_k p_k·M_k / Σ_k M_k, the masks' causal scores p_k over their coverage, per pixel.

    The D channels of the patch tokens before the last block are enlarged bilinearly to the image, scaled to [0, 1] each
    and clustered (complete linkage, cosine distance below ``threshold``). The K clusters' means, scaled again, are the
    masks M_k. With n_k ~ ``noise``·N(0, 1) on normalised pixels and f the target's confidence

        p_k = f(x⊙M_k + n_k⊙(1−M_k)) − f(x + n_k⊙(1−M_k)) + f(x):

    what is hidden becomes noise, and what the noise alone does is taken off. Pixels that no mask covers get 0.

    Args:
        threshold: clusters at this cosine distance or above are kept apart, > 0.
        noise: its standard deviation on normalised pixels, ≥ 0.
        layer: see `LayerAttributor`.
        internal_batch_size: masked images in one pass, of whichever image.
        seed: of the noise; n_k depends on it and on k alone.
    """

    needs_gradients = False
    metadata = Metadata(
        paper="Xie et al., IJCAI 2023",
        cost="(2K + 1)F, K masks found per image",
        architectures=ARCHITECTURES,
        licence="paper",
        notes="the cosines of enlarged channels are computed on the grid, exactly; channels of one value are left "
        "out; every image sees the same noise",
        fidelity="rebuilt from the authors' definition (channels enlarged and scaled before clustering); equal to a "
        "computation by hand with SciPy's clustering, but for the noise, which is drawn anew",
    )

    accepts = ARCHITECTURES
    tokens_only = True

    def __init__(
        self,
        clf: Classifier,
        threshold: float = 0.1,
        noise: float = 0.1,
        layer: nn.Module | str | None = None,
        **options: Any,
    ):
        super().__init__(clf, layer, **options)
        if not 0 < threshold < math.inf:
            raise ValueError(f"threshold={threshold}: give a cosine distance above 0")
        if not 0 <= noise < math.inf:
            raise ValueError(f"noise={noise}: give a standard deviation ≥ 0")
        self.threshold, self.noise = threshold, noise

    def masks(self, maps: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Cluster (B, D, h, w) into masks (N, h, w), those of all images, and whose they are, (N,) sorted.

        A mask is on the grid; enlarged bilinearly to ``size``, it goes from 0 to 1. Enlarging commutes with scaling
        and with sums, so the grid is all that is needed.
        """
        values, kept = _rescale(maps, size)
        parts = zip(values.split(_CLUSTERED_AT_ONCE), kept.split(_CLUSTERED_AT_ONCE), strict=True)
        labels = torch.cat([self._cluster(*part, size) for part in parts])
        sums = torch.zeros_like(values).scatter_add_(1, labels[:, :, None, None].expand_as(values), values)
        # a sum is as good as a mean once scaled
        clusters = kept.new_zeros(kept.shape).scatter_(1, labels, True) & kept
        return _rescale(sums[clusters][:, None], size)[0][:, 0], clusters.nonzero()[:, 0]

    def _cluster(self, values: Tensor, kept: Tensor, size: tuple[int, int]) -> Tensor:
        values = values.double()
        # ⟨U a, U b⟩ = aᵀ(UᵀU)b for the enlargement U, one matrix for rows and one for columns
        down, right = (_enlargement(n, m).to(values) for n, m in zip(values.shape[2:], size, strict=True))
        weighted = (down.mT @ down) @ values @ (right.mT @ right)
        products = values.flatten(2) @ weighted.flatten(2).mT
        length = products.diagonal(dim1=1, dim2=2).sqrt().clamp_min(torch.finfo(products.dtype).tiny)
        distances = 1 - products / (length[:, :, None] * length[:, None, :])
        # a channel without a direction stays alone
        distances.masked_fill_(~(kept[:, :, None] & kept[:, None, :]), torch.inf)
        return complete_linkage(distances, self.threshold)

    def _found(self, captured: Captured) -> tuple[Tensor, Tensor]:
        images = captured.images
        size = (int(images.shape[-2]), int(images.shape[-1]))
        return self.masks(self.maps(captured.output.detach(), images).to(images.dtype), size)

    def passes(self, images: Tensor) -> Passes:
        """Sends the images through the classifier once, to find how many masks each has."""
        images = self.clf.check(images)
        with protected(*self.networks):
            parts = (self.capture(part.detach()) for part in images.split(self.internal_batch_size))
            masks = sum(len(self._found(part)[1]) for part in parts)
        return Passes(1 + 2 * masks / len(images))

    @torch.no_grad()
    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        captured = self.capture(images)
        whole = confidence(captured.logits, target)
        masks, owner = self._found(captured)
        if not len(owner):
            return images.new_zeros(len(images), 1, *images.shape[-2:])
        first = torch.searchsorted(owner, torch.arange(len(images), device=owner.device))
        number = torch.arange(len(owner), device=owner.device) - first[owner]
        pixels = self.clf.normalize(images)
        # masks of one number share their noise, which is then made once
        order = number.argsort(stable=True)
        scores = torch.zeros(len(owner), dtype=masks.dtype, device=images.device)
        for part in order.split(self.internal_batch_size):
            mask = F.interpolate(masks[part][:, None], images.shape[-2:], mode="bilinear", align_corners=False)
            mine = owner[part]
            noise = (1 - mask) * self._noise(number[part], pixels)
            seen, noisy = pixels[mine] * mask + noise, pixels[mine] + noise
            shown, disturbed = (
                confidence(self.clf.forward_normalized(variant), target[mine]) for variant in (seen, noisy)
            )
            scores[part] = (shown - disturbed + whole[mine]).to(scores)
        empty = masks.new_zeros(len(images), *masks.shape[1:])
        grids = (
            empty.index_add(0, owner, weight[:, None, None] * masks) for weight in (scores, torch.ones_like(scores))
        )
        total, coverage = (
            F.interpolate(grid[:, None], images.shape[-2:], mode="bilinear", align_corners=False) for grid in grids
        )
        return torch.where(coverage > 0, total / coverage.clamp_min(1e-6), 0)

    def _noise(self, number: Tensor, pixels: Tensor) -> Tensor:
        """n_k of the masks' numbers k (N,), ascending → (N, C, H, W)."""
        numbers, place = number.unique_consecutive(return_inverse=True)
        fields = [
            torch.randn(pixels.shape[1:], dtype=torch.float32, generator=_generator(self.seed, k))
            for k in numbers.tolist()
        ]
        return self.noise * torch.stack(fields).to(pixels)[place]


def complete_linkage(distances: Tensor, threshold: float) -> Tensor:
    """Agglomerative clustering with complete linkage, cut at a height; batched.

    Clusters are as far apart as their farthest members; the two nearest merge until none are nearer than
    ``threshold``. Complete linkage is reducible (a merger never brings a third cluster nearer to the merged ones), so
    all pairs of mutual nearest neighbours can merge at once without changing the result, and a handful of rounds
    replaces D steps. Ties go to the lower index.

    Args:
        distances: (B, D, D), symmetric up to rounding; the diagonal is ignored.
        threshold: clusters this far apart or farther stay apart.

    Returns:
        (B, D) int64, for each member the lowest index in its cluster.
    """
    own = torch.arange(distances.shape[-1], device=distances.device).expand(distances.shape[:2])
    between = torch.maximum(distances, distances.mT)  # symmetric to the last bit, or neighbours may not be mutual
    between.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    labels = clusters = own
    while between.shape[-1] > 1:
        place = torch.arange(between.shape[-1], device=between.device).expand(between.shape[:2])
        nearest, neighbour = between.min(dim=-1)
        near = nearest < threshold
        partner = torch.where(near & (neighbour.gather(1, neighbour) == place), neighbour, place)
        between = torch.maximum(between, _rows(between, partner))
        between = torch.maximum(between, _rows(between.mT, partner).mT)
        joined = torch.minimum(partner, place)
        labels = own.scatter(1, clusters, clusters.gather(1, joined)).gather(1, labels)
        # distances only grow: who has no neighbour now will never have one
        left = near & (joined == place)
        between.masked_fill_(~(left[:, :, None] & left[:, None, :]), torch.inf)
        order = left.logical_not().byte().argsort(dim=1, stable=True)[:, : int(left.sum(dim=1).max())]
        between = _rows(_rows(between, order).mT, order).mT
        clusters = clusters.gather(1, order)
    return labels


def _rows(matrices: Tensor, index: Tensor) -> Tensor:
    """Rows (B, n) of (B, N, M) → (B, n, M)."""
    return matrices.gather(1, index[:, :, None].expand(-1, -1, matrices.shape[-1]))


def _rescale(maps: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(B, C, h, w) that, enlarged to ``size``, go from 0 to 1, and which do (B, C); maps of one value become zeros."""
    low, high = maps.new_empty(2, *maps.shape[:2], 1, 1)
    for i, image in enumerate(maps):
        # one at a time: its enlarged channels are the largest thing here, 154 MB for 768 at 224 × 224
        enlarged = F.interpolate(image[None], size, mode="bilinear", align_corners=False)[0]
        low[i], high[i] = (ends[:, None, None] for ends in enlarged.flatten(1).aminmax(dim=1))
    # interpolation rounds, so a map of one value is known by its own range
    varies = (maps.amax(dim=(2, 3)) > maps.amin(dim=(2, 3))) & (high > low)[:, :, 0, 0]
    scaled = (maps - low) / (high - low).clamp_min(torch.finfo(maps.dtype).tiny)
    return torch.where(varies[:, :, None, None], scaled, 0), varies


def _enlargement(cells: int, pixels: int) -> Tensor:
    """Bilinear enlargement along one side, (pixels, cells) float64."""
    unit = torch.eye(cells, dtype=torch.float64)
    return F.interpolate(unit[None], pixels, mode="linear", align_corners=False)[0].mT


def _generator(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(b"%d %d" % (seed, number)))
