"""MDA's search: all candidates of a step in one pass against one candidate at a time, in the first steps.

A complete MDA is thousands of passes: the number follows from a formula and is printed, its time is not extrapolated.
Both ways must find the same order, and the passes of both are counted. The ratio is one of medians over interleaved
rounds. `python -m bench.mda --help`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from torch import Tensor

import aha
from aha import attributors
from aha.attributors import mda
from aha.files import write_atomically

from . import table, timing

RATIO_BAR = 1.0  # what the project asks for: never slower


def classifier(model: str, device: str) -> aha.Classifier:
    """Random weights, larger than at the start of training, so that single patches move the confidence."""
    import timm

    torch.manual_seed(0)
    module = timm.create_model(model, pretrained=False).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(2)
    side = module.default_cfg["input_size"][-1]
    return aha.Classifier.wrap(module, (0.5,) * 3, (0.5,) * 3, (side, side)).to(device)


@torch.no_grad()
def one_by_one(clf: aha.Classifier, scene: mda.Scene, prior: Tensor, window: int, steps: int) -> Tensor:
    """(B, steps) the patches that insertion shows: every candidate a copy of the image and a pass of its own."""
    orders = []
    for pixels, blurred, target, ranked in zip(
        scene.pixels, scene.blurred, scene.target, prior.argsort(dim=1, descending=True), strict=True
    ):
        shown, waiting, order = blurred.clone(), ranked.tolist(), []
        for _ in range(steps):
            scores = []
            for patch in waiting[:window]:
                candidate = torch.where(scene.cell == patch, pixels, shown)
                scores.append(clf.forward_normalized(candidate[None]).softmax(dim=-1)[0, target].item())
            best = waiting.pop(scores.index(max(scores)))
            shown = torch.where(scene.cell == best, pixels, shown)
            order.append(best)
        orders.append(order)
    return torch.tensor(orders, device=prior.device)


def measure(
    model: str = "vit_base_patch16_224",
    images: int = 1,
    steps: int = 2,
    window: int | None = None,
    internal_batch_size: int | None = None,
    device: str = "cpu",
    seconds: float = 5.0,
    rounds: int = 3,
) -> dict[str, Any]:
    """Medians in ms of both ways, the ratio, and passes per image; AssertionError if the orders differ."""
    clf = classifier(model, device)
    pixels = torch.rand(images, 3, *clf.input_size, generator=torch.Generator().manual_seed(0)).to(device)
    # no confidence reaches it: all steps insert
    method = mda.MDA(clf, prior="random", window=window, tau=1.0, internal_batch_size=internal_batch_size)
    regions = method.regions(pixels)
    prior = torch.rand(images, regions.count, generator=torch.Generator().manual_seed(1)).to(device)
    scene = method.scene(pixels, clf.resolve_target(pixels), regions)
    scene = scene._replace(original=torch.full_like(scene.original, 2.0))
    used = method.window_for(regions.count, pixels.shape[-2], 0)
    found: dict[str, Tensor] = {}
    passes: dict[str, int] = {}

    def counted(name: str, call: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            with attributors.count_passes(clf) as seen:
                found[name] = call()
            passes[name] = seen.forward

        return run

    calls = {
        "batched": counted("batched", lambda: method.search(scene, prior, used, steps).patches),
        "one by one": counted("one by one", lambda: one_by_one(clf, scene, prior, used, steps)),
    }
    taken = timing.interleaved(calls, device, seconds, rounds)
    assert torch.equal(*found.values()), f"orders differ: {found}"
    assert passes["batched"] == passes["one by one"] == images * sum(min(used, regions.count - k) for k in range(steps))
    medians = {name: times.median_ms for name, times in taken.items()}
    return {
        "model": model,
        "device": table.device_name(device),
        "images": images,
        "patches": regions.count,
        "window": used,
        "steps": steps,
        "internal_batch_size": method.internal_batch_size,
        "ms": {name: times._asdict() for name, times in taken.items()},
        "passes": passes["batched"],
        "passes_of_a_map": mda.fixed_passes(regions.count, used, pixels.shape[-2]),
        "ratio": medians["batched"] / medians["one by one"],
        "ratio_bar": RATIO_BAR,
    }


def main(
    device: Literal["cpu", "cuda"] = "cpu",
    out: Path = Path("bench/results"),
    model: str = "vit_base_patch16_224",
    images: int = 1,
    steps: int = 2,
    window: int | None = None,
    internal_batch_size: int | None = None,
    seconds: float = 5.0,
    rounds: int = 3,
) -> int:
    """Measure once; writes mda_<device>.json.

    Args:
        device: where.
        out: folder of the results.
        model: timm name of the classifier, random weights.
        images: explained together.
        steps: first steps of insertion that are taken.
        window: candidates per step; default as published.
        internal_batch_size: candidates in one pass; default by device.
        seconds: time for the rounds.
        rounds: that are run at least.
    """
    found = measure(model, images, steps, window, internal_batch_size, device, seconds, rounds)
    Console(stderr=True).print(line(found), highlight=False)
    write_atomically(out / f"mda_{device}.json", (json.dumps(found, indent=2) + "\n").encode())
    return 0


def line(found: dict[str, Any]) -> str:
    """A result in one line."""
    return (
        f"MDA, {found['model']}, B = {found['images']}, P = {found['patches']}, W = {found['window']}: "
        f"{found['steps']} steps, {found['passes']} passes, the same order; {found['internal_batch_size']} candidates "
        f"at a time take {found['ratio']:.3f} × the time of one (bar {found['ratio_bar']}); a map takes "
        f"{found['passes_of_a_map']} passes, up to {mda.BLURS} for the blur, and the prior"
    )


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
