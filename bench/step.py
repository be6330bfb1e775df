"""A training step and a refinement step on a ViT: how much of them is ours, and what the objective costs beyond the
classifier.

- share: time of the operators of aha.kernels in a step ÷ time of the step, all of them and each alone. The calls that
  a step makes are recorded and replayed alone, forward and backward. A refinement step is `aha.refine` of one step.
- ratio: the objective, forward and backward, ÷ the classifier's passes that it cannot do without: forward and backward
  on the same perturbed images, forward on the two ends of the curves, nothing else.

Both are ratios of medians over interleaved rounds. `python -m bench.step --help`.
"""

from __future__ import annotations

import json
import sys
import unittest.mock
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import tyro
from rich.console import Console
from torch import Tensor

import aha
from aha import kernels
from aha.files import write_atomically
from aha.regions import grid

from . import table, timing
from .truth import why

SHARE_BAR, RATIO_BAR = 0.002, 1.1  # what the project asks for
_KINDS = {"step": "training step", "refinement": "refinement step"}


class Call(NamedTuple):
    """An operator with the arguments that it was called with, cut off from the graph that made them."""

    operator: str
    args: tuple
    kwargs: dict[str, Any]
    outputs: tuple[Tensor, ...]

    def replay(self) -> None:
        """Forward, and backward to the arguments that need it."""
        out = getattr(kernels, self.operator)(*self.args, **self.kwargs)
        leaves = [a for a in (*self.args, *self.kwargs.values()) if isinstance(a, Tensor) and a.requires_grad]
        if leaves:
            torch.autograd.grad(out, leaves, self.outputs)


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """Every call of a public operator made through the package `aha.kernels` while this is open."""
    calls: list[Call] = []
    with unittest.mock.patch.multiple(
        kernels, **{name: _recorder(name, getattr(kernels, name), calls) for name in kernels.dispatch.BACKENDS}
    ):
        yield calls


def _recorder(name: str, function: Callable, calls: list[Call]) -> Callable:
    def call(*args: Any, **kwargs: Any) -> Any:
        out = function(*args, **kwargs)
        outputs = out if isinstance(out, tuple) else (out,)
        alone = tuple(map(_detached, args)), {key: _detached(value) for key, value in kwargs.items()}
        calls.append(Call(name, *alone, tuple(o.detach() for o in outputs)))
        return out

    return call


def _detached(value: Any) -> Any:
    return value.detach().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def trainer(model: str, batch: int, fractions: int, device: str, backend: str) -> tuple[aha.Trainer, dict[str, Tensor]]:
    """A trainer on random weights and images, explaining one class on the finest grid, and a batch for it."""
    import timm

    torch.manual_seed(0)
    module = timm.create_model(model, pretrained=False).eval()
    side = module.default_cfg["input_size"][-1]
    classifier = aha.Classifier.wrap(module, (0.5,) * 3, (0.5,) * 3, (side, side)).to(device)
    explainer = aha.Explainer.build(classifier, evidence=False)
    images = torch.rand(batch, 3, side, side)
    finest = max(2, min(28, side // 4))
    config = aha.TrainConfig(
        batch_size=batch, fractions=fractions, targets=1, cells=(finest, finest), steps=1000, precision="fp32"
    )
    made = aha.Trainer(explainer, classifier, [{"image": image} for image in images], config)
    object.__setattr__(made.objective, "backend", backend)
    explainer.train()
    return made, {"image": images.to(made.accelerator.device)}


def measure(
    model: str = "vit_tiny_patch16_224",
    batch: int = 2,
    fractions: int = 16,
    device: str = "cpu",
    backend: str = "auto",
    seconds: float = 5.0,
) -> dict[str, Any]:
    """Medians in ms of the steps and their parts, shares and ratio."""
    made, data = trainer(model, batch, fractions, device, backend)
    steps: dict[str, Callable[[], object]] = {
        "step": lambda: made._train_step(data),
        "refinement": refiner(made, data["image"], backend),
    }
    calls = {}
    for kind, run in steps.items():
        with recorded() as calls[kind]:
            run()
    passes = _Passes(made, data, calls["step"])
    clocks: dict[str, Callable[[], object]] = {**steps, "objective": passes.objective, "classifier": passes.classifier}
    for kind, all_calls in calls.items():
        for operator in dict.fromkeys(call.operator for call in all_calls):
            clocks[f"{operator} of {kind}"] = _replayer([call for call in all_calls if call.operator == operator])
    taken = timing.interleaved(clocks, device, seconds, steady=False)
    medians = {name: times.median_ms for name, times in taken.items()}
    shares = {
        kind: {call.operator: medians[f"{call.operator} of {kind}"] / medians[kind] for call in calls[kind]}
        for kind in steps
    }
    return {
        "model": model,
        "device": table.device_name(device),
        "batch": batch,
        "fractions": fractions,
        "backend": backend,
        "ms": {name: times._asdict() for name, times in taken.items()},
        "calls": {kind: Counter(call.operator for call in made) for kind, made in calls.items()},
        "shares": shares,
        "share_bar": SHARE_BAR,
        "ratio": medians["objective"] / medians["classifier"],
        "ratio_bar": RATIO_BAR,
    }


def _replayer(calls: list[Call]) -> Callable[[], object]:
    return lambda: [call.replay() for call in calls]


def refiner(made: aha.Trainer, images: Tensor, backend: str) -> Callable[[], object]:
    """One step of refinement of these images by the trainer's explainer, with the curves of its objective."""
    config = made.config
    targets = [0] * len(images)
    objective = partial(aha.Objective, backend=backend)

    def refine() -> None:
        with unittest.mock.patch("aha.refinement.Objective", objective):
            aha.refine(
                made.explainer, made.classifier, images, targets, 1, fractions=config.fractions, precision="fp32"
            )

    return refine


class _Passes:
    """The objective alone, and the classifier alone on the images that the objective makes."""

    def __init__(self, made: aha.Trainer, data: dict[str, Tensor], calls: list[Call]):
        self.made, self.images = made, data["image"]
        self.regions = grid(*self.images.shape[-2:], made.config.cells[0])
        self.maps = torch.rand_like(self.images[:, :1]).requires_grad_()
        self.blank = torch.full_like(self.images, 0.5)
        self.target = torch.zeros(len(self.images), 1, dtype=torch.int64, device=self.images.device)
        self.ends = [made.classifier.normalize(images) for images in (self.images, self.blank)]
        chunks = [call.outputs for call in calls if call.operator == "perturb"]
        self.chunks = [torch.cat([half.flatten(0, 1) for half in chunk]).requires_grad_() for chunk in chunks]

    def objective(self) -> None:
        out = self.made.objective(
            self.images, self.maps, self.target, [self.blank], self.regions, tau=0.05, noise=0.0, seed=0
        )
        torch.autograd.grad(out.loss.mean(), self.maps)

    def classifier(self) -> None:
        forward = self.made.classifier.forward_normalized
        with torch.no_grad():
            for pixels in self.ends:
                forward(pixels)
        for pixels in self.chunks:
            confidence = forward(pixels).softmax(dim=-1)[:, 0].sum()
            torch.autograd.grad(confidence, pixels)


def main(
    device: Literal["cpu", "cuda"] = "cpu",
    out: Path = Path("bench/results"),
    model: str = "vit_tiny_patch16_224",
    batch: int = 2,
    fractions: int = 16,
    backends: tuple[str, ...] = ("auto",),
    seconds: float = 5.0,
) -> int:
    """Measure once per backend; writes step_<device>.json.

    Args:
        device: where.
        out: folder of the results.
        model: timm name of the classifier, random weights.
        batch: images per step.
        fractions: S, points on the curves.
        backends: of the operators, "auto" or as in `aha.kernels`.
        seconds: time for the rounds; at least five are run.
    """
    console, found, broken = Console(stderr=True), [], False
    for backend in backends:
        try:
            found.append(measure(model, batch, fractions, device, backend, seconds))
        except Exception as error:  # the other backend is still measured
            found.append({"model": model, "backend": backend, "error": why(error)})
            broken = True
        console.print(line(found[-1]), highlight=False)
    write_atomically(out / f"step_{device}.json", (json.dumps(found, indent=2) + "\n").encode())
    return int(broken)


def line(found: dict[str, Any]) -> str:
    """A result in one line."""
    if "error" in found:
        return f"step, {found['model']}, backend {found['backend']}: {found['error']}"
    shares = "; ".join(
        f"{100 * sum(parts.values()):.2f} % of a {_KINDS[kind]} (bar {100 * found['share_bar']:.1f} %: "
        + ", ".join(f"{operator} {100 * part:.2f} %" for operator, part in parts.items())
        + ")"
        for kind, parts in found["shares"].items()
    )
    return (
        f"step, {found['model']}, B = {found['batch']}, S = {found['fractions']}, backend {found['backend']}: "
        f"operators {shares}; objective {found['ratio']:.3f} × the classifier alone (bar {RATIO_BAR})"
    )


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
