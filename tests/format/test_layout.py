import pytest
from hypothesis import given

from smet_compile.format import Layout
from tests.format.strategies import grids
from tests.support.blocks import Grid


@given(grids())
def test_counts(grid: Grid) -> None:
    layout = Layout.of(grid.shape, grid.block_shape, flatten=grid.flatten)
    assert tuple(layout.shape) == grid.shape
    assert (layout.num_matrices, layout.rows, layout.cols) == grid.matrix
    assert (layout.num_matrices, layout.block_rows, layout.block_cols) == grid.counts
    assert layout.num_blocks == grid.num_blocks


def test_by_hand() -> None:
    layout = Layout.of((37, 50), (16, 16))
    assert (layout.block_rows, layout.block_cols, layout.num_blocks) == (3, 4, 12)
    stacked = Layout.of((2, 3, 10, 20), (1, 16))
    assert (stacked.num_matrices, stacked.rows, stacked.cols, stacked.num_blocks) == (6, 10, 20, 120)
    convolution = Layout.of((8, 3, 5, 5), (1, 1), flatten=True)
    assert (convolution.num_matrices, convolution.rows, convolution.cols) == (1, 8, 75)


def test_a_layout_is_a_static_value() -> None:
    assert Layout.of((4, 6), (2, 2)) == Layout.of((4, 6), (2, 2))
    assert hash(Layout.of((4, 6), (2, 2))) == hash(Layout.of((4, 6), (2, 2)))
    with pytest.raises(AttributeError):
        Layout.of((4, 6), (2, 2)).shape = (1, 1)  # type: ignore[misc]
