"""The perturbation operators against loops over pixels, and finite differences."""

import pytest
import torch

from aha import kernels, regions


def blend_by_loops(images, references, masks, rows, cols, mean, std):
    """Pixel by pixel, tap by tap, in float64."""
    batch, channels, height, width = images.shape
    steps = masks.shape[1]
    deleted = torch.zeros(batch, steps, channels, height, width, dtype=torch.float64)
    inserted = torch.zeros_like(deleted)
    grid = masks.double().view(batch, steps, rows.size, cols.size)
    for y in range(height):
        for x in range(width):
            keep = torch.zeros(batch, steps, dtype=torch.float64)
            for i, a in zip(rows.cell[y].tolist(), rows.weight[y].tolist(), strict=True):
                for j, b in zip(cols.cell[x].tolist(), cols.weight[x].tolist(), strict=True):
                    keep += a * b * grid[:, :, i, j]
            pixel, other = images[:, None, :, y, x].double(), references[:, None, :, y, x].double()
            inserted[..., y, x] = keep[..., None] * pixel + (1 - keep[..., None]) * other
            deleted[..., y, x] = (1 - keep[..., None]) * pixel + keep[..., None] * other
    return tuple((x - mean.double()[:, None, None]) / std.double()[:, None, None] for x in (deleted, inserted))


@pytest.fixture
def scene():
    generator = torch.Generator().manual_seed(0)
    images, references = (torch.rand(2, 3, 12, 10, generator=generator) for _ in range(2))
    cells = regions.grid(12, 10, (3, 4), (0.3, -0.2))
    masks = torch.rand(2, 5, cells.count, generator=generator)
    return images, references, masks, cells.upsampler()


def test_perturb_is_its_definition(scene):
    images, references, masks, upsampler = scene
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])
    expected = blend_by_loops(images, references, masks, *upsampler, mean, std)
    for actual, wanted in zip(kernels.perturb(images, references, masks, upsampler, mean, std), expected, strict=True):
        torch.testing.assert_close(actual.double(), wanted, atol=2e-6, rtol=1e-5)


def test_perturb_ends(scene):
    images, references, masks, upsampler = scene
    deleted, inserted = kernels.perturb(images, references, torch.ones_like(masks), upsampler)
    torch.testing.assert_close(inserted, images[:, None].expand_as(inserted))
    torch.testing.assert_close(deleted, references[:, None].expand_as(deleted))


def test_perturb_gradients(scene):
    images, references, masks, upsampler = (x.double() if isinstance(x, torch.Tensor) else x for x in scene)
    inputs = tuple(x[:1, ..., :12].clone().requires_grad_() for x in (images, references, masks))
    std = torch.tensor([0.2, 0.3, 0.4], dtype=torch.float64)

    def call(x, r, m):
        return kernels.perturb(x, r, m, upsampler, std, std)

    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


def test_perturb_casts_and_broadcasts(scene):
    images, references, masks, upsampler = scene
    one, _ = kernels.perturb(images, references[:1], masks, upsampler, dtype=torch.bfloat16)
    all_, _ = kernels.perturb(images, references[:1].expand_as(images), masks, upsampler)
    assert one.dtype == torch.bfloat16
    assert torch.equal(one, all_.bfloat16())


def test_perturb_by_rank_is_its_definition(scene):
    images, references, _, _ = scene
    ranks = torch.stack([torch.randperm(120).view(12, 10) for _ in range(2)])
    counts = [0, 1, 60, 120]
    deleted, inserted = kernels.perturb_by_rank(images, references, ranks, counts)
    for s, count in enumerate(counts):
        for y in range(12):
            for x in range(10):
                for b in range(2):
                    pair = images[b, :, y, x], references[b, :, y, x]
                    shown, gone = pair if ranks[b, y, x] < count else pair[::-1]
                    assert torch.equal(inserted[b, s, :, y, x], shown)
                    assert torch.equal(deleted[b, s, :, y, x], gone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_backends_of_perturb_by_rank_agree(scene, dtype):
    images, references = (x.to(dtype) for x in scene[:2])
    ranks = torch.stack([torch.randperm(120).view(12, 10) for _ in range(2)]).int()
    mean = std = torch.tensor([0.3, 0.4, 0.5], dtype=dtype)
    arguments = (images, references, ranks, [3, 77], mean, std)
    expected = kernels.perturb_by_rank(*arguments, backend="reference")
    for row in kernels.explain("perturb_by_rank", *arguments):
        if row.reason is None:
            actual = kernels.perturb_by_rank(*arguments, backend=row.backend)
            for a, b in zip(actual, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": torch.zeros(3, 12, 10)}, r"images is float32 of shape \(3, 12, 10\)"),
        ({"references": torch.zeros(2, 3, 12, 11)}, "give that of the images"),
        ({"references": torch.zeros(2, 3, 12, 10, dtype=torch.float64)}, "same dtype"),
        ({"masks": torch.zeros(2, 5, 13)}, "one value per cell"),
        ({"masks": torch.zeros(2, 5)}, "3-dim"),
        ({"mean": torch.zeros(4)}, "one value per channel"),
        ({"dtype": torch.int32}, "give float32"),
        ({"upsampler": regions.grid(12, 9, (3, 4)).upsampler()}, "12×9 pixels"),
    ],
)
def test_perturb_bad_input(scene, changes, message):
    given = dict(zip(("images", "references", "masks", "upsampler"), scene, strict=True))
    with pytest.raises(ValueError, match=message):
        kernels.perturb(**{**given, **changes})


@pytest.mark.parametrize(
    ("ranks", "counts", "message"),
    [
        (torch.zeros(1, 4, 4), [1], "ranks is float32"),
        (torch.zeros(1, 4, 5, dtype=torch.int32), [1], "give integers of shape"),
        (torch.zeros(1, 4, 4, dtype=torch.int32), [17], r"0 … H·W = 16"),
        (torch.zeros(1, 4, 4, dtype=torch.int32), [-1], r"0 … H·W = 16"),
        (torch.zeros(1, 4, 4, dtype=torch.int32), [0.5], "integers"),
    ],
)
def test_perturb_by_rank_bad_input(ranks, counts, message):
    image = torch.zeros(1, 3, 4, 4)
    with pytest.raises(ValueError, match=message):
        kernels.perturb_by_rank(image, image, ranks, counts)
