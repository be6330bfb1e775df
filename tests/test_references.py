"""Reference images: blurs against SciPy's filters and against a plain convolution of normalised pixels."""

import pytest
import torch
import torch.nn.functional as F

from aha import references

MEAN, STD = torch.tensor([0.48, 0.45, 0.41]), torch.tensor([0.23, 0.22, 0.26])


def test_blur_is_a_gaussian_filter():
    ndimage = pytest.importorskip("scipy.ndimage")
    image = torch.rand(1, 3, 40, 50, dtype=torch.float64)
    # scipy calls reflection about the edge pixel "mirror"; truncate makes a radius of 6
    expected = ndimage.gaussian_filter(image[0].numpy(), (0, 2.0, 2.0), mode="mirror", truncate=3.0)
    torch.testing.assert_close(references.blur(image, 13, 2.0)[0].numpy(), expected, atol=1e-6, rtol=1e-6)


def test_blur_larger_than_the_image_is_cut():
    image = torch.rand(1, 3, 8, 8)
    assert references.blur(image).shape == image.shape
    torch.testing.assert_close(references.blur(torch.full((1, 3, 8, 8), 0.3)), torch.full((1, 3, 8, 8), 0.3))


def published(kernel, sigma):
    """The kernel as it is published: SciPy's filter of an impulse in the middle of kernel × kernel zeros."""
    ndimage = pytest.importorskip("scipy.ndimage")
    impulse = torch.zeros(kernel, kernel, dtype=torch.float64).numpy()
    impulse[kernel // 2, kernel // 2] = 1
    return torch.from_numpy(ndimage.gaussian_filter(impulse, sigma))


@pytest.mark.parametrize(("kernel", "sigma"), [(11, 5.0), (31, 31.0), (101, 101.0), (5, 0.7), (1, 3.0), (7, 40.0)])
def test_kernels_are_impulse_responses(kernel, sigma):
    weights = references.impulse_response(kernel, sigma)
    assert weights.dtype == torch.float64
    torch.testing.assert_close(weights.outer(weights), published(kernel, sigma), atol=1e-15, rtol=1e-12)


def test_the_kernel_of_rise_is_nearly_a_box():
    weights = references.impulse_response(11, 5.0)
    assert weights[5] / weights[0] == pytest.approx(1.0685, abs=1e-4)
    gaussian = references.gaussian(11, 5.0)
    assert gaussian[5] / gaussian[0] == pytest.approx(1.6487, abs=1e-4)


@pytest.mark.parametrize(("kernel", "sigma"), [(11, 5.0), (31, 31.0)])
def test_published_blur_is_a_convolution_of_normalised_pixels(kernel, sigma):
    """In two dimensions at once, float64, zeros beyond the border; the second kernel is larger than the image."""
    images = torch.rand(2, 3, 20, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, std = MEAN.double()[:, None, None], STD.double()[:, None, None]
    weights = published(kernel, sigma).expand(3, 1, kernel, kernel)
    expected = F.conv2d((images - mean) / std, weights, padding=kernel // 2, groups=3) * std + mean
    torch.testing.assert_close(references.published_blur(images, MEAN, kernel, sigma), expected, atol=1e-7, rtol=0)
    single = references.published_blur(images.float(), MEAN, kernel, sigma)
    torch.testing.assert_close(single, expected.float(), atol=2e-6, rtol=0)


def test_published_blur_keeps_to_pixels():
    for value in (0.0, 1.0):
        blurred = references.published_blur(torch.full((1, 3, 32, 32), value), MEAN, 31, 31.0)
        assert blurred.min() >= 0
        assert blurred.max() <= 1
    with pytest.raises(ValueError, match="odd"):
        references.published_blur(torch.rand(1, 3, 8, 8), MEAN, 4, 1.0)


def test_references_by_name(images):
    colour = torch.tensor([0.1, 0.2, 0.3])
    assert references.make("black", images, colour).abs().sum() == 0
    assert torch.equal(references.make("mean", images, colour)[0, :, 5, 5], colour)
    assert torch.equal(references.make("zero", images, colour, MEAN)[0, :, 5, 5], MEAN)
    blurred = references.make("blur11", images, colour, MEAN)
    assert torch.equal(blurred, references.published_blur(images, MEAN, 11, 5.0))
    with pytest.raises(ValueError, match="choose one of black, mean, blur"):
        references.make("noise", images, colour)
    with pytest.raises(ValueError, match="odd"):
        references.blur(images, 4)


def test_adaptive_blur_grows_until_the_class_is_gone(images):
    def contrast(blurred, _):  # falls as the blur grows
        return blurred.std(dim=(1, 2, 3))

    def blur(image, kernel):
        return references.published_blur(image, MEAN, kernel, float(kernel))

    images = images[:, :, :24] * torch.tensor([1.0, 0.7, 0.4])[:, None, None, None]
    values = [contrast(blur(image[None], kernel), 0).item() for image in images for kernel in (5, 9)]
    threshold = (min(values) + max(values)) / 2
    blurred, kernels = references.adaptive_blur(images, contrast, MEAN, threshold, start=3, largest=31)
    assert (kernels > 0).all()
    assert len(set(kernels.tolist())) > 1
    for image, result, kernel in zip(images, blurred, kernels.tolist(), strict=True):
        assert torch.equal(result, blur(image[None], kernel)[0])
        assert blur(image[None], kernel).std() <= threshold
        if kernel > 3:
            assert blur(image[None], kernel - 2).std() > threshold
    assert (references.adaptive_blur(images, contrast, MEAN, -1.0, start=3, largest=5)[1] == 0).all()
