"""What the methods share that change tokens between the blocks of a vision transformer: recording them, resuming
from them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..classifier import Classifier
from ..protection import undisturbed
from .transformer import ARCHITECTURES, TransformerAttributor


class TokenAttributor(TransformerAttributor):
    """Base of the methods that run blocks on changed tokens; refuses other architectures when it is made."""

    reads = "changes tokens between blocks"
    accepts = ARCHITECTURES

    def __init__(self, clf: Classifier, **options: Any):
        super().__init__(clf, **options)
        if not self.structure.plain:
            self.refuse()

    def record(self, images: Tensor, first: int, last: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Logits (B, classes), and the inputs and the outputs (B, T, D) of the blocks ``first`` to ``last``."""
        inputs: list[Tensor] = []
        outputs: list[Tensor] = []

        def hook(_module: nn.Module, args: tuple, output: Tensor) -> None:
            inputs.append(args[0])
            outputs.append(output)

        hooks: list[tuple[nn.Module, Callable]] = [(block, hook) for block in self.blocks[first : last + 1]]
        with undisturbed(self.clf, hooks):
            logits = self.clf(images)
        return logits, inputs, outputs

    def resume(self, images: Tensor, block: int, tokens: Tensor) -> Tensor:
        """Logits (n, classes) of ``tokens`` (n, T, D) fed to ``block``; of ``images`` only the size matters."""
        blank = images.new_zeros(()).expand(len(tokens), *images.shape[1:])
        with self.starting_at(block, tokens):
            return self.clf.forward_normalized(blank)
