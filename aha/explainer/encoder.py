"""Any backbone as a frozen encoder: images → four feature maps, by timm's or transformers' interface, else by hooks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..classifier import Classifier, HFLogits, dtype_of
from ..protection import protected, steady
from ..stages import LEVELS, find_stages, quarters, seen_at
from ..structure import feature_count, uniform_patch
from ..weights import load_weights, numbers, read_weights

# (encoder, images) → a context that its features are read in, for who counts passes
READING: list[Callable[[Encoder, Tensor], AbstractContextManager]] = []


class Encoder(nn.Module):
    """A frozen backbone: (B,3,H,W) RGB in [0,1] → four maps (B,C_l,h_l,w_l), shallow to deep.

    Images whose size is not a multiple of the patch (or of the deepest stride) are padded at the right and bottom by
    repeating the edge; `padded_size` says to what.

    Attributes:
        channels: C_l of the four maps.
        multiple: H and W are padded to a multiple of this many pixels.
        source: how to make it again (written into saved explainers).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        module: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        image_size: tuple[int, int],
        source: dict[str, Any],
        own: bool = True,
    ):
        super().__init__()
        self.module = module.requires_grad_(False).eval() if own else module
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.float32).clone(), persistent=False)
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.float32).clone(), persistent=False)
        self.source = source
        known = hasattr(module, "forward_intermediates") or _is_transformers(module)
        # hooks see features where they are: nothing says to what size to pad
        self.multiple = (uniform_patch(_inner(module)) or 32) if known else 1
        self.indices = _levels(module)
        device = next((value.device for value in (*module.parameters(), *module.buffers())), torch.device("cpu"))
        blank = torch.zeros(1, len(mean), *image_size, device=device)
        self.stages: list[nn.Module] | None = None
        with protected(self), torch.no_grad():
            if not known:
                # past nn.Module, which would take the parts for its own
                object.__setattr__(
                    self,
                    "stages",
                    find_stages(module, blank.expand(2, -1, -1, -1).to(self.dtype), str(source.get("name"))),
                )
            self.channels = [level.shape[1] for level in self(blank)]

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, to which pixels are cast."""
        return dtype_of(self.module)

    @property
    def guarded(self) -> nn.Module:
        """Whose lock this wrapper shares."""
        return self.module

    def padded_size(self, height: int, width: int) -> tuple[int, int]:
        """The size whose features `forward` returns."""
        return tuple(-(-side // self.multiple) * self.multiple for side in (height, width))  # type: ignore[return-value]

    def forward(self, images: Tensor) -> list[Tensor]:
        height, width = images.shape[-2:]
        full = self.padded_size(height, width)
        pixels = (images - self.mean[:, None, None]) / self.std[:, None, None]
        if full != (height, width):
            pixels = F.pad(pixels, (0, full[1] - width, 0, full[0] - height), mode="replicate")
        try:
            with steady(self.module), ExitStack() as stack:
                for context in tuple(READING):
                    stack.enter_context(context(self, images))
                levels = self._levels_of(pixels.to(self.dtype))
        except AssertionError as error:  # how timm's fixed-size models refuse
            raise ValueError(
                f"encoder {self.source.get('name')} does not take {height}×{width} images ({error}): "
                "resize them, or build the encoder for this size"
            ) from error
        return levels

    def _levels_of(self, pixels: Tensor) -> list[Tensor]:
        if self.stages is not None:
            return seen_at(self.stages, self.module, pixels)
        if isinstance(self.module, HFLogits):
            return _hf_levels(_hf_backbone(self.module.model), pixels, self.multiple)
        if _is_transformers(self.module):
            return _hf_levels(self.module, pixels, self.multiple)
        distinct = sorted(set(self.indices))  # timm returns each block once
        arguments = {"indices": distinct, "output_fmt": "NCHW", "intermediates_only": True}
        model: Any = self.module
        found = dict(zip(distinct, model.forward_intermediates(pixels, norm=True, **arguments), strict=True))
        return [found[index] for index in self.indices]

    def train(self, mode: bool = True) -> Encoder:
        """A frozen encoder stays in evaluation mode."""
        return super().train(False)


def build(
    name: str | None,
    classifier: Classifier,
    weights: str | Path | None = None,
    pretrained: bool | None = None,
    image_size: tuple[int, int] | None = None,
) -> Encoder:
    """An encoder by name.

    Args:
        name: a timm model (``"vit_large_patch16_dinov3.lvd1689m"``), a transformers one
            (``"hf:facebook/dinov2-base"``, or
            ``"hf:"`` and a local folder), or None: the classifier's own features.
        classifier: the classifier under explanation.
        weights: local file for a timm model instead of the hub.
        pretrained: load hub weights; default: yes unless ``weights`` is given.
        image_size: (H, W) it will see; default that of the classifier.
    """
    size = image_size or classifier.input_size
    if name is None:
        source: dict[str, Any] = {"kind": "classifier", "name": classifier.name}
        mean, std = classifier.mean.tolist(), classifier.std.tolist()
        return Encoder(classifier.module, mean, std, size, source, own=False)
    if name.startswith("hf:"):
        return _build_hf(name.removeprefix("hf:"), size)
    return _build_timm(name, weights, weights is None if pretrained is None else pretrained, size)


def _build_timm(name: str, weights: str | Path | None, pretrained: bool, size: tuple[int, int]) -> Encoder:
    import timm

    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}: see timm.list_models(), or write hf:… for transformers")
    try:  # transformers interpolate their position embedding to the size at hand
        module = timm.create_model(name, pretrained=pretrained, num_classes=0, dynamic_img_size=True)
    except TypeError:
        try:
            module = timm.create_model(name, pretrained=pretrained, num_classes=0, img_size=size)
        except TypeError:  # convolutional networks take any size
            module = timm.create_model(name, pretrained=pretrained, num_classes=0)
    if not hasattr(module, "forward_intermediates"):
        raise ValueError(f"timm's {name} gives no intermediate features: choose a ViT, ConvNeXt, Swin or ResNet")
    config = timm.data.resolve_model_data_config(module)
    mean, std = config["mean"], config["std"]
    if weights is not None:
        state, metadata = read_weights(weights)
        # a classifier's weights serve as encoder: its head is not needed
        load_weights(module, state, weights, surplus=("head", "fc", "classifier"))
        mean, std = numbers(metadata.get("mean"), mean), numbers(metadata.get("std"), std)
    source: dict[str, Any] = {"kind": "timm", "name": name}
    if weights is not None:
        source["weights"] = str(weights)
    if not pretrained and weights is None:
        source["pretrained"] = False
    return Encoder(module, mean, std, size, source)


def _build_hf(name: str, size: tuple[int, int]) -> Encoder:
    from transformers import AutoImageProcessor, AutoModel

    module = AutoModel.from_pretrained(name)
    try:
        processor = AutoImageProcessor.from_pretrained(name)
        mean, std = processor.image_mean, processor.image_std
    except OSError:  # weights without a preprocessor file: ImageNet's statistics, as most of them
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    return Encoder(module, mean, std, size, {"kind": "hf", "name": name})


def _is_transformers(module: nn.Module) -> bool:
    return isinstance(module, HFLogits) or hasattr(module, "base_model_prefix")


def _inner(module: nn.Module) -> nn.Module:
    return module.model if isinstance(module, HFLogits) else module


def _levels(module: nn.Module) -> list[int]:
    """Four depths: quarters of a plain ViT (DPT's 4, 11, 17, 23 for 24 blocks), the last four stages otherwise."""
    depth = feature_count(module)
    if uniform_patch(_inner(module)) is None:
        return [max(0, depth - LEVELS + i) for i in range(LEVELS)]
    return quarters(depth) if depth else []


def _hf_backbone(model: nn.Module) -> nn.Module:
    return getattr(model, getattr(model, "base_model_prefix", ""), model)


def _hf_levels(model: nn.Module, pixels: Tensor, patch: int) -> list[Tensor]:
    options = {"output_hidden_states": True}
    if "interpolate_pos_encoding" in inspect.signature(model.forward).parameters:
        options["interpolate_pos_encoding"] = True
    out = model(pixel_values=pixels, **options)
    hidden = getattr(out, "reshaped_hidden_states", None) or out.hidden_states
    if hidden[0].ndim == 4:  # hierarchical: stem and stages
        return list(hidden[-LEVELS:])
    norm = getattr(model, "layernorm", None) or getattr(model, "norm", None) or nn.Identity()
    rows, cols = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    levels = []
    for index in quarters(len(hidden) - 1):
        tokens = norm(hidden[index + 1])[:, -rows * cols :]  # class and register tokens come first
        levels.append(tokens.mT.reshape(len(tokens), -1, rows, cols))
    return levels
