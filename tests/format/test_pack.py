import torch
from hypothesis import given
from torch import Tensor

from smet_compile.format import Layout, pack, unpack
from tests.format.strategies import grids_with_masks
from tests.support.blocks import Grid
from tests.support.snapshots import same_bits


def layout_of(grid: Grid) -> Layout:
    return Layout.of(grid.shape, grid.block_shape, flatten=grid.flatten)


@given(grids_with_masks())
def test_pack_then_unpack_is_the_masked_weight(case: tuple[Grid, Tensor]) -> None:
    grid, mask = case
    dense = torch.randn(grid.shape)
    values = pack(dense, mask, layout_of(grid))
    assert same_bits(values, grid.gather(dense, mask))
    back = unpack(values, mask, layout_of(grid))
    assert same_bits(back, torch.where(grid.spread(mask), dense, torch.zeros(())))


@given(grids_with_masks())
def test_unpack_then_pack_is_the_identity(case: tuple[Grid, Tensor]) -> None:
    grid, mask = case
    values = grid.gather(torch.randn(grid.shape), mask)
    assert same_bits(pack(unpack(values, mask, layout_of(grid)), mask, layout_of(grid)), values)


@given(grids_with_masks())
def test_shapes(case: tuple[Grid, Tensor]) -> None:
    grid, mask = case
    values = pack(torch.ones(grid.shape), mask, layout_of(grid))
    block = () if grid.block_shape == (1, 1) else grid.block_shape
    assert values.shape == (int(mask.sum()), *block)
    assert unpack(values, mask, layout_of(grid)).shape == grid.shape


@given(grids_with_masks())
def test_what_hangs_over_the_edge_is_dropped_by_unpack_and_zero_in_pack(case: tuple[Grid, Tensor]) -> None:
    grid, mask = case
    inside = grid.gather(torch.ones(grid.shape), mask)
    values = pack(torch.full(grid.shape, torch.nan), mask, layout_of(grid))
    assert bool((values[inside == 0] == 0).all())
    noisy = torch.where(inside == 1, 1.0, torch.nan)
    assert not bool(unpack(noisy, mask, layout_of(grid)).isnan().any())


@given(grids_with_masks())
def test_unpack_and_pack_are_adjoint(case: tuple[Grid, Tensor]) -> None:
    """The autograd of unpack is pack: <unpack(v), d> = <v, pack(d)>."""
    grid, mask = case
    values = grid.gather(torch.randn(grid.shape, dtype=torch.float64), mask)
    dense = torch.randn(grid.shape, dtype=torch.float64)
    left = (unpack(values, mask, layout_of(grid)) * dense).sum()
    right = (values * pack(dense, mask, layout_of(grid))).sum()
    torch.testing.assert_close(left, right, atol=1e-10, rtol=1e-10)
