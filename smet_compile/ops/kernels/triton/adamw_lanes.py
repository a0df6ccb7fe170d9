"""Updates of up to LANES entries, each in a lane of its own: consecutive ones, or the active ones of a group."""

from __future__ import annotations

import triton
import triton.language as tl

from smet_compile.ops.kernels.triton import adamw_columns as at
from smet_compile.ops.kernels.triton.adamw_access import grid_of, rates_at, scalars, scale_pointers, tensors
from smet_compile.ops.kernels.triton.adamw_columns import LANES, pointer
from smet_compile.ops.kernels.triton.adamw_rounding import is_finite
from smet_compile.ops.kernels.triton.adamw_step import (
    dense_position,
    load_moments,
    magnitudes,
    next_moments,
    store_step,
)


@triton.jit
def _live(grad, mask, lane, size, num_skipped, SINGLE: tl.constexpr):
    """Of the lanes in ``mask``, those of blocks (of ``size`` entries) whose gradient is finite; counts the others."""
    broken = (mask & ~is_finite(grad)).to(tl.int32)
    count = tl.sum(broken)
    if count > 0:
        if not SINGLE:
            count = 0
            for block in range(0, tl.max(tl.where(mask, lane, 0)) // size + 1):
                mine = lane // size == block
                any_broken = tl.max(tl.where(mine, broken, 0))
                broken = tl.where(mine, any_broken, broken)
                count += any_broken
        tl.atomic_add(num_skipped, count.to(tl.int64))
    return mask & (broken == 0)


@triton.jit
def _update_lanes(
    row, rates, first, lane, mask, position, size, group, DTYPES: tl.constexpr, GENERATION: tl.constexpr,
    STOCHASTIC: tl.constexpr, SINGLE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Entries ``first + lane``, of blocks of ``size`` entries, all in one group. SINGLE: that is 1."""
    CODED: tl.constexpr = DTYPES[2] == tl.uint8
    values, grad_pointer, exp_avg, exp_avg_sq = tensors(row, first, DTYPES, ALIGNED)
    betas, decay, keys = scalars(row)
    scales = 0.0, 0.0
    if CODED:
        pointers = scale_pointers(row, group)
        scales = tl.load(pointers[0]), tl.load(pointers[1])
    generations = pointer(row, at.GENERATION, GENERATION)
    has_ages = tl.load(row + at.GENERATION) != 0
    block = lane
    if SINGLE:
        generations += first
        if ALIGNED:
            generations = tl.multiple_of(generations, 16)
    else:
        generations += first // size
        block = lane // size
    grad = tl.load(grad_pointer + lane, mask=mask, other=0.0).to(tl.float32)
    moments = load_moments(exp_avg, exp_avg_sq, lane, mask, scales)
    weight = tl.load(values + lane, mask=mask, other=0.0).to(tl.float32)
    rate = rates_at(row, rates, tl.load(generations + block, mask=mask & has_ages, other=0).to(tl.int32))
    live = _live(grad, mask, lane, size, pointer(row, at.NUM_SKIPPED, tl.int64), SINGLE)
    moments = next_moments(moments, grad, live, betas)
    if CODED:
        some = tl.max(live.to(tl.int32)) > 0
        mask = mask & some
        size_m, size_v = magnitudes(moments)
        scales = tl.max(size_m), tl.max(size_v)
        tl.store(pointers[0], scales[0], mask=some)
        tl.store(pointers[1], scales[1], mask=some)
    store_step(
        values, exp_avg, exp_avg_sq, lane, mask, live, weight, moments, rate, decay, scales, keys, position,
        STOCHASTIC,
    )  # fmt: skip


@triton.jit
def update_range(
    row, rates, first, count, group, DTYPES: tl.constexpr, INDEX: tl.constexpr, GENERATION: tl.constexpr,
    STOCHASTIC: tl.constexpr, SINGLE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """``count`` consecutive entries: of a plain parameter or of single weights (SINGLE), or of whole small blocks."""
    if ALIGNED:
        count = count // 16 * 16
    lane = tl.arange(0, LANES)
    mask = lane < count
    size = tl.load(row + at.BLOCK_SIZE).to(tl.int32)
    position = first + lane
    if STOCHASTIC and not SINGLE:
        blocks = pointer(row, at.POSITIONS, INDEX) + first // size
        block = tl.load(blocks + lane // size, mask=mask, other=0)
        position = dense_position(block, lane % size, grid_of(row, INDEX))
    _update_lanes(row, rates, first, lane, mask, position, size, group, DTYPES, GENERATION, STOCHASTIC, SINGLE, ALIGNED)


@triton.jit
def update_group_of_weights(
    row, rates, group, DTYPES: tl.constexpr, INDEX: tl.constexpr, GENERATION: tl.constexpr, STOCHASTIC: tl.constexpr
):
    """The active ones among LANES dense weights, each in the lane of its dense position."""
    first = tl.load(pointer(row, at.GROUP_STARTS, INDEX) + group).to(tl.int64)
    dense = tl.arange(0, LANES)
    position = group.to(tl.int64) * LANES + dense
    inside = position < tl.load(row + at.NUM_BLOCKS)
    byte = tl.load(pointer(row, at.TOPOLOGY, tl.uint8) + position // 8, mask=inside, other=0).to(tl.int32)
    bit = (byte >> (dense & 7)) & 1
    lane = tl.cumsum(bit, 0) - bit
    _update_lanes(row, rates, first, lane, bit == 1, position, 1, group, DTYPES, GENERATION, STOCHASTIC, True, False)
