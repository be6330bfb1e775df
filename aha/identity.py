"""What kept work was made from: the weights of a network, the images of a data set."""

from __future__ import annotations

import hashlib
from typing import Any

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


def data_identity(data: Any, content: bool) -> dict[str, Any]:
    """What identifies the images of a data set, in JSON types.

    Args:
        data: a data set with a method ``identity(content)``, as those of `aha.data`; of others only type and size are
            known.
        content: read all files, for results that are kept; else names, sizes and labels, for millions of images.
    """
    if hasattr(data, "identity"):
        return data.identity(content)
    return {"type": type(data).__name__, "size": len(data)}
