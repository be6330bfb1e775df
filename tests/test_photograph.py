"""Explanations of photographs, by a classifier that looks for bright squares and maps that show what it sees."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import aha
from aha import photograph
from aha.data.photograph import FITS

SIDE = 64


class Bright(nn.Module):
    """Class 1 where more than a little is bright, class 0 where all is dark."""

    def __init__(self):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))

    def forward(self, pixels):
        logit = 1000 * ((pixels.mean(dim=1) > 0.5).float().mean(dim=(1, 2)) - 0.004) + self.anchor
        return torch.stack([torch.zeros_like(logit), logit], dim=1)


@pytest.fixture
def clf():
    return aha.Classifier.wrap(Bright(), input_size=SIDE, class_names=["dark", "bright"])


def standardised(images, target):
    """Brightness and a little noise, brought to mean 0 and variance 1 in every image, as some explainers do."""
    heat = images.mean(dim=1, keepdim=True) + 0.01 * torch.rand(
        images[:, :1].shape, generator=torch.Generator().manual_seed(0)
    )
    return (heat - heat.mean(dim=(1, 2, 3), keepdim=True)) / heat.std(dim=(1, 2, 3), keepdim=True)


@pytest.fixture
def file(tmp_path):
    """(150, 301), dark but for a square at rows 40 … 70 and columns 30 … 60, outside the central crop."""
    pixels = np.full((150, 301, 3), 25, np.uint8)
    pixels[40:70, 30:60] = 250
    Image.fromarray(pixels).save(tmp_path / "square.png")
    return tmp_path / "square.png"


@pytest.mark.parametrize("fit", FITS)
def test_it_is_about_the_photograph(file, clf, fit):
    found = photograph.explain(file, clf, standardised, fit=fit)
    assert found.maps.shape == (1, 150, 301)
    assert found.picture.size == (301, 150)
    caption = " ".join(found.caption())
    if fit == "crop":  # the square is not in it
        assert (found.target, found.name) == (0, "dark")
        assert found.seen == pytest.approx((0.875 * 150) ** 2 / 150 / 301, rel=0.02)
        assert "the crop sees 38 % of the photograph" in caption
        assert np.isnan(found.maps[0, 40:70, 30:60]).all()
        return
    assert (found.target, found.name, found.seen) == (1, "bright", 1.0)
    assert found.probability > 0.9
    assert f"class 1 bright, p = {found.probability:.3f}" in caption
    heat = found.maps[0]
    top = np.argsort(heat, axis=None)[-300:]
    y, x = np.unravel_index(top, heat.shape)
    # also among tiles that hold nothing and whose noise has a variance of 1
    assert (y >= 39).all() and (y < 71).all() and (x >= 29).all() and (x < 61).all()
    # of 2 % of the area
    assert 0 < found.kept < 0.06
    assert "of the pixels keep 90 % of p where the rest is blurred" in caption


def test_the_target_steps_and_size_that_are_asked_for(file, clf):
    asked = []

    def steps(images, target):
        asked.append(target.tolist())
        return torch.stack([standardised(images, target), 2 * standardised(images, target)])

    found = photograph.explain(file, clf, steps, target=0, fit="tile", longest=100)
    assert found.target == 0
    assert set(asked[0]) == {0} and len(asked[0]) > 4
    assert found.maps.shape == (2, 50, 100)
    assert np.allclose(found.maps[1], 2 * found.maps[0], atol=1e-4)
    with pytest.raises(ValueError, match="target 2 is out of range"):
        photograph.explain(file, clf, steps, target=2)


def test_a_constant_map_outlines_nothing(file, clf):
    found = photograph.explain(file, clf, lambda images, target: torch.ones_like(images[:, :1]), fit="pad")
    assert found.kept is None
    assert "the map is constant" in " ".join(found.caption())
