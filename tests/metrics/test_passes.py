"""`Protocol.passes` against the passes that `Suite` takes."""

import dataclasses

import pytest
import torch
from torch import nn

from aha.attributors import count_passes
from aha.classifier import Classifier
from aha.metrics import PROTOCOLS, Cost, Protocol, Suite
from aha.references import published_blur

MEAN = torch.full((3,), 0.2)
FEW = Protocol("few", points=200, span=(0.1, 1.0), references=("black", "mean"), metrics=("deletion", "adp"))
APART = Protocol(
    "apart",
    points=4,
    metrics=("insertion", "positive"),
    references=("black", "blur", "mean"),
    deletion=("blur",),
    insertion=("black", "mean"),
)


class Bright(nn.Module):
    """Logit of class 0: slope · mean of the normalised pixels + base."""

    def __init__(self, slope, base):
        super().__init__()
        self.slope, self.base = slope, base

    def forward(self, pixels):
        score = self.slope * pixels.flatten(1).mean(dim=1) + self.base
        return torch.stack([score, torch.zeros_like(score)], dim=1)


def bright(size):
    """An image and a classifier that sees class 0 in it and in its blurs of 31 and 33 pixels, but not of 35."""
    image = 0.5 + 0.5 * torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    level = [(pixels - 0.2).mean().item() for pixels in (image, *(published_blur(image, MEAN, k, k) for k in (33, 35)))]
    at = (level[1] + level[2]) / 2
    slope = 8 / (level[0] - at)
    module = Bright(slope, -5 - slope * at)  # sigmoid(−5) is 0.7 %, sigmoid(3) 95 %
    module.base += 0.4  # −4.6 is 1 %
    return image, Classifier.wrap(module, MEAN.tolist(), (1.0,) * 3, input_size=size, num_classes=2)


@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
@pytest.mark.parametrize("protocol", [*PROTOCOLS.values(), FEW, APART], ids=lambda protocol: protocol.name)
def test_passes_are_those_counted(protocol, size):
    image, clf = bright(size)
    images = image.expand(2, -1, -1, -1).contiguous()
    suite = Suite(clf, protocol, internal_batch_size=7)
    masks = torch.rand(2, 1, *size) < 0.3
    with count_passes(clf) as shared:
        batch = suite.begin(images, labels=[0, 0], masks=masks)
    assert batch.takes_part.all()
    with count_passes(clf) as per_map:
        suite.measure(batch, torch.rand(2, 1, *size))
    blurs = 3 if "adaptive_blur" in protocol.references else 0
    assert protocol.passes(size, blurs) == Cost(shared.forward / 2, per_map.forward / 2)
    assert shared.backward == per_map.backward == 0


def test_passes_at_the_size_that_is_published():
    found = {name: protocol.passes(224) for name, protocol in PROTOCOLS.items()}
    assert found == {
        "aha": (4, 3 * (2 * 19 + 1)),
        "rise": (3, 446),
        "chefer": (1, 18),
        "mda": (4, 446),
        "mas": (4, 446),
        "monotonicity": (4, 57),
        "localisation": (1, 0),
    }
    assert PROTOCOLS["mda"].passes((224, 224), blurs=2.5).shared == 5.5
    assert dataclasses.replace(PROTOCOLS["rise"], metrics=("deletion",)).passes(224).per_map == 223
    with pytest.raises(ValueError, match="size"):
        PROTOCOLS["rise"].passes((224,))


def test_presets_say_how_images_are_cropped():
    for name, protocol in PROTOCOLS.items():
        wanted = (1.0, "bilinear") if name in ("mda", "mas") else (0.875, "bicubic")
        assert dataclasses.astuple(protocol.preprocessing) == wanted
