"""Views of photographs and the way back: what lies where in the file has to come back there."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from aha import data
from aha.data.photograph import FITS, TILES

SIDE = 64
SHAPES = [(151, 333), (333, 151), (97, 97), (41, 57), (20, 171)]  # (H, W): landscape, portrait, square, small, narrow
# EXIF orientation → how the upright image is turned to be stored
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    8: Image.Transpose.ROTATE_270,
}


def planted(folder, shape, orientation=1, place=(0.42, 0.55)):
    """A file whose upright image is dark but for a bright square around ``place``; its path and box (y, x, side)."""
    height, width = shape
    side = max(5, min(shape) // 6)
    top, left = (int(length * share) - side // 2 for length, share in zip(shape, place, strict=True))
    pixels = np.full((height, width, 3), 20, np.uint8)
    pixels[top : top + side, left : left + side] = 240
    image = Image.fromarray(pixels)
    if STORED[orientation] is not None:
        image = image.transpose(STORED[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = folder / f"{height}x{width}_{orientation}.png"
    image.save(path, exif=exif)
    return path, (top, left, side)


def brightness(view):
    """The map of a network that finds bright pixels."""
    return view.inputs.mean(dim=1, keepdim=True) * view.inside


def assert_found(heat, box, grain):
    """Centre and edges of what is bright lie within a fraction of the grain, the photograph's pixels per input's."""
    top, left, side = box
    weight = np.clip(np.nan_to_num(heat) - 0.15, 0, None)
    for axis, start in ((0, top), (1, left)):
        profile = weight.sum(axis=1 - axis)
        centre = (profile * (np.arange(len(profile)) + 0.5)).sum() / profile.sum()
        assert centre == pytest.approx(start + side / 2, abs=0.35 * grain[axis] + 0.1)
        inside = np.flatnonzero(profile > profile.max() / 2)
        assert inside[0] == pytest.approx(start, abs=grain[axis] + 1)
        assert inside[-1] + 1 == pytest.approx(start + side, abs=grain[axis] + 1)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_planted_square_comes_back_where_it_is(shape, fit, tmp_path):
    path, box = planted(tmp_path, shape, place=(0.42, 0.52))
    view = data.Photograph(path).view(SIDE, fit)
    heat = view.to_photograph(brightness(view))
    assert heat.shape == shape == view.size
    assert heat.dtype == np.float32
    assert_found(heat, box, [length / scaled for length, scaled in zip(shape, view.scaled, strict=True)])


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("orientation", STORED)
def test_turned_files_are_explained_upright(orientation, fit, tmp_path):
    shape = (150, 211)
    path, box = planted(tmp_path, shape, orientation, place=(0.35, 0.6))
    with Image.open(path) as stored:
        assert stored.size == (shape if orientation > 4 else shape[::-1])
    view = data.Photograph(path).view(SIDE, fit)
    heat = view.to_photograph(brightness(view))
    assert heat.shape == shape
    assert_found(heat, box, [length / scaled for length, scaled in zip(shape, view.scaled, strict=True)])


@pytest.mark.parametrize("fit", ["pad", "tile"])
@pytest.mark.parametrize("place", [(0.12, 0.05), (0.88, 0.95), (0.5, 0.97)])
def test_what_a_crop_misses_is_found(fit, place, tmp_path):
    path, box = planted(tmp_path, (150, 401), place=place)
    photograph = data.Photograph(path)
    view = photograph.view(SIDE, fit)
    assert view.seen == 1
    heat = view.to_photograph(brightness(view))
    assert np.isfinite(heat).all()
    assert_found(heat, box, [length / scaled for length, scaled in zip(view.size, view.scaled, strict=True)])
    cropped = photograph.view(SIDE, "crop")
    assert np.nanmax(cropped.to_photograph(brightness(cropped))) < 0.2


@pytest.mark.parametrize("shape", SHAPES)
def test_a_crop_is_what_load_image_gives(shape, tmp_path):
    path, _ = planted(tmp_path, shape, 6)
    preprocessing = data.Preprocessing(0.9, "bilinear")
    view = data.Photograph(path).view(SIDE, preprocessing=preprocessing)
    assert torch.equal(view.inputs[0], data.load_image(path, SIDE, preprocessing))
    heat = view.to_photograph(torch.ones(1, 1, SIDE, SIDE))
    # the central square of 0.9 of the shorter side, to whole pixels of the file
    side = 0.9 * min(shape)
    assert np.isfinite(heat).sum() == pytest.approx(side**2, rel=4 / side)
    assert view.seen == pytest.approx(side**2 / shape[0] / shape[1], rel=0.05)
    rows, columns = (np.flatnonzero(np.isfinite(heat).any(axis=axis)) for axis in (1, 0))
    for found, length in ((rows, shape[0]), (columns, shape[1])):
        assert found[0] + found[-1] + 1 == pytest.approx(length, abs=1 + length / SIDE)


def test_padding_has_the_colour_and_is_left_out(tmp_path):
    path, _ = planted(tmp_path, (50, 100))
    view = data.Photograph(path).view(SIDE, "pad", colour=torch.tensor([0.1, 0.2, 0.3]))
    assert view.inside.sum() == SIDE * SIDE / 2
    padding = view.inputs[0][:, ~view.inside[0, 0]]
    assert torch.equal(padding, torch.tensor([[0.1], [0.2], [0.3]]).expand_as(padding))
    heat = torch.where(view.inside, 1.0, 1e6)
    assert (view.to_photograph(heat) == 1).all()


def test_tiles_blend_without_seams(tmp_path):
    path, _ = planted(tmp_path, (150, 333))
    view = data.Photograph(path).view(SIDE, "tile")
    assert view.scaled == (128, int(128 * 333 / 150))
    assert len(view.inputs) == 3 * 8
    assert np.allclose(view.to_photograph(torch.ones(len(view.inputs), 1, SIDE, SIDE)), 1, atol=1e-6)
    # one tile that says more than the others leaves no edge
    maps = torch.zeros(len(view.inputs), 1, SIDE, SIDE)
    maps[9] = 1
    heat = view.to_photograph(maps, view.scaled)
    assert heat.max() > 0.5
    assert max(np.abs(np.diff(heat, axis=axis)).max() for axis in (0, 1)) < 0.06
    # two of them, one standardised noise, the other sure: what is sure is on top
    sure = torch.zeros(len(view.inputs))
    sure[9] = 0.9
    noise = torch.randn(maps.shape, generator=torch.Generator().manual_seed(0))
    weighed = view.to_photograph(noise, view.scaled, sure)
    top, left = view.corners[9]
    outside = np.ones(view.scaled, bool)
    outside[top : top + SIDE, left : left + SIDE] = False
    assert weighed.min() == 0
    assert (weighed[outside] == 0).all()
    assert weighed[~outside].max() > 0.5


@pytest.mark.parametrize(
    ("shape", "zoom"), [((63, 500), 1), ((127, 127), 1), ((128, 128), 2), ((1000, 1500), 2), ((200, 9000), 1)]
)
def test_large_photographs_have_finer_tiles(shape, zoom, tmp_path):
    path = tmp_path / "photo.png"
    Image.new("L", shape[::-1]).save(path)
    view = data.Photograph(path).view(SIDE, "tile")
    assert min(view.scaled) == zoom * SIDE
    assert zoom == 1 or len(view.corners) <= TILES
    for axis in (0, 1):
        starts = sorted({corner[axis] for corner in view.corners})
        assert starts[0] == 0 and starts[-1] == view.scaled[axis] - SIDE
        assert all(after - before <= SIDE / 2 + 1 for before, after in itertools.pairwise(starts))


@pytest.mark.parametrize("fit", ["pad", "tile"])
def test_a_map_of_the_photograph_goes_over_the_inputs(fit, tmp_path):
    path, _ = planted(tmp_path, (150, 333))
    view = data.Photograph(path).view(SIDE, fit)
    across = np.tile(np.arange(333, dtype=np.float32) + 0.5, (150, 1))
    found = view.to_inputs(across)
    assert found.shape == (len(view.inputs), 1, SIDE, SIDE)
    for heat, (top, left), inside in zip(found, view.corners, view.inside, strict=True):
        assert top <= 0 or fit == "tile"
        wanted = (left + torch.arange(SIDE) + 0.5) * 333 / view.scaled[1]
        away = inside[0] & ((wanted > 4) & (wanted < 329))
        assert torch.allclose(heat[0][away], wanted.expand(SIDE, SIDE)[away], atol=0.1)
        assert (heat[0][~inside[0]] == found.min()).all()
    assert np.abs(view.to_photograph(found) - across)[:, 8:-8].max() < 0.2


def test_pictures_are_made_smaller_and_never_larger(tmp_path):
    path, _ = planted(tmp_path, (151, 333))
    photograph = data.Photograph(path)
    assert photograph.picture(333).size == (333, 151)
    assert photograph.picture(100).size == (100, 45)


def test_bad_input(tmp_path, monkeypatch):
    path, _ = planted(tmp_path, (20, 171))
    photograph = data.Photograph(path)
    with pytest.raises(ValueError, match="fit='stretch': choose one of crop, pad, tile"):
        photograph.view(SIDE, "stretch")
    with pytest.raises(ValueError, match="mean_colour"):
        photograph.view(SIDE, "pad", colour=(1, 2, 3))
    with pytest.raises(ValueError, match="image_size=0"):
        photograph.view(0)
    view = photograph.view(SIDE, "pad")
    with pytest.raises(ValueError, match="give \\(1, 1, 64, 64\\)"):
        view.to_photograph(torch.zeros(1, 1, 32, 32))
    with pytest.raises(ValueError, match="weights"):
        view.to_photograph(torch.zeros(1, 1, SIDE, SIDE), weights=[-1])
    with pytest.raises(ValueError, match="NaN"):
        view.to_inputs(np.full((20, 171), np.nan))
    with pytest.raises(ValueError, match="give \\(H, W\\)"):
        view.to_inputs(np.zeros((1, 20, 171)))
    with pytest.raises(data.ImageReadError, match="missing"):
        data.Photograph(tmp_path / "missing.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20 * 171)
    for fit in ("crop", "tile"):  # narrow photographs grow
        with pytest.raises(data.ImageReadError, match=f"cannot read image {path}: it is 171×20"):
            photograph.view(SIDE, fit)
    photograph.view(SIDE, "pad")
