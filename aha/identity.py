"""What kept work was made with: the weights of a network. `aha.data.identity` says it of images."""

from __future__ import annotations

import hashlib

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
