"""What is there: the device, its driver and clocks, and the versions and tools of this machine."""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys

import torch

from .. import table
from ..stages import end_with_parent, tell, version
from ..toolkit import tool

QUERY = "name,driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu,mig.mode.current"


def said(*command: str) -> str:
    """The last line of a program's output, or why there is none."""
    if shutil.which(command[0]) is None:
        return "not available: there is no such program"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=15)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not available: {type(error).__name__}"
    lines = (done.stdout + done.stderr).strip().splitlines() or [""]
    return lines[-1].strip() if done.returncode == 0 else f"not available: {lines[-1].strip()}"


def main(device: str) -> int:
    """0 if the device is there."""
    if device == "cuda":
        if not torch.cuda.is_available():
            tell("device", f"torch {torch.__version__} sees no GPU, nvidia-smi says: {said('nvidia-smi', '-L')}")
            return 2
        found = torch.cuda.get_device_properties()
        figures = {
            "capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "memory_gib": round(found.total_memory / 2**30, 1),
            "l2_mib": round(found.L2_cache_size / 2**20, 1),
            "shared_kib_per_block": found.shared_memory_per_block_optin / 1024,
        }
        tell("device", name=torch.cuda.get_device_name(), **figures)
        values = said("nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader").split(", ")
        tell("nvidia-smi", **dict(zip(QUERY.split(","), values, strict=False)))
        tools = {"nvcc": (tool("nvcc"), "--version"), "compute-sanitizer": (tool("compute-sanitizer"), "--version")}
        tools |= {"ncu": (tool("ncu"), "--version")}
        tell("tools", **{name: said(*command) for name, command in tools.items()})
    else:
        tell("device", name=table.device_name(device))
    versions = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda}
    versions |= {package: version(package) or "not available" for package in ("triton", "numpy")}
    tell("versions", **versions, kernel=platform.release(), cores=os.cpu_count())
    return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    end_with_parent()
    sys.exit(main(parser.parse_args().device))
