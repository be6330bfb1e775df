"""Reference images: what a pixel becomes when its evidence is taken away."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

REFERENCES = ("black", "mean", "blur")
# what protocols may name besides: made for measuring, not for training
MEASURED = (*REFERENCES, "zero", "blur11", "adaptive_blur")


def black(images: Tensor) -> Tensor:
    """A black image for each: (B,C,H,W) in [0,1] → zeros of the same shape."""
    return torch.zeros_like(images)


def mean(images: Tensor, colour: Tensor) -> Tensor:
    """The data set's mean colour (C,) everywhere, for each of (B,C,H,W)."""
    return colour.to(images)[:, None, None].expand_as(images).contiguous()


def blur(images: Tensor, kernel: int = 37, sigma: float = 37.0) -> Tensor:
    """A blurred copy of each of (B,C,H,W): Gaussian, reflect padding; kernel (odd) and sigma in pixels.

    A kernel too large for the image is cut to the largest that reflect padding allows.
    """
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel={kernel}: give an odd number of pixels")
    out = images
    # a half precision convolution would make another reference under autocast
    with torch.autocast(images.device.type, enabled=False):
        for dim in (-2, -1):
            radius = min(kernel // 2, images.shape[dim] - 1)
            weights = gaussian(2 * radius + 1, sigma).to(images)
            shape = (1, 1, -1, 1) if dim == -2 else (1, 1, 1, -1)
            padding = (0, 0, radius, radius) if dim == -2 else (radius, radius, 0, 0)
            padded = F.pad(out, padding, mode="reflect")
            channels = images.shape[1]
            out = F.conv2d(padded, weights.view(shape).expand(channels, 1, *shape[2:]), groups=channels)
    return out


def gaussian(kernel: int, sigma: float) -> Tensor:
    """A Gaussian as (kernel,) weights that sum to 1; σ in pixels."""
    x = torch.arange(kernel, dtype=torch.float64) - (kernel - 1) / 2
    weights = torch.exp(-0.5 * (x / sigma) ** 2)
    return (weights / weights.sum()).float()


def adaptive_blur(
    images: Tensor,
    confidence: Callable[[Tensor, Tensor], Tensor],
    threshold: float = 0.01,
    start: int = 31,
    largest: int = 101,
    step: int = 2,
) -> tuple[Tensor, Tensor]:
    """Blur every image just enough that the classifier no longer sees the class (MDA's insertion reference).

    kernel = σ = ``start`` pixels, growing by ``step`` until the confidence falls to ``threshold``. Images that still
    hold it at ``largest`` are reported as failed.

    Args:
        images: (B, C, H, W) in [0, 1].
        confidence: maps (blurred images (N,C,H,W), their indices (N,)) to the target's probability (N,).

    Returns:
        blurred (B,C,H,W), and the kernel used per image (B,) int64, 0 where none sufficed.
    """
    blurred, kernels = images.clone(), torch.zeros(len(images), dtype=torch.int64, device=images.device)
    pending = torch.arange(len(images), device=images.device)
    for kernel in range(start, largest + 1, step):
        if not len(pending):
            break
        candidate = blur(images[pending], kernel, float(kernel))
        blurred[pending] = candidate
        done = confidence(candidate, pending) <= threshold
        kernels[pending[done]] = kernel
        pending = pending[~done]
    return blurred, kernels


def make(name: str, images: Tensor, colour: Tensor, zero: Tensor | None = None) -> Tensor:
    """The reference called ``name`` for ``images``, without a look at the classifier (so not "adaptive_blur").

    - black, mean, blur: `black`, `mean` with ``colour`` (C,), `blur`.
    - blur11: `blur` with kernel 11 and σ 5 (RISE).
    - zero: the colour ``zero`` (C,) that the classifier's normalisation turns into 0.
    """
    if name == "black":
        return black(images)
    if name == "mean":
        return mean(images, colour)
    if name == "blur":
        return blur(images)
    if name == "blur11":
        return blur(images, 11, 5.0)
    if name == "zero" and zero is not None:
        return mean(images, zero)
    raise ValueError(f"reference {name!r} is not known: choose one of {', '.join(REFERENCES)}")
