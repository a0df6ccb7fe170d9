"""Weights of every kind the format knows: 2-D, stacked, flattened; whole blocks and ragged edges."""

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.support.blocks import Grid

block_shapes = st.sampled_from([(1, 1), (1, 4), (1, 16), (4, 1), (2, 3), (16, 16)])
sizes = st.integers(1, 37)


@st.composite
def grids(draw: st.DrawFn) -> Grid:
    leading = draw(st.lists(st.integers(1, 3), max_size=2))
    shape = (*leading, draw(sizes), draw(sizes))
    return Grid(shape, draw(block_shapes), flatten=draw(st.booleans()))


@st.composite
def grids_with_masks(draw: st.DrawFn) -> tuple[Grid, Tensor]:
    grid = draw(grids())
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    mask = torch.rand(grid.num_blocks, generator=generator) < draw(st.floats(0.05, 1.0))
    mask[draw(st.integers(0, grid.num_blocks - 1))] = True
    return grid, mask
