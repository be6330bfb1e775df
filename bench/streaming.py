"""Does a comparison stream? `python -m bench.streaming 1000 10000` compares five cheap methods on that many scenes.

Each number of images runs in a process of its own, into an empty folder, and prints a line: the resident high-water
mark of the process (VmHWM), the files and bytes it leaves, the time, and the share of it that is spent in forward and
backward passes of the classifier. `--classifier` takes another one, `--points` fewer points on the curves: for a look
at memory and files alone, which passes do not change. `--profile` prints where the rest of the time goes.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from aha.attributors.specs import parse
from aha.classifier import Classifier
from aha.evaluation import compare
from aha.metrics import PROTOCOLS, Protocol
from aha.report import comparison as pages
from aha.source import Source

SMALL = "small"
METHODS = ("random", "input_x_gradient", "raw_attention", "rollout", "gradcam_vit")
OF_SMALL = ("random", "input_x_gradient", "steep@input_x_gradient", "other@random", "third@random:seed=3")


class Spent:
    """Seconds within forward and backward passes."""

    def __init__(self) -> None:
        self.seconds, self._depth, self._began = 0.0, 0, 0.0

    def begin(self, *_: Any) -> None:
        """A pass begins, perhaps within another."""
        if not self._depth:
            self._began = time.perf_counter()
        self._depth += 1

    def end(self, *_: Any) -> None:
        """A pass ends."""
        self._depth -= 1
        if not self._depth:
            self.seconds += time.perf_counter() - self._began


def _small() -> Classifier:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
    return Classifier.wrap(nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 10)), input_size=(32, 32))


@contextmanager
def measured() -> Iterator[Spent]:
    """Passes of every classifier that a `Source` loads, and all that autograd does."""
    spent = Spent()
    load, grad = Source.load_classifier, torch.autograd.grad

    def loaded(source: Source) -> Any:
        clf = _small() if source.classifier == SMALL else load(source)
        clf.module.register_forward_pre_hook(spent.begin)
        clf.module.register_forward_hook(spent.end, always_call=True)
        return clf

    def traced(*arguments: Any, **options: Any) -> Any:
        spent.begin()
        try:
            return grad(*arguments, **options)
        finally:
            spent.end()

    with ExitStack() as stack:
        for owner, name, new, old in (
            (Source, "load_classifier", loaded, load),
            (torch.autograd, "grad", traced, grad),
        ):
            setattr(owner, name, new)
            stack.callback(setattr, owner, name, old)
        yield spent


def run(images: int, folder: Path, classifier: str, points: int, profile: bool) -> dict[str, Any]:
    """One comparison in this process."""
    protocol: str | Protocol = "aha"
    if points != PROTOCOLS["aha"].points:
        protocol = Protocol("short", points=points, references=("black",))
    profiler = cProfile.Profile()
    with measured() as spent:
        started = time.perf_counter()
        if profile:
            profiler.enable()
        methods, _ = parse(OF_SMALL if classifier == SMALL else METHODS)
        done = compare([Source(classifier, limit=images)], methods, folder, (protocol,), strict=False)
        profiler.disable()
        computed = time.perf_counter() - started
        assert done is not None
        pages.write(done, folder)
        written = time.perf_counter() - started - computed
    if profile:
        pstats.Stats(profiler).sort_stats("tottime").print_stats(45)
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {
        "images": images,
        "methods": len(done.results[next(iter(done.results))].methods),
        "failures": len(done.failures),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "files": len(files),
        "mib": sum(path.stat().st_size for path in files) / 2**20,
        "seconds": computed,
        "seconds_of_pages": written,
        "classifier_share": spent.seconds / computed,
    }


def main() -> None:
    """Measure each number of images, or with --here the one that is given, in this process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=int, nargs="+")
    parser.add_argument("--classifier", default="scenes")
    parser.add_argument("--points", type=int, default=PROTOCOLS["aha"].points)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.here:
        torch.set_num_threads(1)
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(run(given.images[0], Path(folder), given.classifier, given.points, given.profile)))
        return
    options = ["--here", "--classifier", given.classifier, "--points", f"{given.points}"]
    for images in given.images:
        command = [sys.executable, "-m", "bench.streaming", f"{images}", *options, *["--profile"] * given.profile]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
