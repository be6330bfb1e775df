"""The full gradient of a logit: what the input of a cut through the network says, and what the biases after it add.

For a network that is homogeneous of degree one up to the constants c it adds, at every cut h,

    logit_t = Σ h⊙∂logit_t/∂h + Σ_{c after h} c⊙∂logit_t/∂c

(Srinivas and Fleuret 2019, proposition 4). ReLU networks are such; transformers are inside `libra`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .checks import checked
from .classifier import Classifier
from .libra import depends, operation
from .precision import switched_off
from .protection import protected


class FullGradient(NamedTuple):
    """The terms of the full gradient at one cut.

    Attributes:
        inputs: h⊙∂logit_t/∂h, of h's shape (B, …).
        biases: (B,) sum of c⊙∂logit_t/∂c over all constants c that are added after the cut.
        logits: (B,) the target's.
    """

    inputs: Tensor
    biases: Tensor
    logits: Tensor

    @property
    def error(self) -> Tensor:
        """(B,) |Σ inputs + biases − logits|: zero for a complete gradient."""
        return (self.inputs.flatten(1).sum(dim=1) + self.biases - self.logits).abs()


@checked
def full_gradient(
    clf: Classifier, images: Tensor, target: Tensor | Sequence[int] | int, at: nn.Module | None = None
) -> FullGradient:
    """The full gradient of the target's logit; inside `libra` it is complete.

    >>> with libra(clf.module):
    ...     terms = full_gradient(clf, images, 3, at=clf.module.blocks[5])

    Args:
        images: (B, C, H, W) in [0, 1].
        target: (B,) classes, or one for all.
        at: the submodule whose first input is the cut; everything must pass through it, as through a block. Default:
            the normalised pixels.

    Raises:
        ValueError: if the classifier's output does not depend on what enters ``at``.
    """
    images = clf.check(images)
    target = clf.resolve_target(images, target)
    with protected(clf), switched_off(clf.module, "grad_checkpointing"):
        pixels = clf.normalize(images.detach().clone())
        biases = pixels.new_zeros(len(images))
        cut: list[Tensor] = [] if at is not None else [pixels.requires_grad_()]

        def enter(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            cut.append(args[0].detach().requires_grad_())
            return (cut[0], *args[1:]), kwargs

        def add(constant: Tensor, gradient: Tensor) -> None:
            biases.add_((constant * gradient).reshape(len(biases), -1).sum(dim=1))

        with ExitStack() as stack:
            if at is not None:
                stack.callback(at.register_forward_pre_hook(enter, with_kwargs=True).remove)
            with Constants(lambda constant: lambda gradient: add(constant, gradient)):
                logits = clf.forward_normalized(pixels).gather(1, target[:, None])[:, 0]
        if not (cut and logits.requires_grad):
            raise ValueError(
                f"the logits do not depend on what enters {type(at).__name__}: give a submodule that the classifier "
                "calls with its tokens as the first argument"
            )
        (gradient,) = torch.autograd.grad(logits.sum(), cut[0])
        return FullGradient(cut[0].detach() * gradient, biases, logits.detach())


class Constants(TorchFunctionMode):
    """Finds every constant that is added to something that depends on the input.

    Args:
        found: called with the constant, in a shape that broadcasts to that of the sum; what it returns is called with
            the gradient (B, …) of the sum when the backward pass gets there. None: the constant is left.
    """

    def __init__(self, found: Callable[[Tensor], Callable[[Tensor], None] | None]):
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Callable, types: Any, args: Sequence = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        find = _ADDED.get(operation(func))
        # before the operation: one in place makes its first argument depend on the second
        constant = find(*args, **kwargs) if find else None
        out = func(*args, **kwargs)
        if constant is not None and depends(out):
            receive = self.found(constant if isinstance(constant, Tensor) else torch.full_like(out, constant).detach())
            if receive is not None:
                # a hook keeps its place when the sum is later overwritten, as by a ReLU in place
                out.register_hook(receive)
        return out


# what the operations add; each gets the operation's arguments, and answers None for nothing


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    return bias


def _convolution(input: Tensor, weight: Tensor, bias: Tensor | None = None, *_: Any, **__: Any) -> Tensor | None:
    return None if bias is None else bias.view(-1, *(1,) * (weight.ndim - 2))


def _layer_norm(
    input: Tensor, normalized_shape: Any, weight: Tensor | None = None, bias: Tensor | None = None, *_: Any, **__: Any
) -> Tensor | None:
    return bias


def _group_norm(
    input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None, *_: Any, **__: Any
) -> Tensor | None:
    return None if bias is None else bias.view(-1, *(1,) * (input.ndim - 2))


def _batch_norm(
    input: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    constant = -running_mean * (running_var + eps).rsqrt()
    constant = constant if weight is None else constant * weight
    constant = constant if bias is None else constant + bias
    return constant.view(-1, *(1,) * (input.ndim - 2))


def _sum(input: Any, other: Any, alpha: float = 1) -> Any:
    if depends(input):
        return None if depends(other) else other * alpha
    return input


def _difference(input: Any, other: Any, alpha: float = 1) -> Any:
    if depends(input):
        return None if depends(other) else -other * alpha
    return input


def _reversed_difference(input: Any, other: Any, alpha: float = 1) -> Any:
    return _difference(other, input, alpha)


def _addcmul(input: Tensor, tensor1: Tensor, tensor2: Tensor, *, value: float = 1) -> Tensor | None:
    if depends(input):
        return None if depends(tensor1) or depends(tensor2) else tensor1 * tensor2 * value
    return input


def _joined(join: Callable) -> Callable:
    def find(tensors: Sequence[Tensor], *args: Any, **kwargs: Any) -> Tensor | None:
        if all(map(depends, tensors)):
            return None
        return join([torch.zeros_like(t) if depends(t) else t.detach() for t in tensors], *args, **kwargs)

    return find


_ADDED: dict[str, Callable] = {
    "linear": _linear,
    "layer_norm": _layer_norm,
    "group_norm": _group_norm,
    "batch_norm": _batch_norm,
    "add": _sum,
    "sub": _difference,
    "rsub": _reversed_difference,
    "addcmul": _addcmul,
    "cat": _joined(torch.cat),
    "stack": _joined(torch.stack),
}
_ADDED |= dict.fromkeys(("conv1d", "conv2d", "conv3d"), _convolution)


# where a timm mixer works on (B, channels, tokens)
_TOKEN_MIXING = ("mlp_tokens", "linear_tokens", "mlp_channels.gate.proj")


class TokenTerms:
    """The terms of `FullGradPlus` by token, of one forward pass and a backward pass per score.

    >>> with terms.recorded():
    ...     logits = clf(images)
    >>> terms.trace(logits[:, 3].sum())

    Args:
        blocks: of a transformer or a mixer, in order.
        tokens: T.

    Attributes:
        inputs: of every block, (B, T): Σ_d h_l⊙∂s/∂h_l.
        biases: (B, T): Σ_c (k/L) Σ_d c⊙∂s/∂c, k the number of cuts before the constant.
    """

    def __init__(self, blocks: Sequence[nn.Module], tokens: int):
        self._blocks, self._tokens = blocks, tokens
        self._start: list[Tensor] = []
        self._seen = 0
        # inside token mixing the last dimension is that of tokens, and a row is a channel
        self._mixing = False
        self.inputs: list[Tensor] = [torch.empty(0)] * len(blocks)
        self.biases: Tensor | float = 0.0

    @property
    def total(self) -> Tensor:
        """(B, T): the mean over the cuts."""
        return sum(self.inputs, torch.zeros_like(self.inputs[0])) / len(self._blocks) + self.biases

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """For the forward pass. Nothing before the first block needs a gradient."""

        def mix(on: bool) -> Callable:
            def hook(*_: Any) -> None:
                self._mixing = on

            return hook

        with ExitStack() as stack:
            for block in self._blocks:
                stack.callback(block.register_forward_pre_hook(self._enter, with_kwargs=True).remove)
                for module in (m for name, m in block.named_modules() if name in _TOKEN_MIXING):
                    stack.callback(module.register_forward_pre_hook(mix(True)).remove)
                    stack.callback(module.register_forward_hook(mix(False)).remove)
            with Constants(self._found):
                yield

    def trace(self, score: Tensor, again: bool = False) -> None:
        """The backward pass from ``score``, the sum of the targets' logits; ``again``: another score will follow."""
        self.biases = 0.0
        torch.autograd.grad(score, self._start[0], retain_graph=again)

    def _enter(self, _module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        hidden = args[0]
        if not self._start:
            hidden = hidden.detach().requires_grad_()
            self._start.append(hidden)
        kept, block = hidden.detach(), self._seen

        def receive(gradient: Tensor) -> None:
            self.inputs[block] = (kept * gradient).sum(dim=-1)

        hidden.register_hook(receive)
        self._seen += 1
        return (hidden, *args[1:]), kwargs

    def _found(self, constant: Tensor) -> Callable[[Tensor], None] | None:
        weight = self._seen / len(self._blocks)
        if self._mixing or not weight:
            return None

        def receive(gradient: Tensor) -> None:
            if gradient.ndim == 3 and gradient.shape[1] == self._tokens:
                self.biases = self.biases + weight * (constant * gradient).sum(dim=-1)

        return receive
