"""Passes through tiny timm transformers, step by step, as the definitions of methods need them."""

from collections.abc import Callable, Sequence

import timm
import torch
from torch import nn

from aha import attributors
from aha.attributors import Attributor

from .architectures import assert_restored_after_an_exception, assert_well_behaved, make, pictures


def readout(kind: str, tokens: int) -> list[int]:
    """The tokens that the head of a plain ViT reads."""
    return {"distilled": [0, 1], "average": list(range(tokens))}.get(kind, [0])


def prefix(kind: str) -> int:
    return {"distilled": 2, "average": 0, "registers": 5}.get(kind, 1)


def forward_by_hand(vit: nn.Module, pixels: torch.Tensor) -> dict[str, list]:
    """A plain timm ViT on one image (1, C, H, W), head by head: everything relevance and attention are made of.

    For each block attention_heads (a list of (T, T)), queries, keys, values (heads, T, d), and of tokens (T, …) those
    entering, normed, heads, mixed, between, normed2, hidden, active, mlp, leaving, in the order they are computed; once
    final (T, D) and logits (classes,).
    """
    seen: dict[str, list] = {}

    def keep(**values) -> None:
        for name, value in values.items():
            seen.setdefault(name, []).append(value)

    tokens = vit.norm_pre(vit._pos_embed(vit.patch_embed(pixels)))[0]
    for block in vit.blocks:
        attn, x = block.attn, block.norm1(tokens)
        heads, width = attn.num_heads, x.shape[1] // attn.num_heads
        parts = {"queries": [], "keys": [], "values": [], "attention": []}
        outputs = []
        for h in range(heads):
            q, k, v = (
                x @ attn.qkv.weight[at : at + width].T + attn.qkv.bias[at : at + width]
                for at in (h * width, (heads + h) * width, (2 * heads + h) * width)
            )
            weights = torch.softmax(q @ k.T / width**0.5, dim=-1)
            if not weights.requires_grad:
                weights.requires_grad_()
            for name, value in zip(parts, (q / width**0.5, k, v, weights), strict=True):
                parts[name].append(value)
            outputs.append(weights @ v)
        keep(attention_heads=parts.pop("attention"), **{name: torch.stack(p) for name, p in parts.items()})
        joined = torch.cat(outputs, dim=1)
        mixed = joined @ attn.proj.weight.T + attn.proj.bias
        keep(entering=tokens, normed=x, heads=joined, mixed=mixed, between=tokens + mixed)
        tokens = tokens + mixed
        x = block.norm2(tokens)
        hidden = block.mlp.fc1(x)
        active = block.mlp.act(hidden)
        mlp = block.mlp.fc2(active)
        keep(normed2=x, hidden=hidden, active=active, mlp=mlp)
        tokens = tokens + mlp
        keep(leaving=tokens)
    final = vit.norm(tokens)
    keep(final=final, logits=vit.forward_head(final[None])[0])
    return seen


def gradients_by_hand(
    vit: nn.Module, pixels: torch.Tensor, target: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Attention of every block (heads, T, T) for one image, and its derivatives."""
    seen = forward_by_hand(vit, pixels)
    score = seen["logits"][0][target]
    attentions, gradients = [], []
    for heads in seen["attention_heads"]:
        attentions.append(torch.stack([weights.detach() for weights in heads]))
        gradients.append(torch.stack(torch.autograd.grad(score, heads, retain_graph=True)))
    return attentions, gradients


def embedded(module, pixels):
    """Tokens at the first block, and what every block is called with besides them, by timm's own steps."""
    x = module.patch_embed(pixels)
    if isinstance(module, timm.models.Eva):
        x, rope = module._pos_embed(x)
        mixed = getattr(module, "rope_mixed", False)
        extra = [{"rope": rope[i] if mixed else rope} for i in range(len(module.blocks))]
        return module.norm_pre(x), extra
    if isinstance(module, timm.models.Beit):
        x = torch.cat([module.cls_token.expand(len(x), -1, -1), x], dim=1)
        x = x if module.pos_embed is None else x + module.pos_embed
        return x, [{} for _ in module.blocks]
    return module.norm_pre(module._pos_embed(x)), [{} for _ in module.blocks]


def head(module, tokens):
    return module.forward_head(module.norm(tokens))


def assert_patches_are_the_map(method: Attributor) -> None:
    """What MDA asks a method for, without the base class around it: ``patches``, which ``upsample`` makes the map."""
    clf = method.clf
    images = pictures(clf)
    with torch.no_grad():
        patches = method.patches(images, clf(images).argmax(dim=1))
    assert not patches.requires_grad
    assert patches.shape == (3, 16)
    assert torch.equal(method.upsample(patches, images), method.attribute(images))


def assert_keeps_the_contract(create: Callable[..., Attributor], models: Callable, kinds: Sequence[str]) -> None:
    """That of every method on ``kinds``; patches; state after an exception in each part of a block and in the head."""
    for kind in kinds:
        assert_well_behaved(create, models(kind))
    assert_patches_are_the_map(create(models("vit")))
    for fails in ("blocks.1.mlp", "blocks.2.attn.proj", "head"):
        assert_restored_after_an_exception(create, fails=fails)


def passes_per_image(name: str, **options) -> tuple[float, float]:
    """Forward and backward passes on a ViT."""
    clf = make("vit")
    method = attributors.create(name, clf, internal_batch_size=8, **options)
    with attributors.count_passes(clf) as passes:
        method.attribute(pictures(clf), 0)
    return passes.forward / 3, passes.backward / 3
