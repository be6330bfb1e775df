"""The training objective: deletion and insertion AUC of soft masks, streamed (paper §3.1–3.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels
from .checks import (
    FLOATS,
    check_answers,
    check_choice,
    check_integer,
    check_number,
    check_target,
    checked,
    checked_fields,
)
from .classifier import Classifier, check_classifier
from .kernels.dispatch import NAMES as BACKENDS
from .kernels.messages import describe
from .precision import autocast, confidence, full_precision, stepwise_attention, uses_bf16
from .protection import protected
from .regions import Regions

SCORE_SCALES = ("standardized", "free")
DIAGNOSED = 2**20  # entries of an image's soft permutation that `Objective.diagnose` looks at


class Losses(NamedTuple):
    """What `Objective` returns, one value per image (B,); only ``loss`` carries a gradient.

    ``curves`` (B, 2, S) are the deletion and the insertion curve themselves; None without their ends.
    """

    loss: Tensor
    deletion: Tensor
    insertion: Tensor
    regularizer: Tensor
    curves: Tensor | None = None


@dataclass(frozen=True)
class Objective:
    """What an explainer is trained and refined for: faithful maps, by the deletion and insertion curves themselves.

    L = λ_del·delAUC − λ_ins·insAUC + λ_reg·R over S evenly spaced fractions, both ends included (paper eq. 6).

    Perturbed images are streamed: for every chunk perturb → classifier → backward to the masks at once, and only
    ∂L/∂mask is kept. Memory is set by ``chunk``, not by S. The end points are f(I) and f(I0), constants that are
    evaluated once and never back-propagated.

    Attributes:
        fractions: S ≥ 3.
        ends: whether the two ends of the curves count, as in the paper; else S interior fractions stand for the
            whole curve (midpoint rule).
        smooth: σ in pixels of the Gaussian over upsampled masks; 0 leaves them in steps.
        scores: "standardized" (each map to mean ½, standard deviation 0.29) or "free" (raw, as published).
        n_iters: Sinkhorn iterations.
        chunk: perturbed images in memory at a time; None keeps all of them and lets autograd do the rest.
        precision: of the classifier's passes, "auto" | "bf16" | "fp32".
    """

    classifier: Classifier
    fractions: int = 16
    weight_deletion: float = 1.0
    weight_insertion: float = 1.0
    weight_regularizer: float = 2.5e-3
    scores: str = "standardized"
    n_iters: int = 30
    chunk: int | None = 128
    precision: str = "fp32"
    backend: str = "auto"
    ends: bool = True
    smooth: float = 1.0

    @checked_fields
    def __post_init__(self) -> None:
        check_classifier(self.classifier)
        uses_bf16(self.precision, self.classifier.device, self.classifier.dtype)
        check_choice("backend", self.backend, BACKENDS)
        check_choice("scores", self.scores, SCORE_SCALES)
        check_integer("fractions", self.fractions, 3)  # the two ends have no gradient
        check_integer("n_iters", self.n_iters, 1)
        if self.chunk is not None:
            check_integer("chunk", self.chunk, 2)  # one deleted and one inserted image
        check_number("smooth", self.smooth, 0)

    def settings(self) -> dict[str, Any]:
        """What an explainer records of the objective it was trained with, in JSON types."""
        return {"objective": "ranking"}

    @property
    def passes(self) -> tuple[int, int]:
        """Forward and backward passes of the classifier for one image and one reference."""
        perturbed = 2 * (self.fractions - 2 if self.ends else self.fractions)
        return perturbed + 2 * self.ends, perturbed

    def regions(self, height: int, width: int) -> Regions | None:
        """The grid that the objective is defined on: None, any will do."""
        return None

    @checked
    def diagnose(self, maps: Tensor, regions: Regions, tau: float) -> dict[str, float]:
        """Beside the losses: τ, and the normalised row entropy of the soft permutation, 0 sorted, 1 uniform.

        The mean over all ranks, or over evenly spaced ones where the permutation has more than `DIAGNOSED` entries.
        """
        scores, count = self.region_scores(maps, regions), regions.count
        if not len(scores):
            raise ValueError(f"maps is {describe(maps)}: the batch is empty, give at least one map")
        ranks = min(count, max(1, DIAGNOSED // count))
        # the middle of equally many ranks each
        chosen = ((torch.arange(ranks, dtype=torch.float64) + 0.5) * count / ranks).long()
        ends = torch.stack([chosen, chosen + 1], dim=1).flatten() / count
        masks = kernels.soft_topk_masks(scores, ends, tau, self.n_iters, backend=self.backend)
        rows = masks.unflatten(1, (ranks, 2)).diff(dim=2)[:, :, 0].clamp(min=0)  # [B, ranks, K]
        rows = rows / rows.sum(dim=-1, keepdim=True)
        entropy = torch.special.entr(rows).sum(dim=-1).mean() / torch.log(torch.tensor(float(count)))
        return {"row_entropy": float(entropy), "tau": tau}

    @checked
    def region_scores(self, maps: Tensor, regions: Regions) -> Tensor:
        """The scores that are ranked: (B,1,H,W) → (B,K)."""
        regions.check(maps)
        return regions.pool(standardize(maps) if self.scores == "standardized" else maps)

    def __call__(
        self,
        images: Tensor,
        maps: Tensor,
        target: Tensor,
        references: Sequence[Tensor],
        regions: Regions,
        tau: float | Tensor,
        noise: float = 0.0,
        seed: int | Tensor | None = None,
        fractions: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> Losses:
        """Loss of attribution ``maps`` (B,1,H,W) for ``images`` (B,C,H,W) in [0,1].

        Args:
            target: (B,), or (B,M): the mean over M classes that share a map.
            references: reference images (B,C,H,W); their losses are averaged.
            regions: the grid on which the maps are ranked, as fine as one pixel per cell where there is no noise, whose
                ranking keeps K² numbers.
            tau, noise, seed: of the soft permutation, see `aha.kernels.soft_topk_masks`. Seeds (B,) int64 give every
                map noise of its own, whatever else is in the batch.
            fractions: (S,) ascending shares of [0,1] in place of the evenly spaced ones, as of `strata`. The areas are
                then Σ weight · f over these alone: no pass is spent on the two ends.
            weights: (S,), or (B,S) for weights of an image's own; default: 1/S each.

        Raises:
            ValueError: in one line, for arguments that do not fit, and where the classifier is not finite.
        """
        with protected(self.classifier, gradients=False):
            shares = self._shares(fractions, weights, len(images))
            return self._losses(images, maps, target, references, regions, tau, noise, seed, *shares)

    def _shares(self, fractions: Tensor | None, weights: Tensor | None, batch: int) -> tuple[Tensor, Tensor | None]:
        """The fractions (S,), and the weights (B,S) of what the caller chose."""
        if fractions is None:
            if weights is not None:
                raise ValueError("weights without fractions: give the fractions (S,) that they weigh too")
            if self.ends:
                return torch.linspace(0, 1, self.fractions, dtype=torch.float64)[1:-1], None
            return (torch.arange(self.fractions, dtype=torch.float64) + 0.5) / self.fractions, None
        shares = torch.as_tensor(fractions, dtype=torch.float64).detach().cpu()
        if (
            shares.ndim != 1
            or not len(shares)
            or not bool(((shares >= 0) & (shares <= 1)).all() and (shares.diff() >= 0).all())
        ):
            raise ValueError(f"fractions={shares.tolist()}: give (S,) ascending shares in [0, 1], S ≥ 1")
        count = len(shares)
        if weights is None:
            return shares, torch.full((batch, count), 1 / count)
        given = torch.as_tensor(weights).detach().float()
        if tuple(given.shape) not in ((count,), (batch, count)) or not bool(given.isfinite().all()):
            raise ValueError(f"weights is {tuple(given.shape)}: give ({count},) or ({batch}, {count}) finite numbers")
        return shares, given.expand(batch, count)

    def _losses(self, images, maps, target, references, regions, tau, noise, seed, fractions, weights) -> Losses:
        images, maps, target, references = check_game(self.classifier, images, maps, target, references)
        if not references:
            raise ValueError("references is empty: give at least one reference image (B,C,H,W) for all images")
        size = (len(regions.row_index), len(regions.col_index))
        if size != tuple(images.shape[-2:]):
            came = f"{images.shape[-2]}×{images.shape[-1]}"
            raise ValueError(
                f"regions are of {size[0]}×{size[1]} pixels, images of {came}: make them with aha.regions.grid"
            )
        maps = full_precision(maps)
        scores = self.region_scores(maps, regions)
        masks = self._masks(scores, fractions, tau, noise, seed)
        target = target if target.ndim == 2 else target[:, None]
        upsampler = regions.upsampler(self.smooth, device=images.device)
        weights = None if weights is None else weights.to(masks)
        curve, deletion, insertion, curves = self._curves(images, masks, target, references, upsampler, weights)
        penalty = sharpness(standardize(maps) if self.scores == "standardized" else maps)
        check_answers(torch.stack([deletion, insertion], dim=1), self.classifier.name)
        return Losses(curve + self.weight_regularizer * penalty, deletion, insertion, penalty.detach(), curves)

    def _masks(self, scores, fractions, tau, noise, seed) -> Tensor:
        """(B,S,K); one by one where every map has a seed of its own and the noise depends on it."""
        if not isinstance(seed, Tensor) or seed.ndim == 0:
            return kernels.soft_topk_masks(scores, fractions, tau, self.n_iters, noise, seed, backend=self.backend)
        seeds = check_seeds(seed, len(scores)).to(scores.device)
        if not noise:
            return kernels.soft_topk_masks(scores, fractions, tau, self.n_iters, backend=self.backend)
        each = [
            kernels.soft_topk_masks(part, fractions, tau, self.n_iters, noise, own, backend=self.backend)
            for part, own in zip(scores.split(1), seeds, strict=True)
        ]
        return torch.cat(each)

    def _curves(
        self, images, masks, target, references, upsampler, weights
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        if self.chunk is None:
            interior = self._unstreamed(images, masks, target, references, upsampler, weights)
        else:
            interior = _Streamed.apply(masks, self, images, target, references, upsampler, weights)
        loss, deletion, insertion, inner = interior
        if weights is not None:
            return loss, deletion, insertion, None
        step = 1 / (self.fractions - 1 if self.ends else self.fractions)
        ends, curves = masks.new_zeros(len(images)), None
        if self.ends:
            both, original, replaced = self._ends(images, target, references)
            ends = both * (step / 2)
            sides = torch.stack([original, replaced], dim=1)[..., None]  # deletion's start is insertion's end
            curves = torch.cat([sides, inner, sides.flip(1)], dim=2)
        ends_loss = (self.weight_deletion - self.weight_insertion) * ends
        return loss * step + ends_loss, deletion * step + ends, insertion * step + ends, curves

    @torch.no_grad()
    def _ends(self, images, target, references) -> tuple[Tensor, Tensor, Tensor]:
        """f(I) + f(I0) and the two by themselves, constants without a gradient."""
        with autocast(self.precision, images.device, self.classifier.dtype):
            ends = original = self._confidence(self.classifier.normalize(images), target)
            replaced = torch.zeros_like(original)
            for reference in references:
                blank = self._confidence(self.classifier.normalize(reference), target) / len(references)
                ends, replaced = ends + blank, replaced + blank
        return ends, original, replaced

    def _confidence(self, pixels: Tensor, target: Tensor) -> Tensor:
        logits = self.classifier.forward_normalized(pixels)
        return confidence(logits, target).mean(dim=1)

    def _pair(self, images, reference, masks, target, upsampler) -> Tensor:
        """Confidences (2, B, S) of deletion and insertion at the given fractions."""
        clf = self.classifier
        batch, steps = masks.shape[:2]
        deleted, inserted = kernels.perturb(
            images, reference, masks, upsampler, clf.mean, clf.std, clf.dtype, backend=self.backend
        )
        pixels = torch.cat([deleted.flatten(0, 1), inserted.flatten(0, 1)])
        repeated = target.repeat_interleave(steps, dim=0).repeat(2, 1)
        return self._confidence(pixels, repeated).view(2, batch, steps)

    def _unstreamed(
        self, images, masks, target, references, upsampler, weights
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        deletion = insertion = masks.new_zeros(len(images))
        curves = masks.new_zeros(len(images), 2, masks.shape[1])
        with autocast(self.precision, images.device, self.classifier.dtype):
            for reference in references:
                pair = self._pair(images, reference, masks, target, upsampler)
                curves += pair.detach().transpose(0, 1) / len(references)
                removed, shown = _areas(pair, weights)
                deletion = deletion + removed / len(references)
                insertion = insertion + shown / len(references)
        loss = self.weight_deletion * deletion - self.weight_insertion * insertion
        return loss, deletion.detach(), insertion.detach(), curves


def strata(count: int, shift: float = 0.5, power: float = 1.5) -> tuple[Tensor, Tensor]:
    """Where to look at the curves: one fraction out of each of ``count`` strata, and weights for their areas.

    The strata are narrow where curves are steep, at the first pixels: fractions are u^power for
    u = (i + shift)/count, weights d(u^power)/du/count, that is 1/density. Σ weight · f over a shift uniform in [0,1)
    is an unbiased estimate of the area under f, and so is its gradient.

    Args:
        count: S ≥ 1.
        shift: where in its stratum a fraction lies, in [0,1).
        power: ≥ 1; 1 spaces the fractions evenly.

    Returns:
        fractions (S,) ascending in [0,1), and weights (S,), both float64.
    """
    u = (torch.arange(count, dtype=torch.float64) + shift) / count
    return u**power, power * u ** (power - 1) / count


def check_game(
    clf: Classifier, images: Tensor, maps: Tensor, target: Tensor, references: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """What a training objective works on: images, maps, target and references in one precision, or ValueError."""
    images = clf.check(images)
    shape = (len(images), 1, *images.shape[-2:])
    if not isinstance(maps, Tensor) or tuple(maps.shape) != shape:
        got = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
        raise ValueError(f"maps is {got}: give {shape}, one value per pixel of the images")
    flat = torch.as_tensor(target)
    if flat.ndim not in (1, 2) or len(flat) != len(images):
        raise ValueError(f"target has shape {tuple(flat.shape)}: give ({len(images)},), or ({len(images)}, M) classes")
    target = check_target(flat.flatten(), flat.numel(), clf.num_classes, images.device).view(flat.shape)
    blanks: list[Tensor] = []
    for reference in references:
        if tuple(reference.shape) != tuple(images.shape):
            came, size = tuple(reference.shape), tuple(images.shape)
            raise ValueError(f"a reference is {came}: give that of the images, {size}")
        blanks.append(reference.to(images))
    return images, maps, target, blanks


def check_seeds(seeds: Tensor, maps: int) -> Tensor:
    """Return ``seeds`` if there is one (B,) int64 for every one of the ``maps``, else ValueError."""
    if tuple(seeds.shape) != (maps,) or seeds.dtype != torch.int64:
        raise ValueError(
            f"seed is {tuple(seeds.shape)} {seeds.dtype}: give an integer, or ({maps},) int64, one per map"
        )
    return seeds


def _areas(pair: Tensor, weights: Tensor | None) -> Tensor:
    """Confidences (2, B, S) of both curves → their sums (2, B), weighted (B, S) or not."""
    return (pair if weights is None else pair * weights).sum(dim=-1)


class _Streamed(torch.autograd.Function):
    """Interior of both curves; the gradient to the masks is made chunk by chunk in the forward pass."""

    @staticmethod
    def forward(ctx: Any, masks, objective: Objective, images, target, references, upsampler, weights):
        batch, steps, _ = masks.shape
        needs_grad = ctx.needs_input_grad[0]
        assert objective.chunk is not None
        images_at_once = min(batch, objective.chunk // 2)
        steps_at_once = min(steps, max(1, objective.chunk // (2 * images_at_once)))
        gradient = torch.zeros_like(masks) if needs_grad else None
        deletion, insertion = masks.new_zeros(batch), masks.new_zeros(batch)
        curves = masks.new_zeros(batch, 2, steps)
        share = 1 / len(references)
        computed = (objective.precision, images.device, objective.classifier.dtype)
        stepwise = images.device.type == "cpu" and uses_bf16(*computed)
        with (
            autocast(*computed),
            stepwise_attention(objective.classifier.module, stepwise and needs_grad),
        ):
            for reference in references:
                for first in range(0, batch, images_at_once):
                    rows = slice(first, first + images_at_once)
                    for start in range(0, steps, steps_at_once):
                        cols = slice(start, start + steps_at_once)
                        with torch.set_grad_enabled(needs_grad):
                            part = masks[rows, cols].detach().requires_grad_(needs_grad)
                            pair = objective._pair(images[rows], reference[rows], part, target[rows], upsampler)
                            removed, shown = _areas(pair, None if weights is None else weights[rows, cols])
                            loss = objective.weight_deletion * removed - objective.weight_insertion * shown
                            if gradient is not None:
                                (piece,) = torch.autograd.grad(share * loss.sum(), part)
                                gradient[rows, cols] += piece
                        deletion[rows] += share * removed.detach()
                        insertion[rows] += share * shown.detach()
                        curves[rows, :, cols] += share * pair.detach().transpose(0, 1)
        ctx.gradient = gradient
        loss = objective.weight_deletion * deletion - objective.weight_insertion * insertion
        ctx.mark_non_differentiable(deletion, insertion, curves)
        return loss, deletion, insertion, curves

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor):
        return ctx.gradient * grads[0][:, None, None], None, None, None, None, None, None


@checked
def standardize(maps: Tensor) -> Tensor:
    """Give maps one scale: (B,1,H,W) → each with mean ½ and standard deviation 0.29, as uniform ranks on [0, 1]."""
    if maps.ndim != 4 or maps.dtype not in FLOATS:
        raise ValueError(f"maps is {describe(maps)}: give floating point (B, 1, H, W)")
    maps = full_precision(maps)
    spread, mean = torch.var_mean(maps, dim=(1, 2, 3), keepdim=True, correction=0)
    # a constant map has no order: it stays at ½ with a finite gradient
    return 0.5 + 0.29 * (maps - mean) * torch.rsqrt(spread + 1e-12)


def sharpness(maps: Tensor) -> Tensor:
    """The regulariser, R (B,): mean of relu(A − box-mean(A))², reflect padding, 15 px at 224, scaled (paper §3.4)."""
    side = min(maps.shape[-2:])
    radius = max(1, round(15 * side / 224) // 2)
    padded = F.pad(maps, (radius,) * 4, mode="reflect")
    smooth = F.avg_pool2d(padded, 2 * radius + 1, stride=1)
    return F.relu(maps - smooth).square().mean(dim=(1, 2, 3))
