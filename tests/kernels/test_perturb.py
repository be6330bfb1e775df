"""The perturbation operators against loops over pixels, and finite differences."""

import pytest
import torch

from aha import kernels, regions
from aha.kernels import native

MEAN, STD = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])

needs_native = pytest.mark.skipif(native.load("_C") is not None, reason=f"aha._C: {native.load('_C')}")


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
    expected = blend_by_loops(images, references, masks, *upsampler, MEAN, STD)
    for row in kernels.explain("perturb", images, references, masks, upsampler, MEAN, STD):
        if row.reason is not None:
            continue
        outputs = kernels.perturb(images, references, masks, upsampler, MEAN, STD, backend=row.backend)
        for actual, wanted in zip(outputs, expected, strict=True):
            torch.testing.assert_close(actual.double(), wanted, atol=2e-6, rtol=1e-5)


def test_perturb_ends(scene):
    images, references, masks, upsampler = scene
    deleted, inserted = kernels.perturb(images, references, torch.ones_like(masks), upsampler)
    torch.testing.assert_close(inserted, images[:, None].expand_as(inserted))
    torch.testing.assert_close(deleted, references[:, None].expand_as(deleted))


@pytest.mark.parametrize("backend", [pytest.param("cpu", marks=needs_native), "reference"])
def test_perturb_gradients(scene, backend):
    images, references, masks, upsampler = (x.double() if isinstance(x, torch.Tensor) else x for x in scene)
    inputs = tuple(x.clone().requires_grad_() for x in (images[:1], references[:1], masks[:1, :2]))

    def call(x, r, m):
        return kernels.perturb(x, r, m, upsampler, MEAN, STD, backend=backend)

    assert torch.autograd.gradcheck(call, inputs)


def outputs_and_gradients(backend, images, references, masks, upsampler, dtype, cotangents, wanted):
    """deleted, inserted and the gradients of the first ``wanted`` of masks, images and references."""
    inputs = [x.detach().requires_grad_() for x in (masks, images, references)]
    masks, images, references = inputs
    mean, std = MEAN.to(images.device), STD.to(images.device)
    outputs = kernels.perturb(images, references, masks, upsampler, mean, std, dtype, backend=backend)
    cotangents = [c.to(y) for c, y in zip(cotangents, outputs, strict=True)]
    return *outputs, *torch.autograd.grad(outputs, inputs[:wanted], cotangents)


def other_backends(*arguments):
    """The backends that can run this call, besides the reference; skips the test if there is none."""
    table = kernels.explain("perturb", *arguments)
    names = [row.backend for row in table if row.reason is None and row.backend != "reference"]
    return names or pytest.skip("; ".join(f"{row.backend}: {row.reason}" for row in table))


def assert_as_accurate(backend, images, references, masks, upsampler, dtype=None, wanted=3):
    """The error against float64 is at most twice that of the reference, for outputs and gradients."""
    generator = torch.Generator().manual_seed(1)
    size = (*masks.shape[:2], *images.shape[1:])
    # one sign, so that the sums of a gradient do not nearly cancel
    cotangents = torch.rand(2, *size, generator=generator).bfloat16().double().to(images.device)
    cotangents[0].neg_()
    truth = outputs_and_gradients(
        "reference", images.double(), references.double(), masks.double(), upsampler, None, cotangents, wanted
    )
    arguments = (images, references, masks, upsampler, dtype, cotangents, wanted)
    single = outputs_and_gradients("reference", *arguments)
    actual = outputs_and_gradients(backend, *arguments)
    for got, reference, exact in zip(actual, single, truth, strict=True):
        assert got.dtype == reference.dtype
        assert got.shape == exact.shape
        if exact.numel():
            scale = exact.abs().max()
            bound = 2 * (reference.double() - exact).abs().max() + 2e-7 * scale
            assert (got.double() - exact).abs().max() <= bound


def random_scene(batch=2, steps=5, channels=3, height=12, width=10, cells=(3, 4), dtype=torch.float32, sigma=1.0):
    generator = torch.Generator().manual_seed(0)
    images, references = torch.rand(2, batch, channels, height, width, generator=generator).to(dtype)
    grid = regions.grid(height, width, cells, (0.3, -0.2))
    masks = torch.rand(batch, steps, grid.count, generator=generator)
    return images, references, masks, grid.upsampler(sigma)


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"height": 1, "width": 1, "cells": 1},
        {"height": 37, "width": 53, "cells": (9, 7), "steps": 1},  # several blocks of rows, one cut short
        {"height": 40, "width": 40, "cells": (40, 40)},  # a cell per pixel: seven taps on each axis
        {"height": 3, "width": 2500, "cells": (2, 11)},  # rows wider than a tile
        {"height": 16, "width": 24, "cells": (2, 3), "sigma": 0.0},  # nearest: one tap
    ],
)
def test_perturb_is_as_accurate_as_the_reference(sizes):
    images, references, masks, upsampler = random_scene(**sizes | {"channels": 3})
    for backend in other_backends(images, references, masks, upsampler):
        assert_as_accurate(backend, images, references, masks, upsampler)
        assert_as_accurate(backend, images, references, masks, upsampler, wanted=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16, torch.float16])
def test_perturb_in_every_precision(dtype, out):
    images, references, masks, upsampler = random_scene(dtype=dtype, width=16)
    for backend in other_backends(images, references, masks, upsampler, None, None, out):
        assert_as_accurate(backend, images, references, masks, upsampler, out)


@needs_native
def test_perturb_in_float64():
    scene = [x.double() if isinstance(x, torch.Tensor) else x for x in random_scene()]
    cotangents = torch.rand(2, 2, 5, 3, 12, 10, dtype=torch.float64)
    actual, expected = (outputs_and_gradients(name, *scene, None, cotangents, 3) for name in ("cpu", "reference"))
    for got, value in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, value, rtol=1e-13, atol=1e-13)


def test_perturb_of_any_strides():
    images, references, masks, upsampler = random_scene(height=12, width=12, cells=(3, 4), channels=3)
    layouts = {
        "channels last": lambda x: x.to(memory_format=torch.channels_last),
        "transposed": lambda x: x.mT,
        "every other column": lambda x: torch.stack([x, x], dim=-1)[..., 0],
        "expanded": lambda x: x[:1, :1, :1].expand(2, 3, 12, 12),
    }
    masks = masks.transpose(0, 1).contiguous().transpose(0, 1)
    for backend in other_backends(images, references, masks, upsampler):
        for layout in layouts.values():
            for shared in (references, references[:1]):
                assert not layout(images).is_contiguous()
                assert_as_accurate(backend, layout(images), shared, masks, upsampler)
                assert_as_accurate(backend, images, layout(references), masks, upsampler)


def test_perturb_of_cotangents_of_any_strides(scene):
    images, references, masks, upsampler = scene
    for backend in other_backends(images, references, masks, upsampler):
        grads = []
        for name in (backend, "reference"):
            inputs = [x.detach().requires_grad_() for x in (images, references, masks)]
            deleted, inserted = kernels.perturb(*inputs, upsampler, MEAN, STD, backend=name)
            # an expanded and a transposed cotangent
            loss = 2 * deleted.sum() + (inserted.transpose(1, 4) ** 2).sum()
            grads.append(torch.autograd.grad(loss, inputs))
        for got, value in zip(*grads, strict=True):
            torch.testing.assert_close(got, value, rtol=1e-5, atol=1e-5 * float(value.abs().max()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("out", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sizes", [{"height": 37, "width": 53}, {"height": 40, "width": 56}, {"width": 2096}])
def test_perturb_on_cuda(dtype, out, sizes):
    if reason := native.load("_C_cuda"):
        pytest.skip(reason)
    *tensors, upsampler = random_scene(**sizes, cells=(9, 7), dtype=dtype)
    images, references, masks = (x.cuda() for x in tensors)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        for shared in (references, references[:1]):
            assert_as_accurate("cuda", images, shared, masks, upsampler.to("cuda"), out)
    torch.cuda.synchronize()


@pytest.mark.parametrize("sizes", [{"batch": 0}, {"steps": 0}, {"channels": 0}])
def test_perturb_of_nothing(sizes):
    images, references, masks, upsampler = random_scene(**sizes)
    for backend in (*other_backends(images, references, masks, upsampler), "reference"):
        inputs = [x.detach().requires_grad_() for x in (images, references, masks)]
        deleted, inserted = kernels.perturb(*inputs, upsampler, backend=backend)
        assert deleted.shape == inserted.shape == (*masks.shape[:2], *images.shape[1:])
        for grad, value in zip(torch.autograd.grad((deleted + inserted).sum(), inputs), inputs, strict=True):
            assert torch.equal(grad, torch.zeros_like(value))


def operator_arguments(scene, dtype=torch.float32):
    """A scene as the arguments of torch.ops.aha.perturb, up to mean and std."""
    images, references, masks, (rows, cols) = scene
    taps = [t for axis in (rows, cols) for t in (axis.cell, axis.weight.to(dtype))]
    return images.to(dtype), references.to(dtype), masks.to(dtype), *taps, rows.size, cols.size


@needs_native
def test_perturb_opcheck(scene):
    forward, backward = torch.ops.aha.perturb.default, torch.ops.aha.perturb_backward.default
    images, references, masks, *rest = operator_arguments(scene, torch.float64)
    inputs = [x.requires_grad_() for x in (images, references, masks)]
    mean, std = MEAN.double(), STD.double()
    torch.library.opcheck(forward, (*inputs, *rest, mean, std, None))
    plain = operator_arguments(scene)
    torch.library.opcheck(forward, (*plain, None, None, torch.bfloat16))
    grads = torch.rand(2, 2, 5, 3, 12, 10).unbind()
    for need_images in (False, True):
        torch.library.opcheck(backward, (*grads, *plain, STD, need_images))


@needs_native
@pytest.mark.parametrize(("axis", "cell"), [(3, -1), (3, 3), (5, -1), (5, 4), (5, 2**40)])
def test_perturb_refuses_a_cell_outside_of_the_grid(scene, axis, cell):
    arguments = list(operator_arguments(scene))
    arguments[axis] = arguments[axis].clone()
    arguments[axis][-1, -1] = cell
    grads = torch.rand(2, 2, 5, 3, 12, 10).unbind()
    with pytest.raises(RuntimeError, match=r"cell has a cell outside of 0"):
        torch.ops.aha.perturb(*arguments, None, None, None)
    with pytest.raises(RuntimeError, match=r"cell has a cell outside of 0"):
        torch.ops.aha.perturb_backward(*grads, *arguments, None, False)


@needs_native
@pytest.mark.parametrize(
    ("place", "change", "message"),
    [
        (1, lambda t: t.double(), "must have the type"),
        (2, lambda t: t.double(), "masks must be Float"),
        (2, lambda t: t[..., :-1], "masks must be"),
        (2, lambda t: t[0], "masks must be"),
        (3, lambda t: t.int(), "row must be Long"),
        (4, lambda t: t[:-1], "row_cell and row_weight must both be"),
        (5, lambda t: t[:-1], "col_cell and col_weight must both be"),
        (7, lambda _: 0, "the grid has 0 x 4 cells"),
        (9, lambda _: MEAN[:2], r"must be \(C,\) with C = 3"),
        (11, lambda _: torch.int32, "use float32, float64, bfloat16 or float16"),
    ],
)
def test_perturb_operator_refuses_what_does_not_fit_in_one_line(scene, place, change, message):
    arguments = [*operator_arguments(scene), MEAN, STD, None]
    arguments[place] = change(arguments[place])
    with pytest.raises(RuntimeError, match=message) as error:
        torch.ops.aha.perturb(*arguments)
    assert "\n" not in str(error.value)


@needs_native
@pytest.mark.parametrize("need_images", [False, True])
def test_perturb_repeats_bit_for_bit_over_thread_counts(need_images):
    arguments = operator_arguments(random_scene(batch=3, height=64, width=64, cells=(9, 8)))
    grads = torch.rand(2, 3, 5, 3, 64, 64).unbind()
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 1):
            torch.set_num_threads(threads)
            forward = torch.ops.aha.perturb(*arguments, MEAN, STD, None)
            results.append((*forward, *torch.ops.aha.perturb_backward(*grads, *arguments, STD, need_images)))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@needs_native
def test_perturb_compiles_without_a_graph_break(scene):
    images, references, masks, upsampler = scene
    inputs = [x.requires_grad_() for x in (images, references, masks)]

    def loss(x, r, m):
        deleted, inserted = kernels.perturb(x, r, m, upsampler, MEAN, STD, backend="cpu")
        return (deleted.sin() * inserted).sum()

    expected = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(*inputs), inputs)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


@needs_native
def test_perturb_under_vmap(scene):
    images, references, masks, upsampler = scene
    several = torch.stack([images, images.flip(0), images**2], dim=1)  # [B, 3, C, H, W]

    def call(x):
        return kernels.perturb(x, references, masks, upsampler, MEAN, STD, backend="cpu")

    mapped = torch.vmap(call, in_dims=1)(several)
    one_by_one = [torch.stack(outputs) for outputs in zip(*(call(x) for x in several.unbind(1)), strict=True)]
    for got, expected in zip(mapped, one_by_one, strict=True):
        assert torch.equal(got, expected)


@needs_native
def test_perturb_says_that_it_has_no_second_derivative(scene):
    images, references, masks, upsampler = scene
    masks.requires_grad_()
    deleted, _ = kernels.perturb(images, references, masks, upsampler, backend="cpu")
    (grad,) = torch.autograd.grad((deleted**2).sum(), masks, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives call it with backend='reference'"):
        grad.sum().backward()


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
