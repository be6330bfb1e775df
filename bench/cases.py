"""What is measured: one case per public operator, and the sizes it is measured at.

A case knows how to make inputs for a size, how to call the operator, and its truth: the float64 reference on the same
float32 inputs. Benchmarks and tests share this registry.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch
from torch import Tensor

from aha import kernels
from aha.regions import grid

Inputs = dict[str, Any]
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Size:
    """How large a call is.

    Attributes:
        name: the column "case" of the results.
        B: images; K: regions; T: Sinkhorn iterations; S: fractions, both ends included.
        tau, noise: temperature and scale of the Gumbel noise.
        side: height and width of the images in pixels.
        dtype: of images and outputs of the perturbing operators.
    """

    name: str
    B: int
    K: int
    T: int = 30
    S: int = 16
    tau: float = 0.3
    noise: float = 0.0
    side: int = 224
    dtype: torch.dtype = torch.float32

    def generator(self) -> torch.Generator:
        """The source of all inputs: the same numbers on every device."""
        return torch.Generator().manual_seed(self.B * 10_007 + self.K)


@dataclass(frozen=True)
class Case:
    """One operator.

    Attributes:
        operator: its name in `aha.kernels`.
        fields: the attributes of `Size` that matter to it.
        make: (size) → its keyword arguments, on the CPU.
        differentiable: those that get a gradient; all hold one entry per image.
        others: further arguments with one entry per image.
        matrices: how many (B, K, K) tensors its reference keeps for the backward pass, given T; None: no such tensors.
    """

    operator: str
    fields: tuple[str, ...]
    make: Callable[[Size], Inputs]
    differentiable: tuple[str, ...]
    others: tuple[str, ...] = ()
    matrices: Callable[[int], int] | None = None

    def inputs(self, size: Size, device: torch.device | str = "cpu") -> Inputs:
        """Keyword arguments of the operator on ``device``."""
        moved = {}
        for name, value in self.make(size).items():
            moved[name] = value.to(device) if isinstance(value, Tensor | kernels.Upsampler) else value
        return moved

    def call(self, inputs: Inputs, backend: str = "auto") -> Outputs:
        """The operator's outputs, always as a tuple."""
        out = getattr(kernels, self.operator)(**inputs, backend=backend)
        return out if isinstance(out, tuple) else (out,)

    def explain(self, inputs: Inputs) -> list[kernels.Choice]:
        """Which backends can run this call."""
        return kernels.explain(self.operator, **inputs)

    def first(self, inputs: Inputs, images: int) -> Inputs:
        """The inputs of the first ``images`` images; their noise is the same, as it is numbered by image."""
        per_image = (*self.differentiable, *self.others)
        return {name: value[:images] if name in per_image else value for name, value in inputs.items()}

    def truth(
        self, inputs: Inputs, cotangents: Sequence[Tensor], backend: str = "reference"
    ) -> tuple[Outputs, Outputs]:
        """Outputs and gradients in float64, of the reference unless another backend is named."""
        exact = self._doubled(inputs)
        return self.gradients(lambda given: self.call(given, backend), exact, [c.double() for c in cotangents])

    def linear(self, inputs: Inputs) -> str | None:
        """The backend that computes this call in float64 without a matrix, if there is one."""
        plans = {choice.backend: choice.plan or "" for choice in self.explain(self._doubled(inputs))}
        return next((name for name, plan in plans.items() if plan.startswith("blocks:")), None)

    def _doubled(self, inputs: Inputs) -> Inputs:
        return {name: value.double() if name in self.differentiable else value for name, value in inputs.items()}

    def gradients(
        self, run: Callable[[Inputs], Outputs], inputs: Inputs, cotangents: Sequence[Tensor]
    ) -> tuple[Outputs, Outputs]:
        """One forward and backward pass of ``run``: its outputs, and the gradients of the differentiable inputs."""
        leaves = {name: inputs[name].detach().requires_grad_() for name in self.differentiable}
        outputs = run({**inputs, **leaves})
        gradients = torch.autograd.grad(outputs, list(leaves.values()), list(cotangents))
        return tuple(o.detach() for o in outputs), gradients

    def cotangents(self, outputs: Outputs, batch: int) -> list[Tensor]:
        """Gradients to send backward for ``batch`` images, shaped like the outputs of any number of images."""
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(batch, *o.shape[1:], generator=generator).to(o) for o in outputs]

    def reference_bytes(self, size: Size, bytes_per_value: int = 4) -> int:
        """An estimate of what the reference keeps for its backward pass."""
        if self.matrices is None:
            return 12 * size.B * size.S * 3 * size.side**2 * bytes_per_value
        return self.matrices(size.T) * size.B * size.K**2 * bytes_per_value


def _scores(size: Size) -> Tensor:
    # mean and spread that the training objective gives to the maps it ranks
    return 0.5 + 0.29 * torch.randn(size.B, size.K, generator=size.generator())


def _ranking(size: Size) -> Inputs:
    return {"tau": size.tau, "n_iters": size.T, "noise": size.noise, "seed": 7}


def _fractions(size: Size) -> Tensor:
    return torch.linspace(0, 1, size.S, dtype=torch.float64)[1:-1]


def _logits(size: Size) -> Tensor:
    ranks = torch.linspace(1, 0, size.K)
    return -((_scores(size)[:, None, :] - ranks[:, None]) ** 2) / size.tau


def _soft_topk_masks(size: Size) -> Inputs:
    return {"scores": _scores(size), "fractions": _fractions(size), **_ranking(size)}


def _gumbel_sinkhorn(size: Size) -> Inputs:
    return {"scores": _scores(size), **_ranking(size)}


def _log_sinkhorn(size: Size) -> Inputs:
    return {"logits": _logits(size), "n_iters": size.T}


def _cumulative_masks(size: Size) -> Inputs:
    return {"permutation": _logits(size).softmax(dim=1), "fractions": _fractions(size)}


def _values(size: Size) -> Inputs:
    return {"values": torch.randn(size.B, size.K, generator=size.generator()), **_ranking(size)}


def _topk(size: Size) -> Inputs:
    return {**_values(size), "k": max(1, size.K // 4)}


def _pictures(size: Size) -> Inputs:
    generator = size.generator()
    shape = (size.B, 3, size.side, size.side)
    pair = {name: torch.rand(shape, generator=generator).to(size.dtype) for name in ("images", "references")}
    return {**pair, "mean": torch.tensor([0.485, 0.456, 0.406]), "std": torch.tensor([0.229, 0.224, 0.225])}


def _perturb(size: Size) -> Inputs:
    rows = next(n for n in range(int(size.K**0.5), 0, -1) if size.K % n == 0)
    masks = torch.rand(size.B, size.S, size.K, generator=size.generator())
    upsampler = grid(size.side, size.side, (rows, size.K // rows)).upsampler()
    return {**_pictures(size), "masks": masks, "upsampler": upsampler}


def _perturb_by_rank(size: Size) -> Inputs:
    pixels = size.side**2
    order = torch.rand(size.B, pixels, generator=size.generator()).argsort(dim=1)
    counts = torch.linspace(0, pixels, size.S, dtype=torch.float64).round().int()
    ranks = order.int().view(size.B, size.side, size.side)
    return {**_pictures(size), "ranks": ranks, "counts": counts}


_SORTING = ("B", "K", "T", "tau", "noise")
_PIXELS = ("images", "references")


def _unrolled(iterations: int) -> int:
    return 2 * iterations + 6


CASES: dict[str, Case] = {
    case.operator: case
    for case in (
        Case("soft_topk_masks", (*_SORTING, "S"), _soft_topk_masks, ("scores",), matrices=_unrolled),
        Case("perturb", ("B", "K", "S", "dtype"), _perturb, (*_PIXELS, "masks")),
        Case("perturb_by_rank", ("B", "S", "dtype"), _perturb_by_rank, _PIXELS, ("ranks",)),
        Case("gumbel_sinkhorn", _SORTING, _gumbel_sinkhorn, ("scores",), matrices=_unrolled),
        Case("log_sinkhorn", ("B", "K", "T", "tau"), _log_sinkhorn, ("logits",), matrices=_unrolled),
        Case("cumulative_masks", ("B", "K", "S"), _cumulative_masks, ("permutation",), matrices=lambda _: 3),
        Case("soft_sort", _SORTING, _values, ("values",), matrices=_unrolled),
        Case("soft_rank", _SORTING, _values, ("values",), matrices=_unrolled),
        Case("soft_topk", _SORTING, _topk, ("values",), matrices=_unrolled),
    )
}
HEADLINES = ("soft_topk_masks", "perturb", "perturb_by_rank")  # what a training step and an evaluation call

SWEEPS = ("the", "selection", "all")
_K = (49, 100, 196, 400, 784, 1024, 2048, 4096)
_LARGE = (224**2, 2**16, 2**18, 2**20)  # every pixel of an image; sizes four times as large as the one before
_B = (1, 8, 32, 128)
_TAU = (1.0, 0.3, 0.1, 0.01)
TINY = Size("tiny", B=2, K=9, T=4, S=5, side=12)


def the(device: str) -> Size:
    """The size that figures are quoted for: B = 8 on a CPU, 32 on a GPU; K = 784, T = 30, S = 16, no noise."""
    return Size("the", B=32 if device == "cuda" else 8, K=784)


def sizes(operator: str, device: str, sweep: str) -> list[Size]:
    """The sizes of ``operator`` in a sweep: "the" (one), "selection" (minutes) or "all" (the whole grid)."""
    if sweep not in SWEEPS:
        raise ValueError(f"sweep={sweep!r} is not known: choose one of {', '.join(SWEEPS)}")
    chosen = the(device)
    if operator not in HEADLINES:
        # the others are parts or relatives of the headlines: a moderate size will do on a CPU, no grid anywhere
        chosen = chosen if device == "cuda" else replace(chosen, name="moderate", K=196)
        sweep = "the" if sweep == "the" else "selection"
    found = [chosen]
    if sweep != "the" and device == "cuda":
        found += [replace(chosen, name="sweep", K=k) for k in _K]
        found += [replace(chosen, name="noise", noise=1.0), replace(chosen, name="half", dtype=torch.bfloat16)]
    elif sweep != "the" and operator == "soft_topk_masks":
        found += [Size("sweep", B=1, K=k) for k in (49, 196, 784)]
        found += [Size("noise", B=8, K=196, noise=1.0)]
        found += [replace(chosen, name="temperature", tau=tau) for tau in (0.05, 0.005)]
        found += [Size("temperature", B=8, K=196, tau=0.05), Size("temperature", B=1, K=4096, tau=0.05)]
        found += [Size("large", B=1, K=k, tau=0.05) for k in _LARGE]
    if sweep == "all":
        found += [Size("sweep", B=b, K=k, tau=t, noise=n) for k, b, t, n in product(_K, _B, _TAU, (0.0, 1.0))]
    # what does not matter to the operator cannot tell two sizes apart
    unique: dict[tuple, Size] = {}
    for size in found:
        unique.setdefault(tuple(getattr(size, field) for field in CASES[operator].fields), size)
    return list(unique.values())
