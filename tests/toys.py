"""The networks and images that the tests of several rooms share: tiny, with random weights, the same every time.

One classifier of each kind of architecture is made in tests/attributors/architectures.py.
"""

import math

import timm
import torch
from torch import nn

import aha
from aha.explainer.decoder import DecoderConfig

TINY_DECODER = DecoderConfig(embedding=16, width=16, head=8, strides=(2, 4, 8, 16))


def tiny_vit(classes: int = 5, seed: int = 0, **options) -> nn.Module:
    """A ViT for 32 px images whose random weights are large enough for confidences to differ."""
    torch.manual_seed(seed)
    settings = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "num_classes": classes,
    }
    model = timm.models.vision_transformer.VisionTransformer(**{**settings, **options})
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


def tiny_classifier(classes: int = 5, seed: int = 0, **options) -> aha.Classifier:
    """`tiny_vit`, wrapped."""
    module = tiny_vit(classes, seed, **options)
    return aha.Classifier.wrap(module, (0.5,) * 3, (0.5,) * 3, module.patch_embed.img_size)


class SmallNet(nn.Module):
    """A random convolutional network with three classes, for images of any size; counts the images it has seen."""

    def __init__(self, channels: int = 4, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, channels, 3, padding=1)
        self.head = nn.Linear(channels * 16, 3)
        self.scale = channels
        self.seen = 0

    def forward(self, pixels):
        self.seen += len(pixels)
        features = nn.functional.adaptive_avg_pool2d(torch.tanh(self.conv(pixels)), 4)
        return self.scale * self.head(features.flatten(1))


def pictures(count: int = 3, size: int = 32, seed: int = 0) -> torch.Tensor:
    """(count, 3, size, size) of uniform noise in [0, 1]."""
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def wide(evaluation):
    """One row per method and image as equally long columns: the facts of the images, every metric, and the costs."""
    facts = {index: row for row, index in enumerate(evaluation.images["index"])}
    table = {name: [] for name in ("method", *evaluation.images)}
    costs = ("seconds_per_image", "forward_per_image", "backward_per_image")
    names = [(column.name, reference) for column in evaluation.columns for reference in ("", *column.references)]
    for method in evaluation.methods:
        images = evaluation.series(method, costs[0]).images.tolist()
        table["method"] += [method] * len(images)
        for name, cells in evaluation.images.items():
            table[name] += [cells[facts[index]] for index in images]
        for name, reference in [*names, *((cost, "") for cost in costs)]:
            known = evaluation.values(method, name, reference)
            column = table.setdefault(f"{reference}/{name}" if reference else name, [])
            column += [known.get(index, math.nan) for index in images]
    return table
