"""The update: one launch for all parameters of the same dtypes, a program for each piece of at most LANES entries.

A piece is a range of entries, a group of dense positions, or a block, however large. Tensors within a program have
one element for each of its lanes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from smet_compile.ops.kernels.triton import adamw_columns as at
from smet_compile.ops.kernels.triton.adamw_columns import LANES, fp32, pointer
from smet_compile.ops.kernels.triton.adamw_rounding import is_finite
from smet_compile.ops.kernels.triton.adamw_step import (
    dense_position,
    load_moments,
    magnitudes,
    next_moments,
    noise_keys,
    store_step,
)

_SCAN = tl.constexpr(4 * LANES.value)
"""Lanes that look for a gradient that is not finite."""


@triton.jit
def _at(row, COLUMN: tl.constexpr, DTYPE: tl.constexpr, first, ALIGNED: tl.constexpr):
    """Pointer to entry ``first`` of a tensor; ALIGNED to 16 bytes."""
    here = pointer(row, COLUMN, DTYPE) + first
    if ALIGNED:
        here = tl.multiple_of(here, 16)
    return here


@triton.jit
def tensors(row, first, DTYPES: tl.constexpr, ALIGNED: tl.constexpr):
    values = _at(row, at.VALUES, DTYPES[0], first, ALIGNED)
    grad = _at(row, at.GRAD, DTYPES[1], first, ALIGNED)
    exp_avg = _at(row, at.EXP_AVG, DTYPES[2], first, ALIGNED)
    exp_avg_sq = _at(row, at.EXP_AVG_SQ, DTYPES[2], first, ALIGNED)
    return values, grad, exp_avg, exp_avg_sq


@triton.jit
def scalars(row):
    betas = fp32(row, at.REST1), fp32(row, at.BETA2), fp32(row, at.REST2)
    decay = fp32(row, at.EPS), fp32(row, at.WEIGHT_DECAY)
    keys = noise_keys(tl.load(row + at.NOISE_SEED), tl.load(pointer(row, at.STEP, tl.int64)))
    return betas, decay, keys


@triton.jit
def grid_of(row, DTYPE: tl.constexpr):
    """What ``dense_position`` wants to know, in the integers of the list of positions."""
    matrix = tl.load(row + at.ROWS), tl.load(row + at.COLS).to(DTYPE)
    blocks = tl.load(row + at.BLOCK_ROWS).to(DTYPE), tl.load(row + at.BLOCK_COLS).to(DTYPE)
    block = tl.load(row + at.BLOCK_HEIGHT).to(tl.int32), tl.load(row + at.BLOCK_WIDTH).to(tl.int32)
    return matrix + blocks + block


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
def _rates(row, rates, number):
    """Step size and bias corrections of generations."""
    num_generations = tl.load(row + at.NUM_GENERATIONS).to(tl.int32)
    rates += tl.load(row + at.FIRST_RATE)
    rate, bias1 = tl.load(rates + number), tl.load(rates + num_generations + number)
    return rate, bias1, tl.load(rates + 2 * num_generations + number)


@triton.jit
def _scale_pointers(row, group):
    scales = pointer(row, at.SCALES, tl.float32) + group
    return scales, scales + tl.load(row + at.NUM_GROUPS)


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
        pointers = _scale_pointers(row, group)
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
    rate = _rates(row, rates, tl.load(generations + block, mask=mask & has_ages, other=0).to(tl.int32))
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
def _update_range(
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
def _update_group_of_weights(
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


@triton.jit
def _all_finite(grad_pointer, size):
    """Whether the gradient of a block is; it is read from memory here, and from the cache afterwards."""
    broken = tl.zeros((_SCAN,), tl.int32)
    for start in range(0, size, _SCAN):
        lane = start + tl.arange(0, _SCAN)
        grad = tl.load(grad_pointer + lane, mask=lane < size, other=0.0).to(tl.float32)
        broken |= (~is_finite(grad)).to(tl.int32)
    return tl.max(broken) == 0


@triton.jit
def _update_block(
    row,
    rates,
    block,
    DTYPES: tl.constexpr,
    INDEX: tl.constexpr,
    GENERATION: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """A block, LANES entries at a time; its moments are computed once for their scales, and again for their codes."""
    CODED: tl.constexpr = DTYPES[2] == tl.uint8
    size = tl.load(row + at.BLOCK_SIZE).to(tl.int32)
    if ALIGNED:
        size = size // 16 * 16
    values, grad_pointer, exp_avg, exp_avg_sq = tensors(row, block.to(tl.int64) * size, DTYPES, ALIGNED)
    if not _all_finite(grad_pointer, size):
        tl.atomic_add(pointer(row, at.NUM_SKIPPED, tl.int64), 1)
    else:
        betas, decay, keys = scalars(row)
        block_position = tl.load(pointer(row, at.POSITIONS, INDEX) + block)
        rate = _rates(row, rates, tl.load(pointer(row, at.GENERATION, GENERATION) + block).to(tl.int32))
        old_scales = 0.0, 0.0
        new_scales = 0.0, 0.0
        if CODED:
            pointers = _scale_pointers(row, block_position)
            old_scales = tl.load(pointers[0]), tl.load(pointers[1])
            largest_m = tl.zeros((LANES,), tl.float32)
            largest_v = tl.zeros((LANES,), tl.float32)
            for start in range(0, size, LANES):
                lane = start + tl.arange(0, LANES)
                mask = lane < size
                grad = tl.load(grad_pointer + lane, mask=mask, other=0.0).to(tl.float32)
                moments = load_moments(exp_avg, exp_avg_sq, lane, mask, old_scales)
                size_m, size_v = magnitudes(next_moments(moments, grad, mask, betas))
                largest_m = tl.maximum(largest_m, size_m)
                largest_v = tl.maximum(largest_v, size_v)
            new_scales = tl.max(largest_m), tl.max(largest_v)
            tl.store(pointers[0], new_scales[0])
            tl.store(pointers[1], new_scales[1])
        for start in range(0, size, LANES):
            lane = start + tl.arange(0, LANES)
            mask = lane < size
            grad = tl.load(grad_pointer + lane, mask=mask, other=0.0).to(tl.float32)
            moments = load_moments(exp_avg, exp_avg_sq, lane, mask, old_scales)
            weight = tl.load(values + lane, mask=mask, other=0.0).to(tl.float32)
            moments = next_moments(moments, grad, mask, betas)
            position = lane.to(tl.int64)
            if STOCHASTIC:
                position = dense_position(block_position, lane, grid_of(row, INDEX))
            store_step(
                values, exp_avg, exp_avg_sq, lane, mask, mask, weight, moments, rate, decay, new_scales, keys,
                position, STOCHASTIC,
            )  # fmt: skip


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
            _update_block(row, rates, piece, DTYPES, INDEX, GENERATION, STOCHASTIC, True)
        else:
            _update_block(row, rates, piece, DTYPES, INDEX, GENERATION, STOCHASTIC, False)
    elif KINDS[at.GROUP_OF_WEIGHTS] and kind == at.GROUP_OF_WEIGHTS:
        _update_group_of_weights(row, rates, piece, DTYPES, INDEX, GENERATION, STOCHASTIC)
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
                _update_range(row, rates, first, count, piece, DTYPES, INDEX, GENERATION, STOCHASTIC, True, True)
            else:
                _update_range(row, rates, first, count, piece, DTYPES, INDEX, GENERATION, STOCHASTIC, True, False)
        elif KINDS[at.BLOCKS] or KINDS[at.GROUP_OF_RUNS]:
            if aligned:
                _update_range(row, rates, first, count, piece, DTYPES, INDEX, GENERATION, STOCHASTIC, False, True)
            else:
                _update_range(row, rates, first, count, piece, DTYPES, INDEX, GENERATION, STOCHASTIC, False, False)
