"""CUDA's tools, and the build for the GPU that is here: `python -m bench.toolkit`."""

from __future__ import annotations

import argparse
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
    """The program ``name`` of the toolkit, on PATH or not."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    return shutil.which(name) or str(Path(named) / "bin" / name)


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
