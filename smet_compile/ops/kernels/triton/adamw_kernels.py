"""Defines the two kernels of "triton_adamw": ``prepare`` counts the step, ``update`` moves the weights.

A program of ``update`` takes a piece of one parameter: one block, however large; up to LANES consecutive entries; or
the active ones among LANES dense weights.
"""

from __future__ import annotations

import triton
import triton.language as tl

from smet_compile.ops.kernels.triton import adamw_step as at
from smet_compile.ops.kernels.triton.adamw_step import (
    LANES,
    dense_position,
    entries_from,
    fp64,
    grid_of,
    is_finite,
    load_moments,
    magnitudes,
    next_moments,
    pointer,
    rates_at,
    scalars,
    scale_pointers,
    store_step,
    tensors,
)

_SCAN = tl.constexpr(4 * LANES.value)
"""Entries that are checked at a time for a gradient that is not finite."""


@triton.jit
def _rates_of(age, bias_age, born, row, lr):
    """Returns step size and bias corrections at an age, in fp32. Blocks born at step 0 are the initial ones."""
    warmup_steps = tl.where(born == 0, tl.load(row + at.INITIAL_WARMUP_STEPS), tl.load(row + at.WARMUP_STEPS))
    warm = tl.where(warmup_steps > 0, tl.minimum(age / tl.maximum(warmup_steps, 1).to(tl.float64), 1.0), 1.0)
    bias1 = 1.0 - tl.exp(bias_age * fp64(row, at.LOG_BETA1))
    bias2 = 1.0 - tl.exp(bias_age * fp64(row, at.LOG_BETA2))
    rate = lr * fp64(row, at.DENSITY_RATE) * warm
    return rate.to(tl.float32), bias1.to(tl.float32), bias2.to(tl.float32)


@triton.jit
def prepare(table, step_table, rates, GENERATIONS: tl.constexpr):
    """Raises each parameter's step, and fills its ``rates``: one program for each parameter."""
    row = table + tl.program_id(0) * at.NUM_COLUMNS
    step_row = step_table + tl.program_id(0) * at.NUM_STEP_COLUMNS
    step_pointer = pointer(row, at.STEP, tl.int64)
    step = tl.load(step_pointer) + 1
    lr = fp64(step_row, at.LR)
    if tl.load(step_row + at.LR_IS_ADDRESS) != 0:
        lr = tl.load(pointer(step_row, at.LR, tl.float64))
    rates += tl.load(row + at.FIRST_RATE)
    num_generations = tl.load(row + at.NUM_GENERATIONS)
    has_births = tl.load(row + at.BIRTHS) != 0
    births = pointer(row, at.BIRTHS, tl.int64)
    shared_step = tl.load(row + at.SHARED_STEP) != 0
    for first in range(0, num_generations, GENERATIONS):
        number = first + tl.arange(0, GENERATIONS)
        here = number < num_generations
        born = tl.load(births + number, mask=here & has_births, other=0)
        age = tl.maximum(step - born, 1).to(tl.float64)
        rate, bias1, bias2 = _rates_of(age, tl.where(shared_step, step.to(tl.float64), age), born, row, lr)
        tl.store(rates + number, rate, mask=here)
        tl.store(rates + num_generations + number, bias1, mask=here)
        tl.store(rates + 2 * num_generations + number, bias2, mask=here)
    tl.store(step_pointer, step)


@triton.jit
def _all_finite(grad_pointer, size):
    """Tells whether a block's gradient is finite; it is read from memory here, and from the cache afterwards."""
    broken = tl.zeros((_SCAN,), tl.int32)
    for start in range(0, size, _SCAN):
        lane = start + tl.arange(0, _SCAN)
        grad = tl.load(grad_pointer + lane, mask=lane < size, other=0.0).to(tl.float32)
        broken |= (~is_finite(grad)).to(tl.int32)
    return tl.max(broken) == 0


@triton.jit
def _update_block(
    row,
    grad_address,
    rates,
    block,
    DTYPES: tl.constexpr,
    INDEX: tl.constexpr,
    GENERATION: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Updates a block, however large, LANES entries at a time.

    Its moments are computed once for their scales, and again for their codes.
    """
    CODED: tl.constexpr = DTYPES[2] == tl.uint8
    size = tl.load(row + at.BLOCK_SIZE).to(tl.int32)
    if ALIGNED:
        size = size // 16 * 16
    first = block.to(tl.int64) * size
    values, exp_avg, exp_avg_sq = tensors(row, first, DTYPES, ALIGNED)
    grad_pointer = entries_from(grad_address, first, DTYPES[1], ALIGNED)
    if not _all_finite(grad_pointer, size):
        tl.atomic_add(pointer(row, at.NUM_SKIPPED, tl.int64), 1)
    else:
        betas, decay, keys = scalars(row)
        block_position = tl.load(pointer(row, at.POSITIONS, INDEX) + block)
        rate = rates_at(row, rates, tl.load(pointer(row, at.GENERATION, GENERATION) + block).to(tl.int32))
        old_scales = 0.0, 0.0
        new_scales = 0.0, 0.0
        if CODED:
            pointers = scale_pointers(row, block_position)
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
def _live(grad, mask, lane, size, num_skipped, SINGLE: tl.constexpr):
    """Finds the lanes in ``mask`` of blocks (of ``size`` entries) whose gradient is finite; counts the other blocks."""
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
    row, grad_address, rates, first, lane, mask, position, size, group, DTYPES: tl.constexpr, GENERATION: tl.constexpr,
    STOCHASTIC: tl.constexpr, SINGLE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Updates the entries ``first + lane``, of blocks of ``size`` entries, all in one group. SINGLE: ``size`` is 1."""
    CODED: tl.constexpr = DTYPES[2] == tl.uint8
    values, exp_avg, exp_avg_sq = tensors(row, first, DTYPES, ALIGNED)
    grad_pointer = entries_from(grad_address, first, DTYPES[1], ALIGNED)
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
def _update_range(
    row, grad_address, rates, first, count, group, DTYPES: tl.constexpr, INDEX: tl.constexpr, GENERATION: tl.constexpr,
    STOCHASTIC: tl.constexpr, SINGLE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Updates ``count`` ≤ LANES consecutive entries: of a plain parameter, single weights (SINGLE), or whole blocks."""
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
    _update_lanes(
        row, grad_address, rates, first, lane, mask, position, size, group, DTYPES, GENERATION, STOCHASTIC, SINGLE,
        ALIGNED,
    )  # fmt: skip


@triton.jit
def _update_group_of_weights(
    row, grad_address, rates, group, DTYPES: tl.constexpr, INDEX: tl.constexpr, GENERATION: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Updates the active ones among LANES dense weights, each in the lane of its dense position."""
    first = tl.load(pointer(row, at.GROUP_STARTS, INDEX) + group).to(tl.int64)
    dense = tl.arange(0, LANES)
    position = group.to(tl.int64) * LANES + dense
    inside = position < tl.load(row + at.NUM_BLOCKS)
    byte = tl.load(pointer(row, at.TOPOLOGY, tl.uint8) + position // 8, mask=inside, other=0).to(tl.int32)
    bit = (byte >> (dense & 7)) & 1
    lane = tl.cumsum(bit, 0) - bit
    _update_lanes(
        row, grad_address, rates, first, lane, bit == 1, position, 1, group, DTYPES, GENERATION, STOCHASTIC, True,
        False,
    )  # fmt: skip


@triton.jit
def update(
    table,
    step_table,
    rates,
    work,
    DTYPES: tl.constexpr,
    INDEX: tl.constexpr,
    GENERATION: tl.constexpr,
    KINDS: tl.constexpr,
    STOCHASTIC: tl.constexpr,
):
    """Updates one piece of one parameter.

    Args:
        table: a ``Row`` for each parameter. step_table: a ``StepRow``. rates: fp32, step sizes and bias corrections.
        work: (programs, 2) int32, the parameter and the number of the piece.
        DTYPES: dtypes of values, gradients and moments. INDEX, GENERATION: dtypes of the lists. KINDS: whether there
            are pieces of each kind.
    """
    program = tl.program_id(0).to(tl.int64)
    parameter = tl.load(work + 2 * program)
    row = table + parameter * at.NUM_COLUMNS
    grad = tl.load(step_table + parameter * at.NUM_STEP_COLUMNS + at.GRAD)
    piece = tl.load(work + 2 * program + 1)
    kind = tl.load(row + at.KIND)
    aligned = (tl.load(row + at.ALIGNED) != 0) & (grad % 16 == 0)
    if KINDS[at.BLOCK] and kind == at.BLOCK:
        if aligned and tl.load(row + at.BLOCK_SIZE) % 16 == 0:
            _update_block(row, grad, rates, piece, DTYPES, INDEX, GENERATION, STOCHASTIC, True)
        else:
            _update_block(row, grad, rates, piece, DTYPES, INDEX, GENERATION, STOCHASTIC, False)
    elif KINDS[at.GROUP_OF_WEIGHTS] and kind == at.GROUP_OF_WEIGHTS:
        _update_group_of_weights(row, grad, rates, piece, DTYPES, INDEX, GENERATION, STOCHASTIC)
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
                _update_range(row, grad, rates, first, count, piece, DTYPES, INDEX, GENERATION, STOCHASTIC, True, True)
            else:
                _update_range(row, grad, rates, first, count, piece, DTYPES, INDEX, GENERATION, STOCHASTIC, True, False)
        elif KINDS[at.BLOCKS] or KINDS[at.GROUP_OF_RUNS]:
            if aligned:
                _update_range(row, grad, rates, first, count, piece, DTYPES, INDEX, GENERATION, STOCHASTIC, False, True)
            else:
                _update_range(
                    row, grad, rates, first, count, piece, DTYPES, INDEX, GENERATION, STOCHASTIC, False, False
                )
