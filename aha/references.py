"""Reference images: what a pixel becomes when its evidence is taken away."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import MOST_SIDE, check_integer, check_number, check_pixels, checked
from .kernels.messages import describe, short

REFERENCES = ("black", "mean", "blur")
# what protocols may name besides: made for measuring, not for training
MEASURED = (*REFERENCES, "zero", "blur11", "adaptive_blur")


@checked
def black(images: Tensor) -> Tensor:
    """A black image for each: (B,C,H,W) in [0,1] → zeros of the same shape."""
    check_pixels("images", images)
    return torch.zeros_like(images)


@checked
def mean(images: Tensor, colour: Tensor) -> Tensor:
    """The data set's mean colour (C,) everywhere, for each of (B,C,H,W)."""
    check_pixels("images", images)
    return _per_channel("colour", colour, images).expand_as(images).contiguous()


@checked
def blur(images: Tensor, kernel: int = 37, sigma: float = 37.0) -> Tensor:
    """A blurred copy of each of (B,C,H,W): Gaussian, reflect padding; kernel (odd) and sigma in pixels.

    A kernel too large for the image is cut to the largest that reflect padding allows.
    """
    check_pixels("images", images)
    kernel, sigma = _check_filter(kernel, sigma)
    radii = [min(kernel // 2, side - 1) for side in images.shape[-2:]]
    return _filtered(images, [gaussian(2 * radius + 1, sigma) for radius in radii], "reflect")


@checked
def published_blur(images: Tensor, zero: Tensor, kernel: int, sigma: float) -> Tensor:
    """The blur that RISE, MDA and others publish with: `impulse_response` over normalised pixels, padded with zeros.

    Whatever the normalisation's std, that is the filter over pixels padded with ``zero``, the colour that becomes 0.

    Args:
        images: (B, C, H, W) in [0, 1].
        zero: (C,) mean of the normalisation.
        kernel: side of the filter in pixels, odd; it may be larger than the image.
        sigma: in pixels.

    Returns:
        (B, C, H, W) in [0, 1].
    """
    check_pixels("images", images)
    weights = impulse_response(kernel, sigma)
    offset = _per_channel("zero", zero, images)
    # rounding may leave [0, 1]
    return (_filtered(images - offset, [weights, weights], "constant") + offset).clamp(0, 1)


def _check_filter(kernel: int, sigma: float) -> tuple[int, float]:
    if check_integer("kernel", kernel, 1, MOST_SIDE) % 2 == 0:
        raise ValueError(f"kernel={kernel}: give an odd number of pixels")
    if check_number("sigma", sigma, 0, above=True) > MOST_SIDE:
        raise ValueError(f"sigma={short(sigma)}: give at most {MOST_SIDE} pixels")
    return int(kernel), float(sigma)


def _per_channel(name: str, values: Tensor, images: Tensor) -> Tensor:
    if tuple(values.shape) != (images.shape[1],) or not torch.isfinite(values).all():
        raise ValueError(f"{name} is {describe(values)}: give ({images.shape[1]},) finite numbers, one per channel")
    return values.to(images)[:, None, None]


def _filtered(images: Tensor, kernels: Sequence[Tensor], padding: str) -> Tensor:
    """(B,C,H,W) with one filter along the columns and one along the rows; ``padding`` as torch's `pad` names it."""
    out, channels = images, images.shape[1]
    # a half precision convolution would make another reference under autocast
    with torch.autocast(images.device.type, enabled=False):
        for dim, weights in zip((-2, -1), kernels, strict=True):
            radius = len(weights) // 2
            shape = (1, 1, -1, 1) if dim == -2 else (1, 1, 1, -1)
            sides = (0, 0, radius, radius) if dim == -2 else (radius, radius, 0, 0)
            kernel = weights.to(images).view(shape).expand(channels, 1, *shape[2:])
            out = F.conv2d(F.pad(out, sides, mode=padding), kernel, groups=channels)
    return out


@checked
def gaussian(kernel: int, sigma: float) -> Tensor:
    """A Gaussian as (kernel,) weights that sum to 1; σ in pixels."""
    kernel, sigma = _check_filter(kernel, sigma)
    x = torch.arange(kernel, dtype=torch.float64) - (kernel - 1) / 2
    weights = torch.exp(-0.5 * (x / sigma) ** 2)
    return (weights / weights.sum()).float()


@checked
def impulse_response(kernel: int, sigma: float) -> Tensor:
    """What a Gaussian filter of σ makes of an impulse amid ``kernel`` cells: (kernel,) float64, of sum 1.

    The Gaussian is cut at 4σ and reflected at the ends of the cells, edges included, as `scipy.ndimage.gaussian_filter`
    does by default. With σ as wide as the kernel nearly all cells weigh the same.
    """
    kernel, sigma = _check_filter(kernel, sigma)
    radius = int(4 * sigma + 0.5)
    x = torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (x.double() / sigma) ** 2)
    cells = (x + kernel // 2) % (2 * kernel)  # to the right and back again
    cells = torch.minimum(cells, 2 * kernel - 1 - cells)
    return torch.zeros(kernel, dtype=torch.float64).index_add_(0, cells, weights / weights.sum())


@checked
def adaptive_blur(
    images: Tensor,
    confidence: Callable[[Tensor, Tensor], Tensor],
    zero: Tensor,
    threshold: float = 0.01,
    start: int = 31,
    largest: int = 101,
    step: int = 2,
) -> tuple[Tensor, Tensor]:
    """Blur every image just enough that the classifier no longer sees the class (MDA's insertion reference).

    `published_blur` of kernel = σ = ``start`` pixels, growing by ``step`` until the confidence falls to ``threshold``.
    Images that still hold it at ``largest`` are reported as failed.

    Args:
        images: (B, C, H, W) in [0, 1].
        confidence: maps (blurred images (N,C,H,W), their indices (N,)) to the target's probability (N,).
        zero: (C,) mean of the classifier's normalisation.

    Returns:
        blurred (B,C,H,W), and the kernel used per image (B,) int64, 0 where none sufficed.
    """
    check_pixels("images", images)
    for name, value in (("start", start), ("largest", largest)):
        if check_integer(name, value, 1, MOST_SIDE) % 2 == 0:
            raise ValueError(f"{name}={value}: give an odd number of pixels")
    if check_integer("step", step, 2) % 2:
        raise ValueError(f"step={step}: give an even number of pixels, for kernels are odd")
    blurred, kernels = images.clone(), torch.zeros(len(images), dtype=torch.int64, device=images.device)
    pending = torch.arange(len(images), device=images.device)
    for kernel in range(start, largest + 1, step):
        if not len(pending):
            break
        candidate = published_blur(images[pending], zero, kernel, float(kernel))
        blurred[pending] = candidate
        done = confidence(candidate, pending) <= threshold
        kernels[pending[done]] = kernel
        pending = pending[~done]
    return blurred, kernels


@checked
def make(name: str, images: Tensor, colour: Tensor, zero: Tensor | None = None) -> Tensor:
    """The reference called ``name`` for ``images``, without a look at the classifier (so not "adaptive_blur").

    - black, mean, blur: `black`, `mean` with ``colour`` (C,), `blur`.
    - zero: the colour ``zero`` (C,) that the classifier's normalisation turns into 0.
    - blur11: `published_blur` with kernel 11 and σ 5 (RISE).
    """
    if name == "black":
        return black(images)
    if name == "mean":
        return mean(images, colour)
    if name == "blur":
        return blur(images)
    if name == "zero" and zero is not None:
        return mean(images, zero)
    if name == "blur11" and zero is not None:
        return published_blur(images, zero, 11, 5.0)
    raise ValueError(f"reference {name!r} is not known: choose one of {', '.join(REFERENCES)}")
