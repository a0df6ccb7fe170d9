"""N is density times blocks, rounded half up, at least one; and read back, never echoed."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

import smet_compile as smet
from smet_compile.ops import find_sites
from tests.support.blocks import Grid, round_half_up


@given(
    st.integers(1, 40),
    st.integers(1, 40),
    st.sampled_from([(1, 1), (1, 16), (4, 4)]),
    st.floats(0.001, 0.999),
)
def test_counts(rows: int, cols: int, block_shape: tuple[int, int], density: float) -> None:
    grid = Grid((rows, cols), block_shape)
    expected = max(1, round_half_up(density * grid.num_blocks))
    assume(expected < grid.num_blocks)
    model = nn.Sequential(nn.Linear(cols, rows))
    smet.sparsify(model, density=density, block_shape=block_shape)
    site = find_sites(model)["0.weight"]
    assert int(site.compact.mask().sum()) == site.num_active == expected
    assert site.values.shape[0] == expected
    assert site.density == expected / grid.num_blocks
    row = smet.report(model).sites[0]
    assert (row.num_blocks, row.num_active, row.density) == (
        grid.num_blocks,
        expected,
        expected / grid.num_blocks,
    )


@pytest.mark.parametrize(("density", "expected"), [(0.25, 3), (0.05, 1), (0.01, 1), (0.15, 2), (0.35, 4), (0.55, 6)])
def test_half_goes_up_and_one_is_the_least(density: float, expected: int) -> None:
    model = nn.Sequential(nn.Linear(5, 2))
    smet.sparsify(model, density=density)
    assert smet.report(model).sites[0].num_active == expected
