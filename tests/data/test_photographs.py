"""The list of photographs, and how they are shown; the images are Debian's and not here."""

import numpy as np
import pytest
import torch
from PIL import Image

from aha.data import photographs
from aha.data.images import ImageReadError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Two photographs of one colour each, and a red disc cut out."""
    origins = []
    for i, kind in enumerate(("photograph", "photograph", "object")):
        origin = photographs.Origin(kind, "package", "1", f"{i}.png", "", "someone", "CC0-1.0")
        path = origin.path(tmp_path)
        path.parent.mkdir(exist_ok=True)
        if kind == "photograph":
            Image.new("RGB", (150, 100), (0, 100 * i, 255)).save(path)
        else:
            y, x = np.mgrid[:40, :60]
            disc = (x - 30) ** 2 + (y - 20) ** 2 < 15**2
            pixels = np.zeros((40, 60, 4), np.uint8)
            pixels[disc] = (255, 0, 0, 255)
            Image.fromarray(pixels).save(path)
        origins.append(origin)
    monkeypatch.setattr(photographs, "origins", lambda: tuple(origins))
    return tmp_path


def test_the_list_names_package_licence_authors_and_content_of_every_image():
    found = photographs.origins()
    assert len(found) > 300
    assert {origin.kind for origin in found} == set(photographs.KINDS)
    assert len({origin.sha256 for origin in found}) == len(found)
    for origin in found:
        assert origin.package and origin.version and origin.authors
        assert origin.licence.startswith(("CC", "GPL", "LGPL"))
        assert len(origin.sha256) == 64
        assert not origin.file.startswith("/") and ".." not in origin.file


def test_items_are_functions_of_seed_and_index(folder):
    data = photographs.Photographs(folder, 48, seed=3)
    again = photographs.Photographs(folder, 48, seed=3)
    for index in (0, 7, len(data), 10 * len(data)):
        image = data[index]["image"]
        assert image.shape == (3, 48, 48) and image.min() >= 0 and image.max() <= 1
        assert torch.equal(image, again[index]["image"])
    assert not torch.equal(data[0]["image"], data[len(data)]["image"])
    assert not torch.equal(data[0]["image"], photographs.Photographs(folder, 48, seed=4)[0]["image"])


def test_objects_lie_over_photographs(folder):
    data = photographs.Photographs(folder, 64)
    red, _, blue = data[0]["image"]
    shown = (red > 0.5) & (blue < 0.3)
    assert 0.02 < shown.float().mean() < 0.8  # the disc, not its transparent frame
    assert (blue[~shown] > 0.3).float().mean() > 0.95


def test_what_is_missing_is_named(folder):
    with pytest.raises(ImageReadError, match=r"lacks package/0\.png: aha\.data\.photographs\.fetch"):
        photographs.Photographs(folder / "elsewhere")


def test_another_image_is_not_taken(folder):
    with pytest.raises(ValueError, match="is not the image of package 1") as error:
        photographs.fetch(folder)
    assert "\n" not in str(error.value)
