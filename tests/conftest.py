"""Shared pieces of the tests: tiny models with random weights, and a poison for uninitialised memory."""

import pytest
import timm
import torch

import aha
from aha.explainer.decoder import DecoderConfig

# tiny tensors: one thread each, so that tests running side by side do not wait for one another
torch.set_num_threads(1)

TINY_DECODER = DecoderConfig(embedding=16, width=16, head=8, strides=(2, 4, 8, 16))


@pytest.fixture(autouse=True)
def poison_empty_memory():
    """Memory from ``torch.empty`` starts as NaN, so an element that nobody wrote shows up."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(deterministic)


def tiny_vit(classes: int = 5, seed: int = 0, **options) -> torch.nn.Module:
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
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


@pytest.fixture
def classifier() -> "aha.Classifier":
    return aha.Classifier.wrap(tiny_vit(), (0.5,) * 3, (0.5,) * 3, (32, 32))


@pytest.fixture
def explainer(classifier) -> "aha.Explainer":
    torch.manual_seed(1)
    return aha.Explainer.build(classifier, decoder=TINY_DECODER)


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
