"""Draws are exact in number, distinct, free, and even where they are to be."""

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smet_compile.format import Layout, sample_evenly, sample_positions

SIDES = st.integers(1, 9)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def grids(draw: st.DrawFn) -> tuple[Layout, torch.Tensor, torch.Tensor, int]:
    """Draws a layout, the active blocks, the taken ones (at least those), and how many to draw."""
    stack, rows, cols = draw(st.integers(1, 3)), draw(SIDES), draw(SIDES)
    layout = Layout.of((stack, 4 * rows, 4 * cols - 1), (4, 4))
    bits = st.lists(st.booleans(), min_size=layout.num_blocks, max_size=layout.num_blocks)
    active = torch.tensor(draw(bits))
    taken = active | torch.tensor(draw(bits))
    return layout, active, taken, draw(st.integers(0, int((~taken).sum())))


@given(grids(), st.integers(0, 99))
def test_exact_distinct_and_free(grid: tuple[Layout, torch.Tensor, torch.Tensor, int], seed: int) -> None:
    layout, active, taken, count = grid
    drawn = sample_evenly(active, taken, layout, count, generator(seed))
    assert drawn.unique().numel() == drawn.numel() == count
    assert not taken[drawn].any()
    assert torch.equal(drawn, sample_evenly(active, taken, layout, count, generator(seed)))


@given(grids(), st.integers(0, 99))
def test_emptiest_rows_are_filled_first(grid: tuple[Layout, torch.Tensor, torch.Tensor, int], seed: int) -> None:
    layout, active, taken, count = grid
    shape = (-1, layout.block_cols)
    after = active.clone()
    after[sample_evenly(active, taken, layout, count, generator(seed))] = True
    before_rows, after_rows = active.view(shape).sum(1), after.view(shape).sum(1)
    full = (after | taken).view(shape).all(1)
    got = after_rows > before_rows
    if got.any() and not full.all():
        assert after_rows[got].max() <= after_rows[~full].min() + 1


@given(st.integers(1, 3), SIDES, SIDES, st.data())
def test_an_empty_grid_fills_evenly(stack: int, rows: int, cols: int, data: st.DataObject) -> None:
    layout = Layout.of((stack, 4 * rows, 4 * cols), (4, 4))
    count = data.draw(st.integers(0, layout.num_blocks))
    empty = torch.zeros(layout.num_blocks, dtype=torch.bool)
    drawn = empty.clone()
    drawn[sample_evenly(empty, empty, layout, count, generator(data.draw(st.integers(0, 99))))] = True
    drawn_SMK = drawn.view(stack, rows, cols)
    rows_held, cols_held = drawn_SMK.sum(2), drawn_SMK.sum(1)
    assert rows_held.max() - rows_held.min() <= 1
    assert (cols_held.amax(1) - cols_held.amin(1) <= 1).all()


def test_every_block_has_its_turn() -> None:
    """Over many seeds each block is drawn as often as any other, within five standard deviations."""
    layout, tries = Layout.of((16, 24), (4, 4)), 2000
    empty = torch.zeros(layout.num_blocks, dtype=torch.bool)
    times = torch.zeros(layout.num_blocks)
    for seed in range(tries):
        times[sample_evenly(empty, empty, layout, 6, generator(seed))] += 1
    expected = tries * 6 / layout.num_blocks
    assert (times - expected).abs().max() < 5 * (expected * (1 - 6 / layout.num_blocks)) ** 0.5


@pytest.mark.parametrize(("free", "count"), [(50, 40), (1000, 3)])
def test_uniform_draws(free: int, count: int) -> None:
    taken = torch.zeros(2 * free, dtype=torch.bool)
    taken[::2] = True
    drawn = sample_positions(taken, count, generator(0))
    assert drawn.unique().numel() == count and not taken[drawn].any()


def test_a_large_grid_takes_no_time() -> None:
    """A 7B model's largest weight in tiles of 16 takes less than a second, since there are hundreds of weights."""
    layout = Layout.of((11008, 4096), (16, 16))
    empty = torch.zeros(layout.num_blocks, dtype=torch.bool)
    start = time.process_time()
    assert sample_evenly(empty, empty, layout, layout.num_blocks // 4, generator(0)).numel() == layout.num_blocks // 4
    assert time.process_time() - start < 1
