"""What the size of a pass and glibc's allocator do to a classifier's passes on a CPU: `python -m bench.allocator`.

Forward passes of random weights over 128 images in parts of one size, as the metrics make them. Every size is measured
in a process of its own, with glibc's allocator as it is and with `aha.memory.keep_freed`, as the command line has it.
Seconds are the process's own, and of them the system's, which clears pages; memory is the most that was resident.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import tyro

from aha import plan
from aha.classifier import from_name
from aha.files import write_atomically
from aha.memory import keep_freed

MODELS = ("tf_efficientnet_lite0", "resnet18", "vit_tiny_patch16_224")
SIZES = (1, 8, 16, 128)
IMAGES, ROUNDS = 128, 3


def measure(model: str, size: int, kept: bool) -> dict[str, Any]:
    """Milliseconds per image, and MiB, of this process."""
    if kept and not keep_freed():
        raise OSError("the allocator is not glibc's: nothing to measure")
    clf = from_name(f"random:{model}")
    pixels = torch.rand(IMAGES, len(clf.mean), *clf.input_size)
    rounds = []
    with torch.no_grad():
        clf.forward_normalized(pixels[:size])
        for _ in range(ROUNDS):
            start, system = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_stime
            for part in pixels.split(size):
                clf.forward_normalized(part)
            spent = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_stime - system
            rounds.append([1000 * value / IMAGES for value in spent])
    whole, system = (round(median(values), 1) for values in zip(*rounds, strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"model": model, "size": size, "kept": kept, "ms": whole, "system_ms": system, "peak_mib": round(peak)}


def main(
    models: tuple[str, ...] = MODELS, sizes: tuple[int, ...] = SIZES, out: Path | None = None, one: bool = False
) -> None:
    """Measure and print; run with OMP_NUM_THREADS=1 on a machine that others use too.

    Args:
        models: timm names, random weights.
        sizes: images in a pass.
        out: folder for allocator_cpu.json.
        one: the first model and the first size in this process, with KEEP_FREED=1 in the environment or without.
    """
    if one:
        print(json.dumps(measure(models[0], sizes[0], os.environ.get("KEEP_FREED") == "1")))
        return
    rows = []
    for model in models:
        for size in sizes:
            for kept in ("0", "1"):
                command = [sys.executable, "-m", "bench.allocator", "--models", model, "--sizes", str(size), "--one"]
                run = subprocess.run(
                    command, env={**os.environ, "KEEP_FREED": kept}, stdout=subprocess.PIPE, text=True, check=True
                )
                rows.append(json.loads(run.stdout))
                print(rows[-1], flush=True)
    if out is not None:
        whole = {"device": plan.device_name(torch.device("cpu")), "torch": torch.__version__, "passes": rows}
        write_atomically(out / "allocator_cpu.json", (json.dumps(whole, indent=2) + "\n").encode())


if __name__ == "__main__":
    tyro.cli(main)
