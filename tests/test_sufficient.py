"""The fraction of the pixels that is enough, on a classifier whose answer is known."""

import pytest
import torch
from torch import nn

import aha
from aha.sufficient import sufficient_fraction

SIZE = 40


class Brightness(nn.Module):
    """p(1) rises with the share of the upper half's bright pixels that are shown."""

    def __init__(self):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))

    def forward(self, pixels):
        share = (pixels[:, :, :20] > 0.75).float().mean(dim=(1, 2, 3)) * 2
        logit = 8 * (share - 0.5) + 2 + self.anchor
        return torch.stack([torch.zeros_like(logit), logit], dim=1)


@pytest.fixture
def image():
    """A checkerboard, which the blur makes grey: half of its pixels count, those bright ones of the upper half."""
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    return ((x + y) % 2).float().expand(1, 3, SIZE, SIZE).clone()


def classifier():
    return aha.Classifier.wrap(Brightness(), input_size=SIZE)


def test_it_is_the_fraction_at_which_the_probability_returns(image):
    clf = classifier()
    upper = torch.zeros(1, 1, SIZE, SIZE)
    upper[:, :, :20] = 1
    bright = upper * image[:, :1]  # a quarter of the pixels bring everything back
    found = sufficient_fraction(clf, image, bright, 1)
    full = float(clf.probabilities(image)[0, 1])

    def confidence(fraction):
        logit = 8 * (min(fraction, 0.25) * 4 - 0.5) + 2
        return 1 / (1 + torch.tensor(-logit).exp())

    assert confidence(0.25) == pytest.approx(full)
    exact = next(f / 1000 for f in range(1001) if confidence(f / 1000) >= 0.9 * full)
    assert 0.1 < exact < 0.25
    assert found == pytest.approx(exact, abs=0.01)  # linear between the fractions measured, 0.1 and 0.15
    # the worst order of pixels: those that count come last
    assert sufficient_fraction(clf, image, -bright, 1) > 0.75
    assert sufficient_fraction(clf, image, bright, 1, share=0.3) < found


def test_what_is_outside_is_always_shown(image):
    clf = classifier()
    inside = torch.ones(1, 1, SIZE, SIZE, dtype=torch.bool)
    inside[:, :, :20] = False  # all that counts
    assert sufficient_fraction(clf, image, torch.rand(1, 1, SIZE, SIZE), 1, inside) == 0
    # half of the pixels count, all of them evidence: twice the fraction
    heat = image[:, :1] * (torch.arange(SIZE) < 20)[:, None]
    whole = sufficient_fraction(clf, image, heat, 1)
    assert sufficient_fraction(clf, image, heat, 1, ~inside) == pytest.approx(2 * whole, rel=0.25)


def test_a_constant_map_ranks_nothing(image):
    assert sufficient_fraction(classifier(), image, torch.full((1, 1, SIZE, SIZE), 3.0), 1) is None


def test_at_most_ten_images_are_looked_at(image):
    clf = classifier()
    seen = []
    clf.module.register_forward_hook(lambda module, inputs, out: seen.append(len(inputs[0])))
    sufficient_fraction(clf, image, image[:, :1], 1)
    assert sum(seen) == 10


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"share": 0}, "share"),
        ({"share": 1.5}, "share=1.5"),
        ({"target": 2}, "target 2 is out of range"),
        ({"heat": torch.zeros(1, 1, 3, 3)}, "one value per pixel"),
        ({"image": torch.zeros(2, 3, SIZE, SIZE), "heat": torch.zeros(2, 1, SIZE, SIZE)}, "give one image"),
        ({"inside": torch.ones(1, 1, SIZE, SIZE)}, "give bool"),
        ({"inside": torch.zeros(1, 1, SIZE, SIZE, dtype=torch.bool)}, "some of them true"),
    ],
)
def test_bad_input(image, change, words):
    given = {"image": image, "heat": image[:, :1], "target": 1, **change}
    with pytest.raises(ValueError, match=words):
        sufficient_fraction(classifier(), **given)
