"""The update: one launch for all parameters of the same dtypes, a program for each piece of one of them."""

from __future__ import annotations

import triton
import triton.language as tl

from smet_compile.ops.kernels.triton import adamw_columns as at
from smet_compile.ops.kernels.triton.adamw_block import update_block
from smet_compile.ops.kernels.triton.adamw_columns import pointer
from smet_compile.ops.kernels.triton.adamw_lanes import update_group_of_weights, update_range


@triton.jit
def update(
    table,
    rates,
    work,
    DTYPES: tl.constexpr,
    INDEX: tl.constexpr,
    GENERATION: tl.constexpr,
    KINDS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """One piece of one parameter.

    Args:
        table: a row for each parameter. rates: fp32, its step sizes and bias corrections.
        work: (programs, 2) int32, the parameter and the number of the piece.
        DTYPES: of values, gradients and moments. INDEX, GENERATION: of the lists. KINDS: of pieces that there are.
    """
    program = tl.program_id(0).to(tl.int64)
    row = table + tl.load(work + 2 * program) * at.NUM_COLUMNS
    piece = tl.load(work + 2 * program + 1)
    kind = tl.load(row + at.KIND)
    aligned = tl.load(row + at.ALIGNED) != 0
    if KINDS[at.BLOCK] and kind == at.BLOCK:
        if aligned and tl.load(row + at.BLOCK_SIZE) % 16 == 0:
            update_block(row, rates, piece, DTYPES, INDEX, GENERATION, STOCHASTIC, True)
        else:
            update_block(row, rates, piece, DTYPES, INDEX, GENERATION, STOCHASTIC, False)
    elif KINDS[at.GROUP_OF_WEIGHTS] and kind == at.GROUP_OF_WEIGHTS:
        update_group_of_weights(row, rates, piece, DTYPES, INDEX, GENERATION, STOCHASTIC)
    else:
        length = tl.load(row + at.ENTRIES_AT_ONCE)
        first = piece.to(tl.int64) * length
        end = tl.minimum(first + length, tl.load(row + at.NUMEL))
        if KINDS[at.GROUP_OF_RUNS] and kind == at.GROUP_OF_RUNS:
            starts = pointer(row, at.GROUP_STARTS, INDEX) + piece
            first = tl.load(starts).to(tl.int64) * tl.load(row + at.BLOCK_SIZE)
            end = tl.load(starts + 1).to(tl.int64) * tl.load(row + at.BLOCK_SIZE)
        count = (end - first).to(tl.int32)
        aligned = aligned and (first % 16 == 0 and count % 16 == 0)
        if KINDS[at.ENTRIES] and kind == at.ENTRIES:
            if aligned:
                update_range(row, rates, first, count, piece, DTYPES, INDEX, GENERATION, STOCHASTIC, True, True)
            else:
                update_range(row, rates, first, count, piece, DTYPES, INDEX, GENERATION, STOCHASTIC, True, False)
        elif KINDS[at.BLOCKS] or KINDS[at.GROUP_OF_RUNS]:
            if aligned:
                update_range(row, rates, first, count, piece, DTYPES, INDEX, GENERATION, STOCHASTIC, False, True)
            else:
                update_range(row, rates, first, count, piece, DTYPES, INDEX, GENERATION, STOCHASTIC, False, False)
