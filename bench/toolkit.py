"""CUDA's tools, and the build for the GPU that is here: `python -m bench.toolkit`."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from . import ROOT
from .stages import end_with_parent, tell

# memory that PyTorch keeps for later would hide from compute-sanitizer where an allocation ends
NO_CACHE = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def tool(name: str) -> str:
    """The program ``name``: on PATH, of the toolkit, or of what triton ships; where the toolkit has it if nowhere."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    folders = [Path(home) / "bin"]
    if triton := importlib.util.find_spec("triton"):  # not imported: that takes seconds
        folders += [Path(folder) / "backends/nvidia/bin" for folder in triton.submodule_search_locations or ()]
    places = os.pathsep.join([os.environ.get("PATH", os.defpath), *map(str, folders)])
    return shutil.which(name, path=places) or str(folders[0] / name)


def build() -> bool:
    """Compile the extensions in place for this GPU alone: all that are supported take several times as long."""
    import torch

    target = os.environ.get("TORCH_CUDA_ARCH_LIST") or "{}.{}".format(*torch.cuda.get_device_capability())
    environment = {**os.environ, "AHA_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": target}
    start = time.monotonic()
    done = subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT, env=environment)
    seconds = round(time.monotonic() - start, 1)
    if done.returncode:
        return tell("build", f"failed: exit status {done.returncode}", target=target, seconds=seconds)
    from aha.kernels import native

    reasons = [native.load(name) for name in ("_C", "_C_cuda")]
    return tell("build", next((f"failed: {why}" for why in reasons if why), "ok"), target=target, seconds=seconds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cuda"], default="cuda")
    parser.parse_args()
    end_with_parent()
    sys.exit(not build())
