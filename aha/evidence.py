"""What a classifier says of its own decision: maps by role, all of one forward pass and one backward pass per class.

Every architecture has the roles, each in its own way:

- ``gradient``: the full gradient, the mean over cuts through the network. FullGrad+ of plain vision transformers and
  mixers; of every other network Σ_l Σ_c h_l⊙∂s/∂h_l over the pixels and the last maps h_l of each resolution, their
  signs kept. Constants are left out there: they make it worse, the pixels make it better;
- ``last``: what the last stage says. AttCAM; of other networks HiResCAM, Σ_c A_c⊙∂s/∂A_c of the last maps;
- ``activity``: where much happens, whatever the class. The attention of the readout in the last block; of other
  networks the norm over channels of the last maps;
- ``early`` and ``late``: the parts of the full gradient that its first and its last third of cuts make;
- ``biases``: the part that constants make. Absent where the full gradient leaves them out.

Gradients are LibraGrad's where it has the rules, plain ones elsewhere. The methods alone are in `aha.attributors`.

They are of the target's logit less ``contrast`` times those of the other classes, each with its softmax weight among
the others: deletion and insertion measure a probability, which falls when another class gains as when the target loses.
The weights are constants to the backward pass, so the score is a class's logit like any other, of which the full
gradient is complete. With 1 the gradient is that of the log-odds, with 0 that of the target's logit alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .checks import check_answers, check_number, check_target
from .classifier import Classifier
from .full_gradient import TokenTerms
from .geometry import as_maps
from .libra import libra
from .objective import standardize
from .precision import switched_off
from .protection import protected, undisturbed
from .stages import find_stages
from .structure import transformer

ROLES = ("gradient", "last", "activity", "early", "late", "biases")
CONTRAST = 0.5  # what explainers are built with (docs/training.md)


class Evidence(NamedTuple):
    """What `evidence` found.

    Attributes:
        maps: (N, roles, H, W), each of mean 0 and standard deviation 1 over the image; 0 where absent or flat. N is
            B, or B·M of M targets per image, image-major.
        present: (roles,) whether the architecture has the role.
        logits: (B, classes), of the same pass.
        target: (N,) the classes that the maps are of.
    """

    maps: Tensor
    present: Tensor
    logits: Tensor
    target: Tensor

    @property
    def best(self) -> Tensor:
        """(N, 1, H, W): the single map that is known to be the best, the full gradient."""
        return self.maps[:, :1]


class Evident:
    """The evidence of one classifier, whose architecture is looked at once.

    >>> found = aha.evidence.Evident(clf)(images)

    Args:
        clf: any classifier with gradients and hooks.
        contrast: the weight of the other classes, in [0, 1].
    """

    def __init__(self, clf: Classifier, contrast: float = CONTRAST):
        clf.require("evidence", True, True)
        self.clf = clf
        contrast = check_number("contrast", contrast, 0, high=1)
        self._read = _of_tokens(clf, contrast) or _of_maps(clf, contrast)
        self._libra = self._has_rules()

    def __call__(self, images: Tensor, target: Tensor | Sequence[int] | int | None = None) -> Evidence:
        """One forward pass, and one backward pass per target of an image.

        Args:
            images: (B, C, H, W) in [0, 1].
            target: (B,) classes, one for all, (B, M) of M classes per image, or None: the predicted ones.
        """
        images = self.clf.check(images).detach()
        if isinstance(target, Tensor) and target.ndim == 2:
            if len(target) != len(images) or not target.shape[1]:
                raise ValueError(f"target has shape {tuple(target.shape)}: give ({len(images)}, M) classes, M ≥ 1")
            flat = check_target(target.flatten(), target.numel(), self.clf.num_classes, images.device)
            target = flat.view(target.shape)
        elif target is not None:
            target = self.clf.resolve_target(images, target)[:, None]
        with protected(self.clf), self._rules():
            maps, logits, target = self._read(images, target)
            check_answers(logits.detach().softmax(dim=1), self.clf.name)
        present = torch.tensor([m is not None for m in maps[0]], device=images.device)
        blank = torch.zeros_like(images[:, :1])
        each = [
            torch.cat([blank if m is None else _standardized(m.detach().float()) for m in of], dim=1) for of in maps
        ]
        stacked = each[0] if len(each) == 1 else torch.stack(each, dim=1).flatten(0, 1)
        return Evidence(stacked, present, logits.detach(), target.flatten())

    def _rules(self) -> AbstractContextManager:
        return libra(self.clf.module) if self._libra else nullcontext()

    def _has_rules(self) -> bool:
        blank = torch.full((1, len(self.clf.mean), *self.clf.input_size), 0.5, device=self.clf.device)
        try:
            with protected(self.clf), libra(self.clf.module):
                self._read(blank, None)
        except ValueError:
            return False
        return True


# images and targets (B, M), or None → for each of the M the roles' maps (B, 1, H, W), and logits and targets
Read = Callable[[Tensor, Tensor | None], tuple[list[list[Tensor | None]], Tensor, Tensor]]


def _standardized(maps: Tensor) -> Tensor:
    """Whatever their unit is."""
    most = maps.abs().amax(dim=(1, 2, 3), keepdim=True)
    return (standardize(maps / torch.where(most > 0, most, 1)) - 0.5) / 0.29


def _scores(logits: Tensor, target: Tensor | None, contrast: float) -> tuple[list[Tensor], Tensor]:
    """The sums over the images of their first, second … target's score, and the targets (B, M)."""
    target = logits.argmax(dim=1, keepdim=True) if target is None else target
    scores = []
    for chosen in target.split(1, dim=1):
        others = logits.detach().scatter(1, chosen, -torch.inf).softmax(dim=1)
        scores.append((logits.gather(1, chosen) - contrast * (others * logits).sum(dim=1, keepdim=True)).sum())
    return scores, target


def _of_tokens(clf: Classifier, contrast: float) -> Read | None:
    found = transformer(clf.module, mixers=True)
    if found is None or found.joined_late:
        return None
    blocks, prefix, readout, softmaxes = found.blocks, found.prefix, found.readout, found.softmaxes
    patches = slice(prefix, None)

    def read(images: Tensor, target: Tensor | None) -> tuple[list[list[Tensor | None]], Tensor, Tensor]:
        size = (int(images.shape[-2]), int(images.shape[-1]))
        rows, cols = found.grid(*size)
        tokens = prefix + rows * cols
        terms = TokenTerms(blocks, tokens)
        weights: list[Tensor] = []
        read_out: list[Tensor] = []

        def watch(_module: nn.Module, _args: Any, attention: Tensor) -> None:
            # windows, or what else is not one row and column for each token, say nothing of where the readout looks
            if tuple(attention.shape[2:]) == (tokens, tokens):
                weights.append(attention.detach()[:, :, :, patches].mean(dim=(1, 2)))
                read_out[:] = [attention.detach()[:, :, readout, patches].mean(dim=(1, 2))]

        hooks = [(module, watch) for module in softmaxes or ()]
        with undisturbed(clf, hooks, unfused=True), terms.recorded():
            logits = clf(images)
        scores, target = _scores(logits, target, contrast)
        by_target: list[list[Tensor | None]] = []
        for number, score in enumerate(scores, 1):
            terms.trace(score, again=number < len(scores))
            maps: list[Tensor | None] = [terms.total, None, None, *_ends(terms.inputs)]
            maps.append(terms.biases if isinstance(terms.biases, Tensor) else None)
            maps = [None if m is None else m[:, patches] for m in maps]
            if len(weights) == len(blocks):
                maps[2] = read_out[0]
                if len(blocks) > 1:
                    # the mean over all queries of a block's attention, with the tokens that leave it
                    pairs = zip(terms.inputs[1:], weights, strict=False)
                    maps[1] = torch.stack([inputs[:, patches] * weight for inputs, weight in pairs]).sum(dim=0)
            by_target.append([None if m is None else _enlarged(m.reshape(-1, 1, rows, cols), size) for m in maps])
        return by_target, logits, target

    return read


def _ends(cuts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The sums over the first and over the last third of the cuts, one at least."""
    third = max(1, len(cuts) // 3)
    return torch.stack(cuts[:third]).sum(dim=0), torch.stack(cuts[-third:]).sum(dim=0)


def _enlarged(maps: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(maps, size, mode="bilinear", align_corners=False)


def _of_maps(clf: Classifier, contrast: float) -> Read:
    blank = torch.zeros(2, len(clf.mean), *clf.input_size, device=clf.device)
    try:
        with protected(clf), torch.no_grad():
            cuts = list(dict.fromkeys(find_stages(clf.module, clf.normalize(blank), clf.name)))
    except ValueError:
        cuts = []

    def read(images: Tensor, target: Tensor | None) -> tuple[list[list[Tensor | None]], Tensor, Tensor]:
        size = (int(images.shape[-2]), int(images.shape[-1]))
        # of the backward pass that is going on, which meets the last cut first
        by_cut: list[Tensor] = []
        last: list[Tensor | None] = [None, None]

        def cut(module: nn.Module, _args: Any, output: Tensor) -> None:
            # a copy, for what follows may work in place
            kept = output.detach().clone()

            def receive(gradient: Tensor) -> None:
                if (maps := as_maps(kept * gradient, size)) is None:
                    return
                here = _enlarged(maps.sum(dim=1, keepdim=True), size)
                by_cut.append(here)
                if module is cuts[-1] and (features := as_maps(kept, size)) is not None:
                    strength = torch.linalg.vector_norm(features, dim=1, keepdim=True)
                    last[:] = [here, _enlarged(strength, size)]

            output.register_hook(receive)

        pixels = clf.normalize(images.clone()).requires_grad_()
        with ExitStack() as stack:
            stack.enter_context(switched_off(clf.module, "grad_checkpointing"))
            for module in cuts:
                stack.callback(module.register_forward_hook(cut).remove)
            logits = clf.forward_normalized(pixels)
        scores, target = _scores(logits, target, contrast)
        by_target: list[list[Tensor | None]] = []
        for number, score in enumerate(scores, 1):
            by_cut.clear()
            (gradient,) = torch.autograd.grad(score, pixels, retain_graph=number < len(scores))
            by_cut.append((pixels.detach() * gradient).sum(dim=1, keepdim=True))
            late, early = _ends(by_cut)
            by_target.append([torch.stack(by_cut).sum(dim=0), *last, early, late, None])
        return by_target, logits, target

    return read
