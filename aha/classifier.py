"""The frozen classifier under explanation. Public images are RGB in [0, 1]; it owns its normalisation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checks import check_images, check_target

RANDOM = "random:"


class Classifier(nn.Module):
    """A frozen image classifier: (B, C, H, W) RGB in [0, 1] → (B, classes) logits.

    Make one with `from_timm`, `from_hf` or `wrap`. Parameters are frozen and the module stays in evaluation mode;
    gradients still flow to the images.

    Attributes:
        module: the network on normalised pixels.
        mean, std: (C,) of its normalisation; the mean is also the colour of the "mean" reference unless given.
        input_size: (H, W) it was made for.
        num_classes: number of classes.
        class_names: one per class, or None.
        source: how to make it again (written into saved explainers), e.g. ``{"kind": "timm", "name": …}``.
    """

    mean: Tensor
    std: Tensor
    mean_colour: Tensor

    def __init__(
        self,
        module: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        input_size: tuple[int, int],
        num_classes: int,
        class_names: Sequence[str] | None = None,
        mean_colour: Sequence[float] | None = None,
        source: dict[str, Any] | None = None,
    ):
        super().__init__()
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(f"{len(class_names)} class names for {num_classes} classes: give one per class")
        self.module = module.requires_grad_(False).eval()
        for name, value in (("mean", mean), ("std", std), ("mean_colour", mean_colour or mean)):
            # cloned: one tensor registered twice would confuse safetensors and DDP
            self.register_buffer(name, torch.as_tensor(value, dtype=torch.float32).clone(), persistent=False)
        self.input_size = input_size
        self.num_classes = num_classes
        self.class_names = list(class_names) if class_names is not None else None
        self.source = source or {"kind": "module", "name": type(module).__name__}

    @property
    def name(self) -> str:
        """A short name for tables and messages."""
        return str(self.source.get("name", type(self.module).__name__))

    @property
    def device(self) -> torch.device:
        return self.mean.device

    @classmethod
    def wrap(
        cls,
        module: nn.Module,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        input_size: tuple[int, int] = (224, 224),
        num_classes: int | None = None,
        **options: Any,
    ) -> Classifier:
        """Wrap any module that maps normalised (B,C,H,W) to logits (B,classes)."""
        if num_classes is None:
            parameter = next(module.parameters(), None)
            device = parameter.device if parameter is not None else "cpu"
            with torch.no_grad():
                num_classes = module.eval()(torch.zeros(1, len(mean), *input_size, device=device)).shape[1]
        made = cls(module, mean, std, input_size, num_classes, **options)
        parameter = next(module.parameters(), None)
        return made.to(parameter.device) if parameter is not None else made

    @classmethod
    def from_timm(
        cls,
        name: str,
        weights: str | Path | None = None,
        pretrained: bool | None = None,
        class_names: Sequence[str] | None = None,
        **model_options: Any,
    ) -> Classifier:
        """A timm model by name.

        Args:
            name: e.g. ``"vit_base_patch16_224.orig_in21k_ft_in1k"``.
            weights: local .safetensors or .pth file instead of the hub; half precision is cast to float32. A
                safetensors file
                may carry ``mean`` and ``std`` in its metadata.
            pretrained: load hub weights; default: yes unless ``weights`` is given.
            model_options: passed to ``timm.create_model``.
        """
        import timm

        pretrained = weights is None if pretrained is None else pretrained
        try:
            module: Any = timm.create_model(name, pretrained=pretrained, **model_options)
        except RuntimeError as error:
            if "Unknown model" not in str(error):
                raise
            raise ValueError(f"timm has no model {name!r}: see timm.list_models()") from error
        config = timm.data.resolve_model_data_config(module)
        mean, std = config["mean"], config["std"]
        if weights is not None:
            state, metadata = read_weights(weights)
            load_weights(module, state, weights)
            mean, std = numbers(metadata.get("mean"), mean), numbers(metadata.get("std"), std)
        source: dict[str, Any] = {"kind": "timm", "name": name}
        if weights is not None:
            source["weights"] = str(weights)
        if model_options:
            source["options"] = model_options
        # the model's own size where it has one: model_options may have changed it
        size = getattr(getattr(module, "patch_embed", None), "img_size", None) or config["input_size"][1:]
        return cls(module, mean, std, (size[0], size[1]), int(module.num_classes), class_names, source=source)

    @classmethod
    def from_hf(cls, name_or_path: str, **model_options: Any) -> Classifier:
        """A transformers image classification model from the hub or a local folder."""
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        model = AutoModelForImageClassification.from_pretrained(name_or_path, **model_options)
        processor = AutoImageProcessor.from_pretrained(name_or_path)
        size = getattr(processor, "crop_size", None) or processor.size
        size = dict(size)
        edge = size.get("shortest_edge")
        height, width = int(size.get("height", edge) or 224), int(size.get("width", edge) or 224)
        labels = model.config.id2label
        names = [labels[i] for i in range(len(labels))]
        source = {"kind": "hf", "name": str(name_or_path)}
        mean, std = processor.image_mean, processor.image_std
        return cls(HFLogits(model), mean, std, (height, width), len(names), names, source=source)

    def normalize(self, images: Tensor) -> Tensor:
        """(…,C,H,W) RGB in [0,1] → what the network expects."""
        return (images - self.mean[:, None, None]) / self.std[:, None, None]

    def forward(self, images: Tensor) -> Tensor:
        """(B,C,H,W) RGB in [0,1] → logits (B,classes). Trusts its input; see `check`."""
        return self.forward_normalized(self.normalize(images))

    def forward_normalized(self, pixels: Tensor) -> Tensor:
        """Logits of pixels that are already normalised (the perturbation kernels do it while they blend)."""
        return self.module(pixels)

    def probabilities(self, images: Tensor) -> Tensor:
        """(B,C,H,W) → softmax (B,classes), float32."""
        return self(images).float().softmax(dim=-1)

    def check(self, images: Tensor) -> Tensor:
        """Return ``images`` if they keep the pixel contract, else raise ValueError in one line."""
        return check_images(images, channels=len(self.mean))

    def resolve_target(self, images: Tensor, target: Tensor | Sequence[int] | int | None = None) -> Tensor:
        """(B,) int64 class indices: None means the predicted class; an int serves all images; a wrong length raises."""
        if target is None:
            with torch.no_grad():
                return self(images).argmax(dim=-1)
        return check_target(target, len(images), self.num_classes, images.device)

    def train(self, mode: bool = True) -> Classifier:
        """A frozen classifier stays in evaluation mode."""
        return super().train(False)


class HFLogits(nn.Module):
    """A transformers classifier as a plain module: pixels → logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixel_values=pixels).logits


def read_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A state dict in float32 and its metadata, from .safetensors or a .pth/.pt file (loaded without pickle code).

    Raises:
        FileNotFoundError, ValueError: one line, for a missing, truncated or foreign file.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file at {path}: give a .safetensors or .pth file")
    metadata: dict[str, str] = {}
    try:
        if path.suffix == ".safetensors":
            from safetensors import safe_open

            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            state = state.get("state_dict", state.get("model", state))
    except Exception as error:  # each reader has its own error types
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} cannot be read as weights, it may be truncated ({reason}): fetch it again") from error
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    return state, metadata


def numbers(text: str | None, default: Sequence[float]) -> Sequence[float]:
    """Numbers written as a JSON list or separated by commas or blanks; ``default`` for None."""
    if text is None:
        return default
    return tuple(float(part) for part in text.strip("[]() ").replace(",", " ").split())


def load_weights(module: nn.Module, state: dict[str, Tensor], path: str | Path) -> None:
    """Load strictly; a mismatch raises one line that names the first keys that differ."""
    own = module.state_dict()
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    misshaped = [key for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    if missing or unexpected or misshaped:
        parts = [
            f"{len(keys)} {what} ({', '.join(keys[:2])}{', …' if len(keys) > 2 else ''})"
            for what, keys in (
                ("missing", missing),
                ("unexpected", unexpected),
                ("of another shape", misshaped),
            )
            if keys
        ]
        raise ValueError(f"{path} does not fit {type(module).__name__}: parameters {'; '.join(parts)}")
    module.load_state_dict(state)


def from_source(source: dict[str, Any]) -> Classifier:
    """The classifier that ``Classifier.source`` describes; ValueError for a module that only its owner can make."""
    if source["kind"] == "timm":
        return Classifier.from_timm(source["name"], weights=source.get("weights"), **source.get("options", {}))
    if source["kind"] == "hf":
        return Classifier.from_hf(source["name"])
    if source["kind"] == "random":
        return from_name(source["name"])
    if source["kind"] == "scenes":
        from .data import Scenes
        from .demo import classifier as demo

        module, size = demo.load(), demo.CONFIG["img_size"]
        names, classes = Scenes.class_names, demo.CONFIG["num_classes"]
        made = {"kind": "scenes", "name": "scenes"}
        return Classifier(module, demo.MEAN, demo.STD, (size, size), classes, names, source=made)
    raise ValueError(
        f"the classifier {source.get('name')!r} is a wrapped module: pass classifier=… to load its explainer"
    )


def from_name(name: str, weights: str | Path | None = None) -> Classifier:
    """A classifier by the name the command line uses: ``scenes``, ``hf:`` and a transformers name, or a timm name.

    ``random:`` and a timm name is that model with random weights from a fixed seed: enough to try a pipeline, to
    count passes and to measure time.
    """
    if name == "scenes":
        return from_source({"kind": "scenes"})
    if name.startswith(RANDOM):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = Classifier.from_timm(name.removeprefix(RANDOM), pretrained=False)
        made.source = {"kind": "random", "name": name}
        return made
    if name.startswith("hf:"):
        return Classifier.from_hf(name.removeprefix("hf:"))
    return Classifier.from_timm(name, weights=weights)
