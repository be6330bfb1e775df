"""Tiny classifiers with random weights, one of each kind of architecture, and the contract that every method keeps."""

import functools
from collections.abc import Callable, Sequence

import pytest
import timm
import torch
from timm.models.mlp_mixer import Affine, MlpMixer, ResBlock, SpatialGatingBlock
from timm.models.vision_transformer import ParallelScalingBlock, ResPostBlock
from torch import nn
from torch.overrides import _get_current_function_mode

from aha.attributors import Attributor
from aha.classifier import Classifier

VIT = "vit_tiny_patch16_224"
PATCHES = {"img_size": 32, "patch_size": 8, "embed_dim": 24}
CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 12, 16, 24)}
# blocks of softmax attention on prefix tokens + patches
TRANSFORMERS = {
    "vit": (VIT, {}),
    "oblong": (VIT, {"img_size": (32, 48)}),
    "registers": (VIT, {"reg_tokens": 4}),
    "average": (VIT, {"class_token": False, "global_pool": "avg"}),
    "attention_pool": ("vit_base_patch16_siglip_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "layer_scale": (VIT, {"init_values": 0.1, "mlp_layer": timm.layers.SwiGLUPacked}),
    "modern": (
        VIT,
        {"init_values": 0.1, "mlp_layer": timm.layers.SwiGLU, "norm_layer": timm.layers.RmsNorm, "qk_norm": True},
    ),
    "dinov3": ("vit_small_patch16_dinov3", {}),
    "mixed_rope": ("vit_small_patch16_rope_mixed_224", {}),
    "eva02": ("eva02_tiny_patch14_336", {}),
    "eva02_scaled": ("eva02_base_patch14_448", {}),
    "beit": ("beit_base_patch16_224", {}),
    "parallel": (VIT, {"block_fn": ParallelScalingBlock, "qk_norm": True}),
    "post_norm": (VIT, {"block_fn": ResPostBlock}),
}
# the class token joins behind the blocks, whose attention has more than a softmax
CAIT = {"cait": ("cait_xxs24_224", {})}
MIXERS = {
    "mixer": {},
    # as many channels as tokens: a row of the one is easily taken for one of the other
    "square_mixer": {"embed_dim": 16},
    "gated_mixer": {"mlp_layer": timm.layers.GluMlp},
    "resmlp": {"block_layer": ResBlock, "norm_layer": Affine, "mlp_ratio": 4},
    "gmlp": {"block_layer": SpatialGatingBlock, "mlp_layer": timm.layers.GatedMlp, "mlp_ratio": 4},
}
GATE = functools.partial(timm.layers.SqueezeExcite, gate_layer="hard_sigmoid")
# what gives maps of channels
PYRAMIDS = {
    "convnext": ("convnext_atto", CONVNEXT),
    "convnextv2": ("convnextv2_atto", CONVNEXT),
    "norm_first": ("convnext_atto", {**CONVNEXT, "head_norm_first": True}),
    "resnet": ("resnet10t", {"channels": (8, 12, 16, 24), "stem_width": 8}),
    "se": ("resnet10t", {"channels": (8, 12, 16, 24), "stem_width": 8, "block_args": {"attn_layer": GATE}}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 64, "window_size": 2, "embed_dim": 8, "depths": (2, 1, 1, 1), "num_heads": (1, 1, 2, 2)},
    ),
    "swinv2": (
        "swinv2_tiny_window8_256",
        {"img_size": 64, "window_size": 4, "embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2)},
    ),
    "lcnet": ("lcnet_035", {}),
}
KINDS = (*TRANSFORMERS, *CAIT, *MIXERS, *PYRAMIDS)


def make(kind: str, **options) -> Classifier:
    """A classifier of 4 classes, for images of 32 × 32 pixels in patches of 8, 64 × 64 of a pyramid.

    Args:
        options: of the timm model, such as ``depth`` or ``img_size``, in place of those of its kind.
    """
    # the caller's generator stays where it is, whether a test makes a classifier or gets a shared one
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module, size = _build(kind, options)
        if kind in PYRAMIDS:
            _initialise_pyramid(module, size)
        else:
            for parameter in module.parameters():
                # as initialised, biases are zero, attention is uniform and layer scale hides the blocks
                nn.init.normal_(parameter, std=0.3)
    size = size if isinstance(size, tuple) else (size, size)
    return Classifier.wrap(module, (0.5, 0.4, 0.6), (0.25, 0.2, 0.3), input_size=size, num_classes=4)


def _initialise_pyramid(module: nn.Module, size: int) -> None:
    """Weights with which logits depend on the image, by about 1."""
    for name, parameter in module.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=1.5 * parameter[0].numel() ** -0.5)
        elif name.endswith("weight"):
            # a negative scale of a norm would leave little for a ReLU to let through
            nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            nn.init.normal_(parameter, std=0.3)
    noise, last = 4 * torch.rand(64, 3, size, size) - 2, last_linear(module)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None  # running statistics become those of the next pass
    with torch.no_grad():
        module.train()(noise)
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d):
                # a channel that hardly varies would be blown up
                part.running_var.clamp_(min=0.01)
        last.weight /= module.eval()(noise).std(dim=0)[:, None]
    # far from zero, for Ablation-CAM divides by logits
    nn.init.uniform_(last.bias, 2, 3)


def _build(kind: str, options: dict) -> tuple[nn.Module, int | tuple[int, int]]:
    if kind in MIXERS:
        options = {**PATCHES, "num_blocks": 3, "num_classes": 4, **MIXERS[kind], **options}
        return MlpMixer(**options), options["img_size"]
    if kind in PYRAMIDS:
        name, own = PYRAMIDS[kind]
        return timm.create_model(name, num_classes=4, **{**own, **options}), 64
    name, own = {**TRANSFORMERS, **CAIT}[kind]
    options = {**PATCHES, "depth": 3, "num_heads": 3, "num_classes": 4, **own, **options}
    return timm.create_model(name, **options), options["img_size"]


def last_linear(module: nn.Module) -> nn.Module:
    return next(part for part in reversed(list(module.modules())) if isinstance(part, nn.Linear))


def pictures(clf: Classifier, count: int = 3) -> torch.Tensor:
    images = torch.rand(count, 3, *clf.input_size, generator=torch.Generator().manual_seed(1))
    return images.to(clf.mean.dtype)


def state(clf: Classifier) -> list:
    """All that a method may change while it runs, and has to put back."""
    modules = [
        (
            name,
            module.training,
            getattr(module, "fused_attn", None),
            getattr(module, "grad_checkpointing", None),
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            len(module._backward_hooks),
            set(vars(module)),  # replaced forwards
        )
        for name, module in clf.named_modules()
    ]
    parameters = [(parameter.requires_grad, parameter.grad) for parameter in clf.parameters()]
    surroundings = (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), _get_current_function_mode())
    return [modules, parameters, surroundings, torch.get_rng_state().tolist()]


def assert_well_behaved(
    create: Callable[..., Attributor],
    clf: Classifier,
    target: Sequence[int] = (1, 3, 0),
    clipped: bool = False,
    rounding: float = 1e-5,
) -> None:
    """Shape and values; batch, chunks and surrounding modes change nothing; state is left alone; targets count.

    Args:
        create: makes the method for a classifier, with ``internal_batch_size`` if it is given.
        clipped: the maps of some images may be zero, where nothing speaks for the class.
        rounding: what batches and chunks may change, as a share of the largest value.
    """
    images, target = pictures(clf, len(target)), list(target)
    method = create(clf)
    before = state(clf)
    maps = method.attribute(images, target)
    assert state(clf) == before
    assert maps.shape == (len(target), 1, *clf.input_size)
    assert maps.dtype == torch.float32
    assert torch.isfinite(maps).all()
    assert not maps.requires_grad
    varying = maps.flatten(1).std(dim=1) > 0
    assert varying.any() if clipped else varying.all()
    scale = maps.abs().max()
    bound = rounding * scale
    alone = torch.cat([method.attribute(image[None], [t]) for image, t in zip(images, target, strict=True)])
    assert (maps - alone).abs().max() <= bound
    for size in (1, 2, 7):
        chunked = create(clf, internal_batch_size=size).attribute(images, target)
        assert (maps - chunked).abs().max() <= bound, size
    own = images.clone().requires_grad_()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(method.attribute(own, target), maps)
    assert own.grad is None
    with torch.inference_mode():
        assert torch.equal(method.attribute(images.clone(), target), maps)
    other = method.attribute(images, [(t + 1) % 4 for t in target])
    change = (maps - other).abs().max()
    assert change > 1e-3 * scale.clamp(max=other.abs().max()) if method.class_specific else change == 0
    image = images[-1:]
    assert torch.equal(method.attribute(image), method.attribute(image, clf(image).argmax(dim=1)))


def assert_restored_after_an_exception(
    create: Callable[..., Attributor], kind: str = "vit", fails: str | None = None, at_call: int = 1
) -> None:
    """State is as before, also where a submodule raises, and the method works again afterwards.

    Args:
        fails: name of the submodule; the classification head unless given.
        at_call: which of its calls raises, from 1.
    """
    clf = make(kind)
    method = create(clf)
    parts = list(getattr(clf.module, "blocks", clf.module.children()))
    parts[0].train()
    parts[1].requires_grad_(True)
    clf.module.set_grad_checkpointing(True)
    images = pictures(clf, 2)
    before = state(clf)
    expected = method.attribute(images, 0)
    assert state(clf) == before
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == at_call:
            raise RuntimeError("out of luck")

    part = clf.module.get_submodule(fails) if fails else last_linear(clf.module)
    handle = part.register_forward_hook(fail)
    hooked = state(clf)
    with pytest.raises(RuntimeError, match="out of luck"):
        method.attribute(images, 0)
    assert len(calls) == at_call
    assert state(clf) == hooked
    handle.remove()
    assert torch.equal(method.attribute(images, 0), expected)
    assert state(clf) == before


def assert_refused(create: Callable[..., Attributor], clf: Classifier, names: str) -> None:
    """The method is not made for the classifier; the message is one line, has ``names`` (a pattern) and what came."""
    with pytest.raises(ValueError, match=names) as error:
        create(clf)
    assert "\n" not in str(error.value)
    came = (type(clf.module), *(type(block) for block in getattr(clf.module, "blocks", ())))
    assert any(part.__name__ in str(error.value) for part in came)
