"""Where a metric spends its time: the share inside the classifier's forward pass, for every protocol on a ViT.

One map per image is measured by `aha.metrics.Suite`; a pair of hooks on the classifier's module sums the time of its
forward passes. The rest is sorting, perturbing, softmax and areas. What `Suite.begin` does once for all methods (the
ends of the curves, blurs) is left out. Weights are random, so presets that take only images classified with
confidence take all here, and the blur that grows until the class is gone is the fixed one: both belong to
`Suite.begin`. Curves of more than `--points` points are cut to so many; as a map is sorted once, whatever the points,
shares can only be lower.

`OMP_NUM_THREADS=2 python -m bench.metrics` writes bench/results/metrics_cpu.json.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

import aha
from aha.files import write_atomically
from aha.metrics import PROTOCOLS, Suite

from . import table

SHARE_BAR = 0.9  # what the project asks for
RESULTS = Path(__file__).parent / "results"


class ForwardTimer:
    """Sums the seconds between the start and the end of a module's forward passes."""

    def __init__(self, module: torch.nn.Module, device: torch.device):
        self.seconds, self.images, self._device, self._started = 0.0, 0, device, 0.0
        self._hooks = [module.register_forward_pre_hook(self._start), module.register_forward_hook(self._stop)]

    def _start(self, _module: torch.nn.Module, args: tuple[Any, ...]) -> None:
        self.images += len(args[0])
        self._started = clock(self._device)

    def _stop(self, *_: Any) -> None:
        self.seconds += clock(self._device) - self._started

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()


def clock(device: torch.device) -> float:
    """Seconds, once the device has nothing left to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _fixed(references: tuple[str, ...] | None) -> tuple[str, ...] | None:
    return references and tuple(name.replace("adaptive_blur", "blur") for name in references)


def measure(clf: aha.Classifier, name: str, batch: int, size: int, points: int) -> dict[str, Any]:
    """Seconds of `Suite.measure` and of the forward passes inside it, for one map of each of ``batch`` images."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch, 3, *clf.input_size, generator=generator).to(clf.device)
    maps = torch.randn(batch, 1, *clf.input_size, generator=generator).to(clf.device)
    masks = torch.rand(batch, 1, *clf.input_size, generator=generator).to(clf.device) < 0.3
    preset = PROTOCOLS[name]
    plain = {key: _fixed(getattr(preset, key)) for key in ("references", "deletion", "insertion")}
    found = len(preset.counts(*clf.input_size))
    protocol = dataclasses.replace(preset, confidence=None, points=min(points, found), **plain)
    suite = Suite(clf, protocol, internal_batch_size=size)
    labels = torch.zeros(batch, dtype=torch.int64)
    shared = suite.begin(images, labels=labels, masks=masks)
    suite.measure(suite.begin(images[:1], labels=labels[:1], masks=masks[:1]), maps[:1])  # warm-up
    timer = ForwardTimer(clf.module, clf.device)
    try:
        started = clock(clf.device)
        suite.measure(shared, maps)
        seconds = clock(clf.device) - started
    finally:
        timer.remove()
    return {
        "points": protocol.points,
        "forward_passes_per_image": timer.images / batch,
        "seconds_per_image": seconds / batch,
        "outside_ms_per_image": 1000 * (seconds - timer.seconds) / batch,
        "share": timer.seconds / seconds if timer.images else None,
    }


def main(
    model: str = "vit_tiny_patch16_224",
    protocols: tuple[str, ...] = tuple(PROTOCOLS),
    batch: int = 1,
    internal_batch_size: int = 32,
    points: int = 21,
    device: str = "cpu",
    out: Path | None = None,
) -> int:
    """Measure and print the shares, and write them down.

    Args:
        model: a timm name; weights are random, time does not depend on them.
        protocols: presets to measure.
        batch: images.
        internal_batch_size: perturbed images in one forward pass.
        points: of a curve at most.
        device: cpu or cuda.
        out: the file; None is bench/results/metrics_<device>.json.
    """
    torch.manual_seed(0)
    clf = aha.Classifier.from_timm(model, pretrained=False).to(device)
    rows = {name: measure(clf, name, batch, internal_batch_size, points) for name in protocols}
    shown = Table(title=f"{model}, {table.device_name(device)}: time of one map inside the classifier's forward pass")
    for heading in ("protocol", "forward/image", "s/image", "outside ms/image", "share"):
        shown.add_column(heading, justify="left" if heading == "protocol" else "right")
    for name, row in rows.items():
        share = "no pass" if row["share"] is None else f"{100 * row['share']:.1f} %"
        numbers = f"{row['forward_passes_per_image']:.0f}", f"{row['seconds_per_image']:.3f}"
        shown.add_row(name, *numbers, f"{row['outside_ms_per_image']:.1f}", share)
    Console().print(shown)
    facts = {"model": model, "device": table.device_name(device), "bar": SHARE_BAR, **table.made()}
    sizes = {"batch": batch, "internal_batch_size": internal_batch_size}
    text = json.dumps({**facts, **sizes, "protocols": rows}, indent=2, ensure_ascii=False)
    write_atomically(out or RESULTS / f"metrics_{torch.device(device).type}.json", f"{text}\n".encode())
    below = [name for name, row in rows.items() if row["share"] is not None and row["share"] < SHARE_BAR]
    if below:
        print(f"below {SHARE_BAR:.0%}: {', '.join(below)}", file=sys.stderr)
    return bool(below)


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
