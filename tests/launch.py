"""Processes that tests start: one, or several as torchrun does."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def environment(**more):
    """Nothing that a launcher or a test of accelerate might have left, and no variable but these."""
    kept = {name: value for name, value in os.environ.items() if name.split("_")[0] not in ("ACCELERATE", "OMP")}
    return {**kept, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", **more}


def torchrun(*arguments):
    """Its command line."""
    return [sys.executable, "-m", "torch.distributed.run", *map(str, arguments)]


def several(processes):
    """What comes before a script that so many processes on this machine run."""
    return torchrun("--standalone", f"--nproc-per-node={processes}")


def finished(command, timeout=170, **more):
    """What a command has printed, and its exit code."""
    command = [*map(str, command)]
    return subprocess.run(command, env=environment(**more), capture_output=True, text=True, timeout=timeout, cwd=ROOT)
