"""The coarse grid: averages of the grid's cells, where it can be cut into three by three."""

import pytest
import torch
from torch import nn

from featurize.encoder import Output
from featurize.images.grid import GridEncoder
from featurize.images.preprocessing import Whole


class Cells(nn.Module):
    """The first channel's average over `rows` by `columns` cells."""

    def __init__(self, rows, columns):
        super().__init__()
        self.shape = (rows, columns)

    def forward(self, images):
        grid = nn.functional.adaptive_avg_pool2d(images[:, :1], self.shape).flatten(2).mT
        return grid, grid.mean(1)


def encoder(rows, columns):
    plain = Whole(36, mean=(0.0,) * 3, std=(1.0,) * 3)
    return GridEncoder("cells", "", Cells(rows, columns), plain, precision="float32", device="cpu")


def test_coarse_cells_are_means_of_the_grid():
    made = encoder(6, 6)
    assert made.card.outputs == (Output("grid", (36, 1)), Output("pooled", (1,)), Output("coarse", (9, 1)))
    batch = torch.randint(0, 256, (2, 3, 36, 36), dtype=torch.uint8)
    answer = made.encode(batch)
    blocks = answer["grid"][1, :, 0].reshape(6, 6)
    by_hand = [
        blocks[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean() for row in range(3) for column in range(3)
    ]
    torch.testing.assert_close(answer["coarse"][1, :, 0], torch.stack(by_hand))


@pytest.mark.parametrize(("rows", "columns", "width"), [(2, 2, 36), (3, 4, 36), (2, 8, 72)])
def test_small_and_oblong_grids_have_no_coarse_one(rows, columns, width):
    answer = encoder(rows, columns).encode(torch.zeros(1, 3, 36, width, dtype=torch.uint8))
    assert list(answer) == ["grid", "pooled"]
