"""What kept work was made with: the weights of a network. `aha.data.identity` says it of images."""

from __future__ import annotations

import hashlib

from torch import nn


def fingerprint(module: nn.Module) -> str:
    """Sixteen characters that differ where any value of two networks differs, batch norm statistics included.

    Wrappers do not count: a classifier has the fingerprint of its network; nor does half precision that was cast from
    equal float32 values to float32 again.
    """
    module = getattr(module, "guarded", module)
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}".encode())
        value = value.dequantize() if getattr(value, "is_quantized", False) else value
        digest.update(value.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]
