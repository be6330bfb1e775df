"""Shapley values by regression: the objective of the amortised peers FastSHAP and ViT-Shapley.

A game has n players, the cells of a grid over the image. v(S) is the softmax probability of the target when only the
players in S are present, and φ its Shapley values: in units of probability, Σφ = v(N) − v(∅).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import kernels
from .checks import check_answers, check_choice, check_integer, checked, checked_fields
from .classifier import Classifier, check_classifier
from .identity import fingerprint
from .kernels.dispatch import NAMES as BACKENDS
from .objective import check_game, check_seeds
from .precision import autocast, confidence, full_precision, uses_bf16
from .protection import protected
from .regions import Regions, grid
from .structure import transformer

# how a player is absent → the method that trains with it
METHODS = {"pixels": "fastshap", "tokens": "vit_shapley"}
REFERENCES = ("mean",)


class ShapleyLosses(NamedTuple):
    """What `ShapleyObjective` returns, one value per image (B,); only ``loss`` carries a gradient.

    ``flat`` is the loss of the explanation that gives every player the same share: loss/flat is 1 without information.
    ``gap`` is |v(N) − v(∅) − Σφ| before the normalisation.
    """

    loss: Tensor
    flat: Tensor
    gap: Tensor


@dataclass(frozen=True)
class ShapleyObjective:
    """What FastSHAP and ViT-Shapley train an explainer for: Shapley values, learned from sampled sets of players.

    L = n · E_S (v(S) − v(∅) − Σ_{i∈S} φ_i)², the weighted least squares whose minimiser are the Shapley values.

    S follows the Shapley kernel: its size is s = 1 … n−1 with probability ∝ 1/(s(n−s)), uniform among the sets of that
    size. Every S is drawn with its complement (paired sampling). φ is shifted by (v(N) − v(∅) − Σφ)/n for every player
    before it is compared (additive efficient normalisation). v needs no gradient, so nothing is back-propagated through
    the classifier (FastSHAP: Jethani et al., ICLR 2022; ViT-Shapley: Covert et al., ICLR 2023).

    A map A is read as a density: φ_i = mean of A over cell i, divided by n. So A is of order 1 for any n, and
    its mean is v(N) − v(∅) in probability.

    Attributes:
        classifier: the classifier to explain.
        absence: "pixels": an absent cell shows the reference; "tokens": an absent patch is dropped from the sequence,
            as no token attends to it.
        coalitions: sets per image and step, complements included; even.
        players: (rows, cols) of the grid; None: the patches of a vision transformer, else cells of 16 px at 224.
        surrogate: plays the game in the classifier's place, such as one that was fine-tuned on masked images; on the
            device of the images.
        chunk: perturbed images in memory at a time; results do not depend on it.
        precision: of the classifier's passes, "auto" | "bf16" | "fp32".
    """

    classifier: Classifier
    absence: str = "pixels"
    coalitions: int = 32
    players: tuple[int, int] | None = None
    surrogate: Classifier | None = None
    chunk: int = 128
    precision: str = "fp32"
    backend: str = "auto"
    _tokens: TokenMasks | None = field(init=False, repr=False, compare=False, default=None)

    @checked_fields
    def __post_init__(self) -> None:
        check_classifier(self.classifier)
        uses_bf16(self.precision, self.value_model.device, self.value_model.dtype)
        check_choice("backend", self.backend, BACKENDS)
        if self.absence not in METHODS:
            raise ValueError(f"absence={self.absence!r} is not known: choose one of {', '.join(METHODS)}")
        if check_integer("coalitions", self.coalitions, 2) % 2:
            raise ValueError(f"coalitions={self.coalitions}: give an even number, every set comes with its complement")
        check_integer("chunk", self.chunk, 2)  # a set and its complement
        if self.surrogate is not None and self.surrogate.num_classes != self.classifier.num_classes:
            raise ValueError(
                f"the surrogate has {self.surrogate.num_classes} classes, {self.classifier.name} has "
                f"{self.classifier.num_classes}: give a surrogate of that classifier"
            )
        if self.absence == "tokens":
            if self.players is not None:
                raise ValueError(
                    f"players={self.players}: with absent tokens the players are the patches, leave it out"
                )
            object.__setattr__(self, "_tokens", TokenMasks(self.value_model))

    @property
    def name(self) -> str:
        """The method that this objective trains."""
        return METHODS[self.absence]

    @property
    def value_model(self) -> Classifier:
        """The classifier that is evaluated, the surrogate if there is one."""
        return self.surrogate or self.classifier

    def settings(self) -> dict[str, Any]:
        """What an explainer records of the objective it was trained with, in JSON types."""
        return {
            "objective": self.name,
            "players": list(self.players) if self.players else None,
            "surrogate": fingerprint(self.surrogate) if self.surrogate is not None else None,
        }

    def regions(self, height: int, width: int) -> Regions:
        """The players as regions of height×width pixels."""
        return grid(height, width, self.players or player_grid(self.value_model, height, width))

    @checked
    def diagnose(self, maps: Tensor, regions: Regions, tau: float) -> dict[str, float]:
        """Nothing beyond the losses; see `Objective.diagnose`."""
        return {}

    def __call__(
        self,
        images: Tensor,
        maps: Tensor,
        target: Tensor,
        references: Sequence[Tensor],
        regions: Regions,
        tau: float | Tensor = 0.0,
        noise: float = 0.0,
        seed: int | Tensor = 0,
    ) -> ShapleyLosses:
        """Loss of attribution ``maps`` (B,1,H,W) for ``images`` (B,C,H,W) in [0,1]; called as `Objective` is.

        Args:
            target: (B,), or (B,M): v is the mean over M classes that share a map.
            references: reference images (B,C,H,W); v is their mean. Unused with absent tokens.
            regions: the players.
            tau, noise: of a ranking; unused.
            seed: of the coalitions, or (B,) int64, one for each map; every seed gives an unbiased estimate.

        Raises:
            ValueError: in one line, for arguments that do not fit, and where the classifier is not finite.
        """
        if regions.count < 2:
            raise ValueError(f"a game of {regions.count} player has nothing to share: give a finer grid of players")
        with protected(self.classifier, self.value_model, gradients=False):
            return self._losses(images, maps, target, references, regions, seed)

    def _losses(self, images, maps, target, references, regions, seed) -> ShapleyLosses:
        images, maps, target, references = check_game(self.classifier, images, maps, target, references)
        seeds = check_seeds(seed, len(images)).tolist() if isinstance(seed, Tensor) and seed.ndim else [int(seed)]
        at_once, pairs = len(images) // len(seeds), self.coalitions // 2
        generators = [torch.Generator().manual_seed(one) for one in seeds]
        drawn = [coalitions(at_once, pairs, regions.count, generator) for generator in generators]
        sets = torch.cat(drawn).to(images.device)
        values, change, empty = self._play(images, references, sets, target, regions)
        share = self.shares(maps, regions)
        gap = change - share.sum(dim=1)
        value = share + gap[:, None] / regions.count
        # a set and its complement
        present = torch.stack([sets, ~sets], dim=1).to(value.dtype)
        gained = values - empty[:, None, None]
        error = gained - torch.einsum("bpmn,bn->bpm", present, value)
        flat = gained - present.mean(dim=-1) * change[:, None, None]
        loss, plain = (regions.count * e.square().mean(dim=(1, 2)) for e in (error, flat))
        return ShapleyLosses(loss, plain, gap.detach().abs())

    @checked
    def shares(self, maps: Tensor, regions: Regions) -> Tensor:
        """Shapley values before they are normalised: maps (B,1,H,W) → φ (B,n)."""
        return regions.pool(full_precision(maps)) / regions.count

    @torch.no_grad()
    def values(
        self, images: Tensor, maps: Tensor, target: Tensor, references: Sequence[Tensor], regions: Regions
    ) -> Tensor:
        """Efficient φ (B,n) of ``maps``: Σφ = v(N) − v(∅), at the price of these two passes."""
        with protected(self.classifier, self.value_model, gradients=False):
            images, maps, target, blanks = check_game(self.classifier, images, maps, target, references)
            none = torch.empty(len(images), 0, regions.count, dtype=torch.bool, device=images.device)
            _, change, _ = self._play(images, blanks, none, target, regions)
            share = self.shares(maps, regions)
            return share + (change - share.sum(dim=1))[:, None] / regions.count

    def _play(self, images, references, sets, target, regions) -> tuple[Tensor, Tensor, Tensor]:
        """Values (B,2,M) of the sets and their complements, v(N) − v(∅) and v(∅) (B,)."""
        # all players and nobody are a pair like any other
        everybody = sets.new_ones(len(sets), 1, sets.shape[2])
        values = self.game(images, references, torch.cat([everybody, sets], dim=1), target, regions)
        full, empty = values[:, 0, 0], values[:, 1, 0]
        return values[:, :, 1:], full - empty, empty

    @torch.no_grad()
    def game(
        self, images: Tensor, references: Sequence[Tensor], sets: Tensor, target: Tensor, regions: Regions
    ) -> Tensor:
        """v of ``sets`` (B,M,n), True where a player is present, and of their complements: (B,2,M) in [0,1]."""
        target = target if target.ndim == 2 else target[:, None]
        batch, count = sets.shape[:2]
        if self._tokens is not None:
            patches = self._tokens.grid(*images.shape[-2:])
            if patches != (regions.rows, regions.cols):
                raise ValueError(
                    f"{regions.rows}×{regions.cols} players for {patches[0]}×{patches[1]} patches: with absent tokens "
                    "they are the same"
                )
        upsampler = regions.upsampler(sigma=0, device=images.device)
        images_at_once = min(batch, self.chunk // 2)
        sets_at_once = max(1, self.chunk // (2 * images_at_once))
        values = torch.zeros(batch, 2, count, dtype=full_precision(images[:0]).dtype, device=images.device)
        # dropped tokens have no reference
        blanks = references if self._tokens is None else [images]
        with autocast(self.precision, images.device, self.value_model.dtype):
            for reference in blanks:
                for first in range(0, batch, images_at_once):
                    rows = slice(first, first + images_at_once)
                    for start in range(0, count, sets_at_once):
                        cols = slice(start, start + sets_at_once)
                        part = (images[rows], reference[rows], sets[rows, cols], target[rows])
                        values[rows, :, cols] += self._confidence(*part, upsampler) / len(blanks)
        return check_answers(values, self.value_model.name)

    def _confidence(self, images, reference, sets, target, upsampler) -> Tensor:
        """(B,2,M), all of it in one pass."""
        model = self.value_model
        batch, count = sets.shape[:2]
        if self._tokens is None:
            present = sets.to(full_precision(images[:0]).dtype)
            without, within = kernels.perturb(
                images, reference, present, upsampler, model.mean, model.std, model.dtype, backend=self.backend
            )
            logits = model.forward_normalized(torch.stack([within, without], dim=1).flatten(0, 2))
        else:
            keep = torch.stack([sets, ~sets], dim=1).flatten(0, 2)
            pixels = model.normalize(images).repeat_interleave(2 * count, dim=0)
            with self._tokens.keeping(keep):
                logits = model.forward_normalized(pixels)
        repeated = target.repeat_interleave(2 * count, dim=0)
        return confidence(logits, repeated).mean(dim=1).view(batch, 2, count)


def player_grid(classifier: Classifier, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of players: the patches of a vision transformer, else cells of 16 px at 224 (8 px below 112)."""
    # hierarchical transformers have patches of 4 px, too many for a game
    found = transformer(classifier.module)
    if found:
        return found.grid(height, width)
    short = min(height, width)
    cells = max(2, min(14, short // 8))
    return round(cells * height / short), round(cells * width / short)


def size_probabilities(players: int) -> Tensor:
    """How often sets of each size 1 … n−1 are drawn, (n−1,) float64: the Shapley kernel's, ∝ 1/(s(n−s))."""
    size = torch.arange(1, players, dtype=torch.float64)
    weight = 1 / (size * (players - size))
    return weight / weight.sum()


def coalitions(batch: int, count: int, players: int, generator: torch.Generator) -> Tensor:
    """Draw sets of players, (B, count, n) bool, from the Shapley kernel's distribution, on the generator's device.

    The complement of a set has the same distribution, so pairs need no correction.
    """
    weights = size_probabilities(players)
    size = 1 + torch.multinomial(weights, batch * count, replacement=True, generator=generator)
    # float64: ties, which would favour the first players, are as good as impossible
    order = torch.rand(batch * count, players, dtype=torch.float64, generator=generator).argsort(dim=-1)
    return (order < size[:, None]).view(batch, count, players)


class TokenMasks:
    """Drops patches from the sequence of a timm vision transformer: no token attends to them, no pooling reads them.

    The result is that of a shorter sequence with the positions kept; masks let coalitions of different sizes share a
    batch. Prefix tokens (class, registers) always stay. Average pooling is over the patches that are left, and over
    none of them it is zero.

    Raises:
        ValueError: in one line, for another architecture or readout.
    """

    ACCEPTS = "timm vision transformers with a class token or average pooling (ViT, DeiT, BEiT, EVA, DINOv3)"

    def __init__(self, classifier: Classifier):
        found = transformer(classifier.module)
        biases = [(attention, _bias_argument(attention)) for attention in found.attentions] if found else []
        self._biases = [(attention, name) for attention, name in biases if name]
        masked = bool(biases) and len(self._biases) == len(biases)
        if not found or not masked or found.norm is None or found.pooling not in ("avg", "token"):
            pooling = f" with {found.pooling!r} pooling" if found and masked and found.pooling else ""
            raise ValueError(
                f"vit_shapley masks attention and accepts {self.ACCEPTS}; {classifier.name} is a "
                f"{type(classifier.module).__name__}{pooling}: choose fastshap, which masks pixels"
            )
        self._structure = found
        self._norm = found.norm

    @property
    def prefix(self) -> int:
        """Tokens before the patches."""
        return self._structure.prefix

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self._structure.grid(height, width)

    @contextmanager
    def keeping(self, keep: Tensor) -> Iterator[None]:
        """Inside, a batch of N images runs with the patches in ``keep`` (N, patches) bool, and no other."""
        present = torch.cat([keep.new_ones(len(keep), self.prefix), keep], dim=1)  # [N, T]

        def bias_of(name: str) -> Callable:
            def mask(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
                dtype = args[0].dtype
                # finite: where nothing is left to attend to, −inf would make NaN
                bias = torch.zeros(present.shape, dtype=dtype, device=present.device)
                bias = bias.masked_fill_(~present, torch.finfo(dtype).min / 2)[:, None, None, :]
                own = kwargs.get(name)
                return args, {**kwargs, name: bias if own is None else own + bias}

            return mask

        def weigh(_module: nn.Module, _args: tuple, tokens: Tensor) -> Tensor:
            # the mean over all of these is the mean over those that are left
            read = present if self._structure.pools_prefix else present[:, self.prefix :]
            weight = present * (read.shape[1] / read.sum(dim=1, keepdim=True).clamp_min(1))
            return tokens * weight[:, :, None].to(tokens.dtype)

        with ExitStack() as stack:
            for owner, name in self._biases:
                handle = owner.register_forward_pre_hook(bias_of(name), with_kwargs=True)
                stack.callback(handle.remove)
            if self._structure.pooling == "avg":
                stack.callback(self._norm.register_forward_hook(weigh).remove)
            yield


def _bias_argument(attention: nn.Module) -> str | None:
    """The argument of an attention layer that is added to its scores, None if it has none."""
    parameters = inspect.signature(attention.forward).parameters
    return next((name for name in ("attn_mask", "shared_rel_pos_bias") if name in parameters), None)
