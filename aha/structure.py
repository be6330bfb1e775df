"""How networks are built that timm and transformers make: what is read from a module by name is read here.

Everything else asks for blocks, tokens, attention or patches; what a network does not have is None.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

Size = tuple[int, int]


@dataclass(frozen=True)
class Transformer:
    """A timm vision transformer: blocks on tokens (B, T, D), T = prefix tokens + patches.

    Prefix tokens (class, distillation, registers) come first. The readout are the tokens that the classification head
    reads: the class token; for DeiT with distillation the class and the distillation token, whose heads are averaged;
    without a token (average or attention pooling) all patches.

    Attributes:
        module: the network.
        embed: what makes tokens of pixels.
        blocks: in order.
        prefix: number of tokens before the patches.
    """

    module: Any
    embed: Any
    blocks: list[nn.Module]
    prefix: int

    def grid(self, height: int, width: int) -> Size:
        """Rows and columns of patches of height×width pixels."""
        return self.embed.dynamic_feat_size((height, width))

    @property
    def patch(self) -> Size:
        """Height and width of a patch in pixels; the border may cut the last ones off."""
        return self.embed.patch_size

    @property
    def channels(self) -> int:
        """D."""
        return self.module.embed_dim

    @property
    def pooling(self) -> str:
        """How the head reads tokens: "token", "avg" for the mean, or what else timm calls it."""
        return "token" if hasattr(self.module, "head_dist") else getattr(self.module, "global_pool", None) or ""

    @property
    def pools_prefix(self) -> bool:
        """Whether what is pooled includes the prefix tokens."""
        return bool(getattr(self.module, "pool_include_prefix", False))

    @property
    def readout(self) -> slice:
        """The tokens whose final values reach the head."""
        if self.pooling == "token":
            return slice(0, 2 if hasattr(self.module, "head_dist") else 1)
        return slice(None) if self.pools_prefix else slice(self.prefix, None)

    @property
    def joined_late(self) -> bool:
        """Whether the class token joins behind the blocks, as in CaiT."""
        return hasattr(self.module, "blocks_token_only")

    @property
    def norm(self) -> nn.Module | None:
        """What normalises the last block's tokens."""
        return getattr(self.module, "norm", None)

    @property
    def attentions(self) -> list[nn.Module]:
        """The attention layer of every block; the block itself where it attends without one."""
        return [getattr(block, "attn", block) for block in self.blocks]

    @property
    def softmaxes(self) -> list[nn.Module] | None:
        """What is applied right after the softmax of every block's attention, once the attention is not fused."""
        found: list[nn.Module] = []
        owner: Any
        for owner in self.attentions:
            # without the switch there is no telling what attn_drop is applied to
            if not (hasattr(owner, "fused_attn") and isinstance(getattr(owner, "attn_drop", None), nn.Module)):
                return None
            found.append(owner.attn_drop)
        return found

    @property
    def plain(self) -> bool:
        """Whether all blocks take and give prefix tokens + patches as (B, T, D): not so in SAM, CaiT and ConViT."""
        from timm.models import Beit, Eva, VisionTransformer

        return isinstance(self.module, (VisionTransformer, Eva, Beit))


def transformer(module: nn.Module, mixers: bool = False) -> Transformer | None:
    """``module`` as a vision transformer; with ``mixers``, an MLP-Mixer too: blocks and patches, no other tokens.

    Hierarchical transformers, whose tokens are merged between blocks, are none.
    """
    # timm's mixers call their patch embedding the stem
    mixer = mixers and hasattr(getattr(module, "stem", None), "dynamic_feat_size")
    embed = getattr(module, "stem" if mixer else "patch_embed", None)
    blocks: Any = getattr(module, "blocks", ())
    prefix: Any = 0 if mixer else getattr(module, "num_prefix_tokens", None)
    if prefix is None or not hasattr(embed, "dynamic_feat_size") or not len(blocks):
        return None
    return Transformer(module, embed, list(blocks), int(prefix))


def made_for(module: nn.Module) -> Size | None:
    """(H, W) that the position embedding was made for."""
    size: Any = getattr(getattr(module, "patch_embed", None), "img_size", None)
    return (int(size[0]), int(size[1])) if size else None


def uniform_patch(module: nn.Module) -> int | None:
    """Pixels along a patch where all features have one resolution; None for hierarchical networks.

    Of timm's features or of a transformers model's configuration.
    """
    config: Any = getattr(module, "config", None)
    if config is not None:
        patch = None if hasattr(config, "depths") else getattr(config, "patch_size", None)
    else:
        reductions = [info["reduction"] for info in _features(module)]
        patch = reductions[0] if len(reductions) > 1 and len(set(reductions)) == 1 else None
    return int(patch[0] if isinstance(patch, Sequence) else patch) if patch else None


def feature_count(module: nn.Module) -> int:
    """How many intermediate features timm lists: blocks of a plain transformer, stages of other networks; else 0."""
    return len(_features(module))


def _features(module: Any) -> Any:
    return getattr(module, "feature_info", [])
