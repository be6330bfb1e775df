"""Class activation maps: the channels of one layer, weighted by what they do for the target's logit.

A is the layer's output as maps (B, C, h, w), s the target's logit (B,), g = ∂s/∂A. Every method here is
ReLU Σ_c w_c·A_c on the layer's grid, enlarged bilinearly. They differ in the weights.

Layers, unless one is given: a convolutional network's last map before pooling, that is ``layer4`` of a ResNet,
``stages[-1]`` of a ConvNeXt, what ``forward_features`` returns of other timm networks; a vision transformer's
patch tokens as the last block's first norm gives them, or as they enter that block if it normalises later. The
last block's output is of no use there: behind it a class token's logit no longer depends on the patches.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..classifier import Classifier
from ..geometry import as_maps
from ..precision import switched_off
from ..protection import protected, undisturbed
from .base import BY_HAND, Attributor, Metadata, register
from .passes import Passes
from .transformer import TransformerAttributor

ARCHITECTURES = "timm CNNs (ConvNeXt, ResNet, …) and Swin, timm vision transformers; others with layer="


@dataclass
class Captured:
    """One pass of the classifier, as seen at a layer.

    Attributes:
        images: what went in, (B, C, H, W).
        output: the layer's output as it is, a leaf that requires gradients.
        logits: (B, classes), a function of ``output``.
        entering: tokens (B, T, D) that entered the transformer block which holds the layer, if one does.
        last: whether only ``forward_head`` follows the layer.
    """

    images: Tensor
    output: Tensor
    logits: Tensor
    entering: Tensor | None
    last: bool


class LayerAttributor(Attributor):
    """Base of the methods that look at one layer: its choice, its maps, passes from there on.

    Refuses, when it is made, networks without a layer that is known to give maps.

    Args:
        layer: a module of the classifier, or its name; it gives maps (B, C, h, w) or (B, h, w, C) with the proportions
            of the image, or the tokens of a vision transformer. None: see the module's docstring.
        channels_last: which of the two; None: what timm models say, else what fits the image.

    Attributes:
        accepts, tokens_only: for messages, and whether the maps have to be a transformer's patch tokens.
    """

    looks_inside = True
    accepts: ClassVar[str] = ARCHITECTURES
    tokens_only: ClassVar[bool] = False

    def __init__(
        self,
        clf: Classifier,
        layer: nn.Module | str | None = None,
        channels_last: bool | None = None,
        **options: Any,
    ):
        super().__init__(clf, **options)
        self._transformer = _Tokens.of(clf)
        if self.tokens_only and self._transformer is None:
            self._refuse("has no patch tokens")
        declared = getattr(clf.module, "output_fmt", None) if layer is None else None
        self.channels_last = declared == "NHWC" if channels_last is None and declared else channels_last
        # None stands for what forward_features returns: not every network has a module that gives it
        self.layer = self._default_layer() if layer is None else self._named_layer(layer)
        blocks = self._transformer.blocks if self._transformer else []
        self._block = next((i for i, b in enumerate(blocks) if any(m is self.layer for m in b.modules())), None)

    def maps(self, output: Tensor, images: Tensor) -> Tensor:
        """A view of the layer's output (N, …) as maps (N, C, h, w); prefix tokens are left out."""
        size = (int(images.shape[-2]), int(images.shape[-1]))
        found = None
        if output.dim() == 3 and self._transformer:
            rows, cols = self._transformer.grid(images)
            prefix = output.shape[1] - rows * cols
            # CaiT's class token joins behind the blocks
            if prefix in (0, self._transformer.prefix):
                found = output[:, prefix:].transpose(1, 2).unflatten(-1, (rows, cols))
        elif output.dim() in (3, 4):
            found = as_maps(output, size, self.channels_last)
        if found is None:
            raise ValueError(
                f"{self.name}: layer {self.layer_name} of {self.clf.name} gives {tuple(output.shape)}, not maps "
                f"(B, C, h, w) or (B, h, w, C) with the proportions of {size[0]}×{size[1]} images, nor a transformer's "
                "patch tokens: pass layer=, a module or its name, that does, or channels_last="
            )
        return found

    @property
    def layer_name(self) -> str:
        """As ``named_modules`` calls the layer; ``forward_features`` for the network's features."""
        names = {module: name for name, module in self.clf.module.named_modules()}
        return "forward_features" if self.layer is None else names[self.layer]

    def capture(self, images: Tensor) -> Captured:
        """One pass, with the layer's output made a leaf, so that a backward pass ends there."""
        seen: list[Tensor] = []
        passed: list[Tensor] = []
        entering: list[Tensor] = []
        features: list[Any] = []

        def keep(output: Any) -> Tensor:
            if seen or not isinstance(output, Tensor):
                problem = "runs more than once in a pass" if seen else f"gives a {type(output).__name__}, not a tensor"
                raise ValueError(f"{self.name}: layer {self.layer_name} {problem}: choose another one")
            self.maps(output, images)
            seen.append(output.detach().requires_grad_())
            # a copy, for what follows may work in place, which a leaf forbids
            passed.append(seen[0].clone())
            return passed[0]

        def note(returned: Any) -> Any:
            features.append(returned)
            return returned

        with ExitStack() as stack:
            if self.layer is not None and hasattr(self.clf.module, "forward_features"):
                stack.enter_context(_features_through(self.clf.module, note))
            if self._transformer and self._block is not None:
                block = self._transformer.blocks[self._block]
                hook = block.register_forward_pre_hook(lambda _, args: entering.append(args[0].detach()))
                stack.callback(hook.remove)
            stack.enter_context(self._replacing(keep))
            logits = self.clf(images)
        if not seen:
            raise ValueError(f"{self.name}: layer {self.layer_name} does not run in a pass: choose another one")
        last = self.layer is None or any(returned is passed[0] for returned in features)
        last = last and hasattr(self.clf.module, "forward_head")
        return Captured(images, seen[0], logits, entering[0] if entering else None, last)

    def tail(self, captured: Captured, output: Tensor) -> Tensor:
        """Logits (B·m, classes) if the layer gave ``output`` (B·m, …): m variants of each captured image in turn.

        Only what follows is computed: the head, or the transformer's blocks from the layer's on. For another
        layer, or a network without ``forward_head``, it is a full pass.
        """
        copies = len(output) // len(captured.images)
        if captured.last:
            module: Any = self.clf.module
            with switched_off(module, "grad_checkpointing"):
                return self.clf.read(module.forward_head(output))
        with self._replacing(lambda _: output):
            if captured.entering is None or self._transformer is None or self._block is None:
                return self.clf(captured.images.repeat_interleave(copies, dim=0))
            tokens = captured.entering.repeat_interleave(copies, dim=0)
            with self._transformer.starting_at(self._block, tokens):
                return self.clf(captured.images[:1].expand(len(output), -1, -1, -1))

    @contextmanager
    def _replacing(self, replace: Callable[[Any], Tensor]) -> Iterator[None]:
        """Inside, ``replace`` gets the layer's output, and what it returns goes on in its place."""
        # checkpointing would run layers twice, or their children without them
        with switched_off(self.clf.module, "grad_checkpointing"):
            if self.layer is None:
                with _features_through(self.clf.module, replace):
                    yield
                return
            handle = self.layer.register_forward_hook(lambda _module, _args, output: replace(output))
            try:
                yield
            finally:
                handle.remove()

    def _default_layer(self) -> nn.Module | None:
        module: Any = self.clf.module
        if self._transformer:
            return self._transformer.last_norm() or self._refuse("has no block that starts with a norm")
        if hasattr(module, "layer4"):
            return module.layer4
        if hasattr(module, "stages") and isinstance(getattr(module, "norm_pre", None), nn.Identity):
            return module.stages[-1]
        if not hasattr(module, "forward_features"):
            features = getattr(module, "features", None)  # torchvision's name
            return features if isinstance(features, nn.Module) else self._refuse("has no layer known to give maps")
        # there is no telling from its modules what a network's features look like
        weight = next(module.parameters(), self.clf.mean)
        blank = torch.zeros(1, len(self.clf.mean), *self.clf.input_size, device=weight.device, dtype=weight.dtype)
        with undisturbed(module), torch.no_grad():
            features = module.forward_features(blank)
        if not isinstance(features, Tensor) or features.dim() != 4:
            given = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            self._refuse(f"has features {given}, not (B, C, h, w)")
        return None

    def _named_layer(self, layer: nn.Module | str) -> nn.Module:
        modules = dict(self.clf.module.named_modules())
        if isinstance(layer, str) and layer in modules:
            return modules[layer]
        if isinstance(layer, nn.Module) and any(module is layer for module in modules.values()):
            return layer
        given = repr(layer) if isinstance(layer, str) else f"a {type(layer).__name__}"
        raise ValueError(
            f"layer={given} is no part of {self.clf.name}: give a module, or a name that named_modules() lists"
        )

    def _refuse(self, reason: str) -> NoReturn:
        advice = "" if self.tokens_only else "pass layer=, or "
        raise ValueError(
            f"{self.name} accepts {self.accepts}; {self.clf.name} is a {type(self.clf.module).__name__} and {reason}: "
            f"{advice}choose a method for any classifier, such as rise"
        )


class _Tokens(TransformerAttributor):
    """A vision transformer's blocks, prefix, grid and partial passes, lent to a CAM; no method of its own."""

    needs_gradients = False
    name = "cam"

    @classmethod
    def of(cls, clf: Classifier) -> _Tokens | None:
        try:
            return cls(clf)
        except ValueError:
            return None

    def _attribute(self, images: Tensor, target: Any) -> Tensor:
        raise NotImplementedError

    def last_norm(self) -> nn.Module | None:
        """What gives the last block's normalised input: its first norm; else, where a block normalises later or in
        its branches, the block before it gives the input as it is."""
        name, first = next(iter(self.blocks[-1].named_children()))
        if name in ("norm1", "in_norm"):
            return first
        return self.blocks[-2] if len(self.blocks) > 1 else None


@contextmanager
def _features_through(module: Any, replace: Callable[[Any], Any]) -> Iterator[None]:
    """Inside, ``forward_features`` returns ``replace`` of what it would have."""
    original = module.forward_features
    before = vars(module).get("forward_features")
    try:
        # an instance attribute hides the class's method until it is deleted
        module.forward_features = lambda *args, **kwargs: replace(original(*args, **kwargs))
        yield
    finally:
        del module.forward_features
        if before is not None:
            module.forward_features = before


class CamAttributor(LayerAttributor):
    """Base of the methods here: what they make of the layer is clipped at zero and enlarged."""

    @abstractmethod
    def cam(self, images: Tensor, target: Tensor) -> Tensor:
        """Images and targets → the map (B, h, w) on the layer's grid, before the ReLU."""

    def _probe(self, images: Tensor) -> tuple[int, bool]:
        """Channels of the layer, and whether only the head follows it, by one pass of the first image."""
        image = self.clf.check(images)[:1].detach()
        with protected(*self.networks):
            captured = self.capture(image)
        return self.maps(captured.output, image).shape[1], captured.last

    def _attribute(self, images: Tensor, target: Tensor) -> Tensor:
        cam = F.relu(self.cam(images, target))
        return F.interpolate(cam[:, None], images.shape[-2:], mode="bilinear", align_corners=False)


class GradientCam(CamAttributor):
    """Base of the methods whose weights are made of the gradient; one forward pass, backward to the layer."""

    per_image = Passes(1, 1)

    @abstractmethod
    def combine(self, maps: Tensor, gradients: Tensor) -> Tensor:
        """A and g, both (B, C, h, w) → (B, h, w), before the ReLU."""

    def cam(self, images: Tensor, target: Tensor) -> Tensor:
        captured = self.capture(images)
        score = captured.logits.gather(1, target[:, None]).sum()
        (gradient,) = torch.autograd.grad(score, captured.output)
        maps, gradients = (
            self.maps(values, images).to(images.dtype) for values in (captured.output.detach(), gradient)
        )
        return self.combine(maps, gradients)


_TOKENS = "vision transformers: patch tokens of the last block's first norm, prefix tokens dropped"


@register("gradcam")
class GradCam(GradientCam):
    """Grad-CAM: ReLU Σ_c mean_xy(g_c)·A_c."""

    metadata = Metadata(
        paper="Selvaraju et al., ICCV 2017",
        cost="1F, B to the layer",
        architectures=ARCHITECTURES,
        licence="well-known",
        notes=f"{_TOKENS}; gradcam_vit reads attention instead",
        fidelity=BY_HAND,
    )

    def combine(self, maps: Tensor, gradients: Tensor) -> Tensor:
        return torch.einsum("bc,bchw->bhw", gradients.mean(dim=(2, 3)), maps)


@register("gradcam_pp")
class GradCamPlusPlus(GradientCam):
    """Grad-CAM++: weights w_c = Σ_xy α·ReLU(g), α = g²/(2g² + Σ_xy(A)·g³ + ε), ε = 1e-12.

    The paper differentiates exp(s), which makes α the ratio above (eq. 19) and multiplies all weights of an image
    by exp(s). That positive factor is left out: it changes no order and overflows.
    """

    metadata = Metadata(
        paper="Chattopadhyay et al., WACV 2018",
        cost="1F, B to the layer",
        architectures=ARCHITECTURES,
        licence="well-known",
        notes="without the factor exp(s) per image; α takes A ≥ 0 for granted: where channels may be negative "
        f"(ConvNeXt, transformers) 2 + ΣA·g may come near 0 and one channel take over; {_TOKENS}",
        fidelity=f"{BY_HAND}; differs by a positive factor per image",
    )
    # far below the square of any gradient that matters; 1e-6 would be above those of a ResNet-50 and change the weights
    epsilon: ClassVar[float] = 1e-12

    def combine(self, maps: Tensor, gradients: Tensor) -> Tensor:
        squares = gradients.square()
        total = maps.sum(dim=(2, 3), keepdim=True)
        alpha = squares / (2 * squares + total * squares * gradients + self.epsilon)
        return torch.einsum("bc,bchw->bhw", (alpha * F.relu(gradients)).sum(dim=(2, 3)), maps)


@register("hirescam")
class HiResCam(GradientCam):
    """HiResCAM: ReLU Σ_c g_c⊙A_c, the gradient element by element.

    Where the average over positions comes right after the layer, as after the last stage of a ResNet or a ConvNeXt,
    g_c is the same everywhere and this is Grad-CAM. Where a norm over channels at each position comes right after
    it, scaling A there changes nothing, so Σ_c g_c·A_c vanishes: choose the norm's output.
    """

    metadata = Metadata(
        paper="Draelos and Carin, 2020 (arXiv 2011.08891)",
        cost="1F, B to the layer",
        architectures=ARCHITECTURES,
        licence="well-known",
        notes=_TOKENS,
        fidelity=BY_HAND,
    )

    def combine(self, maps: Tensor, gradients: Tensor) -> Tensor:
        return (maps * gradients).sum(dim=1)


@register("scorecam")
class ScoreCam(CamAttributor):
    """Score-CAM: weights w = softmax_c s(x⊙M_c), M_c the channel enlarged bilinearly and scaled to [0, 1].

    Masks multiply normalised pixels, as in the paper's code. The score is the logit: confidences lie in [0, 1], and
    the softmax over channels would make nearly equal weights of them. A channel of one value has no mask and gets
    no weight.

    Args:
        internal_batch_size: masked images in one pass.
    """

    needs_gradients = False
    metadata = Metadata(
        paper="Wang et al., CVPR workshops 2020",
        cost="1F, C F",
        architectures=ARCHITECTURES,
        licence="MIT",
        notes="C channels; scores are logits; the paper's baseline score f(0) drops out of the softmax; "
        f"channels without range are left out; {_TOKENS}",
        fidelity=f"{BY_HAND}; differs by logits as scores, where the paper has confidences",
    )

    def passes(self, images: Tensor) -> Passes:
        return Passes(1 + self._probe(images)[0])

    @torch.no_grad()
    def cam(self, images: Tensor, target: Tensor) -> Tensor:
        maps = self.maps(self.capture(images).output.detach(), images).to(images.dtype)
        pixels = self.clf.normalize(images)
        scores = []
        for part in maps.split(max(1, self.internal_batch_size // len(images)), dim=1):
            masks = _rescale(F.interpolate(part, images.shape[-2:], mode="bilinear", align_corners=False))
            masked = (pixels[:, None] * masks[:, :, None]).flatten(0, 1)  # [B·m, 3, H, W]
            classes = target.repeat_interleave(part.shape[1])
            logits = self.clf.forward_normalized(masked)
            scores.append(logits.gather(1, classes[:, None]).view(len(images), -1))
        # interpolation rounds, so a channel of one value is known by its own range
        flat = maps.amax(dim=(2, 3)) == maps.amin(dim=(2, 3))
        weights = torch.cat(scores, dim=1).masked_fill(flat, -torch.inf).softmax(dim=1)
        return torch.einsum("bc,bchw->bhw", weights.masked_fill(flat, 0), maps)


@register("ablationcam")
class AblationCam(CamAttributor):
    """Ablation-CAM: weights w_c = (s − s with A_c = 0)/s.

    Only what follows the layer runs again for each channel, see `LayerAttributor.tail`.

    Args:
        internal_batch_size: ablated copies in one pass.
    """

    needs_gradients = False
    metadata = Metadata(
        paper="Desai and Ramaswamy, WACV 2020",
        cost="1F, C F of what follows the layer",
        architectures=ARCHITECTURES,
        licence="well-known",
        notes="C channels; dividing by s as published turns the signs where the target's logit is negative; full "
        f"passes for layers that more than the head follows, and models without forward_head; {_TOKENS} and "
        "not ablated, one block and the head per channel",
        fidelity=BY_HAND,
    )

    def passes(self, images: Tensor) -> Passes:
        channels, last = self._probe(images)
        return Passes(1 if last else 1 + channels)

    @torch.no_grad()
    def cam(self, images: Tensor, target: Tensor) -> Tensor:
        captured = self.capture(images)
        output, batch = captured.output.detach(), len(images)
        maps = self.maps(output, images)
        without = []
        channels = torch.arange(maps.shape[1], device=maps.device)
        for part in channels.split(max(1, self.internal_batch_size // batch)):
            copies = output.repeat_interleave(len(part), dim=0)
            rows = torch.arange(len(copies), device=maps.device)
            self.maps(copies, images)[rows, part.repeat(batch)] = 0
            classes = target.repeat_interleave(len(part))
            without.append(self.tail(captured, copies).gather(1, classes[:, None]).view(batch, -1))
        score = captured.logits.gather(1, target[:, None])
        weights = (score - torch.cat(without, dim=1)) / torch.where(score == 0, 1, score)
        return torch.einsum("bc,bchw->bhw", weights, maps.to(weights))


def _rescale(maps: Tensor) -> Tensor:
    """(B, C, H, W) → each map to [0, 1] by its minimum and maximum."""
    low, high = maps.amin(dim=(2, 3), keepdim=True), maps.amax(dim=(2, 3), keepdim=True)
    return (maps - low) / (high - low).clamp_min(torch.finfo(maps.dtype).tiny)
