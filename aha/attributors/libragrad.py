"""LibraGrad: other methods with gradients that account for the whole logit (`aha.libra`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..classifier import Classifier
from ..libra import libra
from .base import MEASURED, Attributor, Metadata, available, create, register
from .gradient import InputXGradient
from .passes import Passes


class _PixelsXGradient(InputXGradient):
    """Σ_c x_c·∂logit_t/∂x_c of normalised pixels, its sign kept unless ``signed=False``."""

    name = "libragrad's input_x_gradient"

    def __init__(self, clf: Classifier, signed: bool = True, **options: Any):
        super().__init__(clf, **options)
        self.signed = signed

    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        pixels = self.clf.normalize(images).requires_grad_()
        score = self.clf.forward_normalized(pixels).gather(1, target[:, None]).sum()
        (gradient,) = torch.autograd.grad(score, pixels)
        maps = (pixels.detach() * gradient).sum(dim=1, keepdim=True)
        return self.smoothed(maps if self.signed else maps.abs())


# base → its name in the registry and the options that make it the variant that takes gradients
_BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "attcam": ("attcam", {}),
    "chefer": ("chefer", {"relevance": "gradient"}),
    "fullgrad_plus": ("fullgrad_plus", {}),
    "gradcam": ("gradcam", {}),
    "gradcam_vit": ("gradcam_vit", {}),
    "integrated_gradients": ("integrated_gradients", {}),
}
BASES = ("input_x_gradient", *_BASES)


@register("libragrad")
class LibraGrad(Attributor):
    """A gradient method with the gradients of `libra`, whose input×gradient and bias terms sum to the logit.

    Args:
        base: the method. ``input_x_gradient`` is Σ_c x_c·∂logit_t/∂x_c of the *normalised* pixels with its sign, the
            terms of the completeness relation, unlike the method of that name; its options are ``signed`` (False:
            the absolute value) and ``smooth``. The others are the methods of the registry; a base that reads tokens
            or attention accepts what it accepts alone.
        options: of the base.

    On 12 photographs and a ViT-Tiny (11 points, three references) insertion − deletion ↑ was .407 with
    ``fullgrad_plus`` (without the rules .072), .388 with ``attcam`` (.201; .380 and .185 with variant="readout") and
    .240 with ``gradcam_vit`` (.100); .259 with ``input_x_gradient``, .216 for its absolute value and .307 with
    ``smooth=4``, against .101 for the registered method of that name (.143 smoothed).

    Raises:
        ValueError: for an unknown base, or a classifier with an operation that has no rule, found by one pass over a
            blank image.
    """

    looks_inside = True
    metadata = Metadata(
        paper="Mehri et al., CVPR 2025",
        cost="that of the base: 1F 1B",
        architectures="any made of operations with a rule (ViT, DeiT, BEiT, EVA, DINOv3, Swin, MLP-Mixer, ConvNeXt, "
        "ResNet and others)",
        licence="from the paper's abstract; the rules are derived from FullGrad-completeness",
        notes="rules per operation; gates, GRN, group and L2 norms by the same principle as the paper's. "
        "input_x_gradient takes normalised pixels and keeps the sign. Under the rules integrated_gradients no longer "
        "sums to the change of the logit: gradients with parts left out are not those of any function. chefer is its "
        "gradient variant",
        fidelity=f"base=fullgrad_plus {MEASURED}; base=attcam rebuilt from the authors' definition; the other bases by "
        "the same rules, equal to autograd by hand",
    )

    def __init__(self, clf: Classifier, base: str = "input_x_gradient", **options: Any):
        shared = {k: options[k] for k in ("internal_batch_size", "seed") if k in options}
        super().__init__(clf, **shared)
        if base not in BASES:
            raise ValueError(f"base={base!r} is not known: choose one of {', '.join(BASES)}")
        self.base = base
        if base in _BASES:
            name, defaults = _BASES[base]
            if name not in available():
                raise ValueError(f"base={base!r} needs the method {name!r}, which is not registered: choose another")
            self._method = create(name, clf, **{**defaults, **options})
        else:
            self._method = _PixelsXGradient(clf, **options)
        place = next(clf.module.parameters(), clf.mean)
        with libra(clf.module):
            blank = torch.zeros(1, len(clf.mean), *clf.input_size, device=place.device, dtype=place.dtype)
            clf.module(blank.requires_grad_())

    def passes(self, images: Tensor) -> Passes:
        return self._method.passes(images)

    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        with libra(self.clf.module):
            return self._method._attribute(images, target)
