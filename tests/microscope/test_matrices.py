"""Active blocks of a stack of matrices pass on what the dense 0/1 matrices do."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smet_compile.format import Layout, unpack
from smet_compile.microscope.live_paths import ActiveMatrix


@st.composite
def matrices(draw: st.DrawFn) -> tuple[ActiveMatrix, torch.Tensor]:
    """Draws a random topology, and its weights as 0/1: (S, R, C) float64."""
    stack, rows, cols = (draw(st.integers(1, most)) for most in (3, 9, 9))
    layout = Layout.of((stack, rows, cols), (draw(st.integers(1, 4)), draw(st.integers(1, 4))))
    mask = torch.tensor(draw(st.lists(st.booleans(), min_size=layout.num_blocks, max_size=layout.num_blocks)))
    positions = mask.nonzero().squeeze(1)
    ones = torch.ones(layout.values_shape(positions.numel()), dtype=torch.float64)
    return ActiveMatrix(layout, positions), unpack(ones, mask, layout)


def random_mask(size: int, seed: int) -> torch.Tensor:
    return torch.rand(size, generator=torch.Generator().manual_seed(seed)) < 0.6


@settings(max_examples=50, deadline=None)
@given(matrices(), st.integers(0, 99))
def test_sums_over_rows_and_columns(made: tuple[ActiveMatrix, torch.Tensor], seed: int) -> None:
    matrix, dense = made
    stack, rows, cols = dense.shape
    of_cols = torch.arange(stack * cols, dtype=torch.float64) + seed
    of_rows = torch.arange(stack * rows, dtype=torch.float64) + seed
    assert torch.equal(matrix.to_rows(of_cols), torch.einsum("src,sc->sr", dense, of_cols.view(stack, cols)).flatten())
    assert torch.equal(matrix.to_cols(of_rows), torch.einsum("src,sr->sc", dense, of_rows.view(stack, rows)).flatten())


@settings(max_examples=50, deadline=None)
@given(matrices(), st.integers(1, 3), st.integers(0, 99))
def test_active_weights_in_any_of_some_rows_and_columns(
    made: tuple[ActiveMatrix, torch.Tensor], num_pairs: int, seed: int
) -> None:
    matrix, dense = made
    stack, rows, cols = dense.shape
    pairs = [(random_mask(stack * rows, seed + i), random_mask(stack * cols, seed + 100 + i)) for i in range(num_pairs)]
    inside = [row.view(stack, rows, 1) & col.view(stack, 1, cols) for row, col in pairs]
    assert matrix.count(*pairs) == int((dense * torch.stack(inside).any(0)).sum())
    assert matrix.num_active_weights == int(dense.sum())


def test_every_weight_active() -> None:
    whole = ActiveMatrix(Layout.of((2, 3, 4), (1, 1)))
    of_cols = torch.tensor([1.0, 2, 3, 4, 10, 20, 30, 40])
    assert whole.to_rows(of_cols).tolist() == [10] * 3 + [100] * 3
    assert whole.to_cols(torch.tensor([1.0, 2, 3, 10, 20, 30])).tolist() == [6] * 4 + [60] * 4
