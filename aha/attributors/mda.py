"""MDA: patches ordered by searching for the best insertion and deletion curves, magnitudes fitted to the curves.

Needs no training and looks at nothing but confidences, so it works on any classifier; it takes thousands of forward
passes. P is the number of patches, W the window of candidates of a step, p the softmax probability of the target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_maps
from ..classifier import Classifier
from ..memory import per_pass
from ..precision import autocast, uses_bf16
from ..protection import locked, protected
from ..references import adaptive_blur
from ..regions import Regions, grid
from ..structure import transformer
from .base import _REGISTRY, Attributor, Metadata, create, register
from .passes import Passes, count_passes

# tried in turn: the first that is there and accepts the classifier
PRIORS = ("bi_attention", "gradcam", "input_x_gradient")
WINDOW = 28
# the protocol's kernels of the insertion reference
BLUR_START, BLUR_LARGEST, BLUR_STEP = 31, 101, 2
BLURS = len(range(BLUR_START, BLUR_LARGEST + 1, BLUR_STEP))
# candidates whose log odds differ by less are tied: rounding depends on what else is in the pass
TIE = 2e-6
# step of the value that keeps the order where the curve is flat, per P ranks
FLAT = 1e-6


class Scene(NamedTuple):
    """What the search and the curves of a batch share; pixels are normalised.

    Attributes:
        pixels, blurred: (B, C, H, W) the images and the references of insertion; that of deletion is zero.
        target: (B,) int64.
        regions: the patches.
        cell: (H, W) int64, the patch of every pixel.
        original, from_blur, from_zero: (B,) p of the three.
    """

    pixels: Tensor
    blurred: Tensor
    target: Tensor
    regions: Regions
    cell: Tensor
    original: Tensor
    from_blur: Tensor
    from_zero: Tensor


class Search(NamedTuple):
    """What `MDA.search` did, step by step: first insertion, most important patch first, then deletion, least
    important first.

    Attributes:
        patches: (B, steps) int64, the patch shown in every step.
        inserted: (B,) int64 K, steps that belong to insertion.
    """

    patches: Tensor
    inserted: Tensor

    def order(self) -> Tensor:
        """(B, P) patches of a complete search, most important first."""
        position = torch.arange(self.patches.shape[1], device=self.patches.device)
        # deletion's part backwards
        mirrored = self.inserted[:, None] + self.patches.shape[1] - 1 - position
        return self.patches.gather(1, torch.where(position < self.inserted[:, None], position, mirrored))


@register("mda")
class MDA(Attributor):
    """Metric-driven attribution: greedy order of the patches, magnitudes from their insertion and deletion curves.

    1. A prior map, averaged per patch, ranks the patches.
    2. Insertion starts from the blurred image and shows, step by step, that one of the W best patches left which
       gives the highest p, until p − p_blur ≥ τ·|p_image − p_blur|. These patches come first.
    3. Deletion starts from zero in normalised space, the mean colour, and shows, step by step, that one of the W worst
       patches left which gives the lowest p; insertion's patches are locked. Backwards, this is the rest of the order.
    4. The ranks, enlarged bilinearly, are a map whose curves are measured as the protocol does: one row of pixels per
       step, H + 1 points (225 at 224 px); `response` scales them and makes them monotone.
    5. c = (insertion + 1 − deletion)/2, read off by linear interpolation at the pixels of 0…P patches; x is the nearest
       concave non-decreasing curve with c's ends (`concave_increments`). Rank i = 1…P gets
       Δx_i·(1/m + (P − i)/P), m the pixels of a patch.
    6. Dense variant: (P − i)/P where that value is ≥ κ, the value itself below, all scaled to the sparse maximum. The
       patches' values (1 − γ)·sparse + γ·dense are enlarged bilinearly.

    Insertion's and deletion's steps always sum to P, so all images of a batch take each step together, whatever
    part they are in. Forward passes per image, exactly: P·W − W·(W − 1)/2 + 2·H + b and those of the prior, and 1
    more if the target is to be found; 1 ≤ b ≤ 36 is the number of blurs tried.

    The blur is `references.adaptive_blur` at p ≤ 1 %; where its largest kernel, 101, is not enough, insertion
    starts from that. Candidates tie if their log odds differ by less than 2e-6; then the prior decides.

    Args:
        prior: name of a registered method, an `Attributor`, a function of images (B, C, H, W) and target (B,), or
            maps (B, 1, H, W) of the images that `attribute` will be given. None is the first of bi_attention,
            gradcam and input_x_gradient that accepts the classifier.
        window: W ≥ 1; None is min(2√P, 28). More than P is P.
        gamma: γ in [0, 1], from sparse to dense maps. The order of the patches is the same.
        kappa: κ ≥ 0.
        tau: τ in (0, 1].
        max_passes: forward passes per image, those of the prior and of finding the target included; W shrinks until
            the largest possible number fits.
        cells: rows, or (rows, columns) of a grid; None is the patches of a timm vision transformer, and 14 along the
            shorter side for others.
        precision: "fp32", "bf16" or "auto", of the classifier's passes, not the prior's.
        internal_batch_size: perturbed images in one pass; default: `aha.memory.per_pass`.
    """

    needs_gradients = False
    metadata = Metadata(
        paper="Walker et al., ICLR 2025",
        cost="P·W − W·(W − 1)/2 + 2·H + b F and the prior's; 5,558 + b at 14×14 of 224 px, b ≤ 36",
        architectures="any",
        licence="own implementation from the paper's description",
        notes="the prior is averaged per patch; magnitudes from the curves of the enlarged ranks; where no blur hides "
        "the class, from the largest blur; near ties go to the prior; a flat curve is ordered by steps of 1e-6/P",
        fidelity="the order is that of the authors' code, given the same blur, reference and prior; magnitudes by the "
        "paper's formulas, equal to a computation by hand",
    )

    def __init__(
        self,
        clf: Classifier,
        prior: str | Tensor | Callable[[Tensor, Tensor], Tensor] | None = None,
        window: int | None = None,
        gamma: float = 0.0,
        kappa: float = 0.005,
        tau: float = 0.9,
        max_passes: int | None = None,
        cells: int | tuple[int, int] | None = None,
        precision: str = "fp32",
        internal_batch_size: int | None = None,
        seed: int = 0,
    ):
        super().__init__(clf, per_pass(clf.device, internal_batch_size), seed)
        if window is not None and window < 1:
            raise ValueError(f"window={window}: give at least one candidate per step")
        if not 0 <= gamma <= 1:
            raise ValueError(f"gamma={gamma}: give a share of the dense map in [0, 1]")
        if not 0 <= kappa < math.inf:
            raise ValueError(f"kappa={kappa}: give a threshold ≥ 0")
        if not 0 < tau <= 1:
            raise ValueError(f"tau={tau}: give the share of the confidence that ends insertion, in (0, 1]")
        uses_bf16(precision, clf.device, clf.dtype)  # refuses unknown names
        self.window, self.gamma, self.kappa, self.tau = window, gamma, kappa, tau
        self.max_passes, self.cells, self.precision = max_passes, cells, precision
        self.prior = self._made(prior)
        self._done = 0

    def _made(self, prior: Any) -> Tensor | Callable[[Tensor, Tensor], Tensor]:
        options = {"internal_batch_size": self.internal_batch_size, "seed": self.seed}
        if isinstance(prior, str):
            return create(prior, self.clf, **options)
        if prior is None:
            for name in PRIORS[:-1]:
                if name in _REGISTRY:
                    try:
                        return create(name, self.clf, **options)
                    except ValueError:  # of another architecture
                        continue
            return create(PRIORS[-1], self.clf, **options)
        if not isinstance(prior, Tensor) and not callable(prior):
            raise ValueError(
                f"prior is a {type(prior).__name__}: give a method's name, an attributor, a function of images and "
                "target, or maps (B, 1, H, W)"
            )
        return prior

    def attribute(self, images: Tensor, target: Tensor | Sequence[int] | int | None = None) -> Tensor:
        images = self.clf.check(images)
        if isinstance(self.prior, Tensor):
            check_maps(self.prior, images)
        with locked(*self.networks):  # what is noted of the call belongs to one thread
            self._done = 0
            return super().attribute(images, target)

    attribute.__doc__ = Attributor.attribute.__doc__

    def passes(self, images: Tensor) -> Passes:
        """As of every method; the blurs of all ``images`` are tried, and a prior that is a function is run on one."""
        images = self.clf.check(images)
        with protected(*self.networks):
            target = self.clf.resolve_target(images, None, self.internal_batch_size)
            if isinstance(self.prior, Attributor):
                prior = self.prior.passes(images)
            else:
                with count_passes(self.clf) as prior:
                    self._prior_maps(images[:1], target[:1], 0)
            parts = zip(*(value.split(self.internal_batch_size) for value in (images, target)), strict=True)
            blurs = torch.cat([self._blurred(*part)[2] for part in parts])
        patches = self.regions(images).count
        window = self.window_for(patches, images.shape[-2], math.ceil(prior.forward))
        return prior + Passes(fixed_passes(patches, window, images.shape[-2]) + blurs.double().mean().item())

    def _prior_maps(self, images: Tensor, target: Tensor, start: int) -> Tensor:
        if isinstance(self.prior, Tensor):
            return self.prior[start:][: len(images)]
        return self.prior(images, target)

    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        with count_passes(self.clf) as counted:
            maps = self._prior_maps(images, target, self._done)
        self._done += len(images)
        with torch.no_grad():
            regions = self.regions(images)
            prior = regions.pool(check_maps(maps, images)[:, None].to(images.device))
            asked = math.ceil(counted.forward / len(images))
            window = self.window_for(regions.count, images.shape[-2], asked)
            scene = self.scene(images, target, regions)
            order = self.search(scene, prior, window).order()
            insertion, deletion = self.curves(scene, order)
            rising = response(insertion, scene.from_blur, scene.original, rising=True)
            falling = response(deletion, scene.from_zero, scene.original, rising=False)
            curves = at_patches((rising + 1 - falling) / 2, scene, order)
            values = self.magnitudes(curves, scene.cell.numel() / regions.count).to(images.device)
            return _enlarged(torch.empty_like(values).scatter_(1, order, values), regions, images)

    def regions(self, images: Tensor) -> Regions:
        """The patches of ``images``."""
        height, width = images.shape[-2:]
        found = transformer(self.clf.module) if self.cells is None else None
        if found:
            # by the size of a patch: the last one may be cut off by the border
            down, right = found.patch
            regions = Regions(torch.arange(height) // down, torch.arange(width) // right, *found.grid(height, width))
        else:
            regions = grid(height, width, self.cells or min(14, height, width))
        if regions.count < 2:
            raise ValueError(f"mda orders patches, and images {height}×{width} have one: give cells=2 or more")
        return regions

    def window_for(self, patches: int, height: int, asked: int) -> int:
        """W for P ``patches`` of images H ``height`` where the prior took ``asked`` passes."""
        window = min(self.window or min(math.isqrt(4 * patches), WINDOW), patches)
        if self.max_passes is None:
            return window
        left = self.max_passes - asked - 1 - BLURS
        fewest = fixed_passes(patches, 1, height)
        if left < fewest:
            raise ValueError(
                f"max_passes={self.max_passes} is too few: {patches} patches take {fewest} with a window of 1, the "
                f"blur up to {BLURS}, the prior {asked}, the target 1: give {fewest + BLURS + asked + 1} or fewer cells"
            )
        return max(w for w in range(1, window + 1) if fixed_passes(patches, w, height) <= left)

    @torch.no_grad()
    def scene(self, images: Tensor, target: Tensor, regions: Regions) -> Scene:
        """The reference of insertion and what the classifier says about both; 2 + b passes."""
        pixels = self.clf.normalize(images)
        blurred, from_blur, _ = self._blurred(images, target)
        original = self._scores(pixels.__getitem__, target).sigmoid()
        from_zero = self._scores(lambda part: torch.zeros_like(pixels[part]), target).sigmoid()
        cell = regions.cell_index().to(images.device)
        return Scene(pixels, blurred, target, regions, cell, original, from_blur, from_zero)

    @torch.no_grad()
    def _blurred(self, images: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised pixels of the blurs, their p (B,) and how many were tried, (B,) int64."""
        tried = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        found = images.new_zeros(len(images), dtype=torch.float32)

        def confidence(blurred: Tensor, index: Tensor) -> Tensor:
            found[index] = self._scores(lambda part: self.clf.normalize(blurred[part]), target[index]).sigmoid()
            tried[index] += 1
            return found[index]

        blurred, _ = adaptive_blur(images, confidence, self.clf.mean, 0.01, BLUR_START, BLUR_LARGEST, BLUR_STEP)
        return self.clf.normalize(blurred), found, tried

    @torch.no_grad()
    def search(self, scene: Scene, prior: Tensor, window: int, steps: int | None = None) -> Search:
        """The greedy order by ``prior`` (B, P); ``steps`` stops it early.

        Every step scores min(W, patches left) candidates of each image and changes one patch of it.
        """
        batch, patches = prior.shape
        waiting = prior.argsort(dim=1, descending=True, stable=True)  # [B, patches left]
        shown = scene.blurred
        inserting = torch.ones(batch, dtype=torch.bool, device=prior.device)
        enough = self.tau * (scene.original - scene.from_blur).abs()
        chosen = []
        inserted = torch.zeros(batch, dtype=torch.int64, device=prior.device)
        for step in range(patches if steps is None else min(steps, patches)):
            pool = waiting[:, :window]
            scores = self._candidates(scene, shown, pool)
            gain = torch.where(inserting[:, None], scores, -scores)
            slot = _first(gain >= gain.amax(dim=1, keepdim=True) - TIE)
            patch = pool.gather(1, slot)
            chosen.append(patch[:, 0])
            shown = torch.where((scene.cell == patch[:, :, None])[:, None], scene.pixels, shown)
            position = torch.arange(waiting.shape[1] - 1, device=prior.device)
            waiting = waiting.gather(1, position + (position >= slot))

            inserted += inserting
            # the last patch needs no insertion: its place is known
            confidence = scores.gather(1, slot)[:, 0].sigmoid()
            reached = (confidence - scene.from_blur >= enough) | (step == patches - 2)
            switching = inserting & reached
            inserting = inserting & ~reached
            shown = shown.masked_fill(switching[:, None, None, None], 0)
            waiting = torch.where(switching[:, None], waiting.flip(1), waiting)
        return Search(torch.stack(chosen, dim=1), inserted)

    @torch.no_grad()
    def curves(self, scene: Scene, order: Tensor) -> tuple[Tensor, Tensor]:
        """p (B, H + 1) while the map of ``order`` (B, P) is inserted into the blur, and while it is deleted, one row of
        pixels per step.

        2·(H − 1) passes: the ends are known.
        """
        batch, (height, width) = len(order), scene.pixels.shape[-2:]
        falling = torch.arange(scene.regions.count, 0, -1, device=order.device, dtype=torch.float32)
        ranks = torch.empty_like(order, dtype=torch.float32).scatter_(1, order, falling.expand(order.shape))
        pixels = _enlarged(ranks, scene.regions, scene.pixels).flatten(1).argsort(dim=1, descending=True, stable=True)
        place = torch.arange(height * width, device=order.device).expand_as(pixels)
        place = torch.empty_like(pixels).scatter_(1, pixels, place).view(batch, height, width)
        steps = torch.arange(1, height, device=order.device)
        rows = torch.arange(batch, device=order.device).repeat_interleave(2 * len(steps))
        count = (width * steps).repeat(2 * batch)
        deleting = torch.tensor([False, True], device=order.device).repeat_interleave(len(steps)).repeat(batch)

        def compose(part: Tensor) -> Tensor:
            row, removed = rows[part], deleting[part][:, None, None]
            top = place[row] < count[part][:, None, None]
            reference = scene.blurred[row].masked_fill(removed[:, None], 0)
            return torch.where((top ^ removed)[:, None], scene.pixels[row], reference)

        insertion, deletion = self._scores(compose, scene.target[rows]).sigmoid().view(batch, 2, -1).unbind(1)
        ends = [value[:, None] for value in (scene.from_blur, scene.original, scene.from_zero)]
        return torch.cat([ends[0], insertion, ends[1]], dim=1), torch.cat([ends[1], deletion, ends[2]], dim=1)

    def magnitudes(self, curves: Tensor, pixels: float) -> Tensor:
        """c (B, P + 1) → value (B, P) float32 of every rank, most important first; ``pixels`` of a patch."""
        increments = concave_increments(curves)
        patches = increments.shape[1]
        later = 1 - torch.arange(1, patches + 1, dtype=increments.dtype, device=increments.device) / patches
        sparse = increments * (1 / pixels + later) + FLAT * later
        dense = torch.where(sparse >= self.kappa, later, sparse)
        dense = dense * (sparse.amax(dim=1, keepdim=True) / dense.amax(dim=1, keepdim=True))
        return ((1 - self.gamma) * sparse + self.gamma * dense).float()

    def _candidates(self, scene: Scene, shown: Tensor, pool: Tensor) -> Tensor:
        """Log odds (B, w) of ``shown`` (B, C, H, W) with one patch of ``pool`` (B, w) more."""
        patch = pool.flatten()
        rows = torch.arange(len(pool), device=pool.device).repeat_interleave(pool.shape[1])

        def compose(part: Tensor) -> Tensor:
            added = scene.cell == patch[part][:, None, None]
            return torch.where(added[:, None], scene.pixels[rows[part]], shown[rows[part]])

        return self._scores(compose, scene.target[rows]).view_as(pool)

    def _scores(self, compose: Callable[[Tensor], Tensor], target: Tensor) -> Tensor:
        """Log odds of the ``target`` (n,) in n images, made by ``compose`` (indices → normalised pixels) as needed.

        p is their sigmoid; near 1, where log p would tell nothing apart, they still do.
        """
        found = []
        for part in torch.arange(len(target), device=target.device).split(self.internal_batch_size):
            with autocast(self.precision, target.device, self.clf.dtype):
                logits = self.clf.forward_normalized(compose(part))
            own = logits.float().gather(1, target[part, None])
            found.append(own[:, 0] - logits.float().scatter(1, target[part, None], -torch.inf).logsumexp(dim=-1))
        return torch.cat(found)


def fixed_passes(patches: int, window: int, height: int) -> int:
    """Forward passes of the search, the curves, the image and zero, without blur and prior."""
    return patches * window - window * (window - 1) // 2 + 2 * height


def response(curve: Tensor, reference: Tensor, original: Tensor, rising: bool) -> Tensor:
    """MR (B, S) in [0, 1] of p ``curve`` (B, S): (p − p_ref)/|p_image − p_ref| clipped, and never turning back.

    ``reference`` and ``original`` (B,) are p_ref and p_image; float64. Unscaled where they are equal.
    """
    low, span = reference.double()[:, None], (original.double() - reference)[:, None].abs()
    scaled = ((curve - low) / torch.where(span > 0, span, 1)).clamp(0, 1)
    return (scaled.cummax(dim=1) if rising else scaled.cummin(dim=1)).values


def at_patches(curves: Tensor, scene: Scene, order: Tensor) -> Tensor:
    """``curves`` (B, S) over even shares of the pixels → (B, P + 1) at those of the first 0…P patches of ``order``."""
    size = torch.bincount(scene.cell.flatten(), minlength=order.shape[1])
    share = F.pad(size[order].cumsum(dim=1), (1, 0)).double() / scene.cell.numel()
    position = share * (curves.shape[1] - 1)
    before = position.floor().long().clamp_max(curves.shape[1] - 2)
    return torch.lerp(curves.gather(1, before), curves.gather(1, before + 1), position - before)


def _enlarged(patches: Tensor, regions: Regions, images: Tensor) -> Tensor:
    """(B, P) → (B, 1, H, W), bilinearly."""
    grid = patches.view(len(patches), 1, regions.rows, regions.cols)
    return F.interpolate(grid, images.shape[-2:], mode="bilinear", align_corners=False)


def _first(true: Tensor) -> Tensor:
    """(B, n) bool → (B, 1) the first that holds; argmax promises no order among equals."""
    position = torch.arange(true.shape[1], device=true.device)
    return torch.where(true, position, true.shape[1] - 1).amin(dim=1, keepdim=True)


def concave_increments(curves: Tensor) -> Tensor:
    """Increments of the nearest concave, non-decreasing curve with the same ends.

    min Σ_i (x_i − c_i)² over x_0 = c_0, x_N = c_N, Δx_1 ≥ … ≥ Δx_N ≥ 0, exactly. All such x are
    c_0 + Σ_k w_k·h_k with ramps h_k(i) = min(i/k, 1), w ≥ 0 and Σ_k w_k = c_N − c_0: least squares on a simplex,
    solved by an active set method for all curves at once. A ramp with weight is a bend of the curve, and between
    bends the curve is straight, so a solve is a tridiagonal system in its values at the bends.

    Args:
        curves: c (B, N + 1), N ≥ 1.

    Returns:
        Δx (B, N) float64 on the CPU. Where c_N ≤ c_0, nothing with these ends rises: zeros.
    """
    goal = (curves[:, 1:] - curves[:, :1]).double().cpu()  # [B, N]
    rise = goal[:, -1].clamp_min(0)
    count = goal.shape[1]
    length = torch.arange(1, count + 1, dtype=torch.float64)
    weights = torch.zeros_like(goal)
    weights[:, -1] = rise
    active = weights > 0
    entered = torch.zeros_like(active)
    # below it, a gradient is rounding
    tolerance = 1e-13 * count * goal.abs().amax(dim=1, keepdim=True)
    todo = rise.nonzero()[:, 0]
    # every step lowers the sum of squares; the bound is for curves that rounding would send in a circle
    for _ in range(10 * count):
        if not len(todo):
            break
        w, on = weights[todo], active[todo]
        best, fitted = _best_weights(goal[todo], rise[todo, None], on)
        # as far towards the best as weights stay positive; the ramps that stop it are dropped
        stopping = on & (best <= 0)
        stopped = stopping.any(dim=1, keepdim=True)
        share = torch.where(stopping, w / (w - best).clamp_min(torch.finfo(w.dtype).tiny), 1)
        step = share.amin(dim=1, keepdim=True)
        on = on & ~(stopping & (share <= step))
        w = torch.where(on, torch.lerp(w, best, step), 0)

        # at the best, one ramp enters in every straight piece that a bend would improve
        slack = _gradient(fitted - goal[todo], length)
        slack = slack - torch.where(on, slack, 0).sum(dim=1, keepdim=True) / on.sum(dim=1, keepdim=True)
        piece = on.cumsum(dim=1)
        steepest = torch.zeros_like(slack).scatter_reduce_(1, piece.clamp_max(count - 1), slack, "amin")
        entering = ~on & ~stopped & (slack == steepest.gather(1, piece.clamp_max(count - 1)))
        entering &= slack < -tolerance[todo]
        # one of those that have entered always stays, except by rounding
        refused = stopped[:, 0] & (step[:, 0] == 0) & ~(on & entered[todo]).any(dim=1)
        finished = refused | ~(stopped[:, 0] | entering.any(dim=1))

        weights[todo], active[todo] = w, on | entering
        entered[todo] = torch.where(stopped, entered[todo], entering)
        todo = todo[~finished]
    return (weights / length).flip(1).cumsum(dim=1).flip(1)


def _gradient(residual: Tensor, length: Tensor) -> Tensor:
    """∂/∂w_k of ½ Σ_{i < N} r_i² = Σ_{i < N} h_k(i)·r_i for r = x − c (B, N); the end is fixed."""
    residual = torch.cat([residual[:, :-1], torch.zeros_like(residual[:, :1])], dim=1)
    total = residual.cumsum(dim=1)
    return (residual * length).cumsum(dim=1) / length + total[:, -1:] - total


def _best_weights(goal: Tensor, rise: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (B, N), of any sign, of the curve with bends at the ``active`` places (B, N) that is nearest to
    ``goal`` (B, N), and that curve (B, N).

    It is linear between 0, the bends and, from the last of them on, ``rise`` (B, 1).
    """
    count = goal.shape[1]
    bends = active.sum(dim=1, keepdim=True)
    most = int(bends.max())
    index = (~active).to(torch.int8).argsort(dim=1, stable=True)[:, :most]  # [B, most], ascending
    there = active.gather(1, index)
    place = F.pad(index + 1.0, (1, 0)).to(goal)  # [B, most + 1], 0 first

    # every point lies between two bends, or after the last
    piece = active.cumsum(dim=1) - active.long()
    flat = piece >= bends
    piece = piece.clamp_max(most - 1)
    left, right = place.gather(1, piece), place.gather(1, piece + 1)
    share = torch.where(flat, 0, (torch.arange(1, count + 1).to(goal) - left) / torch.where(flat, 1, right - left))
    seen = torch.where(flat, 0, goal)
    moment = torch.zeros_like(place).scatter_add_(1, piece, seen * (1 - share))
    moment = moment.scatter_add_(1, piece + 1, seen * share)[:, 1:]

    # sums of products of neighbouring hat functions over whole numbers, by the length of the pieces
    before = torch.where(there, place.diff(dim=1), 1)
    after = F.pad(before[:, 1:], (0, 1), value=1.0)
    inner = there & F.pad(there[:, 1:], (0, 1))
    own = (before + 1) * (2 * before + 1) / (6 * before) + (after - 1) * (2 * after - 1) / (6 * after)
    values = _tridiagonal(
        torch.where(inner, (before**2 - 1) / (6 * before), 0),
        torch.where(inner, own, 1),
        torch.where(inner, (after**2 - 1) / (6 * after), 0),
        torch.where(inner, moment, rise * there),
    )
    values = F.pad(values, (1, 0))
    low, high = values.gather(1, piece), values.gather(1, piece + 1)
    curve = torch.where(flat, rise, torch.lerp(low, high, share))
    slope = torch.where(there, values.diff(dim=1) / before, 0)
    change = slope - F.pad(slope[:, 1:], (0, 1))
    return torch.zeros_like(goal).scatter_(1, index, torch.where(there, change * place[:, 1:], 0)), curve


def _tridiagonal(lower: Tensor, diagonal: Tensor, upper: Tensor, right: Tensor) -> Tensor:
    """Solutions (B, n) of diagonally dominant systems l_i·x_{i−1} + d_i·x_i + u_i·x_{i+1} = r_i.

    Parallel cyclic reduction: log₂ n steps, each of which doubles the distance of the neighbours in an equation.
    """
    size, distance = diagonal.shape[1], 1
    while distance < size:

        def shifted(values: Tensor, by: int, fill: float = 0.0) -> Tensor:
            padding = (by, 0) if by > 0 else (0, -by)
            return F.pad(values[:, : size - by] if by > 0 else values[:, -by:], padding, value=fill)

        back, ahead = (shifted(diagonal, by, 1.0) for by in (distance, -distance))
        a, b = -lower / back, -upper / ahead
        lower, diagonal, upper, right = (
            a * shifted(lower, distance),
            diagonal + a * shifted(upper, distance) + b * shifted(lower, -distance),
            b * shifted(upper, -distance),
            right + a * shifted(right, distance) + b * shifted(right, -distance),
        )
        distance *= 2
    return right / diagonal
