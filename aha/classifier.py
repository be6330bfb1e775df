"""The frozen classifier under explanation. Public images are RGB in [0, 1]; it owns its normalisation."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .checks import (
    check_answers,
    check_arguments,
    check_colour,
    check_images,
    check_normalisation,
    check_pixels,
    check_size,
    check_target,
    checked,
)
from .kernels.messages import short
from .precision import in_fast_layout
from .protection import protected, recording, steady
from .recipes import RECIPES
from .structure import made_for
from .weights import load_weights, numbers, read_weights

RANDOM = "random:"


class Classifier(nn.Module):
    """A frozen image classifier: (B, C, H, W) RGB in [0, 1] → (B, classes) logits.

    Make one with `from_timm`, `from_hf` or `wrap`. It is probed once, by one blank pass when it is made: what does not
    return logits, or takes other pixels than it says, is refused in one line. Parameters are frozen and the module
    stays in evaluation mode; gradients still flow to the images.

    What `torch.compile` or `DataParallel` made is taken as it was before, so that methods can look inside. One logit is
    the sigmoid of the second of two classes. A module that returns a tuple, a dict or an object with ``logits`` is read
    where that is unambiguous.

    Several threads may explain one network: whatever patches it takes its lock (see `aha.protection`).

    Attributes:
        module: the network on normalised pixels.
        mean, std: (C,) of its normalisation, for pixels in [0, 1]; the mean is also the colour of the "mean" reference
            unless given.
        input_size: (H, W) it was made for.
        num_classes: number of classes.
        class_names: one per class, or None.
        source: how to make it again (written into saved explainers), e.g. ``{"kind": "timm", "name": …}``.
        differentiable: whether gradients reach the images (not through quantised layers).
        traced: whether it is a TorchScript module, in which hooks see nothing.
    """

    mean: Tensor
    std: Tensor
    mean_colour: Tensor

    def __init__(
        self,
        module: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        input_size: tuple[int, int] | int,
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        mean_colour: Sequence[float] | None = None,
        source: dict[str, Any] | None = None,
    ):
        super().__init__()
        options = {"num_classes": num_classes, "class_names": class_names, "source": source}
        check_arguments(Classifier.__init__, options)
        # what compiled or distributed it keeps the network itself inside
        while (inner := _wrapped(module)) is not None:
            module = inner
        if not isinstance(module, nn.Module) or isinstance(module, Classifier):
            raise ValueError(f"module is a {type(module).__name__}: give a torch.nn.Module from pixels to logits")
        mean, std = (tuple(v) if isinstance(v, Iterator) else v for v in (mean, std))
        channels = check_normalisation(mean, std)
        colour = check_colour(mean if mean_colour is None else mean_colour, channels)
        self.input_size = check_size("input_size", input_size)
        if any(is_lazy(value) for value in module.parameters()):
            raise ValueError(
                f"{type(module).__name__} has lazy parameters without a shape: run it once on a batch first"
            )
        self.module = module.eval()
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        # not by to(), which would gather a network that lies on several devices; a meta network has no numbers
        place = _device(module) if _device(module).type != "meta" else torch.device("cpu")
        with torch.inference_mode(False):  # a tensor made in it could never take part in autograd
            for name, value in (("mean", mean), ("std", std), ("mean_colour", colour)):
                constant = torch.tensor([float(v) for v in value], dtype=torch.float32, device=place)
                self.register_buffer(name, constant, persistent=False)
        self.source = source or {"kind": "module", "name": type(module).__name__}
        self.traced = isinstance(module, torch.jit.ScriptModule)
        self._reads, self.num_classes, self.differentiable = _probe(self)
        self._sizes = {self.input_size}
        self._watching: list[list[Tensor]] = []
        if num_classes is not None and num_classes != self.num_classes and (num_classes, self.num_classes) != (1, 2):
            raise ValueError(f"{self.name} returns {self.num_classes} logits, num_classes={num_classes}: leave it out")
        if class_names is not None and len(class_names) != self.num_classes:
            raise ValueError(f"{len(class_names)} class names for {self.num_classes} classes: give one per class")
        self._class_names = list(class_names) if class_names is not None else None
        self._any_layout = False  # whether its network takes pixels in any memory layout
        self._imagenet = False  # whether its classes are ImageNet's 1000, whose names are read when asked for

    @property
    def class_names(self) -> list[str] | None:
        """One per class, or None where nothing names them."""
        if self._class_names is None and self._imagenet:
            self._class_names = imagenet_names()
        return self._class_names

    @class_names.setter
    def class_names(self, names: Sequence[str] | None) -> None:
        self._class_names, self._imagenet = list(names) if names is not None else None, False

    @property
    def name(self) -> str:
        """A short name for tables and messages."""
        return str(self.source.get("name", type(self.module).__name__))

    @property
    def device(self) -> torch.device:
        return self.mean.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, to which pixels are cast."""
        return dtype_of(self.module)

    @property
    def guarded(self) -> nn.Module:
        """Whose lock this wrapper shares."""
        return self.module

    @classmethod
    def wrap(
        cls,
        module: nn.Module,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        input_size: tuple[int, int] | int = (224, 224),
        num_classes: int | None = None,
        **options: Any,
    ) -> Classifier:
        """Wrap any module that maps normalised pixels (B,C,H,W) to logits (B,classes).

        Args:
            mean, std: of the normalisation, for pixels in [0, 1]; one value per channel.
            input_size: (H, W), or one number for both.
            num_classes: checked against what the module returns.

        Raises:
            ValueError: in one line, for a module whose blank pass is not that of a classifier.
        """
        if isinstance(module, nn.Module) and hasattr(module, "base_model_prefix") and hasattr(module, "config"):
            names = getattr(module.config, "id2label", None) or {}
            if num_classes is None and sorted(names) == list(range(len(names))) and len(names) > 1:
                options.setdefault("class_names", [names[label] for label in range(len(names))])
            options.setdefault("source", {"kind": "module", "name": type(module).__name__})
            module = HFLogits(module)
        return cls(module, mean, std, input_size, num_classes, **options)

    @classmethod
    @checked
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
            weights: local file instead of the hub, see `aha.weights.read_weights`; half precision is cast to float32. A
                safetensors file may carry ``mean`` and ``std`` in its metadata.
            pretrained: load hub weights; default: yes unless ``weights`` is given.
            class_names: one per class; default: ImageNet's 1000, as timm names them, for hub weights or a file of a
                model that timm says was trained on those. Weights of 1000 other classes need their own.
            model_options: passed to ``timm.create_model``.
        """
        import timm

        pretrained = weights is None if pretrained is None else pretrained
        try:
            with torch.inference_mode(False):  # no gradient could pass what is made in it
                module: Any = timm.create_model(name, pretrained=pretrained, **model_options)
        except (OSError, ImportError):
            raise
        except Exception as error:  # an unknown name, or options that fail anywhere in the network's own code
            if "Unknown model" in str(error):
                raise ValueError(f"timm has no model {short(name)}: see timm.list_models()") from error
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            options = f" with {short(model_options)}" if model_options else ""
            raise ValueError(f"timm cannot make {short(name)}{options}: {reason}") from error
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
        size = made_for(module) or config["input_size"][1:]
        made = cls(module, mean, std, (size[0], size[1]), int(module.num_classes), class_names, source=source)
        made._any_layout = True  # those of others may view what they compute as if its channels came first
        # random weights know no class
        made._imagenet = class_names is None and (pretrained or weights is not None) and _of_imagenet(module)
        return made

    @classmethod
    def from_hf(cls, name_or_path: str, **model_options: Any) -> Classifier:
        """A transformers image classification model from the hub or a local folder."""
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        with torch.inference_mode(False):  # no gradient could pass what is made in it
            model = AutoModelForImageClassification.from_pretrained(name_or_path, **model_options)
        processor = AutoImageProcessor.from_pretrained(name_or_path)
        cropped = getattr(processor, "do_center_crop", None) is not False and getattr(processor, "crop_size", None)
        size = dict(cropped or processor.size)
        edge = size.get("shortest_edge")
        height, width = int(size.get("height", edge) or 224), int(size.get("width", edge) or 224)
        labels = model.config.id2label
        names = [labels[i] for i in range(len(labels))]
        source = {"kind": "hf", "name": str(name_or_path)}
        mean, std = _normalisation_of(processor, str(name_or_path))
        return cls(HFLogits(model), mean, std, (height, width), len(names), names, source=source)

    def normalize(self, images: Tensor) -> Tensor:
        """What the network expects of pixels: (…,C,H,W) RGB in [0,1], normalised, in the dtype of its weights.

        Trusts its input, as all that passes go through; see `check`.
        """
        return ((images - self.mean[:, None, None]) / self.std[:, None, None]).to(self.dtype)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B,classes) of (B,C,H,W) RGB in [0,1]. Trusts its input; see `check`."""
        return self.forward_normalized(self.normalize(images))

    def forward_normalized(self, pixels: Tensor) -> Tensor:
        """Logits of pixels that are already normalised (the perturbation kernels do it while they blend)."""
        with steady(self.module):
            pixels = pixels.to(self.dtype)
            return self.read(self.module(in_fast_layout(pixels) if self._any_layout else pixels))

    def read(self, out: Any) -> Tensor:
        """What the network, or its head alone, returned → logits (B, classes), float32 or float64."""
        logits = self._reads(out)
        for finite in self._watching:
            finite.append(torch.isfinite(logits.detach()).all())
        return logits if logits.dtype == torch.float64 else logits.float()

    def own_answer(self, out: Any) -> Tensor:
        """The tensor in what the network returned that `read` reads, as it is: what gradients come back to.

        (B, classes); of a network with one logit (B, 1) or (B,). Of one logit, or half precision, `read` gives a copy.
        """
        return self._reads.own(out)

    @contextmanager
    @checked
    def watched(self, by: str) -> Iterator[None]:
        """Raise ValueError on exit if any answer inside was NaN or infinite; for callers that hold the lock.

        A method may hide it: where the target's logit is NaN its gradient can be zero. Read once, at the end, so that
        a GPU need not wait after every pass.
        """
        finite: list[Tensor] = []
        self._watching.append(finite)
        try:
            yield
        finally:
            self._watching.pop()
        if finite and not torch.stack(finite).all():
            raise ValueError(
                f"{self.name} returns NaN or infinite values while {by} looks at it: nothing can be explained there"
            )

    @checked
    def probabilities(self, images: Tensor) -> Tensor:
        """Softmax (B,classes) of (B,C,H,W) RGB in [0,1]; float32, also under autocast."""
        with protected(self, gradients=False):
            return self(self.check(images)).float().softmax(dim=-1)

    def check(self, images: Tensor) -> Tensor:
        """``images`` as the library works on them, or ValueError in one line: the door that all images enter by.

        They must keep the pixel contract (`aha.checks.check_images`), lie on the classifier's device and have a size
        that it takes. They come back in float32 (float64 for a classifier in float64), and never as an inference
        tensor, which autograd refuses.
        """
        check_images(images, channels=len(self.mean))
        if images.device != self.device:
            raise ValueError(
                f"images are on {images.device}, the classifier is on {self.device}: move them with .to(clf.device)"
            )
        size = (int(images.shape[-2]), int(images.shape[-1]))
        if size not in self._sizes:
            try:
                _blank_pass(self, size)
            except ValueError as error:
                height, width = self.input_size
                raise ValueError(f"{error}: resize the images to {height}×{width}") from error
            self._sizes.add(size)
        with torch.inference_mode(False):
            images = images.to(torch.float64 if self.dtype == torch.float64 else torch.float32)
            return images.clone() if images.is_inference() else images

    @checked
    def resolve_target(
        self,
        images: Tensor,
        target: Tensor | Sequence[int] | int | None = None,
        internal_batch_size: int | None = None,
    ) -> Tensor:
        """The classes to explain, (B,) int64: None means the predicted class, an int serves all; a wrong length raises.

        ``internal_batch_size`` images go through the classifier at a time, all at once by default.
        """
        check_pixels("images", images)
        if target is not None:
            return check_target(target, len(images), self.num_classes, images.device)
        with protected(self), torch.no_grad():
            parts = images.split(internal_batch_size or len(images))
            return torch.cat([check_answers(self(part), self.name).argmax(dim=-1) for part in parts])

    @checked
    def require(self, who: str, gradients: bool, inside: bool) -> None:
        """ValueError in one line if ``who`` needs gradients, or a look inside, which this network does not give."""
        advice = "choose a method for any classifier, such as rise"
        if inside and self.traced:
            raise ValueError(
                f"{who} looks inside the classifier, {self.name} is a TorchScript module: give the module as it was "
                f"before, or {advice}"
            )
        if gradients and not self.differentiable:
            raise ValueError(
                f"{who} needs gradients, and none reach the images through {self.name} (quantised, or run without "
                f"gradients): give the module as it was before, or {advice}"
            )

    def train(self, mode: bool = True) -> Classifier:
        """A frozen classifier stays in evaluation mode."""
        return super().train(False)

    def _apply(self, fn: Any, recurse: bool = True) -> Classifier:
        """Moves and casts; the normalisation keeps at least float32, in which images are."""
        before = {name: getattr(self, name) for name in ("mean", "std", "mean_colour")}
        super()._apply(fn, recurse)
        for name, value in before.items():
            now = getattr(self, name)
            if now.dtype in (torch.float16, torch.bfloat16):
                setattr(self, name, value.to(now.device))
        return self


def check_classifier(clf: Any) -> Classifier:
    """Return ``clf`` if it is a `Classifier`; a plain module is a ValueError that says how to wrap it."""
    if not isinstance(clf, Classifier):
        raise ValueError(f"clf is a {type(clf).__name__}: wrap it with aha.Classifier.wrap(module, mean, std)")
    return clf


@dataclass(frozen=True)
class Reading:
    """Where the logits are in what a network returns.

    Attributes:
        place: "" for the tensor itself, "logits" for an attribute or entry of that name, a number for that of a tuple.
        binary: one logit, of the second of two classes.
    """

    place: str | int = ""
    binary: bool = False

    def own(self, out: Any) -> Tensor:
        """The network's own tensor."""
        if isinstance(out, Tensor):  # a head alone gives a tensor, whatever the network makes of it
            return out
        return out[self.place] if isinstance(self.place, int) or isinstance(out, Mapping) else out.logits

    def __call__(self, out: Any) -> Tensor:
        out = self.own(out)
        if not self.binary:
            return out
        logit = out.reshape(len(out), 1)
        return torch.cat([torch.zeros_like(logit), logit], dim=1)


def _read_of(out: Any, name: str) -> Reading:
    """How to read ``out``; ValueError if that is not plain."""
    place: str | int = ""
    logits = out
    if not isinstance(out, Tensor):
        found = out.get("logits") if isinstance(out, Mapping) else getattr(out, "logits", None)
        if isinstance(found, Tensor):
            place, logits = "logits", found
        elif isinstance(out, (tuple, list)):
            rows = [value for value in out if isinstance(value, Tensor) and value.ndim == 2]
            # auxiliary logits have the same width; features beside the logits have another one
            if rows and rows[0] is out[0] and len({value.shape[1] for value in rows}) == 1:
                place, logits = 0, out[0]
    if not isinstance(logits, Tensor):
        kind = type(out).__name__
        if isinstance(out, Mapping):
            kind += f" of {', '.join(map(str, out))}"
        elif isinstance(out, (tuple, list)):
            kind += f" of {', '.join(str(tuple(v.shape)) if isinstance(v, Tensor) else type(v).__name__ for v in out)}"
        raise ValueError(f"{name} returns a {kind}: wrap it in a module that returns logits (B, classes)")
    shape = tuple(logits.shape)
    if shape in ((1,), (1, 1)):
        return Reading(place, binary=True)
    if len(shape) != 2 or shape[0] != 1 or not logits.is_floating_point():
        dtype = str(logits.dtype).removeprefix("torch.")
        raise ValueError(
            f"{name} returns {dtype} of shape {shape} for one image: give a module with a head, that returns floating "
            "point logits (B, classes)"
        )
    return Reading(place)


def _probe(clf: Classifier) -> tuple[Reading, int, bool]:
    """How to read the network's answers, its number of classes, whether gradients reach the images: one blank pass."""
    module, name = clf.module, clf.name
    if any(value.is_inference() for value in module.parameters()):
        raise ValueError(f"{name} was made in inference_mode, so no gradient can pass it: make it outside")
    places = {str(value.device) for value in (*module.parameters(), *module.buffers())}
    if len(places) > 1:
        raise ValueError(f"{name} lies on {', '.join(sorted(places))}: load it onto one device")
    heads = [part for part_name, part in module.named_children() if part_name in _HEADS]
    if getattr(module, "num_classes", None) == 0 or (heads and all(isinstance(h, nn.Identity) for h in heads)):
        raise ValueError(f"{name} has no classification head: give a model with one, it explains a class")
    out, pixels = _blank_pass(clf, clf.input_size, watched=True)
    reads = _read_of(out, name)
    logits = reads(out)
    differentiable = _reached(logits, pixels)
    if logits.is_meta:  # a network without weights: enough to plan with
        return reads, logits.shape[1], differentiable
    check_answers(logits, f"{name}, for a blank image,")
    total, low = float(logits.detach().double().sum()), float(logits.detach().min())
    if not reads.binary and low >= 0 and abs(total - 1) < 1e-3 and logits.shape[1] > 1:
        raise ValueError(f"{name} returns probabilities: leave its softmax out, so that it returns logits")
    return reads, logits.shape[1], differentiable


def _reached(logits: Tensor, pixels: Tensor) -> bool:
    """Whether a gradient of the logits arrives at the pixels; quantised layers only find out that they have none."""
    if not logits.requires_grad:
        return False
    try:
        with recording(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of kernels without a gradient
            (gradient,) = torch.autograd.grad(logits.sum(), pixels, allow_unused=True)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return False
    return gradient is not None


# what networks call their last layer; nn.Identity is how a head is taken away
_HEADS = ("fc", "head", "heads", "classifier")


def _blank_pass(clf: Classifier, size: tuple[int, int], watched: bool = False) -> tuple[Any, Tensor]:
    """What the network returns for one image of the mean colour, and its pixels; ``watched``, as a function of them."""
    with protected(clf):
        shape = (1, len(clf.mean), *size)
        pixels = torch.zeros(shape, device=_device(clf.module), dtype=clf.dtype).requires_grad_(watched)
        try:
            with torch.set_grad_enabled(watched):
                # a copy, for the first operation may work in place, which a leaf forbids
                return clf.module(pixels.clone() if watched else pixels), pixels
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # networks refuse what they do not take in many ways
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(
                f"{clf.name} does not take {tuple(pixels.shape)}, {len(clf.mean)} channels of {size[0]}×{size[1]} "
                f"pixels ({reason})"
            ) from error


def _normalisation_of(processor: Any, name: str) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and std for RGB in [0, 1] of a transformers image processor; ValueError if it wants other pixels."""
    if getattr(processor, "do_flip_channel_order", False):
        raise ValueError(f"{name} takes BGR pixels: wrap a module that flips the channels with Classifier.wrap")
    rescaled = getattr(processor, "do_rescale", True) is not False
    factor = float(getattr(processor, "rescale_factor", 1 / 255)) if rescaled else 1.0
    if abs(255 * factor - 1) > 1e-6:
        raise ValueError(
            f"{name} takes pixels in 0 … {255 * factor:g}, images here are in [0, 1]: wrap a module that scales them "
            "with Classifier.wrap"
        )
    if getattr(processor, "do_normalize", True) is False:
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return processor.image_mean, processor.image_std


def imagenet_names() -> list[str]:
    """What ImageNet's 1,000 classes are, as timm writes it: synonyms, separated by commas."""
    from timm.data import ImageNetInfo

    known = ImageNetInfo()
    return [known.index_to_description(label) for label in range(1000)]


def _of_imagenet(module: Any) -> bool:
    """Whether a timm model's last training was on ImageNet's 1000 classes, by the tag of its weights, such as
    a1_in1k, orig_in21k_ft_in1k or fb_in22k_ft_in1k_384."""
    config = getattr(module, "pretrained_cfg", None) or {}
    last = str(config.get("tag") or "").rpartition("in1k")
    return module.num_classes == config.get("num_classes") == 1000 and bool(last[1]) and "_ft_" not in last[2]


def _wrapped(module: Any) -> nn.Module | None:
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return module.module
    return getattr(module, "_orig_mod", None) if isinstance(module, nn.Module) else None


def _device(module: nn.Module) -> torch.device:
    value = next(module.parameters(), next(module.buffers(), None))
    return value.device if value is not None else torch.device("cpu")


def dtype_of(module: nn.Module) -> torch.dtype:
    """Of the weights: that of the first floating point parameter, or buffer; float32 where there is none."""
    for values in (module.parameters(), module.buffers()):
        for value in values:
            if value.is_floating_point():
                return value.dtype
    return torch.float32


class HFLogits(nn.Module):
    """A transformers classifier as a plain module: pixels → logits."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    @property
    def guarded(self) -> nn.Module:
        """Whose lock this wrapper shares."""
        return self.model

    def forward(self, pixels: Tensor) -> Tensor:
        out = self.model(pixel_values=pixels)
        return getattr(out, "logits", out)  # what has no head is refused by the probe


def from_source(source: dict[str, Any]) -> Classifier:
    """The classifier that ``Classifier.source`` describes; ValueError for a module that only its owner can make."""
    if source["kind"] == "timm":
        made = Classifier.from_timm(source["name"], weights=source.get("weights"), **source.get("options", {}))
        made.class_names = None  # saved beside the source, where they may be the user's own and not ImageNet's
        return made
    if source["kind"] == "hf":
        return Classifier.from_hf(source["name"])
    if source["kind"] == "random":
        return from_name(source["name"])
    if source["kind"] in RECIPES:
        return RECIPES[source["kind"]]()
    raise ValueError(
        f"the classifier {source.get('name')!r} is a wrapped module: pass classifier=… to load its explainer"
    )


def from_name(name: str, weights: str | Path | None = None) -> Classifier:
    """A classifier by the name the command line uses: ``scenes`` and others of `aha.recipes`, ``hf:`` and a
    transformers name, or a timm name.

    ``random:`` and a timm name is that model with random weights from a fixed seed: enough to try a pipeline, to
    count passes and to measure time.
    """
    if name in RECIPES:
        return RECIPES[name]()
    if name.startswith(RANDOM):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            made = Classifier.from_timm(name.removeprefix(RANDOM), pretrained=False)
        made.source = {"kind": "random", "name": name}
        return made
    if name.startswith("hf:"):
        return Classifier.from_hf(name.removeprefix("hf:"))
    return Classifier.from_timm(name, weights=weights)
