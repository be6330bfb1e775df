"""Attribution by a linear surrogate of the classifier: LIME and Kernel SHAP over patches.

A coalition z ∈ {0, 1}^M shows some of M patches; the others take a reference colour. v(z) is the softmax confidence in
the target. Every image sees the same coalitions, so that one batched solve gives the coefficients of all images.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import references
from ..classifier import Classifier
from ..precision import confidence
from ..structure import transformer
from .base import Attributor, Metadata, register
from .passes import Passes


class Surrogate(Attributor):
    """Base: coalitions, their values, a linear fit. A subclass draws (`coalitions`) and fits (`fit`).

    Args:
        n_samples: coalitions, that is passes, per image.
        cells: rows and columns of the grid, at most the image's pixels; None: the patches of a vision transformer,
            14×14 for other classifiers.
        reference: "mean", "black" or "blur": what a hidden patch becomes.
        internal_batch_size: images times coalitions in one pass.
    """

    needs_gradients = False

    fewest: int = 2

    def __init__(
        self,
        clf: Classifier,
        n_samples: int = 1000,
        cells: int | None = None,
        reference: str = "mean",
        **options: Any,
    ):
        super().__init__(clf, **options)
        if n_samples < self.fewest:
            raise ValueError(f"n_samples={n_samples}: give at least {self.fewest} coalitions")
        if cells is not None and cells < 1:
            raise ValueError(f"cells={cells}: give at least one per side")
        if reference not in references.REFERENCES:
            known = ", ".join(references.REFERENCES)
            raise ValueError(f"reference={reference!r} is not known: choose one of {known}")
        self.n_samples, self.cells, self.reference = n_samples, cells, reference

    @abstractmethod
    def coalitions(self, players: int) -> Tensor:
        """(n, players) bool on the CPU, a function of the seed."""

    @abstractmethod
    def fit(self, coalitions: Tensor, values: Tensor) -> Tensor:
        """(n, M) coalitions and (B, n) values, both float64 → (B, M) coefficients."""

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches of ``images``."""
        height, width = int(images.shape[-2]), int(images.shape[-1])
        found = transformer(self.clf.module) if self.cells is None else None
        if found:
            return found.grid(height, width)
        cells = self.cells or 14
        return min(cells, height), min(cells, width)

    def passes(self, images: Tensor) -> Passes:
        rows, cols = self.grid(images)
        return Passes(len(self.coalitions(rows * cols)))

    def patches(self, images: Tensor, target: Tensor) -> Tensor:
        """Coefficients of the patches, (B, rows·cols) float64. Trusts its input."""
        rows, cols = self.grid(images)
        coalitions = self.coalitions(rows * cols).to(images.device)
        values = self.values(images, target, coalitions)
        return self.fit(coalitions.double(), values.double())

    def values(self, images: Tensor, target: Tensor, coalitions: Tensor) -> Tensor:
        """Confidence (B, n) in the target where only the patches of a coalition (n, M) are shown."""
        batch, _, height, width = images.shape
        rows, cols = self.grid(images)
        row = torch.arange(height, device=images.device) * rows // height
        col = torch.arange(width, device=images.device) * cols // width
        patch = row[:, None] * cols + col  # [H, W]
        hidden = references.make(self.reference, images, self.clf.mean_colour)
        values = []
        for part in coalitions.split(max(1, self.internal_batch_size // batch)):
            shown = part[:, patch][None, :, None]  # [1, m, 1, H, W]
            masked = torch.where(shown, images[:, None], hidden[:, None]).flatten(0, 1)  # [B·m, C, H, W]
            classes = target.repeat_interleave(len(part))
            # checked images stay so when they are masked: no door in the loop
            values.append(confidence(self.clf(masked), classes).view(batch, -1))
        return torch.cat(values, dim=1)

    @torch.no_grad()
    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        maps = self.patches(images, target).float().view(len(images), 1, *self.grid(images))
        return F.interpolate(maps, images.shape[-2:], mode="bilinear", align_corners=False)


@register("lime")
class Lime(Surrogate):
    """LIME: argmin_β Σ_z π(z)·(v(z) − β₀ − zᵀβ)² + ‖β‖², π(z) = exp(−d(z)²/(2·0.25²)).

    d is the cosine distance of z to the whole image, 1 − √(|z|/M). The first coalition is the
    whole image, the others show each patch with probability ½. Ridge with α = 1 and a free intercept, all patches
    kept, as the authors' image explainer does.
    """

    metadata = Metadata(
        paper="Ribeiro et al., KDD 2016",
        cost="1000F",
        architectures="any",
        licence="BSD-2-Clause",
        notes="patches instead of superpixels, a common colour instead of each superpixel's; bilinear",
        fidelity="differs: patches instead of superpixels, a common colour; the fit is that of the authors' image "
        "explainer, equal to the normal equations by hand",
    )

    def coalitions(self, players: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.rand(self.n_samples, players, dtype=torch.float32, generator=generator) < 0.5
        drawn[0] = True
        return drawn

    def fit(self, coalitions: Tensor, values: Tensor) -> Tensor:
        distance = 1 - coalitions.mean(dim=1).sqrt()
        weights = torch.exp(-(distance**2) / (2 * 0.25**2))[:, None]
        # the best intercept makes both sides have weighted mean zero
        shown = coalitions - (weights * coalitions).sum(dim=0) / weights.sum()
        gain = values.T - (weights * values.T).sum(dim=0) / weights.sum()  # [n, B]
        gram = shown.T @ (weights * shown)
        gram.diagonal().add_(1.0)
        return torch.linalg.solve(gram, shown.T @ (weights * gain)).T


@register("kernel_shap")
class KernelShap(Surrogate):
    """Kernel SHAP: Shapley values φ by least squares, argmin_φ Σ_z (v(z) − v(∅) − zᵀφ)² with Σ φ = v(all) − v(∅).

    Coalitions of size s are drawn with probability ∝ 1/(s·(M − s)), so that the Shapley kernel is in the draw and all
    weigh the same; each comes with its complement. With 2^M ≤ ``n_samples`` all coalitions are taken, each with
    its kernel weight, and φ is exact. With fewer coalitions than patches φ is the solution nearest to equal shares.
    """

    metadata = Metadata(
        paper="Lundberg and Lee, NeurIPS 2017; paired draws: Covert and Lee, AISTATS 2021",
        cost="1000F",
        architectures="any",
        licence="paper only",
        notes="the constraint is met exactly, not by a large weight; bilinear",
        fidelity="the paper's definition: equal to Shapley values where all coalitions are taken; not compared with "
        "the authors' code",
    )
    # the two ends and one pair
    fewest = 4

    def coalitions(self, players: int) -> Tensor:
        ends = torch.tensor([[False], [True]]).expand(2, players)
        if 2**players <= self.n_samples:
            bits = torch.arange(1, 2**players - 1)[:, None] >> torch.arange(players)
            return torch.cat([ends, bits % 2 == 1])
        generator = torch.Generator().manual_seed(self.seed)
        sizes = torch.arange(1, players)
        pairs = (self.n_samples - 1) // 2
        drawn = torch.multinomial(1 / (sizes * (players - sizes)).float(), pairs, replacement=True, generator=generator)
        order = torch.rand(pairs, players, dtype=torch.float32, generator=generator).argsort(dim=1).argsort(dim=1)
        half = order < sizes[drawn][:, None]
        return torch.cat([ends, torch.stack([half, ~half], dim=1).flatten(0, 1)])[: self.n_samples]

    def fit(self, coalitions: Tensor, values: Tensor) -> Tensor:
        players = coalitions.shape[1]
        nothing, everything = values[:, :1], values[:, 1:2]
        share = (everything - nothing) / players  # [B, 1]
        between = coalitions[2:]
        size = between.sum(dim=1)
        weights = torch.ones_like(size)
        if len(coalitions) == 2**players:
            kernel = [0.0] + [1 / (s * (players - s) * math.comb(players, s)) for s in range(1, players)]
            weights = size.new_tensor(kernel)[size.long()]
        # φ = equal shares + a part that sums to zero: that part is fitted by coalitions centred over the patches
        centred = between - size[:, None] / players
        rest = values[:, 2:] - nothing - share * size
        gram = centred.T @ (weights[:, None] * centred)
        moments = (rest * weights) @ centred  # [B, M]
        # eigenvalues that are zero but for rounding, that of equal shares among them, must not be inverted: the default
        # tolerance is within the rounding of some processors' linear algebra
        return share + moments @ torch.linalg.pinv(gram, rtol=math.sqrt(torch.finfo(gram.dtype).eps), hermitian=True)
