"""The blocks of a line (a block row, or a block column), as the steps of a sum along it need them."""

# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _one_block(positions, by_column, first_block, num_blocks, place, block_rows, block_cols, TRANSPOSED: tl.constexpr):
    """Of the block at ``place`` in a line: its row of ``values``, and its own block column (block row of a column)."""
    exists = place < num_blocks
    block = first_block + tl.where(exists, place, 0)
    if not TRANSPOSED:
        block = tl.load(by_column + block, mask=exists, other=0)
    position = tl.load(positions + block, mask=exists, other=0)
    across = position % block_cols if TRANSPOSED else position // block_cols % block_rows
    return block, across


@triton.jit
def blocks_of_step(
    positions,
    by_column,
    first_block,
    num_blocks,
    start,
    block_rows,
    block_cols,
    PADDED_I: tl.constexpr,
    BLOCK_I: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """``_one_block`` of a step: scalars where it takes a part of one, else (BLOCK_I,)."""
    place = start // PADDED_I
    block, across = _one_block(positions, by_column, first_block, num_blocks, place, block_rows, block_cols, TRANSPOSED)
    if PADDED_I < BLOCK_I:
        number_k = tl.arange(0, BLOCK_I) // PADDED_I
        for number in tl.static_range(1, BLOCK_I // PADDED_I):
            other, other_across = _one_block(
                positions, by_column, first_block, num_blocks, place + number, block_rows, block_cols, TRANSPOSED
            )
            block = tl.where(number_k >= number, other, block)
            across = tl.where(number_k >= number, other_across, across)
    return block, across
