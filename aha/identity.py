"""What kept work was made with: settings, files, the weights of a network. `aha.data.identity` says it of images."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn


def fingerprint(module: nn.Module) -> str:
    """Sixteen characters that differ where any value of two networks differs, batch norm statistics included.

    The normalisation of a classifier or an encoder counts. Weights count in float32, whatever they are kept in.
    """
    digest = hashlib.sha256()
    for name in ("mean", "std"):
        if isinstance(value := getattr(module, name, None), Tensor):
            digest.update(value.detach().float().cpu().numpy().tobytes())
    module = getattr(module, "guarded", module)
    for name, value in sorted(module.state_dict().items()):
        if not isinstance(value, Tensor):  # what quantised layers pack their weights into
            digest.update(f"{name}{value}".encode())
            continue
        digest.update(f"{name}{tuple(value.shape)}".encode())
        value = value.dequantize() if getattr(value, "is_quantized", False) else value
        digest.update(value.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]


def of_settings(settings: Any) -> str:
    """Eight characters that differ where JSON-like ``settings`` differ."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:8]


def of_files(path: Path) -> str:
    """A digest of a file, or of all files below a folder."""
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
        digest.update(str(file.relative_to(path)).encode())
        with open(file, "rb") as stream:
            while part := stream.read(2**20):
                digest.update(part)
    return digest.hexdigest()
