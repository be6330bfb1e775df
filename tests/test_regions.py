"""Grids: pooling and upsampling share one map from pixels to cells."""

import pytest
import torch
import torch.nn.functional as F

from aha import references, regions


@pytest.mark.parametrize("offset", [(0.0, 0.0), (0.5, -0.5), (0.13, 0.41)])
@pytest.mark.parametrize("cells", [1, 5, (3, 7), (16, 12)])
def test_pooling_is_the_mean_over_each_cell(cells, offset):
    made = regions.grid(16, 12, cells, offset)
    maps = torch.rand(2, 1, 16, 12, dtype=torch.float64)
    index = made.cell_index()
    assert index.unique().tolist() == list(range(made.count))
    pooled = made.pool(maps)
    for cell in range(made.count):
        torch.testing.assert_close(pooled[:, cell], maps[:, 0, index == cell].mean(dim=1))


def test_even_grid_is_average_pooling():
    maps = torch.rand(2, 1, 28, 28)
    torch.testing.assert_close(regions.grid(28, 28, 7).pool(maps), F.avg_pool2d(maps, 4).flatten(1))


def test_nearest_upsampling_inverts_pooling():
    made = regions.grid(20, 30, (4, 5), (0.2, 0.3))
    rows, cols = made.upsampler(sigma=0)
    cells = torch.rand(4, 5)
    up = rows.dense() @ cells @ cols.dense().T
    assert torch.equal(up, cells.flatten()[made.cell_index()])
    torch.testing.assert_close(made.pool(up[None, None])[0], cells.flatten())


def test_gaussian_upsampling_is_nearest_then_blur():
    made = regions.grid(32, 32, 4, (0.1, 0.4))
    rows, cols = made.upsampler(sigma=1.0, kernel=7)
    cells = torch.rand(4, 4)
    expected = references.blur(cells.flatten()[made.cell_index()][None, None], 7, 1.0)[0, 0]
    torch.testing.assert_close(rows.dense() @ cells @ cols.dense().T, expected)
    assert rows.weight.shape[1] <= 3  # banded: cells of 8 px meet at most two neighbours


def test_one_pixel_per_cell_pools_nothing_and_blurs_pixels():
    made = regions.grid(20, 30, 20)
    maps = torch.rand(1, 1, 20, 30)
    assert torch.equal(made.pool(maps), maps.flatten(1))
    rows, cols = made.upsampler()
    torch.testing.assert_close(rows.dense() @ maps[0, 0] @ cols.dense().T, references.blur(maps, 7, 1.0)[0, 0])
    assert rows.weight.shape[1] == 7
    # a shift would empty a cell: it is left out
    assert torch.equal(regions.grid(20, 30, 20, (0.4, -0.2)).cell_index(), made.cell_index())


def test_square_cells_on_wide_images():
    made = regions.grid(100, 200, 10)
    assert (made.rows, made.cols) == (10, 20)


def test_draw_is_a_function_of_the_generator():
    made = [regions.draw(64, 64, (4, 16), torch.Generator().manual_seed(5)) for _ in range(2)]
    assert torch.equal(made[0].cell_index(), made[1].cell_index())
    sizes = {regions.draw(64, 64, (4, 6), torch.Generator().manual_seed(i)).rows for i in range(40)}
    assert sizes == {4, 5, 6}


def test_bad_grids():
    with pytest.raises(ValueError, match="does not fit"):
        regions.grid(8, 8, 9)
    with pytest.raises(ValueError, match="half a cell"):
        regions.grid(8, 8, 4, (0.6, 0.0))
