"""A timm vision transformer as what attribution methods ask for: blocks, tokens, a grid of patches.

Tokens are (B, T, D), T = prefix tokens + patches; prefix tokens and the readout are those of `structure.Transformer`.
Prefix tokens are never part of a map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NoReturn

import torch.nn.functional as F
from torch import Tensor, nn

from ..classifier import Classifier
from ..precision import switched_off
from ..structure import transformer
from .base import Attributor

ARCHITECTURES = "timm vision transformers (ViT, DeiT, BEiT, EVA, DINOv3)"


class TransformerAttributor(Attributor):
    """Base of the methods that look into a vision transformer; refuses other architectures when it is made.

    Attributes:
        structure: what it found.
        blocks: the transformer blocks, in order.
        prefix: number of tokens before the patches.
        readout: the tokens whose final values reach the head.
        reads, accepts: what the method looks at, and where it finds it; both for messages.
    """

    looks_inside = True
    reads: ClassVar[str] = "reads tokens"
    accepts: ClassVar[str] = ARCHITECTURES
    # MLP-Mixers have blocks, patches and no other tokens; for methods that need no attention
    mixers: ClassVar[bool] = False

    def __init__(self, clf: Classifier, **options: Any):
        super().__init__(clf, **options)
        self.structure = transformer(clf.module, self.mixers) or self.refuse()
        self.blocks, self.prefix = self.structure.blocks, self.structure.prefix
        self.readout = self.structure.readout

    def refuse(self) -> NoReturn:
        """ValueError in one line, for a classifier of another architecture."""
        raise ValueError(
            f"{self.name} {self.reads} and accepts {self.accepts}; {self.clf.name} is a "
            f"{type(self.clf.module).__name__}: choose a method for any classifier, such as rise"
        )

    def grid(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of patches of ``images``."""
        height, width = images.shape[-2:]
        return self.structure.grid(height, width)

    def upsample(self, patches: Tensor, images: Tensor) -> Tensor:
        """(B, patches) → (B, 1, H, W), bilinearly."""
        maps = patches.reshape(len(images), 1, *self.grid(images))
        return F.interpolate(maps, images.shape[-2:], mode="bilinear", align_corners=False)

    @contextmanager
    def starting_at(self, block: int, tokens: Callable[[Tensor], Tensor] | Tensor) -> Iterator[None]:
        """Inside, blocks before ``block`` are skipped, and ``block`` is fed ``tokens`` (B, T, D).

        A pass then costs only the blocks from there on; ``tokens`` may be a function of what arrives. Run the
        classifier on a batch of the tokens' size: what its pixels are does not matter.
        """

        def feed(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            return (tokens(args[0]) if callable(tokens) else tokens, *args[1:]), kwargs

        skipped = self.blocks[:block]
        # checkpointing would run the blocks again after the hook has gone
        with switched_off(self.clf.module, "grad_checkpointing"):
            handle = self.blocks[block].register_forward_pre_hook(feed, with_kwargs=True)
            try:
                for module in skipped:
                    # an instance attribute hides the class's forward until it is deleted
                    module.forward = _unchanged
                yield
            finally:
                handle.remove()
                for module in skipped:
                    vars(module).pop("forward", None)


def _unchanged(tokens: Tensor, *_: Any, **__: Any) -> Tensor:
    return tokens
