"""`aha.attribute`: from any torch module to a map in one call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .checks import check_images, checked
from .classifier import Classifier
from .explainer import Explainer
from .refinement import refine

# what networks trained on ImageNet expect unless they say otherwise, torchvision's among them
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@checked
def attribute(
    model: nn.Module,
    images: Tensor,
    target: Tensor | Sequence[int] | int | None = None,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    preset: str | None = None,
) -> Tensor:
    """Which pixels made ``model`` decide as it did, by the explainer that ships: nothing is trained.

    >>> model = timm.create_model("resnet50", pretrained=True)
    >>> maps = aha.attribute(model, images)         # (B,3,H,W) in [0,1] -> (B,1,H,W), higher = more important

    For many calls keep what it makes: `aha.Classifier`, and `aha.Explainer.universal` of it.

    Args:
        model: any classifier from (B,C,H,W) to logits, of torchvision, timm, transformers or your own, or an
            `aha.Classifier`. It is run in evaluation mode, and left as it was.
        images: (B,C,H,W) in [0,1], not normalised, of a size that the model takes.
        target: class per image, one int for all, or None: the model's prediction.
        mean, std: of the model's normalisation, for pixels in [0,1]; 0 and 1 for a model that normalises by itself.
            Default: what a timm model says of itself, else ImageNet's.
        preset: "fast", "default" or "best": refine the maps on the images at hand with that many passes, see
            `aha.refine`. None: one forward and one backward pass.

    Returns:
        (B,1,H,W) float32 maps.

    Raises:
        ValueError: in one line, for a model, images or targets outside the contract.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}: give a torch.nn.Module from pixels to logits")
    with _as_it_was(model):
        clf = model if isinstance(model, Classifier) else _wrapped(model, images, mean, std)
        explainer = Explainer.universal(clf)
        if preset is not None:
            return refine(explainer, clf, images.to(clf.device), target, preset=preset)
        return explainer.attribute(images.to(clf.device), target)


def _wrapped(model: nn.Module, images: Tensor, mean: Sequence[float] | None, std: Sequence[float] | None) -> Classifier:
    said: Any = getattr(model, "pretrained_cfg", None) or {}
    mean = mean or said.get("mean") or MEAN
    std = std or said.get("std") or STD
    check_images(images, len(mean))
    return Classifier.wrap(model, mean, std, (images.shape[-2], images.shape[-1]))


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Modes and requests for gradients as they were before."""
    modes = [(module, module.training) for module in model.modules()]
    asked = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for parameter, requires_grad in asked:
            parameter.requires_grad_(requires_grad)
